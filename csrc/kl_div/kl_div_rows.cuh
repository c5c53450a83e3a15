// Rows of KL divergence from logits on CUDA, in float for float and the half types. The counterpart of kl_div_rows.h,
// for kl_div and cross_entropy.
#pragma once
#include <cmath>

#include "core/cuda_row_pair.cuh"
#include "kl_div/kl_div.h"

namespace torch_divergence::cuda {

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

inline __device__ double value_of(double x) { return x; }
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

// A row's statistics, by reductions `number` and the next. False: they are left to the next launch.
template <class TP, class TQ>
__device__ bool kl_of_logits(const RowTask& task, int number, const LogitRows<TP, TQ>& rows, const Pieces& pieces,
                             double inv_t, KlDivStat& stat) {
  const double t = 1 / inv_t;
  const Start start = rows.guess(task.team, pieces, inv_t);
  RowVisit visit;
  if (!rows.visit(task, number, pieces, start, inv_t, visit)) return false;
  if (!visit.finish(start.centre, 0, t, stat)) {
    const Start again{stat.mean, stat.mean_lo, visit.max_p, visit.max_q};
    if (!rows.visit(task, number + 1, pieces, again, inv_t, visit)) return false;
    visit.finish(again.centre, again.centre_lo, t, stat);
  }
  return true;
}

// p and q of a class and q - p. Where p and q are near each other it is p expm1(-v), v = log p - log q from the logits'
// difference: two exponentials would leave nothing.
template <class A>
struct Gap {
  Split<A> difference, lse_p, lse_q;
  A inv_t, factor_p, factor_q;
  Exp<A> exp;

  __device__ Gap(const KlDivStat& stat, double inv)
      : Gap(stat.log_ratio_centre(1 / inv), Split<A>(stat.lse_p), Split<A>(stat.lse_q), inv) {}
  __device__ __forceinline__ A p(A t) const { return exp(t - lse_p.hi) * factor_p; }
  __device__ __forceinline__ A operator()(A p, A t, A s) const {
    const A v = difference_minus(t, s, difference) * inv_t;
    return std::fabs(v) < A(0.5) ? p * (phi_small(v) - v) : exp(s - lse_q.hi) * factor_q - p;
  }

 private:
  __device__ Gap(const ExactSum& at, const Split<A>& p, const Split<A>& q, double inv)
      : difference(at.sum, at.error),
        lse_p(p),
        lse_q(q),
        inv_t(static_cast<A>(inv)),
        factor_p(static_cast<A>(std::exp(-static_cast<double>(p.lo) * inv))),
        factor_q(static_cast<A>(std::exp(-static_cast<double>(q.lo) * inv))),
        exp(inv) {}
};

// What the gradients of a row leave: the class with more than half of P's mass and the sums of the other classes'
// entries; sum q - p, which is 0 at the right lse_p - lse_q, the largest |q - p| and the largest p of those classes.
struct Written {
  double at = -1;
  double others_p = 0, others_q = 0, gap = 0, largest = 0, top = 0;

  __device__ static Written load(const double* x) { return {x[0], x[1], x[2], x[3], x[4], x[5]}; }
  __device__ void store(double* x) const {
    x[0] = at, x[1] = others_p, x[2] = others_q, x[3] = gap, x[4] = largest, x[5] = top;
  }
  // The statistics are to be settled, and Q's gradient written once more: what is off in log p - log q moves the
  // entries by that much of p, and all of them may be small beside it.
  __device__ bool unsettled() const { return std::fabs(gap) * top > 5e-7 * largest; }
};
inline __device__ Written merged(const Team& team, const Written& part) {
  double most[3] = {part.at, part.largest, part.top}, sums[3] = {part.others_p, part.others_q, part.gap};
  team.max(most);
  team.sum(sums);
  return {most[0], sums[0], sums[1], sums[2], most[1], most[2]};
}

// Gradients of rows that left their statistics first of kStatSize numbers, by reductions 0 to 2.
template <class TP, class TQ, int kStatSize, class Call>
__device__ __forceinline__ void kl_gradients(const Call& k, const RowGrid& grid, double* workspace, int launch) {
  using Rows = LogitRows<TP, TQ>;
  using A = typename Rows::A;
  constexpr int K = Rows::K;
  backward_pair<TP, TQ, Rows>(k, grid, workspace, launch, [&](const RowTask& task, const BackwardPair<Rows>& pair) {
    const Rows& rows = pair.rows;
    const RowPointer<char>&grad_p = pair.grad_p, &grad_q = pair.grad_q;
    const Pieces& pieces = pair.pieces;
    const double coefficient = pair.coefficient;
    auto stat = KlDivStat::load(k.stat + kStatSize * task.row);
    const double inv = inverse_temperature<A>(k.rows.temperature);
    const bool want_p = grad_p.data != nullptr, want_q = grad_q.data != nullptr, infinite = std::isinf(stat.kl);
    // P's gradient is p u, and the classes that share P's mass may have a u far smaller than what the mean was summed
    // from: the far form takes the mean's error, E_p[t - s - mean], from a second look.
    if (want_p && stat.kl >= kKlNear && !infinite) {
      const Split<A> centre(stat.mean, stat.mean_lo), lse_p(stat.lse_p);
      const Exp<A> exp(inv);
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
    const auto part = [&] {
      const Split<A> centre(stat.mean, stat.mean_lo);
      const Gap<A> gap(stat, inv);
      const A c = static_cast<A>(coefficient * inv);
      int64_t at = -1;
      Sum<A> others_p, others_q, gaps;
      A largest = 0, top = 0;
      task.for_pieces<TP>(pieces, [&](const Piece<TP>& piece) {
        A t[K], s[K], x[K];
        rows.load(pieces, piece, t, s);
#pragma unroll
        for (int i = 0; i < K; ++i) {
          x[i] = gap.p(t[i]);
          if (x[i] > A(0.5)) at = piece.at(i);
        }
        A g[K], others = 0;
        if (want_p) {
#pragma unroll
          for (int i = 0; i < K; ++i) {
            g[i] = infinite || x[i] == 0 ? 0 : c * x[i] * (difference_minus(t[i], s[i], centre) * gap.inv_t);
            others += x[i] > A(0.5) ? 0 : g[i];
          }
          others_p.add(others);
          store_piece(grad_p, pieces, piece, g);
        }
        if (want_q) {
          others = 0;
          A sum = 0;
#pragma unroll
          for (int i = 0; i < K; ++i) {
            const A y = gap(x[i], t[i], s[i]);
            g[i] = c * y;
            sum += y;
            if (!(x[i] > A(0.5))) {
              others += g[i];
              largest = std::fabs(y) > largest ? std::fabs(y) : largest;
              top = x[i] > top ? x[i] : top;
            }
          }
          others_q.add(others), gaps.add(sum);
          store_piece(grad_q, pieces, Piece<TQ>{piece.first, piece.gap}, g);
        }
      });
      return Written{static_cast<double>(at),      others_p.value(),        others_q.value(), gaps.value(),
                     static_cast<double>(largest), static_cast<double>(top)};
    };
    const auto merge = [&](const Written& x) { return merged(task.team, x); };
    Written written;
    if (!task.reduce(1, written, part, merge)) return;
    if (want_q && written.unsettled()) {
      stat.settle(written.gap, inv);
      if (!task.reduce(2, written, part, merge)) return;
    }
    if (written.at < 0) return;
    __syncwarp();  // a team that is one warp has met no barrier since the class was written
    if (!task.writes()) return;
    const auto at = static_cast<int64_t>(written.at);
    if (want_p) store_entry<TP>(grad_p, at, static_cast<A>(-written.others_p));
    if (want_q) store_entry<TQ>(grad_q, at, static_cast<A>(-written.others_q));
  });
}

}  // namespace torch_divergence::cuda
