// The iteration of entropic optimal transport on one problem: what happens between two passes over its pairs. Formulas
// in sinkhorn.h. The host's solver runs it with a team of one thread, the CUDA kernels with one of a block's threads.
//
// A team has
//   each(n, f)           f(i) for i < n, an i by the same thread each time
//   sums(n, out, f)      out[k] = the sums over i < n of what f(i, out) adds to out[k], for all threads
//   max(n, start, f)     the largest of start and f(i), for all threads; NaN is passed over
//   leads(), sync()      one thread of the team; what threads have written before is seen by the others after it
// and all of its threads make the same calls, for all of them know the same Progress.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"

// Device code under nvcc and a plain function elsewhere: in either a team's functions may be called.
#if defined(__CUDACC__)
#define TD_TEAM __device__
#define TD_UNROLL _Pragma("unroll")
#else
#define TD_TEAM inline
#define TD_UNROLL
#endif

namespace torch_divergence::transport {

enum class Side { Rows, Columns };

TD_HOST_DEVICE double k_of(double eps, double rho) { return 1 + eps / rho; }
TD_HOST_DEVICE double larger(double a, double b) { return a < b ? b : a; }
// A term of the dual, over its weight.
TD_HOST_DEVICE double side_term(double f, double rho) { return std::isinf(rho) ? f : -rho * std::expm1(-f / rho); }

// Differences that Anderson acceleration combines.
inline constexpr int kMemory = 5;

// One problem and the memory that its iteration works in. Rows carry a and f, columns b and g. Symmetric: columns are
// the rows again, f = g.
struct Task {
  int64_t n, m;
  const double *a, *b;
  double eps, rho_a, rho_b;
  bool symmetric;
  double rounding;  // unit of rounding of the arithmetic on pairs
  double tol;       // compared with the marginal error, which costs no pass; 0: exactly max_iter iterations
  int64_t max_iter;
  // f (n); g and its update (m). Symmetric: f, its update and, at the end, g.
  double *f, *g, *update;
  // Of Anderson acceleration, for problems that are not symmetric: (m), (m, kMemory) and (kMemory, kMemory).
  double *residual, *last_r, *last_g, *d_r, *d_g, *gram;

  TD_HOST_DEVICE bool balanced() const { return std::isinf(rho_a) && std::isinf(rho_b); }
};

// What an iteration knows between two passes, beside the task's memory.
struct Progress {
  // The pass to come: the soft c-transform onto `side` of the other side's potential, at pass_eps. For the rows:
  //   -pass_eps log sum_j b_j exp((g_j - C_ij)/pass_eps)
  // It goes to f, of columns and in symmetric problems to `update`. Going in, that holds a guess of what comes out.
  Side side;
  double pass_eps;
  bool done;
  // The solution, once done.
  bool converged;
  int64_t iterations;
  double marginal_error, value;

  double mass_a, mass_b, cost_size;
  int64_t coarse;  // iterations that anneal
  double shift;
  // Of Anderson acceleration.
  double best, best_dual;
  bool mixed, started;
  int64_t pause, wait;  // plain steps to come, and after the next step that is taken back
  int count, newest;
};

// Annealing, then alternating soft c-transforms with Anderson acceleration of g and, where unbalanced, the translation
// of Sejourne, Vialard and Peyre, "Faster Unbalanced Optimal Transport", 2022; symmetric problems by averaging (Knight,
// Ruiz and Ucar, "A Symmetry Preserving Algorithm for Matrix Scaling", 2014), because alternating may crawl there.
template <class Team>
class Iteration {
 public:
  TD_TEAM Iteration(const Team& team, const Task& task, Progress& progress) : team_(team), p_(task), s_(progress) {}

  // Costs between pairs of positive weight. warm: g (f where symmetric) is given, and there is no annealing; else it
  // is set to 0.
  TD_TEAM void start(double cost_low, double cost_high, bool warm) {
    s_ = {};
    s_.mass_a = sum(p_.n, [&](int64_t i) { return p_.a[i]; });
    s_.mass_b = sum(p_.m, [&](int64_t j) { return p_.b[j]; });
    s_.cost_size = larger(std::abs(cost_low), std::abs(cost_high));
    s_.best = kNone, s_.best_dual = -kNone, s_.wait = 2;
    if (!warm) {
      double* const start = p_.symmetric ? p_.f : p_.g;
      team_.each(p_.symmetric ? p_.n : p_.m, [&](int64_t j) { start[j] = 0; });
      // spread, spread/4, ... while above eps: one iteration each. The coarsest are left out where max_iter is too
      // small. Costs that are not finite have no schedule.
      double eps = cost_high - cost_low;
      s_.pass_eps = eps;
      for (; eps > p_.eps && std::isfinite(eps); eps /= 4) ++s_.coarse;
      for (; s_.coarse > p_.max_iter - 1; --s_.coarse) s_.pass_eps /= 4;
    }
    // Of a pass that has not been made there is no guess.
    team_.each(p_.n, [&](int64_t i) { (p_.symmetric ? p_.update : p_.f)[i] = 0; });
    if (!p_.symmetric) {
      team_.each(p_.m, [&](int64_t j) {
        p_.update[j] = p_.last_r[j] = p_.last_g[j] = 0;
        for (int k = 0; k < kMemory; ++k) p_.d_r[j * kMemory + k] = p_.d_g[j * kMemory + k] = 0;
      });
      if (team_.leads())
        for (int k = 0; k < kMemory * kMemory; ++k) p_.gram[k] = 0;
      team_.sync();
    }
    s_.side = Side::Rows;
    s_.iterations = 1;
    if (s_.coarse == 0) s_.pass_eps = p_.eps;
  }

  // After the pass that was to come.
  TD_TEAM void advance() {
    if (p_.symmetric)
      average();
    else if (s_.side == Side::Rows)
      after_rows();
    else
      after_columns();
  }

 private:
  static constexpr double kNone = std::numeric_limits<double>::infinity();

  TD_TEAM bool anneals() const { return s_.iterations <= s_.coarse; }
  TD_TEAM bool is_last() const {
    return s_.iterations == p_.max_iter || (s_.converged && p_.tol > 0) || std::isnan(s_.marginal_error);
  }
  TD_TEAM void next_iteration() {
    ++s_.iterations;
    s_.side = Side::Rows;
    s_.pass_eps = anneals() ? s_.pass_eps / 4 : p_.eps;
  }

  // A full iteration is two passes: f from g, then the update of g from f, whose distance from g is the error of
  // (f, g).
  TD_TEAM void after_rows() {
    team_.each(p_.n, [&](int64_t i) { p_.f[i] /= k_of(s_.pass_eps, p_.rho_a); });
    s_.shift = translation(p_.g);  // P stays the same
    team_.each(p_.n, [&](int64_t i) { p_.f[i] += s_.shift; });
    team_.each(p_.m, [&](int64_t j) { p_.g[j] -= s_.shift; });
    if (!anneals() && s_.iterations < p_.max_iter) {
      const double mass = larger(s_.mass_a, s_.mass_b),
                   noise = 8 * p_.rounding * (largest(p_.n, p_.a, p_.f) + largest(p_.m, p_.b, p_.g)) * mass;
      if (lowered(dual_of_update(), noise, s_.pass_eps * mass)) {
        take_back();
        next_iteration();
        return;
      }
    }
    s_.side = Side::Columns;
  }

  TD_TEAM void after_columns() {
    team_.each(p_.m, [&](int64_t j) { p_.update[j] /= k_of(s_.pass_eps, p_.rho_b); });
    if (anneals()) {
      const double next = translation(p_.update);
      team_.each(p_.m, [&](int64_t j) { p_.g[j] = p_.update[j] - next; });
      next_iteration();
      return;
    }
    s_.marginal_error =
        larger(std::abs(std::expm1(s_.shift / p_.rho_a)), marginal_error(p_.m, p_.b, p_.g, s_.mass_b, p_.rho_b));
    s_.converged = s_.marginal_error <= larger(p_.tol, float_floor(p_.g));
    if (is_last()) {
      finish();
      return;
    }
    const double next = translation(p_.update);
    team_.each(p_.m, [&](int64_t j) { p_.residual[j] = p_.update[j] - next - p_.g[j]; });
    if (p_.balanced()) {  // the constant is free: keep it out of the history
      const double mean = sum(p_.m, [&](int64_t j) { return p_.b[j] * p_.residual[j]; }) / s_.mass_b;
      team_.each(p_.m, [&](int64_t j) { p_.residual[j] -= mean; });
    }
    step();
    next_iteration();
  }

  TD_TEAM void finish() {
    // The soft c-transform, which gives the one-sided derivative.
    team_.each(p_.m, [&](int64_t j) {
      if (!(p_.b[j] > 0)) p_.g[j] = p_.update[j];
    });
    s_.value = dual_of_update();
    if (p_.balanced()) {
      const double of_g = sum(p_.m, [&](int64_t j) { return p_.b[j] * p_.g[j]; }),
                   of_f = sum(p_.n, [&](int64_t i) { return p_.a[i] * p_.f[i]; }),
                   k = (of_g - of_f) / (s_.mass_a + s_.mass_b);
      team_.each(p_.n, [&](int64_t i) { p_.f[i] += k; });
      team_.each(p_.m, [&](int64_t j) { p_.g[j] -= k; });
    }
    s_.done = true;
  }

  TD_TEAM void average() {
    double *const f = p_.f, *const F = p_.update;
    team_.each(p_.n, [&](int64_t i) { F[i] /= k_of(s_.pass_eps, p_.rho_a); });
    if (!anneals()) {
      s_.marginal_error = marginal_error(p_.n, p_.a, f, s_.mass_a, p_.rho_a);
      s_.converged = s_.marginal_error <= larger(p_.tol, float_floor(f));
      if (is_last()) {
        team_.each(p_.n, [&](int64_t i) {
          if (!(p_.a[i] > 0)) f[i] = F[i];
          p_.g[i] = f[i];
        });
        const double k = k_of(p_.eps, p_.rho_a);
        s_.value = dual_value([&](int64_t i) { return (f[i] - k * F[i]) / p_.eps; });
        s_.done = true;
        return;
      }
    }
    team_.each(p_.n, [&](int64_t i) { f[i] = (f[i] + F[i]) / 2; });
    next_iteration();
  }

  // -- Sums over atoms

  template <class F>
  TD_TEAM double sum(int64_t n, const F& f) const {
    double out[1];
    team_.sums(n, out, [&](int64_t i, double(&to)[1]) { to[0] += f(i); });
    return out[0];
  }
  TD_TEAM double largest(int64_t n, const double* weight, const double* v) const {
    return team_.max(n, 0, [&](int64_t i) { return weight[i] > 0 ? std::abs(v[i]) : 0; });
  }

  // log <a, exp(-f/rho)>, the log of the mass aimed at. By log-sum-exp: far beyond the reach the exponentials
  // underflow.
  TD_TEAM double log_mass(int64_t n, const double* a, const double* f, double rho) const {
    const double best =
        team_.max(n, -kNone, [&](int64_t i) { return a[i] > 0 ? std::log(a[i]) - f[i] / rho : -kNone; });
    return best +
           std::log(sum(n, [&](int64_t i) { return a[i] > 0 ? std::exp(std::log(a[i]) - f[i] / rho - best) : 0; }));
  }

  // The k that maximises the dual over (f + k, g - k): without it a large rho converges ever slower.
  TD_TEAM double translation(const double* g) const {
    if (p_.balanced()) return 0;
    return (log_mass(p_.n, p_.a, p_.f, p_.rho_a) - log_mass(p_.m, p_.b, g, p_.rho_b)) / (1 / p_.rho_a + 1 / p_.rho_b);
  }

  // |c - b E_b|_1/<b, E_b> without a pass, from the update of g: c_j = b_j E_j exp(k_b (g_j - update_j)/eps).
  TD_TEAM double marginal_error(int64_t m, const double* b, const double* g, double mass, double rho) const {
    const double k = k_of(p_.eps, rho);
    const double* const G = p_.update;
    if (std::isinf(rho))
      return sum(m, [&](int64_t j) { return b[j] > 0 ? b[j] * std::abs(std::expm1((g[j] - G[j]) / p_.eps)) : 0; }) /
             mass;
    const double total = log_mass(m, b, g, rho);
    return sum(m, [&](int64_t j) {
      return b[j] > 0 ? std::exp(std::log(b[j]) - g[j] / rho - total) * std::abs(std::expm1(k * (g[j] - G[j]) / p_.eps))
                      : 0;
    });
  }

  // The error below which rounding decides: that of the largest term of a score, over eps. Balanced masses that differ
  // by what is allowed are a floor too: no plan has both marginals.
  TD_TEAM double float_floor(const double* g) const {
    const double scale = larger(larger(largest(p_.n, p_.a, p_.f), largest(p_.m, p_.b, g)), s_.cost_size);
    const double mismatch = p_.balanced() ? std::abs(s_.mass_a / s_.mass_b - 1) : 0;
    return 2 * p_.rounding * scale / p_.eps + mismatch;
  }

  // The dual, without a pass: W b is known at potentials that come out of an update, r_i = a_i e^{log_row_ratio(i)}.
  template <class F>
  TD_TEAM double dual_value(const F& log_row_ratio) const {
    const double excess =
        sum(p_.n, [&](int64_t i) { return p_.a[i] > 0 ? p_.a[i] * std::expm1(log_row_ratio(i)) : 0; });
    return sides() - p_.eps * (excess + s_.mass_a * (1 - s_.mass_b));
  }
  // f is the update from g, then shifted.
  TD_TEAM double dual_of_update() const {
    if (std::isinf(p_.rho_a)) return sides() - p_.eps * s_.mass_a * (1 - s_.mass_b);
    return dual_value([&](int64_t i) { return -(p_.f[i] - s_.shift) / p_.rho_a; });
  }
  TD_TEAM double sides() const {
    return sum(p_.n, [&](int64_t i) { return p_.a[i] * side_term(p_.f[i], p_.rho_a); }) +
           sum(p_.m, [&](int64_t j) { return p_.b[j] * side_term(p_.g[j], p_.rho_b); });
  }

  // -- Anderson acceleration of g <- G(g): the combination of the last sweeps whose residual r = G(g) - g is least in
  // the norm sum_j b_j r_j^2 (Anderson, "Iterative Procedures for Nonlinear Integral Equations", 1965). With dR and dG
  // the last differences of r and G:
  //   gamma = argmin |r - dR gamma|_b^2 + 1e-10 trace |gamma|^2,    next g = G(g) - dG gamma.
  // Weightless atoms take the plain step, which is their soft c-transform. Error above twice the best: plain step.
  //
  // Far from the solution a combination may throw the iteration back, again and again. The dual tells: plain steps
  // never lower it. Where a step has, take_back() returns the plain one in its place, the history starts anew, and ever
  // more plain steps are taken before the next combination.

  // dual: its value at g, whose error in arithmetic is below `noise`; unit: eps times the mass. Was the last step one
  // to take back? Combinations that lower the dual by less than a unit still converge faster than plain steps.
  TD_TEAM bool lowered(double dual, double noise, double unit) {
    const bool worse = s_.mixed && dual < s_.best_dual - noise - unit;
    if (!worse) s_.best_dual = larger(s_.best_dual, dual);
    return worse;
  }
  TD_TEAM void take_back() {
    s_.mixed = s_.started = false;
    s_.count = 0;
    s_.pause = s_.wait;
    s_.wait = s_.wait < 32 ? 2 * s_.wait : 64;
    team_.each(p_.m, [&](int64_t j) { p_.g[j] = p_.last_g[j]; });
  }

  // g becomes the next one.
  TD_TEAM void step() {
    s_.mixed = false;
    team_.each(p_.m, [&](int64_t j) { p_.g[j] += p_.residual[j]; });
    if (s_.started) remember();
    s_.started = true;
    team_.each(p_.m, [&](int64_t j) {
      p_.last_r[j] = p_.residual[j];
      p_.last_g[j] = p_.g[j];
    });
    s_.best = s_.marginal_error < s_.best ? s_.marginal_error : s_.best;
    if (s_.pause > 0) {
      --s_.pause;
      return;
    }
    if (s_.count == 0 || !(s_.marginal_error <= 2 * s_.best)) return;

    double gamma[kMemory];
    if (!combination(gamma)) return;
    const double bad = sum(p_.m, [&](int64_t j) {
      if (!(p_.b[j] > 0)) return 0.0;
      TD_UNROLL
      for (int k = 0; k < kMemory; ++k)
        if (k < s_.count) p_.g[j] -= gamma[k] * p_.d_g[j * kMemory + slot(k)];
      return std::isfinite(p_.g[j]) ? 0.0 : 1.0;
    });
    s_.mixed = bad == 0;
    if (!s_.mixed) team_.each(p_.m, [&](int64_t j) { p_.g[j] = p_.last_g[j]; });
  }

  // Replaces the oldest difference; only its row and column of the Gram matrix change. The columns are summed by
  // themselves: (b u) v and (b v) u differ in their last bit.
  TD_TEAM void remember() {
    s_.newest = (s_.newest + 1) % kMemory;
    s_.count = s_.count < kMemory ? s_.count + 1 : kMemory;
    double changed[2 * kMemory];  // row, column
    team_.sums(p_.m, changed, [&](int64_t j, double(&to)[2 * kMemory]) {
      double* const d = p_.d_r + j * kMemory;
      const double d_r = p_.residual[j] - p_.last_r[j], b = p_.b[j];
      d[s_.newest] = d_r;
      p_.d_g[j * kMemory + s_.newest] = p_.g[j] - p_.last_g[j];
      if (!(b > 0)) return;
      for (int k = 0; k < kMemory; ++k) {
        to[k] += b * d_r * d[k];
        to[kMemory + k] += b * d[k] * d_r;
      }
    });
    if (team_.leads())
      for (int k = 0; k < kMemory; ++k) {
        p_.gram[s_.newest * kMemory + k] = changed[k];
        p_.gram[k * kMemory + s_.newest] = changed[kMemory + k];
      }
    team_.sync();
  }

  // Where the k-th oldest difference is kept.
  TD_TEAM int slot(int k) const { return (s_.newest + 1 + kMemory - s_.count + k) % kMemory; }

  // gamma of the newest residual, oldest difference first; false where nothing moved, or at an overflow. By
  // elimination. All loops are unrolled and all indices constants, so that on CUDA the matrix is in registers.
  TD_TEAM bool combination(double (&gamma)[kMemory]) const {
    double right[kMemory];
    team_.sums(p_.m, right, [&](int64_t j, double(&to)[kMemory]) {
      if (!(p_.b[j] > 0)) return;
      for (int k = 0; k < kMemory; ++k) to[k] += p_.b[j] * p_.d_r[j * kMemory + k] * p_.residual[j];
    });
    const int n = s_.count;
    double A[kMemory][kMemory], trace = 0;
    TD_UNROLL
    for (int k = 0; k < kMemory; ++k) {
      gamma[k] = 0;
      TD_UNROLL
      for (int l = 0; l < kMemory; ++l) {
        A[k][l] = k < n && l < n ? p_.gram[slot(k) * kMemory + slot(l)] : 0;
        if (l == slot(k)) gamma[k] = right[l];
      }
      if (k < n) trace += A[k][k];
    }
    const double ridge = 1e-10 * trace;
    if (!(ridge > 0 && ridge < kNone)) return false;
    TD_UNROLL
    for (int k = 0; k < kMemory; ++k)
      if (k < n) A[k][k] += ridge;
    TD_UNROLL
    for (int k = 0; k < kMemory; ++k) {
      if (k >= n) break;
      int pivot = k;
      double top = std::abs(A[k][k]);
      TD_UNROLL
      for (int i = k + 1; i < kMemory; ++i)
        if (i < n && std::abs(A[i][k]) > top) pivot = i, top = std::abs(A[i][k]);
      TD_UNROLL
      for (int i = k + 1; i < kMemory; ++i) {
        if (i != pivot) continue;
        TD_UNROLL
        for (int j = 0; j < kMemory; ++j) swap(A[k][j], A[i][j]);
        swap(gamma[k], gamma[i]);
      }
      TD_UNROLL
      for (int i = k + 1; i < kMemory; ++i) {
        if (i >= n) break;
        const double factor = A[i][k] / A[k][k];
        TD_UNROLL
        for (int j = k; j < kMemory; ++j)
          if (j < n) A[i][j] -= factor * A[k][j];
        gamma[i] -= factor * gamma[k];
      }
    }
    TD_UNROLL
    for (int k = kMemory - 1; k >= 0; --k) {
      if (k >= n) continue;
      TD_UNROLL
      for (int j = k + 1; j < kMemory; ++j)
        if (j < n) gamma[k] -= A[k][j] * gamma[j];
      gamma[k] /= A[k][k];
    }
    return true;
  }
  TD_TEAM static void swap(double& a, double& b) {
    const double t = a;
    a = b, b = t;
  }

  const Team& team_;
  const Task& p_;
  Progress& s_;
};

}  // namespace torch_divergence::transport
