// KL divergence from a top-k teacher: operators, checks and autograd. The formulas are in kl_div_topk.h, the kernels in
// kl_div_topk_cpu.cpp and kl_div_topk_cuda.cu.
#include "kl_div_topk/kl_div_topk.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <limits>
#include <string_view>
#include <unordered_set>

#include "core/cuda_tensors.h"
#include "core/row_divergence.h"

namespace torch_divergence {
namespace {

constexpr const char* kName = "kl_div_topk";
constexpr double kMinusInf = -std::numeric_limits<double>::infinity();

using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Mask3 = std::array<bool, 3>;
using Mask4 = std::array<bool, 4>;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// The static arguments of the private operators.
struct Options {
  int64_t space, tail;
  bool reverse;
  double temperature;
};

// -- The private operators, called through the dispatcher -------------------------------------------------------------

Tensors2 call_rows(const Tensor& input, const Tensor& indices, const Tensor& log_probs,
                   const OptionalTensor& tail_log_prob, const OptionalTensor& row_weight, const Options& o) {
  static const auto op =
      typed_op<Tensors2(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                        int64_t, int64_t, bool, double)>("torch_divergence::_kl_div_topk");
  return op.call(input, indices, log_probs, tail_log_prob, row_weight, o.space, o.tail, o.reverse, o.temperature);
}
Tensors3 call_backward(const Tensor& grad, const Tensor& input, const Tensor& indices, const Tensor& log_probs,
                       const Tensor& stat, const OptionalTensor& tail_log_prob, const Options& o, Mask3 mask) {
  static const auto op = typed_op<Tensors3(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                           const OptionalTensor&, int64_t, int64_t, bool, double, Mask3)>(
      "torch_divergence::_kl_div_topk_backward");
  return op.call(grad, input, indices, log_probs, stat, tail_log_prob, o.space, o.tail, o.reverse, o.temperature, mask);
}
Tensors3 call_value_and_grad(const Tensor& input, const Tensor& indices, const Tensor& log_probs,
                             const OptionalTensor& tail_log_prob, const OptionalTensor& row_weight, const Options& o,
                             double scale, double incoming) {
  static const auto op = typed_op<Tensors3(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                           const OptionalTensor&, int64_t, int64_t, bool, double, double, double)>(
      "torch_divergence::_kl_div_topk_value_and_grad");
  return op.call(input, indices, log_probs, tail_log_prob, row_weight, o.space, o.tail, o.reverse, o.temperature, scale,
                 incoming);
}
Tensors4 call_double_backward(const OptionalTensor& v_input, const OptionalTensor& v_log_probs,
                              const OptionalTensor& v_tail, const Tensor& grad, const Tensor& input,
                              const Tensor& indices, const Tensor& log_probs, const Tensor& stat,
                              const OptionalTensor& tail_log_prob, const Options& o, Mask4 mask) {
  static const auto op =
      typed_op<Tensors4(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                        int64_t, bool, double, Mask4)>("torch_divergence::_kl_div_topk_double_backward");
  return op.call(v_input, v_log_probs, v_tail, grad, input, indices, log_probs, stat, tail_log_prob, o.space, o.tail,
                 o.reverse, o.temperature, mask);
}

// -- CPU and CUDA -----------------------------------------------------------------------------------------------------

Tensor double_or_undefined(const OptionalTensor& t) { return t.has_value() ? contiguous_double(*t) : Tensor(); }

// The teacher as the kernels read it: k-sized copies, contiguous, in double.
struct Teacher {
  Tensor indices, log_probs, tail_log_prob;
  Tensor places;  // of what is sorted, in the rows as they were given
  double rounding;

  // `sorted`: the classes of a row in ascending order, padding last.
  Teacher(const Tensor& indices_, const Tensor& log_probs_, const OptionalTensor& tail_log_prob_, bool sorted = false)
      : indices(indices_.contiguous()),
        log_probs(contiguous_double(log_probs_)),
        tail_log_prob(double_or_undefined(tail_log_prob_)) {
    switch (log_probs_.scalar_type()) {
      case at::kBFloat16:
        rounding = 0x1p-8;
        break;
      case at::kHalf:
        rounding = 0x1p-11;
        break;
      default:
        rounding = 0;  // far below kMassTolerance
    }
    if (!sorted) return;
    const auto padding_last = at::where(log_probs == kMinusInf, std::numeric_limits<int64_t>::max(), indices);
    std::tie(indices, places) = at::sort(padding_last, -1, false);
    log_probs = sorted_like(log_probs);
  }
  // From the order as given to that of the kernels, and back.
  Tensor sorted_like(const Tensor& t) const { return places.defined() && t.defined() ? t.gather(-1, places) : t; }
  Tensor given_like(const Tensor& t) const {
    return places.defined() && t.defined() ? at::empty_like(t).scatter_(-1, places, t) : t;
  }
  TopkRows rows(const Tensor& input, const Options& o) const {
    TopkRows rows;
    rows.input = rows_in(input);
    rows.indices = indices.const_data_ptr<int64_t>();
    rows.log_probs = log_probs.const_data_ptr<double>();
    rows.tail_log_prob = data_or_null(tail_log_prob);
    rows.space = static_cast<int>(o.space), rows.tail = static_cast<int>(o.tail), rows.reverse = o.reverse;
    rows.temperature = o.temperature;
    rows.classes = input.size(-1), rows.k = indices.size(-1);
    rows.rounding = rounding;
    return rows;
  }
};

// Says what is wrong with a row that a kernel refused.
[[noreturn]] void refuse(const TopkRows& rows, int64_t row) {
  const int64_t* const index = rows.indices + row * rows.k;
  const double* const log_prob = rows.log_probs + row * rows.k;
  std::unordered_set<int64_t> seen;
  double mass = 0;
  for (int64_t j = 0; j < rows.k; ++j) {
    if (log_prob[j] == kMinusInf) continue;
    TORCH_CHECK_VALUE(index[j] >= 0 && index[j] < rows.classes, kName, ": indices holds ", index[j], " in row ", row,
                      ", expected a class from 0 to ", rows.classes - 1, " (padding is a log_probs of -inf)");
    TORCH_CHECK_VALUE(seen.insert(index[j]).second, kName, ": indices holds ", index[j], " twice in row ", row,
                      ", expected each class once (padding is a log_probs of -inf)");
    mass += std::exp(log_prob[j]);
  }
  TORCH_CHECK_VALUE(false, kName, ": log_probs of row ", row, " have the mass ", mass,
                    ", expected log-probabilities, whose mass is at most 1");
}

// kernel(begin, end, columns, bad_row) over all rows; the first row that is refused raises.
template <class Call>
void run(void (*kernel)(const Call&, int64_t, int64_t, ForEach, int64_t*), const Call& call, int64_t rows) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_bad{kNone};
  parallel_rows(rows, call.rows.classes, [&](int64_t begin, int64_t end, ForEach columns) {
    int64_t bad = -1;
    kernel(call, begin, end, columns, &bad);
    int64_t first = first_bad;
    while (bad >= 0 && bad < first && !first_bad.compare_exchange_weak(first, bad)) {
    }
  });
  if (first_bad != kNone) refuse(call.rows, first_bad);
}

#ifdef TD_CUDA
auto cuda_kernel(const TopkForward&) { return &cuda::kl_div_topk_forward; }
auto cuda_kernel(const TopkBackward&) { return &cuda::kl_div_topk_backward; }
auto cuda_kernel(const TopkDoubleBackward&) { return &cuda::kl_div_topk_double_backward; }
#endif

// The same on the device of input.
template <class Kernel, class Call>
void run(Kernel kernel, const Call& call, int64_t rows, [[maybe_unused]] const Tensor& input) {
#ifdef TD_CUDA
  if (is_for_cuda(input))
    return run_on_cuda(cuda_kernel(call), call, rows, cuda::kl_div_topk_workspace(rows, call.rows.classes), input);
#endif
  run(kernel, call, rows);
}

// A k-sized output of the kernels, in double.
Tensor double_output(bool wanted, const Tensor& like) {
  return wanted ? at::empty(like.sizes(), like.options().dtype(at::kDouble)) : Tensor();
}
double* output_or_null(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<double>() : nullptr; }
Tensor output_as(const Tensor& output, const Tensor& like) {
  return output.defined() ? output.to(like.scalar_type()) : nothing_like(like);
}

Tensors2 rows_dense(const Tensor& input, const Tensor& indices, const Tensor& log_probs,
                    const OptionalTensor& tail_log_prob, const OptionalTensor& row_weight, int64_t space, int64_t tail,
                    bool reverse, double temperature) {
  const auto weight = checked_weight(kName, row_weight);
  auto loss = at::empty(input.sizes().slice(0, input.dim() - 1), input.options().dtype(loss_dtype(input, log_probs)));
  auto stat = empty_stat(input, TopkStat::kSize);
  const Teacher teacher(indices, log_probs, tail_log_prob, is_for_cuda(input));
  const TopkForward call{teacher.rows(input, {space, tail, reverse, temperature}), data_or_null(weight),
                         loss.mutable_data_ptr(), loss.scalar_type() == at::kDouble, stat.mutable_data_ptr<double>()};
  run(TD_CPU_KERNEL(kl_div_topk_forward), call, loss.numel(), input);
  return {std::move(loss), std::move(stat)};
}

Tensors3 backward_dense(const Tensor& grad, const Tensor& input, const Tensor& indices, const Tensor& log_probs,
                        const Tensor& stat, const OptionalTensor& tail_log_prob, int64_t space, int64_t tail,
                        bool reverse, double temperature, Mask3 mask) {
  const Tensor& given_tail = tail_log_prob.has_value() ? *tail_log_prob : grad;
  const auto coefficient = contiguous_double(grad), statistics = stat.contiguous();
  auto grad_input = mask[0] ? empty_like_large(input) : nothing_like(input);
  const auto grad_log_probs = double_output(mask[1], log_probs), grad_tail = double_output(mask[2], given_tail);
  const Teacher teacher(indices, log_probs, tail_log_prob);
  const TopkBackward call{teacher.rows(input, {space, tail, reverse, temperature}),
                          coefficient.const_data_ptr<double>(),
                          statistics.const_data_ptr<double>(),
                          mask[0] ? rows_out(grad_input) : RowsOut{},
                          output_or_null(grad_log_probs),
                          output_or_null(grad_tail)};
  if (mask[0] || mask[1] || mask[2]) run(TD_CPU_KERNEL(kl_div_topk_backward), call, coefficient.numel(), input);
  return {std::move(grad_input), output_as(grad_log_probs, log_probs), output_as(grad_tail, given_tail)};
}

Tensors3 value_and_grad_cpu(const Tensor& input, const Tensor& indices, const Tensor& log_probs,
                            const OptionalTensor& tail_log_prob, const OptionalTensor& row_weight, int64_t space,
                            int64_t tail, bool reverse, double temperature, double scale, double incoming) {
  const auto weight = checked_weight(kName, row_weight);
  const double* const w = data_or_null(weight);
  auto stat = empty_stat(input, TopkStat::kSize), grad_input = empty_like_large(input);
  const auto rows = at::empty(input.sizes().slice(0, input.dim() - 1), stat.options());
  auto* const losses = rows.mutable_data_ptr<double>();
  const Teacher teacher(indices, log_probs, tail_log_prob);
  const TopkValueAndGrad call{teacher.rows(input, {space, tail, reverse, temperature}),
                              w,
                              scale * incoming,
                              losses,
                              stat.mutable_data_ptr<double>(),
                              rows_out(grad_input)};
  run(TD_CPU_KERNEL(kl_div_topk_value_and_grad), call, rows.numel());
  auto loss = at::empty({}, input.options().dtype(loss_dtype(input, log_probs)));
  write_loss(loss, scale * weighted_sum(w, losses, 1, rows.numel()));
  return {std::move(loss), std::move(stat), std::move(grad_input)};
}

Tensors4 double_backward_dense(const OptionalTensor& v_input, const OptionalTensor& v_log_probs,
                               const OptionalTensor& v_tail, const Tensor& grad, const Tensor& input,
                               const Tensor& indices, const Tensor& log_probs, const Tensor& stat,
                               const OptionalTensor& tail_log_prob, int64_t space, int64_t tail, bool reverse,
                               double temperature, Mask4 mask) {
  const Tensor& given_tail = tail_log_prob.has_value() ? *tail_log_prob : grad;
  const auto coefficient = contiguous_double(grad), statistics = stat.contiguous();
  const auto v = v_input.has_value() ? v_input->to(input.scalar_type()) : Tensor();
  const Teacher teacher(indices, log_probs, tail_log_prob, is_for_cuda(input));
  const auto v_k = teacher.sorted_like(double_or_undefined(v_log_probs)), v_t = double_or_undefined(v_tail);
  auto d_input = mask[1] ? empty_like_large(input) : nothing_like(input);
  const auto d_coefficient = double_output(mask[0], grad), d_log_probs = double_output(mask[2], log_probs),
             d_tail = double_output(mask[3], given_tail);
  const TopkDoubleBackward call{teacher.rows(input, {space, tail, reverse, temperature}),
                                v.defined() ? rows_in(v) : RowsIn{},
                                data_or_null(v_k),
                                data_or_null(v_t),
                                coefficient.const_data_ptr<double>(),
                                statistics.const_data_ptr<double>(),
                                output_or_null(d_coefficient),
                                mask[1] ? rows_out(d_input) : RowsOut{},
                                output_or_null(d_log_probs),
                                output_or_null(d_tail)};
  run(TD_CPU_KERNEL(kl_div_topk_double_backward), call, coefficient.numel(), input);
  return {output_as(d_coefficient, grad), std::move(d_input), output_as(teacher.given_like(d_log_probs), log_probs),
          output_as(d_tail, given_tail)};
}

// -- Meta -------------------------------------------------------------------------------------------------------------

Tensor like_if(bool wanted, const Tensor& t) { return wanted ? at::empty_like(t) : nothing_like(t); }
Tensor contiguous_like_if(bool wanted, const Tensor& t) {
  return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : nothing_like(t);
}

Tensors2 rows_meta(const Tensor& input, const Tensor&, const Tensor& log_probs, const OptionalTensor&,
                   const OptionalTensor&, int64_t, int64_t, bool, double) {
  c10::SymDimVector stat(input.sym_sizes().begin(), input.sym_sizes().end());
  stat.back() = TopkStat::kSize;
  return {at::empty_symint(input.sym_sizes().slice(0, input.dim() - 1),
                           input.options().dtype(loss_dtype(input, log_probs))),
          at::empty_symint(stat, input.options().dtype(at::kDouble))};
}
Tensors3 backward_meta(const Tensor& grad, const Tensor& input, const Tensor&, const Tensor& log_probs, const Tensor&,
                       const OptionalTensor& tail_log_prob, int64_t, int64_t, bool, double, Mask3 mask) {
  return {like_if(mask[0], input), contiguous_like_if(mask[1], log_probs),
          contiguous_like_if(mask[2], tail_log_prob.value_or(grad))};
}
Tensors3 value_and_grad_meta(const Tensor& input, const Tensor& indices, const Tensor& log_probs,
                             const OptionalTensor& tail_log_prob, const OptionalTensor& row_weight, int64_t space,
                             int64_t tail, bool reverse, double temperature, double, double) {
  auto [loss, stat] =
      rows_meta(input, indices, log_probs, tail_log_prob, row_weight, space, tail, reverse, temperature);
  return {at::empty({}, loss.options()), std::move(stat), at::empty_like(input)};
}
Tensors4 double_backward_meta(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor& grad,
                              const Tensor& input, const Tensor&, const Tensor& log_probs, const Tensor&,
                              const OptionalTensor& tail_log_prob, int64_t, int64_t, bool, double, Mask4 mask) {
  return {contiguous_like_if(mask[0], grad), like_if(mask[1], input), contiguous_like_if(mask[2], log_probs),
          contiguous_like_if(mask[3], tail_log_prob.value_or(grad))};
}

// -- Autograd ---------------------------------------------------------------------------------------------------------

void pack(AutogradContext* ctx, const Options& o) {
  ctx->saved_data["space"] = o.space;
  ctx->saved_data["tail"] = o.tail;
  ctx->saved_data["reverse"] = o.reverse;
  ctx->saved_data["temperature"] = o.temperature;
}
Options unpack(AutogradContext* ctx) {
  return {ctx->saved_data.at("space").toInt(), ctx->saved_data.at("tail").toInt(),
          ctx->saved_data.at("reverse").toBool(), ctx->saved_data.at("temperature").toDouble()};
}

struct Value : torch::autograd::Function<Value> {
  static constexpr const char* name = "KlDivTopkBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& input, const Variable& indices,
                               const Variable& log_probs, const OptionalTensor& tail_log_prob,
                               const OptionalTensor& row_weight, int64_t space, int64_t tail, bool reverse,
                               double temperature) {
    const Options o{space, tail, reverse, temperature};
    auto [loss, stat] = call_rows(input, indices, log_probs, tail_log_prob, row_weight, o);
    ctx->save_for_backward(
        {input, indices, log_probs, stat, tail_log_prob.value_or(Tensor()), row_weight.value_or(Tensor())});
    pack(ctx, o);
    ctx->saved_data["has_tail"] = tail_log_prob.has_value();
    ctx->mark_non_differentiable({stat});
    ctx->set_materialize_grads(false);
    return {loss, stat};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(9);
    if (!incoming[0].defined()) return result;
    const auto s = ctx->get_saved_variables();
    const Mask3 mask{ctx->needs_input_grad(0), ctx->needs_input_grad(2), s[4].defined() && ctx->needs_input_grad(3)};
    auto [g_input, g_log_probs, g_tail] =
        call_backward(weighted(incoming[0], s[5]), s[0], s[1], s[2], s[3], if_defined(s[4]), unpack(ctx), mask);
    result[0] = undefined_unless(mask[0], g_input);
    result[2] = undefined_unless(mask[1], g_log_probs);
    result[3] = undefined_unless(mask[2], g_tail);
    return result;
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    // Optional arguments that are absent are not in the lists.
    const bool has_tail = ctx->saved_data["has_tail"].toBool();
    const size_t weight_at = has_tail ? 4 : 3;
    const OptionalTensor tail = has_tail ? if_defined(in[3]) : std::nullopt,
                         weight = in.size() > weight_at ? if_defined(in[weight_at]) : std::nullopt;
    const Options o = unpack(ctx);
    const auto [loss, stat] = call_rows(in[0], in[1], in[2], tail, weight, o);
    const Mask3 mask{tangents[0].defined(), tangents[2].defined(), has_tail && tangents[3].defined()};
    // Widened: a gradient in a half type would leave the tangent no better than that type.
    const auto type = loss.scalar_type();
    const OptionalTensor wide_tail = tail.has_value() ? OptionalTensor(tail->to(type)) : std::nullopt;
    const auto [g_input, g_log_probs, g_tail] =
        call_backward(weighted(at::ones_like(loss), weight.value_or(Tensor())), in[0].to(type), in[1], in[2].to(type),
                      stat, wide_tail, o, mask);
    auto tangent = at::zeros_like(loss);
    if (mask[0]) tangent = tangent + (g_input * tangents[0].to(type)).sum(-1);
    if (mask[1]) tangent = tangent + (g_log_probs * tangents[2].to(type)).sum(-1);
    if (mask[2]) tangent = tangent + g_tail * tangents[3].to(type);
    return {tangent, Tensor()};
  }
};

// Linear in the incoming gradient, with a symmetric Jacobian in (input, log_probs, tail_log_prob): both derivatives are
// the double backward. The statistics are a function of the others; the derivatives here are total ones.
struct Gradient : torch::autograd::Function<Gradient> {
  static constexpr const char* name = "KlDivTopkGradientBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable& input,
                               const Variable& indices, const Variable& log_probs, const Variable& stat,
                               const OptionalTensor& tail_log_prob, int64_t space, int64_t tail, bool reverse,
                               double temperature, Mask3 mask) {
    const Options o{space, tail, reverse, temperature};
    auto [g_input, g_log_probs, g_tail] = call_backward(grad, input, indices, log_probs, stat, tail_log_prob, o, mask);
    ctx->save_for_backward({grad, input, indices, log_probs, stat, tail_log_prob.value_or(Tensor())});
    pack(ctx, o);
    ctx->saved_data["mask_input"] = mask[0];
    ctx->saved_data["mask_log_probs"] = mask[1];
    ctx->saved_data["mask_tail"] = mask[2];
    ctx->set_materialize_grads(false);
    return {g_input, g_log_probs, g_tail};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& v) {
    variable_list result(11);
    const auto s = ctx->get_saved_variables();
    const Mask4 mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(3),
                     s[5].defined() && ctx->needs_input_grad(5)};
    const Mask3 given = mask_of(ctx);
    variable_list along(3);
    for (size_t i = 0; i < 3; ++i) along[i] = undefined_unless(given[i], v[i]);
    if (!along[0].defined() && !along[1].defined() && !along[2].defined()) return result;
    auto [d_grad, d_input, d_log_probs, d_tail] = derivative(ctx, along, s, if_defined(s[5]), mask);
    result[0] = undefined_unless(mask[0], d_grad);
    result[1] = undefined_unless(mask[1], d_input);
    result[3] = undefined_unless(mask[2], d_log_probs);
    result[5] = undefined_unless(mask[3], d_tail);
    return result;
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    const Mask3 mask = mask_of(ctx);
    const bool has_tail = in.size() > 5;
    const OptionalTensor tail = has_tail ? if_defined(in[5]) : std::nullopt;
    const variable_list along{tangents[1], tangents[3], has_tail ? tangents[5] : Tensor()};
    variable_list out(3);
    if (along[0].defined() || along[1].defined() || along[2].defined())
      std::tie(std::ignore, out[0], out[1], out[2]) =
          derivative(ctx, along, in, tail, {false, mask[0], mask[1], mask[2]});
    if (tangents[0].defined()) {
      const auto [g_input, g_log_probs, g_tail] =
          call_backward(tangents[0], in[1], in[2], in[3], in[4], tail, unpack(ctx), mask);
      const variable_list g{g_input, g_log_probs, g_tail};
      for (size_t i = 0; i < 3; ++i) out[i] = out[i].defined() ? out[i] + g[i] : g[i];
    }
    for (size_t i = 0; i < 3; ++i) out[i] = undefined_unless(mask[i], out[i]);
    return out;
  }

 private:
  static Mask3 mask_of(AutogradContext* ctx) {
    return {ctx->saved_data["mask_input"].toBool(), ctx->saved_data["mask_log_probs"].toBool(),
            ctx->saved_data["mask_tail"].toBool()};
  }
  // s: grad, input, indices, log_probs, stat
  static Tensors4 derivative(AutogradContext* ctx, const variable_list& v, const variable_list& s,
                             const OptionalTensor& tail, Mask4 mask) {
    return call_double_backward(if_defined(v[0]), if_defined(v[1]), if_defined(v[2]), s[0], s[1], s[2], s[3], s[4],
                                tail, unpack(ctx), mask);
  }
};

ExpectedGradient& expected_gradient() {
  static ExpectedGradient expected;
  return expected;
}

// The stored gradient is the one for `incoming`; where another comes, see core/gradient_buffer.h.
struct ValueAndGradient : torch::autograd::Function<ValueAndGradient> {
  static constexpr const char* name = "KlDivTopkValueAndGradBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& input, const Variable& indices,
                               const Variable& log_probs, const OptionalTensor& tail_log_prob,
                               const OptionalTensor& row_weight, int64_t space, int64_t tail, bool reverse,
                               double temperature, double scale, double incoming) {
    const Options o{space, tail, reverse, temperature};
    auto [loss, stat, gradient] =
        call_value_and_grad(input, indices, log_probs, tail_log_prob, row_weight, o, scale, incoming);
    ctx->save_for_backward(
        {input, indices, log_probs, stat, tail_log_prob.value_or(Tensor()), row_weight.value_or(Tensor()), gradient});
    pack(ctx, o);
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["incoming"] = incoming;
    ctx->mark_non_differentiable({stat, gradient});
    ctx->set_materialize_grads(false);  // as in row_divergence.h
    return {loss, stat, gradient};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(11);
    const auto& g = incoming[0];
    if (!g.defined()) return result;
    auto s = ctx->get_saved_variables();
    const Options o = unpack(ctx);
    const double scale = ctx->saved_data["scale"].toDouble();
    const auto tail = if_defined(s[4]);
    const Mask3 mask{ctx->needs_input_grad(0), ctx->needs_input_grad(2), tail && ctx->needs_input_grad(3)};
    if (at::GradMode::is_enabled() || mask[1] || mask[2] || at::isTensorSubclassLike(g) ||
        at::areAnyTensorSubclassLike(s)) {
      const auto each = (g * scale).expand_symint(s[0].sym_sizes().slice(0, s[0].dim() - 1));
      auto [g_input, g_log_probs, g_tail] = call_backward(weighted(each, s[5]), s[0], s[1], s[2], s[3], tail, o, mask);
      result[0] = undefined_unless(mask[0], g_input);
      result[2] = undefined_unless(mask[1], g_log_probs);
      result[3] = undefined_unless(mask[2], g_tail);
      return result;
    }
    Tensor gradient = std::move(s[6]);
    s[6] = Tensor();
    result[0] =
        hand_over(std::move(gradient), ctx->saved_data["incoming"].toDouble(), g.item().toDouble(), expected_gradient(),
                  [&](double needed) {
                    return std::get<2>(call_value_and_grad(s[0], s[1], s[2], tail, if_defined(s[5]), o, scale, needed));
                  });
    return result;
  }
  static variable_list jvp(AutogradContext*, const variable_list&, const variable_list&) {
    TORCH_INTERNAL_ASSERT(false, kName, ": value_and_grad is not chosen where there is a tangent");
  }
};

Tensors2 rows_autograd(const Tensor& input, const Tensor& indices, const Tensor& log_probs,
                       const OptionalTensor& tail_log_prob, const OptionalTensor& row_weight, int64_t space,
                       int64_t tail, bool reverse, double temperature) {
  auto v = apply<Value>(input, indices, log_probs, tail_log_prob, row_weight, space, tail, reverse, temperature);
  return {v[0], v[1]};
}
Tensors3 backward_autograd(const Tensor& grad, const Tensor& input, const Tensor& indices, const Tensor& log_probs,
                           const Tensor& stat, const OptionalTensor& tail_log_prob, int64_t space, int64_t tail,
                           bool reverse, double temperature, Mask3 mask) {
  auto v =
      apply<Gradient>(grad, input, indices, log_probs, stat, tail_log_prob, space, tail, reverse, temperature, mask);
  return {v[0], v[1], v[2]};
}

Tensors3 value_and_grad_autograd(const Tensor& input, const Tensor& indices, const Tensor& log_probs,
                                 const OptionalTensor& tail_log_prob, const OptionalTensor& row_weight, int64_t space,
                                 int64_t tail, bool reverse, double temperature, double scale, double incoming) {
  auto v = apply<ValueAndGradient>(input, indices, log_probs, tail_log_prob, row_weight, space, tail, reverse,
                                   temperature, scale, incoming);
  return {v[0], v[1], v[2]};
}

// The double backward in ATen operators, for derivatives beyond the second. Notation of kl_div_topk.h; the tail is a
// column of its own after those of K. Classes of p = 0 (forward) or q = 0 (reverse) are constants here.
Tensors4 double_backward_composite(const OptionalTensor& v_input, const OptionalTensor& v_log_probs,
                                   const OptionalTensor& v_tail, const Tensor& grad, const Tensor& input,
                                   const Tensor& indices, const Tensor& log_probs, const OptionalTensor& tail_log_prob,
                                   const Options& o, Mask4 mask) {
  const auto dtype = loss_dtype(input, log_probs);
  const bool logits = o.space == kLogits, probs = o.space == kProbs, bucket = o.tail == kTailBucket,
             derived = bucket && !tail_log_prob.has_value(), renorm_both = o.tail == kTailRenormBoth,
             renorm = renorm_both || o.tail == kTailRenormTarget, normalised = logits || renorm_both,
             reads_all = bucket || (logits && !renorm_both);
  const double t = logits ? o.temperature : 1;
  const auto sum = [](const Tensor& x) { return x.sum(-1, true); };
  // v x where v is 0 for classes that are not there, whatever x is; clear of 0 inf in the derivatives too
  const auto only = [](const Tensor& where, const Tensor& x) { return at::where(where, x, 0); };

  const auto x = input.to(dtype), a = log_probs.to(dtype);
  const auto kept = a != kMinusInf;
  const auto index = at::where(kept, indices, 0);
  const auto outside = at::zeros_like(x).scatter_add(-1, index, kept.to(dtype)) == 0;
  const auto vx = v_input.has_value() ? v_input->to(dtype) : at::zeros_like(x);
  const auto va = only(kept, v_log_probs.has_value() ? v_log_probs->to(dtype) : at::zeros_like(a));

  // log q of all classes before any normalisation over K, and its derivative
  const auto zero_x = x == 0;
  const auto divisor = probs ? at::where(zero_x, 1, x) : x;
  const auto log_x = logits ? at::log_softmax(x / t, -1) : (probs ? at::where(zero_x, kMinusInf, divisor.log()) : x);
  const auto d = probs ? only(zero_x.logical_not(), vx / divisor) : vx / t;
  auto log_q = at::where(kept, log_x.gather(-1, index), kMinusInf), d_q = only(kept, d.gather(-1, index));
  auto log_p = a, d_p = va;
  const auto normalise = [&](Tensor& log, Tensor& dot) {
    const auto lse = at::logsumexp(log, -1, true);
    log = at::where(log == kMinusInf, kMinusInf, log - lse);
    dot = dot - sum(log.exp() * dot);
  };
  if (renorm) normalise(log_p, d_p);
  if (renorm_both) normalise(log_q, d_q);

  // the tail as a last column
  Tensor w, d_mean, log_q_t;
  if (reads_all) {
    const auto hidden = at::where(outside, log_x, kMinusInf);
    log_q_t = at::logsumexp(hidden, -1, true);
    const auto no_tail = log_q_t == kMinusInf;
    w = only(outside, (hidden - at::where(no_tail, 0, log_q_t)).exp());
    d_mean = sum(w * d);
  } else {
    log_q_t = at::full_symint(sum(a).sym_sizes(), kMinusInf, a.options());
    d_mean = at::zeros_like(log_q_t);
  }
  Tensor log_p_t, d_p_t;
  if (!bucket) {
    log_p_t = at::full_symint(log_q_t.sym_sizes(), kMinusInf, a.options());
    d_p_t = at::zeros_like(log_q_t);
  } else if (derived) {
    const auto left = -at::expm1(at::logsumexp(a, -1, true));
    const auto none = left.le(0).logical_or((log_q_t == kMinusInf).logical_and(left <= kMassTolerance));
    log_p_t = at::where(none, kMinusInf, at::where(none, 1, left).log());
    d_p_t = -only(none.logical_not(), sum(a.exp() * va) / at::where(none, 1, left));
  } else {
    log_p_t = tail_log_prob->to(dtype).unsqueeze(-1);
    d_p_t = v_tail.has_value() ? v_tail->to(dtype).unsqueeze(-1) : at::zeros_like(log_p_t);
  }
  const auto q = log_q.exp(), q_t = log_q_t.exp(), p = log_p.exp(), p_t = log_p_t.exp();
  auto d_q_t = d_mean;
  if (logits && !renorm_both) {
    const auto mu = sum(q * d_q) + q_t * d_mean;
    d_q = d_q - mu, d_q_t = d_mean - mu;
  }

  // Slopes of K and of the tail, and their derivatives.
  struct Slopes {
    Tensor p, q, p_dot, q_dot;
  };
  const auto slopes = [&](const Tensor& pe, const Tensor& qe, const Tensor& log_pe, const Tensor& log_qe,
                          const Tensor& dp, const Tensor& dq, const Tensor& there) -> Slopes {
    const auto l = only(there, at::where(there, log_pe, 0) - at::where(there, log_qe, 0)), l_dot = only(there, dp - dq);
    if (o.reverse) {
      const auto dot = only(there, qe * dq);
      return {-only(there, qe), only(there, qe * (1 - l)), -dot, dot * (1 - l) - qe * l_dot};
    }
    const auto dot = only(there, pe * dp);
    return {only(there, pe * (l + 1)), -only(there, pe), dot * (l + 1) + pe * l_dot, -dot};
  };
  const auto weighs = o.reverse ? q > 0 : p > 0;
  const auto tail_weighs = bucket ? (o.reverse ? q_t > 0 : p_t > 0) : (q_t < 0);
  const auto k = slopes(p, q, log_p, log_q, d_p, d_q, weighs.logical_and(kept));
  const auto s = slopes(p_t, q_t, log_p_t, log_q_t, d_p_t, d_q_t, tail_weighs);

  auto g_p = k.p_dot, g_q = k.q_dot, tail_slope = s.q, tail_slope_dot = s.q_dot, k_q = k.q;
  if (renorm) g_p = g_p - p * (d_p * sum(k.p) + sum(k.p_dot));
  if (derived) {
    const auto some = p_t > 0;
    const auto at_least = at::where(some, p_t, 1);
    const auto ratio = only(some, s.p / at_least), ratio_dot = only(some, s.p_dot / at_least) - ratio * d_p_t;
    g_p = g_p - p * (d_p * ratio + ratio_dot);
  }
  if (normalised) {
    const auto n = sum(k.q) + s.q, n_dot = sum(k.q_dot) + s.q_dot;
    k_q = k_q - q * n, g_q = g_q - q * (d_q * n + n_dot);
    tail_slope = tail_slope - q_t * n, tail_slope_dot = tail_slope_dot - q_t * (d_q_t * n + n_dot);
  }
  const auto g = grad.to(dtype).unsqueeze(-1);
  const auto loss_dot = sum(d_p * k.p) + sum(d_q * k.q) + d_p_t * s.p + d_q_t * s.q;
  Tensor d_input;
  if (mask[1]) {
    auto dense = at::zeros_like(x).scatter_add(-1, index, only(kept, g_q));
    auto gamma = at::zeros_like(x).scatter_add(-1, index, only(kept, k_q));
    if (reads_all) {
      dense = dense + w * ((d - d_mean) * tail_slope + tail_slope_dot);
      gamma = gamma + w * tail_slope;
    }
    d_input = g * (probs ? only(zero_x.logical_not(), (dense - gamma * d) / divisor) : dense / t);
  }
  const auto result = [](bool wanted, const Tensor& value, const Tensor& like) {
    return wanted ? value.to(like.scalar_type()) : nothing_like(like);
  };
  return {result(mask[0], loss_dot.squeeze(-1), grad), result(mask[1], d_input, input),
          result(mask[2], g * only(kept, g_p), log_probs),
          result(mask[3], (g * s.p_dot).squeeze(-1), tail_log_prob.value_or(grad))};
}

Tensors4 double_backward_autograd(const OptionalTensor& v_input, const OptionalTensor& v_log_probs,
                                  const OptionalTensor& v_tail, const Tensor& grad, const Tensor& input,
                                  const Tensor& indices, const Tensor& log_probs, const Tensor& stat,
                                  const OptionalTensor& tail_log_prob, int64_t space, int64_t tail, bool reverse,
                                  double temperature, Mask4 mask) {
  const Options o{space, tail, reverse, temperature};
  const auto or_undefined = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
  if (is_differentiated(or_undefined(v_input), or_undefined(v_log_probs), or_undefined(v_tail), grad, input, log_probs,
                        or_undefined(tail_log_prob)))
    return double_backward_composite(v_input, v_log_probs, v_tail, grad, input, indices, log_probs, tail_log_prob, o,
                                     mask);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_double_backward(v_input, v_log_probs, v_tail, grad, input, indices, log_probs, stat, tail_log_prob, o,
                              mask);
}

// -- The public operator ----------------------------------------------------------------------------------------------

TailCode check_tail(std::string_view tail) {
  if (tail == "bucket") return kTailBucket;
  if (tail == "zero") return kTailZero;
  if (tail == "renorm_target") return kTailRenormTarget;
  if (tail == "renorm_both") return kTailRenormBoth;
  TORCH_CHECK_VALUE(false, kName, ": tail is \"", tail,
                    R"(", expected "bucket", "zero", "renorm_target" or "renorm_both")");
}

void check_teacher(const Tensor& input, const Tensor& t, const char* argument) {
  TORCH_CHECK_VALUE(t.defined(), kName, ": ", argument, " is an undefined tensor, expected a dense one");
  TORCH_CHECK_VALUE(t.device() == input.device(), kName, ": ", argument, " is on ", t.device(), ", expected ",
                    input.device(), ", where input is");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, kName, ": ", argument, " has layout ", t.layout(),
                    ", expected a dense tensor");
}
void check_dtype(const Tensor& input, const Tensor& t, const char* argument) {
  const auto a = input.scalar_type(), b = t.scalar_type();
  TORCH_CHECK_VALUE(b == at::kFloat || b == at::kDouble || b == at::kHalf || b == at::kBFloat16, kName, ": ", argument,
                    " has dtype ", b, ", expected float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE((a == at::kDouble) == (b == at::kDouble), kName, ": input has dtype ", a, " and ", argument, " ", b,
                    ", expected float64 for both or for neither");
}

Tensor kl_div_topk(const Tensor& input, const Tensor& indices, const Tensor& log_probs, std::string_view tail,
                   const OptionalTensor& tail_log_prob, std::string_view direction, std::string_view space,
                   double temperature, int64_t dim, const OptionalTensor& row_weight, std::string_view reduction,
                   const OptionalTensor& normalizer) {
  check_distribution(kName, "input", input);
  const int64_t class_dim = check_dim(kName, input, dim);
  check_teacher(input, indices, "indices");
  check_teacher(input, log_probs, "log_probs");
  check_dtype(input, log_probs, "log_probs");
  TORCH_CHECK_VALUE(indices.scalar_type() == at::kLong, kName, ": indices has dtype ", indices.scalar_type(),
                    ", expected int64");
  bool fits = log_probs.dim() == input.dim();
  for (int64_t i = 0; fits && i < input.dim(); ++i)
    fits = i == class_dim ? log_probs.sym_size(i) != 0 : log_probs.sym_size(i) == input.sym_size(i);
  TORCH_CHECK_VALUE(fits, kName, ": log_probs has shape ", log_probs.sym_sizes(), ", expected ", input.sym_sizes(),
                    ", the shape of input, with k >= 1 in place of dim ", class_dim);
  TORCH_CHECK_VALUE(indices.dim() == log_probs.dim() && indices.sym_sizes() == log_probs.sym_sizes(), kName,
                    ": indices has shape ", indices.sym_sizes(), ", expected ", log_probs.sym_sizes(),
                    ", the shape of log_probs");
  const auto tail_code = check_tail(tail);
  const auto space_code = check_space(kName, "space", space);
  const bool reverse = check_choice(kName, "direction", direction, "forward", "reverse");
  check_temperature(kName, temperature, space_code == kLogits);
  const auto last = [&](const Tensor& t) { return class_dim == t.dim() - 1 ? t : t.movedim(class_dim, -1); };
  const auto x = last(input);
  if (tail_log_prob.has_value()) {
    TORCH_CHECK_VALUE(tail_code == kTailBucket, kName, ": tail_log_prob is given with tail \"", tail,
                      "\", expected \"bucket\", the only tail that has a probability");
    check_teacher(input, *tail_log_prob, "tail_log_prob");
    check_dtype(input, *tail_log_prob, "tail_log_prob");
    const auto rows = x.sym_sizes().slice(0, x.dim() - 1);
    TORCH_CHECK_VALUE(tail_log_prob->dim() == x.dim() - 1 && tail_log_prob->sym_sizes() == rows, kName,
                      ": tail_log_prob has shape ", tail_log_prob->sym_sizes(), ", expected ", rows,
                      ", the shape of input without dim ", class_dim);
  }
  const RowReduction reduce(kName, x, loss_dtype(input, log_probs), row_weight, reduction, normalizer);
  const Options options{space_code, tail_code, reverse, temperature};
  const auto index = last(indices), given = last(log_probs);
  const auto constant = [](const OptionalTensor& t) {
    return !t.has_value() || (!t->requires_grad() && is_plain_eager(*t));
  };
  // By the rules of RowDivergence::loss.
  if (reduce.reduces() && at::GradMode::is_enabled() && x.requires_grad() && !is_half(x) && !is_for_cuda(x) &&
      is_plain_eager(x) && is_plain_eager(index) && constant(given) && constant(tail_log_prob) &&
      constant(reduce.weight()) && constant(reduce.normalizer()))
    return std::get<0>(call_value_and_grad(x, index, given, tail_log_prob, reduce.weight(), options, reduce.scale(),
                                           expected_gradient().next(x)));
  return reduce(std::get<0>(call_rows(x, index, given, tail_log_prob, reduce.weight(), options)));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "kl_div_topk(Tensor input, Tensor indices, Tensor log_probs, *, str tail=\"bucket\", Tensor? tail_log_prob=None, "
      "str direction=\"forward\", str space=\"logits\", float temperature=1.0, int dim=-1, Tensor? row_weight=None, "
      "str reduction=\"mean\", Tensor? normalizer=None) -> Tensor",
      tags);
  m.def(
      "_kl_div_topk(Tensor input, Tensor indices, Tensor log_probs, Tensor? tail_log_prob, Tensor? row_weight, int "
      "space, int tail, bool reverse, float temperature) -> (Tensor, Tensor)",
      tags);
  m.def(
      "_kl_div_topk_backward(Tensor grad, Tensor input, Tensor indices, Tensor log_probs, Tensor stat, Tensor? "
      "tail_log_prob, int space, int tail, bool reverse, float temperature, bool[3] mask) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "_kl_div_topk_value_and_grad(Tensor input, Tensor indices, Tensor log_probs, Tensor? tail_log_prob, Tensor? "
      "row_weight, int space, int tail, bool reverse, float temperature, float scale, float incoming) -> (Tensor, "
      "Tensor, Tensor)",
      tags);
  m.def(
      "_kl_div_topk_double_backward(Tensor? gg_input, Tensor? gg_log_probs, Tensor? gg_tail_log_prob, Tensor grad, "
      "Tensor input, Tensor indices, Tensor log_probs, Tensor stat, Tensor? tail_log_prob, int space, int tail, bool "
      "reverse, float temperature, bool[4] mask) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { m.impl("kl_div_topk", kl_div_topk); }
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { m.impl("kl_div_topk", kl_div_topk); }
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) {
  m.impl("_kl_div_topk", rows_dense);
  m.impl("_kl_div_topk_backward", backward_dense);
  m.impl("_kl_div_topk_value_and_grad", value_and_grad_cpu);
  m.impl("_kl_div_topk_double_backward", double_backward_dense);
}
#ifdef TD_CUDA
TORCH_LIBRARY_IMPL(torch_divergence, CUDA, m) {
  m.impl("_kl_div_topk", rows_dense);
  m.impl("_kl_div_topk_backward", backward_dense);
  m.impl("_kl_div_topk_double_backward", double_backward_dense);
}
#endif
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) {
  m.impl("_kl_div_topk", rows_meta);
  m.impl("_kl_div_topk_backward", backward_meta);
  m.impl("_kl_div_topk_value_and_grad", value_and_grad_meta);
  m.impl("_kl_div_topk_double_backward", double_backward_meta);
}
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) {
  m.impl("_kl_div_topk", rows_autograd);
  m.impl("_kl_div_topk_backward", backward_autograd);
  m.impl("_kl_div_topk_value_and_grad", value_and_grad_autograd);
  m.impl("_kl_div_topk_double_backward", double_backward_autograd);
}

}  // namespace torch_divergence
