// Rows of entropy from logits, SIMD in float, half types widened in registers. Internal to each *_cpu.cpp that includes
// it.
#pragma once
#include <algorithm>
#include <limits>

#include "core/row_kernels.h"
#include "core/vec_log.h"
#include "entropy/entropy.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

using F = Vec<float>;

// n of entropy.h as n + rest, and e^-(n + rest). Far below the top n alone is off by as much as 1 in 10^5: too much for
// a row whose whole entropy comes from there. n stays at 200 where there is nothing left: p is 0 there, and so is p n.
struct Below {
  F top, lowest, inv_t;
  TD_INLINE Below(double top_, double inv_t_)
      : top(static_cast<float>(finite_or_zero(top_))),
        lowest(static_cast<float>(finite_or_zero(top_) - 200 / inv_t_)),
        inv_t(static_cast<float>(inv_t_)) {}

  struct Term {
    F n, rest;
    TD_INLINE F exp() const { return corrected(exp_of(F(0.f) - n)); }
    // e: e^-n
    TD_INLINE F corrected(F e) const { return e - e * rest; }
    // n + rest - c
    TD_INLINE F minus(F c) const { return (n - c) + rest; }
  };
  TD_INLINE Term operator()(F x) const {
    const Difference<float> d(top, max_of(lowest, x));  // NaN passes
    const F n = d.rounded * inv_t;
    return {n, fmadd(d.error, inv_t, at::vec::fmsub(d.rounded, inv_t, n))};
  }
};

// Where a row's exponentials come from: first() at its first visit, again() later.
struct ComputedExps {
  template <class Count>
  TD_INLINE F first(int64_t, Count, const Below::Term& term) const {
    return term.exp();
  }
  template <class Count>
  TD_INLINE F again(int64_t, Count, const Below::Term& term) const {
    return term.exp();
  }
};
struct KeptExps {
  float* at;
  template <class Count>
  TD_INLINE F first(int64_t i, Count count, const Below::Term& term) const {
    const F e = term.exp();
    store_lanes<float>(at + i, e, count);
    return e;
  }
  template <class Count>
  TD_INLINE F again(int64_t i, Count count, const Below::Term&) const {
    return load_lanes<float>(at + i, count, 0.f);
  }
};
// Another has computed e^-n, without the rest.
struct GivenExps {
  const float* at;
  template <class Count>
  TD_INLINE F first(int64_t i, Count count, const Below::Term& term) const {
    return term.corrected(load_lanes<float>(at + i, count, 0.f));
  }
};

// Sums of e^-n over a row: how many entries are at the top, and beside them what the others have, which must not be
// rounded to the size of 1. Then of e^-n n and, with kSquare, of e^-n n^2.
struct EntropySums {
  double ties = 0, below = 0, shift = 0, square = 0;
};

template <bool kSquare, class T, class Exps>
EntropySums entropy_sums(const T* x, int64_t classes, ForEach columns, const Below& n_of, const Exps& exps) {
  const F zero(0.f);
  return merged_segments<EntropySums>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        EntropySums sums;
        for (int64_t b = first; b < last; b += kBlock) {
          F ties(0.f), below(0.f), shift(0.f), square(0.f);
          for_lanes<float>(
              std::min(kBlock, last - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
                const auto term = n_of(load_lanes<float>(x + b + i, count, -kInf<float>));
                const F e = exps.first(b + i, count, term), n = term.n + term.rest, part = e * n;
                const auto other = less(zero, term.n);
                below = below + select(other, e, zero), ties = ties + select(other, zero, e);
                shift = shift + part;
                if constexpr (kSquare) square = fmadd(part, n, square);
              });
          sums.ties += sum_of(ties), sums.below += sum_of(below);
          sums.shift += sum_of(shift), sums.square += sum_of(square);
        }
        return sums;
      },
      [](EntropySums& total, const EntropySums& part) {
        total.ties += part.ties, total.below += part.below;
        total.shift += part.shift, total.square += part.square;
      });
}

// The sum of e^-n (n - c) over a row.
template <class T, class Exps>
double entropy_shift(const T* x, int64_t classes, ForEach columns, const Below& n_of, float centre, const Exps& exps) {
  const F c(centre);
  return merged_segments<double>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        double sum = 0;
        for (int64_t b = first; b < last; b += kBlock) {
          F shift(0.f);
          for_lanes<float>(
              std::min(kBlock, last - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
                const auto term = n_of(load_lanes<float>(x + b + i, count, -kInf<float>));
                shift = fmadd(exps.again(b + i, count, term), term.minus(c), shift);
              });
          sum += sum_of(shift);
        }
        return sum;
      },
      [](double& total, double part) { total += part; });
}

// kMean: the mean is wanted to the accuracy that the gradient p (n - m) needs: relative to how far n is from it.
template <bool kMean, class T, class Exps>
EntropyStat entropy_of_logits(const T* x, int64_t classes, double t, ForEach columns, const Exps& exps) {
  const double top = merged_segments<double>(
      classes, columns, [&](int64_t first, int64_t last) { return max_of_row<float>(x + first, last - first); },
      [](double& most, double part) { most = std::max(most, part); });
  const Below n_of(top, inverse_temperature<float>(t));
  const EntropySums sums = entropy_sums<kMean>(x, classes, columns, n_of, exps);
  const double mass = sums.ties + sums.below;
  if (!(mass > 0)) {  // a row of -inf only is no distribution
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {nan, nan, nan, nan};
  }
  EntropyStat stat{top, std::log1p(sums.ties - 1 + sums.below), sums.shift / mass, 0};
  // With the mean further from 0 than n is wide, what is rounded off is not small beside n - m.
  if constexpr (kMean)
    if (2 * stat.mean * stat.mean > sums.square / mass) {
      const auto centre = static_cast<float>(stat.mean);
      stat.mean = static_cast<double>(centre) + entropy_shift(x, classes, columns, n_of, centre, exps) / mass;
    }
  stat.entropy = stat.log_z + stat.mean;
  return stat;
}

}  // namespace
}  // namespace torch_divergence::cpu::CPU_CAPABILITY
