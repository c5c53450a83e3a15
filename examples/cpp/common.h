// What several examples need: a classifier of digits, generators and critics, and figures about generated samples.
#pragma once

#include <torch/torch.h>
#include <torch_divergence/torch_divergence.h>

#include <cstdint>
#include <cstdio>
#include <string>

#include "digits.h"
#include "program.h"

constexpr int64_t kBatch = 64;
constexpr int64_t kLatent = 16, kHidden = 128;  // of generators and critics
constexpr int64_t kSamples = 2000;
constexpr double kMaxJs = 0.05;  // nats, between the classes of samples and of training images

// Braces, since they evaluate left to right: each layer draws its random start in the order of the Python program.
inline torch::nn::Sequential make_classifier() {
  namespace nn = torch::nn;
  return nn::Sequential{nn::Conv2d(nn::Conv2dOptions(1, 16, 3).padding(1)),
                        nn::ReLU(),
                        nn::Conv2d(nn::Conv2dOptions(16, 32, 3).padding(1)),
                        nn::ReLU(),
                        nn::MaxPool2d(2),
                        nn::Flatten(),
                        nn::Dropout(0.25),
                        nn::Linear(32 * 4 * 4, 10)};
}

// In per cent.
inline double accuracy(torch::nn::Sequential model, const torch::Tensor& images, const torch::Tensor& labels) {
  torch::NoGradGuard no_grad;
  const bool was_training = model->is_training();
  model->eval();
  const auto correct = model->forward(images).argmax(1) == labels;
  model->train(was_training);
  return 100 * correct.to(torch::kFloat).mean().item<double>();
}

// The images moved by at most one pixel in each direction, all by the same.
inline torch::Tensor shift(const torch::Tensor& images) {
  namespace F = torch::nn::functional;
  const auto offset = torch::randint(3, {2}, torch::kLong);
  const auto padded = F::pad(images, F::PadFuncOptions({1, 1, 1, 1}));
  return padded.narrow(2, offset[0].item<int64_t>(), 8).narrow(3, offset[1].item<int64_t>(), 8);
}

// Learns from all training labels. It is returned in evaluation mode.
inline torch::nn::Sequential train_classifier(const Digits& data, int epochs) {
  torch::manual_seed(0);
  auto classifier = make_classifier();
  torch::optim::Adam optimizer(classifier->parameters(), torch::optim::AdamOptions(5e-3));
  for (int epoch = 1; epoch <= epochs; ++epoch) {
    for (const auto& batch : torch::randperm(data.train_images.size(0), torch::kLong).split(kBatch)) {
      const auto logits = classifier->forward(shift(data.train_images.index({batch})));
      descend(optimizer, torch_divergence::cross_entropy(logits, data.train_labels.index({batch})));
    }
    if (epoch % 5 == 0)
      std::printf("  epoch %2d  test accuracy %.1f %%\n", epoch,
                  accuracy(classifier, data.test_images, data.test_labels));
  }
  classifier->eval();
  return classifier;
}

// Turns Gaussian latents (n, kLatent) into images (n, 1, 8, 8).
inline torch::nn::Sequential make_generator() {
  namespace nn = torch::nn;
  return nn::Sequential{nn::Linear(kLatent, kHidden),
                        nn::BatchNorm1d(kHidden),
                        nn::ReLU(),
                        nn::Linear(kHidden, kHidden),
                        nn::BatchNorm1d(kHidden),
                        nn::ReLU(),
                        nn::Linear(kHidden, 64),
                        nn::Sigmoid(),
                        nn::Unflatten(nn::UnflattenOptions(1, {1, 8, 8}))};
}

// One number for each image: a discriminator's logit or a critic's score.
inline torch::nn::Sequential make_critic(double dropout = 0) {
  namespace nn = torch::nn;
  const auto leaky = nn::LeakyReLUOptions().negative_slope(0.2);
  return nn::Sequential{
      nn::Flatten(),        nn::Linear(64, kHidden),      nn::LeakyReLU(leaky),
      nn::Dropout(dropout), nn::Linear(kHidden, kHidden), nn::LeakyReLU(leaky),
      nn::Dropout(dropout), nn::Linear(kHidden, 1),       nn::Flatten(nn::FlattenOptions().start_dim(0))};
}

// So many images, drawn with replacement.
inline torch::Tensor draw(const torch::Tensor& images, int64_t n) {
  return images.index({torch::randint(images.size(0), {n}, torch::kLong)});
}

// Samples in evaluation mode, the same each time for the same generator.
inline torch::Tensor generate(torch::nn::Sequential generator, int64_t n) {
  torch::NoGradGuard no_grad;
  generator->eval();
  const auto samples = generator->forward(torch::randn({n, kLatent}, at::detail::createCPUGenerator(0)));
  generator->train();
  return samples;
}

struct Verdict {
  int64_t found;  // of the ten digits
  double js, distance;
};

// Measures samples with a classifier that their generator never met, and by a distance to the test images.
//
// - A digit is found if at least 2 % of the samples are classified as it: a fifth of an equal share.
// - JS is the Jensen-Shannon divergence, in nats, of the samples' classes to those of the training labels.
// - The distance is the Sinkhorn divergence of as many samples as there are test images. On its scale `near` is that of
//   training images, and `far` that of images whose pixels are drawn independently, each from the training images.
class Judge {
 public:
  explicit Judge(const Digits& data)
      : classifier_(train_classifier(data, 10)), test_images_(data.test_images), shares_(shares(data.train_labels)) {
    near_ = distance(data.train_images);
    const auto pixels = data.train_images.flatten(1);
    const auto rows = torch::randint(pixels.size(0), pixels.sizes(), at::detail::createCPUGenerator(0), torch::kLong);
    far_ = distance(pixels.gather(0, rows));
  }

  Verdict operator()(const torch::Tensor& samples) {
    torch::NoGradGuard no_grad;
    const auto classes = shares(classifier_->forward(samples).argmax(1));
    const auto probs = torch_divergence::JSDivOptions().space(torch_divergence::Space::Probs);
    return {(classes >= 0.02).sum().item<int64_t>(), torch_divergence::js_div(classes, shares_, probs).item<double>(),
            distance(samples)};
  }

  // Prints the line that says how good the samples are, and whether they pass.
  bool report(const std::string& name, const Verdict& verdict) const {
    std::printf(
        "%s: %d of 10 digits, JS of the classes %.4f, distance %.3f (training images %.3f, independent pixels %.3f)\n",
        name.c_str(), static_cast<int>(verdict.found), verdict.js, verdict.distance, near_, far_);
    const bool passed = verdict.found == 10 && verdict.js < kMaxJs && verdict.distance < (near_ + far_) / 2;
    if (!passed)
      std::fprintf(stderr, "FAILED: all digits, JS below %g and a distance nearer to training images expected\n",
                   kMaxJs);
    return passed;
  }

 private:
  static torch::Tensor shares(const torch::Tensor& classes) {
    return classes.bincount({}, 10).to(torch::kFloat) / classes.size(0);
  }

  // |x - y|^2 / 2 between images, moved at least cost.
  double distance(const torch::Tensor& images) const {
    const auto x = images.slice(0, 0, test_images_.size(0)).flatten(1);
    const auto options = torch_divergence::SinkhornOptions().blur(0.5);
    return torch_divergence::sinkhorn_divergence(x, test_images_.flatten(1), {}, {}, options).item<double>();
  }

  torch::nn::Sequential classifier_;
  torch::Tensor test_images_, shares_;
  double near_, far_;
};
