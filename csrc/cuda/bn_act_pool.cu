// y = max-pool(post((pre(x) - mean) · rstd · weight + bias)), one pass; code: which place of each
// window won, and whether that value was negative before the activation.
//
// Layout: x (N, P, Q, K), y and code (N, P', Q', K), NHWC. Fused: normalisation, both activations
// and the pool. torch writes and reads the N·P·Q·K values before the pool and keeps an int64 index
// of 8 bytes a pooled value; here those passes are gone and a code is one byte. The sign in
// the code also spares the backward from computing z again.
//
// A thread has one pooled pixel x V channels. Windows of 2 and 3 pixels are unrolled, other sizes
// and channel counts off the vector width go one value at a time. Values are compared in fp32,
// before they are rounded to y's type. Of equal values the first wins, and a NaN replaces whatever
// came before it, a NaN too: as torch, index for index.
#include "walk.cuh"

namespace fastcnn::cuda {
namespace {

template <typename T>
struct PoolArguments {
  const T* x;
  T* y;
  uint8_t* code;
  Parameters parameters;
  float pre_slope, post_slope;
  Pool pool;
  int p, q;  // of x
};

// the best so far of each channel
template <int V>
struct Winners {
  float mean[V], scale[V], bias[V];
  float best[V];
  int code[V];

  // the first place of the window inside the image wins if nothing exceeds -inf
  __device__ void start(int place) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      best[i] = -INFINITY;
      code[i] = place | kCodeNegative;
    }
  }

  template <typename T>
  __device__ void consider(Packed<T, V> values, int place, float pre_slope, float post_slope) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float z = normalise(values[i], pre_slope, mean[i], scale[i], bias[i]);
      const float value = activate(z, post_slope);
      if (value > best[i] || isnan(value)) {
        best[i] = value;
        code[i] = place | (is_negative(z, post_slope) ? kCodeNegative : 0);
      }
    }
  }

  __device__ PackedCodes<V> codes() const {
    PackedCodes<V> packed = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) packed |= static_cast<PackedCodes<V>>(code[i]) << (8 * i);
    return packed;
  }
};

// kWindow 0: any window, V = 1
template <typename T, int V, int kWindow>
__global__ void __launch_bounds__(kThreads, kResident)
    bn_act_pool_kernel(PoolArguments<T> args, PoolWalk pool_walk) {
  const Walk& walk = pool_walk.walk;
  Place at(walk);
  if (!at.has_rows()) return;
  Winners<V> winners;
  at.parameters<V>(walk, args.parameters.mean, 0, winners.mean);
  at.scale<V>(walk, args.parameters, winners.scale);
  at.parameters<V>(walk, args.parameters.bias, 0, winners.bias);
  const int window = kWindow ? kWindow : args.pool.window;
  const int64_t pixel = walk.columns * V;  // elements of a pixel
  Position position(at.row, pool_walk);
  for (; at.has_rows(); at.row += walk.step, position.advance(pool_walk)) {
    const int top = position.p * args.pool.stride - args.pool.padding;
    const int left = position.q * args.pool.stride - args.pool.padding;
    const int64_t corner = ((position.n * args.p + top) * args.q + left) * pixel + at.column * V;
    winners.start(max(-top, 0) * window + max(-left, 0));
    const auto inside = [&](int r, int s) {
      return static_cast<unsigned>(top + r) < static_cast<unsigned>(args.p) &&
             static_cast<unsigned>(left + s) < static_cast<unsigned>(args.q);
    };
    const auto value_at = [&](int r, int s) {
      return load<V>(args.x + corner + (static_cast<int64_t>(r) * args.q + s) * pixel);
    };
    const auto consider = [&](const Packed<T, V>& packed, int r, int s) {
      winners.consider(packed, r * window + s, args.pre_slope, args.post_slope);
    };
    if constexpr (kWindow > 0) {
      // a whole window (2) or a row of it (3) is loaded before the first use
      constexpr int kRows = kWindow == 2 ? 2 : 1;
#pragma unroll
      for (int first = 0; first < kWindow; first += kRows) {
        Packed<T, V> packed[kRows][kWindow];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int s = 0; s < kWindow; ++s)
            if (inside(first + r, s)) packed[r][s] = value_at(first + r, s);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int s = 0; s < kWindow; ++s)
            if (inside(first + r, s)) consider(packed[r][s], first + r, s);
      }
    } else {
      for (int r = 0; r < window; ++r)
        for (int s = 0; s < window; ++s)
          if (inside(r, s)) consider(value_at(r, s), r, s);
    }
    const int64_t offset = at.offset<V>(walk);
    store_values<T, V>(args.y + offset, [&](int i) { return winners.best[i]; });
    *reinterpret_cast<PackedCodes<V>*>(args.code + offset) = winners.codes();
  }
}

template <typename T, int V, int kWindow>
cudaError_t pool(const BnActPool& args, cudaStream_t stream) {
  const Sizes& sizes = args.sizes;
  const int64_t p = args.pool.output(sizes.p), q = args.pool.output(sizes.q);
  const PoolWalk walk = make_pool_walk(sizes.n, p, q, sizes.k, V, Order::reversed);
  if (walk.walk.rows == 0 || sizes.k == 0) return cudaSuccess;
  const PoolArguments<T> arguments{static_cast<const T*>(args.x),
                                   static_cast<T*>(args.y),
                                   args.code,
                                   Parameters(args.affine),
                                   static_cast<float>(args.pre_slope),
                                   static_cast<float>(args.post_slope),
                                   args.pool,
                                   static_cast<int>(sizes.p),
                                   static_cast<int>(sizes.q)};
  return launch(bn_act_pool_kernel<T, V, kWindow>, walk.walk.grid(), walk.walk.block(), 0, stream,
                arguments, walk);
}

}  // namespace

cudaError_t launch_bn_act_pool(const BnActPool& args, cudaStream_t stream) {
  if (!is_image(args.sizes)) return cudaErrorInvalidValue;
  return dispatch(args.dtype, [&](auto number) {
    using T = decltype(number);
    const bool wide = aligned(args.x, args.y, args.code);
    return for_pool<T>(args.pool, args.sizes.k, wide, [&](auto width, auto window) {
      return pool<T, decltype(width)::value, decltype(window)::value>(args, stream);
    });
  });
}

std::vector<Kernel> bn_act_pool_kernels() {
  std::vector<Kernel> kernels;
  for_types([&](auto number, const std::string& type) {
    using T = decltype(number);
    for_pools<T>([&](auto width, auto window) {
      constexpr int V = decltype(width)::value, kWindow = decltype(window)::value;
      const auto kernel = bn_act_pool_kernel<T, V, kWindow>;
      kernels.push_back(named<V, kWindow>("bn_act_pool_kernel", type, kernel));
    });
  });
  return kernels;
}

}  // namespace fastcnn::cuda
