// The iteration of entropic optimal transport on one problem: what happens between two passes over its pairs. Formulas
// in sinkhorn.h. The host's solver runs it with a team of one thread, the CUDA kernels with one of a block's threads.
//
// A team has
//   each(n, f)           f(i) for i < n, an i by the same thread each time
//   sums(n, out, f)      out[k] = the sums over i < n of what f(i, out) adds to out[k], for all threads
//   max(n, start, f)     the largest of start and f(i), for all threads; NaN is passed over
//   leads(), sync()      one thread of the team; what threads have written before is seen by the others after it
// and all of its threads make the same calls, for all of them know the same Progress.
//
// Real is double, or a vector with one problem in each lane, which go through the same steps together: what concerns
// some of them only is masked, where(mask, a, b), and left out where it concerns none.
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

// What a vector of problems has too, as friends.
template <class T>
TD_HOST_DEVICE T where(bool condition, T a, T b) {
  return condition ? a : b;
}
TD_HOST_DEVICE bool any(bool condition) { return condition; }

template <class Real>
struct NumberOf {
  using Mask = decltype(Real() < Real());
  using Count = Real;
};
template <>
struct NumberOf<double> {
  using Mask = bool;
  using Count = int64_t;
};

template <class Real>
TD_HOST_DEVICE Real k_of(Real eps, double rho) {
  return 1 + eps / rho;
}
// a where they do not compare, so that NaN stays in it.
template <class Real>
TD_HOST_DEVICE Real larger(Real a, Real b) {
  return where(a < b, b, a);
}
template <class Real>
TD_HOST_DEVICE auto is_finite(Real x) {
  return x - x == Real(0);
}
// A term of the dual, over its weight.
template <class Real>
TD_HOST_DEVICE Real side_term(Real f, double rho) {
  using std::expm1;
  return std::isinf(rho) ? f : -rho * expm1(-f / rho);
}

// Differences that Anderson acceleration combines.
inline constexpr int kMemory = 5;

// One problem and the memory that its iteration works in. Rows carry a and f, columns b and g. Symmetric: columns are
// the rows again, f = g.
template <class Real>
struct TaskOf {
  int64_t n, m;
  const Real *a, *b;
  Real eps;
  double rho_a, rho_b;
  bool symmetric;
  double rounding;  // unit of rounding of the arithmetic on pairs
  double tol;       // compared with the marginal error, which costs no pass; 0: exactly max_iter iterations
  int64_t max_iter;
  // f (n); g and its update (m). Symmetric: f, its update and, at the end, g.
  Real *f, *g, *update;
  // Of Anderson acceleration, for problems that are not symmetric: (m), (m, kMemory) and (kMemory, kMemory).
  Real *residual, *last_r, *last_g, *d_r, *d_g, *gram;

  TD_HOST_DEVICE bool balanced() const { return std::isinf(rho_a) && std::isinf(rho_b); }
};
using Task = TaskOf<double>;

// What an iteration knows between two passes, beside the task's memory.
template <class Real>
struct ProgressOf {
  using Mask = typename NumberOf<Real>::Mask;
  using Count = typename NumberOf<Real>::Count;

  // The pass to come: the soft c-transform onto `side` of the other side's potential, at pass_eps. For the rows:
  //   -pass_eps log sum_j b_j exp((g_j - C_ij)/pass_eps)
  // It goes to f, of columns and in symmetric problems to `update`. Going in, that holds a guess of what comes out.
  Side side;
  Real pass_eps;
  Mask takes_part;  // of several problems: the others' potentials stay as they are
  Mask done;
  // The solution, once done.
  Mask converged;
  Count iterations;
  Real marginal_error, value;

  Real mass_a, mass_b, cost_size;
  Mask all_finite;
  Count coarse;  // iterations that anneal
  Real shift;
  // Of Anderson acceleration.
  Real best, best_dual;
  Mask mixed, started;
  Count pause, wait;  // plain steps to come, and after the next step that is taken back
  Count count;        // of differences
  int newest;         // where the last one is kept: counted in steps, so the same for all problems
};
using Progress = ProgressOf<double>;

// Annealing, then alternating soft c-transforms with Anderson acceleration of g and, where unbalanced, the translation
// of Sejourne, Vialard and Peyre, "Faster Unbalanced Optimal Transport", 2022; symmetric problems by averaging (Knight,
// Ruiz and Ucar, "A Symmetry Preserving Algorithm for Matrix Scaling", 2014), because alternating may crawl there.
template <class Team, class Real = double>
class Iteration {
  using Mask = typename ProgressOf<Real>::Mask;
  using Count = typename ProgressOf<Real>::Count;

 public:
  TD_TEAM Iteration(const Team& team, const TaskOf<Real>& task, ProgressOf<Real>& progress)
      : team_(team), p_(task), s_(progress) {}

  // Finite costs between pairs of positive weight; all_finite: there are no others. warm: g (f where symmetric) is
  // given, and there is no annealing; else it is set to 0.
  TD_TEAM void start(const Real& cost_low, const Real& cost_high, const Mask& all_finite, bool warm) {
    using std::abs;
    s_ = {};
    s_.mass_a = sum(p_.n, [&](int64_t i) { return p_.a[i]; });
    s_.mass_b = sum(p_.m, [&](int64_t j) { return p_.b[j]; });
    s_.cost_size = larger(Real(abs(cost_low)), Real(abs(cost_high)));
    s_.all_finite = all_finite;
    s_.best = kNone, s_.best_dual = -kNone, s_.wait = 2;
    s_.pass_eps = p_.eps;
    if (!warm) {
      Real* const start = p_.symmetric ? p_.f : p_.g;
      team_.each(p_.symmetric ? p_.n : p_.m, [&](int64_t j) { start[j] = 0; });
      anneal(cost_high - cost_low);
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
    s_.iterations = 1;
    begin_rows();
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

  // spread, spread/4, ... while above eps: one iteration each. The coarsest are left out where max_iter is too small.
  // Where no cost is finite there is no schedule.
  TD_TEAM void anneal(const Real& spread) {
    Real first = spread;
    for (Real eps = spread;; eps = eps / 4) {
      const Mask above = (eps > p_.eps) & is_finite(eps);
      if (!any(above)) break;
      s_.coarse = where(above, Count(s_.coarse + 1), s_.coarse);
    }
    for (;;) {
      const Mask too_many = s_.coarse > Count(p_.max_iter - 1);
      if (!any(too_many)) break;
      s_.coarse = where(too_many, Count(s_.coarse - 1), s_.coarse);
      first = where(too_many, Real(first / 4), first);
    }
    s_.pass_eps = where(s_.coarse > Count(0), first, p_.eps);
  }

  TD_TEAM Mask anneals() const { return !(s_.iterations > s_.coarse); }
  TD_TEAM Mask is_last() const {
    const Mask lasts = (s_.iterations == Count(p_.max_iter)) | !(s_.marginal_error == s_.marginal_error);
    return p_.tol > 0 ? Mask(lasts | s_.converged) : lasts;
  }
  TD_TEAM void begin_rows() {
    s_.side = Side::Rows;
    s_.takes_part = !s_.done;
  }
  TD_TEAM void next_iteration(const Mask& on) {
    s_.iterations = where(on, Count(s_.iterations + 1), s_.iterations);
    s_.pass_eps = where(on, where(anneals(), Real(s_.pass_eps / 4), p_.eps), s_.pass_eps);
  }
  TD_TEAM static void set(const Mask& on, Real& to, const Real& value) { to = where(on, value, to); }

  // A full iteration is two passes: f from g, then the update of g from f, whose distance from g is the error of
  // (f, g).
  TD_TEAM void after_rows() {
    const Mask on = s_.takes_part;
    scale_update(on, p_.n, p_.f, p_.rho_a);
    set(on, s_.shift, translation(p_.g));  // P stays the same
    if (!p_.balanced()) {
      team_.each(p_.n, [&](int64_t i) { set(on, p_.f[i], p_.f[i] + s_.shift); });
      team_.each(p_.m, [&](int64_t j) { set(on, p_.g[j], p_.g[j] - s_.shift); });
    }
    const Mask fine = on & !anneals() & (s_.iterations < Count(p_.max_iter));
    Mask back = false;
    if (any(fine)) {
      const Real mass = larger(s_.mass_a, s_.mass_b),
                 noise = 8 * p_.rounding * (largest(p_.n, p_.a, p_.f) + largest(p_.m, p_.b, p_.g)) * mass;
      back = lowered(fine, dual_of_update(), noise, s_.pass_eps * mass);
      if (any(back)) {
        take_back(back);
        next_iteration(back);
      }
    }
    s_.takes_part = on & !back;
    if (any(s_.takes_part))
      s_.side = Side::Columns;
    else
      begin_rows();
  }

  TD_TEAM void after_columns() {
    using std::abs, std::expm1;
    const Mask on = s_.takes_part, coarse = on & anneals(), fine = on & !anneals();
    scale_update(on, p_.m, p_.update, p_.rho_b);
    const Real next = translation(p_.update);
    if (any(coarse)) team_.each(p_.m, [&](int64_t j) { set(coarse, p_.g[j], p_.update[j] - next); });
    if (any(fine)) {
      set(fine, s_.marginal_error,
          larger(marginal_error(p_.m, p_.b, p_.g, s_.mass_b, p_.rho_b), Real(abs(expm1(s_.shift / p_.rho_a)))));
      s_.converged = (s_.converged & !fine) | (fine & is_within(larger(Real(p_.tol), float_floor(p_.g))));
      const Mask last = fine & is_last(), steps = fine & !last;
      if (any(last)) finish(last);
      if (any(steps)) {
        team_.each(p_.m, [&](int64_t j) { p_.residual[j] = p_.update[j] - next - p_.g[j]; });
        if (p_.balanced()) {  // the constant is free: keep it out of the history
          const Real mean = sum(p_.m, [&](int64_t j) { return p_.b[j] * p_.residual[j]; }) / s_.mass_b;
          team_.each(p_.m, [&](int64_t j) { p_.residual[j] = p_.residual[j] - mean; });
        }
        step(steps);
      }
    }
    next_iteration(on & !s_.done);
    begin_rows();
  }

  TD_TEAM void scale_update(const Mask& on, int64_t n, Real* update, double rho) const {
    if (std::isinf(rho)) return;
    team_.each(n, [&](int64_t i) { set(on, update[i], update[i] / k_of(s_.pass_eps, rho)); });
  }

  TD_TEAM void finish(const Mask& last) {
    // The soft c-transform, which gives the one-sided derivative.
    team_.each(p_.m, [&](int64_t j) { set(last & !(p_.b[j] > Real(0)), p_.g[j], p_.update[j]); });
    set(last, s_.value, known(dual_of_update()));
    if (p_.balanced()) {
      const Real of_g = sum(p_.m, [&](int64_t j) { return p_.b[j] * p_.g[j]; }),
                 of_f = sum(p_.n, [&](int64_t i) { return p_.a[i] * p_.f[i]; }),
                 k = (of_g - of_f) / (s_.mass_a + s_.mass_b);
      team_.each(p_.n, [&](int64_t i) { set(last, p_.f[i], p_.f[i] + k); });
      team_.each(p_.m, [&](int64_t j) { set(last, p_.g[j], p_.g[j] - k); });
    }
    s_.done = s_.done | last;
  }

  TD_TEAM void average() {
    Real *const f = p_.f, *const F = p_.update;
    const Mask on = s_.takes_part, fine = on & !anneals();
    scale_update(on, p_.n, F, p_.rho_a);
    if (any(fine)) {
      set(fine, s_.marginal_error, marginal_error(p_.n, p_.a, f, s_.mass_a, p_.rho_a));
      s_.converged = (s_.converged & !fine) | (fine & is_within(larger(Real(p_.tol), float_floor(f))));
      const Mask last = fine & is_last();
      if (any(last)) {
        team_.each(p_.n, [&](int64_t i) {
          set(last & !(p_.a[i] > Real(0)), f[i], F[i]);
          set(last, p_.g[i], f[i]);
        });
        const Real k = k_of(p_.eps, p_.rho_a);
        set(last, s_.value, known(dual_value([&](int64_t i) { return (f[i] - k * F[i]) / p_.eps; })));
        s_.done = s_.done | last;
      }
    }
    const Mask more = on & !s_.done;
    team_.each(p_.n, [&](int64_t i) { set(more, f[i], (f[i] + F[i]) / 2); });
    next_iteration(more);
    begin_rows();
  }

  // -- Sums over atoms

  template <class F>
  TD_TEAM Real sum(int64_t n, const F& f) const {
    Real out[1];
    team_.sums(n, out, [&](int64_t i, Real(&to)[1]) { to[0] = to[0] + f(i); });
    return out[0];
  }
  TD_TEAM Real largest(int64_t n, const Real* weight, const Real* v) const {
    using std::abs;
    return team_.max(n, Real(0), [&](int64_t i) { return where(weight[i] > Real(0), Real(abs(v[i])), Real(0)); });
  }

  // log <a, exp(-f/rho)>, the log of the mass aimed at. By log-sum-exp: far beyond the reach the exponentials
  // underflow.
  TD_TEAM Real log_mass(int64_t n, const Real* a, const Real* f, double rho) const {
    using std::exp, std::log;
    const auto term = [&](int64_t i) { return where(a[i] > Real(0), Real(log(a[i]) - f[i] / rho), Real(-kNone)); };
    const Real best = team_.max(n, Real(-kNone), term);
    return best + log(sum(n, [&](int64_t i) { return where(a[i] > Real(0), Real(exp(term(i) - best)), Real(0)); }));
  }

  // The k that maximises the dual over (f + k, g - k): without it a large rho converges ever slower.
  TD_TEAM Real translation(const Real* g) const {
    if (p_.balanced()) return 0;
    return (log_mass(p_.n, p_.a, p_.f, p_.rho_a) - log_mass(p_.m, p_.b, g, p_.rho_b)) / (1 / p_.rho_a + 1 / p_.rho_b);
  }

  TD_TEAM Mask is_within(const Real& bound) const {
    return is_finite(s_.marginal_error) & (s_.marginal_error <= bound);
  }
  // NaN where the error is.
  TD_TEAM Real known(const Real& value) const {
    return where(s_.marginal_error == s_.marginal_error, value, s_.marginal_error);
  }

  // |c - b E_b|_1/<b, E_b> without a pass, from the update of g: c_j = b_j E_j exp(k_b (g_j - update_j)/eps). NaN where
  // an atom of positive weight can meet no other, for which its update is infinite.
  TD_TEAM Real marginal_error(int64_t m, const Real* b, const Real* g, const Real& mass, double rho) const {
    using std::abs, std::exp, std::expm1, std::log;
    const Real k = k_of(p_.eps, rho);
    const Real* const G = p_.update;
    const auto of_weighted = [&](int64_t j, const Real& share) {
      const Real gap = k * (g[j] - G[j]) / p_.eps;
      return where(b[j] > Real(0), Real(share * abs(expm1(gap)) + (gap - gap)), Real(0));
    };
    if (std::isinf(rho)) return sum(m, [&](int64_t j) { return of_weighted(j, b[j]); }) / mass;
    const Real total = log_mass(m, b, g, rho);
    return sum(m, [&](int64_t j) { return of_weighted(j, exp(log(b[j]) - g[j] / rho - total)); });
  }

  // The error below which rounding decides: that of the largest term of a score, over eps. Balanced masses that differ
  // by what is allowed are a floor too: no plan has both marginals. Infinite costs may leave no plan, and potentials
  // that grow forever: they say nothing then.
  TD_TEAM Real float_floor(const Real* g) const {
    using std::abs;
    const Real potentials = larger(largest(p_.n, p_.a, p_.f), largest(p_.m, p_.b, g)),
               scale = where(s_.all_finite, larger(potentials, s_.cost_size), s_.cost_size);
    const Real floor = 2 * p_.rounding * scale / p_.eps;
    return p_.balanced() ? Real(floor + abs(s_.mass_a / s_.mass_b - 1)) : floor;
  }

  // The dual, without a pass: W b is known at potentials that come out of an update, r_i = a_i e^{log_row_ratio(i)}.
  template <class F>
  TD_TEAM Real dual_value(const F& log_row_ratio) const {
    using std::expm1;
    const Real excess = sum(
        p_.n, [&](int64_t i) { return where(p_.a[i] > Real(0), Real(p_.a[i] * expm1(log_row_ratio(i))), Real(0)); });
    return sides() - p_.eps * (excess + s_.mass_a * (1 - s_.mass_b));
  }
  // f is the update from g, then shifted.
  TD_TEAM Real dual_of_update() const {
    if (std::isinf(p_.rho_a)) return sides() - p_.eps * s_.mass_a * (1 - s_.mass_b);
    return dual_value([&](int64_t i) { return -(p_.f[i] - s_.shift) / p_.rho_a; });
  }
  TD_TEAM Real sides() const {
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
  TD_TEAM Mask lowered(const Mask& on, const Real& dual, const Real& noise, const Real& unit) {
    const Mask worse = on & s_.mixed & (dual < s_.best_dual - noise - unit);
    set(on & !worse, s_.best_dual, larger(s_.best_dual, dual));
    return worse;
  }
  TD_TEAM void take_back(const Mask& back) {
    s_.mixed = s_.mixed & !back;
    s_.started = s_.started & !back;
    s_.count = where(back, Count(0), s_.count);
    s_.pause = where(back, s_.wait, s_.pause);
    s_.wait = where(back, where(s_.wait < Count(32), Count(2 * s_.wait), Count(64)), s_.wait);
    team_.each(p_.m, [&](int64_t j) { set(back, p_.g[j], p_.last_g[j]); });
  }

  // g becomes the next one.
  TD_TEAM void step(const Mask& on) {
    s_.mixed = s_.mixed & !on;
    team_.each(p_.m, [&](int64_t j) { set(on, p_.g[j], p_.g[j] + p_.residual[j]); });
    remember(on & s_.started);
    s_.started = s_.started | on;
    team_.each(p_.m, [&](int64_t j) {
      set(on, p_.last_r[j], p_.residual[j]);
      set(on, p_.last_g[j], p_.g[j]);
    });
    set(on & (s_.marginal_error < s_.best), s_.best, s_.marginal_error);
    const Mask waits = on & (s_.pause > Count(0));
    s_.pause = where(waits, Count(s_.pause - 1), s_.pause);
    // Nobody looks back on the last iteration: it starts from a plain step.
    Mask mixes = on & !waits & (s_.count > Count(0)) & (s_.marginal_error <= 2 * s_.best) &
                 (s_.iterations < Count(p_.max_iter - 1));
    if (!any(mixes)) return;

    Real gamma[kMemory];
    mixes = mixes & combination(gamma);
    if (!any(mixes)) return;
    const Real bad = sum(p_.m, [&](int64_t j) {
      const Mask moves = mixes & (p_.b[j] > Real(0));
      TD_UNROLL
      for (int k = 0; k < kMemory; ++k)
        set(moves & (s_.count > Count(k)), p_.g[j], p_.g[j] - gamma[k] * p_.d_g[j * kMemory + slot(k)]);
      return where(moves & !is_finite(p_.g[j]), Real(1), Real(0));
    });
    const Mask failed = bad > Real(0);
    s_.mixed = s_.mixed | (mixes & !failed);
    if (any(failed)) team_.each(p_.m, [&](int64_t j) { set(failed, p_.g[j], p_.last_g[j]); });
  }

  // Replaces the oldest difference; only its row and column of the Gram matrix change. What is not counted may hold
  // anything.
  TD_TEAM void remember(const Mask& on) {
    s_.newest = (s_.newest + 1) % kMemory;
    if (!any(on)) return;
    s_.count = where(on & (s_.count < Count(kMemory)), Count(s_.count + 1), s_.count);
    Real changed[kMemory];
    team_.sums(p_.m, changed, [&](int64_t j, Real(&to)[kMemory]) {
      Real* const d = p_.d_r + j * kMemory;
      const Real d_r = p_.residual[j] - p_.last_r[j], b = p_.b[j];
      d[s_.newest] = d_r;
      p_.d_g[j * kMemory + s_.newest] = p_.g[j] - p_.last_g[j];
      for (int k = 0; k < kMemory; ++k) to[k] = to[k] + where(b > Real(0), Real(b * d_r * d[k]), Real(0));
    });
    if (team_.leads())
      for (int k = 0; k < kMemory; ++k)
        p_.gram[s_.newest * kMemory + k] = p_.gram[k * kMemory + s_.newest] = changed[k];
    team_.sync();
  }

  // Where the k-th newest difference is kept.
  TD_TEAM int slot(int k) const { return (s_.newest + kMemory - k) % kMemory; }

  // gamma of the newest residual, newest difference first; false where nothing moved, or at an overflow. By elimination
  // without pivots: the matrix is positive definite, and the ridge keeps rounding from that. All loops are unrolled
  // and all indices constants, so that on CUDA the matrix is in registers.
  TD_TEAM Mask combination(Real (&gamma)[kMemory]) const {
    team_.sums(p_.m, gamma, [&](int64_t j, Real(&to)[kMemory]) {
      const Real b_r = p_.b[j] * p_.residual[j];
      for (int k = 0; k < kMemory; ++k)
        to[k] = to[k] + where(p_.b[j] > Real(0), Real(b_r * p_.d_r[j * kMemory + slot(k)]), Real(0));
    });
    // Its lower half; of differences that are not there the identity's.
    Real A[kMemory][kMemory], trace = 0;
    TD_UNROLL
    for (int k = 0; k < kMemory; ++k) {
      const Mask there = s_.count > Count(k);
      TD_UNROLL
      for (int l = 0; l <= k; ++l) A[k][l] = where(there, p_.gram[slot(k) * kMemory + slot(l)], Real(0));
      gamma[k] = where(there, gamma[k], Real(0));
      trace = trace + A[k][k];
    }
    const Real ridge = 1e-10 * trace;
    TD_UNROLL
    for (int k = 0; k < kMemory; ++k) A[k][k] = where(s_.count > Count(k), Real(A[k][k] + ridge), Real(1));
    TD_UNROLL
    for (int k = 0; k < kMemory; ++k) {
      A[k][k] = 1 / A[k][k];
      TD_UNROLL
      for (int i = k + 1; i < kMemory; ++i) {
        const Real factor = A[i][k] * A[k][k];
        TD_UNROLL
        for (int j = k + 1; j <= i; ++j) A[i][j] = A[i][j] - factor * A[j][k];
        gamma[i] = gamma[i] - factor * gamma[k];
      }
    }
    TD_UNROLL
    for (int k = kMemory - 1; k >= 0; --k) {
      TD_UNROLL
      for (int j = k + 1; j < kMemory; ++j) gamma[k] = gamma[k] - A[j][k] * gamma[j];
      gamma[k] = gamma[k] * A[k][k];
    }
    return (ridge > Real(0)) & (ridge < Real(kNone));
  }

  const Team& team_;
  const TaskOf<Real>& p_;
  ProgressOf<Real>& s_;
};

// A thread that is a team by itself.
template <class Real>
struct OneThread {
  template <class F>
  void each(int64_t n, const F& f) const {
    for (int64_t i = 0; i < n; ++i) f(i);
  }
  template <size_t size, class F>
  void sums(int64_t n, Real (&out)[size], const F& f) const {
    for (Real& sum : out) sum = 0;
    for (int64_t i = 0; i < n; ++i) f(i, out);
  }
  template <class F>
  Real max(int64_t n, Real start, const F& f) const {
    for (int64_t i = 0; i < n; ++i) start = larger(start, Real(f(i)));
    return start;
  }
  bool leads() const { return true; }
  void sync() const {}
};

}  // namespace torch_divergence::transport
