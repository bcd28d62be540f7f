// What a convolution multiplies: which value of its input lies behind a result pixel and a tap, and
// how a pending input is made of what lies in memory.
#pragma once

#include "common.cuh"

namespace fastcnn::cuda {

constexpr int kChunk = 8;  // values of 16 bytes

// threadIdx.x read anew, so that what follows from it is not computed ahead of the main loop, whose
// sums need the registers
__device__ inline int thread_anew() {
#ifdef __CUDA_ARCH__
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// Which pixels of which tensor a result pixel sees. The tensor is (n, height, width, channels), its
// pixels `spread` apart with zeros between them (the data gradient of a stride); the result (n, p,
// q), read from (row · step - top, column · step - left) on.
struct Gather {
  int height, width, channels;
  int r, s, step, spread, top, left;
  int p, q;
  int pixels;    // of the result that are computed
  int taps;      // r · s · channels
  bool windows;  // pixels are numbered window by window of 2 x 2, those in no window are left out
};

// what a convolution reads, and so does the gradient of its filters
inline Gather gather_of(const ConvShape& shape, bool windows) {
  const int p = static_cast<int>(shape.p), q = static_cast<int>(shape.q);
  const int64_t pixels = windows ? shape.n * (p / 2) * (q / 2) * 4 : shape.pixels();
  return {static_cast<int>(shape.h),
          static_cast<int>(shape.w),
          static_cast<int>(shape.c),
          shape.r,
          shape.s,
          shape.stride,
          1,
          shape.top,
          shape.left,
          p,
          q,
          static_cast<int>(pixels),
          static_cast<int>(shape.taps()),
          windows};
}

// of a result pixel: the first pixel of its image (-1: there is no such result), and where its
// first tap lies
struct alignas(16) Origin {
  int image, row, column, unused;
};

__device__ inline Origin origin_of(const Gather& g, int pixel) {
  if (pixel >= g.pixels) return {-1, 0, 0, 0};
  int columns = g.q, rows = g.p, place = 0;
  if (g.windows) {
    place = pixel % 4;
    pixel /= 4;
    columns /= 2;
    rows /= 2;
  }
  const int line = pixel / columns, n = line / rows;
  int p = line - n * rows, q = pixel - line * columns;
  if (g.windows) {
    p = 2 * p + place / 2;
    q = 2 * q + place % 2;
  }
  return {n * g.height * g.width, p * g.step - g.top, q * g.step - g.left, 0};
}

// the pixel of the tensor at a tap, or -1 outside it and between its pixels
__device__ inline int pixel_at(const Gather& g, const Origin& origin, int r, int s) {
  int row = origin.row + r, column = origin.column + s;
  if (origin.image < 0 || row < 0 || column < 0) return -1;
  if (g.spread > 1) {
    const int inner_row = row / g.spread, inner_column = column / g.spread;
    if (inner_row * g.spread != row || inner_column * g.spread != column) return -1;
    row = inner_row;
    column = inner_column;
  }
  return row < g.height && column < g.width ? origin.image + row * g.width + column : -1;
}

// a place of the filter and a channel
struct Tap {
  int c, r, s;

  __device__ Tap(const Gather& g, int tap) {
    const int place = tap / g.channels;
    c = tap - place * g.channels;
    r = place / g.s;
    s = place - r * g.s;
  }

  __device__ void advance(const Gather& g, int taps) {
    for (c += taps; c >= g.channels; c -= g.channels)
      if (++s == g.s) {
        s = 0;
        ++r;
      }
  }

  __device__ bool exists(const Gather& g) const { return r < g.r; }
};

// to shared memory; in PTX as in store() of common.cuh
template <typename T>
__device__ inline void store_shared(void* target, const Packed<T, kChunk>& packed) {
#ifdef __CUDA_ARCH__
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(packed.words[0]),
               "r"(packed.words[1]), "r"(packed.words[2]), "r"(packed.words[3])
               : "memory");
#else
  *static_cast<Packed<T, kChunk>*>(target) = packed;
#endif
}

// -------------------------------------------------------------------------- the pending input

// how an input is made from what lies in memory
struct PendingInput {
  Parameters parameters;
  float pre_slope, post_slope;

  explicit PendingInput(const ConvInput& input)
      : parameters(input.affine),
        pre_slope(static_cast<float>(input.pre_slope)),
        post_slope(static_cast<float>(input.post_slope)) {}

  __device__ float mean(int c) const { return parameters.mean ? parameters.mean[c] : 0.f; }
  __device__ float bias(int c) const { return parameters.bias ? parameters.bias[c] : 0.f; }
  __device__ float scale(int c) const {
    const float rstd = parameters.rstd ? parameters.rstd[c] : 1.f;
    return parameters.weight ? rstd * parameters.weight[c] : rstd;
  }

  __device__ float made(float value, float mean, float scale, float bias) const {
    return activate(normalise(value, pre_slope, mean, scale, bias), post_slope);
  }
};

// of V channels
template <int V>
struct PendingChannels {
  float mean[V], scale[V], bias[V];

  __device__ float made(const PendingInput& input, float value, int i) const {
    return input.made(value, mean[i], scale[i], bias[i]);
  }

  template <typename T>
  __device__ Packed<T, V> made(const PendingInput& input, Packed<T, V> raw) const {
    Packed<T, V> packed;
#pragma unroll
    for (int pair = 0; pair < V / 2; ++pair) {
      const float values[2] = {made(input, raw[2 * pair], 2 * pair),
                               made(input, raw[2 * pair + 1], 2 * pair + 1)};
      packed.set(pair, values);
    }
    return packed;
  }
};

// Mean, scale and bias in shared memory, `count` values each: of every channel, or of the channels
// of a tile's taps.
struct PendingVectors {
  float* data;
  int count;

  __device__ void set(int at, const PendingInput& input, int c) const {
    data[at] = input.mean(c);
    data[count + at] = input.scale(c);
    data[2 * count + at] = input.bias(c);
  }

  __device__ PendingChannels<1> single(int at) const {
    return {{data[at]}, {data[count + at]}, {data[2 * count + at]}};
  }

  // of 8 from `at` on; both `at` and `count` are multiples of 8
  __device__ PendingChannels<kChunk> chunk(int at) const {
    PendingChannels<kChunk> found;
    float* const targets[3] = {found.mean, found.scale, found.bias};
#pragma unroll
    for (int v = 0; v < 3; ++v)
#pragma unroll
      for (int i = 0; i < kChunk; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(data + v * count + at + i);
        targets[v][i] = four.x, targets[v][i + 1] = four.y;
        targets[v][i + 2] = four.z, targets[v][i + 3] = four.w;
      }
    return found;
  }
};

}  // namespace fastcnn::cuda
