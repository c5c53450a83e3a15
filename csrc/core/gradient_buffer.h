// A gradient computed together with the loss: who may write in it when backward comes.
#pragma once
#include <ATen/core/Tensor.h>

namespace torch_divergence {

// gradient *= factor, a scalar; by 1 not a byte is touched.
void scale_gradient_(at::Tensor& gradient, const at::Tensor& factor);

// Called from a node's backward on a gradient just unpacked from its saved variables: that gradient times factor. In
// place if the graph is not kept and nobody else holds the tensor (a hook's list, another reference, a view); else a
// fresh one.
at::Tensor hand_over(at::Tensor saved, const at::Tensor& factor);

// Is t a plain CPU tensor in eager mode: no fake, functional, batched or subclassed one, no tracer, no functorch level,
// no forward-mode tangent?
bool is_plain_eager(const at::Tensor& t);

}  // namespace torch_divergence
