// The tensor side of core/rows.h: layouts from tensors, rows over threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "core/rows.h"

namespace torch_divergence {

inline DType kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return DType::Double;
    case at::kHalf:
      return DType::Half;
    case at::kBFloat16:
      return DType::BFloat16;
    default:
      TORCH_INTERNAL_ASSERT(type == at::kFloat, "no kernel for ", type);
      return DType::Float;
  }
}

// The dimensions before the last, neighbours that step alike merged into one.
RowLayout row_layout(const at::Tensor& t);

inline RowsIn rows_in(const at::Tensor& t) {
  return {t.const_data_ptr(), kernel_dtype(t.scalar_type()), row_layout(t)};
}
inline RowsOut rows_out(const at::Tensor& t) {
  return t.numel() > 0 ? RowsOut{t.mutable_data_ptr(), kernel_dtype(t.scalar_type()), row_layout(t)} : RowsOut{};
}

inline int64_t row_count(const at::Tensor& t) { return t.numel() / t.size(-1); }

void for_each_parallel(int64_t count, void* context, void (*body)(void*, int64_t));

// kernel(begin, end, columns) over all rows. Rows go to threads in blocks of at least 32k entries (less does not pay
// for waking a thread); where rows are fewer than threads, each row's columns are split instead.
template <class Kernel>
void parallel_rows(int64_t rows, int64_t classes, const Kernel& kernel) {
  constexpr int64_t kEntries = int64_t{1} << 15;
  if (rows < at::get_num_threads() && classes > kEntries && !at::in_parallel_region()) {
    kernel(int64_t{0}, rows, &for_each_parallel);
    return;
  }
  at::parallel_for(0, rows, (kEntries + classes - 1) / classes,
                   [&](int64_t begin, int64_t end) { kernel(begin, end, nullptr); });
}

}  // namespace torch_divergence
