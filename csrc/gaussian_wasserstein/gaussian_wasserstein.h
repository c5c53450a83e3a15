// W_2^2 between Gaussians: |m1 - m2|^2 + B(S1, S2), with the Bures distance between covariances
//
//   B(S1, S2) = tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2
//
// (Dowson and Landau, "The Frechet distance between multivariate normal distributions", 1982; Bhatia, Jain and Lim, "On
// the Bures-Wasserstein distance between positive definite matrices", 2019).
//
// How it is computed. Any factors S1 = A A', S2 = B B' and the singular values B'A = W diag(s) V' give
//
//   Y1 = A V, Y2 = B W:   Y1 Y1' = S1,  Y2 Y2' = S2,  Y2' Y1 = diag(s),   B(S1, S2) = |Y1 - Y2|^2
//
// which, unlike the traces, cancels to first order only where the covariances are close: there X = T12 - I gets one
// step of Newton's method on S2 - S1 = X S1 + S1 X + X S1 X, and B = |X A|^2 has the accuracy of S2 - S1. The optimal
// map from 1 to 2 is T12 = Y2 diag(1/s) Y2', that from 2 to 1 is T21 = Y1 diag(1/s) Y1', and dB = <I - T12, dS1> + <I -
// T21, dS2>. Directions with s = 0 are left out: where a covariance is singular, that is the finite part of the
// derivative.
//
// The derivative of T12, from T12 S1 T12 = S2:   T12 S1 dT + dT S1 T12 = dS2 - T12 dS1 T12,
// a Lyapunov equation with K = S1 T12 = Y1 diag(s) Y1^-1, Y1^-1 = diag(1/s) Y2', hence diagonal in these coordinates:
//
//   K  X + X K' = Z:   X = Y1 ((Y1^-1 Z Y1^-1')_ij / (s_i + s_j)) Y1'
//   K' X + X K  = Z:   X = Y1^-1' ((Y1' Z Y1)_ij / (s_i + s_j)) Y1^-1
#pragma once
