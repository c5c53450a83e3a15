// What the tests of the CUDA kernels of divergences between two distributions share: cases of two rows.
#pragma once
#include <ostream>
#include <utility>

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

}  // namespace
