// The gradient of a 3x3 convolution's filters: Σ over the tiles of transformed input times
// transformed dy, for each point, and one transform back at the end (winograd.h).
//
// Small filters: each core sums its own tiles, and the sums are added up in order. Large ones: both
// are transformed first, and each core takes a part of the filters over all tiles, whose sums stay
// in registers. The sums of a bounded number of tiles are added to a total, since the rounding of
// one long chain of additions would grow with the batch.
#include "conv.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t kSumBytes = 4 << 20;    // of the sums of a core, as far as they are small
constexpr int64_t kSpanBytes = 32 << 20;  // of input and dy that are transformed at once
constexpr int64_t kFilterRows = 8 * kRows;
constexpr int64_t kRunBlocks = 16;  // of tiles, that are summed before they are added to the total

template <class Tile, class A>
struct GradientPlan {
  static constexpr int64_t kPointCount = kAllPoints<Tile>;
  int64_t tiles, k, c, k_row, c_row;
  bool large;
  int64_t block;   // tiles that are transformed at once
  int64_t slices;  // of small filters
  int64_t input_point, gradient_point, sum_point;

  GradientPlan(int64_t tiles, int64_t k, int64_t c, int threads)
      : tiles(tiles), k(k), c(c), k_row(row_of<A>(k)), c_row(row_of<A>(c)) {
    constexpr int64_t size = sizeof(A);
    large = kPointCount * k * c_row * size > kSumBytes;
    const int64_t fits = kSpanBytes / (kPointCount * (k_row + c_row) * size);
    block = std::min(tiles, large ? std::max<int64_t>(fits, kRows) : 8 * kRows);
    slices = std::min<int64_t>(threads, large ? parts() : ceil_div(tiles, block));
    input_point = point_of<A>(block * c_row);
    gradient_point = point_of<A>(block * k_row);
    sum_point = point_of<A>(large ? kFilterRows * kBlock : k * c_row);
  }

  // of large filters: kFilterRows x kBlock each
  int64_t parts() const { return ceil_div(k, kFilterRows) * ceil_div(c, kBlock); }
  int64_t sum_row() const { return large ? kBlock : c_row; }
  int64_t block_values() const { return kPointCount * (input_point + gradient_point); }
  int64_t sum_values() const { return kPointCount * sum_point; }
  // a slice: the sums, and of small filters their total before them
  int64_t slice_values() const { return (large ? 1 : 2) * sum_values(); }
  // Σ: a block of input and dy (small filters: a slice), and what a slice sums
  int64_t bytes() const {
    return ((large ? 1 : slices) * block_values() + slices * slice_values()) * int64_t(sizeof(A));
  }
};

// v[(i · kPoints + j) · point] ← A dy A' for the tiles [first, first + n): rows of v
template <class Tile, class A>
void gradient_tiles(const Tiling<Tile>& tiling, int64_t first, int64_t n, const A* dy, Rows<A> v,
                    int64_t point) {
  constexpr int W = kLanes<A>, T = Tile::kTile, P = Tile::kPoints;
  using V = Values<A, W>;
  const ConvShape& shape = tiling.shape;
  for (int64_t t = 0; t < n; ++t) {
    const Place at = tiling.place(first + t);
    const int64_t rows = shape.p - at.p, columns = shape.q - at.q;
    const A* corner = dy + ((at.image * shape.p + at.p) * shape.q + at.q) * shape.k;
    for_vectors<A>(shape.k, [&](int64_t k, auto lanes) {
      A* to = v.at + t * v.row + k;
      transform<T, P, V>([](const V* d, V* out) { Tile::output_gradient(d, out); },
                         [&](int r, int s) {
                           if (r >= rows || s >= columns) return V{};
                           return load_lanes<W>(corner + (r * shape.q + s) * shape.k + k, lanes);
                         },
                         [&](int i, int j, V value) { store<W>(to + (i * P + j) * point, value); });
    });
  }
}

// sums (points, rows of K, columns of C) (+)= Σ over n tiles
template <class Tile, class A>
void sum_products(const GradientPlan<Tile, A>& plan, const A* v, const A* w, int64_t n,
                  int64_t rows, int64_t columns, A* sums, bool add) {
  constexpr int W = kLanes<A>;
  const int64_t vectors = ceil_div(columns, W);
  for (int64_t p = 0; p < plan.kPointCount; ++p)
    for (int64_t j = 0; j < vectors; j += kVectors)
      product<A>(rows, int(std::min<int64_t>(kVectors, vectors - j)),
                 {w + p * plan.gradient_point, 1, plan.k_row},
                 {v + p * plan.input_point + j * W, plan.c_row}, n,
                 {sums + p * plan.sum_point + j * W, plan.sum_row()}, add);
}

// total (+)= sums, of all points
template <class Tile, class A>
void add_sums(const GradientPlan<Tile, A>& plan, const A* sums, A* total, bool add) {
  for (int64_t p = 0; p < plan.kPointCount; ++p)
    for (int64_t i = 0; i < plan.k * plan.c_row; ++i) {
      const int64_t at = p * plan.sum_point + i;
      total[at] = add ? total[at] + sums[at] : sums[at];
    }
}

// dfilter of one k, from `first` on `columns` of C, (+)= G' (Σ of the slices' sums) G
template <class Tile, class A>
void write_filter(const GradientPlan<Tile, A>& plan, const A* sums, int64_t slices,
                  int64_t columns, A* dfilter, bool add) {
  constexpr int W = kLanes<A>, P = Tile::kPoints;
  using V = Values<A, W>;
  for_vectors<A>(columns, [&](int64_t c, auto lanes) {
    transform<P, 3, V>([](const V* d, V* out) { Tile::filter_gradient(d, out); },
                       [&](int i, int j) {
                         const A* from = sums + (i * P + j) * plan.sum_point + c;
                         V sum = load<W>(from);
                         for (int64_t s = 1; s < slices; ++s)
                           sum += load<W>(from + s * plan.slice_values());
                         return sum;
                       },
                       [&](int r, int s, V value) {
                         A* to = dfilter + (r * 3 + s) * plan.c + c;
                         if (add) value += load_lanes<W>(to, lanes);
                         store_lanes<W>(to, value, lanes);
                       });
  });
}

template <class Tile, class A>
void gradient_small(const GradientPlan<Tile, A>& plan, const Tiling<Tile>& tiling,
                    const Source<A>& source, const A* dy, A* dfilter, A* totals,
                    const Parallel& parallel) {
  A* own = totals + plan.slices * plan.slice_values();
  for_slices(parallel, plan.slices, [&](int64_t slice) {
    A* v = own + slice * plan.block_values();
    A* w = v + plan.kPointCount * plan.input_point;
    A* total = totals + slice * plan.slice_values();
    A* sums = total + plan.sum_values();
    const Slice blocks(ceil_div(plan.tiles, plan.block), slice, plan.slices);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const int64_t first = b * plan.block, n = std::min(plan.block, plan.tiles - first);
      input_tiles(tiling, first, n, source, Rows<A>{v, plan.c_row}, plan.input_point);
      gradient_tiles(tiling, first, n, dy, Rows<A>{w, plan.k_row}, plan.gradient_point);
      const int64_t done = b - blocks.begin, in_run = done % kRunBlocks;
      sum_products(plan, v, w, n, plan.k, plan.c, sums, in_run > 0);
      if (in_run + 1 == kRunBlocks || b + 1 == blocks.end)
        add_sums(plan, sums, total, done >= kRunBlocks);
    }
  });
  parallel(plan.k, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      write_filter(plan, totals + k * plan.c_row, plan.slices, plan.c, dfilter + k * 9 * plan.c,
                   false);
  });
}

template <class Tile, class A>
void gradient_large(const GradientPlan<Tile, A>& plan, const Tiling<Tile>& tiling,
                    const Source<A>& source, const A* dy, A* dfilter, A* v,
                    const Parallel& parallel) {
  A* w = v + plan.kPointCount * plan.input_point;
  A* own = v + plan.block_values();  // of the slices
  const int64_t columns = ceil_div(plan.c, kBlock);
  for (int64_t start = 0; start < plan.tiles; start += plan.block) {
    const int64_t n = std::min(plan.block, plan.tiles - start);
    parallel(n, [&](int64_t begin, int64_t end) {
      input_tiles(tiling, start + begin, end - begin, source,
                  Rows<A>{v + begin * plan.c_row, plan.c_row}, plan.input_point);
      gradient_tiles(tiling, start + begin, end - begin, dy,
                     Rows<A>{w + begin * plan.k_row, plan.k_row}, plan.gradient_point);
    });
    for_slices(parallel, plan.slices, [&](int64_t slice) {
      A* sums = own + slice * plan.sum_values();
      const Slice parts(plan.parts(), slice, plan.slices);
      for (int64_t part = parts.begin; part < parts.end; ++part) {
        const int64_t k = part / columns * kFilterRows, c = part % columns * kBlock;
        const int64_t rows = std::min(kFilterRows, plan.k - k), some = std::min(kBlock, plan.c - c);
        sum_products(plan, v + c, w + k, n, rows, some, sums, false);
        for (int64_t i = 0; i < rows; ++i)
          write_filter(plan, sums + i * kBlock, 1, some, dfilter + (k + i) * 9 * plan.c + c,
                       start > 0);
      }
    });
  }
}

}  // namespace

int64_t conv_weight_gradient_workspace(const ConvShape& shape, Dtype dtype, int threads) {
  return with_tile(dtype, shape, [&](auto type, auto tile) {
    using Tile = decltype(tile);
    const Tiling<Tile> tiling(shape);
    return GradientPlan<Tile, decltype(type)>(tiling.count, shape.k, shape.c, threads).bytes();
  });
}

void conv_weight_gradient(const ConvWeightGradient& args, int threads, const Parallel& parallel) {
  with_tile(args.dtype, args.shape, [&](auto type, auto tile) {
    using A = decltype(type);
    using Tile = decltype(tile);
    const Tiling<Tile> tiling(args.shape);
    const GradientPlan<Tile, A> plan(tiling.count, args.shape.k, args.shape.c, threads);
    const Source<A> source(args.input, args.shape.c);
    auto* dy = static_cast<const A*>(args.dy);
    auto* dfilter = static_cast<A*>(args.dfilter);
    auto* workspace = static_cast<A*>(args.workspace);
    if (plan.large)
      gradient_large(plan, tiling, source, dy, dfilter, workspace, parallel);
    else
      gradient_small(plan, tiling, source, dy, dfilter, workspace, parallel);
  });
}

}  // namespace fastcnn::cpu
