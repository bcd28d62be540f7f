// The convolution's ops for torch: checks, allocation, workspace, registration. On the CPU there are
// kernels for 3x3 filters with stride 1 alone, under names of their own, which the ops of all shapes
// call (fastcnn/ops/conv_composites.py); fastcnn/ops/conv_library.py holds the schemas.
#include <algorithm>
#include <climits>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace {

using namespace fastcnn;
using Pads = std::vector<int64_t>;

constexpr int kPool = 2;  // window and stride of the only pool

// where an op runs: the same calls for both devices
struct Cpu {
  static int threads() { return static_cast<int>(torch::stable::get_num_threads()); }
  static int64_t partial_rows(const ConvShape&) { return 1; }
  static int64_t data_gradient_workspace(const ConvShape& shape, Dtype dtype) {
    return cpu::conv_data_gradient_workspace(shape, dtype, threads());
  }
  static int64_t weight_gradient_workspace(const ConvShape& shape, Dtype dtype) {
    return cpu::conv_weight_gradient_workspace(shape, dtype, threads());
  }
  static void check_dtype(const Tensor& x) {
    REQUIRE(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
            "x: expected float32 or float64 on the CPU, got another dtype; use torch.conv2d");
  }
  static void check_shape(const ConvShape& shape, const Pads& pads) {
    REQUIRE(shape.r == 3 && shape.s == 3 && shape.stride == 1 &&
                *std::max_element(pads.begin(), pads.end()) <= 2,
            "conv3x3: expected 3x3 filters, stride 1 and pads of 0 to 2, got ", shape.r, " x ",
            shape.s, ", ", shape.stride, " and ", text_of(pads));
    REQUIRE(shape.n && shape.h && shape.w && shape.c && shape.k,
            "conv3x3: expected an image of at least one pixel and channel");
  }
  static void check_room(const ConvInput&, const ConvShape&) {}
  static void run(const Conv& args, const Tensor& x) {
    Tensor workspace = bytes(x, cpu::conv_workspace(args.shape, args.dtype, threads()));
    cpu::conv(args, pointer(workspace), threads(), parallel);
  }
  static void run(const ConvDataGradient& args, const Tensor&) {
    cpu::conv_data_gradient(args, threads(), parallel);
  }
  static void run(const ConvWeightGradient& args, const Tensor&) {
    cpu::conv_weight_gradient(args, threads(), parallel);
  }
  static void run(const BnMerge& args, const Tensor& partials) {
    cpu::bn_merge(args, dtype_of(partials));
  }
};

#ifdef FASTCNN_CUDA
struct Cuda {
  static constexpr auto partial_rows = cuda::conv_partial_rows;
  static constexpr auto data_gradient_workspace = cuda::conv_data_gradient_workspace;
  static constexpr auto weight_gradient_workspace = cuda::conv_weight_gradient_workspace;

  static void check_dtype(const Tensor& x) {
    REQUIRE(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16,
            "x: expected float16 or bfloat16 on a GPU, got another dtype; use torch.conv2d");
  }
  // what the kernels count in 32 bits
  static void check_shape(const ConvShape& shape, const Pads&) {
    constexpr int64_t most = INT_MAX / 2 - 1;
    const int64_t input = shape.n * shape.h * shape.w, filters = shape.k * shape.taps();
    REQUIRE(input <= most && filters <= most, "conv: expected at most ", most, " pixels and ",
            most, " values of filters, got ", input, " and ", filters, "; use smaller batches");
  }
  // what the forward pass keeps in shared memory, a few values a channel
  static void check_room(const ConvInput& input, const ConvShape& shape) {
    REQUIRE(input.is_plain() || shape.c <= cuda::kPendingChannels, "x: expected at most ",
            cuda::kPendingChannels, " channels of a pending input, got ", shape.c);
  }
  static void run(const Conv& args, const Tensor& x) { enqueue(cuda::launch_conv, args, x); }
  static void run(const ConvDataGradient& args, const Tensor& x) {
    enqueue(cuda::launch_conv_data_gradient, args, x);
  }
  static void run(const ConvWeightGradient& args, const Tensor& x) {
    enqueue(cuda::launch_conv_weight_gradient, args, x);
  }
  static void run(const BnMerge& args, const Tensor& partials) {
    enqueue(cuda::launch_bn_merge, args, partials);
  }
};
#endif

void check_image(const Tensor& x, const Tensor& like, const char* name, const char* form) {
  REQUIRE(x.dim() == 4, name, ": expected ", form, ", got ", shape_of(x));
  REQUIRE(x.scalar_type() == like.scalar_type(), name, ": expected the dtype of x");
  REQUIRE(same_device(x, like), name, ": expected the device of x");
  check_layout(x, name);
}

template <class B>
void check_x(const Tensor& x) {
  B::check_dtype(x);
  check_image(x, x, "x", "(N, C, H, W)");
}

int small(int64_t number, const char* name) {
  REQUIRE(number >= 0 && number <= SHRT_MAX, name, ": expected 0 to ", SHRT_MAX, ", got ", number);
  return static_cast<int>(number);
}

// filters of k x r x s over x
template <class B>
ConvShape geometry_of(const Tensor& x, int64_t k, int64_t r, int64_t s, int64_t stride,
                      const Pads& pads) {
  REQUIRE(stride >= 1 && pads.size() == 4 && pads[0] >= 0 && pads[1] >= 0 && pads[2] >= 0 &&
              pads[3] >= 0,
          "conv: expected a stride >= 1 and four pads >= 0, got ", stride, " and ", text_of(pads));
  ConvShape shape{x.size(0), x.size(2), x.size(3), x.size(1), k};
  const int64_t height = shape.h + pads[0] + pads[1], width = shape.w + pads[2] + pads[3];
  REQUIRE(r >= 1 && s >= 1 && r <= height && s <= width, "filter: expected at most ", height,
          " x ", width, ", the padded image, got ", r, " x ", s);
  shape.r = small(r, "filter");
  shape.s = small(s, "filter");
  shape.stride = small(stride, "stride");
  shape.top = small(pads[0], "pads");
  shape.left = small(pads[2], "pads");
  shape.p = (height - r) / stride + 1;
  shape.q = (width - s) / stride + 1;
  B::check_shape(shape, pads);
  return shape;
}

template <class B>
ConvShape geometry_of(const Tensor& x, const Tensor& filter, int64_t stride, const Pads& pads) {
  check_x<B>(x);
  check_image(filter, x, "filter", "(K, C, R, S)");
  REQUIRE(filter.size(1) == x.size(1), "filter: expected ", x.size(1),
          " channels, as x has, got ", filter.size(1));
  return geometry_of<B>(x, filter.size(0), filter.size(2), filter.size(3), stride, pads);
}

std::vector<int64_t> result_sizes(const ConvShape& shape) {
  return {shape.n, shape.k, shape.p, shape.q};
}

std::vector<int64_t> pooled_sizes(const ConvShape& shape) {
  REQUIRE(shape.p >= kPool && shape.q >= kPool, "pool: expected a result of at least ", kPool,
          " x ", kPool, " pixels, got ", shape.p, " x ", shape.q);
  return {shape.n, shape.k, shape.p / kPool, shape.q / kPool};
}

const void* optional_vector(const Optional& t, int64_t length, const Tensor& x, const char* name) {
  return t ? vector_of(*t, length, x, name) : nullptr;
}

// what is pending of x
struct Block {
  const Optional &mean, &rstd, &weight, &bias;
  bool batch_stats;
  double pre_slope, post_slope;
};

ConvInput input_of(const Tensor& x, const Block& block) {
  const int64_t c = x.size(1);
  const Affine affine{optional_vector(block.mean, c, x, "in_mean"),
                      optional_vector(block.rstd, c, x, "in_rstd"),
                      optional_vector(block.weight, c, x, "in_weight"),
                      optional_vector(block.bias, c, x, "in_bias")};
  const bool norm = affine.mean && affine.rstd && affine.weight && affine.bias;
  REQUIRE(norm || !(affine.mean || affine.rstd || affine.weight),
          "in_mean, in_rstd, in_weight, in_bias: expected all of them, the bias alone or none");
  check_slope(block.pre_slope);
  check_slope(block.post_slope);
  REQUIRE(norm || block.pre_slope == 1, "in_pre_slope: expected 1 without in_mean, got ",
          block.pre_slope);
  REQUIRE(norm || !block.batch_stats, "in_batch_stats: expected false without in_mean");
  return {x.const_data_ptr(), affine, block.pre_slope, block.post_slope};
}

template <class B>
std::tuple<Tensor, Tensor> conv(const Tensor& x, const Tensor& filter, const Optional& bias,
                                const Optional& in_mean, const Optional& in_rstd,
                                const Optional& in_weight, const Optional& in_bias,
                                bool in_batch_stats, double in_pre_slope, double in_post_slope,
                                int64_t stride, Pads pads, std::optional<double> stats_slope,
                                bool own_data_gradient, bool own_weight_gradient) {
  const ConvShape shape = geometry_of<B>(x, filter, stride, pads);
  const int64_t rows = stats_slope ? B::partial_rows(shape) : 0;
  if (stats_slope) check_slope(*stats_slope);
  Conv args{dtype_of(x), shape};
  args.input = input_of(x, {in_mean, in_rstd, in_weight, in_bias, in_batch_stats, in_pre_slope,
                            in_post_slope});
  B::check_room(args.input, shape);
  args.filter = filter.const_data_ptr();
  args.bias = optional_vector(bias, shape.k, x, "bias");
  args.pre_slope = args.post_slope = 1;
  Tensor y = empty(x, result_sizes(shape), x.scalar_type());
  Tensor partials = empty(x, {3, rows, shape.k}, parameter_type(x));
  args.y = pointer(y);
  args.partials = stats_slope ? pointer(partials) : nullptr;
  args.stats_slope = stats_slope.value_or(1);
  B::run(args, x);
  return {y, partials};
}

template <class B>
std::tuple<Tensor, Tensor> conv_bias_act_pool(
    const Tensor& x, const Tensor& filter, const Optional& bias, const Optional& in_mean,
    const Optional& in_rstd, const Optional& in_weight, const Optional& in_bias,
    bool in_batch_stats, double in_pre_slope, double in_post_slope, double slope, int64_t stride,
    Pads pads, bool own_data_gradient, bool own_weight_gradient) {
  const ConvShape shape = geometry_of<B>(x, filter, stride, pads);
  check_slope(slope);
  Conv args{dtype_of(x), shape};
  args.input = input_of(x, {in_mean, in_rstd, in_weight, in_bias, in_batch_stats, in_pre_slope,
                            in_post_slope});
  B::check_room(args.input, shape);
  args.filter = filter.const_data_ptr();
  args.bias = optional_vector(bias, shape.k, x, "bias");
  args.pre_slope = 1;
  args.post_slope = slope;
  args.pool = true;
  const auto sizes = pooled_sizes(shape);
  Tensor y = empty(x, sizes, x.scalar_type()), code = empty(x, sizes, ScalarType::Byte);
  args.y = pointer(y);
  args.code = static_cast<uint8_t*>(pointer(code));
  args.stats_slope = 1;
  B::run(args, x);
  return {y, code};
}

template <class B>
Tensor conv_affine_act(const Tensor& x, const Tensor& filter, const Optional& bias,
                       const Optional& scale, const Optional& shift, const Optional& residual,
                       double pre_slope, double post_slope, int64_t stride, Pads pads, bool pool) {
  const ConvShape shape = geometry_of<B>(x, filter, stride, pads);
  check_slope(pre_slope);
  check_slope(post_slope);
  REQUIRE(!residual || !pool, "residual: expected none with a pool");
  Tensor y = empty(x, pool ? pooled_sizes(shape) : result_sizes(shape), x.scalar_type());
  if (residual) check_like(*residual, y, "residual");
  Conv args{dtype_of(x), shape};
  args.input = {x.const_data_ptr(), Affine{}, 1, 1};
  args.filter = filter.const_data_ptr();
  args.bias = optional_vector(bias, shape.k, x, "bias");
  args.scale = optional_vector(scale, shape.k, x, "scale");
  args.shift = optional_vector(shift, shape.k, x, "shift");
  args.residual = residual ? residual->const_data_ptr() : nullptr;
  args.pre_slope = pre_slope;
  args.post_slope = post_slope;
  args.pool = pool;
  args.y = pointer(y);
  args.stats_slope = 1;
  B::run(args, x);
  return y;
}

void check_gradient(const Tensor& dy, const Tensor& x, const ConvShape& shape) {
  check_image(dy, x, "dy", "(N, K, P, Q)");
  REQUIRE(dy.size(0) == shape.n && dy.size(1) == shape.k && dy.size(2) == shape.p &&
              dy.size(3) == shape.q,
          "dy: expected shape ", text_of(result_sizes(shape)), ", got ", shape_of(dy));
}

// dweight, dbias are empty where there is no such vector pending
template <class B>
std::tuple<Tensor, Tensor, Tensor> conv_data_gradient(
    const Tensor& dy, const Tensor& filter, const Tensor& x, const Optional& in_mean,
    const Optional& in_rstd, const Optional& in_weight, const Optional& in_bias,
    bool in_batch_stats, double in_pre_slope, double in_post_slope, int64_t stride, Pads pads) {
  const ConvShape shape = geometry_of<B>(x, filter, stride, pads);
  check_gradient(dy, x, shape);
  const ConvInput input = input_of(x, {in_mean, in_rstd, in_weight, in_bias, in_batch_stats,
                                       in_pre_slope, in_post_slope});
  const Dtype dtype = dtype_of(x);
  const std::vector<int64_t> channels{x.size(1)}, none{0};
  Tensor dx = empty_as(x);
  Tensor dweight = empty(x, in_weight ? channels : none, parameter_type(x));
  Tensor dbias = empty(x, in_bias ? channels : none, parameter_type(x));
  Tensor workspace = bytes(x, B::data_gradient_workspace(shape, dtype));
  B::run(ConvDataGradient{dtype, shape, input, in_batch_stats, filter.const_data_ptr(),
                           dy.const_data_ptr(), pointer(dx),
                           in_weight ? pointer(dweight) : nullptr,
                           in_bias ? pointer(dbias) : nullptr, pointer(workspace)},
          x);
  return {dx, dweight, dbias};
}

template <class B>
Tensor conv_weight_gradient(const Tensor& dy, const Tensor& x, const Optional& in_mean,
                            const Optional& in_rstd, const Optional& in_weight,
                            const Optional& in_bias, bool in_batch_stats, double in_pre_slope,
                            double in_post_slope, int64_t r, int64_t s, int64_t stride,
                            Pads pads) {
  check_x<B>(x);
  REQUIRE(dy.dim() == 4, "dy: expected (N, K, P, Q), got ", shape_of(dy));
  const ConvShape shape = geometry_of<B>(x, dy.size(1), r, s, stride, pads);
  check_gradient(dy, x, shape);
  const ConvInput input = input_of(x, {in_mean, in_rstd, in_weight, in_bias, in_batch_stats,
                                       in_pre_slope, in_post_slope});
  const Dtype dtype = dtype_of(x);
  Tensor dfilter = empty(x, {shape.k, shape.c, r, s}, x.scalar_type());
  Tensor workspace = bytes(x, B::weight_gradient_workspace(shape, dtype));
  B::run(ConvWeightGradient{dtype, shape, input, dy.const_data_ptr(), pointer(dfilter),
                             pointer(workspace)},
          x);
  return dfilter;
}

template <class B>
std::tuple<Tensor, Tensor> bn_stats_merge(const Tensor& partials, std::optional<int64_t> count,
                                          const Tensor& running_mean, const Tensor& running_var,
                                          double momentum, double eps) {
  REQUIRE(partials.dim() == 3 && partials.size(0) == 3 && partials.is_contiguous() &&
              partials.scalar_type() == parameter_type(partials),
          "partials: expected contiguous float32 (3, rows, K), got ", shape_of(partials));
  REQUIRE(!count || *count >= 0, "count: expected >= 0, got ", *count);
  const int64_t k = partials.size(2);
  vector_of(running_mean, k, partials, "running_mean");
  vector_of(running_var, k, partials, "running_var");
  Tensor mean = empty(partials, {k}, partials.scalar_type());
  Tensor rstd = empty(partials, {k}, partials.scalar_type());
  B::run(BnMerge{partials.size(1), k, count.value_or(-1), partials.const_data_ptr(), momentum, eps,
                  pointer(running_mean), pointer(running_var), pointer(mean), pointer(rstd)},
          partials);
  return {mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv<Cpu>));
  m.impl("conv3x3_bias_act_pool", TORCH_BOX(&conv_bias_act_pool<Cpu>));
  m.impl("conv3x3_affine_act", TORCH_BOX(&conv_affine_act<Cpu>));
  m.impl("conv3x3_data_gradient", TORCH_BOX(&conv_data_gradient<Cpu>));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&conv_weight_gradient<Cpu>));
  m.impl("bn_stats_merge", TORCH_BOX(&bn_stats_merge<Cpu>));
}
#ifdef FASTCNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) {
  m.impl("conv", TORCH_BOX(&conv<Cuda>));
  m.impl("conv_bias_act_pool", TORCH_BOX(&conv_bias_act_pool<Cuda>));
  m.impl("conv_affine_act", TORCH_BOX(&conv_affine_act<Cuda>));
  m.impl("conv_data_gradient", TORCH_BOX(&conv_data_gradient<Cuda>));
  m.impl("conv_weight_gradient", TORCH_BOX(&conv_weight_gradient<Cuda>));
  m.impl("bn_stats_merge", TORCH_BOX(&bn_stats_merge<Cuda>));
}
#endif
