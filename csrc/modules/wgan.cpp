#include <torch_divergence/modules/wgan.h>

#include <ostream>

namespace torch_divergence {

void WassersteinGANLossImpl::reset() {}
void WassersteinGANLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::WassersteinGANLoss()";
}
at::Tensor WassersteinGANLossImpl::critic(const at::Tensor& real, const at::Tensor& fake) const {
  return wgan_critic_loss(real, fake);
}
at::Tensor WassersteinGANLossImpl::generator(const at::Tensor& fake) const { return wgan_generator_loss(fake); }

}  // namespace torch_divergence
