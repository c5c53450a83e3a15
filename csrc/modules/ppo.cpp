#include <torch_divergence/modules/ppo.h>

#include "modules/checks.h"

#include <ostream>
#include <utility>

namespace torch_divergence {

PPOClipLossImpl::PPOClipLossImpl(PPOClipOptions options_) : options(std::move(options_)) {
  check_no_batch_tensors(options);
}
void PPOClipLossImpl::reset() {}
void PPOClipLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::PPOClipLoss(clip=" << options.clip()
         << ", clip_high=" << options.clip_high().value_or(options.clip())
         << ", reduction=" << to_string(options.reduction()) << ")";
}
at::Tensor PPOClipLossImpl::forward(const at::Tensor& log_prob, const at::Tensor& old_log_prob,
                                    const at::Tensor& advantage, const std::optional<at::Tensor>& row_weight,
                                    const std::optional<at::Tensor>& normalizer) {
  check_no_batch_tensors(options);
  return ppo_clip_loss(log_prob, old_log_prob, advantage,
                       PPOClipOptions(options).row_weight(row_weight).normalizer(normalizer));
}

PPOKLPenaltyLossImpl::PPOKLPenaltyLossImpl(PPOKLPenaltyOptions options_) : options(std::move(options_)) {
  check_no_batch_tensors(options);
}
void PPOKLPenaltyLossImpl::reset() {}
void PPOKLPenaltyLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::PPOKLPenaltyLoss(kl_coef=" << options.kl_coef()
         << ", reduction=" << to_string(options.reduction()) << ")";
}
at::Tensor PPOKLPenaltyLossImpl::forward(const at::Tensor& log_prob, const at::Tensor& old_log_prob,
                                         const at::Tensor& advantage, const at::Tensor& kl,
                                         const std::optional<at::Tensor>& row_weight,
                                         const std::optional<at::Tensor>& normalizer) {
  check_no_batch_tensors(options);
  return ppo_kl_penalty_loss(log_prob, old_log_prob, advantage, kl,
                             PPOKLPenaltyOptions(options).row_weight(row_weight).normalizer(normalizer));
}

}  // namespace torch_divergence
