// KL divergence between Gaussians: operators, checks, autograd. Diagonal: formulas in gaussian_kl.h, kernels in
// gaussian_kl_cpu.cpp and gaussian_kl_cuda.cu. Full covariance: a composition of ATen operators.
#include "gaussian_kl/gaussian_kl.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/diagonal.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/tril.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>
#include <torch_divergence/functional/gaussian_kl.h>

#include <array>
#include <tuple>

#include "core/apply.h"
#include "core/checks.h"
#include "core/composite.h"
#include "core/cuda_tensors.h"
#include "core/gradient_buffer.h"
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
using OptionalTensor = std::optional<Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Mask = std::array<bool, kGaussianOperands>;

// -- The private operators, called through the dispatcher -----------------------------------------------------------

Tensor gaussian_kl_rows(const Tensor& mean, const Tensor& log_var, const OptionalTensor& prior_mean,
                        const OptionalTensor& prior_log_var, const OptionalTensor& row_weight) {
  static const auto op = typed_op<decltype(gaussian_kl_rows)>("torch_divergence::_gaussian_kl");
  return op.call(mean, log_var, prior_mean, prior_log_var, row_weight);
}
Tensors4 gaussian_kl_backward(const Tensor& grad, const Tensor& mean, const Tensor& log_var,
                              const OptionalTensor& prior_mean, const OptionalTensor& prior_log_var, Mask mask) {
  static const auto op = typed_op<decltype(gaussian_kl_backward)>("torch_divergence::_gaussian_kl_backward");
  return op.call(grad, mean, log_var, prior_mean, prior_log_var, mask);
}

OptionalTensor if_defined(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
RowsIn rows_or_nothing(const OptionalTensor& t) { return t.has_value() ? rows_in(*t) : RowsIn{}; }

// -- CPU, CUDA and meta -----------------------------------------------------------------------------------------------

Tensor rows_dense(const Tensor& mean, const Tensor& log_var, const OptionalTensor& prior_mean,
                  const OptionalTensor& prior_log_var, const OptionalTensor& row_weight) {
  const auto weight = checked_weight("gaussian_kl", row_weight);
  auto loss = at::empty(mean.sizes().slice(0, mean.dim() - 1), mean.options().dtype(loss_dtype(mean, log_var)));
  const GaussianKlForward call{
      {rows_in(mean), rows_in(log_var), rows_or_nothing(prior_mean), rows_or_nothing(prior_log_var)},
      mean.size(-1),
      weight.defined() ? weight.const_data_ptr<double>() : nullptr,
      loss.mutable_data_ptr(),
      loss.scalar_type() == at::kDouble};
#ifdef TD_CUDA
  if (is_for_cuda(mean)) {
    run_on_cuda(&cuda::gaussian_kl_forward, call, loss.numel(), cuda::gaussian_kl_workspace(loss.numel(), call.dims),
                mean);
    return loss;
  }
#endif
  const auto kernel = TD_CPU_KERNEL(gaussian_kl_forward);
  parallel_rows(loss.numel(), call.dims,
                [&](int64_t begin, int64_t end, ForEach columns) { kernel(call, begin, end, columns); });
  return loss;
}

Tensor rows_meta(const Tensor& mean, const Tensor& log_var, const OptionalTensor&, const OptionalTensor&,
                 const OptionalTensor&) {
  return at::empty_symint(mean.sym_sizes().slice(0, mean.dim() - 1), mean.options().dtype(loss_dtype(mean, log_var)));
}

// A masked output is nothing, in 0 elements.
template <class Like>
Tensors4 gradient_buffers(const Tensor& mean, const Tensor& log_var, const OptionalTensor& prior_mean,
                          const OptionalTensor& prior_log_var, Mask mask, const Like& like) {
  const auto one = [&](const Tensor& t, bool wanted) { return wanted ? like(t) : at::empty({0}, t.options()); };
  return {one(mean, mask[kMean]), one(log_var, mask[kLogVar]), one(prior_mean.value_or(mean), mask[kPriorMean]),
          one(prior_log_var.value_or(log_var), mask[kPriorLogVar])};
}

Tensors4 backward_dense(const Tensor& grad, const Tensor& mean, const Tensor& log_var, const OptionalTensor& prior_mean,
                        const OptionalTensor& prior_log_var, Mask mask) {
  const auto coefficient = grad.to(at::kDouble).contiguous();
  // Of an expanded prior, empty_like_large keeps no stride 0: every row has its own gradient.
  auto out = gradient_buffers(mean, log_var, prior_mean, prior_log_var, mask,
                              [](const Tensor& t) { return empty_like_large(t); });
  const auto rows = [](const Tensor& t, bool wanted) { return wanted ? rows_out(t) : RowsOut{}; };
  const GaussianKlBackward call{
      {rows_in(mean), rows_in(log_var), rows_or_nothing(prior_mean), rows_or_nothing(prior_log_var)},
      mean.size(-1),
      coefficient.const_data_ptr<double>(),
      {rows(std::get<0>(out), mask[0]), rows(std::get<1>(out), mask[1]), rows(std::get<2>(out), mask[2]),
       rows(std::get<3>(out), mask[3])}};
#ifdef TD_CUDA
  if (is_for_cuda(mean)) {
    run_on_cuda(&cuda::gaussian_kl_backward, call, coefficient.numel(), 0, mean);
    return out;
  }
#endif
  const auto kernel = TD_CPU_KERNEL(gaussian_kl_backward);
  parallel_rows(coefficient.numel(), call.dims,
                [&](int64_t begin, int64_t end, ForEach columns) { kernel(call, begin, end, columns); });
  return out;
}

Tensors4 backward_meta(const Tensor&, const Tensor& mean, const Tensor& log_var, const OptionalTensor& prior_mean,
                       const OptionalTensor& prior_log_var, Mask mask) {
  return gradient_buffers(mean, log_var, prior_mean, prior_log_var, mask,
                          [](const Tensor& t) { return at::empty_like(t); });
}

// -- Autograd ---------------------------------------------------------------------------------------------------------

// The four operands, undefined where a prior is absent.
using Operands = std::array<Tensor, kGaussianOperands>;

// Autograd counts the tensors that were given. Which of them is operand k, the first being number `next`? -1: absent.
std::array<int, kGaussianOperands> positions(bool prior_mean, bool prior_log_var, int next) {
  return {next, next + 1, prior_mean ? next + 2 : -1, prior_log_var ? next + 2 + (prior_mean ? 1 : 0) : -1};
}
Operands operands(const variable_list& given, const std::array<int, kGaussianOperands>& at) {
  Operands x;
  for (size_t k = 0; k < x.size(); ++k)
    if (at[k] >= 0) x[k] = given[static_cast<size_t>(at[k])];
  return x;
}
Tensors4 gradients(const Tensor& grad, const Operands& x, Mask mask) {
  return gaussian_kl_backward(grad, x[kMean], x[kLogVar], if_defined(x[kPriorMean]), if_defined(x[kPriorLogVar]), mask);
}
Operands as_array(const Tensors4& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }
// A row of weight 0 gets exactly 0, whatever the incoming gradient.
Tensor weighted(const Tensor& g, const Tensor& weight) {
  return weight.defined() ? at::where(weight == 0, 0, g * weight) : g;
}

// What the derivatives of the gradients along `a` are made of. In ATen operators, so that it can be differentiated
// again. With z = d e^(-w/2), and dots for derivatives along a:
//   (d e^-w). = e^-w (d. - d w.)     (expm1(x)/2). = e^x x./2     (z^2/2). = z (d. e^(-w/2) - z w./2)
// Rows of `held` are as if all that they hold were 0.
struct Directional {
  Operands gradient, derivative;  // of KL, a coordinate each

  Directional(const Operands& x, const Operands& a, const Tensor& held) {
    const auto dtype = loss_dtype(x[kMean], x[kLogVar]);
    const auto wide = [&](const Tensor& t) {
      if (!t.defined()) return at::zeros_like(x[kMean], x[kMean].options().dtype(dtype));
      return held.defined() ? at::where(held, 0, t.to(dtype)) : t.to(dtype);
    };
    const auto v = wide(x[kLogVar]), w = wide(x[kPriorLogVar]), d = wide(x[kMean]) - wide(x[kPriorMean]);
    const auto d_dot = wide(a[kMean]) - wide(a[kPriorMean]), w_dot = wide(a[kPriorLogVar]),
               x_dot = wide(a[kLogVar]) - w_dot;
    // Only infinities need it: a where at every v = w would take the derivatives there with it.
    const auto same = (v == w).logical_and(v.isinf());
    const auto difference = at::where(same, 0, v) - at::where(same, 0, w);
    // Factors of e^-w and e^x, kept just finite: 0 times them is 0, and anything else overflows all the same.
    const double highest = dtype == at::kDouble ? 1418 : 177;
    const auto scale = (w.clamp_min(-highest) / -2).exp(), growth = (difference.clamp_max(highest) / 2).exp();
    const auto z = d * scale, by_mean = z * scale, variance = difference.expm1() / 2;
    gradient = {by_mean, variance, -by_mean, -variance - z * z / 2};
    const auto mean_dot = (d_dot - d * w_dot) * scale * scale, variance_dot = x_dot * growth * growth / 2;
    derivative = {mean_dot, variance_dot, -mean_dot, -variance_dot - z * (d_dot * scale - z * w_dot / 2)};
  }
};

struct GaussianKl : torch::autograd::Function<GaussianKl> {
  static constexpr const char* name = "GaussianKlBackward";
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& mean, const Variable& log_var,
                          const OptionalTensor& prior_mean, const OptionalTensor& prior_log_var,
                          const OptionalTensor& row_weight) {
    ctx->save_for_backward({mean, log_var, prior_mean.value_or(Tensor()), prior_log_var.value_or(Tensor()),
                            row_weight.value_or(Tensor())});
    ctx->saved_data["prior_mean"] = prior_mean.has_value();
    ctx->saved_data["prior_log_var"] = prior_log_var.has_value();
    ctx->set_materialize_grads(false);
    return gaussian_kl_rows(mean, log_var, prior_mean, prior_log_var, row_weight);
  }
  static std::array<int, kGaussianOperands> inputs(AutogradContext* ctx) {
    return positions(ctx->saved_data["prior_mean"].toBool(), ctx->saved_data["prior_log_var"].toBool(), 0);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(5);
    if (!incoming[0].defined()) return result;
    const auto s = ctx->get_saved_variables();
    const auto at = inputs(ctx);
    Mask mask{};
    for (size_t k = 0; k < mask.size(); ++k) mask[k] = at[k] >= 0 && ctx->needs_input_grad(static_cast<size_t>(at[k]));
    const auto out = as_array(gradients(weighted(incoming[0], s[4]), {s[0], s[1], s[2], s[3]}, mask));
    for (size_t k = 0; k < mask.size(); ++k)
      if (mask[k]) result[k] = out[k];
    return result;
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    const auto at = inputs(ctx);
    const auto x = operands(in, at), v = operands(tangents, at);
    const size_t given = 2 + size_t{x[kPriorMean].defined()} + size_t{x[kPriorLogVar].defined()};
    const auto weight = in.size() > given ? in[given] : Tensor();
    Mask mask{};
    for (size_t k = 0; k < mask.size(); ++k) mask[k] = v[k].defined();
    const auto dtype = loss_dtype(x[kMean], x[kLogVar]);
    const auto ones = at::ones_like(x[kMean].select(-1, 0), x[kMean].options().dtype(dtype));
    const auto out = as_array(gradients(weighted(ones, weight), x, mask));
    auto tangent = at::zeros_like(ones);
    for (size_t k = 0; k < mask.size(); ++k)
      if (mask[k]) tangent = tangent + (out[k].to(dtype) * v[k].to(dtype)).sum(-1);
    return {tangent};
  }
};

// grad times the Hessian of KL times a, for each operand that there is. Rows whose incoming gradient is 0 are held, so
// that what they hold does not come back as 0 inf.
Operands hessian_products(const Tensor& grad, const Operands& x, const Operands& a) {
  const auto g = grad.to(loss_dtype(x[kMean], x[kLogVar])).unsqueeze(-1);
  const Directional along(x, a, g == 0);
  Operands products;
  for (size_t k = 0; k < products.size(); ++k)
    if (x[k].defined()) products[k] = (g * along.derivative[k]).to(x[k].scalar_type());
  return products;
}

struct GaussianKlGradient : torch::autograd::Function<GaussianKlGradient> {
  static constexpr const char* name = "GaussianKlGradientBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable& mean,
                               const Variable& log_var, const OptionalTensor& prior_mean,
                               const OptionalTensor& prior_log_var, Mask mask) {
    ctx->save_for_backward({grad, mean, log_var, prior_mean.value_or(Tensor()), prior_log_var.value_or(Tensor())});
    ctx->saved_data["prior_mean"] = prior_mean.has_value();
    ctx->saved_data["prior_log_var"] = prior_log_var.has_value();
    for (size_t k = 0; k < mask.size(); ++k) ctx->saved_data["mask" + std::to_string(k)] = mask[k];
    ctx->set_materialize_grads(false);
    const auto out = as_array(gaussian_kl_backward(grad, mean, log_var, prior_mean, prior_log_var, mask));
    return {out.begin(), out.end()};
  }
  static std::array<int, kGaussianOperands> inputs(AutogradContext* ctx) {
    return positions(ctx->saved_data["prior_mean"].toBool(), ctx->saved_data["prior_log_var"].toBool(), 1);
  }
  static Mask outputs(AutogradContext* ctx) {
    Mask mask{};
    for (size_t k = 0; k < mask.size(); ++k) mask[k] = ctx->saved_data["mask" + std::to_string(k)].toBool();
    return mask;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& v) {
    variable_list result(6);
    const auto s = ctx->get_saved_variables();
    const auto mask = outputs(ctx);
    Operands a;
    bool any = false;
    for (size_t k = 0; k < mask.size(); ++k)
      if (mask[k] && v[k].defined()) a[k] = v[k], any = true;
    if (!any) return result;
    const Operands x{s[1], s[2], s[3], s[4]};
    if (ctx->needs_input_grad(0)) {
      const Directional along(x, a, Tensor());
      Tensor sum;
      for (size_t k = 0; k < mask.size(); ++k) {
        if (!a[k].defined()) continue;
        const auto product = (along.gradient[k] * a[k].to(along.gradient[k].scalar_type())).sum(-1);
        sum = sum.defined() ? sum + product : product;
      }
      result[0] = sum.to(s[0].scalar_type());
    }
    const auto at = inputs(ctx);
    const auto wanted = [&](size_t k) { return at[k] >= 0 && ctx->needs_input_grad(static_cast<size_t>(at[k])); };
    if (!wanted(0) && !wanted(1) && !wanted(2) && !wanted(3)) return result;
    const auto hessian = hessian_products(s[0], x, a);
    for (size_t k = 0; k < mask.size(); ++k)
      if (wanted(k)) result[k + 1] = hessian[k];
    return result;
  }
  // The Jacobian of the gradients in the operands is symmetric.
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    const auto at = inputs(ctx);
    const auto x = operands(in, at), a = operands(tangents, at);
    const auto mask = outputs(ctx);
    variable_list result(kGaussianOperands);
    const auto add = [&](size_t k, const Tensor& t) { result[k] = result[k].defined() ? result[k] + t : t; };
    if (a[0].defined() || a[1].defined() || a[2].defined() || a[3].defined()) {
      const auto hessian = hessian_products(in[0], x, a);
      for (size_t k = 0; k < mask.size(); ++k)
        if (mask[k]) add(k, hessian[k]);
    }
    if (tangents[0].defined()) {
      const auto out = as_array(gradients(tangents[0], x, mask));
      for (size_t k = 0; k < mask.size(); ++k)
        if (mask[k]) add(k, out[k]);
    }
    return result;
  }
};

Tensor rows_autograd(const Tensor& mean, const Tensor& log_var, const OptionalTensor& prior_mean,
                     const OptionalTensor& prior_log_var, const OptionalTensor& row_weight) {
  return apply<GaussianKl>(mean, log_var, prior_mean, prior_log_var, row_weight);
}
Tensors4 backward_autograd(const Tensor& grad, const Tensor& mean, const Tensor& log_var,
                           const OptionalTensor& prior_mean, const OptionalTensor& prior_log_var, Mask mask) {
  auto v = apply<GaussianKlGradient>(grad, mean, log_var, prior_mean, prior_log_var, mask);
  return {v[0], v[1], v[2], v[3]};
}

// -- The public operators ---------------------------------------------------------------------------------------------

// A prior as the operator takes it: of the mean's shape.
OptionalTensor checked_prior(const char* argument, const OptionalTensor& prior, const Tensor& mean) {
  constexpr const char* kName = "gaussian_kl";
  if (!prior.has_value()) return std::nullopt;
  checked_like(kName, argument, *prior, "mean", mean, false);
  const int64_t missing = mean.dim() - prior->dim();
  bool fits = missing >= 0;
  for (int64_t d = 0; fits && d < prior->dim(); ++d)
    fits = prior->sym_size(d) == 1 || prior->sym_size(d) == mean.sym_size(d + missing);
  TORCH_CHECK_VALUE(fits, kName, ": ", argument, " has shape ", prior->sym_sizes(),
                    ", expected one that broadcasts to ", mean.sym_sizes(), ", the shape of mean");
  return prior->expand_symint(mean.sym_sizes());
}

void check_coordinates(const char* name, const Tensor& mean) {
  checked_real(name, "mean", mean);
  TORCH_CHECK_VALUE(mean.dim() >= 1, name,
                    ": mean is a scalar, expected at least one dimension, that of the coordinates");
  TORCH_CHECK_VALUE(mean.sym_size(-1) != 0, name, ": mean has shape ", mean.sym_sizes(),
                    ", expected at least one coordinate in the last dimension");
}

Tensor gaussian_kl_op(const Tensor& mean, const Tensor& log_var, const OptionalTensor& prior_mean,
                      const OptionalTensor& prior_log_var, const OptionalTensor& row_weight, std::string_view reduction,
                      const OptionalTensor& normalizer) {
  constexpr const char* kName = "gaussian_kl";
  check_coordinates(kName, mean);
  checked_like(kName, "log_var", log_var, "mean", mean, true);
  const auto c = checked_prior("prior_mean", prior_mean, mean), w = checked_prior("prior_log_var", prior_log_var, mean);
  const RowReduction reduce(kName, mean, loss_dtype(mean, log_var), row_weight, reduction, normalizer);
  return reduce(gaussian_kl_rows(mean, log_var, c, w, reduce.weight()));
}

Tensor checked_factor(const char* argument, const Tensor& factor, const Tensor& mean) {
  constexpr const char* kName = "gaussian_kl_full";
  const auto real = checked_like(kName, argument, factor, "mean", mean, false);
  c10::SymDimVector expected(mean.sym_sizes().begin(), mean.sym_sizes().end());
  expected.push_back(mean.sym_size(-1));
  TORCH_CHECK_VALUE(factor.dim() == mean.dim() + 1 && factor.sym_sizes() == c10::SymIntArrayRef(expected), kName, ": ",
                    argument, " has shape ", factor.sym_sizes(), ", expected ", c10::SymIntArrayRef(expected),
                    ", a square matrix for each row of mean");
  return real;
}

// Values are looked at only where there are any: not in a traced, fake or batched tensor. On CUDA nobody waits for what
// is found: it is an assertion of the device.
void check_diagonal(const char* argument, const Tensor& factor, const OptionalTensor& weight) {
  const auto has_values = [](const Tensor& t) {
    return is_plain_eager(t) || (t.is_cuda() && !at::isTensorSubclassLike(t));
  };
  if (!has_values(factor) || (weight.has_value() && !has_values(*weight))) return;
  auto bad = factor.detach().diagonal(0, -2, -1) <= 0;
  if (weight.has_value()) bad = bad.logical_and((*weight != 0).unsqueeze(-1));
  if (!factor.is_cpu())
    return at::_assert_async(bad.any().logical_not(), "gaussian_kl_full: a diagonal has an entry that is not positive");
  TORCH_CHECK_VALUE(!bad.any().item<bool>(), "gaussian_kl_full: ", argument,
                    " has an entry <= 0 on its diagonal, expected a Cholesky factor, whose diagonal is positive");
}

// With R = Lp^-1 Lq, lower triangular, and y = Lp^-1 (m - c):
//   KL = 1/2 [sum_i h(2 log r_ii) + sum_{i>j} r_ij^2 + |y|^2],   r_ii = q_ii/p_ii,   h(x) = expm1(x) - x
// Near equality R - I = Lp^-1 (Lq - Lp) is solved for: its off-diagonal entries, and r_ii - 1 = (q_ii - p_ii)/p_ii,
// keep the digits that R has lost. With s = r_ii - 1, expm1(2 log r) = s (2 + s) and h = s^2 + 2 (s - log1p(s)). Below
// r = 1/2 it is 1 + s that loses digits, at last all of them: there h = t^4 - 1 - 4 log t with t^2 = r, where no
// quotient leaves the range of numbers that h does not leave.
Tensor gaussian_kl_full_op(const Tensor& mean, const Tensor& scale_tril, const Tensor& prior_mean,
                           const Tensor& prior_scale_tril, const OptionalTensor& row_weight, std::string_view reduction,
                           const OptionalTensor& normalizer) {
  constexpr const char* kName = "gaussian_kl_full";
  check_coordinates(kName, mean);
  const auto m = checked_real(kName, "mean", mean), lq = checked_factor("scale_tril", scale_tril, mean),
             c = checked_like(kName, "prior_mean", prior_mean, "mean", mean, true),
             lp = checked_factor("prior_scale_tril", prior_scale_tril, mean);
  const RowReduction reduce(kName, m, m.scalar_type(), row_weight, reduction, normalizer);
  const auto& weight = reduce.weight();
  if (weight.has_value() && is_plain_eager(*weight)) checked_weight(kName, weight);
  check_diagonal("scale_tril", lq, weight);
  check_diagonal("prior_scale_tril", lp, weight);

  // A row of weight 0, whatever it holds, is that of two standard normals.
  const auto eye = at::ones_like(m).diag_embed();
  const auto dropped = weight.has_value() ? (*weight == 0).unsqueeze(-1) : Tensor();
  const auto keep = [&](const Tensor& t) { return dropped.defined() ? at::where(dropped, 0, t) : t; };
  const auto factor = [&](const Tensor& l) {
    const auto lower = l.tril();
    return dropped.defined() ? at::where(dropped.unsqueeze(-1), eye, lower) : lower;
  };
  const auto q = factor(lq), p = factor(lp);
  const auto y = at::linalg_solve_triangular(p, (keep(m) - keep(c)).unsqueeze(-1), /*upper=*/false).squeeze(-1);
  const auto off = at::linalg_solve_triangular(p, q - p, /*upper=*/false).tril(-1);
  const auto p_diagonal = p.diagonal(0, -2, -1), q_diagonal = q.diagonal(0, -2, -1);
  const auto difference = (q_diagonal - p_diagonal) / p_diagonal;
  const auto far = difference < -0.5;
  // Each branch sees only its own arguments, or the other's infinities would come back as 0 inf.
  const auto s = at::where(far, 0, difference);
  const auto t = at::where(far, q_diagonal, 1).sqrt() / at::where(far, p_diagonal, 1).sqrt(), r = t * t;
  const auto h = at::where(far, r * r - 1 - 4 * t.log(), s * s + 2 * minus_log1p(s));
  const auto rows = h.sum(-1) + (off * off).sum({-2, -1}) + (y * y).sum(-1);
  return reduce(weight.has_value() ? at::where(*weight == 0, 0, rows * *weight / 2) : rows / 2);
}

}  // namespace

Tensor gaussian_kl(const Tensor& mean, const Tensor& log_var, const OptionalTensor& prior_mean,
                   const OptionalTensor& prior_log_var, const GaussianKLOptions& options) {
  return gaussian_kl_op(mean, log_var, prior_mean, prior_log_var, options.row_weight(), to_string(options.reduction()),
                        options.normalizer());
}
Tensor gaussian_kl(const Tensor& mean, const Tensor& log_var, const OptionalTensor& prior_mean,
                   const OptionalTensor& prior_log_var) {
  return gaussian_kl(mean, log_var, prior_mean, prior_log_var, GaussianKLOptions());
}
Tensor gaussian_kl_full(const Tensor& mean, const Tensor& scale_tril, const Tensor& prior_mean,
                        const Tensor& prior_scale_tril, const GaussianKLOptions& options) {
  return gaussian_kl_full_op(mean, scale_tril, prior_mean, prior_scale_tril, options.row_weight(),
                             to_string(options.reduction()), options.normalizer());
}

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "gaussian_kl(Tensor mean, Tensor log_var, Tensor? prior_mean=None, Tensor? prior_log_var=None, *, Tensor? "
      "row_weight=None, str reduction=\"mean\", Tensor? normalizer=None) -> Tensor",
      tags);
  m.def(
      "gaussian_kl_full(Tensor mean, Tensor scale_tril, Tensor prior_mean, Tensor prior_scale_tril, *, Tensor? "
      "row_weight=None, str reduction=\"mean\", Tensor? normalizer=None) -> Tensor",
      tags);
  m.def(
      "_gaussian_kl(Tensor mean, Tensor log_var, Tensor? prior_mean, Tensor? prior_log_var, Tensor? row_weight) -> "
      "Tensor",
      tags);
  m.def(
      "_gaussian_kl_backward(Tensor grad, Tensor mean, Tensor log_var, Tensor? prior_mean, Tensor? prior_log_var, "
      "bool[4] mask) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
}
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) {
  m.impl("gaussian_kl", gaussian_kl_op);
  m.impl("gaussian_kl_full", gaussian_kl_full_op);
}
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) {
  m.impl("gaussian_kl", gaussian_kl_op);
  m.impl("gaussian_kl_full", gaussian_kl_full_op);
}
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) {
  m.impl("_gaussian_kl", rows_dense);
  m.impl("_gaussian_kl_backward", backward_dense);
}
#ifdef TD_CUDA
TORCH_LIBRARY_IMPL(torch_divergence, CUDA, m) {
  m.impl("_gaussian_kl", rows_dense);
  m.impl("_gaussian_kl_backward", backward_dense);
}
#endif
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) {
  m.impl("_gaussian_kl", rows_meta);
  m.impl("_gaussian_kl_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) {
  m.impl("_gaussian_kl", rows_autograd);
  m.impl("_gaussian_kl_backward", backward_autograd);
}

}  // namespace torch_divergence
