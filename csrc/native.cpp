// The Python module fastcnn._native: what the library was built with, what it launches for a
// shape, and how its kernels fit the GPU. Optional at run time; no torch. Links the op library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef FASTCNN_CUDA
#include "kernels.h"
#endif

// text of a macro's value
#define FASTCNN_TEXT_OF(...) #__VA_ARGS__
#define FASTCNN_TEXT(...) FASTCNN_TEXT_OF(__VA_ARGS__)

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

// FASTCNN_ARCHS: a string literal such as "8.0;9.0+PTX", or the same without quotes
py::object architectures() {
#ifdef FASTCNN_ARCHS
  std::string text = FASTCNN_TEXT(FASTCNN_ARCHS);
  if (text.size() > 1 && text.front() == '"') text = text.substr(1, text.size() - 2);
  return py::str(text);
#else
  return py::none();
#endif
}

py::dict build_information() {
  py::dict information;
  information["compiler"] = compiler();
#ifdef FASTCNN_CUDA
  information["cuda"] = py::str(std::to_string(CUDART_VERSION / 1000) + "." +
                                std::to_string(CUDART_VERSION % 1000 / 10));
#else
  information["cuda"] = py::none();
#endif
  information["architectures"] = architectures();
  return information;
}

#ifdef FASTCNN_CUDA

using namespace fastcnn;

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::f32;
  if (name == "float16") return Dtype::f16;
  if (name == "bfloat16") return Dtype::bf16;
  throw py::value_error("dtype: expected float32, float16 or bfloat16, got " + name);
}

py::tuple extent(const dim3& size) { return py::make_tuple(size.x, size.y, size.z); }

py::list launch_configuration(const std::string& op, int64_t n, int64_t p, int64_t q, int64_t k,
                              const std::string& dtype, std::tuple<int, int, int> pool) {
  py::list launches;
  const Pool window{std::get<0>(pool), std::get<1>(pool), std::get<2>(pool)};
  for (const auto& launch :
       cuda::launch_configuration(op, {n, p, q, k}, dtype_of(dtype), window)) {
    py::dict entry;
    entry["kernel"] = launch.kernel;
    entry["grid"] = extent(launch.grid);
    entry["block"] = extent(launch.block);
    entry["shared"] = launch.shared;
    launches.append(entry);
  }
  return launches;
}

py::dict occupancy() {
  py::dict table;
  for (const auto& kernel : cuda::occupancy()) {
    py::dict entry;
    entry["registers"] = kernel.registers;
    entry["local"] = kernel.local;
    entry["shared"] = kernel.shared;
    entry["blocks_per_sm"] = kernel.blocks_per_sm;
    table[py::str(kernel.kernel)] = entry;
  }
  return table;
}

#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.def("build_information", &build_information,
             "Compiler, CUDA version (None: CPU ops only) and architectures of the build.");
#ifdef FASTCNN_CUDA
  module.def("launch_configuration", &launch_configuration, py::arg("op"), py::arg("n"),
             py::arg("p"), py::arg("q"), py::arg("k"), py::arg("dtype"),
             py::arg("pool") = std::make_tuple(2, 2, 0),
             "The launches of an op for x of (n, p, q, k) and dtype \"bfloat16\", ...: kernel, "
             "grid, block, bytes of shared memory. Needs no GPU.");
  module.def("occupancy", &occupancy,
             "Registers, local and shared bytes and blocks a multiprocessor of each kernel on the "
             "current GPU. Raises RuntimeError without one.");
#endif
}
