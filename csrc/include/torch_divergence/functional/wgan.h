/// The Wasserstein GAN: a critic that estimates the Wasserstein-1 distance.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <torch_divergence/export.h>

#include <functional>
#include <optional>

namespace torch_divergence {

/// The critic's loss of Arjovsky, Chintala and Bottou, "Wasserstein GAN", 2017: mean(fake_scores) - mean(real_scores).
/// For a critic that is 1-Lipschitz its negative is at most W_1(real, fake), and equal to it for the best one.
///
/// Any shapes with at least one element, one dtype (half types are computed in float32) and device. Returns a scalar.
///
/// @throws c10::ValueError for dtypes or devices that do not fit and for tensors without elements.
///
/// Example:
///
///     at::Tensor loss = torch_divergence::wgan_critic_loss(critic->forward(x), critic->forward(fake)) +
///                       10 * torch_divergence::gradient_penalty([&](const at::Tensor& y) { return critic->forward(y);
///                       },
///                                                               x, fake);
TD_API at::Tensor wgan_critic_loss(const at::Tensor& real_scores, const at::Tensor& fake_scores);

/// The generator's loss of the same paper: -mean(fake_scores).
TD_API at::Tensor wgan_generator_loss(const at::Tensor& fake_scores);

/// The gradient penalty of Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, without its factor lambda:
///
///     mean_i (|grad critic(u_i)|_2 - target)^2,   u_i = e_i real_i + (1 - e_i) fake_i,   e_i uniform on [0, 1)
///
/// `real` and `fake` have one shape (B, ...) and floating dtype; `critic` maps a batch to one score a sample, (B) or
/// (B, 1), and must treat the samples apart (no batch normalisation). Only the critic's parameters get gradients, by
/// its double backward: real and fake are detached. Where the gradient's norm is 0, its derivative is taken as 0.
/// `generator` draws e; none means the default one of the device. Grad mode is left as it is; where it is off, so is
/// the penalty's graph.
///
/// @throws c10::ValueError for shapes, dtypes or devices that differ, an empty batch, a target that is negative or not
///   finite, scores of another shape or without a graph to the samples.
TD_API at::Tensor gradient_penalty(const std::function<at::Tensor(const at::Tensor&)>& critic, const at::Tensor& real,
                                   const at::Tensor& fake, double target = 1.0,
                                   std::optional<at::Generator> generator = std::nullopt);

}  // namespace torch_divergence
