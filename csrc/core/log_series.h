// The natural logarithm in float, for the kernels: its polynomial.
#pragma once
#include "core/host_device.h"

namespace torch_divergence {

// log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)): f - f^2/2 + f^3 P(f), P the Chebyshev interpolation of degree 7;
// relative error 2e-8. V is float or a SIMD vector of it; fma(a, b, c) = a b + c.
template <class V, class Fma>
TD_HOST_DEVICE V log1p_float(V f, const Fma& fma) {
  V y = fma(V(-0.0790274367f), f, V(0.126223192f));
  y = fma(y, f, V(-0.129981831f));
  y = fma(y, f, V(0.142144963f));
  y = fma(y, f, V(-0.166412815f));
  y = fma(y, f, V(0.200010449f));
  y = fma(y, f, V(-0.25000307f));
  y = fma(y, f, V(0.333333313f));
  return fma(f * f, fma(y, f, V(-0.5f)), f);
}

}  // namespace torch_divergence
