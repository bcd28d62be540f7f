// CUDA kernels on the CPU: what a .cu file of csrc/cuda needs to be compiled by g++, unchanged.
//
// Included before everything else (-include simt.h). Blocks run one after the other; the threads of
// a block are fibers. A warp runs alone, its threads one after the other from one warp barrier to
// the next, until all of them have come to __syncthreads or have ended; then the next warp runs:
// warps are as far apart as barriers let them be. Shared memory is filled with NaN before each
// block. Warps and their threads run in ascending or descending order: a kernel whose result needs
// a barrier that is not there differs between the two, or reads NaN. A barrier that not all threads
// of a block, or of a warp, reach ends the process. An asynchronous copy leaves NaN until it is
// waited for. It cannot show races within an order that happens to be right, nor what the GPU's memory
// model allows beyond any order, nor speed.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <functional>

#undef __launch_bounds__
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using std::max;
using std::min;

void __syncthreads();
void __syncwarp();  // all 32 threads: none may have ended

// volatile: a compiler whose processor has one makes a fused operation of the two
inline float __fmul_rn(float a, float b) {
  const volatile float product = a * b;
  return product;
}
inline float __fadd_rn(float a, float b) { return a + b; }

namespace simt {

struct Settings {
  bool descending = false;                    // order of threads and blocks
  int64_t first_block = 0, end_block = -1;    // of blockIdx.x, if not negative: others do not run
};
extern Settings settings;

cudaError_t run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);

template <typename... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, P... args) {
  return run(grid, block, shared, [&] { kernel(args...); });
}

// A warp's matrix product: d (rows, columns) = a (rows, 16) x b (16, columns), row after row
struct Product {
  float* a;
  float* b;
  const float* d;
};
// where the threads of a warp leave their values of a and b, together all of them
Product begin_product(int rows, int columns);
// comes back when the whole warp is here, with d
void finish_product();

[[noreturn]] void fail_misaligned(const void* address);
// 16 bytes; else ends the process
inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail_misaligned(address);
}

// An asynchronous copy of 16 bytes, or of zeros. It reads and writes when its thread waits for it;
// until then its target holds NaN. A thread that ends with a copy that it has not waited for ends
// the process.
void begin_copy(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(size_t left);  // until so many groups, the latest, are left

}  // namespace simt
