// cudaStream_t, for signatures of kernels that are read without CUDA's headers.
#pragma once

struct CUstream_st;

namespace torch_divergence::cuda {
using Stream = CUstream_st*;
}
