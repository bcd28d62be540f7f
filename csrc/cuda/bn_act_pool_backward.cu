// Backward of bn_act_pool: g of a pixel = Σ over the windows it won of dy · post'(z), with winner
// and sign from the codes; the rest as in backward.cuh.
//
// Layout: dy, code (N, P', Q', K), x, dx (N, P, Q, K), NHWC. Every pixel gathers from the windows
// that cover it, so dx is written once, in a fixed order of summation: no atomics, no buffer that
// must be cleared, no gradient of N·P·Q·K elements between the pool's backward and the rest
// (torch writes and reads it at each of up to four steps).
//
// Stride 2 with windows of 2 or 3: a thread has the tile of 2 x 2 pixels that starts where a window
// starts, x V channels. The only windows that touch the tile are the one that starts there and, for
// 3, those one before in each direction; which place of which window a pixel has is then known at
// compile time. Any other pool, and channel counts off the vector width: a pixel and a channel a
// thread.
#include "backward.cuh"

namespace fastcnn::cuda {
namespace {

template <typename T>
struct PoolBackwardArguments : BackwardArguments<T> {
  const T* dy;
  const uint8_t* code;
  Pool pool;
  int p, q;                // of x
  int pooled_p, pooled_q;  // of dy
};

__device__ inline bool in_range(int value, int end) {
  return static_cast<unsigned>(value) < static_cast<unsigned>(end);
}

// what a window hands to the place that won it
__device__ inline float won(int code, int place, float dy, float post_slope) {
  return (code & kCodePlace) == place ? gradient(code & kCodeNegative, post_slope, dy) : 0.f;
}

// of a window outside the pooled image: no pixel has place 0x7f (11 · 11 - 1 is the last)
template <int V>
constexpr PackedCodes<V> kNoPlace = static_cast<PackedCodes<V>>(0x7f7f7f7f7f7f7f7full);

// of channel i; in 32 bits, since a thread's shifts of 64 bits take two registers
template <int V>
__device__ inline int code_of(PackedCodes<V> codes, int i) {
  const uint32_t word = static_cast<uint32_t>(i < 4 ? codes : static_cast<uint64_t>(codes) >> 32);
  return word >> (8 * (i % 4)) & 0xff;
}

template <typename T, int V, int kWindow, Pass kPass>
__device__ inline void tile_backward(const PoolBackwardArguments<T>& args, const Position& tile,
                                     int64_t columns, int64_t column,
                                     Channels<T, V, kPass>& channels) {
  constexpr int kWindows = (kWindow + 1) / 2;  // that touch a tile, in each direction
  Packed<T, V> dy[kWindows][kWindows], x[2][2] = {};
  PackedCodes<V> code[kWindows][kWindows];
#pragma unroll
  for (int a = 0; a < kWindows; ++a)
#pragma unroll
    for (int b = 0; b < kWindows; ++b) {
      const int p = tile.p - a, q = tile.q - b;
      code[a][b] = kNoPlace<V>;
      dy[a][b] = {};
      if (!in_range(p, args.pooled_p) || !in_range(q, args.pooled_q)) continue;
      const int64_t offset =
          (((tile.n * args.pooled_p + p) * args.pooled_q + q) * columns + column) * V;
      dy[a][b] = load<V>(args.dy + offset);
      code[a][b] = load_codes<V>(args.code + offset);
    }
  const int top = tile.p * 2 - args.pool.padding, left = tile.q * 2 - args.pool.padding;
  const auto inside = [&](int r, int s) {
    return in_range(top + r, args.p) && in_range(left + s, args.q);
  };
  const auto offset_of = [&](int r, int s) {
    return (((tile.n * args.p + top + r) * args.q + left + s) * columns + column) * V;
  };
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int s = 0; s < 2; ++s)
      if (args.x && inside(r, s)) x[r][s] = load<V>(args.x + offset_of(r, s));
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (!inside(r, s)) continue;
      const auto dx = [&](int i) {
        float g = 0;
        // in the window that starts a tiles before, the pixel is in row r + 2a; the earliest
        // window comes first
#pragma unroll
        for (int a = kWindows - 1; a >= 0; --a)
#pragma unroll
          for (int b = kWindows - 1; b >= 0; --b) {
            const int row = r + 2 * a, column_of = s + 2 * b;
            if (row < kWindow && column_of < kWindow)
              g += won(code_of<V>(code[a][b], i), row * kWindow + column_of, dy[a][b][i],
                       args.post_slope);
          }
        return channels.take(i, g, x[r][s][i]);
      };
      if (channels.kWrites) {
        store_values<T, V>(args.dx + offset_of(r, s), dx);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) dx(i);
      }
    }
}

template <typename T, Pass kPass>
__device__ inline void pixel_backward(const PoolBackwardArguments<T>& args, const Position& pixel,
                                      int64_t columns, int64_t column,
                                      Channels<T, 1, kPass>& channels) {
  const Pool& pool = args.pool;
  const int p = pixel.p + pool.padding, q = pixel.q + pool.padding;
  // windows that start at most window - 1 before
  const auto first = [&](int at) { return max(at - pool.window + pool.stride, 0) / pool.stride; };
  const int last_p = min(p / pool.stride, args.pooled_p - 1);
  const int last_q = min(q / pool.stride, args.pooled_q - 1);
  float g = 0;
  for (int a = first(p); a <= last_p; ++a)
    for (int b = first(q); b <= last_q; ++b) {
      const int place = (p - a * pool.stride) * pool.window + q - b * pool.stride;
      const int64_t offset =
          ((pixel.n * args.pooled_p + a) * args.pooled_q + b) * columns + column;
      g += won(args.code[offset], place, to_float(args.dy[offset]), args.post_slope);
    }
  const int64_t offset = ((pixel.n * args.p + pixel.p) * args.q + pixel.q) * columns + column;
  const float dx = channels.take(0, g, args.x ? to_float(args.x[offset]) : 0.f);
  if (channels.kWrites) args.dx[offset] = rounded<T>(dx);
}

// kWindow 0: any pool, V = 1
template <typename T, int V, int kWindow, Pass kPass>
__global__ void __launch_bounds__(kThreads, kBackwardResident)
    bn_act_pool_backward_kernel(PoolBackwardArguments<T> args, PoolWalk pool_walk) {
  const Walk& walk = pool_walk.walk;
  Place at(walk);
  Channels<T, V, kPass> channels(args, at, walk);
  Position position(at.row, pool_walk);
  for (; at.has_rows(); at.row += walk.step, position.advance(pool_walk)) {
    if constexpr (kWindow > 0)
      tile_backward<T, V, kWindow>(args, position, walk.columns, at.column, channels);
    else
      pixel_backward(args, position, walk.columns, at.column, channels);
  }
  channels.finish(at, walk);
}

// walks tiles of `side` x `side` pixels that start where windows do, or single pixels
PoolWalk tile_walk(const BnActPoolBackward& args, int width, int window, Order order) {
  const Sizes& sizes = args.sizes;
  const auto tiles = [&](int64_t size) {
    return window && size ? (size - 1 + args.pool.padding) / 2 + 1 : size;
  };
  return make_pool_walk(sizes.n, tiles(sizes.p), tiles(sizes.q), sizes.k, width, order);
}

template <typename T, int V, int kWindow>
cudaError_t backward(const BnActPoolBackward& args, cudaStream_t stream) {
  const Sizes& sizes = args.sizes;
  const int64_t blocks = tile_walk(args, V, kWindow, Order::interleaved).walk.blocks;
  const PoolBackwardArguments<T> arguments{backward_arguments<T>(args, blocks),
                                           static_cast<const T*>(args.dy),
                                           args.code,
                                           args.pool,
                                           static_cast<int>(sizes.p),
                                           static_cast<int>(sizes.q),
                                           static_cast<int>(args.pool.output(sizes.p)),
                                           static_cast<int>(args.pool.output(sizes.q))};
  const bool sums = arguments.sums;
  return launch_passes(args, arguments.partials, stream, [&](auto pass) {
    constexpr Pass kPass = decltype(pass)::value;
    const PoolWalk walk = tile_walk(args, V, kWindow, order_of(kPass, sums));
    if (walk.walk.rows == 0) return cudaSuccess;
    return launch(bn_act_pool_backward_kernel<T, V, kWindow, kPass>, walk.walk.grid(),
                  walk.walk.block(), backward_shared(kPass, sums, V, walk.walk), stream, arguments,
                  walk);
  });
}

}  // namespace

cudaError_t launch_bn_act_pool_backward(const BnActPoolBackward& args, cudaStream_t stream) {
  if (!is_complete(args) || !is_image(args.sizes)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto number) {
    using T = decltype(number);
    const bool wide = args.pool.stride == 2 && args.pool.padding <= 1 &&
                      aligned(args.dy, args.code, args.x, args.dx);
    return for_pool<T>(args.pool, args.sizes.k, wide, [&](auto width, auto window) {
      return backward<T, decltype(width)::value, decltype(window)::value>(args, stream);
    });
  });
}

std::vector<Kernel> bn_act_pool_backward_kernels() {
  std::vector<Kernel> kernels;
  for_types([&](auto number, const std::string& type) {
    using T = decltype(number);
    for_pools<T>([&](auto width, auto window) {
      for_passes([&](auto pass) {
        constexpr int V = decltype(width)::value, kWindow = decltype(window)::value;
        constexpr Pass kPass = decltype(pass)::value;
        const auto kernel = bn_act_pool_backward_kernel<T, V, kWindow, kPass>;
        kernels.push_back(named<V, kWindow, static_cast<int>(kPass)>(
            "bn_act_pool_backward_kernel", type, kernel));
      });
    });
  });
  return kernels;
}

}  // namespace fastcnn::cuda
