// Small matrix products whose sums stay in registers: c[i][j] (+)= Σ_d a[i][d] · b[d][j].
#pragma once

#include <algorithm>
#include <cstdint>

#include "vec.h"

namespace fastcnn::cpu {

// A row of a product's register block has so many vectors: kRows · kVectors sums, kVectors values of
// b and one of a fit into the registers.
constexpr int kVectors = kRegisters == 32 ? 4 : 2;
constexpr int kRows = 6;

// a: value (i, d) at a[i · row + d · step]; b: row d at b + d · row; c: row i at c + i · row
template <class A>
struct Left {
  const A* at;
  int64_t row, step;
};
template <class A>
struct Rows {
  A* at;
  int64_t row;
};

template <class A, int M, int N>
inline void product_block(Left<A> a, Rows<const A> b, int64_t depth, Rows<A> c, bool add) {
  constexpr int W = kLanes<A>;
  Values<A, W> sums[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j)
      sums[i][j] = add ? load<W>(c.at + i * c.row + j * W) : Values<A, W>{};
  const A *left = a.at, *right = b.at;
  for (int64_t d = 0; d < depth; ++d, left += a.step, right += b.row) {
    Values<A, W> v[N];
    for (int j = 0; j < N; ++j) v[j] = load<W>(right + j * W);
    for (int i = 0; i < M; ++i) {
      const A value = left[i * a.row];
      for (int j = 0; j < N; ++j) sums[i][j] += value * v[j];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) store<W>(c.at + i * c.row + j * W, sums[i][j]);
}

template <class A, int N, int M = kRows>
inline void product_rows(int64_t rows, Left<A> a, Rows<const A> b, int64_t depth, Rows<A> c,
                         bool add) {
  for (; rows >= M; rows -= M) {
    product_block<A, M, N>(a, b, depth, c, add);
    a.at += M * a.row;
    c.at += M * c.row;
  }
  if constexpr (M > 1)
    if (rows) product_rows<A, N, M - 1>(rows, a, b, depth, c, add);
}

// c: rows x (vectors · kLanes), vectors 1 to kVectors
template <class A, int N = kVectors>
inline void product(int64_t rows, int vectors, Left<A> a, Rows<const A> b, int64_t depth,
                    Rows<A> c, bool add) {
  if (vectors == N) return product_rows<A, N>(rows, a, b, depth, c, add);
  if constexpr (N > 1) product<A, N - 1>(rows, vectors, a, b, depth, c, add);
}

}  // namespace fastcnn::cpu
