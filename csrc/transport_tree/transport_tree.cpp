// Flows and potentials on spanning trees: operators, autograd. See transport_tree.h.
#include "transport_tree/transport_tree.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <utility>
#include <vector>

#include "core/apply.h"
#include "core/op.h"

namespace torch_divergence {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using Tensors2 = std::tuple<Tensor, Tensor>;

// The tree of one row, from the root x_0: nodes 0..n-1 are the x, n..n+m-1 the y.
class RootedTree {
 public:
  RootedTree(const int64_t* rows, const int64_t* cols, int64_t n, int64_t m)
      : order_{0}, parent_(n + m, -1), edge_(n + m, -1) {
    const int64_t nodes = n + m, edges = nodes - 1;
    std::vector<int64_t> first(nodes + 1, 0), incident(2 * edges);
    const auto ends = [&](int64_t k) {
      TORCH_CHECK_VALUE(rows[k] >= 0 && rows[k] < n && cols[k] >= 0 && cols[k] < m, "transport tree: edge ", k, " is (",
                        rows[k], ", ", cols[k], "), expected indices below (", n, ", ", m, ")");
      return std::array<int64_t, 2>{rows[k], n + cols[k]};
    };
    for (int64_t k = 0; k < edges; ++k)
      for (const int64_t v : ends(k)) ++first[v + 1];
    for (int64_t v = 0; v < nodes; ++v) first[v + 1] += first[v];
    auto next = first;
    for (int64_t k = 0; k < edges; ++k)
      for (const int64_t v : ends(k)) incident[next[v]++] = k;

    order_.reserve(nodes);
    for (size_t at = 0; at < order_.size(); ++at) {
      const int64_t v = order_[at];
      for (int64_t e = first[v]; e < first[v + 1]; ++e) {
        const int64_t k = incident[e], other = v < n ? n + cols[k] : rows[k];
        if (k == edge_[v]) continue;
        TORCH_CHECK_VALUE(other != 0 && edge_[other] < 0, "transport tree: the edges have a cycle");
        parent_[other] = v;
        edge_[other] = k;
        order_.push_back(other);
      }
    }
    TORCH_CHECK_VALUE(static_cast<int64_t>(order_.size()) == nodes,
                      "transport tree: the edges do not reach every point");
  }

  // Leaves first: what is left of a node's weight goes over the edge to its parent. `weight` (nodes) is used up.
  void flow(double* weight, double* w) const {
    for (size_t at = order_.size() - 1; at > 0; --at) {
      const int64_t v = order_[at];
      w[edge_[v]] = weight[v];
      weight[parent_[v]] -= weight[v];
    }
  }
  void potentials(const double* c, double* potential) const {
    potential[0] = 0;
    for (size_t at = 1; at < order_.size(); ++at) {
      const int64_t v = order_[at];
      potential[v] = c[edge_[v]] - potential[parent_[v]];
    }
  }

 private:
  std::vector<int64_t> order_, parent_, edge_;  // order_: parents before their children
};

void check_tree(const Tensor& rows, const Tensor& cols, const c10::SymInt& n, const c10::SymInt& m) {
  TORCH_CHECK_VALUE(rows.scalar_type() == at::kLong && cols.scalar_type() == at::kLong &&
                        rows.sym_sizes() == cols.sym_sizes() && rows.dim() >= 1 && rows.sym_size(-1) == n + m - 1,
                    "transport tree: rows and cols have shapes ", rows.sym_sizes(), " and ", cols.sym_sizes(),
                    ", expected int64 tensors with ", n + m - 1, " edges");
}

Tensor flow_cpu(const Tensor& rows, const Tensor& cols, const Tensor& a, const Tensor& b) {
  const int64_t n = a.size(-1), m = b.size(-1), edges = n + m - 1;
  check_tree(rows, cols, n, m);
  const auto i = rows.contiguous(), j = cols.contiguous(), x = a.contiguous(), y = b.contiguous();
  auto w = at::empty(rows.sizes(), a.options());
  const auto *const pi = i.const_data_ptr<int64_t>(), *const pj = j.const_data_ptr<int64_t>();
  const auto *const px = x.const_data_ptr<double>(), *const py = y.const_data_ptr<double>();
  auto* const pw = w.mutable_data_ptr<double>();
  at::parallel_for(0, rows.numel() / edges, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> weight(n + m);
    for (int64_t r = begin; r < end; ++r) {
      std::copy_n(px + r * n, n, weight.begin());
      std::copy_n(py + r * m, m, weight.begin() + n);
      RootedTree(pi + r * edges, pj + r * edges, n, m).flow(weight.data(), pw + r * edges);
    }
  });
  return w;
}

Tensors2 empty_potentials(const Tensor& c, const c10::SymInt& n, const c10::SymInt& m) {
  c10::SymDimVector f(c.sym_sizes().begin(), c.sym_sizes().end()), g = f;
  f.back() = n;
  g.back() = m;
  return {at::empty_symint(f, c.options()), at::empty_symint(g, c.options())};
}

Tensors2 potentials_cpu(const Tensor& rows, const Tensor& cols, const Tensor& c, int64_t n, int64_t m) {
  const int64_t edges = n + m - 1;
  check_tree(rows, cols, n, m);
  const auto i = rows.contiguous(), j = cols.contiguous(), cost = c.contiguous();
  auto [f, g] = empty_potentials(c, n, m);
  const auto *const pi = i.const_data_ptr<int64_t>(), *const pj = j.const_data_ptr<int64_t>();
  const auto* const pc = cost.const_data_ptr<double>();
  auto *const pf = f.mutable_data_ptr<double>(), *const pg = g.mutable_data_ptr<double>();
  at::parallel_for(0, rows.numel() / edges, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> potential(n + m);
    for (int64_t r = begin; r < end; ++r) {
      RootedTree(pi + r * edges, pj + r * edges, n, m).potentials(pc + r * edges, potential.data());
      std::copy_n(potential.begin(), n, pf + r * n);
      std::copy_n(potential.begin() + n, m, pg + r * m);
    }
  });
  return {std::move(f), std::move(g)};
}

// On CUDA: trees are walked from the root, which is nothing for a GPU, and only derivatives beyond the first do it.
Tensor flow_by_cpu(const Tensor& rows, const Tensor& cols, const Tensor& a, const Tensor& b) {
  return flow_cpu(rows.cpu(), cols.cpu(), a.cpu(), b.cpu()).to(a.device());
}
Tensors2 potentials_by_cpu(const Tensor& rows, const Tensor& cols, const Tensor& c, int64_t n, int64_t m) {
  auto [f, g] = potentials_cpu(rows.cpu(), cols.cpu(), c.cpu(), n, m);
  return {f.to(c.device()), g.to(c.device())};
}

Tensor flow_meta(const Tensor& rows, const Tensor& /*cols*/, const Tensor& a, const Tensor& /*b*/) {
  return at::empty_symint(rows.sym_sizes(), a.options());
}
Tensors2 potentials_meta(const Tensor& /*rows*/, const Tensor& /*cols*/, const Tensor& c, c10::SymInt n,
                         c10::SymInt m) {
  return empty_potentials(c, n, m);
}

struct TransportFlow : torch::autograd::Function<TransportFlow> {
  static constexpr const char* name = "TransportFlowBackward";
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& rows, const Variable& cols, const Variable& a,
                          const Variable& b) {
    ctx->save_for_backward({rows, cols});
    ctx->saved_data["n"] = a.sym_size(-1);
    ctx->saved_data["m"] = b.sym_size(-1);
    ctx->set_materialize_grads(false);
    return transport_flow(rows, cols, a, b);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    if (!incoming[0].defined()) return variable_list(4);
    const auto s = ctx->get_saved_variables();
    auto [f, g] =
        transport_potentials(s[0], s[1], incoming[0], ctx->saved_data["n"].toSymInt(), ctx->saved_data["m"].toSymInt());
    return {Tensor(), Tensor(), f, g};
  }
  static variable_list jvp(AutogradContext*, const variable_list& in, const variable_list& tangents) {
    const auto of = [&](size_t i) { return tangents[i].defined() ? tangents[i] : at::zeros_like(in[i]); };
    return {transport_flow(in[0], in[1], of(2), of(3))};
  }
};

struct TransportPotentials : torch::autograd::Function<TransportPotentials> {
  static constexpr const char* name = "TransportPotentialsBackward";
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Variable& rows, const Variable& cols, const Variable& c,
                               const c10::SymInt& n, const c10::SymInt& m) {
    ctx->save_for_backward({rows, cols});
    ctx->saved_data["n"] = n;
    ctx->saved_data["m"] = m;
    auto [f, g] = transport_potentials(rows, cols, c, n, m);
    return {f, g};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    const auto s = ctx->get_saved_variables();
    return {Tensor(), Tensor(), transport_flow(s[0], s[1], incoming[0], incoming[1]), Tensor(), Tensor()};
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    auto [f, g] = transport_potentials(in[0], in[1], tangents[2], ctx->saved_data["n"].toSymInt(),
                                       ctx->saved_data["m"].toSymInt());
    return {f, g};
  }
};

Tensor flow_autograd(const Tensor& rows, const Tensor& cols, const Tensor& a, const Tensor& b) {
  return apply<TransportFlow>(rows, cols, a, b);
}
Tensors2 potentials_autograd(const Tensor& rows, const Tensor& cols, const Tensor& c, c10::SymInt n, c10::SymInt m) {
  auto v = apply<TransportPotentials>(rows, cols, c, n, m);
  return {v[0], v[1]};
}

}  // namespace

Tensor transport_flow(const Tensor& rows, const Tensor& cols, const Tensor& a, const Tensor& b) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&);
  static const auto op = typed_op<Signature>("torch_divergence::_transport_flow");
  return op.call(rows, cols, a, b);
}

Tensors2 transport_potentials(const Tensor& rows, const Tensor& cols, const Tensor& c, c10::SymInt n, c10::SymInt m) {
  using Signature = Tensors2(const Tensor&, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt);
  static const auto op = typed_op<Signature>("torch_divergence::_transport_potentials");
  return op.call(rows, cols, c, std::move(n), std::move(m));
}

Tensor weights_or_uniform(const std::optional<Tensor>& weights, c10::SymIntArrayRef batch, const c10::SymInt& n,
                          const Tensor& like) {
  c10::SymDimVector sizes(batch.begin(), batch.end());
  sizes.push_back(n);
  if (weights.has_value()) return weights->to(at::kDouble).expand_symint(sizes);
  return at::ones_symint(sizes, like.options().dtype(at::kDouble)) / n;
}

Tensors2 with_equal_masses(const Tensor& a, const Tensor& b) {
  const auto of_a = a.sum(-1, true), of_b = b.sum(-1, true), mean = (of_a + of_b) / 2;
  return {a * (mean / at::where(of_a == 0, 1, of_a)), b * (mean / at::where(of_b == 0, 1, of_b))};
}

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("_transport_flow(Tensor rows, Tensor cols, Tensor a, Tensor b) -> Tensor", tags);
  m.def("_transport_potentials(Tensor rows, Tensor cols, Tensor c, SymInt n, SymInt m) -> (Tensor, Tensor)", tags);
}
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) {
  m.impl("_transport_flow", flow_cpu);
  m.impl("_transport_potentials", potentials_cpu);
}
TORCH_LIBRARY_IMPL(torch_divergence, CUDA, m) {
  m.impl("_transport_flow", flow_by_cpu);
  m.impl("_transport_potentials", potentials_by_cpu);
}
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) {
  m.impl("_transport_flow", flow_meta);
  m.impl("_transport_potentials", potentials_meta);
}
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) {
  m.impl("_transport_flow", flow_autograd);
  m.impl("_transport_potentials", potentials_autograd);
}

}  // namespace torch_divergence
