// CPU kernels of KL divergence. Compiled once per instruction set (CPU_CAPABILITY); formulas in kl_div.h.
//
// Two families. Both sides in logits: kl_div_rows.h. Everything else, and the double backward: SIMD in double for all
// types, which makes the plain formulas accurate to float's last digits.
#include "core/row_scores.h"
#include "kl_div/kl_div_rows.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

// What a row of logits leaves.
TD_INLINE auto leave_in(double* stats) {
  return [stats](int64_t row, const void*, const void*, const KlDivStat& stat) {
    stat.store(stats + KlDivStat::kSize * row);
    return stat.kl;
  };
}

// -- Any space, in double -------------------------------------------------------------------------------------------

KlDivStat any_row(const RowPair& rows, const void* p, const void* q, ForEach columns) {
  const double t = rows.temperature;
  KlDivStat stat{};
  const auto lse = [&](const void* x, const RowsIn& side, double& stored) {
    const ExactSum exact = any_lse(x, side, rows.classes, t, columns);
    stored = exact.sum, stat.mean_lo = exact.error;
  };
  if (rows.p_space == kLogits) lse(p, rows.p, stat.lse_p);
  if (rows.q_space == kLogits) lse(q, rows.q, stat.lse_q);
  const double rest = rows.from_logits() ? 0 : stat.mean_lo;
  const Side p_side(rows.p, rows.p_space, t, stat.lse_p, rest), q_side(rows.q, rows.q_space, t, stat.lse_q, rest);
  const D zero(0.0), lowest(-kInf<double>);
  const Pair sums = sum_columns(
      rows.classes, columns, [&](int64_t i, auto count, D& kl, D& mass) __attribute__((always_inline)) {
        D x, log_x, y, log_y;
        p_side.read(p, i, count, x, log_x);
        q_side.read(q, i, count, y, log_y);
        const D l = log_ratio(p_side, q_side, x, y, log_x, log_y);
        // p = 0: no term, but a NaN of q stays one, and a p that only underflowed meets q = 0 with +inf.
        const D absent =
            select((log_x > lowest) & (log_y == lowest), D(kInf<double>), select(log_y.isnan(), log_y, zero));
        kl = kl + select(x == zero, absent, x * l);
        mass = mass + x;
      });
  stat.kl = sums.a, stat.mean = sums.b;
  return stat;
}

// Gradient of KL with respect to each side's entries, before the row's coefficient.
TD_INLINE D gradient_p(const Side& side, const KlDivStat& stat, D p, D l) {
  const D zero(0.0);
  if (side.space == kLogits) {
    if (std::isinf(stat.kl)) return zero;
    return select(p == zero, zero, p * (l - D(stat.kl)) * side.inv_t);
  }
  const D g = side.space == kProbs ? l + D(1.0) : p * (l + D(1.0));
  return select(p == zero, zero, g);
}
TD_INLINE D gradient_q(const Side& side, const KlDivStat& stat, D p, D q) {
  const D zero(0.0);
  if (side.space == kLogits) return (q * D(stat.mean) - p) * side.inv_t;
  if (side.space == kLogProbs) return zero - p;
  return select(p == zero, zero, zero - p / q);
}

void forward_any(const KlDivForward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {{}};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const*) {
    const double weight = k.weight ? k.weight[i] : 1;
    KlDivStat stat{};
    if (weight != 0) stat = any_row(k.rows, x[0], x[1], columns);
    stat.store(k.stat + KlDivStat::kSize * i);
    const double loss = weight != 0 ? weight * stat.kl : 0;
    store_loss(k, i, loss);
  });
}

struct Peaks {
  Peak p, q;
};

void any_gradient(const RowPair& rows, const void* p, const void* q, const RowsOut& out_p, void* grad_p,
                  const RowsOut& out_q, void* grad_q, const KlDivStat& stat, double coefficient, ForEach columns) {
  if (coefficient == 0) {
    fill_zero_any(grad_p, out_p.dtype, rows.classes);
    fill_zero_any(grad_q, out_q.dtype, rows.classes);
    return;
  }
  const double rest = stat.mean_lo;
  const Side p_side(rows.p, rows.p_space, rows.temperature, stat.lse_p, rest),
      q_side(rows.q, rows.q_space, rows.temperature, stat.lse_q, rest);
  const D c(coefficient), zero(0.0), half(0.5);
  // A side in logits has gradients whose sum is 0; see kl_div.h for the class with more than half of its mass.
  const auto peaks = merged_segments<Peaks>(
      rows.classes, columns,
      [&](int64_t first, int64_t last) {
        Peaks part;
        D others_p(0.0), others_q(0.0);
        const auto write = [&](void* grad, const RowsOut& out, int64_t i, auto count, D g, D prob, int64_t& at,
                               D& others) __attribute__((always_inline)) {
          if (grad == nullptr) return;
          const D top = prob > half;
          if (any(top)) at = i + first_lane(top);
          others = others + select(top, zero, without_padding(g, count));
          store_any(grad, out.dtype, i, g, count);
        };
        for_lanes<double>(
            last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
              const int64_t i = first + j;
              D x, log_x, y, log_y;
              p_side.read(p, i, count, x, log_x);
              q_side.read(q, i, count, y, log_y);
              const D l = log_ratio(p_side, q_side, x, y, log_x, log_y);
              write(grad_p, out_p, i, count, c * gradient_p(p_side, stat, x, l), x, part.p.at, others_p);
              write(grad_q, out_q, i, count, c * gradient_q(q_side, stat, x, y), y, part.q.at, others_q);
            });
        part.p.others_p = sum_of(others_p), part.q.others_q = sum_of(others_q);
        return part;
      },
      [](Peaks& total, const Peaks& part) { total.p.merge(part.p), total.q.merge(part.q); });
  if (p_side.space == kLogits && peaks.p.at >= 0) store_any(grad_p, out_p.dtype, peaks.p.at, D(-peaks.p.others_p), 1);
  if (q_side.space == kLogits && peaks.q.at >= 0) store_any(grad_q, out_q.dtype, peaks.q.at, D(-peaks.q.others_q), 1);
}

void backward_any(const KlDivBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad_p, k.grad_q};
  RowTiles<2, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    any_gradient(k.rows, x[0], x[1], k.grad_p, y[0], k.grad_q, y[1], KlDivStat::load(k.stat + KlDivStat::kSize * i),
                 k.coefficient[i], columns);
  });
}

void value_and_grad_any(const KlDivValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad};
  const RowsOut unwanted{};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    const double coefficient = k.scale * (k.weight ? k.weight[i] : 1);
    KlDivStat stat{};
    if (coefficient != 0) stat = any_row(k.rows, x[0], x[1], columns);
    stat.store(k.stat + KlDivStat::kSize * i);
    if (k.wrt_q) {
      any_gradient(k.rows, x[0], x[1], unwanted, nullptr, k.grad, y[0], stat, coefficient, columns);
    } else {
      any_gradient(k.rows, x[0], x[1], k.grad, y[0], unwanted, nullptr, stat, coefficient, columns);
    }
  });
}

// With dots for derivatives along (v_p, v_q):  (log p). = (v - <p,v>)/T | v | v/p  for logits | log_probs | probs,
// p. = p (log p). (v for probs), l. = (log p). - (log q)., and
//   P's gradient.   [p. (l - KL) + p (l. - KL.)]/T | p. (l + 1) + p l. | l.
//   Q's gradient.   [q (log q). m + q m. - p.]/T | -p. | (p (log q). - p.)/q      m = sum p
// KL. = <v, gradient>. Where p = 0, P's gradient is constantly 0 by convention, and so is its derivative.
void double_backward_row(const KlDivDoubleBackward& k, int64_t row, const void* const* in, void* const* out,
                         ForEach columns) {
  const RowPair& rows = k.rows;
  KlDivStat stat = KlDivStat::load(k.stat + KlDivStat::kSize * row);
  const double t = rows.temperature, coefficient = k.coefficient[row];
  const bool both_logits = rows.from_logits();
  const double mass = both_logits ? 1 : stat.mean;
  // Where P has its mass on one class, its derivatives are differences of numbers that agree in all of float's digits.
  const bool again = both_logits && rows.p.dtype != DType::Double && !std::isnan(stat.kl);
  ExactSum z_p{stat.lse_p, 0}, z_q{stat.lse_q, 0};
  if (again)
    z_p = any_lse(in[0], rows.p, rows.classes, t, columns), z_q = any_lse(in[1], rows.q, rows.classes, t, columns);
  if (!both_logits) z_p.error = z_q.error = stat.mean_lo;
  const Side p_side(rows.p, rows.p_space, t, z_p.sum, z_p.error), q_side(rows.q, rows.q_space, t, z_q.sum, z_q.error);
  ExactSum at = stat.log_ratio_centre(t);
  if (again) at = two_sum(z_p.sum, -z_q.sum), at.error += z_p.error - z_q.error;
  const Split<double> centre(at.sum, at.error);
  const D zero(0.0), inv_t(1 / t);
  const auto read = [&](int64_t i, auto count, D& p, D& q, D& l, D& v_p, D& v_q) __attribute__((always_inline)) {
    D log_p, log_q;
    p_side.read(in[0], i, count, p, log_p);
    q_side.read(in[1], i, count, q, log_q);
    l = log_ratio(p_side, q_side, p, q, log_p, log_q);
    if (both_logits)  // from the exact difference
      l = difference_minus(load_any(in[0], rows.p.dtype, i, count, 0.0), load_any(in[1], rows.q.dtype, i, count, 0.0),
                           centre) *
          inv_t;
    v_p = in[2] ? load_any(in[2], k.v_p.dtype, i, count, 0.0) : zero;
    v_q = in[3] ? load_any(in[3], k.v_q.dtype, i, count, 0.0) : zero;
  };
  if (again && !std::isinf(stat.kl))
    stat.kl = sum_columns(
                  rows.classes, columns,
                  [&](int64_t i, auto count, D& sum, D&) __attribute__((always_inline)) {
                    D p, q, l, v_p, v_q;
                    read(i, count, p, q, l, v_p, v_q);
                    sum = sum + select(p == zero, zero, p * l);
                  })
                  .a;
  const KlDivStat flat{stat.lse_p, stat.lse_q, mass, 0, stat.kl};
  const D kl(stat.kl);
  const Pair means = sum_columns(
      rows.classes, columns, [&](int64_t i, auto count, D& a, D& b) __attribute__((always_inline)) {
        D p, q, l, v_p, v_q;
        read(i, count, p, q, l, v_p, v_q);
        a = a + (p_side.space == kProbs ? v_p : p * v_p);
        b = b + (q_side.space == kProbs ? v_q : q * v_q);
      });
  const Pair dots = sum_columns(
      rows.classes, columns, [&](int64_t i, auto count, D& a, D& b) __attribute__((always_inline)) {
        D p, q, l, v_p, v_q;
        read(i, count, p, q, l, v_p, v_q);
        D g_q = gradient_q(q_side, flat, p, q);
        if (both_logits) g_q = select(l.abs() < D(0.5), p * (zero - l).expm1() * inv_t, g_q);  // q - p, near
        a = a + select(v_p == zero, zero, v_p * gradient_p(p_side, flat, p, l));
        b = b + select(v_q == zero, zero, v_q * g_q);
      });
  const double kl_dot = dots.a + dots.b;
  if (k.d_coefficient != nullptr) k.d_coefficient[row] = kl_dot;
  if (coefficient == 0) {
    fill_zero_any(out[0], k.d_p.dtype, rows.classes);
    fill_zero_any(out[1], k.d_q.dtype, rows.classes);
    return;
  }
  if (out[0] == nullptr && out[1] == nullptr) return;
  const D c(coefficient), mean_p(means.a), mean_q(means.b), one(1.0);
  const D mass_dot(p_side.space == kLogits ? 0 : means.a);
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    for_lanes<double>(
        last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
          const int64_t i = first + j;
          D p, q, l, v_p, v_q;
          read(i, count, p, q, l, v_p, v_q);
          const D none_p = p == zero, none_q = q == zero;
          D log_p_dot = p_side.space == kLogits ? (v_p - mean_p) * inv_t : p_side.space == kProbs ? v_p / p : v_p;
          log_p_dot = select(none_p, zero, log_p_dot);
          const D p_dot = p_side.space == kProbs ? v_p : p * log_p_dot;
          D log_q_dot = q_side.space == kLogits ? (v_q - mean_q) * inv_t : q_side.space == kProbs ? v_q / q : v_q;
          log_q_dot = select(none_q, zero, log_q_dot);
          const D l_dot = log_p_dot - log_q_dot;
          if (out[0] != nullptr) {
            D h;
            if (p_side.space == kLogits) {
              h = std::isinf(stat.kl) ? zero : (p_dot * (l - kl) + p * (l_dot - D(kl_dot))) * inv_t;
            } else if (p_side.space == kLogProbs) {
              h = p_dot * (l + one) + p * l_dot;
            } else {
              h = l_dot;
            }
            store_any(out[0], k.d_p.dtype, i, c * select(none_p, zero, h), count);
          }
          if (out[1] != nullptr) {
            D h;
            if (q_side.space == kLogits) {
              h = (q * (log_q_dot * D(mass) + mass_dot) - p_dot) * inv_t;
            } else if (q_side.space == kLogProbs) {
              h = zero - p_dot;
            } else {
              h = select(none_q, zero, (p * log_q_dot - p_dot) / q);
            }
            store_any(out[1], k.d_q.dtype, i, c * h, count);
          }
        });
  });
}

}  // namespace

void kl_div_forward(const KlDivForward& k, int64_t begin, int64_t end, ForEach columns) {
  if (!k.rows.from_logits()) return forward_any(k, begin, end, columns);
  dispatch_types(k.rows, [&]<class A, class TP, class TQ>() {
    forward_logits<A, TP, TQ>(k, begin, end, columns, leave_in(k.stat));
  });
}

void kl_div_backward(const KlDivBackward& k, int64_t begin, int64_t end, ForEach columns) {
  if (!k.rows.from_logits()) return backward_any(k, begin, end, columns);
  dispatch_types(k.rows, [&]<class A, class TP, class TQ>() {
    backward_logits<A, TP, TQ>(k, begin, end, columns, KlDivStat::kSize);
  });
}

void kl_div_value_and_grad(const KlDivValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  if (!k.rows.from_logits()) return value_and_grad_any(k, begin, end, columns);
  dispatch_types(k.rows, [&]<class A, class TP, class TQ>() {
    if (k.wrt_q) {
      value_and_grad_logits<A, true, TP, TQ>(k, begin, end, columns, leave_in(k.stat));
    } else {
      value_and_grad_logits<A, false, TP, TQ>(k, begin, end, columns, leave_in(k.stat));
    }
  });
}

void kl_div_double_backward(const KlDivDoubleBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q, k.v_p, k.v_q};
  const RowsOut out[] = {k.d_p, k.d_q};
  RowTiles<4, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    double_backward_row(k, i, x, y, columns);
  });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
