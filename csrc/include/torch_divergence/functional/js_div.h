/// Jensen-Shannon divergence between discrete distributions.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>

namespace torch_divergence {

/// Options of `js_div`. Each setter returns the options, so that calls chain: `JSDivOptions().beta(0.1).scaled(true)`.
struct TD_API JSDivOptions {
  /// The weight of `target` in the mixture, in [0, 1]; 0 and 1 need `scaled`.
  TORCH_ARG(double, beta) = 0.5;
  /// Divides by beta (1 - beta): forward KL at 0, reverse KL at 1.
  TORCH_ARG(bool, scaled) = false;
  /// What `input` holds, and `target` too unless `target_space` is given.
  TORCH_ARG(Space, space) = Space::Logits;
  /// What `target` holds, where it differs from `input`.
  TORCH_ARG(std::optional<Space>, target_space) = std::nullopt;
  /// Divides logits, and logits only. Positive; must be 1 when neither side is given as logits.
  TORCH_ARG(double, temperature) = 1.0;
  /// The class dimension. Every other dimension is a batch dimension; an entry of the batch is called a row.
  TORCH_ARG(std::int64_t, dim) = -1;
  /// Weights of the rows, >= 0, floating point or bool, broadcastable to the shape of the rows. A constant: must not
  /// require grad. A row of weight 0 contributes exactly nothing, whatever it holds.
  TORCH_ARG(std::optional<at::Tensor>, row_weight) = std::nullopt;
  /// None returns one value a row; Sum and Mean return a scalar.
  TORCH_ARG(Reduction, reduction) = Reduction::Mean;
  /// A positive scalar tensor that replaces the denominator of Mean, e.g. the number of rows over all processes or over
  /// all steps of an accumulated gradient. A constant: must not require grad.
  TORCH_ARG(std::optional<at::Tensor>, normalizer) = std::nullopt;
  /// The gradient of `input` overwrites the storage of `input`, which saves a tensor as large as the logits.
  TORCH_ARG(bool, inplace_grad) = false;

 public:
  /// The same with a number: `.normalizer(64.0)`.
  JSDivOptions& normalizer(double value);
};

/// The Jensen-Shannon divergence of discrete distributions, summed over the class dimension and reduced over the rows:
///
///     JS(P, Q) = beta KL(P || M) + (1 - beta) KL(Q || M),  M = beta P + (1 - beta) Q,  P = target, Q = input
///
/// (Lin, "Divergence Measures Based on the Shannon Entropy", 1991; as a loss of distillation, Agarwal et al.,
/// "On-Policy Distillation of Language Models", 2024). It is finite for any two distributions and at most
/// -beta log(beta) - (1 - beta) log(1 - beta), which disjoint ones reach. Swapping the sides and beta with 1 - beta
/// changes nothing. As beta tends to 0 or 1 it vanishes; divided by beta (1 - beta) with `scaled`, it tends to
/// KL(target || input) at 0 and KL(input || target) at 1, and there it is `kl_div`.
///
/// Shapes, dtypes, reductions, weights and `inplace_grad` are as for `kl_div`: `input` and `target` have the same
/// shape, with at least one class along `options.dim()`; Reduction::None returns the shape of `input` without the class
/// dimension, Sum and Mean a scalar; the loss of half types is float32, and each gradient has the dtype of its tensor.
///
/// Differentiable in both tensors, to any order. With sigma = log(p / m), rho = log(q / m) and both sides in logits the
/// gradients of a row are (1 - beta) q (rho - E_q[rho]) / T for `input` and beta p (sigma - E_p[sigma]) / T for
/// `target`. Entries given as Probs or LogProbs are free variables: nothing projects their gradients on the simplex and
/// no mass terms are added (for `input`: (1 - beta) rho or (1 - beta) q rho). A negative probability gives NaN.
///
/// From logits the result stays accurate however close the two distributions are, and is never negative.
///
/// Zeros and infinities, for 0 < beta < 1. A logit or log-probability of -inf is a class of probability 0.
///   - p = q = 0: the class is as if it were not there; both gradients are 0.
///   - p = 0 < q: the term is (1 - beta) q log(1 / (1 - beta)); q = 0 < p: it is beta p log(1 / beta).
///   - The gradient of a side is 0 where its probability is 0, from Probs too, where the one-sided derivative is -inf.
///   - NaN in a row of a weight above 0, or a row without any class left (all -inf), gives NaN.
///
/// @throws c10::ValueError naming the argument, what it was and what was expected: what `kl_div` refuses, `beta`
/// outside
///   [0, 1], and `beta` of 0 or 1 without `scaled`, where the divergence is 0 whatever the distributions are.
///
/// Example:
///
///     namespace td = torch_divergence;
///     at::Tensor teacher = at::randn({64, 10}), student = at::randn({64, 10}).requires_grad_();
///     at::Tensor loss = td::js_div(student, teacher, td::JSDivOptions().beta(0.1).scaled(true));
///     loss.backward();
TD_API at::Tensor js_div(const at::Tensor& input, const at::Tensor& target, const JSDivOptions& options);

/// `js_div` with the default options: beta = 1/2, from logits, the mean over the rows.
TD_API at::Tensor js_div(const at::Tensor& input, const at::Tensor& target);

}  // namespace torch_divergence
