// The arguments (x, y, a, b) of a loss between weighted point clouds, checked and given one batch shape.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace torch_divergence {

// x (*B, N, D), y (*B, M, D), a (*B, N) or none, b (*B, M) or none, where *B is (B) if any argument has a batch
// dimension and nothing otherwise: an argument without it is expanded.
struct PointClouds {
  at::Tensor x, y;
  std::optional<at::Tensor> a, b;

  c10::SymIntArrayRef batch() const { return x.sym_sizes().slice(0, x.dim() - 2); }
};

PointClouds checked_point_clouds(const char* name, const at::Tensor& x, const at::Tensor& y,
                                 const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& b);

}  // namespace torch_divergence
