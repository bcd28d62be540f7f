// What is launched for a shape, and how the kernels fit the GPU: for tables, tests and tuning.
//
// The launchers themselves are asked: they run as ever, but launch() notes what it is given. So
// there is no second computation of the grid that could differ from the first.
#include <stdexcept>

#include "walk.cuh"

namespace fastcnn::cuda {

thread_local std::vector<Launch>* recorded_launches = nullptr;

std::vector<Kernel> bn_stats_kernels();
std::vector<Kernel> bn_act_kernels();
std::vector<Kernel> bn_act_pool_kernels();
std::vector<Kernel> bn_act_backward_kernels();
std::vector<Kernel> bn_act_pool_backward_kernels();
std::vector<Kernel> conv_bn_act_kernels();
std::vector<Kernel> conv_data_gradient_kernels();
std::vector<Kernel> conv_weight_gradient_kernels();
std::vector<Kernel> augment_kernels();
std::vector<Kernel> update_kernels();
std::vector<Kernel> find_nonfinite_kernels();

namespace {

const std::vector<Kernel>& all_kernels() {
  static const std::vector<Kernel> kernels = [] {
    std::vector<Kernel> all;
    for (const auto& some : {bn_stats_kernels(), bn_act_kernels(), bn_act_pool_kernels(),
                             bn_act_backward_kernels(), bn_act_pool_backward_kernels(),
                             conv_bn_act_kernels(), conv_data_gradient_kernels(),
                             conv_weight_gradient_kernels(), augment_kernels(), update_kernels(),
                             find_nonfinite_kernels()})
      all.insert(all.end(), some.begin(), some.end());
    return all;
  }();
  return kernels;
}

// null: aligned, and never read
template <typename Args>
Args arguments(Dtype dtype, const Sizes& sizes) {
  Args args{};
  args.dtype = dtype;
  args.sizes = sizes;
  return args;
}

cudaError_t launch_backward_of(const std::string& op, Dtype dtype, const Sizes& sizes,
                               const Pool& pool) {
  // something where a launcher asks whether there is something
  alignas(16) static char given[16];
  const auto fill = [&](auto& args) {
    args.x = args.dweight = args.dbias = args.workspace = given;
    args.batch_stats = true;
  };
  if (op == "bn_act_backward") {
    auto args = arguments<BnActBackward>(dtype, sizes);
    fill(args);
    return launch_bn_act_backward(args, nullptr);
  }
  auto args = arguments<BnActPoolBackward>(dtype, sizes);
  fill(args);
  args.pool = pool;
  return launch_bn_act_pool_backward(args, nullptr);
}

cudaError_t launch_update_of(const std::string& op, Dtype dtype, const Sizes& sizes) {
  const UpdateTensor tensor{sizes.elements()};
  UpdateGroup group{};
  group.grad_dtype = dtype;
  group.tensors = &tensor;
  group.count = 1;
  if (op == "sgd_") return launch_sgd({group}, nullptr);
  return launch_adam({group}, nullptr);
}

cudaError_t launch_op(const std::string& op, Dtype dtype, const Sizes& sizes, const Pool& pool) {
  if (op == "bn_stats") {
    auto args = arguments<BnStats>(dtype, sizes);
    args.training = true;
    return launch_bn_stats(args, nullptr);
  }
  if (op == "bn_act") return launch_bn_act(arguments<BnAct>(dtype, sizes), nullptr);
  if (op == "bn_act_pool") {
    auto args = arguments<BnActPool>(dtype, sizes);
    args.pool = pool;
    return launch_bn_act_pool(args, nullptr);
  }
  if (op == "bn_act_backward" || op == "bn_act_pool_backward")
    return launch_backward_of(op, dtype, sizes, pool);
  if (op == "augment") {
    Augment args{};
    args.dtype = dtype;
    args.count = sizes.n;
    args.h = static_cast<int>(sizes.p);
    args.w = static_cast<int>(sizes.q);
    return launch_augment(args, nullptr);
  }
  if (op == "sgd_" || op == "adam_") return launch_update_of(op, dtype, sizes);
  if (op == "find_nonfinite_") {
    const FlatTensor tensor{sizes.elements(), dtype, nullptr};
    return launch_find_nonfinite({&tensor, 1, nullptr}, nullptr);
  }
  throw std::invalid_argument("no op '" + op + "'");
}

std::string name_of(const void* address) {
  for (const Kernel& kernel : all_kernels())
    if (kernel.address == address) return kernel.name;
  return "unknown";
}

// of a launch that reduces: bn_stats takes the most, 3 V + 1 floats a thread
size_t most_shared(const Kernel& kernel) {
  if (kernel.threads) return kernel.shared;
  const std::string& name = kernel.name;
  const bool reduces = name.find("stats") != std::string::npos ||
                       name.find("backward") != std::string::npos;
  const int width = name.find(", 8") != std::string::npos ? 8 : 4;
  return reduces ? sizeof(float) * (3 * width + 1) * kThreads : 0;
}

void check(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("occupancy needs a GPU: ") + cudaGetErrorString(status));
}

}  // namespace

std::vector<LaunchConfiguration> launch_configuration(const std::string& op, const Sizes& sizes,
                                                      Dtype dtype, const Pool& pool) {
  std::vector<Launch> launches;
  struct Recording {
    explicit Recording(std::vector<Launch>* into) { recorded_launches = into; }
    ~Recording() { recorded_launches = nullptr; }
  } recording(&launches);
  if (launch_op(op, dtype, sizes, pool) != cudaSuccess)
    throw std::invalid_argument(op + ": no kernel for this dtype or size");
  std::vector<LaunchConfiguration> configurations;
  for (const Launch& launch : launches)
    configurations.push_back({name_of(launch.kernel), launch.grid, launch.block, launch.shared});
  return configurations;
}

std::vector<Occupancy> occupancy() {
  std::vector<Occupancy> table;
  for (const Kernel& kernel : all_kernels()) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel.address));
    const size_t shared = most_shared(kernel);
    const int threads = kernel.threads ? kernel.threads : kThreads;
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.address, threads, shared));
    table.push_back({kernel.name, attributes.numRegs, attributes.localSizeBytes,
                     attributes.sharedSizeBytes + shared, blocks});
  }
  return table;
}

}  // namespace fastcnn::cuda
