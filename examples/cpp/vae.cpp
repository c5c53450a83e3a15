// A variational autoencoder of handwritten digits with two latent dimensions: the C++ twin of ../python/vae.py, without
// the picture.
//
// Encoder and decoder minimise td::vae_loss, the negative evidence lower bound of Kingma and Welling, "Auto-Encoding
// Variational Bayes" (2013), with a Bernoulli likelihood of each pixel. It is compared on the test images with the
// baseline of a decoder that ignores its latent: the best of those predicts the mean training image, and needs no KL.
// The program fails if the VAE is not at least 2.5 nats below the baseline.
//
//     vae            about 15 seconds
//     vae --quick    fewer epochs, and 1.5 nats
#include <torch/torch.h>
#include <torch_divergence/torch_divergence.h>

#include <cstdint>
#include <cstdio>

#include "digits.h"
#include "program.h"

namespace td = torch_divergence;
namespace nn = torch::nn;
using torch::Tensor;

constexpr int64_t kLatent = 2, kHidden = 128, kBatch = 64;

// Braces, since they evaluate left to right: each layer draws its random start in the order of the Python program.
struct VAEImpl : nn::Module {
  nn::Sequential encoder = register_module(
      "encoder", nn::Sequential{nn::Flatten(), nn::Linear(64, kHidden), nn::ReLU(), nn::Linear(kHidden, kHidden),
                                nn::ReLU(), nn::Linear(kHidden, 2 * kLatent)});
  nn::Sequential decoder = register_module(
      "decoder", nn::Sequential{nn::Linear(kLatent, kHidden), nn::ReLU(), nn::Linear(kHidden, kHidden), nn::ReLU(),
                                nn::Linear(kHidden, 64), nn::Unflatten(nn::UnflattenOptions(1, {1, 8, 8}))});

  struct Output {
    Tensor logits, mean, log_var;  // the reconstruction's logits, and the latent's distribution
  };

  Output forward(const Tensor& images) {
    const auto parameters = encoder->forward(images).chunk(2, 1);
    const auto &mean = parameters[0], &log_var = parameters[1];
    const auto latent = mean + (log_var / 2).exp() * torch::randn_like(mean);
    return {decoder->forward(latent), mean, log_var};
  }
};
TORCH_MODULE(VAE);

// In nats.
struct Loss {
  double negative_elbo, kl;  // the KL that the negative ELBO contains
};

// By so many draws of each latent.
Loss test_loss(VAE vae, const Tensor& test_images, int64_t draws = 1) {
  torch::NoGradGuard no_grad;
  const auto images = test_images.repeat({draws, 1, 1, 1});
  const auto [logits, mean, log_var] = vae->forward(images);
  return {td::vae_loss(logits, images, mean, log_var).item<double>(), td::gaussian_kl(mean, log_var).item<double>()};
}

// The negative ELBO of the best decoder without a latent, with the posterior at the prior.
double baseline_loss(const Digits& data) {
  // One more image, all grey, keeps pixels that are white in every training image from a probability of 0.
  const auto pixels = (data.train_images.sum(0) + 0.5) / (data.train_images.size(0) + 1);
  const auto logits = pixels.logit().expand_as(data.test_images);
  const auto prior = torch::zeros({logits.size(0), kLatent});
  return td::vae_loss(logits, data.test_images, prior, prior).item<double>();
}

int run(bool quick) {
  const int epochs = quick ? 60 : 300;
  const double margin = quick ? 1.5 : 2.5;  // nats
  torch::set_num_threads(1);                // such small models gain nothing from a second thread
  const auto data = load_digits();
  torch::manual_seed(0);
  VAE vae;
  torch::optim::Adam optimizer(vae->parameters(), torch::optim::AdamOptions(2e-3));
  for (int epoch = 1; epoch <= epochs; ++epoch) {
    for (const auto& batch : torch::randperm(data.train_images.size(0), torch::kLong).split(kBatch)) {
      const auto images = data.train_images.index({batch});
      const auto [logits, mean, log_var] = vae->forward(images);
      descend(optimizer, td::vae_loss(logits, images, mean, log_var));
    }
    if (epoch % (epochs / 10) == 0) {
      const auto [loss, kl] = test_loss(vae, data.test_images);
      std::printf("  epoch %3d  negative ELBO of the test images %.2f nats, KL %.2f\n", epoch, loss, kl);
    }
  }

  const auto [loss, kl] = test_loss(vae, data.test_images, 20);
  const double baseline = baseline_loss(data);
  std::printf("vae: negative ELBO of the test images %.2f nats, KL %.2f, without a latent %.2f\n", loss, kl, baseline);
  if (!(loss <= baseline - margin)) {
    std::fprintf(stderr, "FAILED: the negative ELBO must be %g nats below the baseline\n", margin);
    return 1;
  }
  return 0;
}

int main(int argc, char** argv) { return run_program(argc, argv, run); }
