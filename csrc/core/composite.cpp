#include "core/composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>

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

namespace {
// x^2 sum_k c(k) x^k: each branch sees only its own arguments, or the other's infinities would come back as 0 inf.
template <class Coefficient, class Plain>
at::Tensor with_series(const at::Tensor& x, double below, int terms, const Coefficient& c, const Plain& plain) {
  const auto small = x.abs() < below;
  const auto t = at::where(small, x, 0), far = at::where(small, 1, x);
  auto y = t * c(terms) + c(terms - 1);
  for (int k = terms - 2; k >= 0; --k) y = y * t + c(k);
  return at::where(small, t * t * y, plain(far));
}
}  // namespace

at::Tensor expm1_minus(const at::Tensor& x) {
  return with_series(
      x, 0.5, 14, [](int k) { return 1 / std::tgamma(k + 3); },
      [](const at::Tensor& t) {
        const auto e = t.expm1();
        return at::where(e == std::numeric_limits<double>::infinity(), e, e - t);
      });
}

at::Tensor minus_log1p(const at::Tensor& x) {
  // 0.25^26 is below the last bit of a double.
  return with_series(
      x, 0.25, 26, [](int k) { return (k % 2 != 0 ? -1.0 : 1.0) / (k + 2); },
      [](const at::Tensor& t) { return t - t.log1p(); });
}

}  // namespace torch_divergence
