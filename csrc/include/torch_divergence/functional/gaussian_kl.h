/// Kullback-Leibler divergence between Gaussians.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <optional>

namespace torch_divergence {

/// Options of `gaussian_kl` and `gaussian_kl_full`.
struct TD_API GaussianKLOptions {
  /// Weights of the rows, >= 0, floating point or bool, broadcastable to their shape. A constant. A row of weight 0
  /// contributes exactly nothing, whatever it holds.
  TORCH_ARG(std::optional<at::Tensor>, row_weight) = std::nullopt;
  TORCH_ARG(Reduction, reduction) = Reduction::Mean;
  /// A positive scalar tensor that replaces the denominator of Mean. A constant.
  TORCH_ARG(std::optional<at::Tensor>, normalizer) = std::nullopt;

 public:
  /// The same with a number: `.normalizer(64.0)`.
  GaussianKLOptions& normalizer(double value);
};

/// KL(N(mean, exp(log_var)) || N(prior_mean, exp(prior_log_var))), diagonal, summed over the last dimension: with
/// x = log_var - prior_log_var and d = mean - prior_mean,
///
///     KL = 1/2 sum (expm1(x) - x + d^2 exp(-prior_log_var))
///
/// The term of the variational auto-encoder (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014). An absent
/// prior tensor is 0, so that without any the prior is standard normal; a given one broadcasts to the shape of `mean`,
/// which `log_var` has too. Accurate however near the two are, never negative. Twice differentiable in all four.
///
/// Infinite log-variances: -inf is a point mass, infinitely far from anything but itself, where KL is 0.
///
/// @throws c10::ValueError for shapes, dtypes, devices and options that do not fit.
///
/// Example:
///
///     at::Tensor kl = torch_divergence::gaussian_kl(mean, log_var);
TD_API at::Tensor gaussian_kl(const at::Tensor& mean, const at::Tensor& log_var,
                              const std::optional<at::Tensor>& prior_mean,
                              const std::optional<at::Tensor>& prior_log_var, const GaussianKLOptions& options);
TD_API at::Tensor gaussian_kl(const at::Tensor& mean, const at::Tensor& log_var,
                              const std::optional<at::Tensor>& prior_mean = std::nullopt,
                              const std::optional<at::Tensor>& prior_log_var = std::nullopt);

/// The same for full covariances, given by their Cholesky factors (..., n, n), of which the strict upper triangle is
/// not read: with R = prior_scale_tril^-1 scale_tril,
///
///     KL = 1/2 (|R|_F^2 - n + |prior_scale_tril^-1 (mean - prior_mean)|^2) - sum log r_ii
///
/// Nothing is broadcast. Accurate to prior_scale_tril's condition number.
///
/// @throws c10::ValueError as above, and for an entry <= 0 on a diagonal of a CPU tensor, in a row of weight > 0.
TD_API at::Tensor gaussian_kl_full(const at::Tensor& mean, const at::Tensor& scale_tril, const at::Tensor& prior_mean,
                                   const at::Tensor& prior_scale_tril, const GaussianKLOptions& options = {});

}  // namespace torch_divergence
