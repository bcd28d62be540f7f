// Vectors of W channels in the compiler's own vector types (GCC, Clang), which it maps to whatever
// the processor has, and the loops' common parts: dispatch on dtype and channels, the activation.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "../arguments.h"

namespace fastcnn::cpu {

// the processor's vectors: bytes, and how many registers hold one
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

struct bf16 {
  uint16_t bits;
};

// the type that values of T are computed in
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A, int W>
struct Vec {
  using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef A Values __attribute__((vector_size(W * sizeof(A))));
  typedef Int Mask __attribute__((vector_size(W * sizeof(A))));
};

template <int W>
struct Bits {
  typedef uint8_t Bytes __attribute__((vector_size(W)));
  typedef uint16_t Halves __attribute__((vector_size(W * 2)));
  typedef uint32_t Words __attribute__((vector_size(W * 4)));
};

template <class A, int W>
using Values = typename Vec<A, W>::Values;
template <class A, int W>
using Mask = typename Vec<A, W>::Mask;

template <class V, class T>
inline V read(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class V, class T>
inline void write(T* to, V v) {
  std::memcpy(to, &v, sizeof(v));
}

template <int W>
inline Values<float, W> load(const float* from) {
  return read<Values<float, W>>(from);
}

template <int W>
inline Values<double, W> load(const double* from) {
  return read<Values<double, W>>(from);
}

template <int W>
inline Values<float, W> load(const bf16* from) {
  auto words = __builtin_convertvector(read<typename Bits<W>::Halves>(from),
                                       typename Bits<W>::Words);
  return (Values<float, W>)(words << 16);
}

// a vector as fp64, and back
template <int W, class V>
inline Values<double, W> widen(V v) {
  return __builtin_convertvector(v, Values<double, W>);
}

template <int W>
inline void store(float* to, Values<float, W> v) {
  write(to, v);
}

template <int W>
inline void store(double* to, Values<double, W> v) {
  write(to, v);
}

// rounds to nearest, ties to even; every NaN becomes one
template <int W>
inline void store(bf16* to, Values<float, W> v) {
  using Words = typename Bits<W>::Words;
  const Words bits = (Words)v, nan = Words{} + 0x7fc0;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  write(to, __builtin_convertvector(v == v ? rounded : nan, typename Bits<W>::Halves));
}

template <int W, class A>
inline Mask<A, W> load_code(const uint8_t* from) {
  return __builtin_convertvector(read<typename Bits<W>::Bytes>(from), Mask<A, W>);
}

template <int W, class A>
inline void store_code(uint8_t* to, Mask<A, W> code) {
  write(to, __builtin_convertvector(code, typename Bits<W>::Bytes));
}

// An activation by its slope. Selections, not products, at slope 0: relu(-inf) is 0 and so is the
// gradient of a clipped value, whatever arrives there. NaN: relu passes it and its gradient, a
// leaky activation scales the gradient (torch's threshold_backward, leaky_relu_backward).
template <class A, int W>
struct Slope {
  A slope;
  bool relu;
  explicit Slope(double s) : slope(static_cast<A>(s)), relu(s == 0) {}

  bool none() const { return slope == 1; }
  Mask<A, W> negative(Values<A, W> v) const { return relu ? v <= 0 : ~(v > 0); }
  Values<A, W> scaled(Values<A, W> v) const { return relu ? Values<A, W>{} : v * slope; }
  Values<A, W> act(Values<A, W> v) const {
    if (none()) return v;
    return negative(v) ? (relu ? Values<A, W>{} : v * slope) : v;
  }
  // gradient of act at a value whose sign is known
  Values<A, W> backward(Values<A, W> g, Mask<A, W> is_negative) const {
    return is_negative ? scaled(g) : g;
  }
};

template <int W_, int U_>
struct Width {
  static constexpr int W = W_, U = U_, channels = W_ * U_;
};

// f(Width<W, U>): blocks of U vectors of W channels that divide k, as many as the registers take
template <class A, class F>
void with_width(int64_t k, F&& f) {
  constexpr int full = kLanes<A>;
  if constexpr (sizeof(A) == sizeof(float)) {
    if constexpr (kRegisters == 32)
      if (k % (4 * full) == 0) return f(Width<full, 4>{});
    if (k % (2 * full) == 0) return f(Width<full, 2>{});
  }
  if (k % full == 0) return f(Width<full, 1>{});
  if constexpr (full > 8)
    if (k % 8 == 0) return f(Width<8, 1>{});
  return f(Width<1, 1>{});
}

// f(T{}, Width<W, U>): the type of the activations and the block of channels
template <class F>
void dispatch(Dtype dtype, int64_t k, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return with_width<float>(k, [&](auto width) { f(float{}, width); });
    case Dtype::bf16:
      return with_width<float>(k, [&](auto width) { f(bf16{}, width); });
    case Dtype::f64:
      return with_width<double>(k, [&](auto width) { f(double{}, width); });
    default:
      throw std::invalid_argument("no CPU kernel for fp16");
  }
}

}  // namespace fastcnn::cpu
