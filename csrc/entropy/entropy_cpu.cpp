// CPU kernels of entropy. Compiled once per instruction set (CPU_CAPABILITY); formulas in entropy.h.
//
// Logits of float and the half types: SIMD in float, entropy_rows.h. Everything else, and the double backward: SIMD in
// double for all types.
#include "core/row_scores.h"
#include "entropy/entropy_rows.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

// Which family serves these rows?
TD_INLINE bool by_float(const SingleRow& rows) { return rows.space == kLogits && rows.x.dtype != DType::Double; }

template <class T, class Exps>
void entropy_gradient(const SingleRow& rows, const T* x, T* grad, const EntropyStat& stat, double coefficient,
                      ForEach columns, const Exps& exps) {
  const double inv_t = inverse_temperature<float>(rows.temperature);
  const Below n_of(stat.top, inv_t);
  const Split<float> mean(stat.mean);
  const F factor(static_cast<float>(coefficient * inv_t * std::exp(-stat.log_z)));
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    for_lanes<float>(
        last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
          const int64_t i = first + j;
          const auto term = n_of(load_lanes<float>(x + i, count, -kInf<float>));
          const F e = exps.again(i, count, term);
          store_lanes<float>(grad + i, e * factor * (((term.n - mean.hi) - mean.lo) + term.rest), count);
        });
  });
}

Scores scores(const SingleRow& rows, const EntropyStat& stat) {
  return {rows.x.dtype, rows.space, rows.temperature, {stat.top, stat.log_z}};
}

EntropyStat entropy_row(const SingleRow& rows, const void* x, ForEach columns) {
  EntropyStat stat{};
  if (rows.space == kLogits) {
    const LogSum sum = log_sum(x, rows.x.dtype, rows.classes, rows.temperature, columns);
    stat.top = sum.top, stat.log_z = sum.log_z;
  }
  const Scores side = scores(rows, stat);
  const auto sums = sums_of_columns<2>(
      rows.classes, columns, [&](int64_t i, auto count, D* lanes) __attribute__((always_inline)) {
        D given, p, n;
        side.read(x, i, count, given, p, n);
        lanes[0] = lanes[0] + share(p, n);
        if (rows.space == kLogits) lanes[1] = lanes[1] + share(p, (side.top - given) * side.inv_t);
      });
  stat.entropy = sums.of[0], stat.mean = sums.of[1];
  return stat;
}

// dH/dx of an entry, before the row's coefficient.
TD_INLINE D gradient(const Scores& side, const EntropyStat& stat, D given, D p, D neg_log) {
  const D zero(0.0), one(1.0);
  D g;
  if (side.space == kLogits) {
    g = p * ((side.top - given) * side.inv_t - D(stat.mean)) * side.inv_t;
  } else {
    g = side.space == kLogProbs ? p * (neg_log - one) : neg_log - one;
  }
  return select(p == zero, zero, g);
}

void any_gradient(const SingleRow& rows, const void* x, const RowsOut& out, void* grad, const EntropyStat& stat,
                  double coefficient, ForEach columns) {
  const Scores side = scores(rows, stat);
  const D c(coefficient);
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    for_lanes<double>(
        last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
          D given, p, n;
          side.read(x, first + j, count, given, p, n);
          store_any(grad, out.dtype, first + j, c * gradient(side, stat, given, p, n), count);
        });
  });
}

// -- Double backward -------------------------------------------------------------------------------------------------

void double_backward_row(const EntropyDoubleBackward& k, int64_t row, const void* const* in, void* out,
                         ForEach columns) {
  const SingleRow& rows = k.rows;
  // In double, where the statistics are to float's accuracy.
  const EntropyStat stat =
      by_float(rows) ? entropy_row(rows, in[0], columns) : EntropyStat::load(k.stat + EntropyStat::kSize * row);
  const Scores side = scores(rows, stat);
  const D zero(0.0), one(1.0);
  const double inv_t = 1 / rows.temperature;
  const bool logits = rows.space == kLogits;
  const auto read = [&](int64_t i, auto count, D& given, D& p, D& n, D& v) __attribute__((always_inline)) {
    side.read(in[0], i, count, given, p, n);
    v = load_any(in[1], k.v.dtype, i, count, 0.0);
  };
  const auto first = sums_of_columns<2>(
      rows.classes, columns, [&](int64_t i, auto count, D* lanes) __attribute__((always_inline)) {
        D given, p, n, v;
        read(i, count, given, p, n, v);
        lanes[0] = lanes[0] + select(v == zero, zero, v * gradient(side, stat, given, p, n));
        if (logits) lanes[1] = lanes[1] + p * v;
      });
  if (k.d_coefficient != nullptr) k.d_coefficient[row] = first.of[0];
  const double coefficient = k.coefficient[row];
  if (coefficient == 0) return fill_zero_any(out, k.d_x.dtype, rows.classes);
  if (out == nullptr) return;
  // m. = sum_j p_j v'_j n_j = sum_j v_j p_j (n_j - m)/T: the first sum.
  const D c(coefficient), mean_v(first.of[1]), mean_dot(first.of[0]);
  for_segments(rows.classes, columns, [&](int64_t begin, int64_t last, int64_t) {
    for_lanes<double>(
        last - begin, [&](int64_t j, auto count) __attribute__((always_inline)) {
          const int64_t i = begin + j;
          D given, p, n, v;
          read(i, count, given, p, n, v);
          D h;
          if (logits) {
            const D v_dot = (v - mean_v) * D(inv_t), above = (side.top - given) * side.inv_t - D(stat.mean);
            h = p * (v_dot * (above - one) - mean_dot) * D(inv_t);
          } else if (rows.space == kLogProbs) {
            h = p * v * (n - one) - p * v;
          } else {
            h = zero - v / p;
          }
          store_any(out, k.d_x.dtype, i, c * select(p == zero, zero, h), count);
        });
  });
}

}  // namespace

void entropy_forward(const EntropyForward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.x};
  const RowsOut out[] = {{}};
  const auto each = [&](const auto& row) {
    RowTiles<1, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const*) {
      const double weight = k.weight ? k.weight[i] : 1;
      EntropyStat stat{};
      if (weight != 0) stat = row(x[0]);
      stat.store(k.stat + EntropyStat::kSize * i);
      store_loss(k, i, weight != 0 ? weight * stat.entropy : 0);
    });
  };
  if (!by_float(k.rows)) return each([&](const void* x) { return entropy_row(k.rows, x, columns); });
  dispatch_float_types(k.rows.x.dtype, [&]<class T>() {
    each([&](const void* x) {
      return entropy_of_logits<true>(static_cast<const T*>(x), k.rows.classes, k.rows.temperature, columns,
                                     ComputedExps());
    });
  });
}

void entropy_backward(const EntropyBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.x};
  const RowsOut out[] = {k.grad};
  const auto each = [&](const auto& row) {
    RowTiles<1, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
      if (k.coefficient[i] == 0) return fill_zero_any(y[0], k.grad.dtype, k.rows.classes);
      row(x[0], y[0], EntropyStat::load(k.stat + EntropyStat::kSize * i), k.coefficient[i]);
    });
  };
  if (by_float(k.rows))
    return dispatch_float_types(k.rows.x.dtype, [&]<class T>() {
      each([&](const void* x, void* grad, const EntropyStat& stat, double coefficient) {
        entropy_gradient(k.rows, static_cast<const T*>(x), static_cast<T*>(grad), stat, coefficient, columns,
                         ComputedExps());
      });
    });
  each([&](const void* x, void* grad, const EntropyStat& stat, double coefficient) {
    any_gradient(k.rows, x, k.grad, grad, stat, coefficient, columns);
  });
}

void entropy_value_and_grad(const EntropyValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.x};
  const RowsOut out[] = {k.grad};
  RowTiles<1, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    const double coefficient = k.scale * (k.weight ? k.weight[i] : 1);
    EntropyStat stat{};
    if (coefficient == 0) {
      fill_zero_any(y[0], k.grad.dtype, k.rows.classes);
    } else if (by_float(k.rows)) {  // of float: half types are not stored
      const auto* row = static_cast<const float*>(x[0]);
      auto* const grad = static_cast<float*>(y[0]);
      const KeptExps exps{grad};
      stat = entropy_of_logits<true>(row, k.rows.classes, k.rows.temperature, columns, exps);
      entropy_gradient(k.rows, row, grad, stat, coefficient, columns, exps);
    } else {
      stat = entropy_row(k.rows, x[0], columns);
      any_gradient(k.rows, x[0], k.grad, y[0], stat, coefficient, columns);
    }
    stat.store(k.stat + EntropyStat::kSize * i);
  });
}

void entropy_double_backward(const EntropyDoubleBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.x, k.v};
  const RowsOut out[] = {k.d_x};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    double_backward_row(k, i, x, y[0], columns);
  });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
