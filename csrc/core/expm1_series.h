// phi(u) = expm1(-u) + u near 0, where expm1 itself would lose its digits.
#pragma once
#include "core/host_device.h"

namespace torch_divergence {

// phi(u)/u^2 = 1/2 - u/6 + u^2/24 - ... for |u| <= 1/2. Float: Chebyshev interpolation, relative error 3e-8; double: 15
// terms of the series, to the last bit. V is a scalar or a SIMD vector of A; fma(a, b, c) = a b + c.
template <class A, class V, class Fma>
TD_HOST_DEVICE V phi_over_square(V u, const Fma& fma) {
  if constexpr (sizeof(A) == 4) {
    V y = fma(V(-1.9944874e-4f), u, V(1.3982186e-3f));
    y = fma(y, u, V(-8.3332361e-3f));
    y = fma(y, u, V(4.1665791e-2f));
    y = fma(y, u, V(-0.16666667f));
    return fma(y, u, V(0.50000001f));
  } else {
    constexpr int kTerms = 15;
    double factorial = 2;
    double c[kTerms];
    for (int k = 0; k < kTerms; ++k) {
      c[k] = (k % 2 ? -1 : 1) / factorial;
      factorial *= k + 3;
    }
    V y = V(c[kTerms - 1]);
    for (int k = kTerms - 2; k >= 0; --k) y = fma(y, u, V(c[k]));
    return y;
  }
}

}  // namespace torch_divergence
