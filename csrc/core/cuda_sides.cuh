// One side of a divergence in any space, in double: its logsumexp, probabilities and log-probabilities.
#pragma once
#include <cmath>
#include <limits>

#include "core/cuda_rows.cuh"
#include "core/exact_sum.h"

namespace torch_divergence::cuda {

// T logsumexp(x/T) of a row.
struct Lse {
  double max = -std::numeric_limits<double>::infinity(), sum = 0;

  __device__ static Lse load(const double* x) { return {x[0], x[1]}; }
  __device__ void store(double* x) const { x[0] = max, x[1] = sum; }
  // What it rounds off goes into lo.
  __device__ double finish(double t, double& lo) const {
    if (!(sum > 0)) return std::numeric_limits<double>::quiet_NaN();
    const ExactSum exact = two_sum(max, t * std::log(sum));
    lo = exact.error;
    return exact.sum;
  }
};
inline __device__ Lse merged(const Team& team, const Lse& part, double inv_t) {
  double top[1] = {part.max};
  team.max(top);
  double sum[1] = {part.sum};
  if (part.max != top[0]) sum[0] *= std::exp((part.max - top[0]) * inv_t);
  team.sum(sum);
  return {top[0], sum[0]};
}

// A thread's share of a row of logits; T is AnyFloat or double.
template <class T>
__device__ Lse lse_of_pieces(const RowTask& task, const Pieces& pieces, const RowPointer<const char>& logits,
                             double inv_t) {
  constexpr int K = kPiece<T>;
  const Exp<double> exp(inv_t);
  double max = -kInf<double>;
  Sum<double> sum;
  task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    double v[K];
    load_piece(logits, pieces, piece, -kInf<double>, v);
    double top = max;
#pragma unroll
    for (int i = 0; i < K; ++i) top = v[i] > top ? v[i] : top;
    if (top > max) sum *= exp(max - top), max = top;
    double part_sum = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) part_sum += v[i] == -kInf<double> ? 0 : exp(v[i] - max);
    sum.add(part_sum);
  });
  return Lse{max, sum.value()};
}

// One side's probability and log-probability, whatever it is given in. Padding has p = q = 0.
struct Side {
  int space;
  double inv_t, lse, log_lo, factor, padding;

  __device__ Side(int space_, double inv_t_, double lse_, double lse_lo)
      : space(space_),
        inv_t(inv_t_),
        lse(lse_),
        log_lo(lse_lo * inv_t_),
        factor(std::exp(-log_lo)),
        padding(space_ == kProbs ? 0 : -kInf<double>) {}
  __device__ void read(double v, double& prob, double& log_prob) const {
    if (space == kProbs) {
      prob = v, log_prob = std::log(v);
    } else if (space == kLogits) {
      const double above = (v - lse) * inv_t;
      log_prob = above - log_lo, prob = std::exp(above) * factor;
    } else {
      log_prob = v, prob = std::exp(v);
    }
  }
};

// log p - log q; near each other from the exact p - q, as the difference of two logarithms has no digits left there.
inline __device__ double log_ratio(bool both_probs, double p, double q, double log_p, double log_q) {
  if (!both_probs) return log_p - log_q;
  if (p < 0 || q < 0) return std::numeric_limits<double>::quiet_NaN();
  const double relative = (p - q) / q, ratio = p / q;
  if (std::fabs(relative) < 0.5) return std::log1p(relative);
  constexpr double kBig = 1e30;
  return ratio > 1 / kBig && ratio < kBig ? std::log(ratio) : log_p - log_q;
}

}  // namespace torch_divergence::cuda
