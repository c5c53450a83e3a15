// What the kernels of a loss of one distribution a row are called with: the counterpart of row_pair.h for a single
// differentiable tensor. Rows is SingleRow, or a struct derived from it with what the loss has beyond it.
#pragma once
#include "core/rows.h"

namespace torch_divergence {

struct SingleRow {
  RowsIn x;
  int space = kLogits;
  int64_t classes = 0;
  double temperature = 1;
};

// loss[i] = weight[i] L_i (float, or double if loss_is_double) and the row's statistics. weight may be null; a row of
// weight 0 is not read: loss 0, statistics 0.
template <class Rows>
struct SingleRowForward {
  Rows rows;
  const double* weight;
  void* loss;
  bool loss_is_double;
  double* stat;
};
// grad = coefficient[i] dL_i/dx. A row whose coefficient is 0 is not read: zeros.
template <class Rows>
struct SingleRowBackward {
  Rows rows;
  const double* coefficient;
  const double* stat;
  RowsOut grad;
};
// Forward and gradient in a row's one visit to memory. grad may be the storage of x. Not for half types.
template <class Rows>
struct SingleRowValueAndGrad {
  Rows rows;
  const double* weight;  // may be null: 1
  double scale;          // gradient = scale weight[i] dL_i
  double* stat;
  RowsOut grad;
};
// Along v: d_coefficient[i] = <v, gradient of L_i>, d_x = coefficient[i] (Hessian of L_i) v.
template <class Rows>
struct SingleRowDoubleBackward {
  Rows rows;
  RowsIn v;
  const double* coefficient;
  const double* stat;
  double* d_coefficient;  // may be null
  RowsOut d_x;
};

}  // namespace torch_divergence
