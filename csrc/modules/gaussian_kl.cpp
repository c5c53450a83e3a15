#include <torch_divergence/modules/gaussian_kl.h>

#include "modules/checks.h"

#include <ostream>
#include <utility>

namespace torch_divergence {

GaussianKLLossImpl::GaussianKLLossImpl(GaussianKLOptions options_) : options(std::move(options_)) {
  check_no_batch_tensors(options);
}
void GaussianKLLossImpl::reset() {}
void GaussianKLLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::GaussianKLLoss(reduction=" << to_string(options.reduction()) << ")";
}
at::Tensor GaussianKLLossImpl::forward(const at::Tensor& mean, const at::Tensor& log_var,
                                       const std::optional<at::Tensor>& prior_mean,
                                       const std::optional<at::Tensor>& prior_log_var,
                                       const std::optional<at::Tensor>& row_weight,
                                       const std::optional<at::Tensor>& normalizer) {
  check_no_batch_tensors(options);
  return gaussian_kl(mean, log_var, prior_mean, prior_log_var,
                     GaussianKLOptions(options).row_weight(row_weight).normalizer(normalizer));
}

GaussianKLFullLossImpl::GaussianKLFullLossImpl(GaussianKLOptions options_) : options(std::move(options_)) {
  check_no_batch_tensors(options);
}
void GaussianKLFullLossImpl::reset() {}
void GaussianKLFullLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::GaussianKLFullLoss(reduction=" << to_string(options.reduction()) << ")";
}
at::Tensor GaussianKLFullLossImpl::forward(const at::Tensor& mean, const at::Tensor& scale_tril,
                                           const at::Tensor& prior_mean, const at::Tensor& prior_scale_tril,
                                           const std::optional<at::Tensor>& row_weight,
                                           const std::optional<at::Tensor>& normalizer) {
  check_no_batch_tensors(options);
  return gaussian_kl_full(mean, scale_tril, prior_mean, prior_scale_tril,
                          GaussianKLOptions(options).row_weight(row_weight).normalizer(normalizer));
}

}  // namespace torch_divergence
