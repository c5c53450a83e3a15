#include "sinkhorn/sinkhorn_solver.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace torch_divergence::transport {

bool Problem::balanced() const { return std::isinf(rho_a) && std::isinf(rho_b); }

Solution solve(const Problem& p, double tol, int64_t max_iter, const Vector& init) {
  const size_t n = p.a.size(), m = p.b.size(), history = p.symmetric ? 0 : m;
  Solution s;
  s.f.resize(n);
  s.g.resize(m);
  Vector update(m), residual(history), last_r(history), last_g(history), d_r(kMemory * history), d_g(d_r);
  double gram[kMemory * kMemory];
  if (!init.empty()) (p.symmetric ? s.f : s.g) = init;
  const Task task{static_cast<int64_t>(n),
                  static_cast<int64_t>(m),
                  p.a.data(),
                  p.b.data(),
                  p.eps,
                  p.rho_a,
                  p.rho_b,
                  p.symmetric,
                  p.rounding,
                  tol,
                  max_iter,
                  s.f.data(),
                  s.g.data(),
                  update.data(),
                  residual.data(),
                  last_r.data(),
                  last_g.data(),
                  d_r.data(),
                  d_g.data(),
                  gram};
  const OneThread<double> team;
  Progress progress;
  Iteration iteration(team, task, progress);
  for (iteration.start(p.cost_low, p.cost_high, p.all_finite, !init.empty()); !progress.done; iteration.advance()) {
    const bool of_g = progress.side == Side::Rows && !p.symmetric;
    p.soft_min(progress.side, of_g ? s.g : s.f, progress.pass_eps, of_g ? s.f : update);
  }
  s.value = progress.value;
  s.marginal_error = progress.marginal_error;
  s.iterations = progress.iterations;
  s.converged = progress.converged;
  return s;
}

double weight_gradient(double f, double eps, double rho, double other_mass) {
  return eps * (other_mass - 1) + (std::isinf(rho) ? f : -(rho + eps) * std::expm1(-f / rho));
}

double sum_of(const Vector& v) { return std::accumulate(v.begin(), v.end(), 0.0); }
double dot(const Vector& u, const Vector& v) { return std::inner_product(u.begin(), u.end(), v.begin(), 0.0); }

double gauge_slope(const Problem& p, const Vector& F, const Vector& G) {
  return p.balanced() ? (sum_of(F) - sum_of(G)) / (sum_of(p.a) + sum_of(p.b)) : 0;
}

Linear::Linear(const Problem& p, Product times, const Product& times_squared)
    : problem_(p), times_(std::move(times)), rows_(times_(Side::Rows, p.b)), cols_(times_(Side::Columns, p.a)) {
  for (double& v : rows_) v *= k_of(p.eps, p.rho_a);
  for (double& v : cols_) v *= k_of(p.eps, p.rho_b);
  Vector weight(p.a.size());
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = p.a[i] / rows_[i];
  const Vector squares = times_squared(Side::Columns, weight);
  diagonal_.resize(p.b.size());
  double top = 0;
  for (size_t j = 0; j < p.b.size(); ++j) top = std::max(top, p.b[j] * cols_[j]);
  // Below the floor the diagonal is lost to rounding: an atom matched to a single other one.
  for (size_t j = 0; j < p.b.size(); ++j)
    diagonal_[j] = p.b[j] > 0 ? std::max(p.b[j] * cols_[j] - p.b[j] * p.b[j] * squares[j], 1e-14 * top) : 1;
}

void Linear::solve(const Vector& p, const Vector& q, Vector& df, Vector& dg) const {
  const Vector &a = problem_.a, &b = problem_.b;
  const size_t n = a.size(), m = b.size();
  const auto kept = static_cast<double>(std::count_if(b.begin(), b.end(), [](double w) { return w > 0; }));
  // W' diag(a) u and W diag(b) v
  const auto down = [&](Vector u) {
    for (size_t i = 0; i < n; ++i) u[i] *= a[i];
    return times_(Side::Columns, u);
  };
  const auto across = [&](Vector v) {
    for (size_t j = 0; j < m; ++j) v[j] *= b[j];
    return times_(Side::Rows, v);
  };
  const auto over_rows = [&](Vector u) {
    for (size_t i = 0; i < n; ++i) u[i] /= rows_[i];
    return u;
  };
  const auto project = [&](Vector& v) {
    double mean = 0;
    if (problem_.balanced()) {
      for (size_t j = 0; j < m; ++j)
        if (b[j] > 0) mean += v[j];
      mean /= kept;
    }
    for (size_t j = 0; j < m; ++j) v[j] = b[j] > 0 ? v[j] - mean : 0;
  };
  const auto largest_of = [](const Vector& v) {
    double best = 0;
    for (const double x : v) best = std::max(best, std::abs(x));
    return best;
  };

  Vector residual = down(over_rows(p)), s(m), direction(m);
  double size = 0;
  for (size_t j = 0; j < m; ++j) {
    size = std::max(size, b[j] * (std::abs(q[j]) + std::abs(residual[j])));
    residual[j] = b[j] * (q[j] - residual[j]);
  }
  project(residual);
  dg.assign(m, 0);
  for (size_t j = 0; j < m; ++j) direction[j] = s[j] = residual[j] / diagonal_[j];
  project(direction);
  double rs = dot(residual, s), least = largest_of(residual);
  const double stop = 1e-14 * least;
  // Between atoms that do not touch, matrix and residual are rounding alone: nothing is to be solved then, and where
  // gradients lead away from a solution the best of them is taken.
  const bool is_noise = least <= 8 * std::numeric_limits<double>::epsilon() * size;
  Vector best = dg;
  const auto steps = is_noise ? 0 : 20 * static_cast<int64_t>(m) + 100;
  for (int64_t step = 0; step < steps && largest_of(residual) > stop; ++step) {
    Vector image = down(over_rows(across(direction)));
    for (size_t j = 0; j < m; ++j) image[j] = b[j] * (cols_[j] * direction[j] - image[j]);
    const double curvature = dot(direction, image);
    if (!(curvature > 0)) break;
    const double length = rs / curvature;
    for (size_t j = 0; j < m; ++j) {
      dg[j] += length * direction[j];
      residual[j] -= length * image[j];
    }
    project(residual);
    if (const double left = largest_of(residual); left < least) {
      least = left;
      best = dg;
    }
    for (size_t j = 0; j < m; ++j) s[j] = residual[j] / diagonal_[j];
    const double previous = std::exchange(rs, dot(residual, s));
    for (size_t j = 0; j < m; ++j) direction[j] = s[j] + rs / previous * direction[j];
    project(direction);
  }
  dg = best;
  df = across(dg);
  for (size_t i = 0; i < n; ++i) df[i] = (p[i] - df[i]) / rows_[i];
  const Vector back = down(df);
  for (size_t j = 0; j < m; ++j)
    if (!(b[j] > 0)) dg[j] = (q[j] - back[j]) / cols_[j];
}

void Linear::solve_transposed(const Vector& F, const Vector& G, Vector& L, Vector& U) const {
  const Vector &a = problem_.a, &b = problem_.b;
  // Weightless atoms: L_i = F_i/(k_a rho_i), moved to the right side.
  Vector L0(a.size()), U0(b.size());
  for (size_t i = 0; i < a.size(); ++i) L0[i] = a[i] > 0 ? 0 : F[i] / rows_[i];
  for (size_t j = 0; j < b.size(); ++j) U0[j] = b[j] > 0 ? 0 : G[j] / cols_[j];
  Vector p = times_(Side::Rows, U0), q = times_(Side::Columns, L0);
  for (size_t i = 0; i < a.size(); ++i) p[i] = (a[i] > 0 ? F[i] / a[i] : 0) - p[i];
  for (size_t j = 0; j < b.size(); ++j) q[j] = (b[j] > 0 ? G[j] / b[j] : 0) - q[j];
  solve(p, q, L, U);
  for (size_t i = 0; i < a.size(); ++i) L[i] = a[i] * L[i] + L0[i];
  for (size_t j = 0; j < b.size(); ++j) U[j] = b[j] * U[j] + U0[j];
}

}  // namespace torch_divergence::transport
