// The solver of entropic optimal transport and the linear system behind its second derivatives. Both work on vectors of
// atoms in double and reach the pairs only through the functions of a Problem, whatever the cost, the type and the
// device behind them. Formulas in sinkhorn.h.
#pragma once
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "sinkhorn/sinkhorn_iteration.h"

namespace torch_divergence::transport {

using Vector = std::vector<double>;

// One problem of a batch. Rows carry a and f, columns b and g. Symmetric: columns are the rows again, f = g.
struct Problem {
  Vector a, b;
  double eps = 1;
  double rho_a = std::numeric_limits<double>::infinity(), rho_b = rho_a;
  bool symmetric = false;
  // Over pairs of positive weight, infinite costs left out.
  double cost_low = 0, cost_high = 0;
  bool all_finite = true;
  // Unit of rounding of the arithmetic on pairs.
  double rounding = 0;
  // out = the soft c-transform onto `side`, at this eps. For the rows: -eps log sum_j b_j exp((g_j - C_ij)/eps). Going
  // in it holds a guess of that, good for speed alone.
  std::function<void(Side side, const Vector& potential, double eps, Vector& out)> soft_min;

  bool balanced() const;
  // Above the spread of all costs?
  bool is_flat(double at_eps) const { return all_finite && at_eps > cost_high - cost_low; }
};

struct Solution {
  Vector f, g;
  double value = 0;           // the dual
  double marginal_error = 0;  // of exactly these f and g
  int64_t iterations = 0;
  bool converged = false;
};

// Runs an Iteration on the host. init: g (f where symmetric), or empty.
Solution solve(const Problem& problem, double tol, int64_t max_iter, const Vector& init);

// d value/d a_i; it exists, one-sided, where a_i = 0.
double weight_gradient(double f, double eps, double rho, double other_mass);
double sum_of(const Vector& v);
double dot(const Vector& u, const Vector& v);

// The balanced potentials returned are those with <a,f> = <b,g>. What that gauge does to a direction (va, vb) or a
// cotangent (F, G): (F - s a, G + s b), with this s.
double gauge_slope(const Problem& p, const Vector& F, const Vector& G);

// The linear system behind every second derivative. With W = exp(z), rho = W b, gamma = W'a:
//
//   N [df; dg] = [p; q]:   k_a rho_i df_i + sum_j W_ij b_j dg_j = p_i     k_b gamma_j dg_j + sum_i W_ij a_i df_i = q_j
//
// the rows of [diag(k_a r) P; P' diag(k_b c)] divided by a_i and b_j, so that weightless atoms need no special case.
// The rows are eliminated; the Schur complement, symmetric once multiplied by b,
//   b k_b gamma - b W' diag(a/(k_a rho)) W b
// is solved by conjugate gradients with its diagonal as preconditioner: two passes a step. Balanced, it is singular
// along the constants: residual and direction are projected. No ridge, which would bias the result.
class Linear {
 public:
  // times(Rows, u): W u;  times(Columns, u): W'u.  squared: the same for the squares of W.
  using Product = std::function<Vector(Side side, const Vector& u)>;
  Linear(const Problem& p, Product times, const Product& times_squared);

  // N [df; dg] = [p; q]
  void solve(const Vector& p, const Vector& q, Vector& df, Vector& dg) const;
  // N' [L; U] = [F; G]: N again, for l = L/a and u = U/b.
  void solve_transposed(const Vector& F, const Vector& G, Vector& L, Vector& U) const;

 private:
  const Problem& problem_;
  Product times_;
  Vector rows_, cols_, diagonal_;
};

}  // namespace torch_divergence::transport
