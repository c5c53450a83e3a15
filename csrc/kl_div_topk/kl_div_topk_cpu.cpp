// CPU kernels of the top-k KL divergence. Compiled once per instruction set (CPU_CAPABILITY); formulas in
// kl_div_topk.h.
//
// What has the size of a row is SIMD, in float for logits and log_probs of float and the half types; what has the size
// of k is in double.
#include "kl_div_topk/kl_div_topk.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "core/row_kernels.h"
#include "kl_div/kl_div.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

// An error of e in the logarithms of Q is a relative one of e sqrt(2/L) in the loss and in its gradient. Below this L,
// sums in float are not enough.
constexpr double kSumInDouble = 1e-2;

// f.template operator()<A, T>() for the type of the input.
template <class F>
TD_INLINE void dispatch_input(DType type, const F& f) {
  switch (type) {
    case DType::Double:
      return f.template operator()<double, double>();
    case DType::Half:
      return f.template operator()<float, c10::Half>();
    case DType::BFloat16:
      return f.template operator()<float, c10::BFloat16>();
    default:
      return f.template operator()<float, float>();
  }
}

template <class T>
TD_INLINE T minus_infinity() {
  if constexpr (std::is_same_v<T, c10::Half>) {
    return {0xFC00, c10::Half::from_bits()};  // gcc 12 warns of the intrinsic that converts one number
  } else {
    return static_cast<T>(-kInf<float>);
  }
}
// One number as the vectors' stores round it.
template <class A, class T>
TD_INLINE T rounded(double v) {
  T lanes[kLanes<A>];
  store<A>(lanes, Vec<A>(static_cast<A>(v)));
  return lanes[0];
}

struct Entry {
  int64_t index, place;  // of the class; in the row of indices and log_probs
};

// y = e^(x - shift)
void exp_all(const double* x, double shift, double* y, int64_t n) {
  for_lanes<double>(
      n, [&](int64_t i, auto count) __attribute__((always_inline)) {
        store_lanes<double>(y + i, (load_lanes<double>(x + i, count, 0.0) - D(shift)).exp(), count);
      });
}

// log sum e^x = max + log1p(others), so that a sum of nearly 1 has the digits of what it lacks.
struct SmallLse {
  double max = -std::numeric_limits<double>::infinity(), others = 0;

  // y = e^(x - max)
  static SmallLse of(const double* x, double* y, int64_t n) {
    SmallLse sum;
    int64_t at = -1;
    for (int64_t e = 0; e < n; ++e)
      if (x[e] > sum.max) sum.max = x[e], at = e;
    exp_all(x, sum.max, y, n);
    for (int64_t e = 0; e < n; ++e)
      if (e != at) sum.others += y[e];
    return sum;
  }
  double value() const { return max + std::log1p(others); }
};

// One row: the classes of K and, as the last entry, the tail.
class Row {
 public:
  explicit Row(const TopkRows& rows)
      : rows_(rows),
        room_(rows.k + 1),
        entries_(std::make_unique_for_overwrite<Entry[]>(static_cast<size_t>(rows.k))),
        values_(std::make_unique_for_overwrite<double[]>(static_cast<size_t>(8 * room_))),
        log_p(values_.get()),
        log_q(log_p + room_),
        p(log_q + room_),
        q(p + room_),
        l(q + room_),
        log_p_dot(l + room_),
        log_q_dot(log_p_dot + room_),
        given_q(log_q_dot + room_) {}

  int64_t size() const { return size_; }    // of K, and the number of the tail
  int64_t terms() const { return terms_; }  // of the loss
  bool has_tail() const { return terms_ > size_; }
  const Entry* begin() const { return entries_.get(); }
  const Entry* end() const { return begin() + size_; }
  Entry operator[](int64_t e) const { return entries_[static_cast<size_t>(e)]; }

  // P of a row; its classes in ascending order if `sorted`. False: the row is refused (without sorting, duplicates are
  // not seen).
  bool read(int64_t row, bool sorted) {
    const int64_t* const index = rows_.indices + row * rows_.k;
    const double* const given = rows_.log_probs + row * rows_.k;
    size_ = 0;
    for (int64_t j = 0; j < rows_.k; ++j) {
      if (given[j] == -kInf<double>) continue;
      if (index[j] < 0 || index[j] >= rows_.classes) return false;
      entries_[static_cast<size_t>(size_++)] = {index[j], j};
    }
    if (sorted) {
      std::sort(entries_.get(), entries_.get() + size_, [](Entry a, Entry b) { return a.index < b.index; });
      for (int64_t e = 1; e < size_; ++e)
        if ((*this)[e].index == (*this)[e - 1].index) return false;
    }
    for (int64_t e = 0; e < size_; ++e) log_p[e] = given[(*this)[e].place];
    return set_p(row);
  }

  // Q from the row of input and its statistics.
  template <class T>
  void set_q(const T* x, const TopkStat& stat) {
    const double t = rows_.temperature;
    gather(x);
    for (int64_t e = 0; e < size_; ++e) log_q[e] = rows_.space == kProbs ? std::log(given_q[e]) : given_q[e];
    if (rows_.tail == kTailRenormBoth) {
      if (rows_.space == kLogits) {
        double top = -kInf<double>;
        for (int64_t e = 0; e < size_; ++e) top = std::max(top, log_q[e]);
        for (int64_t e = 0; e < size_; ++e) log_q[e] = (log_q[e] - top) / t;
      }
      const double lse = SmallLse::of(log_q, q, size_).value();
      for (int64_t e = 0; e < size_; ++e) log_q[e] -= lse;
    } else if (rows_.space == kLogits) {
      for (int64_t e = 0; e < size_; ++e) log_q[e] = (log_q[e] - stat.shift) / t - stat.log_sum;
    }
    log_q[size_] = rows_.reads_all() ? stat.log_tail(t) : -kInf<double>;
    exp_all(log_q, 0, q, size_ + 1);
    given_q[size_] = q[size_];
    // Nothing is outside: what is missing of the teacher's mass is rounding.
    const bool no_tail = rows_.derived_tail() && log_q[size_] == -kInf<double> && p[size_] <= tolerance_;
    terms_ = size_ + (rows_.tail == kTailBucket && !no_tail ? 1 : 0);
    if (!has_tail()) p[size_] = 0, l[size_] = 0;
    for (int64_t e = 0; e < terms_; ++e) l[e] = log_p[e] == log_q[e] ? 0 : log_p[e] - log_q[e];
  }

  // The statistics of Q from the sum over the classes outside K.
  template <class T>
  TopkStat finish(const T* x, const LseScan& outside) {
    TopkStat stat;
    stat.tail_max = finite_or_zero(outside.max), stat.tail_log_sum = std::log(outside.sum);
    if (rows_.space != kLogits) return stat;
    gather(x);
    double top = outside.max;
    for (int64_t e = 0; e < size_; ++e) top = std::max(top, given_q[e]);
    stat.shift = finite_or_zero(top);
    const double inv_t = 1 / rows_.temperature;
    double sum = outside.sum * std::exp((stat.tail_max - stat.shift) * inv_t);
    if (outside.sum == 0) sum = 0;  // its maximum says nothing
    for (int64_t e = 0; e < size_; ++e) sum += std::exp((given_q[e] - stat.shift) * inv_t);
    stat.log_sum = std::log(sum);
    return stat;
  }

  double loss() const {
    // Nothing but padding has no distribution to renormalise.
    if (size_ == 0 && rows_.renormalises_p()) return std::numeric_limits<double>::quiet_NaN();
    // Do P and Q both sum to 1?
    const bool unit =
        rows_.tail == kTailRenormBoth || (rows_.derived_tail() && rows_.space == kLogits && has_tail() && p[size_] > 0);
    double sum = 0;
    for (int64_t e = 0; e < terms_; ++e) {
      const double a = rows_.reverse ? q[e] : p[e], b = rows_.reverse ? p[e] : q[e], x = rows_.reverse ? -l[e] : l[e];
      if (!unit) {
        sum += topk_term(a, x);
      } else if (std::fabs(x) < 0.5) {
        sum += a * x * x * phi_over_square<double>(x, [](double f, double g, double h) { return f * g + h; });
      } else {
        sum += topk_term(a, x) + (b - a);
      }
    }
    return sum;
  }

 private:
  bool set_p(int64_t row) {
    const SmallLse sum = SmallLse::of(log_p, p, size_);
    const double lse = sum.value(), scale = std::exp(sum.max);
    double spread = 0;
    for (int64_t e = 0; e < size_; ++e) spread += p[e] * std::fabs(log_p[e]);
    tolerance_ = kMassTolerance + (size_ > 0 ? rows_.rounding * scale * spread : 0);
    if (std::expm1(lse) > tolerance_) return false;
    const bool normalise = rows_.renormalises_p();
    const double factor = normalise ? 1 / (1 + sum.others) : scale;
    for (int64_t e = 0; e < size_; ++e) {
      p[e] *= factor;
      if (normalise) log_p[e] -= lse;
    }
    p[size_] = 0, log_p[size_] = -kInf<double>;
    if (rows_.tail != kTailBucket) return true;
    if (rows_.tail_log_prob != nullptr) {
      log_p[size_] = rows_.tail_log_prob[row];
      p[size_] = std::exp(log_p[size_]);
    } else if (!(lse >= 0)) {  // the two forms of log(1 - mass): by what is exact of mass and of 1 - mass
      p[size_] = -std::expm1(lse);
      log_p[size_] = lse < -0.7 ? std::log1p(-std::exp(lse)) : std::log(p[size_]);
    }
    return true;
  }
  template <class T>
  void gather(const T* x) {
    for (int64_t e = 0; e < size_; ++e) given_q[e] = static_cast<double>(x[(*this)[e].index]);
  }

  const TopkRows& rows_;
  int64_t room_, size_ = 0, terms_ = 0;
  double tolerance_ = 0;
  std::unique_ptr<Entry[]> entries_;
  std::unique_ptr<double[]> values_;

 public:
  // given_q: q as it was given, in input's space, and Q_t
  double *log_p, *log_q, *p, *q, *l, *log_p_dot, *log_q_dot, *given_q;
};

// f(columns, offset, count) for the chunks of [first, last), whose classes of K read as `nothing`; `row` is sorted.
template <class T, class F>
TD_INLINE void for_chunks_outside(const Row& row, const T* x, T nothing, int64_t first, int64_t last, const F& f) {
  T copy[kChunk];
  const Entry* next =
      std::lower_bound(row.begin(), row.end(), first, [](Entry a, int64_t index) { return a.index < index; });
  for (int64_t c = first; c < last; c += kChunk) {
    const int64_t n = std::min(kChunk, last - c);
    const T* columns = x + c;
    if (next != row.end() && next->index < c + n) {
      std::memcpy(static_cast<void*>(copy), columns, static_cast<size_t>(n) * sizeof(T));
      for (; next != row.end() && next->index < c + n; ++next) copy[next->index - c] = nothing;
      columns = copy;
    }
    f(columns, c, n);
  }
}

// Logits or log_probs: sum of e^((x - max)/T) outside K.
template <class A, class T>
LseScan scan_outside(const Row& row, const T* x, int64_t classes, double t, ForEach columns) {
  const double inv = inverse_temperature<A>(t);
  const Vec<A> inv_t(static_cast<A>(inv));
  return merged_segments<LseScan>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        LseScan part;
        for_chunks_outside<T>(row, x, minus_infinity<T>(), first, last, [&](const T* chunk, int64_t, int64_t n) {
          part.raise(max_of_row<A>(chunk, n), inv);
          const Vec<A> top(static_cast<A>(finite_or_zero(part.max)));
          for (int64_t b = 0; b < n; b += kBlock) {
            Vec<A> sum(A(0));
            for_lanes<A>(
                std::min(kBlock, n - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
                  const Vec<A> v = load_lanes<A>(chunk + b + i, count, -kInf<A>);
                  sum = sum + exp_of((v - top) * inv_t);
                });
            part.sum += sum_of(sum);
          }
        });
        return part;
      },
      [&](LseScan& whole, const LseScan& part) { whole.merge(part, inv); });
}

// Probabilities: their sum outside K, as a scan whose maximum is 0. A negative one makes it NaN.
template <class T>
LseScan sum_outside(const Row& row, const T* x, int64_t classes, ForEach columns) {
  const double sum = merged_segments<double>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        double part = 0;
        for_chunks_outside<T>(row, x, T(0), first, last, [&](const T* chunk, int64_t, int64_t n) {
          D sums(0.0);
          for_lanes<double>(
              n, [&](int64_t i, auto count) __attribute__((always_inline)) {
                const D v = load_lanes<double>(chunk + i, count, 0.0);
                sums = sums + select(v < D(0.0), D(std::numeric_limits<double>::quiet_NaN()), v);
              });
          part += sum_of(sums);
        });
        return part;
      },
      [](double& total, double part) { total += part; });
  return {0, sum};
}

template <class A, class T>
double forward_row(const TopkRows& rows, Row& row, const T* x, ForEach columns, TopkStat& stat) {
  const auto solve = [&](const LseScan& outside) {
    stat = row.finish(x, outside);
    row.set_q(x, stat);
    return row.loss();
  };
  if (!rows.reads_all()) {
    row.set_q(x, stat);
    return row.loss();
  }
  if (rows.space == kProbs) return solve(sum_outside(row, x, rows.classes, columns));
  const double loss = solve(scan_outside<A>(row, x, rows.classes, rows.temperature, columns));
  if (std::is_same_v<A, double> || rows.space != kLogits || !(loss < kSumInDouble)) return loss;
  return solve(scan_outside<double>(row, x, rows.classes, rows.temperature, columns));
}

template <class A, class T>
void forward(const TopkForward& k, int64_t begin, int64_t end, ForEach columns, int64_t* bad_row) {
  Row row(k.rows);
  const RowsIn in[] = {k.rows.input};
  const RowsOut out[] = {{}};
  RowTiles<1, 1>(in, out, k.rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const*) {
    const double weight = k.weight ? k.weight[i] : 1;
    TopkStat stat;
    double loss = 0;
    if (weight != 0 && *bad_row < 0) {
      if (row.read(i, true)) {
        loss = weight * forward_row<A>(k.rows, row, static_cast<const T*>(x[0]), columns, stat);
      } else {
        *bad_row = i;
      }
    }
    stat.store(k.stat + TopkStat::kSize * i);
    if (k.loss_is_double) {
      static_cast<double*>(k.loss)[i] = loss;
    } else {
      static_cast<float*>(k.loss)[i] = static_cast<float>(loss);
    }
  });
}

// What a gradient takes from the whole row.
struct Totals {
  double p = 0, q = 0;    // sums of the slopes where the side is normalised, else 0
  double tail_ratio = 0;  // G_t/P_t where the tail is what the log_probs leave
  bool p_is_0 = false, q_is_0 = false;

  Totals(const TopkRows& rows, const Row& row) {
    const bool derived = rows.derived_tail() && row.has_tail() && row.p[row.size()] > 0;
    const bool infinite = std::isinf(row.loss());
    p_is_0 = infinite && !rows.reverse && (rows.renormalises_p() || rows.derived_tail());
    q_is_0 = infinite && rows.reverse && rows.normalises_q();
    for (int64_t e = 0; e < row.terms(); ++e) {
      const TopkSlope s = topk_slope(rows.reverse, row.p[e], row.q[e], row.l[e]);
      if (rows.renormalises_p()) p += s.p;
      if (rows.normalises_q()) q += s.q;
      if (derived && e == row.size()) tail_ratio = s.p / row.p[e];
    }
  }
};

// gamma, and what a log-probability gets, of entry e
TopkSlope entry_gradient(const TopkRows& rows, const Row& row, const Totals& totals, int64_t e) {
  TopkSlope s{0, 0};
  if (e < row.terms()) s = topk_slope(rows.reverse, row.p[e], row.q[e], row.l[e]);
  const double p_part = e < row.size() ? row.p[e] * (totals.p + totals.tail_ratio) : 0;
  return {totals.p_is_0 ? 0 : s.p - p_part, totals.q_is_0 ? 0 : s.q - row.q[e] * totals.q};
}

double per_entry(const TopkRows& rows, double gamma, double q) {
  return rows.space == kLogits ? gamma / rows.temperature : rows.space == kProbs ? topk_per_prob(gamma, q) : gamma;
}

template <class A, class T>
void backward_row(const TopkBackward& k, const Row& row, const T* x, T* grad, int64_t i, ForEach columns) {
  const TopkRows& rows = k.rows;
  const TopkStat stat = TopkStat::load(k.stat + TopkStat::kSize * i);
  const double c = k.coefficient[i];
  const Totals totals(rows, row);
  const int64_t tail = row.size();
  const double gamma = entry_gradient(rows, row, totals, tail).q;
  if (grad != nullptr) {
    for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
      if (!rows.reads_all()) return fill_zero(grad + first, last - first);
      if (rows.space == kProbs)
        return std::fill(grad + first, grad + last, rounded<A, T>((c * per_entry(rows, gamma, row.given_q[tail]))));
      const Vec<A> inv_t(static_cast<A>(inverse_temperature<A>(rows.temperature))), top(static_cast<A>(stat.tail_max));
      const Vec<A> factor(
          static_cast<A>(stat.empty_tail() ? 0 : c * per_entry(rows, gamma, 0) * std::exp(-stat.tail_log_sum)));
      for_lanes<A>(
          last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
            const Vec<A> v = load_lanes<A>(x + first + j, count, -kInf<A>);
            store_lanes<A>(grad + first + j, exp_of((v - top) * inv_t) * factor, count);
          });
    });
  }
  for (int64_t e = 0; e < tail; ++e) {
    const TopkSlope g = entry_gradient(rows, row, totals, e);
    if (grad != nullptr) grad[row[e].index] = rounded<A, T>((c * per_entry(rows, g.q, row.given_q[e])));
    if (k.grad_log_probs != nullptr) k.grad_log_probs[i * rows.k + row[e].place] = c * g.p;
  }
  if (k.grad_tail != nullptr) k.grad_tail[i] = c * entry_gradient(rows, row, totals, tail).p;
}

template <class A, class T>
void backward(const TopkBackward& k, int64_t begin, int64_t end, ForEach columns, int64_t* bad_row) {
  const TopkRows& rows = k.rows;
  Row row(rows);
  const RowsIn in[] = {rows.input};
  const RowsOut out[] = {k.grad_input};
  RowTiles<1, 1>(in, out, rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    auto* const grad = static_cast<T*>(y[0]);
    const auto* const given = static_cast<const T*>(x[0]);
    if (k.grad_log_probs != nullptr) fill_zero(k.grad_log_probs + i * rows.k, rows.k);
    if (k.coefficient[i] == 0 || *bad_row >= 0) {
      if (grad != nullptr) fill_zero(grad, rows.classes);
      if (k.grad_tail != nullptr) k.grad_tail[i] = 0;
      return;
    }
    if (!row.read(i, false)) {
      *bad_row = i;
      return;
    }
    row.set_q(given, TopkStat::load(k.stat + TopkStat::kSize * i));
    backward_row<A>(k, row, given, grad, i, columns);
  });
}

// sum w d outside K, d = v/T | v | v/q
template <class T>
double mean_outside(const TopkRows& rows, const Row& row, const T* x, const T* v, const TopkStat& stat,
                    ForEach columns) {
  if (v == nullptr || !rows.reads_all() || stat.empty_tail()) return 0;
  const bool probs = rows.space == kProbs;
  const D inv_t(1 / rows.temperature), top(stat.tail_max), log_sum(stat.tail_log_sum);
  const double sum = merged_segments<double>(
      rows.classes, columns,
      [&](int64_t first, int64_t last) {
        double part = 0;
        // Of probabilities w d = v/Q_t: the classes of K are masked out of v.
        const T* const masked = probs ? v : x;
        for_chunks_outside<T>(
            row, masked, probs ? T(0) : minus_infinity<T>(), first, last, [&](const T* chunk, int64_t c, int64_t n) {
              D sums(0.0);
              for_lanes<double>(
                  n, [&](int64_t j, auto count) __attribute__((always_inline)) {
                    const D m = probs ? load_lanes<double>(chunk + j, count, 0.0)
                                      : load_lanes<double>(chunk + j, count, -kInf<double>);
                    if (probs) {
                      sums = sums + m;
                    } else {
                      const D w = ((m - top) * inv_t - log_sum).exp();
                      sums = sums + select(w == D(0.0), D(0.0), w * load_lanes<double>(v + c + j, count, 0.0));
                    }
                  });
              part += sum_of(sums);
            });
        return part;
      },
      [](double& total, double part) { total += part; });
  return probs ? sum / std::exp(stat.tail_log_sum) : sum / rows.temperature;
}

// Fills log_p_dot and log_q_dot. mean: mean_outside().
template <class T>
void set_dots(const TopkDoubleBackward& k, Row& row, const T* v, int64_t i, double mean) {
  const TopkRows& rows = k.rows;
  const int64_t tail = row.size();
  double p_dot = 0, mu = rows.space == kLogits && rows.reads_all() ? row.q[tail] * mean : 0;
  for (int64_t e = 0; e < tail; ++e) {
    row.log_p_dot[e] = k.v_log_probs != nullptr ? k.v_log_probs[i * rows.k + row[e].place] : 0;
    p_dot += topk_times(row.p[e], row.log_p_dot[e]);
    double d = v != nullptr ? static_cast<double>(v[row[e].index]) : 0;
    if (rows.space == kLogits) d /= rows.temperature;
    if (rows.space == kProbs) d = topk_per_prob(d, row.given_q[e]);
    row.log_q_dot[e] = d;
    mu += topk_times(row.q[e], d);
  }
  if (rows.renormalises_p())
    for (int64_t e = 0; e < tail; ++e) row.log_p_dot[e] -= p_dot;
  if (!rows.derived_tail()) {
    row.log_p_dot[tail] = k.v_tail != nullptr ? k.v_tail[i] : 0;
  } else {
    row.log_p_dot[tail] = row.p[tail] > 0 ? -p_dot / row.p[tail] : 0;
  }
  if (!rows.normalises_q()) mu = 0;
  for (int64_t e = 0; e < tail; ++e) row.log_q_dot[e] -= mu;
  row.log_q_dot[tail] = mean - mu;
}

// Row i; mask of what is wanted by the pointers of k and out.
template <class A, class T>
void double_backward_row(const TopkDoubleBackward& k, Row& row, const T* x, const T* v, T* out, int64_t i,
                         ForEach columns) {
  const TopkRows& rows = k.rows;
  const TopkStat stat = TopkStat::load(k.stat + TopkStat::kSize * i);
  const double c = k.coefficient[i], t = rows.temperature;
  const double mean = mean_outside(rows, row, x, v, stat, columns);
  set_dots(k, row, v, i, mean);
  const Totals totals(rows, row);
  const int64_t tail = row.size();

  // Sums and their derivatives over the terms.
  double loss_dot = 0, sum_p = 0, sum_q = 0, ratio = 0;
  const auto slope_dot = [&](int64_t e) {
    return e < row.terms()
               ? topk_slope_dot(rows.reverse, row.p[e], row.q[e], row.l[e], row.log_p_dot[e], row.log_q_dot[e])
               : TopkSlope{0, 0};
  };
  for (int64_t e = 0; e < row.terms(); ++e) {
    const TopkSlope s = topk_slope(rows.reverse, row.p[e], row.q[e], row.l[e]), dot = slope_dot(e);
    if (!totals.p_is_0) loss_dot += topk_times(row.log_p_dot[e], s.p);
    if (!totals.q_is_0) loss_dot += topk_times(row.log_q_dot[e], s.q);
    if (rows.renormalises_p()) sum_p += dot.p;
    if (rows.normalises_q()) sum_q += dot.q;
    if (e == tail && totals.tail_ratio != 0) ratio = dot.p / row.p[e] - totals.tail_ratio * row.log_p_dot[e];
  }
  if (k.d_coefficient != nullptr) k.d_coefficient[i] = loss_dot;
  const auto entry = [&](int64_t e) {
    const TopkSlope dot = slope_dot(e);
    const double p_part = e < tail ? row.p[e] * (row.log_p_dot[e] * (totals.p + totals.tail_ratio) + sum_p + ratio) : 0;
    return TopkSlope{totals.p_is_0 ? 0 : dot.p - p_part,
                     totals.q_is_0 ? 0 : dot.q - row.q[e] * (row.log_q_dot[e] * totals.q + sum_q)};
  };

  const double gamma = entry_gradient(rows, row, totals, tail).q, gamma_dot = entry(tail).q;
  if (out != nullptr) {
    for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
      if (!rows.reads_all() || stat.empty_tail()) return fill_zero(out + first, last - first);
      if (rows.space == kProbs) {
        const double h = topk_per_prob(gamma_dot - gamma * mean, row.given_q[tail]);
        return std::fill(out + first, out + last, rounded<A, T>((c * h)));
      }
      const D inv_t(1 / t), top(stat.tail_max), log_sum(stat.tail_log_sum), zero(0.0), centre(mean), a(c * gamma / t),
          b(c * gamma_dot / t);
      for_lanes<double>(
          last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
            const D w = ((load_lanes<double>(x + first + j, count, -kInf<double>) - top) * inv_t - log_sum).exp();
            const D d = v != nullptr ? load_lanes<double>(v + first + j, count, 0.0) * inv_t : zero;
            store_any(out, k.d_input.dtype, first + j, select(w == zero, zero, w * ((d - centre) * a + b)), count);
          });
    });
  }
  for (int64_t e = 0; e < tail; ++e) {
    const TopkSlope dot = entry(e);
    double h = dot.q;
    if (rows.space == kProbs) {
      const double d = v != nullptr ? topk_per_prob(static_cast<double>(v[row[e].index]), row.given_q[e]) : 0;
      h -= topk_times(entry_gradient(rows, row, totals, e).q, d);
    }
    if (out != nullptr) out[row[e].index] = rounded<A, T>((c * per_entry(rows, h, row.given_q[e])));
    if (k.d_log_probs != nullptr) k.d_log_probs[i * rows.k + row[e].place] = c * dot.p;
  }
  if (k.d_tail != nullptr) k.d_tail[i] = c * entry(tail).p;
}

template <class A, class T>
void double_backward(const TopkDoubleBackward& k, int64_t begin, int64_t end, ForEach columns, int64_t* bad_row) {
  const TopkRows& rows = k.rows;
  Row row(rows);
  const RowsIn in[] = {rows.input, k.v_input};
  const RowsOut out[] = {k.d_input};
  RowTiles<2, 1>(in, out, rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    auto* const d = static_cast<T*>(y[0]);
    const auto* const given = static_cast<const T*>(x[0]);
    if (k.d_log_probs != nullptr) fill_zero(k.d_log_probs + i * rows.k, rows.k);
    if (*bad_row >= 0) return;
    // A row of coefficient 0 may hold anything; its gradient, of which d_coefficient is made, is asked for only where
    // it had a weight.
    if (row.read(i, true)) {
      row.set_q(given, TopkStat::load(k.stat + TopkStat::kSize * i));
      double_backward_row<A>(k, row, given, static_cast<const T*>(x[1]), d, i, columns);
    } else if (k.coefficient[i] != 0) {
      *bad_row = i;
      return;
    } else if (k.d_coefficient != nullptr) {
      k.d_coefficient[i] = 0;
    }
    if (k.coefficient[i] != 0) return;
    if (d != nullptr) fill_zero(d, rows.classes);
    if (k.d_log_probs != nullptr) fill_zero(k.d_log_probs + i * rows.k, rows.k);
    if (k.d_tail != nullptr) k.d_tail[i] = 0;
  });
}

}  // namespace

void kl_div_topk_forward(const TopkForward& k, int64_t begin, int64_t end, ForEach columns, int64_t* bad_row) {
  dispatch_input(k.rows.input.dtype, [&]<class A, class T>() { forward<A, T>(k, begin, end, columns, bad_row); });
}

void kl_div_topk_backward(const TopkBackward& k, int64_t begin, int64_t end, ForEach columns, int64_t* bad_row) {
  dispatch_input(k.rows.input.dtype, [&]<class A, class T>() { backward<A, T>(k, begin, end, columns, bad_row); });
}

void kl_div_topk_double_backward(const TopkDoubleBackward& k, int64_t begin, int64_t end, ForEach columns,
                                 int64_t* bad_row) {
  dispatch_input(k.rows.input.dtype,
                 [&]<class A, class T>() { double_backward<A, T>(k, begin, end, columns, bad_row); });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
