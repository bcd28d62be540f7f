// What the two backward ops share: the sums over all pixels, and dx of one vector of channels.
#pragma once

#include "walk.h"

namespace fastcnn::cpu {

// (v - mean) · rstd · weight + bias for one block of channels; the difference first, since a shift
// folded into the bias would cancel where the mean is large
template <class A, class Block>
struct Normaliser {
  static constexpr int W = Block::W, U = Block::U;
  Values<A, W> mean[U], scale[U], bias[U];

  Normaliser(const Channels<A>& channels, int64_t c) {
    for (int u = 0; u < U; ++u) {
      mean[u] = load<W>(&channels.mean[c + u * W]);
      scale[u] = load<W>(&channels.scale[c + u * W]);
      bias[u] = load<W>(&channels.bias[c + u * W]);
    }
  }
  Values<A, W> affine(int u, Values<A, W> centred) const { return centred * scale[u] + bias[u]; }
  Values<A, W> operator()(int u, Values<A, W> v) const { return affine(u, v - mean[u]); }
};

// rstd · weight · (g - mean(g) - x̂ · mean(g · x̂)), the means 0 without batch statistics
template <class A>
struct InputGradient {
  const Channels<A>& channels;
  bool batch_stats;
  std::vector<A> mean_g, slope;

  InputGradient(const Channels<A>& channels, bool batch_stats, const void* dweight,
                const void* dbias, int64_t pixels)
      : channels(channels), batch_stats(batch_stats) {
    if (!batch_stats) return;
    for (size_t c = 0; c < channels.mean.size(); ++c) {
      mean_g.push_back(static_cast<const A*>(dbias)[c] / A(pixels));
      slope.push_back(static_cast<const A*>(dweight)[c] * channels.rstd[c] / A(pixels));
    }
  }
};

template <class A, class Block>
struct InputGradientBlock {
  static constexpr int W = Block::W, U = Block::U;
  Values<A, W> scale[U], mean_g[U], slope[U];
  bool batch_stats;

  InputGradientBlock(const InputGradient<A>& all, int64_t c) : batch_stats(all.batch_stats) {
    for (int u = 0; u < U; ++u) {
      scale[u] = load<W>(&all.channels.scale[c + u * W]);
      if (!batch_stats) continue;
      mean_g[u] = load<W>(&all.mean_g[c + u * W]);
      slope[u] = load<W>(&all.slope[c + u * W]);
    }
  }
  Values<A, W> operator()(int u, Values<A, W> g, Values<A, W> centred) const {
    if (batch_stats) g = g - mean_g[u] - centred * slope[u];
    return g * scale[u];
  }
};

// Σ g and Σ g · (pre(x) - mean) of one task: partial sums [task][2][K], joined in the tasks' order;
// without partials of no use
struct TaskSums {
  double* g;
  double* gx;

  TaskSums(void* partials, int64_t task, int64_t k)
      : g(partials ? static_cast<double*>(partials) + 2 * task * k : nullptr),
        gx(partials ? g + k : nullptr) {}
  void clear(int64_t k) const { std::fill(g, g + 2 * k, 0.0); }
};

template <class A, class Block>
struct BlockSums {
  static constexpr int W = Block::W, U = Block::U;
  Values<A, W> run_g[U] = {}, run_gx[U] = {};
  Values<double, W> g[U] = {}, gx[U] = {};

  void add(int u, Values<A, W> value, Values<A, W> centred) {
    run_g[u] += value;
    run_gx[u] += value * centred;
  }
  void end_run() {
    for (int u = 0; u < U; ++u) {
      g[u] += widen<W>(run_g[u]);
      gx[u] += widen<W>(run_gx[u]);
      run_g[u] = run_gx[u] = Values<A, W>{};
    }
  }
  void add_to(const TaskSums& sums, int64_t c) const {
    for (int u = 0; u < U; ++u) {
      double *to = sums.g + c + u * W, *to_x = sums.gx + c + u * W;
      store<W>(to, load<W>(to) + g[u]);
      store<W>(to_x, load<W>(to_x) + gx[u]);
    }
  }
};

// dbias = Σ g, dweight = rstd · Σ g · (pre(x) - mean); either may be null
template <class A>
void finish_sums(const Channels<A>& channels, void* partials, int64_t tasks, void* dweight,
                 void* dbias) {
  const int64_t k = int64_t(channels.mean.size());
  std::vector<double> g(k), gx(k);
  for (int64_t task = 0; task < tasks; ++task) {
    const TaskSums sums(partials, task, k);
    for (int64_t c = 0; c < k; ++c) g[c] += sums.g[c];
    for (int64_t c = 0; c < k; ++c) gx[c] += sums.gx[c];
  }
  for (int64_t c = 0; c < k; ++c) {
    if (dbias) static_cast<A*>(dbias)[c] = A(g[c]);
    if (dweight) static_cast<A*>(dweight)[c] = A(channels.rstd[c] * gx[c]);
  }
}

}  // namespace fastcnn::cpu
