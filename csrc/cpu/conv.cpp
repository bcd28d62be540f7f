// The 3x3 convolution, stride 1, with what follows it: bias, activation, affine map, residual,
// activation, 2x2 max-pool, and the partial statistics of a batch norm, all on a tile of the result
// that lies in registers. What the layer before left pending is applied while its input is loaded.
//
// torch's chain writes and reads the whole tensor for each of these; and F(4x4, 3x3) takes a quarter
// of the products (winograd.h).
#include "conv_product.h"
#include "moments.h"

namespace fastcnn::cpu {
namespace {

template <class Tile, class A>
struct Result {
  static constexpr int W = kLanes<A>, T = Tile::kTile;
  const Conv& args;
  const Tiling<Tile>& tiling;
  bool bare;   // nothing follows the product
  A* moments;  // (3, blocks, K): mean, squared deviations from it and count; null: not wanted
  int64_t blocks;

  template <class Lanes>
  struct Vector {
    const Result& all;
    int64_t k;
    Lanes lanes;
    Values<A, W> bias, scale, shift;
    Slope<A, W> pre, post, stats;
    // of the block: shifted by about their mean, so that squares do not cancel
    Values<A, W> about{}, sum{}, squares{};
    int64_t count = 0;

    Vector(const Result& all, int64_t k, Lanes lanes)
        : all(all), k(k), lanes(lanes), bias(vector(all.args.bias, 0)),
          scale(vector(all.args.scale, 1)), shift(vector(all.args.shift, 0)),
          pre(all.args.pre_slope), post(all.args.post_slope), stats(all.args.stats_slope) {}

    Values<A, W> vector(const void* array, A missing) const {
      if (!array) return Values<A, W>{} + missing;
      return load_lanes<W>(static_cast<const A*>(array) + k, lanes);
    }

    void add(int64_t tile, Values<A, W> (&y)[T][T]) {
      const Place at = all.tiling.place(tile);
      const ConvShape& shape = all.tiling.shape;
      const int rows = int(std::min<int64_t>(T, shape.p - at.p));
      const int columns = int(std::min<int64_t>(T, shape.q - at.q));
      const Conv& args = all.args;
      if (!all.bare)
        for (int r = 0; r < rows; ++r)
          for (int s = 0; s < columns; ++s) y[r][s] = pre.act(y[r][s] + bias) * scale + shift;
      if (args.pool) return pool(at, rows, columns, y);
      const int64_t corner = ((at.image * shape.p + at.p) * shape.q + at.q) * shape.k + k;
      if (!all.bare) finish(corner, rows, columns, y);
      for (int r = 0; r < rows; ++r)
        for (int s = 0; s < columns; ++s)
          store_lanes<W>(static_cast<A*>(args.y) + corner + (r * shape.q + s) * shape.k, y[r][s],
                         lanes);
      if (all.moments) add_statistics(rows, columns, y);
    }

    void finish(int64_t corner, int rows, int columns, Values<A, W> (&y)[T][T]) const {
      const ConvShape& shape = all.tiling.shape;
      const A* residual = static_cast<const A*>(all.args.residual);
      for (int r = 0; r < rows; ++r)
        for (int s = 0; s < columns; ++s) {
          const int64_t at = corner + (r * shape.q + s) * shape.k;
          if (residual) y[r][s] += load_lanes<W>(residual + at, lanes);
          y[r][s] = post.act(y[r][s]);
        }
    }

    void pool(const Place& at, int rows, int columns, Values<A, W> (&y)[T][T]) const {
      const ConvShape& shape = all.tiling.shape;
      const int64_t pp = shape.p / 2, qq = shape.q / 2;
      for (int r = 0; r + 1 < rows; r += 2)
        for (int s = 0; s + 1 < columns; s += 2) {
          const int64_t to =
              ((at.image * pp + (at.p + r) / 2) * qq + (at.q + s) / 2) * shape.k + k;
          pool_window({y[r][s], y[r][s + 1], y[r + 1][s], y[r + 1][s + 1]}, to);
        }
    }

    void pool_window(const Values<A, W> (&z)[4], int64_t to) const {
      Values<A, W> best = z[0];
      Mask<A, W> code{};
      for (int i = 1; i < 4; ++i) {
        // torch's comparison: the first of equal values wins, a NaN over all before it
        const Mask<A, W> wins = (z[i] > best) | (z[i] != z[i]);
        best = wins ? z[i] : best;
        code = wins ? Mask<A, W>{} + i : code;
      }
      store_lanes<W>(static_cast<A*>(all.args.y) + to, post.act(best), lanes);
      if (!all.args.code) return;
      uint8_t bytes[W];
      store_code<W, A>(bytes, code | (post.negative(best) & kCodeNegative));
      std::memcpy(all.args.code + to, bytes, int64_t(lanes));
    }

    void add_statistics(int rows, int columns, Values<A, W> (&y)[T][T]) {
      if (!stats.none())
        for (int r = 0; r < rows; ++r)
          for (int s = 0; s < columns; ++s) y[r][s] = stats.act(y[r][s]);
      if (!count) {
        for (int r = 0; r < rows; ++r)
          for (int s = 0; s < columns; ++s) about += y[r][s];
        about = about * (A(1) / A(rows * columns));
        about = about - about == 0 ? about : Values<A, W>{};  // inf and NaN
      }
      Values<A, W> sums{}, products{};
      for (int r = 0; r < rows; ++r)
        for (int s = 0; s < columns; ++s) {
          const Values<A, W> d = y[r][s] - about;
          sums += d;
          products += d * d;
        }
      sum += sums;
      squares += products;
      count += rows * columns;
    }

    void end(int64_t block) const {
      if (!all.moments) return;
      const int64_t plane = all.blocks * all.tiling.shape.k;
      A* to = all.moments + block * all.tiling.shape.k + k;
      const A n = A(count);
      store_lanes<W>(to, about + sum / n, lanes);
      store_lanes<W>(to + plane, squares - sum * sum / n, lanes);
      store_lanes<W>(to + 2 * plane, Values<A, W>{} + n, lanes);
    }
  };

  template <class Lanes>
  Vector<Lanes> vector(int64_t k, Lanes lanes) const {
    return Vector<Lanes>(*this, k, lanes);
  }
};

// of parts (3, parts, K): mean, squared deviations from it and count
template <class A>
JoinedMoments joined(const A* moments, int64_t parts, int64_t k) {
  const A *mean = moments, *squares = mean + parts * k, *count = squares + parts * k;
  return {parts, k, [=](int64_t part, int64_t c) {
            const int64_t at = part * k + c;
            return Moment{double(count[at]), double(mean[at]), double(squares[at])};
          }};
}

template <class Tile, class A>
ProductPlan<Tile, A> plan_of(const ConvShape& shape, int threads) {
  return {Tiling<Tile>(shape).count, shape.c, shape.k, threads};
}

template <class A>
void merge(const BnMerge& args) {
  const JoinedMoments all = joined(static_cast<const A*>(args.partials), args.rows, args.k);
  for (int64_t c = 0; c < args.k; ++c) {
    const double count = args.count < 0 ? all.count[c] : double(args.count);
    write_statistics<A>(args, c, {count, all.mean[c], all.squares[c]});
  }
}

}  // namespace

// of the product, and for partial statistics those of each block of tiles
int64_t conv_workspace(const ConvShape& shape, Dtype dtype, int threads) {
  return with_tile(dtype, shape, [&](auto type, auto tile) {
    const auto plan = plan_of<decltype(tile), decltype(type)>(shape, threads);
    return plan.bytes() + 3 * plan.blocks() * shape.k * int64_t(sizeof(type));
  });
}

void conv(const Conv& args, void* workspace, int threads, const Parallel& parallel) {
  with_tile(args.dtype, args.shape, [&](auto type, auto tile) {
    using A = decltype(type);
    using Tile = decltype(tile);
    const ConvShape& shape = args.shape;
    const Tiling<Tile> tiling(shape);
    const auto plan = plan_of<Tile, A>(shape, threads);
    A* moments = args.partials ? static_cast<A*>(workspace) + plan.bytes() / sizeof(A) : nullptr;
    const Filters<A> filters{static_cast<const A*>(args.filter), shape.k, shape.c, false};
    const bool bare = !args.bias && !args.scale && !args.shift && !args.residual &&
                      args.pre_slope == 1 && args.post_slope == 1;
    multiply(plan, tiling, Source<A>(args.input, shape.c), filters, workspace, parallel,
             Result<Tile, A>{args, tiling, bare, moments, plan.blocks()});
    if (!moments) return;
    const JoinedMoments all = joined(moments, plan.blocks(), shape.k);
    A* to = static_cast<A*>(args.partials);
    for (const auto* part : {&all.mean, &all.squares, &all.count})
      to = std::copy(part->begin(), part->end(), to);
  });
}

void bn_merge(const BnMerge& args, Dtype dtype) {
  dtype == Dtype::f64 ? merge<double>(args) : merge<float>(args);
}

}  // namespace fastcnn::cpu
