// CUDA kernels of entropy; formulas in entropy.h, teams and rows in core/cuda_rows.cuh.
//
// Logits: in float for float and the half types, one visit, entropy_rows.cuh. Every term of a row's sums is
// non-negative, so that its mean is good to some ulp, and so is the gradient p (n - mean), whose largest entry is at
// least that of the largest p, p mean. Other spaces, and the double backward: in double for all types.
#include "core/cuda_launch.cuh"
#include "core/cuda_single_row.cuh"
#include "entropy/entropy_rows.cuh"

namespace torch_divergence::cuda {
namespace {

constexpr int kReductions = 2;

// -- Logits ---------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    forward_logits(const EntropyForward k, const RowGrid grid, double* workspace, int launch) {
  forward_row(k, grid, workspace, launch, &EntropyStat::entropy, [&](const RowTask& task, EntropyStat& stat) {
    RowPointer<const char> x(k.rows.x, task.row);
    const Pieces pieces(k.rows.classes, x);
    const double inv_t = inverse_temperature<Arithmetic<T>>(k.rows.temperature);
    return entropy_of_logits<T>(task, 0, x, pieces, inv_t, stat);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_logits(const EntropyBackward k, const RowGrid grid, double* workspace, int launch) {
  using A = Arithmetic<T>;
  backward_row<T>(k, grid, workspace, launch, [&](const RowTask& task, const BackwardRow& row) {
    const auto stat = EntropyStat::load(k.stat + EntropyStat::kSize * task.row);
    const double inv_t = inverse_temperature<A>(k.rows.temperature);
    Below<A> n_of(inv_t);
    n_of.set_top(static_cast<A>(stat.top));
    const Split<A> mean(stat.mean);
    const A factor = static_cast<A>(row.coefficient * inv_t * std::exp(-stat.log_z));
    task.for_pieces<T>(row.pieces, [&](const Piece<T>& piece) {
      A v[kPiece<T>];
      load_piece(row.x, row.pieces, piece, -kInf<A>, v);
#pragma unroll
      for (int i = 0; i < kPiece<T>; ++i) {
        const auto term = n_of(v[i]);
        v[i] = term.e * factor * (((term.n - mean.hi) - mean.lo) + term.rest);
      }
      store_piece(row.grad, row.pieces, piece, v);
    });
  });
}

// -- Log-probabilities and probabilities ----------------------------------------------------------------------------

// dH/dx of such an entry, before the row's coefficient.
__device__ double gradient_free(int space, double prob, double neg_log) {
  if (prob == 0) return 0;
  return space == kLogProbs ? prob * (neg_log - 1) : neg_log - 1;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    forward_free(const EntropyForward k, const RowGrid grid, double* workspace, int launch) {
  forward_row(k, grid, workspace, launch, &EntropyStat::entropy, [&](const RowTask& task, EntropyStat& stat) {
    RowPointer<const char> x(k.rows.x, task.row);
    const Pieces pieces(k.rows.classes, x);
    const NegLog side(k.rows.space, 1, {});
    Sums<1> entropy;
    const auto part = [&] {
      Sum<double> sum;
      task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
        double v[kPiece<T>], terms = 0;
        load_piece(x, pieces, piece, side.padding, v);
#pragma unroll
        for (int i = 0; i < kPiece<T>; ++i) {
          const auto [prob, neg_log] = side(v[i]);
          terms += share(prob, neg_log);
        }
        sum.add(terms);
      });
      return Sums<1>{{sum.value()}};
    };
    if (!task.reduce(0, entropy, part, [&](const auto& sums) { return merged(task.team, sums); })) return false;
    stat.entropy = entropy.x[0];
    return true;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_free(const EntropyBackward k, const RowGrid grid, double* workspace, int launch) {
  backward_row<T>(k, grid, workspace, launch, [&](const RowTask& task, const BackwardRow& row) {
    const NegLog side(k.rows.space, 1, {});
    task.for_pieces<T>(row.pieces, [&](const Piece<T>& piece) {
      double v[kPiece<T>];
      load_piece(row.x, row.pieces, piece, side.padding, v);
#pragma unroll
      for (int i = 0; i < kPiece<T>; ++i) {
        const auto [prob, neg_log] = side(v[i]);
        v[i] = row.coefficient * gradient_free(side.space, prob, neg_log);
      }
      store_piece(row.grad, row.pieces, piece, v);
    });
  });
}

// -- Double backward ------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    double_backward(const EntropyDoubleBackward k, const RowGrid grid, double* workspace, int launch) {
  constexpr int K = kPiece<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  RowPointer<const char> row_x(k.rows.x, task.row), row_v(k.v, task.row);
  RowPointer<char> d_x(k.d_x, task.row);
  const Pieces pieces(k.rows.classes, row_x, row_v, d_x);
  const double coefficient = k.coefficient[task.row];
  const bool logits = k.rows.space == kLogits;
  const auto stat = EntropyStat::load(k.stat + EntropyStat::kSize * task.row);
  const double inv_t = logits ? inverse_temperature<Arithmetic<T>>(k.rows.temperature) : 1;
  // f(p, -log p (from logits around log_z), v, k) for the classes of a piece.
  NegLog side(k.rows.space, inv_t, {stat.top, 0});
  const auto for_classes = [&](const Piece<T>& piece, const auto& f) {
    double x[K], v[K];
    load_piece(row_x, pieces, piece, side.padding, x);
    load_piece(row_v, pieces, piece, 0.0, v);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const auto [prob, neg_log] = side(x[i]);
      f(prob, neg_log, v[i], i);
    }
  };
  // The statistics again, in double: those of the float types are to float's accuracy. The top is exact. v - E_p[v] at
  // the top, which may be as small as the others' p, comes from v's mean there: v_top + rise.
  double mean = 0, v_top = 0, rise = 0;
  if (logits) {
    Sums<5> sums;
    const auto part = [&] {
      Sums<5> x;
      task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
        for_classes(piece, [&](double e, double n, double v, int) {
          const bool below = n > 0;
          x.x[0] += below ? 0 : e, x.x[1] += below ? e : 0;
          x.x[2] += below ? 0 : e * v, x.x[3] += below ? e * v : 0;
          x.x[4] += share(e, n);
        });
      });
      return x;
    };
    if (!task.reduce(0, sums, part, [&](const auto& x) { return merged(task.team, x); })) return;
    const double ties = sums.x[0], below = sums.x[1], mass = ties + below;
    side.log_z = TopScan{stat.top, ties, below}.finish().log_z;
    mean = sums.x[4] / mass, v_top = sums.x[2] / ties, rise = (sums.x[3] - v_top * below) / mass;
  }
  const auto gradient = [&](double prob, double neg_log) {
    if (!logits) return gradient_free(side.space, prob, neg_log);
    return prob == 0 ? 0 : prob * ((neg_log - side.log_z) - mean) * inv_t;
  };
  Sums<1> dot;
  const auto part = [&] {
    Sums<1> x;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      for_classes(piece, [&](double prob, double neg_log, double v, int) {
        x.x[0] += v == 0 ? 0 : v * gradient(prob, neg_log);
      });
    });
    return x;
  };
  if (!task.reduce(1, dot, part, [&](const auto& x) { return merged(task.team, x); })) return;
  if (k.d_coefficient != nullptr && task.writes()) k.d_coefficient[task.row] = dot.x[0];
  if (d_x.data == nullptr) return;
  if (coefficient == 0) return store_zeros<T>(task, d_x, pieces);
  // m. = sum_j p_j v'_j n_j = sum_j v_j p_j (n_j - m)/T: the gradient along v.
  const double mean_dot = dot.x[0];
  task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    double h[K];
    for_classes(piece, [&](double prob, double neg_log, double v, int i) {
      if (prob == 0) {
        h[i] = 0;
      } else if (logits) {
        const double v_dot = ((v - v_top) - rise) * inv_t, above = (neg_log - side.log_z) - mean;
        h[i] = coefficient * (prob * (v_dot * (above - 1) - mean_dot) * inv_t);
      } else {
        h[i] = coefficient * (side.space == kLogProbs ? prob * v * (neg_log - 1) - prob * v : -v / prob);
      }
    });
    store_piece(d_x, pieces, piece, h);
  });
}

}  // namespace

int64_t entropy_workspace(int64_t rows, int64_t classes) { return RowGrid(rows, classes).workspace(kReductions); }

void entropy_forward(const EntropyForward& k, int64_t rows, double* workspace, Stream stream) {
  if (k.rows.space != kLogits)
    return dispatch_any(k.rows.x.dtype,
                        [&]<class T>() { launch_rows(&forward_free<T>, k, rows, workspace, stream, 1); });
  dispatch_type(k.rows.x.dtype, [&]<class T>() { launch_rows(&forward_logits<T>, k, rows, workspace, stream, 1); });
}

void entropy_backward(const EntropyBackward& k, int64_t rows, double* workspace, Stream stream) {
  if (k.rows.space != kLogits)
    return dispatch_any(k.rows.x.dtype,
                        [&]<class T>() { launch_rows(&backward_free<T>, k, rows, workspace, stream, 0); });
  dispatch_type(k.rows.x.dtype, [&]<class T>() { launch_rows(&backward_logits<T>, k, rows, workspace, stream, 0); });
}

void entropy_double_backward(const EntropyDoubleBackward& k, int64_t rows, double* workspace, Stream stream) {
  dispatch_any(k.rows.x.dtype,
               [&]<class T>() { launch_rows(&double_backward<T>, k, rows, workspace, stream, kReductions); });
}

}  // namespace torch_divergence::cuda
