// Batch statistics: mean_k = Σ v / n and var_k = Σ (v - mean_k)² / n over the n = N·P·Q values
// v = pre(x) of channel k; rstd = 1 / sqrt(var + eps); the running statistics move along.
//
// Layout: x NHWC, (K,) vectors fp32. x is read once, with the pre-activation applied on the way:
// torch reads x, writes and reads pre(x) besides (2 more passes of N·P·Q·K elements).
//
// Stage one: a thread sums v - shift and its square, the shift being its own first value, so that
// a mean far from zero cancels nothing; (count, mean, Σ squared deviations) are merged over the
// lanes of the block by the formula of Chan, Golub and LeVeque (1983), and again over blocks in
// stage two, a launch of a few blocks, in an order that the shape alone decides. No atomics.
#include "moments.cuh"
#include "walk.cuh"

namespace fastcnn::cuda {
namespace {

constexpr int kStatsUnroll = 4;

// of pre(x) - shift
template <int V>
struct ShiftedSums {
  float shift[V], sum[V], square[V];
  int count;

  __device__ ShiftedSums() : count(0) {
#pragma unroll
    for (int i = 0; i < V; ++i) shift[i] = sum[i] = square[i] = 0;
  }

  template <typename T>
  __device__ void set_shift(Packed<T, V> values, float pre_slope) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float value = activate(values[i], pre_slope);
      shift[i] = isfinite(value) ? value : 0.f;
    }
  }

  template <typename T>
  __device__ void add(Packed<T, V> values, float pre_slope) {
    ++count;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float deviation = activate(values[i], pre_slope) - shift[i];
      sum[i] += deviation;
      square[i] = fmaf(deviation, deviation, square[i]);
    }
  }

  __device__ void moments(float (&out)[3 * V + 1]) const {
    const float n = static_cast<float>(count);
    const float inverse = count ? 1 / n : 0.f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float offset = sum[i] * inverse;
      const float squares = fmaf(-offset, sum[i], square[i]);
      out[i] = shift[i];
      out[V + i] = offset;
      out[2 * V + i] = squares < 0 ? 0.f : squares;  // NaN stays
    }
    out[3 * V] = n;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    bn_stats_kernel(const T* x, float pre_slope, Partials partials, Walk walk) {
  Place at(walk);
  ShiftedSums<V> sums;
  const int64_t stride = walk.step * walk.columns * V;
  int64_t offset = at.offset<V>(walk);
  while (at.has_rows()) {
    Packed<T, V> packed[kStatsUnroll];
#pragma unroll
    for (int u = 0; u < kStatsUnroll; ++u)
      if (at.row + u * walk.step < at.end) packed[u] = load<V>(x + offset + u * stride);
    if (sums.count == 0) sums.set_shift(packed[0], pre_slope);
#pragma unroll
    for (int u = 0; u < kStatsUnroll; ++u) {
      if (at.row + u * walk.step >= at.end) break;
      sums.add(packed[u], pre_slope);
    }
    at.row += kStatsUnroll * walk.step;
    offset += kStatsUnroll * stride;
  }
  float moments[3 * V + 1];
  sums.moments(moments);
  reduce_lanes(moments, walk.tile, walk.lanes, shared_memory(), MergeMoments<V>());
  float means[V], counts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    means[i] = moments[i] + moments[V + i];
    counts[i] = moments[3 * V];
  }
  at.write_partials<V>(walk, partials.plane(0), means);
  at.write_partials<V>(walk, partials.plane(1), moments + 2 * V);
  at.write_partials<V>(walk, partials.plane(2), counts);
}

struct Statistics {
  float* running_mean;
  float* running_var;
  float* mean;
  float* rstd;
  float keep, momentum, eps;

  template <typename Args>
  explicit Statistics(const Args& args)
      : running_mean(static_cast<float*>(args.running_mean)),
        running_var(static_cast<float*>(args.running_var)),
        mean(static_cast<float*>(args.mean)),
        rstd(static_cast<float*>(args.rstd)),
        keep(static_cast<float>(1 - args.momentum)),
        momentum(static_cast<float>(args.momentum)),
        eps(static_cast<float>(args.eps)) {}
};

// no partial results, no values: mean 0, rstd 1
__global__ void __launch_bounds__(kThreads)
    bn_stats_finalise_kernel(Partials partials, Statistics out, float count, float unbiased_count) {
  const int64_t k = final_channel();
  Moments all = {0, 0, 0, 0};
  if (k < partials.k) {
    const float* means = partials.plane(0) + k;
    const float* squares = partials.plane(1) + k;
    const float* counts = partials.plane(2) + k;
#pragma unroll 4
    for (int64_t row = threadIdx.x / kFinalChannels; row < partials.rows; row += kSlices) {
      const int64_t at = row * partials.k;
      all = merged(all, {counts[at], means[at], 0, squares[at]});
    }
  }
  float moments[4] = {all.shift, all.offset, all.squares, all.count};
  reduce_lanes(moments, kFinalChannels, kSlices, shared_memory(), MergeMoments<1>());
  if (threadIdx.x >= kFinalChannels || k >= partials.k) return;
  if (count < 0) {
    count = moments[3];
    unbiased_count = count - 1;
  }
  if (count == 0) {
    out.mean[k] = 0;
    out.rstd[k] = 1;
    return;
  }
  const float mean = moments[0] + moments[1], squares = moments[2];
  out.mean[k] = mean;
  out.rstd[k] = 1 / sqrtf(squares / count + out.eps);
  out.running_mean[k] = fmaf(out.keep, out.running_mean[k], out.momentum * mean);
  out.running_var[k] =
      fmaf(out.keep, out.running_var[k], out.momentum * (squares / unbiased_count));
}

__global__ void __launch_bounds__(kThreads)
    bn_stats_running_kernel(Statistics out, int64_t channels) {
  const int64_t k = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (k >= channels) return;
  out.mean[k] = out.running_mean[k];
  out.rstd[k] = 1 / sqrtf(out.running_var[k] + out.eps);
}

cudaError_t finalise(const Partials& partials, const Statistics& out, int64_t count,
                     cudaStream_t stream) {
  return launch(bn_stats_finalise_kernel, blocks_for(partials.k, kFinalChannels), kThreads,
                sizeof(float) * 4 * kThreads, stream, partials, out, static_cast<float>(count),
                static_cast<float>(count - 1));
}

template <typename T>
cudaError_t batch_statistics(const BnStats& args, cudaStream_t stream) {
  const Parts parts = make_parts(args.sizes, kWide<T>, aligned(args.x), Order::interleaved);
  const Partials partials{static_cast<float*>(args.workspace), parts.partial_rows(), args.sizes.k};
  const auto first = [&](auto width, const Walk& walk) {
    constexpr int V = decltype(width)::value;
    const size_t shared = sizeof(float) * (3 * V + 1) * walk.block().x;
    return launch(bn_stats_kernel<T, V>, walk.grid(), walk.block(), shared, stream,
                  static_cast<const T*>(args.x), static_cast<float>(args.pre_slope), partials,
                  walk);
  };
  const cudaError_t status = for_parts<T>(parts, first);
  if (status != cudaSuccess) return status;
  return finalise(partials, Statistics(args), args.sizes.pixels(), stream);
}

}  // namespace

int64_t bn_stats_workspace(const Sizes& sizes) {
  return 3 * sizeof(float) * most_partial_rows(sizes) * sizes.k;
}

cudaError_t launch_bn_stats(const BnStats& args, cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto number) {
    if (args.sizes.k == 0) return cudaSuccess;
    if (args.training) return batch_statistics<decltype(number)>(args, stream);
    return launch(bn_stats_running_kernel, blocks_for(args.sizes.k, kThreads), kThreads, 0, stream,
                  Statistics(args), args.sizes.k);
  });
}

cudaError_t launch_bn_merge(const BnMerge& args, cudaStream_t stream) {
  if (args.k == 0) return cudaSuccess;
  auto* data = static_cast<float*>(const_cast<void*>(args.partials));
  return finalise({data, args.rows, args.k}, Statistics(args), args.count, stream);
}

std::vector<Kernel> bn_stats_kernels() {
  std::vector<Kernel> kernels{named("bn_stats_finalise_kernel", bn_stats_finalise_kernel),
                              named("bn_stats_running_kernel", bn_stats_running_kernel)};
  for_types([&](auto number, const std::string& type) {
    using T = decltype(number);
    constexpr int V = kWide<T>;
    kernels.push_back(named<V>("bn_stats_kernel", type, bn_stats_kernel<T, V>));
    kernels.push_back(named<1>("bn_stats_kernel", type, bn_stats_kernel<T, 1>));
  });
  return kernels;
}

}  // namespace fastcnn::cuda
