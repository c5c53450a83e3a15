// From rows to the loss: "none" | "sum" | "mean" | "batchmean", row_weight and normalizer, checked and applied.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace torch_divergence {

class RowReduction {
 public:
  // input has its class dimension last; dims is how many dimensions the caller's input had before them.
  RowReduction(const char* name, const at::Tensor& input, at::ScalarType loss_dtype,
               const std::optional<at::Tensor>& row_weight, std::string_view reduction,
               const std::optional<at::Tensor>& normalizer);

  bool reduces() const { return kind_ != Kind::None; }
  // One weight a row, of the loss's dtype, or nothing.
  const std::optional<at::Tensor>& weight() const { return weight_; }
  // What replaces the denominator of "mean", or nothing.
  const std::optional<at::Tensor>& normalizer() const { return normalizer_; }
  // What multiplies the sum of weighted rows. Reads tensors: only where they hold values.
  double scale() const;
  // Rows already multiplied by their weight -> the loss.
  at::Tensor operator()(const at::Tensor& rows) const;

 private:
  enum class Kind : std::uint8_t { None, Sum, Mean };
  Kind kind_;
  c10::SymInt row_count_;
  std::optional<at::Tensor> weight_;
  std::optional<at::Tensor> normalizer_;
};

// The weights as doubles in row order, checked: finite and not negative. Null for none. On other devices than the CPU
// they are not looked at; the kernels make the loss of a row with a bad weight NaN.
at::Tensor checked_weight(const char* name, const std::optional<at::Tensor>& weight);

}  // namespace torch_divergence
