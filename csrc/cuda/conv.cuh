// The main loop of an implicit-GEMM convolution, shared by the forward (conv_bn_act.cu) and the
// data gradient (conv_data_gradient.cu), a convolution of dy with the filters turned round.
//
// Product of a matrix (result pixels x taps) and a matrix (taps x filters); a tap is a place of the
// filter and a channel, channels fastest, so that 8 neighbouring taps are 16 bytes of NHWC memory.
// The first matrix is never formed: each block gathers 128 pixels x 32 taps of it at a time into
// shared memory, three stages deep, while its warps multiply the stage before with mma m16n8k16.
//
// How taps reach shared memory (Taps): copied 16 bytes at a time without passing a register
// (cp.async); or, where the input is pending, loaded, normalised and activated in registers and
// then stored; or one value at a time, where channels are no multiple of 8 or memory is not 16-byte
// aligned.
//
// A block takes tile after tile of pixels, so that what an epilogue sums stays in the block and
// leaves few partial results. Which tiles are whose follows from the shape alone.
//
// Registers: as many as conv_resident() leaves a thread, table in csrc/README.md. Shared memory:
// ConvShared, figures in the heads of the two files.
#pragma once

#include <algorithm>
#include <climits>

#include "conv_input.cuh"
#include "mma.cuh"

namespace fastcnn::cuda {

// None of the constants has been measured on a GPU yet.
constexpr int kConvThreads = 128;
constexpr int kConvWarps = kConvThreads / 32;

enum class Taps { copied, pending, single };

// blocks a multiprocessor must be able to hold: leaves a thread 128 registers, 64 of which are
// sums; beside these, values on their way through registers do not fit
constexpr int kConvResident = 4;
constexpr int conv_resident(int tile_filters, Taps taps) {
  return tile_filters == 64 && taps != Taps::copied ? 3 : kConvResident;
}
// blocks of a launch: what a large GPU (132 multiprocessors) holds at once
constexpr int64_t kConvBlocks = 132 * kConvResident;
constexpr int kTilePixels = 128;
constexpr int kTileTaps = 32;
constexpr int kStages = 3;
constexpr int kChunks = kTileTaps / kChunk;          // a row of a stage
constexpr int kRowsAtOnce = kConvThreads / kChunks;  // of a stage, when every thread has a chunk

// Rows of 32 taps, 64 bytes. The chunks of a row change places so that the 8 rows which a matrix
// load reads at once lie in different banks.
__device__ inline char* chunk_at(char* stage, int row, int chunk) {
  return stage + row * kTileTaps * 2 + (chunk ^ (row >> 1 & 3)) * 16;
}

template <typename T>
struct Operands {
  Gather gather;
  const T* x;        // what is gathered
  const T* filters;  // (count, taps)
  int count;
  bool is_pending;
  PendingInput pending;
};

// Shared memory: the stages, which the sums take over for the epilogue; the origins of the tile's
// pixels; what an epilogue keeps from tile to tile, for which no register is left; the vectors of a
// pending input.
template <int kTileFilters>
struct ConvShared {
  static constexpr int kRows = kTilePixels + kTileFilters;
  static constexpr int kStageBytes = kRows * kTileTaps * 2;
  // floats a row of sums: the 8 rows that a warp stores into begin in different banks, yet of the
  // pairs that it stores two meet in each
  static constexpr int kPitch = kTileFilters + 4;
  static constexpr int kSumBytes = kTilePixels * kPitch * 4;
  static constexpr int kFront = std::max(kSumBytes, kStages * kStageBytes);
  static constexpr int kKept = kFront + kTilePixels * static_cast<int>(sizeof(Origin));
  static constexpr int kVectors = kKept + kConvThreads * static_cast<int>(sizeof(float4));

  static constexpr size_t bytes(int pending_channels) {
    return kVectors + 3 * sizeof(float) * pending_channels;
  }

  char* start;

  __device__ char* pixels(int step) const { return start + step % kStages * kStageBytes; }
  __device__ char* filters(int step) const { return pixels(step) + kTilePixels * kTileTaps * 2; }
  __device__ float* sums() const { return reinterpret_cast<float*>(start); }
  __device__ Origin* origins() const { return reinterpret_cast<Origin*>(start + kFront); }
  __device__ float4& kept() const {
    return reinterpret_cast<float4*>(start + kKept)[threadIdx.x];
  }
  __device__ float* vectors() const { return reinterpret_cast<float*>(start + kVectors); }
};

// Fills the stages in order, step after step of 32 taps.
template <typename T, int kTileFilters, Taps kTaps>
struct Loader {
  static constexpr bool kPending = kTaps == Taps::pending;
  static constexpr int kPixelRows = kTilePixels / kRowsAtOnce;
  static constexpr int kFilterRows = kTileFilters / kRowsAtOnce;

  const Operands<T>& operands;
  const ConvShared<kTileFilters>& shared;
  PendingVectors vectors;
  int row, chunk;  // this thread's first row and its chunk of each row
  int first_filter;
  Tap tap;         // of the chunk's first value, in the step that is loaded next
  int stored_c;    // its channel in the step that is fetched
  Packed<T, kChunk> fetched[kPending ? kPixelRows : 1];
  uint32_t inside;  // rows of `fetched` that are not padding

  __device__ Loader(const Operands<T>& given, const ConvShared<kTileFilters>& memory, int filter)
      : operands(given),
        shared(memory),
        vectors{memory.vectors(), given.gather.channels},
        row(static_cast<int>(threadIdx.x) / kChunks),
        chunk(static_cast<int>(threadIdx.x) % kChunks),
        first_filter(filter),
        tap(given.gather, chunk * kChunk) {}

  // first half of a step: what needs no arithmetic, and the loads of what does
  __device__ void start(int step) {
    if constexpr (kTaps == Taps::single)
      single(step);
    else
      chunks(step);
  }

  __device__ void chunks(int step) {
    const Gather& g = operands.gather;
    const bool exists = tap.exists(g);
    char* target = shared.filters(step);
#pragma unroll
    for (int i = 0; i < kFilterRows; ++i) {
      const int filter = first_filter + row + i * kRowsAtOnce;
      const bool valid = exists && filter < operands.count;
      const int64_t at = static_cast<int64_t>(filter) * g.taps + step * kTileTaps + chunk * kChunk;
      copy_async(chunk_at(target, row + i * kRowsAtOnce, chunk),
                 operands.filters + (valid ? at : 0), valid);
    }
    target = shared.pixels(step);
    inside = 0;
    stored_c = tap.c;
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
      const Origin origin = shared.origins()[row + i * kRowsAtOnce];
      const int pixel = exists ? pixel_at(g, origin, tap.r, tap.s) : -1;
      const T* source = operands.x;
      if (pixel >= 0) source += static_cast<int64_t>(pixel) * g.channels + tap.c;
      if constexpr (kPending) {
        if (pixel < 0) continue;
        inside |= 1u << i;
        fetched[i] = load<kChunk>(source);
      } else {
        copy_async(chunk_at(target, row + i * kRowsAtOnce, chunk), source, pixel >= 0);
      }
    }
    tap.advance(g, kTileTaps);
  }

  // second half, of a pending input
  __device__ void finish(int step) {
    if (!kPending) return;
    char* target = shared.pixels(step);
    const PendingChannels<kChunk> channels = vectors.chunk(stored_c);
#pragma unroll
    for (int i = 0; i < (kPending ? kPixelRows : 0); ++i) {
      Packed<T, kChunk> made = {};  // padding is 0 behind the activation
      if (inside >> i & 1) made = channels.made(operands.pending, fetched[i]);
      store_shared(chunk_at(target, row + i * kRowsAtOnce, chunk), made);
    }
  }

  // one value at a time: a thread has one tap and every fourth row, eight of them in flight
  __device__ void single(int step) {
    const Gather& g = operands.gather;
    constexpr int kFlight = 8;
    const int lane = static_cast<int>(threadIdx.x) % kTileTaps;
    const int first = static_cast<int>(threadIdx.x) / kTileTaps;
    const int number = step * kTileTaps + lane;
    const Tap at(g, number);
    const bool exists = number < g.taps;
    for (int base = first; base < kTilePixels; base += kFlight * kConvWarps) {
      T values[kFlight];
#pragma unroll
      for (int i = 0; i < kFlight; ++i) {
        const Origin origin = shared.origins()[base + i * kConvWarps];
        const int pixel = exists ? pixel_at(g, origin, at.r, at.s) : -1;
        values[i] = rounded<T>(0);
        if (pixel < 0) continue;
        values[i] = operands.x[static_cast<int64_t>(pixel) * g.channels + at.c];
        if (operands.is_pending)
          values[i] = rounded<T>(
              vectors.single(at.c).made(operands.pending, to_float(values[i]), 0));
      }
#pragma unroll
      for (int i = 0; i < kFlight; ++i)
        *single_at(shared.pixels(step), base + i * kConvWarps, lane) = values[i];
    }
#pragma unroll 4
    for (int base = first; base < kTileFilters; base += kConvWarps) {
      const int filter = first_filter + base;
      T value = rounded<T>(0);
      if (exists && filter < operands.count)
        value = operands.filters[static_cast<int64_t>(filter) * g.taps + number];
      *single_at(shared.filters(step), base, lane) = value;
    }
  }

  __device__ T* single_at(char* stage, int at_row, int lane) const {
    return reinterpret_cast<T*>(chunk_at(stage, at_row, lane / kChunk)) + lane % kChunk;
  }
};

// What a warp has of a tile: rows of 16 pixels, columns of 8 filters
template <int kTileFilters>
struct WarpTile {
  static constexpr int kAcross = kTileFilters / 32;           // warps side by side
  static constexpr int kDown = kConvWarps / kAcross;          // and below each other
  static constexpr int kRows = kTilePixels / kDown / 16;
  static constexpr int kColumns = 4;

  float sums[kRows][kColumns][4];

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int first_row() { return warp() / kAcross * (kRows * 16); }
  __device__ static int first_column() { return warp() % kAcross * 32; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int v = 0; v < 4; ++v) sums[i][j][v] = 0;
  }

  template <typename T>
  __device__ void multiply(char* pixels, char* filters) {
#pragma unroll
    for (int k = 0; k < kTileTaps / 16; ++k) {
      uint32_t a[kRows][4], b[kColumns][2];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        load_matrices<false>(a[i], [&](int lane) {
          return chunk_at(pixels, first_row() + i * 16 + lane % 16, 2 * k + lane / 16);
        });
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        uint32_t both[4];
        load_matrices<false>(both, [&](int lane) {
          const int filter = first_column() + j * 8 + lane / 16 * 8 + lane % 8;
          return chunk_at(filters, filter, 2 * k + lane / 8 % 2);
        });
        b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
      }
      warp_mma<T>(sums, a, b);
    }
  }

  // all into shared memory, (pixels, kPitch) fp32
  __device__ void spill(float* target, int pitch) const {
    const int thread = thread_anew(), lane = thread % 32, warp = thread / 32;
    target += warp / kAcross * (kRows * 16) * pitch + warp % kAcross * 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = i * 16 + half * 8 + lane / 4;
          float* at = target + row * pitch + j * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(at) = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
        }
  }
};

// The products of this block's tiles, each handed to epilogue(sums, first pixel) in shared memory,
// (128, kPitch) fp32, behind a barrier; the epilogue may overwrite them.
template <typename T, int kTileFilters, Taps kTaps, typename Epilogue>
__device__ inline void conv_tiles(const Operands<T>& operands, Epilogue& epilogue) {
  const ConvShared<kTileFilters> shared{reinterpret_cast<char*>(shared_memory())};
  const Gather& g = operands.gather;
  const int first_filter = static_cast<int>(blockIdx.y) * kTileFilters;
  if (operands.is_pending)
    for (int c = static_cast<int>(threadIdx.x); c < g.channels; c += kConvThreads)
      PendingVectors{shared.vectors(), g.channels}.set(c, operands.pending, c);
  const int steps = (g.taps + kTileTaps - 1) / kTileTaps;
  const int tiles = (g.pixels + kTilePixels - 1) / kTilePixels;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    shared.origins()[threadIdx.x] =
        origin_of(g, tile * kTilePixels + static_cast<int>(threadIdx.x));
    __syncthreads();
    Loader<T, kTileFilters, kTaps> loader(operands, shared, first_filter);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) {
        loader.start(step);
        loader.finish(step);
      }
      commit_copies();
    }
    WarpTile<kTileFilters> products;
    products.clear();
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();
      const int next = step + kStages - 1;  // into the stage that the last step has left
      if (next < steps) loader.start(next);
      commit_copies();
      products.template multiply<T>(shared.pixels(step), shared.filters(step));
      if (next < steps) loader.finish(next);
    }
    wait_copies<0>();
    __syncthreads();
    products.spill(shared.sums(), ConvShared<kTileFilters>::kPitch);
    __syncthreads();
    epilogue(shared.sums(), tile * kTilePixels, first_filter);
  }
}

static_assert(kTilePixels == kConvThreads, "a thread writes the origin of a pixel");

// ------------------------------------------------------------------------------------ launch

// filters of a block: as few as leave no more of the last block empty
inline int tile_filters(int64_t filters) { return (filters + 31) / 32 % 2 ? 32 : 64; }

inline dim3 conv_grid(int64_t pixels, int64_t filters) {
  const unsigned across = blocks_for(filters, tile_filters(filters));
  const int64_t tiles = (pixels + kTilePixels - 1) / kTilePixels;
  const int64_t down = std::min(tiles, std::max<int64_t>(kConvBlocks / across, 1));
  return dim3(static_cast<unsigned>(down), across);
}

// Something to multiply, and everything counted in 32 bits but offsets in memory
inline bool is_countable(const ConvShape& shape) {
  const auto fits = [](int64_t number) { return number >= 0 && number < INT_MAX / 2; };
  const bool sizes = fits(shape.h) && fits(shape.w) && fits(shape.c) && fits(shape.k) &&
                     fits(shape.p) && fits(shape.q) && shape.stride >= 1;
  const bool filters = shape.c >= 1 && shape.k >= 1 && shape.r >= 1 && shape.s >= 1;
  return sizes && filters && fits(shape.n * shape.h * shape.w) && fits(shape.pixels()) &&
         fits(shape.taps()) && fits(static_cast<int64_t>(shape.r) * shape.s * shape.k) &&
         (shape.k + 31) / 32 < 65536 && (shape.c + 31) / 32 < 65536;
}

// f(filters of a block, taps), both constants, for the variants of a kernel
template <Taps... kTaps, typename F>
void for_variants(F f) {
  const auto both = [&](auto filters) {
    (f(filters, std::integral_constant<Taps, kTaps>{}), ...);
  };
  both(std::integral_constant<int, 32>{});
  both(std::integral_constant<int, 64>{});
}

inline PendingInput plain_input() { return PendingInput(ConvInput{nullptr, {}, 1, 1}); }

// f(T{}) for the types of the tensor cores
template <typename F>
cudaError_t dispatch_half(Dtype dtype, F f) {
  if (dtype == Dtype::f16) return f(__half{});
  if (dtype == Dtype::bf16) return f(__nv_bfloat16{});
  return cudaErrorInvalidValue;
}

}  // namespace fastcnn::cuda
