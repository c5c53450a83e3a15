// Knowledge distillation, as a composition over kl_div, js_div, kl_div_topk and cross_entropy.
#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>
#include <torch_divergence/functional/cross_entropy.h>
#include <torch_divergence/functional/distillation.h>
#include <torch_divergence/functional/js_div.h>
#include <torch_divergence/functional/kl_div.h>
#include <torch_divergence/functional/kl_div_topk.h>

#include <string_view>

#include "core/checks.h"

namespace torch_divergence {
namespace {

constexpr const char* kName = "distillation_loss";
using OptionalTensor = std::optional<at::Tensor>;

Reduction reduction_of(std::string_view name) {
  if (name == "none") return Reduction::None;
  if (name == "sum") return Reduction::Sum;
  TORCH_CHECK_VALUE(name == "mean" || name == "batchmean", kName, ": reduction is \"", name,
                    R"(", expected "none", "sum", "mean" or "batchmean")");
  return Reduction::Mean;
}

at::Tensor distillation_loss_op(const at::Tensor& student, const OptionalTensor& teacher, const OptionalTensor& labels,
                                const OptionalTensor& topk_indices, const OptionalTensor& topk_log_probs,
                                double temperature, std::optional<double> alpha, std::string_view divergence,
                                std::string_view direction, double beta, int64_t ignore_index,
                                const OptionalTensor& row_weight, std::string_view reduction,
                                const OptionalTensor& normalizer) {
  const bool js = check_choice(kName, "divergence", divergence, "kl", "js");
  const bool reverse = check_choice(kName, "direction", direction, "forward", "reverse");
  const bool topk = topk_indices.has_value() || topk_log_probs.has_value();
  TORCH_CHECK_VALUE(topk_indices.has_value() == topk_log_probs.has_value(), kName,
                    ": topk has only one of indices and log_probs, expected both");
  TORCH_CHECK_VALUE(teacher.has_value() != topk, kName, ": ",
                    topk ? "teacher_logits and topk are both" : "neither teacher_logits nor topk is",
                    " given, expected one of the two");
  TORCH_CHECK_VALUE(!js || !topk, kName, ": divergence is \"js\" with topk, expected \"kl\"");
  TORCH_CHECK_VALUE(!js || !reverse, kName,
                    ": direction is \"reverse\" with divergence \"js\", expected \"forward\": JS has none");
  TORCH_CHECK_VALUE(js || beta == 0.5, kName, ": beta is ", beta,
                    " with divergence \"kl\", expected 0.5: only JS has one");
  const double a = alpha.value_or(labels.has_value() ? 0.5 : 1.0);
  TORCH_CHECK_VALUE(a >= 0 && a <= 1, kName, ": alpha is ", a, ", expected a number from 0 to 1");
  TORCH_CHECK_VALUE(labels.has_value() || a == 1, kName, ": alpha is ", a, " without labels, expected 1 or labels");
  check_temperature(kName, temperature, true);
  TORCH_CHECK_VALUE(reduction != "batchmean" || !labels.has_value(), kName,
                    ": reduction is \"batchmean\" with labels; expected \"mean\"");

  at::Tensor weight;  // undefined: none
  if (row_weight.has_value()) weight = *row_weight;
  if (labels.has_value()) {
    const auto kept = labels->ne(ignore_index);
    weight = weight.defined() ? at::where(kept, weight, at::zeros_like(weight)) : kept;
  }
  const auto reduce = reduction_of(reduction);
  // Each loss keeps its own operator and with it the gradient in the forward visit.
  const auto share = [&](auto options) {
    if (weight.defined()) options.row_weight(weight);
    return options.reduction(reduce).normalizer(normalizer);
  };
  at::Tensor loss;
  if (a > 0) {
    const auto d = reverse ? Direction::Reverse : Direction::Forward;
    if (topk) {
      loss = kl_div_topk(student, *topk_indices, *topk_log_probs,
                         share(KLDivTopKOptions().direction(d).temperature(temperature)));
    } else if (js) {
      loss = js_div(student, *teacher, share(JSDivOptions().beta(beta).temperature(temperature)));
    } else {
      loss = kl_div(student, *teacher, share(KLDivOptions().direction(d).temperature(temperature)));
    }
    loss = a * temperature * temperature * loss;
  }
  if (a < 1) {
    const auto hard =
        (1 - a) * cross_entropy(student, *labels, share(CrossEntropyOptions().ignore_index(ignore_index)));
    loss = loss.defined() ? loss + hard : hard;
  }
  return loss;
}

}  // namespace

const char* to_string(Divergence divergence) {
  switch (divergence) {
    case Divergence::KL:
      return "kl";
    case Divergence::JS:
      return "js";
  }
  TORCH_CHECK_VALUE(false, "divergence: no such value, ", static_cast<int>(divergence));
}

at::Tensor distillation_loss(const at::Tensor& student_logits, const OptionalTensor& teacher_logits,
                             const OptionalTensor& labels, const DistillationOptions& options) {
  OptionalTensor indices, log_probs;
  if (options.topk().has_value()) std::tie(indices, log_probs) = *options.topk();
  return distillation_loss_op(student_logits, teacher_logits, labels, indices, log_probs, options.temperature(),
                              options.alpha(), to_string(options.divergence()), to_string(options.direction()),
                              options.beta(), options.ignore_index(), options.row_weight(),
                              to_string(options.reduction()), options.normalizer());
}
at::Tensor distillation_loss(const at::Tensor& student_logits, const OptionalTensor& teacher_logits,
                             const OptionalTensor& labels) {
  return distillation_loss(student_logits, teacher_logits, labels, DistillationOptions());
}

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "distillation_loss(Tensor student_logits, Tensor? teacher_logits, Tensor? labels=None, *, Tensor? "
      "topk_indices=None, Tensor? topk_log_probs=None, float temperature=2.0, float? alpha=None, str "
      "divergence=\"kl\", "
      "str direction=\"forward\", float beta=0.5, int ignore_index=-100, Tensor? row_weight=None, str "
      "reduction=\"mean\", Tensor? normalizer=None) -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) {
  m.impl("distillation_loss", distillation_loss_op);
}
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) {
  m.impl("distillation_loss", distillation_loss_op);
}

}  // namespace torch_divergence
