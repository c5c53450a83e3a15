// KL divergence: operators, checks, and what core/row_divergence.h needs to make them. The formulas are in kl_div.h,
// the kernels in kl_div_cpu.cpp.
#include "kl_div/kl_div.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <string_view>

#include "core/composite_side.h"
#include "core/row_divergence.h"

namespace torch_divergence {
namespace {

struct KlDivOps {
  static constexpr const char* name = "kl_div";
  static constexpr const char* kValueNode = "KlDivBackward";
  static constexpr const char* kGradientNode = "KlDivGradientBackward";
  static constexpr const char* kValueAndGradientNode = "KlDivValueAndGradBackward";
  using Rows = RowPair;
  static constexpr int kStatSize = KlDivStat::kSize, kLossStat = KlDivStat::kKl;
  static constexpr bool kStoresHalf = true;

  static Rows rows(const Tensor& p, const Tensor& q, int64_t p_space, int64_t q_space, double temperature) {
    return {rows_in(p), rows_in(q), static_cast<int>(p_space), static_cast<int>(q_space), p.size(-1), temperature};
  }
  static auto forward_kernel() { return TD_CPU_KERNEL(kl_div_forward); }
  static auto backward_kernel() { return TD_CPU_KERNEL(kl_div_backward); }
  static auto double_backward_kernel() { return TD_CPU_KERNEL(kl_div_double_backward); }
  static auto value_and_grad_kernel() { return TD_CPU_KERNEL(kl_div_value_and_grad); }
#ifdef TD_CUDA
  static auto cuda_kernel(const KlDivForward&) { return &cuda::kl_div_forward; }
  static auto cuda_kernel(const KlDivBackward&) { return &cuda::kl_div_backward; }
  static auto cuda_kernel(const KlDivDoubleBackward&) { return &cuda::kl_div_double_backward; }
  static int64_t cuda_workspace(int64_t rows, int64_t classes) { return cuda::kl_div_workspace(rows, classes); }
#endif

  static Tensors3 double_backward_composite(const OptionalTensor& v_p, const OptionalTensor& v_q, const Tensor& grad,
                                            const Tensor& p, const Tensor& q, int64_t p_space, int64_t q_space,
                                            double temperature, std::array<bool, 3> mask) {
    const auto dtype = loss_dtype(p, q);
    const CompositeSide a(p, p_space, temperature, dtype), b(q, q_space, temperature, dtype);
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
};

using KlDiv = RowDivergence<KlDivOps, int64_t, int64_t, double>;

// Which of input and target is Q.
bool input_is_q(std::string_view direction) {
  return !check_choice(KlDivOps::name, "direction", direction, "forward", "reverse");
}

Tensor kl_div(const Tensor& input, const Tensor& target, std::string_view direction, std::string_view space,
              std::optional<std::string_view> target_space, double temperature, int64_t dim,
              const OptionalTensor& row_weight, std::string_view reduction, const OptionalTensor& normalizer) {
  const auto [x, y, x_space, y_space, reduce] = checked_pair(KlDivOps::name, input, target, space, target_space,
                                                             temperature, dim, row_weight, reduction, normalizer);
  return input_is_q(direction) ? KlDiv::loss(y, x, reduce, y_space, x_space, temperature)
                               : KlDiv::loss(x, y, reduce, x_space, y_space, temperature);
}

Tensor kl_div_inplace_grad(Tensor& input, const Tensor& target, std::string_view direction, std::string_view space,
                           std::optional<std::string_view> target_space, double temperature, int64_t dim,
                           const OptionalTensor& row_weight, std::string_view reduction,
                           const OptionalTensor& normalizer) {
  const auto [x, y, x_space, y_space, reduce] = checked_pair(KlDivOps::name, input, target, space, target_space,
                                                             temperature, dim, row_weight, reduction, normalizer);
  return input_is_q(direction)
             ? KlDiv::inplace_loss(input, target, dim, y, x, true, reduce, y_space, x_space, temperature)
             : KlDiv::inplace_loss(input, target, dim, x, y, false, reduce, x_space, y_space, temperature);
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
  KlDiv::define(m, "int p_space, int q_space, float temperature");
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
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) { KlDiv::register_cpu(m); }
#ifdef TD_CUDA
TORCH_LIBRARY_IMPL(torch_divergence, CUDA, m) { KlDiv::register_cuda(m); }
#endif
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) { KlDiv::register_meta(m); }
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) { KlDiv::register_autograd(m); }

}  // namespace torch_divergence
