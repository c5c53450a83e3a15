// CUDA kernels of KL divergence; formulas in kl_div.h, teams and rows in core/cuda_rows.cuh.
//
// Two families, as on the CPU. Both sides in logits: one visit of the row gives the far form and, around a centre
// guessed from the row's first classes, the near one; a near row whose centre was a bad guess is visited again.
// Its arithmetic on classes is in float (double for double), with compensated sums; only what a team's threads leave is
// merged in double. Everything else, and the double backward: the plain formulas in double, which nothing less makes as
// accurate where P and Q are near each other or P has its mass on one class.
#include <limits>

#include "core/cuda_launch.cuh"
#include "core/cuda_row_pair.cuh"
#include "kl_div/kl_div.h"

namespace torch_divergence::cuda {
namespace {

constexpr int kReductions = 2;

__device__ void store_row(const KlDivForward& k, int64_t row, double weight, const KlDivStat& stat) {
  stat.store(k.stat + KlDivStat::kSize * row);
  store_loss(k, row, weight != 0 ? weight * stat.kl : 0);
}

// -- Both sides in logits -------------------------------------------------------------------------------------------

// A row's sums, as a segment leaves them.
struct RowVisit : KlDivVisit<double> {
  __device__ static RowVisit load(const double* x) {
    RowVisit v;
    v.max_p = x[0], v.max_q = x[1], v.sum_p = x[2], v.sum_q = x[3], v.shift = x[4], v.phi = x[5];
    v.infinite = x[6] != 0;
    return v;
  }
  __device__ void store(double* x) const {
    x[0] = max_p, x[1] = max_q, x[2] = sum_p, x[3] = sum_q, x[4] = shift, x[5] = phi, x[6] = infinite ? 1 : 0;
  }
};

// What a visit starts from: a centre, and about where the maxima are.
struct Start {
  double centre, centre_lo, max_p, max_q;
};

// A thread's sums, and those of one piece.
template <class A>
class ThreadVisit {
 public:
  KlDivVisit<A, Sum<A>> sums;

  __device__ ThreadVisit(const Start& start, double inv_t)
      : centre_(start.centre, start.centre_lo),
        rough_centre_(start.centre),
        inv_t_(inv_t),
        above_(static_cast<A>(sums.kAbove / inv_t)),
        scale_(static_cast<A>(inv_t)),
        exp_(inv_t) {
    sums.max_p = static_cast<A>(start.max_p), sums.max_q = static_cast<A>(start.max_q);
    q_to_p_ = sums.q_to_p(rough_centre_, inv_t_);
  }

  template <int K>
  __device__ __forceinline__ void add(const A (&t)[K], const A (&s)[K]) {
    A top_p = t[0], top_q = s[0];
#pragma unroll
    for (int k = 1; k < K; ++k) top_p = t[k] > top_p ? t[k] : top_p, top_q = s[k] > top_q ? s[k] : top_q;
    if (top_p > sums.max_p + above_ || top_q > sums.max_q + above_) {
      sums.raise(top_p, top_q, rough_centre_, inv_t_);
      q_to_p_ = sums.q_to_p(rough_centre_, inv_t_);
    }
    PieceSums piece;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const A x = exp_.near(t[k] - sums.max_p), y = exp_.near(s[k] - sums.max_q);
      piece.p += x, piece.q += y;
      add_near(piece, t[k], s[k], x, y);
    }
    if (!std::isfinite(piece.p + piece.q + piece.shift + piece.phi)) piece = masked(t, s);
    sums.sum_p.add(piece.p), sums.sum_q.add(piece.q), sums.shift.add(piece.shift), sums.phi.add(piece.phi);
  }

 private:
  struct PieceSums {
    A p = 0, q = 0, shift = 0, phi = 0;
  };

  __device__ __forceinline__ void add_near(PieceSums& piece, A t, A s, A x, A y) const {
    const A u = difference_minus(t, s, centre_) * scale_, x_u = x * u;
    piece.shift += x_u;
    piece.phi += std::fabs(u) < A(0.5) ? x * phi_small(u) : std::fma(y, q_to_p_, x_u - x);
  }
  // The sums of classes among which there are infinities or NaN.
  template <int K>
  __device__ __forceinline__ PieceSums masked(const A (&t)[K], const A (&s)[K]) {
    PieceSums piece;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const A x = t[k] == -kInf<A> ? 0 : exp_(t[k] - sums.max_p), y = s[k] == -kInf<A> ? 0 : exp_(s[k] - sums.max_q);
      piece.p += x, piece.q += y;
      if (s[k] == -kInf<A>) {
        sums.infinite = sums.infinite || t[k] > -kInf<A>;
      } else if (x == 0) {
        piece.phi += y * q_to_p_;
      } else {
        add_near(piece, t[k], s[k], x, y);
      }
    }
    return piece;
  }

  Split<A> centre_;
  double rough_centre_, inv_t_;
  A above_, scale_, q_to_p_;
  Exp<A> exp_;
};

__device__ double value_of(double x) { return x; }
template <class A>
__device__ double value_of(const Sum<A>& x) {
  return x.value();
}

template <class Visit>
__device__ RowVisit merged(const Team& team, Visit visit, double centre, double inv_t) {
  decltype(visit.max_p) top[2] = {visit.max_p, visit.max_q};
  team.max(top);
  visit.raise(top[0], top[1], centre, inv_t);
  double sums[5] = {value_of(visit.sum_p), value_of(visit.sum_q), value_of(visit.shift), value_of(visit.phi),
                    visit.infinite ? 1.0 : 0.0};
  team.sum(sums);
  RowVisit whole;
  whole.max_p = top[0], whole.max_q = top[1];
  whole.sum_p = sums[0], whole.sum_q = sums[1], whole.shift = sums[2], whole.phi = sums[3];
  whole.infinite = sums[4] != 0;
  return whole;
}

template <class TP, class TQ>
struct LogitRows : LogitPair<TP, TQ> {
  using Pair = LogitPair<TP, TQ>;
  using Pair::K;
  using Pair::load;
  using Pair::Pair;
  using typename Pair::A;

  // From the row's first classes, one piece a thread: the maxima, and E_p[t - s] as the centre.
  __device__ Start guess(const Team& team, const Pieces& pieces, double inv_t) const {
    A t[K], s[K], top[2] = {-kInf<A>, -kInf<A>};
    load(pieces, pieces.piece<TP>(team.rank, team.size), t, s);
    for (int k = 0; k < K; ++k) top[0] = t[k] > top[0] ? t[k] : top[0], top[1] = s[k] > top[1] ? s[k] : top[1];
    team.max(top);
    const Exp<A> exp(inv_t);
    A mass = 0, mean = 0;
    for (int k = 0; k < K; ++k)
      if (s[k] > -kInf<A> && t[k] > -kInf<A>) {
        const A x = exp(t[k] - top[0]);
        mass += x, mean += x * (t[k] - s[k]);
      }
    double sums[2] = {static_cast<double>(mass), static_cast<double>(mean)};
    team.sum(sums);
    const A centre = static_cast<A>(sums[1] / sums[0]);
    return {std::isfinite(centre) ? static_cast<double>(centre) : 0, 0, static_cast<double>(top[0]),
            static_cast<double>(top[1])};
  }

  // Sums over the row, as reduction `number` of the task.
  __device__ bool visit(const RowTask& task, int number, const Pieces& pieces, const Start& start, double inv_t,
                        RowVisit& whole) const {
    return task.reduce(
        number, whole,
        [&] {
          ThreadVisit<A> visit(start, inv_t);
          task.for_pieces<TP>(pieces, [&](const Piece<TP>& piece) {
            A t[K], s[K];
            load(pieces, piece, t, s);
            visit.add(t, s);
          });
          return visit.sums;
        },
        [&](const auto& part) { return merged(task.team, part, start.centre, inv_t); });
  }
};

template <class TP, class TQ>
__global__ void __launch_bounds__(kThreads, kBlocks<TP>)
    forward_logits(const KlDivForward k, const RowGrid grid, double* workspace, int launch) {
  using Rows = LogitRows<TP, TQ>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const double weight = weight_of(k.weight, task.row);
  KlDivStat stat{};
  if (weight != 0) {
    Rows rows(k.rows, task.row);
    const Pieces pieces(k.rows.classes, rows.p, rows.q);
    const double inv_t = inverse_temperature<typename Rows::A>(k.rows.temperature), t = 1 / inv_t;
    const Start start = rows.guess(task.team, pieces, inv_t);
    RowVisit visit;
    if (!rows.visit(task, 0, pieces, start, inv_t, visit)) return;
    if (!visit.finish(start.centre, 0, t, stat)) {
      const Start again{stat.mean, stat.mean_lo, visit.max_p, visit.max_q};
      if (!rows.visit(task, 1, pieces, again, inv_t, visit)) return;
      visit.finish(again.centre, again.centre_lo, t, stat);
    }
  }
  if (task.writes()) store_row(k, task.row, weight, stat);
}

// The class with more than half of P's mass, and the sums of the other classes' gradients.
struct Peak {
  double at = -1;
  double others_p = 0, others_q = 0;

  __device__ static Peak load(const double* x) { return {x[0], x[1], x[2]}; }
  __device__ void store(double* x) const { x[0] = at, x[1] = others_p, x[2] = others_q; }
};
__device__ Peak merged(const Team& team, const Peak& part) {
  double at[1] = {part.at}, others[2] = {part.others_p, part.others_q};
  team.max(at);
  team.sum(others);
  return {at[0], others[0], others[1]};
}

template <class TP, class TQ>
__global__ void __launch_bounds__(kThreads, kBlocks<TP>)
    backward_logits(const KlDivBackward k, const RowGrid grid, double* workspace, int launch) {
  using Rows = LogitRows<TP, TQ>;
  using A = typename Rows::A;
  constexpr int K = Rows::K;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  Rows rows(k.rows, task.row);
  RowPointer<char> grad_p(k.grad_p, task.row), grad_q(k.grad_q, task.row);
  const Pieces pieces(k.rows.classes, rows.p, rows.q, grad_p, grad_q);
  const double coefficient = k.coefficient[task.row];
  if (coefficient == 0) {
    if (!task.first_launch()) return;
    store_zeros<TP>(task, grad_p, pieces);
    store_zeros<TQ>(task, grad_q, pieces);
    return;
  }
  auto stat = KlDivStat::load(k.stat + KlDivStat::kSize * task.row);
  const double inv = inverse_temperature<A>(k.rows.temperature);
  const bool want_p = grad_p.data != nullptr, want_q = grad_q.data != nullptr, near = stat.kl < kKlNear,
             infinite = std::isinf(stat.kl);
  const Exp<A> exp(inv);
  const Split<A> lse_p(stat.lse_p), lse_q(stat.lse_q);
  // P's gradient is p u, and the classes that share P's mass may have a u far smaller than what the mean was summed
  // from: the far form takes the mean's error, E_p[t - s - mean], from a second look.
  if (want_p && !near && !infinite) {
    const Split<A> centre(stat.mean, stat.mean_lo);
    Sums<1> error;
    const auto part_error = [&] {
      Sum<A> sum;
      task.for_pieces<TP>(pieces, [&](const Piece<TP>& piece) {
        A t[K], s[K], part = 0;
        rows.load(pieces, piece, t, s);
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const A x = exp(t[i] - lse_p.hi);  // without its factor: an error's digits are not needed
          part += x == 0 ? 0 : x * difference_minus(t[i], s[i], centre);
        }
        sum.add(part);
      });
      return Sums<1>{{sum.value()}};
    };
    if (!task.reduce(0, error, part_error, [&](const auto& x) { return merged(task.team, x); })) return;
    stat.set_mean(stat.mean, stat.mean_lo + error.x[0]);
  }
  Peak peak;
  const auto part = [&] {
    const Split<A> centre(stat.mean, stat.mean_lo);
    const A factor_p = static_cast<A>(std::exp(-static_cast<double>(lse_p.lo) * inv)),
            factor_q = static_cast<A>(std::exp(-static_cast<double>(lse_q.lo) * inv)),
            c = static_cast<A>(coefficient * inv), inv_t = static_cast<A>(inv), kl = static_cast<A>(stat.kl);
    int64_t at = -1;
    Sum<A> others_p, others_q;
    task.for_pieces<TP>(pieces, [&](const Piece<TP>& piece) {
      A t[K], s[K], x[K], u[K];
      rows.load(pieces, piece, t, s);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        x[i] = exp(t[i] - lse_p.hi) * factor_p;
        u[i] = difference_minus(t[i], s[i], centre) * inv_t;
        if (x[i] > A(0.5)) at = piece.at(i);
      }
      A g[K], others = 0;
      if (want_p) {
#pragma unroll
        for (int i = 0; i < K; ++i) {
          g[i] = infinite || x[i] == 0 ? 0 : c * x[i] * u[i];
          others += x[i] > A(0.5) ? 0 : g[i];
        }
        others_p.add(others);
        store_piece(grad_p, pieces, piece, g);
      }
      if (want_q) {
        others = 0;
#pragma unroll
        for (int i = 0; i < K; ++i) {
          const A v = u[i] + kl;
          g[i] =
              c * (near && std::fabs(v) < A(0.5) ? x[i] * (phi_small(v) - v) : exp(s[i] - lse_q.hi) * factor_q - x[i]);
          others += x[i] > A(0.5) ? 0 : g[i];
        }
        others_q.add(others);
        store_piece(grad_q, pieces, Piece<TQ>{piece.first, piece.gap}, g);
      }
    });
    return Peak{static_cast<double>(at), others_p.value(), others_q.value()};
  };
  if (!task.reduce(1, peak, part, [&](const Peak& x) { return merged(task.team, x); })) return;
  if (peak.at < 0) return;
  __syncwarp();  // a team that is one warp has met no barrier since the class was written
  if (!task.writes()) return;
  const auto at = static_cast<int64_t>(peak.at);
  if (want_p) store_entry<TP>(grad_p, at, static_cast<A>(-peak.others_p));
  if (want_q) store_entry<TQ>(grad_q, at, static_cast<A>(-peak.others_q));
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
  using Rows = AnyRows<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const double weight = weight_of(k.weight, task.row);
  KlDivStat stat{};
  if (weight != 0) {
    Rows rows{{k.rows.p, task.row}, {k.rows.q, task.row}};
    const Pieces pieces(k.rows.classes, rows.p, rows.q);
    const double inv = 1 / k.rows.temperature;
    if (k.rows.p_space == kLogits || k.rows.q_space == kLogits) {
      RowPointer<const char> logits = rows.q;  // assigned: a reference to either would have to be in memory
      if (k.rows.p_space == kLogits) logits = rows.p;
      Lse lse;
      const auto part = [&] { return lse_of_pieces<T>(task, pieces, logits, inv); };
      if (!task.reduce(0, lse, part, [&](const Lse& x) { return merged(task.team, x, inv); })) return;
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
    if (!task.reduce(1, sums, part, [&](const Sums<2>& x) { return merged(task.team, x); })) return;
    stat.kl = sums.x[0], stat.mean = sums.x[1];
  }
  if (task.writes()) store_row(k, task.row, weight, stat);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_any(const KlDivBackward k, const RowGrid grid, double* workspace, int launch) {
  using Rows = AnyRows<T>;
  constexpr int K = Rows::K;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  Rows rows{{k.rows.p, task.row}, {k.rows.q, task.row}};
  RowPointer<char> grad_p(k.grad_p, task.row), grad_q(k.grad_q, task.row);
  const Pieces pieces(k.rows.classes, rows.p, rows.q, grad_p, grad_q);
  const double coefficient = k.coefficient[task.row];
  if (coefficient == 0) {
    store_zeros<T>(task, grad_p, pieces);
    store_zeros<T>(task, grad_q, pieces);
    return;
  }
  const auto stat = KlDivStat::load(k.stat + KlDivStat::kSize * task.row);
  const double inv = 1 / k.rows.temperature;
  const Side p_side(k.rows.p_space, inv, stat.lse_p, stat.mean_lo),
      q_side(k.rows.q_space, inv, stat.lse_q, stat.mean_lo);
  const double c = coefficient, kl = stat.kl, mass = stat.mean;
  const bool infinite = std::isinf(stat.kl);
  task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    double g_p[K], g_q[K];
    rows.for_classes(pieces, piece, p_side, q_side, [&](double x, double y, double, double, double l, int i) {
      g_p[i] = c * gradient_p(p_side, infinite, x, l, l - kl);
      g_q[i] = c * gradient_q(q_side, mass, x, y);
    });
    if (grad_p.data != nullptr) store_piece(grad_p, pieces, piece, g_p);
    if (grad_q.data != nullptr) store_piece(grad_q, pieces, piece, g_q);
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
  RowPointer<const char> row_p(k.rows.p, task.row), row_q(k.rows.q, task.row);
  RowPointer<const char> v_p(k.v_p, task.row), v_q(k.v_q, task.row);
  RowPointer<char> d_p(k.d_p, task.row), d_q(k.d_q, task.row);
  const Pieces pieces(k.rows.classes, row_p, row_q, v_p, v_q, d_p, d_q);
  const auto stat = KlDivStat::load(k.stat + KlDivStat::kSize * task.row);
  const bool both_logits = k.rows.from_logits(), infinite = std::isinf(stat.kl);
  const double inv_t = both_logits ? inverse_temperature<Arithmetic<T>>(k.rows.temperature) : 1 / k.rows.temperature,
               coefficient = k.coefficient[task.row];
  const double rest = both_logits ? 0 : stat.mean_lo;
  Side p_side(k.rows.p_space, inv_t, stat.lse_p, rest), q_side(k.rows.q_space, inv_t, stat.lse_q, rest);
  const Split<double> centre(stat.mean, stat.mean_lo);
  const double kl = stat.kl, mass = both_logits ? 1 : stat.mean;

  double off_centre = 0;  // E_p[u], which is not 0 where the mean was summed from classes far from it
  // f(p, q, l, l - KL, v_p, v_q, k, is q 0 and not just too small for double) for the classes of a piece.
  const auto for_classes = [&](const Piece<T>& piece, const auto& f) {
    double t[K], s[K], a[K] = {}, b[K] = {};
    load_piece(row_p, pieces, piece, p_side.padding, t);
    load_piece(row_q, pieces, piece, q_side.padding, s);
    if (v_p.data != nullptr) load_piece(v_p, pieces, piece, 0.0, a);
    if (v_q.data != nullptr) load_piece(v_q, pieces, piece, 0.0, b);
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
  if (k.d_coefficient != nullptr && task.writes()) k.d_coefficient[task.row] = dots.x[0] + dots.x[1];
  if (coefficient == 0) {
    store_zeros<T>(task, d_p, pieces);
    store_zeros<T>(task, d_q, pieces);
    return;
  }
  if (d_p.data == nullptr && d_q.data == nullptr) return;
  const double c = coefficient, kl_dot = dots.x[0] + dots.x[1], mass_dot = p_side.space == kLogits ? 0 : mean_p;
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
    if (d_p.data != nullptr) store_piece(d_p, pieces, piece, h_p);
    if (d_q.data != nullptr) store_piece(d_q, pieces, piece, h_q);
  });
}

}  // namespace

int64_t kl_div_workspace(int64_t rows, int64_t classes) { return RowGrid(rows, classes).workspace(kReductions); }

void kl_div_forward(const KlDivForward& k, int64_t rows, double* workspace, Stream stream) {
  if (!k.rows.from_logits())
    return launch_rows(k.rows.p.dtype == DType::Double ? &forward_any<double> : &forward_any<AnyFloat>, k, rows,
                       workspace, stream, kReductions);
  dispatch_types(k.rows, [&]<class TP, class TQ>() {
    launch_rows(&forward_logits<TP, TQ>, k, rows, workspace, stream, kReductions);
  });
}

void kl_div_backward(const KlDivBackward& k, int64_t rows, double* workspace, Stream stream) {
  if (!k.rows.from_logits())
    return launch_rows(k.rows.p.dtype == DType::Double ? &backward_any<double> : &backward_any<AnyFloat>, k, rows,
                       workspace, stream, 0);
  dispatch_types(k.rows, [&]<class TP, class TQ>() {
    launch_rows(&backward_logits<TP, TQ>, k, rows, workspace, stream, kReductions);
  });
}

void kl_div_double_backward(const KlDivDoubleBackward& k, int64_t rows, double* workspace, Stream stream) {
  launch_rows(k.rows.p.dtype == DType::Double ? &double_backward<double> : &double_backward<AnyFloat>, k, rows,
              workspace, stream, kReductions);
}

}  // namespace torch_divergence::cuda
