// Optimal transport on the line: formulas and the sweep over two sorted rows.
//
//   W_p^p = integral_0^m |Q_u(t) - Q_v(t)|^p dt,    Q the quantile functions, m the common mass
//         = sum over cells (i, j) of (the mass t for which Q_u = u_i and Q_v = v_j) |u_i - v_j|^p
//
// (Vallender, "Calculation of the Wasserstein distance between probability distributions on the line", 1974; Peyre and
// Cuturi, "Computational Optimal Transport", 2019, section 2.6). Going through t the cells form a staircase from
// (0, 0) to (N-1, M-1) that advances i at the cumulative masses A_i and j at B_j: N + M - 1 cells, the edges of a
// spanning tree (transport_tree.h). Where A_i = B_j it may advance either way; the loss and the positions' gradients
// are the same, the weights' potentials are not. Their mean, over advancing u first and v first, is the mean of the two
// one-sided derivatives. Masses that differ by rounding alone count as equal there; the loss takes all as they are.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/cuda_stream.h"
#include "core/host_device.h"
#include "core/rows.h"

namespace torch_divergence {

// |d|^p. The slope at 0 is 0, also for p = 1, where it jumps from -1 to 1.
struct PowerCost {
  double p;

  TD_HOST_DEVICE double operator()(double d) const {
    return p == 1 ? std::fabs(d) : p == 2 ? d * d : std::pow(std::fabs(d), p);
  }
  TD_HOST_DEVICE double slope(double d) const {
    if (p == 2) return 2 * d;
    const double sign = d > 0 ? 1 : d < 0 ? -1 : d;  // 0, or NaN
    return p == 1 || sign == 0 ? sign : sign * p * std::pow(std::fabs(d), p - 1);
  }
};

// Cumulative masses closer than this, relative to the whole, coincide: the rounding of weights of a type with this
// epsilon, and of their summation.
inline double rounding_of_masses(int64_t points, double epsilon) {
  return std::max(4 * epsilon, static_cast<double>(points) * std::numeric_limits<double>::epsilon());
}

template <class T>
struct Strided {
  const T* data = nullptr;
  int64_t stride = 1;
  double operator[](int64_t i) const { return static_cast<double>(data[i * stride]); }
};

// One side of a row: sorted positions, and weights in their order or null for uniform ones.
template <class T>
struct SortedSide {
  int64_t size;
  Strided<T> position, weight;

  bool uniform() const { return weight.data == nullptr; }
  double weight_of(int64_t i) const { return uniform() ? 1 / static_cast<double>(size) : weight[i]; }
  // The mass up to and with i, from that before i. Equal quotients round equally, so that uniform sides coincide
  // exactly.
  double cumulative(int64_t i, double before) const {
    return uniform() ? static_cast<double>(i + 1) / static_cast<double>(size) : before + weight[i];
  }
  double mass() const {
    if (uniform()) return 1;
    double sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += weight[i];
    return sum;
  }
};

// Calls step(i, j, t, along_u) where the staircase leaves the cell (i, j), at cumulative mass t, for (i + 1, j) or
// (i, j + 1), and last(i, j, m) at its end. exact: only equal cumulative masses coincide.
template <class T, class Step, class Last>
void staircase(const SortedSide<T>& u, const SortedSide<T>& v, bool u_first, const Step& step, const Last& last,
               bool exact = false) {
  const double mass_u = u.mass(), mass_v = v.mass(), mass = std::min(mass_u, mass_v);
  const double tolerance = exact || (u.uniform() && v.uniform())
                               ? 0
                               : mass * rounding_of_masses(u.size + v.size, std::numeric_limits<T>::epsilon());
  double a = u.cumulative(0, 0), b = v.cumulative(0, 0);
  int64_t i = 0, j = 0;
  while (i + 1 < u.size || j + 1 < v.size) {
    const double gap = a - b;
    const bool along_u = i + 1 < u.size && (j + 1 == v.size || gap < -tolerance || (u_first && gap <= tolerance));
    step(i, j, along_u ? a : b, along_u);
    if (along_u) {
      a = u.cumulative(++i, a);
    } else {
      b = v.cumulative(++j, b);
    }
  }
  last(i, j, mass);
}

// Calls cell(i, j, w) for the cells that hold mass.
template <class T, class Cell>
void transport_cells(const SortedSide<T>& u, const SortedSide<T>& v, double mass, const Cell& cell) {
  double before = 0;
  const auto up_to = [&](int64_t i, int64_t j, double t) {
    t = std::min(t, mass);  // masses may differ by their rounding
    if (t > before) {
      cell(i, j, t - before);
      before = t;
    }
  };
  staircase(
      u, v, true, [&](int64_t i, int64_t j, double t, bool) { up_to(i, j, t); }, up_to, /*exact=*/true);
}

template <class T>
double wasserstein_1d(const SortedSide<T>& u, const SortedSide<T>& v, const PowerCost& cost) {
  double sum = 0;
  transport_cells(u, v, std::min(u.mass(), v.mass()),
                  [&](int64_t i, int64_t j, double w) { sum += w * cost(u.position[i] - v.position[j]); });
  return sum;
}

// c times the derivatives by the positions, added to du (N) and dv (M).
template <class T>
void wasserstein_1d_positions(const SortedSide<T>& u, const SortedSide<T>& v, const PowerCost& cost, double c,
                              double* du, double* dv) {
  transport_cells(u, v, std::min(u.mass(), v.mass()), [&](int64_t i, int64_t j, double w) {
    const double slope = c * w * cost.slope(u.position[i] - v.position[j]);
    du[i] += slope;
    dv[j] -= slope;
  });
}

// c times the potentials f (N) and g (M), the derivatives by the weights, with <a, f> = <b, g>.
template <class T>
void wasserstein_1d_potentials(const SortedSide<T>& u, const SortedSide<T>& v, const PowerCost& cost, double c,
                               double* f, double* g) {
  std::fill_n(f, u.size, 0);
  std::fill_n(g, v.size, 0);
  for (const bool u_first : {true, false}) {
    double of_cell = cost(u.position[0] - v.position[0]), fi = of_cell / 2, gj = of_cell / 2;
    f[0] += fi / 2;
    g[0] += gj / 2;
    staircase(
        u, v, u_first,
        [&](int64_t i, int64_t j, double, bool along_u) {
          const double next =
              along_u ? cost(u.position[i + 1] - v.position[j]) : cost(u.position[i] - v.position[j + 1]);
          if (along_u) {
            fi += next - of_cell;
            f[i + 1] += fi / 2;
          } else {
            gj += next - of_cell;
            g[j + 1] += gj / 2;
          }
          of_cell = next;
        },
        [](int64_t, int64_t, double) {});
  }
  double af = 0, bg = 0;
  for (int64_t i = 0; i < u.size; ++i) af += u.weight_of(i) * f[i];
  for (int64_t j = 0; j < v.size; ++j) bg += v.weight_of(j) * g[j];
  const double mass = u.mass() + v.mass(), shift = mass > 0 ? (bg - af) / mass : 0;
  for (int64_t i = 0; i < u.size; ++i) f[i] = c * (f[i] + shift);
  for (int64_t j = 0; j < v.size; ++j) g[j] = c * (g[j] - shift);
}

// On CUDA a point knows its own cells: those of u_i are (i, j) for j from where the staircase enters row i to where it
// leaves it, at the first B_j that is not before A_i. So every point is worked on by itself, and no two threads add to
// one number.

// One side of all rows: sorted positions, float or double, and cumulative weights, contiguous; null: uniform.
struct SortedRows {
  RowsIn positions;
  const double* cumulative;
  int64_t size;
};
struct LineRows {
  SortedRows own, other;
  double p;
  double tolerance;       // of steps and trees: rounding_of_masses(), 0 where both sides are uniform
  double mass_tolerance;  // relative, of what may differ between the two masses
};
// out[i] = the loss, float or double as the positions.
struct LineForward {
  LineRows rows;
  void* loss;
};
// slopes (rows x own.size) = coefficient[i] times the derivatives by own's positions; steps: what the potentials of
// own's points, whose running sums they are, grow by from the point before, the mean of both ways of the staircase.
struct LineBackward {
  LineRows rows;
  const double* coefficient;
  bool own_is_u;
  RowsOut slopes;
  double* steps;  // null: not wanted
};
// The staircase's cells (own point, other point), which advances own first where both may advance, or last.
struct LineTree {
  LineRows rows;
  bool own_first;
  int64_t *own, *other;  // rows x (own.size + other.size - 1)
};

// All rows, on a stream. Weights that are negative, not finite or of masses that differ are device-side assertions.
namespace cuda {
// sums[i] = running sums of values' row i, double. `weights`: they are checked, and of float or double; else of double.
void running_sums(const RowsIn& values, int64_t size, bool weights, double* sums, int64_t rows, Stream);
int64_t wasserstein_1d_workspace(int64_t rows, int64_t size);
void wasserstein_1d_forward(const LineForward&, int64_t rows, double* workspace, Stream);
void wasserstein_1d_backward(const LineBackward&, int64_t rows, Stream);
void wasserstein_1d_tree(const LineTree&, int64_t rows, Stream);
}  // namespace cuda

}  // namespace torch_divergence
