// Calls of the cross-entropy kernels whose memory traffic and instructions static_report.py counts.
#include <vector>

#include "cross_entropy/cross_entropy.h"
#include "profile_rows.h"

// Two rows of logits. Returns the number of classes of the row that is run. `near`: KL below 1/2.
extern "C" int64_t profile_cross_entropy(bool half, bool near, bool backward, bool, bool) {
  const td::DType type = half ? td::DType::BFloat16 : td::DType::Float;
  const Matrix p(type, 1), q(type, near ? 1 : 2), grad(type);
  const PerRow rows(td::CrossEntropyStat::kSize);
  kl_statistics(p, q).store(rows.stats() + (kRows - 1) * td::CrossEntropyStat::kSize);
  const td::CrossEntropyRows pair{{p.in(), q.in(), td::kLogits, td::kLogits, kClasses, 1}, 0};
  if (!backward) {
    td::cuda::cross_entropy_forward({pair, nullptr, rows.loss.get(), false, rows.stats()}, kRows, nullptr, nullptr);
  } else {
    td::cuda::cross_entropy_backward({pair, rows.coefficients(), rows.stats(), {}, grad.out()}, kRows, nullptr,
                                     nullptr);
  }
  return kClasses;
}

// Class labels over logits.
extern "C" int64_t profile_cross_entropy_labels(bool half, bool, bool backward, bool, bool) {
  const td::DType type = half ? td::DType::BFloat16 : td::DType::Float;
  const Matrix x(type, 1), grad(type);
  const PerRow rows(td::LabelStat::kSize);
  td::LabelStat{8, 4, 12, 12}.store(rows.stats() + (kRows - 1) * td::LabelStat::kSize);
  const std::vector<int64_t> labels(kRows, 1000);
  const td::LabelRows row{{x.in(), td::kLogits, kClasses, 1}, labels.data(), 0};
  if (!backward) {
    td::cuda::cross_entropy_labels_forward({row, nullptr, rows.loss.get(), false, rows.stats()}, kRows, nullptr,
                                           nullptr);
  } else {
    td::cuda::cross_entropy_labels_backward({row, rows.coefficients(), rows.stats(), grad.out()}, kRows, nullptr,
                                            nullptr);
  }
  return kClasses;
}
