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

// n of entropy.h, at most 200: there p is 0, and 0 times it too.
struct Below {
  F top, inv_t;
  TD_INLINE Below(double top_, double inv_t_)
      : top(static_cast<float>(finite_or_zero(top_))), inv_t(static_cast<float>(inv_t_)) {}
  TD_INLINE F operator()(F x) const { return min_of(F(200.f), (top - x) * inv_t); }  // NaN passes
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
                const F n = n_of(load_lanes<float>(x + b + i, count, -kInf<float>)), e = exp_of(zero - n);
                const auto other = less(zero, n);
                below = below + select(other, e, zero), ties = ties + select(other, zero, e);
                const F far = n - c, part = e * far;
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
