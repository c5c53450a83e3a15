/// The Fisher information of a categorical distribution.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/export.h>

#include <cstdint>

namespace torch_divergence {

/// Options of `fisher_vector_product`.
struct TD_API FisherVectorProductOptions {
  /// Divides the logits. Positive.
  TORCH_ARG(double, temperature) = 1.0;
  /// The class dimension.
  TORCH_ARG(std::int64_t, dim) = -1;
};

/// The Fisher information of q = softmax(logits / T) with respect to the logits, times v: q (v - <q, v>) / T^2, a row
/// at a time, not reduced. It is the Hessian of KL(old || new) at new = old, which trust region methods use (Schulman
/// et al., "Trust Region Policy Optimization", 2015). Result in v's shape and dtype; differentiable in both, to any
/// order. A logit of -inf is a class that is not there: 0, whatever v holds.
///
/// @throws c10::ValueError for shapes, dtypes, devices and options that do not fit.
TD_API at::Tensor fisher_vector_product(const at::Tensor& logits, const at::Tensor& v,
                                        const FisherVectorProductOptions& options = {});

}  // namespace torch_divergence
