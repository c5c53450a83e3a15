// Exact optimal transport between weighted points:
//
//   W_p^p = min_w sum_ij w_ij |x_i - y_j|^p,   sum_j w_ij = a_i,  sum_i w_ij = b_j,   | | the Euclidean norm
//
// (Kantorovich, 1942; Peyre and Cuturi, "Computational Optimal Transport", 2019, chapter 3). The simplex method finds
// the tree of an optimal plan; the loss is a differentiable function of points and weights on that tree.
#pragma once
#include <cmath>
#include <cstdint>

#include "wasserstein/network_simplex.h"

namespace torch_divergence {

// |x_i - y_j|^p for points of `dimension` coordinates, n x m, by rows.
inline void transport_costs(const double* x, const double* y, int64_t n, int64_t m, int64_t dimension, double p,
                            double* cost) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      double square = 0;
      for (int64_t k = 0; k < dimension; ++k) {
        const double d = x[i * dimension + k] - y[j * dimension + k];
        square += d * d;
      }
      cost[i * m + j] = p == 2 ? square : p == 1 ? std::sqrt(square) : std::pow(square, p / 2);
    }
}

}  // namespace torch_divergence
