#include "core/row_divergence.h"

namespace torch_divergence {

CheckedPair checked_pair(const char* name, const Tensor& input, const Tensor& target, std::string_view space,
                         std::optional<std::string_view> target_space, double temperature, int64_t dim,
                         const OptionalTensor& row_weight, std::string_view reduction,
                         const OptionalTensor& normalizer) {
  check_distributions(name, input, target);
  const int64_t class_dim = check_dim(name, input, dim);
  const auto of_input = check_space(name, "space", space);
  const auto of_target = target_space.has_value() ? check_space(name, "target_space", *target_space) : of_input;
  check_temperature(name, temperature, of_input == kLogits || of_target == kLogits);
  const bool last = class_dim == input.dim() - 1;
  const auto x = last ? input : input.movedim(class_dim, -1), y = last ? target : target.movedim(class_dim, -1);
  RowReduction reduce(name, x, loss_dtype(x, y), row_weight, reduction, normalizer);
  return {x, y, of_input, of_target, std::move(reduce)};
}

}  // namespace torch_divergence
