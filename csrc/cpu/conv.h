// What the passes of a 3x3 convolution with stride 1 share: how the image is cut into tiles, and the
// transforms of input tiles and of filters into the domain where the convolution is a product for
// each of kPoints² points (winograd.h).
//
// "point" is a stride between the values of two points. Strides are kept off powers of two, which
// would put all points of a value into the same sets of the caches.
#pragma once

#include <algorithm>
#include <functional>

#include "cpu.h"
#include "product.h"
#include "walk.h"
#include "winograd.h"

namespace fastcnn::cpu {

constexpr int64_t kBlock = 64;  // channels of the result that are computed together

inline int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

// a row of `channels` transformed values, padded to whole vectors
template <class A>
int64_t row_of(int64_t channels) {
  const int64_t row = round_up(channels, kLanes<A>);
  return row % (256 / int64_t(sizeof(A))) ? row : row + kLanes<A>;
}

// a stride that holds `values` and leaves the sets of a cache
template <class A>
int64_t point_of(int64_t values) {
  return round_up(values, 4096 / int64_t(sizeof(A))) + kLanes<A>;
}

template <class Tile>
constexpr int64_t kAllPoints = Tile::kPoints* Tile::kPoints;

// f(c, lanes) for the vectors of `channels`, the last of which may have fewer lanes
template <class A, class F>
inline void for_vectors(int64_t channels, F&& f) {
  constexpr int W = kLanes<A>;
  int64_t c = 0;
  for (; c + W <= channels; c += W) f(c, std::integral_constant<int64_t, W>{});
  if (c < channels) f(c, channels - c);
}

// the first lanes of a vector, as for_vectors has them; 0 in the others
template <int W, class A>
inline Values<A, W> load_lanes(const A* from, std::integral_constant<int64_t, W>) {
  return load<W>(from);
}
template <int W, class A>
inline Values<A, W> load_lanes(const A* from, int64_t n) {
  Values<A, W> v{};
  std::memcpy(&v, from, n * sizeof(A));
  return v;
}
template <int W, class A>
inline void store_lanes(A* to, Values<A, W> v, std::integral_constant<int64_t, W>) {
  store<W>(to, v);
}
template <int W, class A>
inline void store_lanes(A* to, Values<A, W> v, int64_t n) {
  std::memcpy(to, &v, n * sizeof(A));
}

// f(A{}, Tile{}): the type of the values, and the tiles for the image
template <class F>
auto with_tile(Dtype dtype, const ConvShape& shape, F&& f) {
  auto typed = [&](auto type) {
    const bool same = shape.h == shape.p && shape.w == shape.q && shape.h == shape.w &&
                      shape.top == 1 && shape.left == 1;
    if (same && shape.h == 1) return f(type, Image1{});
    if (same && shape.h == 2) return f(type, Image2{});
    return f(type, Tile4{});
  };
  if (dtype == Dtype::f32) return typed(float{});
  if (dtype == Dtype::f64) return typed(double{});
  throw std::invalid_argument("no CPU kernel of a convolution for half precision");
}

// Where a tile lies: image, first pixel of the result, and of the input (may be outside).
struct Place {
  int64_t image, p, q, h, w;
};

template <class Tile>
struct Tiling {
  ConvShape shape;
  int64_t rows, columns, count;

  explicit Tiling(const ConvShape& shape)
      : shape(shape),
        rows(ceil_div(shape.p, Tile::kTile)),
        columns(ceil_div(shape.q, Tile::kTile)),
        count(shape.n * rows * columns) {}

  Place place(int64_t tile) const {
    const int64_t p = tile / columns % rows * Tile::kTile, q = tile % columns * Tile::kTile;
    // an image of one tile without overlap is read without its padding
    constexpr bool inside = Tile::kInput == Tile::kTile;
    return {tile / columns / rows, p, q, inside ? 0 : p - shape.top, inside ? 0 : q - shape.left};
  }
};

// [0, size) of a tile that lies inside an image of `length` pixels, from pixel `first` on
struct Inside {
  int from, to;
  Inside(int64_t first, int64_t length, int size)
      : from(int(std::clamp<int64_t>(-first, 0, size))),
        to(int(std::clamp<int64_t>(length - first, from, size))) {}
  bool whole(int size) const { return from == 0 && to == size; }
};

// What is done to x while it is loaded. relu: an affine map and ReLU, as most networks have it, with
// no branch in the loops over pixels.
enum class Form { plain, relu, any };

// What a convolution reads: x itself, or post(affine(pre(x))) made while it is loaded.
template <class A>
struct Source {
  const A* x;
  Form form;
  Channels<A> channels;
  double pre_slope, post_slope;

  Source(const ConvInput& input, int64_t c)
      : x(static_cast<const A*>(input.x)),
        form(input.is_plain()                                  ? Form::plain
             : input.pre_slope == 1 && input.post_slope == 0 ? Form::relu
                                                               : Form::any),
        channels(input.affine, form == Form::plain ? 0 : c),
        pre_slope(input.pre_slope),
        post_slope(input.post_slope) {}
  explicit Source(const void* x) : Source(ConvInput{x, Affine{}, 1, 1}, 0) {}
};

// f(std::integral_constant<Form, ...>{})
template <class F>
void with_form(Form form, F&& f) {
  if (form == Form::plain) return f(std::integral_constant<Form, Form::plain>{});
  if (form == Form::relu) return f(std::integral_constant<Form, Form::relu>{});
  f(std::integral_constant<Form, Form::any>{});
}

// one vector of channels of a source
template <class A, Form F>
struct SourceVector {
  static constexpr int W = kLanes<A>;
  using V = Values<A, W>;
  V mean{}, scale{}, bias{};
  Slope<A, W> pre, post;

  template <class Lanes>
  SourceVector(const Source<A>& source, int64_t c, Lanes lanes)
      : pre(source.pre_slope), post(source.post_slope) {
    if (F == Form::plain) return;
    mean = load_lanes<W>(&source.channels.mean[c], lanes);
    scale = load_lanes<W>(&source.channels.scale[c], lanes);
    bias = load_lanes<W>(&source.channels.bias[c], lanes);
  }
  V centred(V x) const { return (F == Form::any ? pre.act(x) : x) - mean; }
  V affine(V centred) const { return centred * scale + bias; }
  V operator()(V x) const {
    if constexpr (F == Form::plain) return x;
    const V z = affine(centred(x));
    if constexpr (F == Form::relu) return z <= 0 ? V{} : z;
    return post.act(z);
  }
  // of a gradient for what the source made of x
  V masked(V g, V centred) const {
    const V z = affine(centred);
    if constexpr (F == Form::relu) return z <= 0 ? V{} : g;
    return post.none() ? g : post.backward(g, post.negative(z));
  }
  V through_pre(V g, V x) const {
    return F == Form::any && !pre.none() ? pre.backward(g, pre.negative(x)) : g;
  }
};

// the part of [0, count) that one of `slices` takes
struct Slice {
  int64_t begin, end;
  Slice(int64_t count, int64_t slice, int64_t slices)
      : begin(count * slice / slices), end(count * (slice + 1) / slices) {}
};

template <class F>
void for_slices(const Parallel& parallel, int64_t slices, F&& f) {
  parallel(slices, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) f(slice);
  });
}

// store(i, j, value) ← the map of both axes, one vector: map takes From values of a line to To
template <int From, int To, class V, class Map, class Load, class Store>
inline void transform(Map&& map, Load&& load, Store&& store) {
  V half[From][To];
  for (int r = 0; r < From; ++r) {
    V line[From];
    for (int s = 0; s < From; ++s) line[s] = load(r, s);
    map(line, half[r]);
  }
  for (int j = 0; j < To; ++j) {
    V line[From], out[To];
    for (int r = 0; r < From; ++r) line[r] = half[r][j];
    map(line, out);
    for (int i = 0; i < To; ++i) store(i, j, out[i]);
  }
}

// v[(i · kPoints + j) · point] ← B' d B for one tile and one vector, load(r, s) its pixels
template <class Tile, int W, class A, class Load>
inline void transform_input(Load&& load, A* v, int64_t point) {
  using V = Values<A, W>;
  constexpr int P = Tile::kPoints;
  transform<Tile::kInput, P, V>([](const V* d, V* out) { Tile::input(d, out); }, load,
                                [&](int i, int j, V value) {
                                  store<W>(v + (i * P + j) * point, value);
                                });
}

template <class Tile, class A, Form F>
inline void input_tile(const Tiling<Tile>& tiling, int64_t tile, const Source<A>& source, A* v,
                       int64_t point) {
  constexpr int W = kLanes<A>, I = Tile::kInput;
  const ConvShape& shape = tiling.shape;
  const Place at = tiling.place(tile);
  const Inside rows(at.h, shape.h, I), columns(at.w, shape.w, I);
  // of pixels outside the image none is read
  auto offset = [&](int r, int s) {
    return ((at.image * shape.h + at.h + r) * shape.w + at.w + s) * shape.c;
  };
  for_vectors<A>(shape.c, [&](int64_t c, auto lanes) {
    const SourceVector<A, F> activate(source, c, lanes);
    auto pixel = [&](int r, int s) {
      return activate(load_lanes<W>(source.x + offset(r, s) + c, lanes));
    };
    if (rows.whole(I) && columns.whole(I)) return transform_input<Tile, W>(pixel, v + c, point);
    auto inside = [&](int r, int s) {
      const bool is = r >= rows.from && r < rows.to && s >= columns.from && s < columns.to;
      return is ? pixel(r, s) : Values<A, W>{};
    };
    transform_input<Tile, W>(inside, v + c, point);
  });
}

// the tiles [first, first + n): rows of v
template <class Tile, class A>
void input_tiles(const Tiling<Tile>& tiling, int64_t first, int64_t n, const Source<A>& source,
                 Rows<A> v, int64_t point) {
  with_form(source.form, [&](auto form) {
    for (int64_t t = 0; t < n; ++t)
      input_tile<Tile, A, form()>(tiling, first + t, source, v.at + t * v.row, point);
  });
}

// u[(i · kPoints + j) · point] ← G g G' for one vector of filters
template <class Tile, int W, class A>
inline void transform_filter(const Values<A, W> (&g)[3][3], A* u, int64_t point) {
  using V = Values<A, W>;
  constexpr int P = Tile::kPoints;
  transform<3, P, V>([](const V* d, V* out) { Tile::filter(d, out); },
                     [&](int r, int s) { return g[r][s]; },
                     [&](int i, int j, V value) { store<W>(u + (i * P + j) * point, value); });
}

// Filters (K, 3, 3, C) as the product's right side: for a block of results, rows of what is summed
// over. Forward that is (C rows, K columns); for the data gradient, turned by half a turn, (K, C).
template <class A>
struct Filters {
  const A* at;
  int64_t k, c;
  bool turned;

  int64_t depth() const { return turned ? k : c; }
  int64_t results() const { return turned ? c : k; }
};

// the filters of row d and a vector of C from c on, turned
template <class A, class Lanes>
inline void turned_taps(const Filters<A>& filters, int64_t d, int64_t c, Lanes lanes,
                        Values<A, kLanes<A>> (&g)[3][3]) {
  constexpr int W = kLanes<A>;
  for (int r = 0; r < 3; ++r)
    for (int s = 0; s < 3; ++s)
      g[r][s] = load_lanes<W>(
          filters.at + ((d * 3 + 2 - r) * 3 + 2 - s) * filters.c + c, lanes);
}

// taps[c][r][s] ← vectors of the filters k … k + lanes, for the channels c … c + channels
template <class A>
inline void gathered_taps(const Filters<A>& filters, int64_t k, int64_t lanes, int64_t c,
                          int64_t channels, A (*taps)[9][kLanes<A>]) {
  if (lanes < kLanes<A>) std::memset(taps, 0, sizeof(*taps) * channels);
  for (int64_t i = 0; i < lanes; ++i) {
    const A* from = filters.at + (k + i) * 9 * filters.c + c;
    for (int tap = 0; tap < 9; ++tap)
      for (int64_t d = 0; d < channels; ++d) taps[d][tap][i] = from[tap * filters.c + d];
  }
}

// The rows [first, last) of the transformed filters for the results [from, from + kBlock): u is
// (points, depth, kBlock), of which whole vectors are written.
template <class Tile, class A>
void filter_rows(const Filters<A>& filters, int64_t from, int64_t first, int64_t last, A* u,
                 int64_t point) {
  constexpr int W = kLanes<A>;
  const int64_t results = std::min(kBlock, filters.results() - from);
  if (filters.turned) {
    for (int64_t d = first; d < last; ++d)
      for_vectors<A>(results, [&](int64_t j, auto lanes) {
        Values<A, W> g[3][3];
        turned_taps(filters, d, from + j, lanes, g);
        transform_filter<Tile, W>(g, u + d * kBlock + j, point);
      });
    return;
  }
  for (int64_t c = first; c < last; c += W) {
    const int64_t channels = std::min<int64_t>(W, last - c);
    for_vectors<A>(results, [&](int64_t j, auto lanes) {
      alignas(64) A taps[W][9][W];
      gathered_taps(filters, from + j, int64_t(lanes), c, channels, taps);
      for (int64_t d = 0; d < channels; ++d) {
        Values<A, W> g[3][3];
        for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3] = load<W>(taps[d][tap]);
        transform_filter<Tile, W>(g, u + (c + d) * kBlock + j, point);
      }
    });
  }
}

}  // namespace fastcnn::cpu
