// Rows of entropy from logits on CUDA, in A: float, or double. The counterpart of entropy_rows.h.
#pragma once
#include "core/cuda_rows.cuh"
#include "entropy/entropy.h"

namespace torch_divergence::cuda {

// n of entropy.h as n + rest, and e^-(n + rest). Far below the top n alone is off by as much as 1 in 10^5: too much for
// a row whose whole entropy comes from there. n stays at kMost where there is nothing left: p is 0 there, and so is p
// n.
template <class A>
class Below {
 public:
  struct Term {
    A n, rest, e;
  };

  __device__ explicit Below(double inv_t)
      : exp_(inv_t), inv_t_(static_cast<A>(inv_t)), reach_(static_cast<A>(kMost / inv_t)) {}
  // The largest entry that was met; -inf: none.
  __device__ void set_top(A top) {
    top_ = top == -kInf<A> ? 0 : top;
    lowest_ = top_ - reach_;
  }
  __device__ __forceinline__ Term operator()(A x) const {
    const Difference<A> d(top_, x < lowest_ ? lowest_ : x);  // NaN passes
    const A n = d.rounded * inv_t_, lost = d.error * inv_t_, e = exp_.near(-d.rounded);
    return {n, lost + std::fma(d.rounded, inv_t_, -n), std::fma(-e, lost, e)};
  }
  // e^-((to - from)/T)
  __device__ A fall(A from, A to) const { return exp_(from - to); }

 private:
  static constexpr double kMost = sizeof(A) == 4 ? 200 : 800;
  Exp<A> exp_;
  A inv_t_, reach_, top_ = 0, lowest_ = 0;
};

// A thread's sums of EntropyScan.
template <class A>
class ThreadEntropy {
 public:
  __device__ explicit ThreadEntropy(double inv_t) : inv_t_(static_cast<A>(inv_t)), n_of_(inv_t) { n_of_.set_top(top_); }
  template <int K>
  __device__ __forceinline__ void add(const A (&x)[K]) {
    A most = x[0];
#pragma unroll
    for (int k = 1; k < K; ++k) most = x[k] > most ? x[k] : most;
    if (most > top_) raise(most);
    A ties = 0, below = 0, dot = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const auto term = n_of_(x[k]);
      if (term.n > 0) {
        below += term.e;
      } else {
        ties += term.e;
      }
      dot = std::fma(term.e, term.n, dot);
    }
    ties_ += ties;
    below_.add(below), dot_.add(dot);
  }
  __device__ EntropyScan sums() const {
    return {{static_cast<double>(top_), static_cast<double>(ties_), below_.value()}, dot_.value()};
  }

 private:
  __device__ void raise(A to) {
    if (ties_ + below_.hi > 0) {
      const A up = (to - top_) * inv_t_, fall = n_of_.fall(top_, to);
      below_.add(ties_);
      dot_.add(up * below_.hi), dot_.add(up * below_.lo);
      below_ *= fall, dot_ *= fall;
      ties_ = 0;
    }
    top_ = to;
    n_of_.set_top(to);
  }

  A inv_t_, top_ = -kInf<A>, ties_ = 0;
  Sum<A> below_, dot_;
  Below<A> n_of_;
};

// EntropyScan, as a segment leaves it.
struct RowEntropy : EntropyScan {
  __device__ static RowEntropy load(const double* x) { return {{{x[0], x[1], x[2]}, x[3]}}; }
  __device__ void store(double* x) const { x[0] = top, x[1] = ties, x[2] = below, x[3] = dot; }
};

// A row's statistics, by reduction `number` of the task. False: they are left to the next launch.
template <class T>
__device__ bool entropy_of_logits(const RowTask& task, int number, const RowPointer<const char>& row,
                                  const Pieces& pieces, double inv_t, EntropyStat& stat) {
  using A = Arithmetic<T>;
  RowEntropy whole;
  const auto part = [&] {
    ThreadEntropy<A> thread(inv_t);
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      A x[kPiece<T>];
      load_piece(row, pieces, piece, -kInf<A>, x);
      thread.add(x);
    });
    return RowEntropy{thread.sums()};
  };
  const auto merged = [&](RowEntropy sums) {
    double top[1] = {sums.top};
    task.team.max(top);
    sums.raise(top[0], inv_t);
    double x[3] = {sums.ties, sums.below, sums.dot};
    task.team.sum(x);
    return RowEntropy{{{top[0], x[0], x[1]}, x[2]}};
  };
  if (!task.reduce(number, whole, part, merged)) return false;
  stat = whole.finish();
  return true;
}

}  // namespace torch_divergence::cuda
