// Entropy: the formulas, once, and the signatures of its kernels. Included by g++ and nvcc; no ATen.
//
// H(P) = -sum_j p_j log p_j (Shannon, 1948). x are the entries as given, T the temperature. From logits
// (p = softmax(x/T)), with top = max x, log_z = log sum_j e^((x_j - top)/T), n_j = (top - x_j)/T and m = E_p[n]:
//
//   -log p_j = n_j + log_z >= 0,     H = sum_j p_j (n_j + log_z),     dH/dx = p (n - m)/T
//
// Nothing cancels: log_z = log1p(sum of the other classes), and at the largest entry, whose gradient is minus the sum
// of the others, n is exactly 0. Other spaces are free variables: dH = -p (x + 1) for log_probs, -(log x + 1) for
// probs.
//
// Along v, with v' = (v - E_p[v])/T and m. = E_p[v' n]: the Hessian product is p (v' (n - m) - v' - m.)/T from logits,
// -(p v (x + 1) + p v) for log_probs, -v/x for probs.
//
// p = 0: the term is 0, and so are the gradient (from probs the one-sided derivative is +inf) and its derivatives.
#pragma once
#include <cstdint>

#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/log_sum.h"
#include "core/single_row.h"

namespace torch_divergence {

// What a row leaves for its backward.
struct EntropyStat {
  double top, log_z;  // logits: as above
  double mean;        // logits: m
  double entropy;

  static constexpr int kSize = 4;
  static constexpr int kEntropy = 3;  // where entropy is
  TD_HOST_DEVICE static EntropyStat load(const double* x) { return {x[0], x[1], x[2], x[3]}; }
  TD_HOST_DEVICE void store(double* x) const { x[0] = top, x[1] = log_z, x[2] = mean, x[3] = entropy; }
};

// Online sums of a row of logits, all of terms that are not negative: what the threads of a GPU are merged to.
struct EntropyScan : TopScan {
  double dot = 0;  // sum e^-n n

  TD_HOST_DEVICE void raise(double x, double inv_t) {
    if (x > top && ties + below != 0) {
      const double up = (x - top) * inv_t;
      dot = std::exp(-up) * (dot + up * (ties + below));
    }
    TopScan::raise(x, inv_t);
  }
  TD_HOST_DEVICE EntropyStat finish() const {
    const LogSum sum = TopScan::finish();
    const double mean = dot / (ties + below);
    return {sum.top, sum.log_z, mean, sum.log_z + mean};
  }
};

using EntropyForward = SingleRowForward<SingleRow>;
using EntropyBackward = SingleRowBackward<SingleRow>;
using EntropyValueAndGrad = SingleRowValueAndGrad<SingleRow>;  // grad is not the storage of x
using EntropyDoubleBackward = SingleRowDoubleBackward<SingleRow>;

// On CUDA, by the rules of kl_div.h.
namespace cuda {
int64_t entropy_workspace(int64_t rows, int64_t classes);
void entropy_forward(const EntropyForward&, int64_t rows, double* workspace, Stream);
void entropy_backward(const EntropyBackward&, int64_t rows, double* workspace, Stream);
void entropy_double_backward(const EntropyDoubleBackward&, int64_t rows, double* workspace, Stream);
}  // namespace cuda

TD_DECLARE_CPU_KERNEL(entropy_forward, (const EntropyForward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(entropy_backward, (const EntropyBackward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(entropy_value_and_grad, (const EntropyValueAndGrad&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(entropy_double_backward,
                      (const EntropyDoubleBackward&, int64_t begin, int64_t end, ForEach columns))

}  // namespace torch_divergence
