// Batch statistics: mean and rstd of each channel, and the running statistics, in one read of x.
//
// A tile's sums are taken about its first pixel, so that a mean far from 0 cancels nothing, and
// joined as (count, mean, M2) by Chan, Golub and LeVeque 1983, equation 1.5.
#include <cmath>

#include "cpu.h"
#include "walk.h"

namespace fastcnn::cpu {
namespace {

template <class A>
struct Moments {  // of K channels: mean and sum of squared deviations of `count` values each
  A* mean;
  A* m2;
};

// joins the moments of one block of channels of a tile (n values, offset from `shift`) to those of
// the `count` values before it
template <class A, int W>
void join(A* mean, A* m2, int64_t count, Values<A, W> shift, Values<A, W> s1, Values<A, W> s2,
          int64_t n) {
  const A part = A(1) / A(n);
  Values<A, W> offset = s1 * part;
  Values<A, W> tile_mean = shift + offset, tile_m2 = s2 - s1 * offset;
  if (count == 0) {
    store<W>(mean, tile_mean);
    store<W>(m2, tile_m2);
    return;
  }
  const A share = A(n) / A(count + n);
  Values<A, W> old = load<W>(mean), delta = tile_mean - old;
  store<W>(mean, old + delta * share);
  store<W>(m2, load<W>(m2) + tile_m2 + delta * delta * (A(count) * share));
}

template <class T, class Block>
void tile_moments(const T* x, int64_t k, int64_t n, double pre_slope, int64_t count,
                  Moments<Acc<T>> sums) {
  using A = Acc<T>;
  constexpr int W = Block::W, U = Block::U;
  const Slope<A, W> pre(pre_slope);
  for (int64_t c = 0; c < k; c += Block::channels) {
    Values<A, W> shift[U], s1[U], s2[U];
    for (int u = 0; u < U; ++u) {
      shift[u] = pre.act(load<W>(x + c + u * W));
      shift[u] = shift[u] - shift[u] == 0 ? shift[u] : Values<A, W>{};  // inf and NaN
      s1[u] = s2[u] = Values<A, W>{};
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int u = 0; u < U; ++u) {
        Values<A, W> d = pre.act(load<W>(x + i * k + c + u * W)) - shift[u];
        s1[u] += d;
        s2[u] += d * d;
      }
    }
    for (int u = 0; u < U; ++u) {
      int64_t at = c + u * W;
      join<A, W>(sums.mean + at, sums.m2 + at, count, shift[u], s1[u], s2[u], n);
    }
  }
}

// joins the tasks' moments in their order, all channels of a task at a time
template <class A>
void finish(const BnStats& args, const A* partials, const Parts& parts) {
  const int64_t k = args.sizes.k;
  const double pixels = double(args.sizes.pixels());
  std::vector<double> mean(k), m2(k);
  auto count = [&](int64_t task) { return double(parts.end(task) - parts.begin(task)); };
  for (int64_t task = 0; task < parts.tasks; ++task)
    for (int64_t c = 0; c < k; ++c) mean[c] += count(task) * double(partials[2 * task * k + c]);
  for (int64_t c = 0; c < k; ++c) mean[c] /= pixels;
  for (int64_t task = 0; task < parts.tasks; ++task)
    for (int64_t c = 0; c < k; ++c) {
      const double delta = partials[2 * task * k + c] - mean[c];
      m2[c] += partials[(2 * task + 1) * k + c] + count(task) * delta * delta;
    }
  auto move = [&](void* running, int64_t c, double to) {
    A& value = static_cast<A*>(running)[c];
    value = A((1 - args.momentum) * value + args.momentum * to);
  };
  for (int64_t c = 0; c < k; ++c) {
    static_cast<A*>(args.mean)[c] = A(mean[c]);
    static_cast<A*>(args.rstd)[c] = A(1 / std::sqrt(m2[c] / pixels + args.eps));
    move(args.running_mean, c, mean[c]);
    move(args.running_var, c, m2[c] / (pixels - 1));
  }
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
    auto* partials = static_cast<A*>(args.workspace);
    parallel(parts.tasks, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        Moments<A> sums{partials + 2 * task * k, partials + (2 * task + 1) * k};
        for (int64_t at = parts.begin(task); at < parts.end(task); at += parts.tile) {
          const int64_t n = std::min(parts.tile, parts.end(task) - at);
          tile_moments<T, decltype(block)>(static_cast<const T*>(args.x) + at * k, k, n,
                                           args.pre_slope, at - parts.begin(task), sums);
        }
      }
    });
    finish<A>(args, partials, parts);
  });
}

}  // namespace fastcnn::cpu
