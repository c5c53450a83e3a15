// CPU kernels of cross-entropy. Compiled once per instruction set (CPU_CAPABILITY); formulas in cross_entropy.h.
//
// Class labels over logits: SIMD in float (double for double inputs), half types widened in registers, memory read
// once; over rows instead of over classes where these are few. With label smoothing, where q - p' may be small beside
// both, in double. Two sides in logits of float and the half types without smoothing: SIMD in float, but for P's
// gradient. Everything else: SIMD in double for all types.
#include "cross_entropy/cross_entropy.h"

#include <algorithm>
#include <limits>

#include "core/row_scores.h"
#include "entropy/entropy_rows.h"
#include "kl_div/kl_div_rows.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

// -- The target is a distribution -----------------------------------------------------------------------------------

// Both sides of a row with what its statistics tell of them.
struct Distributions {
  const CrossEntropyRows& rows;
  const void* const p;
  const void* const q;
  Scores p_side, q_side;
  Split<double> centre;
  D inv_t, base, near, uniform, keep;
  bool both_logits;

  Distributions(const CrossEntropyRows& rows_, const void* p_, const void* q_, const CrossEntropyStat& stat)
      : rows(rows_),
        p(p_),
        q(q_),
        p_side(rows.p.dtype, rows.p_space, rows.temperature, {stat.top_p, stat.log_z_p}),
        q_side(rows.q.dtype, rows.q_space, rows.temperature, {stat.top_q, stat.log_z_q}),
        centre(centre_of(stat)),
        inv_t(1 / rows.temperature),
        base(stat.base),
        near(stat.near),
        uniform(rows.smoothing / static_cast<double>(rows.classes)),
        keep(1 - rows.smoothing),
        both_logits(rows.from_logits()) {}

  struct Entry {
    D t, x, p, q, n_p, n;
  };
  template <class Count>
  TD_INLINE Entry read(int64_t i, Count count) const {
    Entry e;
    p_side.read(p, i, count, e.t, e.p, e.n_p);
    q_side.read(q, i, count, e.x, e.q, e.n);
    if (p_side.space == kProbs) e.p = select(e.p < D(0.0), D(std::numeric_limits<double>::quiet_NaN()), e.p);
    return e;
  }
  // n around its value at P's largest class; for P in logits.
  TD_INLINE D around(const Entry& e) const { return q_side.space == kLogits ? (base - e.x) * inv_t : e.n + base; }
  // u of both sides in logits
  TD_INLINE D difference(const Entry& e) const { return difference_minus(e.t, e.x, centre) * inv_t; }
  // p'
  TD_INLINE D target(const Entry& e) const { return rows.smoothing == 0 ? e.p : e.p * keep + uniform; }
  // Gradients of an entry, before the row's coefficient.
  TD_INLINE D gradient_q(const Entry& e, double mass) const {
    const D zero(0.0), mixed = target(e);
    if (q_side.space == kLogits) {
      D gap = e.q * D(mass) - mixed;
      if (both_logits && rows.smoothing == 0) {
        const D l = difference(e) + near;
        gap = select(l.abs() < D(0.5), e.p * (zero - l).expm1(), gap);
      }
      return gap * inv_t;
    }
    if (q_side.space == kLogProbs) return zero - mixed;
    return select(mixed == zero, zero, zero - mixed / e.q);
  }
  TD_INLINE D gradient_p(const Entry& e, const CrossEntropyStat& stat) const {
    const D zero(0.0);
    if (p_side.space == kLogits) {
      if (std::isinf(stat.plain)) return zero;
      return select(e.p == zero, zero, e.p * (around(e) - D(stat.mean)) * inv_t * keep);
    }
    const D g = p_side.space == kLogProbs ? share(e.p, e.n) : select(e.p.isnan(), e.p, e.n);
    return select((e.p == zero) & (e.n == D(kInf<double>)), zero, g * keep);  // a class that neither side has
  }

 private:
  static Split<double> centre_of(const CrossEntropyStat& stat) {
    const ExactSum c = two_sum(stat.top_p, -stat.base);
    return Split<double>(c.sum, c.error);
  }
};

CrossEntropyStat distribution_row(const CrossEntropyRows& rows, const void* p, const void* q, ForEach columns) {
  CrossEntropyStat stat{};
  const double t = rows.temperature, infinity = std::numeric_limits<double>::infinity();
  const auto sum_side = [&](const void* x, const RowsIn& side, double& top, double& log_z) {
    const LogSum sum = log_sum(x, side.dtype, rows.classes, t, columns);
    top = sum.top, log_z = sum.log_z;
  };
  if (rows.p_space == kLogits) sum_side(p, rows.p, stat.top_p, stat.log_z_p);
  if (rows.q_space == kLogits) sum_side(q, rows.q, stat.top_q, stat.log_z_q);
  if (rows.p_space == kLogits) {
    const double x = entry(q, rows.q.dtype, index_of(p, rows.p.dtype, rows.classes, stat.top_p));
    stat.base = rows.q_space == kProbs ? std::log(x) : x;
  }
  const Distributions row(rows, p, q, stat);
  const D zero(0.0), inf(infinity);
  const auto sums = sums_of_columns<5>(
      rows.classes, columns, [&](int64_t i, auto count, D* lanes) __attribute__((always_inline)) {
        const auto e = row.read(i, count);
        // A p that only underflowed meets q = 0 with +inf.
        lanes[0] = lanes[0] + select((e.p == zero) & (e.n_p < inf) & (e.n == inf), inf, share(e.p, e.n));
        if (rows.p_space == kLogits) {
          lanes[1] = lanes[1] + share(e.p, row.around(e));
        } else {
          lanes[2] = lanes[2] + e.p;
        }
        if (rows.smoothing != 0) lanes[3] = lanes[3] + without_padding(e.n, count);
        if (row.both_logits) {
          // E_p[expm1(-u)]; far from 0 as p e^-u - p, with p e^-u = e^((x - base)/T - log_z_p), right where p is 0 too.
          const D u = row.difference(e), grown = ((e.x - row.base) * row.inv_t - D(stat.log_z_p)).exp();
          lanes[4] = lanes[4] + select(u.abs() < D(0.5), e.p * (zero - u).expm1(), grown - e.p);
        }
      });
  stat.plain = sums.of[0], stat.mean = sums.of[1];
  stat.mass = rows.p_space == kLogits ? 1 : sums.of[2];
  stat.near = std::log1p(sums.of[4]);
  stat.set_loss(rows, sums.of[3]);
  return stat;
}

void distribution_gradient(const CrossEntropyRows& rows, const void* p, const void* q, const RowsOut& out_p,
                           void* grad_p, const RowsOut& out_q, void* grad_q, const CrossEntropyStat& stat,
                           double coefficient, ForEach columns) {
  if (coefficient == 0) {
    fill_zero_any(grad_p, out_p.dtype, rows.classes);
    fill_zero_any(grad_q, out_q.dtype, rows.classes);
    return;
  }
  const Distributions row(rows, p, q, stat);
  const double mass = stat.mixed_mass(rows);
  const D c(coefficient), zero(0.0), half(0.5);
  // From logits the sum of Q's gradient is 0: the class with more than half of its mass gets what the others leave.
  const auto peak = merged_segments<Peak>(
      rows.classes, columns,
      [&](int64_t first, int64_t last) {
        Peak part;
        D others(0.0);
        for_lanes<double>(
            last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
              const int64_t i = first + j;
              const auto e = row.read(i, count);
              if (grad_p != nullptr) store_any(grad_p, out_p.dtype, i, c * row.gradient_p(e, stat), count);
              if (grad_q == nullptr) return;
              const D g = c * row.gradient_q(e, mass), top = e.q > half;
              if (any(top)) part.at = i + first_lane(top);
              others = others + select(top, zero, without_padding(g, count));
              store_any(grad_q, out_q.dtype, i, g, count);
            });
        part.others_q = sum_of(others);
        return part;
      },
      [](Peak& total, const Peak& part) { total.merge(part); });
  if (grad_q != nullptr && rows.q_space == kLogits && peak.at >= 0)
    store_any(grad_q, out_q.dtype, peak.at, D(-peak.others_q), 1);
}

// -- Both sides in logits, in float: H(P, Q) = H(P) + KL(P || Q) ------------------------------------------------------

// What such a row leaves, in the place of a CrossEntropyStat: the divergence's statistics first, and the loss where
// that has it.
static_assert(KlDivStat::kSize <= CrossEntropyStat::kLoss);
TD_INLINE auto leave_in(double* stats, const CrossEntropyRows& rows, ForEach columns) {
  return [stats, &rows, columns](int64_t row, const auto* p, const float* exps, const KlDivStat& kl) {
    double* const stat = stats + CrossEntropyStat::kSize * row;
    std::fill_n(stat, CrossEntropyStat::kSize, 0.0);
    kl.store(stat);
    if (p == nullptr) return 0.0;
    const auto entropy = [&](const auto& from) {
      return entropy_of_logits<false>(p, rows.classes, rows.temperature, columns, from).entropy;
    };
    return stat[CrossEntropyStat::kLoss] =
               (exps != nullptr ? entropy(GivenExps{exps}) : entropy(ComputedExps())) + kl.kl;
  };
}

// A row's statistics in double: those that it left, unless it left the float family's.
CrossEntropyStat double_stat(const CrossEntropyRows& rows, const void* p, const void* q, const double* left,
                             ForEach columns) {
  return rows.by_logits() ? distribution_row(rows, p, q, columns) : CrossEntropyStat::load(left);
}

// With dots for derivatives along (v_p, v_q): (log p). = (v - <p,v>)/T | v | v/p for logits | log_probs | probs, and
// n. = -(log q)., p. = p (log p). (v for probs), p'. = (1 - s) p., M'. = sum p'.:
//   P's gradient.   (1 - s) times: [p. (n - N) + p (n. - N.)]/T | p. n + p n. | n.
//   Q's gradient.   [q (log q). M' + q M'. - p'.]/T | -p'. | (p' (log q). - p'.)/q
void distribution_double_backward(const CrossEntropyDoubleBackward& k, int64_t row_index, const void* const* in,
                                  void* const* out, ForEach columns) {
  const CrossEntropyRows& rows = k.rows;
  const auto stat = double_stat(rows, in[0], in[1], k.stat + CrossEntropyStat::kSize * row_index, columns);
  const Distributions row(rows, in[0], in[1], stat);
  const double coefficient = k.coefficient[row_index], mass = stat.mixed_mass(rows);
  const bool p_logits = rows.p_space == kLogits, q_logits = rows.q_space == kLogits;
  const D zero(0.0);
  const auto along = [&](int64_t i, auto count, D& v_p, D& v_q) __attribute__((always_inline)) {
    v_p = in[2] ? load_any(in[2], k.v_p.dtype, i, count, 0.0) : zero;
    v_q = in[3] ? load_any(in[3], k.v_q.dtype, i, count, 0.0) : zero;
  };
  const auto first = sums_of_columns<3>(
      rows.classes, columns, [&](int64_t i, auto count, D* lanes) __attribute__((always_inline)) {
        const auto e = row.read(i, count);
        D v_p, v_q;
        along(i, count, v_p, v_q);
        lanes[0] = lanes[0] + (rows.p_space == kProbs ? v_p : e.p * v_p);
        lanes[1] = lanes[1] + e.q * v_q;
        lanes[2] = lanes[2] + select(v_p == zero, zero, v_p * row.gradient_p(e, stat)) +
                   select(v_q == zero, zero, v_q * row.gradient_q(e, mass));
      });
  if (k.d_coefficient != nullptr) k.d_coefficient[row_index] = first.of[2];
  if (coefficient == 0) {
    fill_zero_any(out[0], k.d_p.dtype, rows.classes);
    fill_zero_any(out[1], k.d_q.dtype, rows.classes);
    return;
  }
  if (out[0] == nullptr && out[1] == nullptr) return;
  const D mean_p(first.of[0]), mean_q(first.of[1]);
  const auto dots = [&](const Distributions::Entry& e, D v_p, D v_q, D& p_dot, D& log_q_dot)
      __attribute__((always_inline)) {
    p_dot = rows.p_space == kProbs ? v_p : e.p * (p_logits ? (v_p - mean_p) * row.inv_t : v_p);
    log_q_dot = q_logits ? (v_q - mean_q) * row.inv_t : rows.q_space == kProbs ? v_q / e.x : v_q;
    log_q_dot = select(e.n == D(kInf<double>), zero, log_q_dot);
  };
  // N. = sum p. n + p n.; from logits p. sums to 0, and any origin of n will do.
  double n_dot_total = 0;
  if (p_logits)
    n_dot_total = sums_of_columns<1>(
                      rows.classes, columns,
                      [&](int64_t i, auto count, D* lanes) __attribute__((always_inline)) {
                        const auto e = row.read(i, count);
                        D v_p, v_q, p_dot, log_q_dot;
                        along(i, count, v_p, v_q);
                        dots(e, v_p, v_q, p_dot, log_q_dot);
                        lanes[0] = lanes[0] + share(p_dot, row.around(e)) - e.p * log_q_dot;
                      })
                      .of[0];
  const D c(coefficient), n_dot(n_dot_total), mass_dot((1 - rows.smoothing) * (p_logits ? 0 : first.of[0]));
  for_segments(rows.classes, columns, [&](int64_t begin, int64_t last, int64_t) {
    for_lanes<double>(
        last - begin, [&](int64_t j, auto count) __attribute__((always_inline)) {
          const int64_t i = begin + j;
          const auto e = row.read(i, count);
          D v_p, v_q, p_dot, log_q_dot;
          along(i, count, v_p, v_q);
          dots(e, v_p, v_q, p_dot, log_q_dot);
          if (out[0] != nullptr) {
            D h;
            if (p_logits) {
              h = (p_dot * (row.around(e) - D(stat.mean)) - e.p * (log_q_dot + n_dot)) * row.inv_t;
              h = std::isinf(stat.plain) ? zero : select(e.p == zero, zero, h);
            } else if (rows.p_space == kLogProbs) {
              h = select(e.p == zero, zero, p_dot * e.n - e.p * log_q_dot);
            } else {
              h = zero - log_q_dot;
            }
            store_any(out[0], k.d_p.dtype, i, c * h * row.keep, count);
          }
          if (out[1] != nullptr) {
            const D mixed_dot = row.keep * p_dot;
            D h;
            if (q_logits) {
              h = (e.q * (log_q_dot * D(mass) + mass_dot) - mixed_dot) * row.inv_t;
            } else if (rows.q_space == kLogProbs) {
              h = zero - mixed_dot;
            } else {
              h = select(e.q == zero, zero, (row.target(e) * log_q_dot - mixed_dot) / e.q);
            }
            store_any(out[1], k.d_q.dtype, i, c * h, count);
          }
        });
  });
}

// -- The target is a class label, over logits -------------------------------------------------------------------------

// Loads a chunk's vectors in their order, with -inf for the label's entry if that is among them: beside it, the sum of
// the others would be rounded away.
template <class A, bool kHides>
class Others {
 public:
  TD_INLINE explicit Others(int64_t label) : behind_(Vec<A>::arange(static_cast<A>(-label), A(1))) {}
  template <class T, class Count>
  TD_INLINE Vec<A> next(const T* x, Count count) {
    const Vec<A> v = load_lanes<A>(x, count, -kInf<A>);
    if constexpr (!kHides) return v;
    const auto is_label = less(behind_.abs(), Vec<A>(A(0.5)));
    behind_ = behind_ + Vec<A>(static_cast<A>(kLanes<A>));
    return select(is_label, Vec<A>(-kInf<A>), v);
  }

 private:
  Vec<A> behind_;  // the label, in classes: exact in a chunk
};

// exps: where e^a is left for the gradient, or null. It may be x.
template <class A, bool kSmooth, bool kHides, class T>
TD_INLINE void scan_label_chunk(const T* x, int64_t n, int64_t label, double inv_t_, A* exps, LabelScan& scan) {
  const Vec<A> inv_t(static_cast<A>(inv_t_));
  if constexpr (kHides) {
    Others<A, true> others(label);
    Vec<A> top(-kInf<A>);
    for_lanes<A>(
        n, [&](int64_t i, auto count) __attribute__((always_inline)) { top = max_of(others.next(x + i, count), top); });
    scan.raise(static_cast<double>(max_lane(top)), inv_t_);
  } else {
    scan.raise(max_of_row<A>(x, n), inv_t_);
  }
  const Vec<A> max(static_cast<A>(scan.centre()));
  if constexpr (kSmooth) {
    Vec<A> drop(A(0));
    for_lanes<A>(
        n, [&](int64_t i, auto count) __attribute__((always_inline)) {
          drop = drop + (max - load_lanes<A>(x + i, count, static_cast<A>(scan.centre()))) * inv_t;
        });
    scan.count += static_cast<double>(n), scan.drop += sum_of(drop);
  }
  Others<A, kHides> others(label);
  Vec<A> sum(A(0));
  for (int64_t b = 0; b < n; b += kBlock) {
    Vec<A> part(A(0));
    for_lanes<A>(
        std::min(kBlock, n - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
          const Vec<A> e = exp_of((others.next(x + b + i, count) - max) * inv_t);
          part = part + e;
          if (exps != nullptr) store_lanes<A>(exps + b + i, e, count);
        });
    sum = sum + part;
  }
  scan.sum += sum_of(sum);
}

// exps, max_of_chunk: what the gradient will need, e^a with the maximum so far of each chunk, or null.
template <class A, bool kSmooth, class T>
LabelScan scan_label(const T* x, int64_t first, int64_t last, int64_t label, double inv_t, A* exps,
                     double* max_of_chunk) {
  LabelScan scan;
  for (int64_t c = first; c < last; c += kChunk) {
    const int64_t n = std::min(kChunk, last - c);
    A* const at = exps != nullptr ? exps + c : nullptr;
    if (label >= c && label < c + n) {
      scan_label_chunk<A, kSmooth, true>(x + c, n, label - c, inv_t, at, scan);
    } else {
      scan_label_chunk<A, kSmooth, false>(x + c, n, 0, inv_t, at, scan);
    }
    if (max_of_chunk != nullptr) max_of_chunk[c / kChunk] = scan.max;
  }
  return scan;
}

template <class A, bool kSmooth, class T>
LabelStat label_row(const LabelRows& rows, const T* x, int64_t label, ForEach columns, A* exps, double* max_of_chunk,
                    LabelShares& shares) {
  const double inv_t = inverse_temperature<A>(rows.temperature);
  const double at_label = static_cast<double>(x[label]);  // before exps overwrites it
  auto scan = merged_segments<LabelScan>(
      rows.classes, columns,
      [&](int64_t first, int64_t last) {
        return scan_label<A, kSmooth>(x, first, last, label, inv_t, exps, max_of_chunk);
      },
      [&](LabelScan& total, const LabelScan& part) { total.merge(part, inv_t); });
  return scan.finish(at_label, inv_t, rows.smoothing, rows.classes, shares);
}
// A row of which nothing is kept for its gradient.
template <class A, bool kSmooth, class T>
TD_INLINE LabelStat label_row(const LabelRows& rows, const T* x, int64_t label, ForEach columns) {
  LabelShares unused;
  return label_row<A, kSmooth>(rows, x, label, columns, static_cast<A*>(nullptr), nullptr, unused);
}

template <class A, bool kSmooth, class T>
void label_gradient_row(const LabelRows& rows, const T* x, T* grad, int64_t label, const LabelStat& stat,
                        double coefficient, ForEach columns) {
  const double inv = inverse_temperature<A>(rows.temperature), c = coefficient * inv;
  const double own = coefficient * label_gradient(rows, stat, inv);
  const Vec<A> inv_t(static_cast<A>(inv)), base(static_cast<A>(finite_or_zero(stat.base))),
      factor(static_cast<A>(c * std::exp(-stat.log_z))),
      uniform(static_cast<A>(c * rows.smoothing / static_cast<double>(rows.classes)));
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    for_lanes<A>(
        last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
          const int64_t i = first + j;
          Vec<A> g = exp_of((load_lanes<A>(x + i, count, -kInf<A>) - base) * inv_t) * factor;
          if constexpr (kSmooth) g = g - uniform;
          store_lanes<A>(grad + i, g, count);
        });
  });
  grad[label] = static_cast<T>(static_cast<A>(own));
}

// A is float or double as T is: the exponentials wait in grad.
template <class T>
LabelStat label_value_and_grad_row(const LabelRows& rows, const T* x, T* grad, int64_t label, double coefficient,
                                   ForEach columns, double* max_of_chunk) {
  LabelShares shares;
  const LabelStat stat = label_row<T, false>(rows, x, label, columns, grad, max_of_chunk, shares);
  const double inv_t = inverse_temperature<T>(rows.temperature), c = coefficient * inv_t;
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t b = first; b < last; b += kChunk) {
      const double max = max_of_chunk[b / kChunk], unit = max == stat.base ? 1 : kept_factor(max, stat.base, inv_t);
      const Vec<T> factor(static_cast<T>(c * shares.unit * unit));
      for_lanes<T>(
          std::min(kChunk, last - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
            store_lanes<T>(grad + b + i, load_lanes<T>(grad + b + i, count, T(0)) * factor, count);
          });
    }
  });
  grad[label] = static_cast<T>(-c * shares.others);
  return stat;
}

// -- The same, of few classes: a lane for each row --------------------------------------------------------------------

// Up to this many classes most of a row's time would go into what is done once a row.
constexpr int64_t kFewClasses = 16;

TD_INLINE bool are_few(const LabelRows& rows, ForEach columns) {
  return rows.classes <= kFewClasses && rows.smoothing == 0 && columns == nullptr;
}

// Neighbouring rows. Which lane a row has changes nothing of its results.
template <class A, class T>
class LabelTile {
 public:
  static constexpr int kRows = kLanes<A>;

  explicit LabelTile(const LabelRows& rows) : rows_(rows), inv_t_(inverse_temperature<A>(rows.temperature)) {}

  const LabelStat& stat(int lane) const { return stats_[lane]; }

  // is_read(row): the others are left alone, their statistics are 0.
  template <class IsRead>
  void scan(int64_t first, int count, const IsRead& is_read) {
    A label[kRows] = {}, own[kRows], top[kRows], sum[kRows];
    bool read[kRows];
    const auto classes = static_cast<int>(rows_.classes);
    for (int r = 0; r < kRows; ++r) {
      read[r] = r < count && is_read(first + r);
      if (read[r]) label[r] = static_cast<A>(rows_.labels[first + r]);
      const T* const x = static_cast<const T*>(rows_.x.data) + (read[r] ? rows_.x.layout.offset(first + r) : 0);
      for (int j = 0; j < classes; ++j)
        entries_[j * kRows + r] = read[r] ? static_cast<A>(x[j * rows_.x.layout.class_stride]) : A(0);
    }
    const Vec<A> labels = Vec<A>::loadu(label), lowest(-kInf<A>), zero(A(0)), inv_t(static_cast<A>(inv_t_));
    const auto is_label = [&](int j) __attribute__((always_inline)) {
      return less((labels - Vec<A>(static_cast<A>(j))).abs(), Vec<A>(A(0.5)));
    };
    Vec<A> at_label(zero), most(lowest), total(zero);
    for (int j = 0; j < classes; ++j) {
      const Vec<A> x = Vec<A>::loadu(entries_ + j * kRows);
      at_label = select(is_label(j), x, at_label), most = max_of(select(is_label(j), lowest, x), most);
    }
    const Vec<A> centre = select(less(lowest, most), most, zero);
    for (int j = 0; j < classes; ++j) {
      const Vec<A> x = select(is_label(j), lowest, Vec<A>::loadu(entries_ + j * kRows));
      const Vec<A> e = exp_of((x - centre) * inv_t);
      total = total + e;
      e.store(entries_ + j * kRows);
    }
    at_label.store(own), most.store(top), total.store(sum);
    for (int r = 0; r < kRows; ++r) {
      stats_[r] = {};
      if (!read[r]) continue;
      LabelScan scan{static_cast<double>(top[r]), static_cast<double>(sum[r])};
      stats_[r] = scan.finish(static_cast<double>(own[r]), inv_t_, 0, rows_.classes, shares_[r]);
    }
  }

  // Of a row that was read.
  void gradient(int lane, int64_t label, double coefficient, A* grad, int64_t stride) const {
    const double c = coefficient * inv_t_;
    const auto factor = static_cast<A>(c * shares_[lane].unit);
    for (int64_t j = 0; j < rows_.classes; ++j) grad[j * stride] = entries_[j * kRows + lane] * factor;
    grad[label * stride] = static_cast<A>(-c * shares_[lane].others);
  }

 private:
  const LabelRows& rows_;
  double inv_t_;
  A entries_[kFewClasses * kRows];  // of a class, those of all rows; then e^a
  LabelStat stats_[kRows];
  LabelShares shares_[kRows];
};

template <class A, class T>
void few_classes_forward(const LabelForward& k, int64_t begin, int64_t end) {
  LabelTile<A, T> tile(k.rows);
  const auto weight = [&](int64_t i) { return k.weight ? k.weight[i] : 1; };
  for (int64_t first = begin; first < end; first += tile.kRows) {
    const int count = static_cast<int>(std::min<int64_t>(tile.kRows, end - first));
    tile.scan(first, count, [&](int64_t i) { return weight(i) != 0; });
    for (int r = 0; r < count; ++r) {
      const int64_t i = first + r;
      tile.stat(r).store(k.stat + LabelStat::kSize * i);
      store_loss(k, i, weight(i) != 0 ? weight(i) * tile.stat(r).loss : 0);
    }
  }
}

template <class A>
void few_classes_value_and_grad(const LabelValueAndGrad& k, int64_t begin, int64_t end) {
  LabelTile<A, A> tile(k.rows);
  const auto coefficient = [&](int64_t i) { return k.scale * (k.weight ? k.weight[i] : 1); };
  const int64_t stride = k.grad.layout.class_stride;
  for (int64_t first = begin; first < end; first += tile.kRows) {
    const int count = static_cast<int>(std::min<int64_t>(tile.kRows, end - first));
    tile.scan(first, count, [&](int64_t i) { return coefficient(i) != 0; });
    for (int r = 0; r < count; ++r) {
      const int64_t i = first + r;
      auto* const grad = static_cast<A*>(k.grad.data) + k.grad.layout.offset(i);
      tile.stat(r).store(k.stat + LabelStat::kSize * i);
      if (coefficient(i) != 0) {
        tile.gradient(r, k.rows.labels[i], coefficient(i), grad, stride);
      } else {
        for (int64_t j = 0; j < k.rows.classes; ++j) grad[j * stride] = 0;
      }
    }
  }
}

// f.template operator()<A, kSmooth, T>() for the row's type.
template <class F>
TD_INLINE void dispatch_label_types(const LabelRows& rows, const F& f) {
  const auto with = [&]<class T>() {
    using Own = std::conditional_t<std::is_same_v<T, double>, double, float>;
    return rows.smoothing != 0 ? f.template operator()<double, true, T>() : f.template operator()<Own, false, T>();
  };
  if (rows.x.dtype == DType::Double) return with.template operator()<double>();
  dispatch_float_types(rows.x.dtype, with);
}

// -- The target is a class label, over log-probabilities or probabilities ---------------------------------------------

// p' of the classes other than the label, and what the label has more.
struct LabelTarget {
  D uniform;
  double own;
  explicit LabelTarget(const LabelRows& rows)
      : uniform(rows.smoothing / static_cast<double>(rows.classes)), own(1 - rows.smoothing) {}
};

LabelStat free_label_row(const LabelRows& rows, const void* x, int64_t label, ForEach columns) {
  const double at_label = entry(x, rows.x.dtype, label), s = rows.smoothing;
  const bool probs = rows.space == kProbs;
  // Of the other classes without smoothing only a NaN counts.
  const auto sums = sums_of_columns<1>(
      rows.classes, columns, [&](int64_t i, auto count, D* lanes) __attribute__((always_inline)) {
        const D zero(0.0), given = load_any(x, rows.x.dtype, i, count, probs ? 1.0 : 0.0);
        const D n = zero - (probs ? given.log() : given);
        lanes[0] = lanes[0] + (s != 0 ? n : select(n.isnan(), n, zero));
      });
  return free_label_stat(rows, at_label, sums.of[0]);
}

// The gradient of log-probabilities or probabilities, or with v its derivative along it, times `coefficient`.
void free_label_gradient(const LabelRows& rows, const void* x, int64_t label, const void* v, DType v_dtype, void* out,
                         DType out_dtype, double coefficient, ForEach columns) {
  const LabelTarget target(rows);
  const D c(coefficient), zero(0.0);
  const auto value = [&](D given, D p, D along) __attribute__((always_inline)) {
    if (rows.space == kLogProbs) return v != nullptr ? zero : zero - c * p;
    const D g = v != nullptr ? p * along / (given * given) : zero - p / given;
    return select(p == zero, zero, c * g);
  };
  const double given = entry(x, rows.x.dtype, label), along = v != nullptr ? entry(v, v_dtype, label) : 0;
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    for_lanes<double>(
        last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
          const int64_t i = first + j;
          const D x_i = load_any(x, rows.x.dtype, i, count, 0.0),
                  v_i = v != nullptr ? load_any(v, v_dtype, i, count, 0.0) : zero;
          store_any(out, out_dtype, i, value(x_i, target.uniform, v_i), count);
        });
  });
  const D own = value(D(given), target.uniform + D(target.own), D(along));
  store_any(out, out_dtype, label, own, 1);
}

// H v = q (v - <q, v>)/T^2; by differences from v_y, in which the label's own part is the sum of the others'.
void label_double_backward(const LabelDoubleBackward& k, int64_t row, const void* x, const void* v, void* out,
                           ForEach columns) {
  const LabelRows& rows = k.rows;
  const auto stat = LabelStat::load(k.stat + LabelStat::kSize * row);
  const int64_t label = rows.labels[row];
  const double coefficient = k.coefficient[row], s = rows.smoothing;
  const double inv_t = 1 / rows.temperature;
  const bool left_out = label < 0 || label >= rows.classes;  // only a row of coefficient 0 may have such a label
  if (left_out && k.d_coefficient != nullptr) k.d_coefficient[row] = 0;
  if (coefficient == 0 && (left_out || k.d_coefficient == nullptr))
    return fill_zero_any(out, k.d_x.dtype, rows.classes);
  const DType type = rows.x.dtype;
  const double uniform = s / static_cast<double>(rows.classes), v_label = entry(v, k.v.dtype, label);
  const D zero(0.0);
  if (rows.space != kLogits) {
    if (k.d_coefficient != nullptr) {
      const bool probs = rows.space == kProbs;
      const auto of = [&](double p, double given, double along) {
        return p == 0 || along == 0 ? 0 : -p * along / (probs ? given : 1);
      };
      const auto sums = sums_of_columns<1>(
          rows.classes, columns, [&](int64_t i, auto count, D* lanes) __attribute__((always_inline)) {
            if (uniform == 0) return;
            const D v_i = load_any(v, k.v.dtype, i, count, 0.0), x_i = load_any(x, type, i, count, 1.0);
            lanes[0] = lanes[0] + select(v_i == zero, zero, v_i / (probs ? x_i : D(1.0)));
          });
      k.d_coefficient[row] = of(1 - s, entry(x, type, label), v_label) - uniform * sums.of[0];
    }
    if (out == nullptr) return;
    if (coefficient == 0) return fill_zero_any(out, k.d_x.dtype, rows.classes);
    return free_label_gradient(rows, x, label, v, k.v.dtype, out, k.d_x.dtype, coefficient, columns);
  }
  // In double, which statistics summed in float are not good for: q (v - <q, v>) is a difference beside a large q.
  LogSum z{stat.base, stat.log_z};
  if (type != DType::Double && s == 0) z = log_sum(x, type, rows.classes, rows.temperature, columns);
  const D base(finite_or_zero(z.top)), log_z(z.log_z), own(v_label);
  const auto read = [&](int64_t i, auto count, D& q, D& away) __attribute__((always_inline)) {
    q = ((load_any(x, type, i, count, -kInf<double>) - base) * D(inv_t) - log_z).exp();
    away = load_any(v, k.v.dtype, i, count, v_label) - own;
  };
  const auto sums = sums_of_columns<2>(
      rows.classes, columns, [&](int64_t i, auto count, D* lanes) __attribute__((always_inline)) {
        D q, away;
        read(i, count, q, away);
        lanes[0] = lanes[0] + q * away, lanes[1] = lanes[1] + away;
      });
  // <v, q - p'> = sum q (v - v_y) - s/K sum (v - v_y)
  if (k.d_coefficient != nullptr) k.d_coefficient[row] = (sums.of[0] - uniform * sums.of[1]) * inv_t;
  if (out == nullptr) return;
  if (coefficient == 0) return fill_zero_any(out, k.d_x.dtype, rows.classes);
  const D c(coefficient * inv_t * inv_t), mean(sums.of[0]);
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    for_lanes<double>(
        last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
          D q, away;
          read(first + j, count, q, away);
          store_any(out, k.d_x.dtype, first + j, c * q * (away - mean), count);
        });
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& k, int64_t begin, int64_t end, ForEach columns) {
  if (k.rows.by_logits())
    return dispatch_float_types(k.rows, [&]<class TP, class TQ>() {
      forward_logits<float, TP, TQ>(k, begin, end, columns, leave_in(k.stat, k.rows, columns));
    });
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {{}};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const*) {
    const double weight = k.weight ? k.weight[i] : 1;
    CrossEntropyStat stat{};
    if (weight != 0) stat = distribution_row(k.rows, x[0], x[1], columns);
    stat.store(k.stat + CrossEntropyStat::kSize * i);
    store_loss(k, i, weight != 0 ? weight * stat.loss : 0);
  });
}

void cross_entropy_backward(const CrossEntropyBackward& k, int64_t begin, int64_t end, ForEach columns) {
  if (k.rows.by_logits() && k.grad_p.data == nullptr)
    return dispatch_float_types(k.rows, [&]<class TP, class TQ>() {
      backward_logits<float, TP, TQ>(k, begin, end, columns, CrossEntropyStat::kSize);
    });
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad_p, k.grad_q};
  RowTiles<2, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    CrossEntropyStat stat{};  // of no use where the coefficient is 0: such a row is not read
    if (k.coefficient[i] != 0) stat = double_stat(k.rows, x[0], x[1], k.stat + CrossEntropyStat::kSize * i, columns);
    distribution_gradient(k.rows, x[0], x[1], k.grad_p, y[0], k.grad_q, y[1], stat, k.coefficient[i], columns);
  });
}

void cross_entropy_value_and_grad(const CrossEntropyValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  if (k.rows.by_logits() && k.wrt_q)
    return dispatch_float_types(k.rows.p.dtype, [&]<class TP>() {  // Q is in float: kStoresHalf
      value_and_grad_logits<float, true, TP, float>(k, begin, end, columns, leave_in(k.stat, k.rows, columns));
    });
  const RowsIn in[] = {k.rows.p, k.rows.q};
  const RowsOut out[] = {k.grad};
  const RowsOut unwanted{};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    const double coefficient = k.scale * (k.weight ? k.weight[i] : 1);
    CrossEntropyStat stat{};
    if (coefficient != 0) stat = distribution_row(k.rows, x[0], x[1], columns);
    stat.store(k.stat + CrossEntropyStat::kSize * i);
    distribution_gradient(k.rows, x[0], x[1], k.wrt_q ? unwanted : k.grad, k.wrt_q ? nullptr : y[0],
                          k.wrt_q ? k.grad : unwanted, k.wrt_q ? y[0] : nullptr, stat, coefficient, columns);
  });
}

void cross_entropy_double_backward(const CrossEntropyDoubleBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.p, k.rows.q, k.v_p, k.v_q};
  const RowsOut out[] = {k.d_p, k.d_q};
  RowTiles<4, 2>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    distribution_double_backward(k, i, x, y, columns);
  });
}

void cross_entropy_labels_forward(const LabelForward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.x};
  const RowsOut out[] = {{}};
  const auto each = [&](const auto& row) {
    RowTiles<1, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const*) {
      const double weight = k.weight ? k.weight[i] : 1;
      LabelStat stat{};
      if (weight != 0) stat = row(x[0], k.rows.labels[i]);
      stat.store(k.stat + LabelStat::kSize * i);
      store_loss(k, i, weight != 0 ? weight * stat.loss : 0);
    });
  };
  if (k.rows.space != kLogits)
    return each([&](const void* x, int64_t label) { return free_label_row(k.rows, x, label, columns); });
  dispatch_label_types(k.rows, [&]<class A, bool kSmooth, class T>() {
    if constexpr (!kSmooth)
      if (are_few(k.rows, columns)) return few_classes_forward<A, T>(k, begin, end);
    each([&](const void* x, int64_t label) {
      return label_row<A, kSmooth>(k.rows, static_cast<const T*>(x), label, columns);
    });
  });
}

void cross_entropy_labels_backward(const LabelBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.x};
  const RowsOut out[] = {k.grad};
  const auto each = [&](const auto& row) {
    RowTiles<1, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
      if (k.coefficient[i] == 0) return fill_zero_any(y[0], k.grad.dtype, k.rows.classes);
      row(x[0], y[0], i);
    });
  };
  if (k.rows.space != kLogits)
    return each([&](const void* x, void* grad, int64_t i) {
      free_label_gradient(k.rows, x, k.rows.labels[i], nullptr, k.rows.x.dtype, grad, k.grad.dtype, k.coefficient[i],
                          columns);
    });
  dispatch_label_types(k.rows, [&]<class A, bool kSmooth, class T>() {
    each([&](const void* x, void* grad, int64_t i) {
      label_gradient_row<A, kSmooth>(k.rows, static_cast<const T*>(x), static_cast<T*>(grad), k.rows.labels[i],
                                     LabelStat::load(k.stat + LabelStat::kSize * i), k.coefficient[i], columns);
    });
  });
}

void cross_entropy_labels_value_and_grad(const LabelValueAndGrad& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.x};
  const RowsOut out[] = {k.grad};
  const int64_t n = k.rows.classes;
  const auto max_of_chunk = std::make_unique_for_overwrite<double[]>(static_cast<size_t>((n + kChunk - 1) / kChunk));
  const auto each = [&](const auto& row) {
    RowTiles<1, 1>(in, out, n).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
      const double coefficient = k.scale * (k.weight ? k.weight[i] : 1);
      LabelStat stat{};
      if (coefficient == 0) {
        fill_zero_any(y[0], k.grad.dtype, n);
      } else {
        stat = row(x[0], y[0], k.rows.labels[i], coefficient);
      }
      stat.store(k.stat + LabelStat::kSize * i);
    });
  };
  if (k.rows.space != kLogits)
    return each([&](const void* x, void* grad, int64_t label, double coefficient) {
      const LabelStat stat = free_label_row(k.rows, x, label, columns);
      free_label_gradient(k.rows, x, label, nullptr, k.rows.x.dtype, grad, k.grad.dtype, coefficient, columns);
      return stat;
    });
  dispatch_label_types(k.rows, [&]<class A, bool kSmooth, class T>() {
    if constexpr (std::is_same_v<A, T> && !kSmooth)
      if (are_few(k.rows, columns)) return few_classes_value_and_grad<A>(k, begin, end);
    each([&](const void* x_, void* grad_, int64_t label, double coefficient) {
      const auto* x = static_cast<const T*>(x_);
      auto* grad = static_cast<T*>(grad_);
      if constexpr (std::is_same_v<A, T> && !kSmooth) {
        return label_value_and_grad_row(k.rows, x, grad, label, coefficient, columns, max_of_chunk.get());
      } else {
        const LabelStat stat = label_row<A, kSmooth>(k.rows, x, label, columns);
        label_gradient_row<A, kSmooth>(k.rows, x, grad, label, stat, coefficient, columns);
        return stat;
      }
    });
  });
}

void cross_entropy_labels_double_backward(const LabelDoubleBackward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.rows.x, k.v};
  const RowsOut out[] = {k.d_x};
  RowTiles<2, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    label_double_backward(k, i, x[0], x[1], y[0], columns);
  });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
