#include <torch_divergence/modules/kl_div_topk.h>

#include "modules/checks.h"

#include <ostream>
#include <utility>

namespace torch_divergence {

KLDivTopKLossImpl::KLDivTopKLossImpl(KLDivTopKOptions options_) : options(std::move(options_)) {
  check_no_batch_tensors(options);
}

void KLDivTopKLossImpl::reset() {}

void KLDivTopKLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::KLDivTopKLoss(tail=" << to_string(options.tail())
         << ", direction=" << to_string(options.direction()) << ", space=" << to_string(options.space())
         << ", temperature=" << options.temperature() << ", dim=" << options.dim()
         << ", reduction=" << to_string(options.reduction()) << ")";
}

at::Tensor KLDivTopKLossImpl::forward(const at::Tensor& input, const at::Tensor& indices, const at::Tensor& log_probs,
                                      const std::optional<at::Tensor>& tail_log_prob,
                                      const std::optional<at::Tensor>& row_weight,
                                      const std::optional<at::Tensor>& normalizer) {
  check_no_batch_tensors(options);
  return kl_div_topk(input, indices, log_probs, tail_log_prob,
                     KLDivTopKOptions(options).row_weight(row_weight).normalizer(normalizer));
}

}  // namespace torch_divergence
