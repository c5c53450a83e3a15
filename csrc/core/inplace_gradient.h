// inplace_grad=True: a gradient that lives in its input's own storage.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>

namespace torch_divergence {

// Is t fit to be overwritten by its gradient? Raises ValueError naming what is not.
void check_inplace_gradient(const char* name, const at::Tensor& input, const at::Tensor& target);

// Connects a loss computed below autograd to input and target. `finish(g)` turns input's storage into the gradient for
// the incoming scalar g; target_gradient (for an incoming 1) may be undefined. The graph can be walked once, without
// create_graph. Bumps input's version, so that anything else that saved it will complain.
at::Tensor attach_inplace_gradient(const char* name, at::Tensor loss, const at::Tensor& input, const at::Tensor& target,
                                   at::Tensor target_gradient,
                                   std::function<void(at::Tensor& input, const at::Tensor& g)> finish);

}  // namespace torch_divergence
