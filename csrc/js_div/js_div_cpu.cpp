// CPU kernels of the Jensen-Shannon divergence. Compiled once per instruction set (CPU_CAPABILITY); formulas in
// js_div.h.
//
// Two families, as for kl_div. Both sides in logits: SIMD in float (double for double inputs), half types widened in
// registers, memory read once. Everything else, and the double backward: SIMD in double for all types.
#include "js_div/js_div.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "core/phi.h"
#include "core/row_kernels.h"
#include "core/vec_log.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

template <class A>
TD_INLINE Vec<A> expm1_small(Vec<A> x) {
  const Vec<A> minus_x = Vec<A>(A(0)) - x;
  const auto fma = [](Vec<A> a, Vec<A> b, Vec<A> c) __attribute__((always_inline)) { return fmadd(a, b, c); };
  return fmadd(x * x, phi_over_square<A>(minus_x, fma), x);
}
template <class A>
TD_INLINE auto is_small(Vec<A> x) {
  return less(x.abs(), Vec<A>(A(0.5)));
}

template <class A>
struct Centre {
  Vec<A> own, other, weight, scale, e_k, inv_g, ratio;

  TD_INLINE explicit Centre(const JsCentre& c)
      : own(static_cast<A>(c.own)),
        other(static_cast<A>(c.other)),
        weight(static_cast<A>(c.weight())),
        scale(static_cast<A>(c.scale())),
        e_k(static_cast<A>(c.e_k)),
        inv_g(static_cast<A>(1 / c.g)),
        ratio(static_cast<A>(c.ratio)) {}
  // The argument of -log that gives the ratio less its centre's is (own + other e) inv_g, and this is that less 1; e =
  // e^l, u = l - k.
  TD_INLINE Vec<A> argument_minus_1(Vec<A> e, Vec<A> u) const {
    return select(is_small(u), weight * expm1_small(u), (e - e_k) * scale);
  }
};

// The exponential of a class and what its logarithm needs of it.
template <class A>
struct Begun {
  Vec<A> l, e, argument_minus_1;
};
// sigma, rho and the scaled term of a class.
template <class A>
struct Terms {
  Vec<A> sigma, rho, term;
  Vec<A> from_centre;  // rho less the centre's
  Vec<A> gap;          // q - p, as l has it
};

// In two steps: the chain of operations from l to the term is longer than what a processor looks ahead.
template <class A>
struct Mixture {
  using V = Vec<A>;
  V beta, rest, inv_both, turn;
  V series[JsSeries::kTerms];

  TD_INLINE explicit Mixture(double b)
      : beta(static_cast<A>(b)),
        rest(static_cast<A>(1 - b)),
        inv_both(static_cast<A>(1 / (b * (1 - b)))),
        turn(static_cast<A>(js_turn(b))) {
    const JsSeries s(b);
    for (int k = 0; k < JsSeries::kTerms; ++k) series[k] = V(static_cast<A>(s.c[k]));
  }

  // l finite or NaN, u = l less that of Q's centre. e = e^l, or e^-l where l is above its turn; there the argument of
  // the logarithm is nowhere near 1.
  TD_INLINE Begun<A> begin(V l, V u, const Centre<A>& centre) const {
    const auto turned = less(turn, l);
    const V e = exp_of<true>(select(turned, V(A(0)) - l, l));
    return {l, e, select(turned, V(A(-1)), centre.argument_minus_1(e, u))};
  }
  TD_INLINE Terms<A> finish(const Begun<A>& begun, V p, V q, const Centre<A>& centre) const {
    const V zero(A(0)), l = begun.l;
    const auto turned = less(turn, l);
    // base e^down is the other side's probability, base mass that of m.
    const V base = select(turned, p, q), down = select(turned, zero - l, l);
    const V of_other = select(turned, rest, beta) * begun.e, mass = of_other + select(turned, beta, rest);
    const V minus_log = zero - log_of(select(turned, mass, mass * centre.inv_g), begun.argument_minus_1);
    const V ratio = select(turned, minus_log, minus_log + centre.ratio);
    Terms<A> y;
    y.from_centre = select(turned, minus_log - (l + centre.ratio), minus_log);
    y.rho = select(turned, minus_log - l, ratio);
    y.sigma = select(turned, minus_log, ratio + l);
    V s = series[JsSeries::kTerms - 1];
    for (int k = JsSeries::kTerms - 2; k >= 0; --k) s = fmadd(s, l, series[k]);
    const V closed = fmadd(mass, ratio * inv_both, of_other * inv_both * down);
    y.term = base * select(less(l.abs(), V(static_cast<A>(JsSeries::reach<A>()))), l * l * s, closed);
    const V growth = select(is_small(l), expm1_small(down), begun.e - V(A(1)));
    y.gap = base * select(turned, growth, zero - growth);
    return y;
  }

  // sigma less that of P's centre, from rho: its own logarithm where l > 0.
  TD_INLINE V sigma_from_centre(V l, V u, V rho, const Centre<A>& centre) const {
    const V zero(A(0)), down = min_of(zero - l, zero), e = exp_of<true>(down);
    const V minus_log =
        zero - log_of(fmadd(centre.other, e, centre.own) * centre.inv_g, centre.argument_minus_1(e, zero - u));
    return select(less(zero, l), minus_log, (l + rho) - centre.ratio);
  }
};

// Around l = 0, in double.
struct PlainMixture : Mixture<double> {
  Centre<double> zero;
  TD_INLINE explicit PlainMixture(double b) : Mixture<double>(b), zero(JsCentre::of_q(b, 0)) {}
  TD_INLINE Terms<double> operator()(D l, D p, D q) const { return finish(begin(l, l, zero), p, q, zero); }
};

// Both probabilities and l of some classes, whatever they are given in. In double.
struct Sides {
  Side p_side, q_side;
  Split<double> difference;
  D inv_t;
  bool from_logits;

  Sides(const JsDivRows& rows, const JsDivStat& stat)
      : p_side(rows.p, rows.p_space, rows.temperature, stat.lse_p, stat.lse_p_lo),
        q_side(rows.q, rows.q_space, rows.temperature, stat.lse_q, stat.lse_q_lo),
        difference(stat.difference().sum, stat.difference().error),
        inv_t(1 / rows.temperature),
        from_logits(rows.from_logits()) {}

  template <class Count>
  TD_INLINE void read(const void* x, const void* y, int64_t i, Count count, D& p, D& q, D& l) const {
    D log_p, log_q;
    p_side.read(x, i, count, p, log_p);
    q_side.read(y, i, count, q, log_q);
    const D zero(0.0), far(kJsNone), top(kInf<double>), bottom(-kInf<double>);
    const D plain = log_ratio(p_side, q_side, p, q, log_p, log_q);
    l = plain;
    if (from_logits)
      l = difference_minus(load_any(x, p_side.type, i, count, 0.0), load_any(y, q_side.type, i, count, 0.0),
                           difference) *
          inv_t;
    // One side without mass: beyond +-800 the other's share of m is 0, and the formulas are finite. Both: no class.
    l = select(plain == top, far, select(plain == bottom, zero - far, l));
    l = select((p == zero) & (q == zero), zero, l);
  }
};

// Sums over a row, in a fixed order. From logits, those of sigma and rho are around their centres.
struct Sums {
  double term = 0, p_sigma = 0, q_rho = 0, gap = 0;
  void add(const Sums& other) { term += other.term, p_sigma += other.p_sigma, q_rho += other.q_rho, gap += other.gap; }
  void finish(const JsDivRows& rows, JsDivStat& stat) const {
    stat.mean_p = p_sigma, stat.mean_q = q_rho, stat.js = rows.unit() * term;
  }
};

// -- Both sides in logits -------------------------------------------------------------------------------------------

// Exponentials of one row, e^((x - max)/T) with the maximum so far of each chunk.
template <class A>
struct Kept {
  A* exps;
  double* max;
};

// Exponentials of one chunk and their sum. Not kMasked: the caller hopes for numbers within 1e5 T of the maximum, and
// finds a sum that is not finite where there is something else.
template <class A, bool kMasked, class T>
TD_INLINE double exp_chunk(const T* x, int64_t n, double max_, double inv_t_, A* exps) {
  const Vec<A> inv_t(static_cast<A>(inv_t_)), max(static_cast<A>(finite_or_zero(max_)));
  double total = 0;
  for (int64_t b = 0; b < n; b += kBlock) {
    Vec<A> sum(A(0));
    for_lanes<A>(
        std::min(kBlock, n - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
          constexpr bool kTail = std::is_same_v<decltype(count), int>;
          // The next chunk comes from memory meanwhile; beyond the row is the next one.
          __builtin_prefetch(x + b + i + kChunk);
          const Vec<A> e = exp_of < !kMasked && !kTail > ((load_lanes<A>(x + b + i, count, -kInf<A>) - max) * inv_t);
          sum = sum + e;
          store_lanes<A>(exps + b + i, e, count);
        });
    total += sum_of(sum);
  }
  return total;
}

template <class A, class T>
LseScan scan_columns(const T* x, int64_t first, int64_t last, double inv_t, const Kept<A>& kept) {
  LseScan scan;
  for (int64_t c = first; c < last; c += kChunk) {
    const int64_t n = std::min(kChunk, last - c);
    scan.raise(max_of_row<A>(x + c, n), inv_t);
    kept.max[c / kChunk] = scan.max;
    double sum = exp_chunk<A, false>(x + c, n, scan.max, inv_t, kept.exps + c);
    if (!std::isfinite(sum)) sum = exp_chunk<A, true>(x + c, n, scan.max, inv_t, kept.exps + c);
    scan.sum += sum;
  }
  return scan;
}

// l of some classes from their logits, and what it is more than at the centres. Below its floor a class has no mass
// that the arithmetic can tell from 0: moved up to it, l stays finite.
template <class A>
struct LogRatio {
  Split<A> difference, difference_p, difference_q;
  Vec<A> floor_p, floor_q, inv_t;

  TD_INLINE LogRatio(const JsDivStat& stat, const JsCentres& at, double inv_t_)
      : difference(at.difference.sum, at.difference.error),
        difference_p(at.difference_p.sum, at.difference_p.error),
        difference_q(at.difference_q.sum, at.difference_q.error),
        floor_p(static_cast<A>(stat.lse_p - kJsFar<A> / inv_t_)),
        floor_q(static_cast<A>(stat.lse_q - kJsFar<A> / inv_t_)),
        inv_t(static_cast<A>(inv_t_)) {}

  struct Logits {
    Vec<A> t, s;
  };
  TD_INLINE Logits raised(Vec<A> t, Vec<A> s) const { return {max_of(t, floor_p), max_of(s, floor_q)}; }
  TD_INLINE Vec<A> l(const Logits& x) const { return difference_minus(x.t, x.s, difference) * inv_t; }
  TD_INLINE Vec<A> from_p(const Logits& x) const { return difference_minus(x.t, x.s, difference_p) * inv_t; }
  TD_INLINE Vec<A> from_q(const Logits& x) const { return difference_minus(x.t, x.s, difference_q) * inv_t; }
};

// A row's constants: where its logarithms are centred.
template <class A>
struct Centred {
  LogRatio<A> ratio;
  Centre<A> p, q;
  TD_INLINE Centred(const JsDivRows& rows, const JsDivStat& stat, double inv_t)
      : Centred(rows.beta, stat, JsCentres(stat, inv_t), inv_t) {}

 private:
  TD_INLINE Centred(double beta, const JsDivStat& stat, const JsCentres& at, double inv_t)
      : ratio(stat, at, inv_t), p(JsCentre::of_p(beta, at.l_p)), q(JsCentre::of_q(beta, at.l_q)) {}
};

// Sums over a part of a row. kP, kQ: the means of sigma and rho are wanted; with kAside, p sigma or q rho (kQ) around
// the centre is left there for the gradient.
template <class A, bool kP, bool kQ, bool kAside, class TP, class TQ>
Sums mixed_columns(const JsDivRows& rows, const TP* p, const TQ* q, int64_t first, int64_t last, double inv_t,
                   const Mixture<A>& mixture, const JsDivStat& stat, const Kept<A>& kept_p, const Kept<A>& kept_q,
                   A* aside) {
  const Centred<A> centred(rows, stat, inv_t);
  A waiting[kP ? 4 : 3][kBlock];
  Sums sums;
  for (int64_t c = first; c < last; c += kBlock) {
    const int64_t chunk = c / kChunk;
    const Vec<A> to_p(static_cast<A>(kept_factor(kept_p.max[chunk], stat.lse_p + stat.lse_p_lo, inv_t))),
        to_q(static_cast<A>(kept_factor(kept_q.max[chunk], stat.lse_q + stat.lse_q_lo, inv_t)));
    Vec<A> term(A(0)), p_sigma(A(0)), q_rho(A(0));
    const int64_t n = std::min(kBlock, last - c);
    for_lanes<A>(
        n, [&](int64_t i, auto count) __attribute__((always_inline)) {
          const auto at =
              centred.ratio.raised(load_lanes<A>(p + c + i, count, A(0)), load_lanes<A>(q + c + i, count, A(0)));
          const auto begun = mixture.begin(centred.ratio.l(at), centred.ratio.from_q(at), centred.q);
          begun.l.store(waiting[0] + i), begun.e.store(waiting[1] + i), begun.argument_minus_1.store(waiting[2] + i);
          if constexpr (kP) centred.ratio.from_p(at).store(waiting[3] + i);
        });
    for_lanes<A>(
        n, [&](int64_t i, auto count) __attribute__((always_inline)) {
          const Vec<A> x = load_lanes<A>(kept_p.exps + c + i, count, A(0)) * to_p,
                       y = load_lanes<A>(kept_q.exps + c + i, count, A(0)) * to_q;
          const Begun<A> begun{load<A>(waiting[0] + i), load<A>(waiting[1] + i), load<A>(waiting[2] + i)};
          const auto terms = mixture.finish(begun, x, y, centred.q);
          term = term + terms.term;
          if constexpr (kP) {
            const Vec<A> of_p = x * mixture.sigma_from_centre(begun.l, load<A>(waiting[3] + i), terms.rho, centred.p);
            p_sigma = p_sigma + of_p;
            if constexpr (kAside && !kQ) store_lanes<A>(aside + c + i, of_p, count);
          }
          if constexpr (kQ) {
            const Vec<A> of_q = y * terms.from_centre;
            q_rho = q_rho + of_q;
            if constexpr (kAside) store_lanes<A>(aside + c + i, of_q, count);
          }
        });
    sums.add({sum_of(term), sum_of(p_sigma), sum_of(q_rho), 0});
  }
  return sums;
}

// sum q - p, as l has it.
template <class A, class TP, class TQ>
double gap_of_columns(const JsDivRows& rows, const TP* p, const TQ* q, int64_t first, int64_t last, double inv_t,
                      const Mixture<A>& mixture, const JsDivStat& stat) {
  const Centred<A> centred(rows, stat, inv_t);
  const ExpFrom<A> prob_p(stat.lse_p + stat.lse_p_lo, inv_t), prob_q(stat.lse_q + stat.lse_q_lo, inv_t);
  double sum = 0;
  for (int64_t c = first; c < last; c += kBlock) {
    Vec<A> gap(A(0));
    for_lanes<A>(
        std::min(kBlock, last - c), [&](int64_t i, auto count) __attribute__((always_inline)) {
          const Vec<A> t = load_lanes<A>(p + c + i, count, -kInf<A>), s = load_lanes<A>(q + c + i, count, -kInf<A>);
          const auto at = centred.ratio.raised(t, s);
          const auto begun = mixture.begin(centred.ratio.l(at), centred.ratio.from_q(at), centred.q);
          gap = gap + mixture.finish(begun, prob_p(t), prob_q(s), centred.q).gap;
        });
    sum += sum_of(gap);
  }
  return sum;
}

// The statistics of one row, and with kAside what its gradient needs.
template <class A, bool kP, bool kQ, bool kAside, class TP, class TQ>
JsDivStat logits_row(const JsDivRows& rows, const TP* p, const TQ* q, ForEach columns, const Mixture<A>& mixture,
                     const Kept<A>& kept_p, const Kept<A>& kept_q, A* aside) {
  const double inv_t = inverse_temperature<A>(rows.temperature), t = 1 / inv_t;
  JsDivStat stat{};
  const auto lse = [&](const auto* x, const Kept<A>& kept, double& sum, double& error, int64_t& top) {
    const auto scan = merged_segments<LseScan>(
        rows.classes, columns,
        [&](int64_t first, int64_t last) { return scan_columns<A>(x, first, last, inv_t, kept); },
        [&](LseScan& whole, const LseScan& part) { whole.merge(part, inv_t); });
    if (!(scan.sum > 0) || std::isinf(scan.max)) return false;
    const ExactSum exact = two_sum(scan.max, t * std::log(scan.sum));
    sum = exact.sum, error = exact.error;
    top = top_class<A>(x, rows.classes, scan.max, kept.max);
    return true;
  };
  int64_t top_p = 0, top_q = 0;
  if (!lse(p, kept_p, stat.lse_p, stat.lse_p_lo, top_p) || !lse(q, kept_q, stat.lse_q, stat.lse_q_lo, top_q))
    return JsDivStat::nan();
  {
    const LogRatio<A> ratio(stat, JsCentres(stat, inv_t), inv_t);
    const auto difference = [&](int64_t at) {
      A lanes[2][kLanes<A>];
      const auto x = ratio.raised(Vec<A>(static_cast<A>(p[at])), Vec<A>(static_cast<A>(q[at])));
      x.t.store(lanes[0]), x.s.store(lanes[1]);
      return static_cast<double>(lanes[0][0]) - static_cast<double>(lanes[1][0]);
    };
    stat.top_p = difference(top_p), stat.top_q = difference(top_q);
  }
  const auto pass = [&] {
    return merged_segments<Sums>(
        rows.classes, columns,
        [&](int64_t first, int64_t last) {
          return mixed_columns<A, kP, kQ, kAside>(rows, p, q, first, last, inv_t, mixture, stat, kept_p, kept_q, aside);
        },
        [](Sums& total, const Sums& part) { total.add(part); });
  };
  Sums sums = pass();
  if (sums.term < kJsNear) {
    const double gap = merged_segments<double>(
        rows.classes, columns,
        [&](int64_t first, int64_t last) { return gap_of_columns<A>(rows, p, q, first, last, inv_t, mixture, stat); },
        [](double& total, double part) { total += part; });
    stat.lse_q_lo += t * std::log1p(gap);
    sums = pass();
  }
  sums.finish(rows, stat);
  return stat;
}

// Gradients of a part of a row from its statistics alone: P's, Q's or both.
template <class A, bool kP, bool kQ, class TP, class TQ>
void logits_gradient(const JsDivRows& rows, const TP* p, const TQ* q, TP* grad_p, TQ* grad_q, int64_t first,
                     int64_t last, const Mixture<A>& mixture, const JsDivStat& stat, double coefficient) {
  const double inv_t = inverse_temperature<A>(rows.temperature);
  const JsWeights weights(rows, coefficient * inv_t);
  const Vec<A> c_p(static_cast<A>(weights.p)), c_q(static_cast<A>(weights.q)), mean_p(static_cast<A>(stat.mean_p)),
      mean_q(static_cast<A>(stat.mean_q));
  const Centred<A> centred(rows, stat, inv_t);
  const ExpFrom<A> prob_p(stat.lse_p + stat.lse_p_lo, inv_t), prob_q(stat.lse_q + stat.lse_q_lo, inv_t);
  for_lanes<A>(
      last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
        const int64_t i = first + j;
        const Vec<A> t = load_lanes<A>(p + i, count, A(0)), s = load_lanes<A>(q + i, count, A(0));
        const Vec<A> x = prob_p(t), y = prob_q(s);
        const auto at = centred.ratio.raised(t, s);
        const Vec<A> l = centred.ratio.l(at);
        const auto terms = mixture.finish(mixture.begin(l, centred.ratio.from_q(at), centred.q), x, y, centred.q);
        // Written last: either may be the storage of its own side.
        if constexpr (kP) {
          const Vec<A> sigma = mixture.sigma_from_centre(l, centred.ratio.from_p(at), terms.rho, centred.p);
          store_lanes<A>(grad_p + i, c_p * x * (sigma - mean_p), count);
        }
        if constexpr (kQ) store_lanes<A>(grad_q + i, c_q * y * (terms.from_centre - mean_q), count);
      });
}

// A thread's room for one row: the exponentials of both sides, and where asked for as much as one of them again.
template <class A>
struct Scratch {
  std::unique_ptr<A[]> exps;
  std::unique_ptr<double[]> maxima;
  int64_t classes, chunks;

  Scratch(int64_t classes_, bool aside)
      : exps(std::make_unique_for_overwrite<A[]>(static_cast<size_t>((aside ? 3 : 2) * classes_))),
        maxima(std::make_unique_for_overwrite<double[]>(static_cast<size_t>(2 * ((classes_ + kChunk - 1) / kChunk)))),
        classes(classes_),
        chunks((classes_ + kChunk - 1) / kChunk) {}
  Kept<A> p() const { return {exps.get(), maxima.get()}; }
  Kept<A> q() const { return {exps.get() + classes, maxima.get() + chunks}; }
};

template <class A, class TP, class TQ>
void forward_logits(const JsDivForward& k, int64_t begin, int64_t end, ForEach columns) {
  const Scratch<A> scratch(k.rows.classes, false);
  const Mixture<A> mixture(k.rows.beta);
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {{}};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const*) {
    const double weight = k.weight ? k.weight[i] : 1;
    JsDivStat stat{};
    if (weight != 0)
      stat = logits_row<A, true, true, false>(k.rows, static_cast<const TP*>(x[0]), static_cast<const TQ*>(x[1]),
                                              columns, mixture, scratch.p(), scratch.q(), static_cast<A*>(nullptr));
    stat.store(k.stat + JsDivStat::kSize * i);
    store_loss(k, i, weight != 0 ? weight * stat.js : 0);
  });
}

template <class A, class TP, class TQ>
void backward_logits(const JsDivBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const Mixture<A> mixture(k.rows.beta);
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad_p, k.grad_q};
  const auto gradient = k.grad_p.data && k.grad_q.data ? &logits_gradient<A, true, true, TP, TQ>
                        : k.grad_p.data                ? &logits_gradient<A, true, false, TP, TQ>
                                                       : &logits_gradient<A, false, true, TP, TQ>;
  RowTiles<2, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    auto* grad_p = static_cast<TP*>(y[0]);
    auto* grad_q = static_cast<TQ*>(y[1]);
    if (k.coefficient[i] == 0) {
      if (grad_p) fill_zero(grad_p, k.rows.classes);
      if (grad_q) fill_zero(grad_q, k.rows.classes);
      return;
    }
    const auto stat = JsDivStat::load(k.stat + JsDivStat::kSize * i);
    for_segments(k.rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
      gradient(k.rows, static_cast<const TP*>(x[0]), static_cast<const TQ*>(x[1]), grad_p, grad_q, first, last, mixture,
               stat, k.coefficient[i]);
    });
  });
}

// kQ: the gradient of Q, else that of P; its side has type A. Until its mean is known, what the gradient needs waits in
// `aside`: grad itself, unless that is an input's row.
template <class A, bool kQ, class TP, class TQ>
JsDivStat value_and_grad_row(const JsDivRows& rows, const TP* p, const TQ* q, A* grad, A* aside, double coefficient,
                             ForEach columns, const Mixture<A>& mixture, const Kept<A>& kept_p, const Kept<A>& kept_q) {
  const JsDivStat stat = logits_row<A, !kQ, kQ, true>(rows, p, q, columns, mixture, kept_p, kept_q, aside);
  if (std::isnan(stat.js)) {
    std::fill_n(grad, rows.classes, std::numeric_limits<A>::quiet_NaN());
    return stat;
  }
  const double inv_t = inverse_temperature<A>(rows.temperature);
  const JsWeights weights(rows, coefficient * inv_t);
  const Vec<A> c(static_cast<A>(kQ ? weights.q : weights.p)), mean(static_cast<A>(kQ ? stat.mean_q : stat.mean_p));
  const double lse = kQ ? stat.lse_q + stat.lse_q_lo : stat.lse_p + stat.lse_p_lo;
  const Kept<A>& kept = kQ ? kept_q : kept_p;
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t b = first; b < last; b += kChunk) {
      const Vec<A> share(static_cast<A>(kept_factor(kept.max[b / kChunk], lse, inv_t)));
      for_lanes<A>(
          std::min(kChunk, last - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
            const Vec<A> prob = load_lanes<A>(kept.exps + b + i, count, A(0)) * share;
            store_lanes<A>(grad + b + i, c * (load_lanes<A>(aside + b + i, count, A(0)) - prob * mean), count);
          });
    }
  });
  return stat;
}

template <class A, class TP, class TQ>
void value_and_grad_logits(const JsDivValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  const int64_t n = k.rows.classes;
  const bool over_input = k.grad.data == (k.wrt_q ? k.rows.q : k.rows.p).data;
  const Scratch<A> scratch(n, over_input);
  const Mixture<A> mixture(k.rows.beta);
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad};
  RowTiles<2, 1>(in, out, n).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    auto* grad = static_cast<A*>(y[0]);
    const double coefficient = k.scale * (k.weight ? k.weight[i] : 1);
    JsDivStat stat{};
    if (coefficient == 0) {
      fill_zero(grad, n);
    } else {
      A* const aside = over_input ? scratch.exps.get() + 2 * n : grad;
      const auto* p = static_cast<const TP*>(x[0]);
      const auto* q = static_cast<const TQ*>(x[1]);
      if constexpr (std::is_same_v<TQ, A>)
        if (k.wrt_q)
          stat = value_and_grad_row<A, true>(k.rows, p, q, grad, aside, coefficient, columns, mixture, scratch.p(),
                                             scratch.q());
      if constexpr (std::is_same_v<TP, A>)
        if (!k.wrt_q)
          stat = value_and_grad_row<A, false>(k.rows, p, q, grad, aside, coefficient, columns, mixture, scratch.p(),
                                              scratch.q());
    }
    stat.store(k.stat + JsDivStat::kSize * i);
  });
}

// -- Any space, in double -------------------------------------------------------------------------------------------

JsDivStat any_row(const JsDivRows& rows, const void* p, const void* q, ForEach columns) {
  JsDivStat stat{};
  stat.top_p = -std::numeric_limits<double>::infinity(), stat.top_q = -stat.top_p;  // not centred
  const auto lse = [&](const void* x, const RowsIn& side, double& sum, double& error) {
    const ExactSum exact = any_lse(x, side, rows.classes, rows.temperature, columns);
    sum = exact.sum, error = exact.error;
  };
  if (rows.p_space == kLogits) lse(p, rows.p, stat.lse_p, stat.lse_p_lo);
  if (rows.q_space == kLogits) lse(q, rows.q, stat.lse_q, stat.lse_q_lo);
  const PlainMixture mixture(rows.beta);
  const auto pass = [&] {
    const Sides sides(rows, stat);
    return merged_segments<Sums>(
        rows.classes, columns,
        [&](int64_t first, int64_t last) {
          Sums sums;
          for (int64_t c = first; c < last; c += kChunk) {
            D term(0.0), p_sigma(0.0), q_rho(0.0), gap(0.0);
            for_lanes<double>(
                std::min(kChunk, last - c), [&](int64_t i, auto count) __attribute__((always_inline)) {
                  D x, y, l;
                  sides.read(p, q, c + i, count, x, y, l);
                  const auto terms = mixture(l, x, y);
                  term = term + terms.term, gap = gap + terms.gap;
                  p_sigma = p_sigma + x * terms.sigma, q_rho = q_rho + y * terms.rho;
                });
            sums.add({sum_of(term), sum_of(p_sigma), sum_of(q_rho), sum_of(gap)});
          }
          return sums;
        },
        [](Sums& total, const Sums& part) { total.add(part); });
  };
  Sums sums = pass();
  if (rows.from_logits() && sums.term < kJsNear) {
    stat.lse_q_lo += rows.temperature * std::log1p(sums.gap);
    sums = pass();
  }
  sums.finish(rows, stat);
  return stat;
}

// A side's gradient of the scaled divergence but for 1/(1 - b) or 1/b; ratio is sigma or rho.
TD_INLINE D any_entry(const Side& side, D prob, D ratio, double mean) {
  const D zero(0.0);
  const D g = side.space == kProbs      ? ratio
              : side.space == kLogProbs ? prob * ratio
                                        : prob * (ratio - D(mean)) * side.inv_t;
  return select(prob == zero, zero, g);
}

void any_gradient(const JsDivRows& rows, const void* p, const void* q, const RowsOut& out_p, void* grad_p,
                  const RowsOut& out_q, void* grad_q, const JsDivStat& stat, double coefficient, ForEach columns) {
  if (coefficient == 0) {
    fill_zero_any(grad_p, out_p.dtype, rows.classes);
    fill_zero_any(grad_q, out_q.dtype, rows.classes);
    return;
  }
  const Sides sides(rows, stat);
  const PlainMixture mixture(rows.beta);
  const JsWeights weights(rows, coefficient);
  const D c_p(weights.p), c_q(weights.q);
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    for_lanes<double>(
        last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
          const int64_t i = first + j;
          D x, y, l;
          sides.read(p, q, i, count, x, y, l);
          const auto terms = mixture(l, x, y);
          // Read before either is written: it may be the storage of its own side.
          if (grad_p != nullptr)
            store_any(grad_p, out_p.dtype, i, c_p * any_entry(sides.p_side, x, terms.sigma, stat.mean_p), count);
          if (grad_q != nullptr)
            store_any(grad_q, out_q.dtype, i, c_q * any_entry(sides.q_side, y, terms.rho, stat.mean_q), count);
        });
  });
}

void forward_any(const JsDivForward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {{}};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const*) {
    const double weight = k.weight ? k.weight[i] : 1;
    JsDivStat stat{};
    if (weight != 0) stat = any_row(k.rows, x[0], x[1], columns);
    stat.store(k.stat + JsDivStat::kSize * i);
    store_loss(k, i, weight != 0 ? weight * stat.js : 0);
  });
}

void backward_any(const JsDivBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad_p, k.grad_q};
  RowTiles<2, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    any_gradient(k.rows, x[0], x[1], k.grad_p, y[0], k.grad_q, y[1], JsDivStat::load(k.stat + JsDivStat::kSize * i),
                 k.coefficient[i], columns);
  });
}

void value_and_grad_any(const JsDivValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad};
  const RowsOut unwanted{};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    const double coefficient = k.scale * (k.weight ? k.weight[i] : 1);
    JsDivStat stat{};
    if (coefficient != 0) stat = any_row(k.rows, x[0], x[1], columns);
    stat.store(k.stat + JsDivStat::kSize * i);
    if (k.wrt_q) {
      any_gradient(k.rows, x[0], x[1], unwanted, nullptr, k.grad, y[0], stat, coefficient, columns);
    } else {
      any_gradient(k.rows, x[0], x[1], k.grad, y[0], unwanted, nullptr, stat, coefficient, columns);
    }
  });
}

// <prob, v> as hi + lo, to twice double's precision: where one class has nearly all of the mass, v less its mean is as
// small there as the rest of the mass.
struct Direction {
  double hi, lo;
};
// The derivatives of a side's probability and log-probability along v.
TD_INLINE void differentiate(const Side& side, D prob, D v, const Direction& mean, D& log_dot, D& dot) {
  const D zero(0.0), none = prob == zero;
  log_dot = side.space == kLogits ? ((v - D(mean.hi)) - D(mean.lo)) * side.inv_t : side.space == kProbs ? v / prob : v;
  log_dot = select(none, zero, log_dot);
  dot = side.space == kProbs ? v : prob * log_dot;
}
// The derivative of any_entry; from logits ratio is less its mean. Where prob = 0, that is constantly 0 by convention,
// and so is its derivative.
TD_INLINE D entry_dot(const Side& side, D prob, D dot, D ratio, D ratio_dot, double mean_dot) {
  const D zero(0.0);
  const D g = side.space == kProbs      ? ratio_dot
              : side.space == kLogProbs ? dot * ratio + prob * ratio_dot
                                        : (dot * ratio + prob * (ratio_dot - D(mean_dot))) * side.inv_t;
  return select(prob == zero, zero, g);
}

void double_backward_row(const JsDivDoubleBackward& k, int64_t row, const void* const* in, void* const* out,
                         ForEach columns) {
  const JsDivRows& rows = k.rows;
  const JsDivStat stat = JsDivStat::load(k.stat + JsDivStat::kSize * row);
  const double coefficient = k.coefficient[row];
  const Sides sides(rows, stat);
  const Side &p_side = sides.p_side, &q_side = sides.q_side;
  const PlainMixture mixture(rows.beta);
  const Centred<double> centred(rows, stat, 1 / rows.temperature);
  const D zero(0.0), one(1.0);
  // sigma and rho are less those of their centres.
  struct Ratios {
    D sigma, rho;
  };
  const auto read = [&](int64_t i, auto count, D& p, D& q, D& v_p, D& v_q) __attribute__((always_inline)) {
    D l;
    sides.read(in[0], in[1], i, count, p, q, l);
    v_p = in[2] ? load_any(in[2], k.v_p.dtype, i, count, 0.0) : zero;
    v_q = in[3] ? load_any(in[3], k.v_q.dtype, i, count, 0.0) : zero;
    D from_p = l, from_q = l;
    if (sides.from_logits) {
      const LogRatio<double>::Logits at{load_any(in[0], p_side.type, i, count, 0.0),
                                        load_any(in[1], q_side.type, i, count, 0.0)};
      from_p = centred.ratio.from_p(at), from_q = centred.ratio.from_q(at);
    }
    const auto terms = mixture.finish(mixture.begin(l, from_q, centred.q), p, q, centred.q);
    return Ratios{mixture.sigma_from_centre(l, from_p, terms.rho, centred.p), terms.from_centre};
  };
  const Pair means = sum_columns(
      rows.classes, columns, [&](int64_t i, auto count, D& a, D& b) __attribute__((always_inline)) {
        D p, q, v_p, v_q;
        read(i, count, p, q, v_p, v_q);
        a = a + select(v_p == zero, zero, p * v_p);
        b = b + select(v_q == zero, zero, q * v_q);
      });
  const Pair rests = sum_columns(
      rows.classes, columns, [&](int64_t i, auto count, D& a, D& b) __attribute__((always_inline)) {
        D p, q, v_p, v_q;
        read(i, count, p, q, v_p, v_q);
        a = a + select(p == zero, zero, p * (v_p - D(means.a)));
        b = b + select(q == zero, zero, q * (v_q - D(means.b)));
      });
  const Direction mean_p{means.a, rests.a}, mean_q{means.b, rests.b};
  const JsWeights weights(rows, coefficient), unit(rows, 1);
  const Pair dots = sum_columns(
      rows.classes, columns, [&](int64_t i, auto count, D& a, D& b) __attribute__((always_inline)) {
        D p, q, v_p, v_q;
        const auto terms = read(i, count, p, q, v_p, v_q);
        a = a + select(v_p == zero, zero, v_p * any_entry(p_side, p, terms.sigma, stat.mean_p));
        b = b + select(v_q == zero, zero, v_q * any_entry(q_side, q, terms.rho, stat.mean_q));
      });
  if (k.d_coefficient != nullptr) k.d_coefficient[row] = unit.p * dots.a + unit.q * dots.b;
  if (coefficient == 0) {
    fill_zero_any(out[0], k.d_p.dtype, rows.classes);
    fill_zero_any(out[1], k.d_q.dtype, rows.classes);
    return;
  }
  if (out[0] == nullptr && out[1] == nullptr) return;
  // sigma and rho, from logits less their means, with their derivatives, and those of the probabilities.
  struct Dots {
    D p, q, sigma, rho, p_dot, q_dot, sigma_dot, rho_dot;
  };
  const auto dots_of = [&](int64_t i, auto count) __attribute__((always_inline)) {
    D v_p, v_q, log_p_dot, log_q_dot;
    Dots y;
    const auto terms = read(i, count, y.p, y.q, v_p, v_q);
    differentiate(p_side, y.p, v_p, mean_p, log_p_dot, y.p_dot);
    differentiate(q_side, y.q, v_q, mean_q, log_q_dot, y.q_dot);
    const D mass = mixture.beta * y.p + mixture.rest * y.q, inv_m = one / select(mass == zero, one, mass);
    y.sigma = p_side.space == kLogits ? terms.sigma - D(stat.mean_p) : terms.sigma;
    y.rho = q_side.space == kLogits ? terms.rho - D(stat.mean_q) : terms.rho;
    y.sigma_dot = mixture.rest * (y.q * log_p_dot - y.q_dot) * inv_m;
    y.rho_dot = mixture.beta * (y.p * log_q_dot - y.p_dot) * inv_m;
    return y;
  };
  const Pair mean_dots = sum_columns(
      rows.classes, columns, [&](int64_t i, auto count, D& a, D& b) __attribute__((always_inline)) {
        const auto y = dots_of(i, count);
        a = a + select(y.p == zero, zero, y.p_dot * y.sigma + y.p * y.sigma_dot);
        b = b + select(y.q == zero, zero, y.q_dot * y.rho + y.q * y.rho_dot);
      });
  const D c_p(weights.p), c_q(weights.q);
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    for_lanes<double>(
        last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
          const int64_t i = first + j;
          const auto y = dots_of(i, count);
          if (out[0] != nullptr)
            store_any(out[0], k.d_p.dtype, i, c_p * entry_dot(p_side, y.p, y.p_dot, y.sigma, y.sigma_dot, mean_dots.a),
                      count);
          if (out[1] != nullptr)
            store_any(out[1], k.d_q.dtype, i, c_q * entry_dot(q_side, y.q, y.q_dot, y.rho, y.rho_dot, mean_dots.b),
                      count);
        });
  });
}

}  // namespace

void js_div_forward(const JsDivForward& k, int64_t begin, int64_t end, ForEach columns) {
  if (!k.rows.by_logits()) return forward_any(k, begin, end, columns);
  dispatch_types(k.rows, [&]<class A, class TP, class TQ>() { forward_logits<A, TP, TQ>(k, begin, end, columns); });
}

void js_div_backward(const JsDivBackward& k, int64_t begin, int64_t end, ForEach columns) {
  if (!k.rows.by_logits()) return backward_any(k, begin, end, columns);
  dispatch_types(k.rows, [&]<class A, class TP, class TQ>() { backward_logits<A, TP, TQ>(k, begin, end, columns); });
}

void js_div_value_and_grad(const JsDivValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  if (!k.rows.by_logits()) return value_and_grad_any(k, begin, end, columns);
  dispatch_types(k.rows,
                 [&]<class A, class TP, class TQ>() { value_and_grad_logits<A, TP, TQ>(k, begin, end, columns); });
}

void js_div_double_backward(const JsDivDoubleBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q, k.v_p, k.v_q};
  const RowsOut out[] = {k.d_p, k.d_q};
  RowTiles<4, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    double_backward_row(k, i, x, y, columns);
  });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
