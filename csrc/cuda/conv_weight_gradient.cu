// dfilter of a convolution: the product of dy (filters x pixels) and the gathered input (pixels x
// taps), the input made from x as the forward made it, so that nobody kept it.
//
// Layout: dy NPQK, x NHWC, dfilter (K, R, S, C), fp16 or bf16. Fused, against the normalisation and
// activation of x followed by a convolution's gradient: a write and a read of N·H·W·C elements.
//
// A block has 64 filters x 64 taps and a range of pixels, 32 of which are a stage of shared memory;
// both matrices lie there pixel by pixel and are turned by the matrix loads. Few filters and taps
// leave few such tiles, so the pixels are divided among as many blocks as fill a GPU; their partial
// results, fp32, are added in order by a second launch. No atomics. Registers: at most 128 a thread;
// table in csrc/README.md. Shared memory a block: 26.25 KB.
#include "conv.cuh"

namespace fastcnn::cuda {
namespace {

constexpr int kTileFilters = 64;
constexpr int kTileColumns = 64;  // taps
constexpr int kStepPixels = 32;
constexpr int kRowChunks = 64 / kChunk;                     // of a row of either matrix
constexpr int kRowStep = kConvThreads / kRowChunks;         // rows at once
constexpr int kRowsEach = kStepPixels / kRowStep;           // a thread
constexpr int kMatrixBytes = kStepPixels * 64 * 2;          // of a stage
// steps whose origins are kept: a step's are read when it starts, kStages - 1 steps ahead, and
// written over the ones of kStages steps before, which a barrier has left behind
constexpr int kOriginRing = kStages;
// steps of a block at least, over which its first loads and its partial result are spread
constexpr int64_t kLeastSteps = 16;

template <typename T>
struct WeightGradientArguments {
  Gather gather;
  const T* x;
  const T* dy;
  PendingInput pending;
  int filters;
  int steps;        // of a block
  bool wide_x, wide_dy;
  bool whole;       // one range: the result itself is written
  T* dfilter;
  float* partials;  // (ranges, K, R, S, C)
};

// rows of 64 values, 128 bytes, one a pixel; chunks change places as in conv.cuh
__device__ inline char* wide_chunk_at(char* matrix, int row, int chunk) {
  return matrix + row * 128 + (chunk ^ (row & 7)) * 16;
}

struct WeightGradientShared {
  char* start;

  static constexpr size_t kBytes =
      kStages * 2 * kMatrixBytes + kOriginRing * kStepPixels * sizeof(Origin) +
      3 * sizeof(float) * kTileColumns;

  __device__ char* dy(int step) const { return start + step % kStages * 2 * kMatrixBytes; }
  __device__ char* x(int step) const { return dy(step) + kMatrixBytes; }
  __device__ Origin* origins(int step) const {
    return reinterpret_cast<Origin*>(start + kStages * 2 * kMatrixBytes) +
           step % kOriginRing * kStepPixels;
  }
  // of a pending input, by column
  __device__ PendingVectors vectors() const {
    return {reinterpret_cast<float*>(start + kBytes) - 3 * kTileColumns, kTileColumns};
  }
};

// Fills the stages of a block's range of pixels.
template <typename T, bool kPending>
struct PixelLoader {
  const WeightGradientArguments<T>& args;
  const WeightGradientShared& shared;
  int first_pixel, first_filter, first_tap;
  int row, chunk;
  Tap tap;       // of this thread's chunk
  bool exists;   // that tap
  Packed<T, kChunk> fetched[kPending ? kRowsEach : 1];
  uint32_t inside = 0;

  __device__ PixelLoader(const WeightGradientArguments<T>& given,
                         const WeightGradientShared& memory)
      : args(given),
        shared(memory),
        first_pixel(static_cast<int>(blockIdx.x) * given.steps * kStepPixels),
        first_filter(static_cast<int>(blockIdx.y) * kTileFilters),
        first_tap(static_cast<int>(blockIdx.z) * kTileColumns),
        row(static_cast<int>(threadIdx.x) / kRowChunks),
        chunk(static_cast<int>(threadIdx.x) % kRowChunks),
        tap(given.gather, first_tap + chunk * kChunk),
        exists(tap.exists(given.gather)) {}

  __device__ void fill_vectors() const {
    const int column = static_cast<int>(threadIdx.x);
    if (column >= kTileColumns) return;
    const Tap at(args.gather, first_tap + column);
    if (at.exists(args.gather)) shared.vectors().set(column, args.pending, at.c);
  }

  // where the step's pixels see x, one thread a pixel
  __device__ void locate(int step) const {
    if (threadIdx.x < kStepPixels)
      shared.origins(step)[threadIdx.x] = origin_of(
          args.gather, first_pixel + step * kStepPixels + static_cast<int>(threadIdx.x));
  }

  // first half of a step, whose origins are known
  __device__ void start(int step) {
    args.wide_dy ? copy_dy(step) : single_dy(step);
    if (!args.wide_x) return single_x(step);
    inside = 0;
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      const int at = row + i * kRowStep;
      const int pixel = exists ? pixel_at(args.gather, shared.origins(step)[at], tap.r, tap.s) : -1;
      const T* source = args.x;
      if (pixel >= 0) source += static_cast<int64_t>(pixel) * args.gather.channels + tap.c;
      if constexpr (kPending) {
        if (pixel < 0) continue;
        inside |= 1u << i;
        fetched[i] = load<kChunk>(source);
      } else {
        copy_async(wide_chunk_at(shared.x(step), at, chunk), source, pixel >= 0);
      }
    }
  }

  // second half, of a pending input
  __device__ void finish(int step) {
    if (!kPending || !args.wide_x) return;
    const PendingChannels<kChunk> channels = shared.vectors().chunk(chunk * kChunk);
#pragma unroll
    for (int i = 0; i < (kPending ? kRowsEach : 0); ++i) {
      Packed<T, kChunk> made = {};  // padding is 0 behind the activation
      if (inside >> i & 1) made = channels.made(args.pending, fetched[i]);
      store_shared(wide_chunk_at(shared.x(step), row + i * kRowStep, chunk), made);
    }
  }

  __device__ void copy_dy(int step) const {
    const int filter = first_filter + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      const int at = row + i * kRowStep, pixel = first_pixel + step * kStepPixels + at;
      const bool valid = pixel < args.gather.pixels && filter < args.filters;
      const int64_t offset = static_cast<int64_t>(pixel) * args.filters + filter;
      copy_async(wide_chunk_at(shared.dy(step), at, chunk), args.dy + (valid ? offset : 0), valid);
    }
  }

  // One value at a time: a thread has one column and every other row. Without unrolling, so that
  // these rare paths take no registers from the others.
  __device__ void single_dy(int step) const {
    const int column = static_cast<int>(threadIdx.x) % 64, filter = first_filter + column;
#pragma unroll 4
    for (int at = static_cast<int>(threadIdx.x) / 64; at < kStepPixels; at += 2) {
      const int pixel = first_pixel + step * kStepPixels + at;
      T value = rounded<T>(0);
      if (pixel < args.gather.pixels && filter < args.filters)
        value = args.dy[static_cast<int64_t>(pixel) * args.filters + filter];
      *single_at(shared.dy(step), at, column) = value;
    }
  }

  __device__ void single_x(int step) const {
    const Gather& g = args.gather;
    const int column = static_cast<int>(threadIdx.x) % 64;
    const Tap at_tap(g, first_tap + column);
    const bool valid = at_tap.exists(g);
#pragma unroll 4
    for (int at = static_cast<int>(threadIdx.x) / 64; at < kStepPixels; at += 2) {
      const int pixel = valid ? pixel_at(g, shared.origins(step)[at], at_tap.r, at_tap.s) : -1;
      T value = rounded<T>(0);
      if (pixel >= 0) {
        value = args.x[static_cast<int64_t>(pixel) * g.channels + at_tap.c];
        if (kPending)
          value = rounded<T>(
              shared.vectors().single(column).made(args.pending, to_float(value), 0));
      }
      *single_at(shared.x(step), at, column) = value;
    }
  }

  __device__ T* single_at(char* matrix, int at_row, int column) const {
    return reinterpret_cast<T*>(wide_chunk_at(matrix, at_row, column / kChunk)) + column % kChunk;
  }
};

// What a warp has: 32 filters x 32 taps, four warps two by two
struct WarpGradient {
  float sums[2][4][4] = {};

  __device__ static int first_filter() { return static_cast<int>(threadIdx.x) / 64 * 32; }
  __device__ static int first_column() { return static_cast<int>(threadIdx.x) / 32 % 2 * 32; }

  template <typename T>
  __device__ void multiply(char* dy, char* x) {
#pragma unroll
    for (int k = 0; k < kStepPixels / 16; ++k) {
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_matrices<true>(a[i], [&](int lane) {
          const int pixel = 16 * k + lane % 8 + lane / 16 * 8;
          return wide_chunk_at(dy, pixel, first_filter() / 8 + 2 * i + lane / 8 % 2);
        });
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t both[4];
        load_matrices<true>(both, [&](int lane) {
          return wide_chunk_at(x, 16 * k + lane % 16, first_column() / 8 + j + lane / 16);
        });
        b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
      }
      warp_mma<T>(sums, a, b);
    }
  }

  // f(filter and column within the tile, value) of each sum
  template <typename F>
  __device__ void for_sums(F f) const {
    const int lane = lane_of();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v)
          f(first_filter() + 16 * i + v / 2 * 8 + lane / 4,
            first_column() + 8 * j + lane % 4 * 2 + v % 2, sums[i][j][v]);
  }
};

template <typename T, bool kPending>
__global__ void __launch_bounds__(kConvThreads, kConvResident)
    conv_weight_gradient_kernel(WeightGradientArguments<T> args) {
  const WeightGradientShared shared{reinterpret_cast<char*>(shared_memory())};
  PixelLoader<T, kPending> loader(args, shared);
  // of a range's steps, those with pixels
  const int left = args.gather.pixels - loader.first_pixel;
  const int steps = min(args.steps, (left + kStepPixels - 1) / kStepPixels);
  if (kPending) loader.fill_vectors();
  for (int step = 0; step < kStages; ++step) loader.locate(step);
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) {
      loader.start(step);
      loader.finish(step);
    }
    commit_copies();
  }
  WarpGradient products;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    const int next = step + kStages - 1;
    if (next < steps) loader.start(next);
    commit_copies();
    loader.locate(next + 1);  // read behind the next barrier
    products.template multiply<T>(shared.dy(step), shared.x(step));
    if (next < steps) loader.finish(next);
  }
  wait_copies<0>();
  const int taps = args.gather.taps;
  float* partials = args.partials + static_cast<int64_t>(blockIdx.x) * args.filters * taps;
  products.for_sums([&](int row, int column, float sum) {
    const int filter = loader.first_filter + row, tap = loader.first_tap + column;
    if (filter >= args.filters || tap >= taps) return;
    const int64_t at = static_cast<int64_t>(filter) * taps + tap;
    if (args.whole)
      args.dfilter[at] = rounded<T>(sum);
    else
      partials[at] = sum;
  });
}

// dfilter ← Σ of the ranges' partial results, in their order
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    conv_weight_gradient_sum_kernel(const float* partials, int ranges, int64_t count, T* dfilter) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kConvThreads + threadIdx.x;
  if (at >= count) return;
  float sum = 0;
#pragma unroll 8
  for (int range = 0; range < ranges; ++range) sum += partials[range * count + at];
  dfilter[at] = rounded<T>(sum);
}

// How the pixels are divided: steps of a range, and ranges.
struct Ranges {
  int64_t steps, count;
};

Ranges ranges_of(const ConvShape& shape) {
  const int64_t tiles = static_cast<int64_t>(blocks_for(shape.k, kTileFilters)) *
                        blocks_for(shape.taps(), kTileColumns);
  const int64_t steps = std::max<int64_t>(blocks_for(shape.pixels(), kStepPixels), 1);
  const int64_t wanted = std::max<int64_t>(kConvBlocks / tiles, 1);
  const int64_t each = std::max((steps + wanted - 1) / wanted, std::min(steps, kLeastSteps));
  return {each, (steps + each - 1) / each};
}

bool is_possible(const ConvWeightGradient& args) {
  const ConvShape& shape = args.shape;
  return is_countable(shape) && blocks_for(shape.taps(), kTileColumns) < 65536;
}

template <typename T>
WeightGradientArguments<T> arguments_of(const ConvWeightGradient& args, const Ranges& ranges) {
  const ConvShape& shape = args.shape;
  return {gather_of(shape, false),
          static_cast<const T*>(args.input.x),
          static_cast<const T*>(args.dy),
          PendingInput(args.input),
          static_cast<int>(shape.k),
          static_cast<int>(ranges.steps),
          shape.c % kChunk == 0 && aligned(args.input.x),
          shape.k % kChunk == 0 && aligned(args.dy),
          ranges.count == 1,
          static_cast<T*>(args.dfilter),
          static_cast<float*>(args.workspace)};
}

}  // namespace

int64_t conv_weight_gradient_workspace(const ConvShape& shape, Dtype) {
  const int64_t ranges = ranges_of(shape).count;
  return ranges == 1 ? 0 : ranges * shape.k * shape.taps() * static_cast<int64_t>(sizeof(float));
}

cudaError_t launch_conv_weight_gradient(const ConvWeightGradient& args, cudaStream_t stream) {
  if (!is_possible(args)) return cudaErrorInvalidValue;
  return dispatch_half(args.dtype, [&](auto number) {
    using T = decltype(number);
    const Ranges ranges = ranges_of(args.shape);
    const auto arguments = arguments_of<T>(args, ranges);
    const auto kernel = args.input.is_plain() ? conv_weight_gradient_kernel<T, false>
                                              : conv_weight_gradient_kernel<T, true>;
    const dim3 grid(static_cast<unsigned>(ranges.count), blocks_for(args.shape.k, kTileFilters),
                    blocks_for(args.shape.taps(), kTileColumns));
    const cudaError_t status = launch(kernel, grid, kConvThreads, WeightGradientShared::kBytes,
                                      stream, arguments);
    if (status != cudaSuccess || arguments.whole) return status;
    const int64_t count = args.shape.k * args.shape.taps();
    return launch(conv_weight_gradient_sum_kernel<T>, blocks_for(count, kConvThreads), kConvThreads,
                  0, stream, static_cast<const float*>(args.workspace),
                  static_cast<int>(ranges.count), count, arguments.dfilter);
  });
}

std::vector<Kernel> conv_weight_gradient_kernels() {
  std::vector<Kernel> kernels;
  const auto add = [&](auto number, const std::string& type) {
    using T = decltype(number);
    const std::string name = "conv_weight_gradient_kernel";
    for (const Kernel& kernel : {named<false>(name, type, conv_weight_gradient_kernel<T, false>),
                                 named<true>(name, type, conv_weight_gradient_kernel<T, true>)})
      kernels.push_back(kernel.taking(kConvThreads, WeightGradientShared::kBytes));
    kernels.push_back(
        named("conv_weight_gradient_sum_kernel<" + type + ">", conv_weight_gradient_sum_kernel<T>)
            .taking(kConvThreads, 0));
  };
  add(__half{}, "f16");
  add(__nv_bfloat16{}, "bf16");
  return kernels;
}

}  // namespace fastcnn::cuda
