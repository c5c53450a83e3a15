/// The exact Wasserstein distance on the line.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>

namespace torch_divergence {

/// Options of `wasserstein_1d`.
struct TD_API Wasserstein1dOptions {
  /// The power of the distance, at least 1.
  TORCH_ARG(double, p) = 1.0;
  /// The dimension of the points. A tensor of one dimension has no other and is shared by all rows of the rest.
  TORCH_ARG(std::int64_t, dim) = -1;
  /// None returns one value a row; Sum and Mean return a scalar.
  TORCH_ARG(Reduction, reduction) = Reduction::None;
};

/// The exact Wasserstein distance W_p^p (without a root) between distributions on the line, by sorting:
///
///     W_p^p = integral_0^m |Q_u(t) - Q_v(t)|^p dt
///
/// with the quantile functions Q of the points `u` and `v` of weights `a` and `b` (Vallender, "Calculation of the
/// Wasserstein distance between probability distributions on the line", 1974).
///
/// Shapes. N points of `u` and M of `v` along `options.dim()`, the other dimensions alike; `a` is as `u`, `b` as `v`. A
/// tensor of one dimension is shared by all rows. The result has the shape of the rows, or is a scalar.
///
/// Weights and dtypes are as for `wasserstein`; half types are sorted in float32 and sums are accumulated in float64.
///
/// Differentiable in all four tensors, to any order. |d|^p has slope 0 at d = 0; equal positions are matched in the
/// order of their indices; where cumulative weights of both sides coincide, the weights' gradient is the mean of the
/// two one-sided ones. The weights' gradients come out with <a, f> = <b, g>; only their differences count.
///
/// @throws c10::ValueError naming the argument, what it was and what was expected.
///
/// Example:
///
///     namespace td = torch_divergence;
///     at::Tensor u = at::randn({8, 100}).requires_grad_(), v = at::randn({8, 120});
///     td::wasserstein_1d(u, v, {}, {}, td::Wasserstein1dOptions().p(2).reduction(td::Reduction::Mean)).backward();
TD_API at::Tensor wasserstein_1d(const at::Tensor& u, const at::Tensor& v, const std::optional<at::Tensor>& a,
                                 const std::optional<at::Tensor>& b, const Wasserstein1dOptions& options);

/// `wasserstein_1d` with the default options.
TD_API at::Tensor wasserstein_1d(const at::Tensor& u, const at::Tensor& v,
                                 const std::optional<at::Tensor>& a = std::nullopt,
                                 const std::optional<at::Tensor>& b = std::nullopt);

}  // namespace torch_divergence
