#include <torch_divergence/functional.h>

#include "core/cpu_dispatch.h"
#include "core/large_tensor.h"

#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>
#include <torch/version.h>
#include <torch_divergence/version.h>

namespace torch_divergence {
namespace {

// float64 keeps every integer count exact.
std::optional<at::Tensor> number(double value) { return at::scalar_tensor(value, at::kDouble); }

}  // namespace

DistillationOptions& DistillationOptions::normalizer(double value) { return normalizer(number(value)); }
GaussianKLOptions& GaussianKLOptions::normalizer(double value) { return normalizer(number(value)); }
KLEstimateOptions& KLEstimateOptions::normalizer(double value) { return normalizer(number(value)); }
PPOClipOptions& PPOClipOptions::normalizer(double value) { return normalizer(number(value)); }
PPOKLPenaltyOptions& PPOKLPenaltyOptions::normalizer(double value) { return normalizer(number(value)); }

const char* to_string(Space space) {
  switch (space) {
    case Space::Logits:
      return "logits";
    case Space::LogProbs:
      return "log_probs";
    case Space::Probs:
      return "probs";
  }
  TORCH_CHECK_VALUE(false, "space: no such value, ", static_cast<int>(space));
}

const char* to_string(Direction direction) {
  switch (direction) {
    case Direction::Forward:
      return "forward";
    case Direction::Reverse:
      return "reverse";
  }
  TORCH_CHECK_VALUE(false, "direction: no such value, ", static_cast<int>(direction));
}

const char* to_string(Reduction reduction) {
  switch (reduction) {
    case Reduction::None:
      return "none";
    case Reduction::Sum:
      return "sum";
    case Reduction::Mean:
      return "mean";
  }
  TORCH_CHECK_VALUE(false, "reduction: no such value, ", static_cast<int>(reduction));
}

std::string version() { return TORCH_DIVERGENCE_VERSION; }

std::string torch_version() { return TORCH_VERSION; }

std::string cpu_capability() {
  switch (cpu::isa()) {
    case cpu::Isa::Avx512:
      return "AVX512";
    case cpu::Isa::Avx2:
      return "AVX2";
    case cpu::Isa::Default:
      break;
  }
  return "DEFAULT";
}

void empty_cache() { release_kept_block(); }

}  // namespace torch_divergence
