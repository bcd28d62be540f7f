// What the files bindings*.cpp share: errors, checks, allocation, threads, device and stream. They
// alone see torch, through its stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/cpu.h"
#ifdef FASTCNN_CUDA
#include "kernels.h"
#endif

namespace fastcnn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// STD_TORCH_CHECK's message names a source file, which is of no use to a caller
#define REQUIRE(condition, ...) \
  if (!(condition)) fail(__VA_ARGS__)

template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

template <class Numbers>
std::string text_of(const Numbers& numbers) {
  std::string text = "[";
  for (int64_t number : numbers) text += (text.size() > 1 ? ", " : "") + std::to_string(number);
  return text + "]";
}

inline std::string shape_of(const Tensor& t) { return text_of(t.sizes()); }

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.get_device_index() == b.get_device_index() && a.is_cpu() == b.is_cpu();
}

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      REQUIRE(!x.is_cpu(), "x: expected float32, bfloat16 or float64 on the CPU, got "
                                   "float16; use backend torch");
      return Dtype::f16;
    case ScalarType::Double:
      REQUIRE(x.is_cpu(), "x: expected float32, bfloat16 or float16 on a GPU, got float64; "
                                  "use backend torch");
      return Dtype::f64;
    default:
      fail("x: expected a floating-point tensor, got scalar type ", int(x.scalar_type()));
  }
}

// of parameters, statistics and sums
inline ScalarType parameter_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// channels-last memory without gaps; the strides of sizes below 2 mean nothing
inline void check_layout(const Tensor& x, const char* name) {
  static constexpr int order[] = {1, 3, 2, 0};
  int64_t expected = 1;
  if (x.numel() == 0) return;
  for (int i = 0; i < 4; ++i) {
    const int64_t d = x.dim() == 4 ? order[i] : (i < 2 ? 1 - i : -1);
    if (d < 0) break;
    REQUIRE(x.size(d) == 1 || x.stride(d) == expected, name,
                    ": expected channels-last memory, got stride ", x.stride(d), " in dimension ",
                    d, " (expected ", expected,
                    "); use .contiguous(memory_format=torch.channels_last)");
    expected *= x.size(d);
  }
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  REQUIRE(t.dim() == x.dim() && shape_of(t) == shape_of(x), name, ": expected shape ",
                  shape_of(x), ", got ", shape_of(t));
  REQUIRE(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
  REQUIRE(same_device(t, x), name, ": expected the device of x");
  check_layout(t, name);
}

// (length,), a value each for the channels of x or of what is made of it
inline const void* vector_of(const Tensor& t, int64_t length, const Tensor& x, const char* name) {
  REQUIRE(t.dim() == 1 && t.size(0) == length && t.is_contiguous(), name,
          ": expected contiguous [", length, "], got ", shape_of(t));
  REQUIRE(t.scalar_type() == parameter_type(x), name, ": expected float32 (float64 where x is)");
  REQUIRE(same_device(t, x), name, ": expected the device of x");
  return t.const_data_ptr();
}

inline const void* channels_of(const Tensor& t, const Tensor& x, const char* name) {
  return vector_of(t, x.size(1), x, name);
}

inline void check_slope(double slope) {
  REQUIRE(slope >= 0, "slope: expected >= 0, got ", slope);
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
  const auto format = shape.size() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor empty_as(const Tensor& x) {
  return empty(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type());
}

inline Tensor per_channel(const Tensor& x) { return empty(x, {x.size(1)}, parameter_type(x)); }

inline Tensor bytes(const Tensor& x, int64_t count) { return empty(x, {count}, ScalarType::Byte); }

inline void* pointer(const Tensor& t) { return t.mutable_data_ptr(); }

inline void parallel(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, 1, body);
}

#ifdef FASTCNN_CUDA
// on the device of x and its current stream
template <class Args>
void enqueue(cudaError_t (*launch)(const Args&, cudaStream_t), const Args& args, const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const cudaError_t error = launch(args, static_cast<cudaStream_t>(stream));
  REQUIRE(error == cudaSuccess, "fastcnn kernel: ", cudaGetErrorString(error));
}
#endif

}  // namespace fastcnn
