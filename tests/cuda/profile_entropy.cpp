// Calls of the entropy kernels whose memory traffic and instructions static_report.py counts.
#include "entropy/entropy.h"
#include "profile_rows.h"

// Returns the number of classes of the row that is run. The other arguments are those of every loss.
extern "C" int64_t profile_entropy(bool half, bool, bool backward, bool, bool) {
  const td::DType type = half ? td::DType::BFloat16 : td::DType::Float;
  const Matrix x(type, 1), grad(type);
  const PerRow rows(td::EntropyStat::kSize);
  // About what the forward leaves of such a row.
  td::EntropyStat{8, 4, 4, 8}.store(rows.stats() + (kRows - 1) * td::EntropyStat::kSize);
  const td::SingleRow row{x.in(), td::kLogits, kClasses, 1};
  if (!backward) {
    td::cuda::entropy_forward({row, nullptr, rows.loss.get(), false, rows.stats()}, kRows, nullptr, nullptr);
  } else {
    td::cuda::entropy_backward({row, rows.coefficients(), rows.stats(), grad.out()}, kRows, nullptr, nullptr);
  }
  return kClasses;
}
