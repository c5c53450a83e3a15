// Wasserstein distance on the line: operators, checks, autograd. The sweep is in wasserstein_1d.h.
//
//   wasserstein_1d               checks, sorting, reduction
//   _wasserstein_1d              rows of loss from sorted rows           (differentiable: Wasserstein1d)
//   _wasserstein_1d_backward     gradients of positions and weights; differentiated as a composite of ATen operators on
//   _wasserstein_1d_tree         the staircase as a tree of cells
#include "wasserstein_1d/wasserstein_1d.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "core/apply.h"
#include "core/checks.h"
#include "core/op.h"
#include "core/reduction.h"
#include "core/row_layout.h"
#include "core/transport_checks.h"
#include "transport_tree/transport_tree.h"

namespace torch_divergence {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;
using Mask = std::array<bool, 4>;

constexpr const char* kName = "wasserstein_1d";

// -- The private operators, called through the dispatcher -----------------------------------------------------------

Tensor rows_of(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, double p) {
  using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, double);
  static const auto op = typed_op<Signature>("torch_divergence::_wasserstein_1d");
  return op.call(u, v, a, b, p);
}

Tensors4 backward_of(const Tensor& grad, const Tensor& u, const Tensor& v, const OptionalTensor& a,
                     const OptionalTensor& b, double p, Mask mask) {
  using Signature =
      Tensors4(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, double, Mask);
  static const auto op = typed_op<Signature>("torch_divergence::_wasserstein_1d_backward");
  return op.call(grad, u, v, a, b, p, mask);
}

Tensors2 tree_of(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, bool u_first) {
  using Signature = Tensors2(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, bool);
  static const auto op = typed_op<Signature>("torch_divergence::_wasserstein_1d_tree");
  return op.call(u, v, a, b, u_first);
}

// -- CPU ------------------------------------------------------------------------------------------------------------

// Rows (..., N) of positions and of weights, or none.
template <class T>
struct SideRows {
  explicit SideRows(const Tensor& positions, const OptionalTensor& weights)
      : size(positions.size(-1)), x(positions.const_data_ptr<T>()), x_layout(row_layout(positions)) {
    if (!weights.has_value()) return;
    w = weights->const_data_ptr<T>();
    w_layout = row_layout(*weights);
  }
  SortedSide<T> operator[](int64_t row) const {
    return {size,
            {x + x_layout.offset(row), x_layout.class_stride},
            {w == nullptr ? w : w + w_layout.offset(row), w_layout.class_stride}};
  }
  int64_t size;
  const T* x;
  RowLayout x_layout;
  const T* w = nullptr;
  RowLayout w_layout;
};

// body(row) for every row; a thread takes at least as many as pay for waking it.
template <class Body>
void for_rows(int64_t rows, int64_t entries, const Body& body) {
  at::parallel_for(0, rows, std::max<int64_t>(1, (int64_t{1} << 14) / entries), body);
}

Tensor rows_cpu(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, double p) {
  check_masses(kName, a, b, u.scalar_type());
  auto loss = at::empty(u.sizes().slice(0, u.dim() - 1), u.options());
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), kName, [&] {
    const SideRows<scalar_t> us(u, a), vs(v, b);
    auto* const out = loss.mutable_data_ptr<scalar_t>();
    for_rows(loss.numel(), us.size + vs.size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) out[r] = static_cast<scalar_t>(wasserstein_1d(us[r], vs[r], PowerCost{p}));
    });
  });
  return loss;
}

Tensor empty_if(bool wanted, const Tensor& like) {
  return at::empty(wanted ? like.sizes() : at::IntArrayRef{0}, like.options());
}

Tensors4 backward_cpu(const Tensor& grad, const Tensor& u, const Tensor& v, const OptionalTensor& a,
                      const OptionalTensor& b, double p, Mask mask) {
  const int64_t n = u.size(-1), m = v.size(-1);
  const auto coefficient = grad.contiguous();
  std::array<Tensor, 4> out{empty_if(mask[0], u), empty_if(mask[1], v), empty_if(mask[2], u), empty_if(mask[3], v)};
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), kName, [&] {
    const SideRows<scalar_t> us(u, a), vs(v, b);
    const auto* const c = coefficient.const_data_ptr<scalar_t>();
    std::array<scalar_t*, 4> to{};
    for (size_t k = 0; k < 4; ++k) to[k] = mask[k] ? out[k].template mutable_data_ptr<scalar_t>() : nullptr;
    for_rows(grad.numel(), n + m, [&](int64_t begin, int64_t end) {
      std::vector<double> of_u(n), of_v(m);
      const auto write = [&](int64_t r, scalar_t* to_u, scalar_t* to_v) {
        if (to_u != nullptr)
          std::transform(of_u.begin(), of_u.end(), to_u + r * n, [](double x) { return static_cast<scalar_t>(x); });
        if (to_v != nullptr)
          std::transform(of_v.begin(), of_v.end(), to_v + r * m, [](double x) { return static_cast<scalar_t>(x); });
      };
      for (int64_t r = begin; r < end; ++r) {
        if (mask[0] || mask[1]) {
          std::fill(of_u.begin(), of_u.end(), 0);
          std::fill(of_v.begin(), of_v.end(), 0);
          wasserstein_1d_positions(us[r], vs[r], PowerCost{p}, c[r], of_u.data(), of_v.data());
          write(r, to[0], to[1]);
        }
        if (mask[2] || mask[3]) {
          wasserstein_1d_potentials(us[r], vs[r], PowerCost{p}, c[r], of_u.data(), of_v.data());
          write(r, to[2], to[3]);
        }
      }
    });
  });
  return {out[0], out[1], out[2], out[3]};
}

Tensors2 empty_tree(const Tensor& u, const Tensor& v) {
  c10::SymDimVector sizes(u.sym_sizes().begin(), u.sym_sizes().end());
  sizes.back() = u.sym_size(-1) + v.sym_size(-1) - 1;
  const auto options = u.options().dtype(at::kLong);
  return {at::empty_symint(sizes, options), at::empty_symint(sizes, options)};
}

Tensors2 tree_cpu(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, bool u_first) {
  auto [rows, cols] = empty_tree(u, v);
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), kName, [&] {
    const SideRows<scalar_t> us(u, a), vs(v, b);
    const int64_t edges = us.size + vs.size - 1;
    auto *const i_out = rows.template mutable_data_ptr<int64_t>(), *const j_out =
                                                                       cols.template mutable_data_ptr<int64_t>();
    for_rows(rows.numel() / edges, edges, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        int64_t k = r * edges;
        const auto edge = [&](int64_t i, int64_t j) {
          i_out[k] = i;
          j_out[k++] = j;
        };
        staircase(
            us[r], vs[r], u_first, [&](int64_t i, int64_t j, double, bool) { edge(i, j); },
            [&](int64_t i, int64_t j, double) { edge(i, j); });
      }
    });
  });
  return {std::move(rows), std::move(cols)};
}

// -- Meta -----------------------------------------------------------------------------------------------------------

Tensor rows_meta(const Tensor& u, const Tensor&, const OptionalTensor&, const OptionalTensor&, double) {
  return at::empty_symint(u.sym_sizes().slice(0, u.dim() - 1), u.options());
}

Tensors4 backward_meta(const Tensor&, const Tensor& u, const Tensor& v, const OptionalTensor&, const OptionalTensor&,
                       double, Mask mask) {
  const auto like = [](bool wanted, const Tensor& t) {
    return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : at::empty({0}, t.options());
  };
  return {like(mask[0], u), like(mask[1], v), like(mask[2], u), like(mask[3], v)};
}

Tensors2 tree_meta(const Tensor& u, const Tensor& v, const OptionalTensor&, const OptionalTensor&, bool) {
  return empty_tree(u, v);
}

// -- Autograd -------------------------------------------------------------------------------------------------------

struct Wasserstein1d : torch::autograd::Function<Wasserstein1d> {
  static constexpr const char* name = "Wasserstein1dBackward";
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& u, const Variable& v, const OptionalTensor& a,
                          const OptionalTensor& b, double p) {
    ctx->save_for_backward({u, v, a.value_or(Tensor()), b.value_or(Tensor())});
    ctx->saved_data["p"] = p;
    ctx->saved_data["has_a"] = a.has_value();
    ctx->saved_data["has_b"] = b.has_value();
    ctx->set_materialize_grads(false);
    return rows_of(u, v, a, b, p);
  }
  static OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(5);
    if (!incoming[0].defined()) return result;
    const auto s = ctx->get_saved_variables();
    Mask mask{};
    size_t edge = 0;  // absent tensors have none
    for (size_t k = 0; k < 4; ++k) mask[k] = s[k].defined() && ctx->needs_input_grad(edge++);
    auto [du, dv, da, db] =
        backward_of(incoming[0], s[0], s[1], optional(s[2]), optional(s[3]), ctx->saved_data["p"].toDouble(), mask);
    const std::array<Tensor, 4> all{du, dv, da, db};
    for (size_t k = 0; k < 4; ++k)
      if (mask[k]) result[k] = all[k];
    return result;
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    // Absent weights are not among the inputs.
    const bool has_a = ctx->saved_data["has_a"].toBool(), has_b = ctx->saved_data["has_b"].toBool();
    const double p = ctx->saved_data["p"].toDouble();
    std::array<int, 4> at{0, 1, has_a ? 2 : -1, has_b ? (has_a ? 3 : 2) : -1};
    const auto given = [&](size_t k) { return at[k] >= 0 ? OptionalTensor(in[at[k]]) : std::nullopt; };
    Mask mask{};
    for (size_t k = 0; k < 4; ++k) mask[k] = at[k] >= 0 && tangents[at[k]].defined();
    const auto loss = rows_of(in[0], in[1], given(2), given(3), p);
    const auto [du, dv, da, db] = backward_of(at::ones_like(loss), in[0], in[1], given(2), given(3), p, mask);
    const std::array<Tensor, 4> all{du, dv, da, db};
    auto tangent = at::zeros_like(loss);
    for (size_t k = 0; k < 4; ++k)
      if (mask[k]) tangent = tangent + (all[k] * tangents[at[k]]).sum(-1);
    return {tangent};
  }
};

Tensor rows_autograd(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, double p) {
  return apply<Wasserstein1d>(u, v, a, b, p);
}

// |d|^p and its slope, with derivatives of 0 at d = 0 where they jump or are infinite.
struct PowerComposite {
  Tensor value, slope;

  PowerComposite(const Tensor& d, double p) {
    if (p == 2) {
      value = d * d;
      slope = 2 * d;
      return;
    }
    const auto zero = d == 0, sign = d.sign();
    const auto size = at::where(zero, 1, d.abs());
    value = p == 1 ? d.abs() : at::where(zero, 0, size.pow(p));
    slope = p == 1 ? sign : at::where(zero, 0, p * sign * size.pow(p - 1));
  }
};

// The backward in ATen operators, for derivatives beyond the first.
Tensors4 backward_composite(const Tensor& grad, const Tensor& u, const Tensor& v, const OptionalTensor& a,
                            const OptionalTensor& b, double p, Mask mask) {
  const auto batch = u.sym_sizes().slice(0, u.dim() - 1);
  const auto n = u.sym_size(-1), m = v.sym_size(-1);
  const auto x = u.to(at::kDouble), y = v.to(at::kDouble), c = grad.to(at::kDouble).unsqueeze(-1);
  const auto weight_a = weights_or_uniform(a, batch, n, u), weight_b = weights_or_uniform(b, batch, m, v);
  const auto [mass_a, mass_b] = with_equal_masses(weight_a, weight_b);
  Tensor du = at::zeros_like(x), dv = at::zeros_like(y), f = du, g = dv;
  for (const bool u_first : {true, false}) {
    const auto [rows, cols] = tree_of(u, v, a, b, u_first);
    const PowerComposite cost(x.gather(-1, rows) - y.gather(-1, cols), p);
    const auto slope = 0.5 * transport_flow(rows, cols, mass_a, mass_b) * cost.slope;
    du = du.scatter_add(-1, rows, slope);
    dv = dv.scatter_add(-1, cols, -slope);
    if (mask[2] || mask[3]) {
      const auto [fi, gj] = transport_potentials(rows, cols, cost.value, n, m);
      f = f + 0.5 * fi;
      g = g + 0.5 * gj;
    }
  }
  const auto total = (weight_a.sum(-1, true) + weight_b.sum(-1, true));
  const auto shift = ((weight_b * g).sum(-1, true) - (weight_a * f).sum(-1, true)) / at::where(total == 0, 1, total);
  const auto if_wanted = [&](bool wanted, const Tensor& t, const Tensor& like) {
    return wanted ? (c * t).to(like.scalar_type()) : at::empty({0}, like.options());
  };
  return {if_wanted(mask[0], du, u), if_wanted(mask[1], dv, v), if_wanted(mask[2], f + shift, u),
          if_wanted(mask[3], g - shift, v)};
}

Tensors4 backward_autograd(const Tensor& grad, const Tensor& u, const Tensor& v, const OptionalTensor& a,
                           const OptionalTensor& b, double p, Mask mask) {
  if (is_differentiated(grad, u, v, a.value_or(Tensor()), b.value_or(Tensor())))
    return backward_composite(grad, u, v, a, b, p, mask);
  const at::AutoDispatchBelowADInplaceOrView below;
  return backward_of(grad, u, v, a, b, p, mask);
}

Tensors2 tree_autograd(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b,
                       bool u_first) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return tree_of(u, v, a, b, u_first);
}

// -- The public operator --------------------------------------------------------------------------------------------

// The tensors of a call with their distributions last, and the shape that comes before them.
struct Operands {
  std::array<OptionalTensor, 4> tensors;
  c10::SymDimVector batch;
};

Operands checked_operands(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b,
                          int64_t dim) {
  const OptionalTensor given_u = u, given_v = v;
  check_together(kName, {{"u", given_u}, {"v", given_v}, {"a", a}, {"b", b}});
  constexpr const char* kNames[] = {"u", "v", "a", "b"};
  Operands result{{given_u, given_v, a, b}, {}};
  int64_t dims = 1;
  for (const auto& t : result.tensors)
    if (t.has_value()) dims = std::max(dims, t->dim());
  TORCH_CHECK_VALUE(dim >= -dims && dim < dims, kName, ": dim is ", dim, ", expected a value from ", -dims, " to ",
                    dims - 1, " for tensors of up to ", dims, " dimensions");
  bool has_batch = dims == 1;
  for (size_t k = 0; k < 4; ++k) {
    if (!result.tensors[k].has_value()) continue;
    auto& t = *result.tensors[k];
    TORCH_CHECK_VALUE(t.dim() == dims || t.dim() == 1, kName, ": ", kNames[k], " has shape ", t.sym_sizes(),
                      ", expected ", dims, " dimensions, as another argument has, or one, shared by all rows");
    if (t.dim() == 1) continue;
    t = t.movedim(dim, -1);
    const auto rows = t.sym_sizes().slice(0, dims - 1);
    if (!has_batch) {
      result.batch.assign(rows.begin(), rows.end());
      has_batch = true;
    }
    TORCH_CHECK_VALUE(rows == c10::SymIntArrayRef(result.batch), kName, ": ", kNames[k], " has rows of shape ", rows,
                      ", expected ", c10::SymIntArrayRef(result.batch),
                      ", as another argument has (nothing is broadcast "
                      "but tensors of one dimension)");
  }
  for (size_t k = 0; k < 4; ++k) {
    if (!result.tensors[k].has_value()) continue;
    const auto n = result.tensors[k]->sym_size(-1), expected = result.tensors[k % 2]->sym_size(-1);
    TORCH_CHECK_VALUE(n != 0, kName, ": ", kNames[k], " has no points: its dim ", dim,
                      " is empty, expected at least one");
    TORCH_CHECK_VALUE(n == expected, kName, ": ", kNames[k], " has ", n, " weights along dim ", dim, ", expected ",
                      expected, ", one a point of ", kNames[k % 2]);
  }
  return result;
}

Tensor expand_rows(const Tensor& t, const c10::SymDimVector& batch) {
  auto sizes = batch;
  sizes.push_back(t.sym_size(-1));
  return t.expand_symint(sizes);
}

// Positions in order, and their weights with them. Equal positions keep the order of their indices.
std::pair<Tensor, OptionalTensor> sorted_side(const Tensor& given, const OptionalTensor& given_weights,
                                              at::ScalarType dtype, const c10::SymDimVector& batch) {
  const auto [positions, order] = at::sort(given.to(dtype), /*stable=*/std::optional<bool>(true), -1, false);
  OptionalTensor weights;
  if (given_weights.has_value()) {
    const auto w = given_weights->to(dtype);
    weights = w.dim() == order.dim() && w.dim() == 1 ? w.gather(-1, order)
                                                     : expand_rows(w, batch).gather(-1, expand_rows(order, batch));
    weights = expand_rows(*weights, batch);
  }
  return {expand_rows(positions, batch), weights};
}

Tensor wasserstein_1d_op(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, double p,
                         int64_t dim, std::string_view reduction) {
  const auto operands = checked_operands(u, v, a, b, dim);
  check_power(kName, p);
  const auto dtype = loss_dtype(u, v);
  const auto& [given_u, given_v, given_a, given_b] = operands.tensors;
  const auto [su, sa] = sorted_side(*given_u, given_a, dtype, operands.batch);
  const auto [sv, sb] = sorted_side(*given_v, given_b, dtype, operands.batch);
  const RowReduction reduce(kName, su, dtype, std::nullopt, reduction, std::nullopt);
  return reduce(rows_of(su, sv, sa, sb, p));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "wasserstein_1d(Tensor u, Tensor v, Tensor? a=None, Tensor? b=None, *, float p=1.0, int dim=-1, str "
      "reduction=\"none\") -> Tensor",
      tags);
  m.def("_wasserstein_1d(Tensor u, Tensor v, Tensor? a, Tensor? b, float p) -> Tensor", tags);
  m.def(
      "_wasserstein_1d_backward(Tensor grad, Tensor u, Tensor v, Tensor? a, Tensor? b, float p, bool[4] mask) -> "
      "(Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def("_wasserstein_1d_tree(Tensor u, Tensor v, Tensor? a, Tensor? b, bool u_first) -> (Tensor, Tensor)", tags);
}

TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { m.impl("wasserstein_1d", wasserstein_1d_op); }
// As kl_div: a composite operator under vmap meets the slow per-sample fallback before its decomposition.
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { m.impl("wasserstein_1d", wasserstein_1d_op); }
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) {
  m.impl("_wasserstein_1d", rows_cpu);
  m.impl("_wasserstein_1d_backward", backward_cpu);
  m.impl("_wasserstein_1d_tree", tree_cpu);
}
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) {
  m.impl("_wasserstein_1d", rows_meta);
  m.impl("_wasserstein_1d_backward", backward_meta);
  m.impl("_wasserstein_1d_tree", tree_meta);
}
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) {
  m.impl("_wasserstein_1d", rows_autograd);
  m.impl("_wasserstein_1d_backward", backward_autograd);
  m.impl("_wasserstein_1d_tree", tree_autograd);
}

}  // namespace torch_divergence
