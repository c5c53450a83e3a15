#include <torch_divergence/functional/kl_div_topk.h>

#include "core/op.h"

#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>

#include <string_view>

namespace torch_divergence {

const char* to_string(Tail tail) {
  switch (tail) {
    case Tail::Bucket:
      return "bucket";
    case Tail::Zero:
      return "zero";
    case Tail::RenormTarget:
      return "renorm_target";
    case Tail::RenormBoth:
      return "renorm_both";
  }
  TORCH_CHECK_VALUE(false, "tail: no such value, ", static_cast<int>(tail));
}

KLDivTopKOptions& KLDivTopKOptions::normalizer(double value) {
  return normalizer(std::make_optional(at::scalar_tensor(value, at::kDouble)));
}

at::Tensor kl_div_topk(const at::Tensor& input, const at::Tensor& indices, const at::Tensor& log_probs,
                       const std::optional<at::Tensor>& tail_log_prob, const KLDivTopKOptions& options) {
  using Op =
      at::Tensor(const at::Tensor& input, const at::Tensor& indices, const at::Tensor& log_probs, std::string_view tail,
                 const std::optional<at::Tensor>& tail_log_prob, std::string_view direction, std::string_view space,
                 double temperature, std::int64_t dim, const std::optional<at::Tensor>& row_weight,
                 std::string_view reduction, const std::optional<at::Tensor>& normalizer);
  static const auto op = typed_op<Op>("torch_divergence::kl_div_topk");
  return op.call(input, indices, log_probs, to_string(options.tail()), tail_log_prob, to_string(options.direction()),
                 to_string(options.space()), options.temperature(), options.dim(), options.row_weight(),
                 to_string(options.reduction()), options.normalizer());
}

at::Tensor kl_div_topk(const at::Tensor& input, const at::Tensor& indices, const at::Tensor& log_probs,
                       const KLDivTopKOptions& options) {
  return kl_div_topk(input, indices, log_probs, std::nullopt, options);
}

at::Tensor kl_div_topk(const at::Tensor& input, const at::Tensor& indices, const at::Tensor& log_probs) {
  return kl_div_topk(input, indices, log_probs, std::nullopt, KLDivTopKOptions());
}

}  // namespace torch_divergence
