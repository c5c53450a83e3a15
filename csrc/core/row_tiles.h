// Visits rows [begin, end) of several operands at once, handing out contiguous rows. Rows that are contiguous in memory
// are handed out in place. Others (dim != -1, sliced classes, expanded) are gathered a few at a time into a buffer, so
// that neighbouring rows share their cache lines, and outputs are scattered back: no copy of the whole operand.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>

#include "core/rows.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {

inline __attribute__((always_inline)) int64_t bytes_of(DType type) {
  return type == DType::Double ? 8 : type == DType::Float ? 4 : 2;
}

template <int kIn, int kOut>
class RowTiles {
 public:
  RowTiles(const RowsIn (&in)[kIn], const RowsOut (&out)[kOut], int64_t classes)
      : in_(in), out_(out), classes_(classes) {
    // One cache line of neighbours, as long as the buffers stay within a core's own cache.
    constexpr int64_t kEntries = int64_t{1} << 14;
    bool strided = false;
    for (int k = 0; k < kIn; ++k) strided |= gathers(in_[k].data, in_[k].layout);
    for (int k = 0; k < kOut; ++k) strided |= gathers(out_[k].data, out_[k].layout);
    tile_ = strided ? std::clamp<int64_t>(kEntries / classes, 1, 16) : 1;
    for (int k = 0; k < kIn; ++k)
      if (gathers(in_[k].data, in_[k].layout)) in_buffer_[k] = buffer(in_[k].dtype);
    for (int k = 0; k < kOut; ++k)
      if (gathers(out_[k].data, out_[k].layout)) out_buffer_[k] = buffer(out_[k].dtype);
  }

  // visit(row, in pointers, out pointers); a null operand stays null.
  template <class Visit>
  void run(int64_t begin, int64_t end, const Visit& visit) {
    for (int64_t first = begin; first < end; first += tile_) {
      const int64_t count = std::min(tile_, end - first);
      for (int k = 0; k < kIn; ++k)
        if (in_buffer_[k]) move<true>(in_[k].data, in_[k].layout, in_[k].dtype, in_buffer_[k].get(), first, count);
      for (int64_t r = 0; r < count; ++r) {
        const void* in[kIn];
        void* out[kOut];
        for (int k = 0; k < kIn; ++k)
          in[k] = row(in_[k].data, in_[k].layout, in_[k].dtype, in_buffer_[k].get(), first, r);
        for (int k = 0; k < kOut; ++k)
          out[k] = row(out_[k].data, out_[k].layout, out_[k].dtype, out_buffer_[k].get(), first, r);
        visit(first + r, in, out);
      }
      for (int k = 0; k < kOut; ++k)
        if (out_buffer_[k])
          move<false>(out_[k].data, out_[k].layout, out_[k].dtype, out_buffer_[k].get(), first, count);
    }
  }

 private:
  static bool gathers(const void* data, const RowLayout& layout) { return data != nullptr && layout.class_stride != 1; }
  std::unique_ptr<char[]> buffer(DType type) const {
    return std::make_unique_for_overwrite<char[]>(static_cast<size_t>(tile_ * classes_ * bytes_of(type)));
  }
  template <class Pointer>
  Pointer* row(Pointer* data, const RowLayout& layout, DType type, char* buffer, int64_t first, int64_t r) const {
    if (data == nullptr) return nullptr;
    const int64_t at = buffer ? r * classes_ : layout.offset(first + r);
    using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
    return (buffer ? static_cast<Byte*>(buffer) : static_cast<Byte*>(data)) + at * bytes_of(type);
  }
  template <bool kGather, class Pointer>
  void move(Pointer* data, const RowLayout& layout, DType type, char* buffer, int64_t first, int64_t count) const {
    switch (bytes_of(type)) {
      case 2:
        return move_as<kGather, uint16_t>(data, layout, buffer, first, count);
      case 4:
        return move_as<kGather, uint32_t>(data, layout, buffer, first, count);
      default:
        return move_as<kGather, uint64_t>(data, layout, buffer, first, count);
    }
  }
  template <bool kGather, class Word, class Pointer>
  void move_as(Pointer* data, const RowLayout& layout, char* buffer, int64_t first, int64_t count) const {
    using DataWord = std::conditional_t<std::is_const_v<Pointer>, const Word, Word>;
    auto* words = reinterpret_cast<Word*>(buffer);
    DataWord* from[16];
    for (int64_t r = 0; r < count; ++r) from[r] = static_cast<DataWord*>(data) + layout.offset(first + r);
    for (int64_t j = 0; j < classes_; ++j)
      for (int64_t r = 0; r < count; ++r) {
        if constexpr (kGather) {
          words[r * classes_ + j] = from[r][j * layout.class_stride];
        } else {
          from[r][j * layout.class_stride] = words[r * classes_ + j];
        }
      }
  }

  const RowsIn (&in_)[kIn];
  const RowsOut (&out_)[kOut];
  int64_t classes_;
  int64_t tile_ = 1;
  std::unique_ptr<char[]> in_buffer_[kIn], out_buffer_[kOut];
};

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
