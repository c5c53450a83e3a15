// Rows of a tensor as the kernels see them: raw pointers, a layout, no ATen. Serves the CPU kernels and nvcc.
//
// A "row" is one distribution: the entries along the last dimension. The dimensions before it, coalesced, number the
// rows.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace torch_divergence {

enum class DType : int { Float, Double, Half, BFloat16 };

// How an operand describes its distribution. The numbers are those of the private operators' arguments.
enum SpaceCode : int { kLogits = 0, kLogProbs = 1, kProbs = 2 };

struct RowLayout {
  static constexpr int kMaxDims = 16;  // after coalescing; more is refused by row_layout()
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
  int64_t class_stride = 1;

  TD_HOST_DEVICE int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return dims > 0 ? at + row * strides[0] : at;
  }
};

struct RowsIn {
  const void* data = nullptr;
  DType dtype = DType::Float;
  RowLayout layout;
};

struct RowsOut {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::Float;
  RowLayout layout;
};

// Runs body(context, i) for every i in [0, count), in parallel: how a kernel splits one long row where rows are fewer
// than threads. Null: there are rows enough for all threads, do not split. A plain function pointer, because
// std::function would leave weak symbols in the objects of each instruction set.
using ForEach = void (*)(int64_t count, void* context, void (*body)(void* context, int64_t index));

}  // namespace torch_divergence
