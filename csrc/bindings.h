// What the files that see torch share: its stable ABI, errors, and how an op is run on a device.
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

#include "arguments.h"
#include "cpu/cpu.h"
#ifdef FASTCNN_CUDA
#include "kernels.h"
#endif

namespace fastcnn {

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

inline void parallel(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, 1, body);
}

#ifdef FASTCNN_CUDA
// on the current stream of x's device
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
