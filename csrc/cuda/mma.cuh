// The tensor cores and what feeds them: matrix product of a warp, matrices from shared memory,
// asynchronous copies. All inline PTX of sm_80 and newer that kernels use is here, each instruction
// with a body for the CPU (tests/simt/simt.h).
//
// The fragments of an m16n8k16 product (PTX manual, "Matrix Fragments for mma.m16n8k16"), with
// g = lane / 4 and t = lane % 4. A register holds two values, the first in its lower half:
//   A (16, 16), register r: row g + 8 (r % 2), columns 2t, 2t + 1, + 8 (r / 2)
//   B (16, 8),  register r: rows 2t, 2t + 1, + 8 r, column g
//   D (16, 8),  value r:    row g + 8 (r / 2), column 2t + r % 2
// These are four 8 x 8 matrices as load_matrices gives them: for A, stored row by row, those at
// (row, column) (0, 0), (8, 0), (0, 8), (8, 8); for B two at a time, from rows of 8 columns k
// (stored n by n), or with kTranspose from rows of 8 columns n (stored k by k).
#pragma once

#include "common.cuh"

namespace fastcnn::cuda {

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x % 32); }

#ifdef __CUDACC__
template <typename T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// d[i][j] += a[i] x b[j], accumulated in fp32. T: __half, __nv_bfloat16. The whole warp, converged.
template <typename T, int kRows, int kColumns>
__device__ inline void warp_mma(float (&d)[kRows][kColumns][4], const uint32_t (&a)[kRows][4],
                                const uint32_t (&b)[kColumns][2]) {
  static_assert(sizeof(T) == 2, "half precision");
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) mma_m16n8k16<T>(d[i][j], a[i], b[j]);
#else
  const int g = lane_of() / 4, t = lane_of() % 4, n = 8 * kColumns;
  const simt::Product product = simt::begin_product(16 * kRows, n);
  for (int i = 0; i < kRows; ++i)
    for (int r = 0; r < 4; ++r)
      for (int half = 0; half < 2; ++half)
        product.a[(16 * i + g + 8 * (r % 2)) * 16 + 2 * t + half + 8 * (r / 2)] =
            from_word<T>(a[i][r], half);
  for (int j = 0; j < kColumns; ++j)
    for (int r = 0; r < 2; ++r)
      for (int half = 0; half < 2; ++half)
        product.b[(2 * t + half + 8 * r) * n + 8 * j + g] = from_word<T>(b[j][r], half);
  simt::finish_product();
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j)
      for (int r = 0; r < 4; ++r)
        d[i][j][r] += product.d[(16 * i + g + 8 * (r / 2)) * n + 8 * j + 2 * t + r % 2];
#endif
}

// out[i] ← this thread's two values of 8 x 8 matrix i of four: those of row lane / 4 at the columns
// 2 (lane % 4) and the next; of the transposed matrix if kTranspose. Row j of matrix i lies at
// address(8 i + j) in shared memory, 8 values of 16 bits, 16-byte aligned. The whole warp,
// converged.
template <bool kTranspose, typename Address>
__device__ inline void load_matrices(uint32_t (&out)[4], Address address) {
#ifdef __CUDACC__
  const uint32_t row = shared_address(address(lane_of()));
  // memory: not before the stores that fill what is read here
  if constexpr (kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
#else
  const int row = lane_of() / 4, column = 2 * (lane_of() % 4);
  const auto value = [&](int matrix, int i, int j) -> uint32_t {
    const void* source = address(8 * matrix + i);
    simt::check_aligned(source);
    return static_cast<const uint16_t*>(source)[j];
  };
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = kTranspose ? value(i, column, row) : value(i, row, column);
    const uint32_t high = kTranspose ? value(i, column + 1, row) : value(i, row, column + 1);
    out[i] = low | high << 16;
  }
#endif
}

// shared ← 16 bytes of global, or zeros if not valid (global is not read then, but must be an
// address), both 16-byte aligned; not before wait_copies, and for other threads not before a
// barrier behind that. Through L1, where the next tap finds most of the same pixels.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#else
  simt::begin_copy(shared, global, valid);
#endif
}

// The copies of this thread since the last call are a group, which may be empty.
__device__ inline void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::commit_copies();
#endif
}

// Waits for the groups of this thread but the last kLeft.
template <int kLeft>
__device__ inline void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  simt::wait_copies(kLeft);
#endif
}

}  // namespace fastcnn::cuda
