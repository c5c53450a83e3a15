#include "sinkhorn/sinkhorn_solver.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

namespace torch_divergence::transport {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// log <a, exp(-f/rho)>, the log of the mass aimed at. By log-sum-exp: far beyond the reach the exponentials underflow.
double log_mass(const Vector& a, const Vector& f, double rho) {
  double best = -kInf, sum = 0;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] > 0) best = std::max(best, std::log(a[i]) - f[i] / rho);
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] > 0) sum += std::exp(std::log(a[i]) - f[i] / rho - best);
  return best + std::log(sum);
}

// The k that maximises the dual over (f + k, g - k): without it a large rho converges ever slower.
double translation(const Problem& p, const Vector& f, const Vector& g) {
  if (p.balanced()) return 0;
  return (log_mass(p.a, f, p.rho_a) - log_mass(p.b, g, p.rho_b)) / (1 / p.rho_a + 1 / p.rho_b);
}

// |c - b E_b|_1/<b, E_b> without a pass, for G the update of g: c_j = b_j E_j exp(k_b (g_j - G_j)/eps).
double marginal_error(const Vector& b, const Vector& g, const Vector& G, double eps, double rho) {
  const double k = k_of(eps, rho);
  double error = 0;
  if (std::isinf(rho)) {
    for (size_t j = 0; j < b.size(); ++j)
      if (b[j] > 0) error += b[j] * std::abs(std::expm1((g[j] - G[j]) / eps));
    return error / sum_of(b);
  }
  const double total = log_mass(b, g, rho);
  for (size_t j = 0; j < b.size(); ++j)
    if (b[j] > 0)
      error += std::exp(std::log(b[j]) - g[j] / rho - total) * std::abs(std::expm1(k * (g[j] - G[j]) / eps));
  return error;
}

double largest(const Vector& weight, const Vector& v) {
  double best = 0;
  for (size_t i = 0; i < v.size(); ++i)
    if (weight[i] > 0) best = std::max(best, std::abs(v[i]));
  return best;
}

// The error below which rounding decides: that of the largest term of a score, over eps. Balanced masses that differ by
// what is allowed are a floor too: no plan has both marginals.
double float_floor(const Problem& p, const Vector& f, const Vector& g) {
  const double scale = std::max({largest(p.a, f), largest(p.b, g), std::abs(p.cost_low), std::abs(p.cost_high)});
  const double mismatch = p.balanced() ? std::abs(sum_of(p.a) / sum_of(p.b) - 1) : 0;
  return 2 * p.rounding * scale / p.eps + mismatch;
}

// spread, spread/4, ... while above eps: one iteration each. The coarsest are left out where max_iter is too small.
Vector annealing(const Problem& p, int64_t max_iter) {
  Vector ladder;
  // Costs that are not finite have no schedule.
  for (double eps = p.spread(); eps > p.eps && std::isfinite(eps); eps /= 4) ladder.push_back(eps);
  const auto kept = std::min<int64_t>(static_cast<int64_t>(ladder.size()), max_iter - 1);
  ladder.erase(ladder.begin(), ladder.end() - kept);
  return ladder;
}

// Anderson acceleration of g <- G(g): the combination of the last sweeps whose residual r = G(g) - g is least in the
// norm sum_j b_j r_j^2 (Anderson, "Iterative Procedures for Nonlinear Integral Equations", 1965). With dR and dG the
// last differences of r and G:
//   gamma = argmin |r - dR gamma|_b^2 + 1e-10 trace |gamma|^2,    next g = G(g) - dG gamma.
// Weightless atoms take the plain step, which is their soft c-transform. Error above twice the best: plain step.
//
// Far from the solution a combination may throw the iteration back, again and again. The dual tells: plain steps never
// lower it. Where a step has, take_back() returns the plain one in its place, the history starts anew, and ever more
// plain steps are taken before the next combination.
class Anderson {
 public:
  explicit Anderson(const Vector& b) : b_(b), last_r_(b.size()), last_g_(b.size()), d_r_(b.size()), d_g_(b.size()) {}

  // dual: its value at g, whose error in arithmetic is below `noise`; unit: eps times the mass. Was the last step one
  // to take back? Combinations that lower the dual by less than a unit still converge faster than plain steps.
  bool lowered(double dual, double noise, double unit) {
    const bool worse = mixed_ && dual < best_dual_ - noise - unit;
    if (!worse) best_dual_ = std::max(best_dual_, dual);
    return worse;
  }
  void take_back(Vector& g) {
    mixed_ = started_ = false;
    count_ = 0;
    pause_ = wait_;
    wait_ = std::min<int64_t>(2 * wait_, 64);
    g = last_g_;
  }

  // g becomes the next one.
  void step(Vector& g, const Vector& r, double error) {
    mixed_ = false;
    for (size_t j = 0; j < g.size(); ++j) g[j] += r[j];
    if (started_) remember(g, r);
    started_ = true;
    last_r_ = r;
    last_g_ = g;
    best_ = std::min(best_, error);
    if (pause_ > 0) {
      --pause_;
      return;
    }
    if (count_ == 0 || !(error <= 2 * best_)) return;

    Coefficients gamma{};
    if (!combination(r, gamma)) return;
    for (size_t j = 0; j < g.size(); ++j) {
      if (!(b_[j] > 0)) continue;
      for (size_t k = 0; k < count_; ++k) g[j] -= gamma[k] * d_g_[j][slot(k)];
      if (!std::isfinite(g[j])) {
        g = last_g_;
        return;
      }
    }
    mixed_ = true;
  }

 private:
  static constexpr size_t kMemory = 5;
  using Coefficients = std::array<double, kMemory>;

  // Where the k-th oldest difference is kept.
  size_t slot(size_t k) const { return (newest_ + 1 + kMemory - count_ + k) % kMemory; }

  // Replaces the oldest difference; only its row and column of the Gram matrix change. The columns are summed by
  // themselves: (b u) v and (b v) u differ in their last bit.
  void remember(const Vector& G, const Vector& r) {
    newest_ = (newest_ + 1) % kMemory;
    count_ = std::min(count_ + 1, kMemory);
    Coefficients row{}, column{};
    for (size_t j = 0; j < r.size(); ++j) {
      const double d_r = r[j] - last_r_[j];
      d_r_[j][newest_] = d_r;
      d_g_[j][newest_] = G[j] - last_g_[j];
      if (!(b_[j] > 0)) continue;
      for (size_t k = 0; k < kMemory; ++k) {
        row[k] += b_[j] * d_r * d_r_[j][k];
        column[k] += b_[j] * d_r_[j][k] * d_r;
      }
    }
    for (size_t k = 0; k < kMemory; ++k) gram_[newest_][k] = row[k], gram_[k][newest_] = column[k];
  }

  // gamma of the newest residual, oldest difference first; false where nothing moved, or at an overflow. By
  // elimination.
  bool combination(const Vector& r, Coefficients& gamma) const {
    Coefficients right{};
    for (size_t j = 0; j < r.size(); ++j)
      if (b_[j] > 0)
        for (size_t k = 0; k < kMemory; ++k) right[k] += b_[j] * d_r_[j][k] * r[j];
    const size_t n = count_;
    std::array<Coefficients, kMemory> A{};
    double trace = 0;
    for (size_t k = 0; k < n; ++k) {
      for (size_t l = 0; l < n; ++l) A[k][l] = gram_[slot(k)][slot(l)];
      gamma[k] = right[slot(k)];
      trace += A[k][k];
    }
    const double ridge = 1e-10 * trace;
    if (!(ridge > 0 && ridge < kInf)) return false;
    for (size_t k = 0; k < n; ++k) A[k][k] += ridge;
    for (size_t k = 0; k < n; ++k) {
      size_t pivot = k;
      for (size_t i = k + 1; i < n; ++i)
        if (std::abs(A[i][k]) > std::abs(A[pivot][k])) pivot = i;
      std::swap(A[k], A[pivot]);
      std::swap(gamma[k], gamma[pivot]);
      for (size_t i = k + 1; i < n; ++i) {
        const double factor = A[i][k] / A[k][k];
        for (size_t j = k; j < n; ++j) A[i][j] -= factor * A[k][j];
        gamma[i] -= factor * gamma[k];
      }
    }
    for (size_t k = n; k-- > 0;) {
      for (size_t j = k + 1; j < n; ++j) gamma[k] -= A[k][j] * gamma[j];
      gamma[k] /= A[k][k];
    }
    return true;
  }

  const Vector& b_;
  double best_ = kInf, best_dual_ = -kInf;
  bool mixed_ = false, started_ = false;
  int64_t pause_ = 0, wait_ = 2;  // plain steps to come, and after the next step that is taken back
  Vector last_r_, last_g_;
  size_t count_ = 0, newest_ = 0;
  std::vector<Coefficients> d_r_, d_g_;  // by atom; slots not yet used hold 0
  std::array<Coefficients, kMemory> gram_{};
};

// The dual, without a pass: W b is known at potentials that come out of an update, r_i = a_i e^{u_i}.
double dual_value(const Problem& p, const Vector& f, const Vector& g, const Vector& log_row_ratio) {
  double excess = 0;
  for (size_t i = 0; i < f.size(); ++i)
    if (p.a[i] > 0) excess += p.a[i] * std::expm1(log_row_ratio[i]);
  return side_value(p.a, f, p.rho_a) + side_value(p.b, g, p.rho_b) - p.eps * (excess + sum_of(p.a) * (1 - sum_of(p.b)));
}
// f is the update from g, then shifted.
double dual_of_update(const Problem& p, const Vector& f, const Vector& g, double shift) {
  if (std::isinf(p.rho_a))
    return side_value(p.a, f, p.rho_a) + side_value(p.b, g, p.rho_b) - p.eps * sum_of(p.a) * (1 - sum_of(p.b));
  Vector log_row_ratio(f.size());
  for (size_t i = 0; i < f.size(); ++i) log_row_ratio[i] = -(f[i] - shift) / p.rho_a;
  return dual_value(p, f, g, log_row_ratio);
}

// A full iteration is two passes: f from g, then G from f, whose distance from g is the error of (f, g).
Solution solve_pair(const Problem& p, double tol, int64_t max_iter, const Vector& init) {
  const size_t n = p.a.size(), m = p.b.size();
  Solution s;
  s.f.resize(n);
  s.g = init.empty() ? Vector(m) : init;
  const Vector ladder = init.empty() ? annealing(p, max_iter) : Vector();
  const auto coarse = static_cast<int64_t>(ladder.size());
  Anderson anderson(p.b);
  Vector G(m), residual(m);
  double shift = 0;
  for (s.iterations = 1;; ++s.iterations) {
    const bool anneals = s.iterations <= coarse;
    const double eps = anneals ? ladder[static_cast<size_t>(s.iterations - 1)] : p.eps;
    p.soft_min(Side::Rows, s.g, eps, s.f);
    for (double& v : s.f) v /= k_of(eps, p.rho_a);
    shift = translation(p, s.f, s.g);  // P stays the same
    for (double& v : s.f) v += shift;
    for (double& v : s.g) v -= shift;
    if (!anneals && s.iterations < max_iter) {
      const double mass = std::max(sum_of(p.a), sum_of(p.b)),
                   noise = 8 * p.rounding * (largest(p.a, s.f) + largest(p.b, s.g)) * mass;
      if (anderson.lowered(dual_of_update(p, s.f, s.g, shift), noise, eps * mass)) {
        anderson.take_back(s.g);
        continue;
      }
    }
    p.soft_min(Side::Columns, s.f, eps, G);
    for (double& v : G) v /= k_of(eps, p.rho_b);
    if (anneals) {
      const double next = translation(p, s.f, G);
      for (size_t j = 0; j < m; ++j) s.g[j] = G[j] - next;
      continue;
    }
    s.marginal_error = std::max(std::abs(std::expm1(shift / p.rho_a)), marginal_error(p.b, s.g, G, eps, p.rho_b));
    s.converged = s.marginal_error <= std::max(tol, float_floor(p, s.f, s.g));
    if (s.iterations == max_iter || (s.converged && tol > 0) || std::isnan(s.marginal_error)) break;
    const double next = translation(p, s.f, G);
    for (size_t j = 0; j < m; ++j) residual[j] = G[j] - next - s.g[j];
    if (p.balanced()) {  // the constant is free: keep it out of the history
      const double mean = dot(p.b, residual) / sum_of(p.b);
      for (double& v : residual) v -= mean;
    }
    anderson.step(s.g, residual, s.marginal_error);
  }
  for (size_t j = 0; j < m; ++j)
    if (!(p.b[j] > 0)) s.g[j] = G[j];  // the soft c-transform, which gives the one-sided derivative
  s.value = dual_of_update(p, s.f, s.g, shift);
  if (p.balanced()) {
    const double k = (dot(p.b, s.g) - dot(p.a, s.f)) / (sum_of(p.a) + sum_of(p.b));
    for (double& v : s.f) v += k;
    for (double& v : s.g) v -= k;
  }
  return s;
}

Solution solve_symmetric(const Problem& p, double tol, int64_t max_iter, const Vector& init) {
  const size_t n = p.a.size();
  Solution s;
  s.f = init.empty() ? Vector(n) : init;
  const Vector ladder = init.empty() ? annealing(p, max_iter) : Vector();
  const auto coarse = static_cast<int64_t>(ladder.size());
  const double k = k_of(p.eps, p.rho_a);
  Vector F(n);
  for (s.iterations = 1;; ++s.iterations) {
    const bool anneals = s.iterations <= coarse;
    const double eps = anneals ? ladder[static_cast<size_t>(s.iterations - 1)] : p.eps;
    p.soft_min(Side::Rows, s.f, eps, F);
    for (double& v : F) v /= k_of(eps, p.rho_a);
    if (!anneals) {
      s.marginal_error = marginal_error(p.a, s.f, F, eps, p.rho_a);
      s.converged = s.marginal_error <= std::max(tol, float_floor(p, s.f, s.f));
      if (s.iterations == max_iter || (s.converged && tol > 0) || std::isnan(s.marginal_error)) break;
    }
    for (size_t i = 0; i < n; ++i) s.f[i] = (s.f[i] + F[i]) / 2;
  }
  Vector log_row_ratio(n);
  for (size_t i = 0; i < n; ++i) {
    if (!(p.a[i] > 0)) s.f[i] = F[i];
    log_row_ratio[i] = (s.f[i] - k * F[i]) / p.eps;
  }
  s.g = s.f;
  s.value = dual_value(p, s.f, s.g, log_row_ratio);
  return s;
}

}  // namespace

bool Problem::balanced() const { return std::isinf(rho_a) && std::isinf(rho_b); }

Solution solve(const Problem& problem, double tol, int64_t max_iter, const Vector& init) {
  return problem.symmetric ? solve_symmetric(problem, tol, max_iter, init) : solve_pair(problem, tol, max_iter, init);
}

double side_value(const Vector& a, const Vector& f, double rho) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * (std::isinf(rho) ? f[i] : -rho * std::expm1(-f[i] / rho));
  return sum;
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
  for (size_t j = 0; j < m; ++j) residual[j] = b[j] * (q[j] - residual[j]);
  project(residual);
  dg.assign(m, 0);
  for (size_t j = 0; j < m; ++j) direction[j] = s[j] = residual[j] / diagonal_[j];
  project(direction);
  double rs = dot(residual, s);
  const double stop = 1e-14 * largest_of(residual);
  const auto steps = 20 * static_cast<int64_t>(m) + 100;
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
    for (size_t j = 0; j < m; ++j) s[j] = residual[j] / diagonal_[j];
    const double previous = std::exchange(rs, dot(residual, s));
    for (size_t j = 0; j < m; ++j) direction[j] = s[j] + rs / previous * direction[j];
    project(direction);
  }
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
