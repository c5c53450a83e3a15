// The CUDA kernel of the Fisher-vector product on the emulated device, against long double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "device_rows.h"
#include "fisher_vector_product/fisher_vector_product.h"
#include "simt.h"

namespace {

struct Case {
  const char* name;
  int64_t rows = 2, classes = 100;
  double size = 2, temperature = 1, level = 0, offset = 0;  // of the logits, T, and offsets of logits and v
  Layout logits = {}, v = {}, product = {};
  int masked = 0;  // every so many classes one is absent, and v holds NaN for it
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name << " (" << c.rows << " x " << c.classes << ")"; }

std::vector<Real> exact(const std::vector<Real>& z, const std::vector<Real>& v, Real t) {
  const Real top = *std::max_element(z.begin(), z.end());
  std::vector<Real> q;
  Real sum = 0, mean = 0;
  for (size_t j = 0; j < z.size(); ++j) q.push_back(std::exp((z[j] - top) / t)), sum += q[j];
  for (size_t j = 0; j < z.size(); ++j) q[j] /= sum, mean += q[j] == 0 ? 0 : q[j] * v[j];
  for (size_t j = 0; j < z.size(); ++j) q[j] = q[j] == 0 ? 0 : q[j] * (v[j] - mean) / (t * t);
  return q;
}

void check(const Case& c, DType of_logits, DType of_v) {
  Rows logits(of_logits, c.rows, c.classes, c.logits, "logits"), v(of_v, c.rows, c.classes, c.v, "v"),
      product(of_v, c.rows, c.classes, c.product, "product", false);
  std::mt19937_64 random(static_cast<uint64_t>(c.classes));
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.classes; ++j) {
      const bool absent = c.masked != 0 && j % c.masked == 1;
      logits.set(i, j, absent ? -std::numeric_limits<double>::infinity() : c.size * normal(random) + c.level);
      v.set(i, j, absent ? std::nan("") : normal(random) + c.offset);
    }
  Memory workspace(DType::Double, td::cuda::fisher_vector_product_workspace(c.rows, c.classes), "workspace", false);
  td::cuda::fisher_vector_product({logits.in(), v.in(), c.classes, c.temperature, product.out()}, c.rows,
                                  workspace.data<double>(), nullptr);
  const Real accuracy = of_v == DType::Double ? 1e-13L : 2e-7L;
  for (int64_t i = 0; i < c.rows; ++i) {
    const auto want = exact(logits.row(i), v.row(i), c.temperature);
    // The mean of v is rounded relative to v.
    const Real allowed = accuracy * largest(want) + 1e-15L * std::fabs(c.offset);
    for (int64_t j = 0; j < c.classes; ++j)
      ASSERT_NO_FATAL_FAILURE(
          expect_close(product.get(i, j), want[static_cast<size_t>(j)], allowed, of_v, "product", i, j));
  }
}

class FisherVectorProductCuda : public testing::TestWithParam<Case> {};

TEST_P(FisherVectorProductCuda, Values) {
  const Case& c = GetParam();
  const std::pair<DType, DType> kTypes[] = {{DType::Float, DType::Float},
                                            {DType::Double, DType::Double},
                                            {DType::BFloat16, DType::BFloat16},
                                            {DType::Half, DType::Float}};
  for (const auto& [of_logits, of_v] : kTypes) {
    if (c.classes > 10000 && of_v != DType::Float) continue;
    SCOPED_TRACE("types " + std::to_string(static_cast<int>(of_logits)) + " and " +
                 std::to_string(static_cast<int>(of_v)));
    ASSERT_NO_FATAL_FAILURE(run_orders(c.rows * c.classes <= 2000, [&] { check(c, of_logits, of_v); }));
  }
}

const Case kCases[] = {
    {.name = "one_class", .classes = 1},
    {.name = "less_than_a_piece", .rows = 9, .classes = 7},
    {.name = "odd", .rows = 3, .classes = 37, .temperature = 0.7},
    {.name = "a_block", .classes = 1025, .temperature = 3},
    {.name = "several_visits", .classes = 9001},
    {.name = "split", .rows = 2, .classes = 20003},
    {.name = "peaked", .size = 12},
    {.name = "offsets", .rows = 3, .level = 1000, .offset = 1e4},
    {.name = "masked", .rows = 3, .masked = 3},
    {.name = "strided", .rows = 3, .classes = 67, .logits = {1, 3}, .v = {200, 2}, .product = {1, 3}},
    {.name = "misaligned", .rows = 3, .classes = 1067, .logits = {0, 1, 1}, .v = {0, 1, 3}, .product = {0, 1, 2}},
    {.name = "at_the_end", .classes = 131, .logits = {0, 1, -1}, .v = {0, 1, -1}, .product = {0, 1, -1}},
};
INSTANTIATE_TEST_SUITE_P(Cases, FisherVectorProductCuda, testing::ValuesIn(kCases),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
