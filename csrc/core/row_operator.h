// What the operators of all row losses share: tensors that may be absent, weights, statistics, and a Function's
// options.
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace torch_divergence {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;

inline Tensor undefined_unless(bool wanted, Tensor t) { return wanted ? std::move(t) : Tensor(); }
inline OptionalTensor if_defined(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
inline Tensor contiguous_double(const Tensor& t) { return t.to(at::kDouble).contiguous(); }
inline bool is_half(const Tensor& t) { return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16; }
// A row of weight 0 gets exactly 0, whatever the incoming gradient.
inline Tensor weighted(const Tensor& g, const Tensor& weight) {
  return weight.defined() ? at::where(weight == 0, 0, g * weight) : g;
}
// A masked output: nothing, in 0 elements.
inline Tensor nothing_like(const Tensor& t) { return at::empty({0}, t.options()); }

// A row's statistics: x's shape with `size` doubles for its classes.
inline Tensor empty_stat(const Tensor& x, int64_t size) {
  at::DimVector sizes(x.sizes());
  sizes.back() = size;
  return at::empty(sizes, x.options().dtype(at::kDouble));
}
inline const double* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr<double>() : nullptr; }

// sum of weight[i] loss[i stride]; no weight is 1, and a row of weight 0 is not read.
inline double weighted_sum(const double* weight, const double* loss, int64_t stride, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i)
    if (weight == nullptr || weight[i] != 0) sum += (weight != nullptr ? weight[i] : 1) * loss[stride * i];
  return sum;
}

// A number into a 0-dim tensor on the CPU; what is beyond its type becomes an infinity, where fill_() would raise.
inline void write_loss(const at::Tensor& loss, double value) {
  if (loss.scalar_type() == at::kDouble) {
    *loss.mutable_data_ptr<double>() = value;
  } else {
    *loss.mutable_data_ptr<float>() = static_cast<float>(value);
  }
}

// The options of a Function: integers, numbers and booleans, each kept in its context under a name of its own.
template <class... O>
class SavedOptions {
 public:
  static void pack(torch::autograd::AutogradContext* ctx, O... options) {
    int i = 0;
    ((ctx->saved_data["option" + std::to_string(i++)] = options), ...);
  }
  // f(options...)
  template <class F>
  static auto with(torch::autograd::AutogradContext* ctx, const F& f) {
    return with(ctx, f, std::index_sequence_for<O...>());
  }

 private:
  template <class F, size_t... I>
  static auto with(torch::autograd::AutogradContext* ctx, const F& f, std::index_sequence<I...>) {
    return f(unpack<O>(ctx->saved_data.at("option" + std::to_string(I)))...);
  }
  template <class T>
  static T unpack(const c10::IValue& value) {
    if constexpr (std::is_same_v<T, double>) {
      return value.toDouble();
    } else if constexpr (std::is_same_v<T, bool>) {
      return value.toBool();
    } else {
      return value.toInt();
    }
  }
};

}  // namespace torch_divergence
