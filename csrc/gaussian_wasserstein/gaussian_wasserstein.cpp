// W_2^2 between Gaussians: operators, checks, autograd. The formulas are in gaussian_wasserstein.h; the kernels are
// those of LAPACK.
//
//   gaussian_wasserstein      checks, means
//   _bures                    distance of the covariances, both optimal maps, and the factors they came from
//   _bures_lyapunov           derivatives of the maps, to any order
#include "gaussian_wasserstein/gaussian_wasserstein.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <tuple>
#include <utility>

#include "core/apply.h"
#include "core/checks.h"
#include "core/op.h"
#include "core/transport_checks.h"

namespace torch_divergence {
namespace {

using at::matmul;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
// value, T12, T21, Y1, Y2, s
using Bures = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kName = "gaussian_wasserstein";

Bures bures(const Tensor& cov1, const Tensor& cov2, double rank_tolerance) {
  using Signature = Bures(const Tensor&, const Tensor&, double);
  static const auto op = typed_op<Signature>("torch_divergence::_bures");
  return op.call(cov1, cov2, rank_tolerance);
}

// Solves k X + X k' = z, or k' X + X k = z, with k = y diag(s) y^-1 and y^-1 = diag(1/s) other'.
Tensor lyapunov(const Tensor& k, const Tensor& y, const Tensor& other, const Tensor& s, const Tensor& z,
                bool transposed) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool);
  static const auto op = typed_op<Signature>("torch_divergence::_bures_lyapunov");
  return op.call(k, y, other, s, z, transposed);
}

Tensor reciprocal_or_zero(const Tensor& s) { return at::where(s == 0, 0, 1 / at::where(s == 0, 1, s)); }

// A factor of each matrix, S = A A'. Eigenvalues within the tolerance of 0 are 0; `bad` marks matrices with NaN,
// infinities or an eigenvalue below that.
struct Factor {
  Tensor a, bad;

  Factor(const Tensor& cov, double tolerance) {
    bad = at::isfinite(cov).logical_not().any(-1).any(-1);
    const auto safe = at::where(bad.unsqueeze(-1).unsqueeze(-1), at::eye(cov.size(-1), cov.options()), cov);
    const auto [values, vectors] = at::linalg_eigh(safe, "L");
    const auto floor = tolerance * values.abs().amax(-1, true);
    bad = bad.logical_or((values < -floor).any(-1));
    a = vectors * at::where(values <= floor, 0, values).sqrt().unsqueeze(-2);
  }
};

Tensor lyapunov_composite(const Tensor& /*k*/, const Tensor& y, const Tensor& other, const Tensor& s, const Tensor& z,
                          bool transposed) {
  const auto inverse = reciprocal_or_zero(s).unsqueeze(-1) * other.mT();
  const auto sum = reciprocal_or_zero(s.unsqueeze(-1) + s.unsqueeze(-2));
  if (transposed) return matmul(matmul(inverse.mT(), sum * matmul(matmul(y.mT(), z), y)), inverse).contiguous();
  return matmul(matmul(y, sum * matmul(matmul(inverse, z), inverse.mT())), y.mT()).contiguous();
}

// |Y1 - Y2|^2, whose relative error is that of rounding over |Y1 - Y2| / |Y1|; close matrices get the Newton step of
// the header, which keeps the digits of S2 - S1. Not where S1 is nearly singular: the step divides by s.
Tensor refined(const Tensor& cov1, const Tensor& cov2, const Tensor& a, const Tensor& map12, const Tensor& y1,
               const Tensor& y2, const Tensor& s) {
  constexpr double kClose = 1e-4, kSingular = 1e-4;
  const auto distance = (y1 - y2).square().sum({-2, -1});
  auto x = (map12 + map12.mT()) / 2 - at::eye(cov1.size(-1), cov1.options());  // else a rotation stays in it
  const auto half = matmul(x, cov1), k = matmul(cov1, map12);
  const auto residual = (cov2 - cov1) - (half + half.mT() + matmul(half, x.mT()));
  x = x + lyapunov_composite(k, y1, y2, s, residual, /*transposed=*/true);
  const auto apart = distance.ge(kClose * a.square().sum({-2, -1}));
  const auto singular = s.amin(-1).le(kSingular * s.amax(-1));
  return at::where(apart.logical_or(singular), distance, matmul(x, a).square().sum({-2, -1}));
}

Bures bures_composite(const Tensor& cov1, const Tensor& cov2, double rank_tolerance) {
  const double tolerance =
      std::max(rank_tolerance, static_cast<double>(cov1.size(-1)) * std::numeric_limits<double>::epsilon());
  const Factor f1(cov1, tolerance), f2(cov2, tolerance);
  auto [w, s, vh] = at::linalg_svd(matmul(f2.a.mT(), f1.a), /*full_matrices=*/false);
  s = at::where(s <= tolerance * s.amax(-1, true), 0, s);
  const auto y1 = matmul(f1.a, vh.mT()).contiguous(), y2 = matmul(f2.a, w).contiguous();
  const auto inverse = reciprocal_or_zero(s).unsqueeze(-2);
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  const auto bad = f1.bad.logical_or(f2.bad), bad_matrix = bad.unsqueeze(-1).unsqueeze(-1);
  auto map12 = matmul(y2 * inverse, y2.mT());
  const auto distance = refined(cov1, cov2, f1.a, map12, y1, y2, s);
  const auto equal = (cov1 == cov2).all(-1).all(-1);
  const auto value = at::where(bad, nan, at::where(equal, 0, distance));
  map12 = at::where(bad_matrix, nan, map12);
  auto map21 = at::where(bad_matrix, nan, matmul(y1 * inverse, y1.mT()));
  return {value, map12.contiguous(), map21.contiguous(), y1, y2, s};
}

Bures bures_meta(const Tensor& cov1, const Tensor& /*cov2*/, double) {
  const auto sizes = cov1.sym_sizes();
  const auto square = [&] { return at::empty_symint(sizes, cov1.options()); };
  return {at::empty_symint(sizes.slice(0, cov1.dim() - 2), cov1.options()), square(), square(), square(), square(),
          at::empty_symint(sizes.slice(0, cov1.dim() - 1), cov1.options())};
}

Tensor lyapunov_meta(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor& z, bool) {
  return at::empty_symint(z.sym_sizes(), z.options());
}

struct BuresDistance : torch::autograd::Function<BuresDistance> {
  static constexpr const char* name = "BuresDistanceBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& cov1, const Variable& cov2,
                               double rank_tolerance) {
    auto [value, map12, map21, y1, y2, s] = bures(cov1, cov2, rank_tolerance);
    // The maps are saved as outputs: a derivative of backward goes through them to this node again.
    ctx->save_for_backward({cov1, cov2, map12, map21, y1, y2, s});
    ctx->saved_data["rank_tolerance"] = rank_tolerance;
    ctx->mark_non_differentiable({y1, y2, s});
    ctx->set_materialize_grads(false);
    return {value, map12, map21, y1, y2, s};
  }
  // g (I - T)
  static Tensor of_value(const Tensor& g, const Tensor& map) {
    return g.unsqueeze(-1).unsqueeze(-1) * (at::eye_symint(map.sym_size(-1), map.options()) - map);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    auto s = ctx->get_saved_variables();
    const auto &cov1 = s[0], &cov2 = s[1];
    // A node saves its outputs before they get their tangents.
    if (torch::autograd::isFwGradDefined(cov1) || torch::autograd::isFwGradDefined(cov2))
      std::tie(std::ignore, s[2], s[3], s[4], s[5], s[6]) =
          bures(cov1, cov2, ctx->saved_data["rank_tolerance"].toDouble());
    const auto &map12 = s[2], &map21 = s[3], &y1 = s[4], &y2 = s[5], &sigma = s[6];
    Tensor d1, d2;
    const auto add = [](Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; };
    const auto &g = incoming[0], &g12 = incoming[1], &g21 = incoming[2];
    if (g.defined()) {
      d1 = of_value(g, map12);
      d2 = of_value(g, map21);
    }
    if (g12.defined()) {
      const auto x = lyapunov(matmul(cov1, map12), y1, y2, sigma, g12, false);
      add(d1, -matmul(matmul(map12, x), map12));
      add(d2, x);
    }
    if (g21.defined()) {
      const auto x = lyapunov(matmul(cov2, map21), y2, y1, sigma, g21, false);
      add(d1, x);
      add(d2, -matmul(matmul(map21, x), map21));
    }
    return {d1, d2, Tensor()};
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    const auto [value, map12, map21, y1, y2, s] = bures(in[0], in[1], ctx->saved_data["rank_tolerance"].toDouble());
    const auto t1 = tangents[0].defined() ? tangents[0] : at::zeros_like(in[0]),
               t2 = tangents[1].defined() ? tangents[1] : at::zeros_like(in[1]);
    const auto one = at::ones_like(value);
    return {(of_value(one, map12) * t1 + of_value(one, map21) * t2).sum({-2, -1}),
            lyapunov(matmul(in[0], map12), y1, y2, s, t2 - matmul(matmul(map12, t1), map12), true),
            lyapunov(matmul(in[1], map21), y2, y1, s, t1 - matmul(matmul(map21, t2), map21), true),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

// k carries the derivative of its own factors y, other and s.
struct BuresLyapunov : torch::autograd::Function<BuresLyapunov> {
  static constexpr const char* name = "BuresLyapunovBackward";
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& k, const Variable& y, const Variable& other,
                          const Variable& s, const Variable& z, bool transposed) {
    auto x = lyapunov(k, y, other, s, z, transposed);
    ctx->save_for_backward({k, y, other, s, x});
    ctx->saved_data["transposed"] = transposed;
    ctx->set_materialize_grads(false);
    return x;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(6);
    if (!incoming[0].defined()) return result;
    const auto s = ctx->get_saved_variables();
    const bool transposed = ctx->saved_data["transposed"].toBool();
    const auto& x = s[4];
    const auto l = lyapunov(s[0], s[1], s[2], s[3], incoming[0], !transposed);
    result[0] = transposed ? -(matmul(x, l.mT()) + matmul(x.mT(), l)) : -(matmul(l, x.mT()) + matmul(l.mT(), x));
    result[4] = l;
    return result;
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    const bool transposed = ctx->saved_data["transposed"].toBool();
    const auto x = lyapunov(in[0], in[1], in[2], in[3], in[4], transposed);
    auto z = tangents[4].defined() ? tangents[4] : at::zeros_like(in[4]);
    if (tangents[0].defined()) {
      const auto k = transposed ? tangents[0].mT() : tangents[0];
      z = z - matmul(k, x) - matmul(x, k.mT());
    }
    return {lyapunov(in[0], in[1], in[2], in[3], z, transposed)};
  }
};

Bures bures_autograd(const Tensor& cov1, const Tensor& cov2, double rank_tolerance) {
  auto v = apply<BuresDistance>(cov1, cov2, rank_tolerance);
  return {v[0], v[1], v[2], v[3], v[4], v[5]};
}

Tensor lyapunov_autograd(const Tensor& k, const Tensor& y, const Tensor& other, const Tensor& s, const Tensor& z,
                         bool transposed) {
  return apply<BuresLyapunov>(k, y, other, s, z, transposed);
}

Tensor gaussian_wasserstein(const Tensor& mean1, const Tensor& cov1, const Tensor& mean2, const Tensor& cov2) {
  std::array<OptionalTensor, 4> t{mean1, cov1, mean2, cov2};
  constexpr const char* kNames[] = {"mean1", "cov1", "mean2", "cov2"};
  check_together(kName, {{kNames[0], t[0]}, {kNames[1], t[1]}, {kNames[2], t[2]}, {kNames[3], t[3]}});
  std::optional<c10::SymInt> batch;
  for (size_t k = 0; k < 4; ++k) {
    const auto& argument = *t[k];
    const bool is_cov = k % 2 == 1;
    const int64_t own = is_cov ? 2 : 1;
    TORCH_CHECK_VALUE(argument.dim() == own || argument.dim() == own + 1, kName, ": ", kNames[k], " has shape ",
                      argument.sym_sizes(), ", expected ", is_cov ? "(D, D) or (B, D, D)" : "(D) or (B, D)");
    const auto d = mean1.sym_size(-1);
    TORCH_CHECK_VALUE(d != 0 && argument.sym_size(-1) == d && argument.sym_size(-own) == d, kName, ": ", kNames[k],
                      " has shape ", argument.sym_sizes(), ", expected its last ",
                      is_cov ? "two dimensions" : "dimension", " to be ", d, ", that of mean1, and at least 1");
    if (argument.dim() == own) continue;
    if (!batch.has_value()) batch = argument.sym_size(0);
    TORCH_CHECK_VALUE(argument.sym_size(0) == *batch, kName, ": ", kNames[k], " has a batch of ", argument.sym_size(0),
                      ", expected ", *batch, ", as another argument has");
  }
  const auto dtype = loss_dtype(mean1, cov1);
  // In double: the square root takes half the digits of a small eigenvalue.
  for (size_t k = 0; k < 4; ++k) {
    const auto own = t[k]->sym_sizes().slice(t[k]->dim() - (k % 2 == 1 ? 2 : 1));
    c10::SymDimVector sizes;
    if (batch.has_value()) sizes.push_back(*batch);
    sizes.append(own.begin(), own.end());
    t[k] = t[k]->to(at::kDouble).expand_symint(sizes);
  }
  const auto symmetric = [](const Tensor& cov) { return (cov + cov.mT()) / 2; };
  // How far from 0 the eigenvalues of a singular covariance come to lie when its entries are rounded.
  const auto epsilon = [](const Tensor& cov) {
    switch (cov.scalar_type()) {
      case at::kDouble:
        return std::numeric_limits<double>::epsilon();
      case at::kHalf:
        return static_cast<double>(std::numeric_limits<at::Half>::epsilon());
      case at::kBFloat16:
        return static_cast<double>(std::numeric_limits<at::BFloat16>::epsilon());
      default:
        return static_cast<double>(std::numeric_limits<float>::epsilon());
    }
  };
  const double rounding = std::max(epsilon(cov1), epsilon(cov2));
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto distance = std::get<0>(bures(symmetric(*t[1]), symmetric(*t[3]), 4 * rounding));
  return ((*t[0] - *t[2]).square().sum(-1) + distance).to(dtype);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("gaussian_wasserstein(Tensor mean1, Tensor cov1, Tensor mean2, Tensor cov2) -> Tensor", tags);
  m.def("_bures(Tensor cov1, Tensor cov2, float rank_tolerance) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        tags);
  m.def("_bures_lyapunov(Tensor k, Tensor y, Tensor other, Tensor s, Tensor z, bool transposed) -> Tensor", tags);
}
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) {
  m.impl("gaussian_wasserstein", gaussian_wasserstein);
}
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) {
  m.impl("gaussian_wasserstein", gaussian_wasserstein);
}
// On CPU and CUDA alike.
TORCH_LIBRARY_IMPL(torch_divergence, CompositeExplicitAutograd, m) {
  m.impl("_bures", bures_composite);
  m.impl("_bures_lyapunov", lyapunov_composite);
}
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) {
  m.impl("_bures", bures_meta);
  m.impl("_bures_lyapunov", lyapunov_meta);
}
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) {
  m.impl("_bures", bures_autograd);
  m.impl("_bures_lyapunov", lyapunov_autograd);
}

}  // namespace torch_divergence
