// Kullback-Leibler divergence: the formulas, once, and the signatures of its kernels. Included by g++ and nvcc; no
// ATen.
//
// KL(P || Q) = sum_j p_j (log p_j - log q_j). P is the distribution in front: the target in the forward direction, the
// input in the reverse one. Rows of n classes; t and s are the entries of P and Q as given, T the temperature.
//
// From logits on both sides (p = softmax(t/T), q = softmax(s/T)), with d = (t - s)/T and d' = E_p[d]:
//
//   far   (KL >= 1/2)  KL = d' - (lse_p - lse_q)
//   near  (KL <  1/2)  u = d - d',  phi(u) = expm1(-u) + u >= 0,  KL = log(E_p[e^-u]) = log1p(E_p[phi(u)])
//
// The near form has no cancellation: every term of the sum is non-negative, t - s is exact for close floats (Sterbenz),
// and errors of the normalisers enter squared. A centre c that is off by E_p[d - c] = b is repaired exactly:
// KL = b + log1p(E_p[phi(d - c)] - b).
//
//   dKL/dt = p u / T,     dKL/ds = (q - p)/T = p expm1(-(u + KL))/T     (log p - log q = u + KL)
//
// The entries of either gradient sum to zero. Where P has more than half of its mass on one class, that class's entry
// is taken from the sum of the others: there q - p and u are differences of numbers near each other, while the whole
// gradient may be as small as 1 - p.
//
// Other spaces (log_probs, probs) are free variables: no projection and no mass terms. With l = log p - log q:
//
//   side     logits              log_probs     probs
//   P        p (l - KL)/T        p (l + 1)     l + 1
//   Q        (q sum(p) - p)/T    -p            -p/q
//
// Hessian-vector products are the derivative of these along (v_p, v_q): see kl_div_double_backward.
//
// Zeros and infinities. p = 0: the term is 0, and so is P's gradient there. q = 0 < p: KL = +inf; Q's gradient stays
// finite from logits (q - p) and is -inf from probs; P's gradient from logits is 0 for such a row. Both -inf: as if the
// class were not there. A row of -inf only is no distribution: NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/exact_sum.h"
#include "core/host_device.h"
#include "core/phi.h"
#include "core/row_pair.h"

namespace torch_divergence {

// Below this KL the centred form is used, above it the direct one. At 1/2 both are good to a few ulp.
inline constexpr double kKlNear = 0.5;

// What a row leaves for its backward, in double: float would lose the digits of logits that share a large offset.
struct KlDivStat {
  double lse_p;  // T logsumexp(t/T); 0 where P is not in logits
  double lse_q;
  double mean;     // logits on both sides: E_p[t - s] (not divided by T); else sum(p)
  double mean_lo;  // logits on both sides: what mean rounds off; on one side: what its lse rounds off
  double kl;

  static constexpr int kSize = 5;
  static constexpr int kKl = 4;  // where kl is
  TD_HOST_DEVICE static KlDivStat load(const double* x) { return {x[0], x[1], x[2], x[3], x[4]}; }
  TD_HOST_DEVICE void store(double* x) const { x[0] = lse_p, x[1] = lse_q, x[2] = mean, x[3] = mean_lo, x[4] = kl; }

  // mean + mean_lo = hi + lo, exactly
  TD_HOST_DEVICE void set_mean(double hi, double lo) {
    const ExactSum s = two_sum(hi, lo);
    mean = s.sum, mean_lo = s.error;
  }

  // Both sides in logits: log p - log q = (t - s - this)/T. Around the mean a near row has all of its digits; a far
  // one, or one of infinite KL, around the other statistics.
  TD_HOST_DEVICE ExactSum log_ratio_centre(double t) const {
    if (!(kl < kKlNear)) return two_sum(lse_p, -lse_q);
    const ExactSum d = two_sum(mean, -t * kl);
    return two_sum(d.sum, d.error + mean_lo);
  }
  // (t, s): the logits of P's first class of the largest mass. True where log p - log q is so near 0 there that the row
  // may owe its KL to classes of little mass, or to one that Q masks: all of q - p may then be small beside p, and
  // lse_p - lse_q is needed to more digits than sums of exponentials in float leave. Where false, q - p is at least
  // about min(KL, 1/2)/8 of P's largest mass there, and what those sums round off is a few ulp of that times KL.
  TD_HOST_DEVICE bool agree_at(double t, double s, double inv_t) const {
    return std::fabs((t - s) - (lse_p - lse_q)) * inv_t < (kl < kKlNear ? kl : kKlNear) / 8;
  }
  // Moves log_ratio_centre() by what sum q - p, which is 0 at the right one, tells that it is off. KL has its digits
  // without that: there errors of the normalisers enter squared, or are small beside it.
  TD_HOST_DEVICE void settle(double sum_gap, double inv_t) {
    const double off = std::log1p(sum_gap) / inv_t;
    lse_q += off;
    if (kl < kKlNear) set_mean(mean, mean_lo - off);
  }
};

// Online sums of one part of a row, both sides in logits: a = (t - max_p)/T, b = (s - max_q)/T.
struct KlDivScan {
  double max_p = -std::numeric_limits<double>::infinity();
  double max_q = -std::numeric_limits<double>::infinity();
  double sum_p = 0;       // sum e^a
  double sum_q = 0;       // sum e^b
  double dot = 0;         // sum e^a (a - b), over finite terms
  bool infinite = false;  // a class with s = -inf < t was seen: however small its p, KL is +inf

  // Moves the maxima up to at least (p, q).
  TD_HOST_DEVICE void raise(double p, double q, double inv_t) {
    p = p > max_p ? p : max_p;
    q = q > max_q ? q : max_q;
    if (p == max_p && q == max_q) return;
    if (sum_p > 0) {
      const double down_p = (p - max_p) * inv_t;
      const double down_q = max_q > -std::numeric_limits<double>::infinity() ? (q - max_q) * inv_t : 0;
      const double f = std::exp(-down_p);
      if (std::isfinite(dot)) dot = f * (dot + sum_p * (down_q - down_p));
      sum_p *= f;
    }
    if (sum_q > 0) sum_q *= std::exp(-(q - max_q) * inv_t);
    max_p = p, max_q = q;
  }
  TD_HOST_DEVICE void merge(KlDivScan other, double inv_t) {
    raise(other.max_p, other.max_q, inv_t);
    other.raise(max_p, max_q, inv_t);
    sum_p += other.sum_p, sum_q += other.sum_q, dot += other.dot;
    infinite = infinite || other.infinite;
  }
  // kl by the far form; the near form replaces it.
  TD_HOST_DEVICE KlDivStat finish(double t) const {
    if (!(sum_p > 0) || !(sum_q > 0)) {
      const double nan = std::numeric_limits<double>::quiet_NaN();
      return {nan, nan, nan, nan, nan};
    }
    const double log_p = std::log(sum_p), log_q = std::log(sum_q), mean = dot / sum_p;
    const double lse_p = max_p + t * log_p, lse_q = max_q + t * log_q;
    if (infinite) return {lse_p, lse_q, 0, 0, std::numeric_limits<double>::infinity()};
    KlDivStat stat{lse_p, lse_q, 0, 0, mean - log_p + log_q};
    const ExactSum d = two_sum(max_p, -max_q);
    stat.set_mean(d.sum, d.error + t * mean);
    return stat;
  }
};

// Sums of the near form around the centre that the scan found: E_p[u] (0 but for rounding) and E_p[phi(u)].
struct KlDivCentred {
  double shift = 0;
  double phi = 0;

  TD_HOST_DEVICE double growth() const { return phi - shift; }  // E_p[e^-u] - 1
  // shift + log1p(growth) = phi - (x - log1p(x)) at x = growth: with the centre off by as much as u is wide, shift and
  // the logarithm are sqrt(KL) each and cancel. x - log1p(x) = x^2 (1/2 - x/3 + x^2/4 - ...).
  TD_HOST_DEVICE void finish(KlDivStat& stat, double t) const {
    const double x = growth();
    double rest = x - std::log1p(x);
    if (std::fabs(x) < 0.01) {
      double series = 0;
      for (int k = 9; k >= 2; --k) series = (k % 2 ? -1.0 : 1.0) / k + x * series;
      rest = x * x * series;
    }
    const double kl = phi - rest;
    stat.kl = kl < 0 ? 0 : kl;  // the sum is non-negative; its last rounding need not be
    stat.set_mean(stat.mean, stat.mean_lo + t * shift);
  }
};

// The near form in one visit, around a centre guessed before: against the running maximum of t alone. In finish() it
// turns out whether the guess was good enough; if not, nothing is lost but time.
struct KlDivGuess {
  double max_p = -std::numeric_limits<double>::infinity();
  double sum = 0;    // sum e^((t - max_p)/T)
  double shift = 0;  // and of that times u
  double phi = 0;    // and times phi(u)

  TD_HOST_DEVICE void raise(double p, double inv_t) {
    if (!(p > max_p)) return;
    if (sum != 0 || phi != 0) {  // phi alone: classes of p = 0 so far
      const double f = std::exp((max_p - p) * inv_t);
      sum *= f, shift *= f, phi *= f;
    }
    max_p = p;
  }
  TD_HOST_DEVICE void merge(KlDivGuess other, double inv_t) {
    raise(other.max_p, inv_t);
    other.raise(max_p, inv_t);
    sum += other.sum, shift += other.shift, phi += other.phi;
  }
  // False where the row is not near after all, or the centre is further off than u is wide (KL is half of its
  // variance).
  TD_HOST_DEVICE bool finish(double centre, double t, KlDivStat& stat, KlDivCentred& centred) const {
    if (!(sum > 0) || !std::isfinite(sum + shift + phi)) return false;
    centred = {shift / sum, phi / sum};
    stat.lse_p = max_p + t * std::log(sum);
    stat.set_mean(centre, 0);
    centred.finish(stat, t);
    stat.lse_q = stat.lse_p - stat.mean + t * stat.kl;
    return stat.kl < kKlNear && centred.shift * centred.shift <= 4 * stat.kl;
  }
};

// Both forms in one visit, around a centre guessed before: u = (t - s - centre)/T. What the threads of a GPU hold, in R
// with sums S, and what they are merged to, in double: raise() all to the largest maxima, then add the sums.
// The maxima may also have been guessed: what is up to kAbove T above them is summed as it is.
template <class R, class S = R>
struct KlDivVisit {
  static constexpr double kAbove = 20;
  R max_p = -std::numeric_limits<R>::infinity();
  R max_q = -std::numeric_limits<R>::infinity();
  S sum_p{};  // sum e^((t - max_p)/T)
  S sum_q{};
  S shift{};  // sum e^((t - max_p)/T) u
  S phi{};    // and times phi(u); once there is a p > 0, a class of p = 0 adds its share of q
  bool infinite = false;

  // e^-u e^((t - max_p)/T) over e^((s - max_q)/T), cut where the row cannot be near: there it is at most
  // classes e^kAbove.
  TD_HOST_DEVICE R q_to_p(double centre, double inv_t) const {
    const double x = (static_cast<double>(max_q) - static_cast<double>(max_p) + centre) * inv_t;
    return std::exp(static_cast<R>(x < 60 ? x : 60));
  }
  // Moves the maxima up to at least (p, q).
  TD_HOST_DEVICE void raise(R p, R q, double centre, double inv_t) {
    constexpr R kNone = -std::numeric_limits<R>::infinity();
    if (q > max_q) {
      sum_q *= max_q == kNone ? R(0) : std::exp((max_q - q) * static_cast<R>(inv_t));
      max_q = q;
    }
    if (p > max_p) {
      const bool first = max_p == kNone;
      const R f = first ? R(0) : std::exp((max_p - p) * static_cast<R>(inv_t));
      sum_p *= f, shift *= f, phi *= f;
      max_p = p;
      if (first) {
        phi = sum_q;
        phi *= q_to_p(centre, inv_t);
      }
    }
  }
  // False where the row is near, but the centre further off than u is wide: visit it again around stat.mean.
  TD_HOST_DEVICE bool finish(double centre, double centre_lo, double t, KlDivStat& stat) const {
    const double d = static_cast<double>(max_p) - static_cast<double>(max_q);
    const KlDivScan scan{max_p, max_q, sum_p, sum_q, shift + sum_p * (((centre - d) + centre_lo) / t), infinite};
    stat = scan.finish(t);
    if (!(stat.kl < kKlNear)) return true;
    const KlDivCentred centred{shift / sum_p, phi / sum_p};
    stat.set_mean(centre, centre_lo);
    centred.finish(stat, t);
    return centred.shift * centred.shift <= 4 * stat.kl;
  }
};

using KlDivForward = RowPairForward<RowPair>;
using KlDivBackward = RowPairBackward<RowPair>;
using KlDivValueAndGrad = RowPairValueAndGrad<RowPair>;
using KlDivDoubleBackward = RowPairDoubleBackward<RowPair>;

// On CUDA: all rows, on a stream. workspace: of as many doubles as kl_div_workspace() says, on the same device. A
// weight that is negative or not finite makes its row's loss NaN: nobody waits for the device to be told.
namespace cuda {
int64_t kl_div_workspace(int64_t rows, int64_t classes);
void kl_div_forward(const KlDivForward&, int64_t rows, double* workspace, Stream);
void kl_div_backward(const KlDivBackward&, int64_t rows, double* workspace, Stream);
void kl_div_double_backward(const KlDivDoubleBackward&, int64_t rows, double* workspace, Stream);
}  // namespace cuda

TD_DECLARE_CPU_KERNEL(kl_div_forward, (const KlDivForward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(kl_div_backward, (const KlDivBackward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(kl_div_value_and_grad, (const KlDivValueAndGrad&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(kl_div_double_backward, (const KlDivDoubleBackward&, int64_t begin, int64_t end, ForEach columns))

}  // namespace torch_divergence
