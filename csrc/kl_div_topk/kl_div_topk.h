// KL divergence from a teacher known by its top-k log-probabilities: the formulas, once, and the signatures of the
// kernels. Included by g++ and nvcc; no ATen.
//
// A row has n classes of the student, in any space, and k pairs (index, a) of the teacher; those with a = -inf are
// padding. K is the set of the other indices, t ("tail") stands for all classes outside K together. The loss is
//
//   L = sum_e A_e (log A_e - log B_e),    forward A = P, B = Q;  reverse A = Q, B = P
//
// over e in K and, for "bucket", t:
//
//   tail            log P_e                              log Q_e
//   bucket          a_j,  t: given or log(1 - sum e^a)   log q_j,  t: log sum of the q outside K (a lower bound of KL)
//   zero            a_j                                  log q_j
//   renorm_target   a_j - lse_K(a)                       log q_j
//   renorm_both     a_j - lse_K(a)                       log q_j - lse_K(log q)
//
// With l = log P - log Q, G = dL/dlog P and H = dL/dlog Q:
//
//   forward   G = P (l + 1)   H = -P
//   reverse   G = -Q          H = Q (1 - l)
//
//   dL/da_j      = G_j - P_j G_t/P_t   where the tail is what the a leave
//                  G_j - P_j sum G     where they are normalised over K
//                  G_j                 else; and dL/db = G_t of a tail's log-probability b that is given
//   gamma_e      = H_e - Q_e sum H     where Q is normalised (logits, renorm_both), else H_e; H_t = 0 but for "bucket"
//   dL/dlog q_j  = gamma_j,  and a class m outside K gets its share of the tail's:  w_m gamma_t,  w_m = q_m/Q_t
//
// which is divided by T for logits and by q_m for probabilities. Their derivatives along (v_input, v_a, v_b), with
// dots:
//
//   (log P_j). = v_a - sum_K P v_a (normalised over K) | v_a,   (log P_t). = -sum_K P v_a / P_t | v_b
//   (log Q_j). = d_j - mu,  (log Q_t). = sum_m w_m d_m - mu     d = v_input/T | v_input | v_input/q,
//                mu = the derivative of the normaliser: sum q d over all classes | over K (renorm_both) | 0
//   forward   G. = P. (l + 1) + P l.   H. = -P.
//   reverse   G. = -Q.                 H. = Q. (1 - l) - Q l.
//   gamma. = H. - Q. sum H - Q sum H.,   (w_m gamma_t). = w_m ((d_m - sum w d) gamma_t + gamma_t.)
//
// Where P and Q both sum to 1, L = sum (A log(A/B) + B - A), in which every term is non-negative: near equality
// A phi(log(A/B)) with phi of kl_div.h. P and Q are then divergent by their logarithms' error squared. The student's
// tail is summed, never 1 - sum_K q, which has no digits left where the teacher's k classes hold nearly everything.
//
// Zeros and infinities are those of kl_div.h. A mass of the log_probs in (1, 1 + kMassTolerance] leaves no tail, P_t =
// 0. Where the student has nothing outside K, what the log_probs leave of 1 is rounding up to the same tolerance, and
// there is no tail at all. If L = +inf, the gradient of a normalised A is 0.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/host_device.h"
#include "core/rows.h"

namespace torch_divergence {

// The numbers are those of the private operators' arguments.
enum TailCode : int { kTailBucket = 0, kTailZero = 1, kTailRenormTarget = 2, kTailRenormBoth = 3 };

// Besides what the rounding of the log_probs to their type accounts for, see TopkRows::rounding.
inline constexpr double kMassTolerance = 1e-3;

struct TopkRows {
  RowsIn input;
  const int64_t* indices;       // rows x k
  const double* log_probs;      // rows x k
  const double* tail_log_prob;  // rows; null: what the log_probs leave
  int space = kLogits;
  int tail = kTailBucket;
  bool reverse = false;
  double temperature = 1;
  int64_t classes = 0, k = 0;
  double rounding = 0;  // relative, of the log_probs as they were given

  TD_HOST_DEVICE bool derived_tail() const { return tail == kTailBucket && tail_log_prob == nullptr; }
  TD_HOST_DEVICE bool renormalises_p() const { return tail == kTailRenormTarget || tail == kTailRenormBoth; }
  // Of log Q over the classes and t.
  TD_HOST_DEVICE bool normalises_q() const { return space == kLogits || tail == kTailRenormBoth; }
  // Does the loss depend on classes outside K?
  TD_HOST_DEVICE bool reads_all() const { return tail == kTailBucket || (space == kLogits && tail != kTailRenormBoth); }
};

// What a row leaves for its backward: log q_j = (x_j - shift)/T - log_sum, log Q_t = (tail_max - shift)/T +
// tail_log_sum
// - log_sum, and w_m = e^((x_m - tail_max)/T - tail_log_sum). Of probabilities: Q_t = e^tail_log_sum, the rest 0.
struct TopkStat {
  double shift = 0, log_sum = 0, tail_max = 0, tail_log_sum = -std::numeric_limits<double>::infinity();

  static constexpr int kSize = 4;
  TD_HOST_DEVICE static TopkStat load(const double* x) { return {x[0], x[1], x[2], x[3]}; }
  TD_HOST_DEVICE void store(double* x) const { x[0] = shift, x[1] = log_sum, x[2] = tail_max, x[3] = tail_log_sum; }
  TD_HOST_DEVICE bool empty_tail() const { return tail_log_sum == -std::numeric_limits<double>::infinity(); }
  TD_HOST_DEVICE double log_tail(double t) const {
    return empty_tail() ? tail_log_sum : (tail_max - shift) / t + tail_log_sum - log_sum;
  }
};

// a x, where an a of 0 wins over an infinite x.
TD_HOST_DEVICE double topk_times(double a, double x) { return a == 0 && !std::isnan(x) ? 0 : a * x; }
// a log_ratio as a term of the loss: an a that only underflowed meets B = 0 with +inf.
TD_HOST_DEVICE double topk_term(double a, double log_ratio) {
  return a == 0 && log_ratio < std::numeric_limits<double>::infinity() ? 0 : a == 0 ? log_ratio : a * log_ratio;
}

// A derivative by (log P, log Q) of one class.
struct TopkSlope {
  double p, q;
};
TD_HOST_DEVICE TopkSlope topk_slope(bool reverse, double p, double q, double l) {
  return reverse ? TopkSlope{-q, topk_times(q, 1 - l)} : TopkSlope{topk_times(p, l + 1), -p};
}
TD_HOST_DEVICE TopkSlope topk_slope_dot(bool reverse, double p, double q, double l, double log_p_dot,
                                        double log_q_dot) {
  const double l_dot = log_p_dot - log_q_dot;
  if (reverse) {
    const double q_dot = topk_times(q, log_q_dot);
    return {-q_dot, topk_times(q_dot, 1 - l) - topk_times(q, l_dot)};
  }
  const double p_dot = topk_times(p, log_p_dot);
  return {topk_times(p_dot, l + 1) + topk_times(p, l_dot), -p_dot};
}

// Per unit of q, for probabilities. q = 0 < p in the forward direction is -inf, p = q = 0 and the reverse one 0.
TD_HOST_DEVICE double topk_per_prob(double gamma, double q) { return q == 0 && gamma == 0 ? 0 : gamma / q; }

// loss[i] = weight[i] L_i (float, or double if loss_is_double) and the row's statistics. weight may be null; a row of
// weight 0 is not read: loss 0, statistics 0. bad_row: the first row of [begin, end) whose indices or mass are refused.
struct TopkForward {
  TopkRows rows;
  const double* weight;
  void* loss;
  bool loss_is_double;
  double* stat;
};
// coefficient[i] times the gradient of L_i, where wanted. A row whose coefficient is 0 is not read: zeros.
struct TopkBackward {
  TopkRows rows;
  const double* coefficient;
  const double* stat;
  RowsOut grad_input;
  double* grad_log_probs;  // rows x k; null: not wanted
  double* grad_tail;       // rows; null: not wanted
};
// Along (v_input, v_log_probs, v_tail), any of which may be absent: d_coefficient[i] = <v, gradient of L_i>, and
// coefficient[i] (Hessian of L_i) v.
struct TopkDoubleBackward {
  TopkRows rows;
  RowsIn v_input;             // of input's type; data null: 0
  const double* v_log_probs;  // null: 0
  const double* v_tail;       // null: 0
  const double* coefficient;
  const double* stat;
  double* d_coefficient;  // may be null
  RowsOut d_input;
  double* d_log_probs;
  double* d_tail;
};

// On CUDA: all rows, on a stream; workspace: of as many doubles as kl_div_topk_workspace() says, on the same device.
// For forward and double_backward the indices of a row ascend, its padding last. A row that is refused is a device-side
// assertion, a weight that is negative or not finite makes its row's loss NaN.
namespace cuda {
int64_t kl_div_topk_workspace(int64_t rows, int64_t classes);
void kl_div_topk_forward(const TopkForward&, int64_t rows, double* workspace, Stream);
void kl_div_topk_backward(const TopkBackward&, int64_t rows, double* workspace, Stream);
void kl_div_topk_double_backward(const TopkDoubleBackward&, int64_t rows, double* workspace, Stream);
}  // namespace cuda

TD_DECLARE_CPU_KERNEL(kl_div_topk_forward,
                      (const TopkForward&, int64_t begin, int64_t end, ForEach columns, int64_t* bad_row))
TD_DECLARE_CPU_KERNEL(kl_div_topk_backward,
                      (const TopkBackward&, int64_t begin, int64_t end, ForEach columns, int64_t* bad_row))
TD_DECLARE_CPU_KERNEL(kl_div_topk_double_backward,
                      (const TopkDoubleBackward&, int64_t begin, int64_t end, ForEach columns, int64_t* bad_row))

}  // namespace torch_divergence
