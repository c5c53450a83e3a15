// What the CUDA kernels of losses of one distribution a row share (see single_row.h), and negative log-probabilities in
// double, as core/row_scores.h has them on the CPU.
#pragma once
#include <cmath>

#include "core/cuda_rows.cuh"
#include "core/log_sum.h"
#include "core/single_row.h"

namespace torch_divergence::cuda {

// A row of a backward call.
struct BackwardRow {
  RowPointer<const char> x;
  RowPointer<char> grad;
  Pieces pieces;
  double coefficient;

  template <class Backward>
  __device__ BackwardRow(const Backward& k, int64_t row)
      : x(k.rows.x, row), grad(k.grad, row), pieces(k.rows.classes, x, grad), coefficient(k.coefficient[row]) {}
};
// gradient(task, row) for a row whose coefficient is not 0; zeros for another.
template <class T, class Backward, class F>
__device__ __forceinline__ void backward_row(const Backward& k, const RowGrid& grid, double* workspace, int launch,
                                             const F& gradient) {
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const BackwardRow row(k, task.row);
  if (row.coefficient != 0) return gradient(task, row);
  if (task.first_launch()) store_zeros<T>(task, row.grad, row.pieces);
}

// One side's probability and minus its logarithm, whatever it is given in: from logits (top - x)/T + log_z. Padding has
// probability 0.
struct NegLog {
  int space;
  double inv_t, top, log_z, padding;

  struct Term {
    double prob, neg_log;
  };

  __device__ NegLog(int space_, double inv_t_, const LogSum& sum)
      : space(space_), inv_t(inv_t_), top(sum.top), log_z(sum.log_z), padding(space_ == kProbs ? 0 : -kInf<double>) {}
  __device__ Term operator()(double x) const {
    if (space == kProbs) return {x, -std::log(x)};
    const double neg_log = space == kLogits ? (top - x) * inv_t + log_z : -x;
    return {std::exp(-neg_log), neg_log};
  }
};

// p n, where a p of 0 wins over an infinite n but not over NaN.
inline __device__ double share(double p, double n) { return p == 0 ? (std::isnan(n) ? n : 0) : p * n; }

}  // namespace torch_divergence::cuda
