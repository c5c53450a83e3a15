#include <torch_divergence/functional/sinkhorn.h>

#include "core/op.h"

#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>

#include <string_view>
#include <tuple>

namespace torch_divergence {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

OptionalTensor if_defined(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

SinkhornInfo init_of(const SinkhornOptions& options) { return options.init().value_or(SinkhornInfo{}); }

std::pair<Tensor, SinkhornInfo> divergence(const Tensor& x, const Tensor& y, const OptionalTensor& a,
                                           const OptionalTensor& b, const SinkhornOptions& o,
                                           const OptionalTensor& x_offsets, const OptionalTensor& y_offsets) {
  using Signature = Tensors8(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                             std::string_view, const OptionalTensor&, std::optional<double>, at::ArrayRef<double>,
                             at::ArrayRef<double>, bool, double, int64_t, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::string_view);
  static const auto op = typed_op<Signature>("torch_divergence::sinkhorn_divergence");
  const auto init = init_of(o);
  auto [value, f, g, f_aa, g_bb, error, n_iter, converged] =
      op.call(x, y, a, b, to_string(o.cost()), o.eps(), o.blur(), o.rho(), o.reach(), o.debias(), o.tol(), o.max_iter(),
              if_defined(init.g), if_defined(init.f_aa), if_defined(init.g_bb), x_offsets, y_offsets,
              to_string(o.reduction().value_or(Reduction::None)));
  if (!o.debias()) f_aa = g_bb = Tensor();
  return {value, {f, g, f_aa, g_bb, error, n_iter, converged}};
}

Tensor call_solved(const char* name, const SinkhornResult& r) {
  using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                           const Tensor&, std::string_view, const OptionalTensor&, std::optional<double>);
  return typed_op<Signature>(name).call(r.x, r.y, r.a, r.b, r.f, r.g, to_string(r.options.cost()), r.options.eps(),
                                        r.options.blur());
}

}  // namespace

const char* to_string(Cost cost) {
  switch (cost) {
    case Cost::HalfSqEuclidean:
      return "half_sqeuclidean";
    case Cost::SqEuclidean:
      return "sqeuclidean";
    case Cost::Euclidean:
      return "euclidean";
    case Cost::Cosine:
      return "cosine";
  }
  TORCH_CHECK_VALUE(false, "cost: no such value, ", static_cast<int>(cost));
}

SinkhornOptions& SinkhornOptions::eps(double value) {
  return eps(std::make_optional(at::scalar_tensor(value, at::kDouble)));
}

Tensor SinkhornResult::plan() const { return call_solved("torch_divergence::sinkhorn_plan", *this); }

Tensor SinkhornResult::apply(const Tensor& v, bool transpose) const {
  using Signature =
      Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
             const Tensor&, std::string_view, const OptionalTensor&, std::optional<double>, bool);
  static const auto op = typed_op<Signature>("torch_divergence::sinkhorn_apply");
  return op.call(v, x, y, a, b, f, g, to_string(options.cost()), options.eps(), options.blur(), transpose);
}

Tensor SinkhornResult::barycentric_projection() const {
  return call_solved("torch_divergence::sinkhorn_barycentric_projection", *this);
}

Tensor SinkhornResult::transport_cost() const {
  return call_solved("torch_divergence::sinkhorn_transport_cost", *this);
}

Tensor sinkhorn_divergence(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                           const SinkhornOptions& options) {
  return divergence(x, y, a, b, options, std::nullopt, std::nullopt).first;
}

Tensor sinkhorn_divergence(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b) {
  return sinkhorn_divergence(x, y, a, b, SinkhornOptions());
}

std::pair<Tensor, SinkhornInfo> sinkhorn_divergence_with_info(const Tensor& x, const Tensor& y, const OptionalTensor& a,
                                                              const OptionalTensor& b, const SinkhornOptions& options) {
  return divergence(x, y, a, b, options, std::nullopt, std::nullopt);
}

Tensor sinkhorn_ragged(const Tensor& x, const Tensor& x_offsets, const Tensor& y, const Tensor& y_offsets,
                       const OptionalTensor& a, const OptionalTensor& b, const SinkhornOptions& options) {
  return divergence(x, y, a, b, options, x_offsets, y_offsets).first;
}

std::pair<Tensor, SinkhornInfo> sinkhorn_ragged_with_info(const Tensor& x, const Tensor& x_offsets, const Tensor& y,
                                                          const Tensor& y_offsets, const OptionalTensor& a,
                                                          const OptionalTensor& b, const SinkhornOptions& options) {
  return divergence(x, y, a, b, options, x_offsets, y_offsets);
}

SinkhornResult sinkhorn(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                        const SinkhornOptions& o) {
  using Signature = Tensors6(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                             std::string_view, const OptionalTensor&, std::optional<double>, at::ArrayRef<double>,
                             at::ArrayRef<double>, double, int64_t, const OptionalTensor&);
  static const auto op = typed_op<Signature>("torch_divergence::sinkhorn");
  auto [value, f, g, error, n_iter, converged] = op.call(x, y, a, b, to_string(o.cost()), o.eps(), o.blur(), o.rho(),
                                                         o.reach(), o.tol(), o.max_iter(), if_defined(init_of(o).g));
  return {value, f, g, error, n_iter, converged, x, y, a, b, o};
}

std::pair<Tensor, SinkhornInfo> sinkhorn_cost_with_info(const Tensor& C, const OptionalTensor& a,
                                                        const OptionalTensor& b, const SinkhornOptions& o) {
  using Signature = Tensors6(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                             at::ArrayRef<double>, double, int64_t, const OptionalTensor&, std::string_view);
  static const auto op = typed_op<Signature>("torch_divergence::sinkhorn_cost");
  const auto refuse = [](bool given, const char* name) {
    TORCH_CHECK_VALUE(!given, "sinkhorn_cost: ", name, " is set, expected its default: C, eps and rho say it all");
  };
  refuse(o.cost() != Cost::HalfSqEuclidean, "cost");
  refuse(o.blur().has_value(), "blur");
  refuse(!o.reach().empty(), "reach");
  refuse(!o.debias(), "debias");
  TORCH_CHECK_VALUE(o.eps().has_value(), "sinkhorn_cost: eps is missing, expected a positive number or tensor");
  auto [value, f, g, error, n_iter, converged] =
      op.call(C, a, b, *o.eps(), o.rho(), o.tol(), o.max_iter(), if_defined(init_of(o).g),
              to_string(o.reduction().value_or(Reduction::None)));
  return {value, {f, g, Tensor(), Tensor(), error, n_iter, converged}};
}

Tensor sinkhorn_cost(const Tensor& C, const OptionalTensor& a, const OptionalTensor& b,
                     const SinkhornOptions& options) {
  return sinkhorn_cost_with_info(C, a, b, options).first;
}

}  // namespace torch_divergence
