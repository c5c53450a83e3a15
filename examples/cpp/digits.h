// Reads ../data/digits.bin: 1797 handwritten digits of 8 x 8 pixels, see ../data/README.md.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <vector>

// Images are (n, 1, 8, 8) float32 in [0, 1], labels are (n) int64 in 0..9.
struct Digits {
  torch::Tensor train_images, train_labels, test_images, test_labels;
};

// DIGITS_PATH is the file, defined by CMakeLists.txt.
// The digits, split into 1297 to train on and 500 to test on. The rows of the file are in random order.
inline Digits load_digits(const std::filesystem::path& path = DIGITS_PATH) {
  constexpr int64_t n_train = 1297, row_size = 65;
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path.string());
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};

  // to() copies, so the tensors outlive the vector.
  auto rows = torch::from_blob(bytes.data(), {static_cast<int64_t>(bytes.size()) / row_size, row_size}, torch::kUInt8);
  auto images = rows.slice(1, 0, 64).reshape({-1, 1, 8, 8}).to(torch::kFloat) / 16;
  auto labels = rows.select(1, 64).to(torch::kLong);
  return {images.slice(0, 0, n_train), labels.slice(0, 0, n_train), images.slice(0, n_train), labels.slice(0, n_train)};
}
