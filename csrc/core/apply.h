// apply<F>(args...): run a torch::autograd::Function from an Autograd-key kernel.
//
// Why not F::apply (torch/csrc/autograd/custom_function.h):
//   1. It refuses to run under torch.func, because a Function called from outside the dispatcher sees only one
//      transform level. An Autograd-key kernel is entered once per level, like the generated kernels of native
//      operators, so the refusal is not needed here. Only here: never call apply() from anything but an Autograd-key
//      kernel, and let that kernel's forward redispatch to its own operator.
//   2. It has no forward-mode AD. Here F::jvp(ctx, primals, tangents) gives the outputs' tangents.
//   3. Its forward runs with the Autograd keys on.
// F's operators must be functional: fresh outputs, no views, no in-place arguments.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/FunctionsManual.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

namespace torch_divergence {

// Up to 2.12 PyTorch holds autograd nodes in std::shared_ptr, from 2.14 in c10::intrusive_ptr.
template <class N, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, torch::autograd::Node>) {
    return c10::make_intrusive<N>(std::forward<Args>(args)...);
  } else {
    return std::shared_ptr<N>(new N(std::forward<Args>(args)...), [](auto* n) { deleteNode(n); });
  }
}

// CppNode with a readable grad_fn name: F::name instead of the demangled template.
template <class F>
struct OpNode : torch::autograd::CppNode<F> {
  std::string name() const override { return F::name; }
};

// Forward-mode AD has one level per functorch level; each sees its own tangents at index 0.
inline at::Tensor tangent_of(const at::Tensor& t) { return torch::autograd::generated::details::toNonOptFwGrad(t); }
inline at::Tensor primal_of(const at::Tensor& t) { return torch::autograd::generated::details::toNonOptPrimal(t); }

template <class F, class... Args>
auto apply(Args&&... args) {
  using namespace torch::autograd;
  const auto node = make_node<OpNode<F>>();
  variable_list inputs;
  extract_vars(node->is_variable_input_, inputs, args...);
  const bool differentiate = GradMode::is_enabled() && any_variable_requires_grad(inputs);
  node->set_ctx_grad_fn(node);
  node->set_next_edges(differentiate ? collect_next_edges(inputs) : edge_list());

  using Out = forward_t<F, Args...>;
  Out out;
  {
    // Grad mode stays as it is: a lower functorch level, or plain autograd below torch.func.grad, still has to record.
    const at::AutoDispatchBelowADInplaceOrView below;
    out = F::forward(&node->ctx_, std::forward<Args>(args)...);
  }
  variable_list outputs;
  if constexpr (std::is_same_v<Out, Variable>) {
    outputs = {out};
  } else {
    outputs = out;
  }
#ifndef NDEBUG
  for (const auto& o : outputs)
    for (const auto& i : inputs)
      TORCH_INTERNAL_ASSERT(
          !o.has_storage() || !i.has_storage() || o.nbytes() == 0 || !o.storage().is_alias_of(i.storage()), F::name,
          ": an output shares storage with an input");
#endif

  if (differentiate) {
    const auto& constant = node->ctx_.get_non_differentiable();
    for (auto& o : outputs) {
      if (constant.count(o.unsafeGetTensorImpl()) != 0) {
        node->add_input_metadata(Node::undefined_input());
      } else {
        set_history(o, node);
      }
    }
    for (auto& o : outputs) node->output_info_.emplace_back(o);
    node->save_variables_to_ctx();
    node->ctx_.mark_non_differentiable({});  // served its purpose; compiled autograd asserts that it is empty
  }
  bool has_tangent = false;
  for (const auto& v : inputs) has_tangent = has_tangent || isFwGradDefined(v);
  if (has_tangent) {
    // Grad mode and forward-AD mode stay as they are here too, for the same reason.
    variable_list primals, tangents;
    for (const auto& v : inputs) {
      primals.push_back(primal_of(v));
      tangents.push_back(tangent_of(v));
    }
    const variable_list t = F::jvp(&node->ctx_, primals, tangents);
    for (size_t i = 0; i < outputs.size(); ++i)
      if (t[i].defined()) outputs[i]._set_fw_grad(t[i], /*level=*/0, /*is_inplace_op=*/false);
  }
  return out;  // the same tensors as `outputs`
}

// Would anybody differentiate a function of these?
template <class... T>
bool is_differentiated(const T&... tensors) {
  return torch::autograd::compute_requires_grad(tensors...) || (torch::autograd::isFwGradDefined(tensors) || ...);
}

}  // namespace torch_divergence
