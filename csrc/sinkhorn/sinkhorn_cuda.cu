// CUDA kernels of entropic optimal transport; formulas in sinkhorn.h, the iteration in sinkhorn_iteration.h.
//
// A pass over the pairs of a problem is made of units: a warp takes a few rows and a segment of the columns, over which
// its lanes spread, so that the loads of the columns lie side by side and serve every row. Segments leave their sums in
// the workspace; a block merges them in their order and takes the problem to its next pass. How a problem is cut
// depends on its size alone: in a batch it gives the same bits as by itself.
//
// Small problems: one block does all passes of a problem in one launch. Others: two launches a pass, over all problems,
// of which those that are done return at once.
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/cuda_launch.cuh"
#include "core/cuda_rows.cuh"
#include "sinkhorn/sinkhorn.h"
#include "sinkhorn/sinkhorn_iteration.h"

namespace torch_divergence::cuda {
namespace {

using namespace transport;

// -- Pairs ------------------------------------------------------------------------------------------------------------

constexpr int kRows = 4;                        // of a unit
constexpr int kColumns = 4;                     // of a lane in one step
constexpr int64_t kStep = kColumns * kWarp;     // columns of a unit in one step
constexpr int64_t kBlockRows = kRows * kWarps;  // of the units of a block
constexpr int64_t kBusy = 512;                  // blocks that keep a GPU busy

constexpr int kAnyDims = 0, kMatrix = -1;  // for D, the dimensions that the compiler knows

template <class A>
inline constexpr A kNothing = static_cast<A>(kNoScore);
template <class A>
inline constexpr A kLowest = std::numeric_limits<A>::lowest();

__host__ __device__ constexpr int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

__host__ __device__ inline int64_t row_blocks_of(int64_t rows) { return over(rows, kBlockRows); }
__host__ __device__ inline int64_t segment_of(int64_t rows, int64_t cols) {
  const int64_t wanted = over(kBusy, row_blocks_of(rows));
  return over(over(cols, wanted), kStep) * kStep;
}
__host__ __device__ inline int64_t segments_of(int64_t rows, int64_t cols) {
  return over(cols, segment_of(rows, cols));
}

__device__ __forceinline__ float exp2_of(float x) { return exp2_approx(x); }
__device__ __forceinline__ double exp2_of(double x) { return std::exp2(x); }

// The pairs of one problem seen from a side: as Pairs, at its own first row and column.
template <class A>
struct View {
  const A *x, *y, *matrix;
  int64_t x_stride, y_stride, row_stride, col_stride, rows, cols, dims;
  bool root;
  A scale;  // cost = scale * raw cost

  __device__ View(const PairBatch& p, int64_t problem, Side side) {
    const int64_t row = p.row_start[problem], n = p.row_start[problem + 1] - row, col = p.col_start[problem],
                  m = p.col_start[problem + 1] - col;
    const A *const px = static_cast<const A*>(p.x), *const py = static_cast<const A*>(p.y);
    const bool of_rows = side == Side::Rows;
    x = of_rows ? px + row : py + col, y = of_rows ? py + col : px + row;
    x_stride = of_rows ? p.x_stride : p.y_stride, y_stride = of_rows ? p.y_stride : p.x_stride;
    matrix = static_cast<const A*>(p.matrix) + (p.matrix == nullptr ? 0 : row * m);
    row_stride = of_rows ? m : 1, col_stride = of_rows ? 1 : m;
    rows = of_rows ? n : m, cols = of_rows ? m : n;
    dims = p.dims;
    root = p.cost == kEuclidean;
    scale = p.cost == kHalfSqEuclidean ? A(0.5) : A(1);
  }
};

// Coordinates of a unit's rows, where there are few.
template <class A, int D>
struct UnitRows {
  int64_t at[kRows];
  A x[D > 0 ? D : 1][kRows];

  __device__ UnitRows(const View<A>& p, int64_t first) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      at[r] = first + r < p.rows ? first + r : p.rows - 1;  // past the end: the last one again
#pragma unroll
      for (int k = 0; k < D; ++k) x[k][r] = p.x[k * p.x_stride + at[r]];
    }
  }
};

// |x - y|^2, |x - y| or C, by differences of coordinates, which cancel nothing however far the clouds are from the
// origin.
template <class A, int D>
__device__ __forceinline__ void raw_costs(const View<A>& p, const UnitRows<A, D>& rows, const int64_t (&col)[kColumns],
                                          A (&c)[kRows][kColumns]) {
  if constexpr (D == kMatrix) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kColumns; ++v) c[r][v] = p.matrix[rows.at[r] * p.row_stride + col[v] * p.col_stride];
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kColumns; ++v) c[r][v] = 0;
    const auto add = [&](int64_t k, const A(&x)[kRows]) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const A y = p.y[k * p.y_stride + col[v]];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const A d = x[r] - y;
          c[r][v] = std::fma(d, d, c[r][v]);
        }
      }
    };
    if constexpr (D > 0) {
#pragma unroll
      for (int k = 0; k < D; ++k) add(k, rows.x[k]);
    } else {
      for (int64_t k = 0; k < p.dims; ++k) {
        A x[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) x[r] = p.x[k * p.x_stride + rows.at[r]];
        add(k, x);
      }
    }
    if (!p.root) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kColumns; ++v) c[r][v] = std::sqrt(c[r][v]);
  }
}

// -- What a pass knows of a row: of a lane's columns, of a unit's and, in double, of all
// --------------------------------

// The columns of a lane in one step.
template <class A>
struct Lane {
  A score[kColumns], weight[kColumns];
};

// log2 sum_j 2^(score_j - C_ij log2e/eps): the largest exponent, and the sum over it.
template <class A>
struct SoftMinRow {
  static constexpr int kSize = 2;
  A max = kLowest<A>;
  Sum<A> sum;

  __device__ __forceinline__ void add(const View<A>& p, const A (&c)[kColumns], const Lane<A>& lane, double inv_eps) {
    const A slope = static_cast<A>(-inv_eps * kLog2e) * p.scale;
    A t[kColumns], top = max, part = 0;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      t[v] = std::fma(c[v], slope, lane.score[v]);
      top = t[v] > top ? t[v] : top;
    }
    if (top > max) {
      sum *= exp2_of(max - top);
      max = top;
    }
#pragma unroll
    for (int v = 0; v < kColumns; ++v) part += exp2_of(t[v] - top);
    sum.add(part);
  }
  __device__ static void merge(const Team& warp, SoftMinRow (&rows)[kRows], double (&out)[kRows][kSize]) {
    A top[kRows];
    double sums[kRows];
    for (int r = 0; r < kRows; ++r) top[r] = rows[r].max;
    warp.max(top);
    for (int r = 0; r < kRows; ++r) sums[r] = rows[r].sum.value() * static_cast<double>(exp2_of(rows[r].max - top[r]));
    warp.sum(sums);
    for (int r = 0; r < kRows; ++r) out[r][0] = static_cast<double>(top[r]), out[r][1] = sums[r];
  }
};
struct SoftMinSums {
  double max = kLowest<double>, sum = 0;
  __device__ void add(const double (&x)[2]) {
    const double top = larger(max, x[0]);
    sum = sum * std::exp2(max - top) + x[1] * std::exp2(x[0] - top);
    max = top;
  }
  __device__ double value(double inv_eps) const { return (max + std::log2(sum)) / (kLog2e * inv_eps); }
};

// The same where eps is above the spread of C: eps log sum_j w_j exp(v_j/eps), v_j = g_j - C_ij, as
//   s + eps log1p(sum_j w_j expm1((v_j - s)/eps)),  s the largest v.
// A larger s' takes expm1(u) to expm1(u + d) = expm1(u) e^d + expm1(d), d = (s - s')/eps: all of one sign.
template <class A>
struct FlatRow {
  static constexpr int kSize = 3;
  A max = kLowest<A>;
  Sum<A> sum, weight;

  __device__ __forceinline__ void add(const View<A>& p, const A (&c)[kColumns], const Lane<A>& lane, double inv_eps) {
    const A inv = static_cast<A>(inv_eps);
    A t[kColumns], top = max, part = 0, mass = 0;
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      t[v] = std::fma(c[v], -p.scale, lane.score[v]);
      top = t[v] > top ? t[v] : top;
    }
    if (top > max) {
      const A d = std::expm1((max - top) * inv);
      sum *= 1 + d;
      sum.add(static_cast<A>(weight.value()) * d);
      max = top;
    }
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      const A w = lane.weight[v];
      part += w > 0 ? w * std::expm1((t[v] - top) * inv) : w;
      mass += w;
    }
    sum.add(part);
    weight.add(mass);
  }
  __device__ static void merge(const Team& warp, FlatRow (&rows)[kRows], double (&out)[kRows][kSize], double inv_eps) {
    A top[kRows];
    double sums[2 * kRows];
    for (int r = 0; r < kRows; ++r) top[r] = rows[r].max;
    warp.max(top);
    for (int r = 0; r < kRows; ++r) {
      const double mass = rows[r].weight.value(),
                   d = std::expm1((static_cast<double>(rows[r].max) - static_cast<double>(top[r])) * inv_eps);
      sums[r] = rows[r].sum.value() * (1 + d) + mass * d;
      sums[kRows + r] = mass;
    }
    warp.sum(sums);
    for (int r = 0; r < kRows; ++r)
      out[r][0] = static_cast<double>(top[r]), out[r][1] = sums[r], out[r][2] = sums[kRows + r];
  }
};
struct FlatSums {
  double max = kLowest<double>, sum = 0, weight = 0;
  __device__ void add(const double (&x)[3], double inv_eps) {
    const double top = larger(max, x[0]), d = std::expm1((max - top) * inv_eps), e = std::expm1((x[0] - top) * inv_eps);
    sum = (sum * (1 + d) + weight * d) + (x[1] * (1 + e) + x[2] * e);
    weight += x[2];
    max = top;
  }
  __device__ double value(double inv_eps) const { return max + std::log1p(sum) / inv_eps; }
};

// min_j and max_j C_ij + offset_j over the columns of weight above 0 and finite cost, and the largest whether finite or
// not. Of the smallest, its negative.
template <class A>
struct RangeRow {
  static constexpr int kSize = 3;
  A low = kNothing<A>, high = kNothing<A>, top = kNothing<A>;

  __device__ __forceinline__ void add(const View<A>& p, const A (&c)[kColumns], const Lane<A>& lane, double) {
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      if (lane.score[v] == kNothing<A>) continue;
      const A cost = std::fma(c[v], p.scale, lane.score[v]);
      low = -cost > low ? -cost : low, top = cost > top ? cost : top;
      high = cost > high && cost < -kNothing<A> ? cost : high;
    }
  }
  __device__ static void merge(const Team& warp, RangeRow (&rows)[kRows], double (&out)[kRows][kSize]) {
    A ends[kSize * kRows];
    for (int r = 0; r < kRows; ++r)
      ends[r] = rows[r].low, ends[kRows + r] = rows[r].high, ends[2 * kRows + r] = rows[r].top;
    warp.max(ends);
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < kSize; ++n) out[r][n] = static_cast<double>(ends[n * kRows + r]);
  }
};

// -- Problems on the device
// ---------------------------------------------------------------------------------------------

enum class Pass : int { Range, SoftMin, Flat };

// What is kept of a problem from one launch to the next.
struct Slot {
  Progress progress;
  double low, high;  // the range of its finite costs
  bool all_finite;   // no other costs are there
  bool started;      // the range is known

  __device__ Pass pass() const {
    return !started ? Pass::Range : all_finite && progress.pass_eps > high - low ? Pass::Flat : Pass::SoftMin;
  }
  __device__ Side side() const { return started ? progress.side : Side::Rows; }
  __device__ int status() const { return progress.converged ? kSinkhornConverged : kSinkhornStopped; }  // once done
  __device__ double inv_eps() const { return started ? 1 / progress.pass_eps : 1; }
};

// A call with its memory. Atoms are counted through the batch.
struct Solver {
  SinkhornSolve call;
  Slot* slots;
  double *log_a, *log_b;                        // log2 of the weights
  double *update, *residual, *last_r, *last_g;  // by column
  double *d_r, *d_g, *gram;
  void *score_a, *score_b, *weight_a, *weight_b;  // of the type of the pairs, what a pass reads of its columns
  double* partial;                                // what units leave: partial_size for each problem
  int64_t partial_size;
};

// The block's threads as a team of the iteration.
struct Block {
  Team team{kThreads, static_cast<int>(threadIdx.x)};

  template <class F>
  __device__ void each(int64_t n, const F& f) const {
    for (int64_t i = team.rank; i < n; i += kThreads) f(i);
  }
  template <int size, class F>
  __device__ void sums(int64_t n, double (&out)[size], const F& f) const {
    for (double& sum : out) sum = 0;
    each(n, [&](int64_t i) { f(i, out); });
    team.sum(out);
  }
  template <class F>
  __device__ double max(int64_t n, double start, const F& f) const {
    double top[1] = {start};
    each(n, [&](int64_t i) { top[0] = larger(top[0], f(i)); });
    team.max(top);
    return top[0];
  }
  __device__ bool leads() const { return team.rank == 0; }
  __device__ void sync() const { __syncthreads(); }
};

// One problem of a call.
template <class A>
class Work {
 public:
  Task task;

  __device__ Work(const Solver& solver, int64_t problem)
      : solver_(solver),
        problem_(problem),
        row_(solver.call.pairs.row_start[problem]),
        col_(solver.call.pairs.col_start[problem]) {
    const SinkhornSolve& c = solver.call;
    task.n = c.pairs.row_start[problem + 1] - row_, task.m = c.pairs.col_start[problem + 1] - col_;
    task.a = c.a + row_, task.b = c.b + col_;
    task.eps = c.eps[problem], task.rho_a = c.rho_a, task.rho_b = c.rho_b;
    task.symmetric = c.symmetric;
    task.rounding = static_cast<double>(std::numeric_limits<A>::epsilon());
    task.tol = c.tol, task.max_iter = c.max_iter;
    task.f = c.f + row_, task.g = c.g + col_;
    task.update = solver.update + col_, task.residual = solver.residual + col_;
    task.last_r = solver.last_r + col_, task.last_g = solver.last_g + col_;
    task.d_r = solver.d_r + col_ * kMemory, task.d_g = solver.d_g + col_ * kMemory;
    task.gram = solver.gram + problem * kMemory * kMemory;
  }

  // False where the values are none of a problem. Else the range of its costs is the first pass.
  __device__ bool begin(const Block& block) const {
    const double bad_a = logarithms(block, task.n, task.a, solver_.log_a + row_),
                 bad_b = logarithms(block, task.m, task.b, solver_.log_b + col_);
    double mass[2] = {};
    block.each(task.n, [&](int64_t i) { mass[0] += task.a[i]; });
    block.each(task.m, [&](int64_t j) { mass[1] += task.b[j]; });
    block.team.sum(mass);
    const bool equal = !(std::abs(mass[0] - mass[1]) > solver_.call.mass_rounding * larger(mass[0], mass[1]));
    A* const offset = columns(solver_.score_b, Side::Rows);
    block.each(task.m, [&](int64_t j) {
      offset[j] = task.b[j] > 0 ? static_cast<A>(column_offset(Side::Rows, j)) : kNothing<A>;
    });
    return task.eps > 0 && std::isfinite(task.eps) && bad_a + bad_b == 0 && mass[0] != 0 && mass[1] != 0 &&
           (equal || !task.balanced());
  }

  // The part of a pass that falls to a warp.
  template <int D>
  __device__ void run_unit(const Slot& slot, int64_t first_row, int64_t segment) const {
    const View<A> pairs(solver_.call.pairs, problem_, slot.side());
    if (first_row >= pairs.rows) return;
    switch (slot.pass()) {
      case Pass::Range:
        return run_unit_of<D, RangeRow<A>>(slot, pairs, first_row, segment);
      case Pass::SoftMin:
        return run_unit_of<D, SoftMinRow<A>>(slot, pairs, first_row, segment);
      case Pass::Flat:
        return run_unit_of<D, FlatRow<A>>(slot, pairs, first_row, segment);
    }
  }

  // After a pass: from what the units have left to the columns of the next one.
  __device__ void advance(const Block& block, Slot& slot) const {
    Iteration<Block> iteration(block, task, slot.progress);
    if (slot.started) {
      collect(block, slot);
      iteration.advance();
    } else {
      collect_range(block, slot);
      slot.started = true;
      iteration.start(slot.low, slot.high, slot.all_finite, solver_.call.warm);
    }
    if (!slot.progress.done) {
      prepare(block, slot);
    } else if (block.leads()) {
      const SinkhornSolve& c = solver_.call;
      c.value[problem_] = slot.progress.value;
      c.marginal_error[problem_] = slot.progress.marginal_error;
      c.iterations[problem_] = slot.progress.iterations;
    }
  }

 private:
  // log2 of weights; how many of them are none.
  __device__ double logarithms(const Block& block, int64_t n, const double* weight, double* out) const {
    double bad[1];
    block.sums(n, bad, [&](int64_t i, double(&count)[1]) {
      const double w = weight[i];
      out[i] = w > 0 ? std::log2(w) : kNoScore;
      count[0] += w < 0 || std::isinf(w) ? 1 : 0;
    });
    return bad[0];
  }

  // What belongs to the columns of a side.
  template <class T>
  __device__ T pick(Side side, T of_rows, T of_columns) const {
    return side == Side::Rows ? of_rows : of_columns;
  }
  __device__ A* columns(void* of_b, Side side, void* of_a = nullptr) const {
    return side == Side::Rows ? static_cast<A*>(of_b) + col_ : static_cast<A*>(of_a) + row_;
  }
  __device__ double offset(const double* of_atoms, int64_t at) const { return of_atoms == nullptr ? 0 : of_atoms[at]; }
  __device__ double column_offset(Side side, int64_t j) const {
    return side == Side::Rows ? offset(solver_.call.offset_y, col_ + j) : offset(solver_.call.offset_x, row_ + j);
  }
  __device__ double row_offset(Side side, int64_t i) const {
    return side == Side::Rows ? offset(solver_.call.offset_x, row_ + i) : offset(solver_.call.offset_y, col_ + i);
  }

  template <int D, class Row>
  __device__ void run_unit_of(const Slot& slot, const View<A>& pairs, int64_t first_row, int64_t segment) const {
    const Side side = slot.side();
    const A *const score = columns(solver_.score_b, side, solver_.score_a), *const weight =
                                                                                columns(solver_.weight_b, side,
                                                                                        solver_.weight_a);
    const double inv_eps = slot.inv_eps();
    const UnitRows<A, D> unit(pairs, first_row);
    const Team warp{kWarp, static_cast<int>(threadIdx.x) % kWarp};
    const int64_t length = segment_of(pairs.rows, pairs.cols), first = segment * length,
                  end = first + length < pairs.cols ? first + length : pairs.cols;
    Row rows[kRows];
    for (int64_t j = first; j < end; j += kStep) {
      int64_t col[kColumns];
      Lane<A> lane;
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const int64_t at = j + v * kWarp + warp.rank;
        const bool real = at < end;
        col[v] = real ? at : end - 1;
        lane.score[v] = real ? score[at] : kNothing<A>;
        lane.weight[v] = 0;
        if constexpr (std::is_same_v<Row, FlatRow<A>>) lane.weight[v] = real ? weight[at] : A(0);
      }
      A c[kRows][kColumns];
      raw_costs<A, D>(pairs, unit, col, c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) rows[r].add(pairs, c[r], lane, inv_eps);
    }
    double out[kRows][Row::kSize];
    if constexpr (std::is_same_v<Row, FlatRow<A>>)
      Row::merge(warp, rows, out, inv_eps);
    else
      Row::merge(warp, rows, out);
    if (warp.rank != 0) return;
    for (int r = 0; r < kRows; ++r)
      for (int n = 0; n < Row::kSize; ++n)
        if (first_row + r < pairs.rows) *part(slot, n, segment, first_row + r) = out[r][n];
  }

  __device__ int64_t rows(Side side) const { return pick(side, task.n, task.m); }
  __device__ int64_t cols(Side side) const { return pick(side, task.m, task.n); }
  __device__ double* part(const Slot& slot, int number, int64_t segment, int64_t row) const {
    const int64_t n = rows(slot.side()), segments = segments_of(n, cols(slot.side()));
    return solver_.partial + problem_ * solver_.partial_size + (number * segments + segment) * n + row;
  }

  __device__ void collect_range(const Block& block, Slot& slot) const {
    const int64_t segments = segments_of(task.n, task.m);
    const auto end = [&](int number, double sign) {
      return block.max(task.n, kNoScore, [&](int64_t i) {
        double top = kNoScore;
        for (int64_t q = 0; q < segments; ++q) top = larger(top, *part(slot, number, q, i));
        return task.a[i] > 0 ? top + sign * row_offset(Side::Rows, i) : kNoScore;
      });
    };
    slot.low = -end(0, -1), slot.high = end(1, 1), slot.all_finite = end(2, 1) < -kNoScore;
  }

  // The soft c-transform of a pass.
  __device__ void collect(const Block& block, const Slot& slot) const {
    const Side side = slot.side();
    const bool flat = slot.pass() == Pass::Flat;
    const int64_t segments = segments_of(rows(side), cols(side));
    double* const out = side == Side::Rows && !task.symmetric ? task.f : task.update;
    const double inv_eps = slot.inv_eps(),
                 shift = flat ? std::log(pick(side, slot.progress.mass_b, slot.progress.mass_a)) / inv_eps : 0;
    block.each(rows(side), [&](int64_t i) {
      double value;
      if (flat) {
        FlatSums all;
        for (int64_t q = 0; q < segments; ++q)
          all.add({*part(slot, 0, q, i), *part(slot, 1, q, i), *part(slot, 2, q, i)}, inv_eps);
        value = all.value(inv_eps) + shift;
      } else {
        SoftMinSums all;
        for (int64_t q = 0; q < segments; ++q) all.add({*part(slot, 0, q, i), *part(slot, 1, q, i)});
        value = all.value(inv_eps);
      }
      out[i] = row_offset(side, i) - value;
    });
  }

  __device__ void prepare(const Block& block, const Slot& slot) const {
    const Side side = slot.side();
    const bool flat = slot.pass() == Pass::Flat;
    A *const score = columns(solver_.score_b, side, solver_.score_a), *const weight = columns(solver_.weight_b, side,
                                                                                              solver_.weight_a);
    const double* const w = pick(side, task.b, task.a);
    const double* const log_w = pick(side, solver_.log_b + col_, solver_.log_a + row_);
    const double* const potential = side == Side::Rows && !task.symmetric ? task.g : task.f;
    const double mass = pick(side, slot.progress.mass_b, slot.progress.mass_a), inv_eps = slot.inv_eps();
    block.each(cols(side), [&](int64_t j) {
      const double g = potential[j] - column_offset(side, j);
      const bool counts = w[j] > 0;
      if (flat) {
        score[j] = counts ? static_cast<A>(g) : kNothing<A>;
        weight[j] = static_cast<A>(w[j] / mass);
      } else {
        score[j] = counts ? static_cast<A>(log_w[j] + g * inv_eps * kLog2e) : kNothing<A>;
      }
    });
  }

  const Solver& solver_;
  int64_t problem_, row_, col_;
};

// -- Kernels of the solver
// ------------------------------------------------------------------------------------------------

template <class A>
__global__ void __launch_bounds__(kThreads) begin(const Solver solver) {
  const int64_t problem = blockIdx.x;
  const Block block;
  const bool valid = Work<A>(solver, problem).begin(block);
  if (!block.leads()) return;
  solver.slots[problem] = Slot{};
  solver.call.status[problem] = valid ? kSinkhornRuns : kSinkhornInvalid;
}

template <class A, int D>
__global__ void __launch_bounds__(kThreads) run_pass(const Solver solver, int64_t blocks) {
  const int64_t problem = blockIdx.x / blocks, at = blockIdx.x % blocks;
  if (solver.call.status[problem] != kSinkhornRuns) return;
  const Work<A> work(solver, problem);
  const Slot& slot = solver.slots[problem];
  const bool of_rows = slot.side() == Side::Rows;
  const int64_t rows = of_rows ? work.task.n : work.task.m, cols = of_rows ? work.task.m : work.task.n,
                row_blocks = row_blocks_of(rows), segment = at / row_blocks;
  if (segment >= segments_of(rows, cols)) return;
  work.template run_unit<D>(slot, at % row_blocks * kBlockRows + static_cast<int>(threadIdx.x) / kWarp * kRows,
                            segment);
}

template <class A>
__global__ void __launch_bounds__(kThreads) advance(const Solver solver) {
  const int64_t problem = blockIdx.x;
  if (solver.call.status[problem] != kSinkhornRuns) return;
  const Block block;
  Slot slot = solver.slots[problem];
  Work<A>(solver, problem).advance(block, slot);
  block.sync();  // all have read what is written now
  if (!block.leads()) return;
  solver.slots[problem] = slot;
  if (slot.progress.done) solver.call.status[problem] = slot.status();
}

template <class A, int D>
__global__ void __launch_bounds__(kThreads) solve_small(const Solver solver) {
  const int64_t problem = blockIdx.x;
  const Block block;
  const Work<A> work(solver, problem);
  Slot slot{};
  const bool valid = work.begin(block);
  while (valid && !slot.progress.done) {
    block.sync();  // the columns are ready
    const bool of_rows = slot.side() == Side::Rows;
    const int64_t rows = of_rows ? work.task.n : work.task.m, cols = of_rows ? work.task.m : work.task.n,
                  groups = over(rows, int64_t{kRows}), units = groups * segments_of(rows, cols);
    for (int64_t unit = static_cast<int>(threadIdx.x) / kWarp; unit < units; unit += kWarps)
      work.template run_unit<D>(slot, unit % groups * kRows, unit / groups);
    block.sync();  // the units' sums are there
    work.advance(block, slot);
  }
  if (block.leads()) solver.call.status[problem] = valid ? slot.status() : kSinkhornInvalid;
}

// -- Sums of pair weights --------------------------------------------------------------------------------------------

// z e^z - e^z + 1, by its series (k - 1)/k! z^k near 0, where the direct form cancels.
template <class A>
__device__ __forceinline__ A entropy_density(A z, A e) {
  constexpr int kTerms = 13;
  A y = 0;
#pragma unroll
  for (int k = kTerms + 1; k >= 2; --k) {
    double coefficient = k - 1;
#pragma unroll
    for (int l = 2; l <= k; ++l) coefficient /= l;
    y = std::fma(y, z, static_cast<A>(coefficient));
  }
  return std::abs(z) < A(0.5) ? y * z * z : std::fma(z, e, 1 - e);
}

template <class A>
__device__ __forceinline__ A entry(const void* of, int64_t at) {
  return of == nullptr ? A(0) : static_cast<const A*>(of)[at];
}

// The problem that an atom belongs to.
__device__ inline int64_t problem_of(const int64_t* start, int64_t problems, int64_t atom) {
  int64_t first = 0, last = problems;
  while (last - first > 1) {
    const int64_t middle = (first + last) / 2;
    (start[middle] <= atom ? first : last) = middle;
  }
  return first;
}

// A warp takes a row, its lanes the columns.
template <class A>
__global__ void __launch_bounds__(kThreads) pair_sweep(const PairSweep k, const SweepBatch batch) {
  constexpr int kTile = 8;  // columns of a lane at a time
  const Pairs& p = k.pairs;
  const int64_t i = int64_t{blockIdx.x} * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (i >= p.rows) return;
  const Team warp{kWarp, static_cast<int>(threadIdx.x) % kWarp};
  const int64_t problem = problem_of(batch.row_start, batch.problems, i), first = batch.col_start[problem],
                cols = batch.col_start[problem + 1] - first, start = batch.row_start[problem];
  const A *const x = static_cast<const A*>(p.x), *const y = static_cast<const A*>(p.y) + first;
  // Of a matrix, where the row starts; matrices lie one after another.
  const int64_t entry_of_row = start * cols + (i - start) * p.row_stride;

  const A scale = p.cost == kHalfSqEuclidean ? A(0.5) : A(1), inv_eps = static_cast<A>(1 / batch.eps[problem]);
  // Only between two weightless atoms can e^z overflow and P become 0 * inf: z is cut where no other pair comes. Below
  // the floor e^z is 0, and stays so when multiplied by z: infinite costs are there.
  const A cut = sizeof(A) == 4 ? A(80) : A(300), floor = A(-1e4);
  const bool points = p.cost != kCostMatrix, euclidean = p.cost == kEuclidean;
  const bool moves = points && (k.vx != nullptr || k.vy != nullptr);
  const bool wants_d = k.lambda != 0 && (moves || k.v_matrix != nullptr || k.veps != 0), second = k.second && moves;
  const A f = static_cast<A>(k.f[i]), a = k.a == nullptr ? A(1) : static_cast<A>(k.a[i]),
          alpha = static_cast<A>(k.alpha + (k.alpha_row == nullptr ? 0 : k.alpha_row[i])),
          row_p = k.p == nullptr ? A(0) : static_cast<A>(k.p[i]), lambda = static_cast<A>(k.lambda),
          veps = static_cast<A>(k.veps);

  // |x - y|^2, |x - y| or C; along: <x - y, vx - vy>
  const auto raw_cost = [&](int64_t j, A& along) {
    if (!points) return static_cast<const A*>(p.matrix)[entry_of_row + j * p.col_stride];
    A raw = 0;
    for (int64_t n = 0; n < p.dims; ++n) {
      const A d = x[n * p.x_stride + i] - y[n * p.y_stride + j];
      raw = std::fma(d, d, raw);
      if (wants_d && moves)
        along = std::fma(d, entry<A>(k.vx, n * p.x_stride + i) - entry<A>(k.vy, n * p.y_stride + first + j), along);
    }
    return euclidean ? std::sqrt(raw) : raw;
  };
  const auto exponent_of = [&](int64_t j, A c) { return (f + (entry<A>(k.g, first + j) - c)) * inv_eps; };
  A largest[1] = {0};
  if (batch.over_largest) {
    largest[0] = -std::numeric_limits<A>::infinity();
    for (int64_t j = warp.rank; j < cols; j += kWarp) {
      A along = 0;
      const A exponent = exponent_of(j, raw_cost(j, along) * scale);
      if (static_cast<const A*>(k.b)[first + j] > 0 && exponent > largest[0]) largest[0] = exponent;
    }
    warp.reduce(largest, [](A s, A t) { return s < t ? t : s; });
  }

  Sum<A> sum, sum_cost, sum_z, entropy;
  for (int64_t tile = 0; tile < cols; tile += kTile * kWarp) {
    // Of the tile: Q, Q times the factor of d1C, and what multiplies vx - vy.
    A weight[kTile], pull[kTile], push[kTile];
#pragma unroll
    for (int v = 0; v < kTile; ++v) {
      const int64_t j = tile + v * kWarp + warp.rank, col = first + j;
      weight[v] = pull[v] = push[v] = 0;
      if (j >= cols) continue;
      A along = 0;
      const A raw = raw_cost(j, along), c = raw * scale, exponent = exponent_of(j, c) - largest[0],
              z = exponent > cut     ? cut
                  : exponent < floor ? floor
                                     : exponent;
      const A e = exp2_of(z * static_cast<A>(kLog2e)), b = static_cast<const A*>(k.b)[col];
      // The factor of x - y in d1C.
      const A factor = euclidean ? (raw > 0 ? 1 / raw : A(0)) : p.cost == kSqEuclidean ? A(2) : A(1);
      A bracket = alpha + entry<A>(k.beta, col);
      if (wants_d) {
        const A change =
            k.v_matrix == nullptr ? A(0) : static_cast<const A*>(k.v_matrix)[entry_of_row + j * p.col_stride];
        bracket = std::fma(lambda, change + factor * along + veps * z, bracket);
      }
      for (int64_t n = 0; n < k.rank; ++n)
        bracket = std::fma(entry<A>(k.t, n * p.x_stride + i), entry<A>(k.v, n * p.y_stride + col), bracket);
      const A plan = e * a * b, q = plan * bracket + e * (b * row_p + a * entry<A>(k.q, col));
      weight[v] = q;
      pull[v] = q * factor;
      if (second) {
        push[v] = plan * factor;
        if (euclidean) pull[v] -= plan * along * factor * factor * factor;
      }
      sum.add(q);
      sum_cost.add(q == 0 ? q : q * c);
      sum_z.add(q * z);
      if (k.entropy != nullptr) entropy.add(b * entropy_density(z, e));
      if (k.matrix_out != nullptr) static_cast<A*>(k.matrix_out)[entry_of_row + j * p.col_stride] = q;
    }
    // Each lane keeps the entries that it has stored.
    const auto store = [&](void* to, int64_t entries, int64_t n, A part) {
      A total[1] = {part};
      warp.reduce(total, [](A s, A t) { return s + t; });
      if (n % kWarp != warp.rank) return;
      A& out = static_cast<A*>(to)[i * entries + n];
      out = tile == 0 ? total[0] : out + total[0];
    };
    if (k.gradient != nullptr)
      for (int64_t n = 0; n < p.dims; ++n) {
        const A xn = x[n * p.x_stride + i], vn = entry<A>(k.vx, n * p.x_stride + i);
        A part = 0;
#pragma unroll
        for (int v = 0; v < kTile; ++v) {
          const int64_t j = tile + v * kWarp + warp.rank;
          if (j >= cols) continue;
          part = std::fma(pull[v], xn - y[n * p.y_stride + j], part);
          if (second) part = std::fma(push[v], vn - entry<A>(k.vy, n * p.y_stride + first + j), part);
        }
        store(k.gradient, p.dims, n, part);
      }
    for (int64_t n = 0; n < k.payload_dims; ++n) {
      A part = 0;
#pragma unroll
      for (int v = 0; v < kTile; ++v) {
        const int64_t j = tile + v * kWarp + warp.rank;
        if (j < cols) part = std::fma(weight[v], entry<A>(k.payload, n * p.y_stride + first + j), part);
      }
      store(k.product, k.payload_dims, n, part);
    }
  }
  double sums[] = {sum.value(), sum_cost.value(), sum_z.value(), entropy.value()};
  warp.sum(sums);
  if (warp.rank != 0) return;
  double* const to[] = {k.sum, k.sum_cost, k.sum_z, k.entropy};
#pragma unroll
  for (int n = 0; n < 4; ++n)
    if (to[n] != nullptr) to[n][i] = sums[n];
}

// -- Launchers -------------------------------------------------------------------------------------------------------

constexpr int64_t kSmallSide = 256;

bool is_small(const SinkhornSolve& c) {
  for (int64_t s = 0; s < c.pairs.problems; ++s)
    if (c.rows_at[s + 1] - c.rows_at[s] > kSmallSide || c.cols_at[s + 1] - c.cols_at[s] > kSmallSide) return false;
  return true;
}

// f(rows, cols) at its largest over the problems and sides of a call.
template <class F>
int64_t most(const SinkhornSolve& c, const F& f) {
  int64_t result = 0;
  for (int64_t s = 0; s < c.pairs.problems; ++s) {
    const int64_t n = c.rows_at[s + 1] - c.rows_at[s], m = c.cols_at[s + 1] - c.cols_at[s];
    result = std::max({result, f(n, m), f(m, n)});
  }
  return result;
}

// Memory for a call; how many doubles that takes.
int64_t lay_out(const SinkhornSolve& c, double* base, Solver& solver) {
  const int64_t rows = c.rows_at[c.pairs.problems], cols = c.cols_at[c.pairs.problems], problems = c.pairs.problems;
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    double* const at = base == nullptr ? nullptr : base + used;
    used += count;
    return at;
  };
  static_assert(alignof(Slot) <= alignof(double));
  solver.call = c;
  solver.slots = reinterpret_cast<Slot*>(take(problems * over(sizeof(Slot), sizeof(double))));
  solver.log_a = take(rows), solver.log_b = take(cols);
  for (double** v : {&solver.update, &solver.residual, &solver.last_r, &solver.last_g}) *v = take(cols);
  solver.d_r = take(cols * kMemory), solver.d_g = take(cols * kMemory),
  solver.gram = take(problems * kMemory * kMemory);
  solver.score_a = take(rows), solver.score_b = take(cols), solver.weight_a = take(rows), solver.weight_b = take(cols);
  solver.partial_size = 3 * most(c, [](int64_t n, int64_t m) { return n * segments_of(n, m); });
  solver.partial = take(problems * solver.partial_size);
  return used;
}

dim3 grid_of(int64_t blocks) {
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "sinkhorn: the batch takes ", blocks,
              " blocks, more than CUDA's grid has");
  return dim3(static_cast<unsigned>(blocks));
}

// f.template operator()<A, D>(). In double, whose arithmetic takes longer than finding the coordinates, D is kAnyDims:
// a solve with its own D would not find room in registers.
template <class F>
void dispatch_pairs(const PairBatch& p, const F& f) {
  const auto with_type = [&]<class A>() {
    if (p.cost == kCostMatrix) return f.template operator()<A, kMatrix>();
    if constexpr (std::is_same_v<A, float>) {
      if (p.dims == 2) return f.template operator()<A, 2>();
      if (p.dims == 3) return f.template operator()<A, 3>();
    }
    return f.template operator()<A, kAnyDims>();
  };
  p.is_double ? with_type.template operator()<double>() : with_type.template operator()<float>();
}

}  // namespace

int64_t sinkhorn_workspace(const SinkhornSolve& call) {
  Solver solver{};
  return lay_out(call, nullptr, solver);
}

void sinkhorn_begin(const SinkhornSolve& call, double* workspace, Stream stream) {
  if (call.pairs.problems == 0) return;
  Solver solver{};
  lay_out(call, workspace, solver);
  const dim3 grid = grid_of(call.pairs.problems), block(kThreads);
  if (is_small(call)) {
    dispatch_pairs(call.pairs, [&]<class A, int D>() { TD_LAUNCH((solve_small<A, D>), grid, block, stream, solver); });
  } else {
    dispatch_pairs(call.pairs, [&]<class A, int D>() { TD_LAUNCH(begin<A>, grid, block, stream, solver); });
  }
}

void sinkhorn_passes(const SinkhornSolve& call, int64_t passes, double* workspace, Stream stream) {
  if (call.pairs.problems == 0 || is_small(call)) return;
  Solver solver{};
  lay_out(call, workspace, solver);
  const int64_t blocks = most(call, [](int64_t n, int64_t m) { return row_blocks_of(n) * segments_of(n, m); });
  const dim3 grid = grid_of(call.pairs.problems * blocks), block(kThreads), problems = grid_of(call.pairs.problems);
  dispatch_pairs(call.pairs, [&]<class A, int D>() {
    for (int64_t pass = 0; pass < passes; ++pass) {
      TD_LAUNCH((run_pass<A, D>), grid, block, stream, solver, blocks);
      TD_LAUNCH(advance<A>, problems, block, stream, solver);
    }
  });
}

void sinkhorn_pair_sweep(const PairSweep& call, const SweepBatch& batch, Stream stream) {
  if (call.pairs.rows == 0) return;
  const dim3 grid = grid_of(over(call.pairs.rows, kWarps)), block(kThreads);
  if (call.pairs.is_double)
    TD_LAUNCH(pair_sweep<double>, grid, block, stream, call, batch);
  else
    TD_LAUNCH(pair_sweep<float>, grid, block, stream, call, batch);
}

}  // namespace torch_divergence::cuda
