// What the CUDA kernels of losses of one distribution a row share (see single_row.h), and negative log-probabilities in
// double, as core/row_scores.h has them on the CPU.
#pragma once
#include <cmath>

#include "core/cuda_rows.cuh"
#include "core/log_sum.h"
#include "core/single_row.h"

namespace torch_divergence::cuda {

// f.template operator()<T>() for the type of a row.
template <class F>
void dispatch_type(DType type, const F& f) {
  if (type == DType::Double) return f.template operator()<double>();
  if (type == DType::Half) return f.template operator()<c10::Half>();
  if (type == DType::BFloat16) return f.template operator()<c10::BFloat16>();
  return f.template operator()<float>();
}

// One side's probability and minus its logarithm, whatever it is given in: from logits (top - x)/T + log_z. Padding has
// probability 0.
struct NegLog {
  int space;
  double inv_t, top, log_z, padding;

  struct Term {
    double prob, neg_log;
  };

  __device__ NegLog(int space_, double inv_t_, const LogSum& sum)
      : space(space_), inv_t(inv_t_), top(sum.top), log_z(sum.log_z), padding(space_ == kProbs ? 0 : -kInf<double>) {}
  __device__ Term operator()(double x) const {
    if (space == kProbs) return {x, -std::log(x)};
    const double neg_log = space == kLogits ? (top - x) * inv_t + log_z : -x;
    return {std::exp(-neg_log), neg_log};
  }
};

// p n, where a p of 0 wins over an infinite n but not over NaN.
inline __device__ double share(double p, double n) { return p == 0 ? (std::isnan(n) ? n : 0) : p * n; }

}  // namespace torch_divergence::cuda
