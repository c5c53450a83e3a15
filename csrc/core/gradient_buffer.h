// A gradient computed together with the loss: who may write in it when backward comes.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <atomic>

namespace torch_divergence {

// gradient *= factor, a scalar; by 1 not a byte is touched.
void scale_gradient_(at::Tensor& gradient, const at::Tensor& factor);

// A gradient stored with its loss is right for one incoming gradient. Training hands in the same one step after step
// (1, the loss's weight, what GradScaler multiplies by), so it is computed for the one that came twice in a row last,
// else for 1. What backward returns does not depend on that, only how soon: in float and double a power of two may be
// multiplied by before rounding or after, so no other is expected there; and where another gradient comes than the
// expected one, a gradient that has no such freedom (a half type, an expected one other than 1) is computed again.
class ExpectedGradient {
 public:
  double next(const at::Tensor& gradient_like) const;
  void observe(double incoming);

 private:
  std::atomic<double> last_{1}, repeated_{1};
};

// Called from a node's backward on a gradient just unpacked from its saved variables, computed for an incoming gradient
// of `expected`: the one for `incoming`. In the same memory if the graph is not kept and nobody else holds the tensor
// (a hook's list, another reference, a view); else in a fresh one. again(incoming) computes it anew.
at::Tensor hand_over(at::Tensor saved, double expected, double incoming, ExpectedGradient& seen,
                     c10::function_ref<at::Tensor(double)> again);

// Is t a plain CPU tensor in eager mode: no fake, functional, batched or subclassed one, no tracer, no functorch level,
// no forward-mode tangent?
bool is_plain_eager(const at::Tensor& t);

}  // namespace torch_divergence
