#include <torch_divergence/modules/vae.h>

#include <ostream>
#include <utility>

namespace torch_divergence {

VAELossImpl::VAELossImpl(VAEOptions options_) : options(std::move(options_)) {}
void VAELossImpl::reset() {}
void VAELossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::VAELoss(beta=" << options.beta() << ", likelihood=" << to_string(options.likelihood())
         << ", scale=" << options.scale() << ", free_bits=" << options.free_bits()
         << ", reduction=" << to_string(options.reduction()) << ")";
}
at::Tensor VAELossImpl::forward(const at::Tensor& reconstruction, const at::Tensor& data, const at::Tensor& mean,
                                const at::Tensor& log_var) {
  return vae_loss(reconstruction, data, mean, log_var, options);
}

}  // namespace torch_divergence
