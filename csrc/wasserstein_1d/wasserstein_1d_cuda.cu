// CUDA kernels of optimal transport on the line; formulas in wasserstein_1d.h, teams and rows in core/cuda_rows.cuh.
// In double for all types, as the sweep of the CPU. Points lie where their order has put them: neighbours are read one
// by one, through the caches.
#include <c10/macros/Macros.h>

#include "core/cuda_launch.cuh"
#include "core/cuda_rows.cuh"
#include "wasserstein_1d/wasserstein_1d.h"

namespace torch_divergence::cuda {
namespace {

// One side of a row.
template <class T>
class Line {
 public:
  int64_t size;

  __device__ Line(const SortedRows& rows, int64_t row)
      : size(rows.size),
        position_(rows.positions, row),
        cumulative_(rows.cumulative != nullptr ? rows.cumulative + row * rows.size : nullptr) {}

  __device__ double position(int64_t i) const { return static_cast<double>(load_entry<T>(position_, i)); }
  // The mass up to and with point i. Equal quotients round equally, so that uniform sides coincide exactly.
  __device__ double cumulative(int64_t i) const {
    if (i < 0) return 0;
    return cumulative_ != nullptr ? cumulative_[i] : static_cast<double>(i + 1) / static_cast<double>(size);
  }
  __device__ double mass() const { return cumulative(size - 1); }

 private:
  RowPointer<const char> position_;
  const double* cumulative_;
};

// A row's two sides; the points of `own` are worked on.
template <class T>
struct Lines {
  Line<T> own, other;
  PowerCost cost;
  double mass, tolerance;

  __device__ Lines(const LineRows& rows, int64_t row) : own(rows.own, row), other(rows.other, row), cost{rows.p} {
    const double a = own.mass(), b = other.mass();
    mass = a < b ? a : b;
    tolerance = mass * rows.tolerance;
    CUDA_KERNEL_ASSERT(std::fabs(a - b) <= rows.mass_tolerance * (a > b ? a : b) &&
                       "wasserstein_1d: a and b have different masses");
  }

  // How many of other's points the staircase has left when it leaves own's point i, or, for -1, begins.
  __device__ int64_t left_before(int64_t i, bool own_first) const { return left_before(i, own_first, tolerance); }
  __device__ int64_t left_before(int64_t i, bool own_first, double apart) const {
    const int64_t last = other.size - 1;
    if (i < 0) return 0;
    if (i == own.size - 1) return last;
    const double a = own.cumulative(i);
    int64_t low = 0, high = last;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const double gap = a - other.cumulative(middle);
      if (own_first ? gap <= apart : gap < -apart) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // f(j, w) for the cells of own's point i that hold mass.
  template <class F>
  __device__ void for_cells(int64_t i, bool own_first, const F& f) const {
    const int64_t last = left_before(i, own_first, 0);
    const double own_before = own.cumulative(i - 1), own_after = i + 1 == own.size ? mass : own.cumulative(i);
    for (int64_t j = left_before(i - 1, own_first, 0); j <= last; ++j) {
      const double other_before = other.cumulative(j - 1);
      double before = own_before > other_before ? own_before : other_before,
             after = j < last ? other.cumulative(j) : own_after;
      if (before > mass) before = mass;  // masses may differ by their rounding
      if (after > mass) after = mass;
      if (after > before) f(j, after - before);
    }
  }
  __device__ double cost_of(int64_t i, int64_t j) const { return cost(own.position(i) - other.position(j)); }
};

// f(i) for this thread's points of the row, or of its team's segment.
template <class F>
__device__ void for_points(const RowTask& task, int64_t size, const F& f) {
  const Pieces pieces(size);
  task.for_pieces<double>(pieces, [&](const Piece<double>& piece) {
    for (int k = 0; k < kPiece<double>; ++k)
      if (piece.at(k) < size) f(piece.at(k));
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    forward(const LineForward k, const RowGrid grid, double* workspace, int launch) {
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const Lines<T> lines(k.rows, task.row);
  Sums<1> loss;
  const auto part = [&] {
    Sums<1> sum;
    for_points(task, lines.own.size, [&](int64_t i) {
      lines.for_cells(i, true, [&](int64_t j, double w) { sum.x[0] += w * lines.cost_of(i, j); });
    });
    return sum;
  };
  if (!task.reduce(0, loss, part, [&](const Sums<1>& x) { return merged(task.team, x); })) return;
  if (task.writes()) static_cast<T*>(k.loss)[task.row] = static_cast<T>(loss.x[0]);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    backward(const LineBackward k, const RowGrid grid, double* workspace, int launch) {
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const Lines<T> lines(k.rows, task.row);
  const RowPointer<char> slopes(k.slopes, task.row);
  const double c = k.coefficient[task.row];
  for_points(task, lines.own.size, [&](int64_t i) {
    if (slopes.data != nullptr) {
      double sum = 0;
      lines.for_cells(i, k.own_is_u, [&](int64_t j, double w) {
        sum += c * w * lines.cost.slope(lines.own.position(i) - lines.other.position(j));
      });
      store_entry<T>(slopes, i, sum);
    }
    if (k.steps == nullptr) return;
    const auto grown = [&](bool own_first) {
      const int64_t j = lines.left_before(i - 1, own_first);
      return lines.cost_of(i, j) - lines.cost_of(i - 1, j);
    };
    const double step = i == 0 ? lines.cost_of(0, 0) / 2 : (grown(true) + grown(false)) / 2;
    k.steps[task.row * lines.own.size + i] = step;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    tree(const LineTree k, const RowGrid grid, double* workspace, int launch) {
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const Lines<T> lines(k.rows, task.row);
  const int64_t edges = task.row * (lines.own.size + lines.other.size - 1);
  for_points(task, lines.own.size, [&](int64_t i) {
    const int64_t last = lines.left_before(i, k.own_first);
    for (int64_t j = lines.left_before(i - 1, k.own_first); j <= last; ++j)
      k.own[edges + i + j] = i, k.other[edges + i + j] = j;
  });
}

struct RunningSums {
  RowsIn values;
  int64_t size;
  bool weights;
  double* sums;
};

// A block a row, a stretch of it a thread. Running sums of what is not negative never fall: each stretch begins at
// exactly what the one before ends at.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) row_running_sums(const RunningSums k) {
  __shared__ double parts[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x, length = (k.size + kThreads - 1) / kThreads, first = thread * length,
                last = first + length < k.size ? first + length : k.size;
  const RowPointer<const char> values(k.values, row);
  double sum = 0;
  for (int64_t i = first; i < last; ++i) {
    const auto x = static_cast<double>(load_entry<T>(values, i));
    if (k.weights)
      CUDA_KERNEL_ASSERT(x >= 0 && std::isfinite(x) && "wasserstein_1d: weights are negative or not finite");
    sum += x;
  }
  parts[thread] = sum;
  __syncthreads();
  double before = 0;
  for (int t = 0; t < thread; ++t) before += parts[t];
  sum = 0;
  for (int64_t i = first; i < last; ++i) {
    sum += static_cast<double>(load_entry<T>(values, i));
    k.sums[row * k.size + i] = before + sum;
  }
}

template <class Call, class F, class D>
void launch_lines(F in_float, D in_double, const Call& call, int64_t rows, double* workspace, Stream stream,
                  int reductions) {
  launch_rows(call.rows.own.positions.dtype == DType::Double ? in_double : in_float, call,
              RowGrid(rows, call.rows.own.size), workspace, stream, reductions);
}

}  // namespace

void running_sums(const RowsIn& values, int64_t size, bool weights, double* sums, int64_t rows, Stream stream) {
  if (rows == 0) return;
  TORCH_CHECK(rows <= std::numeric_limits<int>::max(), "torch_divergence: ", rows, " rows are more than CUDA's grid");
  const RunningSums call{values, size, weights, sums};
  const dim3 grid(static_cast<unsigned>(rows));
  if (values.dtype == DType::Double) {
    TD_LAUNCH(row_running_sums<double>, grid, dim3(kThreads), stream, call);
  } else {
    TD_LAUNCH(row_running_sums<float>, grid, dim3(kThreads), stream, call);
  }
}

int64_t wasserstein_1d_workspace(int64_t rows, int64_t size) { return RowGrid(rows, size).workspace(1); }

void wasserstein_1d_forward(const LineForward& k, int64_t rows, double* workspace, Stream stream) {
  launch_lines(&forward<float>, &forward<double>, k, rows, workspace, stream, 1);
}

void wasserstein_1d_backward(const LineBackward& k, int64_t rows, Stream stream) {
  launch_lines(&backward<float>, &backward<double>, k, rows, nullptr, stream, 0);
}

void wasserstein_1d_tree(const LineTree& k, int64_t rows, Stream stream) {
  launch_lines(&tree<float>, &tree<double>, k, rows, nullptr, stream, 0);
}

}  // namespace torch_divergence::cuda
