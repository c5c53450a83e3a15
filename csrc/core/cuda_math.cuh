// Scalar arithmetic of the CUDA kernels, for A = float or double.
#pragma once
#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/log_series.h"
#include "core/phi.h"

namespace torch_divergence::cuda {

template <class A>
inline constexpr A kInf = std::numeric_limits<A>::infinity();

// What a kernel computes in whose operands are T.
template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 1/T as the arithmetic has it, wherever T scales: see the CPU kernels.
template <class A>
__device__ double inverse_temperature(double t) {
  return static_cast<double>(static_cast<A>(1 / t));
}

// 2^x to 2 ulp, one instruction; 0 below 2^-126.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0 : ::exp2f(x);
#endif
}

// e^(x/T). Float: what x log2(e)/T rounds off, which for x = -20 would cost 10 ulp, comes back as a factor.
template <class A>
class Exp {
 public:
  __device__ explicit Exp(double inv_t) : inv_t_(inv_t) {}
  __device__ double near(double x) const { return std::exp(x * inv_t_); }
  __device__ double operator()(double x) const { return std::exp(x * inv_t_); }

 private:
  double inv_t_;
};
template <>
class Exp<float> {
 public:
  __device__ explicit Exp(double inv_t)
      : hi_(static_cast<float>(inv_t * kLog2E)), lo_(static_cast<float>(inv_t * kLog2E - static_cast<double>(hi_))) {}
  // NaN where x or x/T is infinite.
  __device__ float near(float x) const {
    const float y = x * hi_, rest = std::fma(x, lo_, std::fma(x, hi_, -y)), e = exp2_approx(y);
    return std::fma(e, rest * 0.69314718f, e);
  }
  // 0 for -inf; for x/T up to 80.
  __device__ float operator()(float x) const { return x * hi_ < -150 ? 0 : near(x); }

 private:
  static constexpr double kLog2E = 1.4426950408889634;
  float hi_, lo_;
};

template <class A>
__device__ A phi_small(A u) {
  return u * u * phi_over_square<A>(u, [](A a, A b, A c) { return std::fma(a, b, c); });
}

template <class A>
__device__ A expm1_small(A x) {
  return x + phi_small(-x);
}

// log u for a normal u > 0 of which u - 1 is known better than from u itself.
inline __device__ double log_of(double u, double u_minus_1) {
  return std::fabs(u_minus_1) < 0.25 ? std::log1p(u_minus_1) : std::log(u);
}
inline __device__ float log_of(float u, float u_minus_1) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;  // u = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
  const auto bits = std::bit_cast<int32_t>(u), k = (bits - kSqrtHalf) >> 23;
  const auto mantissa = std::bit_cast<float>(bits - static_cast<int32_t>(static_cast<uint32_t>(k) << 23));
  const bool near = std::fabs(u_minus_1) < 0.25f;
  const float y =
      log1p_float(near ? u_minus_1 : mantissa - 1, [](float a, float b, float c) { return std::fma(a, b, c); });
  return std::fma(near ? 0 : static_cast<float>(k), 0.693147181f, y);
}

// A sum that remembers what it rounds off (Kahan): as good as one in double, without the slow units for double.
template <class A>
struct Sum {
  A hi = 0, lo = 0;

  __device__ void add(A x) {
    const A y = x + lo, t = hi + y;
    lo = std::isfinite(t) ? y - (t - hi) : 0;
    hi = t;
  }
  __device__ void operator*=(A f) { hi *= f, lo *= f; }
  __device__ double value() const { return static_cast<double>(hi) + static_cast<double>(lo); }
};

// x = hi + lo to twice A's precision.
template <class A>
struct Split {
  A hi, lo;
  __device__ explicit Split(double x, double rest = 0)
      : hi(static_cast<A>(x)), lo(static_cast<A>((x - static_cast<double>(static_cast<A>(x))) + rest)) {}
};
// a - b = rounded + error, exactly (Knuth).
template <class A>
struct Difference {
  A rounded, error;
  __device__ __forceinline__ Difference(A a, A b) : rounded(a - b) {
    const A back = a - rounded;
    error = (a - (rounded + back)) + (back - b);
  }
};
// a - b - c, rounded once relative to itself.
template <class A>
__device__ __forceinline__ A difference_minus(A a, A b, const Split<A>& c) {
  const Difference<A> d(a, b);
  return (d.rounded - c.hi) + (d.error - c.lo);
}

}  // namespace torch_divergence::cuda
