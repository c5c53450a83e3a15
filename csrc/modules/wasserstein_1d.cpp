#include <torch_divergence/modules/wasserstein_1d.h>

#include <ostream>
#include <utility>

namespace torch_divergence {

Wasserstein1dLossImpl::Wasserstein1dLossImpl(Wasserstein1dOptions options_) : options(std::move(options_)) {}

void Wasserstein1dLossImpl::reset() {}

void Wasserstein1dLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::Wasserstein1dLoss(p=" << options.p() << ", dim=" << options.dim()
         << ", reduction=" << to_string(options.reduction()) << ")";
}

at::Tensor Wasserstein1dLossImpl::forward(const at::Tensor& u, const at::Tensor& v, const std::optional<at::Tensor>& a,
                                          const std::optional<at::Tensor>& b) {
  return wasserstein_1d(u, v, a, b, options);
}

}  // namespace torch_divergence
