#include <torch_divergence/modules/sliced_wasserstein.h>

#include <c10/util/Exception.h>

#include <ostream>
#include <utility>

namespace torch_divergence {

SlicedWassersteinLossImpl::SlicedWassersteinLossImpl(SlicedWassersteinOptions options_) : options(std::move(options_)) {
  TORCH_CHECK_VALUE(!options.projections().has_value(),
                    "projections: was set in the options of a module, expected as an argument of forward");
}

void SlicedWassersteinLossImpl::reset() {}

void SlicedWassersteinLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::SlicedWassersteinLoss(p=" << options.p() << ", n_projections=" << options.n_projections()
         << ", reduction=" << to_string(options.reduction()) << ")";
}

at::Tensor SlicedWassersteinLossImpl::forward(const at::Tensor& x, const at::Tensor& y,
                                              const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& b,
                                              const std::optional<at::Tensor>& projections) {
  return sliced_wasserstein(x, y, a, b, SlicedWassersteinOptions(options).projections(projections));
}

}  // namespace torch_divergence
