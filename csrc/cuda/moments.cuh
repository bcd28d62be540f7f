// Mean and squared deviations of sets of values, merged by the formula of Chan, Golub and LeVeque
// (1983).
#pragma once

#include "common.cuh"

namespace fastcnn::cuda {

// A set of values: how many, their mean as shift + offset, their squared deviations from it. The
// mean is kept in two parts because rounding it anew at each merge costs digits where it is many
// standard deviations away from zero; the offset is about as small as these.
struct Moments {
  float count, shift, offset, squares;
};

__device__ inline Moments merged(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const float count = a.count + b.count;
  const float share = b.count / count;
  const float delta = (b.shift - a.shift) + (b.offset - a.offset);
  return {count, a.shift, fmaf(delta, share, a.offset),
          a.squares + fmaf(delta * delta, a.count * share, b.squares)};
}

// V shifts, offsets and sums of squares, and their common count
template <int V>
struct MergeMoments {
  template <typename Other>
  __device__ void operator()(float (&values)[3 * V + 1], Other other) const {
    const float count = values[3 * V], other_count = other(3 * V);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Moments both = merged({count, values[i], values[V + i], values[2 * V + i]},
                                  {other_count, other(i), other(V + i), other(2 * V + i)});
      values[i] = both.shift;
      values[V + i] = both.offset;
      values[2 * V + i] = both.squares;
      values[3 * V] = both.count;
    }
  }
};

}  // namespace fastcnn::cuda
