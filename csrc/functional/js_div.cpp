#include <torch_divergence/functional/js_div.h>

#include "core/op.h"

#include <ATen/ops/scalar_tensor.h>

#include <string_view>

namespace torch_divergence {
namespace {

template <class Input>
using JSDivOp = at::Tensor(Input, const at::Tensor& target, double beta, bool scaled, std::string_view space,
                           std::optional<std::string_view> target_space, double temperature, std::int64_t dim,
                           const std::optional<at::Tensor>& row_weight, std::string_view reduction,
                           const std::optional<at::Tensor>& normalizer);

}  // namespace

JSDivOptions& JSDivOptions::normalizer(double value) {
  // float64 keeps every integer count exact.
  return normalizer(std::make_optional(at::scalar_tensor(value, at::kDouble)));
}

at::Tensor js_div(const at::Tensor& input, const at::Tensor& target, const JSDivOptions& options) {
  static const auto plain = typed_op<JSDivOp<const at::Tensor&>>("torch_divergence::js_div");
  static const auto inplace_grad = typed_op<JSDivOp<at::Tensor&>>("torch_divergence::js_div_inplace_grad");
  std::optional<std::string_view> target_space;
  if (options.target_space().has_value()) {
    target_space = to_string(*options.target_space());
  }
  const auto call = [&](const auto& op, auto& x) {
    return op.call(x, target, options.beta(), options.scaled(), to_string(options.space()), target_space,
                   options.temperature(), options.dim(), options.row_weight(), to_string(options.reduction()),
                   options.normalizer());
  };
  if (options.inplace_grad()) {
    at::Tensor overwritten = input;
    return call(inplace_grad, overwritten);
  }
  return call(plain, input);
}

at::Tensor js_div(const at::Tensor& input, const at::Tensor& target) { return js_div(input, target, JSDivOptions()); }

}  // namespace torch_divergence
