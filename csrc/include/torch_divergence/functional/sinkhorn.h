/// Entropic optimal transport: Sinkhorn divergence, plan and potentials.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace torch_divergence {

/// The cost of a pair of points.
enum class Cost : std::uint8_t {
  HalfSqEuclidean,  ///< |x - y|^2 / 2
  SqEuclidean,      ///< |x - y|^2
  Euclidean,        ///< |x - y|, with derivative 0 at coincident points
  Cosine,           ///< 1 - cos(x, y); 1 with derivative 0 at a zero vector
};

/// The names that Python and the operators use: "half_sqeuclidean", ...
TD_API const char* to_string(Cost cost);

/// What a solve leaves besides its value, to look at and to start the next one from. Constants: not differentiable.
struct SinkhornInfo {
  at::Tensor f, g;            ///< potentials of x and y (rows and columns of C), shaped as their weights
  at::Tensor f_aa, g_bb;      ///< potentials of the self terms; undefined without debiasing
  at::Tensor marginal_error;  ///< the largest of all problems solved for the value
  at::Tensor n_iter;          ///< iterations spent on OT(a, b), annealing included
  at::Tensor converged;       ///< every marginal error is below tol, or below what rounding allows
};

/// Options of `sinkhorn_divergence`, `sinkhorn`, `sinkhorn_ragged` and `sinkhorn_cost`. Each setter returns the
/// options: `SinkhornOptions().blur(0.1).reach(1.0)`.
struct TD_API SinkhornOptions {
  /// The cost; not for `sinkhorn_cost`, whose cost is given.
  TORCH_ARG(Cost, cost) = Cost::HalfSqEuclidean;
  /// Temperature in units of the cost: () or (B,), differentiable. `sinkhorn_cost` needs it.
  TORCH_ARG(std::optional<at::Tensor>, eps) = std::nullopt;
  /// The same as a length: eps is blur^2, 2 blur^2 for SqEuclidean, blur for Euclidean. 0.05 if neither is given.
  TORCH_ARG(std::optional<double>, blur) = std::nullopt;
  /// Penalty of the marginals: nothing (hard), one number, or x's and y's; infinity is hard.
  TORCH_ARG(std::vector<double>, rho);
  /// The same as a length, mapped as blur.
  TORCH_ARG(std::vector<double>, reach);
  /// Subtract the self terms; of `sinkhorn_divergence` and `sinkhorn_ragged` only.
  TORCH_ARG(bool, debias) = true;
  /// On the L1 marginal error relative to the mass; 0 runs exactly max_iter iterations.
  TORCH_ARG(double, tol) = 1e-3;
  /// Iterations of both potentials, annealing included. Reaching it warns once and never throws.
  TORCH_ARG(std::int64_t, max_iter) = 1000;
  /// Warm start: the potentials of an earlier solve, as SinkhornInfo or SinkhornResult.
  TORCH_ARG(std::optional<SinkhornInfo>, init) = std::nullopt;
  /// None returns one value a problem. Where it is not set, `SinkhornLoss` takes Mean, all others None.
  TORCH_ARG(std::optional<Reduction>, reduction) = std::nullopt;

 public:
  /// The same with numbers.
  SinkhornOptions& eps(double value);
  SinkhornOptions& rho(double both) { return rho(std::vector<double>{both}); }
  SinkhornOptions& rho(double of_x, double of_y) { return rho(std::vector<double>{of_x, of_y}); }
  SinkhornOptions& reach(double both) { return reach(std::vector<double>{both}); }
  SinkhornOptions& reach(double of_x, double of_y) { return reach(std::vector<double>{of_x, of_y}); }
};

/// The solution of OT(a, b), as `sinkhorn` returns it. The plan is P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps).
struct TD_API SinkhornResult {
  at::Tensor value;  ///< the dual value, () or (B,); twice differentiable
  at::Tensor f, g;   ///< potentials, (N,) and (M,) or batched; once differentiable, by the implicit function theorem
  at::Tensor marginal_error;  ///< of exactly these potentials
  at::Tensor n_iter;
  at::Tensor converged;

  /// The plan, (N, M) or (B, N, M). Differentiable.
  at::Tensor plan() const;
  /// P v, or P' v with `transpose`, without the plan in memory: v (M,) or (M, K), batched as the result. Once
  /// differentiable.
  at::Tensor apply(const at::Tensor& v, bool transpose = false) const;
  /// Where the plan sends each x: sum_j P_ij y_j / sum_j P_ij. Once differentiable.
  at::Tensor barycentric_projection() const;
  /// <P, C>, detached.
  at::Tensor transport_cost() const;
  /// Lets a result be the `init` of another solve.
  operator SinkhornInfo() const { return {f, g, at::Tensor(), at::Tensor(), marginal_error, n_iter, converged}; }

  /// What was solved.
  at::Tensor x, y;
  std::optional<at::Tensor> a, b;
  SinkhornOptions options;
};

/// The Sinkhorn divergence between weighted point clouds:
///
///     S(a, b) = OT(a, b) - OT(a, a)/2 - OT(b, b)/2 + eps/2 (m_a - m_b)^2
///     OT(a, b) = min_P <P, C> + eps KL(P | a x b) + rho_a KL(P 1 | a) + rho_b KL(P' 1 | b)
///
/// (Cuturi, "Sinkhorn Distances", 2013; Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
/// Divergences", 2019; Sejourne et al., "Sinkhorn Divergences for Unbalanced Optimal Transport", 2019), m the masses.
/// It is 0 at equal clouds and takes memory for the points, not for the pairs.
///
/// Shapes. x (N, D) or (B, N, D), y (M, D) or (B, M, D), a (N,) or (B, N), b (M,) or (B, M); what has no batch
/// dimension is shared by the batch. Absent weights are uniform and sum to 1. The value is () or (B,).
///
/// Dtypes. float32, float64, bfloat16, float16; half types are computed in float32 and give a float32 value; float64
/// meets only itself.
///
/// Differentiable, twice, in x, y, a, b and eps, by the envelope and implicit function theorems. Balanced, gradients of
/// weights are defined up to a constant. Points of weight 0 change nothing and have finite gradients.
///
/// @throws c10::ValueError naming the argument, what it was and what was expected: shapes, dtypes, devices, both eps
/// and
///   blur, debias with two different rho, negative weights, masses that differ where both marginals are hard (by more
///   than 1e-5 relative in float32, 1e-10 in float64).
///
/// Example:
///
///     namespace td = torch_divergence;
///     at::Tensor x = at::rand({100, 3}).requires_grad_(), y = at::rand({120, 3});
///     td::sinkhorn_divergence(x, y, {}, {}, td::SinkhornOptions().blur(0.1)).backward();
TD_API at::Tensor sinkhorn_divergence(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                                      const std::optional<at::Tensor>& b, const SinkhornOptions& options);
TD_API at::Tensor sinkhorn_divergence(const at::Tensor& x, const at::Tensor& y,
                                      const std::optional<at::Tensor>& a = std::nullopt,
                                      const std::optional<at::Tensor>& b = std::nullopt);

/// The same with what the solve leaves.
TD_API std::pair<at::Tensor, SinkhornInfo> sinkhorn_divergence_with_info(
    const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a = std::nullopt,
    const std::optional<at::Tensor>& b = std::nullopt, const SinkhornOptions& options = {});

/// OT(a, b) itself, with potentials and plan: formula, arguments and errors as above; rho may differ between the sides,
/// `debias` and `reduction` are not looked at. Balanced potentials are those with <a, f> = <b, g>.
TD_API SinkhornResult sinkhorn(const at::Tensor& x, const at::Tensor& y,
                               const std::optional<at::Tensor>& a = std::nullopt,
                               const std::optional<at::Tensor>& b = std::nullopt, const SinkhornOptions& options = {});

/// `sinkhorn_divergence` of clouds of different sizes, one after another: cloud k is x[x_offsets[k] .. x_offsets[k+1]),
/// never empty; offsets int64 (B + 1,). Equal to a loop over the clouds. No forward mode, no vmap.
TD_API at::Tensor sinkhorn_ragged(const at::Tensor& x, const at::Tensor& x_offsets, const at::Tensor& y,
                                  const at::Tensor& y_offsets, const std::optional<at::Tensor>& a = std::nullopt,
                                  const std::optional<at::Tensor>& b = std::nullopt,
                                  const SinkhornOptions& options = {});

/// The same with what the solve leaves; potentials are those of all clouds, one after another.
TD_API std::pair<at::Tensor, SinkhornInfo> sinkhorn_ragged_with_info(const at::Tensor& x, const at::Tensor& x_offsets,
                                                                     const at::Tensor& y, const at::Tensor& y_offsets,
                                                                     const std::optional<at::Tensor>& a = std::nullopt,
                                                                     const std::optional<at::Tensor>& b = std::nullopt,
                                                                     const SinkhornOptions& options = {});

/// OT(a, b) for a given cost matrix C (N, M) or (B, N, M), any real numbers; the gradient of C is the plan. `cost`,
/// `blur`, `reach` and `debias` must be at their defaults; `eps` must be given.
TD_API at::Tensor sinkhorn_cost(const at::Tensor& C, const std::optional<at::Tensor>& a,
                                const std::optional<at::Tensor>& b, const SinkhornOptions& options);

/// The same with what the solve leaves.
TD_API std::pair<at::Tensor, SinkhornInfo> sinkhorn_cost_with_info(const at::Tensor& C,
                                                                   const std::optional<at::Tensor>& a,
                                                                   const std::optional<at::Tensor>& b,
                                                                   const SinkhornOptions& options);

}  // namespace torch_divergence
