// How the CPU ops cut their work: spans of pixels that stay in a core's cache, in a number of tasks
// that depends on the sizes alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace fastcnn::cpu {

constexpr int64_t kTileValues = 8192;  // 32 KB in fp32
constexpr int64_t kMaxTasks = 128;
// pixels whose values are summed in fp32 before the sum goes on in fp64: rounding grows with the
// length of a chain of additions. Scalars are widened one by one, which costs them nothing.
template <int W>
constexpr int64_t kRun = W > 1 ? 8 : 1;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// [0, count) in at most kMaxTasks parts, whole tiles each
struct Parts {
  int64_t count, tile, tasks, per_task;

  Parts(int64_t count, int64_t tile) : count(count), tile(tile) {
    int64_t tiles = ceil_div(count, tile);
    per_task = std::max<int64_t>(1, ceil_div(tiles, kMaxTasks)) * tile;
    tasks = ceil_div(count, per_task);
  }
  int64_t begin(int64_t task) const { return task * per_task; }
  int64_t end(int64_t task) const { return std::min(count, (task + 1) * per_task); }
};

inline Parts pixel_parts(int64_t pixels, int64_t k) {
  return Parts(pixels, std::max<int64_t>(16, kTileValues / std::max<int64_t>(k, 1)));
}

// Affine with every array in place, and the product that the loops need
template <class A>
struct Channels {
  std::vector<A> mean, rstd, scale, bias;

  Channels(const Affine& affine, int64_t k) : mean(k), rstd(k), scale(k), bias(k) {
    for (int64_t i = 0; i < k; ++i) {
      mean[i] = value(affine.mean, i, 0);
      rstd[i] = value(affine.rstd, i, 1);
      scale[i] = rstd[i] * value(affine.weight, i, 1);
      bias[i] = value(affine.bias, i, 0);
    }
  }

 private:
  static A value(const void* array, int64_t i, A missing) {
    return array ? static_cast<const A*>(array)[i] : missing;
  }
};

}  // namespace fastcnn::cpu
