// Checks that the exact transport losses share. As in core/checks.h: c10::ValueError, naming argument, value,
// expectation.
#pragma once
#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

namespace torch_divergence {

struct NamedTensor {
  const char* name;
  const std::optional<at::Tensor>& tensor;
};

// Dense, of a supported dtype, on the first one's device, float64 on all or on none.
void check_together(const char* name, std::initializer_list<NamedTensor> tensors);
// p >= 1 and finite.
void check_power(const char* name, double p);

// How far two masses may be apart and count as equal, relative to the larger.
inline double mass_tolerance(at::ScalarType dtype) { return dtype == at::kDouble ? 1e-10 : 1e-5; }

// Values, for the CPU kernels. Weights (..., N) and (..., M), of which None is uniform and sums to 1: finite, not
// negative, and of equal sums in every row, up to `dtype`'s share of rounding (1e-5 in float32, 1e-10 in float64).
void check_masses(const char* name, const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& b,
                  at::ScalarType dtype);

}  // namespace torch_divergence
