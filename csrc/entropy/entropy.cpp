// Entropy: operators, checks, and what core/row_function.h needs to make them. The formulas are in entropy.h, the
// kernels in entropy_cpu.cpp.
#include "entropy/entropy.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <string_view>

#include "core/row_function.h"

namespace torch_divergence {
namespace {

struct EntropyOps {
  static constexpr const char* name = "entropy";
  static constexpr const char* op = name;
  static constexpr const char* kValueNode = "EntropyBackward";
  static constexpr const char* kGradientNode = "EntropyGradientBackward";
  static constexpr const char* kValueAndGradientNode = "EntropyValueAndGradBackward";
  using Rows = SingleRow;
  static constexpr int kStatSize = EntropyStat::kSize, kLossStat = EntropyStat::kEntropy;

  static Rows rows(const Tensor& x, int64_t space, double temperature) {
    return {rows_in(x), static_cast<int>(space), x.size(-1), temperature};
  }
  static auto forward_kernel() { return TD_CPU_KERNEL(entropy_forward); }
  static auto backward_kernel() { return TD_CPU_KERNEL(entropy_backward); }
  static auto value_and_grad_kernel() { return TD_CPU_KERNEL(entropy_value_and_grad); }
  static auto double_backward_kernel() { return TD_CPU_KERNEL(entropy_double_backward); }
#ifdef TD_CUDA
  static auto cuda_kernel(const EntropyForward&) { return &cuda::entropy_forward; }
  static auto cuda_kernel(const EntropyBackward&) { return &cuda::entropy_backward; }
  static auto cuda_kernel(const EntropyDoubleBackward&) { return &cuda::entropy_double_backward; }
  static int64_t cuda_workspace(int64_t rows, int64_t classes) { return cuda::entropy_workspace(rows, classes); }
#endif

  static Tensors2 double_backward_composite(const Tensor& gg, const Tensor& grad, const Tensor& input, int64_t space,
                                            double temperature, std::array<bool, 2> mask) {
    const auto dtype = loss_dtype(input, input);
    const auto x = input.to(dtype), v = gg.to(dtype), g = grad.to(dtype).unsqueeze(-1);
    const auto log_p = space == kLogits ? at::log_softmax(x / temperature, -1) : x;
    const auto absent = space == kProbs ? x == 0 : log_p.exp() == 0;
    // Classes of p = 0 are constant zeros by convention; the where keeps their infinities out of every derivative.
    const auto keep = [&](const Tensor& t, double other) { return at::where(absent, other, t); };
    Tensor first, second;
    if (space == kProbs) {
      const auto p = keep(x, 1);
      first = -(p.log() + 1), second = -v / p;
    } else {
      const auto l = keep(log_p, 0), p = keep(log_p.exp(), 0);
      if (space == kLogProbs) {
        first = -p * (l + 1), second = -p * v * (l + 2);
      } else {
        const auto h = -(p * l).sum(-1, true), v_dot = (v - (p * v).sum(-1, true)) / temperature;
        const auto h_dot = -(p * v_dot * l).sum(-1, true);
        first = -p * (l + h) / temperature, second = -p * (v_dot * (l + h + 1) + h_dot) / temperature;
      }
    }
    return {mask[0] ? keep(first * v, 0).sum(-1).to(grad.scalar_type()) : at::empty({0}, grad.options()),
            mask[1] ? (g * keep(second, 0)).to(input.scalar_type()) : at::empty({0}, input.options())};
  }
};

using Entropy = RowFunction<EntropyOps, Types<>, Types<int64_t, double>>;

Tensor entropy(const Tensor& input, std::string_view space, double temperature, int64_t dim,
               const OptionalTensor& row_weight, std::string_view reduction, const OptionalTensor& normalizer) {
  check_distribution(EntropyOps::name, "input", input);
  const int64_t class_dim = check_dim(EntropyOps::name, input, dim);
  const auto code = check_space(EntropyOps::name, "space", space);
  check_temperature(EntropyOps::name, temperature, code == kLogits);
  const auto x = class_dim == input.dim() - 1 ? input : input.movedim(class_dim, -1);
  const RowReduction reduce(EntropyOps::name, x, loss_dtype(x, x), row_weight, reduction, normalizer);
  return Entropy::loss(x, reduce, code, temperature);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "entropy(Tensor input, *, str space=\"logits\", float temperature=1.0, int dim=-1, Tensor? row_weight=None, str "
      "reduction=\"mean\", Tensor? normalizer=None) -> Tensor",
      tags);
  Entropy::define(m, "", "int space, float temperature");
}

TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { m.impl("entropy", entropy); }
// As for kl_div: or vmap would meet the slow fallback first.
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { m.impl("entropy", entropy); }
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) { Entropy::register_cpu(m); }
#ifdef TD_CUDA
TORCH_LIBRARY_IMPL(torch_divergence, CUDA, m) { Entropy::register_cuda(m); }
#endif
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) { Entropy::register_meta(m); }
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) { Entropy::register_autograd(m); }

}  // namespace torch_divergence
