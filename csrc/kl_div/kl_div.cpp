// KL divergence: operators, checks, autograd. The formulas are in kl_div.h, the kernels in kl_div_cpu.cpp.
//
//   kl_div                      checks, P and Q from input, target and direction, reduction
//   _kl_div                     rows of loss and their statistics              (differentiable: KlDiv)
//   _kl_div_backward            gradients of either side, or both              (differentiable: KlDivGradient)
//   _kl_div_double_backward     along (v_p, v_q); differentiated as a composite of ATen operators
//   _kl_div_value_and_grad      loss and one side's gradient in one visit to memory, where nothing else can be asked
//   for kl_div_inplace_grad         the same, over the input's own storage
#include "kl_div/kl_div.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <utility>

#include "core/apply.h"
#include "core/checks.h"
#include "core/gradient_buffer.h"
#include "core/inplace_gradient.h"
#include "core/large_tensor.h"
#include "core/op.h"
#include "core/reduction.h"
#include "core/row_layout.h"

namespace torch_divergence {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;

// -- The private operators, called through the dispatcher -----------------------------------------------------------

Tensors2 kl_div_rows(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, int64_t p_space,
                     int64_t q_space, double temperature) {
  using Signature = Tensors2(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, double);
  static const auto op = typed_op<Signature>("torch_divergence::_kl_div");
  return op.call(p, q, row_weight, p_space, q_space, temperature);
}

Tensors2 kl_div_backward(const Tensor& grad, const Tensor& p, const Tensor& q, const Tensor& stat, int64_t p_space,
                         int64_t q_space, double temperature, std::array<bool, 2> mask) {
  using Signature = Tensors2(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, double,
                             std::array<bool, 2>);
  static const auto op = typed_op<Signature>("torch_divergence::_kl_div_backward");
  return op.call(grad, p, q, stat, p_space, q_space, temperature, mask);
}

Tensors3 kl_div_double_backward(const OptionalTensor& v_p, const OptionalTensor& v_q, const Tensor& grad,
                                const Tensor& p, const Tensor& q, const Tensor& stat, int64_t p_space, int64_t q_space,
                                double temperature, std::array<bool, 3> mask) {
  using Signature = Tensors3(const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                             const Tensor&, int64_t, int64_t, double, std::array<bool, 3>);
  static const auto op = typed_op<Signature>("torch_divergence::_kl_div_double_backward");
  return op.call(v_p, v_q, grad, p, q, stat, p_space, q_space, temperature, mask);
}

Tensors3 kl_div_value_and_grad(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, int64_t p_space,
                               int64_t q_space, double temperature, double scale, bool wrt_q) {
  using Signature =
      Tensors3(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, double, double, bool);
  static const auto op = typed_op<Signature>("torch_divergence::_kl_div_value_and_grad");
  return op.call(p, q, row_weight, p_space, q_space, temperature, scale, wrt_q);
}

// -- CPU ------------------------------------------------------------------------------------------------------------

KlDivRows rows_of(const Tensor& p, const Tensor& q, int64_t p_space, int64_t q_space, double temperature) {
  return {rows_in(p), rows_in(q), static_cast<int>(p_space), static_cast<int>(q_space), p.size(-1), temperature};
}

Tensor empty_rows(const Tensor& p, at::ScalarType dtype) {
  return at::empty(p.sizes().slice(0, p.dim() - 1), p.options().dtype(dtype));
}

Tensor empty_stat(const Tensor& p) {
  at::DimVector sizes(p.sizes());
  sizes.back() = KlDivStat::kSize;
  return at::empty(sizes, p.options().dtype(at::kDouble));
}

Tensor contiguous_double(const Tensor& t) { return t.to(at::kDouble).contiguous(); }

Tensors2 kl_div_rows_cpu(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, int64_t p_space,
                         int64_t q_space, double temperature) {
  const auto weight = checked_weight("kl_div", row_weight);
  auto loss = empty_rows(p, loss_dtype(p, q));
  auto stat = empty_stat(p);
  const KlDivForward call{rows_of(p, q, p_space, q_space, temperature),
                          weight.defined() ? weight.const_data_ptr<double>() : nullptr, loss.mutable_data_ptr(),
                          loss.scalar_type() == at::kDouble, stat.mutable_data_ptr<double>()};
  const auto kernel = TD_CPU_KERNEL(kl_div_forward);
  parallel_rows(loss.numel(), p.size(-1),
                [&](int64_t begin, int64_t end, ForEach columns) { kernel(call, begin, end, columns); });
  return {std::move(loss), std::move(stat)};
}

Tensors2 kl_div_backward_cpu(const Tensor& grad, const Tensor& p, const Tensor& q, const Tensor& stat, int64_t p_space,
                             int64_t q_space, double temperature, std::array<bool, 2> mask) {
  const auto coefficient = contiguous_double(grad), statistics = stat.contiguous();
  auto grad_p = mask[0] ? empty_like_large(p) : at::empty({0}, p.options());
  auto grad_q = mask[1] ? empty_like_large(q) : at::empty({0}, q.options());
  const KlDivBackward call{rows_of(p, q, p_space, q_space, temperature), coefficient.const_data_ptr<double>(),
                           statistics.const_data_ptr<double>(), mask[0] ? rows_out(grad_p) : RowsOut{},
                           mask[1] ? rows_out(grad_q) : RowsOut{}};
  const auto kernel = TD_CPU_KERNEL(kl_div_backward);
  if (mask[0] || mask[1])
    parallel_rows(coefficient.numel(), p.size(-1),
                  [&](int64_t begin, int64_t end, ForEach columns) { kernel(call, begin, end, columns); });
  return {std::move(grad_p), std::move(grad_q)};
}

Tensors3 kl_div_double_backward_cpu(const OptionalTensor& v_p, const OptionalTensor& v_q, const Tensor& grad,
                                    const Tensor& p, const Tensor& q, const Tensor& stat, int64_t p_space,
                                    int64_t q_space, double temperature, std::array<bool, 3> mask) {
  const auto coefficient = contiguous_double(grad), statistics = stat.contiguous();
  auto d_coefficient = at::empty(mask[0] ? grad.sizes() : at::IntArrayRef{0}, grad.options().dtype(at::kDouble));
  auto d_p = mask[1] ? empty_like_large(p) : at::empty({0}, p.options());
  auto d_q = mask[2] ? empty_like_large(q) : at::empty({0}, q.options());
  const KlDivDoubleBackward call{
      rows_of(p, q, p_space, q_space, temperature), v_p.has_value() ? rows_in(*v_p) : RowsIn{},
      v_q.has_value() ? rows_in(*v_q) : RowsIn{},   coefficient.const_data_ptr<double>(),
      statistics.const_data_ptr<double>(),          mask[0] ? d_coefficient.mutable_data_ptr<double>() : nullptr,
      mask[1] ? rows_out(d_p) : RowsOut{},          mask[2] ? rows_out(d_q) : RowsOut{}};
  const auto kernel = TD_CPU_KERNEL(kl_div_double_backward);
  parallel_rows(coefficient.numel(), p.size(-1),
                [&](int64_t begin, int64_t end, ForEach columns) { kernel(call, begin, end, columns); });
  return {d_coefficient.to(grad.scalar_type()), std::move(d_p), std::move(d_q)};
}

// loss and stat of one visit that leaves the gradient in `gradient`, which may be the storage of its own side.
Tensors2 value_and_grad_into(const Tensor& gradient, const Tensor& p, const Tensor& q, const OptionalTensor& row_weight,
                             int64_t p_space, int64_t q_space, double temperature, double scale, bool wrt_q) {
  const auto weight = checked_weight("kl_div", row_weight);
  auto stat = empty_stat(p);
  const int64_t rows = row_count(p);
  const double* const w = weight.defined() ? weight.const_data_ptr<double>() : nullptr;
  double* const s = stat.mutable_data_ptr<double>();
  const KlDivValueAndGrad call{rows_of(p, q, p_space, q_space, temperature), w, scale, s, wrt_q, rows_out(gradient)};
  const auto kernel = TD_CPU_KERNEL(kl_div_value_and_grad);
  parallel_rows(rows, p.size(-1),
                [&](int64_t begin, int64_t end, ForEach columns) { kernel(call, begin, end, columns); });
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i)
    if (w == nullptr || w[i] != 0) sum += (w != nullptr ? w[i] : 1) * s[KlDivStat::kSize * i + KlDivStat::kKl];
  auto loss = at::empty({}, p.options().dtype(loss_dtype(p, q)));
  loss.fill_(scale * sum);
  return {std::move(loss), std::move(stat)};
}

Tensors3 kl_div_value_and_grad_cpu(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, int64_t p_space,
                                   int64_t q_space, double temperature, double scale, bool wrt_q) {
  auto gradient = empty_like_large(wrt_q ? q : p);
  auto [loss, stat] = value_and_grad_into(gradient, p, q, row_weight, p_space, q_space, temperature, scale, wrt_q);
  return {std::move(loss), std::move(stat), std::move(gradient)};
}

// -- Meta -----------------------------------------------------------------------------------------------------------

Tensors2 kl_div_rows_meta(const Tensor& p, const Tensor& q, const OptionalTensor& /*row_weight*/, int64_t, int64_t,
                          double) {
  c10::SymDimVector stat(p.sym_sizes().begin(), p.sym_sizes().end());
  stat.back() = KlDivStat::kSize;
  return {at::empty_symint(p.sym_sizes().slice(0, p.dim() - 1), p.options().dtype(loss_dtype(p, q))),
          at::empty_symint(stat, p.options().dtype(at::kDouble))};
}

Tensor like_or_nothing(const Tensor& t, bool wanted) {
  return wanted ? at::empty_like(t) : at::empty({0}, t.options());
}

Tensors2 kl_div_backward_meta(const Tensor&, const Tensor& p, const Tensor& q, const Tensor&, int64_t, int64_t, double,
                              std::array<bool, 2> mask) {
  return {like_or_nothing(p, mask[0]), like_or_nothing(q, mask[1])};
}

Tensors3 kl_div_double_backward_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& grad, const Tensor& p,
                                     const Tensor& q, const Tensor&, int64_t, int64_t, double,
                                     std::array<bool, 3> mask) {
  return {mask[0] ? at::empty_symint(grad.sym_sizes(), grad.options()) : at::empty({0}, grad.options()),
          like_or_nothing(p, mask[1]), like_or_nothing(q, mask[2])};
}

Tensors3 kl_div_value_and_grad_meta(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, int64_t p_space,
                                    int64_t q_space, double temperature, double, bool wrt_q) {
  auto [loss, stat] = kl_div_rows_meta(p, q, row_weight, p_space, q_space, temperature);
  return {at::empty({}, loss.options()), std::move(stat), at::empty_like(wrt_q ? q : p)};
}

// -- Autograd -------------------------------------------------------------------------------------------------------

Tensor undefined_unless(bool wanted, Tensor t) { return wanted ? std::move(t) : Tensor(); }
OptionalTensor if_defined(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor product_sum(const Tensor& g, const Tensor& tangent, at::ScalarType dtype) {
  return (g.to(dtype) * tangent.to(dtype)).sum(-1);
}

// The double backward in ATen operators, for derivatives beyond the second. Notation of kl_div_cpu.cpp.
struct Composite {
  int64_t space;
  Tensor x, divisor, prob, log_prob;
  double t;

  Composite(const Tensor& given, int64_t space_, double t_, at::ScalarType dtype)
      : space(space_), x(given.to(dtype)), t(t_) {
    const auto zero = x == 0;  // log and division stay clear of it, or its infinities would come back as 0 * inf
    divisor = at::where(zero, 1, x);
    const auto log_x = at::where(zero, -std::numeric_limits<double>::infinity(), divisor.log());
    log_prob = space == kLogits ? at::log_softmax(x / t, -1) : space == kProbs ? log_x : x;
    prob = space == kProbs ? x : log_prob.exp();
  }
  Tensor log_dot(const Tensor& v) const {
    if (space == kLogits) return (v - (prob * v).sum(-1, true)) / t;
    return space == kProbs ? v / divisor : v;
  }
  Tensor dot(const Tensor& v) const { return space == kProbs ? v : prob * log_dot(v); }
};

Tensors3 double_backward_composite(const OptionalTensor& v_p, const OptionalTensor& v_q, const Tensor& grad,
                                   const Tensor& p, const Tensor& q, int64_t p_space, int64_t q_space,
                                   double temperature, std::array<bool, 3> mask) {
  const auto dtype = loss_dtype(p, q);
  const Composite a(p, p_space, temperature, dtype), b(q, q_space, temperature, dtype);
  const auto vp = v_p.has_value() ? v_p->to(dtype) : at::zeros_like(a.x),
             vq = v_q.has_value() ? v_q->to(dtype) : at::zeros_like(b.x);
  // Classes of p = 0 are constant zeros by convention; the where keeps their infinities out of every derivative.
  const auto absent = a.prob == 0;
  const auto keep = [&](const Tensor& t) { return at::where(absent, 0, t); };
  const auto l = keep(a.log_prob - b.log_prob), p_dot = a.dot(vp), log_q_dot = b.log_dot(vq),
             l_dot = keep(a.log_dot(vp) - log_q_dot);
  const auto mass = a.prob.sum(-1, true), mass_dot = p_dot.sum(-1, true), kl = (a.prob * l).sum(-1, true);
  const auto kl_dot = (p_dot * l + a.prob * l_dot).sum(-1, true);
  const auto g = grad.to(dtype).unsqueeze(-1);
  Tensor d_p, d_q;
  if (p_space == kLogits) {
    d_p = (p_dot * (l - kl) + a.prob * (l_dot - kl_dot)) / temperature;
  } else {
    d_p = p_space == kLogProbs ? p_dot * (l + 1) + a.prob * l_dot : l_dot;
  }
  if (q_space == kLogits) {
    d_q = (b.prob * (log_q_dot * mass + mass_dot) - p_dot) / temperature;
  } else {
    d_q = q_space == kLogProbs ? -p_dot : at::where(b.prob == 0, 0, (a.prob * log_q_dot - p_dot) / b.divisor);
  }
  return {mask[0] ? kl_dot.squeeze(-1).to(grad.scalar_type()) : at::empty({0}, grad.options()),
          mask[1] ? (g * keep(d_p)).to(p.scalar_type()) : at::empty({0}, p.options()),
          mask[2] ? (g * d_q).to(q.scalar_type()) : at::empty({0}, q.options())};
}

struct KlDiv : torch::autograd::Function<KlDiv> {
  static constexpr const char* name = "KlDivBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& p, const Variable& q,
                               const OptionalTensor& row_weight, int64_t p_space, int64_t q_space, double temperature) {
    auto [loss, stat] = kl_div_rows(p, q, row_weight, p_space, q_space, temperature);
    ctx->save_for_backward({p, q, stat, row_weight.value_or(Tensor())});
    ctx->saved_data["p_space"] = p_space;
    ctx->saved_data["q_space"] = q_space;
    ctx->saved_data["temperature"] = temperature;
    ctx->mark_non_differentiable({stat});
    ctx->set_materialize_grads(false);
    return {loss, stat};
  }
  // A row of weight 0 gets exactly 0, whatever the incoming gradient.
  static Tensor weighted(const Tensor& g, const Tensor& weight) {
    return weight.defined() ? at::where(weight == 0, 0, g * weight) : g;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    if (!incoming[0].defined()) return variable_list(6);
    const auto s = ctx->get_saved_variables();
    const std::array<bool, 2> mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    auto [gp, gq] =
        kl_div_backward(weighted(incoming[0], s[3]), s[0], s[1], s[2], ctx->saved_data["p_space"].toInt(),
                        ctx->saved_data["q_space"].toInt(), ctx->saved_data["temperature"].toDouble(), mask);
    return {undefined_unless(mask[0], gp), undefined_unless(mask[1], gq), Tensor(), Tensor(), Tensor(), Tensor()};
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    const int64_t p_space = ctx->saved_data["p_space"].toInt(), q_space = ctx->saved_data["q_space"].toInt();
    const double temperature = ctx->saved_data["temperature"].toDouble();
    const OptionalTensor weight = in.size() > 2 ? if_defined(in[2]) : std::nullopt;
    const auto [loss, stat] = kl_div_rows(in[0], in[1], weight, p_space, q_space, temperature);
    const std::array<bool, 2> mask{tangents[0].defined(), tangents[1].defined()};
    const auto [gp, gq] = kl_div_backward(weighted(at::ones_like(loss), weight.value_or(Tensor())), in[0], in[1], stat,
                                          p_space, q_space, temperature, mask);
    auto tangent = at::zeros_like(loss);
    if (mask[0]) tangent = tangent + product_sum(gp, tangents[0], loss.scalar_type());
    if (mask[1]) tangent = tangent + product_sum(gq, tangents[1], loss.scalar_type());
    return {tangent, Tensor()};
  }
};

// The gradient is linear in the incoming one, and its Jacobian in (p, q) is symmetric: both derivatives of it are the
// double backward. The statistics are a function of p and q; the derivatives here are total ones.
struct KlDivGradient : torch::autograd::Function<KlDivGradient> {
  static constexpr const char* name = "KlDivGradientBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable& p, const Variable& q,
                               const Variable& stat, int64_t p_space, int64_t q_space, double temperature,
                               std::array<bool, 2> mask) {
    auto [gp, gq] = kl_div_backward(grad, p, q, stat, p_space, q_space, temperature, mask);
    ctx->save_for_backward({grad, p, q, stat});
    ctx->saved_data["p_space"] = p_space;
    ctx->saved_data["q_space"] = q_space;
    ctx->saved_data["temperature"] = temperature;
    ctx->saved_data["mask_p"] = mask[0];
    ctx->saved_data["mask_q"] = mask[1];
    ctx->set_materialize_grads(false);
    return {gp, gq};
  }
  static Tensors3 along(AutogradContext* ctx, const Tensor& v_p, const Tensor& v_q, const Tensor& grad, const Tensor& p,
                        const Tensor& q, const Tensor& stat, std::array<bool, 3> mask) {
    return kl_div_double_backward(if_defined(v_p), if_defined(v_q), grad, p, q, stat,
                                  ctx->saved_data["p_space"].toInt(), ctx->saved_data["q_space"].toInt(),
                                  ctx->saved_data["temperature"].toDouble(), mask);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& v) {
    const auto s = ctx->get_saved_variables();
    const std::array<bool, 3> mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    variable_list result(8);
    const auto v_p = undefined_unless(ctx->saved_data["mask_p"].toBool(), v[0]),
               v_q = undefined_unless(ctx->saved_data["mask_q"].toBool(), v[1]);
    if (!v_p.defined() && !v_q.defined()) return result;
    auto [d_grad, d_p, d_q] = along(ctx, v_p, v_q, s[0], s[1], s[2], s[3], mask);
    result[0] = undefined_unless(mask[0], d_grad);
    result[1] = undefined_unless(mask[1], d_p);
    result[2] = undefined_unless(mask[2], d_q);
    return result;
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    const bool mask_p = ctx->saved_data["mask_p"].toBool(), mask_q = ctx->saved_data["mask_q"].toBool();
    Tensor tangent_p, tangent_q;
    if (tangents[1].defined() || tangents[2].defined())
      std::tie(std::ignore, tangent_p, tangent_q) =
          along(ctx, tangents[1], tangents[2], in[0], in[1], in[2], in[3], {false, mask_p, mask_q});
    if (tangents[0].defined()) {
      const auto [gp, gq] = kl_div_backward(tangents[0], in[1], in[2], in[3], ctx->saved_data["p_space"].toInt(),
                                            ctx->saved_data["q_space"].toInt(),
                                            ctx->saved_data["temperature"].toDouble(), {mask_p, mask_q});
      tangent_p = tangent_p.defined() ? tangent_p + gp : gp;
      tangent_q = tangent_q.defined() ? tangent_q + gq : gq;
    }
    return {undefined_unless(mask_p, tangent_p), undefined_unless(mask_q, tangent_q)};
  }
};

struct KlDivValueAndGradient : torch::autograd::Function<KlDivValueAndGradient> {
  static constexpr const char* name = "KlDivValueAndGradBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& p, const Variable& q,
                               const OptionalTensor& row_weight, int64_t p_space, int64_t q_space, double temperature,
                               double scale, bool wrt_q) {
    auto [loss, stat, gradient] = kl_div_value_and_grad(p, q, row_weight, p_space, q_space, temperature, scale, wrt_q);
    ctx->save_for_backward({p, q, stat, gradient, row_weight.value_or(Tensor())});
    ctx->saved_data["p_space"] = p_space;
    ctx->saved_data["q_space"] = q_space;
    ctx->saved_data["temperature"] = temperature;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["wrt_q"] = wrt_q;
    ctx->mark_non_differentiable({stat, gradient});
    // Or backward is handed zeros as large as the gradient for the output that nobody differentiates.
    ctx->set_materialize_grads(false);
    return {loss, stat, gradient};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(8);
    const auto& g = incoming[0];
    if (!g.defined()) return result;
    auto s = ctx->get_saved_variables();
    const bool wrt_q = ctx->saved_data["wrt_q"].toBool();
    const std::array<bool, 2> mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    if (at::GradMode::is_enabled() || mask[wrt_q ? 0 : 1] || at::isTensorSubclassLike(g) ||
        at::areAnyTensorSubclassLike(s)) {
      const auto rows =
          (g * ctx->saved_data["scale"].toDouble()).expand_symint(s[0].sym_sizes().slice(0, s[0].dim() - 1));
      auto [gp, gq] =
          kl_div_backward(KlDiv::weighted(rows, s[4]), s[0], s[1], s[2], ctx->saved_data["p_space"].toInt(),
                          ctx->saved_data["q_space"].toInt(), ctx->saved_data["temperature"].toDouble(), mask);
      result[0] = undefined_unless(mask[0], gp);
      result[1] = undefined_unless(mask[1], gq);
      return result;
    }
    Tensor gradient = std::move(s[3]);
    s.clear();
    result[wrt_q ? 1 : 0] = hand_over(std::move(gradient), g);
    return result;
  }
  static variable_list jvp(AutogradContext*, const variable_list&, const variable_list&) {
    TORCH_INTERNAL_ASSERT(false, "_kl_div_value_and_grad is not chosen where there is a tangent");
  }
};

Tensors2 kl_div_rows_autograd(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, int64_t p_space,
                              int64_t q_space, double temperature) {
  auto v = apply<KlDiv>(p, q, row_weight, p_space, q_space, temperature);
  return {v[0], v[1]};
}

Tensors2 kl_div_backward_autograd(const Tensor& grad, const Tensor& p, const Tensor& q, const Tensor& stat,
                                  int64_t p_space, int64_t q_space, double temperature, std::array<bool, 2> mask) {
  auto v = apply<KlDivGradient>(grad, p, q, stat, p_space, q_space, temperature, mask);
  return {v[0], v[1]};
}

Tensors3 kl_div_double_backward_autograd(const OptionalTensor& v_p, const OptionalTensor& v_q, const Tensor& grad,
                                         const Tensor& p, const Tensor& q, const Tensor& stat, int64_t p_space,
                                         int64_t q_space, double temperature, std::array<bool, 3> mask) {
  if (is_differentiated(v_p.value_or(Tensor()), v_q.value_or(Tensor()), grad, p, q))
    return double_backward_composite(v_p, v_q, grad, p, q, p_space, q_space, temperature, mask);
  const at::AutoDispatchBelowADInplaceOrView below;
  return kl_div_double_backward(v_p, v_q, grad, p, q, stat, p_space, q_space, temperature, mask);
}

Tensors3 kl_div_value_and_grad_autograd(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight,
                                        int64_t p_space, int64_t q_space, double temperature, double scale,
                                        bool wrt_q) {
  auto v = apply<KlDivValueAndGradient>(p, q, row_weight, p_space, q_space, temperature, scale, wrt_q);
  return {v[0], v[1], v[2]};
}

// -- The public operators -------------------------------------------------------------------------------------------

// What both public operators make of their arguments: P and Q with the classes last, all checked.
struct Problem {
  Tensor p, q;
  bool input_is_q;
  SpaceCode p_space, q_space;
  RowReduction reduction;
};

Problem checked_problem(const Tensor& input, const Tensor& target, std::string_view direction, std::string_view space,
                        std::optional<std::string_view> target_space, double temperature, int64_t dim,
                        const OptionalTensor& row_weight, std::string_view reduction,
                        const OptionalTensor& normalizer) {
  constexpr const char* kName = "kl_div";
  check_distributions(kName, input, target);
  const int64_t class_dim = check_dim(kName, input, dim);
  const bool reverse = check_choice(kName, "direction", direction, "forward", "reverse");
  const auto of_input = check_space(kName, "space", space);
  const auto of_target = target_space.has_value() ? check_space(kName, "target_space", *target_space) : of_input;
  check_temperature(kName, temperature, of_input == kLogits || of_target == kLogits);
  const bool last = class_dim == input.dim() - 1;
  const auto x = last ? input : input.movedim(class_dim, -1), y = last ? target : target.movedim(class_dim, -1);
  RowReduction reduce(kName, x, loss_dtype(x, y), row_weight, reduction, normalizer);
  if (reverse) return {x, y, false, of_input, of_target, std::move(reduce)};
  return {y, x, true, of_target, of_input, std::move(reduce)};
}

bool is_half(const Tensor& t) { return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16; }

Tensor kl_div(const Tensor& input, const Tensor& target, std::string_view direction, std::string_view space,
              std::optional<std::string_view> target_space, double temperature, int64_t dim,
              const OptionalTensor& row_weight, std::string_view reduction, const OptionalTensor& normalizer) {
  const auto k = checked_problem(input, target, direction, space, target_space, temperature, dim, row_weight, reduction,
                                 normalizer);
  const bool wrt_p = k.p.requires_grad(), wrt_q = k.q.requires_grad();
  // Training at memory speed. Half types take the plain pair: (q - p)/n stored in half loses what GradScaler keeps.
  if (k.reduction.reduces() && at::GradMode::is_enabled() && wrt_p != wrt_q && !is_half(wrt_q ? k.q : k.p) &&
      is_plain_eager(k.p) && is_plain_eager(k.q) && (!row_weight.has_value() || is_plain_eager(*row_weight)) &&
      (!normalizer.has_value() || is_plain_eager(*normalizer)))
    return std::get<0>(kl_div_value_and_grad(k.p, k.q, k.reduction.weight(), k.p_space, k.q_space, temperature,
                                             k.reduction.scale(), wrt_q));
  return k.reduction(std::get<0>(kl_div_rows(k.p, k.q, k.reduction.weight(), k.p_space, k.q_space, temperature)));
}

Tensor kl_div_inplace_grad(Tensor& input, const Tensor& target, std::string_view direction, std::string_view space,
                           std::optional<std::string_view> target_space, double temperature, int64_t dim,
                           const OptionalTensor& row_weight, std::string_view reduction,
                           const OptionalTensor& normalizer) {
  constexpr const char* kName = "kl_div";
  const auto k = checked_problem(input, target, direction, space, target_space, temperature, dim, row_weight, reduction,
                                 normalizer);
  TORCH_CHECK_VALUE(k.reduction.reduces(), kName,
                    ": inplace_grad=True with reduction=\"none\", expected a reduced loss");
  check_inplace_gradient(kName, input, target);

  const at::AutoDispatchBelowADInplaceOrView below;
  const auto weight = k.reduction.weight();
  const double scale = k.reduction.scale();
  const auto p = k.p.detach(), q = k.q.detach();
  const auto own = k.input_is_q ? q : p;
  const auto row_factor = [scale, weight](const Tensor& stat, const Tensor& g) {
    auto rows = (g * scale).expand(stat.sizes().slice(0, stat.dim() - 1));
    return KlDiv::weighted(rows, weight.value_or(Tensor()));
  };
  Tensor loss, stat, target_gradient;
  std::function<void(Tensor&, const Tensor&)> finish;
  if (is_half(own) || target.requires_grad()) {
    std::tie(loss, stat) = kl_div_rows(p, q, weight, k.p_space, k.q_space, temperature);
    loss = loss.sum() * scale;
  }
  if (target.requires_grad()) {
    // Not rounded to half before it meets the incoming gradient.
    const auto wide = [](const Tensor& t) { return is_half(t) ? t.to(at::kFloat) : t; };
    auto [gp, gq] =
        kl_div_backward(row_factor(stat, at::ones_like(loss)), k.input_is_q ? wide(p) : p, k.input_is_q ? q : wide(q),
                        stat, k.p_space, k.q_space, temperature, {k.input_is_q, !k.input_is_q});
    target_gradient = (k.input_is_q ? gp : gq).movedim(-1, dim);
  }
  if (is_half(own)) {
    // The gradient needs the incoming one before it is rounded to half: it is written by backward.
    finish = [=, p_space = k.p_space, q_space = k.q_space, input_is_q = k.input_is_q](Tensor&, const Tensor& g) {
      const auto coefficient = contiguous_double(row_factor(stat, g));
      const KlDivBackward call{rows_of(p, q, p_space, q_space, temperature), coefficient.const_data_ptr<double>(),
                               stat.const_data_ptr<double>(), input_is_q ? RowsOut{} : rows_out(own),
                               input_is_q ? rows_out(own) : RowsOut{}};
      const auto kernel = TD_CPU_KERNEL(kl_div_backward);
      parallel_rows(coefficient.numel(), p.size(-1),
                    [&](int64_t begin, int64_t end, ForEach columns) { kernel(call, begin, end, columns); });
    };
  } else {
    std::tie(loss, stat) =
        value_and_grad_into(own, p, q, weight, k.p_space, k.q_space, temperature, scale, k.input_is_q);
    finish = scale_gradient_;
  }
  return attach_inplace_gradient(kName, std::move(loss), input, target, std::move(target_gradient), std::move(finish));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "kl_div(Tensor input, Tensor target, *, str direction=\"forward\", str space=\"logits\", str? target_space=None, "
      "float temperature=1.0, int dim=-1, Tensor? row_weight=None, str reduction=\"mean\", Tensor? normalizer=None) -> "
      "Tensor",
      tags);
  m.def(
      "kl_div_inplace_grad(Tensor(a!) input, Tensor target, *, str direction=\"forward\", str space=\"logits\", str? "
      "target_space=None, "
      "float temperature=1.0, int dim=-1, Tensor? row_weight=None, str reduction=\"mean\", Tensor? normalizer=None) -> "
      "Tensor",
      tags);
  m.def(
      "_kl_div(Tensor p, Tensor q, Tensor? row_weight, int p_space, int q_space, float temperature) -> (Tensor, "
      "Tensor)",
      tags);
  m.def(
      "_kl_div_backward(Tensor grad, Tensor p, Tensor q, Tensor stat, int p_space, int q_space, float temperature, "
      "bool[2] mask) "
      "-> (Tensor, Tensor)",
      tags);
  m.def(
      "_kl_div_double_backward(Tensor? gg_p, Tensor? gg_q, Tensor grad, Tensor p, Tensor q, Tensor stat, int p_space, "
      "int q_space, "
      "float temperature, bool[3] mask) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "_kl_div_value_and_grad(Tensor p, Tensor q, Tensor? row_weight, int p_space, int q_space, float temperature, "
      "float scale, "
      "bool wrt_q) -> (Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) {
  m.impl("kl_div", kl_div);
  m.impl("kl_div_inplace_grad", kl_div_inplace_grad);
}
// A composite operator under vmap meets the slow per-sample fallback before its decomposition: say it again at this
// key.
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) {
  m.impl("kl_div", kl_div);
  m.impl("kl_div_inplace_grad", kl_div_inplace_grad);
}
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) {
  m.impl("_kl_div", kl_div_rows_cpu);
  m.impl("_kl_div_backward", kl_div_backward_cpu);
  m.impl("_kl_div_double_backward", kl_div_double_backward_cpu);
  m.impl("_kl_div_value_and_grad", kl_div_value_and_grad_cpu);
}
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) {
  m.impl("_kl_div", kl_div_rows_meta);
  m.impl("_kl_div_backward", kl_div_backward_meta);
  m.impl("_kl_div_double_backward", kl_div_double_backward_meta);
  m.impl("_kl_div_value_and_grad", kl_div_value_and_grad_meta);
}
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) {
  m.impl("_kl_div", kl_div_rows_autograd);
  m.impl("_kl_div_backward", kl_div_backward_autograd);
  m.impl("_kl_div_double_backward", kl_div_double_backward_autograd);
  m.impl("_kl_div_value_and_grad", kl_div_value_and_grad_autograd);
}

}  // namespace torch_divergence
