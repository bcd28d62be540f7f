// y = post(pre(convolution + bias) · scale + shift + residual), with a 2 x 2 max-pool or the batch
// statistics of the result in the epilogue, and the layer before's normalisation and activation in
// the load of x.
//
// Layout: x NHWC, filters (K, R, S, C), y NPQK, fp16 or bf16; vectors fp32. Fused, against the
// convolution and the kernels that follow it (bn_stats, bn_act, bn_act_pool): in training with
// batch norm the statistics (a read of N·P·Q·K elements) and, with a pending input, the normalised
// tensor of the layer before (a write and a read); without batch norm and in inference the bias,
// activation and pool (a read and a write of N·P·Q·K). The sums are fp32 until y is rounded;
// winners of a pool are chosen before.
//
// Statistics are those of the rounded y, as bn_stats would find them: mean and squared deviations a
// block, merged over its tiles and over blocks by launch_bn_merge, in an order that the
// shape alone decides. Registers: at most 128 a thread, 168 with 64 filters where taps are not
// copied; table in csrc/README.md. Shared memory a block: 40 KB with 64 filters, 34 KB with 32, and
// 12 bytes a channel of a pending input: at most 47.5 of the 48 KB that need no opt-in.
#include "conv.cuh"
#include "moments.cuh"

namespace fastcnn::cuda {
namespace {

template <typename T>
struct ConvArguments {
  Operands<T> operands;
  const float* bias;
  const float* scale;
  const float* shift;
  const T* residual;
  float pre_slope, post_slope;
  T* y;
  uint8_t* code;
  Partials partials;  // data null: no statistics
  float stats_slope;
  bool wide;  // y, residual and code 16 bytes of y at a time
};

// of V filters
template <int V>
struct ResultVectors {
  float bias[V], scale[V], shift[V];

  template <typename T>
  __device__ ResultVectors(const ConvArguments<T>& args, int filter) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      bias[i] = args.bias ? args.bias[filter + i] : 0.f;
      scale[i] = args.scale ? args.scale[filter + i] : 1.f;
      shift[i] = args.shift ? args.shift[filter + i] : 0.f;
    }
  }

  // before the activation
  __device__ float z(float product, int i, float pre_slope) const {
    return fmaf(activate(product + bias[i], pre_slope), scale[i], shift[i]);
  }
};

template <typename T, int kTileFilters>
struct ResultEpilogue {
  static constexpr int kPitch = ConvShared<kTileFilters>::kPitch;
  static constexpr int kGroups = kConvThreads / kTileFilters;  // threads that share a column

  const ConvArguments<T>& args;
  float4& kept;  // of this thread's column: count, shift, offset, squares

  __device__ explicit ResultEpilogue(const ConvArguments<T>& given)
      : args(given),
        kept(ConvShared<kTileFilters>{reinterpret_cast<char*>(shared_memory())}.kept()) {
    kept = {0, 0, 0, 0};
  }

  __device__ Moments moments() const { return {kept.x, kept.y, kept.z, kept.w}; }

  __device__ void operator()(float* sums, int first, int first_filter) {
    if (args.operands.gather.windows) {
      args.wide ? pool<kChunk>(sums, first, first_filter) : pool<1>(sums, first, first_filter);
      return;
    }
    args.wide ? rows<kChunk>(sums, first, first_filter) : rows<1>(sums, first, first_filter);
    if (!args.partials.data) return;
    __syncthreads();
    add_statistics(sums, min(kTilePixels, args.operands.gather.pixels - first));
  }

  template <int V>
  __device__ void rows(float* sums, int first, int first_filter) {
    constexpr int kColumns = kTileFilters / V, kStep = kConvThreads / kColumns;
    const int thread = thread_anew();
    const int column = thread % kColumns * V, filter = first_filter + column;
    if (filter >= args.operands.count) return;
    const ResultVectors<V> vectors(args, filter);
    const int count = min(kTilePixels, args.operands.gather.pixels - first);
    for (int row = thread / kColumns; row < count; row += kStep) {
      float* sum = sums + row * kPitch + column;
      const int64_t at = static_cast<int64_t>(first + row) * args.operands.count + filter;
      Packed<T, V> residual = {};
      if (args.residual) residual = load<V>(args.residual + at);
      store_values<T, V>(args.y + at, [&](int i) {
        float z = vectors.z(sum[i], i, args.pre_slope);
        if (args.residual) z += residual[i];
        const float value = to_float(rounded<T>(activate(z, args.post_slope)));
        if (args.partials.data) sum[i] = activate(value, args.stats_slope);
        return value;
      });
    }
  }

  template <int V>
  __device__ void pool(const float* sums, int first, int first_filter) {
    constexpr int kColumns = kTileFilters / V, kStep = kConvThreads / kColumns;
    const int thread = thread_anew();
    const int column = thread % kColumns * V, filter = first_filter + column;
    if (filter >= args.operands.count) return;
    const ResultVectors<V> vectors(args, filter);
    const int count = min(kTilePixels, args.operands.gather.pixels - first) / 4;
    for (int window = thread / kColumns; window < count; window += kStep) {
      const float* sum = sums + 4 * window * kPitch + column;
      PackedCodes<V> codes = 0;
      const int64_t at = static_cast<int64_t>(first / 4 + window) * args.operands.count + filter;
      store_values<T, V>(args.y + at, [&](int i) {
        float best = -INFINITY;
        int code = kCodeNegative;  // the first wins if nothing exceeds -inf
#pragma unroll
        for (int place = 0; place < 4; ++place) {
          const float z = vectors.z(sum[place * kPitch + i], i, args.pre_slope);
          const float value = activate(z, args.post_slope);
          if (value > best || isnan(value)) {
            best = value;
            code = place | (is_negative(z, args.post_slope) ? kCodeNegative : 0);
          }
        }
        codes |= static_cast<PackedCodes<V>>(code) << (8 * i);
        return best;
      });
      if (args.code) *reinterpret_cast<PackedCodes<V>*>(args.code + at) = codes;
    }
  }

  // of a column of the tile: deviations from its first value, as in bn_stats.cu
  __device__ void add_statistics(const float* sums, int count) {
    constexpr int kRows = kTilePixels / kGroups;
    const int thread = thread_anew(), column = thread % kTileFilters;
    const int begin = thread / kTileFilters * kRows;
    const int rows = min(kRows, count - begin);
    if (rows <= 0) return;
    const float* value = sums + begin * kPitch + column;
    const float shift = isfinite(*value) ? *value : 0.f;
    float sum = 0, square = 0;
#pragma unroll 8
    for (int row = 0; row < rows; ++row) {
      const float deviation = value[row * kPitch] - shift;
      sum += deviation;
      square = fmaf(deviation, deviation, square);
    }
    const float n = static_cast<float>(rows), offset = sum / n;
    const float squares = fmaf(-offset, sum, square);
    const Moments both = merged(moments(), {n, shift, offset, squares < 0 ? 0.f : squares});
    kept = {both.count, both.shift, both.offset, both.squares};
  }

  // every thread of the block must come here
  __device__ void finish(int first_filter) {
    if (!args.partials.data) return;
    __syncthreads();
    const Moments all = moments();
    float values[4] = {all.shift, all.offset, all.squares, all.count};
    reduce_lanes(values, kTileFilters, kGroups, shared_memory(), MergeMoments<1>());
    const int column = static_cast<int>(threadIdx.x), filter = first_filter + column;
    if (column >= kTileFilters || filter >= args.operands.count) return;
    const int64_t at = blockIdx.x * args.partials.k + filter;
    args.partials.plane(0)[at] = values[0] + values[1];
    args.partials.plane(1)[at] = values[2];
    args.partials.plane(2)[at] = values[3];
  }
};

template <typename T, int kTileFilters, Taps kTaps>
__global__ void __launch_bounds__(kConvThreads, conv_resident(kTileFilters, kTaps))
    conv_bn_act_kernel(ConvArguments<T> args) {
  ResultEpilogue<T, kTileFilters> epilogue(args);
  conv_tiles<T, kTileFilters, kTaps>(args.operands, epilogue);
  epilogue.finish(static_cast<int>(blockIdx.y) * kTileFilters);
}

bool is_possible(const Conv& args) {
  const ConvShape& shape = args.shape;
  if (!is_countable(shape) || (args.pool && (args.residual || args.partials))) return false;
  return args.input.is_plain() || shape.c <= kPendingChannels;
}

template <typename T>
ConvArguments<T> arguments_of(const Conv& args, int64_t rows) {
  const ConvShape& shape = args.shape;
  const auto vector = [](const void* data) { return static_cast<const float*>(data); };
  const bool wide_rows =
      shape.k % kChunk == 0 && aligned(args.y, args.residual) &&
      reinterpret_cast<uintptr_t>(args.code) % kChunk == 0;
  return {{gather_of(shape, args.pool), static_cast<const T*>(args.input.x),
           static_cast<const T*>(args.filter), static_cast<int>(shape.k), !args.input.is_plain(),
           PendingInput(args.input)},
          vector(args.bias),
          vector(args.scale),
          vector(args.shift),
          static_cast<const T*>(args.residual),
          static_cast<float>(args.pre_slope),
          static_cast<float>(args.post_slope),
          static_cast<T*>(args.y),
          args.code,
          {static_cast<float*>(args.partials), rows, shape.k},
          static_cast<float>(args.stats_slope),
          wide_rows};
}

Taps taps_of(const Conv& args) {
  if (args.shape.c % kChunk || !aligned(args.input.x, args.filter)) return Taps::single;
  return args.input.is_plain() ? Taps::copied : Taps::pending;
}

// what a launch may ask for without cudaFuncAttributeMaxDynamicSharedMemorySize
constexpr size_t kSharedWithoutOptIn = 48 * 1024;
static_assert(ConvShared<64>::bytes(kPendingChannels) <= kSharedWithoutOptIn &&
                  ConvShared<32>::bytes(kPendingChannels) <= kSharedWithoutOptIn,
              "kPendingChannels: their vectors must fit beside the stages");

// f(filters of a block, taps)
template <typename F>
void for_all(F f) {
  for_variants<Taps::copied, Taps::pending, Taps::single>(f);
}

}  // namespace

int64_t conv_partial_rows(const ConvShape& shape) { return conv_grid(shape.pixels(), shape.k).x; }

cudaError_t launch_conv(const Conv& args, cudaStream_t stream) {
  if (!is_possible(args)) return cudaErrorInvalidValue;
  return dispatch_half(args.dtype, [&](auto number) {
    using T = decltype(number);
    const auto arguments = arguments_of<T>(args, conv_partial_rows(args.shape));
    const int pixels = arguments.operands.gather.pixels;
    if (pixels == 0) return cudaSuccess;
    const int pending = args.input.is_plain() ? 0 : static_cast<int>(args.shape.c);
    cudaError_t status = cudaSuccess;
    for_all([&](auto filters, auto taps) {
      if (filters.value != tile_filters(args.shape.k) || taps.value != taps_of(args)) return;
      status = launch(conv_bn_act_kernel<T, filters.value, taps.value>,
                      conv_grid(pixels, args.shape.k), kConvThreads,
                      ConvShared<filters.value>::bytes(pending), stream, arguments);
    });
    return status;
  });
}

std::vector<Kernel> conv_bn_act_kernels() {
  std::vector<Kernel> kernels;
  const auto add = [&](auto number, const std::string& type) {
    for_all([&](auto filters, auto taps) {
      const Kernel kernel = named<filters.value, static_cast<int>(taps.value)>(
          "conv_bn_act_kernel", type,
          conv_bn_act_kernel<decltype(number), filters.value, taps.value>);
      const int pending = taps.value == Taps::copied ? 0 : kPendingChannels;
      kernels.push_back(kernel.taking(kConvThreads, ConvShared<filters.value>::bytes(pending)));
    });
  };
  add(__half{}, "f16");
  add(__nv_bfloat16{}, "bf16");
  return kernels;
}

}  // namespace fastcnn::cuda
