// Needs functional.h alone: no torch::nn.
#include "evaluate.h"

#include <torch_divergence/functional.h>

namespace td = torch_divergence;

double symmetric_kl(const at::Tensor& student, const at::Tensor& teacher) {
  const at::Tensor forward = td::kl_div(student, teacher);
  const at::Tensor reverse = td::kl_div(student, teacher, td::KLDivOptions().direction(td::Direction::Reverse));
  return (forward.item<double>() + reverse.item<double>()) / 2;
}
