// How a kernel walks a tensor.
//
// Rows x columns: a column is a vector of V neighbouring channels, a row one or more pixels. A
// thread keeps to one column, so that its channels' parameters stay in registers, and steps
// through rows. Neighbouring threads take neighbouring columns, then neighbouring rows, so a
// warp's accesses are coalesced whatever K is.
//
// K off the vector width: f = V / gcd(K, V) pixels make a row of f · K channels, of which V is a
// divisor again, and every access stays 16 bytes wide. The pixels % f at the end (with a layer's
// usual sizes none) and tensors that are not 16-byte aligned are walked one value at a time.
//
// Offsets are 64-bit. The grid follows from the shape alone, so results do not depend on the GPU.
#pragma once

#include <algorithm>
#include <climits>
#include <numeric>

#include "common.cuh"

namespace fastcnn::cuda {

// The constants below are estimates from the latency and the bandwidth of memory; none has been
// measured on a GPU yet.
//
// Threads a block: small enough to fit anywhere, and 8 warps hide the others' barrier.
constexpr int kThreads = 256;
// Blocks of 256 that each multiprocessor must be able to hold: 24 warps with two or more 16-byte
// loads each cover the latency of memory; it leaves a thread 80 registers.
constexpr int kResident = 3;
// A kernel that reduces: about as many blocks as are resident at once on a large GPU (132
// multiprocessors of 3 to 4), so that its partial results stay few.
constexpr int64_t kReduceBlocks = 512;
// A kernel that only writes: enough blocks to fill the last wave evenly...
constexpr int64_t kWriteBlocks = 2048;
// ...until a thread has this many rows, over which loading its parameters is well spread.
constexpr int64_t kMostRows = 16;

// interleaved: blocks sweep the tensor side by side, each to the end.
// chunked: each block has rows of its own, and block 0 the first.
// reversed: block 0 has the last; after a sweep, what it read last is still in L2.
enum class Order { interleaved, chunked, reversed };

struct Walk {
  int64_t rows = 0;     // of the matrix; 0: nothing to do
  int64_t columns = 0;  // vectors a row
  int64_t k = 0;        // channels
  int64_t base = 0;     // elements before the first row
  int64_t partial = 0;  // floats before the first partial result
  int64_t start = 0;    // rows from a block's first to the next block's
  int64_t span = 0;     // rows from a block's first to its end
  int64_t step = 0;     // rows from a thread's row to its next
  int tile = 1;         // columns that a block holds
  int lanes = 1;        // rows that a block holds at once
  unsigned blocks = 0, tiles = 0;
  bool reversed = false;

  dim3 grid() const { return dim3(blocks, tiles); }
  dim3 block() const { return dim3(static_cast<unsigned>(tile * lanes)); }
};

inline Walk make_walk(int64_t rows, int64_t columns, int64_t k, Order order) {
  Walk walk;
  walk.rows = rows;
  walk.columns = columns;
  walk.k = k;
  if (rows == 0 || columns == 0) return walk;
  const int64_t tiles = (columns + kThreads - 1) / kThreads;
  walk.tiles = static_cast<unsigned>(tiles);
  walk.tile = static_cast<int>((columns + tiles - 1) / tiles);
  walk.lanes = static_cast<int>(std::min<int64_t>(kThreads / walk.tile, rows));
  const int64_t turns = (rows + walk.lanes - 1) / walk.lanes;
  if (order == Order::interleaved) {
    walk.blocks = static_cast<unsigned>(
        std::min(turns, std::max<int64_t>(kReduceBlocks / tiles, 1)));
    walk.start = walk.lanes;
    walk.step = walk.blocks * static_cast<int64_t>(walk.lanes);
    walk.span = rows;
  } else {
    const int64_t each = std::clamp<int64_t>(turns * tiles / kWriteBlocks, 1, kMostRows);
    walk.start = walk.span = each * walk.lanes;
    walk.blocks = blocks_for(rows, walk.span);
    walk.step = walk.lanes;
    walk.reversed = order == Order::reversed;
  }
  return walk;
}

// ------------------------------------------------------------------- one value after the other

inline int64_t fold(int64_t k, int64_t width) { return width / std::gcd(k, width); }

// A walk over all values of a tensor: 16 bytes at a time, and one at a time what is left
struct Parts {
  Walk wide, rest;
  int64_t folded = 1;  // pixels in a row of `wide`

  // rows of K floats that the blocks of a reduction leave
  int64_t partial_rows() const { return wide.blocks * folded + rest.blocks; }
};

inline Parts make_parts(const Sizes& sizes, int64_t width, bool is_aligned, Order order) {
  Parts parts;
  const int64_t pixels = sizes.pixels(), k = sizes.k;
  if (k == 0) return parts;
  const int64_t folded = parts.folded = fold(k, width);
  const int64_t rows = is_aligned ? pixels / folded : 0;
  parts.wide = make_walk(rows, k * folded / width, k, order);
  parts.rest = make_walk(pixels - rows * folded, k, k, order);
  parts.rest.base = rows * folded * k;
  parts.rest.partial = parts.wide.blocks * k * folded;
  return parts;
}

// The most partial rows that a reduction over x can leave: any width, aligned or not. A pool's
// walk has no more rows than x has pixels, hence no more blocks.
inline int64_t most_partial_rows(const Sizes& sizes) {
  int64_t most = 0;
  for (const int64_t width : {1, 4, 8})
    most = std::max(most, make_parts(sizes, width, true, Order::interleaved).partial_rows());
  return most;
}

// f(width, walk) for both parts; width converts to a constant
template <typename T, typename F>
cudaError_t for_parts(const Parts& parts, F f) {
  if (parts.wide.rows) {
    const cudaError_t status = f(std::integral_constant<int, kWide<T>>{}, parts.wide);
    if (status != cudaSuccess) return status;
  }
  return parts.rest.rows ? f(std::integral_constant<int, 1>{}, parts.rest) : cudaSuccess;
}

// where a thread stands
struct Place {
  int64_t row, end;  // its first row and the end of its block's; equal for a thread too many
  int64_t column;

  __device__ explicit Place(const Walk& walk) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread / walk.tile;
    const int64_t block = walk.reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    column = static_cast<int64_t>(blockIdx.y) * walk.tile + (thread - lane * walk.tile);
    row = block * walk.start + lane;
    end = column < walk.columns ? min(block * walk.start + walk.span, walk.rows) : row;
  }

  __device__ bool has_rows() const { return row < end; }

  template <int V>
  __device__ int64_t offset(const Walk& walk) const {
    return walk.base + (row * walk.columns + column) * V;
  }

  // out ← values of the V channels of the column, `missing` if there are none
  template <int V>
  __device__ void parameters(const Walk& walk, const float* values, float missing,
                             float (&out)[V]) const {
    int64_t channel = column * V;
    if (!values) {
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = missing;
    } else if (V % 4 == 0 && walk.k % V == 0 &&
               reinterpret_cast<uintptr_t>(values) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < V; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(values + channel + i);
        out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
      }
    } else {
      // folded pixels: the channels come round again
      channel %= walk.k;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        out[i] = values[channel];
        if (++channel == walk.k) channel = 0;
      }
    }
  }

  // rstd · weight
  template <int V>
  __device__ void scale(const Walk& walk, const Parameters& given, float (&out)[V]) const {
    float weight[V];
    parameters<V>(walk, given.rstd, 1, out);
    parameters<V>(walk, given.weight, 1, weight);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] *= weight[i];
  }

  // lane 0 writes its column's V values into a plane of partial results
  template <int V>
  __device__ void write_partials(const Walk& walk, float* plane, const float* values) const {
    if (column >= walk.columns || static_cast<int>(threadIdx.x) >= walk.tile) return;
    float* target = plane + walk.partial + (blockIdx.x * walk.columns + column) * V;
#pragma unroll
    for (int i = 0; i < V; ++i) target[i] = values[i];
  }
};

// -------------------------------------------------------------------------- windows of a pool

// channels of a thread. 4 with windows of 3: with 8, the values and codes of all windows that touch
// a pixel would not fit into registers.
template <typename T, int kWindow>
constexpr int kPoolWide = kWindow == 3 ? 4 : kWindow == 0 ? 1 : kWide<T>;

// f(width, window) for the kernels of a pool: windows of 2 and 3 unrolled, any one value by value
template <typename T, typename F>
void for_pools(F f) {
  f(std::integral_constant<int, kPoolWide<T, 2>>{}, std::integral_constant<int, 2>{});
  f(std::integral_constant<int, kPoolWide<T, 3>>{}, std::integral_constant<int, 3>{});
  f(std::integral_constant<int, 1>{}, std::integral_constant<int, 0>{});
}

// f(width, window) for the one kernel that suits
template <typename T, typename F>
cudaError_t for_pool(const Pool& pool, int64_t k, bool wide, F f) {
  bool found = false;
  cudaError_t status = cudaSuccess;
  for_pools<T>([&](auto width, auto window) {
    const bool unrolled = wide && pool.window == window.value && k % width.value == 0;
    const bool suits = window.value == 0 || unrolled;
    if (found || !suits) return;
    found = true;
    status = f(width, window);
  });
  return status;
}

// A walk whose rows are positions (image, row, column) of a pooled image. A thread's steps carry
// from column to row to image, so that no loop divides.
struct PoolWalk {
  Walk walk;
  int p = 0, q = 0;                  // positions of an image
  int64_t step_n = 0;                // walk.step as images, rows and columns
  int step_p = 0, step_q = 0;
};

inline PoolWalk make_pool_walk(int64_t n, int64_t p, int64_t q, int64_t k, int64_t width,
                               Order order) {
  PoolWalk walk;
  walk.walk = make_walk(n * p * q, k / width, k, order);
  walk.p = static_cast<int>(p);
  walk.q = static_cast<int>(q);
  if (walk.walk.rows == 0) return walk;
  walk.step_q = static_cast<int>(walk.walk.step % q);
  walk.step_p = static_cast<int>(walk.walk.step / q % p);
  walk.step_n = walk.walk.step / q / p;
  return walk;
}

// rows and columns of an image are counted in 32 bits, with room for padding and a carry
inline bool is_image(const Sizes& sizes) { return std::max(sizes.p, sizes.q) < INT_MAX / 4; }

struct Position {
  int64_t n;
  int p, q;

  __device__ Position(int64_t row, const PoolWalk& walk) {
    const int64_t line = row / walk.q;
    q = static_cast<int>(row - line * walk.q);
    n = line / walk.p;
    p = static_cast<int>(line - n * walk.p);
  }

  __device__ void advance(const PoolWalk& walk) {
    q += walk.step_q;
    p += walk.step_p;
    n += walk.step_n;
    if (q >= walk.q) {
      q -= walk.q;
      ++p;
    }
    if (p >= walk.p) {
      p -= walk.p;
      ++n;
    }
  }
};

// of a table of tensors (count, first_block): the last one that begins at this block or before
template <typename Table>
__device__ inline int tensor_of_block(const Table& table, unsigned block) {
  int index = 0;
  for (int after = table.count; after - index > 1;) {
    const int middle = (index + after) / 2;
    if (table.first_block[middle] <= block)
      index = middle;
    else
      after = middle;
  }
  return index;
}

}  // namespace fastcnn::cuda
