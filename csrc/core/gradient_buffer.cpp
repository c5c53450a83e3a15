#include "core/gradient_buffer.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/TracerMode.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/graph_task.h>

#include <cmath>
#include <utility>

#include "core/large_tensor.h"
#include "core/row_operator.h"

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

void scale_(at::Tensor& gradient, double factor) {
  // Not a product with 0: an infinite derivative would come back as NaN.
  if (factor == 0) {
    gradient.zero_();
  } else if (factor != 1) {
    gradient.mul_(factor);
  }
}

}  // namespace

void scale_gradient_(at::Tensor& gradient, const at::Tensor& factor) { scale_(gradient, factor.item().toDouble()); }

double ExpectedGradient::next(const at::Tensor& gradient_like) const {
  const double g = repeated_.load(std::memory_order_relaxed);
  int exponent = 0;
  const bool exact = std::fabs(std::frexp(g, &exponent)) == 0.5;
  return exact || is_half(gradient_like) ? g : 1;
}

void ExpectedGradient::observe(double incoming) {
  const bool again = last_.exchange(incoming, std::memory_order_relaxed) == incoming;
  repeated_.store(again && incoming != 0 && std::isfinite(incoming) ? incoming : 1, std::memory_order_relaxed);
}

at::Tensor hand_over(at::Tensor saved, double expected, double incoming, ExpectedGradient& seen,
                     c10::function_ref<at::Tensor(double)> again) {
  seen.observe(incoming);
  if (incoming != expected && (expected != 1 || is_half(saved))) {
    const bool half = is_half(saved);
    saved = again(half ? incoming : 1);
    if (!half) scale_(saved, incoming);
    return saved;
  }
  const double factor = incoming / expected;
  if (is_ours_alone(saved)) {
    scale_(saved, factor);
    return saved;
  }
  auto fresh = empty_like_large(saved);
  if (factor == 0) {
    fresh.zero_();
  } else {
    at::mul_out(fresh, saved, at::scalar_tensor(factor, at::kDouble));
  }
  return fresh;
}

bool is_plain_eager(const at::Tensor& t) {
  return t.is_cpu() && !at::isTensorSubclassLike(t) && !torch::autograd::isFwGradDefined(t) &&
         !at::tracer::impl::is_dispatch_enabled() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

}  // namespace torch_divergence
