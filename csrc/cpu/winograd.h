// The transforms of a 3x3 convolution with fewer products: an output tile is A'((G g G') ∘ (B' d B))A
// for the input tile d and the filter g, and the gradient of g is G'((A y A') ∘ (B' d B))G for the
// gradient y of the tile (Lavin and Gray 2016). Each struct below has the five maps of one axis:
//   input B': kInput → kPoints     filter G: 3 → kPoints     output A': kPoints → kTile
//   output_gradient A: kTile → kPoints                       filter_gradient G': kPoints → 3
// F(4, 3) errs by about 1e-5 of the largest value in fp32.
#pragma once

#include "vec.h"

namespace fastcnn::cpu {

// F(4, 3), points 0, ±1, ±2, infinity: 36 products for 16 pixels in place of 144
struct Tile4 {
  static constexpr int kTile = 4, kInput = 6, kPoints = 6;

  template <class V>
  static void input(const V* d, V* v) {
    const V even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1];
    const V even2 = d[4] - d[2], odd2 = 2 * (d[3] - d[1]);
    v[0] = 4 * d[0] - 5 * d[2] + d[4];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = even2 + odd2;
    v[4] = even2 - odd2;
    v[5] = 4 * d[1] - 5 * d[3] + d[5];
  }
  template <class V, class A = std::remove_reference_t<decltype(V{}[0])>>
  static void filter(const V* g, V* u) {
    const V sum = (g[0] + g[2]) * A(-1. / 6), middle = g[1] * A(-1. / 6);
    const V outer = g[0] * A(1. / 24) + g[2] * A(1. / 6), middle2 = g[1] * A(1. / 12);
    u[0] = g[0] * A(0.25);
    u[1] = sum + middle;
    u[2] = sum - middle;
    u[3] = outer + middle2;
    u[4] = outer - middle2;
    u[5] = g[2];
  }
  template <class V>
  static void output(const V* m, V* y) {
    const V sum = m[1] + m[2], difference = m[1] - m[2];
    const V sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    y[0] = m[0] + sum + sum2;
    y[1] = difference + 2 * difference2;
    y[2] = sum + 4 * sum2;
    y[3] = difference + 8 * difference2 + m[5];
  }
  template <class V>
  static void output_gradient(const V* y, V* m) {
    const V even = y[0] + y[2], odd = y[1] + y[3];
    const V even2 = y[0] + 4 * y[2], odd2 = 2 * y[1] + 8 * y[3];
    m[0] = y[0];
    m[1] = even + odd;
    m[2] = even - odd;
    m[3] = even2 + odd2;
    m[4] = even2 - odd2;
    m[5] = y[3];
  }
  template <class V, class A = std::remove_reference_t<decltype(V{}[0])>>
  static void filter_gradient(const V* u, V* g) {
    const V sum = (u[1] + u[2]) * A(1. / 6), sum2 = u[3] + u[4];
    g[0] = u[0] * A(0.25) - sum + sum2 * A(1. / 24);
    g[1] = (u[2] - u[1]) * A(1. / 6) + (u[3] - u[4]) * A(1. / 12);
    g[2] = sum2 * A(1. / 6) - sum + u[5];
  }
};

// images of two pixels with a pixel of padding around them: y0 = g1 a + g2 b, y1 = g0 a + g1 b in
// three products; 9 products for 4 pixels in place of 36
struct Image2 {
  static constexpr int kTile = 2, kInput = 2, kPoints = 3;

  template <class V>
  static void input(const V* d, V* v) {
    v[0] = d[0] + d[1];
    v[1] = d[1];
    v[2] = d[0];
  }
  template <class V>
  static void filter(const V* g, V* u) {
    u[0] = g[1];
    u[1] = g[2] - g[1];
    u[2] = g[0] - g[1];
  }
  template <class V>
  static void output(const V* m, V* y) {
    y[0] = m[0] + m[1];
    y[1] = m[0] + m[2];
  }
  template <class V>
  static void output_gradient(const V* y, V* m) {
    m[0] = y[0] + y[1];
    m[1] = y[0];
    m[2] = y[1];
  }
  template <class V>
  static void filter_gradient(const V* u, V* g) {
    g[0] = u[2];
    g[1] = u[0] - u[1] - u[2];
    g[2] = u[1];
  }
};

// images of one pixel with a pixel of padding around them: the filter's centre alone
struct Image1 {
  static constexpr int kTile = 1, kInput = 1, kPoints = 1;

  template <class V>
  static void input(const V* d, V* v) {
    v[0] = d[0];
  }
  template <class V>
  static void filter(const V* g, V* u) {
    u[0] = g[1];
  }
  template <class V>
  static void output(const V* m, V* y) {
    y[0] = m[0];
  }
  template <class V>
  static void output_gradient(const V* y, V* m) {
    m[0] = y[0];
  }
  template <class V>
  static void filter_gradient(const V* u, V* g) {
    g[0] = g[2] = V{};
    g[1] = u[0];
  }
};

}  // namespace fastcnn::cpu
