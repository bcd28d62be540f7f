// The augmentation for torch: checks, allocation, registration. fastcnn/ops/augmentation.py holds
// the schema.
#include <algorithm>
#include <limits>

#include "bindings.h"

namespace {

using namespace fastcnn;

// of padding and cutout, so that sums of positions fit 32 bits
constexpr int64_t kMostPixels = int64_t{1} << 29;

void check_images(const Tensor& images) {
  REQUIRE(images.dim() == 4 && images.size(3) == 3 && images.scalar_type() == ScalarType::Byte &&
              images.is_contiguous(),
          "images: expected contiguous uint8 (M, H, W, 3), got ", shape_of(images));
  REQUIRE(images.numel() > 0, "images: expected at least one, got ", shape_of(images));
  REQUIRE(images.numel() / images.size(0) < int64_t{1} << 30,
          "images: expected less than 2^30 values an image, got ", shape_of(images));
}

// contiguous data of one of two shapes, on the device of the images
const void* data_of(const Tensor& t, const char* name, ScalarType dtype, const char* dtype_name,
                    const std::vector<int64_t>& shape, const Tensor& images,
                    const std::vector<int64_t>& other = {}) {
  const auto has_shape = [&](const std::vector<int64_t>& wanted) {
    return std::vector<int64_t>(t.sizes().begin(), t.sizes().end()) == wanted;
  };
  REQUIRE((has_shape(shape) || (!other.empty() && has_shape(other))) &&
              t.scalar_type() == dtype && t.is_contiguous(),
          name, ": expected contiguous ", dtype_name, " ", text_of(shape),
          other.empty() ? "" : " or " + text_of(other), ", got ", shape_of(t));
  REQUIRE(same_device(t, images), name, ": expected the device of the images");
  return t.const_data_ptr();
}

const int64_t* integers_of(const Tensor& t, const char* name, int64_t length,
                           const Tensor& images) {
  return static_cast<const int64_t*>(
      data_of(t, name, ScalarType::Long, "int64", {length}, images));
}

const float* floats_of(const Tensor& t, const char* name, const Tensor& images,
                       const std::vector<int64_t>& other = {}) {
  return static_cast<const float*>(
      data_of(t, name, ScalarType::Float, "float32", {3}, images, other));
}

Flip flip_of(int64_t number) {
  REQUIRE(number >= 0 && number <= 2, "flip: expected 0, 1 or 2, got ", number);
  return static_cast<Flip>(number);
}

void check_options(const Augment& args, int64_t padding, int64_t cutout) {
  REQUIRE(args.count >= 1 && args.count < int64_t{1} << 31,
          "count: expected 1 to 2^31 - 1, got ", args.count);
  REQUIRE(padding >= 0 && padding < kMostPixels, "padding: expected 0 to 2^29 - 1, got ", padding);
  REQUIRE(!args.reflect || padding < std::min(args.h, args.w),
          "padding: expected less than the image's side, ", std::min(args.h, args.w),
          ", to reflect, got ", padding);
  REQUIRE(cutout >= 0 && cutout < kMostPixels, "cutout: expected 0 to 2^29 - 1, got ", cutout);
}

// what a GPU could not report
void check_samples(const Augment& args, int64_t images) {
  REQUIRE(args.at[0] >= 0 && args.at[1] >= 0, "at: expected epoch and position >= 0, got ",
          args.at[0], " and ", args.at[1]);
  const int64_t last = args.gathered ? std::numeric_limits<int64_t>::max() : images - 1;
  for (int64_t i = 0; i < args.count && i < args.length; ++i) {
    const int64_t sample = args.order[(args.at[1] % args.length + i) % args.length];
    REQUIRE(sample >= 0 && sample <= last, "order: expected samples 0 to ", last, ", got ", sample);
  }
}

void run(const Augment& args, const Tensor& images) {
#ifdef FASTCNN_CUDA
  if (!images.is_cpu()) return enqueue(cuda::launch_augment, args, images);
#endif
  check_samples(args, images.size(0));
  cpu::augment(args, parallel);
}

std::tuple<Tensor, Tensor> augment(const Tensor& images, const Tensor& labels, const Tensor& order,
                                   const Tensor& at, int64_t count, const Tensor& scale,
                                   const Tensor& bias, const Tensor& fill, int64_t seed,
                                   int64_t padding, bool reflect, int64_t flip, int64_t cutout,
                                   bool gathered, ScalarType dtype) {
  check_images(images);
  const int64_t samples = images.size(0), h = images.size(1), w = images.size(2);
  REQUIRE(order.dim() == 1 && order.numel() > 0, "order: expected int64 [L], got ",
          shape_of(order));
  Augment args{};
  args.count = count;
  args.h = static_cast<int>(h);
  args.w = static_cast<int>(w);
  args.images = static_cast<const uint8_t*>(images.const_data_ptr());
  args.labels = integers_of(labels, "labels", samples, images);
  args.length = order.numel();
  args.order = integers_of(order, "order", args.length, images);
  args.at = integers_of(at, "at", 2, images);
  args.scale = floats_of(scale, "scale", images);
  args.bias = floats_of(bias, "bias", images, {h, w, 3});
  args.bias_of_pixels = bias.dim() == 3;
  args.fill = floats_of(fill, "fill", images);
  args.seed = seed;
  args.reflect = reflect;
  args.flip = flip_of(flip);
  check_options(args, padding, cutout);
  args.padding = static_cast<int>(padding);
  args.cutout = static_cast<int>(cutout);
  REQUIRE(!gathered || count <= samples, "images: expected at least ", count, ", got ", samples);
  args.gathered = gathered;
  Tensor x = empty(images, {count, 3, h, w}, dtype), y = empty(images, {count}, ScalarType::Long);
  args.dtype = dtype_of(x);
  args.x = pointer(x);
  args.y = static_cast<int64_t*>(pointer(y));
  run(args, images);
  return {x, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastcnn, CPU, m) { m.impl("augment", TORCH_BOX(&augment)); }
#ifdef FASTCNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastcnn, CUDA, m) { m.impl("augment", TORCH_BOX(&augment)); }
#endif
