// Jensen-Shannon divergence: the formulas, once, and the signatures of its kernels. Included by g++ and nvcc; no ATen.
//
// JS_b(P, Q) = b KL(P || M) + (1 - b) KL(Q || M),  M = b P + (1 - b) Q  (Lin, 1991), divided by b (1 - b) where scaled.
// The kernels take b <= 1/2: JS_b(P, Q) = JS_(1-b)(Q, P). Everything is computed for the scaled divergence, with
// l = log p - log q, sigma = log(p/m), rho = log(q/m):
//
//   scaled term      p sigma/(1 - b) + q rho/b  =  p s(l) = q e^l s(l)
//   gradients        d/dp = sigma/(1 - b),  d/dq = rho/b, each the partial derivative of the term
//
// In other words no mass terms appear, whether or not the entries sum to 1. From logits of temperature T:
// dP = p (sigma - E_p[sigma])/((1 - b) T), dQ = q (rho - E_q[rho])/(b T); from log_probs p sigma/(1 - b), q rho/b.
//
// l comes from the exact difference of the logits, as in kl_div.h, less that of the two logsumexp, d. Then
//
//   e^l <= 1/b^2   rho = -log(1 - b + b e^l),            sigma = l + rho
//   else           sigma = -log(b + (1 - b) e^-l),       rho = sigma - l
//
// in which nothing cancels, and the logarithm near 1 is log1p(b expm1(l)). For small l the term is q l^2 S(l): see
// JsSeries. Every term is >= 0. An error e of d is one of scale: the divergence changes by e times itself and by e^2/2.
// Where that matters, d is corrected until sum q = sum p, in which an error of l is seen in full: d += T log1p(sum(q -
// p)), q - p = -q expm1(l).
//
// The gradients from logits are taken around a class c of the side's largest probability,
//
//   rho - rho_c = -log(1 + w expm1(l - l_c)),   w = b e^l_c/(1 - b + b e^l_c),
//
// and sigma - sigma_c likewise from -l, l - l_c from the difference of the logits alone: where nearly all of a side's
// mass shares one ratio, rho - E_q[rho] would have no digits left, and this has them relative to the largest entry,
// since that of c is q_c E_q[rho - rho_c] itself. Where l_c > 0 (< 0 for P) c is not needed, and 0 takes the place of
// l_c: E_q[rho] >= 0 >= rho_c, so that nothing cancels at c.
//
// Hessian-vector products: with dots for derivatives along (v_p, v_q),
//   sigma. = (1 - b) (q (log p). - q.)/m,   rho. = b (p (log q). - p.)/m.
//
// Zeros. A class of p = 0 has the term q log(1/(1 - b))/b, one of q = 0 p log(1/b)/(1 - b); both gradients of a side
// are 0 where it has no mass (its one-sided derivative is -inf from probs). Both 0: as if the class were not there. The
// value is finite for any two distributions. A row of -inf only is none: NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/exact_sum.h"
#include "core/host_device.h"
#include "core/row_pair.h"

namespace torch_divergence {

// Below this scaled divergence the error of d is corrected.
inline constexpr double kJsNear = 1e-6;

struct JsDivRows : RowPair {
  double beta = 0.5;  // P's weight in M, in (0, 1/2]
  bool scaled = false;

  TD_HOST_DEVICE double unit() const { return scaled ? 1 : beta * (1 - beta); }  // of the scaled divergence
  // Which family of kernels serves these rows? A beta far below float's accuracy leaves float's range.
  TD_HOST_DEVICE bool by_logits() const { return from_logits() && (p.dtype == DType::Double || beta > 1e-6); }
};

// What the gradient of the scaled divergence is multiplied by.
struct JsWeights {
  double p, q;
  TD_HOST_DEVICE JsWeights(const JsDivRows& rows, double coefficient)
      : p(coefficient * (rows.unit() / (1 - rows.beta))), q(coefficient * (rows.unit() / rows.beta)) {}
};

// S of the term q l^2 S(l) for small l: with g = 1 - b + b e^l it is (b l e^l - g log g)/(b (1 - b)), whose
// singularities nearest to 0 are at |l| >= pi. S(0) = 1/2.
struct JsSeries {
  static constexpr int kTerms = 12;
  double c[kTerms] = {};

  TD_HOST_DEVICE explicit JsSeries(double b) {
    constexpr int kOrder = kTerms + 2;
    double e[kOrder], g[kOrder], h[kOrder];  // coefficients of e^l, g and log g
    e[0] = g[0] = 1, h[0] = 0;
    for (int k = 1; k < kOrder; ++k) {
      e[k] = e[k - 1] / k;
      g[k] = b * e[k];
      h[k] = g[k];
      for (int i = 1; i < k; ++i) h[k] -= i * h[i] * g[k - i] / k;
    }
    for (int k = 2; k < kOrder; ++k) {
      double sum = b * e[k - 1];
      for (int i = 1; i <= k; ++i) sum -= h[i] * g[k - i];
      c[k - 2] = sum / (b * (1 - b));
    }
  }
  // Up to which |l| the series has all digits, and beyond which the closed form has enough.
  template <class A>
  TD_HOST_DEVICE static constexpr double reach() {
    return sizeof(A) == 4 ? 1 : 0.05;
  }
};
// Up to which l rho has a logarithm of its own.
TD_HOST_DEVICE double js_turn(double beta) {
  const double turn = -2 * std::log(beta);
  return turn < 700 ? turn : 700;  // e^l must not overflow
}

// What a row leaves for its backward.
struct JsDivStat {
  double lse_p, lse_p_lo;  // T logsumexp(t/T) and what that rounds off; 0 where P is not in logits
  double lse_q, lse_q_lo;
  double top_p, top_q;    // t - s at the largest class of each side; without a centre -inf and +inf
  double mean_p, mean_q;  // sum p (sigma - sigma_c), sum q (rho - rho_c)
  double js;

  static constexpr int kSize = 9;
  static constexpr int kJs = 8;  // where js is
  static JsDivStat nan() {
    const double x = std::numeric_limits<double>::quiet_NaN();
    return {x, x, x, x, x, x, x, x, x};
  }
  TD_HOST_DEVICE static JsDivStat load(const double* x) {
    return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8]};
  }
  TD_HOST_DEVICE void store(double* x) const {
    x[0] = lse_p, x[1] = lse_p_lo, x[2] = lse_q, x[3] = lse_q_lo, x[4] = top_p, x[5] = top_q;
    x[6] = mean_p, x[7] = mean_q, x[8] = js;
  }
  // d = lse_p - lse_q, to twice double's precision
  TD_HOST_DEVICE ExactSum difference() const {
    const ExactSum d = two_sum(lse_p, -lse_q);
    return {d.sum, d.error + (lse_p_lo - lse_q_lo)};
  }
};

// Where the logarithms of a row are centred: l and the difference of the logits there.
struct JsCentres {
  ExactSum difference;  // where l = 0
  double l_p, l_q;
  ExactSum difference_p, difference_q;

  TD_HOST_DEVICE JsCentres(const JsDivStat& stat, double inv_t) : difference(stat.difference()) {
    const double p = ((stat.top_p - difference.sum) - difference.error) * inv_t,
                 q = ((stat.top_q - difference.sum) - difference.error) * inv_t;
    l_p = p > 0 ? p : 0, l_q = q < 0 ? q : 0;
    difference_p = p > 0 ? ExactSum{stat.top_p, 0} : difference;
    difference_q = q < 0 ? ExactSum{stat.top_q, 0} : difference;
  }
};
// One side's logarithms around its centre: -log(own + other e^l) is the side's ratio to m, l being that of the other
// side to it; k <= 0 is l at the centre.
struct JsCentre {
  double own, other, e_k, g, ratio;

  TD_HOST_DEVICE JsCentre(double own_, double other_, double k)
      : own(own_),
        other(other_),
        e_k(std::exp(k)),
        g(own_ + other_ * e_k),
        ratio(-std::log1p(other_ * std::expm1(k))) {}
  TD_HOST_DEVICE static JsCentre of_p(double beta, double l) { return {beta, 1 - beta, -l}; }
  TD_HOST_DEVICE static JsCentre of_q(double beta, double l) { return {1 - beta, beta, l}; }
  // The argument of -log for the ratio less the centre's, less 1, is weight expm1(l - k) = scale (e^l - e^k).
  TD_HOST_DEVICE double weight() const { return other * e_k / g; }
  TD_HOST_DEVICE double scale() const { return other / g; }
};
// Below lse - kJsFar T a class has no mass that A can tell from 0: moved up to it, l stays finite.
template <class A>
inline constexpr double kJsFar = sizeof(A) == 4 ? 200 : 1600;
// One side without mass: beyond +-kJsNone the other's share of m is 0, and the formulas are finite.
inline constexpr double kJsNone = 800;

using JsDivForward = RowPairForward<JsDivRows>;
using JsDivBackward = RowPairBackward<JsDivRows>;
using JsDivValueAndGrad = RowPairValueAndGrad<JsDivRows>;
using JsDivDoubleBackward = RowPairDoubleBackward<JsDivRows>;

// As those of kl_div.h.
namespace cuda {
int64_t js_div_workspace(int64_t rows, int64_t classes);
void js_div_forward(const JsDivForward&, int64_t rows, double* workspace, Stream);
void js_div_backward(const JsDivBackward&, int64_t rows, double* workspace, Stream);
void js_div_double_backward(const JsDivDoubleBackward&, int64_t rows, double* workspace, Stream);
}  // namespace cuda

TD_DECLARE_CPU_KERNEL(js_div_forward, (const JsDivForward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(js_div_backward, (const JsDivBackward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(js_div_value_and_grad, (const JsDivValueAndGrad&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(js_div_double_backward, (const JsDivDoubleBackward&, int64_t begin, int64_t end, ForEach columns))

}  // namespace torch_divergence
