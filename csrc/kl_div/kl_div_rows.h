// Rows of KL divergence with both sides in logits: SIMD in A (float, or double for double inputs), half types widened
// in registers, the accurate forms of kl_div.h, memory read once. Internal to each *_cpu.cpp that includes it.
#pragma once
#include <algorithm>
#include <limits>
#include <memory>

#include "core/row_kernels.h"
#include "kl_div/kl_div.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

template <class A>
TD_INLINE Vec<A> phi_small(Vec<A> u) {
  return u * u *
         phi_over_square<A>(
             u, [](Vec<A> a, Vec<A> b, Vec<A> c) __attribute__((always_inline)) { return fmadd(a, b, c); });
}
template <class A>
TD_INLINE Vec<A> is_small(Vec<A> u) {
  return u.abs() < Vec<A>(A(0.5));
}

// Exponentials kept for the gradient: e^((t - max)/T) with the maximum so far of each chunk.
template <class A>
struct Kept {
  A* exp_p = nullptr;
  A* exp_q = nullptr;  // null: not kept
  double* max_p = nullptr;
  double* max_q = nullptr;

  // e^((t - max)/T) of a whole row, where it is kept in this unit.
  const A* from_max(int64_t classes, const KlDivStat& stat) const {
    return classes <= kChunk && max_p[0] != stat.lse_p ? exp_p : nullptr;
  }
};

// Sums of one chunk against the scan's maxima. kMasked: any value may be there, -inf and NaN included. Not kMasked: the
// caller hopes for numbers within 1e5 T of the maximum, and finds a sum that is not finite where there is something
// else.
template <class A, bool kMasked, bool kUnitT, class TP, class TQ>
TD_INLINE bool scan_chunk(const TP* p, const TQ* q, int64_t n, double inv_t_, KlDivScan& scan, A* exp_p, A* exp_q) {
  const Vec<A> inv_t(static_cast<A>(inv_t_)), zero(A(0)), lowest(-kInf<A>);
  const Vec<A> max_p(static_cast<A>(finite_or_zero(scan.max_p))), max_q(static_cast<A>(finite_or_zero(scan.max_q)));
  Vec<A> sum_p(A(0)), sum_q(A(0)), dot(A(0)), infinite(A(0));
  const auto body = [&](int64_t i, auto count) __attribute__((always_inline)) {
    constexpr bool kTail = std::is_same_v<decltype(count), int>;
    const Vec<A> t = load_lanes<A>(p + i, count, -kInf<A>), s = load_lanes<A>(q + i, count, -kInf<A>);
    Vec<A> a = t - max_p, b = s - max_q;
    if constexpr (!kUnitT) a = a * inv_t, b = b * inv_t;
    const Vec<A> x = exp_of < !kMasked && !kTail > (a), y = exp_of < !kMasked && !kTail > (b);
    sum_p = sum_p + x, sum_q = sum_q + y;
    if constexpr (kMasked || kTail) {
      infinite = infinite | ((s == lowest) & (t > lowest));
      dot = dot + select((x > zero) & (s > lowest), x * (a - b), zero);
    } else {
      dot = fmadd(x, a - b, dot);
    }
    store_lanes<A>(exp_p + i, x, count);
    if (exp_q != nullptr) store_lanes<A>(exp_q + i, y, count);
  };
  for_lanes<A>(n, body);
  const double chunk_p = sum_of(sum_p), chunk_q = sum_of(sum_q), chunk_dot = sum_of(dot);
  if (!kMasked && !std::isfinite(chunk_p + chunk_q + chunk_dot)) return false;
  scan.sum_p += chunk_p, scan.sum_q += chunk_q, scan.dot += chunk_dot;
  scan.infinite = scan.infinite || any(infinite);
  return true;
}

template <class A, class TP, class TQ>
KlDivScan scan_columns(const TP* p, const TQ* q, int64_t first, int64_t last, double inv_t, const Kept<A>& kept) {
  KlDivScan scan;
  for (int64_t c = first; c < last; c += kChunk) {
    const int64_t n = std::min(kChunk, last - c);
    scan.raise(max_of_row<A>(p + c, n), max_of_row<A>(q + c, n), inv_t);
    A* const exp_p = kept.exp_p + c;
    A* const exp_q = kept.exp_q != nullptr ? kept.exp_q + c : nullptr;
    const bool plain = inv_t == 1 ? scan_chunk<A, false, true>(p + c, q + c, n, inv_t, scan, exp_p, exp_q)
                                  : scan_chunk<A, false, false>(p + c, q + c, n, inv_t, scan, exp_p, exp_q);
    if (!plain) scan_chunk<A, true, false>(p + c, q + c, n, inv_t, scan, exp_p, exp_q);
    kept.max_p[c / kChunk] = scan.max_p, kept.max_q[c / kChunk] = scan.max_q;
  }
  return scan;
}

// p u, p phi(u) and p expm1(-u) of some classes, for a p in any unit; grown(s) = p e^-u in that unit, from s alone.
template <class A>
struct NearTerms {
  Vec<A> p_u, p_phi, p_expm1;

  template <class Grown>
  TD_INLINE NearTerms(Vec<A> x, Vec<A> u, Vec<A> s, const Grown& grown) {
    const Vec<A> small = is_small(u), phi_u = phi_small(u);
    p_u = x * u, p_phi = x * phi_u, p_expm1 = x * (phi_u - u);
    if (all(small)) return;
    // p e^-u as p times e^-u, which shares p's rounding, unless they are far apart. There from s: right where p is 0 as
    // well (a class of p = 0 adds its share of q, one of p = q = 0 nothing).
    const Vec<A> zero(A(0)), middle = u.abs() < Vec<A>(A(8)), growth_u = exp_of(zero - u) - Vec<A>(A(1));
    p_u = select(x > zero, p_u, zero);
    Vec<A> gap = x * growth_u;
    if (!all(middle)) gap = select(middle, gap, grown(s) - x);
    p_phi = select(small, p_phi, select(middle, x * (growth_u + u), gap + p_u));
    p_expm1 = select(small, p_expm1, gap);
  }
};

// kWant, here and below: 0 sums only, 1 also growth = p expm1(-u) for the gradient of Q, 2 also growth = p u for that
// of P, both in the unit that kept.max_p tells.
template <class A, int kWant, class Count>
TD_INLINE void store_growth(A* growth, const NearTerms<A>& terms, Count count) {
  if constexpr (kWant == 1) store_lanes<A>(growth, terms.p_expm1, count);
  if constexpr (kWant == 2) store_lanes<A>(growth, terms.p_u, count);
}

// Sums of the near form over a part of a row, from exponentials of P that a scan kept; turns those into probabilities.
template <class A, int kWant, class TP, class TQ>
KlDivCentred centred_columns(const TP* p, const TQ* q, int64_t first, int64_t last, double inv_t_,
                             const KlDivStat& stat, const Kept<A>& kept, A* growth) {
  const Vec<A> inv_t(static_cast<A>(inv_t_));
  const Split<A> centre(stat.mean, stat.mean_lo);
  const ExpFrom<A> grown(stat.lse_p - stat.mean, inv_t_);
  KlDivCentred sums;
  for (int64_t c = first; c < last; c += kBlock) {
    const int64_t n = std::min(kBlock, last - c);
    const Vec<A> factor(static_cast<A>(kept_factor(kept.max_p[c / kChunk], stat.lse_p, inv_t_)));
    Vec<A> shift(A(0)), phi(A(0));
    for_lanes<A>(
        n, [&](int64_t i, auto count) __attribute__((always_inline)) {
          const Vec<A> t = load_lanes<A>(p + c + i, count, -kInf<A>), s = load_lanes<A>(q + c + i, count, -kInf<A>);
          const Vec<A> x = load_lanes<A>(kept.exp_p + c + i, count, A(0)) * factor;
          if constexpr (kWant != 0) store_lanes<A>(kept.exp_p + c + i, x, count);
          const NearTerms<A> terms(x, difference_minus(t, s, centre) * inv_t, s, grown);
          shift = shift + terms.p_u, phi = phi + terms.p_phi;
          store_growth<A, kWant>(growth + c + i, terms, count);
        });
    sums.shift += sum_of(shift), sums.phi += sum_of(phi);
    if constexpr (kWant != 0)  // the unit is 1 from here on
      if (c + n == last || (c + n) % kChunk == 0) kept.max_p[c / kChunk] = stat.lse_p;
  }
  return sums;
}

// Is the row likely a near one, to judge by its first classes, and around which centre?
template <class A, class TP, class TQ>
TD_INLINE bool guess_centre(const TP* p, const TQ* q, int64_t classes, double inv_t, double& centre) {
  const int64_t n = std::min<int64_t>(classes, 256) / kLanes<A> * kLanes<A>;
  Vec<A> sum(A(0)), lo(kInf<A>), hi(-kInf<A>);
  const auto look = [&](int64_t first, int64_t last) __attribute__((always_inline)) {
    for (int64_t i = first; i < last; i += kLanes<A>) {
      const Vec<A> d = load<A>(p + i) - load<A>(q + i);
      sum = sum + d, lo = min_of(d, lo), hi = max_of(d, hi);
    }
    return (static_cast<double>(max_lane(hi)) - static_cast<double>(min_lane(lo))) * inv_t < 1.5;
  };
  const int64_t few = std::min<int64_t>(n, 32);  // tells of most rows that they are not
  if (n == 0 || !look(0, few) || (few < n && !look(few, n))) return false;
  centre = static_cast<double>(static_cast<A>(sum_of(sum) / static_cast<double>(n)));
  return std::isfinite(centre);
}

template <class A, int kWant, class TP, class TQ>
KlDivGuess guess_columns(const TP* p, const TQ* q, int64_t first, int64_t last, double inv_t_, double centre_,
                         const Kept<A>& kept, A* growth) {
  const Vec<A> inv_t(static_cast<A>(inv_t_)), lowest(-kInf<A>);
  const Split<A> centre(centre_);
  KlDivGuess sums;
  for (int64_t c = first; c < last; c += kBlock) {
    const int64_t n = std::min(kBlock, last - c);
    if (c % kChunk == 0) sums.raise(max_of_row<A>(p + c, std::min(kChunk, last - c)), inv_t_);
    kept.max_p[c / kChunk] = sums.max_p;
    const Vec<A> max_p(static_cast<A>(finite_or_zero(sums.max_p)));
    const ExpFrom<A> grown(finite_or_zero(sums.max_p) - centre_, inv_t_);
    Vec<A> sum(A(0)), shift(A(0)), phi(A(0)), infinite(A(0));
    for_lanes<A>(
        n, [&](int64_t i, auto count) __attribute__((always_inline)) {
          const Vec<A> t = load_lanes<A>(p + c + i, count, -kInf<A>), s = load_lanes<A>(q + c + i, count, -kInf<A>);
          const Vec<A> x = exp_of((t - max_p) * inv_t);
          const NearTerms<A> terms(x, difference_minus(t, s, centre) * inv_t, s, grown);
          infinite = infinite | ((s == lowest) & (t > lowest));
          sum = sum + x, shift = shift + terms.p_u, phi = phi + terms.p_phi;
          store_lanes<A>(kept.exp_p + c + i, x, count);
          store_growth<A, kWant>(growth + c + i, terms, count);
        });
    sums.sum += sum_of(sum), sums.shift += sum_of(shift), sums.phi += sum_of(phi);
    if (any(infinite)) sums.phi = std::numeric_limits<double>::infinity();  // however small p is there: not near
  }
  return sums;
}

// P's largest logit, and that of each chunk and those before it where still at hand.
struct RowTop {
  double max = 0;
  const double* of_chunk = nullptr;
};

// The statistics of one row, and with kWant what its gradient needs, in kept (and growth where the near form ran).
template <class A, int kWant, class TP, class TQ>
KlDivStat logits_row(const TP* p, const TQ* q, int64_t classes, double t, ForEach columns, const Kept<A>& kept,
                     A* growth, KlDivCentred& centred, RowTop& top) {
  const double inv_t = inverse_temperature<A>(t);
  t = 1 / inv_t;
  KlDivStat stat{};
  double centre = 0;
  if (guess_centre<A>(p, q, classes, inv_t, centre)) {
    const auto guess = merged_segments<KlDivGuess>(
        classes, columns,
        [&](int64_t first, int64_t last) {
          return guess_columns<A, kWant>(p, q, first, last, inv_t, centre, kept, growth);
        },
        [&](KlDivGuess& total, const KlDivGuess& part) { total.merge(part, inv_t); });
    top = {guess.max_p, kept.max_p};
    if (guess.finish(centre, t, stat, centred)) return stat;
  }
  const auto scan = merged_segments<KlDivScan>(
      classes, columns, [&](int64_t first, int64_t last) { return scan_columns<A>(p, q, first, last, inv_t, kept); },
      [&](KlDivScan& total, const KlDivScan& part) { total.merge(part, inv_t); });
  stat = scan.finish(t);
  top = {scan.max_p, kept.max_p};
  if (!(stat.kl < kKlNear)) return stat;
  if (kWant != 0) top.of_chunk = nullptr;  // lse_p takes their place
  centred = merged_segments<KlDivCentred>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        return centred_columns<A, kWant>(p, q, first, last, inv_t, stat, kept, growth);
      },
      [](KlDivCentred& total, const KlDivCentred& part) { total.shift += part.shift, total.phi += part.phi; });
  centred.finish(stat, t);
  return stat;
}

// q - p of some classes: p expm1(-v), v = log p - log q, where q is no more than a few orders of magnitude from p. Two
// exponentials would leave nothing where q and p are near each other, as they may be wherever there is mass to speak
// of, in a far row too.
template <class A>
struct Gap {
  Split<A> difference;
  Vec<A> inv_t;
  ExpFrom<A> prob_q;

  TD_INLINE Gap(const KlDivStat& stat, double inv_t_) : Gap(stat.log_ratio_centre(1 / inv_t_), stat.lse_q, inv_t_) {}
  // x: p of these classes
  TD_INLINE Vec<A> operator()(Vec<A> x, Vec<A> t, Vec<A> s) const {
    const Vec<A> zero(A(0)), v = difference_minus(t, s, difference) * inv_t, small = is_small(v);
    const Vec<A> gap_small = x * (phi_small(v) - v);
    if (all(small)) return gap_small;
    const Vec<A> middle = v.abs() < Vec<A>(A(8));
    Vec<A> gap = x * (exp_of(zero - v) - Vec<A>(A(1)));  // shares p's rounding, as in NearTerms
    if (!all(middle)) gap = select(middle, gap, prob_q(s) - x);
    return select(small, gap_small, gap);
  }

 private:
  TD_INLINE Gap(const ExactSum& at, double lse_q, double inv_t_)
      : difference(at.sum, at.error), inv_t(static_cast<A>(inv_t_)), prob_q(lse_q, inv_t_) {}
};

// Settles the statistics of a row whose sides agree about P's largest mass. False where they do not; most rows show
// that by their first classes.
template <class A, class TP, class TQ>
bool settle(const TP* p, const TQ* q, int64_t classes, double t, ForEach columns, const RowTop& top, KlDivStat& stat) {
  if (!(stat.kl > 0)) return false;
  const double inv = inverse_temperature<A>(t);
  if (classes >= kLanes<A>) {
    const Vec<A> inv_t(static_cast<A>(inv)), t_i = load<A>(p);
    const Vec<A> v = difference_minus(t_i, load<A>(q), Split<A>(stat.lse_p - stat.lse_q)) * inv_t;
    const Vec<A> share = exp_of((t_i - Vec<A>(static_cast<A>(top.max))) * inv_t);
    if (any(Vec<A>(static_cast<A>(std::min(stat.kl, kKlNear) / 8)) < share * min_of(v.abs(), Vec<A>(A(1)))))
      return false;
  }
  const int64_t at = top_class<A>(p, classes, top.max, top.of_chunk);
  if (!stat.agree_at(static_cast<double>(p[at]), static_cast<double>(q[at]), inv)) return false;
  const ExpFrom<A> prob_p(stat.lse_p, inv);
  const Gap<A> gap(stat, inv);
  const double sum = merged_segments<double>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        double part = 0;
        for (int64_t b = first; b < last; b += kBlock) {
          Vec<A> gaps(A(0));
          for_lanes<A>(
              std::min(kBlock, last - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
                const Vec<A> t_i = load_lanes<A>(p + b + i, count, -kInf<A>),
                             s = load_lanes<A>(q + b + i, count, -kInf<A>);
                gaps = gaps + gap(prob_p(t_i), t_i, s);
              });
          part += sum_of(gaps);
        }
        return part;
      },
      [](double& total, double part) { total += part; });
  stat.settle(sum, inv);
  return true;
}

// P's gradient is p u, and the classes that share P's mass may have a u far smaller than the t - s that the scan
// averaged in A. The far form takes the mean's error, E_p[u], from a second look at the row; the near form has done so
// already.
template <class A, class TP, class TQ>
void recentre(const TP* p, const TQ* q, int64_t classes, double t, ForEach columns, KlDivStat& stat) {
  if (!(stat.kl >= kKlNear) || std::isinf(stat.kl)) return;
  const double inv = inverse_temperature<A>(t);
  const Split<A> centre(stat.mean, stat.mean_lo);
  const ExpFrom<A> prob(stat.lse_p, inv);
  const double shift = merged_segments<double>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        double part = 0;
        for (int64_t b = first; b < last; b += kBlock) {
          Vec<A> sum(A(0));
          for_lanes<A>(
              std::min(kBlock, last - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
                const Vec<A> t_i = load_lanes<A>(p + b + i, count, -kInf<A>),
                             s = load_lanes<A>(q + b + i, count, -kInf<A>);
                const Vec<A> x = prob(t_i), zero(A(0));
                sum = sum + select(x > zero, x * difference_minus(t_i, s, centre), zero);
              });
          part += sum_of(sum);
        }
        return part;
      },
      [](double& total, double part) { total += part; });
  stat.set_mean(stat.mean, stat.mean_lo + shift);
}

// The class with more than half of P's mass, and the sums of the other classes' gradients.
struct Peak {
  int64_t at = -1;
  double others_p = 0, others_q = 0;

  void merge(const Peak& other) {
    at = std::max(at, other.at);
    others_p += other.others_p, others_q += other.others_q;
  }
};

// Gradients of a part of a row from its statistics alone: P's, Q's or both.
template <class A, bool kP, bool kQ, class TP, class TQ>
Peak logits_gradient(const TP* p, const TQ* q, TP* grad_p, TQ* grad_q, int64_t first, int64_t last, double t,
                     const KlDivStat& stat, double coefficient) {
  const double inv = inverse_temperature<A>(t);
  const Vec<A> inv_t(static_cast<A>(inv)), zero(A(0)), half(A(0.5)), c(static_cast<A>(coefficient * inv));
  const Split<A> centre(stat.mean, stat.mean_lo);
  const ExpFrom<A> prob_p(stat.lse_p, inv);
  const Gap<A> gap(stat, inv);
  const bool infinite = std::isinf(stat.kl);
  Peak peak;
  for (int64_t b = first; b < last; b += kChunk) {
    const int64_t n = std::min(kChunk, last - b);
    Vec<A> others_p(A(0)), others_q(A(0));
    for_lanes<A>(
        n, [&](int64_t j, auto count) __attribute__((always_inline)) {
          const int64_t i = b + j;
          // The padding of the tail has no mass.
          const Vec<A> tv = load_lanes<A>(p + i, count, -kInf<A>), s = load_lanes<A>(q + i, count, -kInf<A>);
          const Vec<A> x = prob_p(tv), top = x > half;
          if (any(top)) peak.at = i + first_lane(top);
          Vec<A> gp(A(0)), gq(A(0));
          if constexpr (kP) {
            gp = infinite ? zero : select(x == zero, zero, c * x * (difference_minus(tv, s, centre) * inv_t));
            others_p = others_p + select(top, zero, gp);
          }
          if constexpr (kQ) {
            gq = c * gap(x, tv, s);
            others_q = others_q + select(top, zero, gq);
          }
          // Written last: either may be the storage of its own side.
          if constexpr (kP) store_lanes<A>(grad_p + i, gp, count);
          if constexpr (kQ) store_lanes<A>(grad_q + i, gq, count);
        });
    peak.others_p += sum_of(others_p), peak.others_q += sum_of(others_q);
  }
  return peak;
}

// Gradients of one row from its statistics, where wanted. Either may be the storage of its own side.
template <class A, class TP, class TQ>
void gradient_row(const TP* p, const TQ* q, TP* grad_p, TQ* grad_q, int64_t classes, double t, double coefficient,
                  ForEach columns, KlDivStat stat) {
  if (grad_p) recentre<A>(p, q, classes, t, columns, stat);
  const auto gradient = grad_p && grad_q ? &logits_gradient<A, true, true, TP, TQ>
                        : grad_p         ? &logits_gradient<A, true, false, TP, TQ>
                                         : &logits_gradient<A, false, true, TP, TQ>;
  const auto peak = merged_segments<Peak>(
      classes, columns,
      [&](int64_t first, int64_t last) { return gradient(p, q, grad_p, grad_q, first, last, t, stat, coefficient); },
      [](Peak& total, const Peak& part) { total.merge(part); });
  if (peak.at < 0) return;
  if (grad_p) grad_p[peak.at] = static_cast<TP>(static_cast<A>(-peak.others_p));
  if (grad_q) grad_q[peak.at] = static_cast<TQ>(static_cast<A>(-peak.others_q));
}

// A thread's room for one row: P's exponentials, and where asked for as much again.
template <class A>
struct Scratch {
  std::unique_ptr<A[]> exps;
  std::unique_ptr<double[]> maxima;
  int64_t chunks;

  Scratch(int64_t classes, bool both)
      : exps(std::make_unique_for_overwrite<A[]>(static_cast<size_t>(both ? 2 * classes : classes))),
        maxima(std::make_unique_for_overwrite<double[]>(static_cast<size_t>(2 * ((classes + kChunk - 1) / kChunk)))),
        chunks((classes + kChunk - 1) / kChunk) {}
  Kept<A> kept(A* exp_q) const { return {exps.get(), exp_q, maxima.get(), maxima.get() + chunks}; }
};

// kQ: the gradient of Q, else that of P.
// Until the form of the row is known, what its gradient needs waits in `aside`: grad itself, unless that is an input's
// row or of a half type.
template <class A, bool kQ, class TP, class TQ>
void value_and_grad_row(const TP* p, const TQ* q, std::conditional_t<kQ, TQ, TP>* grad, A* aside, int64_t classes,
                        double t, double coefficient, ForEach columns, const Kept<A>& kept, KlDivStat& stat) {
  KlDivCentred centred;
  RowTop row_top;
  const double inv_t = inverse_temperature<A>(t);
  stat = logits_row < A, kQ ? 1 : 2 > (p, q, classes, t, columns, kept, aside, centred, row_top);
  const bool near = stat.kl < kKlNear;
  const bool settled = settle<A>(p, q, classes, t, columns, row_top, stat);
  if constexpr (kQ) {
    if (settled) return gradient_row<A>(p, q, static_cast<TP*>(nullptr), grad, classes, t, coefficient, columns, stat);
  } else {
    if (std::isinf(stat.kl)) return fill_zero(grad, classes);
    recentre<A>(p, q, classes, t, columns, stat);
  }
  // near: aside holds growth. Q: (p expm1(-u) - p E[expm1(-u)]) / E[e^-u]. P: p u - p E[u].
  const double scale = coefficient * inv_t / (near && kQ ? 1 + centred.growth() : 1);
  const Vec<A> c(static_cast<A>(scale)), c_far(static_cast<A>(scale * inv_t)),
      mean(static_cast<A>(kQ ? centred.growth() : centred.shift));
  const Vec<A> zero(A(0)), half(A(0.5));
  const Split<A> centre(stat.mean, stat.mean_lo);
  const auto write = [&](int64_t first, int64_t last) {
    Peak part;
    for (int64_t b = first; b < last; b += kChunk) {
      const int64_t n = std::min(kChunk, last - b), chunk = b / kChunk;
      Vec<A> others(A(0));
      // g(offset, count, p) -> the entry.
      const double unit = kept_factor(kept.max_p[chunk], stat.lse_p, inv_t);
      const Vec<A> to_p(static_cast<A>(unit));
      const auto fill_with = [&](auto may_peak, const auto& g) __attribute__((always_inline)) {
        for_lanes<A>(
            n, [&](int64_t i, auto count) __attribute__((always_inline)) {
              const Vec<A> x = load_lanes<A>(kept.exp_p + b + i, count, A(0)) * to_p;
              const Vec<A> y = g(i, count, x);
              if constexpr (may_peak) {
                const Vec<A> top = x > half;
                if (any(top)) part.at = b + i + first_lane(top);
                others = others + select(top, zero, y);
              } else {
                others = others + y;
              }
              store_lanes<A>(grad + b + i, y, count);
            });
      };
      // No exponential is above 1, except where they have become probabilities.
      const auto fill = [&](const auto& g) __attribute__((always_inline)) {
        unit > 0.49 ? fill_with(std::true_type(), g) : fill_with(std::false_type(), g);
      };
      if (near) {
        fill([&](int64_t i, auto count, Vec<A> x) __attribute__((always_inline)) {
          return c * (load_lanes<A>(aside + b + i, count, A(0)) * to_p - x * mean);
        });
      } else if constexpr (kQ) {
        const Vec<A> to_q(static_cast<A>(kept_factor(kept.max_q[chunk], stat.lse_q, inv_t)));
        fill([&](int64_t i, auto count, Vec<A> x) __attribute__((always_inline)) {
          return c * (load_lanes<A>(kept.exp_q + b + i, count, A(0)) * to_q - x);
        });
      } else {
        fill([&](int64_t i, auto count, Vec<A> x) __attribute__((always_inline)) {
          const Vec<A> t_i = load_lanes<A>(p + b + i, count, A(0)), s = load_lanes<A>(q + b + i, count, A(0));
          return select(x == zero, zero, c_far * x * difference_minus(t_i, s, centre));
        });
      }
      (kQ ? part.others_q : part.others_p) += sum_of(others);
    }
    return part;
  };
  const auto peak =
      merged_segments<Peak>(classes, columns, write, [](Peak& total, const Peak& part) { total.merge(part); });
  if (peak.at >= 0)
    grad[peak.at] = static_cast<std::conditional_t<kQ, TQ, TP>>(static_cast<A>(-(kQ ? peak.others_q : peak.others_p)));
}

// -- All rows, for KL divergence and what is made of it: Rows is RowPair or derived from it

// leave(row, p, exps, stat) stores what a row leaves for its backward and returns its loss; p is null where the row is
// not read. exps: e^((t - max t)/T) if at hand, or null.
template <class A, class TP, class TQ, class Rows, class Leave>
void forward_logits(const RowPairForward<Rows>& k, int64_t begin, int64_t end, ForEach columns, const Leave& leave) {
  const Scratch<A> scratch(k.rows.classes, false);
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {{}};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const*) {
    const double weight = k.weight ? k.weight[i] : 1;
    const TP* p = nullptr;
    const A* exps = nullptr;
    KlDivStat stat{};
    if (weight != 0) {
      p = static_cast<const TP*>(x[0]);
      const auto* const q = static_cast<const TQ*>(x[1]);
      KlDivCentred centred;
      RowTop top;
      const auto kept = scratch.kept(nullptr);
      stat = logits_row<A, 0>(p, q, k.rows.classes, k.rows.temperature, columns, kept, static_cast<A*>(nullptr),
                              centred, top);
      settle<A>(p, q, k.rows.classes, k.rows.temperature, columns, top, stat);
      exps = kept.from_max(k.rows.classes, stat);
    }
    const double loss = leave(i, p, exps, stat);
    store_loss(k, i, weight != 0 ? weight * loss : 0);
  });
}

// A row's KlDivStat is the first of the stat_size numbers that it left.
template <class A, class TP, class TQ, class Rows>
void backward_logits(const RowPairBackward<Rows>& k, int64_t begin, int64_t end, ForEach columns, int stat_size) {
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad_p, k.grad_q};
  RowTiles<2, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    auto* gp = static_cast<TP*>(y[0]);
    auto* gq = static_cast<TQ*>(y[1]);
    if (k.coefficient[i] == 0) {
      if (gp) fill_zero(gp, k.rows.classes);
      if (gq) fill_zero(gq, k.rows.classes);
      return;
    }
    gradient_row<A>(static_cast<const TP*>(x[0]), static_cast<const TQ*>(x[1]), gp, gq, k.rows.classes,
                    k.rows.temperature, k.coefficient[i], columns, KlDivStat::load(k.stat + stat_size * i));
  });
}

// kQ: the gradient of Q, else that of P.
template <class A, bool kQ, class TP, class TQ, class Rows, class Leave>
void value_and_grad_logits(const RowPairValueAndGrad<Rows>& k, int64_t begin, int64_t end, ForEach columns,
                           const Leave& leave) {
  using G = std::conditional_t<kQ, TQ, TP>;
  const int64_t n = k.rows.classes;
  const bool apart = !std::is_same_v<G, A> || k.grad.data == (kQ ? k.rows.q : k.rows.p).data;
  const Scratch<A> scratch(n, apart);
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad};
  RowTiles<2, 1>(in, out, n).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    auto* const grad = static_cast<G*>(y[0]);
    const double coefficient = k.scale * (k.weight ? k.weight[i] : 1);
    const TP* p = nullptr;
    const A* exps = nullptr;
    KlDivStat stat{};
    if (coefficient == 0) {
      fill_zero(grad, n);
    } else {
      p = static_cast<const TP*>(x[0]);
      A* const aside = apart ? scratch.exps.get() + n : static_cast<A*>(y[0]);
      const auto kept = scratch.kept(kQ ? aside : nullptr);
      value_and_grad_row<A, kQ>(p, static_cast<const TQ*>(x[1]), grad, aside, n, k.rows.temperature, coefficient,
                                columns, kept, stat);
      exps = kept.from_max(n, stat);
    }
    leave(i, p, exps, stat);
  });
}

}  // namespace
}  // namespace torch_divergence::cpu::CPU_CAPABILITY
