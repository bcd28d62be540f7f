// The CUDA launchers: the contract between bindings.cpp, which sees torch, and the .cu files, which
// do not. A launcher enqueues on the caller's stream, never synchronises, allocates or clears
// memory, may be captured in a CUDA graph, and gives the same bits for the same input. It returns
// cudaErrorInvalidValue for a dtype that it has no kernel for (f64; a convolution: f32).
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "arguments.h"

namespace fastcnn::cuda {

// bytes of workspace (16-byte aligned)
int64_t bn_stats_workspace(const Sizes& sizes);
int64_t bn_act_backward_workspace(const Sizes& sizes);
int64_t conv_data_gradient_workspace(const ConvShape& shape, Dtype dtype);
int64_t conv_weight_gradient_workspace(const ConvShape& shape, Dtype dtype);

// rows of partial statistics that a convolution leaves, a function of the shape alone
int64_t conv_partial_rows(const ConvShape& shape);
// the most channels of an input that is made while it is loaded; fastcnn.ops.native.library reads it here
constexpr int64_t kPendingChannels = 640;

cudaError_t launch_bn_stats(const BnStats& args, cudaStream_t stream);
cudaError_t launch_bn_act(const BnAct& args, cudaStream_t stream);
cudaError_t launch_bn_act_pool(const BnActPool& args, cudaStream_t stream);
cudaError_t launch_bn_act_backward(const BnActBackward& args, cudaStream_t stream);
cudaError_t launch_bn_act_pool_backward(const BnActPoolBackward& args, cudaStream_t stream);
cudaError_t launch_conv(const Conv& args, cudaStream_t stream);
cudaError_t launch_bn_merge(const BnMerge& args, cudaStream_t stream);
cudaError_t launch_conv_data_gradient(const ConvDataGradient& args, cudaStream_t stream);
cudaError_t launch_conv_weight_gradient(const ConvWeightGradient& args, cudaStream_t stream);
cudaError_t launch_augment(const Augment& args, cudaStream_t stream);
cudaError_t launch_sgd(const Sgd& args, cudaStream_t stream);
cudaError_t launch_adam(const Adam& args, cudaStream_t stream);
cudaError_t launch_find_nonfinite(const FindNonfinite& args, cudaStream_t stream);

// The launches of an op ("bn_stats", ..., "augment"), in order, for sizes of x: a
// function of shape, dtype and pool alone. 16-byte aligned tensors; training, no residual. "sgd_",
// "adam_": one parameter of so many values, gradients of this dtype; "find_nonfinite_": one tensor.
// Throws std::invalid_argument for an unknown op or a dtype without kernels.
struct LaunchConfiguration {
  std::string kernel;
  dim3 grid, block;
  size_t shared;  // bytes
};
std::vector<LaunchConfiguration> launch_configuration(const std::string& op, const Sizes& sizes,
                                                      Dtype dtype, const Pool& pool);

// Every kernel as compiled for the current GPU; blocks_per_sm at the threads and the most shared
// memory that a launch of it takes. Throws std::runtime_error without a GPU.
struct Occupancy {
  std::string kernel;
  int registers;        // a thread
  size_t local;         // bytes a thread in local memory: spills
  size_t shared;        // bytes a block, at most
  int blocks_per_sm;
};
std::vector<Occupancy> occupancy();

}  // namespace fastcnn::cuda
