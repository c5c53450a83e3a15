// What the CUDA kernels of divergences between two distributions share: see row_pair.h.
#pragma once
#include <cmath>

#include "core/cuda_rows.cuh"
#include "core/cuda_sides.cuh"
#include "core/row_pair.h"

namespace torch_divergence::cuda {

// Two rows of logits.
template <class TP, class TQ>
struct LogitPair {
  static_assert(kPiece<TP> == kPiece<TQ> && kRun<TP> == kRun<TQ>);
  using A = Arithmetic<TP>;
  static constexpr int K = kPiece<TP>;
  RowPointer<const char> p, q;

  __device__ LogitPair(const RowPair& rows, int64_t row) : p(rows.p, row), q(rows.q, row) {}
  __device__ void load(const Pieces& pieces, const Piece<TP>& piece, A (&t)[K], A (&s)[K]) const {
    load_piece(p, pieces, piece, -kInf<A>, t);
    load_piece(q, pieces, Piece<TQ>{piece.first, piece.gap}, -kInf<A>, s);
  }
};

// Both rows, by class: T is AnyFloat or double.
template <class T>
struct AnyRows {
  static constexpr int K = kPiece<T>;
  RowPointer<const char> p, q;

  // f(p, q, log p, log q, log p - log q, k) for the classes of a piece.
  template <class F>
  __device__ void for_classes(const Pieces& pieces, const Piece<T>& piece, const Side& p_side, const Side& q_side,
                              const F& f) const {
    double t[K], s[K];
    load_piece(p, pieces, piece, p_side.padding, t);
    load_piece(q, pieces, piece, q_side.padding, s);
    const bool both_probs = p_side.space == kProbs && q_side.space == kProbs;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      double x, log_x, y, log_y;
      p_side.read(t[k], x, log_x);
      q_side.read(s[k], y, log_y);
      f(x, y, log_x, log_y, log_ratio(both_probs, x, y, log_x, log_y), k);
    }
  }
};

// f.template operator()<TP, TQ>(): types that are equal are known when the kernel is compiled, other pairs when it
// runs.
template <class F>
void dispatch_float_types(const RowPair& rows, const F& f) {
  const DType type = rows.p.dtype;
  if (type != rows.q.dtype) return f.template operator()<AnyFloat, AnyFloat>();
  if (type == DType::Half) return f.template operator()<c10::Half, c10::Half>();
  if (type == DType::BFloat16) return f.template operator()<c10::BFloat16, c10::BFloat16>();
  return f.template operator()<float, float>();
}
template <class F>
void dispatch_types(const RowPair& rows, const F& f) {
  if (rows.p.dtype == DType::Double) return f.template operator()<double, double>();
  dispatch_float_types(rows, f);
}

}  // namespace torch_divergence::cuda
