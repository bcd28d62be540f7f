// Kernels that show what csrc/cuda/mma.cuh does, for tests/csrc/test_simt_mma.py; and that simt.h sees
// the errors that are planted in them.
#include "../../csrc/cuda/mma.cuh"
#include "mma_kernels.h"

namespace fastcnn::cuda {

namespace {

constexpr int kDepth = 16;
constexpr int kVector = 8;  // values of a copy, columns of an 8 x 8 matrix

template <typename T>
__device__ T* shared_values() {
  return reinterpret_cast<T*>(shared_memory());
}

// count values, a multiple of 8
template <typename T>
__device__ void copy_to_shared(T* shared, const T* global, int count) {
  for (int i = kVector * lane_of(); i < count; i += kVector * 32)
    copy_async(shared + i, global + i, true);
}

// d (16 kRows, 8 kColumns) ← a x b. a is stored row by row or, transposed, by column; b is stored
// n by n (8 kColumns, 16) or, transposed, k by k (16, 8 kColumns).
template <typename T, int kRows, int kColumns, bool kTransposed>
__global__ void product_kernel(const T* a, const T* b, float* d) {
  constexpr int kM = 16 * kRows, kN = 8 * kColumns;
  T* shared_a = shared_values<T>();
  T* shared_b = shared_a + kM * kDepth;
  copy_to_shared(shared_a, a, kM * kDepth);
  copy_to_shared(shared_b, b, kN * kDepth);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  uint32_t fragments_a[kRows][4], fragments_b[kColumns][2];
  for (int i = 0; i < kRows; ++i)
    load_matrices<kTransposed>(fragments_a[i], [&](int lane) {
      const int matrix = lane / 8, j = lane % 8;
      const int m = 16 * i + 8 * (matrix % 2), k = 8 * (matrix / 2);
      return kTransposed ? shared_a + (k + j) * kM + m : shared_a + (m + j) * kDepth + k;
    });
  for (int i = 0; i < kColumns; i += 2) {
    uint32_t four[4];
    load_matrices<kTransposed>(four, [&](int lane) {
      const int matrix = lane / 8, j = lane % 8;
      const int n = 8 * (i + matrix / 2), k = 8 * (matrix % 2);
      return kTransposed ? shared_b + (k + j) * kN + n : shared_b + (n + j) * kDepth + k;
    });
    for (int r = 0; r < 4; ++r) fragments_b[i + r / 2][r % 2] = four[r];
  }
  float sums[kRows][kColumns][4] = {};
  // twice, with no block barrier between: 2 a x b
  for (int repeat = 0; repeat < 2; ++repeat)
    warp_mma<T>(sums, fragments_a, fragments_b);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j)
      for (int r = 0; r < 4; ++r)
        d[(16 * i + lane_of() / 4 + 8 * (r / 2)) * kN + 8 * j + 2 * (lane_of() % 4) + r % 2] =
            sums[i][j][r];
}

// y (stages, 4 x 32) ← x, four values a thread, by copies of which two are under way at a time;
// the values of thread i are read by thread i, and zeros take the place of those of every fifth
// thread
template <Copying kCopying>
__global__ void copies_kernel(const float4* x, float4* y, int stages) {
  auto* shared = reinterpret_cast<float4*>(shared_memory());
  const int lane = lane_of(), slots = kCopying == Copying::early_write ? 2 : 3;
  const auto begin = [&](int stage) {
    if (stage < stages)
      copy_async(shared + stage % slots * 32 + lane, x + stage * 32 + lane, lane % 5 != 4);
    commit_copies();
  };
  begin(0);
  begin(1);
  for (int i = 0; i < stages; ++i) {
    begin(i + 2);
    wait_copies<kCopying == Copying::early_read ? 3 : 2>();
    y[i * 32 + lane] = shared[i % slots * 32 + lane];
  }
  wait_copies<0>();
  if (kCopying == Copying::left_over) copy_async(shared + lane, x + lane, true);
}

// y[i] ← x[the thread on the other side of the block], in `rounds` rounds with one buffer
template <bool kBarrier>
__global__ void mirror_kernel(const float* x, float* y, int rounds) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  float* shared = shared_memory();
  float value = x[thread];
  for (int i = 0; i < rounds; ++i) {
    shared[thread] = value + i;
    __syncthreads();
    value = shared[threads - 1 - thread];
    if (kBarrier) __syncthreads();
  }
  y[thread] = value;
}

// y[i] ← the first thread of the block that has not yet written when thread i has met its warp
__global__ void skew_kernel(float* y) {
  float* shared = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int i = 0; i < 3; ++i) __syncwarp();
  shared[thread] = 0;
  __syncwarp();
  int first = 0;
  while (first < threads && shared[first] == 0) ++first;
  y[thread] = static_cast<float>(first);
}

template <typename T, int kRows, int kColumns, bool kTransposed>
cudaError_t product(const void* a, const void* b, void* d) {
  const size_t shared = sizeof(T) * kDepth * (16 * kRows + 8 * kColumns);
  return launch(product_kernel<T, kRows, kColumns, kTransposed>, 1, 32, shared, nullptr,
                static_cast<const T*>(a), static_cast<const T*>(b), static_cast<float*>(d));
}

template <typename T>
cudaError_t product_of(int rows, bool transposed, const void* a, const void* b, void* d) {
  if (rows == 1)
    return transposed ? product<T, 1, 2, true>(a, b, d) : product<T, 1, 2, false>(a, b, d);
  return transposed ? product<T, 4, 6, true>(a, b, d) : product<T, 4, 6, false>(a, b, d);
}

}  // namespace

int test_product(Dtype dtype, int rows, bool transposed, const void* a, const void* b, void* d) {
  if (dtype == Dtype::f16) return product_of<__half>(rows, transposed, a, b, d);
  return product_of<__nv_bfloat16>(rows, transposed, a, b, d);
}

int test_copies(Copying copying, const void* x, void* y, int stages) {
  const auto kernel = copying == Copying::right        ? copies_kernel<Copying::right>
                      : copying == Copying::early_read ? copies_kernel<Copying::early_read>
                      : copying == Copying::early_write
                          ? copies_kernel<Copying::early_write>
                          : copies_kernel<Copying::left_over>;
  return launch(kernel, 1, 32, 3 * 32 * sizeof(float4), nullptr, static_cast<const float4*>(x),
                static_cast<float4*>(y), stages);
}

int test_mirror(bool barrier, const void* x, void* y, int threads, int rounds) {
  return launch(barrier ? mirror_kernel<true> : mirror_kernel<false>, 1, threads,
                threads * sizeof(float), nullptr, static_cast<const float*>(x),
                static_cast<float*>(y), rounds);
}

int test_skew(void* y, int threads) {
  return launch(skew_kernel, 1, threads, threads * sizeof(float), nullptr, static_cast<float*>(y));
}

}  // namespace fastcnn::cuda
