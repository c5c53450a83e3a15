// KL divergence between diagonal Gaussians: the formulas, once, and the signatures of its kernels. Included by g++ and
// nvcc; no ATen.
//
// With m, v the mean and log-variance, c, w those of the prior (0 where absent), d = m - c, x = v - w:
//
//   KL = 1/2 sum [h(x) + d^2 e^-w],   h(x) = expm1(x) - x = phi(-x) >= 0
//
// Every term is non-negative, and x and d are exact for close floats, so that the sum keeps its digits however near
// the two are (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, appendix B, has the form that cancels).
//
//   dKL/dm = d e^-w = -dKL/dc,   dKL/dv = expm1(x)/2,   dKL/dw = -(expm1(x) + d^2 e^-w)/2
//
// d^2 e^-w is the square of z = d e^(-w/2), which overflows only where the result does.
//
// Infinities. v = -inf or w = -inf is a point mass. Against anything else it is infinitely far; v = w counts as x = 0
// there too, and d = 0 as no distance, whatever w: a point mass is at 0 from itself.
#pragma once
#include <cstdint>

#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/rows.h"

namespace torch_divergence {

enum GaussianOperand : int { kMean = 0, kLogVar = 1, kPriorMean = 2, kPriorLogVar = 3, kGaussianOperands = 4 };

// loss[i] = weight[i] KL_i. An operand without data is 0; weight may be null; a row of weight 0 is not read: 0.
struct GaussianKlForward {
  RowsIn in[kGaussianOperands];
  int64_t dims;
  const double* weight;
  void* loss;
  bool loss_is_double;
};
// grad[k] = coefficient[i] dKL_i/din[k], where wanted. A row whose coefficient is 0 is not read: zeros.
struct GaussianKlBackward {
  RowsIn in[kGaussianOperands];
  int64_t dims;
  const double* coefficient;
  RowsOut grad[kGaussianOperands];
};

// On CUDA: all rows, on a stream; workspace: of as many doubles as gaussian_kl_workspace() says, on the same device. A
// weight that is negative or not finite makes its row's loss NaN: nobody waits for the device to be told.
namespace cuda {
int64_t gaussian_kl_workspace(int64_t rows, int64_t dims);
void gaussian_kl_forward(const GaussianKlForward&, int64_t rows, double* workspace, Stream);
void gaussian_kl_backward(const GaussianKlBackward&, int64_t rows, double* workspace, Stream);
}  // namespace cuda

TD_DECLARE_CPU_KERNEL(gaussian_kl_forward, (const GaussianKlForward&, int64_t begin, int64_t end, ForEach columns))
TD_DECLARE_CPU_KERNEL(gaussian_kl_backward, (const GaussianKlBackward&, int64_t begin, int64_t end, ForEach columns))

}  // namespace torch_divergence
