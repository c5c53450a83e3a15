/// Trust region policy optimisation.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/export.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace torch_divergence {

/// Options of `trust_region_step`.
struct TD_API TrustRegionOptions {
  /// delta, the bound on KL(old || new). Positive.
  TORCH_ARG(double, max_kl) = 0.01;
  /// Added to the Hessian's diagonal. Not negative.
  TORCH_ARG(double, damping) = 0.0;
  /// Iterations of conjugate gradients, at least 1.
  TORCH_ARG(std::int64_t, cg_iters) = 10;
  /// How often the step is halved before it is given up, at least 1.
  TORCH_ARG(std::int64_t, backtracks) = 10;
};

struct TD_API TrustRegionResult {
  bool accepted;       ///< were the parameters changed?
  double kl;           ///< KL(old || new) measured after the step; 0 if it was refused
  double improvement;  ///< of the surrogate; 0 if the step was refused
};

/// One step of TRPO (Schulman et al., "Trust Region Policy Optimization", 2015): maximises `surrogate` under
/// KL(old || new) <= max_kl.
///
/// The direction x solves H x = g by conjugate gradients, with g the gradient of the surrogate and H the Hessian of
/// `kl` at the present parameters, used through products only (by double backward); its length makes x' H x / 2 =
/// max_kl. The step is halved until the measured `kl` is at most max_kl and the surrogate has improved; if that never
/// happens, wherever a number is not finite, and if `surrogate` or `kl` throws, the parameters are restored, bit by
/// bit.
///
/// `params` are leaves that require grad. `surrogate` and `kl` are called at the present parameters and return scalars
/// with a graph to them, kl being KL(old || new) with the old policy detached: 0 at the present parameters, as is its
/// gradient. Both are called again, in no-grad mode, after each trial step. Only `params` are written, and no .grad.
///
/// @throws c10::ValueError for options out of range, no parameters, parameters that do not require grad, values that
///   are not scalars or have no graph.
TD_API TrustRegionResult trust_region_step(const std::vector<at::Tensor>& params,
                                           const std::function<at::Tensor()>& surrogate,
                                           const std::function<at::Tensor()>& kl,
                                           const TrustRegionOptions& options = {});

}  // namespace torch_divergence
