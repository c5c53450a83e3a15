// CUDA kernels of KL divergence; formulas in kl_div.h, rows of logits in kl_div_rows.cuh, teams and rows in
// core/cuda_rows.cuh.
//
// Two families, as on the CPU. Both sides in logits: one visit of the row gives the far form and, around a centre
// guessed from the row's first classes, the near one; a near row whose centre was a bad guess is visited again.
// Its arithmetic on classes is in float (double for double), with compensated sums; only what a team's threads leave is
// merged in double. Everything else, and the double backward: the plain formulas in double, which nothing less makes as
// accurate where P and Q are near each other or P has its mass on one class.
#include <limits>

#include "core/cuda_launch.cuh"
#include "kl_div/kl_div_rows.cuh"

namespace torch_divergence::cuda {
namespace {

constexpr int kReductions = 2, kBackward = 3;

// -- Both sides in logits -------------------------------------------------------------------------------------------

template <class TP, class TQ>
__global__ void __launch_bounds__(kThreads, kBlocks<TP>)
    forward_logits(const KlDivForward k, const RowGrid grid, double* workspace, int launch) {
  forward_row(k, grid, workspace, launch, &KlDivStat::kl, [&](const RowTask& task, KlDivStat& stat) {
    LogitRows<TP, TQ> rows(k.rows, task.row);
    const Pieces pieces(k.rows.classes, rows.p, rows.q);
    const double inv_t = inverse_temperature<Arithmetic<TP>>(k.rows.temperature);
    return kl_of_logits(task, 0, rows, pieces, inv_t, stat);
  });
}

template <class TP, class TQ>
__global__ void __launch_bounds__(kThreads, kBlocks<TP>)
    backward_logits(const KlDivBackward k, const RowGrid grid, double* workspace, int launch) {
  kl_gradients<TP, TQ, KlDivStat::kSize>(k, grid, workspace, launch);
}

// -- Any space ------------------------------------------------------------------------------------------------------

// Gradient of KL with respect to each side's entries, before the row's coefficient. l_kl = l - KL.
__device__ double gradient_p(const Side& side, bool infinite, double p, double l, double l_kl) {
  if (p == 0 || (side.space == kLogits && infinite)) return 0;
  if (side.space == kLogits) return p * l_kl * side.inv_t;
  return side.space == kProbs ? l + 1 : p * (l + 1);
}
__device__ double gradient_q(const Side& side, double mass, double p, double q) {
  if (side.space == kLogits) return (q * mass - p) * side.inv_t;
  if (side.space == kLogProbs) return -p;
  return p == 0 ? 0 : -p / q;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    forward_any(const KlDivForward k, const RowGrid grid, double* workspace, int launch) {
  forward_row(k, grid, workspace, launch, &KlDivStat::kl, [&](const RowTask& task, KlDivStat& stat) {
    AnyRows<T> rows(k.rows, task.row);
    const Pieces pieces(k.rows.classes, rows.p, rows.q);
    const double inv = 1 / k.rows.temperature;
    if (k.rows.p_space == kLogits || k.rows.q_space == kLogits) {
      RowPointer<const char> logits = rows.q;  // assigned: a reference to either would have to be in memory
      if (k.rows.p_space == kLogits) logits = rows.p;
      Lse lse;
      const auto part = [&] { return lse_of_pieces<T>(task, pieces, logits, inv); };
      if (!task.reduce(0, lse, part, [&](const Lse& x) { return merged(task.team, x, inv); })) return false;
      const double value = lse.finish(1 / inv, stat.mean_lo);
      (k.rows.p_space == kLogits ? stat.lse_p : stat.lse_q) = value;
    }
    const Side p_side(k.rows.p_space, inv, stat.lse_p, stat.mean_lo),
        q_side(k.rows.q_space, inv, stat.lse_q, stat.mean_lo);
    Sums<2> sums;
    const auto part = [&] {
      Sum<double> kl, mass;
      task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
        double kl_part = 0, mass_part = 0;
        const auto add = [&](double x, double, double log_x, double log_y, double l, int) {
          // p = 0: no term, but a NaN of q stays one, and a p that only underflowed meets q = 0 with +inf.
          double absent = std::isnan(log_y) ? log_y : 0;
          if (log_x > -kInf<double> && log_y == -kInf<double>) absent = kInf<double>;
          kl_part += x == 0 ? absent : x * l;
          mass_part += x;
        };
        rows.for_classes(pieces, piece, p_side, q_side, add);
        kl.add(kl_part), mass.add(mass_part);
      });
      return Sums<2>{{kl.value(), mass.value()}};
    };
    if (!task.reduce(1, sums, part, [&](const Sums<2>& x) { return merged(task.team, x); })) return false;
    stat.kl = sums.x[0], stat.mean = sums.x[1];
    return true;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_any(const KlDivBackward k, const RowGrid grid, double* workspace, int launch) {
  using Rows = AnyRows<T>;
  constexpr int K = Rows::K;
  backward_pair<T, T, Rows>(k, grid, workspace, launch, [&](const RowTask& task, const BackwardPair<Rows>& pair) {
    const auto stat = KlDivStat::load(k.stat + KlDivStat::kSize * task.row);
    const double inv = 1 / k.rows.temperature;
    const Side p_side(k.rows.p_space, inv, stat.lse_p, stat.mean_lo),
        q_side(k.rows.q_space, inv, stat.lse_q, stat.mean_lo);
    const double c = pair.coefficient, kl = stat.kl, mass = stat.mean;
    const bool infinite = std::isinf(stat.kl);
    task.for_pieces<T>(pair.pieces, [&](const Piece<T>& piece) {
      double g_p[K], g_q[K];
      pair.rows.for_classes(pair.pieces, piece, p_side, q_side,
                            [&](double x, double y, double, double, double l, int i) {
                              g_p[i] = c * gradient_p(p_side, infinite, x, l, l - kl);
                              g_q[i] = c * gradient_q(q_side, mass, x, y);
                            });
      pair.store(piece, g_p, g_q);
    });
  });
}

// With dots for derivatives along (v_p, v_q):  (log p). = (v - <p,v>)/T | v | v/p  for logits | log_probs | probs,
// p. = p (log p). (v for probs), l. = (log p). - (log q)., and
//   P's gradient.   [p. (l - KL) + p (l. - KL.)]/T | p. (l + 1) + p l. | l.
//   Q's gradient.   [q (log q). m + q m. - p.]/T | -p. | (p (log q). - p.)/q      m = sum p
// KL. = <v, gradient>. Where p = 0, P's gradient is constantly 0 by convention, and so is its derivative.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    double_backward(const KlDivDoubleBackward k, const RowGrid grid, double* workspace, int launch) {
  constexpr int K = kPiece<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const DoubleBackwardPair<T, AnyRows<T>> pair(k, task.row);
  const Pieces& pieces = pair.pieces;
  const auto stat = KlDivStat::load(k.stat + KlDivStat::kSize * task.row);
  const bool both_logits = k.rows.from_logits(), infinite = std::isinf(stat.kl);
  const double inv_t = both_logits ? inverse_temperature<Arithmetic<T>>(k.rows.temperature) : 1 / k.rows.temperature,
               rest = both_logits ? 0 : stat.mean_lo;
  Side p_side(k.rows.p_space, inv_t, stat.lse_p, rest), q_side(k.rows.q_space, inv_t, stat.lse_q, rest);
  const Split<double> centre(stat.mean, stat.mean_lo);
  const double kl = stat.kl, mass = both_logits ? 1 : stat.mean;

  double off_centre = 0;  // E_p[u], which is not 0 where the mean was summed from classes far from it
  // f(p, q, l, l - KL, v_p, v_q, k, is q 0 and not just too small for double) for the classes of a piece.
  const auto for_classes = [&](const Piece<T>& piece, const auto& f) {
    double t[K], s[K], a[K], b[K];
    load_piece(pair.rows.p, pieces, piece, p_side.padding, t);
    load_piece(pair.rows.q, pieces, piece, q_side.padding, s);
    pair.load_directions(piece, a, b);
    const bool both_probs = p_side.space == kProbs && q_side.space == kProbs;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      double x, log_x, y, log_y;
      p_side.read(t[i], x, log_x);
      q_side.read(s[i], y, log_y);
      // From logits l - KL = u, from the exact difference.
      const double l = log_ratio(both_probs, x, y, log_x, log_y),
                   u = both_logits ? difference_minus(t[i], s[i], centre) * inv_t - off_centre : l - kl;
      f(x, y, both_logits ? u + kl : l, u, a[i], b[i], i, log_y == -kInf<double>);
    }
  };
  Sums<5> means;
  const auto part_means = [&] {
    Sums<5> sums;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      for_classes(piece, [&](double p, double q, double, double u, double a, double b, int, bool) {
        sums.x[0] += p_side.space == kProbs ? a : p * a;
        sums.x[1] += q_side.space == kProbs ? b : q * b;
        sums.x[2] += p == 0 ? 0 : p * u;
        sums.x[3] += p, sums.x[4] += q;
      });
    });
    return sums;
  };
  if (!task.reduce(0, means, part_means, [&](const auto& x) { return merged(task.team, x); })) return;
  double mean_p = means.x[0], mean_q = means.x[1];
  if (both_logits) {
    // The forward summed in less than double: a row with all of its mass on one class, where 1 - p is all that counts,
    // would show it.
    p_side.factor /= means.x[3], q_side.factor /= means.x[4];
    mean_p /= means.x[3], mean_q /= means.x[4];
    if (!infinite) off_centre = means.x[2] / means.x[3];
  }
  Sums<2> dots;
  const auto part_dots = [&] {
    Sums<2> sums;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      for_classes(piece, [&](double p, double q, double l, double u, double a, double b, int, bool) {
        double g_q = gradient_q(q_side, mass, p, q);
        if (both_logits && std::fabs(l) < 0.5) g_q = p * (phi_small(l) - l) * inv_t;  // q - p, near
        sums.x[0] += a == 0 ? 0 : a * gradient_p(p_side, infinite, p, l, u);
        sums.x[1] += b == 0 ? 0 : b * g_q;
      });
    });
    return sums;
  };
  if (!task.reduce(1, dots, part_dots, [&](const auto& x) { return merged(task.team, x); })) return;
  const double kl_dot = dots.x[0] + dots.x[1];
  if (!pair.more_than(k, task, kl_dot)) return;
  const double c = pair.coefficient, mass_dot = p_side.space == kLogits ? 0 : mean_p;
  task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    double h_p[K], h_q[K];
    for_classes(piece, [&](double p, double q, double l, double u, double a, double b, int i, bool none_q) {
      double log_p_dot = p_side.space == kLogits ? (a - mean_p) * inv_t : p_side.space == kProbs ? a / p : a;
      if (p == 0) log_p_dot = 0;
      const double p_dot = p_side.space == kProbs ? a : p * log_p_dot;
      double log_q_dot = q_side.space == kLogits ? (b - mean_q) * inv_t : q_side.space == kProbs ? b / q : b;
      if (none_q) log_q_dot = 0;
      const double l_dot = log_p_dot - log_q_dot;
      if (p == 0 || (p_side.space == kLogits && infinite)) {
        h_p[i] = 0;
      } else if (p_side.space == kLogits) {
        h_p[i] = c * ((p_dot * u + p * (l_dot - kl_dot)) * inv_t);
      } else {
        h_p[i] = c * (p_side.space == kLogProbs ? p_dot * (l + 1) + p * l_dot : l_dot);
      }
      if (q_side.space == kLogits) {
        h_q[i] = c * ((q * (log_q_dot * mass + mass_dot) - p_dot) * inv_t);
      } else if (q_side.space == kLogProbs) {
        h_q[i] = c * -p_dot;
      } else {
        h_q[i] = none_q ? c * 0 : c * ((p * log_q_dot - p_dot) / q);
      }
    });
    pair.store(piece, h_p, h_q);
  });
}

}  // namespace

int64_t kl_div_workspace(int64_t rows, int64_t classes) { return RowGrid(rows, classes).workspace(kBackward); }

void kl_div_forward(const KlDivForward& k, int64_t rows, double* workspace, Stream stream) {
  if (!k.rows.from_logits())
    return dispatch_any(k.rows.p.dtype,
                        [&]<class T>() { launch_rows(&forward_any<T>, k, rows, workspace, stream, kReductions); });
  dispatch_types(k.rows, [&]<class TP, class TQ>() {
    launch_rows(&forward_logits<TP, TQ>, k, rows, workspace, stream, kReductions);
  });
}

void kl_div_backward(const KlDivBackward& k, int64_t rows, double* workspace, Stream stream) {
  if (!k.rows.from_logits())
    return dispatch_any(k.rows.p.dtype,
                        [&]<class T>() { launch_rows(&backward_any<T>, k, rows, workspace, stream, 0); });
  dispatch_types(k.rows, [&]<class TP, class TQ>() {
    launch_rows(&backward_logits<TP, TQ>, k, rows, workspace, stream, kBackward);
  });
}

void kl_div_double_backward(const KlDivDoubleBackward& k, int64_t rows, double* workspace, Stream stream) {
  dispatch_any(k.rows.p.dtype,
               [&]<class T>() { launch_rows(&double_backward<T>, k, rows, workspace, stream, kReductions); });
}

}  // namespace torch_divergence::cuda
