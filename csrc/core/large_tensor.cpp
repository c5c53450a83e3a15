#include "core/large_tensor.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace torch_divergence {
namespace {

#if defined(__linux__)

// The kept block. Never destroyed: tensors may outlive static destruction. A child of fork gets a copy of block and
// lock; holding the lock across fork makes both usable there.
struct Kept {
  std::mutex mutex;
  void* block = nullptr;
  size_t bytes = 0;

  static Kept& instance() {
    static Kept* const kept = [] {
      auto* created = std::make_unique<Kept>().release();
      pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                     [] { instance().mutex.unlock(); });
      return created;
    }();
    return *kept;
  }
  void* take(size_t wanted) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (block == nullptr || bytes != wanted) return nullptr;
    bytes = 0;
    return std::exchange(block, nullptr);
  }
  // The newest block is the likelier one to be asked for again.
  void give(void* freed, size_t freed_bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (freed_bytes <= kMaxKept) {
        std::swap(block, freed);
        std::swap(bytes, freed_bytes);
      }
    }
    std::free(freed);
  }
  size_t release() {
    void* freed = nullptr;
    size_t freed_bytes = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      std::swap(block, freed);
      std::swap(bytes, freed_bytes);
    }
    std::free(freed);
    return freed_bytes;
  }
};

// Knows a block's size, which a deleter is not told.
struct Block {
  void* data;
  size_t bytes;
};

class HugePageAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    if (n < kHugePage) return c10::GetCPUAllocator()->allocate(n);
    const size_t bytes = (n + kHugePage - 1) / kHugePage * kHugePage;
    void* data = Kept::instance().take(bytes);
    if (data == nullptr) {
      if (posix_memalign(&data, kHugePage, bytes) != 0) return c10::GetCPUAllocator()->allocate(n);  // let it raise
      madvise(data, bytes, MADV_HUGEPAGE);  // advice: a refusal leaves ordinary pages
    }
    auto block = std::make_unique<Block>(Block{data, bytes});
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, block.release(), &HugePageAllocator::free_block, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // data and context differ
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }

 private:
  static void free_block(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    Kept::instance().give(block->data, block->bytes);
  }
};

#endif

}  // namespace

at::Tensor empty_like_large(const at::Tensor& t) {
#if defined(__linux__)
  const auto dtype = t.scalar_type();
  if (t.device().is_cpu() && static_cast<size_t>(t.numel()) * c10::elementSize(dtype) >= kHugePage) {
    static HugePageAllocator* const allocator = std::make_unique<HugePageAllocator>().release();
    const auto strides =
        t.is_non_overlapping_and_dense() ? t.strides().vec() : at::infer_dense_strides(t.sizes(), t.strides());
    const at::Tensor out(at::detail::empty_strided_generic(t.sizes(), strides, allocator,
                                                           c10::DispatchKeySet(c10::DispatchKey::CPU), dtype));
    // What at::empty does under torch.use_deterministic_algorithms(True), so that a part left unwritten shows.
    if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory())
      out.fill_(std::numeric_limits<double>::quiet_NaN());
    return out;
  }
#endif
  return at::empty_like(t);
}

size_t release_kept_block() {
#if defined(__linux__)
  return Kept::instance().release();
#else
  return 0;
#endif
}

}  // namespace torch_divergence
