#include "core/composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>

#include "core/gradient_buffer.h"

namespace torch_divergence {

at::Tensor checked_real(const char* name, const char* argument, const at::Tensor& t) {
  const auto type = t.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, name, ": ",
                    argument, " has dtype ", type, ", expected float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, ": ", argument, " has layout ", t.layout(),
                    ", expected a dense tensor");
  return type == at::kHalf || type == at::kBFloat16 ? t.to(at::kFloat) : t;
}

at::Tensor checked_like(const char* name, const char* argument, const at::Tensor& t, const char* first_argument,
                        const at::Tensor& first, bool same_shape) {
  auto real = checked_real(name, argument, t);
  TORCH_CHECK_VALUE(t.device() == first.device(), name, ": ", argument, " is on ", t.device(), ", expected ",
                    first.device(), ", where ", first_argument, " is");
  TORCH_CHECK_VALUE((t.scalar_type() == at::kDouble) == (first.scalar_type() == at::kDouble), name, ": ", argument,
                    " has dtype ", t.scalar_type(), " and ", first_argument, " ", first.scalar_type(),
                    ", expected float64 for both or for neither");
  TORCH_CHECK_VALUE(!same_shape || (t.dim() == first.dim() && t.sym_sizes() == first.sym_sizes()), name, ": ", argument,
                    " has shape ", t.sym_sizes(), ", expected ", first.sym_sizes(), ", the shape of ", first_argument);
  return real;
}

void check_not_empty(const char* name, const char* argument, const at::Tensor& t) {
  TORCH_CHECK_VALUE(!TORCH_GUARD_OR_FALSE(t.sym_numel().sym_eq(0)), name, ": ", argument, " has shape ", t.sym_sizes(),
                    ", expected at least one element to take the mean of");
}

EntryReduction::EntryReduction(const char* name, const at::Tensor& entries, const std::optional<at::Tensor>& row_weight,
                               std::string_view reduction, const std::optional<at::Tensor>& normalizer)
    : reduction_(name, entries.unsqueeze(-1), entries.scalar_type(), row_weight, reduction, normalizer) {
  if (row_weight.has_value() && is_plain_eager(*row_weight)) checked_weight(name, reduction_.weight());
}

at::Tensor EntryReduction::kept(const at::Tensor& t) const {
  const auto& weight = reduction_.weight();
  return weight.has_value() ? at::where(*weight == 0, 0, t) : t;
}

at::Tensor EntryReduction::operator()(const at::Tensor& losses) const {
  const auto& weight = reduction_.weight();
  return reduction_(weight.has_value() ? at::where(*weight == 0, 0, losses * *weight) : losses);
}

at::Tensor softplus(const at::Tensor& x) { return -at::log_sigmoid(-x); }

}  // namespace torch_divergence
