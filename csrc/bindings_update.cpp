// The updates sgd_ and adam_, and find_nonfinite_, for torch: checks, the table of pointers,
// registration.
// fastcnn/ops/optimizers.py holds the schemas.
#include <algorithm>
#include <vector>

#include "bindings.h"

namespace {

using namespace fastcnn;
using Tensors = std::vector<Tensor>;

struct Cpu {
  static constexpr bool on_gpu = false;
  static void run(const Sgd& args, const Tensor&) { cpu::sgd(args, parallel); }
  static void run(const Adam& args, const Tensor&) { cpu::adam(args, parallel); }
  static void run(const FindNonfinite& args, const Tensor&) { cpu::find_nonfinite(args, parallel); }
};

#ifdef FASTCNN_CUDA
struct Cuda {
  static constexpr bool on_gpu = true;
  static void run(const Sgd& args, const Tensor& x) { enqueue(cuda::launch_sgd, args, x); }
  static void run(const Adam& args, const Tensor& x) { enqueue(cuda::launch_adam, args, x); }
  static void run(const FindNonfinite& args, const Tensor& x) {
    enqueue(cuda::launch_find_nonfinite, args, x);
  }
};
#endif

// a tensor of a list, in messages
struct Place {
  const char* list;
  size_t index;
};

std::ostream& operator<<(std::ostream& out, const Place& place) {
  return out << place.list << "[" << place.index << "]";
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    default:
      return "another dtype";
  }
}

Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::Double:
      return Dtype::f64;
    default:
      return Dtype::f32;
  }
}

// whether the strides are those of some order of the dimensions without gaps; the strides of
// sizes below 2 mean nothing
bool is_dense(const Tensor& t) {
  if (t.numel() < 2) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> dimensions;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1) dimensions.emplace_back(strides[d], sizes[d]);
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// the same of two tensors of one shape
bool same_strides(const Tensor& a, const Tensor& b) {
  if (a.numel() < 2) return true;
  const auto sizes = a.sizes(), first = a.strides(), second = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && first[d] != second[d]) return false;
  return true;
}

void check_type(const Tensor& t, ScalarType type, const Place& place) {
  REQUIRE(t.scalar_type() == type, place, ": expected ", name_of(type), ", got ",
          name_of(t.scalar_type()));
}

void check_dense(const Tensor& t, const Place& place) {
  REQUIRE(is_dense(t), place, ": expected memory without gaps or overlap, got shape ", shape_of(t),
          " with strides ", text_of(t.strides()));
}

// of parameters, states and averages
ScalarType wide_type(const Tensors& params) {
  return params.empty() ? ScalarType::Float : params[0].scalar_type();
}

void check_params(const Tensors& params, const Tensor& rates, bool on_gpu) {
  if (params.empty()) return;
  const ScalarType type = params[0].scalar_type();
  REQUIRE(type == ScalarType::Float || (type == ScalarType::Double && !on_gpu),
          "params: expected float32", on_gpu ? "" : " or float64", ", got ", name_of(type),
          "; use backend torch");
  for (size_t i = 0; i < params.size(); ++i) {
    const Place place{"params", i};
    check_type(params[i], type, place);
    REQUIRE(same_device(params[i], rates), place, ": expected the device of rates");
    check_dense(params[i], place);
  }
}

// a list beside params: as many tensors, of one dtype, each with the memory layout of its parameter
void check_list(const Tensors& list, const Tensors& params, ScalarType type, const char* name) {
  REQUIRE(list.size() == params.size(), name, ": expected ", params.size(), " tensors, got ",
          list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const Tensor &t = list[i], &param = params[i];
    const Place place{name, i};
    check_type(t, type, place);
    REQUIRE(same_device(t, param), place, ": expected the device of params[", i, "]");
    REQUIRE(std::equal(t.sizes().begin(), t.sizes().end(), param.sizes().begin(),
                       param.sizes().end()),
            place, ": expected the shape of its parameter, ", shape_of(param), ", got ",
            shape_of(t));
    REQUIRE(same_strides(t, param), place, ": expected the strides of its parameter, ",
            text_of(param.strides()), ", got ", text_of(t.strides()));
  }
}

ScalarType grad_type(const Tensors& grads, const Tensors& params, bool on_gpu) {
  const ScalarType wide = params[0].scalar_type();
  const ScalarType type = grads.empty() ? wide : grads[0].scalar_type();
  const bool narrow = type == ScalarType::BFloat16 || (type == ScalarType::Half && on_gpu);
  REQUIRE(type == wide || (narrow && wide == ScalarType::Float), "grads: expected ",
          wide == ScalarType::Double ? "float64"
          : on_gpu                   ? "float32, bfloat16 or float16"
                                     : "float32 or bfloat16",
          " beside ", name_of(wide), " parameters, got ", name_of(type), "; use backend torch");
  return type;
}

ScalarType copy_type(const Tensors& copies, const Tensors& params, bool on_gpu) {
  const ScalarType type = copies[0].scalar_type();
  REQUIRE(params[0].scalar_type() == ScalarType::Float &&
              (type == ScalarType::BFloat16 || (type == ScalarType::Half && on_gpu)),
          "copies: expected bfloat16", on_gpu ? " or float16" : "",
          " beside float32 parameters, got ", name_of(type), " beside ",
          name_of(params[0].scalar_type()), "; use backend torch");
  return type;
}

const float* scalars(const Tensor& t, const Tensor& rates, int64_t dim, const char* name) {
  REQUIRE(t.scalar_type() == ScalarType::Float && t.dim() == dim && t.numel() == 1 + dim &&
              t.is_contiguous(),
          name, ": expected contiguous float32 ", dim ? "[2]" : "[]", ", got ",
          name_of(t.scalar_type()), " ", shape_of(t));
  REQUIRE(same_device(t, rates), name, ": expected the device of rates");
  return static_cast<const float*>(t.const_data_ptr());
}

const float* scalar(const Optional& t, const Tensor& rates, const char* name) {
  return t ? scalars(*t, rates, 0, name) : nullptr;
}

void check_number(double value, bool valid, const char* expected, const char* name) {
  REQUIRE(valid, name, ": expected ", expected, ", got ", value);  // a NaN is not valid
}

void* pointer(const Tensors& list, size_t i) {
  return list.empty() ? nullptr : list[i].mutable_data_ptr();
}

// what both updates have; first, second: as in UpdateTensor
struct Lists {
  const Tensors &params, &grads, &first, &second, &copies, &averages;
};

UpdateGroup group_of(const Lists& lists, const Tensor& rates, const Optional& factor,
                     const Optional& found_inf, bool on_gpu, std::vector<UpdateTensor>& table) {
  const Tensors& params = lists.params;
  UpdateGroup group{};
  group.rates = scalars(rates, rates, 1, "rates");
  group.factor = scalar(factor, rates, "factor");
  group.found_inf = scalar(found_inf, rates, "found_inf");
  const ScalarType wide = wide_type(params);
  const ScalarType grad = params.empty() ? wide : grad_type(lists.grads, params, on_gpu);
  check_list(lists.grads, params, grad, "grads");
  group.dtype = dtype_of(wide);
  group.grad_dtype = dtype_of(grad);
  if (!lists.copies.empty()) {
    REQUIRE(!params.empty(), "copies: expected 0 tensors, got ", lists.copies.size());
    const ScalarType copy = copy_type(lists.copies, params, on_gpu);
    check_list(lists.copies, params, copy, "copies");
    group.copy_dtype = dtype_of(copy);
  }
  if (!lists.averages.empty()) check_list(lists.averages, params, wide, "averages");
  for (size_t i = 0; i < params.size(); ++i)
    table.push_back({params[i].numel(), params[i].mutable_data_ptr(),
                     lists.grads[i].const_data_ptr(), pointer(lists.first, i),
                     pointer(lists.second, i), pointer(lists.copies, i),
                     pointer(lists.averages, i)});
  group.tensors = table.data();
  group.count = int64_t(table.size());
  return group;
}

template <class B>
void sgd(Tensors params, Tensors grads, Tensors momenta, Tensors copies, Tensors averages,
         const Tensor& rates, const Optional& factor, const Optional& found_inf, double decay,
         bool decoupled, double momentum, bool nesterov) {
  check_number(decay, decay >= 0, ">= 0", "decay");
  check_number(momentum, momentum >= 0, ">= 0", "momentum");
  check_params(params, rates, B::on_gpu);
  if (momentum != 0)
    check_list(momenta, params, wide_type(params), "momenta");
  else
    REQUIRE(momenta.empty(), "momenta: expected none without momentum, got ", momenta.size());
  std::vector<UpdateTensor> table;
  const Tensors none;
  const Lists lists{params, grads, momenta, none, copies, averages};
  const UpdateGroup group = group_of(lists, rates, factor, found_inf, B::on_gpu, table);
  B::run(Sgd{group, decay, decoupled, momentum, nesterov}, rates);
}

template <class B>
void adam(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors copies,
          Tensors averages, const Tensor& rates, const Tensor& steps, const Optional& factor,
          const Optional& found_inf, double decay, bool decoupled, double beta1, double beta2,
          double eps) {
  check_number(decay, decay >= 0, ">= 0", "decay");
  check_number(beta1, beta1 >= 0 && beta1 < 1, "0 <= beta1 < 1", "beta1");
  check_number(beta2, beta2 >= 0 && beta2 < 1, "0 <= beta2 < 1", "beta2");
  check_number(eps, eps >= 0, ">= 0", "eps");
  check_params(params, rates, B::on_gpu);
  check_list(exp_avgs, params, wide_type(params), "exp_avgs");
  check_list(exp_avg_sqs, params, wide_type(params), "exp_avg_sqs");
  std::vector<UpdateTensor> table;
  const Lists lists{params, grads, exp_avgs, exp_avg_sqs, copies, averages};
  const UpdateGroup group = group_of(lists, rates, factor, found_inf, B::on_gpu, table);
  const float* number = scalars(steps, rates, 0, "steps");
  B::run(Adam{group, number, decay, decoupled, beta1, beta2, eps}, rates);
}

template <class B>
void find_nonfinite(Tensors grads, Tensor found_inf) {
  scalars(found_inf, found_inf, 0, "found_inf");
  std::vector<FlatTensor> table;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Place place{"grads", i};
    const ScalarType type = grads[i].scalar_type();
    const Dtype dtype = dtype_of(type);  // f32 also for whatever has none
    REQUIRE((dtype != Dtype::f32 || type == ScalarType::Float) &&
                (dtype != Dtype::f64 || !B::on_gpu),
            place, ": expected float32, bfloat16",
            B::on_gpu ? " or float16" : ", float16 or float64", ", got ", name_of(type),
            "; use backend torch");
    REQUIRE(same_device(grads[i], found_inf), place, ": expected the device of found_inf");
    check_dense(grads[i], place);
    table.push_back({grads[i].numel(), dtype, grads[i].const_data_ptr()});
  }
  auto* found = static_cast<float*>(found_inf.mutable_data_ptr());
  B::run(FindNonfinite{table.data(), int64_t(table.size()), found}, found_inf);
}

template <class B>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("sgd_", TORCH_BOX(&sgd<B>));
  m.impl("adam_", TORCH_BOX(&adam<B>));
  m.impl("find_nonfinite_", TORCH_BOX(&find_nonfinite<B>));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) { implement<Cpu>(m); }
#ifdef FASTCNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) { implement<Cuda>(m); }
#endif
