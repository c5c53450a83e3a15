// The last of many long rows, for the calls whose memory traffic and instructions static_report.py counts.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdlib>
#include <memory>
#include <random>

#include "kl_div/kl_div.h"
#include "simt.h"

namespace td = torch_divergence;

namespace {

constexpr int64_t kRows = 256, kClasses = 65536;  // so many rows that none is split over blocks

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Storage = std::unique_ptr<void, Free>;

Storage zeros(size_t bytes) { return Storage(std::calloc(bytes, 1)); }

struct Matrix {
  Storage storage;
  td::DType type;
  td::RowLayout layout;

  explicit Matrix(td::DType type_) : storage(zeros(kRows * kClasses * sizeof(float))), type(type_) {
    layout.dims = 1, layout.sizes[0] = kRows, layout.strides[0] = kClasses;
  }
  Matrix(td::DType type_, unsigned seed) : Matrix(type_) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, 2);
    for (int64_t j = (kRows - 1) * kClasses; j < kRows * kClasses; ++j) {
      if (type == td::DType::Float) {
        static_cast<float*>(storage.get())[j] = normal(random);
      } else {
        static_cast<c10::BFloat16*>(storage.get())[j] = normal(random);
      }
    }
  }
  td::RowsIn in() const { return {storage.get(), type, layout}; }
  td::RowsOut out() const { return {storage.get(), type, layout}; }
  // Of the row that is run.
  double at(int64_t j) const {
    const int64_t i = (kRows - 1) * kClasses + j;
    return type == td::DType::Float ? static_cast<const float*>(storage.get())[i]
                                    : static_cast<float>(static_cast<const c10::BFloat16*>(storage.get())[i]);
  }
};

// What the forward of KL divergence leaves of two rows of logits: a gradient that did not sum to 0 would be written
// twice.
inline td::KlDivStat kl_statistics(const Matrix& p, const Matrix& q) {
  td::KlDivScan scan;
  scan.raise(100, 100, 1);
  for (int64_t j = 0; j < kClasses; ++j) {
    const double t = p.at(j) - 100, s = q.at(j) - 100;
    scan.sum_p += std::exp(t), scan.sum_q += std::exp(s), scan.dot += std::exp(t) * (t - s);
  }
  return scan.finish(1);
}

// Statistics, losses and coefficients of the rows; `stat` doubles a row.
struct PerRow {
  Storage loss = zeros(kRows * sizeof(float)), stat, coefficient = zeros(kRows * sizeof(double));

  explicit PerRow(int stat_size) : stat(zeros(kRows * static_cast<size_t>(stat_size) * sizeof(double))) {
    static_cast<double*>(coefficient.get())[kRows - 1] = 1;
    simt::options = {};
    simt::options.order = simt::Order::Forward, simt::options.first_block = kRows - 1;
  }
  double* stats() const { return static_cast<double*>(stat.get()); }
  double* coefficients() const { return static_cast<double*>(coefficient.get()); }
};

}  // namespace
