#include <torch_divergence/functional/sliced_wasserstein.h>

#include "core/op.h"

#include <string_view>

namespace torch_divergence {

at::Tensor sliced_wasserstein(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                              const std::optional<at::Tensor>& b, const SlicedWassersteinOptions& options) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                               const std::optional<at::Tensor>&, double, std::int64_t, const std::optional<at::Tensor>&,
                               std::optional<at::Generator>, std::string_view);
  static const auto op = typed_op<Signature>("torch_divergence::sliced_wasserstein");
  return op.call(x, y, a, b, options.p(), options.n_projections(), options.projections(), options.generator(),
                 to_string(options.reduction().value_or(Reduction::None)));
}

at::Tensor sliced_wasserstein(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                              const std::optional<at::Tensor>& b) {
  return sliced_wasserstein(x, y, a, b, SlicedWassersteinOptions());
}

}  // namespace torch_divergence
