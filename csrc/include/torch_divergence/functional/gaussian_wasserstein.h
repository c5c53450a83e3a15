/// The Wasserstein distance between Gaussians.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_divergence/export.h>

namespace torch_divergence {

/// The Wasserstein distance W_2^2 (without a root) between N(mean1, cov1) and N(mean2, cov2):
///
///     W_2^2 = |m1 - m2|^2 + tr (S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)
///
/// (Dowson and Landau, "The Frechet distance between multivariate normal distributions", 1982), computed from factors
/// of the covariances and not as the difference of these traces, so that it stays accurate where they are close.
///
/// Shapes. Means (D) or (B, D), covariances (D, D) or (B, D, D); an argument without the batch dimension is shared by
/// the batch. The result is () or (B). Of a covariance the symmetric part is taken. Eigenvalues within 4 eps of 0,
/// relative to the largest, count as 0, with eps that of its dtype; with an eigenvalue below that the result is NaN.
///
/// Dtypes. float32, float64, bfloat16, float16; float64 meets only itself. Everything is computed in float64; the
/// result is float64 for float64 arguments and else float32.
///
/// Differentiable in all four tensors, to any order where both covariances are positive definite. Equal covariances
/// give exactly 0. Where one is singular the gradient is the finite part: directions in which the derivative is
/// infinite are left out.
///
/// @throws c10::ValueError naming the argument, what it was and what was expected.
///
/// Example:
///
///     namespace td = torch_divergence;
///     at::Tensor mean = at::zeros({3}), cov = at::eye(3).requires_grad_();
///     td::gaussian_wasserstein(mean, cov, mean + 1, 4 * at::eye(3)).backward();  // cov.grad() is -I
TD_API at::Tensor gaussian_wasserstein(const at::Tensor& mean1, const at::Tensor& cov1, const at::Tensor& mean2,
                                       const at::Tensor& cov2);

}  // namespace torch_divergence
