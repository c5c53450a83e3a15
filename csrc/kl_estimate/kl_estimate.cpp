// Estimators of KL(p || q) from samples of p, as a composition of ATen operators.
#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <torch/library.h>
#include <torch_divergence/functional/kl_estimate.h>

#include <cmath>
#include <string_view>

#include "core/composite.h"

namespace torch_divergence {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor kl_estimate_op(const Tensor& log_p, const Tensor& log_q, std::string_view kind, std::string_view gradient,
                      std::optional<double> max_log_ratio, const OptionalTensor& importance_weight,
                      const OptionalTensor& row_weight, std::string_view reduction, const OptionalTensor& normalizer) {
  constexpr const char* kName = "kl_estimate";
  const auto p = checked_real(kName, "log_p", log_p);
  const auto q = checked_like(kName, "log_q", log_q, "log_p", log_p, true);
  TORCH_CHECK_VALUE(kind == "k1" || kind == "k2" || kind == "k3", kName, ": kind is \"", kind,
                    R"(", expected "k1", "k2" or "k3")");
  TORCH_CHECK_VALUE(gradient == "path" || gradient == "kl" || gradient == "none", kName, ": gradient is \"", gradient,
                    R"(", expected "path", "kl" or "none")");
  TORCH_CHECK_VALUE(!max_log_ratio.has_value() || (std::isfinite(*max_log_ratio) && *max_log_ratio > 0), kName,
                    ": max_log_ratio is ", max_log_ratio.value_or(0), ", expected a positive finite number");
  const EntryReduction reduce(kName, p, row_weight, reduction, normalizer);
  // Equal infinities are equal densities.
  const auto a = reduce.kept(p), b = reduce.kept(q);
  const auto same = (a == b).logical_and(a.isinf());
  auto r = at::where(same, 0, b) - at::where(same, 0, a);
  if (max_log_ratio.has_value()) r = r.clamp(-*max_log_ratio, *max_log_ratio);
  const auto estimate = [&](const Tensor& x) { return kind == "k1" ? -x : kind == "k2" ? x * x / 2 : expm1_minus(x); };
  Tensor value;
  if (gradient == "path") {
    value = estimate(r);
  } else if (gradient == "none") {
    value = estimate(r.detach());
  } else {
    // r^2/2 minus itself, as a product that does not overflow: 0, with the gradient of k2. An infinite r would make it
    // NaN.
    const auto finite = at::where(r.detach().isinf(), 0, r), fixed = finite.detach();
    value = estimate(r.detach()) + (finite - fixed) * (finite / 2 + fixed / 2);
  }
  if (importance_weight.has_value())
    value = value * reduce.kept(checked_like(kName, "importance_weight", *importance_weight, "log_p", log_p, true));
  return reduce(value);
}

}  // namespace

const char* to_string(KLEstimator kind) {
  switch (kind) {
    case KLEstimator::K1:
      return "k1";
    case KLEstimator::K2:
      return "k2";
    case KLEstimator::K3:
      return "k3";
  }
  TORCH_CHECK_VALUE(false, "kind: no such value, ", static_cast<int>(kind));
}
const char* to_string(KLEstimateGradient gradient) {
  switch (gradient) {
    case KLEstimateGradient::Path:
      return "path";
    case KLEstimateGradient::KL:
      return "kl";
    case KLEstimateGradient::None:
      return "none";
  }
  TORCH_CHECK_VALUE(false, "gradient: no such value, ", static_cast<int>(gradient));
}

Tensor kl_estimate(const Tensor& log_p, const Tensor& log_q, const KLEstimateOptions& options) {
  return kl_estimate_op(log_p, log_q, to_string(options.kind()), to_string(options.gradient()), options.max_log_ratio(),
                        options.importance_weight(), options.row_weight(), to_string(options.reduction()),
                        options.normalizer());
}

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  m.def(
      "kl_estimate(Tensor log_p, Tensor log_q, *, str kind=\"k3\", str gradient=\"path\", float? max_log_ratio=None, "
      "Tensor? importance_weight=None, Tensor? row_weight=None, str reduction=\"mean\", Tensor? normalizer=None) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { m.impl("kl_estimate", kl_estimate_op); }
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { m.impl("kl_estimate", kl_estimate_op); }

}  // namespace torch_divergence
