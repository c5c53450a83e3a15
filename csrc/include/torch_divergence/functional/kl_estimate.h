/// Estimators of a Kullback-Leibler divergence from samples.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>

namespace torch_divergence {

/// With r = log q(x) - log p(x).
enum class KLEstimator : std::uint8_t {
  K1,  ///< -r: unbiased, of either sign
  K2,  ///< r^2 / 2: biased, small variance near equality
  K3,  ///< expm1(r) - r: unbiased and never negative
};
/// What backward does.
enum class KLEstimateGradient : std::uint8_t {
  Path,  ///< differentiates the estimator: in expectation 0 for K1, KL(p || q)'s for K2, KL(q || p)'s for K3 (in p)
  KL,    ///< K2's gradient, in expectation that of KL(p || q) in p, whatever the value is
  None,  ///< none
};
TD_API const char* to_string(KLEstimator kind);
TD_API const char* to_string(KLEstimateGradient gradient);

/// Options of `kl_estimate`.
struct TD_API KLEstimateOptions {
  TORCH_ARG(KLEstimator, kind) = KLEstimator::K3;
  TORCH_ARG(KLEstimateGradient, gradient) = KLEstimateGradient::Path;
  /// r is clamped to +-max_log_ratio before the exponential; a clamped entry has no gradient.
  TORCH_ARG(std::optional<double>, max_log_ratio) = std::nullopt;
  /// Multiplies each entry, of the entries' shape: p / (what the samples were drawn from). Differentiable; detach it
  /// where it is to be a constant.
  TORCH_ARG(std::optional<at::Tensor>, importance_weight) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, row_weight) = std::nullopt;
  TORCH_ARG(Reduction, reduction) = Reduction::Mean;
  TORCH_ARG(std::optional<at::Tensor>, normalizer) = std::nullopt;

 public:
  /// The same with a number: `.normalizer(64.0)`.
  KLEstimateOptions& normalizer(double value);
};

/// KL(p || q) from the log-densities of samples x ~ p (Schulman, "Approximating KL Divergence", 2020). `log_p` and
/// `log_q` have one shape, an entry a sample. Twice differentiable in both.
///
/// @throws c10::ValueError for shapes, dtypes, devices and options that do not fit.
TD_API at::Tensor kl_estimate(const at::Tensor& log_p, const at::Tensor& log_q, const KLEstimateOptions& options = {});

}  // namespace torch_divergence
