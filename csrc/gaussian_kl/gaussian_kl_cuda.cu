// CUDA kernels of the KL divergence between diagonal Gaussians; formulas in gaussian_kl.h, teams and rows in
// core/cuda_rows.cuh. One visit to memory. Arithmetic is in float for float and the half types, but for the gradient of
// the prior's log-variance: a difference of two terms, of which float may leave no digit.
#include "core/cuda_launch.cuh"
#include "core/cuda_rows.cuh"
#include "gaussian_kl/gaussian_kl.h"

namespace torch_divergence::cuda {
namespace {

constexpr int kOperands = kGaussianOperands;

// e^x for every x, infinities included.
__device__ double exp_of(const Exp<double>& exp, double x) { return exp(x); }
__device__ float exp_of(const Exp<float>& exp, float x) {
  constexpr float kHighest = 88.722839f;  // the logarithm of the largest float
  return x > kHighest ? kInf<float> : exp(x);
}

// One coordinate: x, z and what both directions of the pass make of them.
template <class A>
struct Coordinate {
  A expm1_x, h, scale, z;

  __device__ Coordinate(const Exp<A>& exp, A mean, A log_var, A prior_mean, A prior_log_var) {
    const A x = log_var == prior_log_var ? 0 : log_var - prior_log_var;
    // What the difference has rounded off, times x, would be an error of e^x.
    const A back = log_var - x;
    const A error = std::isfinite(x) ? (log_var - (x + back)) + (back - prior_log_var) : 0;
    const A e_x = exp_of(exp, x), e = std::isfinite(e_x) ? std::fma(e_x, error, e_x) : e_x;
    // From the half of x, h(x) = 2 h(x/2) + expm1(x/2)^2: a sum of terms of one sign wherever e - 1 - x is not.
    const A half = x / 2, half_h = phi_small(-half), half_expm1 = half + half_h;
    const A small_h = std::fma(half_expm1, half_expm1, 2 * half_h);
    const bool small = std::fabs(x) < 1;
    expm1_x = small ? x + small_h : e - 1;
    h = small ? small_h : e == kInf<A> ? e : (e - 1) - x;
    scale = exp_of(exp, prior_log_var * A(-0.5));
    const A d = mean - prior_mean;
    z = d == 0 ? 0 : d * scale;
  }
  __device__ A by_mean() const { return z == 0 ? z : z * scale; }
};

// The four operands of a row.
template <class T, class A>
struct GaussianRow {
  static constexpr int K = kPiece<T>;
  RowPointer<const char> mean, log_var, prior_mean, prior_log_var;

  __device__ GaussianRow(const RowsIn (&in)[kOperands], int64_t row)
      : mean(in[kMean], row),
        log_var(in[kLogVar], row),
        prior_mean(in[kPriorMean], row),
        prior_log_var(in[kPriorLogVar], row) {}

  // f(coordinate, k) for those of a piece; outside of the row all of their parts are 0.
  template <class F>
  __device__ __forceinline__ void for_coordinates(const Exp<A>& exp, const Pieces& pieces, const Piece<T>& piece,
                                                  const F& f) const {
    A m[K], v[K], c[K] = {}, w[K] = {};
    load_piece(mean, pieces, piece, A(0), m);
    load_piece(log_var, pieces, piece, A(0), v);
    if (prior_mean.data != nullptr) load_piece(prior_mean, pieces, piece, A(0), c);
    if (prior_log_var.data != nullptr) load_piece(prior_log_var, pieces, piece, A(0), w);
#pragma unroll
    for (int k = 0; k < K; ++k) f(Coordinate<A>(exp, m[k], v[k], c[k], w[k]), k);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    forward(const GaussianKlForward k, const RowGrid grid, double* workspace, int launch) {
  using A = Arithmetic<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const double weight = weight_of(k.weight, task.row);
  double loss = 0;
  if (weight != 0) {
    GaussianRow<T, A> row(k.in, task.row);
    const Pieces pieces(k.dims, row.mean, row.log_var, row.prior_mean, row.prior_log_var);
    const Exp<A> exp(1);
    Sums<1> twice;
    const auto part = [&] {
      Sum<A> sum;
      task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
        A of_piece = 0;
        row.for_coordinates(exp, pieces, piece,
                            [&](const Coordinate<A>& at, int) { of_piece += std::fma(at.z, at.z, at.h); });
        sum.add(of_piece);
      });
      return Sums<1>{{sum.value()}};
    };
    if (!task.reduce(0, twice, part, [&](const Sums<1>& x) { return merged(task.team, x); })) return;
    loss = weight * 0.5 * twice.x[0];
  }
  if (task.writes()) store_loss(k, task.row, loss);
}

// A: what is computed in.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, kBlocks<A>)
    backward(const GaussianKlBackward k, const RowGrid grid, double* workspace, int launch) {
  constexpr int K = kPiece<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  GaussianRow<T, A> row(k.in, task.row);
  RowPointer<char> of_mean(k.grad[kMean], task.row), of_log_var(k.grad[kLogVar], task.row),
      of_prior_mean(k.grad[kPriorMean], task.row), of_prior_log_var(k.grad[kPriorLogVar], task.row);
  const Pieces pieces(k.dims, row.mean, row.log_var, row.prior_mean, row.prior_log_var, of_mean, of_log_var,
                      of_prior_mean, of_prior_log_var);
  if (k.coefficient[task.row] == 0) {
    store_zeros<T>(task, of_mean, pieces);
    store_zeros<T>(task, of_log_var, pieces);
    store_zeros<T>(task, of_prior_mean, pieces);
    store_zeros<T>(task, of_prior_log_var, pieces);
    return;
  }
  const Exp<A> exp(1);
  const A c = static_cast<A>(k.coefficient[task.row]), half = c / 2;
  task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    A by_mean[K], by_log_var[K], by_prior[K];
    row.for_coordinates(exp, pieces, piece, [&](const Coordinate<A>& at, int i) {
      by_mean[i] = c * at.by_mean(), by_log_var[i] = half * at.expm1_x;
      by_prior[i] = -half * std::fma(at.z, at.z, at.expm1_x);
    });
    if (of_mean.data != nullptr) store_piece(of_mean, pieces, piece, by_mean);
    if (of_log_var.data != nullptr) store_piece(of_log_var, pieces, piece, by_log_var);
    if (of_prior_log_var.data != nullptr) store_piece(of_prior_log_var, pieces, piece, by_prior);
    if (of_prior_mean.data == nullptr) return;
#pragma unroll
    for (int i = 0; i < K; ++i) by_mean[i] = -by_mean[i];
    store_piece(of_prior_mean, pieces, piece, by_mean);
  });
}

// f.template operator()<T>(): a type that all operands share is known when the kernel is compiled.
template <class F>
void dispatch_operands(const RowsIn (&in)[kOperands], const F& f) {
  const DType type = in[kMean].dtype;
  for (const RowsIn& x : in)
    if (type != DType::Double && x.data != nullptr && x.dtype != type) return f.template operator()<AnyFloat>();
  dispatch_type(type, f);
}

}  // namespace

int64_t gaussian_kl_workspace(int64_t rows, int64_t dims) { return RowGrid(rows, dims).workspace(1); }

void gaussian_kl_forward(const GaussianKlForward& k, int64_t rows, double* workspace, Stream stream) {
  dispatch_operands(k.in, [&]<class T>() { launch_rows(&forward<T>, k, RowGrid(rows, k.dims), workspace, stream, 1); });
}

void gaussian_kl_backward(const GaussianKlBackward& k, int64_t rows, double* workspace, Stream stream) {
  const auto launch = [&](auto kernel) { launch_rows(kernel, k, RowGrid(rows, k.dims), workspace, stream, 0); };
  if (k.grad[kPriorLogVar].data != nullptr && k.in[kMean].dtype != DType::Double)
    return launch(&backward<AnyFloat, double>);
  dispatch_operands(k.in, [&]<class T>() { launch(&backward<T, Arithmetic<T>>); });
}

}  // namespace torch_divergence::cuda
