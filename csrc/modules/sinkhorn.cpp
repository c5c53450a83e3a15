#include <torch_divergence/modules/sinkhorn.h>

#include "modules/checks.h"

#include <ostream>
#include <utility>

namespace torch_divergence {
namespace {

void check_no_init(const SinkhornOptions& options) { check_not_of_batch("init", options.init().has_value()); }

void print(std::ostream& stream, const char* name, const SinkhornOptions& o) {
  stream << "torch_divergence::" << name << "(cost=" << to_string(o.cost());
  if (o.eps().has_value()) {
    const auto eps = o.eps()->detach().to(at::kCPU, at::kDouble).contiguous();
    const at::ArrayRef<double> values(eps.const_data_ptr<double>(), static_cast<size_t>(eps.numel()));
    stream << ", eps=";
    if (eps.dim() == 0) {
      stream << values[0];
    } else {
      stream << values;
    }
  }
  if (o.blur().has_value()) {
    stream << ", blur=" << *o.blur();
  }
  const auto list = [&](const char* key, const std::vector<double>& values) {
    if (!values.empty()) {
      stream << ", " << key << "=" << at::ArrayRef<double>(values);
    }
  };
  list("rho", o.rho());
  list("reach", o.reach());
  stream << ", debias=" << (o.debias() ? "true" : "false") << ", tol=" << o.tol() << ", max_iter=" << o.max_iter()
         << ", reduction=" << to_string(o.reduction().value_or(Reduction::None)) << ")";
}

}  // namespace

SinkhornLossImpl::SinkhornLossImpl(SinkhornOptions options_) : options(with_mean(std::move(options_))) {
  check_no_init(options);
}

void SinkhornLossImpl::reset() {}

void SinkhornLossImpl::pretty_print(std::ostream& stream) const { print(stream, "SinkhornLoss", options); }

at::Tensor SinkhornLossImpl::forward(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a,
                                     const std::optional<at::Tensor>& b, const std::optional<SinkhornInfo>& init) {
  check_no_init(options);
  return sinkhorn_divergence(x, y, a, b, SinkhornOptions(options).init(init));
}

SinkhornCostLossImpl::SinkhornCostLossImpl(SinkhornOptions options_) : options(std::move(options_)) {
  check_no_init(options);
}

void SinkhornCostLossImpl::reset() {}

void SinkhornCostLossImpl::pretty_print(std::ostream& stream) const { print(stream, "SinkhornCostLoss", options); }

at::Tensor SinkhornCostLossImpl::forward(const at::Tensor& C, const std::optional<at::Tensor>& a,
                                         const std::optional<at::Tensor>& b, const std::optional<SinkhornInfo>& init) {
  check_no_init(options);
  return sinkhorn_cost(C, a, b, SinkhornOptions(options).init(init));
}

}  // namespace torch_divergence
