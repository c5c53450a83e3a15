#include "core/reduction.h"

#include <ATen/ops/div.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "core/gradient_buffer.h"

namespace torch_divergence {

RowReduction::RowReduction(const char* name, const at::Tensor& input, at::ScalarType loss_dtype,
                           const std::optional<at::Tensor>& row_weight, std::string_view reduction,
                           const std::optional<at::Tensor>& normalizer)
    : row_count_(1) {
  const auto rows = input.sym_sizes().slice(0, input.dim() - 1);
  for (const auto& size : rows) row_count_ = row_count_ * size;

  if (reduction == "none") {
    kind_ = Kind::None;
  } else if (reduction == "sum") {
    kind_ = Kind::Sum;
  } else if (reduction == "mean") {
    kind_ = Kind::Mean;
  } else if (reduction == "batchmean") {
    TORCH_CHECK_VALUE(
        rows.size() <= 1 && !row_weight.has_value(), name, ": reduction is \"batchmean\" with ",
        row_weight.has_value() ? "row_weight" : "more than one leading dimension",
        ", where the batch is ambiguous; expected \"mean\" (over all rows), or \"mean\" with normalizer=input.size(0)");
    kind_ = Kind::Mean;
  } else {
    TORCH_CHECK_VALUE(false, name, ": reduction is \"", reduction,
                      R"(", expected "none", "sum", "mean" or "batchmean")");
  }

  if (row_weight.has_value()) {
    const auto& w = *row_weight;
    const auto type = w.scalar_type();
    TORCH_CHECK_VALUE(at::isFloatingType(type) || type == at::kBool, name, ": row_weight has dtype ", type,
                      ", expected a floating dtype or bool");
    TORCH_CHECK_VALUE(
        !w.requires_grad(), name,
        ": row_weight requires grad, expected a constant; weight the rows of reduction=\"none\" to differentiate it");
    TORCH_CHECK_VALUE(w.device() == input.device(), name, ": row_weight is on ", w.device(), ", expected ",
                      input.device(), ", where input is");
    const int64_t missing = static_cast<int64_t>(rows.size()) - w.dim();
    bool fits = missing >= 0;
    for (int64_t d = 0; fits && d < w.dim(); ++d)
      // A size that is known only when the compiled program runs is left to expand().
      fits = TORCH_GUARD_OR_FALSE(w.sym_size(d).sym_eq(1)) ||
             TORCH_GUARD_OR_TRUE(w.sym_size(d).sym_eq(rows[static_cast<size_t>(d + missing)]));
    TORCH_CHECK_VALUE(fits, name, ": row_weight has shape ", w.sym_sizes(), ", expected one that broadcasts to ", rows,
                      ", the shape of the rows");
    weight_ = w.to(loss_dtype).expand_symint(rows);
  }
  if (normalizer.has_value()) {
    TORCH_CHECK_VALUE(reduction == "mean", name, ": normalizer is given with reduction \"", reduction,
                      "\", expected \"mean\", whose denominator it replaces");
    TORCH_CHECK_VALUE(normalizer->dim() == 0, name, ": normalizer has shape ", normalizer->sym_sizes(),
                      ", expected a number or a 0-dim tensor");
    TORCH_CHECK_VALUE(!at::isComplexType(normalizer->scalar_type()) && normalizer->scalar_type() != at::kBool, name,
                      ": normalizer has dtype ", normalizer->scalar_type(), ", expected a real number");
    TORCH_CHECK_VALUE(
        !normalizer->requires_grad(), name,
        ": normalizer requires grad, expected a constant; divide the sum of reduction=\"none\" to differentiate it");
    TORCH_CHECK_VALUE(normalizer->device() == input.device() || normalizer->is_cpu(), name, ": normalizer is on ",
                      normalizer->device(), ", expected ", input.device(), " or the CPU");
    if (is_plain_eager(*normalizer)) {  // elsewhere there is no value to look at, or looking would synchronise
      const double value = normalizer->item().toDouble();
      TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), name, ": normalizer is ", value,
                        ", expected a positive finite number");
    }
    normalizer_ = *normalizer;
  }
}

double RowReduction::scale() const {
  if (kind_ != Kind::Mean) return 1;
  double denominator = 0;
  if (normalizer_.has_value()) {
    denominator = normalizer_->item().toDouble();
  } else if (weight_.has_value()) {
    denominator = at::sum(*weight_, at::kDouble).item<double>();
  } else {
    denominator = static_cast<double>(row_count_.expect_int());
  }
  return denominator == 0 ? 1 : 1 / denominator;  // nothing kept: the sum is 0, and so is the loss
}

at::Tensor RowReduction::operator()(const at::Tensor& rows) const {
  if (kind_ == Kind::None) return rows;
  if (kind_ == Kind::Sum) return rows.sum();
  if (normalizer_.has_value()) return at::div(rows.sum(), normalizer_->to(rows.options()));
  if (weight_.has_value()) {
    const auto total = weight_->sum();
    return at::div(rows.sum(), at::where(total.eq(0), 1, total));
  }
  // Not mean(): that of no rows is NaN.
  return TORCH_GUARD_OR_FALSE(row_count_.sym_eq(0)) ? rows.sum() : rows.mean();
}

at::Tensor checked_weight(const char* name, const std::optional<at::Tensor>& weight) {
  if (!weight.has_value()) return {};
  auto w = weight->to(at::kDouble).contiguous();
  if (!w.is_cpu()) return w;  // to look would be to wait for the device
  const double* const x = w.const_data_ptr<double>();
  const auto* const bad = std::find_if_not(x, x + w.numel(), [](double v) { return v >= 0 && std::isfinite(v); });
  TORCH_CHECK_VALUE(bad == x + w.numel(), name, ": row_weight holds ", *bad, " for row ", bad - x,
                    ", expected finite values that are not negative");
  return w;
}

}  // namespace torch_divergence
