// CPU kernels of the top-k KL divergence. Compiled once per instruction set (CPU_CAPABILITY); formulas in
// kl_div_topk.h.
//
// What has the size of a row is SIMD, in float for logits and log_probs of float and the half types; what has the size
// of k is SIMD in double: loops over the formulas of kl_div_topk.h, which the compiler vectorises.
#include "kl_div_topk/kl_div_topk.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "core/row_kernels.h"
#include "core/vec_log.h"
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

// One number as the vectors' stores round it.
template <class A, class T>
TD_INLINE T rounded(double v) {
  if constexpr (std::is_same_v<A, T>) {
    return static_cast<A>(v);
  } else {
    T lanes[kLanes<A>];
    store<A>(lanes, Vec<A>(static_cast<A>(v)));
    return lanes[0];
  }
}

struct Entry {
  int64_t index, place;  // of the class; in the row of indices and log_probs
};

// -- Arrays of the size of k

// y = e^(x - shift)
void exp_all(const double* x, double shift, double* y, int64_t n) {
  for_lanes<double>(
      n, [&](int64_t i, auto count) __attribute__((always_inline)) {
        store_lanes<double>(y + i, (load_lanes<double>(x + i, count, 0.0) - D(shift)).exp(), count);
      });
}
double sum_all(const double* x, int64_t n) {
  D sum(0.0);
  for_lanes<double>(
      n, [&](int64_t i, auto count)
             __attribute__((always_inline)) { sum = sum + load_lanes<double>(x + i, count, 0.0); });
  return sum_of(sum);
}

// log sum e^x = max + log1p(others), so that a sum of nearly 1 has the digits of what it lacks.
struct SmallLse {
  double max = -std::numeric_limits<double>::infinity(), others = 0;

  // y = e^(x - max)
  static SmallLse of(const double* x, double* y, int64_t n) {
    SmallLse sum;
    if (n == 0) return sum;
    sum.max = max_of_row<double>(x, n);
    exp_all(x, sum.max, y, n);
    double* const top = y + (std::find(x, x + n, sum.max) - x);
    if (top == y + n) return {sum.max, sum_all(y, n)};  // NaN
    const double own = *top;
    *top = 0;
    sum.others = sum_all(y, n);
    *top = own;
    return sum;
  }
  double value() const { return max + std::log1p(others); }
};

// The classes of K, a mark each.
class Marks {
 public:
  explicit Marks(int64_t classes) {
    const auto room = static_cast<size_t>(classes + kLanes<float>);  // a vector may begin at the last class
    marks_ = std::make_unique_for_overwrite<int8_t[]>(room);
    std::memset(marks_.get(), 0, room);
  }
  // Adds the classes of n entries. False: one of them is there already.
  bool add(const Entry* entries, int64_t n) {
    int8_t* const marks = marks_.get();  // a byte may alias anything: nothing of *this is read in the loops
    int8_t there = 0;
    for (int64_t e = 0; e < n; ++e) {
      int8_t& mark = marks[entries[e].index];
      there |= mark;
      mark = -1;
    }
    return there == 0;
  }
  void remove(const Entry* entries, int64_t n) {
    int8_t* const marks = marks_.get();
    for (int64_t e = 0; e < n; ++e) marks[entries[e].index] = 0;
  }
  // x, but `nothing` for those of the kLanes<A> classes from `first` on that are there.
  template <class A>
  TD_INLINE Vec<A> hide(Vec<A> x, int64_t first, Vec<A> nothing) const {
    return select(mask_of<A>(marks_.get() + first), nothing, x);
  }

 private:
  std::unique_ptr<int8_t[]> marks_;
};

// One row: the classes of K and, as the last entry, the tail.
class Row {
 public:
  explicit Row(const TopkRows& rows)
      : rows_(rows),
        room_(rows.k + 1),
        marks_(rows.classes),
        entries_(std::make_unique_for_overwrite<Entry[]>(static_cast<size_t>(rows.k))),
        values_(std::make_unique_for_overwrite<double[]>(static_cast<size_t>(10 * room_))),
        log_p(values_.get()),
        log_q(log_p + room_),
        p(log_q + room_),
        q(p + room_),
        l(q + room_),
        log_p_dot(l + room_),
        log_q_dot(log_p_dot + room_),
        given_q(log_q_dot + room_),
        by_p(given_q + room_),
        by_q(by_p + room_) {}

  int64_t size() const { return size_; }    // of K, and the number of the tail
  int64_t terms() const { return terms_; }  // of the loss
  bool has_tail() const { return terms_ > size_; }
  Entry operator[](int64_t e) const { return entries_[static_cast<size_t>(e)]; }
  const Marks& marks() const { return marks_; }

  // P of a row. `mark`: marks() are needed, and duplicates seen. False: the row is refused.
  bool read(int64_t row, bool mark) {
    const int64_t* const index = rows_.indices + row * rows_.k;
    const double* const given = rows_.log_probs + row * rows_.k;
    Entry* const entries = entries_.get();
    double* const kept = log_p;
    if (marked_) marks_.remove(entries, size_);
    marked_ = false;
    int64_t size = 0;
    for (int64_t j = 0; j < rows_.k; ++j) {
      if (given[j] == -kInf<double>) continue;
      if (index[j] < 0 || index[j] >= rows_.classes) return false;
      kept[size] = given[j];
      entries[size++] = {index[j], j};
    }
    size_ = size, marked_ = mark;
    if (mark && !marks_.add(entries, size)) return false;
    return set_p(row);
  }

  // Q from the row of input and its statistics.
  template <class T>
  void set_q(const T* x, const TopkStat& stat) {
    gather(x);
    if (rows_.tail == kTailRenormBoth) {
      const bool logits = rows_.space == kLogits;
      const double top = logits ? max_of_row<double>(given_q, size_) : 0, inv_t = logits ? 1 / rows_.temperature : 1;
      for (int64_t e = 0; e < size_; ++e)
        log_q[e] = rows_.space == kProbs ? std::log(given_q[e]) : (given_q[e] - top) * inv_t;
      const double lse = SmallLse::of(log_q, q, size_).value();
      for (int64_t e = 0; e < size_; ++e) log_q[e] -= lse;
    } else {
      set_log_q(stat);
    }
    exp_all(log_q, 0, q, size_);
    set_terms(stat);
  }

  // Q and its statistics from the row of input and the sum over the classes outside K.
  template <class T>
  TopkStat finish(const T* x, const LseScan& outside) {
    TopkStat stat;
    stat.tail_max = finite_or_zero(outside.max), stat.tail_log_sum = std::log(outside.sum);
    if (rows_.space != kLogits) {
      set_q(x, stat);
      return stat;
    }
    gather(x);
    const double top = std::max(outside.max, max_of_row<double>(given_q, size_)), inv_t = 1 / rows_.temperature;
    stat.shift = finite_or_zero(top);
    double sum = outside.sum * std::exp((stat.tail_max - stat.shift) * inv_t);
    if (outside.sum == 0) sum = 0;  // its maximum says nothing
    for (int64_t e = 0; e < size_; ++e) log_q[e] = (given_q[e] - stat.shift) * inv_t;
    exp_all(log_q, 0, q, size_);
    sum += sum_all(q, size_);
    stat.log_sum = std::log(sum);
    set_log_q(stat);
    const double share = 1 / sum;
    for (int64_t e = 0; e < size_; ++e) q[e] *= share;
    set_terms(stat);
    return stat;
  }

  double loss() {
    // Nothing but padding has no distribution to renormalise.
    if (size_ == 0 && rows_.renormalises_p()) return std::numeric_limits<double>::quiet_NaN();
    const double *a = rows_.reverse ? q : p, *b = rows_.reverse ? p : q;
    const double sign = rows_.reverse ? -1 : 1;
    double* const term = by_p;  // not yet used
    // Do P and Q both sum to 1?
    if (rows_.tail == kTailRenormBoth ||
        (rows_.derived_tail() && rows_.space == kLogits && has_tail() && p[size_] > 0)) {
      for (int64_t e = 0; e < terms_; ++e) {
        const double x = sign * l[e];
        const double near =
            a[e] * x * x *
            phi_over_square<double>(
                x, [](double f, double g, double h) __attribute__((always_inline)) { return f * g + h; });
        term[e] = std::fabs(x) < 0.5 ? near : topk_term(a[e], x) + (b[e] - a[e]);
      }
    } else {
      for (int64_t e = 0; e < terms_; ++e) term[e] = topk_term(a[e], sign * l[e]);
    }
    return sum_all(term, terms_);
  }

 private:
  bool set_p(int64_t row) {
    const SmallLse sum = SmallLse::of(log_p, p, size_);
    const double lse = sum.value(), scale = std::exp(sum.max);
    tolerance_ = kMassTolerance;
    if (rows_.rounding != 0 && size_ > 0) {
      for (int64_t e = 0; e < size_; ++e) l[e] = p[e] * std::fabs(log_p[e]);
      tolerance_ += rows_.rounding * scale * sum_all(l, size_);
    }
    if (std::expm1(lse) > tolerance_) return false;
    const bool normalise = rows_.renormalises_p();
    const double factor = normalise ? 1 / (1 + sum.others) : scale, down = normalise ? lse : 0;
    for (int64_t e = 0; e < size_; ++e) p[e] *= factor, log_p[e] -= down;
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
  void set_log_q(const TopkStat& stat) {
    const double inv_t = 1 / rows_.temperature;
    if (rows_.space == kLogits) {
      for (int64_t e = 0; e < size_; ++e) log_q[e] = (given_q[e] - stat.shift) * inv_t - stat.log_sum;
    } else {
      for (int64_t e = 0; e < size_; ++e) log_q[e] = rows_.space == kProbs ? std::log(given_q[e]) : given_q[e];
    }
  }
  // The tail of Q, and l.
  void set_terms(const TopkStat& stat) {
    log_q[size_] = rows_.reads_all() ? stat.log_tail(rows_.temperature) : -kInf<double>;
    q[size_] = given_q[size_] = std::exp(log_q[size_]);
    // Nothing is outside: what is missing of the teacher's mass is rounding.
    const bool no_tail = rows_.derived_tail() && log_q[size_] == -kInf<double> && p[size_] <= tolerance_;
    terms_ = size_ + (rows_.tail == kTailBucket && !no_tail ? 1 : 0);
    if (!has_tail()) p[size_] = 0, l[size_] = 0;
    for (int64_t e = 0; e < terms_; ++e) l[e] = log_p[e] == log_q[e] ? 0 : log_p[e] - log_q[e];
  }

  const TopkRows& rows_;
  int64_t room_, size_ = 0, terms_ = 0;
  bool marked_ = false;
  double tolerance_ = 0;
  Marks marks_;
  std::unique_ptr<Entry[]> entries_;
  std::unique_ptr<double[]> values_;

 public:
  // given_q: q as it was given, in input's space, and Q_t. by_p, by_q: derivatives by log P and log Q.
  double *log_p, *log_q, *p, *q, *l, *log_p_dot, *log_q_dot, *given_q, *by_p, *by_q;
};

// Logits or log_probs: sum of e^((x - max)/T) outside K, `row` being marked. exps, max_of_chunk: where not null, the
// terms with the maximum so far of each chunk; 0 for the classes of K.
template <class A, class T>
LseScan scan_outside(const Row& row, const T* x, int64_t classes, double t, ForEach columns, A* exps = nullptr,
                     double* max_of_chunk = nullptr) {
  const double inv = inverse_temperature<A>(t);
  const Vec<A> inv_t(static_cast<A>(inv)), nothing(-kInf<A>);
  const auto read = [&](int64_t i, auto count) __attribute__((always_inline)) {
    return row.marks().hide<A>(load_lanes<A>(x + i, count, -kInf<A>), i, nothing);
  };
  return merged_segments<LseScan>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        LseScan part;
        for (int64_t c = first; c < last; c += kChunk) {
          const int64_t n = std::min(kChunk, last - c);
          Vec<A> most = nothing;
          for_lanes<A>(
              n, [&](int64_t i, auto count)
                     __attribute__((always_inline)) { most = max_of(read(c + i, count), most); });
          part.raise(static_cast<double>(max_lane(most)), inv);
          if (max_of_chunk != nullptr) max_of_chunk[c / kChunk] = part.max;
          const Vec<A> top(static_cast<A>(finite_or_zero(part.max)));
          for (int64_t b = c; b < c + n; b += kBlock) {
            Vec<A> sum(A(0));
            for_lanes<A>(
                std::min(kBlock, c + n - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
                  const Vec<A> e = exp_of((read(b + i, count) - top) * inv_t);
                  sum = sum + e;
                  if (exps != nullptr) store_lanes<A>(exps + b + i, e, count);
                });
            part.sum += sum_of(sum);
          }
        }
        return part;
      },
      [&](LseScan& whole, const LseScan& part) { whole.merge(part, inv); });
}

// Probabilities: their sum outside K, as a scan whose maximum is 0. A negative one makes it NaN.
template <class T>
LseScan sum_outside(const Row& row, const T* x, int64_t classes, ForEach columns) {
  const D zero(0.0), nan(std::numeric_limits<double>::quiet_NaN());
  const Pair sums = sum_columns(
      classes, columns, [&](int64_t i, auto count, D& sum, D&) __attribute__((always_inline)) {
        const D v = row.marks().hide<double>(load_lanes<double>(x + i, count, 0.0), i, zero);
        sum = sum + select(v < zero, nan, v);
      });
  return {0, sums.a};
}

// The loss and statistics of a row that was read with its marks; exps and max_of_chunk as scan_outside() leaves them.
template <class A, class T>
double forward_row(const TopkRows& rows, Row& row, const T* x, ForEach columns, TopkStat& stat, A* exps = nullptr,
                   double* max_of_chunk = nullptr) {
  const auto solve = [&](const LseScan& outside) {
    stat = row.finish(x, outside);
    return row.loss();
  };
  if (!rows.reads_all()) {
    row.set_q(x, stat);
    return row.loss();
  }
  if (rows.space == kProbs) return solve(sum_outside(row, x, rows.classes, columns));
  const double loss = solve(scan_outside<A>(row, x, rows.classes, rows.temperature, columns, exps, max_of_chunk));
  if (std::is_same_v<A, double> || (rows.space == kLogits && !(loss < kSumInDouble))) return loss;
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
    store_loss(k, i, loss);
  });
}

// What a gradient takes from the whole row; leaves the slopes of each entry in row.by_p and by_q.
struct Totals {
  double p = 0, q = 0;    // sums of the slopes where the side is normalised, else 0
  double tail_ratio = 0;  // G_t/P_t where the tail is what the log_probs leave
  bool p_is_0 = false, q_is_0 = false;

  Totals(const TopkRows& rows, Row& row, double loss) {
    const bool infinite = std::isinf(loss);
    p_is_0 = infinite && !rows.reverse && (rows.renormalises_p() || rows.derived_tail());
    q_is_0 = infinite && rows.reverse && rows.normalises_q();
    row.by_p[row.size()] = row.by_q[row.size()] = 0;
    for (int64_t e = 0; e < row.terms(); ++e) {
      const TopkSlope s = topk_slope(rows.reverse, row.p[e], row.q[e], row.l[e]);
      row.by_p[e] = s.p, row.by_q[e] = s.q;
    }
    if (rows.renormalises_p()) p = sum_all(row.by_p, row.terms());
    if (rows.normalises_q()) q = sum_all(row.by_q, row.terms());
    if (rows.derived_tail() && row.has_tail() && row.p[row.size()] > 0)
      tail_ratio = row.by_p[row.size()] / row.p[row.size()];
  }
};

// Turns the slopes into what a log-probability gets, and into gamma.
void to_gradients(Row& row, const Totals& totals) {
  const int64_t tail = row.size();
  const double mine = totals.p + totals.tail_ratio;
  for (int64_t e = 0; e < tail; ++e) row.by_p[e] = totals.p_is_0 ? 0 : row.by_p[e] - row.p[e] * mine;
  if (totals.p_is_0) row.by_p[tail] = 0;
  for (int64_t e = 0; e <= tail; ++e) row.by_q[e] = totals.q_is_0 ? 0 : row.by_q[e] - row.q[e] * totals.q;
}

double per_entry(const TopkRows& rows, double gamma, double q) {
  return rows.space == kLogits ? gamma / rows.temperature : rows.space == kProbs ? topk_per_prob(gamma, q) : gamma;
}

// by_q of the classes of K, in input's space, into the gradient.
template <class A, class T>
void scatter(const TopkRows& rows, const Row& row, double c, T* grad) {
  const double scale = c / rows.temperature;
  for (int64_t e = 0; e < row.size(); ++e)
    grad[row[e].index] =
        rounded<A, T>(rows.space == kProbs ? c * topk_per_prob(row.by_q[e], row.given_q[e]) : scale * row.by_q[e]);
}

// The gradient of input outside K; whatever for the classes of K.
template <class A, class T>
void gradient_outside(const TopkRows& rows, const Row& row, const TopkStat& stat, double c, const T* x, T* grad,
                      ForEach columns) {
  const double gamma = row.by_q[row.size()];
  for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
    if (!rows.reads_all()) return fill_zero(grad + first, last - first);
    if (rows.space == kProbs)
      return std::fill(grad + first, grad + last, rounded<A, T>(c * per_entry(rows, gamma, row.given_q[row.size()])));
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

template <class A, class T>
void backward_row(const TopkBackward& k, Row& row, const T* x, T* grad, int64_t i, ForEach columns) {
  const TopkRows& rows = k.rows;
  const double c = k.coefficient[i];
  to_gradients(row, Totals(rows, row, row.loss()));
  if (grad != nullptr) {
    gradient_outside<A>(rows, row, TopkStat::load(k.stat + TopkStat::kSize * i), c, x, grad, columns);
    scatter<A>(rows, row, c, grad);
  }
  if (k.grad_log_probs != nullptr)
    for (int64_t e = 0; e < row.size(); ++e) k.grad_log_probs[i * rows.k + row[e].place] = c * row.by_p[e];
  if (k.grad_tail != nullptr) k.grad_tail[i] = c * row.by_p[row.size()];
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

// The gradient of input, of type A, from the exponentials that forward_row() left in it.
template <class A>
void value_and_grad_row(const TopkRows& rows, Row& row, const A* x, A* grad, double c, ForEach columns, TopkStat& stat,
                        double& loss, double* max_of_chunk) {
  const bool kept = rows.space != kProbs && rows.reads_all();
  loss = forward_row<A>(rows, row, x, columns, stat, kept ? grad : nullptr, max_of_chunk);
  to_gradients(row, Totals(rows, row, loss));
  if (!kept) {
    gradient_outside<A>(rows, row, stat, c, x, grad, columns);
  } else {
    const double inv_t = inverse_temperature<A>(rows.temperature),
                 scale = stat.empty_tail()
                             ? 0
                             : c * per_entry(rows, row.by_q[row.size()], 0) * std::exp(-stat.tail_log_sum);
    for_segments(rows.classes, columns, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t b = first; b < last; b += kChunk) {
        const Vec<A> factor(static_cast<A>(scale * kept_factor(max_of_chunk[b / kChunk], stat.tail_max, inv_t)));
        for_lanes<A>(
            std::min(kChunk, last - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
              store_lanes<A>(grad + b + i, load_lanes<A>(grad + b + i, count, A(0)) * factor, count);
            });
      }
    });
  }
  scatter<A>(rows, row, c, grad);
}

template <class A>
void value_and_grad(const TopkValueAndGrad& k, int64_t begin, int64_t end, ForEach columns, int64_t* bad_row) {
  const TopkRows& rows = k.rows;
  Row row(rows);
  const auto max_of_chunk =
      std::make_unique_for_overwrite<double[]>(static_cast<size_t>((rows.classes + kChunk - 1) / kChunk));
  const RowsIn in[] = {rows.input};
  const RowsOut out[] = {k.grad_input};
  RowTiles<1, 1>(in, out, rows.classes).run(begin, end, [&](int64_t i, const void* const* x, void* const* y) {
    auto* const grad = static_cast<A*>(y[0]);
    const double coefficient = k.scale * (k.weight ? k.weight[i] : 1);
    TopkStat stat;
    k.loss[i] = 0;
    if (coefficient == 0 || *bad_row >= 0) {
      fill_zero(grad, rows.classes);
    } else if (row.read(i, true)) {
      value_and_grad_row<A>(rows, row, static_cast<const A*>(x[0]), grad, coefficient, columns, stat, k.loss[i],
                            max_of_chunk.get());
    } else {
      *bad_row = i;
    }
    stat.store(k.stat + TopkStat::kSize * i);
  });
}

// sum w d outside K, d = v/T | v | v/q
template <class T>
double mean_outside(const TopkRows& rows, const Row& row, const T* x, const T* v, const TopkStat& stat,
                    ForEach columns) {
  if (v == nullptr || !rows.reads_all() || stat.empty_tail()) return 0;
  const D inv_t(1 / rows.temperature), top(stat.tail_max), log_sum(stat.tail_log_sum), zero(0.0),
      nothing(-kInf<double>);
  const Pair sums = sum_columns(
      rows.classes, columns, [&](int64_t i, auto count, D& sum, D&) __attribute__((always_inline)) {
        const D v_i = load_lanes<double>(v + i, count, 0.0);
        if (rows.space == kProbs) {  // w d = v/Q_t
          sum = sum + row.marks().hide<double>(v_i, i, zero);
        } else {
          const D x_i = row.marks().hide<double>(load_lanes<double>(x + i, count, -kInf<double>), i, nothing);
          const D w = ((x_i - top) * inv_t - log_sum).exp();
          sum = sum + select(w == zero, zero, w * v_i);
        }
      });
  return rows.space == kProbs ? sums.a / std::exp(stat.tail_log_sum) : sums.a / rows.temperature;
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
  const Totals totals(rows, row, row.loss());
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

  to_gradients(row, totals);
  const double gamma = row.by_q[tail], gamma_dot = entry(tail).q;
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
      h -= topk_times(row.by_q[e], d);
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

void kl_div_topk_value_and_grad(const TopkValueAndGrad& k, int64_t begin, int64_t end, ForEach columns,
                                int64_t* bad_row) {
  if (k.rows.input.dtype == DType::Double) return value_and_grad<double>(k, begin, end, columns, bad_row);
  value_and_grad<float>(k, begin, end, columns, bad_row);
}

void kl_div_topk_double_backward(const TopkDoubleBackward& k, int64_t begin, int64_t end, ForEach columns,
                                 int64_t* bad_row) {
  dispatch_input(k.rows.input.dtype,
                 [&]<class A, class T>() { double_backward<A, T>(k, begin, end, columns, bad_row); });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
