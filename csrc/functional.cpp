#include <torch_divergence/functional.h>

#include "core/cpu_dispatch.h"
#include "core/large_tensor.h"
#include "core/op.h"

#include <ATen/ops/scalar_tensor.h>
#include <torch/version.h>
#include <torch_divergence/version.h>

#include <string_view>

namespace torch_divergence {
namespace {

template <class Input>
using KLDivOp = at::Tensor(Input, const at::Tensor& target, std::string_view direction, std::string_view space,
                           std::optional<std::string_view> target_space, double temperature, std::int64_t dim,
                           const std::optional<at::Tensor>& row_weight, std::string_view reduction,
                           const std::optional<at::Tensor>& normalizer);

}  // namespace

const char* to_string(Space space) {
  switch (space) {
    case Space::Logits:
      return "logits";
    case Space::LogProbs:
      return "log_probs";
    case Space::Probs:
      return "probs";
  }
  TORCH_CHECK_VALUE(false, "space: no such value, ", static_cast<int>(space));
}

const char* to_string(Direction direction) {
  switch (direction) {
    case Direction::Forward:
      return "forward";
    case Direction::Reverse:
      return "reverse";
  }
  TORCH_CHECK_VALUE(false, "direction: no such value, ", static_cast<int>(direction));
}

const char* to_string(Reduction reduction) {
  switch (reduction) {
    case Reduction::None:
      return "none";
    case Reduction::Sum:
      return "sum";
    case Reduction::Mean:
      return "mean";
  }
  TORCH_CHECK_VALUE(false, "reduction: no such value, ", static_cast<int>(reduction));
}

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

std::string version() { return TORCH_DIVERGENCE_VERSION; }

std::string torch_version() { return TORCH_VERSION; }

std::string cpu_capability() {
  switch (cpu::isa()) {
    case cpu::Isa::Avx512:
      return "AVX512";
    case cpu::Isa::Avx2:
      return "AVX2";
    case cpu::Isa::Default:
      break;
  }
  return "DEFAULT";
}

void empty_cache() { release_kept_block(); }

}  // namespace torch_divergence
