// Error-free addition, for what a rounded sum must not lose.
#pragma once
#include "core/host_device.h"

namespace torch_divergence {

struct ExactSum {
  double sum, error;  // a + b = sum + error, exactly
};

// Knuth's, for any order of magnitude. Must not be compiled with reassociation.
TD_HOST_DEVICE ExactSum two_sum(double a, double b) {
  const double sum = a + b, back = sum - a;
  return {sum, (a - (sum - back)) + (b - back)};
}

}  // namespace torch_divergence
