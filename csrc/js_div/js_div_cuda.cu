// CUDA kernels of the Jensen-Shannon divergence; formulas in js_div.h, teams and rows in core/cuda_rows.cuh.
//
// Two families, as on the CPU. Both sides in logits: a visit of the row for the two logsumexp, one for the value and
// the means, and for a row whose sides are near each other two more, to correct d. Arithmetic on classes is in float
// (double for double), with compensated sums; only what a team's threads leave is merged in double. Everything else,
// and the double backward: double.
#include <algorithm>
#include <limits>

#include "core/cuda_launch.cuh"
#include "core/cuda_row_pair.cuh"
#include "js_div/js_div.h"

namespace torch_divergence::cuda {
namespace {

constexpr int kReductions = 4;

// What a call's beta makes of the formulas. Among a kernel's parameters: there an operand costs no register.
template <class A>
struct Mixture {
  A beta, rest, inv_both, inv_beta, inv_rest, turn;
  A series[JsSeries::kTerms];

  explicit Mixture(double b)
      : beta(static_cast<A>(b)),
        rest(static_cast<A>(1 - b)),
        inv_both(static_cast<A>(1 / (b * (1 - b)))),
        inv_beta(static_cast<A>(1 / b)),
        inv_rest(static_cast<A>(1 / (1 - b))),
        turn(static_cast<A>(js_turn(b))) {
    const JsSeries exact(b);
    std::transform(exact.c, exact.c + JsSeries::kTerms, series, [](double c) { return static_cast<A>(c); });
  }
};
template <class Call, class A>
struct Mixed : Call {
  Mixture<A> mixture;
  explicit Mixed(const Call& call) : Call(call), mixture(call.rows.beta) {}
};

template <class A>
struct Centre {
  A own, other, weight, scale, e_k, inv_g, ratio;

  __device__ explicit Centre(const JsCentre& c)
      : own(static_cast<A>(c.own)),
        other(static_cast<A>(c.other)),
        weight(static_cast<A>(c.weight())),
        scale(static_cast<A>(c.scale())),
        e_k(static_cast<A>(c.e_k)),
        inv_g(static_cast<A>(1 / c.g)),
        ratio(static_cast<A>(c.ratio)) {}
  // The ratio to m less the centre's, from e = e^l and u = l - k.
  __device__ A ratio_from_centre(A e, A u) const {
    const A minus_1 = std::fabs(u) < A(0.5) ? weight * expm1_small(u) : (e - e_k) * scale;
    return -log_of(std::fma(other, e, own) * inv_g, minus_1);
  }
};

// sigma and rho of a class, less those of their centres.
template <class A>
struct Ratios {
  A sigma, rho;
  A e;  // e^l, or e^-l where l is above its turn
};

template <class A>
struct Centres {
  Centre<A> p, q;
  Exp<A> exp{1};

  __device__ Centres(double beta, const JsCentres& at)
      : p(JsCentre::of_p(beta, at.l_p)), q(JsCentre::of_q(beta, at.l_q)) {}
  // l finite or NaN; u_p and u_q: l less that of the centres.
  __device__ __forceinline__ Ratios<A> operator()(const Mixture<A>& m, A l, A u_p, A u_q, bool want_p,
                                                  bool want_q) const {
    Ratios<A> y{};
    const bool turned = l > m.turn;
    y.e = exp.near(turned ? -l : l);
    if (!turned && (want_q || !(l > 0))) y.rho = q.ratio_from_centre(y.e, u_q);
    if (!(l > 0)) {
      y.sigma = (l + (y.rho + q.ratio)) - p.ratio;
    } else if (want_p || turned) {
      y.sigma = p.ratio_from_centre(turned ? y.e : exp.near(-l), -u_p);
    }
    if (turned) y.rho = (y.sigma + p.ratio) - (l + q.ratio);
    return y;
  }
  // The scaled term.
  __device__ __forceinline__ A term(const Mixture<A>& m, A l, A x, A y, const Ratios<A>& r) const {
    if (std::fabs(l) < static_cast<A>(JsSeries::reach<A>())) {
      A s = m.series[JsSeries::kTerms - 1];
#pragma unroll
      for (int k = JsSeries::kTerms - 2; k >= 0; --k) s = std::fma(s, l, m.series[k]);
      return y * (l * l * s);
    }
    if (l > m.turn)
      return x * std::fma(std::fma(m.rest, r.e, m.beta), (r.sigma + p.ratio) * m.inv_both, -(m.inv_beta * r.e * l));
    return y * std::fma(std::fma(m.beta, r.e, m.rest), (r.rho + q.ratio) * m.inv_both, m.inv_rest * r.e * l);
  }
};

// q - p, as l has it.
template <class A>
__device__ A gap(A l, A x, A y) {
  return l > 0 ? x * std::expm1(-l) : -y * std::expm1(l);
}

__device__ JsDivStat no_distribution() {
  const double x = std::numeric_limits<double>::quiet_NaN();
  return {x, x, x, x, x, x, x, x, x};
}

// -- Both sides in logits -------------------------------------------------------------------------------------------

// Both logsumexp of a row, and t - s at the largest class of each side: of several the largest difference.
struct RowTops {
  double max_p = -kInf<double>, max_q = -kInf<double>;
  double sum_p = 0, sum_q = 0;
  double top_p = -kInf<double>, top_q = -kInf<double>;

  __device__ static RowTops load(const double* x) { return {x[0], x[1], x[2], x[3], x[4], x[5]}; }
  __device__ void store(double* x) const {
    x[0] = max_p, x[1] = max_q, x[2] = sum_p, x[3] = sum_q, x[4] = top_p, x[5] = top_q;
  }
};
__device__ RowTops merged(const Team& team, const RowTops& part, double inv_t) {
  double max[2] = {part.max_p, part.max_q}, sum[2] = {part.sum_p, part.sum_q};
  team.max(max);
  const bool has_p = part.max_p == max[0], has_q = part.max_q == max[1];
  if (!has_p) sum[0] *= std::exp((part.max_p - max[0]) * inv_t);
  if (!has_q) sum[1] *= std::exp((part.max_q - max[1]) * inv_t);
  team.sum(sum);
  double top[2] = {has_p ? part.top_p : -kInf<double>, has_q ? part.top_q : -kInf<double>};
  team.max(top);
  return {max[0], max[1], sum[0], sum[1], top[0], top[1]};
}

// One side of a thread's share of it.
template <class A>
class ThreadTop {
 public:
  A max = -kInf<A>, other = 0;  // the other side's logit at the maximum
  Sum<A> sum;

  // prefer(a, b): of equal classes, the other side's logit to keep.
  template <int K, class Prefer>
  __device__ __forceinline__ void add(const A (&v)[K], const A (&others)[K], const Exp<A>& exp, const Prefer& prefer) {
    A top = v[0];
#pragma unroll
    for (int k = 1; k < K; ++k) top = v[k] > top ? v[k] : top;
    if (top >= max) {
      if (max > -kInf<A>) sum *= exp(max - top);
      A at = top > max ? prefer.none : other;
#pragma unroll
      for (int k = 0; k < K; ++k) at = v[k] == top ? prefer(at, others[k]) : at;
      max = top, other = at;
    }
    const A base = max > -kInf<A> ? max : 0;
    A part = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) part += exp(v[k] - base);
    sum.add(part);
  }
};
template <class A>
struct Smaller {
  A none = kInf<A>;
  __device__ A operator()(A a, A b) const { return b < a ? b : a; }
};
template <class A>
struct Larger {
  A none = -kInf<A>;
  __device__ A operator()(A a, A b) const { return b > a ? b : a; }
};

// l of a row's classes from their logits, and what it is more than at the centres.
template <class A>
struct LogRatio {
  Split<A> difference, difference_p, difference_q;
  A floor_p, floor_q, inv_t;
  Centres<A> centres;

  struct At {
    A l, from_p, from_q;
  };

  __device__ LogRatio(double beta, const JsDivStat& stat, double inv)
      : LogRatio(beta, stat, inv, JsCentres(stat, inv)) {}
  __device__ At operator()(A t, A s) const {
    t = t > floor_p ? t : floor_p, s = s > floor_q ? s : floor_q;
    return {difference_minus(t, s, difference) * inv_t, difference_minus(t, s, difference_p) * inv_t,
            difference_minus(t, s, difference_q) * inv_t};
  }
  __device__ static double floor(double lse, double inv) {
    return static_cast<double>(static_cast<A>(lse - kJsFar<A> / inv));
  }

 private:
  __device__ LogRatio(double beta, const JsDivStat& stat, double inv, const JsCentres& at)
      : difference(at.difference.sum, at.difference.error),
        difference_p(at.difference_p.sum, at.difference_p.error),
        difference_q(at.difference_q.sum, at.difference_q.error),
        floor_p(static_cast<A>(floor(stat.lse_p, inv))),
        floor_q(static_cast<A>(floor(stat.lse_q, inv))),
        inv_t(static_cast<A>(inv)),
        centres(beta, at) {}
};
// e^((x - lse)/T).
template <class A>
class Probability {
 public:
  __device__ Probability(double lse, double lo, double inv_t)
      : exp_(inv_t),
        base_(static_cast<A>(lse)),
        factor_(static_cast<A>(std::exp(((static_cast<double>(base_) - lse) - lo) * inv_t))) {}
  __device__ A operator()(A x) const { return exp_(x - base_) * factor_; }

 private:
  Exp<A> exp_;
  A base_, factor_;
};

template <class TP, class TQ>
__global__ void __launch_bounds__(kThreads, kBlocks<TP>)
    forward_logits(const Mixed<JsDivForward, Arithmetic<TP>> k, const RowGrid grid, double* workspace, int launch) {
  using Rows = LogitPair<TP, TQ>;
  using A = typename Rows::A;
  constexpr int K = Rows::K;
  forward_row(k, grid, workspace, launch, &JsDivStat::js, [&](const RowTask& task, JsDivStat& stat) {
    Rows rows(k.rows, task.row);
    const Pieces pieces(k.rows.classes, rows.p, rows.q);
    const double inv_t = inverse_temperature<A>(k.rows.temperature), temperature = 1 / inv_t;
    RowTops tops;
    const auto part_tops = [&] {
      const Exp<A> exp(inv_t);
      ThreadTop<A> p, q;
      task.for_pieces<TP>(pieces, [&](const Piece<TP>& piece) {
        A t[K], s[K];
        rows.load(pieces, piece, t, s);
        p.add(t, s, exp, Smaller<A>());
        q.add(s, t, exp, Larger<A>());
      });
      const auto wide = [](A x) { return static_cast<double>(x); };
      return RowTops{wide(p.max),
                     wide(q.max),
                     p.sum.value(),
                     q.sum.value(),
                     wide(p.max) - wide(p.other),
                     wide(q.other) - wide(q.max)};
    };
    if (!task.reduce(0, tops, part_tops, [&](const RowTops& x) { return merged(task.team, x, inv_t); })) return false;
    if (!(tops.sum_p > 0) || !(tops.sum_q > 0) || std::isinf(tops.max_p) || std::isinf(tops.max_q)) {
      stat = no_distribution();
      return true;
    }
    stat.lse_p = Lse{tops.max_p, tops.sum_p}.finish(temperature, stat.lse_p_lo);
    stat.lse_q = Lse{tops.max_q, tops.sum_q}.finish(temperature, stat.lse_q_lo);
    // A class of no mass is moved up to its floor.
    stat.top_p = std::fmin(tops.top_p, tops.max_p - LogRatio<A>::floor(stat.lse_q, inv_t));
    stat.top_q = std::fmax(tops.top_q, LogRatio<A>::floor(stat.lse_p, inv_t) - tops.max_q);
    Sums<3> sums;
    const auto part = [&] {
      const LogRatio<A> ratio(k.rows.beta, stat, inv_t);
      const Probability<A> prob_p(stat.lse_p, stat.lse_p_lo, inv_t), prob_q(stat.lse_q, stat.lse_q_lo, inv_t);
      Sum<A> term, p_sigma, q_rho;
      task.for_pieces<TP>(pieces, [&](const Piece<TP>& piece) {
        A t[K], s[K], part_term = 0, part_p = 0, part_q = 0;
        rows.load(pieces, piece, t, s);
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const A x = prob_p(t[i]), y = prob_q(s[i]);
          const auto at = ratio(t[i], s[i]);
          const Ratios<A> r = ratio.centres(k.mixture, at.l, at.from_p, at.from_q, true, true);
          part_term += ratio.centres.term(k.mixture, at.l, x, y, r);
          part_p += x * r.sigma, part_q += y * r.rho;
        }
        term.add(part_term), p_sigma.add(part_p), q_rho.add(part_q);
      });
      return Sums<3>{{term.value(), p_sigma.value(), q_rho.value()}};
    };
    const auto whole = [&](const auto& x) { return merged(task.team, x); };
    for (int number = 1;; number = 3) {
      if (!task.reduce(number, sums, part, whole)) return false;
      if (number == 3 || !(sums.x[0] < kJsNear)) break;
      Sums<1> error;
      const auto part_error = [&] {
        const LogRatio<A> ratio(k.rows.beta, stat, inv_t);
        const Probability<A> prob_p(stat.lse_p, stat.lse_p_lo, inv_t), prob_q(stat.lse_q, stat.lse_q_lo, inv_t);
        Sum<A> sum;
        task.for_pieces<TP>(pieces, [&](const Piece<TP>& piece) {
          A t[K], s[K], sum_gap = 0;
          rows.load(pieces, piece, t, s);
#pragma unroll
          for (int i = 0; i < K; ++i) sum_gap += gap(ratio(t[i], s[i]).l, prob_p(t[i]), prob_q(s[i]));
          sum.add(sum_gap);
        });
        return Sums<1>{{sum.value()}};
      };
      if (!task.reduce(2, error, part_error, whole)) return false;
      stat.lse_q_lo += temperature * std::log1p(error.x[0]);
    }
    stat.mean_p = sums.x[1], stat.mean_q = sums.x[2], stat.js = k.rows.unit() * sums.x[0];
    return true;
  });
}

template <class TP, class TQ>
__global__ void __launch_bounds__(kThreads, kBlocks<TP>)
    backward_logits(const Mixed<JsDivBackward, Arithmetic<TP>> k, const RowGrid grid, double* workspace, int launch) {
  using Rows = LogitPair<TP, TQ>;
  using A = typename Rows::A;
  constexpr int K = Rows::K;
  backward_pair<TP, TQ, Rows>(k, grid, workspace, launch, [&](const RowTask& task, const BackwardPair<Rows>& pair) {
    const auto stat = JsDivStat::load(k.stat + JsDivStat::kSize * task.row);
    const double inv_t = inverse_temperature<A>(k.rows.temperature);
    const JsWeights weights(k.rows, pair.coefficient * inv_t);
    const LogRatio<A> ratio(k.rows.beta, stat, inv_t);
    const Probability<A> prob_p(stat.lse_p, stat.lse_p_lo, inv_t), prob_q(stat.lse_q, stat.lse_q_lo, inv_t);
    const A c_p = static_cast<A>(weights.p), c_q = static_cast<A>(weights.q), mean_p = static_cast<A>(stat.mean_p),
            mean_q = static_cast<A>(stat.mean_q);
    const bool want_p = pair.grad_p.data != nullptr, want_q = pair.grad_q.data != nullptr;
    task.for_pieces<TP>(pair.pieces, [&](const Piece<TP>& piece) {
      A t[K], s[K], g_p[K], g_q[K];
      pair.rows.load(pair.pieces, piece, t, s);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const auto at = ratio(t[i], s[i]);
        const Ratios<A> r = ratio.centres(k.mixture, at.l, at.from_p, at.from_q, want_p, want_q);
        g_p[i] = c_p * prob_p(t[i]) * (r.sigma - mean_p);
        g_q[i] = c_q * prob_q(s[i]) * (r.rho - mean_q);
      }
      if (want_p) store_piece(pair.grad_p, pair.pieces, piece, g_p);
      if (want_q) store_piece(pair.grad_q, pair.pieces, Piece<TQ>{piece.first, piece.gap}, g_q);
    });
  });
}

// -- Any space, in double -------------------------------------------------------------------------------------------

// A row's classes with what the formulas need of them; T is AnyFloat or double.
template <class T>
struct Classes {
  static constexpr int K = kPiece<T>;
  RowPointer<const char> p, q;
  Side p_side, q_side;
  Split<double> difference, difference_p, difference_q;
  Centres<double> centres;
  double inv_t;
  bool from_logits;

  __device__ Classes(const JsDivRows& rows, const AnyRows<T>& row, const JsDivStat& stat, double inv)
      : Classes(rows, row, stat, inv, JsCentres(stat, inv)) {}
  // f(p, q, l, ratios) for the classes of a piece, in order.
  template <class F>
  __device__ void for_each(const Mixture<double>& mixture, const Pieces& pieces, const Piece<T>& piece,
                           const F& f) const {
    double t[K], s[K];
    load_piece(p, pieces, piece, p_side.padding, t);
    load_piece(q, pieces, piece, q_side.padding, s);
    const bool both_probs = p_side.space == kProbs && q_side.space == kProbs;
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      const double given_p = next(t), given_q = next(s);
      double x, log_x, y, log_y;
      p_side.read(given_p, x, log_x);
      q_side.read(given_q, y, log_y);
      const double plain = log_ratio(both_probs, x, y, log_x, log_y);
      double l = from_logits ? difference_minus(given_p, given_q, difference) * inv_t : plain;
      if (std::isinf(plain)) l = plain > 0 ? kJsNone : -kJsNone;
      if (x == 0 && y == 0) l = 0;
      const double u_p = from_logits ? difference_minus(given_p, given_q, difference_p) * inv_t : l,
                   u_q = from_logits ? difference_minus(given_p, given_q, difference_q) * inv_t : l;
      const Ratios<double> r = centres(mixture, l, u_p, u_q, true, true);
      f(x, y, l, r);
    }
  }

 private:
  __device__ Classes(const JsDivRows& rows, const AnyRows<T>& row, const JsDivStat& stat, double inv,
                     const JsCentres& at)
      : p(row.p),
        q(row.q),
        p_side(rows.p_space, inv, stat.lse_p, stat.lse_p_lo),
        q_side(rows.q_space, inv, stat.lse_q, stat.lse_q_lo),
        difference(at.difference.sum, at.difference.error),
        difference_p(at.difference_p.sum, at.difference_p.error),
        difference_q(at.difference_q.sum, at.difference_q.error),
        centres(rows.beta, at),
        inv_t(inv),
        from_logits(rows.from_logits()) {}
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_any(const Mixed<JsDivForward, double> k, const RowGrid grid, double* workspace, int launch) {
  forward_row(k, grid, workspace, launch, &JsDivStat::js, [&](const RowTask& task, JsDivStat& stat) {
    AnyRows<T> rows(k.rows, task.row);
    const Pieces pieces(k.rows.classes, rows.p, rows.q);
    const double inv = 1 / k.rows.temperature;
    stat.top_p = -kInf<double>, stat.top_q = kInf<double>;  // not centred
    const auto merged_lse = [&](const Lse& x) { return merged(task.team, x, inv); };
    Lse lse;
    if (k.rows.p_space == kLogits) {
      if (!task.reduce(
              0, lse, [&] { return lse_of_pieces<T>(task, pieces, rows.p, inv); }, merged_lse))
        return false;
      stat.lse_p = lse.finish(k.rows.temperature, stat.lse_p_lo);
    }
    if (k.rows.q_space == kLogits) {
      if (!task.reduce(
              1, lse, [&] { return lse_of_pieces<T>(task, pieces, rows.q, inv); }, merged_lse))
        return false;
      stat.lse_q = lse.finish(k.rows.temperature, stat.lse_q_lo);
    }
    Sums<4> sums;
    const auto part = [&] {
      const Classes<T> classes(k.rows, rows, stat, inv);
      Sum<double> term, p_sigma, q_rho, error;
      task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
        double piece_term = 0, piece_p = 0, piece_q = 0, piece_gap = 0;
        classes.for_each(k.mixture, pieces, piece, [&](double x, double y, double l, const Ratios<double>& r) {
          piece_term += classes.centres.term(k.mixture, l, x, y, r);
          piece_p += x * r.sigma, piece_q += y * r.rho, piece_gap += gap(l, x, y);
        });
        term.add(piece_term), p_sigma.add(piece_p), q_rho.add(piece_q), error.add(piece_gap);
      });
      return Sums<4>{{term.value(), p_sigma.value(), q_rho.value(), error.value()}};
    };
    const auto whole = [&](const Sums<4>& x) { return merged(task.team, x); };
    for (int number = 2;; number = 3) {
      if (!task.reduce(number, sums, part, whole)) return false;
      if (number == 3 || !k.rows.from_logits() || !(sums.x[0] < kJsNear)) break;
      stat.lse_q_lo += k.rows.temperature * std::log1p(sums.x[3]);
    }
    stat.mean_p = sums.x[1], stat.mean_q = sums.x[2], stat.js = k.rows.unit() * sums.x[0];
    return true;
  });
}

// A side's gradient of the scaled divergence but for 1/(1 - b) or 1/b; ratio is sigma or rho.
__device__ double entry(const Side& side, double prob, double ratio, double mean) {
  if (prob == 0) return 0;
  if (side.space == kLogits) return prob * (ratio - mean) * side.inv_t;
  return side.space == kProbs ? ratio : prob * ratio;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_any(const Mixed<JsDivBackward, double> k, const RowGrid grid, double* workspace, int launch) {
  using Rows = AnyRows<T>;
  constexpr int K = Rows::K;
  backward_pair<T, T, Rows>(k, grid, workspace, launch, [&](const RowTask& task, const BackwardPair<Rows>& pair) {
    const auto stat = JsDivStat::load(k.stat + JsDivStat::kSize * task.row);
    const Classes<T> classes(k.rows, pair.rows, stat, 1 / k.rows.temperature);
    const JsWeights weights(k.rows, pair.coefficient);
    task.for_pieces<T>(pair.pieces, [&](const Piece<T>& piece) {
      double g_p[K] = {}, g_q[K] = {};
      classes.for_each(k.mixture, pair.pieces, piece, [&](double x, double y, double, const Ratios<double>& r) {
        append(g_p, weights.p * entry(classes.p_side, x, r.sigma, stat.mean_p));
        append(g_q, weights.q * entry(classes.q_side, y, r.rho, stat.mean_q));
      });
      pair.store(piece, g_p, g_q);
    });
  });
}

// The mean of v over a side's probabilities, to twice double's precision: where one class has nearly all of the mass,
// v less its mean is as small there as the rest of the mass. The derivatives of the log-probability and probability.
struct Direction {
  double mean = 0, mean_lo = 0;

  __device__ double log_dot(const Side& side, double prob, double v) const {
    if (prob == 0) return 0;
    return side.space == kLogits ? ((v - mean) - mean_lo) * side.inv_t : side.space == kProbs ? v / prob : v;
  }
  __device__ static double dot(const Side& side, double prob, double v, double log_dot) {
    return side.space == kProbs ? v : prob * log_dot;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    double_backward(const Mixed<JsDivDoubleBackward, double> k, const RowGrid grid, double* workspace, int launch) {
  constexpr int K = kPiece<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const DoubleBackwardPair<T, AnyRows<T>> pair(k, task.row);
  const Pieces& pieces = pair.pieces;
  const auto stat = JsDivStat::load(k.stat + JsDivStat::kSize * task.row);
  const double inv_t =
      k.rows.by_logits() ? inverse_temperature<Arithmetic<T>>(k.rows.temperature) : 1 / k.rows.temperature;
  const Classes<T> classes(k.rows, pair.rows, stat, inv_t);
  const Side &p_side = classes.p_side, &q_side = classes.q_side;
  // f(p, q, ratios, v_p, v_q) for the classes of a piece.
  const auto for_each = [&](const Piece<T>& piece, const auto& f) {
    double a[K], b[K];
    pair.load_directions(piece, a, b);
    classes.for_each(k.mixture, pieces, piece,
                     [&](double x, double y, double, const Ratios<double>& r) { f(x, y, r, next(a), next(b)); });
  };
  const auto whole = [&](const auto& x) { return merged(task.team, x); };
  Sums<4> means;
  const auto part_means = [&] {
    Sums<4> sums;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      for_each(piece, [&](double x, double y, const Ratios<double>& r, double a, double b) {
        sums.x[0] += a == 0 ? 0 : x * a;
        sums.x[1] += b == 0 ? 0 : y * b;
        sums.x[2] += a == 0 ? 0 : a * entry(p_side, x, r.sigma, stat.mean_p);
        sums.x[3] += b == 0 ? 0 : b * entry(q_side, y, r.rho, stat.mean_q);
      });
    });
    return sums;
  };
  if (!task.reduce(0, means, part_means, whole)) return;
  const JsWeights unit(k.rows, 1);
  if (!pair.more_than(k, task, unit.p * means.x[2] + unit.q * means.x[3])) return;
  Sums<2> rest;
  const auto part_rest = [&] {
    Sums<2> sums;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      for_each(piece, [&](double x, double y, const Ratios<double>&, double a, double b) {
        sums.x[0] += x == 0 ? 0 : x * (a - means.x[0]);
        sums.x[1] += y == 0 ? 0 : y * (b - means.x[1]);
      });
    });
    return sums;
  };
  if (!task.reduce(1, rest, part_rest, whole)) return;
  const Direction of_p{means.x[0], rest.x[0]}, of_q{means.x[1], rest.x[1]};
  // f(p, q, ratios less their means, derivatives of p, q, sigma, rho)
  const auto for_dots = [&](const Piece<T>& piece, const auto& f) {
    for_each(piece, [&](double x, double y, Ratios<double> r, double a, double b) {
      const double log_p_dot = of_p.log_dot(p_side, x, a), log_q_dot = of_q.log_dot(q_side, y, b),
                   p_dot = Direction::dot(p_side, x, a, log_p_dot), q_dot = Direction::dot(q_side, y, b, log_q_dot),
                   m = k.mixture.beta * x + k.mixture.rest * y, inv_m = m == 0 ? 1 : 1 / m;
      if (p_side.space == kLogits) r.sigma -= stat.mean_p;
      if (q_side.space == kLogits) r.rho -= stat.mean_q;
      f(x, y, r, p_dot, q_dot, k.mixture.rest * (y * log_p_dot - q_dot) * inv_m,
        k.mixture.beta * (x * log_q_dot - p_dot) * inv_m);
    });
  };
  Sums<2> mean_dots;
  const auto part_dots = [&] {
    Sums<2> sums;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      for_dots(piece, [&](double x, double y, const Ratios<double>& r, double p_dot, double q_dot, double sigma_dot,
                          double rho_dot) {
        sums.x[0] += x == 0 ? 0 : p_dot * r.sigma + x * sigma_dot;
        sums.x[1] += y == 0 ? 0 : q_dot * r.rho + y * rho_dot;
      });
    });
    return sums;
  };
  if (!task.reduce(2, mean_dots, part_dots, whole)) return;
  const JsWeights weights(k.rows, pair.coefficient);
  // The derivative of entry(). Where prob = 0, that is constantly 0 by convention, and so is its derivative.
  const auto entry_dot = [](const Side& side, double prob, double dot, double ratio, double ratio_dot,
                            double mean_dot) {
    if (prob == 0) return 0.0;
    if (side.space == kProbs) return ratio_dot;
    const double whole_dot = dot * ratio + prob * ratio_dot;
    return side.space == kLogProbs ? whole_dot : (dot * ratio + prob * (ratio_dot - mean_dot)) * side.inv_t;
  };
  task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    double h_p[K] = {}, h_q[K] = {};
    for_dots(piece, [&](double x, double y, const Ratios<double>& r, double p_dot, double q_dot, double sigma_dot,
                        double rho_dot) {
      append(h_p, weights.p * entry_dot(p_side, x, p_dot, r.sigma, sigma_dot, mean_dots.x[0]));
      append(h_q, weights.q * entry_dot(q_side, y, q_dot, r.rho, rho_dot, mean_dots.x[1]));
    });
    pair.store(piece, h_p, h_q);
  });
}

}  // namespace

int64_t js_div_workspace(int64_t rows, int64_t classes) { return RowGrid(rows, classes).workspace(kReductions); }

void js_div_forward(const JsDivForward& k, int64_t rows, double* workspace, Stream stream) {
  if (!k.rows.by_logits())
    return dispatch_any(k.rows.p.dtype, [&]<class T>() {
      launch_rows(&forward_any<T>, Mixed<JsDivForward, double>(k), rows, workspace, stream, kReductions);
    });
  dispatch_types(k.rows, [&]<class TP, class TQ>() {
    launch_rows(&forward_logits<TP, TQ>, Mixed<JsDivForward, Arithmetic<TP>>(k), rows, workspace, stream, kReductions);
  });
}

void js_div_backward(const JsDivBackward& k, int64_t rows, double* workspace, Stream stream) {
  if (!k.rows.by_logits())
    return dispatch_any(k.rows.p.dtype, [&]<class T>() {
      launch_rows(&backward_any<T>, Mixed<JsDivBackward, double>(k), rows, workspace, stream, 0);
    });
  dispatch_types(k.rows, [&]<class TP, class TQ>() {
    launch_rows(&backward_logits<TP, TQ>, Mixed<JsDivBackward, Arithmetic<TP>>(k), rows, workspace, stream, 0);
  });
}

void js_div_double_backward(const JsDivDoubleBackward& k, int64_t rows, double* workspace, Stream stream) {
  dispatch_any(k.rows.p.dtype, [&]<class T>() {
    launch_rows(&double_backward<T>, Mixed<JsDivDoubleBackward, double>(k), rows, workspace, stream, 3);
  });
}

}  // namespace torch_divergence::cuda
