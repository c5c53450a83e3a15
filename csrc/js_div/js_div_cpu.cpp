// CPU kernels of the Jensen-Shannon divergence. Compiled once per instruction set (CPU_CAPABILITY); formulas in
// js_div.h.
//
// Two families, as for kl_div. Both sides in logits: SIMD in float (double for double inputs), half types widened in
// registers, memory read once. Everything else, and the double backward: SIMD in double for all types.
#include "js_div/js_div.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "core/expm1_series.h"
#include "core/row_kernels.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

// sigma, rho and the scaled term of a class, from l and both probabilities.
template <class A>
struct Terms {
  Vec<A> sigma, rho, term;
  Vec<A> gap;  // q - p, as l has it
};

template <class A>
struct Mixture {
  Vec<A> beta, rest, inv_beta, inv_rest, turn;
  Vec<A> series[JsSeries::kTerms];

  TD_INLINE explicit Mixture(double b)
      : beta(static_cast<A>(b)),
        rest(static_cast<A>(1 - b)),
        inv_beta(static_cast<A>(1 / b)),
        inv_rest(static_cast<A>(1 / (1 - b))),
        turn(static_cast<A>(js_turn(b))) {
    const JsSeries s(b);
    for (int k = 0; k < JsSeries::kTerms; ++k) series[k] = Vec<A>(static_cast<A>(s.c[k]));
  }

  // l finite or NaN.
  TD_INLINE Terms<A> operator()(Vec<A> l, Vec<A> p, Vec<A> q) const {
    const Vec<A> zero(A(0)), one(A(1)), minus_l = zero - l;
    const Vec<A> small = l.abs()<Vec<A>(JsSeries::reach<A>()), turned = l> turn;
    // base e^down is the other side's probability; e^down is bounded.
    const Vec<A> down = select(turned, minus_l, l), base = select(turned, p, q), e = exp_of<true>(down);
    const Vec<A> phi =
        l * l *
        phi_over_square<A>(
            minus_l, [](Vec<A> a, Vec<A> b, Vec<A> c) __attribute__((always_inline)) { return fmadd(a, b, c); });
    const Vec<A> growth = select(small, phi + l, e - one);
    const Vec<A> other_weight = select(turned, rest, beta), base_weight = select(turned, beta, rest);
    const Vec<A> minus_log = zero - log_of(fmadd(other_weight, e, base_weight), other_weight * growth);

    Terms<A> y;
    y.rho = select(turned, minus_log - l, minus_log);
    y.sigma = select(turned, minus_log, minus_log + l);
    Vec<A> s = series[JsSeries::kTerms - 1];
    for (int k = JsSeries::kTerms - 2; k >= 0; --k) s = fmadd(s, l, series[k]);
    const Vec<A> of_p = y.sigma * inv_rest, of_q = y.rho * inv_beta;
    const Vec<A> closed = select(turned, fmadd(e, of_q, of_p), fmadd(e, of_p, of_q));
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

// -- Any space, in double -------------------------------------------------------------------------------------------

JsDivStat any_row(const JsDivRows& rows, const void* p, const void* q, ForEach columns) {
  JsDivStat stat{};
  const auto lse = [&](const void* x, const RowsIn& side, double& sum, double& error) {
    const ExactSum exact = any_lse(x, side, rows.classes, rows.temperature, columns);
    sum = exact.sum, error = exact.error;
  };
  if (rows.p_space == kLogits) lse(p, rows.p, stat.lse_p, stat.lse_p_lo);
  if (rows.q_space == kLogits) lse(q, rows.q, stat.lse_q, stat.lse_q_lo);
  const Mixture<double> mixture(rows.beta);
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

// What the gradient of the scaled divergence is multiplied by.
struct Weights {
  double p, q;
  Weights(const JsDivRows& rows, double coefficient)
      : p(coefficient * (rows.unit() / (1 - rows.beta))), q(coefficient * (rows.unit() / rows.beta)) {}
};

void any_gradient(const JsDivRows& rows, const void* p, const void* q, const RowsOut& out_p, void* grad_p,
                  const RowsOut& out_q, void* grad_q, const JsDivStat& stat, double coefficient, ForEach columns) {
  if (coefficient == 0) {
    fill_zero_any(grad_p, out_p.dtype, rows.classes);
    fill_zero_any(grad_q, out_q.dtype, rows.classes);
    return;
  }
  const Sides sides(rows, stat);
  const Mixture<double> mixture(rows.beta);
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
  const Mixture<double> mixture(rows.beta);
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
  forward_any(k, begin, end, columns);
}

void js_div_backward(const JsDivBackward& k, int64_t begin, int64_t end, ForEach columns) {
  backward_any(k, begin, end, columns);
}

void js_div_value_and_grad(const JsDivValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  value_and_grad_any(k, begin, end, columns);
}

void js_div_double_backward(const JsDivDoubleBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q, k.v_p, k.v_q};
  const RowsOut out[] = {k.d_p, k.d_q};
  RowTiles<4, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    double_backward_row(k, i, x, y, columns);
  });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
