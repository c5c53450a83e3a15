// Sliced Wasserstein distance: the mean of wasserstein_1d over directions. A composite of operators.
//
//   SW_p^p = 1/L sum_l W_p^p(<theta_l, x>, <theta_l, y>)
//
// (Rabin, Peyre, Delon and Bernot, "Wasserstein Barycenter and Its Application to Texture Mixing", 2011).
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <string_view>

#include "core/checks.h"
#include "core/op.h"
#include "core/point_clouds.h"
#include "core/reduction.h"
#include "core/transport_checks.h"

namespace torch_divergence {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kName = "sliced_wasserstein";

// Directions spread evenly over the sphere: normal vectors, scaled to length 1.
Tensor random_directions(int64_t count, const c10::SymInt& dimension, const std::optional<at::Generator>& generator,
                         const at::TensorOptions& options) {
  const auto normal = at::randn_symint({count, dimension}, generator, options);
  return normal / at::linalg_vector_norm(normal, 2, at::IntArrayRef{-1}, /*keepdim=*/true);
}

Tensor sliced_wasserstein(const Tensor& x, const Tensor& y, const OptionalTensor& a, const OptionalTensor& b, double p,
                          int64_t n_projections, const OptionalTensor& projections,
                          std::optional<at::Generator> generator, std::string_view reduction) {
  const auto clouds = checked_point_clouds(kName, x, y, a, b);
  check_power(kName, p);
  const auto dtype = loss_dtype(x, y);
  const auto dimension = x.sym_size(-1);
  if (projections.has_value()) {
    const OptionalTensor given_x = x;
    check_together(kName, {{"x", given_x}, {"projections", projections}});
    TORCH_CHECK_VALUE(projections->dim() == 2 && projections->sym_size(0) != 0 && projections->sym_size(1) == dimension,
                      kName, ": projections has shape ", projections->sym_sizes(), ", expected (L, ", dimension,
                      "), a direction a row");
    TORCH_CHECK_VALUE(!generator.has_value(), kName,
                      ": generator was given together with projections, expected only one of them");
  } else {
    TORCH_CHECK_VALUE(n_projections > 0, kName, ": n_projections is ", n_projections, ", expected a positive number");
  }
  const RowReduction reduce(kName, clouds.x.select(-1, 0), dtype, std::nullopt, reduction, std::nullopt);

  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto directions = projections.has_value()
                              ? projections->to(dtype)
                              : random_directions(n_projections, dimension, generator, x.options().dtype(dtype));
  // About a common centre, to which the distance is indifferent: far from it projections would lose digits. A constant,
  // on a grid of a power of 2 as coarse as the clouds are large: the differences take no digits that were not there.
  const auto wide_x = clouds.x.to(dtype), wide_y = clouds.y.to(dtype);
  const auto mean = wide_x.detach().mean(-2, true);
  const auto size_about_mean = [&](const Tensor& points) {
    return (points.detach() - mean).abs().amax({-2, -1}, true);
  };
  const auto grid = size_about_mean(wide_x).maximum(size_about_mean(wide_y)).log2().floor().exp2();
  const auto rounded = (mean / grid).round() * grid;
  const auto centre = at::where(rounded.isfinite(), rounded, 0);
  const auto project = [&](const Tensor& points) {
    return at::matmul(directions, (points - centre).mT());
  };  // (*B, L, N)
  const auto of_slices = [&](const OptionalTensor& weights, const Tensor& projected) {
    return weights.has_value() ? OptionalTensor(weights->unsqueeze(-2).expand_symint(projected.sym_sizes()))
                               : std::nullopt;
  };
  const auto u = project(wide_x), v = project(wide_y);
  using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, double, int64_t,
                           std::string_view);
  static const auto wasserstein_1d = typed_op<Signature>("torch_divergence::wasserstein_1d");
  return reduce(wasserstein_1d.call(u, v, of_slices(clouds.a, u), of_slices(clouds.b, v), p, -1, "none").mean(-1));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "sliced_wasserstein(Tensor x, Tensor y, Tensor? a=None, Tensor? b=None, *, float p=2.0, int n_projections=128, "
      "Tensor? projections=None, Generator? generator=None, str reduction=\"none\") -> Tensor",
      tags);
}
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { m.impl("sliced_wasserstein", sliced_wasserstein); }
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) {
  m.impl("sliced_wasserstein", sliced_wasserstein);
}

}  // namespace torch_divergence
