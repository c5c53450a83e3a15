// What the modules do with their options.
#pragma once
#include <c10/util/Exception.h>
#include <torch_divergence/functional/common.h>

namespace torch_divergence {

// Tensors that belong to a batch are arguments of forward.
inline void check_not_of_batch(const char* name, bool given) {
  TORCH_CHECK_VALUE(!given, name,
                    ": was set in the options of a module, where it would be used for every batch; pass it to forward");
}

template <class Options>
void check_no_batch_tensors(const Options& options) {
  check_not_of_batch("row_weight", options.row_weight().has_value());
  check_not_of_batch("normalizer", options.normalizer().has_value());
}

// For modules whose functions reduce nothing unless told to.
template <class Options>
Options with_mean(Options options) {
  if (!options.reduction().has_value()) options.reduction(Reduction::Mean);
  return options;
}

}  // namespace torch_divergence
