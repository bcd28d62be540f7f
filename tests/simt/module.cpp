// The launchers of kernels.h for Python, with addresses as integers; and a heap whose blocks have
// exactly the size asked for, for the sanitizers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>

#include "../../csrc/kernels.h"
#include "mma_kernels.h"

namespace py = pybind11;
using namespace fastcnn;

namespace {

// (n, h, w, c, k, r, s, stride, top, left, p, q)
ConvShape conv_shape_of(const std::vector<int64_t>& s) {
  const auto number = [&](int i) { return static_cast<int>(s.at(i)); };
  return {s.at(0),   s.at(1),   s.at(2),   s.at(3),   s.at(4),  number(5),
          number(6), number(7), number(8), number(9), s.at(10), s.at(11)};
}

Dtype dtype_named(const std::string& name) {
  return name == "float32"    ? Dtype::f32
         : name == "float16"  ? Dtype::f16
         : name == "bfloat16" ? Dtype::bf16
                              : Dtype::f64;
}

// the value of a field of an argument struct by its name; 0 and null if it is not given
struct Fields {
  py::kwargs values;

  void* pointer(const char* name) const {
    return values.contains(name) ? reinterpret_cast<void*>(values[name].cast<uintptr_t>())
                                 : nullptr;
  }
  template <typename T>
  T value(const char* name) const {
    return values[name].cast<T>();
  }
  Sizes sizes() const {
    const auto s = value<std::tuple<int64_t, int64_t, int64_t, int64_t>>("sizes");
    return {std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s)};
  }
  Pool pool() const {
    const auto p = value<std::tuple<int, int, int>>("pool");
    return {std::get<0>(p), std::get<1>(p), std::get<2>(p)};
  }
  Dtype dtype(const char* field = "dtype") const {
    return dtype_named(value<std::string>(field));
  }
  Part part() const {
    const auto name = values.contains("part") ? value<std::string>("part") : "whole";
    return name == "sums" ? Part::sums : name == "apply" ? Part::apply : Part::whole;
  }
  Affine affine() const {
    return {pointer("mean"), pointer("rstd"), pointer("weight"), pointer("bias")};
  }
  ConvShape conv_shape() const { return conv_shape_of(value<std::vector<int64_t>>("shape")); }
  ConvInput conv_input() const {
    return {pointer("x"),
            {pointer("in_mean"), pointer("in_rstd"), pointer("in_weight"), pointer("in_bias")},
            value<double>("in_pre_slope"),
            value<double>("in_post_slope")};
  }
};

int bn_stats(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::launch_bn_stats(
      {f.dtype(), f.sizes(), f.pointer("x"), f.value<bool>("training"), f.value<double>("momentum"),
       f.value<double>("eps"), f.value<double>("pre_slope"), f.pointer("running_mean"),
       f.pointer("running_var"), f.pointer("mean"), f.pointer("rstd"), f.pointer("workspace")},
      nullptr);
}

int bn_act(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::launch_bn_act(
      {f.dtype(), f.sizes(), f.pointer("x"), f.pointer("residual"), f.affine(),
       f.value<double>("pre_slope"), f.value<double>("post_slope"), f.pointer("y")},
      nullptr);
}

int bn_act_pool(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::launch_bn_act_pool(
      {f.dtype(), f.sizes(), f.pointer("x"), f.affine(), f.value<double>("pre_slope"),
       f.value<double>("post_slope"), f.pool(), f.pointer("y"),
       static_cast<uint8_t*>(f.pointer("code"))},
      nullptr);
}

int bn_act_backward(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::launch_bn_act_backward(
      {f.dtype(), f.sizes(), f.pointer("dy"), f.pointer("x"), f.pointer("y"), f.affine(),
       f.value<bool>("batch_stats"), f.value<double>("pre_slope"), f.value<double>("post_slope"),
       f.pointer("dx"), f.pointer("dresidual"), f.pointer("dweight"), f.pointer("dbias"),
       f.pointer("workspace"), f.part()},
      nullptr);
}

int bn_act_pool_backward(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::launch_bn_act_pool_backward(
      {f.dtype(), f.sizes(), f.pointer("dy"), static_cast<const uint8_t*>(f.pointer("code")),
       f.pointer("x"), f.affine(), f.value<bool>("batch_stats"), f.value<double>("pre_slope"),
       f.value<double>("post_slope"), f.pool(), f.pointer("dx"), f.pointer("dweight"),
       f.pointer("dbias"), f.pointer("workspace"), f.part()},
      nullptr);
}

int conv(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::launch_conv(
      {f.dtype(), f.conv_shape(), f.conv_input(), f.pointer("filter"), f.pointer("bias"),
       f.pointer("scale"), f.pointer("shift"), f.pointer("residual"), f.value<double>("pre_slope"),
       f.value<double>("post_slope"), f.value<bool>("pool"), f.pointer("y"),
       static_cast<uint8_t*>(f.pointer("code")), f.pointer("partials"),
       f.value<double>("stats_slope")},
      nullptr);
}

int bn_merge(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::launch_bn_merge(
      {f.value<int64_t>("rows"), f.value<int64_t>("k"), f.value<int64_t>("count"),
       f.pointer("partials"), f.value<double>("momentum"), f.value<double>("eps"),
       f.pointer("running_mean"), f.pointer("running_var"), f.pointer("mean"), f.pointer("rstd")},
      nullptr);
}

int conv_data_gradient(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::launch_conv_data_gradient(
      {f.dtype(), f.conv_shape(), f.conv_input(), f.value<bool>("batch_stats"),
       f.pointer("filter"), f.pointer("dy"), f.pointer("dx"), f.pointer("dweight"),
       f.pointer("dbias"), f.pointer("workspace")},
      nullptr);
}

int conv_weight_gradient(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::launch_conv_weight_gradient(
      {f.dtype(), f.conv_shape(), f.conv_input(), f.pointer("dy"), f.pointer("dfilter"),
       f.pointer("workspace")},
      nullptr);
}

int64_t conv_workspace(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return f.value<std::string>("op") == "conv_data_gradient"
             ? cuda::conv_data_gradient_workspace(f.conv_shape(), f.dtype())
             : cuda::conv_weight_gradient_workspace(f.conv_shape(), f.dtype());
}

int augment(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  const auto integers = [&](const char* name) {
    return static_cast<int64_t*>(f.pointer(name));
  };
  const auto floats = [&](const char* name) { return static_cast<float*>(f.pointer(name)); };
  return cuda::launch_augment(
      {f.dtype(), f.value<int64_t>("count"), f.value<int>("h"), f.value<int>("w"),
       static_cast<uint8_t*>(f.pointer("images")), integers("labels"), integers("order"),
       f.value<int64_t>("length"), integers("at"), floats("scale"), floats("bias"),
       f.value<bool>("bias_of_pixels"), floats("fill"), f.value<int64_t>("seed"),
       f.value<int>("padding"), f.value<bool>("reflect"), static_cast<Flip>(f.value<int>("flip")),
       f.value<int>("cutout"), f.value<bool>("gathered"), f.pointer("x"), integers("y")},
      nullptr);
}

// tensors: (count, weight, grad, first, second, copy, average) each
struct Group {
  std::vector<UpdateTensor> tensors;
  UpdateGroup group;

  explicit Group(const Fields& f) {
    for (const py::handle tensor : f.values["tensors"]) {
      const auto t = tensor.cast<std::vector<uintptr_t>>();
      const auto at = [&](int i) { return reinterpret_cast<void*>(t[i]); };
      tensors.push_back({int64_t(t[0]), at(1), at(2), at(3), at(4), at(5), at(6)});
    }
    const auto scalar = [&](const char* name) {
      return static_cast<const float*>(f.pointer(name));
    };
    group = {f.dtype(),         f.dtype("grad_dtype"), f.dtype("copy_dtype"), tensors.data(),
             int64_t(tensors.size()), scalar("rates"), scalar("factor"),      scalar("found_inf")};
  }
};

int sgd(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  const Group all(f);
  return cuda::launch_sgd({all.group, f.value<double>("decay"), f.value<bool>("decoupled"),
                           f.value<double>("momentum"), f.value<bool>("nesterov")},
                          nullptr);
}

int adam(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  const Group all(f);
  return cuda::launch_adam(
      {all.group, static_cast<const float*>(f.pointer("steps")), f.value<double>("decay"),
       f.value<bool>("decoupled"), f.value<double>("beta1"), f.value<double>("beta2"),
       f.value<double>("eps")},
      nullptr);
}

// tensors: (count, dtype, data) each
int find_nonfinite(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  std::vector<FlatTensor> tensors;
  for (const auto& [count, type, data] :
       f.value<std::vector<std::tuple<int64_t, std::string, uintptr_t>>>("tensors"))
    tensors.push_back({count, dtype_named(type), reinterpret_cast<void*>(data)});
  return cuda::launch_find_nonfinite({tensors.data(), int64_t(tensors.size()),
                                      static_cast<float*>(f.pointer("found_inf"))},
                                     nullptr);
}

int mma_product(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::test_product(f.dtype(), f.value<int>("rows"), f.value<bool>("transposed"),
                            f.pointer("a"), f.pointer("b"), f.pointer("d"));
}

int mma_copies(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  const auto copying = f.value<std::string>("copying");
  return cuda::test_copies(copying == "right"        ? cuda::Copying::right
                           : copying == "early_read"  ? cuda::Copying::early_read
                           : copying == "early_write" ? cuda::Copying::early_write
                                                      : cuda::Copying::left_over,
                           f.pointer("x"), f.pointer("y"), f.value<int>("stages"));
}

int mma_mirror(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::test_mirror(f.value<bool>("barrier"), f.pointer("x"), f.pointer("y"),
                           f.value<int>("threads"), f.value<int>("rounds"));
}

int mma_skew(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  return cuda::test_skew(f.pointer("y"), f.value<int>("threads"));
}

py::list launch_configuration(const py::kwargs& kwargs) {
  const Fields f{kwargs};
  py::list launches;
  for (const auto& launch :
       cuda::launch_configuration(f.value<std::string>("op"), f.sizes(), f.dtype(), f.pool()))
    launches.append(py::make_tuple(launch.kernel, launch.grid.x, launch.grid.y, launch.block.x,
                                   launch.shared));
  return launches;
}

}  // namespace

PYBIND11_MODULE(simt_kernels, module) {
  module.def("bn_stats", &bn_stats);
  module.def("bn_act", &bn_act);
  module.def("bn_act_pool", &bn_act_pool);
  module.def("bn_act_backward", &bn_act_backward);
  module.def("bn_act_pool_backward", &bn_act_pool_backward);
  module.def("conv", &conv);
  module.def("bn_merge", &bn_merge);
  module.def("conv_data_gradient", &conv_data_gradient);
  module.def("conv_weight_gradient", &conv_weight_gradient);
  module.def("conv_workspace", &conv_workspace);
  module.def("conv_partial_rows", [](const std::vector<int64_t>& shape) {
    return cuda::conv_partial_rows(conv_shape_of(shape));
  });
  module.def("augment", &augment);
  module.def("sgd_", &sgd);
  module.def("adam_", &adam);
  module.def("find_nonfinite_", &find_nonfinite);
  module.def("mma_product", &mma_product);
  module.def("mma_copies", &mma_copies);
  module.def("mma_mirror", &mma_mirror);
  module.def("mma_skew", &mma_skew);
  module.def("launch_configuration", &launch_configuration);
  module.def("bn_stats_workspace", [](int64_t n, int64_t p, int64_t q, int64_t k) {
    return cuda::bn_stats_workspace({n, p, q, k});
  });
  module.def("bn_act_backward_workspace", [](int64_t n, int64_t p, int64_t q, int64_t k) {
    return cuda::bn_act_backward_workspace({n, p, q, k});
  });
  module.def("descending", [](bool on) { simt::settings.descending = on; });
  module.def("only_blocks", [](int64_t first, int64_t end) {
    simt::settings.first_block = first;
    simt::settings.end_block = end;
  });
  module.def("allocate", [](const py::bytes& content) {
    const std::string bytes = content;
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes.size())) throw std::bad_alloc();
    memcpy(memory, bytes.data(), bytes.size());
    return reinterpret_cast<uintptr_t>(memory);
  });
  module.def("release", [](uintptr_t memory) { free(reinterpret_cast<void*>(memory)); });
}
