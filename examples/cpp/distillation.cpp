// Knowledge distillation on handwritten digits: the C++ twin of ../python/distillation.py, without the picture.
//
// A convolutional teacher learns from all 1297 training labels. A small student then sees 100 labels only: once alone,
// and once together with the teacher's logits on all the training images, which cost no label. The student's loss is
// that of Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2:
//
//     alpha T^2 KL(teacher_T || student_T) + (1 - alpha) cross_entropy(student, label)
//
// The gain in test accuracy is measured over 10 seeds. The program fails if the teacher does not reach 97 %, or if the
// 95 % interval of the mean gain reaches down to 0.
//
//     distillation            about 10 seconds
//     distillation --quick    the same with 5 seeds and fewer epochs
#include <torch/torch.h>
#include <torch_divergence/torch_divergence.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <optional>

#include "common.h"
#include "digits.h"
#include "program.h"

namespace td = torch_divergence;
namespace nn = torch::nn;

constexpr double kTemperature = 4.0;
constexpr double kAlpha = 0.9;
constexpr int64_t kLabelled = 100;

nn::Sequential make_student() {
  return nn::Sequential{nn::Flatten(), nn::Linear(64, 16), nn::ReLU(), nn::Linear(16, 10)};
}

// Test accuracy at the end. The seed chooses the labelled images and the start, with a teacher or without.
double train_student(const Digits& data, const std::optional<torch::Tensor>& teacher_logits, int seed, int epochs) {
  torch::manual_seed(seed);
  auto labelled = torch::randperm(data.train_images.size(0), torch::kLong).slice(0, 0, kLabelled);
  auto images = data.train_images.index({labelled}), labels = data.train_labels.index({labelled});
  auto student = make_student();
  torch::optim::Adam optimizer(student->parameters(), torch::optim::AdamOptions(5e-3));
  const auto options = td::KLDivOptions().temperature(kTemperature);
  for (int epoch = 1; epoch <= epochs; ++epoch) {
    for (const auto& batch : torch::randperm(data.train_images.size(0), torch::kLong).split(kBatch)) {
      auto loss = td::cross_entropy(student->forward(images), labels);
      if (teacher_logits) {
        auto kl =
            td::kl_div(student->forward(data.train_images.index({batch})), teacher_logits->index({batch}), options);
        loss = kAlpha * kTemperature * kTemperature * kl + (1 - kAlpha) * loss;
      }
      descend(optimizer, loss);
    }
  }
  return accuracy(student, data.test_images, data.test_labels);
}

int run(bool quick) {
  const int n_seeds = quick ? 5 : 10, teacher_epochs = quick ? 15 : 30, student_epochs = quick ? 25 : 40;
  torch::set_num_threads(1);  // such small models gain nothing from a second thread
  const auto start = std::chrono::steady_clock::now();

  auto data = load_digits();
  std::printf("teacher: all %d labels\n", static_cast<int>(data.train_images.size(0)));
  auto teacher = train_classifier(data, teacher_epochs);
  const double teacher_accuracy = accuracy(teacher, data.test_images, data.test_labels);
  torch::Tensor teacher_logits;
  {
    torch::NoGradGuard no_grad;
    teacher_logits = teacher->forward(data.train_images);
  }

  std::printf("student: %d labels, alone and with the teacher's logits\n", static_cast<int>(kLabelled));
  auto alone = torch::empty({n_seeds}, torch::kDouble), distilled = torch::empty_like(alone);
  for (int seed = 1; seed <= n_seeds; ++seed) {
    const double a = train_student(data, std::nullopt, seed, student_epochs);
    const double d = train_student(data, teacher_logits, seed, student_epochs);
    std::printf("  seed %2d  alone %.1f %%  distilled %.1f %%\n", seed, a, d);
    alone[seed - 1] = a;
    distilled[seed - 1] = d;
  }

  // 97.5 % quantile of Student's t at n_seeds - 1 degrees of freedom: the half-width of a 95 % interval in standard
  // errors.
  const double t_quantile = quick ? 2.776 : 2.262;
  const auto gains = distilled - alone;
  const double gain = gains.mean().item<double>();
  const double half_width = t_quantile * gains.std().item<double>() / std::sqrt(n_seeds);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("teacher %.2f %%\n", teacher_accuracy);
  std::printf("student alone %.2f %%\n", alone.mean().item<double>());
  std::printf("student distilled %.2f %%\n", distilled.mean().item<double>());
  std::printf("gain %+.2f points, 95 %% interval [%+.2f, %+.2f], %d seeds\n", gain, gain - half_width,
              gain + half_width, n_seeds);
  std::printf("time %.0f s\n", seconds);
  if (teacher_accuracy < 97 || gain - half_width <= 0) {
    std::fprintf(stderr, "FAILED: the teacher must reach 97 %% and the interval must lie above 0\n");
    return 1;
  }
  return 0;
}

int main(int argc, char** argv) { return run_program(argc, argv, run); }
