// The GAN's losses, as compositions. V = mean log D(real) + mean log(1 - D(fake)), D = sigmoid of the logit.
#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <torch/library.h>
#include <torch_divergence/functional/gan.h>

#include <cmath>
#include <string_view>

#include "core/checks.h"
#include "core/composite.h"

namespace torch_divergence {
namespace {

at::Tensor gan_generator_loss_op(const at::Tensor& fake_logits, std::string_view kind) {
  constexpr const char* kName = "gan_generator_loss";
  const bool minimax = check_choice(kName, "kind", kind, "nonsaturating", "minimax");
  const auto fake = checked_real(kName, "fake_logits", fake_logits);
  check_not_empty(kName, "fake_logits", fake);
  return minimax ? -softplus(fake).mean() : softplus(-fake).mean();
}

struct Logits {
  at::Tensor real, fake;
};
Logits checked_logits(const char* name, const at::Tensor& real_logits, const at::Tensor& fake_logits) {
  const auto real = checked_real(name, "real_logits", real_logits);
  const auto fake = checked_like(name, "fake_logits", fake_logits, "real_logits", real_logits, false);
  check_not_empty(name, "real_logits", real);
  check_not_empty(name, "fake_logits", fake);
  return {real, fake};
}

// log 2 - softplus(x) = -log((1 + e^x) / 2). Near 0 the difference has no digits left, elsewhere e^x overflows: each
// branch sees only its own arguments.
at::Tensor log2_minus_softplus(const at::Tensor& x) {
  const auto small = x.abs() < 1;
  const auto near = at::where(small, x, 0), far = at::where(small, 0, x);
  return at::where(small, -(near.expm1() / 2).log1p(), std::log(2.0) - softplus(far));
}

}  // namespace

const char* to_string(GANLossKind kind) {
  switch (kind) {
    case GANLossKind::Nonsaturating:
      return "nonsaturating";
    case GANLossKind::Minimax:
      return "minimax";
  }
  TORCH_CHECK_VALUE(false, "kind: no such value, ", static_cast<int>(kind));
}

at::Tensor gan_discriminator_loss(const at::Tensor& real_logits, const at::Tensor& fake_logits) {
  const auto [real, fake] = checked_logits("gan_discriminator_loss", real_logits, fake_logits);
  return softplus(-real).mean() + softplus(fake).mean();
}

at::Tensor gan_generator_loss(const at::Tensor& fake_logits, GANLossKind kind) {
  return gan_generator_loss_op(fake_logits, to_string(kind));
}

at::Tensor gan_js_estimate(const at::Tensor& real_logits, const at::Tensor& fake_logits) {
  const auto [real, fake] = checked_logits("gan_js_estimate", real_logits, fake_logits);
  return (log2_minus_softplus(-real).mean() + log2_minus_softplus(fake).mean()) / 2;
}

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("gan_discriminator_loss(Tensor real_logits, Tensor fake_logits) -> Tensor", tags);
  m.def("gan_generator_loss(Tensor fake_logits, *, str kind=\"nonsaturating\") -> Tensor", tags);
  m.def("gan_js_estimate(Tensor real_logits, Tensor fake_logits) -> Tensor", tags);
}
namespace {
void register_composites(torch::Library& m) {
  m.impl("gan_discriminator_loss", gan_discriminator_loss);
  m.impl("gan_generator_loss", gan_generator_loss_op);
  m.impl("gan_js_estimate", gan_js_estimate);
}
}  // namespace
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { register_composites(m); }
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { register_composites(m); }

}  // namespace torch_divergence
