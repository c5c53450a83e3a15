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

  __device__ AnyRows(const RowPair& rows, int64_t row) : p(rows.p, row), q(rows.q, row) {}
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

// A row of a backward call. Rows has the sides p and q.
template <class Rows>
struct BackwardPair {
  Rows rows;
  RowPointer<char> grad_p, grad_q;
  Pieces pieces;
  double coefficient;

  template <class Backward>
  __device__ BackwardPair(const Backward& k, int64_t row)
      : rows(k.rows, row),
        grad_p(k.grad_p, row),
        grad_q(k.grad_q, row),
        pieces(k.rows.classes, rows.p, rows.q, grad_p, grad_q),
        coefficient(k.coefficient[row]) {}
  template <class T, class A>
  __device__ void store(const Piece<T>& piece, const A (&of_p)[kPiece<T>], const A (&of_q)[kPiece<T>]) const {
    if (grad_p.data != nullptr) store_piece(grad_p, pieces, piece, of_p);
    if (grad_q.data != nullptr) store_piece(grad_q, pieces, piece, of_q);
  }
};
// gradients(task, pair) for a row whose coefficient is not 0; zeros for another.
template <class TP, class TQ, class Rows, class Backward, class F>
__device__ __forceinline__ void backward_pair(const Backward& k, const RowGrid& grid, double* workspace, int launch,
                                              const F& gradients) {
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  BackwardPair<Rows> pair(k, task.row);
  if (pair.coefficient != 0) return gradients(task, pair);
  if (!task.first_launch()) return;
  store_zeros<TP>(task, pair.grad_p, pair.pieces);
  store_zeros<TQ>(task, pair.grad_q, pair.pieces);
}

// A row of a double backward; T is AnyFloat or double.
template <class T, class Rows>
struct DoubleBackwardPair {
  Rows rows;
  RowPointer<const char> v_p, v_q;
  RowPointer<char> d_p, d_q;
  Pieces pieces;
  double coefficient;

  template <class DoubleBackward>
  __device__ DoubleBackwardPair(const DoubleBackward& k, int64_t row)
      : rows(k.rows, row),
        v_p(k.v_p, row),
        v_q(k.v_q, row),
        d_p(k.d_p, row),
        d_q(k.d_q, row),
        pieces(k.rows.classes, rows.p, rows.q, v_p, v_q, d_p, d_q),
        coefficient(k.coefficient[row]) {}
  __device__ void load_directions(const Piece<T>& piece, double (&of_p)[kPiece<T>], double (&of_q)[kPiece<T>]) const {
    for (double& x : of_p) x = 0;
    for (double& x : of_q) x = 0;
    if (v_p.data != nullptr) load_piece(v_p, pieces, piece, 0.0, of_p);
    if (v_q.data != nullptr) load_piece(v_q, pieces, piece, 0.0, of_q);
  }
  __device__ void store(const Piece<T>& piece, const double (&of_p)[kPiece<T>], const double (&of_q)[kPiece<T>]) const {
    if (d_p.data != nullptr) store_piece(d_p, pieces, piece, of_p);
    if (d_q.data != nullptr) store_piece(d_q, pieces, piece, of_q);
  }
  // With the derivative of the coefficient; true: those of the sides are still to be found. Zeros are stored here.
  template <class DoubleBackward>
  __device__ bool more_than(const DoubleBackward& k, const RowTask& task, double d_coefficient) const {
    if (k.d_coefficient != nullptr && task.writes()) k.d_coefficient[task.row] = d_coefficient;
    if (coefficient != 0) return d_p.data != nullptr || d_q.data != nullptr;
    store_zeros<T>(task, d_p, pieces);
    store_zeros<T>(task, d_q, pieces);
    return false;
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
