// A training batch from images that stay on the device: x (count, H, W, 3), NHWC, and its labels.
//
// Fused: the choice of samples, crop, flip, normalisation, cutout, rounding to the step's dtype and
// the labels, in one launch. A pixel is 3 bytes read and 3 values written; torch writes and reads
// the batch for each of these steps, the last of them in fp32: 49 operations there. Epoch
// and position are read on the device, so that a CUDA graph can be replayed for every batch.
//
// A block has one image, or a part of it, and each of its threads draws the image's choices anew,
// which costs less than to share them. A thread makes 16 bytes of a row (any three channels in a
// row start somewhere in a pixel, hence the turned parameters), or one value where rows are no
// whole number of 16 bytes.
#include "../draws.h"
#include "walk.cuh"

namespace fastcnn::cuda {
namespace {

// an estimate, as those of walk.cuh: a 32x32 image is then one block in bf16, two in fp32
constexpr int kImageThreads = 128;
constexpr int kVectors = 4;  // of a thread, at least, before an image is cut

__device__ inline bool is_cut(int from_start, int side) {
  return static_cast<unsigned>(from_start) < static_cast<unsigned>(side);
}

template <typename T, int V>
__global__ void __launch_bounds__(kImageThreads) augment_kernel(Augment args) {
  const int64_t epoch = args.at[0];
  const int64_t sample = sample_of(args, blockIdx.x);
  const Choice choice = choose(args, sample, epoch);
  const int row_values = args.w * 3;
  const int columns = row_values / V;
  const int64_t image_values = static_cast<int64_t>(args.h) * row_values;
  const int64_t place = place_of(args, blockIdx.x, sample);
  const uint8_t* image = args.images + place * image_values;
  T* x = static_cast<T*>(args.x) + blockIdx.x * image_values;
  if (blockIdx.y == 0 && threadIdx.x == 0) args.y[blockIdx.x] = args.labels[place];

  const int step = static_cast<int>(gridDim.y * blockDim.x);
  for (int vector = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
       vector < args.h * columns; vector += step) {
    const int row = vector / columns;
    const int first = (vector - row * columns) * V;  // value of the row
    const int source_row = source_of(row + choice.dy, args.h, args.reflect);
    const bool cut_row = is_cut(row - choice.top, args.cutout);
    // parameters of the channels, turned so that value i has those of i % 3
    float scale[3], bias[3], fill[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int channel = (first + i) % 3;
      scale[i] = args.scale[channel];
      bias[i] = args.bias_of_pixels ? 0.f : args.bias[channel];
      fill[i] = cut_row ? args.fill[channel] : 0.f;
    }
    uint8_t pixels[V];
    unsigned cut = 0;  // a bit a value
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int column = (first + i) / 3;
      const int window = choice.mirrored ? args.w - 1 - column : column;
      const int source = source_of(window + choice.dx, args.w, args.reflect);
      const bool inside = source_row >= 0 && source >= 0;
      pixels[i] = inside ? image[(source_row * args.w + source) * 3 + (first + i) % 3] : 0;
      if (cut_row && is_cut(column - choice.left, args.cutout)) cut |= 1u << i;
    }
    const int64_t offset = static_cast<int64_t>(row) * row_values + first;
    store_values<T, V>(x + offset, [&](int i) {
      const float shift = args.bias_of_pixels ? args.bias[offset + i] : bias[i % 3];
      const float value = __fadd_rn(__fmul_rn(static_cast<float>(pixels[i]), scale[i % 3]), shift);
      return cut >> i & 1 ? fill[i % 3] : value;
    });
  }
}

}  // namespace

cudaError_t launch_augment(const Augment& args, cudaStream_t stream) {
  return dispatch(args.dtype, [&](auto number) {
    using T = decltype(number);
    const bool wide = args.w % kWide<T> == 0 && aligned(args.x);
    const int64_t vectors = int64_t{args.h} * args.w * 3 / (wide ? kWide<T> : 1);
    const dim3 grid(static_cast<unsigned>(args.count),
                    std::min(blocks_for(vectors, kImageThreads * kVectors), 65535u));
    const auto kernel = wide ? augment_kernel<T, kWide<T>> : augment_kernel<T, 1>;
    return launch(kernel, grid, dim3(kImageThreads), 0, stream, args);
  });
}

std::vector<Kernel> augment_kernels() {
  std::vector<Kernel> kernels;
  for_types([&](auto number, const std::string& type) {
    using T = decltype(number);
    kernels.push_back(named<kWide<T>>("augment_kernel", type, augment_kernel<T, kWide<T>>));
    kernels.push_back(named<1>("augment_kernel", type, augment_kernel<T, 1>));
  });
  return kernels;
}

}  // namespace fastcnn::cuda
