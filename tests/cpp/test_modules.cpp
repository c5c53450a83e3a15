// The modules: options, cloning, printing, serialisation, use in torch::nn containers, training.
#include <gtest/gtest.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>
#include <torch_divergence/modules.h>

#include <sstream>
#include <string>

namespace td = torch_divergence;

namespace {

std::string printed(const td::KLDivLoss& module) {
  std::ostringstream stream;
  stream << module;
  return stream.str();
}

TEST(KLDivLoss, EqualsTheFunctionWithTheSameOptions) {
  torch::manual_seed(0);
  const torch::Tensor input = torch::randn({3, 7, 4}), target = torch::softmax(torch::randn({3, 7, 4}), 1);
  const auto options = td::KLDivOptions()
                           .direction(td::Direction::Reverse)
                           .target_space(td::Space::Probs)
                           .temperature(1.5)
                           .dim(1)
                           .reduction(td::Reduction::Sum);
  td::KLDivLoss module(options);
  EXPECT_TRUE(torch::equal(module(input, target), td::kl_div(input, target, options)));
}

TEST(KLDivLoss, DefaultsAreThoseOfTheFunction) {
  torch::manual_seed(0);
  const torch::Tensor input = torch::randn({3, 7}), target = torch::randn({3, 7});
  td::KLDivLoss module;
  EXPECT_TRUE(torch::equal(module(input, target), td::kl_div(input, target)));
}

TEST(KLDivLoss, TakesTheTensorsOfTheBatchInForward) {
  torch::manual_seed(0);
  const torch::Tensor input = torch::randn({3, 7}), target = torch::randn({3, 7}), weight = torch::rand({3});
  td::KLDivLoss module;
  EXPECT_TRUE(
      torch::equal(module(input, target, weight), td::kl_div(input, target, td::KLDivOptions().row_weight(weight))));
  EXPECT_TRUE(torch::equal(module(input, target, std::nullopt, torch::tensor(12.0, torch::kDouble)),
                           td::kl_div(input, target, td::KLDivOptions().normalizer(12.0))));
  EXPECT_TRUE(torch::equal(module(input, target, weight, torch::tensor(12.0, torch::kDouble)),
                           td::kl_div(input, target, td::KLDivOptions().row_weight(weight).normalizer(12.0))));
}

TEST(KLDivLoss, RefusesTheTensorsOfTheBatchInItsOptions) {
  EXPECT_THROW(td::KLDivLoss(td::KLDivOptions().row_weight(torch::ones({3}))), c10::ValueError);
  EXPECT_THROW(td::KLDivLoss(td::KLDivOptions().normalizer(3.0)), c10::ValueError);
  td::KLDivLoss module;
  module->options.normalizer(3.0);
  EXPECT_THROW(module(torch::randn({3, 7}), torch::randn({3, 7})), c10::ValueError);
}

TEST(KLDivLoss, PrintsItsOptions) {
  EXPECT_EQ(printed(td::KLDivLoss()),
            "torch_divergence::KLDivLoss(direction=forward, space=logits, temperature=1, dim=-1, reduction=mean)");
  EXPECT_EQ(printed(td::KLDivLoss(td::KLDivOptions()
                                      .direction(td::Direction::Reverse)
                                      .space(td::Space::LogProbs)
                                      .target_space(td::Space::Probs)
                                      .dim(1)
                                      .reduction(td::Reduction::None)
                                      .inplace_grad(true))),
            "torch_divergence::KLDivLoss(direction=reverse, space=log_probs, target_space=probs, temperature=1, dim=1, "
            "reduction=none, inplace_grad=true)");
}

TEST(KLDivLoss, CloneKeepsTheOptionsAndIsIndependent) {
  td::KLDivLoss module(td::KLDivOptions().temperature(3.0));
  const auto clone = std::dynamic_pointer_cast<td::KLDivLossImpl>(module->clone());
  ASSERT_NE(clone, nullptr);
  EXPECT_EQ(clone->options.temperature(), 3.0);
  clone->options.temperature(1.0);
  EXPECT_EQ(module->options.temperature(), 3.0);
}

TEST(KLDivLoss, HasNoParametersAndKeepsItsOptionsThroughSaveAndLoad) {
  td::KLDivLoss module(td::KLDivOptions().temperature(3.0));
  EXPECT_TRUE(module->parameters().empty());
  EXPECT_TRUE(module->buffers().empty());
  std::stringstream stream;
  torch::save(module, stream);
  td::KLDivLoss loaded(td::KLDivOptions().temperature(3.0));
  torch::load(loaded, stream);
  EXPECT_EQ(printed(loaded), printed(module));
}

// A model that holds its loss, as models in torch::nn do.
struct DistilledImpl : torch::nn::Cloneable<DistilledImpl> {
  DistilledImpl() { reset(); }
  void reset() override {
    linear = register_module("linear", torch::nn::Linear(8, 10));
    criterion = register_module("criterion", td::KLDivLoss(td::KLDivOptions().temperature(2.0)));
  }
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& teacher) { return criterion(linear(x), teacher); }
  torch::nn::Linear linear = nullptr;
  td::KLDivLoss criterion = nullptr;
};
TORCH_MODULE(Distilled);

TEST(KLDivLoss, IsSavedClonedAndPrintedAsPartOfAModel) {
  torch::manual_seed(0);
  const torch::Tensor x = torch::randn({16, 8}), teacher = torch::randn({16, 10});
  Distilled model, loaded;
  std::stringstream stream;
  torch::save(model, stream);
  torch::load(loaded, stream);
  EXPECT_TRUE(torch::equal(model(x, teacher), loaded(x, teacher)));
  const auto clone = std::dynamic_pointer_cast<DistilledImpl>(model->clone());
  ASSERT_NE(clone, nullptr);
  EXPECT_TRUE(torch::equal(model(x, teacher), clone->forward(x, teacher)));
  std::ostringstream text;
  text << model;
  EXPECT_NE(text.str().find("torch_divergence::KLDivLoss(direction=forward"), std::string::npos) << text.str();
}

TEST(KLDivLoss, FitsInAnyModule) {
  torch::manual_seed(0);
  const torch::Tensor input = torch::randn({3, 7}), target = torch::randn({3, 7});
  torch::nn::AnyModule any{td::KLDivLoss()};
  EXPECT_TRUE(torch::equal(any.forward(input, target), td::kl_div(input, target)));
}

TEST(KLDivLoss, TrainingReachesTheTeacher) {
  torch::manual_seed(0);
  const torch::Tensor x = torch::randn({64, 8});
  const torch::Tensor teacher = torch::nn::Linear(8, 10)(x).detach();
  torch::nn::Linear student(8, 10);
  torch::optim::SGD optimizer(student->parameters(), 2.0);
  td::KLDivLoss criterion;
  const float first = criterion(student(x), teacher).item<float>();
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    criterion(student(x), teacher).backward();
    optimizer.step();
  }
  EXPECT_LT(criterion(student(x), teacher).item<float>(), 1e-2f * first);
}

}  // namespace
