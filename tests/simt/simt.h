// CUDA kernels on the CPU: what a .cu file of csrc/cuda needs to be compiled by g++, unchanged.
//
// Included before everything else (-include simt.h). Blocks run one after the other; the threads of
// a block are fibers that run until __syncthreads and then take turns. Shared memory is filled with
// NaN before each block. Threads run in ascending or descending order: a kernel whose result needs
// a barrier that is not there differs between the two, or reads NaN. A barrier that not all threads
// of a block reach ends the process. It cannot show races within an order that happens to be right,
// nor what the GPU's memory model allows beyond any order, nor speed.
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

}  // namespace simt
