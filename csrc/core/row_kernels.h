// What the row kernels of the divergences are made of: rows in segments and chunks, operands of any type and space,
// exponentials from a centre. Internal to each *_cpu.cpp that includes it.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "core/exact_sum.h"
#include "core/log_sum.h"
#include "core/row_pair.h"
#include "core/row_tiles.h"
#include "core/vec_math.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

// A chunk of both rows stays in the first-level cache between the search for its maximum and its exponentials.
constexpr int64_t kChunk = 2048;
// How much is summed in A before it goes to a sum in double: logits in bfloat16 take few values, and adding the same
// one again and again rounds the same way each time.
constexpr int64_t kBlock = 512;
// Where a row is split over threads: fixed, so that the result does not depend on how many there are.
constexpr int64_t kSegment = 8 * kChunk;

// Calls f(first, last, index) for each segment of a row's columns, through `columns` if the row is split.
template <class F>
TD_INLINE void for_segments(int64_t classes, ForEach columns, const F& f) {
  if (columns == nullptr) {
    f(int64_t{0}, classes, int64_t{0});
    return;
  }
  struct Context {
    const F& f;
    int64_t classes;
  } context{f, classes};
  columns((classes + kSegment - 1) / kSegment, &context, [](void* c, int64_t i) {
    const auto& self = *static_cast<Context*>(c);
    self.f(i * kSegment, std::min(self.classes, (i + 1) * kSegment), i);
  });
}
TD_INLINE int64_t segment_count(int64_t classes, ForEach columns) {
  return columns == nullptr ? 1 : (classes + kSegment - 1) / kSegment;
}

// A type of this instruction set alone: the array of a shared one would leave weak symbols in the object.
template <class Sums>
struct PartOf {
  Sums sums;
};

// part(first, last) of each segment, merged in their order.
template <class Sums, class Part, class Merge>
TD_INLINE Sums merged_segments(int64_t classes, ForEach columns, const Part& part, const Merge& merge) {
  const int64_t segments = segment_count(classes, columns);
  if (segments == 1) return part(int64_t{0}, classes);
  const auto parts = std::make_unique<PartOf<Sums>[]>(static_cast<size_t>(segments));
  for_segments(classes, columns,
               [&](int64_t first, int64_t last, int64_t k) { parts[static_cast<size_t>(k)].sums = part(first, last); });
  Sums total = parts[0].sums;
  for (int64_t k = 1; k < segments; ++k) merge(total, parts[static_cast<size_t>(k)].sums);
  return total;
}

// 1/T as the arithmetic has it. Everything that scales by T uses this one: two roundings of 1/T that differ would leave
// probabilities whose sum is not 1 by that much times the logarithm of the number of classes.
template <class A>
TD_INLINE double inverse_temperature(double t) {
  return static_cast<double>(static_cast<A>(1 / t));
}

// x + rest as a pair of A, to twice A's precision.
template <class A>
struct Split {
  Vec<A> hi, lo;
  TD_INLINE explicit Split(double x, double rest = 0)
      : hi(static_cast<A>(x)), lo(static_cast<A>((x - static_cast<double>(static_cast<A>(x))) + rest)) {}
};
// e^((x - c)/T). What c has beyond A's precision becomes a factor: subtracted, it would be rounded away where x is far
// from c, and away in one direction for a whole row.
template <class A>
struct ExpFrom {
  Vec<A> base, factor, inv_t;
  TD_INLINE ExpFrom(double c, double inv_t_) : ExpFrom(static_cast<A>(c), c, inv_t_) {}
  TD_INLINE Vec<A> operator()(Vec<A> x) const { return exp_of((x - base) * inv_t) * factor; }

 private:
  TD_INLINE ExpFrom(A near, double c, double inv_t_)
      : base(near),
        factor(static_cast<A>(std::exp((static_cast<double>(near) - c) * inv_t_))),
        inv_t(static_cast<A>(inv_t_)) {}
};
// t - s = rounded + error, exactly (Knuth).
template <class A>
struct Difference {
  Vec<A> rounded, error;
  TD_INLINE Difference(Vec<A> t, Vec<A> s) : rounded(t - s) {
    const Vec<A> back = t - rounded;
    error = (t - (rounded + back)) + (back - s);
  }
};
// t - s - c, rounded once relative to itself: the error-free difference keeps what t - s rounds off.
template <class A>
TD_INLINE Vec<A> difference_minus(Vec<A> t, Vec<A> s, const Split<A>& c) {
  const Difference<A> d(t, s);
  return (d.rounded - c.hi) + (d.error - c.lo);
}

template <class A, class T>
TD_INLINE double max_of_row(const T* x, int64_t n) {
  Vec<A> m0(-kInf<A>), m1 = m0, m2 = m0, m3 = m0;
  constexpr int64_t kStep = kLanes<A>;
  int64_t i = 0;
  for (; i + 4 * kStep <= n; i += 4 * kStep) {
    m0 = max_of(load<A>(x + i), m0), m1 = max_of(load<A>(x + i + kStep), m1);
    m2 = max_of(load<A>(x + i + 2 * kStep), m2), m3 = max_of(load<A>(x + i + 3 * kStep), m3);
  }
  for_lanes<A>(
      n - i, [&](int64_t j, auto count)
                 __attribute__((always_inline)) { m0 = max_of(load_lanes<A>(x + i + j, count, -kInf<A>), m0); });
  return static_cast<double>(max_lane(max_of(max_of(m0, m1), max_of(m2, m3))));
}

// The first class whose entry is `max`, the row's maximum. chunk_max: the maximum of a row's part up to each chunk's
// end, if at hand.
template <class A, class T>
TD_INLINE int64_t top_class(const T* x, int64_t classes, double max, const double* chunk_max) {
  int64_t at = 0;
  while (chunk_max != nullptr && at + kChunk < classes && chunk_max[at / kChunk] != max) at += kChunk;
  const Vec<A> top(static_cast<A>(max));
  for (; at + kLanes<A> <= classes; at += kLanes<A>) {
    const Vec<A> found = load<A>(x + at) == top;
    if (any(found)) return at + first_lane(found);
  }
  while (at + 1 < classes && static_cast<double>(x[at]) != max) ++at;
  return at;
}

// A maximum that is still -inf (no class seen) must not be subtracted from -inf.
TD_INLINE double finite_or_zero(double max) { return max == -std::numeric_limits<double>::infinity() ? 0 : max; }

// e^((max - lse)/T): turns a kept exponential into a probability.
TD_INLINE double kept_factor(double max, double lse, double inv_t) {
  return max == -std::numeric_limits<double>::infinity() && !std::isnan(lse) ? 0 : std::exp((max - lse) * inv_t);
}

template <class T>
TD_INLINE void fill_zero(T* x, int64_t n) {
  std::memset(static_cast<void*>(x), 0, static_cast<size_t>(n) * sizeof(T));
}

// f.template operator()<T>() for a type whose arithmetic is float's.
template <class F>
TD_INLINE void dispatch_float_types(DType type, const F& f) {
  switch (type) {
    case DType::Half:
      return f.template operator()<c10::Half>();
    case DType::BFloat16:
      return f.template operator()<c10::BFloat16>();
    default:
      return f.template operator()<float>();
  }
}
// f.template operator()<TP, TQ>() for such types of both sides.
template <class F>
TD_INLINE void dispatch_float_types(const RowPair& rows, const F& f) {
  dispatch_float_types(rows.p.dtype, [&]<class TP>() {
    dispatch_float_types(rows.q.dtype, [&]<class TQ>() { f.template operator()<TP, TQ>(); });
  });
}
// f.template operator()<A, TP, TQ>() for the types of both sides.
template <class F>
TD_INLINE void dispatch_types(const RowPair& rows, const F& f) {
  if (rows.p.dtype == DType::Double) return f.template operator()<double, double, double>();
  dispatch_float_types(rows, [&]<class TP, class TQ>() { f.template operator()<float, TP, TQ>(); });
}

// -- Any type, in double

using D = Vec<double>;

template <class Count>
TD_INLINE D load_any(const void* x, DType type, int64_t i, Count count, double fill) {
  switch (type) {
    case DType::Double:
      return load_lanes<double>(static_cast<const double*>(x) + i, count, fill);
    case DType::Half:
      return load_lanes<double>(static_cast<const c10::Half*>(x) + i, count, fill);
    case DType::BFloat16:
      return load_lanes<double>(static_cast<const c10::BFloat16*>(x) + i, count, fill);
    default:
      return load_lanes<double>(static_cast<const float*>(x) + i, count, fill);
  }
}
template <class Count>
TD_INLINE void store_any(void* y, DType type, int64_t i, D v, Count count) {
  switch (type) {
    case DType::Double:
      return store_lanes<double>(static_cast<double*>(y) + i, v, count);
    case DType::Half:
      return store_lanes<double>(static_cast<c10::Half*>(y) + i, v, count);
    case DType::BFloat16:
      return store_lanes<double>(static_cast<c10::BFloat16*>(y) + i, v, count);
    default:
      return store_lanes<double>(static_cast<float*>(y) + i, v, count);
  }
}
inline void fill_zero_any(void* y, DType type, int64_t n) {
  if (y != nullptr) std::memset(y, 0, static_cast<size_t>(n * bytes_of(type)));
}

// One side's probability and log-probability, whatever it is given in. Padding lanes have p = q = 0.
struct Side {
  DType type;
  int space;
  D inv_t, lse, lse_lo, factor;
  double padding;

  Side(const RowsIn& rows, int space_, double t, double lse_, double lse_lo_)
      : type(rows.dtype),
        space(space_),
        inv_t(1 / t),
        lse(lse_),
        lse_lo(lse_lo_ / t),
        factor(std::exp(-lse_lo_ / t)),
        padding(space_ == kProbs ? 0 : -kInf<double>) {}
  template <class Count>
  TD_INLINE void read(const void* x, int64_t i, Count count, D& prob, D& log_prob) const {
    const D v = load_any(x, type, i, count, padding);
    if (space == kProbs) {
      prob = v, log_prob = v.log();
    } else if (space == kLogits) {
      const D above = (v - lse) * inv_t;
      log_prob = above - lse_lo, prob = above.exp() * factor;
    } else {
      log_prob = v, prob = v.exp();
    }
  }
};

// log p - log q; near each other from the exact p - q, as the difference of two logarithms has no digits left there.
TD_INLINE D log_ratio(const Side& p_side, const Side& q_side, D p, D q, D log_p, D log_q) {
  D l = log_p - log_q;
  if (p_side.space == kProbs && q_side.space == kProbs) {
    const D relative = (p - q) / q, ratio = p / q;
    l = select((ratio > D(1e-290)) & (ratio < D(1e290)), ratio.log(), l);
    l = select(relative.abs() < D(0.5), relative.log1p(), l);
    l = select((p < D(0.0)) | (q < D(0.0)), D(std::numeric_limits<double>::quiet_NaN()), l);
  }
  return l;
}

// Online sum of e^((x - max)/T).
struct LseScan {
  double max = -std::numeric_limits<double>::infinity(), sum = 0;

  void raise(double top, double inv_t) {
    if (!(top > max)) return;
    if (sum != 0) sum *= std::exp((max - top) * inv_t);
    max = top;
  }
  void merge(LseScan other, double inv_t) {
    raise(other.max, inv_t);
    other.raise(max, inv_t);
    sum += other.sum;
  }
};

inline LogSum log_sum(const void* x, DType type, int64_t classes, double t, ForEach columns) {
  const double inv_t = 1 / t;
  const auto scan = [&](int64_t first, int64_t last) {
    TopScan part;
    for (int64_t c = first; c < last; c += kChunk) {
      const int64_t n = std::min(kChunk, last - c);
      D hi(-kInf<double>);
      for_lanes<double>(
          n, [&](int64_t i, auto count)
                 __attribute__((always_inline)) { hi = max_of(load_any(x, type, c + i, count, -kInf<double>), hi); });
      part.raise(max_lane(hi), inv_t);
      const D top(finite_or_zero(part.top)), zero(0.0), one(1.0);
      D ties(0.0), below(0.0);
      for_lanes<double>(
          n, [&](int64_t i, auto count) __attribute__((always_inline)) {
            const D v = load_any(x, type, c + i, count, -kInf<double>), at_top = v == top;
            ties = ties + select(at_top, one, zero);
            below = below + select(at_top, zero, ((v - top) * D(inv_t)).exp());
          });
      part.ties += sum_of(ties), part.below += sum_of(below);
    }
    return part;
  };
  return merged_segments<TopScan>(classes, columns, scan,
                                  [&](TopScan& whole, const TopScan& part) { whole.merge(part, inv_t); })
      .finish();
}

// T logsumexp(x/T) = sum + error
inline ExactSum any_lse(const void* x, const RowsIn& rows, int64_t classes, double t, ForEach columns) {
  const LogSum z = log_sum(x, rows.dtype, classes, t, columns);
  return two_sum(z.top, t * z.log_z);
}

// Sums f(i, count) -> two vectors over a row, in a fixed order.
struct Pair {
  double a = 0, b = 0;
};
template <class F>
TD_INLINE Pair sum_columns(int64_t classes, ForEach columns, const F& f) {
  return merged_segments<Pair>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        Pair sums;
        for (int64_t c = first; c < last; c += kChunk) {
          D a(0.0), b(0.0);
          for_lanes<double>(
              std::min(kChunk, last - c), [&](int64_t i, auto count)
                                              __attribute__((always_inline)) { f(c + i, count, a, b); });
          sums.a += sum_of(a), sums.b += sum_of(b);
        }
        return sums;
      },
      [](Pair& total, const Pair& part) { total.a += part.a, total.b += part.b; });
}

template <class Forward>
TD_INLINE void store_loss(const Forward& k, int64_t row, double loss) {
  if (k.loss_is_double) {
    static_cast<double*>(k.loss)[row] = loss;
  } else {
    static_cast<float*>(k.loss)[row] = static_cast<float>(loss);
  }
}

}  // namespace
}  // namespace torch_divergence::cpu::CPU_CAPABILITY
