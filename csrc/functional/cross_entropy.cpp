#include <torch_divergence/functional/cross_entropy.h>

#include "core/op.h"

#include <ATen/ops/scalar_tensor.h>

#include <string_view>

namespace torch_divergence {
namespace {

template <class Input>
using CrossEntropyOp = at::Tensor(Input, const at::Tensor& target, std::optional<std::string_view> target_space,
                                  double label_smoothing, std::int64_t ignore_index, std::string_view space,
                                  double temperature, std::int64_t dim, const std::optional<at::Tensor>& row_weight,
                                  std::string_view reduction, const std::optional<at::Tensor>& normalizer);

}  // namespace

CrossEntropyOptions& CrossEntropyOptions::normalizer(double value) {
  // float64 keeps every integer count exact.
  return normalizer(std::make_optional(at::scalar_tensor(value, at::kDouble)));
}

at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options) {
  static const auto plain = typed_op<CrossEntropyOp<const at::Tensor&>>("torch_divergence::cross_entropy");
  static const auto inplace_grad =
      typed_op<CrossEntropyOp<at::Tensor&>>("torch_divergence::cross_entropy_inplace_grad");
  std::optional<std::string_view> target_space;
  if (options.target_space().has_value()) {
    target_space = to_string(*options.target_space());
  }
  const auto call = [&](const auto& op, auto& x) {
    return op.call(x, target, target_space, options.label_smoothing(), options.ignore_index(),
                   to_string(options.space()), options.temperature(), options.dim(), options.row_weight(),
                   to_string(options.reduction()), options.normalizer());
  };
  if (options.inplace_grad()) {
    at::Tensor overwritten = input;
    return call(inplace_grad, overwritten);
  }
  return call(plain, input);
}

at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target) {
  return cross_entropy(input, target, CrossEntropyOptions());
}

}  // namespace torch_divergence
