// What the kernels share: numbers and 16-byte vectors of them, activations, per-channel
// parameters, the reduction within a block, and the launch.
//
// Everything is computed in fp32 whatever the activations are stored in. A thread owns V
// neighbouring channels: V = 8 (bf16, fp16) or 4 (fp32) makes every access 16 bytes wide; V = 1
// serves what is not 16-byte aligned. A kernel exists in only these two widths, to bound the
// compile time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "../kernels.h"

namespace fastcnn::cuda {

// ---------------------------------------------------------------------------- numbers, vectors

template <typename T>
constexpr int kWide = 16 / sizeof(T);

// A 32-bit word of activations: kPair<T> values. Kernels turn a word into fp32 where they use it
// and back at once, because whole vectors in fp32 cost twice the registers.
template <typename T>
constexpr int kPair = 4 / sizeof(T);

template <typename To, typename From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
__device__ inline float from_word(uint32_t word, int i) {
  if constexpr (std::is_same_v<T, float>) return bits_as<float>(word);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(bits_as<__half>(static_cast<uint16_t>(i ? word >> 16 : word)));
  // bf16 is the upper half of an fp32
  return bits_as<float>(i ? word & 0xffff0000u : word << 16);
}

// rounded to nearest even
template <typename T>
__device__ inline uint32_t to_word(const float (&values)[kPair<T>]) {
  if constexpr (std::is_same_v<T, float>)
    return bits_as<uint32_t>(values[0]);
  else if constexpr (std::is_same_v<T, __half>)
    return bits_as<uint32_t>(__floats2half2_rn(values[0], values[1]));
  else
    return bits_as<uint32_t>(__floats2bfloat162_rn(values[0], values[1]));
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T rounded(float value) {
  if constexpr (std::is_same_v<T, float>)
    return value;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(value);
  else
    return __float2bfloat16_rn(value);
}

// V neighbouring values as they lie in memory, in groups that are converted together; i and group
// must be constants, so that all stays in registers
template <typename T, int V>
struct alignas(sizeof(T) * V) Packed {
  static constexpr int kGroup = kPair<T>;
  static_assert(V % kGroup == 0, "whole words");
  uint32_t words[V / kGroup];

  __device__ uint32_t& word(int i) { return words[i]; }
  __device__ float operator[](int i) { return from_word<T>(word(i / kGroup), i % kGroup); }
  __device__ void set(int group, const float (&values)[kGroup]) {
    word(group) = to_word<T>(values);
  }
};

template <typename T>
struct Packed<T, 1> {
  static constexpr int kGroup = 1;
  T value;

  __device__ float operator[](int) { return to_float(value); }
  __device__ void set(int, const float (&values)[1]) { value = rounded<T>(values[0]); }
};

// the same for the codes of V pooled values, 8, 4 or 1 bytes
template <int V>
using PackedCodes =
    std::conditional_t<V == 8, uint64_t, std::conditional_t<V == 4, uint32_t, uint8_t>>;

template <int V, typename T>
__device__ inline Packed<T, V> load(const T* source) {
  return *reinterpret_cast<const Packed<T, V>*>(source);
}

template <int V>
__device__ inline PackedCodes<V> load_codes(const uint8_t* source) {
  return *reinterpret_cast<const PackedCodes<V>*>(source);
}

// In PTX, because nvcc splits the assignment of a struct, even of a uint4, into words. No memory
// clobber: a thread's stores go only where itself has read before, if anybody has.
template <typename T, int V>
__device__ inline void store(T* target, const Packed<T, V>& packed) {
#ifdef __CUDA_ARCH__
  const size_t address = __cvta_generic_to_global(target);
  if constexpr (sizeof(packed) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(packed.words[0]),
                 "r"(packed.words[1]), "r"(packed.words[2]), "r"(packed.words[3]));
    return;
  } else if constexpr (sizeof(packed) == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(packed.words[0]),
                 "r"(packed.words[1]));
    return;
  }
#endif
  *reinterpret_cast<Packed<T, V>*>(target) = packed;
}

// target[i] ← f(i), rounded, of V values
template <typename T, int V, typename F>
__device__ inline void store_values(T* target, F f) {
  constexpr int kGroup = Packed<T, V>::kGroup;
  Packed<T, V> packed;
#pragma unroll
  for (int group = 0; group < V / kGroup; ++group) {
    float values[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = f(group * kGroup + i);
    packed.set(group, values);
  }
  store(target, packed);
}

// ------------------------------------------------------------------------------- activations

// Without branches, which would be most of the instructions. NaN is not <= 0 and stays; slope 0
// makes 0 of -inf too, hence the finite bound; + 0 makes 0 of -0.
__device__ inline float activate(float value, float slope) {
  const float bound = slope == 0 ? -FLT_MAX : -INFINITY;
  return value <= 0 ? fmaf(fmaxf(value, bound), slope, 0.f) : value;
}

// where an activation's gradient is scaled; for NaN as torch's two backwards have it
__device__ inline bool is_negative(float value, float slope) {
  return slope == 0 ? value <= 0 : !(value > 0);
}

// slope 0 selects: 0 · inf and 0 · NaN must not appear
__device__ inline float gradient(bool negative, float slope, float g) {
  const float factor = negative ? slope : 1.f;
  return factor == 0 ? 0.f : factor * g;
}

// -------------------------------------------------------------------------------- parameters

struct Parameters {
  const float* mean;
  const float* rstd;
  const float* weight;
  const float* bias;

  explicit Parameters(const Affine& affine)
      : mean(static_cast<const float*>(affine.mean)),
        rstd(static_cast<const float*>(affine.rstd)),
        weight(static_cast<const float*>(affine.weight)),
        bias(static_cast<const float*>(affine.bias)) {}
};

// z of one value. Forward, and backward where it asks for the sign of z, must round alike, hence
// one function. The mean is subtracted first: folded into the shift it would cancel.
__device__ inline float normalise(float value, float pre_slope, float mean, float scale,
                                  float bias) {
  return fmaf(activate(value, pre_slope) - mean, scale, bias);
}

// --------------------------------------------------------------- reduction within a block

// Of a block of `lanes` x `tile` threads (thread = lane · tile + column), each column's N values
// are merged into lane 0, in an order that `lanes` alone decides. Every thread must come here.
// merge(values, other): other(i) is value i of the other lane.
// shared: N · blockDim.x floats. A lane hands its values over once, into slots of its own that
// are never written again, so one barrier between writing and reading is all each level needs.
template <int N, typename Merge>
__device__ inline void reduce_lanes(float (&values)[N], int tile, int lanes, float* shared,
                                    Merge merge) {
  const int threads = tile * lanes;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread / tile;
  for (int active = lanes; active > 1;) {
    const int half = (active + 1) / 2;
    if (lane >= half && lane < active) {
#pragma unroll
      for (int i = 0; i < N; ++i) shared[i * threads + thread] = values[i];
    }
    __syncthreads();
    if (lane < active - half) {
      const float* other = shared + thread + half * tile;
      merge(values, [&](int i) { return other[i * threads]; });
    }
    active = half;
  }
}

// what the launch asked for, in bytes
__device__ inline float* shared_memory() {
  extern __shared__ float4 dynamic_shared[];
  return reinterpret_cast<float*>(dynamic_shared);
}

// The second stage of a reduction: a block merges kSlices strided slices of the partial results
// of kFinalChannels channels. 8 fp32 channels are one 32-byte sector; few channels a block give
// many blocks, and many slices keep the chain of dependent merges short.
constexpr int kFinalChannels = 8;
constexpr int kSlices = 32;

__device__ inline int64_t final_channel() {
  return static_cast<int64_t>(blockIdx.x) * kFinalChannels + threadIdx.x % kFinalChannels;
}

// Partial results of the first stage: planes of rows x K floats, one after the other
struct Partials {
  float* data;
  int64_t rows, k;

  __device__ float* plane(int index) const { return data + index * rows * k; }
};

// ------------------------------------------------------------------------------------ launch

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared;
};

// launches of this thread are noted here instead of made, if set
extern thread_local std::vector<Launch>* recorded_launches;

// kernel<<<grid, block, shared, stream>>>(args...), in a form that a C++ compiler reads too:
// tests/simt runs these files on the CPU.
template <typename... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   std::common_type_t<P>... args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (recorded_launches) {
    recorded_launches->push_back({function, grid, block, shared});
    return cudaSuccess;
  }
#ifdef __CUDACC__
  void* pointers[] = {&args...};
  const cudaError_t status = cudaLaunchKernel(function, grid, block, pointers, shared, stream);
  if (status != cudaSuccess) cudaGetLastError();  // reported here, not to whoever asks next
  return status;
#else
  (void)stream;
  return simt::launch(kernel, grid, block, shared, args...);
#endif
}

// for tables: "bn_act_kernel<bf16, 8, 1>", the template's arguments, and where the kernel is; what
// a launch of it takes, where that is not as for most kernels (introspection.cu)
struct Kernel {
  std::string name;
  const void* address;
  int threads = 0;    // 0: as for most
  size_t shared = 0;  // bytes, at most

  Kernel taking(int block_threads, size_t most_shared) const {
    return {name, address, block_threads, most_shared};
  }
};

template <typename... P>
Kernel named(const std::string& name, void (*kernel)(P...)) {
  return {name, reinterpret_cast<const void*>(kernel)};
}

template <int... kArguments, typename... P>
Kernel named(const std::string& name, const std::string& type, void (*kernel)(P...)) {
  const std::string arguments = ((", " + std::to_string(kArguments)) + ...);
  return named(name + "<" + type + arguments + ">", kernel);
}

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

// ---------------------------------------------------------------------------------- dispatch

// f(T{}) with the type of the activations
template <typename F>
cudaError_t dispatch(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::f16:
      return f(__half{});
    case Dtype::bf16:
      return f(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

// f(T{}, "T") for each of these types
template <typename F>
void for_types(F f) {
  f(float{}, std::string("f32"));
  f(__half{}, std::string("f16"));
  f(__nv_bfloat16{}, std::string("bf16"));
}

template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace fastcnn::cuda
