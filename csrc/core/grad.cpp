#include "core/grad.h"

#include <torch/csrc/autograd/autograd.h>

namespace torch_divergence {

std::vector<at::Tensor> gradients_of(const at::Tensor& value, const std::vector<at::Tensor>& inputs, bool create_graph,
                                     bool retain_graph) {
  return torch::autograd::grad({value}, inputs, {}, retain_graph, create_graph, /*allow_unused=*/true);
}

}  // namespace torch_divergence
