// What the two backwards have in common once g, the gradient behind the post-activation, is known:
//
//   dbias = Σ g,  dweight = Σ g · x̂,  x̂ = (pre(x) - mean) · rstd
//   dx = pre'(x) · rstd · weight · (g - (dbias + x̂ · dweight) / n)    with batch statistics
//   dx = pre'(x) · rstd · weight · g                                  without
//
// With batch statistics dx needs the sums first: a pass that reduces, a small launch that merges
// the blocks' partial sums, and a pass that applies and recomputes g instead of reading it back
// (a write and a read of N·P·Q·K elements less, and no buffer). Without, one pass does both. Those
// of several processes come between the merge and the apply: the two parts are launched apart.
#pragma once

#include "walk.cuh"

namespace fastcnn::cuda {

// blocks a multiprocessor: with the sums a thread needs up to 128 registers; its loads are twice as
// many as the forward's
constexpr int kBackwardResident = 2;

enum class Pass { reduce, apply, single };

// f(pass) for each, as a constant
template <typename F>
void for_passes(F f) {
  f(std::integral_constant<Pass, Pass::reduce>{});
  f(std::integral_constant<Pass, Pass::apply>{});
  f(std::integral_constant<Pass, Pass::single>{});
}

inline Order order_of(Pass pass, bool sums) {
  // apply: from where the reduction's sweep ended
  if (pass == Pass::apply) return Order::reversed;
  return pass == Pass::reduce || sums ? Order::interleaved : Order::chunked;
}

template <typename T>
struct BackwardArguments {
  const T* x;
  T* dx;
  Parameters parameters;
  const float* dweight;  // of the pass apply
  const float* dbias;
  Partials partials;
  bool sums;  // are wanted
  float inverse_pixels;
  float pre_slope, post_slope;
};

template <typename T, typename Args>
BackwardArguments<T> backward_arguments(const Args& args, int64_t partial_rows) {
  const bool sums = args.batch_stats || args.dweight || args.dbias;
  return {static_cast<const T*>(args.x),
          static_cast<T*>(args.dx),
          Parameters(args.affine),
          static_cast<const float*>(args.dweight),
          static_cast<const float*>(args.dbias),
          {static_cast<float*>(args.workspace), partial_rows, args.sizes.k},
          sums,
          static_cast<float>(1 / static_cast<double>(args.sizes.pixels())),
          static_cast<float>(args.pre_slope),
          static_cast<float>(args.post_slope)};
}

template <int N>
struct Add {
  template <typename Other>
  __device__ void operator()(float (&values)[N], Other other) const {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += other(i);
  }
};

// What a thread keeps of its V channels, and what it does with each vector of g
template <typename T, int V, Pass kPass>
struct Channels {
  static constexpr bool kSums = kPass != Pass::apply, kWrites = kPass != Pass::reduce;

  const BackwardArguments<T>& args;
  float mean[V], scale[V];
  float shift[V], slope[V];  // apply: what the mean of g and of g · x̂ take from g
  float sums[2 * V];         // Σ g, Σ g · (pre(x) - mean)

  __device__ Channels(const BackwardArguments<T>& given, const Place& at, const Walk& walk)
      : args(given) {
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) sums[i] = 0;
    if (!at.has_rows()) return;
    at.parameters<V>(walk, args.parameters.mean, 0, mean);
    at.scale<V>(walk, args.parameters, scale);
    if (kPass != Pass::apply) return;
    at.parameters<V>(walk, args.dbias, 0, shift);
    at.parameters<V>(walk, args.dweight, 0, slope);
    float rstd[V];
    at.parameters<V>(walk, args.parameters.rstd, 1, rstd);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      shift[i] *= args.inverse_pixels;
      slope[i] *= rstd[i] * args.inverse_pixels;
    }
  }

  // dx of one value from its g and x
  __device__ float take(int i, float g, float x) {
    const float deviation = activate(x, args.pre_slope) - mean[i];
    if (kSums) {
      sums[i] += g;
      sums[V + i] = fmaf(g, deviation, sums[V + i]);
    }
    const float left = kPass == Pass::apply ? g - fmaf(deviation, slope[i], shift[i]) : g;
    return gradient(is_negative(x, args.pre_slope), args.pre_slope, left * scale[i]);
  }

  // every thread of the block must come here
  __device__ void finish(const Place& at, const Walk& walk) {
    if (!kSums || !args.sums) return;
    reduce_lanes(sums, walk.tile, walk.lanes, shared_memory(), Add<2 * V>());
    at.write_partials<V>(walk, args.partials.plane(0), sums);
    at.write_partials<V>(walk, args.partials.plane(1), sums + V);
  }
};

inline size_t backward_shared(Pass pass, bool sums, int width, const Walk& walk) {
  return pass == Pass::apply || !sums ? 0 : sizeof(float) * 2 * width * walk.block().x;
}

// dweight, dbias ← the blocks' partial sums; either may be null
cudaError_t launch_backward_finalise(const Partials& partials, const Affine& affine, void* dweight,
                                     void* dbias, cudaStream_t stream);

// The launches of a backward: run(pass) with the pass as a constant
template <typename Args, typename Run>
cudaError_t launch_passes(const Args& args, const Partials& partials, cudaStream_t stream,
                          Run run) {
  using std::integral_constant;
  if (args.sizes.k == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  if (args.part != Part::apply) {
    status = args.batch_stats ? run(integral_constant<Pass, Pass::reduce>{})
                              : run(integral_constant<Pass, Pass::single>{});
    if (status == cudaSuccess && (args.dweight || args.dbias))
      status = launch_backward_finalise(partials, args.affine, args.dweight, args.dbias, stream);
  }
  if (status == cudaSuccess && args.batch_stats && args.part != Part::sums)
    status = run(integral_constant<Pass, Pass::apply>{});
  return status;
}

// x may be missing without normalisation or pixels, dweight and dbias only without batch statistics
template <typename Args>
bool is_complete(const Args& args) {
  if (args.part != Part::whole && !args.batch_stats) return false;
  if (args.sizes.elements() == 0) return true;
  return args.batch_stats ? args.x && args.dweight && args.dbias : args.x || args.pre_slope == 1;
}

}  // namespace fastcnn::cuda
