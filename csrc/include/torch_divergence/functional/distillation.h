/// Knowledge distillation.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace torch_divergence {

/// Which divergence a student is distilled with.
enum class Divergence : std::uint8_t {
  KL,  ///< `kl_div`, in the direction asked for
  JS,  ///< `js_div`
};
TD_API const char* to_string(Divergence divergence);

/// (indices, log_probs) of a teacher's largest classes, each (*, k).
using TopK = std::pair<at::Tensor, at::Tensor>;

/// Options of `distillation_loss`.
struct TD_API DistillationOptions {
  /// A teacher known by its largest log-probabilities only, at `temperature`: (indices, log_probs) as in `kl_div_topk`,
  /// with the "bucket" tail. Replaces `teacher_logits`.
  TORCH_ARG(std::optional<TopK>, topk) = std::nullopt;
  /// Divides the logits of both sides in the divergence. Positive.
  TORCH_ARG(double, temperature) = 2.0;
  /// Weight of the divergence, from 0 to 1. None is 1 without labels and 0.5 with them.
  TORCH_ARG(std::optional<double>, alpha) = std::nullopt;
  TORCH_ARG(Divergence, divergence) = Divergence::KL;
  /// Of KL: Forward is KL(teacher || student).
  TORCH_ARG(Direction, direction) = Direction::Forward;
  /// Of JS.
  TORCH_ARG(double, beta) = 0.5;
  /// A row with this label has weight 0, in the divergence too.
  TORCH_ARG(std::int64_t, ignore_index) = -100;
  /// As in `kl_div`.
  TORCH_ARG(std::optional<at::Tensor>, row_weight) = std::nullopt;
  TORCH_ARG(Reduction, reduction) = Reduction::Mean;
  TORCH_ARG(std::optional<at::Tensor>, normalizer) = std::nullopt;

 public:
  /// The same with a number: `.normalizer(64.0)`.
  DistillationOptions& normalizer(double value);
};

/// The loss of Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015:
///
///     alpha T^2 D(teacher / T, student / T) + (1 - alpha) cross_entropy(student, labels)
///
/// with D the KL or JS divergence at temperature T and the cross-entropy at temperature 1. The factor T^2 keeps the
/// size of the first term's gradients when T changes.
///
/// Shapes: student and teacher logits (*, classes), labels (*) of class indices. A term whose weight is 0 is not
/// computed; its arguments are checked all the same.
///
/// @throws c10::ValueError for a teacher that is missing or given twice, an alpha other than 1 without labels, a
///   direction other than Forward with JS, a beta other than 0.5 with KL, and for what the divergence and
///   `cross_entropy` refuse.
TD_API at::Tensor distillation_loss(const at::Tensor& student_logits, const std::optional<at::Tensor>& teacher_logits,
                                    const std::optional<at::Tensor>& labels, const DistillationOptions& options);
/// `distillation_loss` with the default options.
TD_API at::Tensor distillation_loss(const at::Tensor& student_logits, const std::optional<at::Tensor>& teacher_logits,
                                    const std::optional<at::Tensor>& labels = std::nullopt);

}  // namespace torch_divergence
