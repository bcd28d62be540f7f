// Normalise (or add a bias), add a residual, activate: one read of x, one write of y; and the
// backward: sums and gradient, in two passes where the statistics depend on x, else in one.
//
// torch's chain reads and writes the tensor again for the residual, the activation and its mask.
#include "cpu.h"
#include "gradient.h"

namespace fastcnn::cpu {
namespace {

template <class T, class Block>
void forward_tile(const BnAct& args, const Channels<Acc<T>>& channels, int64_t first, int64_t n) {
  using A = Acc<T>;
  constexpr int W = Block::W, U = Block::U;
  const int64_t k = args.sizes.k;
  const Slope<A, W> pre(args.pre_slope), post(args.post_slope);
  const T* x = static_cast<const T*>(args.x) + first * k;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + first * k : nullptr;
  T* y = static_cast<T*>(args.y) + first * k;
  for (int64_t c = 0; c < k; c += Block::channels) {
    const Normaliser<A, Block> normalise(channels, c);
    for (int64_t i = 0; i < n; ++i) {
      for (int u = 0; u < U; ++u) {
        const int64_t at = i * k + c + u * W;
        Values<A, W> z = normalise(u, pre.act(load<W>(x + at)));
        if (residual) z += load<W>(residual + at);
        store<W>(y + at, post.act(z));
      }
    }
  }
}

// one tile of the backward: dx and dresidual if Write, the sums if Sum
template <class T, class Block, bool Sum, bool Write>
void backward_tile(const BnActBackward& args, const InputGradient<Acc<T>>& input, int64_t first,
                   int64_t n, const TaskSums& sums) {
  using A = Acc<T>;
  constexpr int W = Block::W, U = Block::U;
  const int64_t k = args.sizes.k;
  const Slope<A, W> pre(args.pre_slope), post(args.post_slope);
  auto tile = [&](const void* p) { return p ? static_cast<const T*>(p) + first * k : nullptr; };
  const T *dy = tile(args.dy), *x = tile(args.x), *y = tile(args.y);
  T *dx = const_cast<T*>(tile(args.dx)), *dresidual = const_cast<T*>(tile(args.dresidual));
  for (int64_t c = 0; c < k; c += Block::channels) {
    const Normaliser<A, Block> normalise(input.channels, c);
    const InputGradientBlock<A, Block> gradient(input, c);
    BlockSums<A, Block> block;
    for (int64_t i = 0; i < n; ++i) {
      for (int u = 0; u < U; ++u) {
        const int64_t at = i * k + c + u * W;
        Values<A, W> value{};
        if (x) value = load<W>(x + at);
        const Values<A, W> centred = pre.act(value) - normalise.mean[u];
        Values<A, W> g = load<W>(dy + at);
        if (!post.none()) {
          Values<A, W> z = y ? load<W>(y + at) : normalise.affine(u, centred);
          g = post.backward(g, post.negative(z));
        }
        if constexpr (Sum) block.add(u, g, centred);
        if constexpr (Write) {
          Values<A, W> d = gradient(u, g, centred);
          store<W>(dx + at, pre.none() ? d : pre.backward(d, pre.negative(value)));
          if (dresidual) store<W>(dresidual + at, g);
        }
      }
      if (Sum && (i + 1 == n || i % kRun<W> == kRun<W> - 1)) block.end_run();
    }
    if constexpr (Sum) block.add_to(sums, c);
  }
}

template <class T, class Block, bool Sum, bool Write>
void backward_pass(const BnActBackward& args, const InputGradient<Acc<T>>& input,
                   const Parts& parts, const Parallel& parallel) {
  parallel(parts.tasks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // the last pass goes backwards: what the one before read last is still in the cache
      const int64_t task = Write ? end - 1 - (i - begin) : i;
      const TaskSums sums(args.workspace, task, args.sizes.k);
      if constexpr (Sum) sums.clear(args.sizes.k);
      for (int64_t at = parts.begin(task); at < parts.end(task); at += parts.tile)
        backward_tile<T, Block, Sum, Write>(args, input, at,
                                            std::min(parts.tile, parts.end(task) - at), sums);
    }
  });
}

}  // namespace

int64_t bn_act_backward_workspace(const Sizes& sizes) {
  return kMaxTasks * 2 * sizes.k * int64_t(sizeof(double));
}

void bn_act(const BnAct& args, const Parallel& parallel) {
  dispatch(args.dtype, args.sizes.k, [&](auto type, auto block) {
    using T = decltype(type);
    const Channels<Acc<T>> channels(args.affine, args.sizes.k);
    const Parts parts = pixel_parts(args.sizes.pixels(), args.sizes.k);
    parallel(parts.tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t task = end - 1 - (i - begin);  // backwards, after the statistics
        for (int64_t at = parts.begin(task); at < parts.end(task); at += parts.tile)
          forward_tile<T, decltype(block)>(args, channels, at,
                                           std::min(parts.tile, parts.end(task) - at));
      }
    });
  });
}

void bn_act_backward(const BnActBackward& args, const Parallel& parallel) {
  dispatch(args.dtype, args.sizes.k, [&](auto type, auto block_type) {
    using T = decltype(type);
    using A = Acc<T>;
    using Block = decltype(block_type);
    const int64_t k = args.sizes.k, pixels = args.sizes.pixels();
    const Channels<A> channels(args.affine, k);
    const Parts parts = pixel_parts(pixels, k);
    auto finish = [&] {
      finish_sums(channels, args.workspace, parts.tasks, args.dweight, args.dbias);
    };
    if (pixels == 0) {
      if (args.part != Part::apply) finish();
      return;
    }
    if (args.batch_stats) {
      if (args.part != Part::apply) {
        const InputGradient<A> none(channels, false, nullptr, nullptr, pixels);
        backward_pass<T, Block, true, false>(args, none, parts, parallel);
        finish();
      }
      if (args.part == Part::sums) return;
      const InputGradient<A> input(channels, true, args.dweight, args.dbias, pixels);
      return backward_pass<T, Block, false, true>(args, input, parts, parallel);
    }
    const InputGradient<A> input(channels, false, nullptr, nullptr, pixels);
    if (!args.dweight && !args.dbias)
      return backward_pass<T, Block, false, true>(args, input, parts, parallel);
    backward_pass<T, Block, true, true>(args, input, parts, parallel);
    finish();
  });
}

}  // namespace fastcnn::cpu
