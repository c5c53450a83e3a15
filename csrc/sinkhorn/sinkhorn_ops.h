// The private operators of entropic optimal transport: what they take, and their CPU implementations.
//
//   _sinkhorn                       value, f, g and counters; the value is differentiable, f and g are statistics of it
//   _sinkhorn_backward              gradients of the value; differentiable: total derivatives
//   _sinkhorn_double_backward       Hessian of the value along a direction
//   _sinkhorn_potentials            f and g again, differentiable by the implicit function theorem
//   _sinkhorn_potentials_backward, _sinkhorn_potentials_jvp
//   _sinkhorn_plan                  P v or P'v, once differentiable
//   _sinkhorn_plan_backward
//   _sinkhorn_marginals             r, c and <P,C>
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace torch_divergence::transport {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 5>;  // x, y, a, b, eps

// Every operator takes a batch of problems:
//   points   x (B, N, D), y (B, M, D), a (B, N), b (B, M), all float or all double; eps (B,) double
//   ragged   the same without the batch: x (sum of N, D), ..., with offsets (B + 1,) int64
//   matrix   x is C (B, N, M), y absent
//   symmetric: y and b absent, for which x and a stand again; each gradient is that of both roles
#define TD_SINKHORN_PROBLEM \
  const Tensor &x, const OptionalTensor &y, const Tensor &a, const OptionalTensor &b, const Tensor &eps
#define TD_SINKHORN_OPTIONS \
  const OptionalTensor &x_offsets, const OptionalTensor &y_offsets, int64_t cost, double rho_a, double rho_b

// _cpu, _cuda: on tensors of that device. The others take both; on CUDA they are led by the host, over vectors of atoms
// that have been copied to it, and only their sweeps over pairs run on the device.
Tensors6 solve_cpu(TD_SINKHORN_PROBLEM, const OptionalTensor& init, double tol, int64_t max_iter, TD_SINKHORN_OPTIONS);
Tensors5 backward_cpu(const Tensor& grad, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS,
                      Mask mask);
Tensors6 double_backward(const OptionalTensor& vx, const OptionalTensor& vy, const OptionalTensor& va,
                         const OptionalTensor& vb, const OptionalTensor& veps, const Tensor& grad, TD_SINKHORN_PROBLEM,
                         const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS, std::array<bool, 6> mask);
Tensors5 potentials_backward(const OptionalTensor& grad_f, const OptionalTensor& grad_g, TD_SINKHORN_PROBLEM,
                             const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS, Mask mask);
Tensors2 potentials_jvp(const OptionalTensor& vx, const OptionalTensor& vy, const OptionalTensor& va,
                        const OptionalTensor& vb, const OptionalTensor& veps, TD_SINKHORN_PROBLEM, const Tensor& f,
                        const Tensor& g, TD_SINKHORN_OPTIONS);
Tensor plan_cpu(const Tensor& v, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, bool transpose,
                TD_SINKHORN_OPTIONS);
Tensors7 plan_backward(const Tensor& grad, const Tensor& v, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g,
                       bool transpose, TD_SINKHORN_OPTIONS, std::array<bool, 7> mask);
Tensors3 marginals_cpu(TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS);

Tensors6 solve_cuda(TD_SINKHORN_PROBLEM, const OptionalTensor& init, double tol, int64_t max_iter, TD_SINKHORN_OPTIONS);
Tensors5 backward_cuda(const Tensor& grad, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS,
                       Mask mask);
Tensor plan_cuda(const Tensor& v, TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, bool transpose,
                 TD_SINKHORN_OPTIONS);
Tensors3 marginals_cuda(TD_SINKHORN_PROBLEM, const Tensor& f, const Tensor& g, TD_SINKHORN_OPTIONS);

}  // namespace torch_divergence::transport
