/// The variational autoencoder's loss.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>

namespace torch_divergence {

/// How a VAE's decoder describes the data.
enum class Likelihood : std::uint8_t {
  Bernoulli,  ///< `reconstruction` holds logits, the data lies in [0, 1]
  Gaussian,   ///< `reconstruction` is the mean, `scale` the standard deviation
};
TD_API const char* to_string(Likelihood likelihood);

/// Options of `vae_loss`.
struct TD_API VAEOptions {
  /// Multiplies the KL term (Higgins et al., "beta-VAE", 2017). Not negative.
  TORCH_ARG(double, beta) = 1.0;
  TORCH_ARG(Likelihood, likelihood) = Likelihood::Bernoulli;
  /// Standard deviation of the Gaussian likelihood. Positive; 1 with Bernoulli.
  TORCH_ARG(double, scale) = 1.0;
  /// Each latent dimension's KL counts for at least this much, after the mean over the batch (Kingma et al., "Improved
  /// Variational Inference with Inverse Autoregressive Flow", 2016). Not negative.
  TORCH_ARG(double, free_bits) = 0.0;
  /// None returns one value a sample, and is not defined with free bits.
  TORCH_ARG(Reduction, reduction) = Reduction::Mean;
};

/// The negative evidence lower bound (Kingma and Welling, "Auto-Encoding Variational Bayes", 2013), summed over all but
/// the batch dimension and reduced over the batch:
///
///     -log p(data | reconstruction) + beta KL(N(mean, exp(log_var)) || N(0, 1))
///     Bernoulli: sum softplus(x) - x data;  Gaussian: sum ((data - x) / scale)^2 / 2 + log scale + log(2 pi) / 2
///
/// With free bits the KL term is sum_d max(free_bits, mean over the batch of KL_d). With beta = 0 it is left out,
/// whatever `mean` and `log_var` hold.
///
/// `reconstruction` and `data` have one shape (B, ...), `mean` and `log_var` one shape (B, ...) with the same B. dtypes
/// and devices must go together (float64 with float64); half types are computed in float32. Twice differentiable in all
/// four tensors.
///
/// @throws c10::ValueError for shapes, dtypes, devices and options that do not fit.
///
/// Example:
///
///     at::Tensor loss = torch_divergence::vae_loss(decoder->forward(z), x, mean, log_var,
///                                                  torch_divergence::VAEOptions().beta(4.0));
TD_API at::Tensor vae_loss(const at::Tensor& reconstruction, const at::Tensor& data, const at::Tensor& mean,
                           const at::Tensor& log_var, const VAEOptions& options);
/// `vae_loss` with the default options.
TD_API at::Tensor vae_loss(const at::Tensor& reconstruction, const at::Tensor& data, const at::Tensor& mean,
                           const at::Tensor& log_var);

}  // namespace torch_divergence
