// Whether any value of many tensors is inf or NaN, in one launch:
//   found_inf ← 1 where one is; else it stays
//
// The exponent's bits are all set in such a value, whatever the format, so a 32-bit word is tested
// by two masks, one for each 16-bit number in it; for fp32 both are the same. Hence one kernel for
// all dtypes, which a launch may mix. Each byte is read once, 16 at a time; one value at a time
// where a tensor is not aligned so, and at its end. Threads that find one all write the same number,
// so there is nothing to reduce and to clear.
//
// Torch's own, _amp_foreach_non_finite_check_and_unscale_, has no bf16 on CUDA and takes a launch a
// dtype; by norms, _foreach_norm(inf), it takes about ten.
//
// The table of pointers travels in the kernel's parameters, as in update.cu: a launch copies
// nothing and can be captured; more tensors take several launches.
#include "walk.cuh"

namespace fastcnn::cuda {
namespace {

// 4 KB of parameters hold this many tensors
constexpr int kCheckTensors = 128;
// 16-byte vectors that a thread has in flight
constexpr int kCheckLoads = 4;
// bytes of a tensor that a block reads
constexpr int64_t kCheckBytes = 16 * kCheckLoads * kThreads;

struct CheckTable {
  const unsigned char* data[kCheckTensors];
  int64_t bytes[kCheckTensors];
  unsigned first_block[kCheckTensors];  // of each tensor; a block has one chunk
  Dtype dtypes[kCheckTensors];
  int count;
  float* found_inf;
};

struct ExponentMasks {
  uint32_t low, high;

  __device__ explicit ExponentMasks(Dtype dtype)
      : low(dtype == Dtype::f16    ? 0x7c00u
            : dtype == Dtype::bf16 ? 0x7f80u
                                   : 0x7f800000u),
        high(dtype == Dtype::f32 ? low : low << 16) {}

  __device__ bool nonfinite(uint32_t word) const {
    return (word & low) == low || (word & high) == high;
  }
};

__device__ inline bool check_vectors(const unsigned char* data, int count,
                                     const ExponentMasks& masks) {
  Packed<float, 4> vectors[kCheckLoads] = {};
#pragma unroll
  for (int u = 0; u < kCheckLoads; ++u) {
    const int at = static_cast<int>(threadIdx.x) + u * kThreads;
    if (at < count) vectors[u] = load<4>(reinterpret_cast<const float*>(data) + 4 * at);
  }
  bool found = false;
#pragma unroll
  for (int u = 0; u < kCheckLoads; ++u)
#pragma unroll
    for (int i = 0; i < 4; ++i) found |= masks.nonfinite(vectors[u].words[i]);
  return found;
}

// a 16-bit value is the lower half of a word whose upper one is 0
template <typename Bits>
__device__ inline bool check_values(const unsigned char* data, int count,
                                    const ExponentMasks& masks) {
  bool found = false;
  for (int at = static_cast<int>(threadIdx.x); at < count; at += kThreads)
    found |= masks.nonfinite(reinterpret_cast<const Bits*>(data)[at]);
  return found;
}

__global__ void __launch_bounds__(kThreads)
    find_nonfinite_kernel(const __grid_constant__ CheckTable table) {
  const int index = tensor_of_block(table, blockIdx.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[index]) * kCheckBytes;
  const unsigned char* data = table.data[index] + begin;
  const int bytes = static_cast<int>(min(kCheckBytes, table.bytes[index] - begin));
  const Dtype dtype = table.dtypes[index];
  const ExponentMasks masks(dtype);
  const int vectors = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? bytes / 16 : 0;
  const int rest = bytes - 16 * vectors;
  bool found = check_vectors(data, vectors, masks);
  if (dtype == Dtype::f32)
    found |= check_values<uint32_t>(data + 16 * vectors, rest / 4, masks);
  else
    found |= check_values<uint16_t>(data + 16 * vectors, rest / 2, masks);
  if (found) *table.found_inf = 1;
}

}  // namespace

cudaError_t launch_find_nonfinite(const FindNonfinite& args, cudaStream_t stream) {
  static_assert(sizeof(CheckTable) <= 4096, "a kernel's parameters");
  CheckTable table{};
  table.found_inf = args.found_inf;
  unsigned blocks = 0;
  cudaError_t status = cudaSuccess;
  for (int64_t i = 0; i < args.count; ++i)
    if (args.tensors[i].dtype == Dtype::f64) return cudaErrorInvalidValue;
  for (int64_t i = 0; i < args.count && status == cudaSuccess; ++i) {
    const FlatTensor& tensor = args.tensors[i];
    if (tensor.count > 0) {
      table.data[table.count] = static_cast<const unsigned char*>(tensor.data);
      table.bytes[table.count] = tensor.count * (tensor.dtype == Dtype::f32 ? 4 : 2);
      table.dtypes[table.count] = tensor.dtype;
      table.first_block[table.count] = blocks;
      blocks += blocks_for(table.bytes[table.count++], kCheckBytes);
    }
    if (blocks == 0 || (table.count < kCheckTensors && i + 1 < args.count)) continue;
    status = launch(find_nonfinite_kernel, dim3(blocks), dim3(kThreads), 0, stream, table);
    table.count = 0;
    blocks = 0;
  }
  return status;
}

std::vector<Kernel> find_nonfinite_kernels() {
  return {named("find_nonfinite_kernel", find_nonfinite_kernel)};
}

}  // namespace fastcnn::cuda
