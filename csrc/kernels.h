// The CUDA launchers: the contract between bindings.cpp, which sees torch, and the .cu files, which
// do not. A launcher enqueues on the caller's stream, never synchronises, allocates or clears
// memory, may be captured in a CUDA graph, and gives the same bits for the same input. It returns
// cudaErrorInvalidValue for a dtype that it has no kernel for (f64).
#pragma once

#include <cuda_runtime_api.h>

#include "arguments.h"

namespace fastcnn::cuda {

// bytes of workspace (16-byte aligned)
int64_t bn_stats_workspace(const Sizes& sizes);
int64_t bn_act_backward_workspace(const Sizes& sizes);

cudaError_t launch_bn_stats(const BnStats& args, cudaStream_t stream);
cudaError_t launch_bn_act(const BnAct& args, cudaStream_t stream);
cudaError_t launch_bn_act_pool(const BnActPool& args, cudaStream_t stream);
cudaError_t launch_bn_act_backward(const BnActBackward& args, cudaStream_t stream);
cudaError_t launch_bn_act_pool_backward(const BnActPoolBackward& args, cudaStream_t stream);

}  // namespace fastcnn::cuda
