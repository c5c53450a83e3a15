// Cross-entropy: operators, checks, and what core/row_divergence.h and core/row_function.h need to make them. The
// formulas are in cross_entropy.h, the kernels in cross_entropy_cpu.cpp.
#include "cross_entropy/cross_entropy.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <limits>
#include <string_view>

#include "core/composite_side.h"
#include "core/row_function.h"

namespace torch_divergence {
namespace {

constexpr const char* kName = "cross_entropy";

// -- The target is a distribution -----------------------------------------------------------------------------------

struct DistributionOps {
  static constexpr const char* name = kName;
  static constexpr const char* kValueNode = "CrossEntropyBackward";
  static constexpr const char* kGradientNode = "CrossEntropyGradientBackward";
  static constexpr const char* kValueAndGradientNode = "CrossEntropyValueAndGradBackward";
  using Rows = CrossEntropyRows;
  static constexpr int kStatSize = CrossEntropyStat::kSize, kLossStat = CrossEntropyStat::kLoss;
  static constexpr bool kStoresHalf = false;

  static Rows rows(const Tensor& p, const Tensor& q, int64_t p_space, int64_t q_space, double temperature,
                   double smoothing) {
    return {{rows_in(p), rows_in(q), static_cast<int>(p_space), static_cast<int>(q_space), p.size(-1), temperature},
            smoothing};
  }
  static auto forward_kernel() { return TD_CPU_KERNEL(cross_entropy_forward); }
  static auto backward_kernel() { return TD_CPU_KERNEL(cross_entropy_backward); }
  static auto double_backward_kernel() { return TD_CPU_KERNEL(cross_entropy_double_backward); }
  static auto value_and_grad_kernel() { return TD_CPU_KERNEL(cross_entropy_value_and_grad); }
#ifdef TD_CUDA
  static auto cuda_kernel(const CrossEntropyForward&) { return &cuda::cross_entropy_forward; }
  static auto cuda_kernel(const CrossEntropyBackward&) { return &cuda::cross_entropy_backward; }
  static auto cuda_kernel(const CrossEntropyDoubleBackward&) { return &cuda::cross_entropy_double_backward; }
  static int64_t cuda_workspace(int64_t rows, int64_t classes) { return cuda::cross_entropy_workspace(rows, classes); }
#endif

  static Tensors3 double_backward_composite(const OptionalTensor& v_p, const OptionalTensor& v_q, const Tensor& grad,
                                            const Tensor& p, const Tensor& q, int64_t p_space, int64_t q_space,
                                            double temperature, double smoothing, std::array<bool, 3> mask) {
    const auto dtype = loss_dtype(p, q);
    const CompositeSide a(p, p_space, temperature, dtype), b(q, q_space, temperature, dtype);
    const auto vp = v_p.has_value() ? v_p->to(dtype) : at::zeros_like(a.x),
               vq = v_q.has_value() ? v_q->to(dtype) : at::zeros_like(b.x);
    const double keep = 1 - smoothing;
    // Infinite n's are of no use to anybody: they are kept out of every derivative.
    const auto infinite = b.log_prob == -std::numeric_limits<double>::infinity();
    const auto n = at::where(infinite, 0, -b.log_prob), n_dot = at::where(infinite, 0, -b.log_dot(vq));
    const auto mixed = a.prob * keep + smoothing / a.x.sym_size(-1), p_dot = a.dot(vp), mixed_dot = p_dot * keep;
    const auto mass = mixed.sum(-1, true), mass_dot = mixed_dot.sum(-1, true);
    const auto total = (a.prob * n).sum(-1, true), total_dot = (p_dot * n + a.prob * n_dot).sum(-1, true);
    const auto loss_dot = (mixed_dot * n + mixed * n_dot).sum(-1);
    const auto g = grad.to(dtype).unsqueeze(-1);
    Tensor d_p, d_q;
    if (p_space == kLogits) {
      d_p = (p_dot * (n - total) + a.prob * (n_dot - total_dot)) / temperature;
    } else {
      d_p = p_space == kLogProbs ? p_dot * n + a.prob * n_dot : n_dot;
    }
    if (q_space == kLogits) {
      d_q = (b.prob * (mass_dot - n_dot * mass) - mixed_dot) / temperature;
    } else {
      d_q = q_space == kLogProbs ? -mixed_dot : at::where(b.prob == 0, 0, -(mixed * n_dot + mixed_dot) / b.divisor);
    }
    return {mask[0] ? loss_dot.to(grad.scalar_type()) : at::empty({0}, grad.options()),
            mask[1] ? (g * keep * d_p).to(p.scalar_type()) : at::empty({0}, p.options()),
            mask[2] ? (g * d_q).to(q.scalar_type()) : at::empty({0}, q.options())};
  }
};

using WithDistribution = RowDivergence<DistributionOps, int64_t, int64_t, double, double>;

// -- The target is class labels ---------------------------------------------------------------------------------------

struct LabelOps {
  static constexpr const char* name = kName;
  static constexpr const char* op = "cross_entropy_labels";
  static constexpr const char* kValueNode = "CrossEntropyLabelsBackward";
  static constexpr const char* kGradientNode = "CrossEntropyLabelsGradientBackward";
  static constexpr const char* kValueAndGradientNode = "CrossEntropyLabelsValueAndGradBackward";
  using Rows = LabelRows;
  static constexpr int kStatSize = LabelStat::kSize, kLossStat = LabelStat::kLoss;

  static Tensor ready(const Tensor& labels) { return labels.to(at::kLong).contiguous(); }
  static void check(const Tensor& labels, const Tensor& x, const double* used) {
    const int64_t* const y = labels.const_data_ptr<int64_t>();
    const int64_t classes = x.size(-1);
    for (int64_t i = 0; i < labels.numel(); ++i)
      TORCH_CHECK_VALUE((used != nullptr && used[i] == 0) || (y[i] >= 0 && y[i] < classes), name, ": target holds ",
                        y[i], " for row ", i, ", expected a class from 0 to ", classes - 1, ", or ignore_index");
  }
  static Rows rows(const Tensor& x, const Tensor& labels, int64_t space, double temperature, double smoothing) {
    return {
        {rows_in(x), static_cast<int>(space), x.size(-1), temperature}, labels.const_data_ptr<int64_t>(), smoothing};
  }
  static auto forward_kernel() { return TD_CPU_KERNEL(cross_entropy_labels_forward); }
  static auto backward_kernel() { return TD_CPU_KERNEL(cross_entropy_labels_backward); }
  static auto double_backward_kernel() { return TD_CPU_KERNEL(cross_entropy_labels_double_backward); }
  static auto value_and_grad_kernel() { return TD_CPU_KERNEL(cross_entropy_labels_value_and_grad); }
#ifdef TD_CUDA
  static auto cuda_kernel(const LabelForward&) { return &cuda::cross_entropy_labels_forward; }
  static auto cuda_kernel(const LabelBackward&) { return &cuda::cross_entropy_labels_backward; }
  static auto cuda_kernel(const LabelDoubleBackward&) { return &cuda::cross_entropy_labels_double_backward; }
  static int64_t cuda_workspace(int64_t rows, int64_t classes) {
    return cuda::cross_entropy_labels_workspace(rows, classes);
  }
#endif

  static Tensors2 double_backward_composite(const Tensor& gg, const Tensor& grad, const Tensor& input,
                                            const Tensor& labels, int64_t space, double temperature, double smoothing,
                                            std::array<bool, 2> mask) {
    const auto dtype = loss_dtype(input, input);
    const auto x = input.to(dtype), v = gg.to(dtype), g = grad.to(dtype).unsqueeze(-1);
    // Rows that are left out may have any label; their g is 0.
    const auto y = labels.to(at::kLong).clamp_min(0).unsqueeze(-1);
    const auto own = at::zeros_like(x).scatter(-1, at::where(y < x.sym_size(-1), y, 0), 1 - smoothing);
    const auto p = own + smoothing / x.sym_size(-1);
    Tensor first, second;
    if (space == kLogits) {
      const auto q = at::softmax(x / temperature, -1);
      first = (q - p) / temperature;
      second = q * (v - (q * v).sum(-1, true)) / (temperature * temperature);
    } else if (space == kLogProbs) {
      first = -p, second = at::zeros_like(x);
    } else {
      const auto divisor = at::where(p == 0, 1, x);
      first = -p / divisor, second = p * v / (divisor * divisor);
    }
    return {mask[0] ? (first * v).sum(-1).to(grad.scalar_type()) : at::empty({0}, grad.options()),
            mask[1] ? at::where(g == 0, 0, g * second).to(input.scalar_type()) : at::empty({0}, input.options())};
  }
};

using WithLabels = RowFunction<LabelOps, Types<const Tensor&>, Types<int64_t, double, double>>;

// -- Public operators -------------------------------------------------------------------------------------------------

bool are_labels(const Tensor& target) { return at::isIntegralType(target.scalar_type(), /*includeBool=*/false); }

void check_smoothing(double smoothing) {
  TORCH_CHECK_VALUE(smoothing >= 0 && smoothing <= 1, kName, ": label_smoothing is ", smoothing,
                    ", expected a number from 0 to 1");
}

constexpr int64_t kIgnoreIndex = -100;

CheckedPair checked_distribution(const Tensor& input, const Tensor& target,
                                 std::optional<std::string_view> target_space, int64_t ignore_index,
                                 std::string_view space, double temperature, int64_t dim,
                                 const OptionalTensor& row_weight, std::string_view reduction,
                                 const OptionalTensor& normalizer) {
  TORCH_CHECK_VALUE(ignore_index == kIgnoreIndex, kName, ": ignore_index is ", ignore_index,
                    " with a target that is a distribution, expected it with class indices only; leave rows out by "
                    "row_weight");
  return checked_pair(kName, input, target, space, target_space.value_or("probs"), temperature, dim, row_weight,
                      reduction, normalizer);
}

struct CheckedLabels {
  Tensor input;
  SpaceCode space;
  RowReduction reduction;
};
CheckedLabels checked_labels(const Tensor& input, const Tensor& target, std::optional<std::string_view> target_space,
                             int64_t ignore_index, std::string_view space, double temperature, int64_t dim,
                             const OptionalTensor& row_weight, std::string_view reduction,
                             const OptionalTensor& normalizer) {
  check_distribution(kName, "input", input);
  const int64_t class_dim = check_dim(kName, input, dim);
  TORCH_CHECK_VALUE(!target_space.has_value(), kName, ": target_space is \"", *target_space,
                    "\" with a target of class indices (dtype ", target.scalar_type(),
                    "), expected it with a distribution only");
  TORCH_CHECK_VALUE(target.layout() == at::kStrided, kName, ": target has layout ", target.layout(),
                    ", expected a dense tensor");
  TORCH_CHECK_VALUE(input.device() == target.device(), kName, ": target is on ", target.device(), ", expected ",
                    input.device(), ", where input is");
  const auto code = check_space(kName, "space", space);
  check_temperature(kName, temperature, code == kLogits);
  const auto x = class_dim == input.dim() - 1 ? input : input.movedim(class_dim, -1);
  const auto rows = x.sym_sizes().slice(0, x.dim() - 1);
  TORCH_CHECK_VALUE(target.sym_sizes() == rows, kName, ": target has shape ", target.sym_sizes(),
                    " and class indices, expected ", rows, ", the shape of input without its dim ", dim);
  // The caller's weights, checked; then those of the rows that are kept.
  const RowReduction given(kName, x, loss_dtype(x, x), row_weight, reduction, normalizer);
  const auto kept = target.to(at::kLong).ne(ignore_index);  // a smaller type would wrap ignore_index around
  const auto weight = given.weight().has_value() ? at::where(kept, *given.weight(), 0) : kept;
  return {x, code,
          RowReduction(kName, x, loss_dtype(x, x), weight, reduction == "batchmean" ? "mean" : reduction, normalizer)};
}

Tensor cross_entropy(const Tensor& input, const Tensor& target, std::optional<std::string_view> target_space,
                     double label_smoothing, int64_t ignore_index, std::string_view space, double temperature,
                     int64_t dim, const OptionalTensor& row_weight, std::string_view reduction,
                     const OptionalTensor& normalizer) {
  check_smoothing(label_smoothing);
  if (are_labels(target)) {
    const auto [x, x_space, reduce] = checked_labels(input, target, target_space, ignore_index, space, temperature, dim,
                                                     row_weight, reduction, normalizer);
    return WithLabels::loss(x, target, reduce, x_space, temperature, label_smoothing);
  }
  const auto [x, y, x_space, y_space, reduce] = checked_distribution(
      input, target, target_space, ignore_index, space, temperature, dim, row_weight, reduction, normalizer);
  return WithDistribution::loss(y, x, reduce, y_space, x_space, temperature, label_smoothing);
}

Tensor cross_entropy_inplace_grad(Tensor& input, const Tensor& target, std::optional<std::string_view> target_space,
                                  double label_smoothing, int64_t ignore_index, std::string_view space,
                                  double temperature, int64_t dim, const OptionalTensor& row_weight,
                                  std::string_view reduction, const OptionalTensor& normalizer) {
  check_smoothing(label_smoothing);
  if (are_labels(target)) {
    const auto [x, x_space, reduce] = checked_labels(input, target, target_space, ignore_index, space, temperature, dim,
                                                     row_weight, reduction, normalizer);
    return WithLabels::inplace_loss(input, x, target, reduce, x_space, temperature, label_smoothing);
  }
  const auto [x, y, x_space, y_space, reduce] = checked_distribution(
      input, target, target_space, ignore_index, space, temperature, dim, row_weight, reduction, normalizer);
  return WithDistribution::inplace_loss(input, target, dim, y, x, true, reduce, y_space, x_space, temperature,
                                        label_smoothing);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const std::string options =
      "Tensor target, *, str? target_space=None, float label_smoothing=0.0, int ignore_index=-100, str "
      "space=\"logits\", float temperature=1.0, int dim=-1, Tensor? row_weight=None, str reduction=\"mean\", Tensor? "
      "normalizer=None) -> Tensor";
  m.def(("cross_entropy(Tensor input, " + options).c_str(), tags);
  m.def(("cross_entropy_inplace_grad(Tensor(a!) input, " + options).c_str(), tags);
  WithDistribution::define(m, "int p_space, int q_space, float temperature, float label_smoothing");
  WithLabels::define(m, "Tensor labels, ", "int space, float temperature, float label_smoothing");
}

TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) {
  m.impl("cross_entropy", cross_entropy);
  m.impl("cross_entropy_inplace_grad", cross_entropy_inplace_grad);
}
// As for kl_div: or vmap would meet the slow fallback first.
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) {
  m.impl("cross_entropy", cross_entropy);
  m.impl("cross_entropy_inplace_grad", cross_entropy_inplace_grad);
}
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) {
  WithDistribution::register_cpu(m);
  WithLabels::register_cpu(m);
}
#ifdef TD_CUDA
TORCH_LIBRARY_IMPL(torch_divergence, CUDA, m) {
  WithDistribution::register_cuda(m);
  WithLabels::register_cuda(m);
}
#endif
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) {
  WithDistribution::register_meta(m);
  WithLabels::register_meta(m);
}
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) {
  WithDistribution::register_autograd(m);
  WithLabels::register_autograd(m);
}

}  // namespace torch_divergence
