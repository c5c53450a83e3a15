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
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/row_pair.h"
#include "core/single_row.h"

namespace torch_divergence {

// -- The target is a distribution -----------------------------------------------------------------------------------

struct CrossEntropyRows : RowPair {
  double smoothing = 0;

  // Do the rows of entropy and kl_div, in float, serve these?
  TD_HOST_DEVICE bool by_logits() const { return from_logits() && smoothing == 0 && p.dtype != DType::Double; }
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
  // sum_n: sum of n over all classes
  TD_HOST_DEVICE void set_loss(const CrossEntropyRows& rows, double sum_n) {
    const double s = rows.smoothing;
    // A mixture with nothing of one part has no infinity of it.
    loss = (s == 1 && !std::isnan(plain) ? 0 : (1 - s) * plain) +
           (s != 0 ? s / static_cast<double>(rows.classes) * sum_n : 0);
  }
  // sum p'
  TD_HOST_DEVICE double mixed_mass(const CrossEntropyRows& rows) const {
    return (1 - rows.smoothing) * mass + rows.smoothing;
  }
};

using CrossEntropyForward = RowPairForward<CrossEntropyRows>;
using CrossEntropyBackward = RowPairBackward<CrossEntropyRows>;
using CrossEntropyValueAndGrad = RowPairValueAndGrad<CrossEntropyRows>;
using CrossEntropyDoubleBackward = RowPairDoubleBackward<CrossEntropyRows>;

// On CUDA, by the rules of kl_div.h.
namespace cuda {
int64_t cross_entropy_workspace(int64_t rows, int64_t classes);
void cross_entropy_forward(const CrossEntropyForward&, int64_t rows, double* workspace, Stream);
void cross_entropy_backward(const CrossEntropyBackward&, int64_t rows, double* workspace, Stream);
void cross_entropy_double_backward(const CrossEntropyDoubleBackward&, int64_t rows, double* workspace, Stream);
}  // namespace cuda

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

// The gradient's factors, of which the statistics hold logarithms.
struct LabelShares {
  double unit;    // e^-log_z
  double others;  // 1 - q_y
};

// Online sums over the classes other than the label, a = (x - max)/T.
struct LabelScan {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;    // sum e^a
  double count = 0;  // smoothing: how many classes,
  double drop = 0;   // and sum -a of them, the label included; around 0 while max is -inf

  TD_HOST_DEVICE double centre() const { return max == -std::numeric_limits<double>::infinity() ? 0 : max; }
  TD_HOST_DEVICE void raise(double to, double inv_t) {
    if (!(to > max)) return;
    const double up = (to - centre()) * inv_t;
    if (sum != 0) sum *= std::exp(-up);
    drop += count * up;
    max = to;
  }
  TD_HOST_DEVICE void merge(LabelScan other, double inv_t) {
    raise(other.max, inv_t);
    other.raise(max, inv_t);
    sum += other.sum, count += other.count, drop += other.drop;
  }
  // x: the label's entry.
  TD_HOST_DEVICE LabelStat finish(double x, double inv_t, double smoothing, int64_t classes) {
    LabelShares unused;
    return finish(x, inv_t, smoothing, classes, unused);
  }
  TD_HOST_DEVICE LabelStat finish(double x, double inv_t, double smoothing, int64_t classes, LabelShares& shares) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const bool alone = sum == 0;
    if (!(x < std::numeric_limits<double>::infinity()) || (alone && std::isinf(x))) {
      shares = {nan, nan};
      return {nan, nan, nan, nan};
    }
    LabelStat stat{};
    if (alone) {  // the label's class alone
      raise(x, inv_t);
      shares = {1, 0};
    } else {
      const double u = (x - max) * inv_t, apart = std::exp(-std::fabs(u));
      if (u > 0) {
        const double others = sum * apart;
        stat.at_label = std::log1p(others), stat.log_z = u + stat.at_label;
        shares = {apart / (1 + others), others / (1 + others)};
      } else {
        const double all = sum + apart;
        stat.log_z = std::log(all), stat.at_label = stat.log_z - u;
        shares = {1 / all, sum / all};
      }
    }
    stat.base = max, stat.loss = stat.at_label;
    if (smoothing != 0) {
      const double k = static_cast<double>(classes), every = drop + k * stat.log_z;
      stat.loss = (smoothing == 1 ? 0 : (1 - smoothing) * stat.at_label) + smoothing / k * every;
    }
    return stat;
  }
};

// (q_y - p'_y)/T
TD_HOST_DEVICE double label_gradient(const LabelRows& rows, const LabelStat& stat, double inv_t) {
  const double s = rows.smoothing;
  return (std::expm1(-stat.at_label) + s - s / static_cast<double>(rows.classes)) * inv_t;
}

// Over log-probabilities or probabilities. x: the label's entry; sum_n: with smoothing the sum of n over all classes,
// else 0, or NaN where one of them is.
TD_HOST_DEVICE LabelStat free_label_stat(const LabelRows& rows, double x, double sum_n) {
  const double s = rows.smoothing;
  LabelStat stat{};
  stat.at_label = rows.space == kProbs ? -std::log(x) : -x;
  stat.loss = (s == 1 ? 0 : (1 - s) * stat.at_label) + (s != 0 ? s / static_cast<double>(rows.classes) : 1) * sum_n;
  return stat;
}

using LabelForward = SingleRowForward<LabelRows>;
using LabelBackward = SingleRowBackward<LabelRows>;
using LabelValueAndGrad = SingleRowValueAndGrad<LabelRows>;
using LabelDoubleBackward = SingleRowDoubleBackward<LabelRows>;

// A label that is no class of its row, of weight or coefficient other than 0, is a device-side assertion.
namespace cuda {
int64_t cross_entropy_labels_workspace(int64_t rows, int64_t classes);
void cross_entropy_labels_forward(const LabelForward&, int64_t rows, double* workspace, Stream);
void cross_entropy_labels_backward(const LabelBackward&, int64_t rows, double* workspace, Stream);
void cross_entropy_labels_double_backward(const LabelDoubleBackward&, int64_t rows, double* workspace, Stream);
}  // namespace cuda

TD_DECLARE_CPU_KERNEL(cross_entropy_labels_forward, (const LabelForward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(cross_entropy_labels_backward,
                      (const LabelBackward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(cross_entropy_labels_value_and_grad,
                      (const LabelValueAndGrad&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(cross_entropy_labels_double_backward,
                      (const LabelDoubleBackward&, int64_t begin, int64_t end, ForEach columns))

}  // namespace torch_divergence
