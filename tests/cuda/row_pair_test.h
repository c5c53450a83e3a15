// What the tests of the CUDA kernels of divergences between two distributions share: cases of two rows, and what is
// expected of the kernels in each.
#pragma once
#include <ostream>
#include <utility>

#include "core/cuda_stream.h"
#include "core/row_pair.h"
#include "device_rows.h"

namespace {

// -- Cases -----------------------------------------------------------------------------------------------------------

enum class Mask { None, P, Both, Q, Row, Tail };

struct Case {
  const char* name;
  int64_t rows = 2, classes = 1000;
  double kl = 1;  // about how far P and Q are apart
  double size = 2;
  double temperature = 1;
  Layout p = {}, q = {}, grad_p = {}, grad_q = {};
  Mask mask = Mask::None;
  double offset = 0;    // of Q from P
  double level = 0;     // of both
  bool same_v = false;  // both sides move alike, and up
  double lacking = 0;   // not 0: Q's last logit is so far below P's, which has little mass
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name << " (" << c.rows << " x " << c.classes << ")"; }

struct Types {
  DType p, q;
};
constexpr Types kTypes[] = {{DType::Float, DType::Float},       {DType::Double, DType::Double},
                            {DType::BFloat16, DType::BFloat16}, {DType::Half, DType::Half},
                            {DType::Float, DType::BFloat16},    {DType::Half, DType::Float}};

class Problem {
 public:
  Problem(const Case& c, Types types, int p_space, int q_space)
      : c_(c),
        p(types.p, c.rows, c.classes, c.p, "p"),
        q(types.q, c.rows, c.classes, c.q, "q"),
        v_p(types.p, c.rows, c.classes, c.grad_p, "v_p"),
        v_q(types.q, c.rows, c.classes, {}, "v_q"),
        weight(DType::Double, c.rows, "weight", true),
        coefficient(DType::Double, c.rows, "coefficient", true),
        p_space_(p_space),
        q_space_(q_space) {
    std::mt19937_64 random(static_cast<uint64_t>(c.classes) * 7 + static_cast<uint64_t>(c.rows));
    for (int64_t i = 0; i < c.rows; ++i) {
      std::vector<double> t, s;
      for (int64_t j = 0; j < c.classes; ++j) {
        t.push_back(c.size * normal(random) + c.level);
        s.push_back(t.back() + std::sqrt(2 * c.kl) * c.temperature * normal(random) + c.offset);
        v_p.set(i, j, normal(random) + (c.same_v ? 100 : 0));
        v_q.set(i, j, c.same_v ? v_p.get(i, j) : normal(random));
      }
      if (c.lacking != 0) t.back() = c.level + static_cast<double>(i) - 2, s.back() = t.back() - c.lacking;
      fill(p, i, t, p_space), fill(q, i, s, q_space);
      for (int64_t j = 0; j < c.classes; ++j) {
        if (hides(c.mask, true, i, j)) p.set(i, j, nothing(p_space));
        if (hides(c.mask, false, i, j)) q.set(i, j, nothing(q_space));
      }
      weight.set(i, i % 3 == 2 ? 0 : 0.5 + 0.25 * static_cast<double>(i));
      coefficient.set(i, i % 3 == 2 ? 0 : 1.5 - static_cast<double>(i % 5));
    }
  }

  td::RowPair rows() const {
    const bool any_logits = p_space_ == td::kLogits || q_space_ == td::kLogits;
    return {p.in(), q.in(), p_space_, q_space_, c_.classes, any_logits ? c_.temperature : 1};
  }
  bool is_double() const { return p.type() == DType::Double; }
  bool logits() const { return p_space_ == td::kLogits && q_space_ == td::kLogits; }

 private:
  const Case& c_;

 public:
  Rows p, q, v_p, v_q;
  Memory weight, coefficient;

 private:
  static double nothing(int space) { return space == td::kProbs ? 0 : -std::numeric_limits<double>::infinity(); }
  static bool hides(Mask mask, bool of_p, int64_t i, int64_t j) {
    switch (mask) {
      case Mask::P:
        return of_p && j % 3 == 0;
      case Mask::Q:
        return !of_p && j % 7 == 3 && i == 0;
      case Mask::Both:
        return j % 3 == 0;
      case Mask::Row:
        return i == 1;
      case Mask::Tail:
        return j >= 5;
      default:
        return false;
    }
  }
  static void fill(Rows& rows, int64_t i, const std::vector<double>& x, int space) {
    const double top = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (const double v : x) sum += std::exp(v - top);
    for (size_t j = 0; j < x.size(); ++j)
      rows.set(i, static_cast<int64_t>(j),
               space == td::kLogits  ? x[j]
               : space == td::kProbs ? std::exp(x[j] - top) / sum
                                     : x[j] - top - std::log(sum));
  }
  int p_space_, q_space_;
};

// f(problem), with every type of logits.
template <class F>
void for_logits(const Case& c, const F& f) {
  for (const Types types : kTypes) {
    if (c.classes > 10000 && types.p != DType::Float) continue;
    SCOPED_TRACE("types " + std::to_string(static_cast<int>(types.p)) + " and " +
                 std::to_string(static_cast<int>(types.q)));
    ASSERT_NO_FATAL_FAILURE(f(Problem(c, types, td::kLogits, td::kLogits)));
  }
}
// And with every other pair of spaces, with types in turn.
template <class F>
void for_other_spaces(const Case& c, const F& f) {
  size_t k = 0;
  for (const int p_space : {td::kLogits, td::kLogProbs, td::kProbs})
    for (const int q_space : {td::kLogits, td::kLogProbs, td::kProbs})
      if (p_space != td::kLogits || q_space != td::kLogits) {
        if (c.classes > 10000 && p_space == q_space) continue;
        const Types types = kTypes[k++ % std::size(kTypes)];
        SCOPED_TRACE("spaces " + std::to_string(p_space) + " and " + std::to_string(q_space) + ", types " +
                     std::to_string(static_cast<int>(types.p)) + " and " + std::to_string(static_cast<int>(types.q)));
        ASSERT_NO_FATAL_FAILURE(f(Problem(c, types, p_space, q_space)));
      }
}

std::string case_name(const testing::TestParamInfo<Case>& test) {
  std::string name = test.param.name;
  std::replace_if(
      name.begin(), name.end(), [](char x) { return !std::isalnum(x); }, '_');
  return name;
}

const Case kCases[] = {
    // Around what a thread, a warp and a block take at once.
    {.name = "one_class", .classes = 1},
    {.name = "two", .rows = 3, .classes = 2},
    {.name = "less_than_a_piece", .rows = 9, .classes = 7},
    {.name = "a_piece", .rows = 17, .classes = 8},
    {.name = "odd", .rows = 3, .classes = 37},
    {.name = "a_warp", .rows = 3, .classes = 256},
    {.name = "more_than_a_warp", .rows = 4, .classes = 257},
    {.name = "most_of_a_warp", .rows = 3, .classes = 1024},
    {.name = "a_block", .rows = 2, .classes = 1025},
    {.name = "more_than_a_block", .rows = 2, .classes = 2051},
    {.name = "several_visits", .rows = 2, .classes = 9001},
    // Rows over several blocks.
    {.name = "split", .rows = 1, .classes = 16384},
    {.name = "split_odd", .rows = 2, .classes = 70001},
    {.name = "split_odd_far", .rows = 1, .classes = 20003, .kl = 9},
    // How far P and Q are apart, from tiny to far.
    {.name = "kl_1e-12", .kl = 1e-12},
    {.name = "kl_1e-6", .kl = 1e-6, .temperature = 3},
    {.name = "kl_1e-3", .classes = 3001, .kl = 1e-3, .temperature = 0.5},
    {.name = "kl_0.2", .classes = 3001, .kl = 0.2},
    {.name = "kl_30", .classes = 3001, .kl = 30},
    {.name = "kl_300", .kl = 300, .temperature = 2.5},
    {.name = "peaked", .kl = 0.1, .size = 12},
    {.name = "offset", .kl = 1e-4, .offset = 1000},
    {.name = "same_direction", .kl = 1e-6, .same_v = true},
    {.name = "level", .kl = 1e-2, .level = 1000},
    {.name = "level_far", .kl = 5, .level = 1000},
    {.name = "agree", .rows = 4, .kl = 0, .lacking = 45},
    {.name = "agree_near", .rows = 4, .kl = 0, .lacking = 30},
    {.name = "agree_centre", .rows = 4, .kl = 0, .offset = 3, .lacking = 30},
    {.name = "agree_masked", .rows = 4, .kl = 0, .lacking = std::numeric_limits<double>::infinity()},
    {.name = "agree_split", .rows = 1, .classes = 20003, .kl = 0, .lacking = std::numeric_limits<double>::infinity()},
    // Memory: padded and strided rows, misaligned alike and differently, against the end of a page.
    {.name = "padded", .rows = 3, .classes = 64, .p = {69}, .q = {69}, .grad_p = {65}, .grad_q = {66}},
    {.name = "misaligned_alike",
     .rows = 3,
     .classes = 1067,
     .p = {0, 1, 1},
     .q = {0, 1, 1},
     .grad_p = {0, 1, 1},
     .grad_q = {0, 1, 1}},
    {.name = "misaligned_differently",
     .rows = 3,
     .classes = 1100,
     .p = {1102, 1, 3},
     .q = {1102, 1, 1},
     .grad_q = {0, 1, 2}},
    {.name = "at_the_end",
     .rows = 2,
     .classes = 1031,
     .p = {0, 1, -1},
     .q = {0, 1, -1},
     .grad_p = {0, 1, -1},
     .grad_q = {0, 1, -1}},
    {.name = "strided", .rows = 3, .classes = 67, .p = {1, 3}, .q = {200, 2}, .grad_p = {1, 3}, .grad_q = {1, 3}},
    {.name = "strided_peaked",
     .rows = 2,
     .classes = 67,
     .kl = 0.1,
     .size = 12,
     .p = {1, 3},
     .q = {200, 2},
     .grad_p = {1, 3},
     .grad_q = {1, 3}},
    {.name = "strided_block", .rows = 2, .classes = 1500, .p = {1, 2}, .grad_p = {1, 2}},
    // Zeros and infinities.
    {.name = "mask_p", .rows = 3, .classes = 515, .kl = 0.1, .mask = Mask::P},
    {.name = "mask_both", .rows = 3, .classes = 1515, .kl = 0.1, .mask = Mask::Both},
    {.name = "mask_both_far", .rows = 2, .classes = 515, .kl = 5, .mask = Mask::Both},
    {.name = "mask_q", .rows = 2, .classes = 515, .mask = Mask::Q},
    {.name = "mask_row", .rows = 3, .classes = 40, .mask = Mask::Row},
    {.name = "mask_row_block", .rows = 2, .classes = 1300, .mask = Mask::Row},
    {.name = "mask_tail", .rows = 2, .classes = 3000, .kl = 0.1, .mask = Mask::Tail},
};

// -- Checks ----------------------------------------------------------------------------------------------------------

struct Exact {
  Real value = 0;
  Real terms = 0;  // what the error of the value is relative to
  std::vector<Real> grad_p, grad_q, d_p, d_q;
  Real scale_p = 0, scale_q = 0;  // what the errors of grad_p, grad_q are relative to
  Real dot = 0, dot_scale = 0;    // the derivative along (v_p, v_q), and what its error is relative to
};

// The kernels of a divergence.
template <class PairRows>
struct Kernels {
  using Stream = td::cuda::Stream;
  int stat_size;
  int64_t (*workspace)(int64_t rows, int64_t classes);
  void (*forward)(const td::RowPairForward<PairRows>&, int64_t rows, double* workspace, Stream);
  void (*backward)(const td::RowPairBackward<PairRows>&, int64_t rows, double* workspace, Stream);
  void (*double_backward)(const td::RowPairDoubleBackward<PairRows>&, int64_t rows, double* workspace, Stream);
};

// Runs all three kernels and compares all that they leave. exact(i): of a row.
template <class PairRows, class F>
void check_all(const Kernels<PairRows>& kernels, const Case& c, const Problem& in, const PairRows& rows,
               const F& exact) {
  const int64_t n = c.rows, v = c.classes;
  const DType real = in.is_double() ? DType::Double : DType::Float;
  const Real ulp = in.is_double() ? 0x1p-52L : 0x1p-23L, accuracy = in.is_double() ? 1e-11L : 2e-6L;
  const Memory loss(real, n, "loss", false), stat(DType::Double, n * kernels.stat_size, "stat", false),
      d_coefficient(DType::Double, n, "d_coefficient", false);
  const Rows grad_p(in.p.type(), n, v, c.grad_p, "grad_p", false), grad_q(in.q.type(), n, v, c.grad_q, "grad_q", false),
      alone_p(in.p.type(), n, v, c.grad_q, "grad_p alone", false),
      alone_q(in.q.type(), n, v, {}, "grad_q alone", false), d_p(in.p.type(), n, v, {}, "d_p", false),
      d_q(in.q.type(), n, v, c.grad_q, "d_q", false);
  // Each in a workspace of its own: garbage.
  const auto run = [&](auto kernel, const auto& call) {
    const Memory workspace(DType::Double, kernels.workspace(n, v), "workspace", false);
    kernel(call, n, workspace.data<double>(), nullptr);
  };
  run(kernels.forward,
      td::RowPairForward<PairRows>{rows, in.weight.data<double>(), loss.data(), in.is_double(), stat.data<double>()});
  const auto backward = [&](const td::RowsOut& of_p, const td::RowsOut& of_q) {
    run(kernels.backward,
        td::RowPairBackward<PairRows>{rows, in.coefficient.data<double>(), stat.data<double>(), of_p, of_q});
  };
  backward(grad_p.out(), grad_q.out());
  backward(alone_p.out(), {});
  backward({}, alone_q.out());
  run(kernels.double_backward,
      td::RowPairDoubleBackward<PairRows>{rows, in.v_p.in(), in.v_q.in(), in.coefficient.data<double>(),
                                          stat.data<double>(), d_coefficient.data<double>(), d_p.out(), d_q.out()});
  for (int64_t i = 0; i < n; ++i) {
    const Real weight = in.weight.get(i), g = in.coefficient.get(i), size = std::fabs(g);
    if (weight == 0) {
      ASSERT_EQ(loss.get(i), 0);
      for (int64_t j = 0; j < v; ++j)
        for (const Rows* x : {&grad_p, &grad_q, &alone_p, &alone_q, &d_p, &d_q}) ASSERT_EQ(x->get(i, j), 0);
      continue;
    }
    const Exact e = exact(i);
    const Real allowed = in.logits() ? accuracy * e.terms : 8 * ulp * e.terms;
    ASSERT_NO_FATAL_FAILURE(expect_close(loss.get(i), weight * e.value, weight * allowed, real, "loss", i, -1));
    const Real of_p = size * accuracy * e.scale_p, of_q = size * accuracy * e.scale_q;
    ASSERT_NO_FATAL_FAILURE(expect_rows(grad_p, i, e.grad_p, g, of_p, "grad_p"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(grad_q, i, e.grad_q, g, of_q, "grad_q"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(alone_p, i, e.grad_p, g, of_p, "grad_p alone"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(alone_q, i, e.grad_q, g, of_q, "grad_q alone"));
    if (!std::isfinite(e.value)) continue;
    ASSERT_NO_FATAL_FAILURE(expect_rows(d_p, i, e.d_p, g, size * accuracy * largest(e.d_p), "d_p"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(d_q, i, e.d_q, g, size * accuracy * largest(e.d_q), "d_q"));
    ASSERT_NO_FATAL_FAILURE(
        expect_close(d_coefficient.get(i), e.dot, accuracy * e.dot_scale, DType::Double, "d_coefficient", i, -1));
  }
}

// One row of a matrix of more than 2^31 elements. exact(p, q): of it.
template <class PairRows, class F>
void expect_64_bit_offsets(const Kernels<PairRows>& kernels, const F& exact) {
  const Huge p, q, grad;
  for (int64_t j = 0; j < Huge::kClasses; ++j)
    p.row()[j] = static_cast<float>(j % 11), q.row()[j] = static_cast<float>(j % 7);
  const PairRows in{td::RowPair{p.in(), q.in(), td::kLogits, td::kLogits, Huge::kClasses, 1}};
  std::vector<double> stat(static_cast<size_t>(Huge::kRows * kernels.stat_size)),
      coefficient(static_cast<size_t>(Huge::kRows), 1);
  std::vector<float> loss(static_cast<size_t>(Huge::kRows));
  simt::options = {};
  simt::options.first_block = Huge::kRows - 1;
  kernels.forward({in, nullptr, loss.data(), false, stat.data()}, Huge::kRows, nullptr, nullptr);
  kernels.backward({in, coefficient.data(), stat.data(), {}, grad.out()}, Huge::kRows, nullptr, nullptr);
  const Exact e = exact(p.values(), q.values());
  EXPECT_NEAR(loss.back(), static_cast<double>(e.value), 2e-6 * static_cast<double>(e.value));
  for (int64_t j = 0; j < Huge::kClasses; ++j)
    ASSERT_NEAR(grad.row()[j], static_cast<double>(e.grad_q[static_cast<size_t>(j)]),
                2e-6 * static_cast<double>(e.scale_q));
}

// A weight that is none makes its row NaN, and no other.
template <class PairRows>
void expect_nan_of_bad_weights(const Kernels<PairRows>& kernels) {
  const Case c{.name = "weights", .rows = 5, .classes = 30};
  Problem problem(c, kTypes[0], td::kLogits, td::kLogits);
  const double bad[] = {1, -1, std::nan(""), std::numeric_limits<double>::infinity(), 0};
  for (int64_t i = 0; i < c.rows; ++i) problem.weight.set(i, bad[i]);
  simt::options = {};
  std::vector<float> loss(5);
  std::vector<double> stat(5 * static_cast<size_t>(kernels.stat_size));
  kernels.forward({PairRows{problem.rows()}, problem.weight.data<double>(), loss.data(), false, stat.data()}, c.rows,
                  nullptr, nullptr);
  EXPECT_GT(loss[0], 0);
  for (const size_t i : {1, 2, 3}) EXPECT_TRUE(std::isnan(loss[i]));
  EXPECT_EQ(loss[4], 0);
}

// Twice the same bits, in whatever order the threads and blocks run.
template <class PairRows>
void expect_same_bits(const Kernels<PairRows>& kernels, Types types) {
  for (const int64_t classes : {700, 3000, 50000}) {
    const Case c{.name = "bits", .rows = 3, .classes = classes, .kl = 0.1};
    const Problem problem(c, types, td::kLogits, td::kLogits);
    std::vector<std::vector<double>> stats;
    for (const simt::Schedule& t : simt::schedules) {
      simt::options = {};
      simt::options.order = t.order, simt::options.seed = t.seed;
      std::vector<float> loss(3);
      std::vector<double> stat(3 * static_cast<size_t>(kernels.stat_size)),
          workspace(static_cast<size_t>(kernels.workspace(c.rows, classes)));
      kernels.forward({PairRows{problem.rows()}, nullptr, loss.data(), false, stat.data()}, c.rows, workspace.data(),
                      nullptr);
      stats.push_back(stat);
    }
    for (const auto& stat : stats) EXPECT_EQ(stat, stats[0]);
  }
}

}  // namespace
