// Normalise (or add a bias), activate and max-pool: x is read once, what is written is a quarter of
// it and one byte for each pooled value, in place of torch's full-size tensor and eight-byte index.
// The backward gathers by that byte: nothing is cleared first, nothing is added twice.
#include <limits>

#include "cpu.h"
#include "gradient.h"

namespace fastcnn::cpu {
namespace {

// the windows' geometry: P x Q pixels in, PP x QQ out
struct Windows {
  int64_t p, q, pp, qq, k;
  Pool pool;

  Windows(const Sizes& sizes, const Pool& pool)
      : p(sizes.p), q(sizes.q), pp(pool.output(p)), qq(pool.output(q)), k(sizes.k), pool(pool) {}

  // of a window with output index `out`: the part [low, high) inside [0, size)
  int low(int64_t out) const { return int(std::max<int64_t>(0, pool.padding - out * pool.stride)); }
  int high(int64_t out, int64_t size) const {
    return int(std::min<int64_t>(pool.window, size + pool.padding - out * pool.stride));
  }
  int64_t pixel(int64_t out, int inside) const { return out * pool.stride - pool.padding + inside; }

  // windows [first, last) of an axis that cover a pixel
  int64_t first(int64_t at) const {
    const int64_t above = at + pool.padding - pool.window + 1;
    return above <= 0 ? 0 : ceil_div(above, pool.stride);
  }
  int64_t last(int64_t at, int64_t count) const {
    return std::min(count, (at + pool.padding) / pool.stride + 1);
  }
};

// one row of outputs: image n, output row i; its windows' rows [r0, r1) are inside the image
struct WindowRow {
  const Windows& w;
  int64_t n, i;
  int r0, r1;

  WindowRow(const Windows& w, int64_t out_row)
      : w(w), n(out_row / w.pp), i(out_row % w.pp), r0(w.low(i)), r1(w.high(i, w.p)) {}

  int64_t output(int64_t j) const { return ((n * w.pp + i) * w.qq + j) * w.k; }
  int first_place(int64_t j) const { return r0 * w.pool.window + w.low(j); }

  // calls body(at, place) for the pixels in the window of output j, `at` counting values of x
  template <class F>
  void for_window(int64_t j, F&& body) const {
    const int s0 = w.low(j), s1 = w.high(j, w.q);
    const int64_t corner = (n * w.p + w.pixel(i, 0)) * w.q + w.pixel(j, 0);
    for (int r = r0; r < r1; ++r)
      for (int s = s0; s < s1; ++s) body((corner + r * w.q + s) * w.k, r * w.pool.window + s);
  }
};

template <class T, class Block>
void forward_row(const BnActPool& args, const Channels<Acc<T>>& channels, const WindowRow& row) {
  using A = Acc<T>;
  constexpr int W = Block::W, U = Block::U;
  const Slope<A, W> pre(args.pre_slope), post(args.post_slope);
  const T* x = static_cast<const T*>(args.x);
  for (int64_t c = 0; c < row.w.k; c += Block::channels) {
    const Normaliser<A, Block> normalise(channels, c);
    for (int64_t j = 0; j < row.w.qq; ++j) {
      Values<A, W> best[U];
      Mask<A, W> place[U];
      for (int u = 0; u < U; ++u) {
        best[u] = Values<A, W>{} - std::numeric_limits<A>::infinity();
        place[u] = Mask<A, W>{} + row.first_place(j);
      }
      row.for_window(j, [&](int64_t at, int here) {
        for (int u = 0; u < U; ++u) {
          const Values<A, W> z = normalise(u, pre.act(load<W>(x + at + c + u * W)));
          // torch's comparison: the first of equal values wins, a NaN over all before it
          const Mask<A, W> wins = (z > best[u]) | (z != z);
          best[u] = wins ? z : best[u];
          place[u] = wins ? Mask<A, W>{} + here : place[u];
        }
      });
      const int64_t to = row.output(j) + c;
      for (int u = 0; u < U; ++u) {
        const Mask<A, W> sign = post.negative(best[u]) & kCodeNegative;
        store_code<W, A>(args.code + to + u * W, place[u] | sign);
        store<W>(static_cast<T*>(args.y) + to + u * W, post.act(best[u]));
      }
    }
  }
}

// dy · post' of one pooled block, and the places in their windows that its values belong to
template <class T, class Block>
struct Pooled {
  using A = Acc<T>;
  static constexpr int W = Block::W, U = Block::U;
  Values<A, W> g[U];
  Mask<A, W> place[U];

  Pooled(const BnActPoolBackward& args, const Slope<A, W>& post, int64_t at) {
    for (int u = 0; u < U; ++u) {
      const Mask<A, W> code = load_code<W, A>(args.code + at + u * W);
      g[u] = load<W>(static_cast<const T*>(args.dy) + at + u * W);
      place[u] = code & kCodePlace;
      if (!post.none()) g[u] = post.backward(g[u], code > kCodePlace);
    }
  }
  Values<A, W> at(int u, int here) const { return place[u] == here ? g[u] : Values<A, W>{}; }
};

template <class T, class Block>
void sum_row(const BnActPoolBackward& args, const Channels<Acc<T>>& channels,
             const WindowRow& row, const TaskSums& sums) {
  using A = Acc<T>;
  constexpr int W = Block::W, U = Block::U;
  const Slope<A, W> pre(args.pre_slope), post(args.post_slope);
  const T* x = static_cast<const T*>(args.x);
  for (int64_t c = 0; c < row.w.k; c += Block::channels) {
    const Normaliser<A, Block> normalise(channels, c);
    BlockSums<A, Block> block;
    for (int64_t j = 0; j < row.w.qq; ++j) {
      const Pooled<T, Block> pooled(args, post, row.output(j) + c);
      Values<A, W> winner[U];
      for (int u = 0; u < U; ++u) winner[u] = normalise.mean[u];
      if (x)
        row.for_window(j, [&](int64_t at, int here) {
          for (int u = 0; u < U; ++u)
            winner[u] = pooled.place[u] == here ? load<W>(x + at + c + u * W) : winner[u];
        });
      for (int u = 0; u < U; ++u)
        block.add(u, pooled.g[u], pre.act(winner[u]) - normalise.mean[u]);
      if (j + 1 == row.w.qq || j % kRun<W> == kRun<W> - 1) block.end_run();
    }
    block.add_to(sums, c);
  }
}

// writes dx of one vector of channels
template <class T, class Block>
struct Writer {
  using A = Acc<T>;
  static constexpr int W = Block::W, U = Block::U;
  const T* x;
  T* dx;
  Slope<A, W> pre;
  Normaliser<A, Block> normalise;
  InputGradientBlock<A, Block> gradient;

  Writer(const BnActPoolBackward& args, const InputGradient<A>& input, int64_t c)
      : x(static_cast<const T*>(args.x)),
        dx(static_cast<T*>(args.dx)),
        pre(args.pre_slope),
        normalise(input.channels, c),
        gradient(input, c) {}

  void operator()(int u, int64_t at, Values<A, W> g) const {
    Values<A, W> value{};
    if (x) value = load<W>(x + at);
    const Values<A, W> d = gradient(u, g, pre.act(value) - normalise.mean[u]);
    store<W>(dx + at, pre.none() ? d : pre.backward(d, pre.negative(value)));
  }
};

// dx of the pixels [q_begin, Q) of one row, gathered from all windows that cover them; a row of
// windows is decoded once for the pixels under it
template <class T, class Block>
void gather_row(const BnActPoolBackward& args, const InputGradient<Acc<T>>& input,
                const Windows& w, int64_t n, int64_t p, int64_t q_begin,
                std::vector<Pooled<T, Block>>& decoded) {
  using A = Acc<T>;
  constexpr int W = Block::W, U = Block::U;
  const Slope<A, W> post(args.post_slope);
  const int64_t i0 = w.first(p), i1 = w.last(p, w.pp), first = w.first(q_begin);
  for (int64_t c = 0; c < w.k; c += Block::channels) {
    const Writer<T, Block> write(args, input, c);
    decoded.clear();
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = first; j < w.qq; ++j)
        decoded.emplace_back(args, post, ((n * w.pp + i) * w.qq + j) * w.k + c);
    for (int64_t q = q_begin; q < w.q; ++q) {
      const int64_t j0 = w.first(q), j1 = w.last(q, w.qq);
      Values<A, W> g[U] = {};
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) {
          const int here = int((p - w.pixel(i, 0)) * w.pool.window + q - w.pixel(j, 0));
          const Pooled<T, Block>& pooled = decoded[(i - i0) * (w.qq - first) + j - first];
          for (int u = 0; u < U; ++u) g[u] += pooled.at(u, here);
        }
      for (int u = 0; u < U; ++u) write(u, ((n * w.p + p) * w.q + q) * w.k + c + u * W, g[u]);
    }
  }
}

// dx of the pixels under one row of windows that do not overlap: dy and the codes are read once
template <class T, class Block>
void scatter_row(const BnActPoolBackward& args, const InputGradient<Acc<T>>& input,
                 const WindowRow& row) {
  using A = Acc<T>;
  constexpr int W = Block::W, U = Block::U;
  const Slope<A, W> post(args.post_slope);
  for (int64_t c = 0; c < row.w.k; c += Block::channels) {
    const Writer<T, Block> write(args, input, c);
    for (int r = row.r0; r < row.r1; ++r) {
      const int64_t corner = (row.n * row.w.p + row.w.pixel(row.i, r)) * row.w.q;
      for (int64_t j = 0; j < row.w.qq; ++j) {
        const Pooled<T, Block> pooled(args, post, row.output(j) + c);
        for (int s = 0; s < row.w.pool.window; ++s) {
          const int64_t at = (corner + j * row.w.pool.stride + s) * row.w.k + c;
          for (int u = 0; u < U; ++u)
            write(u, at + u * W, pooled.at(u, r * row.w.pool.window + s));
        }
      }
    }
  }
}

// dx of a strip of rows: those under one row of windows where windows lie side by side, with nothing
// between them; what they leave at the edges, and any other pool, is gathered
template <class T, class Block>
void write_strip(const BnActPoolBackward& args, const InputGradient<Acc<T>>& input,
                 const Windows& w, int64_t n, int64_t strip,
                 std::vector<Pooled<T, Block>>& decoded) {
  const bool tiled = w.pool.window == w.pool.stride && w.pool.padding == 0 && strip < w.pp;
  if (tiled) scatter_row<T, Block>(args, input, WindowRow(w, n * w.pp + strip));
  const int64_t q_begin = tiled ? w.qq * w.pool.stride : 0;
  if (q_begin == w.q) return;
  const int64_t end = std::min(w.p, (strip + 1) * w.pool.stride);
  for (int64_t p = strip * w.pool.stride; p < end; ++p)
    gather_row<T, Block>(args, input, w, n, p, q_begin, decoded);
}

template <class T, class Block>
void write_pass(const BnActPoolBackward& args, const InputGradient<Acc<T>>& input,
                const Windows& w, const Parallel& parallel) {
  const int64_t per_image = ceil_div(w.p, w.pool.stride);
  const Parts strips(args.sizes.n * per_image, 1);
  parallel(strips.tasks, [&](int64_t begin, int64_t end) {
    std::vector<Pooled<T, Block>> decoded;
    // backwards: what the sums read last is still in the cache
    for (int64_t task = end - 1; task >= begin; --task)
      for (int64_t at = strips.begin(task); at < strips.end(task); ++at)
        write_strip<T, Block>(args, input, w, at / per_image, at % per_image, decoded);
  });
}

template <class T, class Block>
void sum_pass(const BnActPoolBackward& args, const Channels<Acc<T>>& channels, const Windows& w,
              const Parts& rows, const Parallel& parallel) {
  parallel(rows.tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const TaskSums sums(args.workspace, task, w.k);
      sums.clear(w.k);
      for (int64_t row = rows.begin(task); row < rows.end(task); ++row)
        sum_row<T, Block>(args, channels, WindowRow(w, row), sums);
    }
  });
}

}  // namespace

void bn_act_pool(const BnActPool& args, const Parallel& parallel) {
  dispatch(args.dtype, args.sizes.k, [&](auto type, auto block) {
    using T = decltype(type);
    const Channels<Acc<T>> channels(args.affine, args.sizes.k);
    const Windows w(args.sizes, args.pool);
    const Parts rows(args.sizes.n * w.pp, 1);
    parallel(rows.tasks, [&](int64_t begin, int64_t end) {
      for (int64_t task = end - 1; task >= begin; --task)  // backwards, after the statistics
        for (int64_t row = rows.begin(task); row < rows.end(task); ++row)
          forward_row<T, decltype(block)>(args, channels, WindowRow(w, row));
    });
  });
}

void bn_act_pool_backward(const BnActPoolBackward& args, const Parallel& parallel) {
  dispatch(args.dtype, args.sizes.k, [&](auto type, auto block) {
    using T = decltype(type);
    using A = Acc<T>;
    const int64_t pixels = args.sizes.pixels();
    const Channels<A> channels(args.affine, args.sizes.k);
    const Windows w(args.sizes, args.pool);
    const Parts rows(args.sizes.n * w.pp, 1);
    if (args.part != Part::apply && (args.dweight || args.dbias)) {
      sum_pass<T, decltype(block)>(args, channels, w, rows, parallel);
      finish_sums(channels, args.workspace, rows.tasks, args.dweight, args.dbias);
    }
    if (args.part == Part::sums) return;
    const InputGradient<A> input(channels, args.batch_stats, args.dweight, args.dbias, pixels);
    write_pass<T, decltype(block)>(args, input, w, parallel);
  });
}

}  // namespace fastcnn::cpu
