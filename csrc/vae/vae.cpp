// The VAE's loss, as a composition over gaussian_kl.
#include <ATen/TensorOperators.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/where.h>
#include <torch/library.h>
#include <torch_divergence/functional/gaussian_kl.h>
#include <torch_divergence/functional/vae.h>

#include <cmath>
#include <limits>
#include <string_view>

#include "core/checks.h"
#include "core/composite.h"

namespace torch_divergence {
namespace {

constexpr const char* kName = "vae_loss";
constexpr double kLog2Pi = 1.8378770664093454836;

void check_number(const char* argument, double value, bool zero_too) {
  TORCH_CHECK_VALUE(std::isfinite(value) && (value > 0 || (zero_too && value == 0)), kName, ": ", argument, " is ",
                    value, ", expected a finite number ", zero_too ? ">= 0" : "> 0");
}

// softplus(x) - x data, as log(1 + e^-|x|) + |x| |[x > 0] - data|: both terms >= 0 for data in [0, 1], where the
// difference of the plain form has no digits left for a logit that is sure and right. An infinite logit is sure of its
// side: 0 if the data agrees, else inf.
at::Tensor bernoulli(const at::Tensor& logits, const at::Tensor& data) {
  const auto infinite = logits.isinf();
  const auto x = at::where(infinite, 0, logits);
  const auto agrees = at::where(logits > 0, data == 1, data == 0);
  const auto sure = at::where(agrees, 0, at::where(data.isnan(), data, std::numeric_limits<double>::infinity()));
  const auto positive = x > 0;
  const auto size = at::where(positive, x, -x), wrong = at::where(positive, 1 - data, data);
  return at::where(infinite, sure.to(x.scalar_type()), (-size).exp().log1p() + size * wrong);
}

at::Tensor vae_loss_op(const at::Tensor& reconstruction, const at::Tensor& data, const at::Tensor& mean,
                       const at::Tensor& log_var, double beta, std::string_view likelihood, double scale,
                       double free_bits, std::string_view reduction) {
  const auto x = checked_real(kName, "reconstruction", reconstruction);
  const auto y = checked_like(kName, "data", data, "reconstruction", reconstruction, true);
  const auto m = checked_like(kName, "mean", mean, "reconstruction", reconstruction, false);
  const auto v = checked_like(kName, "log_var", log_var, "mean", mean, true);
  TORCH_CHECK_VALUE(x.dim() >= 1 && m.dim() >= 1 && x.sym_size(0) == m.sym_size(0), kName, ": mean has shape ",
                    m.sym_sizes(), " and reconstruction ", x.sym_sizes(), ", expected a batch dimension of one size");
  const bool gaussian = check_choice(kName, "likelihood", likelihood, "bernoulli", "gaussian");
  check_number("beta", beta, true);
  check_number("scale", scale, false);
  check_number("free_bits", free_bits, true);
  TORCH_CHECK_VALUE(gaussian || scale == 1, kName, ": scale is ", scale,
                    " with likelihood \"bernoulli\", expected 1: only the Gaussian likelihood has one");
  TORCH_CHECK_VALUE(
      free_bits == 0 || reduction != "none", kName,
      ": reduction is \"none\" with free_bits, which bound the batch's mean; expected \"mean\" or \"sum\"");

  const auto per_sample = [](const at::Tensor& t) { return t.dim() > 1 ? t.flatten(1).sum(-1) : t; };
  const auto nll =
      per_sample(gaussian ? ((y - x) / scale).square() / 2 + (std::log(scale) + kLog2Pi / 2) : bernoulli(x, y));
  const EntryReduction reduce(kName, nll, std::nullopt, reduction, std::nullopt);
  // 0 inf is no 0: the term is left out, but for a sum over nothing, whose gradients are the zeros expected of it.
  if (beta == 0) return reduce(nll + (m.slice(0, 0, 0).sum() + v.slice(0, 0, 0).sum()));
  const auto kl = gaussian_kl(m.unsqueeze(-1), v.unsqueeze(-1), std::nullopt, std::nullopt,
                              GaussianKLOptions().reduction(Reduction::None));
  if (free_bits == 0) return reduce(nll + beta * per_sample(kl));
  const auto bounded = kl.mean(0).clamp_min(free_bits).sum();
  const auto share = nll + beta * bounded;  // the same for each sample
  return reduce(share);
}

}  // namespace

const char* to_string(Likelihood likelihood) {
  switch (likelihood) {
    case Likelihood::Bernoulli:
      return "bernoulli";
    case Likelihood::Gaussian:
      return "gaussian";
  }
  TORCH_CHECK_VALUE(false, "likelihood: no such value, ", static_cast<int>(likelihood));
}

at::Tensor vae_loss(const at::Tensor& reconstruction, const at::Tensor& data, const at::Tensor& mean,
                    const at::Tensor& log_var, const VAEOptions& options) {
  return vae_loss_op(reconstruction, data, mean, log_var, options.beta(), to_string(options.likelihood()),
                     options.scale(), options.free_bits(), to_string(options.reduction()));
}
at::Tensor vae_loss(const at::Tensor& reconstruction, const at::Tensor& data, const at::Tensor& mean,
                    const at::Tensor& log_var) {
  return vae_loss(reconstruction, data, mean, log_var, VAEOptions());
}

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "vae_loss(Tensor reconstruction, Tensor data, Tensor mean, Tensor log_var, *, float beta=1.0, str "
      "likelihood=\"bernoulli\", float scale=1.0, float free_bits=0.0, str reduction=\"mean\") -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { m.impl("vae_loss", vae_loss_op); }
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { m.impl("vae_loss", vae_loss_op); }

}  // namespace torch_divergence
