// What the examples share: their command line, and a step of an optimizer.
#pragma once

#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <string_view>

// `main` of an example: run(quick) returns the exit code, and an exception is an error message.
inline int run_program(int argc, char** argv, int (*run)(bool quick)) {
  std::setvbuf(stdout, nullptr, _IOLBF, 1 << 12);  // progress appears line by line in a pipe too
  const bool quick = argc == 2 && std::string_view(argv[1]) == "--quick";
  if (argc > 1 && !quick) {
    std::fprintf(stderr, "usage: %s [--quick]\n", argv[0]);
    return 2;
  }
  try {
    return run(quick);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

inline void descend(torch::optim::Optimizer& optimizer, const torch::Tensor& loss) {
  optimizer.zero_grad();
  loss.backward();
  optimizer.step();
}
