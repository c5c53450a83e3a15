// Gradients against central differences, which LibTorch does not offer in C++.
//
// The directional derivative of s(x) = <w, f(x)> along v is compared with <grad s, v> for random w and v. The
// difference is the one of fourth order: where probabilities of 0.05 are divided by, that of second order has no step
// at which truncation and rounding are both below the tolerance.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/autograd.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace gradcheck {

using Tensors = std::vector<at::Tensor>;
using Function = std::function<at::Tensor(const Tensors&)>;

inline constexpr double kStep = 1e-4;
inline constexpr double kTolerance = 1e-8;
inline constexpr int kDirections = 3;

inline Tensors leaves(const Tensors& inputs, const std::vector<bool>& requires_grad) {
  Tensors out;
  for (size_t i = 0; i < inputs.size(); ++i) {
    out.push_back(inputs[i].detach().clone().requires_grad_(requires_grad[i]));
  }
  return out;
}

// <u, v>, where an undefined gradient counts as zero.
inline double scalar_product(const at::Tensor& u, const at::Tensor& v) {
  return u.defined() ? (u * v).sum().item<double>() : 0.0;
}

// Compares only the inputs that are marked, and asks autograd for no other gradient.
inline testing::AssertionResult check_marked(const Function& f, const Tensors& inputs,
                                             const std::vector<bool>& requires_grad) {
  const Tensors x = leaves(inputs, requires_grad);
  Tensors wanted;
  for (const at::Tensor& t : x) {
    if (t.requires_grad()) {
      wanted.push_back(t);
    }
  }
  const at::Tensor y = f(x);
  const at::Tensor w = at::randn_like(y.detach());
  const Tensors grads =
      torch::autograd::grad({(w * y).sum()}, wanted, {}, /*retain_graph=*/std::nullopt, /*create_graph=*/false,
                            /*allow_unused=*/true);

  for (int k = 0; k < kDirections; ++k) {
    Tensors v;
    double analytic = 0.0;
    size_t next = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      v.push_back(requires_grad[i] ? at::randn_like(inputs[i]) : at::zeros_like(inputs[i]));
      if (requires_grad[i]) {
        analytic += scalar_product(grads[next++], v[i]);
      }
    }
    const auto s = [&](double steps) {
      Tensors moved;
      for (size_t i = 0; i < x.size(); ++i) {
        moved.push_back(inputs[i].detach() + steps * kStep * v[i]);
      }
      // Leaves again: f may itself differentiate.
      return scalar_product(w, f(leaves(moved, requires_grad)).detach());
    };
    const double numeric = (8 * (s(1) - s(-1)) - (s(2) - s(-2))) / (12 * kStep);
    const double error = std::abs(numeric - analytic) / std::max(1.0, std::abs(analytic));
    if (!(error <= kTolerance)) {  // NaN fails
      return testing::AssertionFailure() << "directional derivative: autograd " << analytic << ", central difference "
                                         << numeric << ", error " << error;
    }
  }
  return testing::AssertionSuccess();
}

// All inputs together, then each one alone: what is not needed must not be missed, nor disturb what is.
inline testing::AssertionResult gradients_match(const Function& f, const Tensors& inputs) {
  const auto all = check_marked(f, inputs, std::vector<bool>(inputs.size(), true));
  if (!all) {
    return all;
  }
  for (size_t i = 0; i < inputs.size() && inputs.size() > 1; ++i) {
    std::vector<bool> only(inputs.size(), false);
    only[i] = true;
    const auto one = check_marked(f, inputs, only);
    if (!one) {
      return testing::AssertionFailure() << "with only input " << i << " requiring grad: " << one.message();
    }
  }
  return testing::AssertionSuccess();
}

// The same for g(x, w) = sum_i <u_i, d<w, f(x)>/dx_i>, so that the derivative by the incoming gradient w counts too.
inline testing::AssertionResult second_gradients_match(const Function& f, const Tensors& inputs) {
  Tensors u;
  for (const at::Tensor& t : inputs) {
    u.push_back(at::randn_like(t));
  }
  const size_t n = inputs.size();
  const Function g = [&](const Tensors& x_and_w) {
    Tensors x(x_and_w.begin(), x_and_w.begin() + static_cast<std::ptrdiff_t>(n));
    for (at::Tensor& t : x) {
      // A view, so that an input that is held fixed here still has the first gradient.
      t = t.requires_grad() ? t.view_as(t) : t.detach().requires_grad_();
    }
    const Tensors grads = torch::autograd::grad({f(x)}, x, {x_and_w[n]}, /*retain_graph=*/true, /*create_graph=*/true);
    at::Tensor sum = at::zeros({}, at::kDouble);
    for (size_t i = 0; i < n; ++i) {
      sum = sum + (u[i] * grads[i]).sum();
    }
    return sum;
  };
  Tensors x_and_w = inputs;
  {
    const at::NoGradGuard no_grad;
    x_and_w.push_back(at::randn_like(f(inputs)));
  }
  return gradients_match(g, x_and_w);
}

}  // namespace gradcheck
