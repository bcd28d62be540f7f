// The launchers of mma_kernels.cu, one block each
#pragma once

#include "../../csrc/arguments.h"

namespace fastcnn::cuda {

enum class Copying { right, early_read, early_write, left_over };

// a (16 rows, 16), b (16, 8 columns), d fp32: rows, columns 1, 2 or 4, 6
int test_product(Dtype dtype, int rows, bool transposed, const void* a, const void* b, void* d);
int test_copies(Copying copying, const void* x, void* y, int stages);
int test_mirror(bool barrier, const void* x, void* y, int threads, int rounds);
int test_skew(void* y, int threads);

}  // namespace fastcnn::cuda
