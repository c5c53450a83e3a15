#include <torch_divergence/functional/kl_div.h>

#include "core/op.h"

#include <ATen/ops/scalar_tensor.h>

#include <string_view>

namespace torch_divergence {
namespace {

template <class Input>
using KLDivOp = at::Tensor(Input, const at::Tensor& target, std::string_view direction, std::string_view space,
                           std::optional<std::string_view> target_space, double temperature, std::int64_t dim,
                           const std::optional<at::Tensor>& row_weight, std::string_view reduction,
                           const std::optional<at::Tensor>& normalizer);

}  // namespace

KLDivOptions& KLDivOptions::normalizer(double value) {
  // float64 keeps every integer count exact.
  return normalizer(std::make_optional(at::scalar_tensor(value, at::kDouble)));
}

at::Tensor kl_div(const at::Tensor& input, const at::Tensor& target, const KLDivOptions& options) {
  static const auto plain = typed_op<KLDivOp<const at::Tensor&>>("torch_divergence::kl_div");
  static const auto inplace_grad = typed_op<KLDivOp<at::Tensor&>>("torch_divergence::kl_div_inplace_grad");
  std::optional<std::string_view> target_space;
  if (options.target_space().has_value()) {
    target_space = to_string(*options.target_space());
  }
  const auto call = [&](const auto& op, auto& x) {
    return op.call(x, target, to_string(options.direction()), to_string(options.space()), target_space,
                   options.temperature(), options.dim(), options.row_weight(), to_string(options.reduction()),
                   options.normalizer());
  };
  if (options.inplace_grad()) {
    at::Tensor overwritten = input;
    return call(inplace_grad, overwritten);
  }
  return call(plain, input);
}

at::Tensor kl_div(const at::Tensor& input, const at::Tensor& target) { return kl_div(input, target, KLDivOptions()); }

}  // namespace torch_divergence
