// The C++ faces of cross_entropy and entropy: the same operators as Python's, which tests/test_cross_entropy.py
// compares with exact values.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_divergence/torch_divergence.h>

#include <sstream>

namespace td = torch_divergence;
namespace F = torch::nn::functional;

namespace {

bool close(const at::Tensor& a, const at::Tensor& b) { return at::allclose(a, b, 1e-10, 1e-12); }

struct CrossEntropy : testing::Test {
  void SetUp() override { torch::manual_seed(0); }
  at::Tensor x = torch::randn({6, 5}, at::kDouble).requires_grad_();
  at::Tensor labels = torch::tensor({0, 4, -100, 2, 1, 3});
};

TEST_F(CrossEntropy, LabelsEqualPyTorch) {
  const auto options = td::CrossEntropyOptions().label_smoothing(0.1);
  const auto loss = td::cross_entropy(x, labels, options);
  const auto want = F::cross_entropy(x, labels, F::CrossEntropyFuncOptions().label_smoothing(0.1));
  EXPECT_TRUE(close(loss, want));
  EXPECT_TRUE(close(torch::autograd::grad({loss}, {x})[0], torch::autograd::grad({want}, {x})[0]));
  EXPECT_TRUE(close(td::cross_entropy(x, labels), F::cross_entropy(x, labels)));
}

TEST_F(CrossEntropy, IsEntropyPlusDivergence) {
  const auto target = torch::randn({6, 5}, at::kDouble);
  const auto none = td::Reduction::None;
  const auto got =
      td::cross_entropy(x, target, td::CrossEntropyOptions().target_space(td::Space::Logits).reduction(none));
  const auto want = td::entropy(target, td::EntropyOptions().reduction(none)) +
                    td::kl_div(x, target, td::KLDivOptions().reduction(none));
  EXPECT_TRUE(close(got, want));
}

TEST_F(CrossEntropy, OptionsReachTheOperator) {
  const auto weight = torch::tensor({1.0, 0.0, 1.0, 0.5, 2.0, 1.0});
  auto options = td::CrossEntropyOptions().ignore_index(3).temperature(2.0).row_weight(weight).normalizer(4.0);
  auto y = labels.clone();
  y[2] = 77;  // its weight must be 0, or this is out of range
  EXPECT_THROW(td::cross_entropy(x, y, options), c10::ValueError);
  y[2] = 3;
  const auto rows = F::cross_entropy(x / 2, y, F::CrossEntropyFuncOptions().reduction(torch::kNone));
  EXPECT_TRUE(close(td::cross_entropy(x, y, options), (rows * weight * (y != 3)).sum() / 4));
  EXPECT_THROW(td::cross_entropy(x, y, td::CrossEntropyOptions().target_space(td::Space::Probs)), c10::ValueError);
  const auto moved = x.t().contiguous();
  EXPECT_TRUE(close(td::cross_entropy(moved, labels, td::CrossEntropyOptions().dim(0)), td::cross_entropy(x, labels)));
}

TEST_F(CrossEntropy, InplaceGradient) {
  const auto want = torch::autograd::grad({td::cross_entropy(x, labels)}, {x})[0];
  const auto logits = x * 1;
  const auto* const storage = logits.const_data_ptr();
  td::cross_entropy(logits, labels, td::CrossEntropyOptions().inplace_grad(true)).backward();
  EXPECT_TRUE(close(x.grad(), want));
  EXPECT_TRUE(close(logits.detach(), want));
  EXPECT_EQ(logits.const_data_ptr(), storage);
}

TEST_F(CrossEntropy, Modules) {
  td::CrossEntropyLoss criterion(td::CrossEntropyOptions().label_smoothing(0.1));
  EXPECT_TRUE(close(criterion(x, labels), td::cross_entropy(x, labels, criterion->options)));
  std::ostringstream text;
  text << *criterion;
  EXPECT_EQ(text.str(),
            "torch_divergence::CrossEntropyLoss(label_smoothing=0.1, ignore_index=-100, space=logits, temperature=1, "
            "dim=-1, reduction=mean)");
  EXPECT_THROW(td::CrossEntropyLoss(td::CrossEntropyOptions().normalizer(3.0)), c10::ValueError);

  td::EntropyLoss entropy(td::EntropyOptions().space(td::Space::Probs));
  const auto p = x.softmax(-1);
  EXPECT_TRUE(close(entropy(p), -(p * p.log()).sum(-1).mean()));
  const auto weight = torch::tensor({1.0, 0.0, 0.0, 0.0, 0.0, 0.0});
  EXPECT_TRUE(close(entropy(p, weight), -(p[0] * p[0].log()).sum()));
  torch::nn::AnyModule any(entropy);
  EXPECT_TRUE(close(any.forward(p), entropy(p)));
}

}  // namespace
