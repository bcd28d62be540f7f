// SGD and Adam(W) on all parameters of a group in one launch, with the weights' rounded copies and
// their running average:
//   g = factor · grad;  state ← rule(state, g);  weight ← rule(weight, state)
//   copy ← rounded(weight);  average ← average + rate · (weight - average)
//
// Flat memory: 4 values of each array a thread at a time (16 bytes of fp32, 8 of a half), one
// where an array is not aligned so, and at a tensor's end. Fused: unscaling and clipping (factor),
// decay, momentum, update, cast and average, for which torch reads the weights four times and the
// gradients twice. Bytes a value, SGD with momentum: 16 + the gradient's 2 or 4, + 2 for a copy,
// + 8 for an average.
//
// The table of the tensors' pointers travels in the kernel's parameters, so that a launch copies
// nothing and can be captured; a group of more tensors takes several launches. Learning rate, step
// and loss scale are read on the device, so that a captured launch follows them.
#include "walk.cuh"

namespace fastcnn::cuda {
namespace {

// 4 KB of parameters hold this many tensors
constexpr int kTableTensors = 64;
constexpr int kValues = 4;
// vectors of each array that a thread has in flight
constexpr int kUpdateLoads = 2;
// values of a tensor that a block updates: two turns of every thread
constexpr int kChunk = 2 * kUpdateLoads * kValues * kThreads;

struct UpdateTable {
  UpdateTensor tensors[kTableTensors];
  unsigned first_block[kTableTensors];  // of each tensor; a block has one chunk
  int count;
  bool half_copies;  // fp16; else bf16
  const float* rates;
  const float* factor;
  const float* found_inf;
};

// what a rule reads on the device, and what decay is made of it
struct DeviceRates {
  float lr, average, factor, l2, shrink;
  bool skip;

  __device__ DeviceRates(const UpdateTable& table, float decay, bool decoupled)
      : lr(table.rates[0]),
        average(table.rates[1]),
        factor(table.factor ? *table.factor : 1.f),
        l2(decoupled ? 0.f : decay),
        shrink(decoupled ? lr * decay : 0.f),
        skip(table.found_inf && *table.found_inf != 0) {}

  // decays the weight and returns its gradient
  __device__ float gradient(float& weight, float grad) const {
    float g = factor * grad;
    if (l2 != 0) g = fmaf(l2, weight, g);
    if (shrink != 0) weight = fmaf(-shrink, weight, weight);
    return g;
  }
};

struct SgdRule {
  static constexpr int kStates = 1;
  float decay, momentum;
  bool decoupled, nesterov;

  struct Step {
    DeviceRates rates;
    float momentum;
    bool nesterov, has_state;

    __device__ Step(const SgdRule& rule, const UpdateTable& table, const UpdateTensor& tensor)
        : rates(table, rule.decay, rule.decoupled),
          momentum(rule.momentum),
          nesterov(rule.nesterov),
          has_state(tensor.first != nullptr) {}

    __device__ void operator()(float& weight, float grad, float& first, float&) const {
      float g = rates.gradient(weight, grad);
      if (has_state) {
        first = fmaf(momentum, first, g);
        g = nesterov ? fmaf(momentum, first, g) : first;
      }
      weight = fmaf(-rates.lr, g, weight);
    }
  };
};

struct AdamRule {
  static constexpr int kStates = 2;
  float decay;
  bool decoupled;
  float beta1, beta2, rest1, rest2, eps;  // rest: 1 - beta
  float log_beta1, log_beta2;
  const float* steps;

  // With c = 1 - beta^steps: lr / c1 · m / (sqrt(v) / sqrt(c2) + eps) is
  // (lr · sqrt(c2) / c1) · m / (sqrt(v) + eps · sqrt(c2)), which divides once a value.
  struct Step {
    DeviceRates rates;
    float beta1, beta2, rest1, rest2, size, eps;
    static constexpr bool has_state = true;

    __device__ Step(const AdamRule& rule, const UpdateTable& table, const UpdateTensor&)
        : rates(table, rule.decay, rule.decoupled),
          beta1(rule.beta1),
          beta2(rule.beta2),
          rest1(rule.rest1),
          rest2(rule.rest2) {
      const float steps = *rule.steps;
      const float root = sqrtf(-expm1f(steps * rule.log_beta2));
      size = rates.lr * root / -expm1f(steps * rule.log_beta1);
      eps = rule.eps * root;
    }

    __device__ void operator()(float& weight, float grad, float& first, float& second) const {
      const float g = rates.gradient(weight, grad);
      // from the nearer end, so that what is rounded is small
      first = rest1 < 0.5f ? fmaf(rest1, g - first, first) : fmaf(beta1, first - g, g);
      second = fmaf(beta2, second, rest2 * g * g);
      weight = fmaf(-size, first / (sqrtf(second) + eps), weight);
    }
  };
};

// the arrays of a tensor from a block's chunk on
template <typename G>
struct Chunk {
  float* weight;
  const G* grad;
  float *first, *second;
  void* copy;
  float* average;

  __device__ Chunk(const UpdateTensor& tensor, int64_t begin)
      : weight(static_cast<float*>(tensor.weight) + begin),
        grad(static_cast<const G*>(tensor.grad) + begin),
        first(offset(tensor.first, begin)),
        second(offset(tensor.second, begin)),
        copy(tensor.copy ? static_cast<uint16_t*>(tensor.copy) + begin : nullptr),
        average(offset(tensor.average, begin)) {}

  __device__ static float* offset(void* array, int64_t begin) {
    return array ? static_cast<float*>(array) + begin : nullptr;
  }
  __device__ bool wide() const {
    const auto fits = [](const void* array, size_t size) {
      return reinterpret_cast<uintptr_t>(array) % (kValues * size) == 0;
    };
    return fits(weight, 4) && fits(grad, sizeof(G)) && fits(first, 4) && fits(second, 4) &&
           fits(copy, 2) && fits(average, 4);
  }
};

template <int V>
__device__ inline void store_copy(void* target, int at, bool half, const float (&values)[V]) {
  const auto value = [&](int i) { return values[i]; };
  if (half)
    store_values<__half, V>(static_cast<__half*>(target) + at, value);
  else
    store_values<__nv_bfloat16, V>(static_cast<__nv_bfloat16*>(target) + at, value);
}

// V values of every array, read together
template <typename G, int V, typename Rule>
struct Vectors {
  static constexpr bool kSecond = Rule::kStates > 1;
  Packed<float, V> weight, first, second, average;
  Packed<G, V> grad;

  __device__ void load_all(const Chunk<G>& chunk, int at, bool has_state) {
    weight = load<V>(chunk.weight + at);
    grad = load<V>(chunk.grad + at);
    if (has_state) first = load<V>(chunk.first + at);
    if (kSecond) second = load<V>(chunk.second + at);
    if (chunk.average) average = load<V>(chunk.average + at);
  }

  __device__ void update(const Chunk<G>& chunk, int at, const typename Rule::Step& step,
                         bool half_copies) {
    float w[V];
#pragma unroll
    for (int i = 0; i < V; ++i) w[i] = weight[i];
    if (!step.rates.skip) {
      float m[V], v[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        m[i] = step.has_state ? first[i] : 0.f;
        v[i] = kSecond ? second[i] : 0.f;
        step(w[i], grad[i], m[i], v[i]);
      }
      store_values<float, V>(chunk.weight + at, [&](int i) { return w[i]; });
      if (step.has_state) store_values<float, V>(chunk.first + at, [&](int i) { return m[i]; });
      if (kSecond) store_values<float, V>(chunk.second + at, [&](int i) { return v[i]; });
      if (chunk.copy) store_copy<V>(chunk.copy, at, half_copies, w);
    }
    if (chunk.average)
      store_values<float, V>(chunk.average + at, [&](int i) {
        return fmaf(step.rates.average, w[i] - average[i], average[i]);
      });
  }
};

// values begin to end of a chunk, V at a time
template <typename G, int V, typename Rule>
__device__ inline void update_values(const Chunk<G>& chunk, int begin, int end,
                                     const typename Rule::Step& step, bool half_copies) {
  constexpr int kStride = V * kThreads;
  for (int at = begin + static_cast<int>(threadIdx.x) * V; at < end; at += kUpdateLoads * kStride) {
    Vectors<G, V, Rule> vectors[kUpdateLoads];
#pragma unroll
    for (int u = 0; u < kUpdateLoads; ++u) {
      if (at + u * kStride >= end) break;
      vectors[u].load_all(chunk, at + u * kStride, step.has_state);
    }
#pragma unroll
    for (int u = 0; u < kUpdateLoads; ++u) {
      if (at + u * kStride >= end) break;
      vectors[u].update(chunk, at + u * kStride, step, half_copies);
    }
  }
}

template <typename G, typename Rule>
__global__ void __launch_bounds__(kThreads, kResident)
    update_kernel(const __grid_constant__ UpdateTable table, const __grid_constant__ Rule rule) {
  const int index = tensor_of_block(table, blockIdx.x);
  const UpdateTensor& tensor = table.tensors[index];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - table.first_block[index]) * kChunk;
  const int count = static_cast<int>(min(static_cast<int64_t>(kChunk), tensor.count - begin));
  const Chunk<G> chunk(tensor, begin);
  const typename Rule::Step step(rule, table, tensor);
  const int whole = chunk.wide() ? count - count % kValues : 0;
  update_values<G, kValues, Rule>(chunk, 0, whole, step, table.half_copies);
  update_values<G, 1, Rule>(chunk, whole, count, step, table.half_copies);
}

template <typename Rule>
cudaError_t launch_update(const UpdateGroup& group, const Rule& rule, cudaStream_t stream) {
  static_assert(sizeof(UpdateTable) + sizeof(Rule) <= 4096, "a kernel's parameters");
  if (group.dtype != Dtype::f32) return cudaErrorInvalidValue;
  return dispatch(group.grad_dtype, [&](auto number) {
    UpdateTable table{};
    table.half_copies = group.copy_dtype == Dtype::f16;
    table.rates = group.rates;
    table.factor = group.factor;
    table.found_inf = group.found_inf;
    unsigned blocks = 0;
    cudaError_t status = cudaSuccess;
    for (int64_t i = 0; i < group.count && status == cudaSuccess; ++i) {
      if (group.tensors[i].count > 0) {
        table.tensors[table.count] = group.tensors[i];
        table.first_block[table.count++] = blocks;
        blocks += blocks_for(group.tensors[i].count, kChunk);
      }
      if (blocks == 0 || (table.count < kTableTensors && i + 1 < group.count)) continue;
      status = launch(update_kernel<decltype(number), Rule>, dim3(blocks), dim3(kThreads), 0,
                      stream, table, rule);
      table.count = 0;
      blocks = 0;
    }
    return status;
  });
}

}  // namespace

cudaError_t launch_sgd(const Sgd& args, cudaStream_t stream) {
  const SgdRule rule{static_cast<float>(args.decay), static_cast<float>(args.momentum),
                     args.decoupled, args.nesterov};
  return launch_update(args.group, rule, stream);
}

cudaError_t launch_adam(const Adam& args, cudaStream_t stream) {
  const auto number = [](double value) { return static_cast<float>(value); };
  const AdamRule rule{number(args.decay),           args.decoupled,
                      number(args.beta1),           number(args.beta2),
                      number(1 - args.beta1),       number(1 - args.beta2),
                      number(args.eps),             number(std::log(args.beta1)),
                      number(std::log(args.beta2)), args.steps};
  return launch_update(args.group, rule, stream);
}

std::vector<Kernel> update_kernels() {
  std::vector<Kernel> kernels;
  for_types([&](auto number, const std::string& type) {
    using G = decltype(number);
    kernels.push_back(named("update_kernel<" + type + ", sgd>", update_kernel<G, SgdRule>));
    kernels.push_back(named("update_kernel<" + type + ", adam>", update_kernel<G, AdamRule>));
  });
  return kernels;
}

}  // namespace fastcnn::cuda
