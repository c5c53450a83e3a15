// What the kernels of a divergence between two distributions are called with. No ATen; serves the CPU kernels and nvcc.
//
// A call works on rows [begin, end). Outputs are contiguous per row index unless they have a layout. Rows is RowPair,
// or a struct derived from it with the divergence's own options.
#pragma once
#include "core/rows.h"

namespace torch_divergence {

struct RowPair {
  RowsIn p, q;
  int p_space = kLogits, q_space = kLogits;
  int64_t classes = 0;
  double temperature = 1;

  TD_HOST_DEVICE bool from_logits() const { return p_space == kLogits && q_space == kLogits; }
};

// loss[i] = weight[i] D_i (float, or double if loss_is_double) and the row's statistics. weight may be null; a row of
// weight 0 is not read: loss 0, statistics 0.
template <class Rows>
struct RowPairForward {
  Rows rows;
  const double* weight;
  void* loss;
  bool loss_is_double;
  double* stat;
};
// grad_p = coefficient[i] dD_i/dp and grad_q likewise, where wanted. A row whose coefficient is 0 is not read: zeros.
template <class Rows>
struct RowPairBackward {
  Rows rows;
  const double* coefficient;
  const double* stat;
  RowsOut grad_p, grad_q;
};
// Forward and one gradient in a row's one visit to memory. grad may be the storage of its own side.
template <class Rows>
struct RowPairValueAndGrad {
  Rows rows;
  const double* weight;  // may be null: 1
  double scale;          // gradient = scale weight[i] dD_i
  double* stat;
  bool wrt_q;
  RowsOut grad;
};
// Along (v_p, v_q), either of which may be absent: d_coefficient[i] = <v, gradient of D_i>,
// d_p, d_q = coefficient[i] (Hessian of D_i) v.
template <class Rows>
struct RowPairDoubleBackward {
  Rows rows;
  RowsIn v_p, v_q;  // data null: 0
  const double* coefficient;
  const double* stat;
  double* d_coefficient;  // may be null
  RowsOut d_p, d_q;
};

}  // namespace torch_divergence
