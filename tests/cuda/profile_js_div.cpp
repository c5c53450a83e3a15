// Calls of the Jensen-Shannon kernels whose memory traffic and instructions static_report.py counts.
#include "js_div/js_div.h"
#include "profile_rows.h"

// Returns the number of classes of the row that is run. `near`: P and Q are equal.
extern "C" int64_t profile_js_div(bool half, bool near, bool backward, bool wrt_p, bool wrt_q) {
  const td::DType type = half ? td::DType::BFloat16 : td::DType::Float;
  const Matrix p(type, 1), q(type, near ? 1 : 2), grad_p(type), grad_q(type);
  const PerRow rows(td::JsDivStat::kSize);
  // About what the forward leaves of such rows.
  const double lse = std::log(static_cast<double>(kClasses)) + 2;
  td::JsDivStat{lse, 0, lse, 0, near ? 0.0 : 9.0, near ? 0.0 : -9.0, 0, 0, near ? 0 : 0.4}.store(
      rows.stats() + (kRows - 1) * td::JsDivStat::kSize);
  const td::JsDivRows pair{{p.in(), q.in(), td::kLogits, td::kLogits, kClasses, 1}, 0.5, false};
  if (!backward) {
    td::cuda::js_div_forward({pair, nullptr, rows.loss.get(), false, rows.stats()}, kRows, nullptr, nullptr);
  } else {
    td::cuda::js_div_backward({pair, rows.coefficients(), rows.stats(), wrt_p ? grad_p.out() : td::RowsOut{},
                               wrt_q ? grad_q.out() : td::RowsOut{}},
                              kRows, nullptr, nullptr);
  }
  return kClasses;
}
