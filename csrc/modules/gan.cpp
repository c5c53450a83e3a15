#include <torch_divergence/modules/gan.h>

#include <ostream>

namespace torch_divergence {

GANLossImpl::GANLossImpl(GANLossKind kind_) : kind(kind_) {}
void GANLossImpl::reset() {}
void GANLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::GANLoss(kind=" << to_string(kind) << ")";
}
at::Tensor GANLossImpl::discriminator(const at::Tensor& real, const at::Tensor& fake) const {
  return gan_discriminator_loss(real, fake);
}
at::Tensor GANLossImpl::generator(const at::Tensor& fake) const { return gan_generator_loss(fake, kind); }

}  // namespace torch_divergence
