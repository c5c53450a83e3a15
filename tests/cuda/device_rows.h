// What the tests of the CUDA kernels share: operands between pages that cannot be touched, references in long double,
// orders of threads.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/rows.h"
#include "simt.h"

namespace td = torch_divergence;

namespace {

using Real = long double;
using td::DType;
constexpr Real kInf = std::numeric_limits<Real>::infinity();
constexpr size_t kPage = 4096;

inline size_t bytes_of(DType type) { return type == DType::Double ? 8 : type == DType::Float ? 4 : 2; }

// Entries between pages that cannot be touched, known to the checker. They begin `offset` entries after the first
// page, aligned as the caching allocator aligns, or end at the last one (kAtEnd). Not initialised: NaN.
class Memory {
 public:
  static constexpr int kAtEnd = -1;

  Memory(DType type, int64_t count, const char* name, bool initialised, int offset = 0) : type_(type) {
    const size_t bytes = static_cast<size_t>(count) * bytes_of(type);
    size_ = ((bytes + kPage) / kPage + 3) * kPage;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_, kPage, PROT_NONE);
    mprotect(base_ + size_ - kPage, kPage, PROT_NONE);
    std::memset(base_ + kPage, 0xff, size_ - 2 * kPage);
    data_ =
        offset == kAtEnd ? base_ + size_ - kPage - bytes : base_ + kPage + static_cast<size_t>(offset) * bytes_of(type);
    buffer_ = std::make_unique<simt::Buffer>(data_, bytes, name, initialised);
  }
  ~Memory() { munmap(base_, size_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  double get(int64_t i) const {
    switch (type_) {
      case DType::Double:
        return data<double>()[i];
      case DType::Half:
        return static_cast<double>(static_cast<float>(data<c10::Half>()[i]));
      case DType::BFloat16:
        return static_cast<double>(static_cast<float>(data<c10::BFloat16>()[i]));
      default:
        return static_cast<double>(data<float>()[i]);
    }
  }
  void set(int64_t i, double x) {
    switch (type_) {
      case DType::Double:
        data<double>()[i] = x;
        return;
      case DType::Half:
        data<c10::Half>()[i] = static_cast<c10::Half>(static_cast<float>(x));
        return;
      case DType::BFloat16:
        data<c10::BFloat16>()[i] = static_cast<c10::BFloat16>(static_cast<float>(x));
        return;
      default:
        data<float>()[i] = static_cast<float>(x);
    }
  }

 private:
  DType type_;
  size_t size_;
  char* base_;
  char* data_;
  std::unique_ptr<simt::Buffer> buffer_;
};

// Rows of an operand in memory.
struct Layout {
  int64_t row_stride = 0, class_stride = 1;  // 0: contiguous
  int offset = 0;
};
class Rows {
 public:
  Rows(DType type, int64_t rows, int64_t classes, const Layout& layout, const char* name, bool initialised = true)
      : type_(type),
        classes_(classes),
        row_stride_(layout.row_stride != 0 ? layout.row_stride : classes),
        class_stride_(layout.class_stride),
        memory_(type, (rows - 1) * row_stride_ + (classes - 1) * class_stride_ + 1, name, initialised, layout.offset) {
    layout_.dims = 1;
    layout_.sizes[0] = rows;
    layout_.strides[0] = row_stride_;
    layout_.class_stride = class_stride_;
  }
  double get(int64_t i, int64_t j) const { return memory_.get(i * row_stride_ + j * class_stride_); }
  void set(int64_t i, int64_t j, double x) { memory_.set(i * row_stride_ + j * class_stride_, x); }
  std::vector<Real> row(int64_t i) const {
    std::vector<Real> x;
    for (int64_t j = 0; j < classes_; ++j) x.push_back(get(i, j));
    return x;
  }
  td::RowsIn in() const { return {memory_.data(), type_, layout_}; }
  td::RowsOut out() const { return {memory_.data(), type_, layout_}; }
  DType type() const { return type_; }

 private:
  DType type_;
  int64_t classes_, row_stride_, class_stride_;
  td::RowLayout layout_;
  Memory memory_;
};

// A row of a matrix of more than 2^31 floats, in memory that is reserved and touched nowhere else: the last one.
class Huge {
 public:
  static constexpr int64_t kClasses = int64_t{1} << 16, kRows = (int64_t{1} << 31) / kClasses + 2;

  Huge()
      : data_(static_cast<float*>(
            mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    layout_.dims = 1, layout_.sizes[0] = kRows, layout_.strides[0] = kClasses;
  }
  ~Huge() { munmap(data_, kBytes); }
  Huge(const Huge&) = delete;
  Huge& operator=(const Huge&) = delete;

  float* row() const { return data_ + (kRows - 1) * kClasses; }
  std::vector<Real> values() const { return {row(), row() + kClasses}; }
  td::RowsIn in() const { return {data_, DType::Float, layout_}; }
  td::RowsOut out() const { return {data_, DType::Float, layout_}; }

 private:
  static constexpr size_t kBytes = static_cast<size_t>(kRows * kClasses) * sizeof(float);
  float* data_;
  td::RowLayout layout_;
};

// -- References and comparisons --------------------------------------------------------------------------------------

inline double normal(std::mt19937_64& random) { return std::normal_distribution<double>()(random); }

inline Real largest(const std::vector<Real>& x) {
  Real r = 0;
  for (const Real v : x)
    if (std::isfinite(v)) r = std::max(r, std::fabs(v));
  return r;
}

// log-probabilities of a row, by log1p of the sum without its largest term.
inline std::vector<Real> log_probs(const std::vector<Real>& x, int space, Real t) {
  std::vector<Real> result(x.size());
  if (space == td::kLogProbs) return x;
  if (space == td::kProbs) {
    std::transform(x.begin(), x.end(), result.begin(), [](Real v) { return std::log(v); });
    return result;
  }
  const auto top = std::max_element(x.begin(), x.end());
  Real others = 0;
  for (auto it = x.begin(); it != x.end(); ++it)
    if (it != top) others += std::exp((*it - *top) / t);
  std::transform(x.begin(), x.end(), result.begin(), [&](Real v) { return (v - *top) / t - std::log1p(others); });
  return result;
}

// Within tolerance * scale; and, of a half type, its own rounding.
inline void expect_close(double got, Real want, Real allowed, DType type, const char* what, int64_t i, int64_t j) {
  const Real most = type == DType::Half ? 65504 : type == DType::Double ? 0x1p1023L : 0x1p127L;
  if (std::fabs(want) > most / 2 && std::fabs(want) < most * 2) return;  // may overflow, or not
  if (std::fabs(want) > most) want = std::copysign(kInf, want);
  if (type == DType::Half) allowed += std::fabs(want) * 0x1p-11L + 0x1p-25L;
  if (type == DType::BFloat16) allowed += std::fabs(want) * 0x1p-8L;
  if (std::isnan(want) || std::isinf(want)) {
    ASSERT_TRUE(std::isnan(want) ? std::isnan(got) : static_cast<Real>(got) == want)
        << what << " of row " << i << ", class " << j << " is " << got << ", expected " << want;
    return;
  }
  ASSERT_LE(std::fabs(static_cast<Real>(got) - want), allowed)
      << what << " of row " << i << ", class " << j << " is " << got << ", expected " << static_cast<double>(want);
}

inline void expect_rows(const Rows& got, int64_t i, const std::vector<Real>& want, Real factor, Real allowed,
                        const char* what) {
  for (size_t j = 0; j < want.size(); ++j) {
    ASSERT_NO_FATAL_FAILURE(expect_close(got.get(i, static_cast<int64_t>(j)), factor * want[j], allowed, got.type(),
                                         what, i, static_cast<int64_t>(j)));
  }
}

// check() in the orders of threads that this machine knows, or in one of them.
template <class F>
void run_orders(bool all, const F& check) {
  for (const simt::Schedule& t : simt::schedules) {
    if (!all && t.seed != 1) continue;
    simt::options = {};
    simt::options.order = t.order, simt::options.seed = t.seed, simt::options.only_buffers = true;
    SCOPED_TRACE("order " + std::to_string(static_cast<int>(t.order)) + ", seed " + std::to_string(t.seed));
    ASSERT_NO_FATAL_FAILURE(check());
  }
}

}  // namespace
