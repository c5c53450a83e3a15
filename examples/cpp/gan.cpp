// A generative adversarial network of handwritten digits: the C++ twin of ../python/gan.py, without the picture.
//
// The discriminator minimises td::gan_discriminator_loss, the generator the non-saturating td::gan_generator_loss,
// after Goodfellow et al., "Generative Adversarial Nets" (2014). As they play, td::gan_js_estimate on the test images
// tells how much of JS(data, samples) the discriminator sees: log 2 = 0.69 where it knows every sample, 0 where it
// knows none. A classifier that the generator never met then judges the samples. The program fails if it does not find
// all ten digits among them, if the JS of their classes to the data's is 0.05 or more, or if they are no nearer to the
// test images than halfway from images of independent pixels to training images.
//
//     gan            half a minute
//     gan --quick    fewer steps
#include <torch/torch.h>
#include <torch_divergence/torch_divergence.h>

#include <cstdio>

#include "common.h"
#include "digits.h"
#include "program.h"

namespace td = torch_divergence;

constexpr double kDropout = 0.3;  // in the discriminator: without, it learns the training images by heart

double js_estimate(torch::nn::Sequential discriminator, const torch::Tensor& images, const torch::Tensor& samples) {
  torch::NoGradGuard no_grad;
  discriminator->eval();
  const auto estimate = td::gan_js_estimate(discriminator->forward(images), discriminator->forward(samples));
  discriminator->train();
  return estimate.item<double>();
}

int run(bool quick) {
  const int steps = quick ? 3000 : 6000;
  torch::set_num_threads(1);  // such small models gain nothing from a second thread
  const auto data = load_digits();
  std::printf("classifier\n");
  Judge judge(data);
  std::printf("generator and discriminator\n");
  torch::manual_seed(0);
  auto generator = make_generator(), discriminator = make_critic(kDropout);
  const auto adam = torch::optim::AdamOptions(1e-3).betas({0.5, 0.99});
  torch::optim::Adam generator_optimizer(generator->parameters(), adam);
  torch::optim::Adam discriminator_optimizer(discriminator->parameters(), adam);
  Verdict verdict{};
  for (int step = 1; step <= steps; ++step) {
    const auto real = draw(data.train_images, kBatch);
    const auto fake = generator->forward(torch::randn({kBatch, kLatent}));
    descend(discriminator_optimizer,
            td::gan_discriminator_loss(discriminator->forward(real), discriminator->forward(fake.detach())));
    descend(generator_optimizer, td::gan_generator_loss(discriminator->forward(fake)));
    if (step % (steps / 10) == 0) {
      const auto samples = generate(generator, kSamples);
      verdict = judge(samples);
      std::printf("  step %d  JS estimate %.3f  %d digits\n", step,
                  js_estimate(discriminator, data.test_images, samples), static_cast<int>(verdict.found));
    }
  }
  return judge.report("gan", verdict) ? 0 : 1;
}

int main(int argc, char** argv) { return run_program(argc, argv, run); }
