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
    F n, rest, e;
  };
  TD_INLINE Term operator()(F x) const {
    const Difference<float> d(top, max_of(lowest, x));  // NaN passes
    Term term;
    term.n = d.rounded * inv_t;
    term.rest = fmadd(d.error, inv_t, at::vec::fmsub(d.rounded, inv_t, term.n));
    const F e = exp_of(F(0.f) - term.n);
    term.e = e - e * term.rest;
    return term;
  }
};

// Sums of e^-n over a row: how many entries are at the top, and beside them what the others have, which must not be
// rounded to the size of 1. Then of e^-n (n - c) and e^-n (n - c)^2.
struct EntropySums {
  double ties = 0, below = 0, shift = 0, square = 0;
};

template <class T>
EntropySums entropy_sums(const T* x, int64_t classes, ForEach columns, const Below& n_of, double centre) {
  const F zero(0.f), c(static_cast<float>(centre));
  return merged_segments<EntropySums>(
      classes, columns,
      [&](int64_t first, int64_t last) {
        EntropySums sums;
        for (int64_t b = first; b < last; b += kBlock) {
          F ties(0.f), below(0.f), shift(0.f), square(0.f);
          for_lanes<float>(
              std::min(kBlock, last - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
                const auto term = n_of(load_lanes<float>(x + b + i, count, -kInf<float>));
                const auto other = less(zero, term.n);
                below = below + select(other, term.e, zero), ties = ties + select(other, zero, term.e);
                const F far = (term.n - c) + term.rest, part = term.e * far;
                shift = shift + part, square = fmadd(part, far, square);
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

// kMean: the mean is wanted to the accuracy that the gradient p (n - m) needs: relative to how far n is from it.
template <bool kMean, class T>
EntropyStat entropy_of_logits(const T* x, int64_t classes, double t, ForEach columns) {
  const double top = merged_segments<double>(
      classes, columns, [&](int64_t first, int64_t last) { return max_of_row<float>(x + first, last - first); },
      [](double& most, double part) { most = std::max(most, part); });
  const Below n_of(top, inverse_temperature<float>(t));
  double centre = 0;
  EntropySums sums = entropy_sums(x, classes, columns, n_of, centre);
  double mass = sums.ties + sums.below;
  if (!(mass > 0)) {  // a row of -inf only is no distribution
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {nan, nan, nan, nan};
  }
  // With the centre further off than n is wide, what is rounded off is not small beside n - m.
  const double mean = sums.shift / mass;
  if (kMean && mean * mean > sums.square / mass - mean * mean) {
    centre = static_cast<float>(mean);
    sums = entropy_sums(x, classes, columns, n_of, centre);
    mass = sums.ties + sums.below;
  }
  EntropyStat stat{top, std::log1p(sums.ties - 1 + sums.below), centre + sums.shift / mass, 0};
  stat.entropy = stat.log_z + stat.mean;
  return stat;
}

}  // namespace
}  // namespace torch_divergence::cpu::CPU_CAPABILITY
