// The Fisher-vector product of a categorical distribution: operators, checks, autograd. The formulas are in
// fisher_vector_product.h, the kernels in fisher_vector_product_cpu.cpp and
// fisher_vector_product_cuda.cu.
#include "fisher_vector_product/fisher_vector_product.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <torch/library.h>
#include <torch_divergence/functional/fisher_vector_product.h>

#include "core/apply.h"
#include "core/checks.h"
#include "core/composite.h"
#include "core/cuda_tensors.h"
#include "core/large_tensor.h"
#include "core/op.h"
#include "core/row_layout.h"

namespace torch_divergence {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// F v over the last dimension, in v's dtype.
Tensor product(const Tensor& logits, const Tensor& v, double temperature) {
  static const auto op = typed_op<decltype(product)>("torch_divergence::_fisher_vector_product");
  return op.call(logits, v, temperature);
}

Tensor product_dense(const Tensor& logits, const Tensor& v, double temperature) {
  auto out = empty_like_large(v);
  const FisherVectorProduct call{rows_in(logits), rows_in(v), v.size(-1), temperature, rows_out(out)};
#ifdef TD_CUDA
  if (is_for_cuda(v)) {
    const int64_t rows = row_count(v);
    run_on_cuda(&cuda::fisher_vector_product, call, rows, cuda::fisher_vector_product_workspace(rows, call.classes), v);
    return out;
  }
#endif
  const auto kernel = TD_CPU_KERNEL(fisher_vector_product);
  parallel_rows(row_count(v), v.size(-1),
                [&](int64_t begin, int64_t end, ForEach columns) { kernel(call, begin, end, columns); });
  return out;
}
Tensor product_meta(const Tensor&, const Tensor& v, double) { return at::empty_like(v); }

// (dF[u]) v, see fisher_vector_product.h: in the dtype that is computed in.
Tensor derivative(const Tensor& logits, const Tensor& u, const Tensor& v, double temperature) {
  const auto dtype = loss_dtype(logits, v);
  const auto z = logits.to(dtype), q = at::softmax(z / temperature, -1);
  const auto absent = z == -std::numeric_limits<double>::infinity();
  const auto centred = [&](const Tensor& t) {
    const auto kept = at::where(absent, 0, t.to(dtype));
    return kept - (q * kept).sum(-1, true);
  };
  return product(logits, centred(u) * centred(v), temperature) / temperature;
}

struct Product : torch::autograd::Function<Product> {
  static constexpr const char* name = "FisherVectorProductBackward";
  static constexpr bool is_traceable = true;

  static Variable forward(AutogradContext* ctx, const Variable& logits, const Variable& v, double temperature) {
    ctx->save_for_backward({logits, v});
    ctx->saved_data["temperature"] = temperature;
    ctx->set_materialize_grads(false);
    return product(logits, v, temperature);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list result(3);
    const auto& g = incoming[0];
    if (!g.defined()) return result;
    const auto s = ctx->get_saved_variables();
    const double temperature = ctx->saved_data["temperature"].toDouble();
    if (ctx->needs_input_grad(0)) result[0] = derivative(s[0], g, s[1], temperature).to(s[0].scalar_type());
    if (ctx->needs_input_grad(1)) result[1] = product(s[0], g, temperature);
    return result;
  }
  static variable_list jvp(AutogradContext* ctx, const variable_list& in, const variable_list& tangents) {
    const double temperature = ctx->saved_data["temperature"].toDouble();
    Tensor tangent;
    if (tangents[1].defined()) tangent = product(in[0], tangents[1], temperature);
    if (tangents[0].defined()) {
      const auto t = derivative(in[0], tangents[0], in[1], temperature).to(in[1].scalar_type());
      tangent = tangent.defined() ? tangent + t : t;
    }
    return {tangent};
  }
};

Tensor product_autograd(const Tensor& logits, const Tensor& v, double temperature) {
  return apply<Product>(logits, v, temperature);
}

Tensor fisher_vector_product_op(const Tensor& logits, const Tensor& v, double temperature, int64_t dim) {
  constexpr const char* kName = "fisher_vector_product";
  check_distribution(kName, "logits", logits);
  checked_like(kName, "v", v, "logits", logits, true);
  const int64_t class_dim = check_dim(kName, logits, dim);
  check_temperature(kName, temperature, true);
  if (class_dim == logits.dim() - 1) return product(logits, v, temperature);
  return product(logits.movedim(class_dim, -1), v.movedim(class_dim, -1), temperature).movedim(-1, class_dim);
}

}  // namespace

Tensor fisher_vector_product(const Tensor& logits, const Tensor& v, const FisherVectorProductOptions& options) {
  return fisher_vector_product_op(logits, v, options.temperature(), options.dim());
}

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("fisher_vector_product(Tensor logits, Tensor v, *, float temperature=1.0, int dim=-1) -> Tensor", tags);
  m.def("_fisher_vector_product(Tensor logits, Tensor v, float temperature) -> Tensor", tags);
}
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) {
  m.impl("fisher_vector_product", fisher_vector_product_op);
}
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) {
  m.impl("fisher_vector_product", fisher_vector_product_op);
}
TORCH_LIBRARY_IMPL(torch_divergence, CPU, m) { m.impl("_fisher_vector_product", product_dense); }
#ifdef TD_CUDA
TORCH_LIBRARY_IMPL(torch_divergence, CUDA, m) { m.impl("_fisher_vector_product", product_dense); }
#endif
TORCH_LIBRARY_IMPL(torch_divergence, Meta, m) { m.impl("_fisher_vector_product", product_meta); }
TORCH_LIBRARY_IMPL(torch_divergence, Autograd, m) { m.impl("_fisher_vector_product", product_autograd); }

}  // namespace torch_divergence
