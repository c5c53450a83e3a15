// Negative log-probabilities that keep their digits beside a probability near 1, in double, for operands of any type
// and space. Internal to each *_cpu.cpp that includes it.
//
// With logits x, top = max x and log_z = log sum_j e^((x_j - top)/T):   -log p_j = (top - x_j)/T + log_z.
// Both terms are non-negative, and log_z = log1p(what the other classes add) is as accurate as they are, however little
// that is; lse - x_j would round it away.
#pragma once
#include "core/log_sum.h"
#include "core/row_kernels.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

TD_INLINE double entry(const void* x, DType type, int64_t i) {
  switch (type) {
    case DType::Double:
      return static_cast<const double*>(x)[i];
    case DType::Half:
      return static_cast<double>(static_cast<float>(static_cast<const c10::Half*>(x)[i]));
    case DType::BFloat16:
      return static_cast<double>(static_cast<float>(static_cast<const c10::BFloat16*>(x)[i]));
    default:
      return static_cast<double>(static_cast<const float*>(x)[i]);
  }
}

// The first entry equal to `value`, or 0 where there is none (NaN).
inline int64_t index_of(const void* x, DType type, int64_t classes, double value) {
  int64_t at = -1;
  const D wanted(value);
  for (int64_t c = 0; c < classes && at < 0; c += kChunk)
    for_lanes<double>(
        std::min(kChunk, classes - c), [&](int64_t i, auto count) __attribute__((always_inline)) {
          const D found = load_any(x, type, c + i, count, std::numeric_limits<double>::quiet_NaN()) == wanted;
          if (at < 0 && any(found)) at = c + i + first_lane(found);
        });
  return std::max<int64_t>(at, 0);
}

// One side's probabilities and what they are a function of. Padding lanes have probability 0.
struct Scores {
  DType type;
  int space;
  D inv_t, top, log_z;
  double padding;

  Scores(DType type_, int space_, double t, const LogSum& sum)
      : type(type_),
        space(space_),
        inv_t(1 / t),
        top(sum.top),
        log_z(sum.log_z),
        padding(space_ == kProbs ? 0 : -kInf<double>) {}
  // The entry as given, the probability and -log of it.
  template <class Count>
  TD_INLINE void read(const void* x, int64_t i, Count count, D& given, D& prob, D& neg_log) const {
    given = load_any(x, type, i, count, padding);
    if (space == kProbs) {
      prob = given, neg_log = D(0.0) - given.log();
    } else if (space == kLogits) {
      neg_log = (top - given) * inv_t + log_z, prob = (D(0.0) - neg_log).exp();
    } else {
      neg_log = D(0.0) - given, prob = given.exp();
    }
  }
};

// p n, where a p of 0 wins over an infinite n but not over NaN.
TD_INLINE D share(D p, D n) {
  const D zero(0.0);
  return select(p == zero, select(n.isnan(), n, zero), p * n);
}

// v with 0 in the padding lanes of a tail.
template <class Count>
TD_INLINE D without_padding(D v, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    double lanes[kLanes<double>];
    v.store(lanes);
    for (int i = count; i < kLanes<double>; ++i) lanes[i] = 0;
    return D::loadu(lanes);
  } else {
    return v;
  }
}

// N sums over a row, in a fixed order: f(i, count, vectors) adds to its vectors.
template <int N>
struct Sums {
  double of[N];
};
template <int N, class F>
TD_INLINE Sums<N> sums_of_columns(int64_t classes, ForEach columns, const F& f) {
  return merged_segments<Sums<N>>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        Sums<N> sums{};
        for (int64_t c = first; c < last; c += kChunk) {
          D lanes[N];
          for (D& v : lanes) v = D(0.0);
          for_lanes<double>(
              std::min(kChunk, last - c), [&](int64_t i, auto count)
                                              __attribute__((always_inline)) { f(c + i, count, lanes); });
          for (int k = 0; k < N; ++k) sums.of[k] += sum_of(lanes[k]);
        }
        return sums;
      },
      [](Sums<N>& total, const Sums<N>& part) {
        for (int k = 0; k < N; ++k) total.of[k] += part.of[k];
      });
}

}  // namespace
}  // namespace torch_divergence::cpu::CPU_CAPABILITY
