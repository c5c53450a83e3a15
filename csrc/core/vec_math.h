// Loads, stores and elementary functions on at::vec::Vectorized, for the CPU kernels.
//
// Everything here lives in the instruction set's own namespace and is always inlined: a *_cpu.cpp is compiled once per
// set, and a shared weak symbol compiled for AVX-512 would crash an older machine.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define TD_INLINE inline __attribute__((always_inline))

namespace torch_divergence::cpu::CPU_CAPABILITY {

using at::vec::fmadd;
template <class A>
using Vec = at::vec::Vectorized<A>;
template <class A>
inline constexpr int kLanes = Vec<A>::size();
template <class A>
inline constexpr A kInf = std::numeric_limits<A>::infinity();

// f(0) ... f(N - 1), each a constant. Loops over arrays of vectors are written with it: GCC unrolls its own loops only
// after it has decided which arrays can live in registers.
template <int N, class F>
TD_INLINE void unrolled(const F& f) {
  [&]<int... k>(std::integer_sequence<int, k...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, k>()), ...);
  }
  (std::make_integer_sequence<int, N>());
}

// Arithmetic happens in A: float for float and the half types, double for double and wherever float is not enough.

// kLanes<A> values of type T, widened in registers.
template <class A, class T>
TD_INLINE Vec<A> load(const T* x) {
  if constexpr (std::is_same_v<A, T>) {
    return Vec<A>::loadu(x);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    __m512 f;
    if constexpr (std::is_same_v<A, float>) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        f = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
      } else {
        f = _mm512_cvtph_ps(raw);
      }
      return f;
    } else if constexpr (std::is_same_v<T, float>) {
      return _mm512_cvtps_pd(_mm256_loadu_ps(x));
    } else {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)));
      } else {
        return _mm512_cvtps_pd(_mm256_cvtph_ps(raw));
      }
    }
#elif defined(CPU_CAPABILITY_AVX2)
    if constexpr (std::is_same_v<A, float>) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
      } else {
        return _mm256_cvtph_ps(raw);
      }
    } else if constexpr (std::is_same_v<T, float>) {
      return _mm256_cvtps_pd(_mm_loadu_ps(x));
    } else {
      const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16)));
      } else {
        return _mm256_cvtps_pd(_mm_cvtph_ps(raw));
      }
    }
#else
    A lanes[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) lanes[i] = static_cast<A>(static_cast<float>(x[i]));
    return Vec<A>::loadu(lanes);
#endif
  }
}

// Rounds to nearest even.
template <class A, class T>
TD_INLINE void store(T* y, Vec<A> v) {
  if constexpr (std::is_same_v<A, T>) {
    v.store(y);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<A, float>) {
      __m256i raw;
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        raw = at::vec::cvtfp32_bf16(v);
      } else {
        raw = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), raw);
      return;
    }
    if constexpr (std::is_same_v<A, double> && std::is_same_v<T, float>) {
      _mm256_storeu_ps(y, _mm512_cvtpd_ps(v));
      return;
    }
#elif defined(CPU_CAPABILITY_AVX2)
    if constexpr (std::is_same_v<A, float>) {
      __m128i raw;
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        raw = at::vec::cvtfp32_bf16(v);
      } else {
        raw = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y), raw);
      return;
    }
    if constexpr (std::is_same_v<A, double> && std::is_same_v<T, float>) {
      _mm_storeu_ps(y, _mm256_cvtpd_ps(v));
      return;
    }
#endif
    A lanes[kLanes<A>];
    v.store(lanes);
    for (int i = 0; i < kLanes<A>; ++i) y[i] = static_cast<T>(static_cast<float>(lanes[i]));
  }
}

// What masked loads and stores of the first count lanes take.
#if defined(CPU_CAPABILITY_AVX512)
template <class A>
TD_INLINE std::conditional_t<std::is_same_v<A, float>, __mmask16, __mmask8> first_lanes(int64_t count) {
  return static_cast<std::conditional_t<std::is_same_v<A, float>, __mmask16, __mmask8>>((1u << count) - 1);
}
#elif defined(CPU_CAPABILITY_AVX2)
template <class A>
TD_INLINE __m256i first_lanes(int64_t count) {
  if constexpr (std::is_same_v<A, float>) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  } else {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
}
#endif

// The first count lanes; the others are fill. What lies behind them in memory is not touched.
template <class A, class T>
TD_INLINE Vec<A> load(const T* x, int64_t count, A fill) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, T>) {
    if constexpr (std::is_same_v<A, float>) {
      return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes<A>(count), x);
    } else {
      return _mm512_mask_loadu_pd(_mm512_set1_pd(fill), first_lanes<A>(count), x);
    }
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, T>) {
    const __m256i mask = first_lanes<A>(count);
    if constexpr (std::is_same_v<A, float>) {
      return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(x, mask), _mm256_castsi256_ps(mask));
    } else {
      return _mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(x, mask), _mm256_castsi256_pd(mask));
    }
  }
#endif
  T lanes[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = static_cast<T>(fill);
  std::memcpy(lanes, x, static_cast<size_t>(count) * sizeof(T));
  return load<A>(lanes);
}
template <class A, class T>
TD_INLINE void store(T* y, Vec<A> v, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, T>) {
    if constexpr (std::is_same_v<A, float>) {
      return _mm512_mask_storeu_ps(y, first_lanes<A>(count), v);
    } else {
      return _mm512_mask_storeu_pd(y, first_lanes<A>(count), v);
    }
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, T>) {
    if constexpr (std::is_same_v<A, float>) {
      return _mm256_maskstore_ps(y, first_lanes<A>(count), v);
    } else {
      return _mm256_maskstore_pd(y, first_lanes<A>(count), v);
    }
  }
#endif
  T lanes[kLanes<A>];
  store<A>(lanes, v);
  std::memcpy(y, lanes, static_cast<size_t>(count) * sizeof(T));
}

// f(offset, count) for each vector of [0, n); count < kLanes only in the last. f is inlined twice, so that the body of
// the loop has no tail in it.
template <class A, class F>
TD_INLINE void for_lanes(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, std::integral_constant<int, kLanes<A>>{});
  if (i < n) f(i, static_cast<int>(n - i));
}
// In for_lanes: whole vectors are loaded plainly, the tail with its fill.
template <class A, class T, class Count>
TD_INLINE Vec<A> load_lanes(const T* x, Count count, A fill) {
  if constexpr (std::is_same_v<Count, int>) {
    return load<A>(x, count, fill);
  } else {
    return load<A>(x);
  }
}
template <class A, class T, class Count>
TD_INLINE void store_lanes(T* y, Vec<A> v, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    store<A>(y, v, count);
  } else {
    store<A>(y, v);
  }
}

// Any NaN operand may be lost here: the sums that follow a maximum see it.
TD_INLINE Vec<float> max_of(Vec<float> a, Vec<float> b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return Vec<float>::blendv(b, a, a > b);
#endif
}
TD_INLINE Vec<double> max_of(Vec<double> a, Vec<double> b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_pd(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_pd(a, b);
#else
  return Vec<double>::blendv(b, a, a > b);
#endif
}
TD_INLINE Vec<float> min_of(Vec<float> a, Vec<float> b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_ps(a, b);
#else
  return Vec<float>::blendv(b, a, a < b);
#endif
}
TD_INLINE Vec<double> min_of(Vec<double> a, Vec<double> b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_pd(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_pd(a, b);
#else
  return Vec<double>::blendv(b, a, a < b);
#endif
}

// where(mask, a, b); a lane of the mask is all ones or all zeros, as comparisons leave it.
template <class A>
TD_INLINE Vec<A> select(Vec<A> mask, Vec<A> a, Vec<A> b) {
  return Vec<A>::blendv(b, a, mask);
}
template <class A>
TD_INLINE bool all(Vec<A> mask) {
  return mask.zero_mask() == 0;  // a lane of ones is a NaN, not zero
}
template <class A>
TD_INLINE bool any(Vec<A> mask) {
  return mask.zero_mask() != (1 << kLanes<A>)-1;
}

template <class A>
TD_INLINE int first_lane(Vec<A> mask) {
  return __builtin_ctz(~static_cast<unsigned>(mask.zero_mask()));
}

// op over all lanes, lower half against upper half until one is left; op takes vector registers as it takes numbers.
template <class A, class Op>
TD_INLINE A fold(Vec<A> v, const Op& op) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 whole = v;
    const __m256 eight = op(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
    const __m256 eight = v;
#endif
    const __m128 four = op(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = op(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(op(two, _mm_movehdup_ps(two)));
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512d whole = v;
    const __m256d four = op(_mm512_castpd512_pd256(whole), _mm512_extractf64x4_pd(whole, 1));
#else
    const __m256d four = v;
#endif
    const __m128d two = op(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(op(two, _mm_unpackhi_pd(two, two)));
  }
#else
  A lanes[kLanes<A>];
  v.store(lanes);
  for (int n = kLanes<A> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] = op(lanes[i], lanes[i + n]);
  return lanes[0];
#endif
}

TD_INLINE double sum_of(Vec<double> v) {
  return fold(
      v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
// In double: a lane may hold 1 and its neighbour 1e-9.
TD_INLINE double sum_of(Vec<float> v) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 whole = v;
  const Vec<double> low = _mm512_cvtps_pd(_mm512_castps512_ps256(whole)),
                    high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(whole, 1));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 whole = v;
  const Vec<double> low = _mm256_cvtps_pd(_mm256_castps256_ps128(whole)),
                    high = _mm256_cvtps_pd(_mm256_extractf128_ps(whole, 1));
#else
  float lanes[kLanes<float>];
  double wide[kLanes<float>];
  v.store(lanes);
  for (int i = 0; i < kLanes<float>; ++i) wide[i] = static_cast<double>(lanes[i]);
  const auto low = Vec<double>::loadu(wide), high = Vec<double>::loadu(wide + kLanes<double>);
#endif
  return sum_of(low + high);
}
template <class A>
TD_INLINE A max_lane(Vec<A> v) {
  return fold(
      v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}
template <class A>
TD_INLINE A min_lane(Vec<A> v) {
  return fold(
      v, [](auto a, auto b) __attribute__((always_inline)) { return a < b ? a : b; });
}

// e^x at about 1 ulp: k = round(x log2 e), r = x - k ln 2 with ln 2 in two parts (Cody and Waite), a polynomial for e^r
// (degree 6, Chebyshev interpolation of (e^r - 1 - r)/r^2 on |r| <= ln(2)/2, relative error 1e-8), and 2^k. Gradual
// underflow; -inf -> 0, +inf -> inf, NaN -> NaN. Beyond +-104 the result is 0 or inf, so clamping there changes
// nothing.
//
// kBounded: the caller knows that x is in [-1e5, 0], or does not mind what it gets: no clamp.
template <bool kBounded = false>
TD_INLINE Vec<float> exp_of(Vec<float> x) {
  constexpr float kLog2e = 1.442695041f, kLn2Hi = 0x1.62e4p-1f, kLn2Lo = 0x1.7f7d1cp-20f;
  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold.
  constexpr float kMagic = 12582912.f;
  constexpr float c6 = 0.0013926250830f, c5 = 0.0083632328837f, c4 = 0.041666554213f, c3 = 0.16666576666f, c2 = 0.5f;
#if defined(CPU_CAPABILITY_AVX512)
  __m512 c = x;
  if constexpr (!kBounded)
    c = _mm512_min_ps(_mm512_set1_ps(104.f), _mm512_max_ps(_mm512_set1_ps(-104.f), c));  // NaN passes
  const __m512 k =
      _mm512_sub_ps(_mm512_fmadd_ps(c, _mm512_set1_ps(kLog2e), _mm512_set1_ps(kMagic)), _mm512_set1_ps(kMagic));
  __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(kLn2Hi), c);
  r = _mm512_fnmadd_ps(k, _mm512_set1_ps(kLn2Lo), r);
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(c6), r, _mm512_set1_ps(c5));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c4));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c3));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c2));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(y, k);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 c = _mm256_min_ps(_mm256_set1_ps(104.f), _mm256_max_ps(_mm256_set1_ps(-104.f), x));
  const __m256 shifted = _mm256_fmadd_ps(c, _mm256_set1_ps(kLog2e), _mm256_set1_ps(kMagic));
  const __m256 k = _mm256_sub_ps(shifted, _mm256_set1_ps(kMagic));
  __m256 r = _mm256_fnmadd_ps(k, _mm256_set1_ps(kLn2Hi), c);
  r = _mm256_fnmadd_ps(k, _mm256_set1_ps(kLn2Lo), r);
  __m256 y = _mm256_fmadd_ps(_mm256_set1_ps(c6), r, _mm256_set1_ps(c5));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c4));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c3));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c2));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.f));
  y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(1.f));
  // 2^k in two factors: k reaches -150, where one exponent field would not do.
  const __m256i whole = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(_mm256_set1_ps(kMagic)));
  const __m256i half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
  const auto pow2 = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(y, pow2(half)), pow2(rest));
#else
  float lanes[kLanes<float>];
  x.store(lanes);
  for (float& v : lanes) {
    const float c = v > 104.f ? 104.f : v < -104.f ? -104.f : v;
    const float shifted = c * kLog2e + kMagic, k = shifted - kMagic;
    const float r = (c - k * kLn2Hi) - k * kLn2Lo;
    const float y = (((((c6 * r + c5) * r + c4) * r + c3) * r + c2) * r + 1.f) * r + 1.f;
    const int32_t whole = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kMagic), half = whole >> 1,
                  rest = whole - half;
    const float e = y * std::bit_cast<float>((half + 127) << 23) * std::bit_cast<float>((rest + 127) << 23);
    v = v != v ? v : e;
  }
  return Vec<float>::loadu(lanes);
#endif
}
template <bool kBounded = false>
TD_INLINE Vec<double> exp_of(Vec<double> x) {
  return x.exp();
}

// log u for a u > 0 of which u - 1 is known better than from u itself: without the cancellation at 1, and without the
// end that log1p has at u = 0.
TD_INLINE Vec<double> log_of(Vec<double> u, Vec<double> u_minus_1) {
  const Vec<double> near = u_minus_1.abs() < Vec<double>(0.5);
  if (all(near)) return u_minus_1.log1p();
  return select(near, u_minus_1.log1p(), u.log());
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
