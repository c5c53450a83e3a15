// The operators and autograd Functions of a divergence D between two distributions P and Q, row by row. What makes a
// divergence is its kernels and one formula; the rest is the same for each and stands here:
//
//   _x                  rows of loss and their statistics              (differentiable: Value)
//   _x_backward         gradients of either side, or both              (differentiable: Gradient)
//   _x_double_backward  along (v_p, v_q); differentiated as a composite of ATen operators
//   _x_value_and_grad   loss and one side's gradient in one visit to memory, where nothing else can be asked
//   inplace_loss        the same, over the input's own storage
//
// The trailing arguments of each, O..., are the divergence's static options: p_space, q_space, temperature and what it
// has beyond them. D provides (see KlDivOps in kl_div/kl_div.cpp):
//
//   name                                      of the public operator
//   kValueNode, kGradientNode, ...            names that grad_fn shows
//   Rows, kStatSize, kLossStat                kernel argument, doubles a row, which of them is the loss
//   kStoresHalf                               value_and_grad is worth it for a gradient of a half type
//   rows(p, q, O...) -> Rows
//   forward_kernel() ...                      of the processor at hand
//   cuda_kernel(call), cuda_workspace(...)    where there are CUDA kernels: see run_on_cuda() in core/cuda_tensors.h
//   double_backward_composite(...)            the double backward in ATen operators, for derivatives beyond the second
#pragma once
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "core/apply.h"
#include "core/checks.h"
#include "core/cuda_tensors.h"
#include "core/gradient_buffer.h"
#include "core/inplace_gradient.h"
#include "core/large_tensor.h"
#include "core/op.h"
#include "core/reduction.h"
#include "core/row_layout.h"
#include "core/row_operator.h"
#include "core/row_pair.h"

namespace torch_divergence {

// What the public operators make of their arguments: both with the classes last, all checked.
struct CheckedPair {
  Tensor input, target;
  SpaceCode input_space, target_space;
  RowReduction reduction;
};
CheckedPair checked_pair(const char* name, const Tensor& input, const Tensor& target, std::string_view space,
                         std::optional<std::string_view> target_space, double temperature, int64_t dim,
                         const OptionalTensor& row_weight, std::string_view reduction,
                         const OptionalTensor& normalizer);

template <class D, class... O>
class RowDivergence {
  using AutogradContext = torch::autograd::AutogradContext;
  using Variable = torch::autograd::Variable;
  using variable_list = torch::autograd::variable_list;
  using Rows = typename D::Rows;
  using Options = SavedOptions<O...>;
  using Mask2 = std::array<bool, 2>;
  using Mask3 = std::array<bool, 3>;

 public:
  // -- The private operators, called through the dispatcher ---------------------------------------------------------

  static Tensors2 rows(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, O... options) {
    static const auto op = typed_op<decltype(rows)>(operator_name("").c_str());
    return op.call(p, q, row_weight, options...);
  }
  static Tensors2 backward(const Tensor& grad, const Tensor& p, const Tensor& q, const Tensor& stat, O... options,
                           Mask2 mask) {
    static const auto op = typed_op<decltype(backward)>(operator_name("_backward").c_str());
    return op.call(grad, p, q, stat, options..., mask);
  }
  static Tensors3 double_backward(const OptionalTensor& v_p, const OptionalTensor& v_q, const Tensor& grad,
                                  const Tensor& p, const Tensor& q, const Tensor& stat, O... options, Mask3 mask) {
    static const auto op = typed_op<decltype(double_backward)>(operator_name("_double_backward").c_str());
    return op.call(v_p, v_q, grad, p, q, stat, options..., mask);
  }
  static Tensors3 value_and_grad(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, O... options,
                                 double scale, double incoming, bool wrt_q) {
    static const auto op = typed_op<decltype(value_and_grad)>(operator_name("_value_and_grad").c_str());
    return op.call(p, q, row_weight, options..., scale, incoming, wrt_q);
  }

  // -- CPU and CUDA -------------------------------------------------------------------------------------------------

  static Tensors2 rows_dense(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, O... options) {
    const auto weight = checked_weight(D::name, row_weight);
    auto loss = at::empty(p.sizes().slice(0, p.dim() - 1), p.options().dtype(loss_dtype(p, q)));
    auto stat = empty_stat(p, D::kStatSize);
    const RowPairForward<Rows> call{D::rows(p, q, options...), data_or_null(weight), loss.mutable_data_ptr(),
                                    loss.scalar_type() == at::kDouble, stat.template mutable_data_ptr<double>()};
    run(D::forward_kernel(), call, loss.numel(), p);
    return {std::move(loss), std::move(stat)};
  }

  static Tensors2 backward_dense(const Tensor& grad, const Tensor& p, const Tensor& q, const Tensor& stat, O... options,
                                 Mask2 mask) {
    const auto statistics = stat.contiguous();
    auto grad_p = mask[0] ? empty_like_large(p) : nothing_like(p);
    auto grad_q = mask[1] ? empty_like_large(q) : nothing_like(q);
    if (mask[0] || mask[1])
      gradient_into(contiguous_double(grad), p, q, statistics, options..., mask[0] ? rows_out(grad_p) : RowsOut{},
                    mask[1] ? rows_out(grad_q) : RowsOut{});
    return {std::move(grad_p), std::move(grad_q)};
  }

  static Tensors3 double_backward_dense(const OptionalTensor& v_p, const OptionalTensor& v_q, const Tensor& grad,
                                        const Tensor& p, const Tensor& q, const Tensor& stat, O... options,
                                        Mask3 mask) {
    const auto coefficient = contiguous_double(grad), statistics = stat.contiguous();
    auto d_coefficient = at::empty(mask[0] ? grad.sizes() : at::IntArrayRef{0}, grad.options().dtype(at::kDouble));
    auto d_p = mask[1] ? empty_like_large(p) : nothing_like(p);
    auto d_q = mask[2] ? empty_like_large(q) : nothing_like(q);
    const RowPairDoubleBackward<Rows> call{D::rows(p, q, options...),
                                           v_p.has_value() ? rows_in(*v_p) : RowsIn{},
                                           v_q.has_value() ? rows_in(*v_q) : RowsIn{},
                                           coefficient.template const_data_ptr<double>(),
                                           statistics.template const_data_ptr<double>(),
                                           mask[0] ? d_coefficient.template mutable_data_ptr<double>() : nullptr,
                                           mask[1] ? rows_out(d_p) : RowsOut{},
                                           mask[2] ? rows_out(d_q) : RowsOut{}};
    run(D::double_backward_kernel(), call, coefficient.numel(), p);
    return {d_coefficient.to(grad.scalar_type()), std::move(d_p), std::move(d_q)};
  }

  static Tensors3 value_and_grad_dense(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, O... options,
                                       double scale, double incoming, bool wrt_q) {
    auto gradient = empty_like_large(wrt_q ? q : p);
    auto [loss, stat] = value_and_grad_into(gradient, p, q, row_weight, options..., scale, incoming, wrt_q);
    return {std::move(loss), std::move(stat), std::move(gradient)};
  }

  // -- Meta ---------------------------------------------------------------------------------------------------------

  static Tensors2 rows_meta(const Tensor& p, const Tensor& q, const OptionalTensor& /*row_weight*/, O...) {
    c10::SymDimVector stat(p.sym_sizes().begin(), p.sym_sizes().end());
    stat.back() = D::kStatSize;
    return {at::empty_symint(p.sym_sizes().slice(0, p.dim() - 1), p.options().dtype(loss_dtype(p, q))),
            at::empty_symint(stat, p.options().dtype(at::kDouble))};
  }
  static Tensors2 backward_meta(const Tensor&, const Tensor& p, const Tensor& q, const Tensor&, O..., Mask2 mask) {
    return {mask[0] ? at::empty_like(p) : nothing_like(p), mask[1] ? at::empty_like(q) : nothing_like(q)};
  }
  static Tensors3 double_backward_meta(const OptionalTensor&, const OptionalTensor&, const Tensor& grad,
                                       const Tensor& p, const Tensor& q, const Tensor&, O..., Mask3 mask) {
    return {mask[0] ? at::empty_symint(grad.sym_sizes(), grad.options()) : nothing_like(grad),
            mask[1] ? at::empty_like(p) : nothing_like(p), mask[2] ? at::empty_like(q) : nothing_like(q)};
  }
  static Tensors3 value_and_grad_meta(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, O... options,
                                      double, double, bool wrt_q) {
    auto [loss, stat] = rows_meta(p, q, row_weight, options...);
    return {at::empty({}, loss.options()), std::move(stat), at::empty_like(wrt_q ? q : p)};
  }

  // -- Autograd -----------------------------------------------------------------------------------------------------

  struct Value : torch::autograd::Function<Value> {
    static constexpr const char* name = D::kValueNode;
    static constexpr bool is_traceable = true;

    static variable_list forward(AutogradContext* ctx, const Variable& p, const Variable& q,
                                 const OptionalTensor& row_weight, O... options) {
      auto [loss, stat] = rows(p, q, row_weight, options...);
      ctx->save_for_backward({p, q, stat, row_weight.value_or(Tensor())});
      Options::pack(ctx, options...);
      ctx->mark_non_differentiable({stat});
      ctx->set_materialize_grads(false);
      return {loss, stat};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
      variable_list result(3 + sizeof...(O));
      if (!incoming[0].defined()) return result;
      const auto s = ctx->get_saved_variables();
      const Mask2 mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
      auto [gp, gq] = Options::with(ctx, [&](O... options) {
        return RowDivergence::backward(weighted(incoming[0], s[3]), s[0], s[1], s[2], options..., mask);
      });
      result[0] = undefined_unless(mask[0], gp);
      result[1] = undefined_unless(mask[1], gq);
      return result;
    }
    static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
      const OptionalTensor weight = in.size() > 2 ? if_defined(in[2]) : std::nullopt;
      return Options::with(ctx, [&](O... options) -> variable_list {
        const auto [loss, stat] = rows(in[0], in[1], weight, options...);
        const Mask2 mask{tangents[0].defined(), tangents[1].defined()};
        // Widened: a gradient in a half type would leave the tangent no better than that type.
        const auto type = loss.scalar_type();
        const auto [gp, gq] = RowDivergence::backward(weighted(at::ones_like(loss), weight.value_or(Tensor())),
                                                      in[0].to(type), in[1].to(type), stat, options..., mask);
        auto tangent = at::zeros_like(loss);
        const auto along = [&](const Tensor& g, const Tensor& v) { tangent = tangent + (g * v.to(type)).sum(-1); };
        if (mask[0]) along(gp, tangents[0]);
        if (mask[1]) along(gq, tangents[1]);
        return {tangent, Tensor()};
      });
    }
  };

  // The gradient is linear in the incoming one, and its Jacobian in (p, q) is symmetric: both derivatives of it are the
  // double backward. The statistics are a function of p and q; the derivatives here are total ones.
  struct Gradient : torch::autograd::Function<Gradient> {
    static constexpr const char* name = D::kGradientNode;
    static constexpr bool is_traceable = true;

    static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable& p, const Variable& q,
                                 const Variable& stat, O... options, Mask2 mask) {
      auto [gp, gq] = RowDivergence::backward(grad, p, q, stat, options..., mask);
      ctx->save_for_backward({grad, p, q, stat});
      Options::pack(ctx, options...);
      ctx->saved_data["mask_p"] = mask[0];
      ctx->saved_data["mask_q"] = mask[1];
      ctx->set_materialize_grads(false);
      return {gp, gq};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& v) {
      variable_list result(5 + sizeof...(O));
      const auto s = ctx->get_saved_variables();
      const Mask3 mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
      const auto v_p = undefined_unless(ctx->saved_data["mask_p"].toBool(), v[0]),
                 v_q = undefined_unless(ctx->saved_data["mask_q"].toBool(), v[1]);
      if (!v_p.defined() && !v_q.defined()) return result;
      auto [d_grad, d_p, d_q] = along(ctx, v_p, v_q, s, mask);
      result[0] = undefined_unless(mask[0], d_grad);
      result[1] = undefined_unless(mask[1], d_p);
      result[2] = undefined_unless(mask[2], d_q);
      return result;
    }
    static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
      const Mask2 mask{ctx->saved_data["mask_p"].toBool(), ctx->saved_data["mask_q"].toBool()};
      Tensor tangent_p, tangent_q;
      if (tangents[1].defined() || tangents[2].defined())
        std::tie(std::ignore, tangent_p, tangent_q) =
            along(ctx, tangents[1], tangents[2], in, {false, mask[0], mask[1]});
      if (tangents[0].defined()) {
        const auto [gp, gq] = Options::with(ctx, [&](O... options) {
          return RowDivergence::backward(tangents[0], in[1], in[2], in[3], options..., mask);
        });
        tangent_p = tangent_p.defined() ? tangent_p + gp : gp;
        tangent_q = tangent_q.defined() ? tangent_q + gq : gq;
      }
      return {undefined_unless(mask[0], tangent_p), undefined_unless(mask[1], tangent_q)};
    }

   private:
    // s: grad, p, q, stat
    static Tensors3 along(AutogradContext* ctx, const Tensor& v_p, const Tensor& v_q, const variable_list& s,
                          Mask3 mask) {
      return Options::with(ctx, [&](O... options) {
        return double_backward(if_defined(v_p), if_defined(v_q), s[0], s[1], s[2], s[3], options..., mask);
      });
    }
  };

  // The stored gradient is the one for `incoming`; where another comes, see core/gradient_buffer.h.
  struct ValueAndGradient : torch::autograd::Function<ValueAndGradient> {
    static constexpr const char* name = D::kValueAndGradientNode;
    static constexpr bool is_traceable = true;

    static variable_list forward(AutogradContext* ctx, const Variable& p, const Variable& q,
                                 const OptionalTensor& row_weight, O... options, double scale, double incoming,
                                 bool wrt_q) {
      auto [loss, stat, gradient] = value_and_grad(p, q, row_weight, options..., scale, incoming, wrt_q);
      ctx->save_for_backward({p, q, stat, gradient, row_weight.value_or(Tensor())});
      Options::pack(ctx, options...);
      ctx->saved_data["scale"] = scale;
      ctx->saved_data["incoming"] = incoming;
      ctx->saved_data["wrt_q"] = wrt_q;
      ctx->mark_non_differentiable({stat, gradient});
      // Or backward is handed zeros as large as the gradient for the output that nobody differentiates.
      ctx->set_materialize_grads(false);
      return {loss, stat, gradient};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
      variable_list result(6 + sizeof...(O));
      const auto& g = incoming[0];
      if (!g.defined()) return result;
      auto s = ctx->get_saved_variables();
      const double scale = ctx->saved_data["scale"].toDouble();
      const bool wrt_q = ctx->saved_data["wrt_q"].toBool();
      const Mask2 mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
      if (at::GradMode::is_enabled() || mask[wrt_q ? 0 : 1] || at::isTensorSubclassLike(g) ||
          at::areAnyTensorSubclassLike(s)) {
        const auto each = (g * scale).expand_symint(s[0].sym_sizes().slice(0, s[0].dim() - 1));
        auto [gp, gq] = Options::with(ctx, [&](O... options) {
          // A visit that stores one side's gradient need not leave what the other's takes.
          const auto stat = mask[wrt_q ? 0 : 1] ? std::get<1>(rows(s[0], s[1], if_defined(s[4]), options...)) : s[2];
          return RowDivergence::backward(weighted(each, s[4]), s[0], s[1], stat, options..., mask);
        });
        result[0] = undefined_unless(mask[0], gp);
        result[1] = undefined_unless(mask[1], gq);
        return result;
      }
      Tensor gradient = std::move(s[3]);
      s[3] = Tensor();
      result[wrt_q ? 1 : 0] = hand_over(
          std::move(gradient), ctx->saved_data["incoming"].toDouble(), g.item().toDouble(), expected_gradient(),
          [&](double needed) {
            return Options::with(ctx, [&](O... options) {
              return std::get<2>(value_and_grad(s[0], s[1], if_defined(s[4]), options..., scale, needed, wrt_q));
            });
          });
      return result;
    }
    static variable_list jvp(AutogradContext*, const variable_list&, const variable_list&) {
      TORCH_INTERNAL_ASSERT(false, D::name, ": value_and_grad is not chosen where there is a tangent");
    }
  };

  static Tensors2 rows_autograd(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight, O... options) {
    auto v = apply<Value>(p, q, row_weight, options...);
    return {v[0], v[1]};
  }
  static Tensors2 backward_autograd(const Tensor& grad, const Tensor& p, const Tensor& q, const Tensor& stat,
                                    O... options, Mask2 mask) {
    auto v = apply<Gradient>(grad, p, q, stat, options..., mask);
    return {v[0], v[1]};
  }
  static Tensors3 double_backward_autograd(const OptionalTensor& v_p, const OptionalTensor& v_q, const Tensor& grad,
                                           const Tensor& p, const Tensor& q, const Tensor& stat, O... options,
                                           Mask3 mask) {
    if (is_differentiated(v_p.value_or(Tensor()), v_q.value_or(Tensor()), grad, p, q))
      return D::double_backward_composite(v_p, v_q, grad, p, q, options..., mask);
    const at::AutoDispatchBelowADInplaceOrView below;
    return double_backward(v_p, v_q, grad, p, q, stat, options..., mask);
  }
  static Tensors3 value_and_grad_autograd(const Tensor& p, const Tensor& q, const OptionalTensor& row_weight,
                                          O... options, double scale, double incoming, bool wrt_q) {
    auto v = apply<ValueAndGradient>(p, q, row_weight, options..., scale, incoming, wrt_q);
    return {v[0], v[1], v[2]};
  }

  // -- The public operators' way from rows to the loss --------------------------------------------------------------

  static Tensor loss(const Tensor& p, const Tensor& q, const RowReduction& reduction, O... options) {
    const bool wrt_p = p.requires_grad(), wrt_q = q.requires_grad();
    const auto plain = [](const OptionalTensor& t) { return !t.has_value() || is_plain_eager(*t); };
    const auto& own = wrt_q ? q : p;
    // Training at memory speed.
    if (reduction.reduces() && at::GradMode::is_enabled() && wrt_p != wrt_q && (D::kStoresHalf || !is_half(own)) &&
        is_plain_eager(p) && is_plain_eager(q) && !is_for_cuda(p) && plain(reduction.weight()) &&
        plain(reduction.normalizer()))
      return std::get<0>(value_and_grad(p, q, reduction.weight(), options..., reduction.scale(),
                                        expected_gradient().next(own), wrt_q));
    return reduction(std::get<0>(rows(p, q, reduction.weight(), options...)));
  }

  // input and target as the caller gave them; input_is_q tells which side of (p, q) input is, dim its class dimension.
  static Tensor inplace_loss(Tensor& input, const Tensor& target, int64_t dim, const Tensor& p_, const Tensor& q_,
                             bool input_is_q, const RowReduction& reduction, O... options) {
    TORCH_CHECK_VALUE(reduction.reduces(), D::name,
                      ": inplace_grad=True with reduction=\"none\", expected a reduced loss");
    check_inplace_gradient(D::name, input, target);

    const at::AutoDispatchBelowADInplaceOrView below;
    const auto weight = reduction.weight();
    const double scale = reduction.scale();
    const auto p = p_.detach(), q = q_.detach();
    const auto own = input_is_q ? q : p;
    const auto row_factor = [scale, weight](const Tensor& stat, const Tensor& g) {
      return weighted((g * scale).expand(stat.sizes().slice(0, stat.dim() - 1)), weight.value_or(Tensor()));
    };
    Tensor value, stat, target_gradient;
    std::function<void(Tensor&, const Tensor&)> finish;
    if (is_half(own) || target.requires_grad()) {
      std::tie(value, stat) = rows(p, q, weight, options...);
      value = value.sum() * scale;
    }
    if (target.requires_grad()) {
      // Not rounded to half before it meets the incoming gradient.
      const auto wide = [](const Tensor& t) { return is_half(t) ? t.to(at::kFloat) : t; };
      auto [gp, gq] = backward(row_factor(stat, at::ones_like(value)), input_is_q ? wide(p) : p,
                               input_is_q ? q : wide(q), stat, options..., {input_is_q, !input_is_q});
      target_gradient = (input_is_q ? gp : gq).movedim(-1, dim);
    }
    if (is_half(own)) {
      // The gradient needs the incoming one before it is rounded to half: it is written by backward.
      finish = [=](Tensor&, const Tensor& g) {
        gradient_into(contiguous_double(row_factor(stat, g)), p, q, stat, options...,
                      input_is_q ? RowsOut{} : rows_out(own), input_is_q ? rows_out(own) : RowsOut{});
      };
    } else {
      std::tie(value, stat) = value_and_grad_into(own, p, q, weight, options..., scale, 1, input_is_q);
      finish = scale_gradient_;
    }
    return attach_inplace_gradient(D::name, std::move(value), input, target, std::move(target_gradient),
                                   std::move(finish));
  }

  // -- Registration -------------------------------------------------------------------------------------------------

  // options: O... in the schema's words, e.g. "int p_space, int q_space, float temperature"
  static void define(torch::Library& m, const std::string& options) {
    const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
    const auto def = [&](const char* suffix, const std::string& before, const std::string& after) {
      const auto schema = private_name(suffix) + "(" + before + ", " + options + after;
      m.def(schema.c_str(), tags);
    };
    def("", "Tensor p, Tensor q, Tensor? row_weight", ") -> (Tensor, Tensor)");
    def("_backward", "Tensor grad, Tensor p, Tensor q, Tensor stat", ", bool[2] mask) -> (Tensor, Tensor)");
    def("_double_backward", "Tensor? gg_p, Tensor? gg_q, Tensor grad, Tensor p, Tensor q, Tensor stat",
        ", bool[3] mask) -> (Tensor, Tensor, Tensor)");
    def("_value_and_grad", "Tensor p, Tensor q, Tensor? row_weight",
        ", float scale, float incoming, bool wrt_q) -> (Tensor, Tensor, Tensor)");
  }
  static void register_cpu(torch::Library& m) {
    m.impl(private_name("").c_str(), &rows_dense);
    m.impl(private_name("_backward").c_str(), &backward_dense);
    m.impl(private_name("_double_backward").c_str(), &double_backward_dense);
    m.impl(private_name("_value_and_grad").c_str(), &value_and_grad_dense);
  }
  // Not _value_and_grad: what a GPU holds of a row does not stay in its caches until the gradient.
  static void register_cuda(torch::Library& m) {
    m.impl(private_name("").c_str(), &rows_dense);
    m.impl(private_name("_backward").c_str(), &backward_dense);
    m.impl(private_name("_double_backward").c_str(), &double_backward_dense);
  }
  static void register_meta(torch::Library& m) {
    m.impl(private_name("").c_str(), &rows_meta);
    m.impl(private_name("_backward").c_str(), &backward_meta);
    m.impl(private_name("_double_backward").c_str(), &double_backward_meta);
    m.impl(private_name("_value_and_grad").c_str(), &value_and_grad_meta);
  }
  static void register_autograd(torch::Library& m) {
    m.impl(private_name("").c_str(), &rows_autograd);
    m.impl(private_name("_backward").c_str(), &backward_autograd);
    m.impl(private_name("_double_backward").c_str(), &double_backward_autograd);
    m.impl(private_name("_value_and_grad").c_str(), &value_and_grad_autograd);
  }

 private:
  static ExpectedGradient& expected_gradient() {
    static ExpectedGradient expected;
    return expected;
  }
  static std::string private_name(const char* suffix) { return std::string("_") + D::name + suffix; }
  static std::string operator_name(const char* suffix) { return "torch_divergence::" + private_name(suffix); }

  template <class Kernel, class Call>
  static void run(Kernel kernel, const Call& call, int64_t rows, [[maybe_unused]] const Tensor& p) {
#ifdef TD_CUDA
    if constexpr (requires { D::cuda_kernel(call); })
      if (is_for_cuda(p)) return run_on_cuda(D::cuda_kernel(call), call, rows, D::cuda_workspace(rows, p.size(-1)), p);
#endif
    parallel_rows(rows, call.rows.classes,
                  [&](int64_t begin, int64_t end, ForEach columns) { kernel(call, begin, end, columns); });
  }

  static void gradient_into(const Tensor& coefficient, const Tensor& p, const Tensor& q, const Tensor& stat,
                            O... options, const RowsOut& grad_p, const RowsOut& grad_q) {
    const RowPairBackward<Rows> call{D::rows(p, q, options...), coefficient.template const_data_ptr<double>(),
                                     stat.template const_data_ptr<double>(), grad_p, grad_q};
    run(D::backward_kernel(), call, coefficient.numel(), p);
  }

  // loss and stat of one visit that leaves the gradient in `gradient`, which may be the storage of its own side.
  static Tensors2 value_and_grad_into(const Tensor& gradient, const Tensor& p, const Tensor& q,
                                      const OptionalTensor& row_weight, O... options, double scale, double incoming,
                                      bool wrt_q) {
    const auto weight = checked_weight(D::name, row_weight);
    auto stat = empty_stat(p, D::kStatSize);
    const int64_t count = row_count(p);
    const double* const w = data_or_null(weight);
    double* const s = stat.template mutable_data_ptr<double>();
    const RowPairValueAndGrad<Rows> call{D::rows(p, q, options...), w, scale * incoming, s, wrt_q, rows_out(gradient)};
    run(D::value_and_grad_kernel(), call, count, p);
    auto value = at::empty({}, p.options().dtype(loss_dtype(p, q)));
    write_loss(value, scale * weighted_sum(w, s + D::kLossStat, D::kStatSize, count));
    return {std::move(value), std::move(stat)};
  }
};

}  // namespace torch_divergence
