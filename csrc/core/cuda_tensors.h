// From tensors to CUDA kernels. TD_CUDA: the library is built with them. TD_CUDA_EMULATED: for the tests, and they run
// on CPU tensors, in place of the CPU kernels, on the emulated device of tests/cuda/emulator.
#pragma once
#include <ATen/core/Tensor.h>

#ifdef TD_CUDA
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace torch_divergence {

inline bool is_for_cuda(const at::Tensor& t) {
#ifdef TD_CUDA_EMULATED
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

#ifdef TD_CUDA
// kernel(call, rows, workspace, stream) on the device and current stream of p; workspace is of so many doubles.
template <class Kernel, class Call>
void run_on_cuda(Kernel kernel, const Call& call, int64_t rows, int64_t workspace, const at::Tensor& p) {
  const c10::cuda::CUDAGuard guard(p.device());
  const auto space = at::empty({workspace}, p.options().dtype(at::kDouble));
  kernel(call, rows, space.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream());
}
#endif

}  // namespace torch_divergence
