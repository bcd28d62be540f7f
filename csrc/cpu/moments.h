// Batch statistics out of those of parts: joined in the parts' order, in fp64, so that the bits do not
// depend on who computed a part (Chan, Golub and LeVeque 1983).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastcnn::cpu {

// of `count` values: their mean and the sum of their squared deviations from it
struct Moment {
  double count, mean, squares;
};

struct JoinedMoments {
  std::vector<double> count, mean, squares;  // (K,)

  // of_part(part, c) → the moment of a channel in a part
  template <class F>
  JoinedMoments(int64_t parts, int64_t k, F&& of_part) : count(k), mean(k), squares(k) {
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t c = 0; c < k; ++c) {
        const Moment moment = of_part(part, c);
        count[c] += moment.count;
        mean[c] += moment.count * moment.mean;
      }
    for (int64_t c = 0; c < k; ++c) mean[c] /= std::max(count[c], 1.0);
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t c = 0; c < k; ++c) {
        const Moment moment = of_part(part, c);
        const double delta = moment.mean - mean[c];
        squares[c] += moment.squares + moment.count * delta * delta;
      }
  }
};

// mean and rstd of channel c, and the running statistics moved towards them, of BnStats or BnMerge;
// without values as arguments.h says
template <class A, class Args>
void write_statistics(const Args& args, int64_t c, const Moment& moment) {
  auto move = [&](void* running, double to) {
    A& value = static_cast<A*>(running)[c];
    value = A((1 - args.momentum) * value + args.momentum * to);
  };
  const bool any = moment.count > 0;
  static_cast<A*>(args.mean)[c] = A(moment.mean);
  static_cast<A*>(args.rstd)[c] =
      any ? A(1 / std::sqrt(moment.squares / moment.count + args.eps)) : A(1);
  if (!any) return;
  move(args.running_mean, moment.mean);
  move(args.running_var, moment.squares / std::max(moment.count - 1, 1.0));
}

}  // namespace fastcnn::cpu
