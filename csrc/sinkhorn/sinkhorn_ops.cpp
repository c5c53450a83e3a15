// The private operators on the CPU: from tensors to problems, samples and sweeps, and back. Formulas in sinkhorn.h.
// Those behind second derivatives serve CUDA too, with their sweeps on the device.
#include "sinkhorn/sinkhorn_ops.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "core/cuda_tensors.h"
#include "sinkhorn/sinkhorn_sample.h"

namespace torch_divergence::transport {
namespace {

// Above this many pairs the rows of a problem are split over threads, below it the problems of a batch.
constexpr int64_t kSmall = int64_t{1} << 18;

// The tensors of a batch, contiguous and in the kernels' type, and where each problem starts in them.
class Batch {
 public:
  Batch(TD_SINKHORN_PROBLEM, TD_SINKHORN_OPTIONS, at::ScalarType type)
      : code(static_cast<int>(cost)),
        symmetric(cost != kCostMatrix && !y.has_value()),
        dims(cost == kCostMatrix ? 0 : x.size(-1)),
        rho_a_(rho_a),
        rho_b_(symmetric ? rho_a : rho_b),
        device_(is_for_cuda(x) ? std::optional(x.device()) : std::nullopt),
        one_matrix_(cost == kCostMatrix && x.size(0) > 1 && x.stride(0) == 0),
        x_(on_host(one_matrix_ ? x.select(0, 0) : x, type)),
        y_(y.has_value() ? on_host(*y, type) : Tensor()),
        a_(on_host(a, at::kDouble)),
        b_(b.has_value() ? on_host(*b, at::kDouble) : a_),
        eps_(on_host(eps, at::kDouble)) {
    starts(x_offsets, a_, "x_offsets", x_start_);
    starts(symmetric ? x_offsets : y_offsets, b_, "y_offsets", y_start_);
  }

  int64_t size() const { return eps_.numel(); }
  int64_t rows(int64_t s) const { return x_start_[index(s) + 1] - x_start_[index(s)]; }
  int64_t cols(int64_t s) const { return y_start_[index(s) + 1] - y_start_[index(s)]; }
  int64_t row_start(int64_t s) const { return x_start_[index(s)]; }
  int64_t col_start(int64_t s) const { return y_start_[index(s)]; }
  // Where the problem's entries start in a tensor of the shape of x, counted in entries.
  int64_t x_entry(int64_t s) const { return row_start(s) * (code == kCostMatrix ? x_.size(-1) : dims); }

  template <class A>
  Sample<A> sample(int64_t s) const {
    return {code,
            rows(s),
            cols(s),
            dims,
            x_.const_data_ptr<A>() + (one_matrix_ ? 0 : x_entry(s)),
            y_.defined() ? y_.const_data_ptr<A>() + col_start(s) * dims : nullptr,
            device_};
  }
  Problem problem(int64_t s) const {
    Problem p;
    p.a = slice(a_, row_start(s), rows(s));
    p.b = slice(b_, col_start(s), cols(s));
    p.eps = eps_.const_data_ptr<double>()[s];
    p.rho_a = rho_a_;
    p.rho_b = rho_b_;
    p.symmetric = symmetric;
    return p;
  }
  // Entries of a tensor with one number an atom.
  static Vector slice(const Tensor& t, int64_t start, int64_t count) {
    const double* const from = t.const_data_ptr<double>() + start;
    return {from, from + count};
  }
  Vector of_rows(const Tensor& t, int64_t s) const { return slice(t, row_start(s), rows(s)); }
  Vector of_cols(const Tensor& t, int64_t s) const { return slice(t, col_start(s), cols(s)); }

  template <class F>
  void for_each(const F& f) const {
    for_each_of(size(), 1, f);
  }
  // f(begin, end): problems that one kernel solves side by side, or a single one.
  template <class F>
  void for_each_group(const F& f) const {
    std::vector<int64_t> begins;
    for (int64_t s = 0; s < size(); ++s)
      if (begins.empty() || s == begins.back() + kSmallLanes || !is_small(s) || !is_small(s - 1)) begins.push_back(s);
    begins.push_back(size());
    for_each_of(static_cast<int64_t>(begins.size()) - 1, kSmallLanes,
                [&](int64_t k) { f(begins[index(k)], begins[index(k + 1)]); });
  }
  bool is_small(int64_t s) const { return rows(s) <= kSmallAtoms && cols(s) <= kSmallAtoms; }
  SmallSolve small_solve(const Tensor& init, double tol, int64_t max_iter) const {
    const bool matrix = code == kCostMatrix;
    const void* const points = matrix ? nullptr : x_.const_data_ptr();
    return {.is_double = x_.scalar_type() == at::kDouble,
            .cost = code,
            .dims = dims,
            .row_start = x_start_.data(),
            .col_start = y_start_.data(),
            .x = points,
            .y = y_.defined() ? y_.const_data_ptr() : points,
            .matrix = matrix ? x_.const_data_ptr() : nullptr,
            .one_matrix = one_matrix_,
            .a = a_.const_data_ptr<double>(),
            .b = b_.const_data_ptr<double>(),
            .eps = eps_.const_data_ptr<double>(),
            .init = init.defined() ? init.const_data_ptr<double>() : nullptr,
            .rho_a = rho_a_,
            .rho_b = rho_b_,
            .symmetric = symmetric,
            .tol = tol,
            .max_iter = max_iter};
  }

  int code;  // a CostCode
  bool symmetric;
  int64_t dims;

 private:
  static size_t index(int64_t s) { return static_cast<size_t>(s); }
  // together: problems of one call, where they are small.
  template <class F>
  void for_each_of(int64_t count, int64_t together, const F& f) const {
    int64_t pairs = 1;
    for (int64_t s = 0; s < size(); ++s) pairs = std::max(pairs, rows(s) * cols(s));
    const bool splits = pairs <= kSmall && !device_.has_value();
    const int64_t grain = std::max<int64_t>(1, splits ? kSmall / 64 / pairs / together : count);
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) f(k);
    });
  }
  void starts(const OptionalTensor& offsets, const Tensor& weight, const char* argument, std::vector<int64_t>& out) {
    const int64_t batch = eps_.numel();
    out.resize(index(batch + 1));
    if (!offsets.has_value()) {
      for (int64_t s = 0; s <= batch; ++s) out[index(s)] = s * weight.size(-1);
      return;
    }
    out = checked_starts(*offsets, weight.size(0), argument);
  }
  static Tensor on_host(const Tensor& t, at::ScalarType type) { return t.to(at::kCPU, type).contiguous(); }

  double rho_a_, rho_b_;
  std::optional<c10::Device> device_;
  bool one_matrix_;  // of all problems; x_ holds it once
  Tensor x_, y_, a_, b_, eps_;
  std::vector<int64_t> x_start_, y_start_;
};

template <class A>
void write(const Tensor& out, int64_t start, const Vector& values) {
  A* const to = out.mutable_data_ptr<A>() + start;
  for (size_t i = 0; i < values.size(); ++i) to[i] = static_cast<A>(values[i]);
}

void transform(Vector& v, const auto& f) {
  for (size_t i = 0; i < v.size(); ++i) v[i] = f(v[i], i);
}
double relaxation(double f, double rho) { return std::exp(-f / rho); }

template <class A>
const A* points_of(const Tensor& t, int64_t start, int64_t dims) {
  return t.defined() ? t.const_data_ptr<A>() + start * dims : nullptr;
}

Tensor as_double(const OptionalTensor& t) {
  return t.has_value() && t->defined() ? t->to(at::kCPU, at::kDouble).contiguous() : Tensor();
}

// Buffers for the gradients by x, y, a, b and eps; the weights' and eps's are always in double.
std::array<Tensor, 5> gradients(TD_SINKHORN_PROBLEM, Mask mask, at::ScalarType points) {
  const auto make = [&](bool wanted, const Tensor& t, at::ScalarType type) {
    return at::empty(wanted ? t.sizes() : at::IntArrayRef{0}, at::TensorOptions(type));
  };
  return {make(mask[0], x, points), make(mask[1], y.value_or(x), points), make(mask[2], a, at::kDouble),
          make(mask[3], b.value_or(a), at::kDouble), make(mask[4], eps, at::kDouble)};
}

// The value's gradients of one problem, times its incoming gradient.
template <class A>
void backward_sample(const Batch& batch, int64_t s, double grad, const Vector& f, const Vector& g,
                     const std::array<Tensor, 5>& out, Mask mask) {
  const Problem p = batch.problem(s);
  auto sample = batch.sample<A>(s);
  const double twice = batch.symmetric ? 2 : 1;
  if (batch.code == kCostMatrix) {
    if (mask[0]) {
      Sweep<A> sweep(sample, Side::Rows, p.eps, f, g);
      sweep.call.a = sweep.keep(p.a);
      sweep.call.b = sweep.columns(p.b);
      sweep.call.alpha = grad;
      sweep.call.matrix_out = out[0].mutable_data_ptr<A>() + batch.x_entry(s);
      sweep.run();
    }
  } else {
    // Each side's plan is scaled to the marginal aimed at, which before convergence is the better gradient.
    const auto side = [&](Side which, const Vector& own, const Vector& other, const Vector& weight, double rho, A* to) {
      sample.point_gradient(p, which, own, other, to);
      for (size_t i = 0; i < own.size(); ++i) {
        const double factor = twice * grad * weight[i] * relaxation(own[i], rho);
        for (int64_t k = 0; k < batch.dims; ++k, ++to)
          *to = weight[i] > 0 ? static_cast<A>(static_cast<double>(*to) * factor) : A(0);
      }
    };
    if (mask[0]) side(Side::Rows, f, g, p.a, p.rho_a, out[0].mutable_data_ptr<A>() + batch.row_start(s) * batch.dims);
    if (mask[1])
      side(Side::Columns, g, f, p.b, p.rho_b, out[1].mutable_data_ptr<A>() + batch.col_start(s) * batch.dims);
  }
  const auto weights = [&](Vector v, double rho, double other_mass) {
    transform(v, [&](double t, size_t) { return twice * grad * weight_gradient(t, p.eps, rho, other_mass); });
    return v;
  };
  if (mask[2]) write<double>(out[2], batch.row_start(s), weights(f, p.rho_a, sum_of(p.b)));
  if (mask[3]) write<double>(out[3], batch.col_start(s), weights(g, p.rho_b, sum_of(p.a)));
  if (mask[4]) {
    Sweep<A> sweep(sample, Side::Rows, p.eps, f, g);
    sweep.call.b = sweep.columns(p.b);
    const Vector& entropy = sweep.wanted(sweep.call.entropy);
    sweep.run();
    out[4].mutable_data_ptr<double>()[s] = grad * dot(p.a, entropy);
  }
}

// W u and W'u by sweeps, at eps or for the squares of W.
Linear::Product products(const Sample<double>& sample, const Vector& f, const Vector& g, double eps) {
  return [&sample, &f, &g, eps](Side side, const Vector& u) {
    Sweep<double> sweep(sample, side, eps, side == Side::Rows ? f : g, side == Side::Rows ? g : f);
    sweep.call.b = sweep.columns(u);
    sweep.call.alpha = 1;
    Vector out = sweep.wanted(sweep.call.sum);
    sweep.call.sum = out.data();
    sweep.run();
    return out;
  };
}

// A direction in which a problem moves.
struct Direction {
  const double *x = nullptr, *y = nullptr;  // points, or C in x
  Vector a, b;
  double eps = 0;
};

// What a direction does to the potentials: the change (df, dg), with the balanced gauge <a,f> = <b,g> kept only if
// asked.
class Tangent {
 public:
  Tangent(const Batch& batch, const Problem& p, const Sample<double>& sample, const Vector& f, const Vector& g,
          Direction& v)
      : p_(p), sample_(sample), f_(f), g_(g), v_(v), dims_(batch.dims), times_(products(sample, f, g, p.eps)) {
    slope = gauge_slope(p, v.a, v.b);
    transform(v.a, [&](double t, size_t i) { return t - slope * p.a[i]; });
    transform(v.b, [&](double t, size_t j) { return t + slope * p.b[j]; });
    const Linear linear(p, times_, products(sample, f, g, p.eps / 2));
    linear.solve(right(Side::Rows), right(Side::Columns), df, dg);
    // Where the plan is nearly diagonal the system hardly determines df - dg, which is 0.
    if (p.symmetric) {
      transform(df, [&](double t, size_t i) { return (t + dg[i]) / 2; });
      dg = df;
    }
    shift((dot(p.b, dg) - dot(p.a, df)) / (sum_of(p.a) + sum_of(p.b)));
  }

  void shift(double k) {
    if (!p_.balanced()) return;
    transform(df, [&](double t, size_t) { return t + k; });
    transform(dg, [&](double t, size_t) { return t - k; });
  }

  // The sweep whose weights are dP, seen from a side.
  void prepare(Sweep<double>& sweep, Side side) const {
    const bool rows = side == Side::Rows;
    move(sweep, side);
    sweep.call.a = sweep.keep(rows ? p_.a : p_.b);
    sweep.call.b = sweep.columns(rows ? p_.b : p_.a);
    const auto scaled = [&](Vector u) {
      transform(u, [&](double t, size_t) { return t / p_.eps; });
      return u;
    };
    sweep.call.alpha_row = sweep.keep(scaled(rows ? df : dg));
    sweep.call.beta = sweep.columns(scaled(rows ? dg : df));
    sweep.call.lambda = -1 / p_.eps;
    sweep.call.p = sweep.keep(rows ? v_.a : v_.b);
    sweep.call.q = sweep.columns(rows ? v_.b : v_.a);
  }
  Sweep<double> sweep(Side side) const {
    const bool rows = side == Side::Rows;
    return {sample_, side, p_.eps, rows ? f_ : g_, rows ? g_ : f_};
  }
  Vector times(Side side, const Vector& u) const { return times_(side, u); }

  Vector df, dg;
  double slope = 0;

 private:
  void move(Sweep<double>& sweep, Side side) const {
    if (sweep.call.pairs.cost == kCostMatrix) {
      sweep.call.v_matrix = v_.x;
    } else {
      const bool rows = side == Side::Rows;
      sweep.call.vx = sweep.coordinates(rows ? v_.x : v_.y, true, dims_);
      sweep.call.vy = sweep.coordinates(rows ? v_.y : v_.x, false, dims_);
    }
    sweep.call.veps = v_.eps;
  }
  // sum_j W b D - eps W vb, and the same from the other side.
  Vector right(Side side) const {
    const bool rows = side == Side::Rows;
    auto call = sweep(side);
    move(call, side);
    call.call.b = call.columns(rows ? p_.b : p_.a);
    call.call.lambda = 1;
    Vector other = rows ? v_.b : v_.a;
    transform(other, [&](double t, size_t) { return -p_.eps * t; });
    call.call.q = call.columns(other);
    Vector out = call.wanted(call.call.sum);
    call.call.sum = out.data();
    call.run();
    return out;
  }

  const Problem& p_;
  const Sample<double>& sample_;
  const Vector &f_, &g_;
  const Direction& v_;
  int64_t dims_;
  Linear::Product times_;
};

// The direction of problem s; absent tangents are 0. In symmetric problems both roles move.
class Directions {
 public:
  Directions(const OptionalTensor& vx, const OptionalTensor& vy, const OptionalTensor& va, const OptionalTensor& vb,
             const OptionalTensor& veps)
      : x_(as_double(vx)), y_(as_double(vy)), a_(as_double(va)), b_(as_double(vb)), eps_(as_double(veps)) {}

  Direction of(const Batch& batch, int64_t s) const {
    Direction v;
    if (x_.defined()) v.x = x_.const_data_ptr<double>() + batch.x_entry(s);
    const Tensor &y = batch.symmetric ? x_ : y_, &b = batch.symmetric ? a_ : b_;
    if (y.defined() && batch.code != kCostMatrix) v.y = y.const_data_ptr<double>() + batch.col_start(s) * batch.dims;
    v.a = a_.defined() ? batch.of_rows(a_, s) : Vector(static_cast<size_t>(batch.rows(s)));
    v.b = b.defined() ? batch.of_cols(b, s) : Vector(static_cast<size_t>(batch.cols(s)));
    v.eps = eps_.defined() ? eps_.const_data_ptr<double>()[s] : 0;
    return v;
  }

 private:
  Tensor x_, y_, a_, b_, eps_;
};

Tensors5 in_types_of(const Tensor& x, const Tensor& a, const OptionalTensor& b, const Tensor& eps,
                     const std::array<Tensor, 5>& t) {
  const auto like = [&](size_t k, const Tensor& input) { return t[k].to(input.device(), input.scalar_type()); };
  return {like(0, x), like(1, x), like(2, a), like(3, b.value_or(a)), like(4, eps)};
}

void scale(double* t, int64_t count, double factor) {
  for (int64_t i = 0; i < count; ++i) t[i] *= factor;
}

}  // namespace

void check_values(const Problem& p, double rounding) {
  TORCH_CHECK_VALUE(p.eps > 0 && std::isfinite(p.eps), "sinkhorn: eps is ", p.eps,
                    ", expected a positive finite number");
  const auto check = [](const Vector& weight, const char* argument) {
    for (size_t i = 0; i < weight.size(); ++i)
      TORCH_CHECK_VALUE(!(weight[i] < 0) && !std::isinf(weight[i]), "sinkhorn: ", argument, " holds ", weight[i],
                        " at ", i, ", expected finite weights that are not negative");
    TORCH_CHECK_VALUE(sum_of(weight) != 0, "sinkhorn: ", argument, " has mass 0, expected a positive one");
  };
  check(p.a, "a");
  check(p.b, "b");
  const double m_a = sum_of(p.a), m_b = sum_of(p.b);
  TORCH_CHECK_VALUE(!p.balanced() || !(std::abs(m_a - m_b) > rounding * std::max(m_a, m_b)), "sinkhorn: a has mass ",
                    m_a, " and b ", m_b,
                    ", expected equal ones where both marginals are hard (rho or reach relaxes them)");
}

void warn_not_converged(double tol, int64_t max_iter) {
  TORCH_WARN_ONCE("sinkhorn: a problem has not reached tol = ", tol, " within max_iter = ", max_iter,
                  " iterations; its marginal_error says how far it is. This is said once.");
}

std::vector<int64_t> checked_starts(const Tensor& offsets, int64_t atoms, const char* argument) {
  const auto o = offsets.cpu().contiguous();
  const int64_t* const from = o.const_data_ptr<int64_t>();
  std::vector<int64_t> out(from, from + o.numel());
  TORCH_CHECK_VALUE(out.front() == 0 && out.back() == atoms, "sinkhorn: ", argument, " runs from ", out.front(), " to ",
                    out.back(), ", expected from 0 to the number of points, ", atoms);
  for (size_t s = 0; s + 1 < out.size(); ++s)
    TORCH_CHECK_VALUE(out[s] < out[s + 1], "sinkhorn: ", argument, " leaves problem ", s, " with ", out[s + 1] - out[s],
                      " points, expected at least one");
  return out;
}

Tensors6 solve_cpu(TD_SINKHORN_PROBLEM, const OptionalTensor& init, double tol, int64_t max_iter, TD_SINKHORN_OPTIONS) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, x.scalar_type());
  const auto numbers = eps.options().dtype(at::kDouble);
  auto value = at::empty({batch.size()}, numbers), error = at::empty({batch.size()}, numbers);
  auto n_iter = at::empty({batch.size()}, numbers.dtype(at::kLong)),
       converged = at::empty({batch.size()}, numbers.dtype(at::kBool));
  auto f = at::empty(a.sizes(), x.options()), g = at::empty(b.value_or(a).sizes(), x.options());
  const auto warm = as_double(init);
  SmallSolve small = batch.small_solve(warm, tol, max_iter);
  small.f = f.mutable_data_ptr();
  small.g = g.mutable_data_ptr();
  small.value = value.mutable_data_ptr<double>();
  small.marginal_error = error.mutable_data_ptr<double>();
  small.iterations = n_iter.mutable_data_ptr<int64_t>();
  small.converged = converged.mutable_data_ptr<bool>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sinkhorn", [&] {
    const double mass_rounding = mass_rounding_of(x.scalar_type());
    batch.for_each_group([&](int64_t begin, int64_t end) {
      if (batch.is_small(begin)) {
        for (int64_t s = begin; s < end; ++s) check_values(batch.problem(s), mass_rounding);
        return TD_CPU_KERNEL(sinkhorn_solve_small)(small, begin, end);
      }
      const int64_t s = begin;
      Problem p = batch.problem(s);
      check_values(p, mass_rounding);
      auto sample = batch.sample<scalar_t>(s);
      sample.set_cost_range(p);
      p.rounding = static_cast<double>(std::numeric_limits<scalar_t>::epsilon());
      p.soft_min = [&](Side side, const Vector& potential, double at_eps, Vector& out) {
        sample.soft_min(p, side, potential, at_eps, out);
      };
      const Solution solution = solve(p, tol, max_iter, warm.defined() ? batch.of_cols(warm, s) : Vector());
      write<scalar_t>(f, batch.row_start(s), solution.f);
      write<scalar_t>(g, batch.col_start(s), solution.g);
      small.value[s] = solution.value;
      small.marginal_error[s] = solution.marginal_error;
      small.iterations[s] = solution.iterations;
      small.converged[s] = solution.converged;
    });
  });
  const bool all_converged = std::all_of(small.converged, small.converged + batch.size(), [](bool c) { return c; });
  if (!all_converged && tol > 0) warn_not_converged(tol, max_iter);
  return {value, f, g, error, n_iter, converged};
}

Tensors5 backward_cpu(const Tensor& grad, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS,
                      Mask mask) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, x.scalar_type());
  const auto out = gradients(x, y, a, b, eps, mask, x.scalar_type());
  const auto incoming = as_double(grad), f_double = as_double(f), g_double = as_double(g);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sinkhorn_backward", [&] {
    batch.for_each([&](int64_t s) {
      backward_sample<scalar_t>(batch, s, incoming.const_data_ptr<double>()[s], batch.of_rows(f_double, s),
                                batch.of_cols(g_double, s), out, mask);
    });
  });
  return in_types_of(x, a, b, eps, out);
}

Tensors6 double_backward(const OptionalTensor& vx, const OptionalTensor& vy, const OptionalTensor& va,
                         const OptionalTensor& vb, const OptionalTensor& veps, const Tensor& grad, TD_SINKHORN_PROBLEM,
                         const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS, std::array<bool, 6> wanted) {
  const Mask mask{wanted[1], wanted[2], wanted[3], wanted[4], wanted[5]};
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, at::kDouble);
  const auto out = gradients(x, y, a, b, eps, mask, at::kDouble);
  const auto incoming = as_double(grad), f_double = as_double(f), g_double = as_double(g);
  const Directions directions(vx, vy, va, vb, veps);
  batch.for_each([&](int64_t s) {
    const Problem p = batch.problem(s);
    const auto sample = batch.sample<double>(s);
    const Vector fs = batch.of_rows(f_double, s), gs = batch.of_cols(g_double, s);
    auto v = directions.of(batch, s);
    const Tangent tangent(batch, p, sample, fs, gs, v);
    const double factor = incoming.const_data_ptr<double>()[s] * (batch.symmetric ? 2 : 1);
    const double d_a = sum_of(v.a), d_b = sum_of(v.b);

    const auto points = [&](Side side, double* to, int64_t count) {
      auto sweep = tangent.sweep(side);
      tangent.prepare(sweep, side);
      sweep.call.gradient = to;
      sweep.call.second = true;
      sweep.run();
      scale(to, count, factor);
    };
    if (mask[0] && batch.code == kCostMatrix) {
      auto sweep = tangent.sweep(Side::Rows);
      tangent.prepare(sweep, Side::Rows);
      double* const to = out[0].mutable_data_ptr<double>() + batch.x_entry(s);
      sweep.call.matrix_out = to;
      sweep.run();
      scale(to, batch.rows(s) * batch.cols(s), factor);
    } else if (mask[0]) {
      points(Side::Rows, out[0].mutable_data_ptr<double>() + batch.x_entry(s), batch.rows(s) * batch.dims);
    }
    if (mask[1])
      points(Side::Columns, out[1].mutable_data_ptr<double>() + batch.col_start(s) * batch.dims,
             batch.cols(s) * batch.dims);

    // E k df + eps sum(other direction) + veps (other mass - E), and what the gauge does
    const auto weights = [&](const Vector& potential, const Vector& change, double rho, double other_change,
                             double other_mass, double gauge) {
      Vector h(potential.size());
      for (size_t i = 0; i < h.size(); ++i) {
        const double e = relaxation(potential[i], rho);
        h[i] = factor * (e * k_of(p.eps, rho) * change[i] + p.eps * other_change + v.eps * (other_mass - e) +
                         gauge * potential[i]);
      }
      return h;
    };
    if (mask[2])
      write<double>(out[2], batch.row_start(s), weights(fs, tangent.df, p.rho_a, d_b, sum_of(p.b), -tangent.slope));
    if (mask[3])
      write<double>(out[3], batch.col_start(s), weights(gs, tangent.dg, p.rho_b, d_a, sum_of(p.a), tangent.slope));
    if (mask[4]) {
      auto sweep = tangent.sweep(Side::Rows);
      tangent.prepare(sweep, Side::Rows);
      const Vector& sum_z = sweep.wanted(sweep.call.sum_z);
      sweep.run();
      out[4].mutable_data_ptr<double>()[s] =
          incoming.const_data_ptr<double>()[s] *
          (sum_of(sum_z) - dot(v.a, tangent.times(Side::Rows, p.b)) - dot(v.b, tangent.times(Side::Columns, p.a)) +
           sum_of(p.b) * d_a + sum_of(p.a) * d_b);
    }
  });
  Tensor d_grad = at::empty({0}, grad.options());
  if (wanted[0]) {
    // The gradient is linear in the incoming one: <v, gradient at 1>.
    const Mask given{vx.has_value(), vy.has_value(), va.has_value(), vb.has_value(), veps.has_value()};
#ifdef TD_CUDA
    const auto& backward = is_for_cuda(x) ? backward_cuda : backward_cpu;
#else
    const auto& backward = backward_cpu;
#endif
    const auto [gx, gy, ga, gb, geps] =
        backward(at::ones_like(grad), x, y, a, b, eps, f, g, x_offsets, y_offsets, cost, rho_a, rho_b, given);
    d_grad = at::zeros(grad.sizes(), at::kDouble);
    double* const to = d_grad.mutable_data_ptr<double>();
    const auto add = [&](const OptionalTensor& v, const Tensor& gradient, const auto& first, const auto& last) {
      if (!v.has_value()) return;
      const auto u = as_double(v), w = as_double(gradient);
      const double *const p = u.const_data_ptr<double>(), *const q = w.const_data_ptr<double>();
      for (int64_t s = 0; s < batch.size(); ++s)
        to[s] += std::inner_product(p + first(s), p + last(s), q + first(s), 0.0);
    };
    const auto row = [&](int64_t s) { return batch.row_start(s); };
    const auto col = [&](int64_t s) { return batch.col_start(s); };
    add(
        vx, gx, [&](int64_t s) { return batch.x_entry(s); }, [&](int64_t s) { return batch.x_entry(s + 1); });
    add(
        vy, gy, [&](int64_t s) { return col(s) * batch.dims; }, [&](int64_t s) { return col(s + 1) * batch.dims; });
    add(va, ga, row, [&](int64_t s) { return row(s + 1); });
    add(vb, gb, col, [&](int64_t s) { return col(s + 1); });
    add(
        veps, geps, [](int64_t s) { return s; }, [](int64_t s) { return s + 1; });
    d_grad = d_grad.to(grad.device(), grad.scalar_type());
  }
  const auto [hx, hy, ha, hb, heps] = in_types_of(x, a, b, eps, out);
  return {d_grad, hx, hy, ha, hb, heps};
}

Tensors5 potentials_backward(const OptionalTensor& grad_f, const OptionalTensor& grad_g, TD_SINKHORN_PROBLEM,
                             const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS, Mask mask) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, at::kDouble);
  const auto out = gradients(x, y, a, b, eps, mask, at::kDouble);
  const auto F_all = as_double(grad_f), G_all = as_double(grad_g), f_double = as_double(f), g_double = as_double(g);
  batch.for_each([&](int64_t s) {
    const Problem p = batch.problem(s);
    const auto sample = batch.sample<double>(s);
    const Vector fs = batch.of_rows(f_double, s), gs = batch.of_cols(g_double, s);
    Vector F = F_all.defined() ? batch.of_rows(F_all, s) : Vector(fs.size());
    Vector G = G_all.defined() ? batch.of_cols(G_all, s) : Vector(gs.size());
    const double slope = gauge_slope(p, F, G);
    transform(F, [&](double t, size_t i) { return p.eps * (t - slope * p.a[i]); });
    transform(G, [&](double t, size_t j) { return p.eps * (t + slope * p.b[j]); });
    const auto times = products(sample, fs, gs, p.eps);
    const Linear linear(p, times, products(sample, fs, gs, p.eps / 2));
    Vector L, U;
    linear.solve_transposed(F, G, L, U);

    // Cbar_ij = W_ij (b_j L_i + a_i U_j)/eps, seen from a side.
    const auto cotangent = [&](Side side) {
      const bool rows = side == Side::Rows;
      Sweep<double> sweep(sample, side, p.eps, rows ? fs : gs, rows ? gs : fs);
      const auto scaled = [&](Vector u) {
        transform(u, [&](double t, size_t) { return t / p.eps; });
        return u;
      };
      sweep.call.a = sweep.keep(rows ? p.a : p.b);
      sweep.call.b = sweep.columns(rows ? p.b : p.a);
      sweep.call.p = sweep.keep(scaled(rows ? L : U));
      sweep.call.q = sweep.columns(scaled(rows ? U : L));
      return sweep;
    };
    if (mask[0] || mask[4]) {
      auto sweep = cotangent(Side::Rows);
      const Vector& sum_z = sweep.wanted(sweep.call.sum_z);
      if (mask[0]) {
        void*& to = batch.code == kCostMatrix ? sweep.call.matrix_out : sweep.call.gradient;
        to = out[0].mutable_data_ptr<double>() + batch.x_entry(s);
      }
      sweep.run();
      if (mask[4]) out[4].mutable_data_ptr<double>()[s] = sum_of(sum_z);
    }
    if (mask[1]) {
      auto sweep = cotangent(Side::Columns);
      sweep.call.gradient = out[1].mutable_data_ptr<double>() + batch.col_start(s) * batch.dims;
      sweep.run();
    }
    if (mask[2]) {
      Vector h = times(Side::Rows, U);
      transform(h, [&](double t, size_t i) { return -t - slope * fs[i]; });
      write<double>(out[2], batch.row_start(s), h);
    }
    if (mask[3]) {
      Vector h = times(Side::Columns, L);
      transform(h, [&](double t, size_t j) { return -t + slope * gs[j]; });
      write<double>(out[3], batch.col_start(s), h);
    }
  });
  return in_types_of(x, a, b, eps, out);
}

Tensors2 potentials_jvp(const OptionalTensor& vx, const OptionalTensor& vy, const OptionalTensor& va,
                        const OptionalTensor& vb, const OptionalTensor& veps, TD_SINKHORN_PROBLEM, const Tensor& f,
                        const Tensor& g, TD_SINKHORN_OPTIONS) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, at::kDouble);
  const auto f_double = as_double(f), g_double = as_double(g);
  const auto df = at::empty(f.sizes(), at::kDouble), dg = at::empty(g.sizes(), at::kDouble);
  const Directions directions(vx, vy, va, vb, veps);
  batch.for_each([&](int64_t s) {
    const Problem p = batch.problem(s);
    const auto sample = batch.sample<double>(s);
    const Vector fs = batch.of_rows(f_double, s), gs = batch.of_cols(g_double, s);
    auto v = directions.of(batch, s);
    const double gauge = (dot(v.b, gs) - dot(v.a, fs)) / (sum_of(p.a) + sum_of(p.b));
    Tangent tangent(batch, p, sample, fs, gs, v);
    tangent.shift(gauge);
    write<double>(df, batch.row_start(s), tangent.df);
    write<double>(dg, batch.col_start(s), tangent.dg);
  });
  return {df.to(f.device(), f.scalar_type()), dg.to(g.device(), g.scalar_type())};
}

Tensor plan_cpu(const Tensor& v, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, bool transpose,
                TD_SINKHORN_OPTIONS) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, x.scalar_type());
  const auto f_double = as_double(f), g_double = as_double(g);
  const auto payload = v.to(x.scalar_type()).contiguous();
  const int64_t width = payload.size(-1);
  const Side side = transpose ? Side::Columns : Side::Rows;
  at::DimVector sizes((transpose ? g : f).sizes());
  sizes.push_back(width);
  auto out = at::empty(sizes, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sinkhorn_plan", [&] {
    batch.for_each([&](int64_t s) {
      const Problem p = batch.problem(s);
      const auto sample = batch.sample<scalar_t>(s);
      const Vector fs = batch.of_rows(f_double, s), gs = batch.of_cols(g_double, s);
      const int64_t row = transpose ? batch.col_start(s) : batch.row_start(s),
                    col = transpose ? batch.row_start(s) : batch.col_start(s);
      Sweep<scalar_t> sweep(sample, side, p.eps, transpose ? gs : fs, transpose ? fs : gs);
      sweep.call.a = sweep.keep(transpose ? p.b : p.a);
      sweep.call.b = sweep.columns(transpose ? p.a : p.b);
      sweep.call.alpha = 1;
      sweep.call.payload = sweep.coordinates(payload.const_data_ptr<scalar_t>() + col * width, false, width);
      sweep.call.payload_dims = width;
      sweep.call.product = out.mutable_data_ptr<scalar_t>() + row * width;
      sweep.run();
    });
  });
  return out;
}

Tensors7 plan_backward(const Tensor& grad, const Tensor& v, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g,
                       bool transpose, TD_SINKHORN_OPTIONS, std::array<bool, 7> mask) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, at::kDouble);
  const auto out = gradients(x, y, a, b, eps, {mask[0], mask[1], mask[2], mask[3], mask[4]}, at::kDouble);
  const auto one = [](bool wanted, const Tensor& t) {
    return at::empty(wanted ? t.sizes() : at::IntArrayRef{0}, at::kDouble);
  };
  const Tensor grad_f = one(mask[5], f), grad_g = one(mask[6], g);
  const auto f_double = as_double(f), g_double = as_double(g);
  // s_ij = P_ij <t_i, v_j>, t of the rows and v of the columns.
  const auto on_rows = as_double(transpose ? v : grad), on_cols = as_double(transpose ? grad : v);
  const int64_t rank = on_rows.size(-1);
  batch.for_each([&](int64_t s) {
    const Problem p = batch.problem(s);
    const auto sample = batch.sample<double>(s);
    const Vector fs = batch.of_rows(f_double, s), gs = batch.of_cols(g_double, s);
    const double* const t_rows = on_rows.const_data_ptr<double>() + batch.row_start(s) * rank;
    const double* const t_cols = on_cols.const_data_ptr<double>() + batch.col_start(s) * rank;
    const auto side = [&](Side which, const Tensor& to_points, const Tensor& to_weight, const Tensor& to_potential,
                          bool wants_points, bool wants_weight, bool wants_potential, bool wants_eps) {
      const bool rows = which == Side::Rows;
      const int64_t start = rows ? batch.row_start(s) : batch.col_start(s);
      const Vector& own = rows ? p.a : p.b;
      Sweep<double> sweep(sample, which, p.eps, rows ? fs : gs, rows ? gs : fs);
      sweep.call.b = sweep.columns(rows ? p.b : p.a);
      sweep.call.t = sweep.coordinates(rows ? t_rows : t_cols, true, rank);
      sweep.call.v = sweep.coordinates(rows ? t_cols : t_rows, false, rank);
      sweep.call.rank = rank;
      Vector& sum = sweep.wanted(sweep.call.sum);
      const Vector& sum_z = sweep.wanted(sweep.call.sum_z);
      const bool matrix = batch.code == kCostMatrix;
      if (wants_points) {
        double* const to = to_points.mutable_data_ptr<double>() + (rows ? batch.x_entry(s) : start * batch.dims);
        (matrix ? sweep.call.matrix_out : sweep.call.gradient) = to;
        sweep.run();
        const int64_t width = matrix ? batch.cols(s) : batch.dims;
        for (size_t i = 0; i < own.size(); ++i) scale(to + static_cast<int64_t>(i) * width, width, -own[i] / p.eps);
      } else {
        sweep.run();
      }
      if (wants_weight) write<double>(to_weight, start, sum);
      if (wants_eps) out[4].mutable_data_ptr<double>()[s] = -dot(own, sum_z) / p.eps;
      transform(sum, [&](double t, size_t i) { return own[i] * t / p.eps; });
      if (wants_potential) write<double>(to_potential, start, sum);
    };
    if (mask[0] || mask[2] || mask[4] || mask[5])
      side(Side::Rows, out[0], out[2], grad_f, mask[0], mask[2], mask[5], mask[4]);
    if (mask[1] || mask[3] || mask[6]) side(Side::Columns, out[1], out[3], grad_g, mask[1], mask[3], mask[6], false);
  });
  const auto [gx, gy, ga, gb, geps] = in_types_of(x, a, b, eps, out);
  return {gx, gy, ga, gb, geps, grad_f.to(f.device(), f.scalar_type()), grad_g.to(g.device(), g.scalar_type())};
}

Tensors3 marginals_cpu(TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS) {
  const Batch batch(x, y, a, b, eps, x_offsets, y_offsets, cost, rho_a, rho_b, x.scalar_type());
  const auto f_double = as_double(f), g_double = as_double(g);
  auto r = at::empty(f.sizes(), f.options()), c = at::empty(g.sizes(), g.options());
  auto transport_cost = at::empty({batch.size()}, eps.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sinkhorn_marginals", [&] {
    batch.for_each([&](int64_t s) {
      const Problem p = batch.problem(s);
      const auto sample = batch.sample<scalar_t>(s);
      const Vector fs = batch.of_rows(f_double, s), gs = batch.of_cols(g_double, s);
      Sweep<scalar_t> rows(sample, Side::Rows, p.eps, fs, gs), cols(sample, Side::Columns, p.eps, gs, fs);
      const auto marginal = [](Sweep<scalar_t>& sweep, const Vector& own, const Vector& other) {
        sweep.call.a = sweep.keep(own);
        sweep.call.b = sweep.columns(other);
        sweep.call.alpha = 1;
        const Vector& sum = sweep.wanted(sweep.call.sum);
        return &sum;
      };
      const Vector &row_sum = *marginal(rows, p.a, p.b), &col_sum = *marginal(cols, p.b, p.a);
      const Vector& row_cost = rows.wanted(rows.call.sum_cost);
      rows.run();
      cols.run();
      write<scalar_t>(r, batch.row_start(s), row_sum);
      write<scalar_t>(c, batch.col_start(s), col_sum);
      transport_cost.mutable_data_ptr<double>()[s] =
          sum_of(row_cost) + dot(row_sum, sample.offset(Side::Rows)) + dot(col_sum, sample.offset(Side::Columns));
    });
  });
  return {r, c, transport_cost};
}

}  // namespace torch_divergence::transport
