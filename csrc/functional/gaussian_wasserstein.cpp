#include <torch_divergence/functional/gaussian_wasserstein.h>

#include "core/op.h"

namespace torch_divergence {

at::Tensor gaussian_wasserstein(const at::Tensor& mean1, const at::Tensor& cov1, const at::Tensor& mean2,
                                const at::Tensor& cov2) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&);
  static const auto op = typed_op<Signature>("torch_divergence::gaussian_wasserstein");
  return op.call(mean1, cov1, mean2, cov2);
}

}  // namespace torch_divergence
