// What every module refuses in its options.
#pragma once
#include <c10/util/Exception.h>

namespace torch_divergence {

// Tensors that belong to a batch are arguments of forward.
template <class Options>
void check_no_batch_tensors(const Options& options) {
  const auto refuse = [](bool given, const char* name) {
    TORCH_CHECK_VALUE(!given, name,
                      ": was set in the options of a module, where it would be used for every batch; pass it to "
                      "forward(..., row_weight, normalizer)");
  };
  refuse(options.row_weight().has_value(), "row_weight");
  refuse(options.normalizer().has_value(), "normalizer");
}

}  // namespace torch_divergence
