#include <torch_divergence/modules/entropy.h>

#include "modules/checks.h"

#include <ostream>
#include <utility>

namespace torch_divergence {

EntropyLossImpl::EntropyLossImpl(EntropyOptions options_) : options(std::move(options_)) {
  check_no_batch_tensors(options);
}

void EntropyLossImpl::reset() {}

void EntropyLossImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_divergence::EntropyLoss(space=" << to_string(options.space())
         << ", temperature=" << options.temperature() << ", dim=" << options.dim()
         << ", reduction=" << to_string(options.reduction()) << ")";
}

at::Tensor EntropyLossImpl::forward(const at::Tensor& input, const std::optional<at::Tensor>& row_weight,
                                    const std::optional<at::Tensor>& normalizer) {
  check_no_batch_tensors(options);
  return entropy(input, EntropyOptions(options).row_weight(row_weight).normalizer(normalizer));
}

}  // namespace torch_divergence
