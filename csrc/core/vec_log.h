// Masks that stay in a mask register where there are such, and the natural logarithm of float vectors.
#pragma once
#include "core/log_series.h"
#include "core/vec_math.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {

// where(a < b, ...): as select() of vec_math.h, without the way through a vector of ones.
#if defined(CPU_CAPABILITY_AVX512)
TD_INLINE __mmask16 less(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
TD_INLINE __mmask8 less(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
TD_INLINE Vec<float> select(__mmask16 mask, Vec<float> a, Vec<float> b) { return _mm512_mask_blend_ps(mask, b, a); }
TD_INLINE Vec<double> select(__mmask8 mask, Vec<double> a, Vec<double> b) { return _mm512_mask_blend_pd(mask, b, a); }
#else
template <class A>
TD_INLINE Vec<A> less(Vec<A> a, Vec<A> b) {
  return a < b;
}
#endif

// The mask of kLanes<A> marks: bytes that are 0 or -1.
template <class A>
TD_INLINE auto mask_of(const int8_t* marks) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    return _mm_movepi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(marks)));
  } else {
    return static_cast<__mmask8>(_mm_movepi8_mask(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(marks))));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(marks));
    return Vec<A>(_mm256_castsi256_ps(_mm256_cvtepi8_epi32(eight)));
  } else {
    const __m128i four = _mm_loadu_si32(marks);
    return Vec<A>(_mm256_castsi256_pd(_mm256_cvtepi8_epi64(four)));
  }
#else
  A lanes[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = static_cast<A>(marks[i]);
  return Vec<A>::loadu(lanes) != Vec<A>(A(0));
#endif
}

// log u in float, as the one in double of vec_math.h: for a normal u > 0 of which u - 1 is known better than from u
// itself. u = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
TD_INLINE Vec<float> log_of(Vec<float> u, Vec<float> u_minus_1) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  Vec<float> k, mantissa;
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i bits = _mm512_castps_si512(u);
  const __m512i whole = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(kSqrtHalf)), 23);
  k = _mm512_cvtepi32_ps(whole);
  mantissa = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(whole, 23)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i bits = _mm256_castps_si256(u);
  const __m256i whole = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(kSqrtHalf)), 23);
  k = _mm256_cvtepi32_ps(whole);
  mantissa = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(whole, 23)));
#else
  float lanes[kLanes<float>], exponents[kLanes<float>];
  u.store(lanes);
  for (int i = 0; i < kLanes<float>; ++i) {
    const auto bits = std::bit_cast<int32_t>(lanes[i]);
    const int32_t whole = (bits - kSqrtHalf) >> 23;
    exponents[i] = static_cast<float>(whole);
    lanes[i] = std::bit_cast<float>(static_cast<int32_t>(bits - (static_cast<uint32_t>(whole) << 23)));
  }
  k = Vec<float>::loadu(exponents), mantissa = Vec<float>::loadu(lanes);
#endif
  const auto near = less(u_minus_1.abs(), Vec<float>(0.25f));
  const Vec<float> f = select(near, u_minus_1, mantissa - Vec<float>(1.f));
  k = select(near, Vec<float>(0.f), k);
  const auto fma = [](Vec<float> a, Vec<float> b, Vec<float> c) __attribute__((always_inline)) {
    return fmadd(a, b, c);
  };
  return fmadd(k, Vec<float>(0.693147181f), log1p_float(f, fma));
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
