#include <torch_divergence/modules/js_div.h>

#include "modules/checks.h"

#include <ostream>
#include <utility>

namespace torch_divergence {
JSDivLossImpl::JSDivLossImpl(JSDivOptions options_) : options(std::move(options_)) { check_no_batch_tensors(options); }

void JSDivLossImpl::reset() {}

void JSDivLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::JSDivLoss(beta=" << options.beta()
         << ", scaled=" << (options.scaled() ? "true" : "false") << ", space=" << to_string(options.space());
  if (options.target_space().has_value()) {
    stream << ", target_space=" << to_string(*options.target_space());
  }
  stream << ", temperature=" << options.temperature() << ", dim=" << options.dim()
         << ", reduction=" << to_string(options.reduction());
  if (options.inplace_grad()) {
    stream << ", inplace_grad=true";
  }
  stream << ")";
}

at::Tensor JSDivLossImpl::forward(const at::Tensor& input, const at::Tensor& target,
                                  const std::optional<at::Tensor>& row_weight,
                                  const std::optional<at::Tensor>& normalizer) {
  check_no_batch_tensors(options);
  return js_div(input, target, JSDivOptions(options).row_weight(row_weight).normalizer(normalizer));
}

}  // namespace torch_divergence
