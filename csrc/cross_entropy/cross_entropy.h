// Cross-entropy: the formulas, once, and the signatures of its kernels. Included by g++ and nvcc; no ATen.
//
// H(P', Q) = sum_j p'_j n_j with n_j = -log q_j, Q the input and P' = (1 - s) P + s/K the target P mixed with the
// uniform distribution over the K classes (label smoothing s: Szegedy et al., "Rethinking the Inception Architecture
// for Computer Vision", 2016). x and t are the entries of Q and P as given, T the temperature.
//
// From logits n_j = (top - x_j)/T + log_z with top = max x and log_z = log sum_j e^((x_j - top)/T), both non-negative:
// every term of the loss is, so nothing cancels, and log_z = log1p(what is beside the largest entry) keeps the digits
// of a loss of 1e-12. With M' = sum_j p'_j (1 from logits), N = sum_j p_j n_j and l = log p - log q:
//
//   side     logits                     log_probs      probs
//   Q        (q M' - p')/T              -p'            -p'/q
//   P        (1 - s) p (n - N)/T        (1 - s) p n    (1 - s) n
//
// It is also H(P) + KL(P || Q), both non-negative, and Q's gradient is that of KL: entropy.h and kl_div.h.
//
// n - N of P's gradient comes from differences of x around its entry at P's largest class, where P's entry is -sum of
// the others. q - p between two sides in logits is p expm1(-l) for |l| < 1/2, with l = u + log1p(E_p[expm1(-u)]) and u
// = (t - x - c)/T from the error-free difference, c that at P's largest class.
//
// A class label y is P = onehot(y). From logits, with a = (lse of the others - x_y)/T:
//
//   n_y = log(1 + e^a),    dn_y/dx_j = q_j/T (j != y),    dn_y/dx_y = (q_y - 1)/T = expm1(-n_y)/T
//
// Zeros and infinities. p' = 0: the term is 0, and so is Q's gradient, whatever q. q = 0 < p': +inf; Q's gradient stays
// finite from logits (q - p') and is -inf from probs; P's is 0 from logits for such a row. Both 0: as if the class were
// not there. A row of -inf only is no distribution: NaN.
#pragma once
#include <cstdint>

#include "core/cpu_dispatch.h"
#include "core/row_pair.h"
#include "core/single_row.h"

namespace torch_divergence {

// -- The target is a distribution -----------------------------------------------------------------------------------

struct CrossEntropyRows : RowPair {
  double smoothing = 0;
};

// What a row leaves for its backward.
struct CrossEntropyStat {
  double top_p, log_z_p;  // logits: as above; else 0
  double top_q, log_z_q;
  double base;   // P in logits: Q's entry (log q if Q is not in logits) at P's largest class
  double mean;   // P in logits: E_p of n around base
  double mass;   // sum p; 1 from logits
  double near;   // both in logits: log1p(E_p[expm1(-u)])
  double plain;  // N
  double loss;

  static constexpr int kSize = 10;
  static constexpr int kLoss = 9;  // where loss is
  TD_HOST_DEVICE static CrossEntropyStat load(const double* x) {
    return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9]};
  }
  TD_HOST_DEVICE void store(double* x) const {
    x[0] = top_p, x[1] = log_z_p, x[2] = top_q, x[3] = log_z_q, x[4] = base;
    x[5] = mean, x[6] = mass, x[7] = near, x[8] = plain, x[9] = loss;
  }
};

using CrossEntropyForward = RowPairForward<CrossEntropyRows>;
using CrossEntropyBackward = RowPairBackward<CrossEntropyRows>;
using CrossEntropyValueAndGrad = RowPairValueAndGrad<CrossEntropyRows>;
using CrossEntropyDoubleBackward = RowPairDoubleBackward<CrossEntropyRows>;

TD_DECLARE_CPU_KERNEL(cross_entropy_forward, (const CrossEntropyForward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(cross_entropy_backward,
                      (const CrossEntropyBackward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(cross_entropy_value_and_grad,
                      (const CrossEntropyValueAndGrad&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(cross_entropy_double_backward,
                      (const CrossEntropyDoubleBackward&, int64_t begin, int64_t end, ForEach columns))

// -- The target is a class label ------------------------------------------------------------------------------------

struct LabelRows : SingleRow {
  const int64_t* labels = nullptr;  // one a row, in row order; within [0, classes) where the row is read
  double smoothing = 0;
};

// What a row leaves for its backward.
struct LabelStat {
  double base;      // logits: the largest entry of the classes other than y
  double log_z;     // logits: log sum_j e^((x_j - base)/T), y included
  double at_label;  // n_y
  double loss;

  static constexpr int kSize = 4;
  static constexpr int kLoss = 3;  // where loss is
  TD_HOST_DEVICE static LabelStat load(const double* x) { return {x[0], x[1], x[2], x[3]}; }
  TD_HOST_DEVICE void store(double* x) const { x[0] = base, x[1] = log_z, x[2] = at_label, x[3] = loss; }
};

using LabelForward = SingleRowForward<LabelRows>;
using LabelBackward = SingleRowBackward<LabelRows>;
using LabelValueAndGrad = SingleRowValueAndGrad<LabelRows>;
using LabelDoubleBackward = SingleRowDoubleBackward<LabelRows>;

TD_DECLARE_CPU_KERNEL(cross_entropy_labels_forward, (const LabelForward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(cross_entropy_labels_backward,
                      (const LabelBackward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(cross_entropy_labels_value_and_grad,
                      (const LabelValueAndGrad&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(cross_entropy_labels_double_backward,
                      (const LabelDoubleBackward&, int64_t begin, int64_t end, ForEach columns))

}  // namespace torch_divergence
