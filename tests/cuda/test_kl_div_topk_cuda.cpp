// The CUDA kernels of the top-k KL divergence on the emulated device, against the formulas in long double, whose second
// derivatives come from dual numbers: over tails, spaces, directions, sizes, dtypes, layouts, padding and masks.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <ostream>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_rows.h"
#include "kl_div_topk/kl_div_topk.h"
#include "simt.h"

namespace {

// -- Reference -------------------------------------------------------------------------------------------------------

// x + d e with e^2 = 0.
struct Dual {
  Real x = 0, d = 0;
  Dual() = default;
  Dual(Real value, Real along = 0) : x(value), d(along) {}
};
Dual operator+(Dual a, Dual b) { return {a.x + b.x, a.d + b.d}; }
Dual operator-(Dual a, Dual b) { return {a.x - b.x, a.d - b.d}; }
Dual operator-(Dual a) { return {-a.x, -a.d}; }
Dual operator*(Dual a, Dual b) { return {a.x * b.x, a.d * b.x + a.x * b.d}; }
Dual operator/(Dual a, Dual b) { return {a.x / b.x, (a.d - a.x / b.x * b.d) / b.x}; }
Dual exp(Dual a) { return {std::exp(a.x), std::exp(a.x) * a.d}; }
Dual log(Dual a) { return {std::log(a.x), a.d / a.x}; }
using std::exp;
using std::log;

struct Options {
  int space = td::kLogits, tail = td::kTailBucket;
  bool reverse = false, given_tail = false;
  Real temperature = 1;
};
std::ostream& operator<<(std::ostream& out, const Options& o) {
  return out << "space " << o.space << ", tail " << o.tail << (o.given_tail ? " given" : "")
             << (o.reverse ? ", reverse" : ", forward");
}

template <class S>
struct Gradients {
  S loss = 0;
  Real terms = 0;  // sum of |terms|
  std::vector<S> x, a;
  S b = 0;
};

template <class S>
S sum_of(const std::vector<S>& x) {
  return std::accumulate(x.begin(), x.end(), S(0));
}
template <class S>
S lse_of(const std::vector<S>& x) {
  Real top = -kInf;
  for (const S& v : x) top = std::max(top, static_cast<Real>(reinterpret_cast<const Real&>(v)));
  S sum(0);
  for (const S& v : x) sum = sum + exp(v - S(top));
  return S(top) + log(sum);
}

// x: all classes, -inf (0 for probs) where absent in none of K; index, a: K.
template <class S>
Gradients<S> gradients(const std::vector<S>& x, const std::vector<int64_t>& index, const std::vector<S>& a, S b,
                       const Options& o) {
  const size_t n = x.size(), k = index.size();
  const S t(o.temperature);
  const bool bucket = o.tail == td::kTailBucket, renorm_both = o.tail == td::kTailRenormBoth,
             renorm_p = renorm_both || o.tail == td::kTailRenormTarget,
             normalised = o.space == td::kLogits || renorm_both;
  std::vector<bool> in_k(n, false);
  for (const int64_t i : index) in_k[static_cast<size_t>(i)] = true;
  std::vector<S> raw(n), outside, of_k;
  std::vector<size_t> outside_at;
  const auto value = [](const S& v) { return reinterpret_cast<const Real&>(v); };
  for (size_t j = 0; j < n; ++j) {
    raw[j] = o.space == td::kProbs ? log(x[j]) : x[j] / t;
    if (!in_k[j] && std::isfinite(value(raw[j]))) outside.push_back(raw[j]), outside_at.push_back(j);
  }
  // Of probabilities the tail is their sum, of which a class of 0 takes part.
  S sum_outside(0);
  for (size_t j = 0; j < n; ++j)
    if (!in_k[j]) sum_outside = sum_outside + x[j];
  const S lse_outside = o.space == td::kProbs ? log(sum_outside) : lse_of(outside);
  for (const int64_t i : index) of_k.push_back(raw[static_cast<size_t>(i)]);
  std::vector<S> log_p = a, log_q = of_k;
  if (renorm_p)
    for (S& v : log_p) v = v - lse_of(a);
  S shift(0);
  if (renorm_both) {
    shift = lse_of(of_k);
  } else if (o.space == td::kLogits) {
    auto all = of_k;
    all.insert(all.end(), outside.begin(), outside.end());
    shift = lse_of(all);
  }
  for (S& v : log_q) v = v - shift;
  if (bucket) {
    log_p.push_back(o.given_tail ? b : log(S(1) - exp(lse_of(a))));
    log_q.push_back(lse_outside - shift);
  }
  Gradients<S> r;
  std::vector<S> g, h, p, q;
  for (size_t e = 0; e < log_p.size(); ++e) {
    p.push_back(exp(log_p[e])), q.push_back(exp(log_q[e]));
    const S l = log_p[e] - log_q[e], term = o.reverse ? -(q[e] * l) : p[e] * l;
    r.loss = r.loss + term, r.terms += std::fabs(value(term));
    g.push_back(o.reverse ? -q[e] : p[e] * (l + S(1)));
    h.push_back(o.reverse ? q[e] * (S(1) - l) : -p[e]);
  }
  const S sum_g = sum_of(g), sum_h = sum_of(h);
  r.x.assign(n, S(0));
  const auto per_x = [&](size_t j, S gamma) { return o.space == td::kProbs ? gamma / x[j] : gamma / t; };
  for (size_t e = 0; e < k; ++e) {
    S of_a = g[e];
    if (renorm_p) of_a = of_a - p[e] * sum_g;
    if (bucket && !o.given_tail) of_a = of_a - p[e] * g[k] / p[k];
    r.a.push_back(of_a);
    const auto j = static_cast<size_t>(index[e]);
    r.x[j] = per_x(j, normalised ? h[e] - q[e] * sum_h : h[e]);
  }
  if (bucket || (o.space == td::kLogits && !renorm_both)) {
    // Of "zero" and "renorm_target" the normaliser alone sees the classes outside.
    const S tail_q = exp(lse_outside - shift), tail_h = bucket ? h[k] : S(0);
    const S gamma = normalised ? tail_h - tail_q * sum_h : tail_h;
    for (size_t m = 0; m < outside.size(); ++m) r.x[outside_at[m]] = exp(outside[m] - lse_outside) * gamma / t;
    for (size_t m = 0; o.space == td::kProbs && m < n; ++m)
      if (!in_k[m]) r.x[m] = gamma / sum_outside;
  }
  if (bucket && o.given_tail) r.b = g[k];
  return r;
}

// -- Cases -----------------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  int64_t rows = 3, classes = 100, k = 8;
  double kl = 1, size = 2, temperature = 1;
  Layout in = {}, out = {};
  bool masked = false;  // classes that the student does not have
  bool all_options = false;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name << " (" << c.rows << " x " << c.classes << ")"; }

struct Problem {
  Rows x, v;
  Memory log_probs, v_k, tail, v_tail, weight, coefficient;
  std::vector<int64_t> indices;
  std::vector<int64_t> kept;  // of K, a row

  Problem(const Case& c, DType type, const Options& o)
      : x(type, c.rows, c.classes, c.in, "x"),
        v(type, c.rows, c.classes, c.out, "v"),
        log_probs(DType::Double, c.rows * c.k, "log_probs", true),
        v_k(DType::Double, c.rows * c.k, "v_log_probs", true),
        tail(DType::Double, c.rows, "tail", true),
        v_tail(DType::Double, c.rows, "v_tail", true),
        weight(DType::Double, c.rows, "weight", true),
        coefficient(DType::Double, c.rows, "coefficient", true),
        indices(static_cast<size_t>(c.rows * c.k), std::numeric_limits<int64_t>::max()) {
    std::mt19937_64 random(static_cast<uint64_t>(c.classes) * 3 + static_cast<uint64_t>(c.k));
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < c.rows; ++i) {
      std::vector<double> s, p;
      for (int64_t j = 0; j < c.classes; ++j) s.push_back(c.size * normal(random));
      const auto log_sum = [&](const std::vector<double>& of) {
        double sum = 0;
        for (const double z : of) sum += std::exp(z / c.temperature);
        return std::log(sum);
      };
      for (const double z : s) p.push_back(z + std::sqrt(2 * c.kl) * c.temperature * normal(random));
      // K: the teacher's largest classes, the last two padding.
      std::vector<int64_t> order(static_cast<size_t>(c.classes));
      std::iota(order.begin(), order.end(), 0);
      std::sort(order.begin(), order.end(),
                [&](int64_t e, int64_t f) { return p[static_cast<size_t>(e)] > p[static_cast<size_t>(f)]; });
      const int64_t keep = std::max<int64_t>(1, c.k - (i == 2 ? 2 : 0));
      std::sort(order.begin(), order.begin() + keep);
      kept.push_back(keep);
      const double sum_s = log_sum(s), sum_p = log_sum(p);
      for (int64_t e = 0; e < c.k; ++e) {
        const bool there = e < keep;
        if (there) indices[static_cast<size_t>(i * c.k + e)] = order[static_cast<size_t>(e)];
        log_probs.set(i * c.k + e, there ? p[static_cast<size_t>(order[static_cast<size_t>(e)])] / c.temperature - sum_p
                                         : -std::numeric_limits<double>::infinity());
        v_k.set(i * c.k + e, normal(random));
      }
      std::vector<bool> in_k(s.size(), false);
      for (int64_t e = 0; e < keep; ++e) in_k[static_cast<size_t>(order[static_cast<size_t>(e)])] = true;
      for (int64_t j = 0; j < c.classes; ++j) {
        const double log_q = s[static_cast<size_t>(j)] / c.temperature - sum_s;
        const bool absent = c.masked && j % 3 == 1 && !in_k[static_cast<size_t>(j)];
        double z = o.space == td::kLogits ? s[static_cast<size_t>(j)] : o.space == td::kProbs ? std::exp(log_q) : log_q;
        if (absent) z = o.space == td::kProbs ? 0 : -std::numeric_limits<double>::infinity();
        x.set(i, j, z);
        v.set(i, j, (o.space == td::kProbs ? std::exp(log_q) : 1) * normal(random));
      }
      tail.set(i, -1.5 - 0.1 * static_cast<double>(i)), v_tail.set(i, normal(random));
      weight.set(i, i % 3 == 1 ? 0 : 0.5 + static_cast<double>(i));
      coefficient.set(i, i % 3 == 1 ? 0 : -0.75);
    }
  }
  td::TopkRows rows(const Case& c, const Options& o) const {
    td::TopkRows r;
    r.input = x.in();
    r.indices = indices.data(), r.log_probs = log_probs.data<double>();
    r.tail_log_prob = o.given_tail ? tail.data<double>() : nullptr;
    r.space = o.space, r.tail = o.tail, r.reverse = o.reverse, r.temperature = static_cast<double>(o.temperature);
    r.classes = c.classes, r.k = c.k;
    return r;
  }
};

void check(const Case& c, DType type, const Options& o) {
  const Problem in(c, type, o);
  const simt::Buffer indices(in.indices.data(), in.indices.size() * sizeof(int64_t), "indices", true);
  const int64_t n = c.rows, classes = c.classes, k = c.k;
  const bool wide = type == DType::Double;
  const DType real = wide ? DType::Double : DType::Float;
  const Real accuracy = wide ? 1e-11L : 2e-6L;
  const td::TopkRows rows = in.rows(c, o);
  const auto workspace = [&] {
    return std::make_unique<Memory>(DType::Double, td::cuda::kl_div_topk_workspace(n, classes), "workspace", false);
  };
  Memory loss(real, n, "loss", false), stat(DType::Double, n * td::TopkStat::kSize, "stat", false);
  td::cuda::kl_div_topk_forward({rows, in.weight.data<double>(), loss.data(), wide, stat.data<double>()}, n,
                                workspace()->data<double>(), nullptr);
  const Rows grad(type, n, classes, c.out, "grad", false), d_x(type, n, classes, c.out, "d_x", false);
  Memory grad_a(DType::Double, n * k, "grad_a", false), grad_b(DType::Double, n, "grad_b", false);
  td::cuda::kl_div_topk_backward({rows, in.coefficient.data<double>(), stat.data<double>(), grad.out(),
                                  grad_a.data<double>(), o.given_tail ? grad_b.data<double>() : nullptr},
                                 n, nullptr, nullptr);
  Memory d_c(DType::Double, n, "d_coefficient", false), d_a(DType::Double, n * k, "d_a", false),
      d_b(DType::Double, n, "d_b", false);
  td::cuda::kl_div_topk_double_backward(
      {rows, in.v.in(), in.v_k.data<double>(), o.given_tail ? in.v_tail.data<double>() : nullptr,
       in.coefficient.data<double>(), stat.data<double>(), d_c.data<double>(), d_x.out(), d_a.data<double>(),
       o.given_tail ? d_b.data<double>() : nullptr},
      n, workspace()->data<double>(), nullptr);
  for (int64_t i = 0; i < n; ++i) {
    const Real weight = in.weight.get(i), g = in.coefficient.get(i);
    const auto keep = static_cast<size_t>(in.kept[static_cast<size_t>(i)]);
    if (weight == 0) {
      ASSERT_EQ(loss.get(i), 0);
      for (int64_t j = 0; j < classes; ++j) ASSERT_TRUE(grad.get(i, j) == 0 && d_x.get(i, j) == 0);
      for (int64_t e = 0; e < k; ++e) ASSERT_TRUE(grad_a.get(i * k + e) == 0 && d_a.get(i * k + e) == 0);
      continue;
    }
    std::vector<Dual> x, a;
    std::vector<int64_t> index;
    for (int64_t j = 0; j < classes; ++j) {
      x.push_back({in.x.get(i, j), std::isfinite(in.x.get(i, j)) ? in.v.get(i, j) : 0});
    }
    for (size_t e = 0; e < keep; ++e) {
      const int64_t at = i * k + static_cast<int64_t>(e);
      index.push_back(in.indices[static_cast<size_t>(at)]), a.push_back({in.log_probs.get(at), in.v_k.get(at)});
    }
    const Dual b(in.tail.get(i), o.given_tail ? in.v_tail.get(i) : 0);
    const auto want = gradients<Dual>(x, index, a, b, o);
    const auto part = [](const std::vector<Dual>& v, bool along) {
      std::vector<Real> r;
      for (const Dual& e : v) r.push_back(along ? e.d : e.x);
      return r;
    };
    // Where P and Q both sum to 1, relative to the loss and to what an error of the logarithms makes of it, which are
    // of about 10 and rounded in double a few times; else to its terms.
    const bool unit =
        o.tail == td::kTailRenormBoth || (o.tail == td::kTailBucket && !o.given_tail && o.space == td::kLogits);
    const Real allowed =
        unit ? accuracy * want.loss.x + 1e-14L * std::sqrt(2 * std::fabs(want.loss.x)) : accuracy * want.terms;
    ASSERT_NO_FATAL_FAILURE(expect_close(loss.get(i), weight * want.loss.x, weight * allowed, real, "loss", i, -1));
    for (const bool along : {false, true}) {
      const auto of_x = part(want.x, along), of_a = part(want.a, along);
      const Real size_x = largest(of_x), size_a = std::max<Real>(largest(of_a), 1e-3L);
      const Rows& got = along ? d_x : grad;
      Memory& got_a = along ? d_a : grad_a;
      for (int64_t j = 0; j < classes; ++j)
        ASSERT_NO_FATAL_FAILURE(expect_close(got.get(i, j), g * of_x[static_cast<size_t>(j)],
                                             std::fabs(g) * accuracy * size_x, type, along ? "d_x" : "grad", i, j));
      for (int64_t e = 0; e < k; ++e)
        ASSERT_NO_FATAL_FAILURE(expect_close(got_a.get(i * k + e),
                                             static_cast<size_t>(e) < keep ? g * of_a[static_cast<size_t>(e)] : 0,
                                             std::fabs(g) * accuracy * size_a, real, along ? "d_a" : "grad_a", i, e));
    }
    if (o.given_tail) {
      ASSERT_NO_FATAL_FAILURE(expect_close(grad_b.get(i), g * want.b.x, accuracy, real, "grad_b", i, -1));
      ASSERT_NO_FATAL_FAILURE(expect_close(d_b.get(i), g * want.b.d, accuracy, real, "d_b", i, -1));
    }
    Real sizes = 0;
    for (size_t j = 0; j < x.size(); ++j) sizes += std::fabs(want.x[j].x * x[j].d);
    for (size_t e = 0; e < keep; ++e) sizes += std::fabs(want.a[e].x * a[e].d) + std::fabs(a[e].d);
    ASSERT_NO_FATAL_FAILURE(expect_close(d_c.get(i), want.loss.d, accuracy * sizes, real, "d_coefficient", i, -1));
  }
}

class KlDivTopkCuda : public testing::TestWithParam<Case> {};

TEST_P(KlDivTopkCuda, ValuesAndDerivatives) {
  const Case& c = GetParam();
  std::vector<Options> options;
  for (const int space : {td::kLogits, td::kLogProbs, td::kProbs})
    for (const int tail : {td::kTailBucket, td::kTailZero, td::kTailRenormTarget, td::kTailRenormBoth})
      for (const bool reverse : {false, true})
        for (const bool given : {false, true})
          if (!given || tail == td::kTailBucket)
            options.push_back(
                {space, tail, reverse, given, space == td::kLogits ? static_cast<Real>(c.temperature) : 1});
  size_t turn = 0;
  for (const DType type : {DType::Float, DType::Double, DType::BFloat16, DType::Half})
    for (const Options& o : options) {
      // A case that is not of all options takes "bucket" of logits, and of the others each in turn.
      const bool chosen = o.space == td::kLogits && o.tail == td::kTailBucket && !o.given_tail && !o.reverse;
      if (!c.all_options && (c.classes > 10000 ? type != DType::Float || !chosen : !chosen && turn++ % 11 != 0))
        continue;
      SCOPED_TRACE((std::ostringstream() << "type " << static_cast<int>(type) << ", " << o).str());
      ASSERT_NO_FATAL_FAILURE(run_orders(chosen && c.rows * c.classes <= 2000, [&] { check(c, type, o); }));
    }
}

const Case kCases[] = {
    {.name = "few", .classes = 5, .k = 2},
    {.name = "odd", .classes = 37, .k = 6, .temperature = 1.5, .all_options = true},
    {.name = "warp", .classes = 300, .k = 40},
    {.name = "a_block", .classes = 1100, .k = 20},
    {.name = "many", .classes = 1500, .k = 700},
    {.name = "several_visits", .rows = 2, .classes = 9001, .k = 64},
    {.name = "split", .rows = 2, .classes = 20003, .k = 33},
    {.name = "near", .classes = 500, .kl = 1e-8},
    {.name = "near_split", .rows = 1, .classes = 17000, .k = 33, .kl = 1e-8},
    {.name = "far", .classes = 500, .kl = 9},
    {.name = "peaked", .classes = 200, .size = 8},
    {.name = "masked", .classes = 90, .masked = true},
    {.name = "strided", .classes = 67, .in = {1, 3}, .out = {1, 3}},
    {.name = "misaligned", .classes = 1067, .in = {0, 1, 1}, .out = {0, 1, 2}},
    {.name = "at_the_end", .classes = 131, .in = {0, 1, -1}, .out = {0, 1, -1}},
};
INSTANTIATE_TEST_SUITE_P(Cases, KlDivTopkCuda, testing::ValuesIn(kCases),
                         [](const auto& test) { return std::string(test.param.name); });

// What the CPU kernel refuses is an assertion of the device, but in a row of weight or coefficient 0.
class KlDivTopkCudaAssertions : public testing::TestWithParam<int64_t> {};
TEST_P(KlDivTopkCudaAssertions, RefusedRows) {
  const Case c{.name = "refused", .rows = 3, .classes = GetParam(), .k = 4};
  const auto workspace = [&] {
    return std::make_unique<Memory>(DType::Double, td::cuda::kl_div_topk_workspace(c.rows, c.classes), "workspace",
                                    false);
  };
  for (const char* bad : {"class -1", "class too large", "class twice", "mass"})
    for (const int64_t row : {0, 1}) {  // row 1 has weight 0
      Problem in(c, DType::Float, {});
      int64_t* const index = &in.indices[static_cast<size_t>(row * c.k)];
      if (bad == std::string("class -1")) index[0] = -1;
      if (bad == std::string("class too large")) index[3] = c.classes;
      if (bad == std::string("class twice")) index[2] = index[1];
      if (bad == std::string("mass")) in.log_probs.set(row * c.k, 0.1);
      simt::options = {};
      std::vector<float> loss(3);
      std::vector<double> stat(3 * td::TopkStat::kSize), d_coefficient(3), d_a(12);
      const td::TopkForward forward{in.rows(c, {}), in.weight.data<double>(), loss.data(), false, stat.data()};
      const td::TopkDoubleBackward second{forward.rows,
                                          in.v.in(),
                                          in.v_k.data<double>(),
                                          nullptr,
                                          in.coefficient.data<double>(),
                                          stat.data(),
                                          d_coefficient.data(),
                                          {},
                                          d_a.data(),
                                          nullptr};
      if (row == 0) {
        EXPECT_THROW(td::cuda::kl_div_topk_forward(forward, c.rows, workspace()->data<double>(), nullptr),
                     std::runtime_error)
            << bad;
        EXPECT_THROW(td::cuda::kl_div_topk_double_backward(second, c.rows, workspace()->data<double>(), nullptr),
                     std::runtime_error)
            << bad;
      } else {
        td::cuda::kl_div_topk_forward(forward, c.rows, workspace()->data<double>(), nullptr);
        td::cuda::kl_div_topk_double_backward(second, c.rows, workspace()->data<double>(), nullptr);
        EXPECT_EQ(loss[1], 0);
        EXPECT_EQ(d_coefficient[1], 0);
      }
    }
}
INSTANTIATE_TEST_SUITE_P(Classes, KlDivTopkCudaAssertions, testing::Values(20, 20003),  // one segment, several
                         [](const auto& test) { return std::to_string(test.param); });

}  // namespace
