// CPU kernels of the Jensen-Shannon divergence. Compiled once per instruction set (CPU_CAPABILITY); formulas in
// js_div.h.
//
// Two families, as for kl_div. Both sides in logits of float64: memory read once. Everything else, and the double
// backward: SIMD in double for all types.
#include "js_div/js_div.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "core/phi.h"
#include "core/row_kernels.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

// sigma, rho and the scaled term of a class, from l and both probabilities.
struct Terms {
  D sigma, rho, term;
  D gap;  // q - p, as l has it
};

struct Mixture {
  D beta, rest, inv_beta, inv_rest, turn;
  D series[JsSeries::kTerms];

  TD_INLINE explicit Mixture(double b)
      : beta(b), rest(1 - b), inv_beta(1 / b), inv_rest(1 / (1 - b)), turn(js_turn(b)) {
    const JsSeries s(b);
    for (int k = 0; k < JsSeries::kTerms; ++k) series[k] = D(s.c[k]);
  }

  // l finite or NaN.
  TD_INLINE Terms operator()(D l, D p, D q) const {
    const D zero(0.0), one(1.0), minus_l = zero - l;
    const D small = l.abs()<D(JsSeries::kReach), turned = l> turn;
    // base e^down is the other side's probability; e^down is bounded.
    const D down = select(turned, minus_l, l), base = select(turned, p, q), e = exp_of<true>(down);
    const D phi = l * l *
                  phi_over_square<double>(
                      minus_l, [](D a, D b, D c) __attribute__((always_inline)) { return fmadd(a, b, c); });
    const D growth = select(small, phi + l, e - one);
    const D other_weight = select(turned, rest, beta), base_weight = select(turned, beta, rest);
    const D minus_log = zero - log_of(fmadd(other_weight, e, base_weight), other_weight * growth);

    Terms y;
    y.rho = select(turned, minus_log - l, minus_log);
    y.sigma = select(turned, minus_log, minus_log + l);
    D s = series[JsSeries::kTerms - 1];
    for (int k = JsSeries::kTerms - 2; k >= 0; --k) s = fmadd(s, l, series[k]);
    const D of_p = y.sigma * inv_rest, of_q = y.rho * inv_beta;
    const D closed = select(turned, fmadd(e, of_q, of_p), fmadd(e, of_p, of_q));
    y.term = base * select(small, l * l * s, closed);
    y.gap = base * select(turned, growth, zero - growth);
    return y;
  }
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
    const D zero(0.0), far(800.0), top(kInf<double>), bottom(-kInf<double>);
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

// Sums f(i, count, sums) over a row, in a fixed order.
struct Sums {
  double term = 0, p_sigma = 0, q_rho = 0, gap = 0;
  void add(const Sums& other) { term += other.term, p_sigma += other.p_sigma, q_rho += other.q_rho, gap += other.gap; }
  void finish(const JsDivRows& rows, JsDivStat& stat) const {
    stat.mean_p = p_sigma, stat.mean_q = q_rho, stat.js = rows.unit() * term;
  }
};

// What the gradient of the scaled divergence is multiplied by.
struct Weights {
  double p, q;
  Weights(const JsDivRows& rows, double coefficient)
      : p(coefficient * (rows.unit() / (1 - rows.beta))), q(coefficient * (rows.unit() / rows.beta)) {}
};

// -- Both sides in logits -------------------------------------------------------------------------------------------

// Exponentials of one row, e^((x - max)/T) with the maximum so far of each chunk.
struct Kept {
  double* exps;
  double* max;
};

LseScan scan_columns(const double* x, int64_t first, int64_t last, double inv_t_, const Kept& kept) {
  const D inv_t(inv_t_);
  LseScan scan;
  for (int64_t c = first; c < last; c += kChunk) {
    const int64_t n = std::min(kChunk, last - c);
    scan.raise(max_of_row<double>(x + c, n), inv_t_);
    kept.max[c / kChunk] = scan.max;
    const D max(finite_or_zero(scan.max));
    for (int64_t b = c; b < c + n; b += kBlock) {
      D sum(0.0);
      for_lanes<double>(
          std::min(kBlock, c + n - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
            const D e = exp_of((load_lanes<double>(x + b + i, count, -kInf<double>) - max) * inv_t);
            sum = sum + e;
            store_lanes<double>(kept.exps + b + i, e, count);
          });
      scan.sum += sum_of(sum);
    }
  }
  return scan;
}

// l of some classes from their logits. Below its floor a class has no mass that the arithmetic can tell from 0: moved
// up to it, l stays finite.
struct LogRatio {
  Split<double> difference;
  D floor_p, floor_q, inv_t;

  TD_INLINE LogRatio(const JsDivStat& stat, double inv_t_)
      : difference(stat.difference().sum, stat.difference().error),
        floor_p(stat.lse_p - kFar / inv_t_),
        floor_q(stat.lse_q - kFar / inv_t_),
        inv_t(inv_t_) {}
  TD_INLINE D operator()(D t, D s) const {
    return difference_minus(max_of(t, floor_p), max_of(s, floor_q), difference) * inv_t;
  }

 private:
  static constexpr double kFar = 1600;
};

// What is left aside for a gradient.
enum class Aside { Nothing, PSigma, QRho };

template <Aside kAside>
Sums mixed_columns(const double* p, const double* q, int64_t first, int64_t last, double inv_t, const Mixture& mixture,
                   const JsDivStat& stat, const Kept& kept_p, const Kept& kept_q, double* aside) {
  const LogRatio ratio(stat, inv_t);
  Sums sums;
  for (int64_t c = first; c < last; c += kBlock) {
    const int64_t chunk = c / kChunk;
    const D to_p(kept_factor(kept_p.max[chunk], stat.lse_p + stat.lse_p_lo, inv_t)),
        to_q(kept_factor(kept_q.max[chunk], stat.lse_q + stat.lse_q_lo, inv_t));
    D term(0.0), p_sigma(0.0), q_rho(0.0), gap(0.0);
    for_lanes<double>(
        std::min(kBlock, last - c), [&](int64_t i, auto count) __attribute__((always_inline)) {
          const D x = load_lanes<double>(kept_p.exps + c + i, count, 0.0) * to_p,
                  y = load_lanes<double>(kept_q.exps + c + i, count, 0.0) * to_q;
          const auto terms = mixture(
              ratio(load_lanes<double>(p + c + i, count, 0.0), load_lanes<double>(q + c + i, count, 0.0)), x, y);
          const D of_p = x * terms.sigma, of_q = y * terms.rho;
          term = term + terms.term, gap = gap + terms.gap;
          p_sigma = p_sigma + of_p, q_rho = q_rho + of_q;
          if constexpr (kAside == Aside::PSigma) store_lanes<double>(aside + c + i, of_p, count);
          if constexpr (kAside == Aside::QRho) store_lanes<double>(aside + c + i, of_q, count);
        });
    sums.add({sum_of(term), sum_of(p_sigma), sum_of(q_rho), sum_of(gap)});
  }
  return sums;
}

// The statistics of one row, and with kAside what its gradient needs.
template <Aside kAside>
JsDivStat logits_row(const JsDivRows& rows, const double* p, const double* q, ForEach columns, const Mixture& mixture,
                     const Kept& kept_p, const Kept& kept_q, double* aside) {
  const double inv_t = inverse_temperature<double>(rows.temperature), t = 1 / inv_t;
  JsDivStat stat{};
  const auto lse = [&](const auto* x, const Kept& kept, double& sum, double& error) {
    const auto scan = merged_segments<LseScan>(
        rows.classes, columns, [&](int64_t first, int64_t last) { return scan_columns(x, first, last, inv_t, kept); },
        [&](LseScan& whole, const LseScan& part) { whole.merge(part, inv_t); });
    if (!(scan.sum > 0) || std::isinf(scan.max)) return false;
    const ExactSum exact = two_sum(scan.max, t * std::log(scan.sum));
    sum = exact.sum, error = exact.error;
    return true;
  };
  if (!lse(p, kept_p, stat.lse_p, stat.lse_p_lo) || !lse(q, kept_q, stat.lse_q, stat.lse_q_lo)) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {nan, nan, nan, nan, nan, nan, nan};
  }
  const auto pass = [&] {
    return merged_segments<Sums>(
        rows.classes, columns,
        [&](int64_t first, int64_t last) {
          return mixed_columns<kAside>(p, q, first, last, inv_t, mixture, stat, kept_p, kept_q, aside);
        },
        [](Sums& total, const Sums& part) { total.add(part); });
  };
  Sums sums = pass();
  if (sums.term < kJsNear) {
    stat.lse_q_lo += t * std::log1p(sums.gap);
    sums = pass();
  }
  sums.finish(rows, stat);
  return stat;
}

// The class with more than half of a side's mass, and the sum of the other classes' gradients. The entries sum to 0:
// that class's is what the others leave, where by itself it is a difference of numbers near each other.
struct Peak {
  int64_t at = -1;
  double others = 0;

  void merge(const Peak& other) { at = std::max(at, other.at), others += other.others; }
};
TD_INLINE void write_peak(double* grad, const Peak& peak) {
  if (peak.at >= 0) grad[peak.at] = -peak.others;
}
TD_INLINE D without_peak(D prob, D g, int64_t i, Peak& peak) {
  const D top = prob > D(0.5);
  if (any(top)) peak.at = i + first_lane(top);
  return select(top, D(0.0), g);
}
struct Peaks {
  Peak p, q;
};

// Gradients of a part of a row from its statistics alone: P's, Q's or both.
template <bool kP, bool kQ>
Peaks logits_gradient(const JsDivRows& rows, const double* p, const double* q, double* grad_p, double* grad_q,
                      int64_t first, int64_t last, const Mixture& mixture, const JsDivStat& stat, double coefficient) {
  const double inv_t = inverse_temperature<double>(rows.temperature);
  const Weights weights(rows, coefficient * inv_t);
  const D c_p(weights.p), c_q(weights.q), mean_p(stat.mean_p), mean_q(stat.mean_q);
  const LogRatio ratio(stat, inv_t);
  const ExpFrom<double> prob_p(stat.lse_p + stat.lse_p_lo, inv_t), prob_q(stat.lse_q + stat.lse_q_lo, inv_t);
  Peaks peaks;
  for (int64_t b = first; b < last; b += kBlock) {
    D others_p(0.0), others_q(0.0);
    for_lanes<double>(
        std::min(kBlock, last - b), [&](int64_t j, auto count) __attribute__((always_inline)) {
          const int64_t i = b + j;
          // The padding of the tail has no mass.
          const D t = load_lanes<double>(p + i, count, -kInf<double>),
                  s = load_lanes<double>(q + i, count, -kInf<double>);
          const D x = prob_p(t), y = prob_q(s);
          const auto terms = mixture(ratio(t, s), x, y);
          const D g_p = c_p * x * (terms.sigma - mean_p), g_q = c_q * y * (terms.rho - mean_q);
          if constexpr (kP) {
            others_p = others_p + without_peak(x, g_p, i, peaks.p);
            store_lanes<double>(grad_p + i, g_p, count);
          }
          if constexpr (kQ) {
            others_q = others_q + without_peak(y, g_q, i, peaks.q);
            store_lanes<double>(grad_q + i, g_q, count);
          }
        });
    peaks.p.others += sum_of(others_p), peaks.q.others += sum_of(others_q);
  }
  return peaks;
}

// A thread's room for one row: the exponentials of both sides, and where asked for as much as one of them again.
struct Scratch {
  std::unique_ptr<double[]> exps;
  std::unique_ptr<double[]> maxima;
  int64_t classes, chunks;

  Scratch(int64_t classes_, bool aside)
      : exps(std::make_unique_for_overwrite<double[]>(static_cast<size_t>((aside ? 3 : 2) * classes_))),
        maxima(std::make_unique_for_overwrite<double[]>(static_cast<size_t>(2 * ((classes_ + kChunk - 1) / kChunk)))),
        classes(classes_),
        chunks((classes_ + kChunk - 1) / kChunk) {}
  Kept p() const { return {exps.get(), maxima.get()}; }
  Kept q() const { return {exps.get() + classes, maxima.get() + chunks}; }
};

void forward_logits(const JsDivForward& k, int64_t begin, int64_t end, ForEach columns) {
  const Scratch scratch(k.rows.classes, false);
  const Mixture mixture(k.rows.beta);
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {{}};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const*) {
    const double weight = k.weight ? k.weight[i] : 1;
    JsDivStat stat{};
    if (weight != 0)
      stat = logits_row<Aside::Nothing>(k.rows, static_cast<const double*>(x[0]), static_cast<const double*>(x[1]),
                                        columns, mixture, scratch.p(), scratch.q(), nullptr);
    stat.store(k.stat + JsDivStat::kSize * i);
    store_loss(k, i, weight != 0 ? weight * stat.js : 0);
  });
}

void backward_logits(const JsDivBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const Mixture mixture(k.rows.beta);
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad_p, k.grad_q};
  const auto gradient = k.grad_p.data && k.grad_q.data ? &logits_gradient<true, true>
                        : k.grad_p.data                ? &logits_gradient<true, false>
                                                       : &logits_gradient<false, true>;
  RowTiles<2, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    auto* grad_p = static_cast<double*>(y[0]);
    auto* grad_q = static_cast<double*>(y[1]);
    if (k.coefficient[i] == 0) {
      if (grad_p) fill_zero(grad_p, k.rows.classes);
      if (grad_q) fill_zero(grad_q, k.rows.classes);
      return;
    }
    const auto stat = JsDivStat::load(k.stat + JsDivStat::kSize * i);
    const auto peaks = merged_segments<Peaks>(
        k.rows.classes, columns,
        [&](int64_t first, int64_t last) {
          return gradient(k.rows, static_cast<const double*>(x[0]), static_cast<const double*>(x[1]), grad_p, grad_q,
                          first, last, mixture, stat, k.coefficient[i]);
        },
        [](Peaks& total, const Peaks& part) { total.p.merge(part.p), total.q.merge(part.q); });
    if (grad_p) write_peak(grad_p, peaks.p);
    if (grad_q) write_peak(grad_q, peaks.q);
  });
}

// kQ: the gradient of Q, else that of P; until its mean is known, what the gradient needs waits in
// `aside`: grad itself, unless that is an input's row.
template <bool kQ>
JsDivStat value_and_grad_row(const JsDivRows& rows, const double* p, const double* q, double* grad, double* aside,
                             double coefficient, ForEach columns, const Mixture& mixture, const Kept& kept_p,
                             const Kept& kept_q) {
  const JsDivStat stat =
      logits_row < kQ ? Aside::QRho : Aside::PSigma > (rows, p, q, columns, mixture, kept_p, kept_q, aside);
  if (std::isnan(stat.js)) {
    std::fill_n(grad, rows.classes, std::numeric_limits<double>::quiet_NaN());
    return stat;
  }
  const double inv_t = inverse_temperature<double>(rows.temperature);
  const Weights weights(rows, coefficient * inv_t);
  const D c(kQ ? weights.q : weights.p), mean(kQ ? stat.mean_q : stat.mean_p);
  const double lse = kQ ? stat.lse_q + stat.lse_q_lo : stat.lse_p + stat.lse_p_lo;
  const Kept& kept = kQ ? kept_q : kept_p;
  const auto peak = merged_segments<Peak>(
      rows.classes, columns,
      [&](int64_t first, int64_t last) {
        Peak part;
        for (int64_t b = first; b < last; b += kBlock) {
          const D factor(kept_factor(kept.max[b / kChunk], lse, inv_t));
          D others(0.0);
          for_lanes<double>(
              std::min(kBlock, last - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
                const D prob = load_lanes<double>(kept.exps + b + i, count, 0.0) * factor;
                const D g = c * (load_lanes<double>(aside + b + i, count, 0.0) - prob * mean);
                others = others + without_peak(prob, g, b + i, part);
                store_lanes<double>(grad + b + i, g, count);
              });
          part.others += sum_of(others);
        }
        return part;
      },
      [](Peak& total, const Peak& part) { total.merge(part); });
  write_peak(grad, peak);
  return stat;
}

void value_and_grad_logits(const JsDivValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  const int64_t n = k.rows.classes;
  const bool over_input = k.grad.data == (k.wrt_q ? k.rows.q : k.rows.p).data;
  const Scratch scratch(n, over_input);
  const Mixture mixture(k.rows.beta);
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad};
  RowTiles<2, 1>(in, out, n).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    auto* grad = static_cast<double*>(y[0]);
    const double coefficient = k.scale * (k.weight ? k.weight[i] : 1);
    JsDivStat stat{};
    if (coefficient == 0) {
      fill_zero(grad, n);
    } else {
      double* const aside = over_input ? scratch.exps.get() + 2 * n : grad;
      const auto* p = static_cast<const double*>(x[0]);
      const auto* q = static_cast<const double*>(x[1]);
      if (k.wrt_q)
        stat = value_and_grad_row<true>(k.rows, p, q, grad, aside, coefficient, columns, mixture, scratch.p(),
                                        scratch.q());
      if (!k.wrt_q)
        stat = value_and_grad_row<false>(k.rows, p, q, grad, aside, coefficient, columns, mixture, scratch.p(),
                                         scratch.q());
    }
    stat.store(k.stat + JsDivStat::kSize * i);
  });
}

// Which family serves these rows? In float the gradient's sigma - mean would cancel where logits are several units
// apart.
TD_INLINE bool by_logits(const JsDivRows& rows) { return rows.from_logits() && rows.p.dtype == DType::Double; }

// -- Any space, in double -------------------------------------------------------------------------------------------

JsDivStat any_row(const JsDivRows& rows, const void* p, const void* q, ForEach columns) {
  JsDivStat stat{};
  const auto lse = [&](const void* x, const RowsIn& side, double& sum, double& error) {
    const ExactSum exact = any_lse(x, side, rows.classes, rows.temperature, columns);
    sum = exact.sum, error = exact.error;
  };
  if (rows.p_space == kLogits) lse(p, rows.p, stat.lse_p, stat.lse_p_lo);
  if (rows.q_space == kLogits) lse(q, rows.q, stat.lse_q, stat.lse_q_lo);
  const Mixture mixture(rows.beta);
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
  const Mixture mixture(rows.beta);
  const Weights weights(rows, coefficient);
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

// The derivatives of a side's probability and log-probability along v; mean = <prob, v>.
TD_INLINE void differentiate(const Side& side, D prob, D v, double mean, D& log_dot, D& dot) {
  const D zero(0.0), none = prob == zero;
  log_dot = side.space == kLogits ? (v - D(mean)) * side.inv_t : side.space == kProbs ? v / prob : v;
  log_dot = select(none, zero, log_dot);
  dot = side.space == kProbs ? v : prob * log_dot;
}
// The derivative of any_entry. Where prob = 0, that is constantly 0 by convention, and so is its derivative.
TD_INLINE D entry_dot(const Side& side, D prob, D dot, D ratio, D ratio_dot, double mean, double mean_dot) {
  const D zero(0.0);
  const D g = side.space == kProbs      ? ratio_dot
              : side.space == kLogProbs ? dot * ratio + prob * ratio_dot
                                        : (dot * (ratio - D(mean)) + prob * (ratio_dot - D(mean_dot))) * side.inv_t;
  return select(prob == zero, zero, g);
}

void double_backward_row(const JsDivDoubleBackward& k, int64_t row, const void* const* in, void* const* out,
                         ForEach columns) {
  const JsDivRows& rows = k.rows;
  const JsDivStat stat = JsDivStat::load(k.stat + JsDivStat::kSize * row);
  const double coefficient = k.coefficient[row];
  const Sides sides(rows, stat);
  const Side &p_side = sides.p_side, &q_side = sides.q_side;
  const Mixture mixture(rows.beta);
  const D zero(0.0), one(1.0);
  const auto read = [&](int64_t i, auto count, D& p, D& q, D& v_p, D& v_q) __attribute__((always_inline)) {
    D l;
    sides.read(in[0], in[1], i, count, p, q, l);
    v_p = in[2] ? load_any(in[2], k.v_p.dtype, i, count, 0.0) : zero;
    v_q = in[3] ? load_any(in[3], k.v_q.dtype, i, count, 0.0) : zero;
    return mixture(l, p, q);
  };
  const Pair means = sum_columns(
      rows.classes, columns, [&](int64_t i, auto count, D& a, D& b) __attribute__((always_inline)) {
        D p, q, v_p, v_q;
        read(i, count, p, q, v_p, v_q);
        a = a + select(v_p == zero, zero, p * v_p);
        b = b + select(v_q == zero, zero, q * v_q);
      });
  const Weights weights(rows, coefficient), unit(rows, 1);
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
  // sigma and rho with their derivatives, and those of the probabilities.
  struct Dots {
    D p, q, sigma, rho, p_dot, q_dot, sigma_dot, rho_dot;
  };
  const auto dots_of = [&](int64_t i, auto count) __attribute__((always_inline)) {
    D v_p, v_q, log_p_dot, log_q_dot;
    Dots y;
    const auto terms = read(i, count, y.p, y.q, v_p, v_q);
    differentiate(p_side, y.p, v_p, means.a, log_p_dot, y.p_dot);
    differentiate(q_side, y.q, v_q, means.b, log_q_dot, y.q_dot);
    const D mass = mixture.beta * y.p + mixture.rest * y.q, inv_m = one / select(mass == zero, one, mass);
    y.sigma = terms.sigma, y.rho = terms.rho;
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
            store_any(out[0], k.d_p.dtype, i,
                      c_p * entry_dot(p_side, y.p, y.p_dot, y.sigma, y.sigma_dot, stat.mean_p, mean_dots.a), count);
          if (out[1] != nullptr)
            store_any(out[1], k.d_q.dtype, i,
                      c_q * entry_dot(q_side, y.q, y.q_dot, y.rho, y.rho_dot, stat.mean_q, mean_dots.b), count);
        });
  });
}

}  // namespace

void js_div_forward(const JsDivForward& k, int64_t begin, int64_t end, ForEach columns) {
  if (!by_logits(k.rows)) return forward_any(k, begin, end, columns);
  forward_logits(k, begin, end, columns);
}

void js_div_backward(const JsDivBackward& k, int64_t begin, int64_t end, ForEach columns) {
  if (!by_logits(k.rows)) return backward_any(k, begin, end, columns);
  backward_logits(k, begin, end, columns);
}

void js_div_value_and_grad(const JsDivValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  if (!by_logits(k.rows)) return value_and_grad_any(k, begin, end, columns);
  value_and_grad_logits(k, begin, end, columns);
}

void js_div_double_backward(const JsDivDoubleBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q, k.v_p, k.v_q};
  const RowsOut out[] = {k.d_p, k.d_q};
  RowTiles<4, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    double_backward_row(k, i, x, y, columns);
  });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
