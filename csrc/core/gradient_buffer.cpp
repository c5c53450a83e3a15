#include "core/gradient_buffer.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/TracerMode.h>
#include <ATen/ops/mul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/graph_task.h>

#include <utility>

#include "core/large_tensor.h"

namespace torch_divergence {
namespace {

bool is_ours_alone(const at::Tensor& saved) {
  // True outside an engine run too (grad_fn called by hand), which is the safe answer.
  if (torch::autograd::get_current_graph_task_keep_graph()) return false;
  // One reference is the caller's, one the node's; a Python object for the tensor holds a third, and must have no other
  // owner itself.
  auto* const slot = saved.unsafeGetTensorImpl()->pyobj_slot();
  const bool in_python = slot->load_pyobj() != nullptr;
  if (in_python && !slot->has_unique_reference()) return false;
  return saved.use_count() <= (in_python ? 3U : 2U) && saved.storage().use_count() == 1;
}

}  // namespace

void scale_gradient_(at::Tensor& gradient, const at::Tensor& factor) {
  const double f = factor.item().toDouble();
  // Not a product with 0: an infinite derivative would come back as NaN.
  if (f == 0) {
    gradient.zero_();
  } else if (f != 1) {
    gradient.mul_(f);
  }
}

at::Tensor hand_over(at::Tensor saved, const at::Tensor& factor) {
  if (!is_ours_alone(saved)) {
    auto fresh = empty_like_large(saved);
    const double f = factor.item().toDouble();
    if (f == 0) {
      fresh.zero_();
    } else {
      at::mul_out(fresh, saved, factor);
    }
    return fresh;
  }
  scale_gradient_(saved, factor);
  return saved;
}

bool is_plain_eager(const at::Tensor& t) {
  return t.is_cpu() && !at::isTensorSubclassLike(t) && !torch::autograd::isFwGradDefined(t) &&
         !at::tracer::impl::is_dispatch_enabled() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

}  // namespace torch_divergence
