// Powers of 2 and their logarithms, for soft minima.
#pragma once
#include <cmath>
#include <iterator>
#include <numbers>

#include "core/vec_math.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {

// 2^t = 2^(t - floor t) 2^floor(t), the first factor by a polynomial on [0, 1): minimax in the relative error (Remez),
// 7e-8 in float and 3e-18 in double. t up to 1000 in double, 120 in float; down to -inf, which gives 0; NaN stays.
template <class A>
struct Exp2Polynomial;
template <>
struct Exp2Polynomial<float> {
  static constexpr float c[] = {0.99999992506f,      0.69315307320263f,    0.240153617021126f,
                                0.0558263181162335f, 0.00898934002358191f, 0.00187757670002f};
};
template <>
struct Exp2Polynomial<double> {
  static constexpr double c[] = {0.999999999999999997,    0.693147180559946235,     0.240226506959054714,
                                 0.0555041086657111406,   0.00961812909879262171,   0.00133335586615757574,
                                 0.000154035114464905525, 0.0000152531902488312434, 1.32081934957471215e-6,
                                 1.02544573790145502e-7,  6.55445716265483915e-9,   6.27243446480288956e-10};
};
template <class A>
TD_INLINE Vec<A> exp2_fraction(Vec<A> r) {
  constexpr auto& c = Exp2Polynomial<A>::c;
  constexpr int n = static_cast<int>(std::size(Exp2Polynomial<A>::c));
  Vec<A> y(c[n - 1]);
#pragma GCC unroll 16
  for (int k = n - 2; k >= 0; --k) y = fmadd(y, r, Vec<A>(c[k]));
  return y;
}
#if defined(CPU_CAPABILITY_AVX2)
// In the range where 2^floor(t) is a normal number. NaN stays: its floor converts to 0x80000000, of which the shift
// leaves nothing.
TD_INLINE __m256 exp2_in_range(__m256 t) {
  const __m256 k = _mm256_floor_ps(t);
  const __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(k), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(exp2_fraction<float>(_mm256_sub_ps(t, k))), e));
}
TD_INLINE __m256d exp2_in_range(__m256d t) {
  const __m256d k = _mm256_floor_pd(t);
  const __m256i e = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(k)), 52);
  return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(exp2_fraction<double>(_mm256_sub_pd(t, k))), e));
}
#endif

// Below the normal range, 0: a subnormal result costs the processor a hundred times a normal one. NaN compares false
// with "less", and passes.
TD_INLINE Vec<float> exp2_of(Vec<float> t) {
#if defined(CPU_CAPABILITY_AVX512)
  // 0x9: t - floor(t), no inexact flag. scalef takes the floor of its exponent itself.
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(-126.f), _CMP_NLT_UQ),
                                exp2_fraction<float>(_mm512_reduce_ps(t, 0x9)), t);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_andnot_ps(_mm256_cmp_ps(t, _mm256_set1_ps(-126.f), _CMP_LT_OQ), exp2_in_range(t));
#else
  float lanes[kLanes<float>];
  t.store(lanes);
  for (float& v : lanes) v = v < -126.f ? 0.f : std::exp2(v);
  return Vec<float>::loadu(lanes);
#endif
}
TD_INLINE Vec<double> exp2_of(Vec<double> t) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(t, _mm512_set1_pd(-1022.), _CMP_NLT_UQ),
                                exp2_fraction<double>(_mm512_reduce_pd(t, 0x9)), t);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_andnot_pd(_mm256_cmp_pd(t, _mm256_set1_pd(-1022.), _CMP_LT_OQ), exp2_in_range(t));
#else
  double lanes[kLanes<double>];
  t.store(lanes);
  for (double& v : lanes) v = v < -1022. ? 0. : std::exp2(v);
  return Vec<double>::loadu(lanes);
#endif
}

// log2 u within 2e-16 of the larger of 1 and itself, for u >= 3/4; 0 gives -inf, inf and NaN stay. u = 2^k m with m in
// [sqrt(1/2), sqrt(2)) and log m = 2 artanh((m - 1)/(m + 1)) by its series, cut off at 1e-17.
TD_INLINE Vec<double> log2_of(Vec<double> u) {
  constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd, kExponent = -(int64_t{1} << 52);
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i bits = _mm512_castpd_si512(u);
  const __m512i above = _mm512_sub_epi64(bits, _mm512_set1_epi64(kSqrtHalf));
  const Vec<double> k = _mm512_cvtepi64_pd(_mm512_srai_epi64(above, 52));
  const Vec<double> m =
      _mm512_castsi512_pd(_mm512_sub_epi64(bits, _mm512_and_si512(above, _mm512_set1_epi64(kExponent))));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i bits = _mm256_castpd_si256(u);
  // Not negative: u is at least sqrt(1/2), or what comes out is not used.
  const __m256i above = _mm256_sub_epi64(bits, _mm256_set1_epi64x(kSqrtHalf));
  constexpr double kTwo52 = 0x1p52;  // its low bits hold an integer added to it
  const __m256i two52 = _mm256_castpd_si256(_mm256_set1_pd(kTwo52));
  const Vec<double> k =
      _mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(_mm256_srli_epi64(above, 52), two52)), _mm256_set1_pd(kTwo52));
  const Vec<double> m =
      _mm256_castsi256_pd(_mm256_sub_epi64(bits, _mm256_and_si256(above, _mm256_set1_epi64x(kExponent))));
#else
  double whole[kLanes<double>], mantissa[kLanes<double>];
  u.store(mantissa);
  for (int i = 0; i < kLanes<double>; ++i) {
    const auto bits = std::bit_cast<int64_t>(mantissa[i]), above = bits - kSqrtHalf;
    whole[i] = static_cast<double>(above >> 52);
    mantissa[i] = std::bit_cast<double>(bits - (above & kExponent));
  }
  const auto k = Vec<double>::loadu(whole), m = Vec<double>::loadu(mantissa);
#endif
  const Vec<double> one(1.0), f = (m - one) / (m + one), s = f * f;
  Vec<double> series(2 * std::numbers::log2e / 21);
  unrolled<10>([&](auto n) __attribute__((always_inline)) {
    series = fmadd(series, s, Vec<double>(2 * std::numbers::log2e / (19 - 2 * decltype(n)::value)));
  });
  const Vec<double> y = fmadd(f, series, k);
  const Vec<double> usual = (u >= Vec<double>(0.75)) & (u < Vec<double>(kInf<double>));
  return all(usual) ? y : select(usual, y, u.log2());
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
