/// The exact Wasserstein distance between weighted points.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/export.h>

#include <optional>

namespace torch_divergence {

/// Options of `wasserstein`.
struct TD_API WassersteinOptions {
  /// The power of the Euclidean distance, at least 1.
  TORCH_ARG(double, p) = 1.0;
};

/// The exact Wasserstein distance W_p^p (without a root) in any dimension, for a few thousand points a side, on the
/// CPU:
///
///     W_p^p = min_w sum_ij w_ij |x_i - y_j|^p,    sum_j w_ij = a_i,  sum_i w_ij = b_j,  w >= 0
///
/// (Kantorovich, 1942; Peyre and Cuturi, "Computational Optimal Transport", 2019, chapter 3), solved by the network
/// simplex method (Dantzig, 1951). N M costs are held in float64.
///
/// Shapes. `x` is (N, D) or (B, N, D), `y` (M, D) or (B, M, D), `a` (N) or (B, N), `b` (M) or (B, M); an argument
/// without the batch dimension is shared by the batch. The result is () or (B).
///
/// Weights are not negative; without any they are uniform and sum to 1. The sums of both sides are equal, to 1e-10
/// relative in float64 and else to 1e-5; nothing is rescaled. Points of weight 0 change nothing, but must be finite.
///
/// Dtypes. float32, float64, bfloat16, float16; float64 meets only itself. Everything is computed in float64; the
/// result is float64 for float64 arguments and else float32.
///
/// Gradients are those of the optimal plan for the points and of its dual potentials for the weights, one of the
/// optimal pairs where there are several; they come out with <a, f> = <b, g>, and only their differences count. Second
/// and higher derivatives are those on the optimal tree, on which the plan stays as the points move. Points that
/// coincide have derivatives 0.
///
/// @throws c10::ValueError naming the argument, what it was and what was expected.
///
/// Example:
///
///     namespace td = torch_divergence;
///     at::Tensor x = at::randn({100, 3}).requires_grad_(), y = at::randn({120, 3});
///     td::wasserstein(x, y, std::nullopt, std::nullopt, td::WassersteinOptions().p(2)).backward();
TD_API at::Tensor wasserstein(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                              const std::optional<at::Tensor>& b, const WassersteinOptions& options);

/// `wasserstein` with p = 1.
TD_API at::Tensor wasserstein(const at::Tensor& x, const at::Tensor& y,
                              const std::optional<at::Tensor>& a = std::nullopt,
                              const std::optional<at::Tensor>& b = std::nullopt);

}  // namespace torch_divergence
