// Calls of the KL kernels whose memory traffic and instructions static_report.py counts.
#include "profile_rows.h"

// Returns the number of classes of the row that is run. `near`: KL below 1/2.
extern "C" int64_t profile_kl_div(bool half, bool near, bool backward, bool wrt_p, bool wrt_q) {
  const td::DType type = half ? td::DType::BFloat16 : td::DType::Float;
  const Matrix p(type, 1), q(type, near ? 1 : 2), grad_p(type), grad_q(type);
  const PerRow rows(td::KlDivStat::kSize);
  kl_statistics(p, q).store(rows.stats() + (kRows - 1) * td::KlDivStat::kSize);
  const td::RowPair pair{p.in(), q.in(), td::kLogits, td::kLogits, kClasses, 1};
  if (!backward) {
    td::cuda::kl_div_forward({pair, nullptr, rows.loss.get(), false, rows.stats()}, kRows, nullptr, nullptr);
  } else {
    td::cuda::kl_div_backward({pair, rows.coefficients(), rows.stats(), wrt_p ? grad_p.out() : td::RowsOut{},
                               wrt_q ? grad_q.out() : td::RowsOut{}},
                              kRows, nullptr, nullptr);
  }
  return kClasses;
}
