/// The sliced Wasserstein distance.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>

namespace torch_divergence {

/// Options of `sliced_wasserstein`.
struct TD_API SlicedWassersteinOptions {
  /// The power of the distance, at least 1.
  TORCH_ARG(double, p) = 2.0;
  /// How many directions to draw, evenly on the sphere.
  TORCH_ARG(std::int64_t, n_projections) = 128;
  /// (L, D): the directions themselves, taken as they are, shared by the batch. Nothing is drawn then.
  TORCH_ARG(std::optional<at::Tensor>, projections) = std::nullopt;
  /// What the directions are drawn with; the same state gives the same directions.
  TORCH_ARG(std::optional<at::Generator>, generator) = std::nullopt;
  /// None returns one value for each sample of the batch; Sum and Mean return a scalar. Where it is not set,
  /// `SlicedWassersteinLoss` takes Mean, `sliced_wasserstein` None.
  TORCH_ARG(std::optional<Reduction>, reduction) = std::nullopt;
};

/// The sliced Wasserstein distance SW_p^p (without a root), a mean over projections to lines:
///
///     SW_p^p = 1/L sum_l W_p^p(<theta_l, x>, <theta_l, y>)
///
/// (Rabin, Peyre, Delon and Bernot, "Wasserstein Barycenter and Its Application to Texture Mixing", 2011). Shapes are
/// those of `wasserstein`, conventions of weights and derivatives those of `wasserstein_1d`; given projections get
/// gradients too.
///
/// @throws c10::ValueError naming the argument, what it was and what was expected.
///
/// Example:
///
///     namespace td = torch_divergence;
///     at::Tensor x = at::randn({4, 100, 3}).requires_grad_(), y = at::randn({4, 120, 3});
///     td::sliced_wasserstein(x, y).sum().backward();
TD_API at::Tensor sliced_wasserstein(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                                     const std::optional<at::Tensor>& b, const SlicedWassersteinOptions& options);

/// `sliced_wasserstein` with the default options.
TD_API at::Tensor sliced_wasserstein(const at::Tensor& x, const at::Tensor& y,
                                     const std::optional<at::Tensor>& a = std::nullopt,
                                     const std::optional<at::Tensor>& b = std::nullopt);

}  // namespace torch_divergence
