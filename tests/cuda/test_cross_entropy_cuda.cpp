// The CUDA kernels of cross-entropy on the emulated device: values and derivatives against long double, over sizes,
// dtypes, spaces, layouts, masks and label smoothing, in several orders of the threads. Whatever the checker finds
// (emulator/simt.cpp) fails the test that launched the kernel.
#include <ostream>
#include <stdexcept>

#include "cross_entropy/cross_entropy.h"
#include "device_rows.h"

namespace {

// -- Reference -------------------------------------------------------------------------------------------------------

struct Exact {
  Real loss = 0, terms = 0;  // terms: what the error of the loss is relative to
  std::vector<Real> grad_p, grad_q, d_p, d_q;
  Real scale_p = 0, scale_q = 0;  // what the errors of grad_p, grad_q are relative to
  Real dot = 0;                   // <v, gradient>
};

// p, and n = -log p with 0 n = 0, of a row.
struct Side {
  std::vector<Real> p, n;
  Side(const std::vector<Real>& x, int space, Real t) {
    for (const Real log_p : log_probs(x, space, t)) n.push_back(-log_p), p.push_back(std::exp(log_p));
    if (space == td::kProbs) p = x;
  }
};
Real product(Real p, Real n) { return p == 0 && !std::isnan(n) ? 0 : p * n; }

Exact exact(const std::vector<Real>& t, const std::vector<Real>& x, const std::vector<Real>& v_p,
            const std::vector<Real>& v_q, int p_space, int q_space, Real temperature, Real smoothing) {
  const size_t k = t.size();
  const Real keep = 1 - smoothing, uniform = smoothing / static_cast<Real>(k);
  const Real t_p = p_space == td::kLogits ? temperature : 1, t_q = q_space == td::kLogits ? temperature : 1;
  const Side a(t, p_space, temperature), b(x, q_space, temperature);
  Exact e;
  Real mass = 0, plain = 0;
  for (size_t j = 0; j < k; ++j) {
    const Real mixed = keep * a.p[j] + uniform;
    mass += mixed, plain += product(a.p[j], b.n[j]), e.loss += product(mixed, b.n[j]);
    e.terms += std::fabs(product(mixed, b.n[j]));
  }
  const bool infinite = std::isinf(plain), near = p_space == td::kLogits && q_space == td::kLogits && smoothing == 0;
  // E[v] from logits by differences from v at the largest class, whose own v - E[v] would be rounded away.
  const auto at_top = [&](const std::vector<Real>& side, const std::vector<Real>& v, int space) {
    return space == td::kLogits ? v[static_cast<size_t>(std::max_element(side.begin(), side.end()) - side.begin())] : 0;
  };
  const Real from_p = at_top(t, v_p, p_space), from_q = at_top(x, v_q, q_space);
  Real mean_p = 0, mean_q = 0;
  for (size_t j = 0; j < k; ++j) {
    const Real p = a.p[j], q = b.p[j], n = b.n[j], mixed = keep * p + uniform, l = n - a.n[j];
    const Real gap = near && std::fabs(l) < 1 && p > 0 ? p * std::expm1(-l) : q * mass - mixed;
    const Real of_p = p_space == td::kLogits     ? (p == 0 || infinite ? 0 : p * (n - plain) / t_p)
                      : p == 0 && std::isinf(n)  ? 0
                      : p_space == td::kLogProbs ? product(p, n)
                                                 : n;
    e.grad_p.push_back(keep * of_p);
    e.grad_q.push_back(q_space == td::kLogits     ? gap / t_q
                       : q_space == td::kLogProbs ? -mixed
                       : mixed == 0               ? 0
                                                  : -mixed / q);
    e.dot += (v_p[j] == 0 ? 0 : v_p[j] * e.grad_p[j]) + (v_q[j] == 0 ? 0 : v_q[j] * e.grad_q[j]);
    mean_p += p_space == td::kProbs ? v_p[j] : product(p, v_p[j] - from_p), mean_q += product(q, v_q[j] - from_q);
    if (!near && q_space == td::kLogits) e.scale_q = std::max(e.scale_q, (q * mass + mixed) / t_q);
    if (p_space == td::kLogits && q_space != td::kLogits && std::isfinite(n))
      e.scale_p = std::max(e.scale_p, p * (std::fabs(n) + std::fabs(plain)) / t_p);
  }
  e.scale_p = std::max(e.scale_p, largest(e.grad_p)), e.scale_q = std::max(e.scale_q, largest(e.grad_q));
  std::vector<Real> p_dot(k), log_q_dot(k);
  Real total_dot = 0, mass_dot = 0;
  for (size_t j = 0; j < k; ++j) {
    p_dot[j] = p_space == td::kLogits     ? a.p[j] * ((v_p[j] - from_p) - mean_p) / t_p
               : p_space == td::kLogProbs ? a.p[j] * v_p[j]
                                          : v_p[j];
    log_q_dot[j] = q_space == td::kLogits  ? ((v_q[j] - from_q) - mean_q) / t_q
                   : q_space == td::kProbs ? v_q[j] / b.p[j]
                                           : v_q[j];
    if (std::isinf(b.n[j])) log_q_dot[j] = 0;
    total_dot += product(p_dot[j], b.n[j]) - a.p[j] * log_q_dot[j];
    mass_dot += keep * p_dot[j];
  }
  for (size_t j = 0; j < k; ++j) {
    const Real p = a.p[j], q = b.p[j], n = b.n[j], mixed = keep * p + uniform, mixed_dot = keep * p_dot[j];
    const Real of_p = p_space == td::kProbs      ? -log_q_dot[j]
                      : p == 0                   ? 0
                      : p_space == td::kLogProbs ? p_dot[j] * n - p * log_q_dot[j]
                                                 : (p_dot[j] * (n - plain) - p * (log_q_dot[j] + total_dot)) / t_p;
    e.d_p.push_back(keep * of_p);
    e.d_q.push_back(q_space == td::kLogits     ? (q * (log_q_dot[j] * mass + mass_dot) - mixed_dot) / t_q
                    : q_space == td::kLogProbs ? -mixed_dot
                    : q == 0                   ? 0
                                               : (mixed * log_q_dot[j] - mixed_dot) / q);
  }
  return e;
}

// -- Cases -----------------------------------------------------------------------------------------------------------

enum class Mask { None, P, Q, Both, Row };

struct Case {
  const char* name;
  int64_t rows = 2, classes = 1000;
  double kl = 1;  // about how far P and Q are apart
  double size = 2;
  double temperature = 1;
  Layout p = {}, q = {}, grad = {};
  Mask mask = Mask::None;
  double level = 0;       // of Q's logits
  double peak = 0;        // how far the label, or one class of both, is above the others
  bool climbing = false;  // the largest entries come last, 50 above the first
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name << " (" << c.rows << " x " << c.classes << ")"; }

const Case kCases[] = {
    // Around what a thread, a warp and a block take at once.
    {.name = "one_class", .classes = 1},
    {.name = "less_than_a_piece", .rows = 9, .classes = 7},
    {.name = "odd", .rows = 3, .classes = 37},
    {.name = "more_than_a_warp", .rows = 4, .classes = 257},
    {.name = "a_block", .rows = 2, .classes = 1025},
    {.name = "several_visits", .rows = 1, .classes = 9001, .temperature = 3},
    // Rows over several blocks.
    {.name = "split_odd", .rows = 1, .classes = 20003, .climbing = true},
    // How far P and Q are apart; one class that outweighs the others.
    {.name = "near", .rows = 3, .kl = 1e-6, .temperature = 0.5},
    {.name = "far", .rows = 2, .classes = 515, .kl = 30},
    {.name = "peak", .rows = 2, .classes = 50, .kl = 0.01, .size = 0.5, .peak = 24},
    {.name = "level", .rows = 2, .kl = 1e-2, .level = 1000},
    // Memory.
    {.name = "misaligned", .rows = 3, .classes = 300, .p = {305, 1, 1}, .q = {302, 1, 3}, .grad = {0, 1, 2}},
    {.name = "at_the_end", .rows = 2, .classes = 131, .p = {0, 1, -1}, .q = {0, 1, -1}, .grad = {0, 1, -1}},
    {.name = "strided", .rows = 3, .classes = 67, .p = {1, 3}, .q = {200, 2}, .grad = {1, 3}},
    // Zeros and infinities.
    {.name = "mask_p", .rows = 2, .classes = 115, .mask = Mask::P},
    {.name = "mask_q", .rows = 2, .classes = 115, .mask = Mask::Q},
    {.name = "mask_both", .rows = 2, .classes = 515, .kl = 0.1, .mask = Mask::Both},
    {.name = "mask_row", .rows = 2, .classes = 40, .mask = Mask::Row},
};

double nothing(int space) { return space == td::kProbs ? 0 : -std::numeric_limits<double>::infinity(); }

void fill(Rows& rows, int64_t i, const std::vector<double>& x, int space) {
  double sum = 0;
  for (const double v : x) sum += std::exp(v);
  for (size_t j = 0; j < x.size(); ++j)
    rows.set(i, static_cast<int64_t>(j),
             space == td::kLogits  ? x[j]
             : space == td::kProbs ? std::exp(x[j]) / sum
                                   : x[j] - std::log(sum));
}

// Operands of a case; the target is a distribution, or a label a row.
struct Problem {
  const Case& c;
  int p_space, q_space;
  double smoothing;
  Rows p, q, v_p, v_q;
  std::vector<int64_t> labels;
  simt::Buffer labels_buffer;
  Memory weight, coefficient;

  Problem(const Case& c_, DType p_type, DType q_type, int p_space_, int q_space_, double smoothing_)
      : c(c_),
        p_space(p_space_),
        q_space(q_space_),
        smoothing(smoothing_),
        p(p_type, c.rows, c.classes, c.p, "p"),
        q(q_type, c.rows, c.classes, c.q, "q"),
        v_p(p_type, c.rows, c.classes, c.grad, "v_p"),
        v_q(q_type, c.rows, c.classes, {}, "v_q"),
        labels(static_cast<size_t>(c.rows)),
        labels_buffer(labels.data(), labels.size() * sizeof(int64_t), "labels", true),
        weight(DType::Double, c.rows, "weight", true),
        coefficient(DType::Double, c.rows, "coefficient", true) {
    std::mt19937_64 random(static_cast<uint64_t>(c.classes) * 7 + static_cast<uint64_t>(c.rows));
    for (int64_t i = 0; i < c.rows; ++i) {
      const int64_t label = i % 3 == 0 ? c.classes - 1 : i % 3 == 1 ? 0 : i == 2 ? c.classes : -100;
      labels[static_cast<size_t>(i)] = label;
      std::vector<double> t, x;
      for (int64_t j = 0; j < c.classes; ++j) {
        double entry = c.size * normal(random) + (j == label ? c.peak : 0);
        if (c.climbing) entry += 50.0 * static_cast<double>(j) / static_cast<double>(c.classes);
        t.push_back(entry);
        x.push_back(entry + std::sqrt(2 * c.kl) * c.temperature * normal(random) + c.level);
        v_p.set(i, j, normal(random)), v_q.set(i, j, normal(random));
      }
      fill(p, i, t, p_space), fill(q, i, x, q_space);
      for (int64_t j = 0; j < c.classes; ++j) {
        if (c.mask == Mask::Both || c.mask == Mask::P ? j % 3 == 1 : c.mask == Mask::Row && i == 1)
          p.set(i, j, nothing(p_space));
        if (c.mask == Mask::Both ? j % 3 == 1
            : c.mask == Mask::Q  ? j % 7 == 3 && i == 0
                                 : c.mask == Mask::Row && i == 1)
          q.set(i, j, nothing(q_space));
      }
      weight.set(i, i % 3 == 2 ? 0 : 0.5 + 0.25 * static_cast<double>(i));
      coefficient.set(i, i % 3 == 2 ? 0 : 1.5 - static_cast<double>(i % 5));
    }
  }
  double temperature(bool labelled) const {
    return q_space == td::kLogits || (!labelled && p_space == td::kLogits) ? c.temperature : 1;
  }
  bool is_double() const { return q.type() == DType::Double; }
  Exact exact_row(int64_t i) const {
    return exact(p.row(i), q.row(i), v_p.row(i), v_q.row(i), p_space, q_space, static_cast<Real>(temperature(false)),
                 static_cast<Real>(smoothing));
  }
  Exact exact_label_row(int64_t i) const {
    std::vector<Real> onehot(static_cast<size_t>(c.classes)), none(onehot.size());
    onehot[static_cast<size_t>(labels[static_cast<size_t>(i)])] = 1;
    return exact(onehot, q.row(i), none, v_q.row(i), td::kProbs, q_space, static_cast<Real>(temperature(true)),
                 static_cast<Real>(smoothing));
  }
};

// A row of weight 0 leaves zeros; of any other what `e` says, d_coefficient against the sizes of its terms.
struct Outputs {
  const Memory &loss, &d_coefficient;
  const Rows *grad_p, *grad_q, *d_p, *d_q;  // null: none
};
void check_row(const Problem& in, int64_t i, const Exact& e, bool by_value, const Outputs& out) {
  const DType real = in.is_double() ? DType::Double : DType::Float;
  const Real ulp = in.is_double() ? 0x1p-52L : 0x1p-23L, accuracy = in.is_double() ? 1e-11L : 2e-6L,
             weight = in.weight.get(i), g = in.coefficient.get(i), size = std::fabs(g) * accuracy;
  const Real allowed = by_value ? accuracy * std::fabs(e.loss) : 8 * ulp * e.terms;
  ASSERT_NO_FATAL_FAILURE(expect_close(out.loss.get(i), weight * e.loss, weight * allowed, real, "loss", i, -1));
  if (std::isnan(e.loss)) return;
  if (out.grad_p != nullptr) {
    ASSERT_NO_FATAL_FAILURE(expect_rows(*out.grad_p, i, e.grad_p, g, size * e.scale_p, "grad_p"));
  }
  ASSERT_NO_FATAL_FAILURE(expect_rows(*out.grad_q, i, e.grad_q, g, size * e.scale_q, "grad_q"));
  if (std::isinf(e.loss)) return;
  // Of distributions v - E[v] is rounded to the size of v.
  const Real of_v = out.d_p != nullptr ? std::fabs(g) * 0x1p-46L : 0;
  if (out.d_p != nullptr) {
    ASSERT_NO_FATAL_FAILURE(expect_rows(*out.d_p, i, e.d_p, g, size * largest(e.d_p) + of_v, "d_p"));
  }
  ASSERT_NO_FATAL_FAILURE(expect_rows(*out.d_q, i, e.d_q, g, size * largest(e.d_q) + of_v, "d_q"));
  Real sizes = 0;
  for (int64_t j = 0; j < in.c.classes; ++j) {
    const auto k = static_cast<size_t>(j);
    sizes += (out.d_p != nullptr ? std::fabs(in.v_p.get(i, j) * e.grad_p[k]) : 0) +
             std::fabs(in.v_q.get(i, j)) * std::max(std::fabs(e.grad_q[k]), e.scale_q / 100);
  }
  ASSERT_NO_FATAL_FAILURE(
      expect_close(out.d_coefficient.get(i), e.dot, accuracy * sizes, DType::Double, "d_coefficient", i, -1));
}
void check_left_out(const Problem& in, int64_t i, const Outputs& out) {
  ASSERT_EQ(out.loss.get(i), 0);
  for (const Rows* x : {out.grad_p, out.grad_q, out.d_p, out.d_q})
    for (int64_t j = 0; x != nullptr && j < in.c.classes; ++j) ASSERT_EQ(x->get(i, j), 0);
}

// -- The target is a distribution ------------------------------------------------------------------------------------

void check_distributions(const Problem& in) {
  const Case& c = in.c;
  const int64_t n = c.rows, k = c.classes, size = td::cuda::cross_entropy_workspace(n, k);
  const td::CrossEntropyRows rows{{in.p.in(), in.q.in(), in.p_space, in.q_space, k, in.temperature(false)},
                                  in.smoothing};
  Memory loss(in.is_double() ? DType::Double : DType::Float, n, "loss", false),
      stat(DType::Double, n * td::CrossEntropyStat::kSize, "stat", false),
      d_coefficient(DType::Double, n, "d_coefficient", false);
  const auto out = [&](const Rows& like, const char* name) { return Rows(like.type(), n, k, c.grad, name, false); };
  const Rows grad_p = out(in.p, "grad_p"), grad_q = out(in.q, "grad_q"), alone_p = out(in.p, "grad_p alone"),
             alone_q = out(in.q, "grad_q alone"), d_p = out(in.p, "d_p"), d_q = out(in.q, "d_q");
  Memory space(DType::Double, size, "workspace", false);
  td::cuda::cross_entropy_forward({rows, in.weight.data<double>(), loss.data(), in.is_double(), stat.data<double>()}, n,
                                  space.data<double>(), nullptr);
  const auto backward = [&](const td::RowsOut& of_p, const td::RowsOut& of_q) {
    Memory own(DType::Double, size, "workspace", false);
    td::cuda::cross_entropy_backward({rows, in.coefficient.data<double>(), stat.data<double>(), of_p, of_q}, n,
                                     own.data<double>(), nullptr);
  };
  backward(grad_p.out(), grad_q.out());
  backward(alone_p.out(), {});
  backward({}, alone_q.out());
  Memory again(DType::Double, size, "workspace", false);
  td::cuda::cross_entropy_double_backward({rows, in.v_p.in(), in.v_q.in(), in.coefficient.data<double>(),
                                           stat.data<double>(), d_coefficient.data<double>(), d_p.out(), d_q.out()},
                                          n, again.data<double>(), nullptr);
  for (int64_t i = 0; i < n; ++i)
    for (const Outputs& x : {Outputs{loss, d_coefficient, &grad_p, &grad_q, &d_p, &d_q},
                             Outputs{loss, d_coefficient, &alone_p, &alone_q, &d_p, &d_q}}) {
      if (in.weight.get(i) == 0) {
        ASSERT_NO_FATAL_FAILURE(check_left_out(in, i, x));
      } else {
        const bool logits = in.p_space == td::kLogits && in.q_space == td::kLogits;
        ASSERT_NO_FATAL_FAILURE(check_row(in, i, in.exact_row(i), logits, x));
      }
    }
}

struct Types {
  DType p, q;
};
constexpr Types kTypes[] = {{DType::Float, DType::Float},       {DType::Double, DType::Double},
                            {DType::BFloat16, DType::BFloat16}, {DType::Half, DType::Half},
                            {DType::Float, DType::BFloat16},    {DType::Half, DType::Float}};

class CrossEntropyCuda : public testing::TestWithParam<Case> {};

TEST_P(CrossEntropyCuda, Logits) {
  const Case& c = GetParam();
  for (const Types types : kTypes) {
    if (c.classes > 2000 && types.p != DType::Float) continue;
    SCOPED_TRACE("types " + std::to_string(static_cast<int>(types.p)) + " and " +
                 std::to_string(static_cast<int>(types.q)));
    const Problem problem(c, types.p, types.q, td::kLogits, td::kLogits, 0);
    ASSERT_NO_FATAL_FAILURE(run_orders(c.rows * c.classes < 200, [&] { check_distributions(problem); }));
  }
}

TEST_P(CrossEntropyCuda, OtherSpaces) {
  const Case& c = GetParam();
  size_t k = 0;  // every pair of spaces, with types and smoothing in turn
  for (const int p_space : {td::kLogits, td::kLogProbs, td::kProbs})
    for (const int q_space : {td::kLogits, td::kLogProbs, td::kProbs}) {
      const Types types = kTypes[k % std::size(kTypes)];
      const double smoothing = p_space == td::kLogits && q_space == td::kLogits ? 0.1 : k % 2 == 0 ? 0.25 : 0;
      ++k;
      if (c.classes > 2000 && (p_space == q_space || k % 3 == 0)) continue;
      SCOPED_TRACE("spaces " + std::to_string(p_space) + " and " + std::to_string(q_space) + ", types " +
                   std::to_string(static_cast<int>(types.p)) + " and " + std::to_string(static_cast<int>(types.q)) +
                   ", smoothing " + std::to_string(smoothing));
      const Problem problem(c, types.p, types.q, p_space, q_space, smoothing);
      ASSERT_NO_FATAL_FAILURE(run_orders(false, [&] { check_distributions(problem); }));
    }
}

// -- The target is a class label -------------------------------------------------------------------------------------

void check_labels(const Problem& in) {
  const Case& c = in.c;
  const int64_t n = c.rows, k = c.classes, size = td::cuda::cross_entropy_labels_workspace(n, k);
  const td::LabelRows rows{{in.q.in(), in.q_space, k, in.temperature(true)}, in.labels.data(), in.smoothing};
  Memory loss(in.is_double() ? DType::Double : DType::Float, n, "loss", false),
      stat(DType::Double, n * td::LabelStat::kSize, "stat", false),
      d_coefficient(DType::Double, n, "d_coefficient", false), first(DType::Double, size, "workspace", false),
      second(DType::Double, size, "workspace", false), third(DType::Double, size, "workspace", false);
  const Rows grad(in.q.type(), n, k, c.grad, "grad", false), d_x(in.q.type(), n, k, c.grad, "d_x", false);
  td::cuda::cross_entropy_labels_forward(
      {rows, in.weight.data<double>(), loss.data(), in.is_double(), stat.data<double>()}, n, first.data<double>(),
      nullptr);
  td::cuda::cross_entropy_labels_backward({rows, in.coefficient.data<double>(), stat.data<double>(), grad.out()}, n,
                                          second.data<double>(), nullptr);
  td::cuda::cross_entropy_labels_double_backward(
      {rows, in.v_q.in(), in.coefficient.data<double>(), stat.data<double>(), d_coefficient.data<double>(), d_x.out()},
      n, third.data<double>(), nullptr);
  const Outputs out{loss, d_coefficient, nullptr, &grad, nullptr, &d_x};
  for (int64_t i = 0; i < n; ++i) {
    if (in.weight.get(i) == 0) {
      ASSERT_NO_FATAL_FAILURE(check_left_out(in, i, out));
    } else {
      ASSERT_NO_FATAL_FAILURE(check_row(in, i, in.exact_label_row(i), in.q_space == td::kLogits, out));
    }
  }
}

constexpr DType kLabelTypes[] = {DType::Float, DType::Double, DType::BFloat16, DType::Half};

TEST_P(CrossEntropyCuda, Labels) {
  const Case& c = GetParam();
  for (const DType type : kLabelTypes) {
    if (c.classes > 2000 && type != DType::Float) continue;
    SCOPED_TRACE("type " + std::to_string(static_cast<int>(type)));
    const Problem problem(c, type, type, td::kLogits, td::kLogits, 0);
    ASSERT_NO_FATAL_FAILURE(run_orders(c.rows * c.classes < 4000, [&] { check_labels(problem); }));
  }
}

TEST_P(CrossEntropyCuda, LabelsOfOtherSpaces) {
  const Case& c = GetParam();
  size_t k = 0;
  for (const int space : {td::kLogits, td::kLogProbs, td::kProbs})
    for (const double smoothing : {0.0, 0.1, 1.0}) {
      const DType type = kLabelTypes[k++ % std::size(kLabelTypes)];
      if (c.classes > 2000 && smoothing == 1) continue;
      SCOPED_TRACE("space " + std::to_string(space) + ", type " + std::to_string(static_cast<int>(type)) +
                   ", smoothing " + std::to_string(smoothing));
      const Problem problem(c, type, type, space, space, smoothing);
      ASSERT_NO_FATAL_FAILURE(run_orders(false, [&] { check_labels(problem); }));
    }
}

INSTANTIATE_TEST_SUITE_P(Cases, CrossEntropyCuda, testing::ValuesIn(kCases),
                         [](const auto& test) { return std::string(test.param.name); });

// A label out of range fails an assertion of the kernel and reads nothing that is not there.
TEST(CrossEntropyCudaLabels, OutOfRange) {
  const Case c{.name = "labels", .rows = 3, .classes = 40};
  for (const int64_t label : {int64_t{-1}, int64_t{40}, int64_t{-100}, int64_t{1} << 40})
    for (const int space : {td::kLogits, td::kProbs}) {
      Problem problem(c, DType::Float, DType::Float, space, space, 0);
      problem.labels[1] = label;
      const td::LabelRows rows{{problem.q.in(), space, c.classes, 1}, problem.labels.data(), 0};
      std::vector<float> loss(3);
      std::vector<double> stat(3 * td::LabelStat::kSize), d_coefficient(3);
      const Rows out(DType::Float, 3, c.classes, {}, "out", false);
      const auto* const weight = problem.weight.data<double>();
      const auto fails = [&](const auto& launch) {
        simt::options = {};
        try {
          launch();
          FAIL() << "label " << label << " was taken";
        } catch (const std::runtime_error& error) {
          const std::string what = error.what();
          EXPECT_NE(what.find("assertion failed"), std::string::npos) << what;
          EXPECT_EQ(what.find("out of bounds"), std::string::npos) << what;
        }
      };
      fails([&] {
        td::cuda::cross_entropy_labels_forward({rows, weight, loss.data(), false, stat.data()}, 3, nullptr, nullptr);
      });
      fails([&] {
        td::cuda::cross_entropy_labels_backward({rows, weight, stat.data(), out.out()}, 3, nullptr, nullptr);
      });
      fails([&] {
        td::cuda::cross_entropy_labels_double_backward(
            {rows, problem.v_q.in(), weight, stat.data(), d_coefficient.data(), out.out()}, 3, nullptr, nullptr);
      });
    }
}

TEST(CrossEntropyCudaLabels, NotADistributionIsNan) {
  simt::options = {};
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()})
    for (const int64_t at : {0, 3, 39}) {
      const Case c{.name = "bad", .classes = 40};
      Problem problem(c, DType::Float, DType::Float, td::kLogits, td::kLogits, 0);
      problem.q.set(1, at, bad);
      std::vector<float> loss(2);
      std::vector<double> stat(2 * td::LabelStat::kSize);
      const td::LabelRows rows{{problem.q.in(), td::kLogits, c.classes, 1}, problem.labels.data(), 0};
      td::cuda::cross_entropy_labels_forward({rows, nullptr, loss.data(), false, stat.data()}, 2, nullptr, nullptr);
      EXPECT_GT(loss[0], 0);
      EXPECT_TRUE(std::isnan(loss[1]));
    }
}

}  // namespace
