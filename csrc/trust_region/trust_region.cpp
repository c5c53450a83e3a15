#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros_like.h>
#include <torch_divergence/functional/trust_region.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/grad.h"

namespace torch_divergence {
namespace {

constexpr const char* kName = "trust_region_step";

at::Tensor scalar(const char* argument, const std::function<at::Tensor()>& closure, bool with_graph) {
  auto value = closure();
  TORCH_CHECK_VALUE(value.defined(), kName, ": ", argument, " returned an undefined tensor, expected a scalar");
  TORCH_CHECK_VALUE(value.dim() == 0, kName, ": ", argument, " returned a tensor of shape ", value.sizes(),
                    ", expected a scalar");
  TORCH_CHECK_VALUE(!with_graph || value.requires_grad(), kName, ": ", argument,
                    " returned a value without a graph, expected a function of params");
  return value;
}

at::Tensor flat_gradient(const at::Tensor& value, const std::vector<at::Tensor>& params, bool create_graph,
                         bool retain_graph) {
  auto gradients = gradients_of(value, params, create_graph, retain_graph);
  for (size_t i = 0; i < params.size(); ++i)
    gradients[i] = (gradients[i].defined() ? gradients[i] : at::zeros_like(params[i])).reshape(-1);
  return at::cat(gradients);
}

double dot(const at::Tensor& a, const at::Tensor& b) { return a.dot(b).item().toDouble(); }

double epsilon(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return std::numeric_limits<double>::epsilon();
    case at::kHalf:
      return std::numeric_limits<at::Half>::epsilon();
    case at::kBFloat16:
      return std::numeric_limits<at::BFloat16>::epsilon();
    default:
      return std::numeric_limits<float>::epsilon();
  }
}

// H x = g, for a positive semidefinite H. Logits may be shifted together at no cost, so H is singular; what is left of
// g when all else is solved is rounding, in directions whose curvature is rounding too: a step along them has any size.
at::Tensor conjugate_gradients(const std::function<at::Tensor(const at::Tensor&)>& h, const at::Tensor& g,
                               int64_t iterations) {
  auto x = at::zeros_like(g), r = g.clone(), p = g.clone();
  const double rounding = 4 * epsilon(g.scalar_type());
  double rr = dot(r, r), steepest = 0;
  const double enough = std::max(1e-20, rounding * rounding) * rr;
  for (int64_t i = 0; i < iterations && rr > enough; ++i) {
    const auto hp = h(p);
    const double curvature = dot(p, hp), quotient = curvature / dot(p, p);
    steepest = std::max(steepest, quotient);
    if (!(quotient > rounding * steepest)) break;  // the KL does not grow along p, or NaN: what there is must do
    x = x + (rr / curvature) * p;
    r = r - (rr / curvature) * hp;
    const double next = dot(r, r);
    p = r + (next / rr) * p;
    rr = next;
  }
  return x;
}

void write(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& old, const at::Tensor& step) {
  int64_t at = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    auto target = params[i].detach();
    if (step.defined()) {
      target.copy_(old[i] + step.slice(0, at, at + target.numel()).view_as(target));
    } else {
      target.copy_(old[i]);
    }
    at += target.numel();
  }
}

}  // namespace

TrustRegionResult trust_region_step(const std::vector<at::Tensor>& params, const std::function<at::Tensor()>& surrogate,
                                    const std::function<at::Tensor()>& kl, const TrustRegionOptions& options) {
  TORCH_CHECK_VALUE(!params.empty(), kName, ": params is empty, expected at least one parameter");
  TORCH_CHECK_VALUE(surrogate && kl, kName, ": ", surrogate ? "kl" : "surrogate", " is empty, expected a function");
  for (const auto& p : params) {
    TORCH_CHECK_VALUE(p.defined(), kName, ": params holds an undefined tensor, expected a leaf that requires grad");
    TORCH_CHECK_VALUE(p.requires_grad() && p.is_leaf(), kName,
                      ": params holds a tensor that is not a leaf that requires grad, of shape ", p.sizes());
  }
  const auto positive = [](const char* argument, double value) {
    TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), kName, ": ", argument, " is ", value,
                      ", expected a positive number");
  };
  positive("max_kl", options.max_kl());
  positive("cg_iters", static_cast<double>(options.cg_iters()));
  positive("backtracks", static_cast<double>(options.backtracks()));
  TORCH_CHECK_VALUE(options.damping() >= 0 && std::isfinite(options.damping()), kName, ": damping is ",
                    options.damping(), ", expected a finite number >= 0");

  const TrustRegionResult refused{false, 0, 0};
  at::Tensor step;
  double before = 0;
  {
    const at::AutoGradMode on(true);
    const auto value = scalar("surrogate", surrogate, true);
    before = value.item().toDouble();
    const auto gradient = flat_gradient(value, params, false, false);
    const auto kl_gradient = flat_gradient(scalar("kl", kl, true), params, true, true);
    TORCH_CHECK_VALUE(kl_gradient.requires_grad(), kName,
                      ": kl returned a value without a second derivative, expected KL(old || new) of params");
    // Its size does not matter, and its square must not overflow.
    const double size = gradient.numel() == 0 ? 0 : gradient.abs().max().item().toDouble();
    if (!(size > 0 && std::isfinite(size))) return refused;
    const auto hessian_times = [&](const at::Tensor& v) {
      return flat_gradient((kl_gradient * v).sum(), params, false, true) + options.damping() * v;
    };
    const auto direction = conjugate_gradients(hessian_times, gradient / size, options.cg_iters());
    const double curvature = dot(direction, hessian_times(direction));
    step = std::sqrt(2 * options.max_kl() / curvature) * direction;
  }
  if (!step.isfinite().all().item<bool>()) return refused;

  const at::NoGradGuard off;
  std::vector<at::Tensor> old;
  for (const auto& p : params) old.push_back(p.detach().clone());
  try {
    for (int64_t i = 0; i < options.backtracks(); ++i, step = step / 2) {
      write(params, old, step);
      const double divergence = scalar("kl", kl, false).item().toDouble();
      const double improvement = scalar("surrogate", surrogate, false).item().toDouble() - before;
      if (divergence <= options.max_kl() && improvement > 0 && std::isfinite(improvement))
        return {true, divergence, improvement};
    }
  } catch (...) {
    write(params, old, {});
    throw;
  }
  write(params, old, {});
  return refused;
}

}  // namespace torch_divergence
