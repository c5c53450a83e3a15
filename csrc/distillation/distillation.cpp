// Knowledge distillation, as a composition over kl_div, js_div, kl_div_topk and cross_entropy.
#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <torch/library.h>
#include <torch_divergence/functional/cross_entropy.h>
#include <torch_divergence/functional/distillation.h>
#include <torch_divergence/functional/js_div.h>
#include <torch_divergence/functional/kl_div.h>
#include <torch_divergence/functional/kl_div_topk.h>

#include <string_view>

#include "core/checks.h"
#include "core/gradient_buffer.h"
#include "core/reduction.h"

namespace torch_divergence {
namespace {

constexpr const char* kName = "distillation_loss";
using OptionalTensor = std::optional<at::Tensor>;

// "batchmean" is "mean" where it is allowed.
Reduction reduction_of(std::string_view checked) {
  return checked == "none" ? Reduction::None : checked == "sum" ? Reduction::Sum : Reduction::Mean;
}

void check_device(const char* argument, const at::Tensor& t, const at::Tensor& student) {
  TORCH_CHECK_VALUE(t.device() == student.device(), kName, ": ", argument, " is on ", t.device(), ", expected ",
                    student.device(), ", where student_logits is");
}

void check_shape(const char* argument, const at::Tensor& t, c10::SymIntArrayRef expected) {
  TORCH_CHECK_VALUE(t.sym_sizes() == expected, kName, ": ", argument, " has shape ", t.sym_sizes(), ", expected ",
                    expected);
}

// Of a teacher: its logits, or its largest log-probabilities.
void check_teacher(const char* argument, const at::Tensor& t, const at::Tensor& student) {
  check_distribution(kName, argument, t);
  check_device(argument, t, student);
  TORCH_CHECK_VALUE((t.scalar_type() == at::kDouble) == (student.scalar_type() == at::kDouble), kName, ": ", argument,
                    " has dtype ", t.scalar_type(), " and student_logits ", student.scalar_type(),
                    ", expected float64 for both or for neither");
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
  // What belongs to a term whose weight is 0 is checked too.
  check_distribution(kName, "student_logits", student);
  const auto rows = student.sym_sizes().slice(0, static_cast<size_t>(student.dim() - 1));
  if (topk) {
    check_teacher("log_probs of topk", *topk_log_probs, student);
    auto expected = rows.vec();
    expected.push_back(topk_log_probs->sym_size(-1));
    check_shape("log_probs of topk", *topk_log_probs, expected);
    TORCH_CHECK_VALUE(topk_indices->scalar_type() == at::kLong, kName, ": indices of topk has dtype ",
                      topk_indices->scalar_type(), ", expected int64");
    check_device("indices of topk", *topk_indices, student);
    check_shape("indices of topk", *topk_indices, expected);
  } else {
    check_teacher("teacher_logits", *teacher, student);
    check_shape("teacher_logits", *teacher, student.sym_sizes());
  }
  if (labels.has_value()) {
    TORCH_CHECK_VALUE(at::isIntegralType(labels->scalar_type(), /*includeBool=*/false), kName, ": labels has dtype ",
                      labels->scalar_type(), ", expected class indices, of an integer dtype");
    TORCH_CHECK_VALUE(labels->layout() == at::kStrided, kName, ": labels has layout ", labels->layout(),
                      ", expected a dense tensor");
    check_device("labels", *labels, student);
    check_shape("labels", *labels, rows);
  }
  auto weight = RowReduction(kName, student, loss_dtype(student, student), row_weight, reduction, normalizer).weight();
  if (labels.has_value()) {
    const auto kept = labels->to(at::kLong).ne(ignore_index);  // a smaller type would wrap ignore_index around
    weight = weight.has_value() ? at::where(kept, *weight, 0) : kept;
  }
  if (row_weight.has_value() && is_plain_eager(*weight)) checked_weight(kName, weight);
  // Each loss keeps its own operator and with it the gradient in the forward visit.
  const auto share = [&](auto options) {
    return options.row_weight(weight).reduction(reduction_of(reduction)).normalizer(normalizer);
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
