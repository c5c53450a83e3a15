// How kernels are launched. TD_LAUNCH is the only spelling in a CUDA source that is not CUDA: the emulator
// (tests/cuda/emulator) defines it itself, in its cuda_runtime.h, and compiles the same source as C++.
#pragma once
#include <c10/cuda/CUDAException.h>
#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#include <limits>

#include "core/cuda_rows.cuh"
#include "core/cuda_stream.h"

#ifndef TD_LAUNCH
#define TD_LAUNCH(kernel, grid, block, stream, ...)  \
  do {                                               \
    kernel<<<grid, block, 0, stream>>>(__VA_ARGS__); \
    C10_CUDA_KERNEL_LAUNCH_CHECK();                  \
  } while (false)
#endif

namespace torch_divergence::cuda {

// A kernel with so many reductions over the row (RowTask) on all rows of a grid.
template <class Call>
void launch_rows(void (*kernel)(Call, RowGrid, double*, int), const Call& call, const RowGrid& grid, double* workspace,
                 Stream stream, int reductions) {
  if (grid.rows == 0) return;
  const int64_t blocks = grid.blocks();
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "torch_divergence: ", grid.rows,
              " rows are more than CUDA's grid");
  const int launches = grid.segments == 1 ? 1 : reductions + 1;
  for (int launch = 0; launch < launches; ++launch)
    TD_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, call, grid, workspace, launch);
}
// On all rows of a call.
template <class Call>
void launch_rows(void (*kernel)(Call, RowGrid, double*, int), const Call& call, int64_t rows, double* workspace,
                 Stream stream, int reductions) {
  launch_rows(kernel, call, RowGrid(rows, call.rows.classes), workspace, stream, reductions);
}

}  // namespace torch_divergence::cuda
