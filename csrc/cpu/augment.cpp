// A training batch from resident images: samples, crop, flip, normalisation, cutout and labels in
// one pass, image by image. torch gathers, converts, scales, shifts and masks in passes of their
// own over the whole batch.
//
// A pixel is a byte, so what becomes of it is looked up in 256 entries a channel. That spares the
// arithmetic, and keeps the product and the sum apart: the compiler would fuse them into one
// operation that rounds once (-ffp-contract=fast).
#include <algorithm>
#include <array>
#include <vector>

#include "../draws.h"
#include "cpu.h"
#include "vec.h"

namespace fastcnn::cpu {
namespace {

template <class T>
using Table = std::array<std::array<T, 256>, 3>;

template <class T>
T rounded(float value) {
  if constexpr (std::is_same_v<T, bf16>) {
    bf16 result;
    store<1>(&result, Values<float, 1>{value});
    return result;
  } else {
    return value;
  }
}

// pixel · scale, + bias where there is one a channel
template <class T>
Table<T> table_of(const float* scale, const float* bias) {
  Table<T> table;
  for (int channel = 0; channel < 3; ++channel)
    for (int pixel = 0; pixel < 256; ++pixel) {
      // volatile: the product is rounded before the sum
      const volatile float product = static_cast<float>(pixel) * scale[channel];
      table[channel][pixel] = rounded<T>(bias ? product + bias[channel] : float{product});
    }
  return table;
}

// value(channel, pixel, place in the image) is what a pixel becomes
template <class T, class Value>
void make_image(const Augment& args, const Choice& choice, const uint8_t* image,
                std::vector<int>& columns, T* x, const Value& value) {
  static constexpr uint8_t nothing[3] = {};
  const int64_t row_values = int64_t{args.w} * 3;
  for (int column = 0; column < args.w; ++column) {
    const int window = choice.mirrored ? args.w - 1 - column : column;
    columns[column] = source_of(window + choice.dx, args.w, args.reflect);
  }
  for (int row = 0; row < args.h; ++row) {
    const int source = source_of(row + choice.dy, args.h, args.reflect);
    const uint8_t* from = image + std::max(source, 0) * row_values;
    for (int column = 0; column < args.w; ++column) {
      const bool inside = source >= 0 && columns[column] >= 0;
      const uint8_t* pixel = inside ? from + 3 * columns[column] : nothing;
      const int64_t place = row * row_values + 3 * column;
      for (int channel = 0; channel < 3; ++channel)
        x[place + channel] = value(channel, pixel[channel], place + channel);
    }
  }
}

template <class T>
void cut_out(const Augment& args, const Choice& choice, const std::array<T, 3>& fill, T* x) {
  const int top = std::max(choice.top, 0), bottom = std::min(choice.top + args.cutout, args.h);
  const int left = std::max(choice.left, 0), right = std::min(choice.left + args.cutout, args.w);
  for (int row = top; row < bottom; ++row)
    for (int column = left; column < right; ++column)
      std::copy(fill.begin(), fill.end(), x + (int64_t{row} * args.w + column) * 3);
}

template <class T>
void make_batch(const Augment& args, const Parallel& parallel) {
  const int64_t image_values = int64_t{args.h} * args.w * 3;
  const std::array<T, 3> fill{rounded<T>(args.fill[0]), rounded<T>(args.fill[1]),
                              rounded<T>(args.fill[2])};
  const auto make = [&](const auto& value) {
    parallel(args.count, [&](int64_t begin, int64_t end) {
      std::vector<int> columns(args.w);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = sample_of(args, i);
        const Choice choice = choose(args, sample, args.at[0]);
        const int64_t place = place_of(args, i, sample);
        T* x = static_cast<T*>(args.x) + i * image_values;
        make_image(args, choice, args.images + place * image_values, columns, x, value);
        if (args.cutout > 0) cut_out(args, choice, fill, x);
        args.y[i] = args.labels[place];
      }
    });
  };
  if (args.bias_of_pixels) {
    const Table<float> products = table_of<float>(args.scale, nullptr);
    return make([&](int channel, uint8_t pixel, int64_t place) {
      return rounded<T>(products[channel][pixel] + args.bias[place]);
    });
  }
  const Table<T> table = table_of<T>(args.scale, args.bias);
  make([&](int channel, uint8_t pixel, int64_t) { return table[channel][pixel]; });
}

}  // namespace

void augment(const Augment& args, const Parallel& parallel) {
  switch (args.dtype) {
    case Dtype::f32:
      return make_batch<float>(args, parallel);
    case Dtype::bf16:
      return make_batch<bf16>(args, parallel);
    case Dtype::f64:
      return make_batch<double>(args, parallel);
    default:
      throw std::invalid_argument("no CPU kernel for fp16");
  }
}

}  // namespace fastcnn::cpu
