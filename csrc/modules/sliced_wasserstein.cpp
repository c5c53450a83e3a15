#include <torch_divergence/modules/sliced_wasserstein.h>

#include "modules/checks.h"

#include <ostream>
#include <utility>

namespace torch_divergence {

namespace {

void check_no_projections(const SlicedWassersteinOptions& options) {
  check_not_of_batch("projections", options.projections().has_value());
}

}  // namespace

SlicedWassersteinLossImpl::SlicedWassersteinLossImpl(SlicedWassersteinOptions options_)
    : options(with_mean(std::move(options_))) {
  check_no_projections(options);
}

void SlicedWassersteinLossImpl::reset() {}

void SlicedWassersteinLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::SlicedWassersteinLoss(p=" << options.p() << ", n_projections=" << options.n_projections()
         << ", reduction=" << to_string(options.reduction().value_or(Reduction::None)) << ")";
}

at::Tensor SlicedWassersteinLossImpl::forward(const at::Tensor& x, const at::Tensor& y,
                                              const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& b,
                                              const std::optional<at::Tensor>& projections) {
  check_no_projections(options);
  return sliced_wasserstein(x, y, a, b, SlicedWassersteinOptions(options).projections(projections));
}

}  // namespace torch_divergence
