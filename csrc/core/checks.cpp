#include "core/checks.h"

#include <c10/util/Exception.h>

#include <cmath>

namespace torch_divergence {

void check_distribution(const char* name, const char* argument, const at::Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, name, ": ",
                    argument, " has dtype ", type, ", expected float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, ": ", argument, " has layout ", t.layout(),
                    ", expected a dense tensor");
  TORCH_CHECK_VALUE(t.dim() >= 1, name, ": ", argument,
                    " is a scalar, expected at least one dimension, that of the classes");
}

void check_distributions(const char* name, const at::Tensor& input, const at::Tensor& target) {
  check_distribution(name, "input", input);
  check_distribution(name, "target", target);
  TORCH_CHECK_VALUE(input.device() == target.device(), name, ": target is on ", target.device(), ", expected ",
                    input.device(), ", where input is");
  TORCH_CHECK_VALUE(input.dim() == target.dim() && input.sym_sizes() == target.sym_sizes(), name, ": target has shape ",
                    target.sym_sizes(), ", expected ", input.sym_sizes(),
                    ", the shape of input (nothing is broadcast; expand() costs no memory)");
  const auto a = input.scalar_type(), b = target.scalar_type();
  TORCH_CHECK_VALUE((a == at::kDouble) == (b == at::kDouble), name, ": input has dtype ", a, " and target ", b,
                    ", expected float64 on both sides or on neither");
}

int64_t check_dim(const char* name, const at::Tensor& input, int64_t dim) {
  const int64_t dims = input.dim();
  TORCH_CHECK_VALUE(dim >= -dims && dim < dims, name, ": dim is ", dim, ", expected a value from ", -dims, " to ",
                    dims - 1, " for input of shape ", input.sym_sizes());
  const int64_t wrapped = dim < 0 ? dim + dims : dim;
  TORCH_CHECK_VALUE(TORCH_GUARD_OR_TRUE(input.sym_size(wrapped).sym_ne(0)), name, ": input has no classes: dim ", dim,
                    " of shape ", input.sym_sizes(), ", expected at least one");
  return wrapped;
}

SpaceCode check_space(const char* name, const char* argument, std::string_view space) {
  if (space == "logits") return kLogits;
  if (space == "log_probs") return kLogProbs;
  if (space == "probs") return kProbs;
  TORCH_CHECK_VALUE(false, name, ": ", argument, " is \"", space, R"(", expected "logits", "log_probs" or "probs")");
}

void check_temperature(const char* name, double temperature, bool any_logits) {
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature > 0, name, ": temperature is ", temperature,
                    ", expected a positive finite number");
  TORCH_CHECK_VALUE(any_logits || temperature == 1, name, ": temperature is ", temperature,
                    ", expected 1 where no side is given as logits (it divides logits only)");
}

bool check_choice(const char* name, const char* argument, std::string_view value, std::string_view first,
                  std::string_view second) {
  TORCH_CHECK_VALUE(value == first || value == second, name, ": ", argument, " is \"", value, "\", expected \"", first,
                    "\" or \"", second, "\"");
  return value == second;
}

}  // namespace torch_divergence
