/// Kullback-Leibler divergence between discrete distributions.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>

namespace torch_divergence {

/// Options of `kl_div`. Each setter returns the options, so that calls chain:
/// `KLDivOptions().temperature(2.0).direction(Direction::Reverse)`.
struct TD_API KLDivOptions {
  /// Forward is KL(target || input), Reverse is KL(input || target).
  TORCH_ARG(Direction, direction) = Direction::Forward;
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
  KLDivOptions& normalizer(double value);
};

/// The Kullback-Leibler divergence between discrete distributions, summed over the class dimension and reduced over the
/// rows:
///
///     KL(P || Q) = sum_j p_j (log p_j - log q_j),    Forward: P = target, Q = input;  Reverse: P = input, Q = target
///
/// (Kullback and Leibler, "On Information and Sufficiency", 1951; with a temperature as in Hinton, Vinyals and Dean,
/// "Distilling the Knowledge in a Neural Network", 2015, whose factor T^2 is left to the caller).
///
/// Shapes. `input` and `target` have the same shape, with any number of dimensions and at least one class along
/// `options.dim()`; nothing is broadcast (`expand` costs nothing), any strides are taken. Reduction::None returns the
/// shape of `input` without the class dimension, Sum and Mean return a scalar. With no row, or none of a weight above
/// 0, the result is 0.
///
/// Dtypes. float32, float64, bfloat16, float16. A half type may meet another half type or float32; float64 meets only
/// itself. Half types are computed in float32, and the loss is then float32; each gradient has the dtype of its tensor.
///
/// Differentiable in both tensors, to any order. With both sides in logits the gradients of a row are (q - p) / T for Q
/// and p (log(p / q) - KL) / T for P. Entries given as Probs or LogProbs are free variables: nothing projects their
/// gradients on the simplex and no mass terms are added (for Q: -p / q or -p; for P: log(p / q) + 1 or
/// p (log(p / q) + 1)). Their sums are not checked: the formula is applied as it stands. A negative probability gives
/// NaN.
///
/// From logits the result stays accurate however close the two distributions are, and is never negative; from LogProbs
/// and Probs the rounding of what was passed in already limits it. Prefer logits where you have them.
///
/// Zeros and infinities. A logit or log-probability of -inf is a class of probability 0.
///   - p = q = 0: the class is as if it were not there; both gradients are 0.
///   - p = 0 < q: the term is 0. P's gradient is 0 (from Probs too, where the one-sided derivative is -inf).
///   - q = 0 < p: the value is +inf. From logits Q's gradient is still (q - p) / T, and P's is 0 for that row. Q's
///     gradient is -p from LogProbs and -inf from Probs.
///   - NaN in a row of a weight above 0, or a row without any class left (all -inf), gives NaN.
///
/// With `inplace_grad`, `input` must be dense, require grad, not be a leaf and share no storage with a target that does
/// not require grad, and the loss must be reduced. What `input` held is lost, with the call already. A second backward
/// through the same graph, create_graph and forward-mode differentiation raise.
///
/// @throws c10::ValueError naming the argument, what it was and what was expected: shapes, dtypes and devices that do
///   not fit, `dim` out of range, `temperature` not positive (or not 1 without logits), `row_weight` negative or not
///   broadcastable, `normalizer` not positive or without Reduction::Mean, a constant that requires grad, an `input`
///   that `inplace_grad` cannot use.
///
/// Example:
///
///     namespace td = torch_divergence;
///     at::Tensor teacher = at::randn({64, 10}), student = at::randn({64, 10}).requires_grad_();
///     at::Tensor loss = td::kl_div(student, teacher, td::KLDivOptions().temperature(2.0));
///     loss.backward(); // student.grad() is (softmax(student / 2) - softmax(teacher / 2)) / (2 * 64)
TD_API at::Tensor kl_div(const at::Tensor& input, const at::Tensor& target, const KLDivOptions& options);

/// `kl_div` with the default options: forward, from logits, the mean over the rows.
TD_API at::Tensor kl_div(const at::Tensor& input, const at::Tensor& target);

}  // namespace torch_divergence
