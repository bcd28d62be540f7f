// dx of a convolution from dy, with the backward of what makes its pending input: the activation's
// mask and the two sums of batch norm's backward in the epilogue, while dz is still in registers.
//
// Layout: dy NPQK, filters (K, R, S, C), x, dx NHWC, fp16 or bf16; vectors fp32. dz, the transposed
// convolution of dy, is a convolution of dy with the filters turned round and their two channel
// dimensions exchanged (a small launch of its own, into the workspace). Fused, against that
// convolution and bn_act_backward: the pass that reduces (reads of dz and x, 2·N·H·W·C elements,
// for one of x here). With batch statistics g goes to memory and dx is made of it in place, once
// the sums are known; else dx leaves the epilogue.
//
// Sums: each thread of its rows, each block of its threads and tiles, then over blocks by
// bn_act_backward_finalise, in an order that the shape alone decides. No atomics. Registers: at most
// 128 a thread, 168 with 64 channels and single values; table in csrc/README.md. Shared memory a
// block: 40 KB with 64 channels, 34 KB with 32.
#include "backward.cuh"
#include "conv.cuh"

namespace fastcnn::cuda {
namespace {

template <typename T>
struct DataGradientArguments {
  Operands<T> operands;  // dy and the turned filters
  const T* x;            // null: dx is dz
  PendingInput input;
  bool batch_stats;
  T* dx;
  Partials partials;     // data null: no sums
  bool wide;             // x and dx 16 bytes at a time
};

template <typename T, int kTileFilters>
struct GradientEpilogue {
  static constexpr int kPitch = ConvShared<kTileFilters>::kPitch;

  const DataGradientArguments<T>& args;
  float sum = 0;  // thread: Σ g of a channel, then Σ g · (pre(x) - mean) of a channel

  __device__ explicit GradientEpilogue(const DataGradientArguments<T>& given) : args(given) {}

  __device__ void operator()(float* dz, int first, int first_channel) {
    args.wide ? rows<kChunk>(dz, first, first_channel) : rows<1>(dz, first, first_channel);
  }

  template <int V>
  __device__ void rows(float* dz, int first, int first_channel) {
    constexpr int kColumns = kTileFilters / V, kStep = kConvThreads / kColumns;
    const int thread = thread_anew(), lane = thread / kColumns;
    const int column = thread % kColumns * V;
    const int channel = first_channel + column;
    const bool exists = channel < args.operands.count;
    const int count = exists ? min(kTilePixels, args.operands.gather.pixels - first) : 0;
    float sums[2 * V] = {};
    float mean[V], scale[V], bias[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      mean[i] = exists && args.x ? args.input.mean(channel + i) : 0;
      scale[i] = exists && args.x ? args.input.scale(channel + i) : 1;
      bias[i] = exists && args.x ? args.input.bias(channel + i) : 0;
    }
    for (int row = lane; row < count; row += kStep) {
      const int64_t at = static_cast<int64_t>(first + row) * args.operands.count + channel;
      Packed<T, V> x = {};
      if (args.x) x = load<V>(args.x + at);
      store_values<T, V>(args.dx + at, [&](int i) {
        const float value = dz[row * kPitch + column + i];
        return args.x ? gradient_of(value, x[i], mean[i], scale[i], bias[i], sums[i], sums[V + i])
                      : value;
      });
    }
    if (args.partials.data) add_lanes<V>(dz, sums, lane, column);
  }

  // of one value; with batch statistics g alone, else dx
  __device__ float gradient_of(float dz, float x, float mean, float scale, float bias, float& sum_g,
                               float& sum_product) const {
    const PendingInput& input = args.input;
    const float z = normalise(x, input.pre_slope, mean, scale, bias);
    const bool negative = is_negative(z, input.post_slope);
    const float g = to_float(rounded<T>(gradient(negative, input.post_slope, dz)));
    sum_g += g;
    sum_product = fmaf(g, activate(x, input.pre_slope) - mean, sum_product);
    if (args.batch_stats) return g;
    return gradient(is_negative(x, input.pre_slope), input.pre_slope, g * scale);
  }

  // The lanes' sums of each column, added to this thread's. dz has been read and gives its place.
  template <int V>
  __device__ void add_lanes(float* shared, const float (&sums)[2 * V], int lane, int column) {
    constexpr int kWidth = 2 * kTileFilters, kLanes = kConvThreads / (kTileFilters / V);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < V; ++i) {
      shared[lane * kWidth + column + i] = sums[i];
      shared[lane * kWidth + kTileFilters + column + i] = sums[V + i];
    }
    __syncthreads();
    if (threadIdx.x >= kWidth) return;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) sum += shared[i * kWidth + threadIdx.x];
  }

  __device__ void finish(int first_channel) const {
    const int thread = thread_anew();
    const int channel = first_channel + thread % kTileFilters;
    if (!args.partials.data || thread >= 2 * kTileFilters || channel >= args.partials.k) return;
    args.partials.plane(thread / kTileFilters)[blockIdx.x * args.partials.k + channel] = sum;
  }
};

template <typename T, int kTileFilters, Taps kTaps>
__global__ void __launch_bounds__(kConvThreads, conv_resident(kTileFilters, kTaps))
    conv_data_gradient_kernel(DataGradientArguments<T> args) {
  GradientEpilogue<T, kTileFilters> epilogue(args);
  conv_tiles<T, kTileFilters, kTaps>(args.operands, epilogue);
  epilogue.finish(static_cast<int>(blockIdx.y) * kTileFilters);
}

// turned (C, R, S, K) ← filters (K, R, S, C) at R - 1 - r, S - 1 - s. A block turns 32 x 32 values
// of one place of the filter through shared memory, so that both sides go by rows.
constexpr int kTurn = 32;
constexpr int kTurnRows = 8;
constexpr size_t kTurnBytes = sizeof(float) * kTurn * (kTurn + 1);

template <typename T>
__global__ void __launch_bounds__(kTurn* kTurnRows)
    conv_turn_filters_kernel(const T* filters, T* turned, int filter_count, int places,
                             int channels) {
  float* shared = shared_memory();
  const int lane = static_cast<int>(threadIdx.x) % kTurn;
  const int row = static_cast<int>(threadIdx.x) / kTurn;
  const int place = static_cast<int>(blockIdx.x) % places;
  const int first_k = static_cast<int>(blockIdx.x) / places * kTurn;
  const int first_c = static_cast<int>(blockIdx.y) * kTurn;
  for (int i = row; i < kTurn; i += kTurnRows) {
    const int k = first_k + i, c = first_c + lane;
    if (k < filter_count && c < channels)
      shared[i * (kTurn + 1) + lane] =
          to_float(filters[(static_cast<int64_t>(k) * places + place) * channels + c]);
  }
  __syncthreads();
  for (int i = row; i < kTurn; i += kTurnRows) {
    const int c = first_c + i, k = first_k + lane;
    if (k < filter_count && c < channels)
      turned[(static_cast<int64_t>(c) * places + places - 1 - place) * filter_count + k] =
          rounded<T>(shared[lane * (kTurn + 1) + i]);
  }
}

template <typename T>
cudaError_t turn_filters(const ConvShape& shape, const void* filters, void* turned,
                         cudaStream_t stream) {
  const int places = shape.r * shape.s;
  const dim3 grid(blocks_for(shape.k, kTurn) * static_cast<unsigned>(places),
                  blocks_for(shape.c, kTurn));
  return launch(conv_turn_filters_kernel<T>, grid, kTurn * kTurnRows, kTurnBytes, stream,
                static_cast<const T*>(filters), static_cast<T*>(turned),
                static_cast<int>(shape.k), places, static_cast<int>(shape.c));
}

int64_t input_pixels(const ConvShape& shape) { return shape.n * shape.h * shape.w; }

int64_t turned_bytes(const ConvShape& shape) { return (2 * shape.k * shape.taps() + 15) / 16 * 16; }

// of the convolution of dy that gives dz
Gather transposed_gather(const ConvShape& shape) {
  return {static_cast<int>(shape.p),
          static_cast<int>(shape.q),
          static_cast<int>(shape.k),
          shape.r,
          shape.s,
          1,
          shape.stride,
          shape.r - 1 - shape.top,
          shape.s - 1 - shape.left,
          static_cast<int>(shape.h),
          static_cast<int>(shape.w),
          static_cast<int>(input_pixels(shape)),
          static_cast<int>(shape.r * shape.s * shape.k),
          false};
}

bool wants_sums(const ConvDataGradient& args) {
  return args.batch_stats || args.dweight || args.dbias;
}

bool is_possible(const ConvDataGradient& args) {
  if (!is_countable(args.shape)) return false;
  if (args.input.is_plain()) return !wants_sums(args);
  return (args.input.x || !input_pixels(args.shape)) &&
         (!args.batch_stats || (args.dweight && args.dbias));
}

template <typename T>
DataGradientArguments<T> arguments_of(const ConvDataGradient& args) {
  const ConvShape& shape = args.shape;
  const bool plain = args.input.is_plain();
  char* workspace = static_cast<char*>(args.workspace);
  auto* sums = reinterpret_cast<float*>(workspace + turned_bytes(shape));
  return {{transposed_gather(shape), static_cast<const T*>(args.dy),
           reinterpret_cast<const T*>(workspace), static_cast<int>(shape.c), false,
           plain_input()},
          plain ? nullptr : static_cast<const T*>(args.input.x),
          PendingInput(args.input),
          args.batch_stats,
          static_cast<T*>(args.dx),
          {wants_sums(args) ? sums : nullptr, conv_grid(input_pixels(shape), shape.c).x, shape.c},
          shape.c % kChunk == 0 && aligned(args.input.x, args.dx)};
}

Taps taps_of(const ConvDataGradient& args) {
  return args.shape.k % kChunk == 0 && aligned(args.dy) ? Taps::copied : Taps::single;
}

// f(channels of a block, taps)
template <typename F>
void for_all(F f) {
  for_variants<Taps::copied, Taps::single>(f);
}

template <typename T>
cudaError_t convolve(const ConvDataGradient& args, const DataGradientArguments<T>& arguments,
                     cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  for_all([&](auto channels, auto taps) {
    if (channels.value != tile_filters(args.shape.c) || taps.value != taps_of(args)) return;
    status = launch(conv_data_gradient_kernel<T, channels.value, taps.value>,
                    conv_grid(input_pixels(args.shape), args.shape.c), kConvThreads,
                    ConvShared<channels.value>::bytes(0), stream, arguments);
  });
  return status;
}

// g in dx becomes dx
cudaError_t apply(const ConvDataGradient& args, cudaStream_t stream) {
  const ConvShape& shape = args.shape;
  return launch_bn_act_backward(
      {args.dtype, Sizes{shape.n, shape.h, shape.w, shape.c}, args.dx, args.input.x, nullptr,
       args.input.affine, true, args.input.pre_slope, 1, args.dx, nullptr, args.dweight, args.dbias,
       args.workspace, Part::apply},
      stream);
}

}  // namespace

int64_t conv_data_gradient_workspace(const ConvShape& shape, Dtype) {
  const int64_t rows = conv_grid(input_pixels(shape), shape.c).x;
  return turned_bytes(shape) + 2 * sizeof(float) * rows * shape.c;
}

cudaError_t launch_conv_data_gradient(const ConvDataGradient& args, cudaStream_t stream) {
  if (!is_possible(args)) return cudaErrorInvalidValue;
  return dispatch_half(args.dtype, [&](auto number) {
    using T = decltype(number);
    const auto arguments = arguments_of<T>(args);
    cudaError_t status = cudaSuccess;
    if (input_pixels(args.shape) > 0) {
      status = turn_filters<T>(args.shape, args.filter, args.workspace, stream);
      if (status == cudaSuccess) status = convolve(args, arguments, stream);
    }
    if (status == cudaSuccess && (args.dweight || args.dbias))
      status = launch_backward_finalise(arguments.partials, args.input.affine, args.dweight,
                                        args.dbias, stream);
    return status == cudaSuccess && args.batch_stats ? apply(args, stream) : status;
  });
}

std::vector<Kernel> conv_data_gradient_kernels() {
  std::vector<Kernel> kernels;
  const auto add = [&](auto number, const std::string& type) {
    using T = decltype(number);
    kernels.push_back(named("conv_turn_filters_kernel<" + type + ">", conv_turn_filters_kernel<T>)
                          .taking(kTurn * kTurnRows, kTurnBytes));
    for_all([&](auto channels, auto taps) {
      const Kernel kernel = named<channels.value, static_cast<int>(taps.value)>(
          "conv_data_gradient_kernel", type,
          conv_data_gradient_kernel<T, channels.value, taps.value>);
      kernels.push_back(kernel.taking(kConvThreads, ConvShared<channels.value>::bytes(0)));
    });
  };
  add(__half{}, "f16");
  add(__nv_bfloat16{}, "bf16");
  return kernels;
}

}  // namespace fastcnn::cuda
