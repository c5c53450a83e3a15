// log sum_j e^((x_j - top)/T) with top = max x of a row, without loss beside a largest entry that outweighs the others.
// Serves the CPU kernels and nvcc.
#pragma once
#include <cmath>
#include <limits>

#include "core/host_device.h"

namespace torch_divergence {

// top and log_z of a row of logits.
struct LogSum {
  double top = 0, log_z = 0;
};

// Online sum of e^((x - top)/T). Entries equal to top are counted, not added up: what is below them must not be rounded
// to their size.
struct TopScan {
  double top = -std::numeric_limits<double>::infinity(), ties = 0, below = 0;

  TD_HOST_DEVICE void raise(double x, double inv_t) {
    if (!(x > top)) return;
    if (ties + below != 0) below = (ties + below) * std::exp((top - x) * inv_t);
    ties = 0, top = x;
  }
  TD_HOST_DEVICE void merge(TopScan other, double inv_t) {
    raise(other.top, inv_t);
    other.raise(top, inv_t);
    ties += other.ties, below += other.below;
  }
  TD_HOST_DEVICE LogSum finish() const {
    if (!(ties + below > 0)) {  // a row of -inf only is no distribution
      const double nan = std::numeric_limits<double>::quiet_NaN();
      return {nan, nan};
    }
    return {top, std::log1p(ties - 1 + below)};
  }
};

}  // namespace torch_divergence
