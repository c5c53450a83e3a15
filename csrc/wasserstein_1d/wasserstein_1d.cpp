// Wasserstein distance on the line: operators, checks, autograd. The sweep is in wasserstein_1d.h, the CUDA kernels in
// wasserstein_1d_cuda.cu.
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

#include <algorithm>
#include <array>
#include <limits>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "core/apply.h"
#include "core/checks.h"
#include "core/cuda_tensors.h"
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

Tensors2 tree_of(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, bool u_first,
                 bool exact) {
  using Signature = Tensors2(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, bool, bool);
  static const auto op = typed_op<Signature>("torch_divergence::_wasserstein_1d_tree");
  return op.call(u, v, a, b, u_first, exact);
}

// -- Both sides of a row --------------------------------------------------------------------------------------------

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

// -- CUDA -----------------------------------------------------------------------------------------------------------

Tensor empty_if(bool wanted, const Tensor& like) {
  return at::empty(wanted ? like.sizes() : at::IntArrayRef{0}, like.options());
}

Tensors2 empty_tree(const Tensor& u, const Tensor& v) {
  c10::SymDimVector sizes(u.sym_sizes().begin(), u.sym_sizes().end());
  sizes.back() = u.sym_size(-1) + v.sym_size(-1) - 1;
  const auto options = u.options().dtype(at::kLong);
  return {at::empty_symint(sizes, options), at::empty_symint(sizes, options)};
}

#ifdef TD_CUDA
// Running sums of each row, in double; of weights, which are checked, or of numbers.
Tensor running_sums(const Tensor& values, bool weights) {
  auto sums = at::empty(values.sizes(), values.options().dtype(at::kDouble));
  run_on_cuda(
      [&](const RowsIn& rows, int64_t count, double*, cuda::Stream stream) {
        cuda::running_sums(rows, values.size(-1), weights, sums.mutable_data_ptr<double>(), count, stream);
      },
      rows_in(values), row_count(values), 0, values);
  return sums;
}

// Both sides as the kernels take them.
class CudaLines {
 public:
  CudaLines(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, double p)
      : u_{u, a.has_value() ? running_sums(*a, true) : Tensor()},
        v_{v, b.has_value() ? running_sums(*b, true) : Tensor()},
        p_(p),
        uniform_(!a.has_value() && !b.has_value()) {}

  LineRows with_own(bool u, bool exact = false) const {
    const auto dtype = u_.positions.scalar_type();
    const double epsilon = dtype == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                : static_cast<double>(std::numeric_limits<float>::epsilon());
    const SortedRows of_u = u_.rows(), of_v = v_.rows();
    return {u ? of_u : of_v, u ? of_v : of_u, p_,
            uniform_ || exact ? 0 : rounding_of_masses(of_u.size + of_v.size, epsilon), mass_tolerance(dtype)};
  }

 private:
  struct Side {
    Tensor positions, cumulative;
    SortedRows rows() const {
      return {rows_in(positions), cumulative.defined() ? cumulative.const_data_ptr<double>() : nullptr,
              positions.size(-1)};
    }
  };
  Side u_, v_;
  double p_;
  bool uniform_;
};

Tensor rows_cuda(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, double p) {
  auto loss = at::empty(u.sizes().slice(0, u.dim() - 1), u.options());
  const CudaLines lines(u, v, a, b, p);
  const int64_t rows = loss.numel(), n = u.size(-1), m = v.size(-1);
  run_on_cuda(&cuda::wasserstein_1d_forward, LineForward{lines.with_own(n >= m), loss.mutable_data_ptr()}, rows,
              cuda::wasserstein_1d_workspace(rows, std::max(n, m)), u);
  return loss;
}

Tensors4 backward_cuda(const Tensor& grad, const Tensor& u, const Tensor& v, const OptionalTensor& a,
                       const OptionalTensor& b, double p, Mask mask) {
  const auto coefficient = grad.to(at::kDouble).contiguous();
  const CudaLines lines(u, v, a, b, p);
  std::array<Tensor, 4> out{empty_if(mask[0], u), empty_if(mask[1], v), empty_if(mask[2], u), empty_if(mask[3], v)};
  std::array<Tensor, 2> potentials;
  const bool by_weights = mask[2] || mask[3];
  for (const size_t side : {0, 1}) {
    if (!mask[side] && !by_weights) continue;
    const Tensor& own = side == 0 ? u : v;
    const auto steps = by_weights ? at::empty(own.sizes(), coefficient.options()) : Tensor();
    const LineBackward call{lines.with_own(side == 0), coefficient.const_data_ptr<double>(), side == 0,
                            mask[side] ? rows_out(out[side]) : RowsOut{},
                            by_weights ? steps.mutable_data_ptr<double>() : nullptr};
    run_on_cuda([](const LineBackward& k, int64_t rows, double*,
                   cuda::Stream stream) { cuda::wasserstein_1d_backward(k, rows, stream); },
                call, coefficient.numel(), 0, u);
    if (by_weights) potentials[side] = running_sums(steps, false);
  }
  if (!by_weights) return {out[0], out[1], out[2], out[3]};
  // <a, f> = <b, g>, as wasserstein_1d_potentials() has it.
  const auto& [f, g] = potentials;
  const auto batch = u.sym_sizes().slice(0, u.dim() - 1);
  const auto weight_a = weights_or_uniform(a, batch, u.sym_size(-1), u),
             weight_b = weights_or_uniform(b, batch, v.sym_size(-1), v);
  const auto total = weight_a.sum(-1, true) + weight_b.sum(-1, true);
  const auto shift = ((weight_b * g).sum(-1, true) - (weight_a * f).sum(-1, true)) / at::where(total == 0, 1, total);
  const auto c = coefficient.unsqueeze(-1);
  if (mask[2]) out[2] = (c * (f + shift)).to(u.scalar_type());
  if (mask[3]) out[3] = (c * (g - shift)).to(v.scalar_type());
  return {out[0], out[1], out[2], out[3]};
}

Tensors2 tree_cuda(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, bool u_first,
                   bool exact) {
  auto [rows, cols] = empty_tree(u, v);
  const LineTree call{CudaLines(u, v, a, b, 1).with_own(true, exact), u_first,
                      rows.template mutable_data_ptr<int64_t>(), cols.template mutable_data_ptr<int64_t>()};
  run_on_cuda([](const LineTree& k, int64_t count, double*,
                 cuda::Stream stream) { cuda::wasserstein_1d_tree(k, count, stream); },
              call, row_count(u), 0, u);
  return {std::move(rows), std::move(cols)};
}
#endif

// -- CPU, and by device ---------------------------------------------------------------------------------------------

Tensor rows_dense(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, double p) {
#ifdef TD_CUDA
  if (is_for_cuda(u)) return rows_cuda(u, v, a, b, p);
#endif
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

Tensors4 backward_dense(const Tensor& grad, const Tensor& u, const Tensor& v, const OptionalTensor& a,
                        const OptionalTensor& b, double p, Mask mask) {
#ifdef TD_CUDA
  if (is_for_cuda(u)) return backward_cuda(grad, u, v, a, b, p, mask);
#endif
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

Tensors2 tree_dense(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, bool u_first,
                    bool exact) {
#ifdef TD_CUDA
  if (is_for_cuda(u)) return tree_cuda(u, v, a, b, u_first, exact);
#endif
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
            [&](int64_t i, int64_t j, double) { edge(i, j); }, exact);
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

Tensors2 tree_meta(const Tensor& u, const Tensor& v, const OptionalTensor&, const OptionalTensor&, bool, bool) {
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
    const auto cost_on = [&](const Tensor& rows, const Tensor& cols) {
      return PowerComposite(x.gather(-1, rows) - y.gather(-1, cols), p);
    };
    if (mask[0] || mask[1]) {
      const auto [rows, cols] = tree_of(u, v, a, b, u_first, /*exact=*/true);
      const auto slope = 0.5 * transport_flow(rows, cols, mass_a, mass_b) * cost_on(rows, cols).slope;
      du = du.scatter_add(-1, rows, slope);
      dv = dv.scatter_add(-1, cols, -slope);
    }
    if (mask[2] || mask[3]) {
      const auto [rows, cols] = tree_of(u, v, a, b, u_first, /*exact=*/false);
      const auto [fi, gj] = transport_potentials(rows, cols, cost_on(rows, cols).value, n, m);
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

Tensors2 tree_autograd(const Tensor& u, const Tensor& v, const OptionalTensor& a, const OptionalTensor& b, bool u_first,
                       bool exact) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return tree_of(u, v, a, b, u_first, exact);
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
  m.def("_wasserstein_1d_tree(Tensor u, Tensor v, Tensor? a, Tensor? b, bool u_first, bool exact) -> (Tensor, Tensor)",
        tags);
}

TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { m.impl("wasserstein_1d", wasserstein_1d_op); }
// As kl_div: a composite operator under vmap meets the slow per-sample fallback before its decomposition.
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { m.impl("wasserstein_1d", wasserstein_1d_op); }
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) {
  m.impl("_wasserstein_1d", rows_dense);
  m.impl("_wasserstein_1d_backward", backward_dense);
  m.impl("_wasserstein_1d_tree", tree_dense);
}
#ifdef TD_CUDA
TORCH_LIBRARY_IMPL(torch_divergence, CUDA, m) {
  m.impl("_wasserstein_1d", rows_dense);
  m.impl("_wasserstein_1d_backward", backward_dense);
  m.impl("_wasserstein_1d_tree", tree_dense);
}
#endif
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
