// The only spelling in a CUDA source that is not CUDA: how a kernel is launched. The emulator (tests/cuda/emulator)
// defines TD_LAUNCH itself, in its cuda_runtime.h, and compiles the same source as C++.
#pragma once
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime.h>

#ifndef TD_LAUNCH
#define TD_LAUNCH(kernel, grid, block, stream, ...)  \
  do {                                               \
    kernel<<<grid, block, 0, stream>>>(__VA_ARGS__); \
    C10_CUDA_KERNEL_LAUNCH_CHECK();                  \
  } while (false)
#endif
