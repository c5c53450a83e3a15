// Transport plans on a spanning tree.
//
// An optimal plan between N and M points can be taken from the edges of a spanning tree of the bipartite graph of the
// points: K = N + M - 1 pairs (rows[k], cols[k]). On a fixed tree two linear maps, each the other's adjoint, hold all
// of the loss and of its derivatives:
//
//   flow        w = flow(a, b):          sum of w over the edges at x_i is a_i, at y_j is b_j
//   potentials  (f, g) = potentials(c):  f_i + g_j = c_k on every edge k = (i, j), f_0 = 0
//
//   W(x, y, a, b) = sum_k flow(a, b)_k c_k,   dW/dc = flow(a, b),   dW/d(a, b) = potentials(c)
//
// flow leaves out the equation of x_0, which follows from the others where the masses are equal.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

namespace torch_divergence {

// rows, cols: (..., K) int64; a (..., N), b (..., M), c (..., K): float64. Differentiable to any order.
at::Tensor transport_flow(const at::Tensor& rows, const at::Tensor& cols, const at::Tensor& a, const at::Tensor& b);
std::tuple<at::Tensor, at::Tensor> transport_potentials(const at::Tensor& rows, const at::Tensor& cols,
                                                        const at::Tensor& c, c10::SymInt n, c10::SymInt m);

// Weights as (..., N) float64, uniform ones where there are none.
at::Tensor weights_or_uniform(const std::optional<at::Tensor>& weights, c10::SymIntArrayRef batch, const c10::SymInt& n,
                              const at::Tensor& like);

// (a, b) scaled to their mean mass. Changes nothing where the masses are equal, but fixes what only then is free: the
// gradients of the weights, potentials up to (+k, -k), come out with <a, f> = <b, g>.
std::tuple<at::Tensor, at::Tensor> with_equal_masses(const at::Tensor& a, const at::Tensor& b);

}  // namespace torch_divergence
