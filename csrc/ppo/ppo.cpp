// PPO's losses, as compositions, and the controller of the KL penalty.
#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <torch/library.h>
#include <torch_divergence/functional/ppo.h>

#include <algorithm>
#include <cmath>
#include <string_view>

#include "core/composite.h"

namespace torch_divergence {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

struct Surrogate {
  at::Tensor log_ratio, advantage;
  EntryReduction reduce;
};

Surrogate checked_surrogate(const char* name, const at::Tensor& log_prob, const at::Tensor& old_log_prob,
                            const at::Tensor& advantage, const OptionalTensor& row_weight, std::string_view reduction,
                            const OptionalTensor& normalizer) {
  const auto x = checked_real(name, "log_prob", log_prob);
  const auto old = checked_like(name, "old_log_prob", old_log_prob, "log_prob", log_prob, true);
  const auto a = checked_like(name, "advantage", advantage, "log_prob", log_prob, true);
  EntryReduction reduce(name, x, row_weight, reduction, normalizer);
  return {reduce.kept(x) - reduce.kept(old), reduce.kept(a), reduce};
}

// e^d a. Where a is 0 the exponential must not overflow: 0 inf is no 0.
at::Tensor ratio_times(const at::Tensor& d, const at::Tensor& a) {
  const double largest = d.scalar_type() == at::kDouble ? 709 : 88;
  return at::where(a == 0, d.clamp_max(largest), d).exp() * a;
}

at::Tensor ppo_clip_loss_op(const at::Tensor& log_prob, const at::Tensor& old_log_prob, const at::Tensor& advantage,
                            double clip, std::optional<double> clip_high, const OptionalTensor& row_weight,
                            std::string_view reduction, const OptionalTensor& normalizer) {
  constexpr const char* kName = "ppo_clip_loss";
  TORCH_CHECK_VALUE(clip > 0 && clip < 1, kName, ": clip is ", clip, ", expected a number between 0 and 1");
  const double high = clip_high.value_or(clip);
  TORCH_CHECK_VALUE(high > 0 && std::isfinite(high), kName, ": clip_high is ", high, ", expected a positive number");
  const auto [d, a, reduce] =
      checked_surrogate(kName, log_prob, old_log_prob, advantage, row_weight, reduction, normalizer);
  // The minimum picks the clipped term where the ratio has left the interval on the side that A rewards.
  const auto clipped = at::where(a > 0, d > std::log1p(high), (a < 0).logical_and(d < std::log1p(-clip)));
  const auto bound = at::where(a > 0, a * (1 + high), a * (1 - clip));
  // Clipped entries are kept from the exponential too, whose overflow would come back as 0 inf in their gradient.
  return reduce(-at::where(clipped, bound, ratio_times(at::where(clipped, 0, d), a)));
}

at::Tensor ppo_kl_penalty_loss_op(const at::Tensor& log_prob, const at::Tensor& old_log_prob,
                                  const at::Tensor& advantage, const at::Tensor& kl, double kl_coef,
                                  const OptionalTensor& row_weight, std::string_view reduction,
                                  const OptionalTensor& normalizer) {
  constexpr const char* kName = "ppo_kl_penalty_loss";
  TORCH_CHECK_VALUE(kl_coef >= 0 && std::isfinite(kl_coef), kName, ": kl_coef is ", kl_coef,
                    ", expected a finite number >= 0");
  const auto divergence = checked_like(kName, "kl", kl, "log_prob", log_prob, kl.dim() != 0);
  const auto [d, a, reduce] =
      checked_surrogate(kName, log_prob, old_log_prob, advantage, row_weight, reduction, normalizer);
  // 0 inf is no 0: the term is left out, but for a sum over nothing, whose gradient is the zeros expected of it.
  if (kl_coef == 0) return reduce(divergence.unsqueeze(0).slice(0, 0, 0).sum() - ratio_times(d, a));
  const auto penalty = kl.dim() == 0 ? divergence : reduce.kept(divergence);
  return reduce(kl_coef * penalty - ratio_times(d, a));
}

void check_coefficient(const char* argument, double value) {
  TORCH_CHECK_VALUE(value >= 0 && std::isfinite(value), "AdaptiveKLController: ", argument, " is ", value,
                    ", expected a finite number >= 0");
}

}  // namespace

at::Tensor ppo_clip_loss(const at::Tensor& log_prob, const at::Tensor& old_log_prob, const at::Tensor& advantage,
                         const PPOClipOptions& options) {
  return ppo_clip_loss_op(log_prob, old_log_prob, advantage, options.clip(), options.clip_high(), options.row_weight(),
                          to_string(options.reduction()), options.normalizer());
}
at::Tensor ppo_clip_loss(const at::Tensor& log_prob, const at::Tensor& old_log_prob, const at::Tensor& advantage) {
  return ppo_clip_loss(log_prob, old_log_prob, advantage, PPOClipOptions());
}

at::Tensor ppo_kl_penalty_loss(const at::Tensor& log_prob, const at::Tensor& old_log_prob, const at::Tensor& advantage,
                               const at::Tensor& kl, const PPOKLPenaltyOptions& options) {
  return ppo_kl_penalty_loss_op(log_prob, old_log_prob, advantage, kl, options.kl_coef(), options.row_weight(),
                                to_string(options.reduction()), options.normalizer());
}

AdaptiveKLController::AdaptiveKLController(double init, double target, double horizon)
    : value_(init), target_(target), horizon_(horizon) {
  check_coefficient("init", init);
  TORCH_CHECK_VALUE(target > 0 && std::isfinite(target), "AdaptiveKLController: target is ", target,
                    ", expected a positive number");
  TORCH_CHECK_VALUE(horizon > 0 && std::isfinite(horizon), "AdaptiveKLController: horizon is ", horizon,
                    ", expected a positive number");
}

void AdaptiveKLController::set_value(double value) {
  check_coefficient("value", value);
  value_ = value;
}

double AdaptiveKLController::update(double kl, std::int64_t n) {
  TORCH_CHECK_VALUE(!std::isnan(kl), "AdaptiveKLController: kl is NaN, expected a number");
  TORCH_CHECK_VALUE(n >= 0, "AdaptiveKLController: n is ", n, ", expected a number of samples >= 0");
  const double error = std::clamp(kl / target_ - 1, -0.2, 0.2);
  const double factor = 1 + error * static_cast<double>(n) / horizon_;
  TORCH_CHECK_VALUE(factor > 0, "AdaptiveKLController: n is ", n, " with a horizon of ", horizon_,
                    ", which would multiply the coefficient by ", factor,
                    ", expected less than 5 horizons: a positive factor");
  value_ *= factor;
  return value_;
}

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "ppo_clip_loss(Tensor log_prob, Tensor old_log_prob, Tensor advantage, *, float clip=0.2, float? clip_high=None, "
      "Tensor? row_weight=None, str reduction=\"mean\", Tensor? normalizer=None) -> Tensor",
      tags);
  m.def(
      "ppo_kl_penalty_loss(Tensor log_prob, Tensor old_log_prob, Tensor advantage, Tensor kl, *, float kl_coef, "
      "Tensor? "
      "row_weight=None, str reduction=\"mean\", Tensor? normalizer=None) -> Tensor",
      tags);
}
namespace {
void register_composites(torch::Library& m) {
  m.impl("ppo_clip_loss", ppo_clip_loss_op);
  m.impl("ppo_kl_penalty_loss", ppo_kl_penalty_loss_op);
}
}  // namespace
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { register_composites(m); }
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { register_composites(m); }

}  // namespace torch_divergence
