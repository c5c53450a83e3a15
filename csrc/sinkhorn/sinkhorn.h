// Entropic optimal transport: the formulas, once, and the signatures of its pair kernels. Included by g++ and nvcc; no
// ATen.
//
//   C_ij cost, a_i >= 0 and b_j >= 0 weights, m_a = sum a, m_b = sum b, ra and rb penalties (infinite = hard marginal)
//   z_ij = (f_i + g_j - C_ij)/eps     W_ij = exp(z_ij)     P_ij = a_i b_j W_ij     r = P 1     c = P' 1     m_P = sum P
//
//   OT   = min_P <P,C> + eps KL(P|a x b) + ra KL(r|a) + rb KL(c|b),      KL(p|q) = sum p log(p/q) - p + q
//   dual = A(a,f,ra) + A(b,g,rb) - eps (m_P - m_a m_b),    A(a,f,ra) = -ra <a, exp(-f/ra) - 1>, or <a,f> if ra = inf
//   at the optimum  r = a E_a,  c = b E_b,  E_a = exp(-f/ra) (1 if hard),  k_a = 1 + eps/ra
//   C_ij may be infinite: W_ij = P_ij = 0
//
//   S = OT(a,b) - OT(a,a)/2 - OT(b,b)/2 + eps/2 (m_a - m_b)^2
//
// Cuturi, "Sinkhorn Distances", 2013; Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
// Divergences", 2019; Sejourne et al., "Sinkhorn Divergences for Unbalanced Optimal Transport", 2019.
//
// First derivatives, by the envelope theorem (potentials held fixed), d1C = dC(x_i, y_j)/dx_i:
//   dC = P    dx_i = sum_j P_ij d1C_ij    deps = KL(P|a x b)
//   da_i = f_i + eps (m_b - 1) if hard, else eps (m_b - 1) - (ra + eps) expm1(-f_i/ra)
// Every d1C is a factor times x - y, and so is d2C = -d1C:
//   half_sqeuclidean 1;  sqeuclidean 2;  euclidean 1/|x - y|, 0 at 0
// Cosine is half_sqeuclidean between the normalised points: 1 - <x,y> = |x - y|^2/2 + (1 - |x|^2)/2 + (1 - |y|^2)/2.
//
// Second derivatives: see Linear in sinkhorn_solver.h.
#pragma once
#include <cstdint>
#include <limits>

#include "core/cpu_dispatch.h"

struct CUstream_st;

namespace torch_divergence {

enum CostCode : int { kHalfSqEuclidean = 0, kSqEuclidean = 1, kEuclidean = 2, kCosine = 3, kCostMatrix = 4 };

namespace transport {

// Columns are padded to this many, so that the kernels know no tail. Padding has weight 0.
inline constexpr int64_t kPad = 16;
inline constexpr double kLog2e = 1.4426950408889634;
// log2(0), the score of what has no weight. A search for the largest score starts at the lowest finite number instead,
// from which infinities subtract to no NaN.
inline constexpr double kNoScore = -std::numeric_limits<double>::infinity();

// The pairs of one problem, seen from one side (rows). A is float or double, all arrays of A are of that type.
struct Pairs {
  bool is_double;
  int cost;  // not kCosine, which is kHalfSqEuclidean here
  int64_t rows, cols, dims;
  // Coordinate k of row i is x[k * x_stride + i] (A); of column j, y[k * y_stride + j]; y_stride is a multiple of kPad.
  const void *x, *y;
  int64_t x_stride, y_stride;
  // kCostMatrix: C_ij = matrix[i * row_stride + j * col_stride] (A).
  const void* matrix;
  int64_t row_stride, col_stride;
  // C_ij = -<x, y> or, for kSqEuclidean, -2 <x, y>: what is left of |x - y|^2 once the squares of the points are in the
  // potentials. The points come in panels of kPad, so that a tile of columns is one piece of memory: coordinate k of
  // row i is x[i / kPad * kPad * dims + k * kPad + i % kPad]. Only for SoftMin and PointGradient.
  bool products = false;
};

// out_i = log2 sum_j 2^(score_j - C_ij log2e/eps)
struct SoftMin {
  Pairs pairs;
  const void* score;  // A, padded with kNoScore: log2 b_j + g_j log2e/eps
  double inv_eps;
  double* out;  // going in: a guess of what comes out, which saves the search for the largest term; any number will do
};

// The same for eps above the spread of C, where the sum is near m_b: with s_i = max_j g_j - C_ij over b_j > 0,
//   out_i = s_i + eps log1p(sum_j b_j/m_b expm1((g_j - C_ij - s_i)/eps))
struct SoftMinFlat {
  Pairs pairs;
  const void* potential;  // A, g_j; kNoScore where b_j = 0
  const void* weight;     // A, b_j/m_b
  double inv_eps;
  double* out;
};

// gradient_i = sum_j Q_ij d1C_ij / sum_j Q_ij of the Q of a SoftMin, whose out is a guess: the first derivative by the
// points of a side, per unit of its marginal. Not for kCostMatrix.
struct PointGradient : SoftMin {
  void* gradient;  // A, (rows, dims)
};

// low_i = min_j C_ij + offset_j, high_i = max_j C_ij + offset_j over the columns of weight above 0 and finite cost;
// top_i is infinite where such a column's cost is.
struct CostRange {
  Pairs pairs;
  const void* offset;  // A; kNoScore where b_j = 0
  double *low, *high, *top;
};

// Sums over j of one weight a pair, which serves every derivative:
//   Q_ij = W_ij [a_i b_j (alpha + alpha_i + beta_j + lambda D_ij + <t_i, v_j>) + b_j p_i + a_i q_j]
//   D_ij = d1C_ij.vx_i + d2C_ij.vy_j + vC_ij + veps z_ij              (the change of C along a direction, and z veps)
struct PairSweep {
  Pairs pairs;
  double inv_eps;
  const double* f;  // rows
  const void* g;    // A, padded
  // Rows: null is 1 for a, 0 for the others. Columns (A, padded with 0): null is 0.
  const double *a, *alpha_row, *p;
  const void *b, *beta, *q;
  double alpha;
  double lambda, veps;
  const void *vx, *vy;   // A, laid out as x and y; null: 0
  const void* v_matrix;  // A, laid out as C; null: 0
  const void *t, *v;     // A, rank coordinates laid out as x and y
  int64_t rank;
  const void* payload;  // A, payload_dims coordinates laid out as y
  int64_t payload_dims;

  // Outputs; null: not wanted.
  double* sum;       // sum_j Q
  double* sum_cost;  // sum_j Q C
  double* sum_z;     // sum_j Q z
  double* entropy;   // sum_j b (z e^z - e^z + 1): KL(P|a x b) once multiplied by a and summed
  void* gradient;    // A, (rows, dims): sum_j Q d1C
  bool second;       // adds sum_j P (d11C vx_i + d12C vy_j) to gradient; wants lambda != 0
  void* product;     // A, (rows, payload_dims): sum_j Q payload_j
  void* matrix_out;  // A, laid out as C: Q
};

// Whole solves of problems of at most kSmallAtoms points a side; what is meant by each is in sinkhorn_iteration.h.
// Problem s has rows row_start[s] to row_start[s + 1] of the arrays of rows, and columns likewise.
struct SmallSolve {
  bool is_double;
  int cost;
  int64_t dims;
  const int64_t *row_start, *col_start;
  const void *x, *y;   // A, (rows, dims) and (columns, dims)
  const void* matrix;  // A: C (rows, columns) of one problem after another, all of one size,
  bool one_matrix;     // or one of them all
  const double *a, *b, *eps;
  const double* init;  // g (f where symmetric); null: none
  double rho_a, rho_b;
  bool symmetric;  // y and b are x and a
  double tol;
  int64_t max_iter;
  void *f = nullptr, *g = nullptr;  // A
  double *value = nullptr, *marginal_error = nullptr;
  int64_t* iterations = nullptr;
  bool* converged = nullptr;
};
inline constexpr int64_t kSmallAtoms = 16;
// Problems that the kernel solves side by side, at most: calls with fewer leave lanes empty.
inline constexpr int64_t kSmallLanes = 16;

// -- On CUDA: batches of problems, whose atoms lie one after another, counted through the batch ----------------------

// As Pairs; problem s has the rows from row_start[s] and the columns from col_start[s] on. Matrices (rows, columns) lie
// one after another. No padding.
struct PairBatch {
  bool is_double;
  int cost;
  int64_t problems, dims;
  const int64_t *row_start, *col_start;  // (problems + 1)
  const void *x, *y;
  int64_t x_stride, y_stride;
  const void* matrix;
};

// Invalid: eps or weights that are none; of such a problem nothing but the status is written.
enum SinkhornStatus : int { kSinkhornRuns = 0, kSinkhornConverged = 1, kSinkhornStopped = 2, kSinkhornInvalid = 3 };

// Solves all problems of a batch; what is meant by each is in sinkhorn_iteration.h.
struct SinkhornSolve {
  PairBatch pairs;
  const int64_t *rows_at, *cols_at;   // row_start and col_start on the host
  const double *a, *b, *eps;          // eps: one a problem
  const double *offset_x, *offset_y;  // what an atom adds to its costs; null: 0
  double rho_a, rho_b;
  bool symmetric, warm;
  double tol;
  int64_t max_iter;
  double mass_rounding;  // by how much, relatively, two hard marginals' masses may differ
  double *f, *g;         // warm: g (f where symmetric) going in
  // One a problem.
  double *value, *marginal_error;
  int64_t* iterations;
  int* status;  // a SinkhornStatus
};

// The problems of a PairSweep, whose pairs.rows are those of all problems. eps instead of inv_eps.
struct SweepBatch {
  const int64_t *row_start, *col_start;
  int64_t problems;
  const double* eps;
  // The W of each row over its largest, b being positive: for ratios of sums at potentials however far from solving the
  // problem, where all W of a row may vanish or overflow.
  bool over_largest = false;
};

}  // namespace transport

namespace cuda {
using Stream = CUstream_st*;
// Of doubles.
int64_t sinkhorn_workspace(const transport::SinkhornSolve& call);
// Starts the problems, and solves them if all are small. Then, until each one's status has changed, passes.
void sinkhorn_begin(const transport::SinkhornSolve& call, double* workspace, Stream stream);
void sinkhorn_passes(const transport::SinkhornSolve& call, int64_t passes, double* workspace, Stream stream);
void sinkhorn_pair_sweep(const transport::PairSweep& call, const transport::SweepBatch& batch, Stream stream);
}  // namespace cuda

// Rows [begin, end) of a call.
TD_DECLARE_CPU_KERNEL(sinkhorn_soft_min, (const transport::SoftMin& call, int64_t begin, int64_t end))
TD_DECLARE_CPU_KERNEL(sinkhorn_soft_min_flat, (const transport::SoftMinFlat& call, int64_t begin, int64_t end))
TD_DECLARE_CPU_KERNEL(sinkhorn_point_gradient, (const transport::PointGradient& call, int64_t begin, int64_t end))
TD_DECLARE_CPU_KERNEL(sinkhorn_cost_range, (const transport::CostRange& call, int64_t begin, int64_t end))
TD_DECLARE_CPU_KERNEL(sinkhorn_pair_sweep, (const transport::PairSweep& call, int64_t begin, int64_t end))
// Problems [begin, end) of a call.
TD_DECLARE_CPU_KERNEL(sinkhorn_solve_small, (const transport::SmallSolve& call, int64_t begin, int64_t end))

}  // namespace torch_divergence
