// Whether any value of many tensors is inf or NaN: the exponent's bits are all set in such a value,
// so that integers are compared, and no floating-point exception is raised.
#include <algorithm>
#include <vector>

#include "cpu.h"

namespace fastcnn::cpu {
namespace {

constexpr int64_t kTaskValues = 32 * 1024;

struct CheckTask {
  const FlatTensor* tensor;
  int64_t begin, end;
};

// without a way out before the end, so that the loop is vectors
template <class Bits>
bool any_nonfinite(const CheckTask& task, Bits exponent) {
  const Bits* values = static_cast<const Bits*>(task.tensor->data);
  Bits found = 0;
  for (int64_t i = task.begin; i < task.end; ++i) found |= (values[i] & exponent) == exponent;
  return found != 0;
}

bool run(const CheckTask& task) {
  switch (task.tensor->dtype) {
    case Dtype::f32:
      return any_nonfinite<uint32_t>(task, 0x7f800000);
    case Dtype::f16:
      return any_nonfinite<uint16_t>(task, 0x7c00);
    case Dtype::bf16:
      return any_nonfinite<uint16_t>(task, 0x7f80);
    default:
      return any_nonfinite<uint64_t>(task, 0x7ff0000000000000);
  }
}

}  // namespace

void find_nonfinite(const FindNonfinite& args, const Parallel& parallel) {
  std::vector<CheckTask> tasks;
  for (int64_t i = 0; i < args.count; ++i)
    for (int64_t at = 0; at < args.tensors[i].count; at += kTaskValues)
      tasks.push_back({&args.tensors[i], at, std::min(args.tensors[i].count, at + kTaskValues)});
  std::vector<char> found(tasks.size());
  parallel(int64_t(tasks.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) found[i] = run(tasks[i]);
  });
  if (std::find(found.begin(), found.end(), 1) != found.end()) *args.found_inf = 1;
}

}  // namespace fastcnn::cpu
