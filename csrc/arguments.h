// What an op works on: raw pointers, sizes and scalars, the same for the CUDA and the CPU half.
//
// Sizes: N images of P x Q pixels, K channels; x is NHWC, so pixel i has its K values at x + i·K.
// A layer without pixels, (N, K), has P = Q = 1. An activation is its negative slope: 1 none,
// 0 ReLU, 0.01 leaky ReLU. Memory is the caller's; every buffer is written whole, none is read
// before it is written, so that nothing needs to be cleared.
//
// An update works on flat memory: the tensors of a parameter have the same strides, without gaps.
#pragma once

#include <cstdint>

namespace fastcnn {

// of the activations; parameters, statistics and sums are fp32, fp64 where the activations are
enum class Dtype { f32, f16, bf16, f64 };

struct Sizes {
  int64_t n, p, q, k;
  int64_t pixels() const { return n * p * q; }
  int64_t elements() const { return pixels() * k; }
};

// max-pool: square window, stride and padding in pixels; sizes floor
struct Pool {
  int window, stride, padding;
  int64_t output(int64_t size) const { return (size + 2 * padding - window) / stride + 1; }
};

// One byte for each pooled value: the place of the value that won in its window (row · window +
// column, counted from the window's corner, which padding may put outside the image), and whether
// that value was negative before the activation, so that the slope scales its gradient.
constexpr int kCodePlace = 0x7f;
constexpr int kCodeNegative = 0x80;

// Normalisation and affine map, each (K,): (pre(x) - mean) · rstd · weight + bias.
// Null: 0, 1, 1, 0. A bias alone is a layer without normalisation.
struct Affine {
  const void* mean;
  const void* rstd;
  const void* weight;
  const void* bias;
};

// mean, rstd (K,) ← statistics of pre(x) over all pixels; the running ones (K,) move towards them.
// training false: mean ← running_mean, rstd ← 1 / sqrt(running_var + eps), x is not read.
// training with no pixels: mean ← 0, rstd ← 1, the running ones stay (as torch).
struct BnStats {
  Dtype dtype;
  Sizes sizes;
  const void* x;
  bool training;
  double momentum, eps, pre_slope;
  void* running_mean;
  void* running_var;
  void* mean;
  void* rstd;
  void* workspace;  // bn_stats_workspace(...) bytes
};

// y (N, P, Q, K) ← post(affine(pre(x)) + residual); residual may be null.
struct BnAct {
  Dtype dtype;
  Sizes sizes;
  const void* x;
  const void* residual;
  Affine affine;
  double pre_slope, post_slope;
  void* y;
};

// y, code (N, P', Q', K) ← max-pool(post(affine(pre(x)))), P' = pool.output(P).
// The first of equal values wins, a NaN wins over all before it (as torch).
struct BnActPool {
  Dtype dtype;
  Sizes sizes;
  const void* x;
  Affine affine;
  double pre_slope, post_slope;
  Pool pool;
  void* y;
  uint8_t* code;
};

// What of a backward is wanted. Where statistics are those of several processes, their sums are
// added up between the two parts, which the same passes then compute as of one process.
//   sums:  dweight and dbias, as with batch_stats; dx and dresidual are not read and may be null
//   apply: dx and dresidual from dweight and dbias, which are read; with batch_stats
enum class Part { whole, sums, apply };

// Backward of BnAct. With g = dy · post'(z):
//   dresidual ← g;  dbias ← Σ g;  dweight ← Σ g · x̂,  x̂ = (pre(x) - mean) · rstd
//   dx ← pre'(x) · rstd · weight · (g - (dbias + x̂ · dweight) / pixels)   if batch_stats
//   dx ← pre'(x) · rstd · weight · g                                      else
// Where the mask post' comes from: y if given, else z recomputed from x.
// x may be null for a layer without normalisation, whose slope is 1 or whose mask comes from y.
// dresidual, and without batch_stats dweight and dbias, may be null: not wanted.
struct BnActBackward {
  Dtype dtype;
  Sizes sizes;
  const void* dy;
  const void* x;
  const void* y;
  Affine affine;
  bool batch_stats;
  double pre_slope, post_slope;
  void* dx;
  void* dresidual;
  void* dweight;
  void* dbias;
  void* workspace;  // bn_act_backward_workspace(...) bytes; null for the part apply
  Part part = Part::whole;
};

// Backward of BnActPool: the same, g gathered from dy (N, P', Q', K) by the codes. sizes are x's.
struct BnActPoolBackward {
  Dtype dtype;
  Sizes sizes;
  const void* dy;
  const uint8_t* code;
  const void* x;
  Affine affine;
  bool batch_stats;
  double pre_slope, post_slope;
  Pool pool;
  void* dx;
  void* dweight;
  void* dbias;
  void* workspace;  // bn_act_backward_workspace(...) bytes; null for the part apply
  Part part = Part::whole;
};

// A convolution: N images of H x W pixels and C channels, K filters of R x S, P x Q pixels out.
// x is (N, H, W, C), a filter (K, R, S, C), the result (N, P, Q, K). Result pixel (p, q) sees the
// rows p · stride - top + r and the columns q · stride - left + s; what lies outside x is 0. The
// padding at the bottom and at the right follows from P and Q.
struct ConvShape {
  int64_t n, h, w, c, k;
  int r, s, stride, top, left;
  int64_t p, q;
  int64_t pixels() const { return n * p * q; }
  int64_t taps() const { return static_cast<int64_t>(r) * s * c; }  // values of a filter
};

// What a convolution multiplies: post(affine(pre(x))), made while x is loaded, so that the
// normalised tensor of the layer before is never written. All null and both slopes 1: x itself.
// The padding is 0 behind the activation.
struct ConvInput {
  const void* x;
  Affine affine;
  double pre_slope, post_slope;
  bool is_plain() const {
    return !affine.mean && !affine.rstd && !affine.weight && !affine.bias && pre_slope == 1 &&
           post_slope == 1;
  }
};

// y ← post(pre(product + bias) · scale + shift + residual), each vector (K,) fp32 or null.
// pool: y, code (N, P/2, Q/2, K) ← max-pool of that, 2 x 2, stride 2, sizes floor; code may be null
// (inference); no residual then. The first of equal values wins, a NaN wins over all before it.
// partials: (3, rows, K) fp32, rows = conv_partial_rows(shape): mean, squared deviations from it
// and count of activate(y, stats_slope) as rounded to dtype, for BnMerge; null: not wanted; no
// pool. f16, bf16.
struct Conv {
  Dtype dtype;
  ConvShape shape;
  ConvInput input;
  const void* filter;
  const void* bias;
  const void* scale;
  const void* shift;
  const void* residual;
  double pre_slope, post_slope;
  bool pool;
  void* y;
  uint8_t* code;
  void* partials;
  double stats_slope;
};

// mean, rstd (K,) ← the merged partials (3, rows, K) of `count` values a channel; the running ones
// move towards them, as in BnStats. count 0: mean 0, rstd 1, the running ones stay. count -1: as
// many values as the partials say, which the device alone knows.
struct BnMerge {
  int64_t rows, k;
  int64_t count;
  const void* partials;
  double momentum, eps;
  void* running_mean;
  void* running_var;
  void* mean;
  void* rstd;
};

// Gradient of Conv's input for dy, the gradient of its product: with dz (N, H, W, C) the transposed
// convolution of dy, and z = affine(pre(x)),
//   g = dz · post'(z);  dbias ← Σ g;  dweight ← Σ g · x̂,  x̂ = (pre(x) - mean) · rstd
//   dx ← as in BnActBackward
// A plain input: dx ← dz, and x may be null. dweight, dbias (C,) may be null without batch_stats.
// Sums are those of g as rounded to dtype. f16, bf16.
struct ConvDataGradient {
  Dtype dtype;
  ConvShape shape;
  ConvInput input;
  bool batch_stats;
  const void* filter;
  const void* dy;
  void* dx;
  void* dweight;
  void* dbias;
  void* workspace;  // conv_data_gradient_workspace(...) bytes
};

// dfilter (K, R, S, C), of dtype, ← Σ over the pixels of dy · input, input recomputed from x.
// f16, bf16.
struct ConvWeightGradient {
  Dtype dtype;
  ConvShape shape;
  ConvInput input;
  const void* dy;
  void* dfilter;
  void* workspace;  // conv_weight_gradient_workspace(...) bytes
};

enum class Flip { none, random, alternating };

// x (count, H, W, 3), y (count,) ← what becomes of the samples order[(position + i) % length] and
// their labels: cropped from an image with `padding` pixels around it, mirrored, normalised, and
// with a square of `cutout` pixels set to fill. draws.h has the choices.
// A pixel becomes pixel · scale + bias: the product and the sum are each rounded to fp32, so that
// all halves agree to the bit, and the result to dtype. The padding holds pixels, 0 if not
// reflected.
struct Augment {
  Dtype dtype;  // of x
  int64_t count;
  int h, w;                // less than 2^30 values an image
  const uint8_t* images;   // (M, H, W, 3)
  const int64_t* labels;   // (M,)
  const int64_t* order;    // (length,), sample numbers, below M unless gathered
  int64_t length;
  const int64_t* at;       // epoch, position >= 0; on the device
  const float* scale;      // (3,)
  const float* bias;       // (3,), or (H, W, 3) if bias_of_pixels
  bool bias_of_pixels;
  const float* fill;       // (3,)
  int64_t seed;
  int padding;             // less than H and W if reflect
  bool reflect;            // without the edge; else 0
  Flip flip;
  int cutout;
  bool gathered;           // image i of the batch is images[i], whatever its sample number
  void* x;
  int64_t* y;
};

// One parameter of `count` values in flat memory, and what is updated with it; null: not there.
struct UpdateTensor {
  int64_t count;
  void* weight;
  const void* grad;
  void* first;    // SGD: momentum; Adam: exp_avg
  void* second;   // Adam: exp_avg_sq
  void* copy;     // ← the new weight, rounded
  void* average;  // ← average + rates[1] · (new weight - average)
};

// The tensors of one update and what is the same for all of them. Every one or none has a first,
// a second, a copy and an average. The scalars are fp32 in the memory of the device.
struct UpdateGroup {
  Dtype dtype;       // of weights, first, second and averages: f32, or f64 on the CPU
  Dtype grad_dtype;  // f32, bf16, f16; f64 where dtype is
  Dtype copy_dtype;  // bf16, f16; of no meaning without copies
  const UpdateTensor* tensors;  // read by the launcher alone
  int64_t count;
  const float* rates;      // (2,): learning rate, weight of the new weights in the averages
  const float* factor;     // that gradients are multiplied by; null: 1
  const float* found_inf;  // not 0: weight, first, second and copy stay; null: 0
};

// g = factor · grad (+ decay · w);  w ← w · (1 - lr · decay) if decoupled
// first ← momentum · first + g;  w ← w - lr · (first, or g + momentum · first if nesterov)
// Without first: w ← w - lr · g.
struct Sgd {
  UpdateGroup group;
  double decay;
  bool decoupled;
  double momentum;
  bool nesterov;
};

// g and decay as above;  first ← beta1 · first + (1 - beta1) · g
// second ← beta2 · second + (1 - beta2) · g²;  with c = 1 - beta^steps,
// w ← w - lr / c1 · first / (sqrt(second) / sqrt(c2) + eps)
struct Adam {
  UpdateGroup group;
  const float* steps;  // the number of this step, from 1
  double decay;
  bool decoupled;
  double beta1, beta2, eps;
};

// `count` values in flat memory.
struct FlatTensor {
  int64_t count;
  Dtype dtype;
  const void* data;
};

// found_inf ← 1 where a value of any tensor is inf or NaN; else it stays as it is.
struct FindNonfinite {
  const FlatTensor* tensors;  // of any dtypes, f64 on the CPU alone; read by the launcher alone
  int64_t count;
  float* found_inf;  // in the memory of the device
};

}  // namespace fastcnn
