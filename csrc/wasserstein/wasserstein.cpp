// Exact Wasserstein distance: operators and checks. The solver is network_simplex.h; derivatives are those of the loss
// on the tree that it finds (transport_tree.h).
//
//   wasserstein          checks, then a composite on the tree, differentiable to any order
//   _wasserstein_tree    the tree of an optimal plan
#include "wasserstein/wasserstein.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "core/checks.h"
#include "core/op.h"
#include "core/point_clouds.h"
#include "core/transport_checks.h"
#include "transport_tree/transport_tree.h"

namespace torch_divergence {
namespace {

using at::Tensor;
using Tensors2 = std::tuple<Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kName = "wasserstein";

Tensors2 tree_of(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b, double p) {
  using Signature = Tensors2(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, double);
  static const auto op = typed_op<Signature>("torch_divergence::_wasserstein_tree");
  return op.call(x, y, a, b, p);
}

Tensors2 empty_tree(const Tensor& x, const Tensor& y) {
  const auto batch = x.sym_sizes().slice(0, x.dim() - 2);
  c10::SymDimVector sizes(batch.begin(), batch.end());
  sizes.push_back(x.sym_size(-2) + y.sym_size(-2) - 1);
  const auto options = x.options().dtype(at::kLong);
  return {at::empty_symint(sizes, options), at::empty_symint(sizes, options)};
}

Tensors2 tree_meta(const Tensor& x, const Tensor& y, const OptionalTensor&, const OptionalTensor&, double) {
  return empty_tree(x, y);
}

Tensors2 tree_cpu(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b, double p) {
  check_masses(kName, a, b, loss_dtype(x, y));
  const int64_t n = x.size(-2), m = y.size(-2), dimension = x.size(-1), edges = n + m - 1;
  const auto xs = x.to(at::kDouble).contiguous(), ys = y.to(at::kDouble).contiguous();
  const auto batch = x.sym_sizes().slice(0, x.dim() - 2);
  const auto as = weights_or_uniform(a, batch, n, x).contiguous(), bs = weights_or_uniform(b, batch, m, x).contiguous();
  auto [rows, cols] = empty_tree(x, y);
  const auto *const px = xs.const_data_ptr<double>(), *const py = ys.const_data_ptr<double>();
  const auto *const pa = as.const_data_ptr<double>(), *const pb = bs.const_data_ptr<double>();
  auto *const i = rows.mutable_data_ptr<int64_t>(), *const j = cols.mutable_data_ptr<int64_t>();
  at::parallel_for(0, rows.numel() / edges, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> cost(static_cast<size_t>(n * m));
    for (int64_t r = begin; r < end; ++r) {
      transport_costs(px + r * n * dimension, py + r * m * dimension, n, m, dimension, p, cost.data());
      NetworkSimplex simplex(cost.data(), n, m, pa + r * n, pb + r * m);
      TORCH_CHECK(simplex.solve(), kName, ": the simplex method did not come to an end on problem ", r,
                  "; please report the input");
      simplex.tree(i + r * edges, j + r * edges);
    }
  });
  return {std::move(rows), std::move(cols)};
}

Tensors2 tree_autograd(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b, double p) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return tree_of(x, y, a, b, p);
}

// The points (*, N, D) at indices (*, K).
Tensor points_at(const Tensor& points, const Tensor& indices) {
  c10::SymDimVector sizes(indices.sym_sizes().begin(), indices.sym_sizes().end());
  sizes.push_back(points.sym_size(-1));
  return points.gather(-2, indices.unsqueeze(-1).expand_symint(sizes));
}

Tensor wasserstein(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b, double p) {
  const auto clouds = checked_point_clouds(kName, x, y, a, b);
  check_power(kName, p);
  TORCH_CHECK_VALUE(x.is_cpu() || x.is_meta(), kName, ": x is on ", x.device(),
                    ", expected the CPU, where the network simplex runs; move the points there");
  const auto [rows, cols] = tree_of(clouds.x, clouds.y, clouds.a, clouds.b, p);
  const auto square =
      (points_at(clouds.x.to(at::kDouble), rows) - points_at(clouds.y.to(at::kDouble), cols)).square().sum(-1);
  // Points that coincide have cost and derivatives 0, where those of the root are infinite.
  const auto zero = square == 0;
  const auto cost = p == 2 ? square : at::where(zero, 0, at::where(zero, 1, square).pow(p / 2));
  const auto weight_a = weights_or_uniform(clouds.a, clouds.batch(), clouds.x.sym_size(-2), x),
             weight_b = weights_or_uniform(clouds.b, clouds.batch(), clouds.y.sym_size(-2), x);
  const auto [mass_a, mass_b] = with_equal_masses(weight_a, weight_b);
  return (transport_flow(rows, cols, mass_a, mass_b) * cost).sum(-1).to(loss_dtype(x, y));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("wasserstein(Tensor x, Tensor y, Tensor? a=None, Tensor? b=None, *, float p=1.0) -> Tensor", tags);
  m.def("_wasserstein_tree(Tensor x, Tensor y, Tensor? a, Tensor? b, float p) -> (Tensor, Tensor)", tags);
}
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { m.impl("wasserstein", wasserstein); }
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { m.impl("wasserstein", wasserstein); }
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) { m.impl("_wasserstein_tree", tree_cpu); }
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) { m.impl("_wasserstein_tree", tree_meta); }
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) { m.impl("_wasserstein_tree", tree_autograd); }

}  // namespace torch_divergence
