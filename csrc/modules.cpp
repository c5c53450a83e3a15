#include <torch_divergence/modules.h>

#include <ostream>
#include <utility>

namespace torch_divergence {
namespace {

void check_no_batch_tensors(const KLDivOptions& options) {
  TORCH_CHECK_VALUE(
      !options.row_weight().has_value(),
      "row_weight: was set in the options of a module, where it would be used for every batch; pass it to "
      "forward(input, target, row_weight, normalizer)");
  TORCH_CHECK_VALUE(
      !options.normalizer().has_value(),
      "normalizer: was set in the options of a module, where it would be used for every batch; pass it to "
      "forward(input, target, row_weight, normalizer)");
}

}  // namespace

KLDivLossImpl::KLDivLossImpl(KLDivOptions options_) : options(std::move(options_)) { check_no_batch_tensors(options); }

void KLDivLossImpl::reset() {}

void KLDivLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::KLDivLoss(direction=" << to_string(options.direction())
         << ", space=" << to_string(options.space());
  if (options.target_space().has_value()) {
    stream << ", target_space=" << to_string(*options.target_space());
  }
  stream << ", temperature=" << options.temperature() << ", dim=" << options.dim()
         << ", reduction=" << to_string(options.reduction());
  if (options.inplace_grad()) {
    stream << ", inplace_grad=true";
  }
  stream << ")";
}

at::Tensor KLDivLossImpl::forward(const at::Tensor& input, const at::Tensor& target,
                                  const std::optional<at::Tensor>& row_weight,
                                  const std::optional<at::Tensor>& normalizer) {
  check_no_batch_tensors(options);
  return kl_div(input, target, KLDivOptions(options).row_weight(row_weight).normalizer(normalizer));
}

}  // namespace torch_divergence
