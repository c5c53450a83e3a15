#include <torch_divergence/modules/distillation.h>

#include "modules/checks.h"

#include <ostream>

namespace torch_divergence {

namespace {

void check_options(const DistillationOptions& options) {
  check_not_of_batch("topk", options.topk().has_value());
  check_no_batch_tensors(options);
}

}  // namespace

DistillationLossImpl::DistillationLossImpl(DistillationOptions options_) : options(std::move(options_)) {
  check_options(options);
}
void DistillationLossImpl::reset() {}
void DistillationLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::DistillationLoss(temperature=" << options.temperature() << ", alpha=";
  if (options.alpha().has_value()) {
    stream << *options.alpha();
  } else {
    stream << "none";
  }
  stream << ", divergence=" << to_string(options.divergence()) << ", direction=" << to_string(options.direction())
         << ", beta=" << options.beta() << ", ignore_index=" << options.ignore_index()
         << ", reduction=" << to_string(options.reduction()) << ")";
}
at::Tensor DistillationLossImpl::forward(const at::Tensor& student_logits,
                                         const std::optional<at::Tensor>& teacher_logits,
                                         const std::optional<at::Tensor>& labels, const std::optional<TopK>& topk,
                                         const std::optional<at::Tensor>& row_weight,
                                         const std::optional<at::Tensor>& normalizer) {
  check_options(options);
  return distillation_loss(student_logits, teacher_logits, labels,
                           DistillationOptions(options).topk(topk).row_weight(row_weight).normalizer(normalizer));
}

}  // namespace torch_divergence
