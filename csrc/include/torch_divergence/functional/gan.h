/// The original GAN: a game whose value is the Jensen-Shannon divergence.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch_divergence/export.h>

#include <cstdint>

namespace torch_divergence {

/// The generator's side of the game.
enum class GANLossKind : std::uint8_t {
  Nonsaturating,  ///< mean softplus(-f): keeps its gradient while the discriminator wins
  Minimax,        ///< -mean softplus(f): what the discriminator maximises, minimised
};
TD_API const char* to_string(GANLossKind kind);

/// The discriminator's loss of Goodfellow et al., "Generative Adversarial Nets", 2014, from logits, D = sigmoid(logit):
///
///     mean softplus(-r) + mean softplus(f) = -(mean log D(real) + mean log(1 - D(fake))) = -V
///
/// `real_logits` and `fake_logits` may have any shapes, with at least one element each, the same dtype (a half type may
/// meet float32, and is computed in float32) and device. Returns a scalar. At the optimal discriminator V is
/// 2 JS(real, fake) - log 4. Twice differentiable in both; an infinite logit on the right side costs 0.
///
/// @throws c10::ValueError for dtypes or devices that do not fit and for tensors without elements.
///
/// Example:
///
///     at::Tensor loss = torch_divergence::gan_discriminator_loss(d->forward(x), d->forward(g->forward(z).detach()));
TD_API at::Tensor gan_discriminator_loss(const at::Tensor& real_logits, const at::Tensor& fake_logits);

/// The generator's loss of the same paper: mean softplus(-f), or with Minimax -mean softplus(f), whose gradient
/// vanishes while the discriminator recognises every fake. Shapes, dtypes and errors as in `gan_discriminator_loss`.
TD_API at::Tensor gan_generator_loss(const at::Tensor& fake_logits, GANLossKind kind = GANLossKind::Nonsaturating);

/// (V + log 4) / 2, with V as in `gan_discriminator_loss`: in nats, and in expectation a lower bound on the
/// Jensen-Shannon divergence of the two distributions for any discriminator that was not fitted on these samples; equal
/// to it for the optimal one.
TD_API at::Tensor gan_js_estimate(const at::Tensor& real_logits, const at::Tensor& fake_logits);

}  // namespace torch_divergence
