// The last of many long rows, for the calls whose memory traffic and instructions static_report.py counts.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdlib>
#include <memory>
#include <random>

#include "core/row_pair.h"
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
};

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
