// y = post((pre(x) - mean) · rstd · weight + bias + residual), one pass.
//
// Layout: x, residual, y NHWC of one type; (K,) vectors fp32, each may be absent, so that the
// same kernel adds a bias alone. Fused: pre-activation, normalisation, residual and activation,
// which torch runs as up to four passes; each pass saved is a read and a write of N·P·Q·K
// elements. What the forward pass keeps for the backward is x, which exists anyway; nothing else
// is written.
//
// The tensor is walked in the reverse of the order in which bn_stats swept it, so that the tens of
// MB which the sweep left in L2 need not come from memory again.
#include "walk.cuh"

namespace fastcnn::cuda {
namespace {

// loads in flight a thread, of x and of the residual together
constexpr int kActLoads = 4;

template <typename T>
struct ActArguments {
  const T* x;
  const T* residual;
  T* y;
  Parameters parameters;
  float pre_slope, post_slope;
};

template <typename T, int V, bool has_residual>
__global__ void __launch_bounds__(kThreads, kResident)
    bn_act_kernel(ActArguments<T> args, Walk walk) {
  constexpr int kUnroll = has_residual ? kActLoads / 2 : kActLoads;
  Place at(walk);
  if (!at.has_rows()) return;
  float mean[V], scale[V], bias[V];
  at.parameters<V>(walk, args.parameters.mean, 0, mean);
  at.scale<V>(walk, args.parameters, scale);
  at.parameters<V>(walk, args.parameters.bias, 0, bias);
  const int64_t stride = walk.step * walk.columns * V;
  int64_t offset = at.offset<V>(walk);
  while (at.has_rows()) {
    Packed<T, V> x[kUnroll], residual[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at.row + u * walk.step >= at.end) break;
      x[u] = load<V>(args.x + offset + u * stride);
      if (has_residual) residual[u] = load<V>(args.residual + offset + u * stride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at.row + u * walk.step >= at.end) break;
      store_values<T, V>(args.y + offset + u * stride, [&](int i) {
        float z = normalise(x[u][i], args.pre_slope, mean[i], scale[i], bias[i]);
        if (has_residual) z += residual[u][i];
        return activate(z, args.post_slope);
      });
    }
    at.row += kUnroll * walk.step;
    offset += kUnroll * stride;
  }
}

}  // namespace

cudaError_t launch_bn_act(const BnAct& args, cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto number) {
    using T = decltype(number);
    const ActArguments<T> arguments{static_cast<const T*>(args.x),
                                    static_cast<const T*>(args.residual),
                                    static_cast<T*>(args.y),
                                    Parameters(args.affine),
                                    static_cast<float>(args.pre_slope),
                                    static_cast<float>(args.post_slope)};
    const bool wide = aligned(args.x, args.residual, args.y);
    const Parts parts = make_parts(args.sizes, kWide<T>, wide, Order::reversed);
    return for_parts<T>(parts, [&](auto width, const Walk& walk) {
      constexpr int V = decltype(width)::value;
      const auto kernel = args.residual ? bn_act_kernel<T, V, true> : bn_act_kernel<T, V, false>;
      return launch(kernel, walk.grid(), walk.block(), 0, stream, arguments, walk);
    });
  });
}

std::vector<Kernel> bn_act_kernels() {
  std::vector<Kernel> kernels;
  for_types([&](auto number, const std::string& type) {
    using T = decltype(number);
    constexpr int V = kWide<T>;
    kernels.push_back(named<V, false>("bn_act_kernel", type, bn_act_kernel<T, V, false>));
    kernels.push_back(named<V, true>("bn_act_kernel", type, bn_act_kernel<T, V, true>));
    kernels.push_back(named<1, false>("bn_act_kernel", type, bn_act_kernel<T, 1, false>));
    kernels.push_back(named<1, true>("bn_act_kernel", type, bn_act_kernel<T, 1, true>));
  });
  return kernels;
}

}  // namespace fastcnn::cuda
