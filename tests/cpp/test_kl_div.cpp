// Values, gradients, options and errors of kl_div through the C++ API, on libtorch alone.
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/autograd.h>
#include <torch_divergence/functional.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numbers>
#include <string>
#include <tuple>
#include <vector>

namespace td = torch_divergence;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr td::Space kSpaces[] = {td::Space::Logits, td::Space::LogProbs, td::Space::Probs};
constexpr td::Direction kDirections[] = {td::Direction::Forward, td::Direction::Reverse};

// Logits as an entry of `space`: a normalised distribution.
at::Tensor as_space(const at::Tensor& logits, td::Space space, int64_t dim) {
  switch (space) {
    case td::Space::Logits:
      return logits;
    case td::Space::LogProbs:
      return at::log_softmax(logits, dim);
    default:
      return at::softmax(logits, dim);
  }
}

at::Tensor log_probs(const at::Tensor& x, td::Space space, double temperature, int64_t dim) {
  switch (space) {
    case td::Space::Logits:
      return at::log_softmax(x / temperature, dim);
    case td::Space::LogProbs:
      return x;
    default:
      return at::log(x);
  }
}

// The definition, a row at a time, in ATen operators.
at::Tensor reference_rows(const at::Tensor& input, const at::Tensor& target, const td::KLDivOptions& o) {
  const at::Tensor log_input = log_probs(input, o.space(), o.temperature(), o.dim());
  const at::Tensor log_target = log_probs(target, o.target_space().value_or(o.space()), o.temperature(), o.dim());
  const bool forward = o.direction() == td::Direction::Forward;
  const at::Tensor& log_p = forward ? log_target : log_input;
  const at::Tensor& log_q = forward ? log_input : log_target;
  return (log_p.exp() * (log_p - log_q)).sum(o.dim());
}

void expect_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  const at::Tensor a = actual.detach().to(at::kDouble), e = expected.detach().to(at::kDouble);
  EXPECT_TRUE(at::allclose(a, e, tolerance, tolerance)) << "actual\n" << a << "\nexpected\n" << e;
}

void expect_same_bits(const at::Tensor& actual, const at::Tensor& expected) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  ASSERT_EQ(actual.scalar_type(), expected.scalar_type());
  const at::Tensor a = actual.detach().contiguous(), e = expected.detach().contiguous();
  EXPECT_EQ(std::memcmp(a.const_data_ptr(), e.const_data_ptr(), a.nbytes()), 0);
}

void expect_value_error(const std::function<void()>& call, const std::vector<std::string>& words) {
  try {
    call();
    FAIL() << "nothing was raised; expected a ValueError naming '" << words.front() << "'";
  } catch (const c10::ValueError& error) {
    const std::string message = error.what_without_backtrace();
    for (const std::string& word : words) {
      EXPECT_NE(message.find(word), std::string::npos) << "'" << word << "' is not in: " << message;
    }
  }
}

at::Tensor randn(at::IntArrayRef shape, at::ScalarType dtype = at::kDouble) {
  return at::randn(shape, at::TensorOptions(dtype));
}

class KLDiv : public testing::Test {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

// Every pair of spaces with both directions; a temperature wherever one of the sides is in logits.
class KLDivOfSpaces : public testing::TestWithParam<std::tuple<td::Space, td::Space, td::Direction>> {
 protected:
  void SetUp() override { at::manual_seed(0); }

  td::KLDivOptions options() const {
    const auto [space, target_space, direction] = GetParam();
    const bool any_logits = space == td::Space::Logits || target_space == td::Space::Logits;
    return td::KLDivOptions()
        .space(space)
        .target_space(target_space)
        .direction(direction)
        .temperature(any_logits ? 1.7 : 1.0);
  }

  // No probability so small that a central difference loses its digits.
  static gradcheck::Tensors inputs(const td::KLDivOptions& o) {
    return {as_space(0.5 * randn({3, 5}), o.space(), -1), as_space(0.5 * randn({3, 5}), *o.target_space(), -1)};
  }
};

std::string name_of(const testing::TestParamInfo<KLDivOfSpaces::ParamType>& info) {
  const auto [space, target_space, direction] = info.param;
  return std::string(td::to_string(space)) + "_against_" + td::to_string(target_space) + "_" + td::to_string(direction);
}

INSTANTIATE_TEST_SUITE_P(All, KLDivOfSpaces,
                         testing::Combine(testing::ValuesIn(kSpaces), testing::ValuesIn(kSpaces),
                                          testing::ValuesIn(kDirections)),
                         name_of);

TEST_P(KLDivOfSpaces, EqualsTheDefinition) {
  const auto o = options().dim(1).reduction(td::Reduction::None);
  const at::Tensor input = as_space(randn({3, 17, 4}), o.space(), 1);
  const at::Tensor target = as_space(randn({3, 17, 4}), *o.target_space(), 1);
  const at::Tensor expected = reference_rows(input, target, o);
  const at::Tensor rows = td::kl_div(input, target, o);
  EXPECT_EQ(rows.scalar_type(), at::kDouble);
  expect_close(rows, expected, 1e-12);

  const at::Tensor in_float = td::kl_div(input.to(at::kFloat), target.to(at::kFloat), o);
  EXPECT_EQ(in_float.scalar_type(), at::kFloat);
  expect_close(in_float, reference_rows(input.to(at::kFloat).to(at::kDouble), target.to(at::kFloat).to(at::kDouble), o),
               2e-6);
}

TEST_P(KLDivOfSpaces, GradientsEqualCentralDifferences) {
  for (const td::Reduction reduction : {td::Reduction::None, td::Reduction::Sum, td::Reduction::Mean}) {
    SCOPED_TRACE(td::to_string(reduction));
    const auto o = options().reduction(reduction).row_weight(at::tensor({0.5, 0.0, 2.0}, at::kDouble));
    const auto f = [&](const gradcheck::Tensors& x) { return td::kl_div(x[0], x[1], o); };
    EXPECT_TRUE(gradcheck::gradients_match(f, inputs(o)));
  }
}

TEST_P(KLDivOfSpaces, SecondGradientsEqualCentralDifferences) {
  for (const td::Reduction reduction : {td::Reduction::None, td::Reduction::Mean}) {
    SCOPED_TRACE(td::to_string(reduction));
    const auto o = options().reduction(reduction);
    const auto f = [&](const gradcheck::Tensors& x) { return td::kl_div(x[0], x[1], o); };
    EXPECT_TRUE(gradcheck::second_gradients_match(f, inputs(o)));
  }
}

TEST_F(KLDiv, OfTwoCoinsIsTheClosedForm) {
  const at::Tensor fair = at::tensor({0.5, 0.5}, at::kDouble), biased = at::tensor({0.75, 0.25}, at::kDouble);
  const double biased_from_fair = 0.75 * std::log(1.5) + 0.25 * std::log(0.5);
  const double fair_from_biased = 0.5 * std::log(2.0 / 3.0) + 0.5 * std::log(2.0);
  for (const td::Space space : kSpaces) {
    SCOPED_TRACE(td::to_string(space));
    const at::Tensor input = space == td::Space::Probs ? fair : fair.log();
    const at::Tensor target = space == td::Space::Probs ? biased : biased.log();
    const auto o = td::KLDivOptions().space(space);
    EXPECT_NEAR(td::kl_div(input, target, o).item<double>(), biased_from_fair, 1e-15);
    EXPECT_NEAR(td::kl_div(input, target, td::KLDivOptions(o).direction(td::Direction::Reverse)).item<double>(),
                fair_from_biased, 1e-15);
  }
}

TEST_F(KLDiv, OfAGeometricAgainstAUniformDistributionIsTheClosedForm) {
  // p_j = 2^-(j+1) up to the last class, which takes what is left: log n - H(p), H(p) = log 2 (2 - 2^(2-n)).
  constexpr int n = 10;
  std::vector<double> p;
  for (int j = 0; j < n; ++j) {
    p.push_back(std::ldexp(1.0, j + 1 < n ? -(j + 1) : -j));
  }
  const double expected = std::log(n) - std::numbers::ln2 * (2.0 - std::ldexp(1.0, 2 - n));
  const at::Tensor target = at::tensor(p, at::kDouble).log(), input = at::zeros({n}, at::kDouble);
  EXPECT_NEAR(td::kl_div(input, target).item<double>(), expected, 1e-14);
}

TEST_F(KLDiv, DefaultsAreForwardFromLogitsAveragedOverRows) {
  const at::Tensor input = randn({2, 3, 5}), target = randn({2, 3, 5});
  const auto spelled_out = td::KLDivOptions()
                               .direction(td::Direction::Forward)
                               .space(td::Space::Logits)
                               .target_space(std::nullopt)
                               .temperature(1.0)
                               .dim(-1)
                               .row_weight(std::nullopt)
                               .reduction(td::Reduction::Mean)
                               .normalizer(std::nullopt)
                               .inplace_grad(false);
  const at::Tensor loss = td::kl_div(input, target);
  EXPECT_EQ(loss.dim(), 0);
  expect_same_bits(loss, td::kl_div(input, target, spelled_out));
  expect_close(loss, reference_rows(input, target, {}).mean(), 1e-12);
}

TEST_F(KLDiv, ReverseIsForwardWithTheArgumentsExchanged) {
  const at::Tensor a = randn({4, 7}), b = randn({4, 7});
  expect_same_bits(td::kl_div(a, b, td::KLDivOptions().direction(td::Direction::Reverse)), td::kl_div(b, a));
}

TEST_F(KLDiv, GradientFromLogitsIsTheDifferenceOfTheDistributions) {
  const double T = 2.0;
  const at::Tensor student = randn({6, 11}).requires_grad_(), teacher = randn({6, 11});
  td::kl_div(student, teacher, td::KLDivOptions().temperature(T)).backward();
  expect_close(student.grad(), (at::softmax(student / T, -1) - at::softmax(teacher / T, -1)) / (T * 6), 1e-13);
}

TEST_F(KLDiv, AtEqualLogitsTheHessianIsTheFisherMatrix) {
  const at::Tensor logits = randn({1, 6}), v = randn({1, 6});
  const at::Tensor student = logits.clone().requires_grad_();
  const at::Tensor loss = td::kl_div(student, logits);
  EXPECT_EQ(loss.item<double>(), 0.0);
  const at::Tensor grad = torch::autograd::grad({loss}, {student}, {}, true, true)[0];
  const at::Tensor product = torch::autograd::grad({(grad * v).sum()}, {student})[0];
  const at::Tensor q = at::softmax(logits, -1);
  expect_close(product, q * (v - (q * v).sum(-1, true)), 1e-13);
}

TEST_F(KLDiv, StaysAccurateAndNonNegativeForNearlyEqualLogits) {
  // F.kl_div loses all digits here: the terms are around 1e-4 and cancel down to 1e-13.
  const at::Tensor teacher = randn({8, 1000}, at::kFloat);
  for (const double distance : {1e-1, 1e-3, 1e-5, 3e-7}) {
    SCOPED_TRACE(distance);
    const at::Tensor student = (teacher + distance * at::randn_like(teacher)).requires_grad_();
    const at::Tensor rows = td::kl_div(student, teacher, td::KLDivOptions().reduction(td::Reduction::None));
    rows.sum().backward();

    // log E_p[exp(-(d - E_p d))] by expm1, in float64.
    const at::Tensor s = student.detach().to(at::kDouble), t = teacher.to(at::kDouble);
    const at::Tensor p = at::softmax(t, -1), d = t - s, u = d - (p * d).sum(-1, true);
    const at::Tensor expected = ((p * (at::expm1(-u) + u)).sum(-1)).log1p();
    EXPECT_TRUE((rows >= 0).all().item<bool>());
    EXPECT_LE(((rows.detach() - expected).abs() / expected).max().item<double>(), 2e-6);

    const at::Tensor grad = p * at::expm1(-(u + expected.unsqueeze(-1)));
    const at::Tensor error = (student.grad() - grad).abs().amax(-1) / grad.abs().amax(-1);
    EXPECT_LE(error.max().item<double>(), 2e-6);
  }
}

TEST_F(KLDiv, IsShiftInvariantInLogits) {
  const at::Tensor student = randn({3, 9}), teacher = randn({3, 9});
  expect_close(td::kl_div(student + 1e4, teacher - 1e4), td::kl_div(student, teacher), 1e-10);
}

TEST_F(KLDiv, ReductionsAreTheWeightedSumsOfTheRows) {
  const at::Tensor input = randn({2, 4, 5}), target = randn({2, 4, 5}), w = at::rand({2, 4}, at::kDouble);
  const auto with = [&](td::Reduction r) {
    return td::kl_div(input, target, td::KLDivOptions().row_weight(w).reduction(r));
  };
  const at::Tensor rows = reference_rows(input, target, {});
  expect_close(with(td::Reduction::None), w * rows, 1e-12);
  expect_close(with(td::Reduction::Sum), (w * rows).sum(), 1e-12);
  expect_close(with(td::Reduction::Mean), (w * rows).sum() / w.sum(), 1e-12);
}

TEST_F(KLDiv, BroadcastsRowWeightBeforeItIsSummed) {
  const at::Tensor input = randn({2, 4, 5}), target = randn({2, 4, 5}), w = at::rand({4}, at::kDouble);
  expect_close(td::kl_div(input, target, td::KLDivOptions().row_weight(w)),
               td::kl_div(input, target, td::KLDivOptions().row_weight(w.expand({2, 4}))), 1e-15);
}

TEST_F(KLDiv, TakesABoolRowWeight) {
  const at::Tensor input = randn({4, 5}), target = randn({4, 5}), keep = at::tensor({1, 0, 1, 0}).to(at::kBool);
  const at::Tensor rows = reference_rows(input, target, {});
  expect_close(td::kl_div(input, target, td::KLDivOptions().row_weight(keep)), (rows[0] + rows[2]) / 2, 1e-12);
}

TEST_F(KLDiv, RowOfWeightZeroContributesNothingWhateverItHolds) {
  const at::Tensor clean = randn({3, 5}), target = randn({3, 5}), w = at::tensor({1.0, 0.0, 1.0}, at::kDouble);
  for (const double junk : {kNaN, kInf, -kInf}) {
    SCOPED_TRACE(junk);
    at::Tensor input = clean.clone();
    input[1].fill_(junk);
    input.requires_grad_();
    const at::Tensor loss = td::kl_div(input, target, td::KLDivOptions().row_weight(w));
    loss.backward();
    const at::Tensor rows = reference_rows(clean, target, {});
    expect_close(loss, (rows[0] + rows[2]) / 2, 1e-12);
    EXPECT_TRUE((input.grad()[1] == 0).all().item<bool>());
    EXPECT_TRUE(input.grad().isfinite().all().item<bool>());
  }
}

TEST_F(KLDiv, WithoutAKeptRowIsZeroWithZeroGradients) {
  const at::Tensor input = randn({3, 5}).requires_grad_(), target = randn({3, 5});
  const at::Tensor loss = td::kl_div(input, target, td::KLDivOptions().row_weight(at::zeros({3}, at::kDouble)));
  loss.backward();
  EXPECT_EQ(loss.item<double>(), 0.0);
  EXPECT_TRUE((input.grad() == 0).all().item<bool>());
}

TEST_F(KLDiv, OfNoRowsIsZeroWithAnEmptyGradient) {
  const at::Tensor input = randn({0, 5}).requires_grad_(), target = randn({0, 5});
  const at::Tensor loss = td::kl_div(input, target);
  loss.backward();
  EXPECT_EQ(loss.item<double>(), 0.0);
  EXPECT_EQ(input.grad().sizes(), at::IntArrayRef({0, 5}));
  EXPECT_EQ(td::kl_div(input, target, td::KLDivOptions().reduction(td::Reduction::None)).sizes(), at::IntArrayRef({0}));
}

TEST_F(KLDiv, OfOneClassIsZero) {
  const at::Tensor input = randn({3, 1}).requires_grad_();
  const at::Tensor loss = td::kl_div(input, randn({3, 1}));
  loss.backward();
  EXPECT_EQ(loss.item<double>(), 0.0);
  EXPECT_TRUE((input.grad() == 0).all().item<bool>());
}

TEST_F(KLDiv, NormalizerReplacesTheDenominator) {
  const at::Tensor input = randn({4, 5}), target = randn({4, 5});
  const at::Tensor sum = reference_rows(input, target, {}).sum();
  expect_close(td::kl_div(input, target, td::KLDivOptions().normalizer(64.0)), sum / 64, 1e-12);
  expect_close(td::kl_div(input, target, td::KLDivOptions().normalizer(64)), sum / 64, 1e-12);
  expect_close(td::kl_div(input, target, td::KLDivOptions().normalizer(at::scalar_tensor(64.0, at::kFloat))), sum / 64,
               1e-12);
}

TEST_F(KLDiv, TakesAnyStrides) {
  const at::Tensor input = randn({7, 3, 5}), target = randn({5, 7, 3});
  const at::Tensor a = input.transpose(0, 2), b = target.permute({0, 2, 1});  // {5, 3, 7}
  const at::Tensor sliced = randn({3, 14}).slice(1, 0, 14, 2), expanded = randn({1, 7}).expand({3, 7});
  for (const td::Reduction r : {td::Reduction::None, td::Reduction::Mean}) {
    for (const int64_t dim : {0, 1, 2, -1, -2}) {
      const auto o = td::KLDivOptions().dim(dim).reduction(r);
      expect_close(td::kl_div(a, b, o), td::kl_div(a.contiguous(), b.contiguous(), o), 1e-14);
    }
    const auto o = td::KLDivOptions().reduction(r);
    expect_close(td::kl_div(sliced, expanded, o), td::kl_div(sliced.contiguous(), expanded.contiguous(), o), 1e-14);
  }
}

TEST_F(KLDiv, OfHalfTypesIsComputedInFloatAndKeepsTheDtypeOfEachGradient) {
  for (const at::ScalarType half : {at::kHalf, at::kBFloat16}) {
    for (const at::ScalarType other : {half, at::kFloat}) {
      SCOPED_TRACE(std::string(at::toString(half)) + " and " + at::toString(other));
      const at::Tensor input = randn({6, 50}, half).requires_grad_(), target = randn({6, 50}, other).requires_grad_();
      const at::Tensor loss = td::kl_div(input, target);
      loss.backward();
      EXPECT_EQ(loss.scalar_type(), at::kFloat);
      EXPECT_EQ(input.grad().scalar_type(), half);
      EXPECT_EQ(target.grad().scalar_type(), other);

      const at::Tensor a = input.detach().to(at::kDouble).requires_grad_();
      const at::Tensor b = target.detach().to(at::kDouble).requires_grad_();
      const at::Tensor expected = td::kl_div(a, b);
      expected.backward();
      expect_close(loss, expected, 2e-6);
      // Half an ulp of the half type, of the entry or (rounding of float32 before) of the largest entry.
      const double ulp = half == at::kHalf ? std::ldexp(1.0, -11) : std::ldexp(1.0, -8);
      const double smallest = half == at::kHalf ? std::ldexp(1.0, -25) : 0.0;
      const at::Tensor slack = a.grad().abs() * ulp + 2e-6 * a.grad().abs().max() + smallest;
      EXPECT_TRUE(((input.grad().to(at::kDouble) - a.grad()).abs() <= slack).all().item<bool>());
    }
  }
}

TEST_F(KLDiv, LargeRowsEqualFloat64) {
  // 64 x 20000 float32 is over the size from which outputs live on huge pages.
  const at::Tensor student = randn({64, 20000}, at::kFloat).requires_grad_(), teacher = randn({64, 20000}, at::kFloat);
  const at::Tensor loss = td::kl_div(student, teacher);
  loss.backward();
  const at::Tensor s = student.detach().to(at::kDouble), t = teacher.to(at::kDouble);
  expect_close(loss, reference_rows(s, t, {}).mean(), 2e-6);
  const at::Tensor grad = (at::softmax(s, -1) - at::softmax(t, -1)) / 64;
  EXPECT_LE(((student.grad() - grad).abs().amax(-1) / grad.abs().amax(-1)).max().item<double>(), 2e-6);
  td::empty_cache();
  EXPECT_TRUE(student.grad().isfinite().all().item<bool>());
}

TEST_F(KLDiv, ColumnMaskedOnBothSidesIsAsIfItWereNotThere) {
  const at::Tensor student = randn({3, 4}), teacher = randn({3, 4}), column = at::full({3, 1}, -kInf, at::kDouble);
  const at::Tensor masked = at::cat({student, column}, 1).requires_grad_();
  const at::Tensor masked_teacher = at::cat({teacher, column}, 1).requires_grad_();
  const at::Tensor plain = student.clone().requires_grad_(), plain_teacher = teacher.clone().requires_grad_();
  const at::Tensor loss = td::kl_div(masked, masked_teacher), expected = td::kl_div(plain, plain_teacher);
  loss.backward();
  expected.backward();
  const at::Tensor zeros = at::zeros({3, 1}, at::kDouble);
  expect_close(loss, expected, 1e-14);
  expect_close(masked.grad(), at::cat({plain.grad(), zeros}, 1), 1e-14);
  expect_close(masked_teacher.grad(), at::cat({plain_teacher.grad(), zeros}, 1), 1e-14);
}

TEST_F(KLDiv, ClassThatOnlyTheTargetExcludesHasTermZero) {
  const at::Tensor student = randn({1, 4}).requires_grad_();
  at::Tensor teacher = randn({1, 4});
  teacher[0][2] = -kInf;
  const at::Tensor frozen = teacher.clone();
  teacher.requires_grad_();
  const at::Tensor loss = td::kl_div(student, teacher);
  loss.backward();
  const at::Tensor p = at::softmax(frozen, -1), keep = at::tensor({0, 1, 3});
  const at::Tensor log_ratio = p.log() - at::log_softmax(student.detach(), -1);
  EXPECT_NEAR(loss.item<double>(), (p * log_ratio).index_select(1, keep).sum().item<double>(), 1e-14);
  expect_close(student.grad(), at::softmax(student, -1) - p, 1e-14);
  EXPECT_EQ(teacher.grad()[0][2].item<double>(), 0.0);
}

TEST_F(KLDiv, ClassThatOnlyTheInputExcludesGivesInfinityWithAFiniteStudentGradient) {
  at::Tensor student = randn({1, 4});
  student[0][2] = -kInf;
  student.requires_grad_();
  const at::Tensor teacher = randn({1, 4}).requires_grad_();
  const at::Tensor loss = td::kl_div(student, teacher);
  loss.backward();
  EXPECT_EQ(loss.item<double>(), kInf);
  expect_close(student.grad(), at::softmax(student, -1) - at::softmax(teacher, -1), 1e-14);
  EXPECT_TRUE((teacher.grad() == 0).all().item<bool>());
}

TEST_F(KLDiv, ZeroProbabilitiesFollowTheConvention) {
  const auto o = td::KLDivOptions().space(td::Space::Probs);
  const at::Tensor p = at::tensor({0.0, 0.5, 0.5}, at::kDouble).requires_grad_();
  const at::Tensor q = at::tensor({0.25, 0.25, 0.5}, at::kDouble).requires_grad_();
  const at::Tensor finite = td::kl_div(q, p, o);
  finite.backward();
  EXPECT_NEAR(finite.item<double>(), 0.5 * std::numbers::ln2, 1e-15);
  expect_close(p.grad(), at::tensor({0.0, std::numbers::ln2 + 1.0, 1.0}, at::kDouble), 1e-14);
  expect_close(q.grad(), at::tensor({0.0, -2.0, -1.0}, at::kDouble), 1e-14);

  q.mutable_grad().reset();
  const at::Tensor infinite = td::kl_div(p, q, o);  // now p is the input and has q's role
  EXPECT_EQ(infinite.item<double>(), kInf);
  p.mutable_grad().reset();
  infinite.backward();
  EXPECT_EQ(p.grad()[0].item<double>(), -kInf);
}

TEST_F(KLDiv, NaNInNaNOut) {
  for (const td::Space space : kSpaces) {
    SCOPED_TRACE(td::to_string(space));
    at::Tensor input = as_space(randn({2, 5}), space, -1);
    const at::Tensor target = as_space(randn({2, 5}), space, -1);
    input[1][3] = kNaN;
    const at::Tensor rows = td::kl_div(input, target, td::KLDivOptions().space(space).reduction(td::Reduction::None));
    EXPECT_TRUE(std::isfinite(rows[0].item<double>()));
    EXPECT_TRUE(std::isnan(rows[1].item<double>()));
  }
}

TEST_F(KLDiv, NegativeProbabilityGivesNaN) {
  const auto o = td::KLDivOptions().space(td::Space::Probs);
  const at::Tensor bad = at::tensor({-0.1, 1.1}, at::kDouble), good = at::tensor({0.5, 0.5}, at::kDouble);
  EXPECT_TRUE(std::isnan(td::kl_div(bad, good, o).item<double>()));
  EXPECT_TRUE(std::isnan(td::kl_div(good, bad, o).item<double>()));
}

TEST_F(KLDiv, GradientSurvivesRetainGraphAndEditsOfGrad) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const at::Tensor student = randn({4, 9}, dtype).requires_grad_(), teacher = randn({4, 9}, dtype);
    const at::Tensor loss = td::kl_div(student, teacher);
    const at::Tensor expected = torch::autograd::grad({loss}, {student}, {}, /*retain_graph=*/true)[0].clone();
    for (int pass = 0; pass < 3; ++pass) {
      student.mutable_grad().reset();
      loss.backward({}, /*retain_graph=*/true);
      expect_same_bits(student.grad(), expected);
      student.mutable_grad().fill_(123.0);
    }
  }
}

TEST_F(KLDiv, ScalesWithTheIncomingGradient) {
  const at::Tensor student = randn({4, 9}).requires_grad_(), teacher = randn({4, 9});
  const at::Tensor one = torch::autograd::grad({td::kl_div(student, teacher)}, {student})[0];
  const at::Tensor quarter = torch::autograd::grad({td::kl_div(student, teacher) * 0.25}, {student})[0];
  expect_close(quarter, one * 0.25, 1e-15);
}

TEST_F(KLDiv, InplaceGradientEqualsThePlainOneAndLivesInTheInput) {
  for (const td::Direction direction : kDirections) {
    SCOPED_TRACE(td::to_string(direction));
    const at::Tensor leaf = randn({8, 33}, at::kFloat).requires_grad_(), teacher = randn({8, 33}, at::kFloat);
    const auto o = td::KLDivOptions().direction(direction).temperature(2.0);
    const at::Tensor expected_loss = td::kl_div(leaf, teacher, o);
    const at::Tensor expected = torch::autograd::grad({expected_loss}, {leaf})[0];

    const at::Tensor logits = leaf * 1.0;
    const void* storage = logits.const_data_ptr();
    const at::Tensor loss = td::kl_div(logits, teacher, td::KLDivOptions(o).inplace_grad(true));
    const at::Tensor grad = torch::autograd::grad({loss}, {logits})[0];
    EXPECT_EQ(grad.const_data_ptr(), storage);
    expect_close(loss, expected_loss, 1e-6);
    expect_close(grad, expected, 1e-6);

    const at::Tensor scaled_logits = leaf * 1.0;
    (td::kl_div(scaled_logits, teacher, td::KLDivOptions(o).inplace_grad(true)) * 0.25).backward();
    expect_close(leaf.grad(), expected * 0.25, 1e-6);
  }
}

TEST_F(KLDiv, InplaceGradientAllowsOneBackwardOnly) {
  const at::Tensor leaf = randn({4, 5}).requires_grad_(), teacher = randn({4, 5});
  const auto o = td::KLDivOptions().inplace_grad(true);
  const at::Tensor loss = td::kl_div(leaf * 1.0, teacher, o);
  loss.backward({}, /*retain_graph=*/true);
  EXPECT_THROW(loss.backward(), c10::Error);

  const at::Tensor twice = td::kl_div(leaf * 1.0, teacher, o);
  EXPECT_THROW(torch::autograd::grad({twice}, {leaf}, {}, true, /*create_graph=*/true), c10::Error);
}

TEST_F(KLDiv, InplaceGradientRefusesInputsItCannotUse) {
  const auto o = td::KLDivOptions().inplace_grad(true);
  const at::Tensor leaf = randn({4, 5}).requires_grad_(), teacher = randn({4, 5});
  expect_value_error([&] { td::kl_div(leaf, teacher, o); }, {"inplace_grad", "leaf"});
  expect_value_error([&] { td::kl_div(randn({4, 5}), teacher, o); }, {"inplace_grad", "requires grad"});
  expect_value_error([&] { td::kl_div((leaf * 1.0).expand({3, 4, 5}), randn({3, 4, 5}), o); }, {"inplace_grad"});
  const at::Tensor logits = leaf * 1.0;
  expect_value_error([&] { td::kl_div(logits, logits.detach(), o); }, {"inplace_grad", "storage"});
  expect_value_error([&] { td::kl_div(leaf * 1.0, teacher, td::KLDivOptions(o).reduction(td::Reduction::None)); },
                     {"inplace_grad", "reduction"});
}

TEST_F(KLDiv, NamesWhatIsWrongWithTheTensors) {
  const at::Tensor x = randn({3, 5});
  expect_value_error([&] { td::kl_div(x, randn({3, 6})); }, {"target", "[3, 6]", "[3, 5]"});
  expect_value_error([&] { td::kl_div(x, randn({1, 5})); }, {"target", "[1, 5]", "[3, 5]"});
  expect_value_error([&] { td::kl_div(x, randn({3, 5}, at::kFloat)); }, {"target", "Float", "Double"});
  expect_value_error([&] { td::kl_div(at::ones({3, 5}, at::kLong), x); }, {"input", "Long"});
  expect_value_error(
      [&] {
        td::kl_div(x, at::empty({3, 5}, at::TensorOptions(at::kDouble).device(at::kMeta)));
      },
      {"target", "meta", "cpu"});
  expect_value_error([&] { td::kl_div(randn({3, 0}), randn({3, 0})); }, {"input", "[3, 0]"});
  expect_value_error([&] { td::kl_div(at::zeros({}, at::kDouble), at::zeros({}, at::kDouble)); }, {"input"});
}

TEST_F(KLDiv, NamesWhatIsWrongWithTheOptions) {
  const at::Tensor x = randn({3, 5}), y = randn({3, 5});
  const auto call = [&](const td::KLDivOptions& o) { return [&x, &y, o] { td::kl_div(x, y, o); }; };
  const auto with = [&](auto set) {
    td::KLDivOptions o;
    set(o);
    return call(o);
  };
  for (const double temperature : {0.0, -1.0, kNaN, kInf}) {
    SCOPED_TRACE(temperature);
    expect_value_error(with([&](auto& o) { o.temperature(temperature); }), {"temperature"});
  }
  expect_value_error(with([](auto& o) { o.temperature(2.0).space(td::Space::Probs); }), {"temperature", "2"});
  expect_value_error(with([](auto& o) { o.dim(2); }), {"dim", "2"});
  expect_value_error(with([](auto& o) { o.dim(-3); }), {"dim", "-3"});
  expect_value_error(with([](auto& o) { o.row_weight(at::ones({4}, at::kDouble)); }), {"row_weight", "[4]", "[3]"});
  expect_value_error(with([](auto& o) { o.row_weight(at::ones({3}, at::kLong)); }), {"row_weight", "Long"});
  expect_value_error(with([](auto& o) { o.row_weight(at::tensor({1.0, -1.0, 1.0})); }), {"row_weight"});
  expect_value_error(with([](auto& o) { o.row_weight(at::tensor({1.0, kNaN, 1.0})); }), {"row_weight"});
  expect_value_error(with([](auto& o) { o.row_weight(at::ones({3}, at::kDouble).requires_grad_()); }),
                     {"row_weight", "grad", "none"});
  expect_value_error(with([](auto& o) { o.normalizer(0.0); }), {"normalizer", "0"});
  expect_value_error(with([](auto& o) { o.normalizer(-1.0); }), {"normalizer", "-1"});
  expect_value_error(with([](auto& o) { o.normalizer(at::ones({2}, at::kDouble)); }), {"normalizer", "[2]"});
  expect_value_error(with([](auto& o) { o.normalizer(2.0).reduction(td::Reduction::Sum); }), {"normalizer", "sum"});
  expect_value_error(with([](auto& o) { o.normalizer(at::ones({}, at::kDouble).requires_grad_()); }),
                     {"normalizer", "grad", "none"});
}

TEST_F(KLDiv, RefusesAnEnumeratorThatDoesNotExist) {
  expect_value_error([] { td::to_string(static_cast<td::Space>(7)); }, {"space", "7"});
  expect_value_error([] { td::to_string(static_cast<td::Direction>(7)); }, {"direction", "7"});
  expect_value_error([] { td::to_string(static_cast<td::Reduction>(7)); }, {"reduction", "7"});
}

}  // namespace
