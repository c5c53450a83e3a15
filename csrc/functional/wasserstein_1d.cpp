#include <torch_divergence/functional/wasserstein_1d.h>

#include "core/op.h"

#include <string_view>

namespace torch_divergence {

at::Tensor wasserstein_1d(const at::Tensor& u, const at::Tensor& v, const std::optional<at::Tensor>& a,
                          const std::optional<at::Tensor>& b, const Wasserstein1dOptions& options) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                               const std::optional<at::Tensor>&, double, std::int64_t, std::string_view);
  static const auto op = typed_op<Signature>("torch_divergence::wasserstein_1d");
  return op.call(u, v, a, b, options.p(), options.dim(), to_string(options.reduction()));
}

at::Tensor wasserstein_1d(const at::Tensor& u, const at::Tensor& v, const std::optional<at::Tensor>& a,
                          const std::optional<at::Tensor>& b) {
  return wasserstein_1d(u, v, a, b, Wasserstein1dOptions());
}

}  // namespace torch_divergence
