#include <torch_divergence/modules/cross_entropy.h>

#include "modules/checks.h"

#include <ostream>
#include <utility>

namespace torch_divergence {

CrossEntropyLossImpl::CrossEntropyLossImpl(CrossEntropyOptions options_) : options(std::move(options_)) {
  check_no_batch_tensors(options);
}

void CrossEntropyLossImpl::reset() {}

void CrossEntropyLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::CrossEntropyLoss(";
  if (options.target_space().has_value()) {
    stream << "target_space=" << to_string(*options.target_space()) << ", ";
  }
  stream << "label_smoothing=" << options.label_smoothing() << ", ignore_index=" << options.ignore_index()
         << ", space=" << to_string(options.space()) << ", temperature=" << options.temperature()
         << ", dim=" << options.dim() << ", reduction=" << to_string(options.reduction());
  if (options.inplace_grad()) {
    stream << ", inplace_grad=true";
  }
  stream << ")";
}

at::Tensor CrossEntropyLossImpl::forward(const at::Tensor& input, const at::Tensor& target,
                                         const std::optional<at::Tensor>& row_weight,
                                         const std::optional<at::Tensor>& normalizer) {
  check_no_batch_tensors(options);
  return cross_entropy(input, target, CrossEntropyOptions(options).row_weight(row_weight).normalizer(normalizer));
}

}  // namespace torch_divergence
