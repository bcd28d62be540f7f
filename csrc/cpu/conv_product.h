// The convolution of tiles: transformed input times transformed filters for each point, the result
// transformed back and handed to an epilogue while it is in a core's cache.
//
// Small filters are transformed once, and each core takes blocks of tiles from input to result.
// Filters that a cache cannot hold beside a block are cheaper to make than to fetch: there the
// input is transformed first, and each core takes kBlock results and transforms their filters.
#pragma once

#include "conv.h"

namespace fastcnn::cpu {

constexpr int64_t kCoreBytes = 1 << 20;    // of a block's input, about a second-level cache
constexpr int64_t kFilterBytes = 4 << 20;  // of transformed filters that are made once
constexpr int64_t kInputBytes = 16 << 20;  // of input that is transformed at once

template <class Tile, class A>
struct ProductPlan {
  static constexpr int64_t kPointCount = kAllPoints<Tile>;
  int64_t depth, results, tiles, slices;
  int64_t blocks_of_results, row, block;  // tiles a block
  bool large;                             // filters
  int64_t span;                           // tiles whose input is transformed at once
  int64_t input_point, filter_point, result_point;

  ProductPlan(int64_t tiles, int64_t depth, int64_t results, int threads)
      : depth(depth), results(results), tiles(tiles) {
    constexpr int64_t size = sizeof(A);
    blocks_of_results = ceil_div(results, kBlock);
    row = row_of<A>(depth);
    large = kPointCount * depth * blocks_of_results * kBlock * size > kFilterBytes;
    const int64_t fits = kCoreBytes / (kPointCount * (row + kBlock) * size);
    block = std::clamp<int64_t>(fits / kRows * kRows, 4 * kRows, 8 * kRows);
    span = large ? std::max(block, kInputBytes / (kPointCount * row * size) / block * block) : block;
    span = std::min(span, round_up(tiles, block));
    slices = std::min<int64_t>(threads, large ? tasks() : ceil_div(tiles, block));
    input_point = point_of<A>(span * row);
    filter_point = point_of<A>(depth * kBlock);
    result_point = point_of<A>(block * kBlock);
  }

  int64_t blocks() const { return ceil_div(tiles, block); }
  // of large filters: blocks of results, each in parts of a span's tiles where cores would idle
  int64_t tasks() const { return blocks_of_results * ceil_div(span, block); }
  int64_t input_values() const { return kPointCount * input_point; }
  int64_t filter_values() const { return kPointCount * filter_point; }
  int64_t result_values() const { return kPointCount * result_point; }
  // Σ: small filters: all of them, and a block of input and of result a slice;
  //    large filters: a span of input, and a block of filters and of result a slice
  int64_t bytes() const {
    const int64_t shared = large ? input_values() : blocks_of_results * filter_values();
    const int64_t own = large ? filter_values() : input_values();
    return (shared + slices * (own + result_values())) * int64_t(sizeof(A));
  }
};

// y[r][s] ← A' m A for one vector
template <class Tile, int W, class A>
inline void transform_output(const A* m, int64_t point,
                             Values<A, W> (&y)[Tile::kTile][Tile::kTile]) {
  using V = Values<A, W>;
  constexpr int P = Tile::kPoints;
  transform<P, Tile::kTile, V>([](const V* d, V* out) { Tile::output(d, out); },
                               [&](int i, int j) { return load<W>(m + (i * P + j) * point); },
                               [&](int r, int s, V value) { y[r][s] = value; });
}

// One block of tiles times one block of results. epilogue.vector(k, lanes) takes the tiles of one
// vector of results, add(tile, y), and then end(number of the block).
template <class Tile, class A, class Epilogue>
void multiply_block(const ProductPlan<Tile, A>& plan, Rows<const A> v, int64_t first, int64_t n,
                    const A* u, int64_t from, A* m, const Epilogue& epilogue) {
  constexpr int W = kLanes<A>, T = Tile::kTile;
  const int64_t results = std::min(kBlock, plan.results - from);
  const int64_t vectors = ceil_div(results, W);
  for (int64_t p = 0; p < plan.kPointCount; ++p)
    for (int64_t j = 0; j < vectors; j += kVectors)
      product<A>(n, int(std::min<int64_t>(kVectors, vectors - j)),
                 {v.at + p * plan.input_point, v.row, 1},
                 {u + p * plan.filter_point + j * W, kBlock}, plan.depth,
                 {m + p * plan.result_point + j * W, kBlock}, false);
  for_vectors<A>(results, [&](int64_t j, auto lanes) {
    auto vector = epilogue.vector(from + j, lanes);
    for (int64_t t = 0; t < n; ++t) {
      Values<A, W> y[T][T];
      transform_output<Tile, W>(m + t * kBlock + j, plan.result_point, y);
      vector.add(first + t, y);
    }
    vector.end(first / plan.block);
  });
}

template <class Tile, class A, class Epilogue>
void multiply_small(const ProductPlan<Tile, A>& plan, const Tiling<Tile>& tiling,
                    const Source<A>& source, const Filters<A>& filters, A* workspace,
                    const Parallel& parallel, const Epilogue& epilogue) {
  A* own = workspace + plan.blocks_of_results * plan.filter_values();
  const int64_t parts = ceil_div(plan.depth, kLanes<A>);
  parallel(plan.blocks_of_results * parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / parts, first = task % parts * kLanes<A>;
      filter_rows<Tile>(filters, block * kBlock, first,
                        std::min<int64_t>(first + kLanes<A>, plan.depth),
                        workspace + block * plan.filter_values(), plan.filter_point);
    }
  });
  for_slices(parallel, plan.slices, [&](int64_t slice) {
    A* v = own + slice * (plan.input_values() + plan.result_values());
    A* m = v + plan.input_values();
    const Slice blocks(plan.blocks(), slice, plan.slices);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const int64_t first = b * plan.block, n = std::min(plan.block, plan.tiles - first);
      input_tiles(tiling, first, n, source, Rows<A>{v, plan.row}, plan.input_point);
      for (int64_t k = 0; k < plan.blocks_of_results; ++k)
        multiply_block(plan, {v, plan.row}, first, n, workspace + k * plan.filter_values(),
                       k * kBlock, m, epilogue);
    }
  });
}

template <class Tile, class A, class Epilogue>
void multiply_large(const ProductPlan<Tile, A>& plan, const Tiling<Tile>& tiling,
                    const Source<A>& source, const Filters<A>& filters, A* v,
                    const Parallel& parallel, const Epilogue& epilogue) {
  A* own = v + plan.input_values();
  for (int64_t start = 0; start < plan.tiles; start += plan.span) {
    const int64_t span = std::min(plan.span, plan.tiles - start);
    parallel(span, [&](int64_t begin, int64_t end) {
      input_tiles(tiling, start + begin, end - begin, source,
                  Rows<A>{v + begin * plan.row, plan.row}, plan.input_point);
    });
    const int64_t blocks = ceil_div(span, plan.block), tasks = plan.blocks_of_results * blocks;
    for_slices(parallel, std::min(plan.slices, tasks), [&](int64_t slice) {
      A* u = own + slice * (plan.filter_values() + plan.result_values());
      A* m = u + plan.filter_values();
      const Slice part(tasks, slice, std::min(plan.slices, tasks));
      int64_t made = -1;
      for (int64_t task = part.begin; task < part.end; ++task) {
        const int64_t k = task / blocks, at = task % blocks * plan.block;
        if (k != made)
          filter_rows<Tile>(filters, k * kBlock, 0, plan.depth, u, plan.filter_point);
        made = k;
        multiply_block(plan, {v + at * plan.row, plan.row}, start + at,
                       std::min(plan.block, span - at), u, k * kBlock, m, epilogue);
      }
    });
  }
}

// workspace: plan.bytes()
template <class Tile, class A, class Epilogue>
void multiply(const ProductPlan<Tile, A>& plan, const Tiling<Tile>& tiling,
              const Source<A>& source, const Filters<A>& filters, void* workspace,
              const Parallel& parallel, const Epilogue& epilogue) {
  auto* values = static_cast<A*>(workspace);
  if (plan.large)
    multiply_large(plan, tiling, source, filters, values, parallel, epilogue);
  else
    multiply_small(plan, tiling, source, filters, values, parallel, epilogue);
}

}  // namespace fastcnn::cpu
