#include "core/row_layout.h"

namespace torch_divergence {

RowLayout row_layout(const at::Tensor& t) {
  RowLayout layout;
  const int64_t last = t.dim() - 1;
  layout.class_stride = t.size(last) > 1 ? t.stride(last) : 1;
  for (int64_t d = 0; d < last; ++d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 1) continue;
    const int n = layout.dims;
    if (n > 0 && layout.strides[n - 1] == size * stride) {
      layout.sizes[n - 1] *= size;
      layout.strides[n - 1] = stride;
      continue;
    }
    TORCH_CHECK_VALUE(n < RowLayout::kMaxDims, "torch_divergence: a tensor whose leading dimensions need more than ",
                      RowLayout::kMaxDims, " strides is not supported; call contiguous() on it");
    layout.sizes[n] = size;
    layout.strides[n] = stride;
    ++layout.dims;
  }
  return layout;
}

void for_each_parallel(int64_t count, void* context, void (*body)(void*, int64_t)) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}

}  // namespace torch_divergence
