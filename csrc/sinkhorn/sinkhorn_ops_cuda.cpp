// The private operators on CUDA, whole batches at a time. What takes conjugate gradients is led by the host, with
// sweeps on the device: see sinkhorn_ops.cpp. Formulas in sinkhorn.h.
#include "core/cuda_tensors.h"

#ifdef TD_CUDA
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Event.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "sinkhorn/sinkhorn_ops.h"
#include "sinkhorn/sinkhorn_sample.h"

namespace torch_divergence::transport {
namespace {

// The tensors of a batch in the kernels' layout: atoms are counted through the batch, points are (dims, atoms).
class Batch {
 public:
  Batch(const Tensor& x, const OptionalTensor& y, const Tensor& a_, const OptionalTensor& b_, const Tensor& eps_,
        const OptionalTensor& x_offsets, const OptionalTensor& y_offsets, int64_t cost, double rho_a_, double rho_b_,
        at::ScalarType type_)
      : type(type_),
        code(static_cast<int>(cost)),
        symmetric(cost != kCostMatrix && !y.has_value()),
        rho_a(rho_a_),
        rho_b(symmetric ? rho_a_ : rho_b_),
        a(flat(a_)),
        b(b_.has_value() ? flat(*b_) : a),
        eps(flat(eps_)),
        rows_at(starts(x_offsets, a_, "x_offsets")),
        cols_at(symmetric ? rows_at : starts(y_offsets, b_.value_or(a_), "y_offsets")),
        row_start(to_device(rows_at)),
        col_start(symmetric ? row_start : to_device(cols_at)) {
    if (code == kCostMatrix) {
      x_ = x.to(type).contiguous();
      return;
    }
    x_ = coordinates(x);
    y_ = symmetric ? x_ : coordinates(*y);
    if (code == kCosine) {
      offset_x = zero_vectors(x_);
      offset_y = symmetric ? offset_x : zero_vectors(y_);
    }
  }

  int64_t size() const { return eps.numel(); }
  int64_t dims() const { return code == kCostMatrix ? 0 : x_.size(0); }

  // (..., width) -> (width, atoms)
  Tensor coordinates(const Tensor& points) const {
    return points.to(type).reshape({-1, points.size(-1)}).t().contiguous();
  }
  static Tensor flat(const Tensor& t) { return t.to(at::kDouble).reshape({-1}).contiguous(); }

  PairBatch pairs() const {
    const bool matrix = code == kCostMatrix;
    return {type == at::kDouble,
            code == kCosine ? kHalfSqEuclidean : code,
            size(),
            dims(),
            row_start.const_data_ptr<int64_t>(),
            col_start.const_data_ptr<int64_t>(),
            matrix ? nullptr : x_.const_data_ptr(),
            matrix ? nullptr : y_.const_data_ptr(),
            rows_at.back(),
            cols_at.back(),
            matrix ? x_.const_data_ptr() : nullptr};
  }

  // One entry a problem, for each of its atoms.
  Tensor of_problem(const Tensor& t, Side side) const {
    const auto& start = side == Side::Rows ? row_start : col_start;
    return t.repeat_interleave(start.slice(0, 1) - start.slice(0, 0, -1), 0,
                               (side == Side::Rows ? rows_at : cols_at).back());
  }
  // Sums over the atoms of each problem, in a fixed order.
  Tensor sums(const Tensor& t, Side side) const {
    const auto& at = side == Side::Rows ? rows_at : cols_at;
    const int64_t problems = size();
    bool equal = true;
    for (size_t s = 0; s + 1 < at.size(); ++s) equal = equal && at[s + 1] - at[s] == at[1];
    if (problems == 0 || equal) return t.reshape({problems, -1}).sum(-1);
    std::vector<Tensor> parts;
    for (size_t s = 0; s + 1 < at.size(); ++s) parts.push_back(t.slice(0, at[s], at[s + 1]).sum());
    return at::stack(parts);
  }

  at::ScalarType type;
  int code;
  bool symmetric;
  double rho_a, rho_b;
  Tensor a, b, eps;                       // by atom and by problem, in double
  std::vector<int64_t> rows_at, cols_at;  // where each problem's atoms start: on the host,
  Tensor row_start, col_start;            // and on the device
  Tensor offset_x, offset_y;              // what cosine adds to an atom's costs: 1/2 for a zero vector

 private:
  std::vector<int64_t> starts(const OptionalTensor& offsets, const Tensor& weight, const char* argument) const {
    if (offsets.has_value()) return checked_starts(*offsets, weight.size(0), argument);
    std::vector<int64_t> out(static_cast<size_t>(size() + 1));
    for (size_t s = 0; s < out.size(); ++s) out[s] = static_cast<int64_t>(s) * weight.size(-1);
    return out;
  }
  Tensor to_device(const std::vector<int64_t>& v) const { return at::tensor(v, at::kLong).to(eps.device()); }
  static Tensor zero_vectors(const Tensor& points) { return (points == 0).all(0).to(at::kDouble) / 2; }

  Tensor x_, y_;
};

// A PairSweep over a batch, under construction: keeps the arrays that it points to. f and g are the potentials of rows
// and columns, in double.
class BatchSweep {
 public:
  BatchSweep(const Batch& batch, Side side, const Tensor& f, const Tensor& g) : batch_(batch) {
    const bool rows = side == Side::Rows;
    const PairBatch p = batch.pairs();
    const int64_t atoms = (rows ? batch.rows_at : batch.cols_at).back(),
                  width = p.cost == kCostMatrix ? batch.cols_at[1] : 0;  // of a matrix
    call.pairs = {p.is_double,
                  p.cost,
                  atoms,
                  0,
                  p.dims,
                  rows ? p.x : p.y,
                  rows ? p.y : p.x,
                  rows ? p.x_stride : p.y_stride,
                  rows ? p.y_stride : p.x_stride,
                  p.matrix,
                  rows ? width : 1,
                  rows ? 1 : width};
    batch_call_ = {rows ? p.row_start : p.col_start, rows ? p.col_start : p.row_start, p.problems,
                   batch.eps.const_data_ptr<double>()};
    const auto shifted = [](const Tensor& t, const Tensor& offset) { return offset.defined() ? t - offset : t; };
    call.f = keep(shifted(f, rows ? batch.offset_x : batch.offset_y));
    call.g = columns(shifted(g, rows ? batch.offset_y : batch.offset_x));
    call.alpha = 1;
  }

  const double* keep(const Tensor& t) { return tensors_.emplace_back(t).const_data_ptr<double>(); }
  // Of the pairs' type.
  const void* columns(const Tensor& t) { return tensors_.emplace_back(t.to(batch_.type)).const_data_ptr(); }
  // An output of one number a row.
  Tensor wanted(double*& slot) {
    const auto out = at::empty({call.pairs.rows}, batch_.eps.options());
    slot = out.mutable_data_ptr<double>();
    return out;
  }
  void run(bool over_largest = false) {
    const c10::cuda::CUDAGuard guard(batch_.eps.device());
    batch_call_.over_largest = over_largest;
    cuda::sinkhorn_pair_sweep(call, batch_call_, c10::cuda::getCurrentCUDAStream());
  }

  PairSweep call{};

 private:
  const Batch& batch_;
  SweepBatch batch_call_{};
  std::vector<Tensor> tensors_;
};

// A copy of a tensor of the device, which the host waits for as late as it likes.
class Glance {
 public:
  explicit Glance(const Tensor& t)
      : host_(at::empty(t.sizes(), t.options().device(at::kCPU).pinned_memory(t.is_cuda()))) {
    host_.copy_(t, /*non_blocking=*/true);
    if (!t.is_cuda()) return;
    event_.emplace(t.device().type());
    event_->record(c10::impl::VirtualGuardImpl(t.device().type()).getStream(t.device()));
  }
  const Tensor& wait() {
    if (event_.has_value()) event_->synchronize();
    return host_;
  }

 private:
  Tensor host_;
  std::optional<c10::Event> event_;
};

}  // namespace

Tensors6 solve_cuda(TD_SINKHORN_PROBLEM, const OptionalTensor& init, double tol, int64_t max_iter,
                    TD_SINKHORN_OPTIONS) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, x.scalar_type());
  const auto numbers = batch.eps.options();
  const auto one_each = [&](at::ScalarType type) { return at::empty({batch.size()}, numbers.dtype(type)); };
  const auto value = one_each(at::kDouble), error = one_each(at::kDouble), n_iter = one_each(at::kLong),
             status = at::zeros({batch.size()}, numbers.dtype(at::kInt));
  auto f = at::empty({batch.rows_at.back()}, numbers), g = at::empty({batch.cols_at.back()}, numbers);
  if (init.has_value()) (batch.symmetric ? f : g).copy_(init->reshape({-1}));
  const auto offset = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<double>() : nullptr; };
  const double mass_rounding = mass_rounding_of(x.scalar_type());
  const SinkhornSolve call{batch.pairs(),
                           batch.rows_at.data(),
                           batch.cols_at.data(),
                           batch.a.const_data_ptr<double>(),
                           batch.b.const_data_ptr<double>(),
                           batch.eps.const_data_ptr<double>(),
                           offset(batch.offset_x),
                           offset(batch.offset_y),
                           batch.rho_a,
                           batch.rho_b,
                           batch.symmetric,
                           init.has_value(),
                           tol,
                           max_iter,
                           mass_rounding,
                           f.mutable_data_ptr<double>(),
                           g.mutable_data_ptr<double>(),
                           value.mutable_data_ptr<double>(),
                           error.mutable_data_ptr<double>(),
                           n_iter.mutable_data_ptr<int64_t>(),
                           status.mutable_data_ptr<int>()};
  const c10::cuda::CUDAGuard guard(batch.eps.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto workspace = at::empty({cuda::sinkhorn_workspace(call)}, numbers);
  cuda::sinkhorn_begin(call, workspace.mutable_data_ptr<double>(), stream);
  // The host looks at the problems as they were before the passes that it has enqueued last: the device never waits.
  constexpr int64_t kPasses = 16;
  Tensor state;
  for (Glance before(status);;) {
    cuda::sinkhorn_passes(call, kPasses, workspace.mutable_data_ptr<double>(), stream);
    Glance now(status);
    state = before.wait();
    if ((state != kSinkhornRuns).all().item<bool>()) break;
    before = std::move(now);
  }
  for (int64_t s = 0; s < batch.size(); ++s)
    if (state.const_data_ptr<int>()[s] == kSinkhornInvalid) {
      const auto on_host = [](const Tensor& t, const std::vector<int64_t>& at, int64_t problem) {
        const auto part = t.slice(0, at[static_cast<size_t>(problem)], at[static_cast<size_t>(problem) + 1]).cpu();
        const double* const from = part.const_data_ptr<double>();
        return Vector(from, from + part.numel());
      };
      Problem p;
      p.a = on_host(batch.a, batch.rows_at, s);
      p.b = on_host(batch.b, batch.cols_at, s);
      p.eps = batch.eps.select(0, s).item<double>();
      p.rho_a = batch.rho_a;
      p.rho_b = batch.rho_b;
      check_values(p, mass_rounding);
      TORCH_CHECK_VALUE(false, "sinkhorn: problem ", s, " has masses ", sum_of(p.a), " and ", sum_of(p.b),
                        ", expected equal ones where both marginals are hard");
    }
  const auto converged = status == kSinkhornConverged;
  if (tol > 0 && !converged.all().item<bool>()) warn_not_converged(tol, max_iter);
  const auto like = [&](const Tensor& t, const Tensor& potential) {
    return potential.to(x.scalar_type()).reshape(t.sizes());
  };
  return {value, like(a, f), like(b.value_or(a), g), error, n_iter, converged};
}

Tensors5 backward_cuda(const Tensor& grad, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS,
                       Mask mask) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, x.scalar_type());
  const auto on_rows = Batch::flat(f), on_cols = Batch::flat(g), incoming = Batch::flat(grad),
             factor = batch.symmetric ? 2 * incoming : incoming;
  const auto none = [](const Tensor& t) { return at::empty({0}, t.options()); };
  std::array<Tensor, 5> out{none(x), none(y.value_or(x)), none(a), none(b.value_or(a)), none(eps)};
  const auto give = [&](size_t k, const Tensor& gradient, const Tensor& like) {
    out[k] = gradient.reshape(like.sizes()).to(like.scalar_type());
  };
  if (mask[0] && batch.code == kCostMatrix) {
    BatchSweep sweep(batch, Side::Rows, on_rows, on_cols);
    sweep.call.a = sweep.keep(batch.a);
    sweep.call.b = sweep.columns(batch.b);
    sweep.call.alpha = 0;
    sweep.call.alpha_row = sweep.keep(batch.of_problem(incoming, Side::Rows));
    const auto plan = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
    sweep.call.matrix_out = plan.mutable_data_ptr();
    sweep.run();
    out[0] = plan;
  }
  const auto of_side = [&](Side side, size_t at_points, size_t at_weight) {
    const bool rows = side == Side::Rows;
    const Tensor &potential = rows ? on_rows : on_cols, &own = rows ? batch.a : batch.b,
                 &weight = rows ? batch.b : batch.a;
    const double rho = rows ? batch.rho_a : batch.rho_b;
    if (mask[at_points] && batch.code != kCostMatrix) {
      // The plan is scaled to the marginal aimed at, which before convergence is the better gradient.
      BatchSweep sweep(batch, side, potential, rows ? on_cols : on_rows);
      sweep.call.b = sweep.columns(weight);
      const auto sum = sweep.wanted(sweep.call.sum);
      const auto points = at::empty({sum.numel(), batch.dims()}, sum.options().dtype(batch.type));
      sweep.call.gradient = points.mutable_data_ptr();
      sweep.run(/*over_largest=*/true);
      const auto scale = batch.of_problem(factor, side) * own * (-potential / rho).exp() / sum;
      give(at_points, points.to(at::kDouble) * at::where(own > 0, scale, 0.0).unsqueeze(-1), rows ? x : y.value_or(x));
    }
    if (mask[at_weight]) {
      const auto e = batch.of_problem(batch.eps, side),
                 other_mass = batch.of_problem(batch.sums(weight, rows ? Side::Columns : Side::Rows), side),
                 own_part = std::isinf(rho) ? potential : -(rho + e) * (-potential / rho).expm1();
      give(at_weight, batch.of_problem(factor, side) * (e * (other_mass - 1) + own_part), rows ? a : b.value_or(a));
    }
  };
  of_side(Side::Rows, 0, 2);
  of_side(Side::Columns, 1, 3);
  if (mask[4]) {
    BatchSweep sweep(batch, Side::Rows, on_rows, on_cols);
    sweep.call.b = sweep.columns(batch.b);
    const auto entropy = sweep.wanted(sweep.call.entropy);
    sweep.run();
    give(4, incoming * batch.sums(batch.a * entropy, Side::Rows), eps);
  }
  return {out[0], out[1], out[2], out[3], out[4]};
}

Tensor plan_cuda(const Tensor& v, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, bool transpose,
                 TD_SINKHORN_OPTIONS) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, x.scalar_type());
  const auto on_rows = Batch::flat(f), on_cols = Batch::flat(g), payload = batch.coordinates(v);
  BatchSweep sweep(batch, transpose ? Side::Columns : Side::Rows, transpose ? on_cols : on_rows,
                   transpose ? on_rows : on_cols);
  sweep.call.a = sweep.keep(transpose ? batch.b : batch.a);
  sweep.call.b = sweep.columns(transpose ? batch.a : batch.b);
  sweep.call.payload = payload.const_data_ptr();
  sweep.call.payload_dims = payload.size(0);
  at::DimVector sizes((transpose ? g : f).sizes());
  sizes.push_back(payload.size(0));
  auto out = at::empty(sizes, x.options());
  sweep.call.product = out.mutable_data_ptr();
  sweep.run();
  return out;
}

Tensors3 marginals_cuda(TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, x.scalar_type());
  const auto on_rows = Batch::flat(f), on_cols = Batch::flat(g);
  BatchSweep rows(batch, Side::Rows, on_rows, on_cols), cols(batch, Side::Columns, on_cols, on_rows);
  const auto marginal = [](BatchSweep& sweep, const Tensor& own, const Tensor& other) {
    sweep.call.a = sweep.keep(own);
    sweep.call.b = sweep.columns(other);
    return sweep.wanted(sweep.call.sum);
  };
  const auto r = marginal(rows, batch.a, batch.b), c = marginal(cols, batch.b, batch.a);
  auto cost_of_row = rows.wanted(rows.call.sum_cost);
  rows.run();
  cols.run();
  auto transport_cost = batch.sums(cost_of_row, Side::Rows);
  if (batch.offset_x.defined())
    transport_cost =
        transport_cost + batch.sums(r * batch.offset_x, Side::Rows) + batch.sums(c * batch.offset_y, Side::Columns);
  return {r.reshape(f.sizes()).to(f.scalar_type()), c.reshape(g.sizes()).to(g.scalar_type()), transport_cost};
}

void sweep_on_cuda(const PairSweep& host, c10::Device device) {
  const Pairs& p = host.pairs;
  const int64_t wide = p.is_double ? sizeof(double) : sizeof(float), pairs = p.rows * p.cols;
  PairSweep call = host;
  struct Part {
    void** slot;  // in call, where it still points to the host's memory
    int64_t bytes, at;
  };
  std::vector<Part> in, out;
  int64_t in_bytes = 0, out_bytes = 0;
  const auto add = [](std::vector<Part>& parts, int64_t& used, auto*& slot, int64_t bytes) {
    if (slot == nullptr) return;
    parts.push_back({reinterpret_cast<void**>(const_cast<void*>(static_cast<const void*>(&slot))), bytes, used});
    used += (bytes + 15) / 16 * 16;
  };
  const auto input = [&](auto*& slot, int64_t bytes) { add(in, in_bytes, slot, bytes); };
  const auto output = [&](auto*& slot, int64_t bytes) { add(out, out_bytes, slot, bytes); };
  const auto by_row = [&](const double*& slot) { input(slot, p.rows * static_cast<int64_t>(sizeof(double))); };
  const auto by_col = [&](const void*& slot) { input(slot, p.cols * wide); };
  input(call.pairs.x, p.dims * p.x_stride * wide);
  input(call.pairs.y, p.dims * p.y_stride * wide);
  input(call.pairs.matrix, pairs * wide);
  for (const double** v : {&call.f, &call.a, &call.alpha_row, &call.p}) by_row(*v);
  for (const void** v : {&call.g, &call.b, &call.beta, &call.q}) by_col(*v);
  input(call.vx, p.dims * p.x_stride * wide);
  input(call.vy, p.dims * p.y_stride * wide);
  input(call.v_matrix, pairs * wide);
  input(call.t, call.rank * p.x_stride * wide);
  input(call.v, call.rank * p.y_stride * wide);
  input(call.payload, call.payload_dims * p.y_stride * wide);
  for (double** v : {&call.sum, &call.sum_cost, &call.sum_z, &call.entropy})
    output(*v, p.rows * static_cast<int64_t>(sizeof(double)));
  output(call.gradient, p.rows * p.dims * wide);
  output(call.product, p.rows * call.payload_dims * wide);
  output(call.matrix_out, pairs * wide);

  const auto bytes = at::TensorOptions(at::kByte);
  const auto staged = at::empty({in_bytes}, bytes);
  for (const Part& part : in)
    std::memcpy(staged.mutable_data_ptr<uint8_t>() + part.at, *part.slot, static_cast<size_t>(part.bytes));
  const auto there = staged.to(device), back = at::empty({out_bytes}, bytes.device(device)),
             starts = at::tensor({int64_t{0}, p.rows, int64_t{0}, p.cols}).to(device),
             eps = at::full({1}, 1 / host.inv_eps, at::TensorOptions(at::kDouble).device(device));
  std::vector<void*> results;
  for (const Part& part : in) *part.slot = there.mutable_data_ptr<uint8_t>() + part.at;
  for (const Part& part : out) {
    results.push_back(*part.slot);
    *part.slot = back.mutable_data_ptr<uint8_t>() + part.at;
  }
  const int64_t* const start = starts.const_data_ptr<int64_t>();
  const c10::cuda::CUDAGuard guard(device);
  cuda::sinkhorn_pair_sweep(call, {start, start + 2, 1, eps.const_data_ptr<double>()},
                            c10::cuda::getCurrentCUDAStream());
  const auto result = back.cpu();
  for (size_t k = 0; k < out.size(); ++k)
    std::memcpy(results[k], result.const_data_ptr<uint8_t>() + out[k].at, static_cast<size_t>(out[k].bytes));
}

}  // namespace torch_divergence::transport
#endif
