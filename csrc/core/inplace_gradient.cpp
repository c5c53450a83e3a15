#include "core/inplace_gradient.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <string>
#include <utility>

#include "core/apply.h"
#include "core/gradient_buffer.h"

namespace torch_divergence {
namespace {

using torch::autograd::variable_list;

struct InplaceGradient : torch::autograd::Node {
  std::string op;
  at::Tensor gradient;           // input's storage, without its history: no reference cycle
  c10::VariableVersion version;  // input's own counter
  uint32_t expected_version = 0;
  at::Tensor target_gradient;
  at::ScalarType target_dtype = at::kFloat;
  std::function<void(at::Tensor&, const at::Tensor&)> finish;
  bool used = false;

  std::string name() const override { return "InplaceGradientBackward"; }

  variable_list apply(variable_list&& incoming) override {
    variable_list result(num_outputs());
    TORCH_CHECK(!used, op,
                ": backward a second time with inplace_grad=True, whose gradient has overwritten the input; use "
                "inplace_grad=False");
    TORCH_CHECK(
        !at::GradMode::is_enabled(), op,
        ": create_graph=True with inplace_grad=True, whose gradient has overwritten the input; use inplace_grad=False");
    const auto& g = incoming[0];
    if (!g.defined()) return result;
    TORCH_CHECK(!at::isTensorSubclassLike(g), op,
                ": a batched incoming gradient with inplace_grad=True; use inplace_grad=False");
    TORCH_CHECK(version.current_version() == expected_version, op,
                ": input was modified by an inplace operation after inplace_grad=True stored its gradient there");
    used = true;
    finish(gradient, g);
    if (task_should_compute_output(0)) result[0] = std::exchange(gradient, {});
    if (num_outputs() > 1 && task_should_compute_output(1)) result[1] = (target_gradient * g).to(target_dtype);
    return result;
  }
  void release_variables() override {
    used = true;
    gradient.reset();
    target_gradient.reset();
    finish = nullptr;
  }
};

}  // namespace

void check_inplace_gradient(const char* name, const at::Tensor& input, const at::Tensor& target) {
  for (const auto* t : {&input, &target})
    TORCH_CHECK_VALUE(
        is_plain_eager(*t), name,
        ": inplace_grad=True needs plain CPU tensors in eager mode: no torch.func transform, forward-mode AD, "
        "torch.compile, tracing or tensor subclass; expected inplace_grad=False there");
  TORCH_CHECK_VALUE(
      input.requires_grad() && at::GradMode::is_enabled(), name,
      ": inplace_grad=True needs an input that requires grad, in grad mode; expected inplace_grad=False otherwise");
  const bool of_leaf = input.is_view() && input._base().is_leaf() && input._base().requires_grad();
  TORCH_CHECK_VALUE(
      !input.is_leaf() && !of_leaf, name,
      ": inplace_grad=True would overwrite a leaf (a parameter, say), expected the result of an operation");
  TORCH_CHECK_VALUE(input.is_non_overlapping_and_dense(), name, ": inplace_grad=True needs a dense input, got strides ",
                    input.strides(), " for shape ", input.sizes());
  if (input.storage().is_alias_of(target.storage())) {
    TORCH_CHECK_VALUE(target.requires_grad(), name,
                      ": inplace_grad=True would overwrite target, which shares input's storage and does not require "
                      "grad; expected a target of its own");
    TORCH_CHECK_VALUE(
        at::get_overlap_status(input, target) == at::MemOverlapStatus::No, name,
        ": inplace_grad=True would overwrite target, which overlaps input in memory; expected a target of its own");
  }
}

at::Tensor attach_inplace_gradient(const char* name, at::Tensor loss, const at::Tensor& input, const at::Tensor& target,
                                   at::Tensor target_gradient,
                                   std::function<void(at::Tensor&, const at::Tensor&)> finish) {
  const auto node = make_node<InplaceGradient>();
  torch::autograd::edge_list edges{torch::autograd::impl::gradient_edge(input)};
  if (target_gradient.defined()) edges.push_back(torch::autograd::impl::gradient_edge(target));
  node->set_next_edges(std::move(edges));
  torch::autograd::impl::bump_version(input);
  node->op = name;
  node->gradient = input.detach();
  node->version = torch::autograd::impl::version_counter(input);
  node->expected_version = node->version.current_version();
  node->target_gradient = std::move(target_gradient);
  node->target_dtype = target.scalar_type();
  node->finish = std::move(finish);
  torch::autograd::set_history(loss, node);
  return loss;
}

}  // namespace torch_divergence
