// Outputs of the size of the input: at::empty_like, on transparent huge pages where that pays.
//
// Touching fresh memory costs more than the arithmetic of these losses: cloning 64 MB takes 16 ms on 4 KB pages, 4 ms
// on 2 MB pages, 3 ms in memory touched before. So outputs of kPage and more are aligned to 2 MB and advised
// MADV_HUGEPAGE, and one freed block of at most kMaxKept is kept for the next request of its size (a training loop
// frees each step's gradient before it makes the next). empty_cache() returns it.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstddef>

namespace torch_divergence {

inline constexpr size_t kHugePage = size_t{2} << 20;
inline constexpr size_t kMaxKept = size_t{256} << 20;

// A CPU tensor like t (dtype, sizes, and strides if t is dense), uninitialised.
at::Tensor empty_like_large(const at::Tensor& t);

// Frees the kept block. Returns how many bytes that were.
size_t release_kept_block();

}  // namespace torch_divergence
