// Values, gradients, options and errors of kl_div_topk through the C++ API.
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch_divergence/torch_divergence.h>

#include <sstream>
#include <string>

namespace td = torch_divergence;

namespace {

class KLDivTopK : public testing::Test {
 protected:
  void SetUp() override {
    at::manual_seed(0);
    student = at::randn({3, 6}, at::kDouble);
    teacher = at::randn({3, 6}, at::kDouble);
  }
  std::pair<at::Tensor, at::Tensor> top(int64_t k) const {
    auto [log_probs, indices] = at::log_softmax(teacher, -1).topk(k);
    return {indices, log_probs};
  }
  at::Tensor student, teacher;
};

TEST_F(KLDivTopK, OfAllButOneClassIsTheWholeDivergence) {
  const auto [indices, log_probs] = top(5);
  EXPECT_TRUE(at::allclose(td::kl_div_topk(student, indices, log_probs), td::kl_div(student, teacher), 1e-10));
}

TEST_F(KLDivTopK, GradientsMatchDifferences) {
  const auto [indices, log_probs] = top(2);
  for (const auto tail : {td::Tail::Bucket, td::Tail::Zero, td::Tail::RenormTarget, td::Tail::RenormBoth}) {
    for (const auto direction : {td::Direction::Forward, td::Direction::Reverse}) {
      const auto options =
          td::KLDivTopKOptions().tail(tail).direction(direction).temperature(1.5).reduction(td::Reduction::None);
      const gradcheck::Function f = [&, indices = indices](const gradcheck::Tensors& x) {
        return td::kl_div_topk(x[0], indices, x[1], options);
      };
      EXPECT_TRUE(gradcheck::gradients_match(f, {student, log_probs - 0.1})) << td::to_string(tail);
      EXPECT_TRUE(gradcheck::second_gradients_match(f, {student, log_probs - 0.1})) << td::to_string(tail);
    }
  }
}

TEST_F(KLDivTopK, ModuleIsTheFunction) {
  const auto [indices, log_probs] = top(2);
  const auto left = at::full({3}, -1.0, at::kDouble);
  const auto options = td::KLDivTopKOptions().temperature(2.0);
  td::KLDivTopKLoss criterion(options);
  EXPECT_TRUE(at::equal(criterion(student, indices, log_probs, left),
                        td::kl_div_topk(student, indices, log_probs, left, options)));
  std::ostringstream text;
  text << *criterion;
  EXPECT_EQ(text.str(),
            "torch_divergence::KLDivTopKLoss(tail=bucket, direction=forward, space=logits, temperature=2, dim=-1, "
            "reduction=mean)");
}

TEST_F(KLDivTopK, RefusesIndicesOutOfRange) {
  const auto [indices, log_probs] = top(2);
  try {
    td::kl_div_topk(student, indices + 6, log_probs);
    FAIL() << "nothing was raised";
  } catch (const c10::ValueError& error) {
    EXPECT_NE(std::string(error.what()).find("indices holds"), std::string::npos);
  }
}

TEST_F(KLDivTopK, RefusesUndefinedTensors) {
  const auto [indices, log_probs] = top(2);
  EXPECT_THROW(td::kl_div_topk(student, indices, log_probs, at::Tensor(), td::KLDivTopKOptions()), c10::ValueError);
  EXPECT_THROW(td::kl_div_topk(student, at::Tensor(), log_probs), c10::ValueError);
  EXPECT_THROW(td::kl_div_topk(student, indices, at::Tensor()), c10::ValueError);
}

}  // namespace
