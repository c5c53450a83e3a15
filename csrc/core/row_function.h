// The operators and autograd Functions of a loss L of one distribution a row, with at most one constant tensor beside
// it (class labels): the counterpart of row_divergence.h for a single differentiable tensor.
//
//   _x                  rows of loss and their statistics              (differentiable: Value)
//   _x_backward         the gradient                                   (differentiable: Gradient)
//   _x_double_backward  along v; differentiated as a composite of ATen operators
//   _x_value_and_grad   loss and gradient in one visit to memory, where nothing else can be asked   } only if L has a
//   inplace_loss        the same, over the input's own storage                                      } kernel for it
//
// L provides (see csrc/entropy/entropy.cpp and csrc/cross_entropy/cross_entropy.cpp):
//
//   name, op                                  of the public and of the private operators
//   kValueNode, kGradientNode, ...            names that grad_fn shows
//   Rows, kStatSize, kLossStat                kernel argument, doubles a row, which of them is the loss
//   rows(x, constants..., options...) -> Rows
//   ready(constant) -> constant               as the kernels read it
//   check(ready, x, used)                     of its values where used[row] is not 0 (null: everywhere); on the CPU
//   forward_kernel() ...                      of the processor at hand
//   cuda_kernel(call), cuda_workspace(...)    where there are CUDA kernels: see run_on_cuda() in core/cuda_tensors.h
//   double_backward_composite(...)            the double backward in ATen operators, for derivatives beyond the second
#pragma once
#include "core/row_divergence.h"
#include "core/single_row.h"

namespace torch_divergence {

template <class... T>
struct Types {};

template <class L, class Constants, class Options>
class RowFunction;

// C... is const Tensor& once or not at all.
template <class L, class... C, class... O>
class RowFunction<L, Types<C...>, Types<O...>> {
  static_assert(sizeof...(C) <= 1);
  using AutogradContext = torch::autograd::AutogradContext;
  using Variable = torch::autograd::Variable;
  using variable_list = torch::autograd::variable_list;
  using Rows = typename L::Rows;
  using Options = SavedOptions<O...>;
  using Mask2 = std::array<bool, 2>;
  static constexpr size_t kConstants = sizeof...(C);

 public:
  // -- The private operators, called through the dispatcher ---------------------------------------------------------

  static Tensors2 rows(const Tensor& x, C... constant, const OptionalTensor& row_weight, O... options) {
    static const auto op = typed_op<decltype(rows)>(operator_name("").c_str());
    return op.call(x, constant..., row_weight, options...);
  }
  static Tensor backward(const Tensor& grad, const Tensor& x, C... constant, const Tensor& stat, O... options) {
    static const auto op = typed_op<decltype(backward)>(operator_name("_backward").c_str());
    return op.call(grad, x, constant..., stat, options...);
  }
  static Tensors2 double_backward(const Tensor& v, const Tensor& grad, const Tensor& x, C... constant,
                                  const Tensor& stat, O... options, Mask2 mask) {
    static const auto op = typed_op<decltype(double_backward)>(operator_name("_double_backward").c_str());
    return op.call(v, grad, x, constant..., stat, options..., mask);
  }
  static Tensors3 value_and_grad(const Tensor& x, C... constant, const OptionalTensor& row_weight, O... options,
                                 double scale, double incoming) {
    static const auto op = typed_op<decltype(value_and_grad)>(operator_name("_value_and_grad").c_str());
    return op.call(x, constant..., row_weight, options..., scale, incoming);
  }

  // -- CPU and CUDA -------------------------------------------------------------------------------------------------

  static Tensors2 rows_dense(const Tensor& x, C... constant, const OptionalTensor& row_weight, O... options) {
    const auto weight = checked_weight(L::name, row_weight);
    const double* const w = data_or_null(weight);
    auto loss = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(loss_dtype(x, x)));
    auto stat = empty_stat(x, L::kStatSize);
    with_ready(
        [&](const auto&... ready) {
          const SingleRowForward<Rows> call{L::rows(x, ready..., options...), w, loss.mutable_data_ptr(),
                                            loss.scalar_type() == at::kDouble,
                                            stat.template mutable_data_ptr<double>()};
          run(L::forward_kernel(), call, loss.numel(), x);
        },
        x, w, constant...);
    return {std::move(loss), std::move(stat)};
  }

  static Tensor backward_dense(const Tensor& grad, const Tensor& x, C... constant, const Tensor& stat, O... options) {
    auto out = empty_like_large(x);
    gradient_into(contiguous_double(grad), x, constant..., stat.contiguous(), options..., rows_out(out));
    return out;
  }

  static Tensors2 double_backward_dense(const Tensor& v, const Tensor& grad, const Tensor& x, C... constant,
                                        const Tensor& stat, O... options, Mask2 mask) {
    const auto coefficient = contiguous_double(grad), statistics = stat.contiguous();
    auto d_coefficient = at::empty(mask[0] ? grad.sizes() : at::IntArrayRef{0}, grad.options().dtype(at::kDouble));
    auto d_x = mask[1] ? empty_like_large(x) : nothing_like(x);
    with_ready(
        [&](const auto&... ready) {
          const SingleRowDoubleBackward<Rows> call{
              L::rows(x, ready..., options...),
              rows_in(v),
              coefficient.template const_data_ptr<double>(),
              statistics.template const_data_ptr<double>(),
              mask[0] ? d_coefficient.template mutable_data_ptr<double>() : nullptr,
              mask[1] ? rows_out(d_x) : RowsOut{}};
          run(L::double_backward_kernel(), call, coefficient.numel(), x);
        },
        x, coefficient.template const_data_ptr<double>(), constant...);
    return {d_coefficient.to(grad.scalar_type()), std::move(d_x)};
  }

  static Tensors3 value_and_grad_dense(const Tensor& x, C... constant, const OptionalTensor& row_weight, O... options,
                                       double scale, double incoming) {
    auto gradient = empty_like_large(x);
    auto [loss, stat] = value_and_grad_into(gradient, x, constant..., row_weight, options..., scale, incoming);
    return {std::move(loss), std::move(stat), std::move(gradient)};
  }

  // -- Meta ---------------------------------------------------------------------------------------------------------

  static Tensors2 rows_meta(const Tensor& x, C..., const OptionalTensor& /*row_weight*/, O...) {
    c10::SymDimVector stat(x.sym_sizes().begin(), x.sym_sizes().end());
    stat.back() = L::kStatSize;
    return {at::empty_symint(x.sym_sizes().slice(0, x.dim() - 1), x.options().dtype(loss_dtype(x, x))),
            at::empty_symint(stat, x.options().dtype(at::kDouble))};
  }
  static Tensor backward_meta(const Tensor&, const Tensor& x, C..., const Tensor&, O...) { return at::empty_like(x); }
  static Tensors2 double_backward_meta(const Tensor&, const Tensor& grad, const Tensor& x, C..., const Tensor&, O...,
                                       Mask2 mask) {
    return {mask[0] ? at::empty_symint(grad.sym_sizes(), grad.options()) : nothing_like(grad),
            mask[1] ? at::empty_like(x) : nothing_like(x)};
  }
  static Tensors3 value_and_grad_meta(const Tensor& x, C... constant, const OptionalTensor& row_weight, O... options,
                                      double, double) {
    auto [loss, stat] = rows_meta(x, constant..., row_weight, options...);
    return {at::empty({}, loss.options()), std::move(stat), at::empty_like(x)};
  }

  // -- Autograd -----------------------------------------------------------------------------------------------------

  struct Value : torch::autograd::Function<Value> {
    static constexpr const char* name = L::kValueNode;
    static constexpr bool is_traceable = true;

    static variable_list forward(AutogradContext* ctx, const Variable& x, C... constant,
                                 const OptionalTensor& row_weight, O... options) {
      auto [loss, stat] = rows(x, constant..., row_weight, options...);
      ctx->save_for_backward({x, stat, row_weight.value_or(Tensor()), constant...});
      Options::pack(ctx, options...);
      ctx->mark_non_differentiable({stat});
      ctx->set_materialize_grads(false);
      return {loss, stat};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
      variable_list result(2 + kConstants + sizeof...(O));
      if (!incoming[0].defined()) return result;
      const auto s = ctx->get_saved_variables();
      result[0] = with_all(ctx, s, 3, [&](auto call) { return call(weighted(incoming[0], s[2]), s[0], s[1]); });
      return result;
    }
    static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
      // in: x, the constants, and the weight where there is one
      const OptionalTensor weight = in.size() > 1 + kConstants ? if_defined(in[1 + kConstants]) : std::nullopt;
      return Options::with(ctx, [&](O... options) -> variable_list {
        return with_constants(in, 1, [&](const auto&... constant) -> variable_list {
          const auto [loss, stat] = rows(in[0], constant..., weight, options...);
          // Widened: a gradient in a half type would leave the tangent no better than that type.
          const auto type = loss.scalar_type();
          const auto g = RowFunction::backward(weighted(at::ones_like(loss), weight.value_or(Tensor())), in[0].to(type),
                                               constant..., stat, options...);
          return {(g * tangents[0].to(type)).sum(-1), Tensor()};
        });
      });
    }
  };

  // The gradient is linear in the incoming one, and its Jacobian in x is symmetric: both derivatives of it are the
  // double backward. The statistics are a function of x; the derivatives here are total ones.
  struct Gradient : torch::autograd::Function<Gradient> {
    static constexpr const char* name = L::kGradientNode;
    static constexpr bool is_traceable = true;

    static Variable forward(AutogradContext* ctx, const Variable& grad, const Variable& x, C... constant,
                            const Variable& stat, O... options) {
      ctx->save_for_backward({grad, x, stat, constant...});
      Options::pack(ctx, options...);
      ctx->set_materialize_grads(false);
      return RowFunction::backward(grad, x, constant..., stat, options...);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& v) {
      variable_list result(3 + kConstants + sizeof...(O));
      const auto s = ctx->get_saved_variables();
      const Mask2 mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
      if (!v[0].defined()) return result;
      auto [d_grad, d_x] = along(ctx, v[0], s[0], s[1], s[2], s, 3, mask);
      result[0] = undefined_unless(mask[0], d_grad);
      result[1] = undefined_unless(mask[1], d_x);
      return result;
    }
    static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
      const Tensor& stat = in[2 + kConstants];
      Tensor tangent;
      if (tangents[1].defined())
        std::tie(std::ignore, tangent) = along(ctx, tangents[1], in[0], in[1], stat, in, 2, {false, true});
      if (tangents[0].defined()) {
        const auto g = with_all(ctx, in, 2, [&](auto call) { return call(tangents[0], in[1], stat); });
        tangent = tangent.defined() ? tangent + g : g;
      }
      return {tangent};
    }

   private:
    static Tensors2 along(AutogradContext* ctx, const Tensor& v, const Tensor& grad, const Tensor& x,
                          const Tensor& stat, const variable_list& s, size_t first, Mask2 mask) {
      return Options::with(ctx, [&](O... options) {
        return with_constants(s, first, [&](const auto&... constant) {
          return double_backward(v, grad, x, constant..., stat, options..., mask);
        });
      });
    }
  };

  struct ValueAndGradient : torch::autograd::Function<ValueAndGradient> {
    static constexpr const char* name = L::kValueAndGradientNode;
    static constexpr bool is_traceable = true;

    static variable_list forward(AutogradContext* ctx, const Variable& x, C... constant,
                                 const OptionalTensor& row_weight, O... options, double scale, double incoming) {
      auto [loss, stat, gradient] = value_and_grad(x, constant..., row_weight, options..., scale, incoming);
      ctx->save_for_backward({x, stat, gradient, row_weight.value_or(Tensor()), constant...});
      Options::pack(ctx, options...);
      ctx->saved_data["scale"] = scale;
      ctx->saved_data["incoming"] = incoming;
      ctx->mark_non_differentiable({stat, gradient});
      ctx->set_materialize_grads(false);  // as in row_divergence.h
      return {loss, stat, gradient};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
      variable_list result(4 + kConstants + sizeof...(O));
      const auto& g = incoming[0];
      if (!g.defined()) return result;
      auto s = ctx->get_saved_variables();
      const double scale = ctx->saved_data["scale"].toDouble();
      if (at::GradMode::is_enabled() || at::isTensorSubclassLike(g) || at::areAnyTensorSubclassLike(s)) {
        const auto each = (g * scale).expand_symint(s[0].sym_sizes().slice(0, s[0].dim() - 1));
        result[0] = with_all(ctx, s, 4, [&](auto call) { return call(weighted(each, s[3]), s[0], s[1]); });
        return result;
      }
      Tensor gradient = std::move(s[2]);
      s[2] = Tensor();
      result[0] = hand_over(
          std::move(gradient), ctx->saved_data["incoming"].toDouble(), g.item().toDouble(), expected_gradient(),
          [&](double needed) {
            return Options::with(ctx, [&](O... options) {
              return with_constants(s, 4, [&](const auto&... constant) {
                return std::get<2>(value_and_grad(s[0], constant..., if_defined(s[3]), options..., scale, needed));
              });
            });
          });
      return result;
    }
    static variable_list jvp(AutogradContext*, const variable_list&, const variable_list&) {
      TORCH_INTERNAL_ASSERT(false, L::name, ": value_and_grad is not chosen where there is a tangent");
    }
  };

  static Tensors2 rows_autograd(const Tensor& x, C... constant, const OptionalTensor& row_weight, O... options) {
    auto v = apply<Value>(x, constant..., row_weight, options...);
    return {v[0], v[1]};
  }
  static Tensor backward_autograd(const Tensor& grad, const Tensor& x, C... constant, const Tensor& stat,
                                  O... options) {
    return apply<Gradient>(grad, x, constant..., stat, options...);
  }
  static Tensors2 double_backward_autograd(const Tensor& v, const Tensor& grad, const Tensor& x, C... constant,
                                           const Tensor& stat, O... options, Mask2 mask) {
    if (is_differentiated(v, grad, x)) return L::double_backward_composite(v, grad, x, constant..., options..., mask);
    const at::AutoDispatchBelowADInplaceOrView below;
    return double_backward(v, grad, x, constant..., stat, options..., mask);
  }
  static Tensors3 value_and_grad_autograd(const Tensor& x, C... constant, const OptionalTensor& row_weight,
                                          O... options, double scale, double incoming) {
    auto v = apply<ValueAndGradient>(x, constant..., row_weight, options..., scale, incoming);
    return {v[0], v[1], v[2]};
  }

  // -- The public operators' way from rows to the loss --------------------------------------------------------------

  static Tensor loss(const Tensor& x, C... constant, const RowReduction& reduction, O... options) {
    if constexpr (kStoresGradient) {
      const auto plain = [](const OptionalTensor& t) { return !t.has_value() || is_plain_eager(*t); };
      // By the rules of RowDivergence::loss.
      if (reduction.reduces() && at::GradMode::is_enabled() && x.requires_grad() && !is_half(x) && is_plain_eager(x) &&
          !is_on_device(x) && (is_plain_eager(constant) && ...) && plain(reduction.weight()) &&
          plain(reduction.normalizer()))
        return std::get<0>(value_and_grad(x, constant..., reduction.weight(), options..., reduction.scale(),
                                          expected_gradient().next(x)));
    }
    return reduction(std::get<0>(rows(x, constant..., reduction.weight(), options...)));
  }

  // input as the caller gave it, x the same with the classes last.
  static Tensor inplace_loss(Tensor& input, const Tensor& x_, C... constant, const RowReduction& reduction,
                             O... options) {
    TORCH_CHECK_VALUE(reduction.reduces(), L::name,
                      ": inplace_grad=True with reduction=\"none\", expected a reduced loss");
    const Tensor beside = std::get<0>(std::forward_as_tuple(constant..., x_));
    check_inplace_gradient(L::name, input, beside);

    const at::AutoDispatchBelowADInplaceOrView below;
    const auto weight = reduction.weight();
    const double scale = reduction.scale();
    const auto x = x_.detach();
    Tensor value, stat;
    std::function<void(Tensor&, const Tensor&)> finish;
    if (is_half(x)) {
      // The gradient needs the incoming one before it is rounded to half: it is written by backward.
      std::tie(value, stat) = rows(x, constant..., weight, options...);
      value = value.sum() * scale;
      const auto each = std::make_tuple(Tensor(constant)...);
      finish = [=](Tensor&, const Tensor& g) {
        const auto factor = (g * scale).expand(stat.sizes().slice(0, stat.dim() - 1));
        std::apply(
            [&](const auto&... kept) {
              gradient_into(contiguous_double(weighted(factor, weight.value_or(Tensor()))), x, kept..., stat,
                            options..., rows_out(x));
            },
            each);
      };
    } else {
      std::tie(value, stat) = value_and_grad_into(x, x, constant..., weight, options..., scale, 1);
      finish = scale_gradient_;
    }
    return attach_inplace_gradient(L::name, std::move(value), input, beside, Tensor(), std::move(finish));
  }

  // -- Registration -------------------------------------------------------------------------------------------------

  // constant: the schema of C..., with a comma behind it; options: that of O...
  static void define(torch::Library& m, const std::string& constant, const std::string& options) {
    const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
    const auto def = [&](const char* suffix, const std::string& before, const std::string& middle,
                         const std::string& after) {
      const auto schema = private_name(suffix) + "(" + before + ", " + constant + middle + ", " + options + after;
      m.def(schema.c_str(), tags);
    };
    def("", "Tensor input", "Tensor? row_weight", ") -> (Tensor, Tensor)");
    def("_backward", "Tensor grad, Tensor input", "Tensor stat", ") -> Tensor");
    def("_double_backward", "Tensor gg, Tensor grad, Tensor input", "Tensor stat",
        ", bool[2] mask) -> (Tensor, Tensor)");
    if constexpr (kStoresGradient)
      def("_value_and_grad", "Tensor input", "Tensor? row_weight",
          ", float scale, float incoming) -> (Tensor, Tensor, Tensor)");
  }
  static void register_cpu(torch::Library& m) {
    m.impl(private_name("").c_str(), &rows_dense);
    m.impl(private_name("_backward").c_str(), &backward_dense);
    m.impl(private_name("_double_backward").c_str(), &double_backward_dense);
    if constexpr (kStoresGradient) m.impl(private_name("_value_and_grad").c_str(), &value_and_grad_dense);
  }
  // Not _value_and_grad: see row_divergence.h.
  static void register_cuda(torch::Library& m) {
    m.impl(private_name("").c_str(), &rows_dense);
    m.impl(private_name("_backward").c_str(), &backward_dense);
    m.impl(private_name("_double_backward").c_str(), &double_backward_dense);
  }
  static void register_meta(torch::Library& m) {
    m.impl(private_name("").c_str(), &rows_meta);
    m.impl(private_name("_backward").c_str(), &backward_meta);
    m.impl(private_name("_double_backward").c_str(), &double_backward_meta);
    if constexpr (kStoresGradient) m.impl(private_name("_value_and_grad").c_str(), &value_and_grad_meta);
  }
  static void register_autograd(torch::Library& m) {
    m.impl(private_name("").c_str(), &rows_autograd);
    m.impl(private_name("_backward").c_str(), &backward_autograd);
    m.impl(private_name("_double_backward").c_str(), &double_backward_autograd);
    if constexpr (kStoresGradient) m.impl(private_name("_value_and_grad").c_str(), &value_and_grad_autograd);
  }

 private:
  static constexpr bool kStoresGradient = requires { L::value_and_grad_kernel(); };

  static ExpectedGradient& expected_gradient() {
    static ExpectedGradient expected;
    return expected;
  }
  static std::string private_name(const char* suffix) { return std::string("_") + L::op + suffix; }
  static std::string operator_name(const char* suffix) { return "torch_divergence::" + private_name(suffix); }

  // Do CUDA kernels serve x?
  static bool is_on_device([[maybe_unused]] const Tensor& x) {
#ifdef TD_CUDA
    if constexpr (requires { L::cuda_workspace(int64_t{}, int64_t{}); }) return is_for_cuda(x);
#endif
    return false;
  }
  template <class Kernel, class Call>
  static void run(Kernel kernel, const Call& call, int64_t count, [[maybe_unused]] const Tensor& x) {
#ifdef TD_CUDA
    if constexpr (requires { L::cuda_kernel(call); })
      if (is_on_device(x))
        return run_on_cuda(L::cuda_kernel(call), call, count, L::cuda_workspace(count, x.size(-1)), x);
#endif
    parallel_rows(count, call.rows.classes,
                  [&](int64_t begin, int64_t end, ForEach columns) { kernel(call, begin, end, columns); });
  }

  // f(the constants as the kernels read them). Those of a device are checked there: to look would be to wait for it.
  template <class F>
  static void with_ready(const F& f, [[maybe_unused]] const Tensor& x, [[maybe_unused]] const double* used,
                         C... constant) {
    const auto checked = [&](const auto&... ready) {
      if constexpr (kConstants > 0)
        if (!is_on_device(x)) (L::check(ready, x, used), ...);
      f(ready...);
    };
    checked(L::ready(constant)...);
  }
  static void gradient_into(const Tensor& coefficient, const Tensor& x, C... constant, const Tensor& stat, O... options,
                            const RowsOut& grad) {
    const double* const c = coefficient.template const_data_ptr<double>();
    with_ready(
        [&](const auto&... ready) {
          const SingleRowBackward<Rows> call{L::rows(x, ready..., options...), c,
                                             stat.template const_data_ptr<double>(), grad};
          run(L::backward_kernel(), call, coefficient.numel(), x);
        },
        x, c, constant...);
  }
  // loss and stat of one visit that leaves the gradient in `gradient`, which may be the storage of x.
  static Tensors2 value_and_grad_into(const Tensor& gradient, const Tensor& x, C... constant,
                                      const OptionalTensor& row_weight, O... options, double scale, double incoming) {
    const auto weight = checked_weight(L::name, row_weight);
    auto stat = empty_stat(x, L::kStatSize);
    const int64_t count = row_count(x);
    const double* const w = data_or_null(weight);
    double* const s = stat.template mutable_data_ptr<double>();
    with_ready(
        [&](const auto&... ready) {
          const SingleRowValueAndGrad<Rows> call{L::rows(x, ready..., options...), w, scale * incoming, s,
                                                 rows_out(gradient)};
          run(L::value_and_grad_kernel(), call, count, x);
        },
        x, w, constant...);
    auto value = at::empty({}, x.options().dtype(loss_dtype(x, x)));
    write_loss(value, scale * weighted_sum(w, s + L::kLossStat, L::kStatSize, count));
    return {std::move(value), std::move(stat)};
  }

  // f(constants...), which stand in `list` from `first` on
  template <class F>
  static auto with_constants(const variable_list& list, size_t first, const F& f) {
    if constexpr (kConstants == 0) {
      return f();
    } else {
      return f(list[first]);
    }
  }
  // f(call), call(grad, x, stat) being the backward with the constants and options of this node
  template <class F>
  static Tensor with_all(AutogradContext* ctx, const variable_list& list, size_t first, const F& f) {
    return Options::with(ctx, [&](O... options) {
      return with_constants(list, first, [&](const auto&... constant) {
        return f([&](const Tensor& grad, const Tensor& x, const Tensor& stat) {
          return RowFunction::backward(grad, x, constant..., stat, options...);
        });
      });
    });
  }
};

}  // namespace torch_divergence
