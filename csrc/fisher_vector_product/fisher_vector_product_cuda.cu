// CUDA kernel of the Fisher-vector product, in two visits to memory; teams and rows in core/cuda_rows.cuh. In double
// for all types: <q, v> must keep the digits of v - <q, v> where v has a large offset, or q its mass on one class.
#include "core/cuda_launch.cuh"
#include "core/cuda_rows.cuh"
#include "fisher_vector_product/fisher_vector_product.h"

namespace torch_divergence::cuda {
namespace {

// Sums of e = e^((z - max)/T) and e v.
struct MeanScan {
  double max = -kInf<double>, sum = 0, dot = 0;

  __device__ static MeanScan load(const double* x) { return {x[0], x[1], x[2]}; }
  __device__ void store(double* x) const { x[0] = max, x[1] = sum, x[2] = dot; }
  __device__ void raise(double top, const Exp<double>& exp) {
    if (!(top > max)) return;
    const double factor = sum != 0 ? exp(max - top) : 0;
    sum *= factor, dot *= factor;
    max = top;
  }
  __device__ double shift() const { return std::isinf(max) ? 0 : max; }
};
__device__ MeanScan merged(const Team& team, MeanScan scan, const Exp<double>& exp) {
  double top[1] = {scan.max};
  team.max(top);
  scan.raise(top[0], exp);
  double sums[2] = {scan.sum, scan.dot};
  team.sum(sums);
  return {top[0], sums[0], sums[1]};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    product_any(const FisherVectorProduct k, const RowGrid grid, double* workspace, int launch) {
  constexpr int K = kPiece<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  RowPointer<const char> logits(k.logits, task.row), vector(k.v, task.row);
  RowPointer<char> product(k.product, task.row);
  const Pieces pieces(k.classes, logits, vector, product);
  const double inv_t = 1 / k.temperature;
  const Exp<double> exp(inv_t);
  const auto read = [&](const Piece<T>& piece, double(&z)[K], double(&v)[K]) {
    load_piece(logits, pieces, piece, -kInf<double>, z);
    load_piece(vector, pieces, piece, 0.0, v);
#pragma unroll
    for (int i = 0; i < K; ++i) v[i] = z[i] == -kInf<double> ? 0 : v[i];
  };
  const auto part = [&] {
    MeanScan scan;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      double z[K], v[K];
      read(piece, z, v);
      double top = scan.max;
#pragma unroll
      for (int i = 0; i < K; ++i) top = z[i] > top ? z[i] : top;
      scan.raise(top, exp);
      const double shift = scan.shift();
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const double e = exp(z[i] - shift);
        scan.sum += e, scan.dot = std::fma(e, v[i], scan.dot);
      }
    });
    return scan;
  };
  MeanScan whole;
  if (!task.reduce(0, whole, part, [&](const MeanScan& x) { return merged(task.team, x, exp); })) return;
  const double shift = whole.shift(), mean = whole.dot / whole.sum, factor = inv_t * inv_t / whole.sum;
  task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    double z[K], v[K];
    read(piece, z, v);
#pragma unroll
    for (int i = 0; i < K; ++i) v[i] = exp(z[i] - shift) * factor * (v[i] - mean);
    store_piece(product, pieces, piece, v);
  });
}

}  // namespace

int64_t fisher_vector_product_workspace(int64_t rows, int64_t classes) { return RowGrid(rows, classes).workspace(1); }

void fisher_vector_product(const FisherVectorProduct& k, int64_t rows, double* workspace, Stream stream) {
  dispatch_any(k.v.dtype,
               [&]<class T>() { launch_rows(&product_any<T>, k, RowGrid(rows, k.classes), workspace, stream, 1); });
}

}  // namespace torch_divergence::cuda
