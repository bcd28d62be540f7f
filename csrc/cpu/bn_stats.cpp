// Batch statistics: mean and rstd of each channel, and the running statistics, in one read of x.
//
// A tile's sums are taken about the mean of its first pixels, so that a mean far from 0 cancels
// nothing, and joined in fp64 as (count, mean, M2) by Chan, Golub and LeVeque 1983, equation 1.5.
#include <cmath>

#include "cpu.h"
#include "moments.h"
#include "walk.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t kFirst = 16;   // pixels that the shift is the mean of
constexpr int64_t kSummed = 16;  // pixels summed in one register before the sum joins the tile's

// of K channels: mean and sum of squared deviations, one task's among the partials
struct Moments {
  double* mean;
  double* m2;

  Moments(void* partials, int64_t task, int64_t k)
      : mean(static_cast<double*>(partials) + 2 * task * k), m2(mean + k) {}
};

// joins one vector of a tile (n values, sums about `shift`) to the `count` values before it
template <class A, int W>
void join(double* mean, double* m2, int64_t count, Values<A, W> shift, Values<A, W> s1,
          Values<A, W> s2, int64_t n) {
  using Wide = Values<double, W>;
  const Wide sum = widen<W>(s1), offset = sum * (1 / double(n));
  const Wide tile_mean = widen<W>(shift) + offset, tile_m2 = widen<W>(s2) - sum * offset;
  if (count == 0) {
    store<W>(mean, tile_mean);
    store<W>(m2, tile_m2);
    return;
  }
  const double share = double(n) / double(count + n);
  const Wide old = load<W>(mean), delta = tile_mean - old;
  store<W>(mean, old + delta * share);
  store<W>(m2, load<W>(m2) + tile_m2 + delta * delta * (double(count) * share));
}

// sums of d and d² over pixels [0, n), d = pre(x) - shift
template <class T, class Block>
struct ShiftedSums {
  using A = Acc<T>;
  static constexpr int W = Block::W, U = Block::U;
  Values<A, W> s1[U] = {}, s2[U] = {};

  ShiftedSums(const T* x, int64_t k, int64_t n, const Slope<A, W>& pre,
              const Values<A, W>* shift) {
    for (int64_t run = 0; run < n; run += kSummed) {
      Values<A, W> r1[U] = {}, r2[U] = {};
      for (int64_t i = run; i < std::min(n, run + kSummed); ++i)
        for (int u = 0; u < U; ++u) {
          const Values<A, W> d = pre.act(load<W>(x + i * k + u * W)) - shift[u];
          r1[u] += d;
          r2[u] += d * d;
        }
      for (int u = 0; u < U; ++u) {
        s1[u] += r1[u];
        s2[u] += r2[u];
      }
    }
  }
};

template <class T, class Block>
void tile_moments(const T* x, int64_t k, int64_t n, double pre_slope, int64_t count,
                  const Moments& moments) {
  using A = Acc<T>;
  constexpr int W = Block::W, U = Block::U;
  const Slope<A, W> pre(pre_slope);
  const int64_t few = std::min(n, kFirst);
  for (int64_t c = 0; c < k; c += Block::channels) {
    Values<A, W> shift[U] = {};
    const ShiftedSums<T, Block> first(x + c, k, few, pre, shift);
    for (int u = 0; u < U; ++u) {
      shift[u] = first.s1[u] * (A(1) / A(few));
      shift[u] = shift[u] - shift[u] == 0 ? shift[u] : Values<A, W>{};  // inf and NaN
    }
    const ShiftedSums<T, Block> all(x + c, k, n, pre, shift);
    for (int u = 0; u < U; ++u) {
      const int64_t at = c + u * W;
      join<A, W>(moments.mean + at, moments.m2 + at, count, shift[u], all.s1[u], all.s2[u], n);
    }
  }
}

template <class A>
void finish(const BnStats& args, const Parts& parts) {
  const int64_t k = args.sizes.k;
  const JoinedMoments all(parts.tasks, k, [&](int64_t task, int64_t c) {
    const Moments moments(args.workspace, task, k);
    return Moment{double(parts.end(task) - parts.begin(task)), moments.mean[c], moments.m2[c]};
  });
  for (int64_t c = 0; c < k; ++c)
    write_statistics<A>(args, c, {all.count[c], all.mean[c], all.squares[c]});
}

template <class A>
void without_batch(const BnStats& args) {
  for (int64_t c = 0; c < args.sizes.k; ++c) {
    const double mean = args.training ? 0 : double(static_cast<A*>(args.running_mean)[c]);
    const double var = static_cast<A*>(args.running_var)[c];
    static_cast<A*>(args.mean)[c] = A(mean);
    static_cast<A*>(args.rstd)[c] = A(args.training ? 1 : 1 / std::sqrt(var + args.eps));
  }
}

}  // namespace

int64_t bn_stats_workspace(const Sizes& sizes) {
  const Parts parts = pixel_parts(sizes.pixels(), sizes.k);
  return parts.tasks * 2 * sizes.k * int64_t(sizeof(double));
}

void bn_stats(const BnStats& args, const Parallel& parallel) {
  const int64_t k = args.sizes.k;
  dispatch(args.dtype, k, [&](auto type, auto block) {
    using T = decltype(type);
    using A = Acc<T>;
    if (!args.training || args.sizes.pixels() == 0) return without_batch<A>(args);
    const Parts parts = pixel_parts(args.sizes.pixels(), k);
    parallel(parts.tasks, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const Moments moments(args.workspace, task, k);
        for (int64_t at = parts.begin(task); at < parts.end(task); at += parts.tile) {
          const int64_t n = std::min(parts.tile, parts.end(task) - at);
          tile_moments<T, decltype(block)>(static_cast<const T*>(args.x) + at * k, k, n,
                                           args.pre_slope, at - parts.begin(task), moments);
        }
      }
    });
    finish<A>(args, parts);
  });
}

}  // namespace fastcnn::cpu
