// Checks that every loss between two distributions shares, in one wording: argument, what it was, what was expected.
// All raise c10::ValueError (Python: ValueError), on meta and fake tensors too. `name` is the public function's.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "core/rows.h"

namespace torch_divergence {

// float32 for float32 and the half types, float64 for float64: in what losses are accumulated and returned.
inline at::ScalarType loss_dtype(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == at::kDouble || b.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_distribution(const char* name, const char* argument, const at::Tensor& t);
// Both as above, of one shape and device, with dtypes that go together.
void check_distributions(const char* name, const at::Tensor& input, const at::Tensor& target);
// The dimension counted from the front.
int64_t check_dim(const char* name, const at::Tensor& input, int64_t dim);
SpaceCode check_space(const char* name, const char* argument, std::string_view space);
void check_temperature(const char* name, double temperature, bool any_logits);
// Is `value` the second of the two choices?
bool check_choice(const char* name, const char* argument, std::string_view value, std::string_view first,
                  std::string_view second);

}  // namespace torch_divergence
