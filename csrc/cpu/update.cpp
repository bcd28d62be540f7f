// SGD and Adam(W), the weights' rounded copies and their running average, tile by tile.
//
// A tile of every array stays in the first cache while plain loops pass over it one after the
// other, so that memory is read and written once whatever a group asks for, and no loop has to
// exist for every combination. Each sum has one product at most that may be contracted, so that a
// value's bits do not depend on where in a loop it stands.
#include <algorithm>
#include <cmath>

#include "cpu.h"
#include "walk.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t kTileCount = 1024;  // values; five arrays of fp32 are 20 KB
constexpr int64_t kTaskCount = 16 * kTileCount;

template <class T>
Acc<T> widened(T value) {
  return value;
}

inline float widened(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// what is read of the device, and what decay is made of it
template <class A>
struct Rates {
  A lr, average, factor, l2, shrink;
  bool skip;

  Rates(const UpdateGroup& group, double decay, bool decoupled)
      : lr(group.rates[0]),
        average(group.rates[1]),
        factor(group.factor ? *group.factor : 1),
        l2(A(decoupled ? 0 : decay)),
        shrink(A(decoupled ? double(group.rates[0]) * decay : 0)),
        skip(group.found_inf && *group.found_inf != 0) {}
};

// g ← factor · grad (+ decay · w), w ← w · (1 - lr · decay)
template <class A, class G>
void decay_tile(const Rates<A>& rates, int64_t n, const G* __restrict__ grad, A* __restrict__ w,
                A* __restrict__ g) {
  const A factor = rates.factor, l2 = rates.l2, shrink = rates.shrink;
  for (int64_t i = 0; i < n; ++i) g[i] = factor * widened(grad[i]);
  if (l2 != 0)
    for (int64_t i = 0; i < n; ++i) g[i] += l2 * w[i];
  if (shrink != 0)
    for (int64_t i = 0; i < n; ++i) w[i] -= shrink * w[i];
}

template <class A>
struct SgdRule {
  Rates<A> rates;
  A momentum;
  bool nesterov;

  explicit SgdRule(const Sgd& args)
      : rates(args.group, args.decay, args.decoupled),
        momentum(A(args.momentum)),
        nesterov(args.nesterov) {}

  void operator()(int64_t n, A* __restrict__ w, A* __restrict__ g, A* __restrict__ first,
                  A*) const {
    const A lr = rates.lr, mu = momentum;
    if (first && nesterov)
      for (int64_t i = 0; i < n; ++i) {
        first[i] = mu * first[i] + g[i];
        g[i] += mu * first[i];
      }
    else if (first)
      for (int64_t i = 0; i < n; ++i) g[i] = first[i] = mu * first[i] + g[i];
    for (int64_t i = 0; i < n; ++i) w[i] -= lr * g[i];
  }
};

template <class A>
struct AdamRule {
  Rates<A> rates;
  A beta1, beta2, rest1, rest2, size, eps;  // rest: 1 - beta

  // With c = 1 - beta^steps: lr / c1 · m / (sqrt(v) / sqrt(c2) + eps) is
  // (lr · sqrt(c2) / c1) · m / (sqrt(v) + eps · sqrt(c2)), which divides once a value.
  explicit AdamRule(const Adam& args)
      : rates(args.group, args.decay, args.decoupled),
        beta1(A(args.beta1)),
        beta2(A(args.beta2)),
        rest1(A(1 - args.beta1)),
        rest2(A(1 - args.beta2)) {
    const double steps = *args.steps;
    const double root = std::sqrt(-std::expm1(steps * std::log(args.beta2)));
    size = A(args.group.rates[0] * root / -std::expm1(steps * std::log(args.beta1)));
    eps = A(args.eps * root);
  }

  void operator()(int64_t n, A* __restrict__ w, A* __restrict__ g, A* __restrict__ first,
                  A* __restrict__ second) const {
    const A b1 = beta1, b2 = beta2, r1 = rest1, r2 = rest2, factor = size, least = eps;
    // from the nearer end, so that what is rounded is small
    if (r1 < A(0.5))
      for (int64_t i = 0; i < n; ++i) first[i] += r1 * (g[i] - first[i]);
    else
      for (int64_t i = 0; i < n; ++i) first[i] = g[i] + b1 * (first[i] - g[i]);
    for (int64_t i = 0; i < n; ++i) g[i] *= r2 * g[i];
    for (int64_t i = 0; i < n; ++i) {
      second[i] = b2 * second[i] + g[i];
      w[i] -= factor * (first[i] / (std::sqrt(second[i]) + least));
    }
  }
};

// rounds to nearest, ties to even; every NaN becomes one
template <class A>
void copy_tile(int64_t n, const A* __restrict__ w, bf16* __restrict__ copy) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = float(w[i]);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    copy[i].bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

template <class A>
void average_tile(A rate, int64_t n, const A* __restrict__ w, A* __restrict__ average) {
  for (int64_t i = 0; i < n; ++i) average[i] += rate * (w[i] - average[i]);
}

template <class A, class G, class Rule>
void update_tile(const Rule& rule, const UpdateTensor& tensor, int64_t at, int64_t n) {
  const auto from = [at](void* array) { return array ? static_cast<A*>(array) + at : nullptr; };
  A* w = from(tensor.weight);
  if (!rule.rates.skip) {
    A g[kTileCount];
    decay_tile(rule.rates, n, static_cast<const G*>(tensor.grad) + at, w, g);
    rule(n, w, g, from(tensor.first), from(tensor.second));
    if (tensor.copy) copy_tile(n, w, static_cast<bf16*>(tensor.copy) + at);
  }
  if (tensor.average) average_tile(rule.rates.average, n, w, from(tensor.average));
}

// parts of the tensors, cut by their sizes alone
struct Task {
  const UpdateTensor* tensor;
  int64_t begin, end;
};

std::vector<Task> tasks_of(const UpdateGroup& group) {
  std::vector<Task> tasks;
  for (int64_t i = 0; i < group.count; ++i) {
    const UpdateTensor& tensor = group.tensors[i];
    for (int64_t at = 0; at < tensor.count; at += kTaskCount)
      tasks.push_back({&tensor, at, std::min(tensor.count, at + kTaskCount)});
  }
  return tasks;
}

template <class A, class G, class Rule>
void update(const UpdateGroup& group, const Rule& rule, const Parallel& parallel) {
  const std::vector<Task> tasks = tasks_of(group);
  parallel(int64_t(tasks.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t at = tasks[i].begin; at < tasks[i].end; at += kTileCount)
        update_tile<A, G>(rule, *tasks[i].tensor, at, std::min(kTileCount, tasks[i].end - at));
  });
}

template <template <class> class Rule, class Args>
void dispatch_update(const Args& args, const Parallel& parallel) {
  const UpdateGroup& group = args.group;
  if (group.dtype == Dtype::f64 && group.grad_dtype == Dtype::f64)
    return update<double, double>(group, Rule<double>(args), parallel);
  if (group.dtype == Dtype::f32 && group.grad_dtype == Dtype::f32)
    return update<float, float>(group, Rule<float>(args), parallel);
  if (group.dtype == Dtype::f32 && group.grad_dtype == Dtype::bf16)
    return update<float, bf16>(group, Rule<float>(args), parallel);
  throw std::invalid_argument("no CPU kernel for these dtypes");
}

}  // namespace

void sgd(const Sgd& args, const Parallel& parallel) { dispatch_update<SgdRule>(args, parallel); }

void adam(const Adam& args, const Parallel& parallel) {
  dispatch_update<AdamRule>(args, parallel);
}

}  // namespace fastcnn::cpu
