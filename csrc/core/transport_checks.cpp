#include "core/transport_checks.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace torch_divergence {

void check_together(const char* name, std::initializer_list<NamedTensor> tensors) {
  const NamedTensor& first = *tensors.begin();
  for (const auto& [argument, tensor] : tensors) {
    if (!tensor.has_value()) continue;
    const auto& t = *tensor;
    const auto type = t.scalar_type(), reference = first.tensor->scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, name,
                      ": ", argument, " has dtype ", type, ", expected float32, float64, bfloat16 or float16");
    TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, ": ", argument, " has layout ", t.layout(),
                      ", expected a dense tensor");
    TORCH_CHECK_VALUE(t.device() == first.tensor->device(), name, ": ", argument, " is on ", t.device(), ", expected ",
                      first.tensor->device(), ", where ", first.name, " is");
    TORCH_CHECK_VALUE((type == at::kDouble) == (reference == at::kDouble), name, ": ", first.name, " has dtype ",
                      reference, " and ", argument, " ", type, ", expected float64 in every tensor or in none");
  }
}

void check_power(const char* name, double p) {
  TORCH_CHECK_VALUE(p >= 1 && std::isfinite(p), name, ": p is ", p, ", expected a finite number of at least 1");
}

namespace {

// The sum of each row, in double; {1} where the weights are uniform.
at::Tensor checked_sums(const char* name, const char* argument, const std::optional<at::Tensor>& weights) {
  if (!weights.has_value()) return at::ones({1}, at::kDouble);
  const auto w = weights->to(at::kDouble).contiguous();
  const double* const x = w.const_data_ptr<double>();
  const auto* const bad = std::find_if_not(x, x + w.numel(), [](double v) { return v >= 0 && std::isfinite(v); });
  TORCH_CHECK_VALUE(bad == x + w.numel(), name, ": ", argument, " holds ", *bad,
                    ", expected finite weights that are not negative");
  return w.sum(-1).reshape({-1});
}

}  // namespace

void check_masses(const char* name, const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& b,
                  at::ScalarType dtype) {
  const double tolerance = mass_tolerance(dtype);
  const auto of_a = checked_sums(name, "a", a), of_b = checked_sums(name, "b", b);
  const double *const x = of_a.const_data_ptr<double>(), *const y = of_b.const_data_ptr<double>();
  const int64_t rows = a.has_value() ? of_a.numel() : of_b.numel();
  for (int64_t i = 0; i < rows; ++i) {
    const double mass_a = a.has_value() ? x[i] : 1, mass_b = b.has_value() ? y[i] : 1;
    TORCH_CHECK_VALUE(std::abs(mass_a - mass_b) <= tolerance * std::max(mass_a, mass_b), name, ": a sums to ", mass_a,
                      " and b to ", mass_b, " in row ", i, ", which differ by ", std::abs(mass_a - mass_b),
                      ", expected equal masses (to ", tolerance,
                      " relative; weights that are None sum to 1, and nothing is rescaled)");
  }
}

}  // namespace torch_divergence
