#include <torch_divergence/functional/entropy.h>

#include "core/op.h"

#include <ATen/ops/scalar_tensor.h>

#include <string_view>

namespace torch_divergence {

EntropyOptions& EntropyOptions::normalizer(double value) {
  // float64 keeps every integer count exact.
  return normalizer(std::make_optional(at::scalar_tensor(value, at::kDouble)));
}

at::Tensor entropy(const at::Tensor& input, const EntropyOptions& options) {
  using Op = at::Tensor(const at::Tensor&, std::string_view space, double temperature, std::int64_t dim,
                        const std::optional<at::Tensor>& row_weight, std::string_view reduction,
                        const std::optional<at::Tensor>& normalizer);
  static const auto op = typed_op<Op>("torch_divergence::entropy");
  return op.call(input, to_string(options.space()), options.temperature(), options.dim(), options.row_weight(),
                 to_string(options.reduction()), options.normalizer());
}

at::Tensor entropy(const at::Tensor& input) { return entropy(input, EntropyOptions()); }

}  // namespace torch_divergence
