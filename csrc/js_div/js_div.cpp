// Jensen-Shannon divergence: operators, checks, and what core/row_divergence.h needs to make them. The formulas are in
// js_div.h, the kernels in js_div_cpu.cpp and js_div_cuda.cu. The ends of the scaled family, beta = 0 and 1, are
// kl_div.
#include "js_div/js_div.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <string_view>
#include <utility>

#include "core/row_divergence.h"

namespace torch_divergence {
namespace {

// One side of the double backward in ATen operators, for derivatives beyond the second. Notation of js_div.h.
struct Composite {
  int64_t space;
  Tensor x, absent, divisor, prob, log_prob, v, log_dot, dot;
  double t;

  Composite(const Tensor& given, const OptionalTensor& v_, int64_t space_, double t_, at::ScalarType dtype)
      : space(space_), x(given.to(dtype)), t(t_) {
    v = v_.has_value() ? v_->to(dtype) : at::zeros_like(x);
    if (space == kProbs) {
      absent = x == 0;  // log and division stay clear of it, or its infinities would come back as 0 * inf
      divisor = at::where(absent, 1, x);
      prob = x, log_prob = divisor.log(), log_dot = v / divisor, dot = v;
    } else {
      log_prob = space == kLogits ? at::log_softmax(x / t, -1) : x;
      prob = log_prob.exp();
      absent = prob == 0;
      log_prob = at::where(absent, 0, log_prob);
      log_dot = space == kLogits ? (v - (prob * v).sum(-1, true)) / t : v;
      dot = prob * log_dot;
    }
    log_dot = at::where(absent, 0, log_dot);
  }
  // The derivative of this side's gradient, ratio being sigma or rho.
  Tensor derivative(const Tensor& ratio, const Tensor& ratio_dot) const {
    if (space == kProbs) return keep(ratio_dot);
    const auto whole = dot * ratio + prob * ratio_dot;
    if (space == kLogProbs) return keep(whole);
    const auto mean = (prob * ratio).sum(-1, true), mean_dot = whole.sum(-1, true);
    return keep(whole - dot * mean - prob * mean_dot) / t;
  }
  Tensor keep(const Tensor& y) const { return at::where(absent, 0, y); }
};

struct JsDivOps {
  static constexpr const char* name = "js_div";
  static constexpr const char* kValueNode = "JsDivBackward";
  static constexpr const char* kGradientNode = "JsDivGradientBackward";
  static constexpr const char* kValueAndGradientNode = "JsDivValueAndGradBackward";
  using Rows = JsDivRows;
  static constexpr int kStatSize = JsDivStat::kSize, kLossStat = JsDivStat::kJs;
  static constexpr bool kStoresHalf = false;

  static Rows rows(const Tensor& p, const Tensor& q, int64_t p_space, int64_t q_space, double temperature, double beta,
                   bool scaled) {
    const RowPair pair{rows_in(p), rows_in(q), static_cast<int>(p_space), static_cast<int>(q_space),
                       p.size(-1), temperature};
    return {pair, beta, scaled};
  }
  static auto forward_kernel() { return TD_CPU_KERNEL(js_div_forward); }
  static auto backward_kernel() { return TD_CPU_KERNEL(js_div_backward); }
  static auto double_backward_kernel() { return TD_CPU_KERNEL(js_div_double_backward); }
  static auto value_and_grad_kernel() { return TD_CPU_KERNEL(js_div_value_and_grad); }
#ifdef TD_CUDA
  static auto cuda_kernel(const JsDivForward&) { return &cuda::js_div_forward; }
  static auto cuda_kernel(const JsDivBackward&) { return &cuda::js_div_backward; }
  static auto cuda_kernel(const JsDivDoubleBackward&) { return &cuda::js_div_double_backward; }
  static int64_t cuda_workspace(int64_t rows, int64_t classes) { return cuda::js_div_workspace(rows, classes); }
#endif

  static Tensors3 double_backward_composite(const OptionalTensor& v_p, const OptionalTensor& v_q, const Tensor& grad,
                                            const Tensor& p, const Tensor& q, int64_t p_space, int64_t q_space,
                                            double temperature, double beta, bool scaled, std::array<bool, 3> mask) {
    const auto dtype = loss_dtype(p, q);
    const double rest = 1 - beta;
    const Composite a(p, v_p, p_space, temperature, dtype), b(q, v_q, q_space, temperature, dtype);
    const auto mix = beta * a.prob + rest * b.prob;
    const auto m = at::where(mix == 0, 1, mix);
    const auto log_m = m.log();
    const auto sigma = a.keep(a.log_prob - log_m), rho = b.keep(b.log_prob - log_m);
    const auto sigma_dot = a.keep(rest * (b.prob * a.log_dot - b.dot) / m),
               rho_dot = b.keep(beta * (a.prob * b.log_dot - a.dot) / m);
    const double unit = scaled ? 1 : beta * rest, of_p = unit / rest, of_q = unit / beta;
    const auto js_dot = (a.dot * sigma * of_p + b.dot * rho * of_q).sum(-1);
    const auto g = grad.to(dtype).unsqueeze(-1);
    return {mask[0] ? js_dot.to(grad.scalar_type()) : at::empty({0}, grad.options()),
            mask[1] ? (of_p * g * a.derivative(sigma, sigma_dot)).to(p.scalar_type()) : at::empty({0}, p.options()),
            mask[2] ? (of_q * g * b.derivative(rho, rho_dot)).to(q.scalar_type()) : at::empty({0}, q.options())};
  }
};

using JsDiv = RowDivergence<JsDivOps, int64_t, int64_t, double, double, bool>;

void check_beta(double beta, bool scaled) {
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1, JsDivOps::name, ": beta is ", beta, ", expected a number in [0, 1]");
  TORCH_CHECK_VALUE(scaled || (beta > 0 && beta < 1), JsDivOps::name, ": beta is ", beta,
                    ", where the divergence is 0 whatever the distributions are; expected a number in (0, 1), or "
                    "scaled=True, which at 0 and 1 is the forward and the reverse KL divergence");
}
// Below the smallest normal number beta has no inverse.
double invertible(double beta) { return std::max(beta, std::numeric_limits<double>::min()); }
// The direction of kl_div that the scaled divergence is at an end.
std::optional<std::string_view> end_of(double beta) {
  if (beta < std::numeric_limits<double>::min()) return "forward";
  if (beta == 1) return "reverse";
  return std::nullopt;
}

template <class Input>
using KlDivOp = Tensor(Input, const Tensor&, std::string_view, std::string_view, std::optional<std::string_view>,
                       double, int64_t, const OptionalTensor&, std::string_view, const OptionalTensor&);

Tensor js_div(const Tensor& input, const Tensor& target, double beta, bool scaled, std::string_view space,
              std::optional<std::string_view> target_space, double temperature, int64_t dim,
              const OptionalTensor& row_weight, std::string_view reduction, const OptionalTensor& normalizer) {
  const auto [x, y, x_space, y_space, reduce] = checked_pair(JsDivOps::name, input, target, space, target_space,
                                                             temperature, dim, row_weight, reduction, normalizer);
  check_beta(beta, scaled);
  if (const auto direction = end_of(beta); scaled && direction.has_value()) {
    static const auto kl_div = typed_op<KlDivOp<const Tensor&>>("torch_divergence::kl_div");
    return kl_div.call(input, target, *direction, space, target_space, temperature, dim, row_weight, reduction,
                       normalizer);
  }
  return beta <= 0.5 ? JsDiv::loss(y, x, reduce, y_space, x_space, temperature, invertible(beta), scaled)
                     : JsDiv::loss(x, y, reduce, x_space, y_space, temperature, 1 - beta, scaled);
}

Tensor js_div_inplace_grad(Tensor& input, const Tensor& target, double beta, bool scaled, std::string_view space,
                           std::optional<std::string_view> target_space, double temperature, int64_t dim,
                           const OptionalTensor& row_weight, std::string_view reduction,
                           const OptionalTensor& normalizer) {
  const auto [x, y, x_space, y_space, reduce] = checked_pair(JsDivOps::name, input, target, space, target_space,
                                                             temperature, dim, row_weight, reduction, normalizer);
  check_beta(beta, scaled);
  if (const auto direction = end_of(beta); scaled && direction.has_value()) {
    static const auto kl_div = typed_op<KlDivOp<Tensor&>>("torch_divergence::kl_div_inplace_grad");
    return kl_div.call(input, target, *direction, space, target_space, temperature, dim, row_weight, reduction,
                       normalizer);
  }
  return beta <= 0.5 ? JsDiv::inplace_loss(input, target, dim, y, x, true, reduce, y_space, x_space, temperature,
                                           invertible(beta), scaled)
                     : JsDiv::inplace_loss(input, target, dim, x, y, false, reduce, x_space, y_space, temperature,
                                           1 - beta, scaled);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "js_div(Tensor input, Tensor target, *, float beta=0.5, bool scaled=False, str space=\"logits\", str? "
      "target_space=None, float temperature=1.0, int dim=-1, Tensor? row_weight=None, str reduction=\"mean\", Tensor? "
      "normalizer=None) -> Tensor",
      tags);
  m.def(
      "js_div_inplace_grad(Tensor(a!) input, Tensor target, *, float beta=0.5, bool scaled=False, str "
      "space=\"logits\", str? target_space=None, float temperature=1.0, int dim=-1, Tensor? row_weight=None, str "
      "reduction=\"mean\", Tensor? normalizer=None) -> Tensor",
      tags);
  JsDiv::define(m, "int p_space, int q_space, float temperature, float beta, bool scaled");
}

TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) {
  m.impl("js_div", js_div);
  m.impl("js_div_inplace_grad", js_div_inplace_grad);
}
// A composite operator under vmap meets the slow per-sample fallback before its decomposition: say it again at this
// key.
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) {
  m.impl("js_div", js_div);
  m.impl("js_div_inplace_grad", js_div_inplace_grad);
}
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) { JsDiv::register_cpu(m); }
#ifdef TD_CUDA
TORCH_LIBRARY_IMPL(torch_divergence, CUDA, m) { JsDiv::register_cuda(m); }
#endif
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) { JsDiv::register_meta(m); }
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) { JsDiv::register_autograd(m); }

}  // namespace torch_divergence
