// Calls of the KL kernels whose memory traffic and instructions static_report.py counts: the last of many long rows.
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
};

}  // namespace

// Returns the number of classes of the row that is run. `near`: KL below 1/2.
extern "C" int64_t profile_kl_div(bool half, bool near, bool backward, bool wrt_p, bool wrt_q) {
  const td::DType type = half ? td::DType::BFloat16 : td::DType::Float;
  const Matrix p(type, 1), q(type, near ? 1 : 2), grad_p(type), grad_q(type);
  const Storage loss = zeros(kRows * sizeof(float)), stat = zeros(kRows * td::KlDivStat::kSize * sizeof(double)),
                coefficient = zeros(kRows * sizeof(double));
  static_cast<double*>(coefficient.get())[kRows - 1] = 1;
  auto* const statistics = static_cast<double*>(stat.get());
  statistics[kRows * td::KlDivStat::kSize - 1] = near ? 0.1 : 4;  // KL, which tells the forms apart
  simt::options = {};
  simt::options.order = simt::Order::Forward, simt::options.first_block = kRows - 1;
  const td::RowPair rows{p.in(), q.in(), td::kLogits, td::kLogits, kClasses, 1};
  if (!backward) {
    td::cuda::kl_div_forward({rows, nullptr, loss.get(), false, statistics}, kRows, nullptr, nullptr);
  } else {
    td::cuda::kl_div_backward({rows, static_cast<double*>(coefficient.get()), statistics,
                               wrt_p ? grad_p.out() : td::RowsOut{}, wrt_q ? grad_q.out() : td::RowsOut{}},
                              kRows, nullptr, nullptr);
  }
  return kClasses;
}
