// torch::autograd::grad without its headers.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace torch_divergence {

// d value / d inputs of a scalar. An input that value does not depend on gets an undefined gradient.
std::vector<at::Tensor> gradients_of(const at::Tensor& value, const std::vector<at::Tensor>& inputs, bool create_graph,
                                     bool retain_graph);

}  // namespace torch_divergence
