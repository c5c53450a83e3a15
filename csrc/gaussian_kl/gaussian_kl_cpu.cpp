// CPU kernels of the KL divergence between diagonal Gaussians; formulas in gaussian_kl.h. SIMD in double for all types,
// one visit to memory.
#include "gaussian_kl/gaussian_kl.h"

#include "core/phi.h"
#include "core/row_kernels.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

// One vector of coordinates: x, z and what both directions of the pass make of them. Padding lanes contribute 0.
struct Coordinates {
  D expm1_x, h, scale, z;

  template <class Count>
  TD_INLINE Coordinates(const RowsIn (&rows)[kGaussianOperands], const void* const* in, int64_t i, Count count) {
    const D zero(0.0), one(1.0);
    const auto read = [&](int k) __attribute__((always_inline)) {
      return in[k] != nullptr ? load_any(in[k], rows[k].dtype, i, count, 0.0) : zero;
    };
    const D v = read(kLogVar), w = read(kPriorLogVar), d = read(kMean) - read(kPriorMean);
    const D x = select(v == w, zero, v - w);
    const D e = x.exp();
    const D small_h = x * x *
                      phi_over_square<double>(
                          zero - x, [](D a, D b, D c) __attribute__((always_inline)) { return fmadd(a, b, c); });
    const D small = x.abs() < D(0.5);
    expm1_x = select(small, x + small_h, e - one);
    // e - 1 - x, but inf - inf where e overflows
    h = select(small, small_h, select(e == D(kInf<double>), e, (e - one) - x));
    scale = in[kPriorLogVar] != nullptr ? (w * D(-0.5)).exp() : one;
    z = select(d == zero, zero, d * scale);
  }
  TD_INLINE D by_mean() const { return select(z == D(0.0), z, z * scale); }
};

}  // namespace

void gaussian_kl_forward(const GaussianKlForward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsOut out[] = {{}};
  RowTiles<kGaussianOperands, 1>(k.in, out, k.dims)
      .run(begin, end, [&](int64_t row, const void* const* in, void* const*) {
        const double weight = k.weight != nullptr ? k.weight[row] : 1;
        double loss = 0;
        if (weight != 0) {
          const Pair sums = sum_columns(
              k.dims, columns, [&](int64_t i, auto count, D& variance, D& mean) __attribute__((always_inline)) {
                const Coordinates at(k.in, in, i, count);
                variance = variance + at.h, mean = fmadd(at.z, at.z, mean);
              });
          loss = weight * 0.5 * (sums.a + sums.b);
        }
        if (k.loss_is_double) {
          static_cast<double*>(k.loss)[row] = loss;
        } else {
          static_cast<float*>(k.loss)[row] = static_cast<float>(loss);
        }
      });
}

void gaussian_kl_backward(const GaussianKlBackward& k, int64_t begin, int64_t end, ForEach columns) {
  RowTiles<kGaussianOperands, kGaussianOperands>(k.in, k.grad, k.dims)
      .run(begin, end, [&](int64_t row, const void* const* in, void* const* out) {
        const double coefficient = k.coefficient[row];
        if (coefficient == 0) {
          for (int j = 0; j < kGaussianOperands; ++j) fill_zero_any(out[j], k.grad[j].dtype, k.dims);
          return;
        }
        const D c(coefficient), half(0.5 * coefficient), zero(0.0);
        for_segments(k.dims, columns, [&](int64_t first, int64_t last, int64_t) {
          for_lanes<double>(
              last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
                const int64_t i = first + j;
                const Coordinates at(k.in, in, i, count);
                const D by_mean = c * at.by_mean();
                const auto write = [&](int operand, D value) __attribute__((always_inline)) {
                  if (out[operand] != nullptr) store_any(out[operand], k.grad[operand].dtype, i, value, count);
                };
                write(kMean, by_mean);
                write(kLogVar, half * at.expm1_x);
                write(kPriorMean, zero - by_mean);
                write(kPriorLogVar, zero - half * fmadd(at.z, at.z, at.expm1_x));
              });
        });
      });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
