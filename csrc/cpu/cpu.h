// The ops on CPU tensors, with the arguments of the CUDA half. dtype: f32, bf16, f64.
//
// Work is cut into tasks by the sizes alone and their results are joined in order, so that the bits
// do not depend on the number of threads; but for those of a convolution's weight gradient.
#pragma once

#include <functional>

#include "../arguments.h"

namespace fastcnn::cpu {

// runs body(begin, end) over parts of [0, tasks), on as many threads as the framework has
using Parallel =
    std::function<void(int64_t tasks, const std::function<void(int64_t, int64_t)>& body)>;

// bytes of workspace (64-byte aligned)
int64_t bn_stats_workspace(const Sizes& sizes);
int64_t bn_act_backward_workspace(const Sizes& sizes);

// bytes of a convolution's workspace for so many threads. Convolutions are 3x3, stride 1, with pads
// of 0 to 2, f32 or f64; an image of at least one pixel. A weight gradient is the sum of `threads`
// parts.
int64_t conv_workspace(const ConvShape& shape, Dtype dtype, int threads);
int64_t conv_data_gradient_workspace(const ConvShape& shape, Dtype dtype, int threads);
int64_t conv_weight_gradient_workspace(const ConvShape& shape, Dtype dtype, int threads);

void bn_stats(const BnStats& args, const Parallel& parallel);
void bn_act(const BnAct& args, const Parallel& parallel);
void bn_act_pool(const BnActPool& args, const Parallel& parallel);
void bn_act_backward(const BnActBackward& args, const Parallel& parallel);
void bn_act_pool_backward(const BnActPoolBackward& args, const Parallel& parallel);
// partials: one row
void conv(const Conv& args, void* workspace, int threads, const Parallel& parallel);
void bn_merge(const BnMerge& args, Dtype dtype);
void conv_data_gradient(const ConvDataGradient& args, int threads, const Parallel& parallel);
void conv_weight_gradient(const ConvWeightGradient& args, int threads, const Parallel& parallel);
void augment(const Augment& args, const Parallel& parallel);
void sgd(const Sgd& args, const Parallel& parallel);
void adam(const Adam& args, const Parallel& parallel);
void find_nonfinite(const FindNonfinite& args, const Parallel& parallel);

}  // namespace fastcnn::cpu
