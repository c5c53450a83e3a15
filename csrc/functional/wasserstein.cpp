#include <torch_divergence/functional/wasserstein.h>

#include "core/op.h"

namespace torch_divergence {

at::Tensor wasserstein(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                       const std::optional<at::Tensor>& b, const WassersteinOptions& options) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                               const std::optional<at::Tensor>&, double);
  static const auto op = typed_op<Signature>("torch_divergence::wasserstein");
  return op.call(x, y, a, b, options.p());
}

at::Tensor wasserstein(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                       const std::optional<at::Tensor>& b) {
  return wasserstein(x, y, a, b, WassersteinOptions());
}

}  // namespace torch_divergence
