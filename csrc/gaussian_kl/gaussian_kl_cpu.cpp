// CPU kernels of the KL divergence between diagonal Gaussians; formulas in gaussian_kl.h. One visit to memory; SIMD in
// float where all operands have one type that float holds, in double for all others and for chunks that leave float's
// range.
#include "gaussian_kl/gaussian_kl.h"

#include "core/phi.h"
#include "core/row_kernels.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

// What a chunk in float may add up to: nothing that counts has left the range of normal numbers then.
TD_INLINE bool fits_float(double size) { return size > 1e-18 && size < 1e18; }

// The operands of a row, absent ones being 0, as vectors of A: of entries of type T, or of any types where T is void.
template <class A, class T>
struct Operands {
  const RowsIn (&rows)[kGaussianOperands];
  const void* const* in;

  template <class Count>
  TD_INLINE Vec<A> read(int k, int64_t i, Count count) const {
    if (in[k] == nullptr) return Vec<A>(A(0));
    if constexpr (std::is_void_v<T>) {
      return load_any(in[k], rows[k].dtype, i, count, 0.0);
    } else {
      return load_lanes<A>(static_cast<const T*>(in[k]) + i, count, A(0));
    }
  }
};

// One vector of coordinates: x, z and what both directions of the pass make of them. Padding lanes contribute 0.
template <class A>
struct Coordinates {
  Vec<A> expm1_x, h, scale, z;

  template <class T, class Count>
  TD_INLINE Coordinates(const Operands<A, T>& row, int64_t i, Count count) {
    const Vec<A> zero(A(0)), one(A(1)), infinity(kInf<A>);
    const bool has_prior = row.in[kPriorLogVar] != nullptr;
    const Vec<A> v = row.read(kLogVar, i, count), w = row.read(kPriorLogVar, i, count),
                 d = row.read(kMean, i, count) - row.read(kPriorMean, i, count);
    const Difference<A> difference(v, w);
    const Vec<A> x = select(v == w, zero, difference.rounded);
    Vec<A> e = exp_of(x);
    // What float rounds off x is as large a part of e^x. It is no number next to an infinity; float does without those.
    if (std::is_same_v<A, float> && has_prior) e = fmadd(e, difference.error, e);
    const Vec<A> small_h =
        x * x *
        phi_over_square<A>(
            zero - x, [](Vec<A> a, Vec<A> b, Vec<A> c) __attribute__((always_inline)) { return fmadd(a, b, c); });
    const Vec<A> small = x.abs() < Vec<A>(A(0.5));
    expm1_x = select(small, x + small_h, e - one);
    // e - 1 - x, but inf - inf where e overflows
    h = select(small, small_h, select(e == infinity, e, (e - one) - x));
    scale = has_prior ? exp_of(w * Vec<A>(A(-0.5))) : one;
    z = select(d == zero, zero, d * scale);
  }
  TD_INLINE Vec<A> by_mean() const { return select(z == Vec<A>(A(0)), z, z * scale); }
};

// f.template operator()<T>() for the type that all operands of a row have, void if that is none of float's.
template <class F>
TD_INLINE void dispatch_operands(const RowsIn (&in)[kGaussianOperands], const F& f) {
  const DType type = in[kMean].dtype;
  bool in_float = type != DType::Double;
  for (const RowsIn& operand : in) in_float = in_float && (operand.data == nullptr || operand.dtype == type);
  if (!in_float) return f.template operator()<void>();
  dispatch_float_types(type, f);
}

// sum h + z^2 over [first, last)
template <class A, class T>
double sum_terms(const Operands<A, T>& row, int64_t first, int64_t last) {
  double total = 0;
  for (int64_t b = first; b < last; b += kBlock) {
    Vec<A> variance(A(0)), mean(A(0));
    for_lanes<A>(
        std::min(kBlock, last - b), [&](int64_t i, auto count) __attribute__((always_inline)) {
          const Coordinates<A> at(row, b + i, count);
          variance = variance + at.h, mean = fmadd(at.z, at.z, mean);
        });
    total += sum_of(variance) + sum_of(mean);
  }
  return total;
}

// By the prior's log-variance the gradient is a difference, expm1(x) + z^2, of which float may leave no digit. Errors
// count relative to a row's largest entry: of a chunk's largest term this part, at least, has to be left in its largest
// difference.
inline constexpr float kLeftInFloat = 0.25f;

// Writes the gradients of [first, last). Has arithmetic in A been good enough for that?
template <class A, class T>
bool write_gradients(const GaussianKlBackward& k, const Operands<A, T>& row, void* const* out, double coefficient,
                     int64_t first, int64_t last) {
  const Vec<A> c(static_cast<A>(coefficient)), half(static_cast<A>(0.5 * coefficient)), zero(A(0));
  Vec<A> size(A(0)), terms(A(0)), left(A(0));
  for_lanes<A>(
      last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
        const int64_t i = first + j;
        const Coordinates<A> at(row, i, count);
        const Vec<A> by_mean = at.by_mean(), by_variance = fmadd(at.z, at.z, at.expm1_x);
        if constexpr (std::is_same_v<A, float>) {
          size = size + by_mean.abs() + by_variance.abs();
          if (out[kPriorLogVar] != nullptr)
            terms = max_of(fmadd(at.z, at.z, at.expm1_x.abs()), terms), left = max_of(by_variance.abs(), left);
        }
        const auto write = [&](int operand, Vec<A> value) __attribute__((always_inline)) {
          if (out[operand] == nullptr) return;
          if constexpr (std::is_void_v<T>) {
            store_any(out[operand], k.grad[operand].dtype, i, value, count);
          } else {
            store_lanes<A>(static_cast<T*>(out[operand]) + i, value, count);
          }
        };
        write(kMean, c * by_mean);
        write(kLogVar, half * at.expm1_x);
        write(kPriorMean, zero - c * by_mean);
        write(kPriorLogVar, zero - half * by_variance);
      });
  if constexpr (!std::is_same_v<A, float>) return true;
  return fits_float(sum_of(size)) && max_lane(left) >= kLeftInFloat * max_lane(terms);
}

}  // namespace

void gaussian_kl_forward(const GaussianKlForward& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsOut out[] = {{}};
  dispatch_operands(k.in, [&]<class T>() {
    RowTiles<kGaussianOperands, 1>(k.in, out, k.dims)
        .run(begin, end, [&](int64_t row, const void* const* in, void* const*) {
          const double weight = k.weight != nullptr ? k.weight[row] : 1;
          const Operands<double, void> wide{k.in, in};
          const auto part = [&](int64_t first, int64_t last) {
            if constexpr (std::is_void_v<T>) {
              return sum_terms(wide, first, last);
            } else {
              double sum = 0;
              for (int64_t b = first; b < last; b += kChunk) {
                const int64_t n = std::min(last, b + kChunk);
                const double chunk = sum_terms(Operands<float, T>{k.in, in}, b, n);
                sum += fits_float(chunk) ? chunk : sum_terms(wide, b, n);
              }
              return sum;
            }
          };
          double loss = 0;
          if (weight != 0)
            loss = weight * 0.5 *
                   merged_segments<double>(k.dims, columns, part, [](double& total, double next) { total += next; });
          store_loss(k, row, loss);
        });
  });
}

void gaussian_kl_backward(const GaussianKlBackward& k, int64_t begin, int64_t end, ForEach columns) {
  dispatch_operands(k.in, [&]<class T>() {
    RowTiles<kGaussianOperands, kGaussianOperands>(k.in, k.grad, k.dims)
        .run(begin, end, [&](int64_t row, const void* const* in, void* const* out) {
          const double coefficient = k.coefficient[row];
          if (coefficient == 0) {
            for (int j = 0; j < kGaussianOperands; ++j) fill_zero_any(out[j], k.grad[j].dtype, k.dims);
            return;
          }
          const Operands<double, void> wide{k.in, in};
          for_segments(k.dims, columns, [&](int64_t first, int64_t last, int64_t) {
            for (int64_t b = first; b < last; b += kChunk) {
              const int64_t n = std::min(last, b + kChunk);
              if constexpr (!std::is_void_v<T>)
                if (fits_float(std::fabs(coefficient)) &&
                    write_gradients(k, Operands<float, T>{k.in, in}, out, coefficient, b, n))
                  continue;
              write_gradients(k, wide, out, coefficient, b, n);
            }
          });
        });
  });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
