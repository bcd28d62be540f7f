// The ops that follow a convolution, for torch: checks, allocation, registration. What sees torch
// are the files bindings*, through its stable ABI; fastcnn/ops/norm_act.py holds the schemas.
#include <algorithm>
#include <climits>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace {

using namespace fastcnn;

// where an op runs: the same calls for both devices
struct Cpu {
  static constexpr auto stats_workspace = cpu::bn_stats_workspace;
  static constexpr auto backward_workspace = cpu::bn_act_backward_workspace;

  static void run(const BnStats& args, const Tensor&) { cpu::bn_stats(args, parallel); }
  static void run(const BnAct& args, const Tensor&) { cpu::bn_act(args, parallel); }
  static void run(const BnActPool& args, const Tensor&) { cpu::bn_act_pool(args, parallel); }
  static void run(const BnActBackward& args, const Tensor&) {
    cpu::bn_act_backward(args, parallel);
  }
  static void run(const BnActPoolBackward& args, const Tensor&) {
    cpu::bn_act_pool_backward(args, parallel);
  }
};

#ifdef FASTCNN_CUDA
struct Cuda {
  static constexpr auto stats_workspace = cuda::bn_stats_workspace;
  static constexpr auto backward_workspace = cuda::bn_act_backward_workspace;

  static void run(const BnStats& args, const Tensor& x) {
    enqueue(cuda::launch_bn_stats, args, x);
  }
  static void run(const BnAct& args, const Tensor& x) { enqueue(cuda::launch_bn_act, args, x); }
  static void run(const BnActPool& args, const Tensor& x) {
    enqueue(cuda::launch_bn_act_pool, args, x);
  }
  static void run(const BnActBackward& args, const Tensor& x) {
    enqueue(cuda::launch_bn_act_backward, args, x);
  }
  static void run(const BnActPoolBackward& args, const Tensor& x) {
    enqueue(cuda::launch_bn_act_pool_backward, args, x);
  }
};
#endif

Sizes sizes_of(const Tensor& x, const char* name) {
  REQUIRE(x.dim() == 2 || x.dim() == 4, name, ": expected (N, K, P, Q) or (N, K), got ",
                  shape_of(x));
  if (x.dim() == 2) return {x.size(0), 1, 1, x.size(1)};
  return {x.size(0), x.size(2), x.size(3), x.size(1)};
}

void check_input(const Tensor& x, const char* name) {
  sizes_of(x, name);
  check_layout(x, name);
}

Pool pool_of(const Tensor& x, int64_t window, int64_t stride, int64_t padding) {
  REQUIRE(x.dim() == 4, "x: expected (N, K, P, Q), got ", shape_of(x));
  REQUIRE(window >= 1 && window <= 11 && stride >= 1 && stride < INT_MAX && padding >= 0,
                  "pool: expected a window of 1 to 11, a stride >= 1 and padding >= 0, got (",
                  window, ", ", stride, ", ", padding, ")");
  REQUIRE(padding <= window / 2, "pool: expected padding <= ", window / 2,
                  " (half of the window), got ", padding);
  const int64_t smallest = std::min(x.size(2), x.size(3));
  REQUIRE(smallest + 2 * padding >= window, "pool: expected a window of at most ",
                  smallest + 2 * padding, " for ", shape_of(x), ", got ", window);
  return {int(window), int(stride), int(padding)};
}

template <class B>
std::tuple<Tensor, Tensor> bn_stats(const Tensor& x, const Tensor& running_mean,
                                    const Tensor& running_var, bool training, double momentum,
                                    double eps, double pre_slope) {
  check_input(x, "x");
  check_slope(pre_slope);
  channels_of(running_mean, x, "running_mean");
  channels_of(running_var, x, "running_var");
  const Sizes sizes = sizes_of(x, "x");
  Tensor mean = per_channel(x), rstd = per_channel(x);
  Tensor workspace = bytes(x, training ? B::stats_workspace(sizes) : 0);
  B::run(BnStats{dtype_of(x), sizes, x.const_data_ptr(), training, momentum, eps, pre_slope,
                 pointer(running_mean), pointer(running_var), pointer(mean), pointer(rstd),
                 pointer(workspace)},
         x);
  return {mean, rstd};
}

Affine affine_of(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
                 const Optional& bias) {
  return {channels_of(mean, x, "mean"), channels_of(rstd, x, "rstd"),
          channels_of(weight, x, "weight"), bias ? channels_of(*bias, x, "bias") : nullptr};
}

// dweight or dbias, which the part apply reads
void* sums_of(const Tensor& sums, const Tensor& x, const char* name) {
  return const_cast<void*>(channels_of(sums, x, name));
}

Affine bias_of(const Tensor& x, const Optional& bias) {
  return {nullptr, nullptr, nullptr, bias ? channels_of(*bias, x, "bias") : nullptr};
}

template <class B>
Tensor forward(const Tensor& x, const Affine& affine, const Optional& residual, double pre_slope,
               double post_slope) {
  check_input(x, "x");
  check_slope(pre_slope);
  check_slope(post_slope);
  if (residual) check_like(*residual, x, "residual");
  Tensor y = empty_as(x);
  B::run(BnAct{dtype_of(x), sizes_of(x, "x"), x.const_data_ptr(),
               residual ? residual->const_data_ptr() : nullptr, affine, pre_slope, post_slope,
               pointer(y)},
         x);
  return y;
}

template <class B>
Tensor bn_act(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
              const Tensor& bias, const Optional& residual, bool batch_stats, double pre_slope,
              double post_slope) {
  return forward<B>(x, affine_of(x, mean, rstd, weight, bias), residual, pre_slope, post_slope);
}

template <class B>
Tensor bias_act(const Tensor& x, const Optional& bias, const Optional& residual, double slope) {
  return forward<B>(x, bias_of(x, bias), residual, 1, slope);
}

template <class B>
std::tuple<Tensor, Tensor> forward_pool(const Tensor& x, const Affine& affine, double pre_slope,
                                        double post_slope, const Pool& pool) {
  check_input(x, "x");
  check_slope(pre_slope);
  check_slope(post_slope);
  const Sizes sizes = sizes_of(x, "x");
  std::vector<int64_t> shape{sizes.n, sizes.k, pool.output(sizes.p), pool.output(sizes.q)};
  Tensor y = empty(x, shape, x.scalar_type()), code = empty(x, shape, ScalarType::Byte);
  B::run(BnActPool{dtype_of(x), sizes, x.const_data_ptr(), affine, pre_slope, post_slope, pool,
                   pointer(y), static_cast<uint8_t*>(pointer(code))},
         x);
  return {y, code};
}

template <class B>
std::tuple<Tensor, Tensor> bn_act_pool(const Tensor& x, const Tensor& mean, const Tensor& rstd,
                                       const Tensor& weight, const Tensor& bias, bool batch_stats,
                                       double pre_slope, double post_slope, int64_t window,
                                       int64_t stride, int64_t padding) {
  return forward_pool<B>(x, affine_of(x, mean, rstd, weight, bias), pre_slope, post_slope,
                         pool_of(x, window, stride, padding));
}

template <class B>
std::tuple<Tensor, Tensor> bias_act_pool(const Tensor& x, const Optional& bias, double slope,
                                         int64_t window, int64_t stride, int64_t padding) {
  return forward_pool<B>(x, bias_of(x, bias), 1, slope, pool_of(x, window, stride, padding));
}

// what the parts of a backward have in common; the rest is null
BnActBackward backward_of(const Tensor& dy, const Tensor& x, const Optional& y, const Tensor& mean,
                          const Tensor& rstd, const Tensor& weight, const Tensor& bias,
                          bool batch_stats, double pre_slope, double post_slope, Part part) {
  check_input(x, "x");
  check_like(dy, x, "dy");
  if (y) check_like(*y, x, "y");
  BnActBackward args{dtype_of(x), sizes_of(x, "x"), dy.const_data_ptr(), x.const_data_ptr(),
                     y ? y->const_data_ptr() : nullptr,
                     affine_of(x, mean, rstd, weight, bias), batch_stats, pre_slope, post_slope};
  args.part = part;
  return args;
}

// dresidual is empty where the forward had no residual, and so no y is given
Tensor residual_gradient(const Tensor& x, const Optional& y) {
  return y ? empty_as(x) : empty(x, {0}, x.scalar_type());
}

template <class B>
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& dy, const Tensor& x, const Optional& y, const Tensor& mean, const Tensor& rstd,
    const Tensor& weight, const Tensor& bias, bool batch_stats, double pre_slope,
    double post_slope) {
  BnActBackward args = backward_of(dy, x, y, mean, rstd, weight, bias, batch_stats, pre_slope,
                                   post_slope, Part::whole);
  Tensor dx = empty_as(x), dweight = per_channel(x), dbias = per_channel(x);
  Tensor dresidual = residual_gradient(x, y);
  Tensor workspace = bytes(x, B::backward_workspace(args.sizes));
  args.dx = pointer(dx), args.dresidual = y ? pointer(dresidual) : nullptr;
  args.dweight = pointer(dweight), args.dbias = pointer(dbias);
  args.workspace = pointer(workspace);
  B::run(args, x);
  return {dx, dweight, dbias, dresidual};
}

template <class B>
std::tuple<Tensor, Tensor> bn_act_backward_sums(const Tensor& dy, const Tensor& x,
                                                const Optional& y, const Tensor& mean,
                                                const Tensor& rstd, const Tensor& weight,
                                                const Tensor& bias, double pre_slope,
                                                double post_slope) {
  BnActBackward args = backward_of(dy, x, y, mean, rstd, weight, bias, true, pre_slope, post_slope,
                                   Part::sums);
  Tensor dweight = per_channel(x), dbias = per_channel(x);
  Tensor workspace = bytes(x, B::backward_workspace(args.sizes));
  args.dweight = pointer(dweight), args.dbias = pointer(dbias);
  args.workspace = pointer(workspace);
  B::run(args, x);
  return {dweight, dbias};
}

template <class B>
std::tuple<Tensor, Tensor> bn_act_backward_apply(
    const Tensor& dy, const Tensor& x, const Optional& y, const Tensor& mean, const Tensor& rstd,
    const Tensor& weight, const Tensor& bias, const Tensor& dweight, const Tensor& dbias,
    double pre_slope, double post_slope) {
  BnActBackward args = backward_of(dy, x, y, mean, rstd, weight, bias, true, pre_slope, post_slope,
                                   Part::apply);
  Tensor dx = empty_as(x), dresidual = residual_gradient(x, y);
  args.dx = pointer(dx), args.dresidual = y ? pointer(dresidual) : nullptr;
  args.dweight = sums_of(dweight, x, "dweight"), args.dbias = sums_of(dbias, x, "dbias");
  B::run(args, x);
  return {dx, dresidual};
}

// dbias is empty where the forward had no bias; dx is the gradient of a residual as well
template <class B>
std::tuple<Tensor, Tensor> bias_act_backward(const Tensor& dy, const Tensor& y, bool with_bias,
                                             double slope) {
  check_input(y, "y");
  check_like(dy, y, "dy");
  const Sizes sizes = sizes_of(y, "y");
  Tensor dx = empty_as(y);
  Tensor dbias = with_bias ? per_channel(y) : empty(y, {0}, parameter_type(y));
  Tensor workspace = bytes(y, with_bias ? B::backward_workspace(sizes) : 0);
  B::run(BnActBackward{dtype_of(y), sizes, dy.const_data_ptr(), nullptr, y.const_data_ptr(),
                       Affine{}, false, 1, slope, pointer(dx), nullptr, nullptr,
                       with_bias ? pointer(dbias) : nullptr, pointer(workspace)},
         y);
  return {dx, dbias};
}

void check_pooled(const Tensor& dy, const Tensor& code, const Sizes& sizes, const Pool& pool) {
  check_input(dy, "dy");
  check_layout(code, "code");
  REQUIRE(code.scalar_type() == ScalarType::Byte && shape_of(code) == shape_of(dy),
                  "code: expected uint8 ", shape_of(dy), ", got ", shape_of(code));
  REQUIRE(dy.size(0) == sizes.n && dy.size(1) == sizes.k &&
                      dy.size(2) == pool.output(sizes.p) && dy.size(3) == pool.output(sizes.q),
                  "dy: expected the pooled shape of x, got ", shape_of(dy));
}

BnActPoolBackward pool_backward_of(const Tensor& dy, const Tensor& code, const Tensor& x,
                                   const Tensor& mean, const Tensor& rstd, const Tensor& weight,
                                   bool batch_stats, double pre_slope, double post_slope,
                                   int64_t window, int64_t stride, int64_t padding, Part part) {
  check_input(x, "x");
  REQUIRE(dy.scalar_type() == x.scalar_type(), "dy: expected the dtype of x");
  const Sizes sizes = sizes_of(x, "x");
  const Pool pool = pool_of(x, window, stride, padding);
  check_pooled(dy, code, sizes, pool);
  BnActPoolBackward args{dtype_of(x), sizes, dy.const_data_ptr(),
                         static_cast<const uint8_t*>(code.const_data_ptr()), x.const_data_ptr(),
                         affine_of(x, mean, rstd, weight, std::nullopt), batch_stats, pre_slope,
                         post_slope, pool};
  args.part = part;
  return args;
}

template <class B>
std::tuple<Tensor, Tensor, Tensor> bn_act_pool_backward(
    const Tensor& dy, const Tensor& code, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const Tensor& weight, bool batch_stats, double pre_slope, double post_slope, int64_t window,
    int64_t stride, int64_t padding) {
  BnActPoolBackward args =
      pool_backward_of(dy, code, x, mean, rstd, weight, batch_stats, pre_slope, post_slope, window,
                       stride, padding, Part::whole);
  Tensor dx = empty_as(x), dweight = per_channel(x), dbias = per_channel(x);
  Tensor workspace = bytes(x, B::backward_workspace(args.sizes));
  args.dx = pointer(dx), args.dweight = pointer(dweight), args.dbias = pointer(dbias);
  args.workspace = pointer(workspace);
  B::run(args, x);
  return {dx, dweight, dbias};
}

template <class B>
std::tuple<Tensor, Tensor> bn_act_pool_backward_sums(
    const Tensor& dy, const Tensor& code, const Tensor& x, const Tensor& mean, const Tensor& rstd,
    const Tensor& weight, double pre_slope, double post_slope, int64_t window, int64_t stride,
    int64_t padding) {
  BnActPoolBackward args =
      pool_backward_of(dy, code, x, mean, rstd, weight, true, pre_slope, post_slope, window,
                       stride, padding, Part::sums);
  Tensor dweight = per_channel(x), dbias = per_channel(x);
  Tensor workspace = bytes(x, B::backward_workspace(args.sizes));
  args.dweight = pointer(dweight), args.dbias = pointer(dbias);
  args.workspace = pointer(workspace);
  B::run(args, x);
  return {dweight, dbias};
}

template <class B>
Tensor bn_act_pool_backward_apply(const Tensor& dy, const Tensor& code, const Tensor& x,
                                  const Tensor& mean, const Tensor& rstd, const Tensor& weight,
                                  const Tensor& dweight, const Tensor& dbias, double pre_slope,
                                  double post_slope, int64_t window, int64_t stride,
                                  int64_t padding) {
  BnActPoolBackward args =
      pool_backward_of(dy, code, x, mean, rstd, weight, true, pre_slope, post_slope, window,
                       stride, padding, Part::apply);
  Tensor dx = empty_as(x);
  args.dx = pointer(dx);
  args.dweight = sums_of(dweight, x, "dweight"), args.dbias = sums_of(dbias, x, "dbias");
  B::run(args, x);
  return dx;
}

// p, q: rows and columns of the image that was pooled
template <class B>
std::tuple<Tensor, Tensor> bias_act_pool_backward(const Tensor& dy, const Tensor& code, int64_t p,
                                                  int64_t q, bool with_bias, double slope,
                                                  int64_t window, int64_t stride,
                                                  int64_t padding) {
  const Sizes sizes{dy.size(0), p, q, dy.size(1)};
  Tensor dx = empty(dy, {sizes.n, sizes.k, p, q}, dy.scalar_type());
  const Pool pool = pool_of(dx, window, stride, padding);
  check_pooled(dy, code, sizes, pool);
  Tensor dbias = with_bias ? per_channel(dy) : empty(dy, {0}, parameter_type(dy));
  Tensor workspace = bytes(dy, with_bias ? B::backward_workspace(sizes) : 0);
  B::run(BnActPoolBackward{dtype_of(dy), sizes, dy.const_data_ptr(),
                           static_cast<const uint8_t*>(code.const_data_ptr()), nullptr, Affine{},
                           false, 1, slope, pool, pointer(dx), nullptr,
                           with_bias ? pointer(dbias) : nullptr, pointer(workspace)},
         dy);
  return {dx, dbias};
}

template <class B>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("bn_stats", TORCH_BOX(&bn_stats<B>));
  m.impl("bn_act", TORCH_BOX(&bn_act<B>));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward<B>));
  m.impl("bn_act_backward_sums", TORCH_BOX(&bn_act_backward_sums<B>));
  m.impl("bn_act_backward_apply", TORCH_BOX(&bn_act_backward_apply<B>));
  m.impl("bn_act_pool", TORCH_BOX(&bn_act_pool<B>));
  m.impl("bn_act_pool_backward", TORCH_BOX(&bn_act_pool_backward<B>));
  m.impl("bn_act_pool_backward_sums", TORCH_BOX(&bn_act_pool_backward_sums<B>));
  m.impl("bn_act_pool_backward_apply", TORCH_BOX(&bn_act_pool_backward_apply<B>));
  m.impl("bias_act", TORCH_BOX(&bias_act<B>));
  m.impl("bias_act_backward", TORCH_BOX(&bias_act_backward<B>));
  m.impl("bias_act_pool", TORCH_BOX(&bias_act_pool<B>));
  m.impl("bias_act_pool_backward", TORCH_BOX(&bias_act_pool_backward<B>));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) { implement<Cpu>(m); }
#ifdef FASTCNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) { implement<Cuda>(m); }
#endif
