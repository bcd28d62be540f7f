// Runs every CPU op on odd shapes with buffers of exactly the size that it may touch, each in an
// allocation of its own, so that a sanitizer sees any access beside them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/cpu.h"

namespace {

using namespace fastcnn;

size_t size_of(Dtype dtype) {
  return dtype == Dtype::bf16 || dtype == Dtype::f16 ? 2 : dtype == Dtype::f64 ? 8 : 4;
}

struct Buffer {
  std::vector<char> bytes;
  Buffer(int64_t count, size_t size, bool filled = true) : bytes(size_t(count) * size) {
    static std::minstd_rand random(1);
    // 0x3f in the high byte of every format: small finite numbers
    for (size_t i = 0; filled && i < bytes.size(); ++i)
      bytes[i] = i % size == size - 1 ? 0x3f : char(random() & 0x7f);
    bytes.shrink_to_fit();
  }
  void* data() { return bytes.data(); }
};

void threads(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  std::thread other(body, tasks / 2, tasks);
  body(0, tasks / 2);
  other.join();
}

void run(Dtype dtype, Sizes sizes, Pool pool) {
  const size_t size = size_of(dtype), wide = dtype == Dtype::f64 ? 8 : 4;
  const int64_t k = sizes.k, all = sizes.elements();
  Buffer x(all, size), residual(all, size), dy(all, size), y(all, size, false);
  Buffer dx(all, size, false), dresidual(all, size, false);
  Buffer mean(k, wide), rstd(k, wide), weight(k, wide), bias(k, wide);
  Buffer running_mean(k, wide), running_var(k, wide), dweight(k, wide), dbias(k, wide);
  Buffer stats_space(cpu::bn_stats_workspace(sizes), 1);
  Buffer space(cpu::bn_act_backward_workspace(sizes), 1);
  const Affine affine{mean.data(), rstd.data(), weight.data(), bias.data()};
  cpu::bn_stats({dtype, sizes, x.data(), true, 0.1, 1e-5, 0.1, running_mean.data(),
                 running_var.data(), mean.data(), rstd.data(), stats_space.data()},
                threads);
  cpu::bn_act({dtype, sizes, x.data(), residual.data(), affine, 0.2, 0.1, y.data()}, threads);
  for (bool batch_stats : {true, false})
    cpu::bn_act_backward({dtype, sizes, dy.data(), x.data(), batch_stats ? y.data() : nullptr,
                          affine, batch_stats, 0.2, 0.1, dx.data(), dresidual.data(),
                          dweight.data(), dbias.data(), space.data()},
                         threads);
  for (Part part : {Part::sums, Part::apply}) {
    const bool sums = part == Part::sums;
    cpu::bn_act_backward({dtype, sizes, dy.data(), x.data(), y.data(), affine, true, 0.2, 0.1,
                          sums ? nullptr : dx.data(), sums ? nullptr : dresidual.data(),
                          dweight.data(), dbias.data(), sums ? space.data() : nullptr, part},
                         threads);
  }
  if (std::min(sizes.p, sizes.q) + 2 * pool.padding < pool.window) return;
  const int64_t pooled = sizes.n * pool.output(sizes.p) * pool.output(sizes.q) * k;
  Buffer small_y(pooled, size, false), small_dy(pooled, size), code(pooled, 1, false);
  auto* codes = static_cast<uint8_t*>(code.data());
  cpu::bn_act_pool({dtype, sizes, x.data(), affine, 0.2, 0.1, pool, small_y.data(), codes},
                   threads);
  cpu::bn_act_pool_backward({dtype, sizes, small_dy.data(), codes, x.data(), affine, true, 0.2,
                             0.1, pool, dx.data(), dweight.data(), dbias.data(), space.data()},
                            threads);
  for (Part part : {Part::sums, Part::apply}) {
    const bool sums = part == Part::sums;
    cpu::bn_act_pool_backward({dtype, sizes, small_dy.data(), codes, x.data(), affine, true, 0.2,
                               0.1, pool, sums ? nullptr : dx.data(), dweight.data(), dbias.data(),
                               sums ? space.data() : nullptr, part},
                              threads);
  }
  cpu::bn_act_pool_backward({dtype, sizes, small_dy.data(), codes, nullptr, {}, false, 1, 0, pool,
                             dx.data(), nullptr, dbias.data(), space.data()},
                            threads);
}

constexpr int kThreads = 2;

// the three passes of a convolution, with all and with nothing of what surrounds it
void run_conv(Dtype dtype, ConvShape shape, bool norm) {
  const size_t size = size_of(dtype);
  shape.r = shape.s = 3, shape.stride = 1;
  const int64_t k = shape.k, in = shape.n * shape.h * shape.w * shape.c;
  const int64_t out = shape.pixels() * k, filters = k * shape.taps();
  Buffer x(in, size), filter(filters, size), dy(out, size), residual(out, size);
  Buffer y(out, size, false), dx(in, size, false), dfilter(filters, size, false);
  Buffer a(shape.c, size), b(shape.c, size), c(shape.c, size), d(shape.c, size);
  Buffer dweight(shape.c, size, false), dbias(shape.c, size, false);
  Buffer bias(k, size), scale(k, size), shift(k, size), partials(3 * k, size, false);
  Buffer mean(k, size, false), rstd(k, size, false), running(k, size), running_var(k, size);
  Buffer space(cpu::conv_workspace(shape, dtype, kThreads), 1, false);
  Buffer data_space(cpu::conv_data_gradient_workspace(shape, dtype, kThreads), 1, false);
  Buffer weight_space(cpu::conv_weight_gradient_workspace(shape, dtype, kThreads), 1, false);
  ConvInput input{x.data(), {}, 1, 1};
  if (norm) input = {x.data(), {a.data(), b.data(), c.data(), d.data()}, 0.2, 0.1};
  Conv args{dtype, shape, input, filter.data(), bias.data(), scale.data(), shift.data(),
            residual.data(), 0.2, 0.1, false, y.data(), nullptr, partials.data(), 0.5};
  cpu::conv(args, space.data(), kThreads, threads);
  cpu::bn_merge({1, k, -1, partials.data(), 0.1, 1e-5, running.data(), running_var.data(),
                 mean.data(), rstd.data()},
                dtype);
  Conv bare{dtype, shape, input, filter.data()};
  bare.pre_slope = bare.post_slope = 1, bare.y = y.data();
  cpu::conv(bare, space.data(), kThreads, threads);
  if (std::min(shape.p, shape.q) >= 2) {
    const int64_t pooled = shape.n * (shape.p / 2) * (shape.q / 2) * k;
    Buffer small(pooled, size, false), code(pooled, 1, false);
    bare.pool = true, bare.y = small.data(), bare.code = static_cast<uint8_t*>(code.data());
    cpu::conv(bare, space.data(), kThreads, threads);
  }
  for (bool batch_stats : {true, false})
    cpu::conv_data_gradient({dtype, shape, input, batch_stats && norm, filter.data(), dy.data(),
                             dx.data(), dweight.data(), dbias.data(), data_space.data()},
                            kThreads, threads);
  cpu::conv_weight_gradient({dtype, shape, input, dy.data(), dfilter.data(), weight_space.data()},
                            kThreads, threads);
}

// every option on images of one size: 4 of them, of which a batch of 5 takes two twice
// gathered: images as many as the batch has, sample numbers that lie far outside
void run_augment(Dtype dtype, int h, int w, bool gathered) {
  const int64_t count = 5, samples = gathered ? count : 4, values = int64_t{h} * w * 3;
  Buffer images(samples * values, 1), scale(3, 4), bias(3, 4), pixel_bias(values, 4), fill(3, 4);
  Buffer x(count * values, size_of(dtype), false), y(count, 8, false);
  const std::vector<int64_t> labels(samples, 7), at{1, 2};
  const std::vector<int64_t> order{3, gathered ? int64_t{1} << 40 : 1, 0};
  const auto floats = [](Buffer& buffer) { return static_cast<const float*>(buffer.data()); };
  for (const bool reflect : {true, false})
    for (const Flip flip : {Flip::none, Flip::random, Flip::alternating})
      for (const int cutout : {0, 3, 3 * w}) {
        Augment args{dtype, count, h, w, static_cast<uint8_t*>(images.data())};
        args.labels = labels.data(), args.order = order.data(), args.at = at.data();
        args.length = int64_t(order.size());
        args.scale = floats(scale), args.fill = floats(fill);
        args.bias_of_pixels = flip == Flip::random;
        args.bias = floats(args.bias_of_pixels ? pixel_bias : bias);
        args.seed = 5, args.reflect = reflect, args.flip = flip, args.cutout = cutout;
        args.gathered = gathered;
        args.padding = reflect ? std::min(h, w) - 1 : 2 * std::max(h, w);
        args.x = x.data(), args.y = static_cast<int64_t*>(y.data());
        cpu::augment(args, threads);
      }
}

// both updates, with everything that may be there and with nothing
void update(Dtype dtype) {
  const Dtype wide = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const int64_t counts[] = {0, 1, 3, 1023, 1024, 1025, 16384, 40001};
  const float rates[] = {0.1f, 0.2f}, factor = 0.5f, found_inf[] = {0, 1}, steps = 3;
  std::vector<Buffer> buffers;
  std::vector<UpdateTensor> tensors, bare;
  for (int64_t count : counts) {
    for (Dtype type : {wide, dtype, wide, wide, Dtype::bf16, wide})
      buffers.emplace_back(count, size_of(type));
    const auto at = [&](int i) { return buffers[buffers.size() - 6 + i].data(); };
    void* copy = wide == Dtype::f64 ? nullptr : at(4);
    tensors.push_back({count, at(0), at(1), at(2), at(3), copy, at(5)});
    bare.push_back({count, at(0), at(1)});
  }
  for (bool decoupled : {false, true})
    for (const float& found : found_inf) {
      const UpdateGroup group{wide,           dtype, Dtype::bf16, tensors.data(),
                              int64_t(tensors.size()), rates, &factor, &found};
      cpu::sgd({group, 0.1, decoupled, 0.9, decoupled}, threads);
      cpu::adam({group, &steps, 0.1, decoupled, 0.9, 0.99, 1e-8}, threads);
      cpu::adam({group, &steps, 0.1, decoupled, 0, 0.99, 1e-8}, threads);
    }
  const UpdateGroup group{wide,           dtype, Dtype::bf16, bare.data(), int64_t(bare.size()),
                          rates, nullptr, nullptr};
  cpu::sgd({group, 0, false, 0, false}, threads);
}

void find_nonfinite() {
  const int64_t counts[] = {0, 1, 3, 1023, 32768, 32769, 100001};
  std::vector<Buffer> buffers;
  std::vector<FlatTensor> tensors;
  for (int64_t count : counts)
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64}) {
      buffers.emplace_back(count, size_of(dtype));
      tensors.push_back({count, dtype, buffers.back().data()});
    }
  Buffer found_inf(1, sizeof(float), false);
  auto* found = static_cast<float*>(found_inf.data());
  cpu::find_nonfinite({tensors.data(), int64_t(tensors.size()), found}, threads);
  std::vector<float> infinite(100001, INFINITY);  // found by both threads
  tensors.push_back({int64_t(infinite.size()), Dtype::f32, infinite.data()});
  if (*found == 0) cpu::find_nonfinite({tensors.data(), int64_t(tensors.size()), found}, threads);
  if (*found != 1) std::puts("wrong");
}

}  // namespace

int main() {
  const Sizes shapes[] = {{1, 1, 1, 1}, {0, 4, 4, 8}, {2, 3, 5, 3}, {1, 7, 2, 17}, {3, 5, 4, 24},
                          {2, 9, 7, 32}, {1, 6, 6, 65},
                          {2, 11, 13, 100}, {1, 4, 2, 512}, {9, 33, 31, 16}};
  const Pool pools[] = {{2, 2, 0}, {3, 2, 0}, {3, 2, 1}, {2, 1, 0}, {2, 3, 1}};
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f64})
    for (const Sizes& sizes : shapes)
      for (const Pool& pool : pools) run(dtype, sizes, pool);
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f64})
    for (const auto& [h, w] : {std::pair{1, 1}, {5, 7}, {16, 8}})
      for (const bool gathered : {false, true}) run_augment(dtype, h, w, gathered);
  for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f64}) update(dtype);
  // n, h, w, c, k and, behind what run_conv fills in, top, left, p, q
  const ConvShape convs[] = {{1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1},
                             {3, 2, 2, 17, 65, 0, 0, 0, 1, 1, 2, 2},
                             {2, 7, 9, 3, 33, 0, 0, 0, 1, 1, 7, 9},
                             {2, 6, 5, 20, 70, 0, 0, 0, 0, 2, 6, 6},
                             {9, 8, 8, 16, 16, 0, 0, 0, 1, 1, 8, 8},
                             {2, 4, 4, 190, 200, 0, 0, 0, 1, 1, 4, 4}};
  for (Dtype dtype : {Dtype::f32, Dtype::f64})
    for (const ConvShape& shape : convs)
      for (bool norm : {false, true}) run_conv(dtype, shape, norm);
  find_nonfinite();
  std::puts("clean");
}
