#include <torch_divergence/modules/kl_estimate.h>

#include "modules/checks.h"

#include <ostream>
#include <utility>

namespace torch_divergence {

namespace {

void check_options(const KLEstimateOptions& options) {
  check_not_of_batch("importance_weight", options.importance_weight().has_value());
  check_no_batch_tensors(options);
}

}  // namespace

KLEstimateLossImpl::KLEstimateLossImpl(KLEstimateOptions options_) : options(std::move(options_)) {
  check_options(options);
}
void KLEstimateLossImpl::reset() {}
void KLEstimateLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::KLEstimateLoss(kind=" << to_string(options.kind())
         << ", gradient=" << to_string(options.gradient());
  if (options.max_log_ratio().has_value()) {
    stream << ", max_log_ratio=" << *options.max_log_ratio();
  }
  stream << ", reduction=" << to_string(options.reduction()) << ")";
}
at::Tensor KLEstimateLossImpl::forward(const at::Tensor& log_p, const at::Tensor& log_q,
                                       const std::optional<at::Tensor>& importance_weight,
                                       const std::optional<at::Tensor>& row_weight,
                                       const std::optional<at::Tensor>& normalizer) {
  check_options(options);
  return kl_estimate(
      log_p, log_q,
      KLEstimateOptions(options).importance_weight(importance_weight).row_weight(row_weight).normalizer(normalizer));
}

}  // namespace torch_divergence
