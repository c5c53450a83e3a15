/// The entropy of discrete distributions.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>

namespace torch_divergence {

/// Options of `entropy`. Each setter returns the options, so that calls chain.
struct TD_API EntropyOptions {
  /// What `input` holds.
  TORCH_ARG(Space, space) = Space::Logits;
  /// Divides logits, and logits only. Positive; must be 1 without them.
  TORCH_ARG(double, temperature) = 1.0;
  /// The class dimension. Every other dimension is a batch dimension; an entry of the batch is called a row.
  TORCH_ARG(std::int64_t, dim) = -1;
  /// Weights of the rows, >= 0, floating point or bool, broadcastable to the shape of the rows. A constant: must not
  /// require grad. A row of weight 0 contributes exactly nothing, whatever it holds.
  TORCH_ARG(std::optional<at::Tensor>, row_weight) = std::nullopt;
  /// None returns one value a row; Sum and Mean return a scalar.
  TORCH_ARG(Reduction, reduction) = Reduction::Mean;
  /// A positive scalar tensor that replaces the denominator of Mean. A constant: must not require grad.
  TORCH_ARG(std::optional<at::Tensor>, normalizer) = std::nullopt;

 public:
  /// The same with a number: `.normalizer(64.0)`.
  EntropyOptions& normalizer(double value);
};

/// The Shannon entropy of discrete distributions, in nats, summed over the class dimension and reduced over the rows:
///
///     H(P) = -sum_j p_j log p_j
///
/// (Shannon, "A Mathematical Theory of Communication", 1948). `input` is float32, float64, bfloat16 or float16 with any
/// number of dimensions and any strides; half types are computed in float32, and the result is then float32.
/// Reduction::None returns the shape of `input` without the class dimension, Sum and Mean a scalar; with no row of a
/// weight above 0 the result is 0.
///
/// Differentiable to any order. From logits the gradient of a row is -p (log p + H) / T, and the value is accurate
/// however small it is. LogProbs and Probs are free variables, with gradients -p (log p + 1) and -(log p + 1). A class
/// of probability 0 adds nothing and has gradient 0 (from Probs too, where the one-sided derivative is +inf). NaN, a
/// negative probability or a row of -inf only gives NaN.
///
/// @throws c10::ValueError naming the argument, what it was and what was expected.
///
/// Example:
///
///     namespace td = torch_divergence;
///     at::Tensor policy = at::randn({64, 4}).requires_grad_();
///     (-0.01 * td::entropy(policy)).backward();  // a bonus for exploration
TD_API at::Tensor entropy(const at::Tensor& input, const EntropyOptions& options);

/// `entropy` with the default options: from logits, the mean over the rows.
TD_API at::Tensor entropy(const at::Tensor& input);

}  // namespace torch_divergence
