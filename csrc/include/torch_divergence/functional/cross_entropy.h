/// Cross-entropy with class labels or distributions.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>

namespace torch_divergence {

/// Options of `cross_entropy`. Each setter returns the options, so that calls chain:
/// `CrossEntropyOptions().label_smoothing(0.1).ignore_index(0)`.
struct TD_API CrossEntropyOptions {
  /// What a target of distributions holds: Probs unless told otherwise. Refused for class indices.
  TORCH_ARG(std::optional<Space>, target_space) = std::nullopt;
  /// How much of the target is spread over all classes, from 0 to 1.
  TORCH_ARG(double, label_smoothing) = 0.0;
  /// Rows of this class index have weight 0, whatever `input` holds there. For class indices only.
  TORCH_ARG(std::int64_t, ignore_index) = -100;
  /// What `input` holds.
  TORCH_ARG(Space, space) = Space::Logits;
  /// Divides logits, and logits only. Positive; must be 1 when neither side is given as logits.
  TORCH_ARG(double, temperature) = 1.0;
  /// The class dimension. Every other dimension is a batch dimension; an entry of the batch is called a row.
  TORCH_ARG(std::int64_t, dim) = -1;
  /// Weights of the rows, >= 0, floating point or bool, broadcastable to the shape of the rows. A constant: must not
  /// require grad. A row of weight 0 contributes exactly nothing, whatever it holds, a label out of range included.
  TORCH_ARG(std::optional<at::Tensor>, row_weight) = std::nullopt;
  /// None returns one value a row; Sum and Mean return a scalar. Mean is over the weights of the rows that are kept.
  TORCH_ARG(Reduction, reduction) = Reduction::Mean;
  /// A positive scalar tensor that replaces the denominator of Mean. A constant: must not require grad.
  TORCH_ARG(std::optional<at::Tensor>, normalizer) = std::nullopt;
  /// The gradient of `input` overwrites the storage of `input`, which saves a tensor as large as the logits.
  TORCH_ARG(bool, inplace_grad) = false;

 public:
  /// The same with a number: `.normalizer(64.0)`.
  CrossEntropyOptions& normalizer(double value);
};

/// The cross-entropy of class labels or distributions, summed over the class dimension and reduced over the rows:
///
///     H(P', Q) = -sum_j p'_j log q_j,    P' = (1 - s) P + s / K,    Q = input, P = target, s = label_smoothing
///
/// over K classes; for s = 0 it is H(P) + KL(P || Q). A target of an integer dtype holds one class index a row, in the
/// shape of `input` without the class dimension: P is 1 at that class. A target of a floating dtype holds distributions
/// and has the shape of `input`. Label smoothing is that of Szegedy et al., "Rethinking the Inception Architecture for
/// Computer Vision", 2016.
///
/// Dtypes. float32, float64, bfloat16, float16, any strides. A half type may meet another half type or float32; float64
/// meets only itself. Half types are computed in float32, and the loss is then float32; each gradient has the dtype of
/// its tensor. With no row of a weight above 0 the result is 0.
///
/// Differentiable to any order in `input` and in a target of distributions. From logits the gradient is
/// (q sum(p') - p') / T for `input`, -p' / q or -p' from Probs or LogProbs, which are free variables. From logits the
/// result is accurate however small it is, and so is its gradient.
///
/// Zeros and infinities. Where p' = 0 the term is 0, whatever q. Where q = 0 < p' the value is +inf, with a finite
/// gradient q - p' for logits. NaN in a row of a weight above 0, a negative probability, or a row of -inf only gives
/// NaN.
///
/// With `inplace_grad`, the rules of `kl_div` hold.
///
/// @throws c10::ValueError naming the argument, what it was and what was expected; for a label out of range too.
///
/// Example:
///
///     namespace td = torch_divergence;
///     at::Tensor logits = at::randn({64, 10}).requires_grad_(), labels = at::randint(10, {64}, at::kLong);
///     td::cross_entropy(logits, labels, td::CrossEntropyOptions().label_smoothing(0.1)).backward();
TD_API at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options);

/// `cross_entropy` with the default options: from logits, the mean over the rows.
TD_API at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target);

}  // namespace torch_divergence
