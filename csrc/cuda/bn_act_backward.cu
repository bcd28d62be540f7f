// Backward of bn_act: g = dy · post'(z); the rest as in backward.cuh; dresidual = g.
//
// Layout: dy, x, y, dx, dresidual NHWC of one type; (K,) vectors fp32. The sign of z comes from y
// where the caller kept it (with a residual), else from x: z is computed again, by the expression
// and the rounding of the forward pass, so the forward need not store a mask (a write of an eighth
// to a half of x) nor y be read. Fused: both activations' backwards, the normalisation's and the
// residual's; torch runs them one by one, 2 reads and a write of N·P·Q·K elements each.
#include "backward.cuh"

namespace fastcnn::cuda {
namespace {

constexpr int kBackwardUnroll = 2;  // rows of dy, x and maybe y in flight

template <typename T>
struct ActBackwardArguments : BackwardArguments<T> {
  const T* dy;
  const T* y;
  T* dresidual;
};

template <typename T, int V, Pass kPass>
__global__ void __launch_bounds__(kThreads, kBackwardResident)
    bn_act_backward_kernel(ActBackwardArguments<T> args, Walk walk) {
  constexpr int kUnroll = kBackwardUnroll;
  Place at(walk);
  Channels<T, V, kPass> channels(args, at, walk);
  float bias[V];
  if (at.has_rows()) at.parameters<V>(walk, args.parameters.bias, 0, bias);
  const int64_t stride = walk.step * walk.columns * V;
  int64_t offset = at.offset<V>(walk);
  while (at.has_rows()) {
    Packed<T, V> dy[kUnroll], x[kUnroll] = {}, y[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at.row + u * walk.step >= at.end) break;
      dy[u] = load<V>(args.dy + offset + u * stride);
      if (args.x) x[u] = load<V>(args.x + offset + u * stride);
      if (args.y) y[u] = load<V>(args.y + offset + u * stride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at.row + u * walk.step >= at.end) break;
      constexpr int kGroup = Packed<T, V>::kGroup;
#pragma unroll
      for (int group = 0; group < V / kGroup; ++group) {
        float g[kGroup], out[kGroup];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const int i = group * kGroup + j;
          const float value = x[u][i];
          const float z = args.y ? y[u][i]
                                 : normalise(value, args.pre_slope, channels.mean[i],
                                             channels.scale[i], bias[i]);
          g[j] = gradient(is_negative(z, args.post_slope), args.post_slope, dy[u][i]);
          out[j] = channels.take(i, g[j], value);
        }
        // in place: dy and x are not needed again
        dy[u].set(group, g);
        x[u].set(group, out);
      }
      if (channels.kWrites) {
        if (args.dresidual) store(args.dresidual + offset + u * stride, dy[u]);
        store(args.dx + offset + u * stride, x[u]);
      }
    }
    at.row += kUnroll * walk.step;
    offset += kUnroll * stride;
  }
  channels.finish(at, walk);
}

__global__ void __launch_bounds__(kThreads)
    bn_act_backward_finalise_kernel(Partials partials, const float* rstd, float* dweight,
                                    float* dbias) {
  const int64_t k = final_channel();
  float sums[2] = {0, 0};
  if (k < partials.k) {
    const float* g = partials.plane(0) + k;
    const float* product = partials.plane(1) + k;
#pragma unroll 4
    for (int64_t row = threadIdx.x / kFinalChannels; row < partials.rows; row += kSlices) {
      sums[0] += g[row * partials.k];
      sums[1] += product[row * partials.k];
    }
  }
  reduce_lanes(sums, kFinalChannels, kSlices, shared_memory(), Add<2>());
  if (threadIdx.x >= kFinalChannels || k >= partials.k) return;
  if (dbias) dbias[k] = sums[0];
  if (dweight) dweight[k] = sums[1] * (rstd ? rstd[k] : 1.f);
}

}  // namespace

cudaError_t launch_backward_finalise(const Partials& partials, const Affine& affine, void* dweight,
                                     void* dbias, cudaStream_t stream) {
  return launch(bn_act_backward_finalise_kernel, blocks_for(partials.k, kFinalChannels), kThreads,
                sizeof(float) * 2 * kThreads, stream, partials,
                static_cast<const float*>(affine.rstd), static_cast<float*>(dweight),
                static_cast<float*>(dbias));
}

int64_t bn_act_backward_workspace(const Sizes& sizes) {
  return 2 * sizeof(float) * most_partial_rows(sizes) * sizes.k;
}

namespace {

template <typename T>
Parts parts_of(const BnActBackward& args, Order order) {
  const bool wide = aligned(args.dy, args.x, args.y, args.dx, args.dresidual);
  return make_parts(args.sizes, kWide<T>, wide, order);
}

template <typename T>
ActBackwardArguments<T> act_arguments(const BnActBackward& args) {
  const int64_t rows = parts_of<T>(args, Order::interleaved).partial_rows();
  return {backward_arguments<T>(args, rows), static_cast<const T*>(args.dy),
          static_cast<const T*>(args.y), static_cast<T*>(args.dresidual)};
}

template <typename T, Pass kPass>
cudaError_t run_pass(const BnActBackward& args, const ActBackwardArguments<T>& arguments,
                     cudaStream_t stream) {
  const bool sums = arguments.sums;
  return for_parts<T>(parts_of<T>(args, order_of(kPass, sums)), [&](auto width, const Walk& walk) {
    constexpr int V = decltype(width)::value;
    return launch(bn_act_backward_kernel<T, V, kPass>, walk.grid(), walk.block(),
                  backward_shared(kPass, sums, V, walk), stream, arguments, walk);
  });
}

}  // namespace

cudaError_t launch_bn_act_backward(const BnActBackward& args, cudaStream_t stream) {
  if (!is_complete(args)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto number) {
    using T = decltype(number);
    const auto arguments = act_arguments<T>(args);
    return launch_passes(args, arguments.partials, stream, [&](auto pass) {
      return run_pass<T, decltype(pass)::value>(args, arguments, stream);
    });
  });
}

std::vector<Kernel> bn_act_backward_kernels() {
  std::vector<Kernel> kernels{
      named("bn_act_backward_finalise_kernel", bn_act_backward_finalise_kernel)};
  for_types([&](auto number, const std::string& type) {
    for_passes([&](auto pass) {
      using T = decltype(number);
      constexpr Pass kPass = decltype(pass)::value;
      constexpr int V = kWide<T>, kIndex = static_cast<int>(kPass);
      const std::string name = "bn_act_backward_kernel";
      kernels.push_back(named<V, kIndex>(name, type, bn_act_backward_kernel<T, V, kPass>));
      kernels.push_back(named<1, kIndex>(name, type, bn_act_backward_kernel<T, 1, kPass>));
    });
  });
  return kernels;
}

}  // namespace fastcnn::cuda
