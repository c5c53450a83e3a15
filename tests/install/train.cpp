// Distils a linear teacher into a linear student and fails unless it works.
#include <torch/torch.h>
#include <torch_divergence/torch_divergence.h>

#include <iostream>

#include "evaluate.h"

namespace td = torch_divergence;

int main() {
  std::cout << "torch_divergence " << td::version() << " for torch " << td::torch_version() << ", "
            << td::cpu_capability() << "\n";
  if (td::version() != TORCH_DIVERGENCE_VERSION) {
    std::cerr << "the headers are of version " << TORCH_DIVERGENCE_VERSION << "\n";
    return 1;
  }

  torch::manual_seed(0);
  const torch::Tensor x = torch::randn({256, 16});
  const torch::Tensor teacher = torch::nn::Linear(16, 10)(x).detach();
  torch::nn::Linear student(16, 10);
  td::KLDivLoss criterion(td::KLDivOptions().temperature(2.0));
  torch::optim::SGD optimizer(student->parameters(), 4.0);

  const double before = symmetric_kl(student(x).detach(), teacher);
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    const torch::Tensor loss = criterion(student(x), teacher);
    loss.backward();
    optimizer.step();
    if (step % 25 == 0) {
      std::cout << "step " << step << ": " << loss.item<double>() << "\n";
    }
  }
  const double after = symmetric_kl(student(x).detach(), teacher);
  std::cout << "symmetric KL " << before << " -> " << after << "\n";
  if (!(after < 0.01 * before)) {
    std::cerr << "the student did not learn\n";
    return 1;
  }

  try {
    td::kl_div(torch::zeros({2, 3}), torch::zeros({2, 4}));
  } catch (const c10::ValueError&) {  // crosses the library's boundary with its type
    return 0;
  }
  std::cerr << "shapes that differ were not refused\n";
  return 1;
}
