// Entropic optimal transport: operators, checks, autograd. Formulas in sinkhorn.h, the solver in sinkhorn_iteration.h
// and sinkhorn_solver.cpp, the private operators on the CPU in sinkhorn_ops.cpp, their kernels in sinkhorn_cpu.cpp; on
// CUDA in sinkhorn_ops_cuda.cpp and sinkhorn_cuda.cu.
#include "sinkhorn/sinkhorn.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/apply.h"
#include "core/cuda_tensors.h"
#include "core/op.h"
#include "sinkhorn/sinkhorn_ops.h"

namespace torch_divergence {
namespace {

using namespace transport;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr double kHard = std::numeric_limits<double>::infinity();

// -- The private operators, called through the dispatcher -----------------------------------------------------------

OptionalTensor if_defined(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor undefined_unless(bool wanted, const Tensor& t) { return wanted ? t : Tensor(); }

// The constants of a problem, as autograd carries them.
struct Options {
  OptionalTensor x_offsets, y_offsets;
  int64_t cost;
  double rho_a, rho_b;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["cost"] = cost;
    ctx->saved_data["rho_a"] = rho_a;
    ctx->saved_data["rho_b"] = rho_b;
  }
  static Options of(AutogradContext* ctx, const Tensor& x_offsets, const Tensor& y_offsets) {
    return {if_defined(x_offsets), if_defined(y_offsets), ctx->saved_data["cost"].toInt(),
            ctx->saved_data["rho_a"].toDouble(), ctx->saved_data["rho_b"].toDouble()};
  }
};
// x, y, a, b, eps of a list that starts with them at `first`; y and b undefined where symmetric, y with a cost matrix.
struct Inputs {
  const variable_list& list;
  size_t first = 0;
  const Tensor& x() const { return list[first]; }
  OptionalTensor y() const { return if_defined(list[first + 1]); }
  const Tensor& a() const { return list[first + 2]; }
  OptionalTensor b() const { return if_defined(list[first + 3]); }
  const Tensor& eps() const { return list[first + 4]; }
};

#define TD_OFFSETS_OPTIONS(o) o.x_offsets, o.y_offsets, o.cost, o.rho_a, o.rho_b
#define TD_INPUTS(in) in.x(), in.y(), in.a(), in.b(), in.eps()

const auto& solve_op() {
  static const auto op = typed_op<decltype(solve_cpu)>("torch_divergence::_sinkhorn");
  return op;
}
const auto& backward_op() {
  static const auto op = typed_op<decltype(backward_cpu)>("torch_divergence::_sinkhorn_backward");
  return op;
}
const auto& double_backward_op() {
  static const auto op = typed_op<decltype(double_backward)>("torch_divergence::_sinkhorn_double_backward");
  return op;
}
using Potentials = Tensors2(TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS);
const auto& potentials_op() {
  static const auto op = typed_op<Potentials>("torch_divergence::_sinkhorn_potentials");
  return op;
}
const auto& potentials_backward_op() {
  static const auto op = typed_op<decltype(potentials_backward)>("torch_divergence::_sinkhorn_potentials_backward");
  return op;
}
const auto& potentials_jvp_op() {
  static const auto op = typed_op<decltype(potentials_jvp)>("torch_divergence::_sinkhorn_potentials_jvp");
  return op;
}
const auto& plan_op() {
  static const auto op = typed_op<decltype(plan_cpu)>("torch_divergence::_sinkhorn_plan");
  return op;
}
const auto& plan_backward_op() {
  static const auto op = typed_op<decltype(plan_backward)>("torch_divergence::_sinkhorn_plan_backward");
  return op;
}

Tensors2 potentials(TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS) {
  (void)x, (void)y, (void)a, (void)b, (void)eps, (void)x_offsets, (void)y_offsets, (void)cost, (void)rho_a, (void)rho_b;
  return {f.clone(), g.clone()};
}

// -- Meta -----------------------------------------------------------------------------------------------------------

Tensor like_or_nothing(const Tensor& t, bool wanted) {
  return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : at::empty({0}, t.options());
}

Tensors6 solve_meta(const Tensor& x, const OptionalTensor&, const Tensor& a, const OptionalTensor& b, const Tensor& eps,
                    const OptionalTensor&, double, int64_t, const OptionalTensor&, const OptionalTensor&, int64_t,
                    double, double) {
  const auto counter = [&](at::ScalarType type) {
    return at::empty_symint(eps.sym_sizes(), eps.options().dtype(type));
  };
  return {counter(at::kDouble),
          at::empty_symint(a.sym_sizes(), x.options()),
          at::empty_symint(b.value_or(a).sym_sizes(), x.options()),
          counter(at::kDouble),
          counter(at::kLong),
          counter(at::kBool)};
}

Tensors5 backward_meta(const Tensor&, TD_SINKHORN_PROBLEM, const Tensor&, const Tensor&, const OptionalTensor&,
                       const OptionalTensor&, int64_t, double, double, Mask mask) {
  return {like_or_nothing(x, mask[0]), like_or_nothing(y.value_or(x), mask[1]), like_or_nothing(a, mask[2]),
          like_or_nothing(b.value_or(a), mask[3]), like_or_nothing(eps, mask[4])};
}

Tensors6 double_backward_meta(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, const Tensor& grad, TD_SINKHORN_PROBLEM,
                              const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
                              double, double, std::array<bool, 6> mask) {
  return {like_or_nothing(grad, mask[0]),          like_or_nothing(x, mask[1]),
          like_or_nothing(y.value_or(x), mask[2]), like_or_nothing(a, mask[3]),
          like_or_nothing(b.value_or(a), mask[4]), like_or_nothing(eps, mask[5])};
}

Tensors2 potentials_meta(const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                         const Tensor& f, const Tensor& g, const OptionalTensor&, const OptionalTensor&, int64_t,
                         double, double) {
  return {like_or_nothing(f, true), like_or_nothing(g, true)};
}

Tensors5 potentials_backward_meta(const OptionalTensor&, const OptionalTensor&, TD_SINKHORN_PROBLEM, const Tensor&,
                                  const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double, double,
                                  Mask mask) {
  return {like_or_nothing(x, mask[0]), like_or_nothing(y.value_or(x), mask[1]), like_or_nothing(a, mask[2]),
          like_or_nothing(b.value_or(a), mask[3]), like_or_nothing(eps, mask[4])};
}

Tensors2 potentials_jvp_meta(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                             const OptionalTensor&, const Tensor&, const Tensor& f, const Tensor& g,
                             const OptionalTensor&, const OptionalTensor&, int64_t, double, double) {
  return {like_or_nothing(f, true), like_or_nothing(g, true)};
}

Tensor plan_meta(const Tensor& v, const Tensor& x, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                 const Tensor&, const Tensor& f, const Tensor& g, bool transpose, const OptionalTensor&,
                 const OptionalTensor&, int64_t, double, double) {
  const auto atoms = (transpose ? g : f).sym_sizes();
  c10::SymDimVector sizes(atoms.begin(), atoms.end());
  sizes.push_back(v.sym_size(-1));
  return at::empty_symint(sizes, x.options());
}

Tensors7 plan_backward_meta(const Tensor&, const Tensor&, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, bool,
                            const OptionalTensor&, const OptionalTensor&, int64_t, double, double,
                            std::array<bool, 7> mask) {
  return {like_or_nothing(x, mask[0]),   like_or_nothing(y.value_or(x), mask[1]),
          like_or_nothing(a, mask[2]),   like_or_nothing(b.value_or(a), mask[3]),
          like_or_nothing(eps, mask[4]), like_or_nothing(f, mask[5]),
          like_or_nothing(g, mask[6])};
}

Tensors3 marginals_meta(const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&, const Tensor& eps,
                        const Tensor& f, const Tensor& g, const OptionalTensor&, const OptionalTensor&, int64_t, double,
                        double) {
  return {like_or_nothing(f, true), like_or_nothing(g, true), like_or_nothing(eps, true)};
}

// -- Autograd -------------------------------------------------------------------------------------------------------

template <size_t n>
std::array<bool, n> needed(AutogradContext* ctx, size_t first) {
  std::array<bool, n> mask;
  for (size_t k = 0; k < n; ++k) mask[k] = ctx->needs_input_grad(first + k);
  return mask;
}

// Per problem of the batch: <gradient, tangent>. Ragged batches have no such sum in ATen that keeps digits.
Tensor add_dot(const Tensor& total, const Tensor& gradient, const Tensor& tangent) {
  auto product = gradient.to(at::kDouble) * tangent.to(at::kDouble);
  if (product.dim() > 1) {
    std::vector<int64_t> within(static_cast<size_t>(product.dim()) - 1);
    std::iota(within.begin(), within.end(), 1);
    product = product.sum(within);
  }
  return total.defined() ? total + product : product;
}

// f and g are a function of the inputs; the derivatives of value are total ones.
struct Sinkhorn : torch::autograd::Function<Sinkhorn> {
  static constexpr const char* name = "SinkhornBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& x, const Variable& y, const Variable& a,
                               const Variable& b, const Variable& eps, const Variable& init, double tol,
                               int64_t max_iter, const Variable& x_offsets, const Variable& y_offsets, int64_t cost,
                               double rho_a, double rho_b) {
    const Options o{if_defined(x_offsets), if_defined(y_offsets), cost, rho_a, rho_b};
    auto [value, f, g, error, n_iter, converged] = solve_op().call(
        x, if_defined(y), a, if_defined(b), eps, if_defined(init), tol, max_iter, TD_OFFSETS_OPTIONS(o));
    ctx->save_for_backward({x, y, a, b, eps, f, g, x_offsets, y_offsets});
    o.save(ctx);
    ctx->mark_non_differentiable({f, g, error, n_iter, converged});
    ctx->set_materialize_grads(false);
    bool has_tangent = false;
    for (const auto* t : {&x, &y, &a, &b, &eps}) has_tangent = has_tangent || torch::autograd::isFwGradDefined(*t);
    if (has_tangent) {  // for jvp, which would have to solve again
      ctx->saved_data["f"] = f;
      ctx->saved_data["g"] = g;
    }
    return {value, f, g, error, n_iter, converged};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(13);
    if (!incoming[0].defined()) return result;
    const auto s = ctx->get_saved_variables();
    const auto mask = needed<5>(ctx, 0);
    const Inputs in{s};
    const auto o = Options::of(ctx, s[7], s[8]);
    const auto [gx, gy, ga, gb, geps] =
        backward_op().call(incoming[0], TD_INPUTS(in), s[5], s[6], TD_OFFSETS_OPTIONS(o), mask);
    result[0] = undefined_unless(mask[0], gx);
    result[1] = undefined_unless(mask[1], gy);
    result[2] = undefined_unless(mask[2], ga);
    result[3] = undefined_unless(mask[3], gb);
    result[4] = undefined_unless(mask[4], geps);
    return result;
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& primals, const variable_list& tangents) {
    const Inputs in{primals};
    const auto o = Options::of(ctx, primals[6], primals[7]);
    TORCH_CHECK_NOT_IMPLEMENTED(!o.x_offsets.has_value(), "sinkhorn: forward-mode differentiation of ragged batches");
    Mask mask;
    for (size_t k = 0; k < 5; ++k) mask[k] = tangents[k].defined();
    const auto f = ctx->saved_data["f"].toTensor(), g = ctx->saved_data["g"].toTensor();
    ctx->saved_data.erase("f");
    ctx->saved_data.erase("g");
    const auto [gx, gy, ga, gb, geps] =
        backward_op().call(at::ones_like(in.eps(), in.eps().options().dtype(at::kDouble)), TD_INPUTS(in), f, g,
                           TD_OFFSETS_OPTIONS(o), mask);
    const Tensor gradients[] = {gx, gy, ga, gb, geps};
    Tensor tangent;
    for (size_t k = 0; k < 5; ++k)
      if (mask[k]) tangent = add_dot(tangent, gradients[k], tangents[k]);
    return {tangent, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// Linear in the incoming gradient, with a symmetric Jacobian in the inputs: both derivatives are the double backward.
struct SinkhornGradient : torch::autograd::Function<SinkhornGradient> {
  static constexpr const char* name = "SinkhornGradientBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable& x, const Variable& y,
                               const Variable& a, const Variable& b, const Variable& eps, const Variable& f,
                               const Variable& g, const Variable& x_offsets, const Variable& y_offsets, int64_t cost,
                               double rho_a, double rho_b, Mask mask) {
    const Options o{if_defined(x_offsets), if_defined(y_offsets), cost, rho_a, rho_b};
    const auto [gx, gy, ga, gb, geps] =
        backward_op().call(grad, x, if_defined(y), a, if_defined(b), eps, f, g, TD_OFFSETS_OPTIONS(o), mask);
    ctx->save_for_backward({grad, x, y, a, b, eps, f, g, x_offsets, y_offsets});
    o.save(ctx);
    ctx->saved_data["mask"] = c10::List<bool>({mask[0], mask[1], mask[2], mask[3], mask[4]});
    ctx->set_materialize_grads(false);
    return {gx, gy, ga, gb, geps};
  }
  static Mask mask_of(AutogradContext* ctx) {
    const auto list = ctx->saved_data["mask"].toBoolList();
    return {list[0], list[1], list[2], list[3], list[4]};
  }
  static Tensors6 along(AutogradContext* ctx, const std::array<Tensor, 5>& v, const variable_list& s,
                        std::array<bool, 6> wanted) {
    const Inputs in{s, 1};
    const auto o = Options::of(ctx, s[8], s[9]);
    return double_backward_op().call(if_defined(v[0]), if_defined(v[1]), if_defined(v[2]), if_defined(v[3]),
                                     if_defined(v[4]), s[0], TD_INPUTS(in), s[6], s[7], TD_OFFSETS_OPTIONS(o), wanted);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(14);
    const auto mask = mask_of(ctx);
    std::array<Tensor, 5> v;
    bool any = false;
    for (size_t k = 0; k < 5; ++k) {
      v[k] = undefined_unless(mask[k], incoming[k]);
      any = any || v[k].defined();
    }
    if (!any) return result;
    const auto wanted = needed<6>(ctx, 0);
    const auto [d_grad, hx, hy, ha, hb, heps] = along(ctx, v, ctx->get_saved_variables(), wanted);
    const Tensor out[] = {d_grad, hx, hy, ha, hb, heps};
    for (size_t k = 0; k < 6; ++k) result[k] = undefined_unless(wanted[k], out[k]);
    return result;
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& primals, const variable_list& tangents) {
    const auto mask = mask_of(ctx);
    std::array<Tensor, 5> v, out;
    bool moves = false;
    for (size_t k = 0; k < 5; ++k) {
      v[k] = tangents[k + 1];
      moves = moves || v[k].defined();
    }
    if (moves)
      std::tie(std::ignore, out[0], out[1], out[2], out[3], out[4]) =
          along(ctx, v, primals, {false, mask[0], mask[1], mask[2], mask[3], mask[4]});
    if (tangents[0].defined()) {
      const Inputs in{primals, 1};
      const auto o = Options::of(ctx, primals[8], primals[9]);
      const auto [gx, gy, ga, gb, geps] =
          backward_op().call(tangents[0], TD_INPUTS(in), primals[6], primals[7], TD_OFFSETS_OPTIONS(o), mask);
      const Tensor linear[] = {gx, gy, ga, gb, geps};
      for (size_t k = 0; k < 5; ++k) out[k] = out[k].defined() ? out[k] + linear[k] : linear[k];
    }
    variable_list result(5);
    for (size_t k = 0; k < 5; ++k) result[k] = undefined_unless(mask[k], out[k]);
    return result;
  }
};

struct SinkhornPotentials : torch::autograd::Function<SinkhornPotentials> {
  static constexpr const char* name = "SinkhornPotentialsBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& x, const Variable& y, const Variable& a,
                               const Variable& b, const Variable& eps, const Variable& f, const Variable& g,
                               const Variable& x_offsets, const Variable& y_offsets, int64_t cost, double rho_a,
                               double rho_b) {
    const Options o{if_defined(x_offsets), if_defined(y_offsets), cost, rho_a, rho_b};
    auto [f_out, g_out] = potentials_op().call(x, if_defined(y), a, if_defined(b), eps, f, g, TD_OFFSETS_OPTIONS(o));
    ctx->save_for_backward({x, y, a, b, eps, f, g, x_offsets, y_offsets});
    o.save(ctx);
    ctx->set_materialize_grads(false);
    return {f_out, g_out};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(12);
    if (!incoming[0].defined() && !incoming[1].defined()) return result;
    const auto s = ctx->get_saved_variables();
    const auto mask = needed<5>(ctx, 0);
    const Inputs in{s};
    const auto o = Options::of(ctx, s[7], s[8]);
    const auto [gx, gy, ga, gb, geps] = potentials_backward_op().call(
        if_defined(incoming[0]), if_defined(incoming[1]), TD_INPUTS(in), s[5], s[6], TD_OFFSETS_OPTIONS(o), mask);
    result[0] = undefined_unless(mask[0], gx);
    result[1] = undefined_unless(mask[1], gy);
    result[2] = undefined_unless(mask[2], ga);
    result[3] = undefined_unless(mask[3], gb);
    result[4] = undefined_unless(mask[4], geps);
    return result;
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& primals, const variable_list& tangents) {
    const Inputs in{primals};
    const auto o = Options::of(ctx, primals[7], primals[8]);
    const auto [df, dg] = potentials_jvp_op().call(
        if_defined(tangents[0]), if_defined(tangents[1]), if_defined(tangents[2]), if_defined(tangents[3]),
        if_defined(tangents[4]), TD_INPUTS(in), primals[5], primals[6], TD_OFFSETS_OPTIONS(o));
    return {df, dg};
  }
};

// Once differentiable, in v, the inputs and the potentials.
struct SinkhornPlan : torch::autograd::Function<SinkhornPlan> {
  static constexpr const char* name = "SinkhornPlanBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& v, const Variable& x, const Variable& y,
                               const Variable& a, const Variable& b, const Variable& eps, const Variable& f,
                               const Variable& g, bool transpose, const Variable& x_offsets, const Variable& y_offsets,
                               int64_t cost, double rho_a, double rho_b) {
    const Options o{if_defined(x_offsets), if_defined(y_offsets), cost, rho_a, rho_b};
    auto out = plan_op().call(v, x, if_defined(y), a, if_defined(b), eps, f, g, transpose, TD_OFFSETS_OPTIONS(o));
    ctx->save_for_backward({v, x, y, a, b, eps, f, g, x_offsets, y_offsets});
    o.save(ctx);
    ctx->saved_data["transpose"] = transpose;
    ctx->set_materialize_grads(false);
    return {out};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(14);
    if (!incoming[0].defined()) return result;
    const auto s = ctx->get_saved_variables();
    const auto wanted = needed<8>(ctx, 0);
    const Inputs in{s, 1};
    const auto o = Options::of(ctx, s[8], s[9]);
    const bool transpose = ctx->saved_data["transpose"].toBool();
    if (wanted[0])
      result[0] = plan_op()
                      .call(incoming[0], TD_INPUTS(in), s[6], s[7], !transpose, TD_OFFSETS_OPTIONS(o))
                      .to(s[0].scalar_type());
    std::array<bool, 7> mask;
    bool any = false;
    for (size_t k = 0; k < 7; ++k) any = (mask[k] = wanted[k + 1]) || any;
    if (!any) return result;
    const auto [gx, gy, ga, gb, geps, gf, gg] =
        plan_backward_op().call(incoming[0], s[0], TD_INPUTS(in), s[6], s[7], transpose, TD_OFFSETS_OPTIONS(o), mask);
    const Tensor out[] = {gx, gy, ga, gb, geps, gf, gg};
    for (size_t k = 0; k < 7; ++k) result[k + 1] = undefined_unless(mask[k], out[k]);
    return result;
  }
  static variable_list jvp(AutogradContext*, const variable_list&, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "sinkhorn: forward-mode differentiation of the plan's products");
  }
};

Tensors6 solve_autograd(TD_SINKHORN_PROBLEM, const OptionalTensor& init, double tol, int64_t max_iter,
                        TD_SINKHORN_OPTIONS) {
  const auto none = Tensor();
  auto v = apply<Sinkhorn>(x, y.value_or(none), a, b.value_or(none), eps, init.value_or(none), tol, max_iter,
                           x_offsets.value_or(none), y_offsets.value_or(none), cost, rho_a, rho_b);
  return {v[0], v[1], v[2], v[3], v[4], v[5]};
}

Tensors5 backward_autograd(const Tensor& grad, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g,
                           TD_SINKHORN_OPTIONS, Mask mask) {
  const auto none = Tensor();
  auto v = apply<SinkhornGradient>(grad, x, y.value_or(none), a, b.value_or(none), eps, f, g, x_offsets.value_or(none),
                                   y_offsets.value_or(none), cost, rho_a, rho_b, mask);
  return {v[0], v[1], v[2], v[3], v[4]};
}

Tensors2 potentials_autograd(TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS) {
  const auto none = Tensor();
  auto v = apply<SinkhornPotentials>(x, y.value_or(none), a, b.value_or(none), eps, f, g, x_offsets.value_or(none),
                                     y_offsets.value_or(none), cost, rho_a, rho_b);
  return {v[0], v[1]};
}

Tensor plan_autograd(const Tensor& v, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, bool transpose,
                     TD_SINKHORN_OPTIONS) {
  const auto none = Tensor();
  return apply<SinkhornPlan>(v, x, y.value_or(none), a, b.value_or(none), eps, f, g, transpose,
                             x_offsets.value_or(none), y_offsets.value_or(none), cost, rho_a, rho_b)[0];
}

// -- The public operators ---------------------------------------------------------------------------------------------

bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

// A batch of problems as the private operators take it, made from what the user gave.
struct Prepared {
  const char* name;
  Tensor x, y, a, b, eps;
  OptionalTensor x_offsets, y_offsets;
  int64_t cost = kHalfSqEuclidean;
  double rho_a = kHard, rho_b = kHard;
  at::ScalarType dtype = at::kFloat;
  bool batched = false;
  c10::SymInt batch = 1;

  void check_tensor(const char* argument, const Tensor& t, const Tensor& first) const {
    TORCH_CHECK_VALUE(is_supported(t.scalar_type()), name, ": ", argument, " has dtype ", t.scalar_type(),
                      ", expected float32, float64, bfloat16 or float16");
    TORCH_CHECK_VALUE((t.scalar_type() == at::kDouble) == (first.scalar_type() == at::kDouble), name, ": ", argument,
                      " has dtype ", t.scalar_type(), " beside ", first.scalar_type(),
                      ", expected float64 everywhere or nowhere");
    TORCH_CHECK_VALUE(t.device() == first.device(), name, ": ", argument, " is on ", t.device(), ", expected ",
                      first.device());
    TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, ": ", argument, " has layout ", t.layout(),
                      ", expected a dense tensor");
  }
  void take_batch(const char* argument, const Tensor& t) {
    if (!batched) batch = t.sym_size(0);
    TORCH_CHECK_VALUE(t.sym_size(0) == batch, name, ": ", argument, " has batch size ", t.sym_size(0), ", expected ",
                      batch, " as the arguments before it");
    batched = true;
  }
  // (..., dims of one problem) -> (batch, ...)
  Tensor expanded(const Tensor& t, int64_t dims) const {
    c10::SymDimVector sizes(t.sym_sizes().begin(), t.sym_sizes().end());
    if (t.dim() == dims)
      sizes.insert(sizes.begin(), batch);
    else
      sizes[0] = batch;
    return t.expand_symint(sizes);
  }
  Tensor weights(const char* argument, const OptionalTensor& given, const c10::SymInt& count, const Tensor& first) {
    if (!given.has_value()) return {};
    check_tensor(argument, *given, first);
    TORCH_CHECK_VALUE((given->dim() == 1 || given->dim() == 2) && given->sym_size(-1) == count, name, ": ", argument,
                      " has shape ", given->sym_sizes(), ", expected (", count, ",) or (batch, ", count, ")");
    if (given->dim() == 2) take_batch(argument, *given);
    return *given;
  }
  Tensor uniform(const Tensor& like, const c10::SymInt& count) const {
    const auto one = at::ones_symint({count}, like.options().dtype(at::kDouble));
    return one / one.sum();
  }
  // The problem that each atom belongs to. Offsets that make no sense are the kernels' to refuse: here they only must
  // not fail in other words.
  static Tensor problem_of(const Tensor& offsets, const c10::SymInt& total) {
    const auto atom = at::arange(c10::Scalar(total), offsets.options());
    return (at::searchsorted(offsets, atom, /*out_int32=*/false, /*right=*/true) - 1)
        .clamp(0, offsets.sym_size(0).guard_int(__FILE__, __LINE__) - 2);
  }
  static Tensor ragged_uniform(const Tensor& offsets, const c10::SymInt& total) {
    const auto counts = offsets.slice(0, 1) - offsets.slice(0, 0, -1);
    return (1 / counts.to(at::kDouble)).index_select(0, problem_of(offsets, total));
  }

  // eps and rho from eps, blur, rho, reach: eps = blur^2, 2 blur^2 (sqeuclidean), blur (euclidean).
  double from_length(double length) const {
    return cost == kEuclidean ? length : cost == kSqEuclidean ? 2 * length * length : length * length;
  }
  void take_rho(at::ArrayRef<double> rho, at::ArrayRef<double> reach) {
    TORCH_CHECK_VALUE(rho.empty() || reach.empty(), name, ": both rho and reach are given, expected one of them");
    const bool lengths = !reach.empty();
    const auto given = lengths ? reach : rho;
    const char* const argument = lengths ? "reach" : "rho";
    TORCH_CHECK_VALUE(given.size() <= 2, name, ": ", argument, " has ", given.size(),
                      " entries, expected one number or a pair");
    for (const double v : given)
      TORCH_CHECK_VALUE(v > 0, name, ": ", argument, " is ", v, ", expected a positive number, or None");
    if (given.empty()) return;
    rho_a = lengths ? from_length(given.front()) : given.front();
    rho_b = lengths ? from_length(given.back()) : given.back();
  }
  void take_eps(const OptionalTensor& given, std::optional<double> blur) {
    TORCH_CHECK_VALUE(!given.has_value() || !blur.has_value(), name,
                      ": both eps and blur are given, expected one of them");
    const auto options = x.options().dtype(at::kDouble);
    if (!given.has_value()) {
      const double length = blur.value_or(0.05);
      TORCH_CHECK_VALUE(length > 0 && std::isfinite(length), name, ": blur is ", length,
                        ", expected a positive finite number");
      eps = at::full_symint({batch}, from_length(length), options);
      return;
    }
    TORCH_CHECK_VALUE(at::isFloatingType(given->scalar_type()), name, ": eps has dtype ", given->scalar_type(),
                      ", expected a floating dtype");
    TORCH_CHECK_VALUE(given->dim() <= 1, name, ": eps has shape ", given->sym_sizes(),
                      ", expected a number or one entry a problem");
    TORCH_CHECK_VALUE(given->device() == x.device() || (given->is_cpu() && given->dim() == 0), name, ": eps is on ",
                      given->device(), ", expected ", x.device());
    if (given->dim() == 1) take_batch("eps", *given);
    eps = given->to(options).expand_symint({batch});
  }
  Tensor without_batch(const Tensor& t) const { return batched ? t : t.squeeze(0); }
};

// What a zero vector has instead of a direction is itself, with derivative 0. The squares are of coordinates up to 1:
// others would overflow, or be lost. The direction does not depend on that scale, which is a constant.
Tensor normalised(const Tensor& x) {
  const auto largest = x.detach().abs().amax(-1, true), zero = largest == 0;
  const auto scaled = at::where(zero, at::zeros_like(x), x) / at::where(zero, at::ones_like(largest), largest);
  const auto square = (scaled * scaled).sum(-1, true);
  return scaled / at::where(zero, at::ones_like(square), square).sqrt();
}

int64_t cost_of(const char* name, std::string_view cost) {
  if (cost == "half_sqeuclidean") return kHalfSqEuclidean;
  if (cost == "sqeuclidean") return kSqEuclidean;
  if (cost == "euclidean") return kEuclidean;
  if (cost == "cosine") return kCosine;
  TORCH_CHECK_VALUE(false, name, ": cost is \"", cost,
                    R"(", expected "half_sqeuclidean", "sqeuclidean", "euclidean" or "cosine")");
}

void check_stopping(const char* name, double tol, int64_t max_iter) {
  TORCH_CHECK_VALUE(tol >= 0 && std::isfinite(tol), name, ": tol is ", tol, ", expected a finite number, 0 or above");
  TORCH_CHECK_VALUE(max_iter >= 1, name, ": max_iter is ", max_iter, ", expected at least 1");
}

Prepared prepare(const char* name, const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                 std::string_view cost, const OptionalTensor& eps, std::optional<double> blur, at::ArrayRef<double> rho,
                 at::ArrayRef<double> reach, const OptionalTensor& x_offsets, const OptionalTensor& y_offsets) {
  Prepared p;
  p.name = name;
  p.cost = cost_of(name, cost);
  p.check_tensor("x", x, x);
  p.check_tensor("y", y, x);
  const bool ragged = x_offsets.has_value() || y_offsets.has_value();
  TORCH_CHECK_VALUE(x_offsets.has_value() == y_offsets.has_value(), name, ": ",
                    ragged && x_offsets.has_value() ? "y" : "x", "_offsets are missing, expected both or none");
  const auto check_points = [&](const char* argument, const Tensor& t) {
    TORCH_CHECK_VALUE(
        t.dim() == 2 || (t.dim() == 3 && !ragged), name, ": ", argument, " has shape ", t.sym_sizes(),
        ragged ? ", expected (points, dimensions)" : ", expected (points, dimensions) or (batch, points, dimensions)");
    TORCH_CHECK_VALUE(t.sym_size(-2) != 0 && t.sym_size(-1) != 0, name, ": ", argument, " has shape ", t.sym_sizes(),
                      ", expected at least one point of at least one dimension");
    if (t.dim() == 3) p.take_batch(argument, t);
  };
  check_points("x", x);
  check_points("y", y);
  TORCH_CHECK_VALUE(x.sym_size(-1) == y.sym_size(-1), name, ": y has points of ", y.sym_size(-1),
                    " dimensions, expected ", x.sym_size(-1), ", as x has");
  p.dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (ragged) {
    p.batched = true;
    for (const auto& [argument, o] : {std::pair("x_offsets", *x_offsets), std::pair("y_offsets", *y_offsets)}) {
      TORCH_CHECK_VALUE(o.scalar_type() == at::kLong && o.dim() == 1, name, ": ", argument, " has dtype ",
                        o.scalar_type(), " and shape ", o.sym_sizes(), ", expected int64 and (batch + 1,)");
      TORCH_CHECK_VALUE(o.device() == x.device(), name, ": ", argument, " is on ", o.device(), ", expected ",
                        x.device());
      TORCH_CHECK_VALUE(o.sym_size(0) >= 2, name, ": ", argument, " has ", o.sym_size(0),
                        " entries, expected one more than problems: the points are those of one at least");
    }
    p.batch = x_offsets->sym_size(0) - 1;
    TORCH_CHECK_VALUE(y_offsets->sym_size(0) == x_offsets->sym_size(0), name, ": y_offsets has ",
                      y_offsets->sym_size(0), " entries, expected ", x_offsets->sym_size(0), ", as x_offsets has");
    TORCH_CHECK_VALUE(!a.has_value() || a->dim() == 1, name, ": a has shape ", a->sym_sizes(), ", expected (points,)");
    TORCH_CHECK_VALUE(!b.has_value() || b->dim() == 1, name, ": b has shape ", b->sym_sizes(), ", expected (points,)");
  }
  p.a = p.weights("a", a, x.sym_size(-2), x);
  p.b = p.weights("b", b, y.sym_size(-2), x);
  p.x = x.to(p.dtype);
  p.y = y.to(p.dtype);
  p.take_rho(rho, reach);
  p.take_eps(eps, blur);
  if (p.cost == kCosine) {
    p.x = normalised(p.x);
    p.y = normalised(p.y);
  }
  if (ragged) {
    p.x_offsets = x_offsets;
    p.y_offsets = y_offsets;
    if (!p.a.defined()) p.a = p.ragged_uniform(*x_offsets, x.sym_size(0));
    if (!p.b.defined()) p.b = p.ragged_uniform(*y_offsets, y.sym_size(0));
  } else {
    if (!p.a.defined()) p.a = p.uniform(x, x.sym_size(-2));
    if (!p.b.defined()) p.b = p.uniform(y, y.sym_size(-2));
    p.x = p.expanded(p.x, 2);
    p.y = p.expanded(p.y, 2);
    p.a = p.expanded(p.a, 1);
    p.b = p.expanded(p.b, 1);
  }
  return p;
}

OptionalTensor prepare_init(const Prepared& p, const char* argument, const OptionalTensor& init, const Tensor& like) {
  if (!init.has_value()) return std::nullopt;
  const auto atoms = like.sym_size(-1);
  const bool ragged = p.x_offsets.has_value(), takes_batch = p.batched && !ragged;
  TORCH_CHECK_VALUE(is_supported(init->scalar_type()), p.name, ": ", argument, " has dtype ", init->scalar_type(),
                    ", expected float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(init->layout() == at::kStrided, p.name, ": ", argument, " has layout ", init->layout(),
                    ", expected a dense tensor");
  TORCH_CHECK_VALUE(init->device() == p.x.device(), p.name, ": ", argument, " is on ", init->device(), ", expected ",
                    p.x.device());
  if (takes_batch) {
    TORCH_CHECK_VALUE(
        (init->dim() == 1 || (init->dim() == 2 && init->sym_size(0) == p.batch)) && init->sym_size(-1) == atoms, p.name,
        ": ", argument, " has shape ", init->sym_sizes(), ", expected (", p.batch, ", ", atoms,
        "), as the weights, or (", atoms, ",) for all problems");
  } else {
    TORCH_CHECK_VALUE(init->dim() == 1 && init->sym_size(0) == atoms, p.name, ": ", argument, " has shape ",
                      init->sym_sizes(), ", expected (", atoms, ",), as the weights");
  }
  return ragged ? init->detach() : p.expanded(init->detach(), 1);
}

Tensor reduce(const char* name, const Tensor& value, std::string_view reduction) {
  if (reduction == "none") return value;
  if (reduction == "sum") return value.sum();
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "batchmean", name, ": reduction is \"", reduction,
                    R"(", expected "none", "sum", "mean" or "batchmean")");
  // Not mean(): that of no problems is NaN.
  return TORCH_GUARD_OR_FALSE(value.sym_numel().sym_eq(0)) ? value.sum() : value.mean();
}

using Divergence = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Divergence sinkhorn_divergence(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                               std::string_view cost, const OptionalTensor& eps, std::optional<double> blur,
                               at::ArrayRef<double> rho, at::ArrayRef<double> reach, bool debias, double tol,
                               int64_t max_iter, const OptionalTensor& init_g, const OptionalTensor& init_f_aa,
                               const OptionalTensor& init_g_bb, const OptionalTensor& x_offsets,
                               const OptionalTensor& y_offsets, std::string_view reduction) {
  const char* const name = x_offsets.has_value() ? "sinkhorn_ragged" : "sinkhorn_divergence";
  const auto p = prepare(name, x, y, a, b, cost, eps, blur, rho, reach, x_offsets, y_offsets);
  check_stopping(name, tol, max_iter);
  TORCH_CHECK_VALUE(!debias || p.rho_a == p.rho_b, name, ": debias=True with rho ", p.rho_a, " for x and ", p.rho_b,
                    " for y, expected equal ones: with two it is no divergence");
  auto [value, f, g, error, n_iter, converged] =
      solve_op().call(p.x, p.y, p.a, p.b, p.eps, prepare_init(p, "init g", init_g, p.b), tol, max_iter, p.x_offsets,
                      p.y_offsets, p.cost, p.rho_a, p.rho_b);
  auto f_aa = at::empty({0}, f.options()), g_bb = at::empty({0}, g.options());
  if (debias) {
    // The self terms are solved tighter: their error would show as a bias.
    const auto self = [&](const Tensor& points, const Tensor& weight, const OptionalTensor& offsets, double penalty,
                          const OptionalTensor& init) {
      return solve_op().call(points, std::nullopt, weight, std::nullopt, p.eps, init, tol / 10, max_iter, offsets,
                             std::nullopt, p.cost, penalty, penalty);
    };
    const auto [v_a, f_a, g_a, error_a, n_a, converged_a] =
        self(p.x, p.a, p.x_offsets, p.rho_a, prepare_init(p, "init f_aa", init_f_aa, p.a));
    const auto [v_b, f_b, g_b, error_b, n_b, converged_b] =
        self(p.y, p.b, p.y_offsets, p.rho_b, prepare_init(p, "init g_bb", init_g_bb, p.b));
    value = value - (v_a + v_b) / 2;
    if (a.has_value() || b.has_value()) {  // uniform weights have mass 1 on both sides
      const auto mass = [&](const Tensor& weight, const OptionalTensor& offsets) {
        const auto w = weight.to(at::kDouble);
        if (!offsets.has_value()) return w.sum(-1);
        return at::zeros_like(p.eps).index_add(0, Prepared::problem_of(*offsets, w.sym_size(0)), w);
      };
      const auto gap = mass(p.a, p.x_offsets) - mass(p.b, p.y_offsets);
      value = value + p.eps / 2 * gap * gap;
    }
    f_aa = p.without_batch(f_a);
    g_bb = p.without_batch(f_b);
    error = error.maximum(error_a).maximum(error_b);
    converged = converged.logical_and(converged_a).logical_and(converged_b);
  }
  return {reduce(name, p.without_batch(value.to(p.dtype)), reduction),
          p.without_batch(f),
          p.without_batch(g),
          f_aa,
          g_bb,
          p.without_batch(error),
          p.without_batch(n_iter),
          p.without_batch(converged)};
}

Tensors6 sinkhorn(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                  std::string_view cost, const OptionalTensor& eps, std::optional<double> blur,
                  at::ArrayRef<double> rho, at::ArrayRef<double> reach, double tol, int64_t max_iter,
                  const OptionalTensor& init_g) {
  const auto p = prepare("sinkhorn", x, y, a, b, cost, eps, blur, rho, reach, std::nullopt, std::nullopt);
  check_stopping("sinkhorn", tol, max_iter);
  const auto [value, f, g, error, n_iter, converged] =
      solve_op().call(p.x, p.y, p.a, p.b, p.eps, prepare_init(p, "init g", init_g, p.b), tol, max_iter, std::nullopt,
                      std::nullopt, p.cost, p.rho_a, p.rho_b);
  const auto [f_out, g_out] =
      potentials_op().call(p.x, p.y, p.a, p.b, p.eps, f, g, std::nullopt, std::nullopt, p.cost, p.rho_a, p.rho_b);
  return {p.without_batch(value.to(p.dtype)),
          p.without_batch(f_out),
          p.without_batch(g_out),
          p.without_batch(error),
          p.without_batch(n_iter),
          p.without_batch(converged)};
}

Tensors6 sinkhorn_cost(const Tensor& C, const OptionalTensor& a, const OptionalTensor& b, const Tensor& eps,
                       at::ArrayRef<double> rho, double tol, int64_t max_iter, const OptionalTensor& init_g,
                       std::string_view reduction) {
  constexpr const char* name = "sinkhorn_cost";
  Prepared p;
  p.name = name;
  p.cost = kCostMatrix;
  p.check_tensor("C", C, C);
  TORCH_CHECK_VALUE(C.dim() == 2 || C.dim() == 3, name, ": C has shape ", C.sym_sizes(),
                    ", expected (rows, columns) or (batch, rows, columns)");
  TORCH_CHECK_VALUE(C.sym_size(-2) != 0 && C.sym_size(-1) != 0, name, ": C has shape ", C.sym_sizes(),
                    ", expected at least one row and one column");
  if (C.dim() == 3) p.take_batch("C", C);
  p.a = p.weights("a", a, C.sym_size(-2), C);
  p.b = p.weights("b", b, C.sym_size(-1), C);
  p.dtype = C.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  p.x = C.to(p.dtype);
  p.take_rho(rho, {});
  p.take_eps(eps, std::nullopt);
  check_stopping(name, tol, max_iter);
  if (!p.a.defined()) p.a = p.uniform(C, C.sym_size(-2));
  if (!p.b.defined()) p.b = p.uniform(C, C.sym_size(-1));
  p.x = p.expanded(p.x, 2);
  p.a = p.expanded(p.a, 1);
  p.b = p.expanded(p.b, 1);
  const auto [value, f, g, error, n_iter, converged] =
      solve_op().call(p.x, std::nullopt, p.a, p.b, p.eps, prepare_init(p, "init g", init_g, p.b), tol, max_iter,
                      std::nullopt, std::nullopt, p.cost, p.rho_a, p.rho_b);
  return {reduce(name, p.without_batch(value.to(p.dtype)), reduction),
          p.without_batch(f),
          p.without_batch(g),
          p.without_batch(error),
          p.without_batch(n_iter),
          p.without_batch(converged)};
}

// What a result offers beyond its tensors: the plan, its products and <P,C>.
struct Solved : Prepared {
  Tensor f, g;  // (batch, atoms)

  Solved(const char* caller, const Tensor& x_, const Tensor& y_, const OptionalTensor& a_, const OptionalTensor& b_,
         const Tensor& f_, const Tensor& g_, std::string_view cost_, const OptionalTensor& eps_,
         std::optional<double> blur)
      : Prepared(prepare(caller, x_, y_, a_, b_, cost_, eps_, blur, {}, {}, std::nullopt, std::nullopt)),
        f(batched ? f_ : f_.unsqueeze(0)),
        g(batched ? g_ : g_.unsqueeze(0)) {}
};

Tensor sinkhorn_plan(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                     const Tensor& f, const Tensor& g, std::string_view cost, const OptionalTensor& eps,
                     std::optional<double> blur) {
  const Solved s("sinkhorn_plan", x, y, a, b, f, g, cost, eps, blur);
  Tensor costs;
  if (s.cost == kCosine) {
    costs = 1 - s.x.matmul(s.y.mT());
  } else {
    // One dimension after the other: the differences of all are D times the plan.
    Tensor square;
    for (int64_t k = 0; k < s.x.sym_size(-1).guard_int(__FILE__, __LINE__); ++k) {
      const auto term = (s.x.select(-1, k).unsqueeze(-1) - s.y.select(-1, k).unsqueeze(-2)).square();
      square = k == 0 ? term : square + term;
    }
    if (s.cost == kEuclidean) {
      const auto zero = square == 0;
      costs = at::where(zero, 0, at::where(zero, 1, square).sqrt());
    } else {
      costs = s.cost == kSqEuclidean ? square : square / 2;
    }
  }
  const auto eps_ = s.eps.to(s.dtype).unsqueeze(-1).unsqueeze(-1);
  const auto z = (s.f.unsqueeze(-1) + s.g.unsqueeze(-2) - costs) / eps_;
  return s.without_batch(s.a.to(s.dtype).unsqueeze(-1) * s.b.to(s.dtype).unsqueeze(-2) * z.exp());
}

Tensor sinkhorn_apply(const Tensor& v, const Tensor& x, const Tensor& y, const OptionalTensor& a,
                      const OptionalTensor& b, const Tensor& f, const Tensor& g, std::string_view cost,
                      const OptionalTensor& eps, std::optional<double> blur, bool transpose) {
  const Solved s("sinkhorn_apply", x, y, a, b, f, g, cost, eps, blur);
  const auto& atoms = transpose ? f : g;
  const bool is_vector = v.dim() == atoms.dim();
  TORCH_CHECK_VALUE((is_vector || v.dim() == atoms.dim() + 1) &&
                        v.sym_sizes().slice(0, static_cast<size_t>(atoms.dim())) == atoms.sym_sizes(),
                    "sinkhorn_apply: v has shape ", v.sym_sizes(), ", expected ", atoms.sym_sizes(),
                    ", or that and one dimension more");
  s.check_tensor("v", v, x);
  auto columns = is_vector ? v.unsqueeze(-1) : v;
  if (!s.batched) columns = columns.unsqueeze(0);
  const auto out = s.without_batch(plan_op().call(columns, s.x, s.y, s.a, s.b, s.eps, s.f, s.g, transpose, std::nullopt,
                                                  std::nullopt, s.cost, kHard, kHard));
  return is_vector ? out.squeeze(-1) : out;
}

// The points of y averaged over each row of the plan: weights softmax_j(log b_j + (g_j - C_ij)/eps), which exist where
// a_i is 0 and where P_ij underflows.
Tensor sinkhorn_barycentric_projection(const Tensor& x, const Tensor& y, const OptionalTensor& a,
                                       const OptionalTensor& b, const Tensor& f, const Tensor& g, std::string_view cost,
                                       const OptionalTensor& eps, std::optional<double> blur) {
  const Solved s("sinkhorn_barycentric_projection", x, y, a, b, f, g, cost, eps, blur);
  // The f of rows that sum to a_i, from one update. The average does not depend on it: a constant. So is what the
  // solver moves from g to f, which is taken back.
  const auto at_g = s.g.detach(), weight = s.b.detach().to(at::kDouble), mass = weight.sum(-1, true);
  const auto solved =
      solve_op().call(s.x.detach(), s.y.detach(), mass * s.uniform(s.x, s.x.sym_size(-2)), weight, s.eps.detach(), at_g,
                      /*tol=*/0, /*max_iter=*/1, std::nullopt, std::nullopt, s.cost, kHard, kHard);
  const auto& [value, own_f, moved_g, error, n_iter, converged] = solved;
  const auto own = own_f - ((weight * (at_g - moved_g)).sum(-1, true) / mass).to(own_f.scalar_type());
  const auto points = s.expanded(y.to(s.dtype), 2);
  const auto sums =
      plan_op().call(at::cat({points, at::ones_like(points.slice(-1, 0, 1))}, -1), s.x, s.y, at::ones_like(own), s.b,
                     s.eps, own, s.g, /*transpose=*/false, std::nullopt, std::nullopt, s.cost, kHard, kHard);
  return s.without_batch(sums.slice(-1, 0, -1) / sums.slice(-1, -1));
}

Tensor sinkhorn_transport_cost(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b,
                               const Tensor& f, const Tensor& g, std::string_view cost, const OptionalTensor& eps,
                               std::optional<double> blur) {
  using Signature = decltype(marginals_cpu);
  static const auto op = typed_op<Signature>("torch_divergence::_sinkhorn_marginals");
  const auto constant = [](const OptionalTensor& t) {
    return t.has_value() ? OptionalTensor(t->detach()) : std::nullopt;
  };
  const Solved s("sinkhorn_transport_cost", x.detach(), y.detach(), constant(a), constant(b), f.detach(), g.detach(),
                 cost, constant(eps), blur);
  const auto out = op.call(s.x, s.y, s.a, s.b, s.eps, s.f, s.g, std::nullopt, std::nullopt, s.cost, kHard, kHard);
  return s.without_batch(std::get<2>(out).to(s.dtype));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const std::string problem = "Tensor x, Tensor? y, Tensor a, Tensor? b, Tensor eps, ",
                    options = "Tensor? x_offsets, Tensor? y_offsets, int cost, float rho_a, float rho_b",
                    direction = "Tensor? vx, Tensor? vy, Tensor? va, Tensor? vb, Tensor? veps, ",
                    five = "(Tensor, Tensor, Tensor, Tensor, Tensor)",
                    six = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
  m.def(
      "sinkhorn_divergence(Tensor x, Tensor y, Tensor? a=None, Tensor? b=None, *, str cost=\"half_sqeuclidean\", "
      "Tensor? "
      "eps=None, float? blur=None, float[] rho=[], float[] reach=[], bool debias=True, float tol=0.001, int "
      "max_iter=1000, Tensor? init_g=None, Tensor? init_f_aa=None, Tensor? init_g_bb=None, Tensor? x_offsets=None, "
      "Tensor? y_offsets=None, str reduction=\"none\") -> (Tensor value, Tensor f, Tensor g, Tensor f_aa, Tensor g_bb, "
      "Tensor marginal_error, Tensor n_iter, Tensor converged)",
      tags);
  m.def(
      "sinkhorn(Tensor x, Tensor y, Tensor? a=None, Tensor? b=None, *, str cost=\"half_sqeuclidean\", Tensor? "
      "eps=None, "
      "float? blur=None, float[] rho=[], float[] reach=[], float tol=0.001, int max_iter=1000, Tensor? init_g=None) -> "
      "(Tensor value, Tensor f, Tensor g, Tensor marginal_error, Tensor n_iter, Tensor converged)",
      tags);
  m.def(
      "sinkhorn_cost(Tensor C, Tensor? a=None, Tensor? b=None, *, Tensor eps, float[] rho=[], float tol=0.001, int "
      "max_iter=1000, Tensor? init_g=None, str reduction=\"none\") -> (Tensor value, Tensor f, Tensor g, Tensor "
      "marginal_error, Tensor n_iter, Tensor converged)",
      tags);
  const std::string solved =
      "Tensor x, Tensor y, Tensor? a, Tensor? b, Tensor f, Tensor g, *, str cost=\"half_sqeuclidean\", Tensor? "
      "eps=None, "
      "float? blur=None";
  const auto def = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  def("sinkhorn_plan(" + solved + ") -> Tensor");
  def("sinkhorn_apply(Tensor v, " + solved + ", bool transpose=False) -> Tensor");
  def("sinkhorn_barycentric_projection(" + solved + ") -> Tensor");
  def("sinkhorn_transport_cost(" + solved + ") -> Tensor");
  def("_sinkhorn(" + problem + "Tensor? init, float tol, int max_iter, " + options + ") -> " + six);
  def("_sinkhorn_backward(Tensor grad, " + problem + "Tensor f, Tensor g, " + options + ", bool[5] mask) -> " + five);
  def("_sinkhorn_double_backward(" + direction + "Tensor grad, " + problem + "Tensor f, Tensor g, " + options +
      ", bool[6] mask) -> " + six);
  def("_sinkhorn_potentials(" + problem + "Tensor f, Tensor g, " + options + ") -> (Tensor, Tensor)");
  def("_sinkhorn_potentials_backward(Tensor? grad_f, Tensor? grad_g, " + problem + "Tensor f, Tensor g, " + options +
      ", bool[5] mask) -> " + five);
  def("_sinkhorn_potentials_jvp(" + direction + problem + "Tensor f, Tensor g, " + options + ") -> (Tensor, Tensor)");
  def("_sinkhorn_plan(Tensor v, " + problem + "Tensor f, Tensor g, bool transpose, " + options + ") -> Tensor");
  def("_sinkhorn_plan_backward(Tensor grad, Tensor v, " + problem + "Tensor f, Tensor g, bool transpose, " + options +
      ", bool[7] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  def("_sinkhorn_marginals(" + problem + "Tensor f, Tensor g, " + options + ") -> (Tensor, Tensor, Tensor)");
}

namespace {
void register_composites(torch::Library& m) {
  m.impl("sinkhorn_divergence", sinkhorn_divergence);
  m.impl("sinkhorn", sinkhorn);
  m.impl("sinkhorn_cost", sinkhorn_cost);
  m.impl("sinkhorn_plan", sinkhorn_plan);
  m.impl("sinkhorn_apply", sinkhorn_apply);
  m.impl("sinkhorn_barycentric_projection", sinkhorn_barycentric_projection);
  m.impl("sinkhorn_transport_cost", sinkhorn_transport_cost);
}
}  // namespace
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { register_composites(m); }
// A composite operator under vmap meets the slow per-sample fallback before its decomposition.
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { register_composites(m); }
namespace {
// The private operators that are the same on every device.
void register_for_all_devices(torch::Library& m) {
  m.impl("_sinkhorn_double_backward", double_backward);
  m.impl("_sinkhorn_potentials", potentials);
  m.impl("_sinkhorn_potentials_backward", potentials_backward);
  m.impl("_sinkhorn_potentials_jvp", potentials_jvp);
  m.impl("_sinkhorn_plan_backward", plan_backward);
}
}  // namespace
#ifndef TD_CUDA_EMULATED
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) {
  m.impl("_sinkhorn", solve_cpu);
  m.impl("_sinkhorn_backward", backward_cpu);
  m.impl("_sinkhorn_plan", plan_cpu);
  m.impl("_sinkhorn_marginals", marginals_cpu);
  register_for_all_devices(m);
}
#endif
#ifdef TD_CUDA
#ifdef TD_CUDA_EMULATED
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) {
#else
TORCH_LIBRARY_IMPL(torch_divergence, CUDA, m) {
#endif
  m.impl("_sinkhorn", solve_cuda);
  m.impl("_sinkhorn_backward", backward_cuda);
  m.impl("_sinkhorn_plan", plan_cuda);
  m.impl("_sinkhorn_marginals", marginals_cuda);
  register_for_all_devices(m);
}
#endif
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) {
  m.impl("_sinkhorn", solve_meta);
  m.impl("_sinkhorn_backward", backward_meta);
  m.impl("_sinkhorn_double_backward", double_backward_meta);
  m.impl("_sinkhorn_potentials", potentials_meta);
  m.impl("_sinkhorn_potentials_backward", potentials_backward_meta);
  m.impl("_sinkhorn_potentials_jvp", potentials_jvp_meta);
  m.impl("_sinkhorn_plan", plan_meta);
  m.impl("_sinkhorn_plan_backward", plan_backward_meta);
  m.impl("_sinkhorn_marginals", marginals_meta);
}
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) {
  m.impl("_sinkhorn", solve_autograd);
  m.impl("_sinkhorn_backward", backward_autograd);
  m.impl("_sinkhorn_potentials", potentials_autograd);
  m.impl("_sinkhorn_plan", plan_autograd);
  // No further: asked for, PyTorch says that the derivative is not implemented.
  for (const char* name : {"_sinkhorn_double_backward", "_sinkhorn_potentials_backward", "_sinkhorn_potentials_jvp",
                           "_sinkhorn_plan_backward", "_sinkhorn_marginals"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace torch_divergence
