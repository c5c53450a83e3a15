// Powers of 2, for soft minima and the sums behind them.
#pragma once
#include <cmath>

#include "core/vec_math.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {

// 2^t = 2^(t - floor t) 2^floor(t), the first factor by a polynomial on [0, 1): minimax in the relative error (Remez),
// 7e-8 in float and 3e-18 in double. t up to 1000 in double, 120 in float; anything down to kNoScore gives 0; NaN
// stays.
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

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
