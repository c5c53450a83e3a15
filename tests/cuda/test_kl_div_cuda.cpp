// The CUDA kernels of KL divergence on the emulated device: values and derivatives against long double and against the
// CPU kernels, over sizes, dtypes, spaces, layouts and masks, in several orders of the threads. Whatever the checker
// finds (emulator/simt.cpp) fails the test that launched the kernel.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kl_div/kl_div.h"
#include "simt.h"

namespace td = torch_divergence;

namespace {

using Real = long double;
using td::DType;
constexpr Real kInf = std::numeric_limits<Real>::infinity();
constexpr size_t kPage = 4096;

size_t bytes_of(DType type) { return type == DType::Double ? 8 : type == DType::Float ? 4 : 2; }

// Entries between pages that cannot be touched, known to the checker. They begin `offset` entries after the first
// page, aligned as the caching allocator aligns, or end at the last one (kAtEnd). Not initialised: NaN.
class Memory {
 public:
  static constexpr int kAtEnd = -1;

  Memory(DType type, int64_t count, const char* name, bool initialised, int offset = 0) : type_(type) {
    const size_t bytes = static_cast<size_t>(count) * bytes_of(type);
    size_ = ((bytes + kPage) / kPage + 3) * kPage;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_, kPage, PROT_NONE);
    mprotect(base_ + size_ - kPage, kPage, PROT_NONE);
    std::memset(base_ + kPage, 0xff, size_ - 2 * kPage);
    data_ =
        offset == kAtEnd ? base_ + size_ - kPage - bytes : base_ + kPage + static_cast<size_t>(offset) * bytes_of(type);
    buffer_ = std::make_unique<simt::Buffer>(data_, bytes, name, initialised);
  }
  ~Memory() { munmap(base_, size_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  double get(int64_t i) const {
    switch (type_) {
      case DType::Double:
        return data<double>()[i];
      case DType::Half:
        return static_cast<double>(static_cast<float>(data<c10::Half>()[i]));
      case DType::BFloat16:
        return static_cast<double>(static_cast<float>(data<c10::BFloat16>()[i]));
      default:
        return static_cast<double>(data<float>()[i]);
    }
  }
  void set(int64_t i, double x) {
    switch (type_) {
      case DType::Double:
        data<double>()[i] = x;
        return;
      case DType::Half:
        data<c10::Half>()[i] = static_cast<c10::Half>(static_cast<float>(x));
        return;
      case DType::BFloat16:
        data<c10::BFloat16>()[i] = static_cast<c10::BFloat16>(static_cast<float>(x));
        return;
      default:
        data<float>()[i] = static_cast<float>(x);
    }
  }

 private:
  DType type_;
  size_t size_;
  char* base_;
  char* data_;
  std::unique_ptr<simt::Buffer> buffer_;
};

// Rows of an operand in memory.
struct Layout {
  int64_t row_stride = 0, class_stride = 1;  // 0: contiguous
  int offset = 0;
};
class Rows {
 public:
  Rows(DType type, int64_t rows, int64_t classes, const Layout& layout, const char* name, bool initialised = true)
      : type_(type),
        classes_(classes),
        row_stride_(layout.row_stride != 0 ? layout.row_stride : classes),
        class_stride_(layout.class_stride),
        memory_(type, (rows - 1) * row_stride_ + (classes - 1) * class_stride_ + 1, name, initialised, layout.offset) {
    layout_.dims = 1;
    layout_.sizes[0] = rows;
    layout_.strides[0] = row_stride_;
    layout_.class_stride = class_stride_;
  }
  double get(int64_t i, int64_t j) const { return memory_.get(i * row_stride_ + j * class_stride_); }
  void set(int64_t i, int64_t j, double x) { memory_.set(i * row_stride_ + j * class_stride_, x); }
  std::vector<Real> row(int64_t i) const {
    std::vector<Real> x;
    for (int64_t j = 0; j < classes_; ++j) x.push_back(get(i, j));
    return x;
  }
  td::RowsIn in() const { return {memory_.data(), type_, layout_}; }
  td::RowsOut out() const { return {memory_.data(), type_, layout_}; }
  DType type() const { return type_; }

 private:
  DType type_;
  int64_t classes_, row_stride_, class_stride_;
  td::RowLayout layout_;
  Memory memory_;
};

// -- Reference -------------------------------------------------------------------------------------------------------

struct Exact {
  Real kl = 0;
  Real terms = 0;  // what the error of kl is relative to
  std::vector<Real> grad_p, grad_q, d_p, d_q;
  Real scale_p = 0, scale_q = 0;  // what the errors of grad_p, grad_q are relative to
  Real kl_dot = 0;
};

Real largest(const std::vector<Real>& x) {
  Real r = 0;
  for (const Real v : x)
    if (std::isfinite(v)) r = std::max(r, std::fabs(v));
  return r;
}

// log-probabilities of a row, by log1p of the sum without its largest term.
std::vector<Real> log_probs(const std::vector<Real>& x, int space, Real t) {
  std::vector<Real> result(x.size());
  if (space == td::kLogProbs) return x;
  if (space == td::kProbs) {
    std::transform(x.begin(), x.end(), result.begin(), [](Real v) { return std::log(v); });
    return result;
  }
  const auto top = std::max_element(x.begin(), x.end());
  Real others = 0;
  for (auto it = x.begin(); it != x.end(); ++it)
    if (it != top) others += std::exp((*it - *top) / t);
  std::transform(x.begin(), x.end(), result.begin(), [&](Real v) { return (v - *top) / t - std::log1p(others); });
  return result;
}

Real phi(Real u) {  // e^-u - 1 + u
  if (std::fabs(u) > 0.01L) return std::expm1(-u) + u;
  Real series = 1;
  for (int k = 11; k > 2; --k) series = 1 - u / k * series;
  return u * u / 2 * series;
}

Exact exact(const std::vector<Real>& t, const std::vector<Real>& s, const std::vector<Real>& v_p,
            const std::vector<Real>& v_q, int p_space, int q_space, Real temperature) {
  const size_t n = t.size();
  const bool logits = p_space == td::kLogits && q_space == td::kLogits;
  const auto log_p = log_probs(t, p_space, temperature), log_q = log_probs(s, q_space, temperature);
  std::vector<Real> p(n), q(n), l(n), gap(n), size(n);
  Exact e;
  Real mass = 0;
  for (size_t j = 0; j < n; ++j) {
    p[j] = p_space == td::kProbs ? t[j] : std::exp(log_p[j]);
    q[j] = q_space == td::kProbs ? s[j] : std::exp(log_q[j]);
    l[j] = p[j] == 0 ? (std::isnan(log_q[j]) ? log_q[j] : 0) : log_p[j] - log_q[j];
    if (p[j] != 0 && p_space == td::kProbs && q_space == td::kProbs && std::fabs(p[j] - q[j]) < q[j] / 2)
      l[j] = std::log1p((p[j] - q[j]) / q[j]);
    mass += p[j];
    const auto terms_of = [&](Real x, Real log, int space) {
      return space == td::kLogits ? std::fabs(x / temperature) + std::fabs(x / temperature - log) : std::fabs(log);
    };
    size[j] = p[j] == 0            ? 0
              : p_space == q_space ? std::fabs(l[j])
                                   : terms_of(t[j], log_p[j], p_space) + terms_of(s[j], log_q[j], q_space);
    if (logits) {
      e.kl += std::fabs(l[j]) < 1 && p[j] > 0 ? p[j] * phi(l[j]) : q[j] - p[j] + p[j] * l[j];
    } else {
      e.kl += p[j] * l[j];
      e.terms += std::fabs(p[j] * size[j]);
    }
  }
  if (logits) e.terms = e.kl;
  const bool infinite = std::isinf(e.kl);
  Real centre = 0;
  for (size_t j = 0; j < n; ++j) centre += p[j] == 0 ? 0 : p[j] * l[j];
  const auto zero_or = [&](bool zero, Real x) { return zero ? 0 : x; };
  Real others = 0;
  for (size_t j = 0; j < n; ++j) {
    gap[j] = logits && std::fabs(l[j]) < 1 && p[j] > 0 ? p[j] * std::expm1(-l[j]) : q[j] * mass - p[j];
    const Real g = p_space == td::kLogits ? zero_or(infinite, p[j] * (l[j] - (logits ? centre : e.kl)) / temperature)
                                          : (p_space == td::kProbs ? 1 : p[j]) * (l[j] + 1);
    e.grad_p.push_back(zero_or(p[j] == 0, g));
    e.grad_q.push_back(q_space == td::kLogits     ? gap[j] / temperature
                       : q_space == td::kLogProbs ? -p[j]
                                                  : zero_or(p[j] == 0, -p[j] / q[j]));
    if (logits && p[j] <= 0.5L) others += e.grad_p[j];
  }
  for (size_t j = 0; logits && j < n; ++j)
    if (p[j] > 0.5L) e.grad_p[j] = -others;
  e.scale_p = largest(e.grad_p), e.scale_q = largest(e.grad_q);
  if (!logits) {
    for (size_t j = 0; j < n; ++j) {
      const Real of_p = p_space == td::kLogits  ? p[j] * (size[j] + e.terms) / temperature
                        : p_space == td::kProbs ? size[j] + 1
                                                : p[j] * (size[j] + 1);
      if (std::isfinite(of_p)) e.scale_p = std::max(e.scale_p, of_p);
      if (q_space == td::kLogits) e.scale_q = std::max(e.scale_q, (q[j] * mass + p[j]) / temperature);
    }
  }
  // Along (v_p, v_q).
  Real mean_p = 0, mean_q = 0;
  for (size_t j = 0; j < n; ++j) {
    mean_p += p_space == td::kProbs ? v_p[j] : p[j] * v_p[j];
    mean_q += q[j] * v_q[j];
    e.kl_dot += zero_or(v_p[j] == 0, e.grad_p[j] * v_p[j]) + zero_or(v_q[j] == 0, e.grad_q[j] * v_q[j]);
  }
  for (size_t j = 0; j < n; ++j) {
    const Real log_p_dot = zero_or(p[j] == 0, p_space == td::kLogits  ? (v_p[j] - mean_p) / temperature
                                              : p_space == td::kProbs ? v_p[j] / p[j]
                                                                      : v_p[j]);
    const Real log_q_dot = zero_or(q[j] == 0, q_space == td::kLogits  ? (v_q[j] - mean_q) / temperature
                                              : q_space == td::kProbs ? v_q[j] / q[j]
                                                                      : v_q[j]);
    const Real p_dot = p_space == td::kProbs ? v_p[j] : p[j] * log_p_dot, l_dot = log_p_dot - log_q_dot;
    const Real mass_dot = p_space == td::kLogits ? 0 : mean_p;
    const Real of_p =
        p_space == td::kLogits
            ? zero_or(infinite, (p_dot * (l[j] - (logits ? centre : e.kl)) + p[j] * (l_dot - e.kl_dot)) / temperature)
        : p_space == td::kLogProbs ? p_dot * (l[j] + 1) + p[j] * l_dot
                                   : l_dot;
    e.d_p.push_back(zero_or(p[j] == 0, of_p));
    e.d_q.push_back(q_space == td::kLogits     ? (q[j] * (log_q_dot * mass + mass_dot) - p_dot) / temperature
                    : q_space == td::kLogProbs ? -p_dot
                                               : zero_or(q[j] == 0, (p[j] * log_q_dot - p_dot) / q[j]));
  }
  return e;
}

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

double normal(std::mt19937_64& random) { return std::normal_distribution<double>()(random); }

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
  Exact exact_row(int64_t i) const {
    return exact(p.row(i), q.row(i), v_p.row(i), v_q.row(i), p_space_, q_space_, static_cast<Real>(rows().temperature));
  }

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
    double sum = 0;
    for (const double v : x) sum += std::exp(v);
    for (size_t j = 0; j < x.size(); ++j)
      rows.set(i, static_cast<int64_t>(j),
               space == td::kLogits  ? x[j]
               : space == td::kProbs ? std::exp(x[j]) / sum
                                     : x[j] - std::log(sum));
  }
  int p_space_, q_space_;
};

// Within tolerance * scale; and, of a half type, its own rounding.
void expect_close(double got, Real want, Real allowed, DType type, const char* what, int64_t i, int64_t j) {
  const Real most = type == DType::Half ? 65504 : type == DType::Double ? 0x1p1023L : 0x1p127L;
  if (std::fabs(want) > most / 2 && std::fabs(want) < most * 2) return;  // may overflow, or not
  if (std::fabs(want) > most) want = std::copysign(kInf, want);
  if (type == DType::Half) allowed += std::fabs(want) * 0x1p-11L + 0x1p-25L;
  if (type == DType::BFloat16) allowed += std::fabs(want) * 0x1p-8L;
  if (std::isnan(want) || std::isinf(want)) {
    ASSERT_TRUE(std::isnan(want) ? std::isnan(got) : static_cast<Real>(got) == want)
        << what << " of row " << i << ", class " << j << " is " << got << ", expected " << want;
    return;
  }
  ASSERT_LE(std::fabs(static_cast<Real>(got) - want), allowed)
      << what << " of row " << i << ", class " << j << " is " << got << ", expected " << static_cast<double>(want);
}

void expect_rows(const Rows& got, int64_t i, const std::vector<Real>& want, Real factor, Real allowed,
                 const char* what) {
  for (size_t j = 0; j < want.size(); ++j) {
    ASSERT_NO_FATAL_FAILURE(expect_close(got.get(i, static_cast<int64_t>(j)), factor * want[j], allowed, got.type(),
                                         what, i, static_cast<int64_t>(j)));
  }
}

// Runs all three kernels and compares all that they leave.
void check_all(const Case& c, const Problem& in) {
  const int64_t n = c.rows, v = c.classes;
  const DType real = in.is_double() ? DType::Double : DType::Float;
  const Real ulp = in.is_double() ? 0x1p-52L : 0x1p-23L, accuracy = in.is_double() ? 1e-11L : 2e-6L;
  Memory loss(real, n, "loss", false), stat(DType::Double, n * td::KlDivStat::kSize, "stat", false);
  Memory workspace(DType::Double, td::cuda::kl_div_workspace(n, v), "workspace", false);
  Memory d_coefficient(DType::Double, n, "d_coefficient", false);
  const td::RowPair rows = in.rows();
  td::cuda::kl_div_forward({rows, in.weight.data<double>(), loss.data(), in.is_double(), stat.data<double>()}, n,
                           workspace.data<double>(), nullptr);
  const auto backward = [&](const Rows* grad_p, const Rows* grad_q) {
    Memory space(DType::Double, td::cuda::kl_div_workspace(n, v), "workspace", false);
    td::cuda::kl_div_backward(
        {rows, in.coefficient.data<double>(), stat.data<double>(), grad_p != nullptr ? grad_p->out() : td::RowsOut{},
         grad_q != nullptr ? grad_q->out() : td::RowsOut{}},
        n, space.data<double>(), nullptr);
  };
  const Rows grad_p(in.p.type(), n, v, c.grad_p, "grad_p", false), grad_q(in.q.type(), n, v, c.grad_q, "grad_q", false),
      alone_p(in.p.type(), n, v, c.grad_q, "grad_p alone", false),
      alone_q(in.q.type(), n, v, {}, "grad_q alone", false), d_p(in.p.type(), n, v, {}, "d_p", false),
      d_q(in.q.type(), n, v, c.grad_q, "d_q", false);
  backward(&grad_p, &grad_q);
  backward(&alone_p, nullptr);
  backward(nullptr, &alone_q);
  Memory space(DType::Double, td::cuda::kl_div_workspace(n, v), "workspace", false);
  td::cuda::kl_div_double_backward({rows, in.v_p.in(), in.v_q.in(), in.coefficient.data<double>(), stat.data<double>(),
                                    d_coefficient.data<double>(), d_p.out(), d_q.out()},
                                   n, space.data<double>(), nullptr);
  for (int64_t i = 0; i < n; ++i) {
    const Real weight = in.weight.get(i), g = in.coefficient.get(i);
    if (weight == 0) {
      ASSERT_EQ(loss.get(i), 0);
      for (int64_t j = 0; j < v; ++j)
        for (const Rows* x : {&grad_p, &grad_q, &alone_p, &alone_q, &d_p, &d_q}) ASSERT_EQ(x->get(i, j), 0);
      continue;
    }
    const Exact e = in.exact_row(i);
    const Real allowed = in.logits() ? accuracy * e.terms : 8 * ulp * e.terms;
    ASSERT_NO_FATAL_FAILURE(expect_close(loss.get(i), weight * e.kl, weight * allowed, real, "loss", i, -1));
    const Real of_p = std::fabs(g) * accuracy * e.scale_p, of_q = std::fabs(g) * accuracy * e.scale_q;
    ASSERT_NO_FATAL_FAILURE(expect_rows(grad_p, i, e.grad_p, g, of_p, "grad_p"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(grad_q, i, e.grad_q, g, of_q, "grad_q"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(alone_p, i, e.grad_p, g, of_p, "grad_p alone"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(alone_q, i, e.grad_q, g, of_q, "grad_q alone"));
    if (std::isnan(e.kl) || std::isinf(e.kl)) continue;
    const Real second = in.is_double() ? 1e-11L : 2e-6L;
    ASSERT_NO_FATAL_FAILURE(expect_rows(d_p, i, e.d_p, g, std::fabs(g) * second * largest(e.d_p), "d_p"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(d_q, i, e.d_q, g, std::fabs(g) * second * largest(e.d_q), "d_q"));
    // A sum of terms of both signs.
    Real sizes = 0;
    for (int64_t j = 0; j < v; ++j)
      sizes += std::fabs(in.v_p.get(i, j) * e.grad_p[static_cast<size_t>(j)]) +
               std::fabs(in.v_q.get(i, j) * e.grad_q[static_cast<size_t>(j)]);
    ASSERT_NO_FATAL_FAILURE(
        expect_close(d_coefficient.get(i), e.kl_dot, second * sizes, DType::Double, "d_coefficient", i, -1));
  }
}

void run_orders(const Case& c, const Problem& problem, bool all) {
  for (const simt::Schedule& t : simt::schedules) {
    if (!all && t.seed != 1) continue;
    simt::options = {};
    simt::options.order = t.order, simt::options.seed = t.seed, simt::options.only_buffers = true;
    SCOPED_TRACE("order " + std::to_string(static_cast<int>(t.order)) + ", seed " + std::to_string(t.seed));
    ASSERT_NO_FATAL_FAILURE(check_all(c, problem));
  }
}

class KlDivCuda : public testing::TestWithParam<Case> {};

TEST_P(KlDivCuda, Logits) {
  const Case& c = GetParam();
  for (const Types types : kTypes) {
    if (c.classes > 10000 && types.p != DType::Float) continue;
    SCOPED_TRACE("types " + std::to_string(static_cast<int>(types.p)) + " and " +
                 std::to_string(static_cast<int>(types.q)));
    ASSERT_NO_FATAL_FAILURE(run_orders(c, {c, types, td::kLogits, td::kLogits}, c.rows * c.classes < 8000));
  }
}

TEST_P(KlDivCuda, OtherSpaces) {
  const Case& c = GetParam();
  size_t k = 0;  // every pair of spaces, with types in turn; every type for one pair
  for (const int p_space : {td::kLogits, td::kLogProbs, td::kProbs})
    for (const int q_space : {td::kLogits, td::kLogProbs, td::kProbs})
      if (p_space != td::kLogits || q_space != td::kLogits) {
        if (c.classes > 10000 && p_space == q_space) continue;
        const Types types = kTypes[k++ % std::size(kTypes)];
        SCOPED_TRACE("spaces " + std::to_string(p_space) + " and " + std::to_string(q_space) + ", types " +
                     std::to_string(static_cast<int>(types.p)) + " and " + std::to_string(static_cast<int>(types.q)));
        ASSERT_NO_FATAL_FAILURE(run_orders(c, {c, types, p_space, q_space}, false));
      }
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
INSTANTIATE_TEST_SUITE_P(Cases, KlDivCuda, testing::ValuesIn(kCases), [](const auto& test) {
  std::string name = test.param.name;
  std::replace_if(
      name.begin(), name.end(), [](char x) { return !std::isalnum(x); }, '_');
  return name;
});

// The classes that centre and maxima are guessed from say nothing about the others: the maxima are raised, and where
// the centre is off, the near form needs its second visit.
TEST(KlDivCudaCentre, BadGuess) {
  // How far the others are above: a little more than what is summed as it is, and more than exp can say.
  const std::pair<int64_t, double> sizes[] = {{5000, 40}, {17000, 140}};
  for (const auto& [classes, above] : sizes)
    for (const double off : {3.0, 0.0}) {
      const Case c{.name = "bad guess", .rows = 2, .classes = classes, .kl = 1e-8};
      Problem problem(c, kTypes[0], td::kLogits, td::kLogits);
      for (int64_t i = 0; i < c.rows; ++i)
        for (int64_t j = 0; j < 2100; ++j) {
          problem.p.set(i, j, problem.p.get(i, j) - above);
          problem.q.set(i, j, problem.q.get(i, j) - above + off);
        }
      run_orders(c, problem, false);
    }
}

// One row of a matrix of more than 2^31 elements, in memory that is reserved and touched nowhere else.
TEST(KlDivCudaHuge, OffsetsBeyond32Bits) {
  const int64_t classes = int64_t{1} << 16, rows = (int64_t{1} << 31) / classes + 2, last = rows - 1;
  const size_t bytes = static_cast<size_t>(rows * classes) * sizeof(float);
  const auto reserve = [&] {
    return static_cast<float*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  };
  float *const p = reserve(), *const q = reserve(), *const grad = reserve();
  const auto at = [&](int64_t j) { return last * classes + j; };
  for (int64_t j = 0; j < classes; ++j) p[at(j)] = static_cast<float>(j % 11), q[at(j)] = static_cast<float>(j % 7);
  td::RowLayout layout;
  layout.dims = 1, layout.sizes[0] = rows, layout.strides[0] = classes;
  const td::RowPair in{{p, DType::Float, layout}, {q, DType::Float, layout}, td::kLogits, td::kLogits, classes, 1};
  std::vector<double> stat(static_cast<size_t>(rows * td::KlDivStat::kSize)), coefficient(static_cast<size_t>(rows), 1);
  std::vector<float> loss(static_cast<size_t>(rows));
  simt::options = {};
  simt::options.first_block = last;
  td::cuda::kl_div_forward({in, nullptr, loss.data(), false, stat.data()}, rows, nullptr, nullptr);
  td::cuda::kl_div_backward({in, coefficient.data(), stat.data(), {}, {grad, DType::Float, layout}}, rows, nullptr,
                            nullptr);
  std::vector<Real> t, s;
  for (int64_t j = 0; j < classes; ++j) t.push_back(p[at(j)]), s.push_back(q[at(j)]);
  const Exact e = exact(t, s, t, s, td::kLogits, td::kLogits, 1);
  EXPECT_NEAR(loss.back(), static_cast<double>(e.kl), 2e-6 * static_cast<double>(e.kl));
  for (int64_t j = 0; j < classes; ++j)
    ASSERT_NEAR(grad[at(j)], static_cast<double>(e.grad_q[static_cast<size_t>(j)]),
                2e-6 * static_cast<double>(e.scale_q));
  for (float* x : {p, q, grad}) munmap(x, bytes);
}

// A weight that is none makes its row NaN, and no other.
TEST(KlDivCudaWeight, BadWeightsAreNan) {
  const Case c{.name = "weights", .rows = 5, .classes = 30};
  Problem problem(c, kTypes[0], td::kLogits, td::kLogits);
  const double bad[] = {1, -1, std::nan(""), std::numeric_limits<double>::infinity(), 0};
  for (int64_t i = 0; i < c.rows; ++i) problem.weight.set(i, bad[i]);
  simt::options = {};
  std::vector<float> loss(5);
  std::vector<double> stat(5 * td::KlDivStat::kSize);
  td::cuda::kl_div_forward({problem.rows(), problem.weight.data<double>(), loss.data(), false, stat.data()}, c.rows,
                           nullptr, nullptr);
  EXPECT_GT(loss[0], 0);
  for (const size_t i : {1, 2, 3}) EXPECT_TRUE(std::isnan(loss[i]));
  EXPECT_EQ(loss[4], 0);
}

// Twice the same bits, in whatever order the threads and blocks run.
TEST(KlDivCudaDeterminism, SameBitsInAnyOrder) {
  for (const int64_t classes : {700, 3000, 50000}) {
    const Case c{.name = "bits", .rows = 3, .classes = classes, .kl = 0.1};
    const Problem problem(c, kTypes[0], td::kLogits, td::kLogits);
    std::vector<std::vector<double>> stats;
    for (const simt::Schedule& t : simt::schedules) {
      simt::options = {};
      simt::options.order = t.order, simt::options.seed = t.seed;
      std::vector<float> loss(3);
      std::vector<double> stat(3 * td::KlDivStat::kSize),
          workspace(static_cast<size_t>(td::cuda::kl_div_workspace(c.rows, classes)));
      td::cuda::kl_div_forward({problem.rows(), nullptr, loss.data(), false, stat.data()}, c.rows, workspace.data(),
                               nullptr);
      stats.push_back(stat);
    }
    for (const auto& stat : stats) EXPECT_EQ(stat, stats[0]);
  }
}

}  // namespace
