// One side of a divergence in ATen operators, for derivatives beyond the second: its probabilities and
// log-probabilities, and their derivatives along v.
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/where.h>

#include <limits>

#include "core/rows.h"

namespace torch_divergence {

struct CompositeSide {
  int64_t space;
  at::Tensor x, divisor, prob, log_prob;
  double t;

  CompositeSide(const at::Tensor& given, int64_t space_, double t_, at::ScalarType dtype)
      : space(space_), x(given.to(dtype)), t(t_) {
    const auto zero = x == 0;  // log and division stay clear of it, or its infinities would come back as 0 * inf
    divisor = at::where(zero, 1, x);
    const auto log_x = at::where(zero, -std::numeric_limits<double>::infinity(), divisor.log());
    log_prob = space == kLogits ? at::log_softmax(x / t, -1) : space == kProbs ? log_x : x;
    prob = space == kProbs ? x : log_prob.exp();
  }
  at::Tensor log_dot(const at::Tensor& v) const {
    if (space == kLogits) return (v - (prob * v).sum(-1, true)) / t;
    return space == kProbs ? v / divisor : v;
  }
  at::Tensor dot(const at::Tensor& v) const { return space == kProbs ? v : prob * log_dot(v); }
};

}  // namespace torch_divergence
