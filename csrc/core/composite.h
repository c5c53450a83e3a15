// For losses that are compositions of differentiable operators: their argument checks, and the weighting of rows.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "core/reduction.h"

namespace torch_divergence {

// Raises ValueError unless t is a dense float32, float64, bfloat16 or float16 tensor. Returns it, half types widened to
// float32, in which all losses are computed.
at::Tensor checked_real(const char* name, const char* argument, const at::Tensor& t);
// The same for a tensor that goes with `first`, its dtype and device; of its shape too, if asked for.
at::Tensor checked_like(const char* name, const char* argument, const at::Tensor& t, const char* first_argument,
                        const at::Tensor& first, bool same_shape);
// Raises ValueError for a tensor without elements, whose mean is not defined.
void check_not_empty(const char* name, const char* argument, const at::Tensor& t);

// One loss for each entry of a tensor, with the row_weight, reduction and normalizer of every loss.
class EntryReduction {
 public:
  EntryReduction(const char* name, const at::Tensor& entries, const std::optional<at::Tensor>& row_weight,
                 std::string_view reduction, const std::optional<at::Tensor>& normalizer);

  // t where its entry has a weight, else 0: whatever an entry of weight 0 holds must not reach a derivative either.
  at::Tensor kept(const at::Tensor& t) const;
  at::Tensor operator()(const at::Tensor& losses) const;

 private:
  RowReduction reduction_;
};

// log(1 + e^x), good to the last digits for every x, twice differentiable.
at::Tensor softplus(const at::Tensor& x);

// e^x - 1 - x and x - log(1 + x): both >= 0, x^2/2 near 0, where they and their derivatives keep their digits.
at::Tensor expm1_minus(const at::Tensor& x);
at::Tensor minus_log1p(const at::Tensor& x);

}  // namespace torch_divergence
