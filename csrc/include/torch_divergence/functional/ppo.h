/// Proximal policy optimisation.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>

namespace torch_divergence {

/// Options of `ppo_clip_loss`.
struct TD_API PPOClipOptions {
  /// The ratio counts from 1 - clip ... In (0, 1).
  TORCH_ARG(double, clip) = 0.2;
  /// ... to 1 + clip_high, which is clip unless given. Positive.
  TORCH_ARG(std::optional<double>, clip_high) = std::nullopt;
  /// Weights of the entries, >= 0, floating point or bool, broadcastable to their shape. A constant. An entry of weight
  /// 0 (padding, say) contributes exactly nothing, whatever it holds.
  TORCH_ARG(std::optional<at::Tensor>, row_weight) = std::nullopt;
  TORCH_ARG(Reduction, reduction) = Reduction::Mean;
  /// A positive scalar tensor that replaces the denominator of Mean. A constant.
  TORCH_ARG(std::optional<at::Tensor>, normalizer) = std::nullopt;

 public:
  /// The same with a number: `.normalizer(64.0)`.
  PPOClipOptions& normalizer(double value);
};

/// Options of `ppo_kl_penalty_loss`.
struct TD_API PPOKLPenaltyOptions {
  /// Multiplies the KL divergence. Not negative.
  TORCH_ARG(double, kl_coef) = 0.0;
  TORCH_ARG(std::optional<at::Tensor>, row_weight) = std::nullopt;
  TORCH_ARG(Reduction, reduction) = Reduction::Mean;
  TORCH_ARG(std::optional<at::Tensor>, normalizer) = std::nullopt;

 public:
  explicit PPOKLPenaltyOptions(double kl_coef) : kl_coef_(kl_coef) {}
  /// The same with a number: `.normalizer(64.0)`.
  PPOKLPenaltyOptions& normalizer(double value);
};

/// The clipped surrogate of Schulman et al., "Proximal Policy Optimization Algorithms", 2017, as a loss:
///
///     mean -min(r A, clamp(r, 1 - clip, 1 + clip_high) A),   r = exp(log_prob - old_log_prob)
///
/// The three tensors have one shape, one entry an action or token. A clipped entry has gradient exactly 0, however
/// large its ratio (no 0 inf), and so has one of advantage 0. Differentiable in all three tensors; detach the old
/// policy's log-probabilities and the advantages as usual. half types are computed in float32.
///
/// @throws c10::ValueError for shapes, dtypes, devices and options that do not fit.
TD_API at::Tensor ppo_clip_loss(const at::Tensor& log_prob, const at::Tensor& old_log_prob, const at::Tensor& advantage,
                                const PPOClipOptions& options);
/// `ppo_clip_loss` with the default options.
TD_API at::Tensor ppo_clip_loss(const at::Tensor& log_prob, const at::Tensor& old_log_prob,
                                const at::Tensor& advantage);

/// The penalised surrogate of the same paper: mean(-r A + kl_coef kl). `kl` has the shape of the others, or is a
/// scalar. With kl_coef = 0 the term is left out, whatever `kl` holds.
TD_API at::Tensor ppo_kl_penalty_loss(const at::Tensor& log_prob, const at::Tensor& old_log_prob,
                                      const at::Tensor& advantage, const at::Tensor& kl,
                                      const PPOKLPenaltyOptions& options);

/// The coefficient of a KL penalty, steered to a target (Ziegler et al., "Fine-Tuning Language Models from Human
/// Preferences", 2019): update(kl, n) multiplies it by 1 + clip(kl / target - 1, -0.2, 0.2) n / horizon.
class TD_API AdaptiveKLController {
 public:
  /// @throws c10::ValueError unless init >= 0, target > 0 and horizon > 0, all finite.
  AdaptiveKLController(double init, double target, double horizon);

  /// The coefficient.
  double value() const { return value_; }
  /// Sets the coefficient, when training goes on from a checkpoint.
  void set_value(double value);
  double target() const { return target_; }
  double horizon() const { return horizon_; }
  /// Takes the KL measured over n samples and returns the new coefficient.
  /// @throws c10::ValueError for a kl that is NaN, a negative n, and an n of 5 horizons and more where the coefficient
  ///   would not stay positive.
  double update(double kl, std::int64_t n);

 private:
  double value_, target_, horizon_;
};

}  // namespace torch_divergence
