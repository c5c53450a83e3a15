// The row kernels themselves, on raw pointers and row ranges: any split into ranges gives the bits of one call, from
// any thread; a range writes its own rows only; a row of weight 0 is not read.
#include <gtest/gtest.h>
#include <torch_divergence/functional.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "kl_div/kl_div.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace td = torch_divergence;

namespace {

// The instruction set of the library's own choice.
#if defined(__x86_64__)
#define KERNEL(name)                                           \
  (td::cpu_capability() == "AVX512" ? TD_BEST_CPU_KERNEL(name) \
   : td::cpu_capability() == "AVX2" ? &td::cpu::AVX2::name     \
                                    : &td::cpu::DEFAULT::name)
#else
#define KERNEL(name) (&td::cpu::DEFAULT::name)
#endif

enum class Kernel { Forward, Backward, ValueAndGrad, DoubleBackward };
constexpr Kernel kKernels[] = {Kernel::Forward, Kernel::Backward, Kernel::ValueAndGrad, Kernel::DoubleBackward};

struct Spaces {
  int p, q;
};
// Both families of kernels: both sides in logits, and anything else.
constexpr Spaces kSpaces[] = {{td::kLogits, td::kLogits}, {td::kProbs, td::kLogProbs}, {td::kProbs, td::kLogits}};

template <class T>
constexpr td::DType kType = std::is_same_v<T, double> ? td::DType::Double : td::DType::Float;

td::RowLayout contiguous(int64_t rows, int64_t classes) {
  td::RowLayout layout;
  layout.dims = 1;
  layout.sizes[0] = rows;
  layout.strides[0] = classes;
  return layout;
}

// Inputs of a problem, and what every kernel but the forward one needs from before.
template <class T>
struct Problem {
  int64_t rows, classes;
  Spaces spaces;
  std::vector<T> p, q, v_p, v_q;
  std::vector<double> weight, coefficient, stat;

  Problem(int64_t rows_, int64_t classes_, Spaces spaces_) : rows(rows_), classes(classes_), spaces(spaces_) {
    std::mt19937_64 random(0);
    std::normal_distribution<double> normal;
    const size_t n = static_cast<size_t>(rows * classes);
    for (std::vector<T>* x : {&p, &q, &v_p, &v_q}) {
      for (size_t i = 0; i < n; ++i) {
        x->push_back(static_cast<T>(normal(random)));
      }
    }
    // Half of the rows near each other, where the centred form runs.
    for (size_t i = 0; i < n / 2; ++i) {
      q[i] = p[i] + static_cast<T>(0.01) * q[i];
    }
    for (int64_t i = 0; i < rows; ++i) {
      weight.push_back(i % 5 == 3 ? 0.0 : std::abs(normal(random)));
      coefficient.push_back(i % 5 == 3 ? 0.0 : normal(random));
    }
    normalise(p, spaces.p);
    normalise(q, spaces.q);
    stat.resize(static_cast<size_t>(rows * td::KlDivStat::kSize));
    std::vector<double> loss(static_cast<size_t>(rows));
    KERNEL(kl_div_forward)({rows_in(), nullptr, loss.data(), true, stat.data()}, 0, rows, nullptr);
  }

  td::RowPair rows_in() const {
    td::RowPair in;
    in.p = read(p);
    in.q = read(q);
    in.p_space = spaces.p;
    in.q_space = spaces.q;
    in.classes = classes;
    in.temperature = spaces.p == td::kLogits || spaces.q == td::kLogits ? 1.5 : 1.0;
    return in;
  }
  td::RowsIn read(const std::vector<T>& x) const { return {x.data(), kType<T>, contiguous(rows, classes)}; }
  td::RowsOut write(std::vector<T>& x) const { return {x.data(), kType<T>, contiguous(rows, classes)}; }

 private:
  void normalise(std::vector<T>& x, int space) const {
    if (space == td::kLogits) {
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      T* row = x.data() + i * classes;
      double sum = 0;
      for (int64_t j = 0; j < classes; ++j) {
        sum += std::exp(static_cast<double>(row[j]));
      }
      for (int64_t j = 0; j < classes; ++j) {
        row[j] = static_cast<T>(space == td::kProbs ? std::exp(static_cast<double>(row[j])) / sum
                                                    : static_cast<double>(row[j]) - std::log(sum));
      }
    }
  }
};

constexpr double kSentinel = -12345.0;

// Outputs of any kernel; what a kernel does not write keeps the sentinel.
template <class T>
struct Outputs {
  std::vector<double> loss, stat, d_coefficient;
  std::vector<T> grad_p, grad_q;

  explicit Outputs(const Problem<T>& problem)
      : loss(static_cast<size_t>(problem.rows), kSentinel),
        stat(static_cast<size_t>(problem.rows * td::KlDivStat::kSize), kSentinel),
        d_coefficient(static_cast<size_t>(problem.rows), kSentinel),
        grad_p(problem.p.size(), static_cast<T>(kSentinel)),
        grad_q(problem.q.size(), static_cast<T>(kSentinel)) {}
};

template <class T>
void run(Kernel kernel, const Problem<T>& in, Outputs<T>& out, int64_t begin, int64_t end, td::ForEach columns) {
  switch (kernel) {
    case Kernel::Forward:
      KERNEL(kl_div_forward)
      ({in.rows_in(), in.weight.data(), out.loss.data(), true, out.stat.data()}, begin, end, columns);
      return;
    case Kernel::Backward:
      KERNEL(kl_div_backward)
      ({in.rows_in(), in.coefficient.data(), in.stat.data(), in.write(out.grad_p), in.write(out.grad_q)}, begin, end,
       columns);
      return;
    case Kernel::ValueAndGrad:
      KERNEL(kl_div_value_and_grad)
      ({in.rows_in(), in.weight.data(), 0.25, out.stat.data(), true, in.write(out.grad_q)}, begin, end, columns);
      KERNEL(kl_div_value_and_grad)
      ({in.rows_in(), in.weight.data(), 0.25, out.stat.data(), false, in.write(out.grad_p)}, begin, end, columns);
      return;
    case Kernel::DoubleBackward:
      KERNEL(kl_div_double_backward)
      ({in.rows_in(), in.read(in.v_p), in.read(in.v_q), in.coefficient.data(), in.stat.data(), out.d_coefficient.data(),
        in.write(out.grad_p), in.write(out.grad_q)},
       begin, end, columns);
      return;
  }
}

template <class V>
void expect_same_bits(const std::vector<V>& a, const std::vector<V>& b, const char* what) {
  ASSERT_EQ(a.size(), b.size());
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(V)), 0) << what;
}

template <class T>
void expect_same_bits(const Outputs<T>& a, const Outputs<T>& b) {
  expect_same_bits(a.loss, b.loss, "loss");
  expect_same_bits(a.stat, b.stat, "stat");
  expect_same_bits(a.d_coefficient, b.d_coefficient, "d_coefficient");
  expect_same_bits(a.grad_p, b.grad_p, "grad_p");
  expect_same_bits(a.grad_q, b.grad_q, "grad_q");
}

// Norm-wise over each row of `n` entries, as all accuracies here are.
template <class V>
void expect_near_rows(const std::vector<V>& a, const std::vector<V>& b, int64_t n, double tolerance, const char* what) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t row = 0; row < a.size(); row += static_cast<size_t>(n)) {
    double error = 0, largest = 0;
    for (size_t i = row; i < row + static_cast<size_t>(n); ++i) {
      error = std::max(error, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
      largest = std::max(largest, std::abs(static_cast<double>(b[i])));
    }
    EXPECT_LE(error, tolerance * largest) << what << ", row " << row / static_cast<size_t>(n);
  }
}

// Loops over columns as another caller might: on a thread of its own for each part, or from the last part to the first.
void for_each_thread(int64_t count, void* context, void (*body)(void*, int64_t)) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) {
    threads.emplace_back(body, context, i);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}
void for_each_backwards(int64_t count, void* context, void (*body)(void*, int64_t)) {
  for (int64_t i = count; i-- > 0;) {
    body(context, i);
  }
}

std::string name_of(Kernel kernel) {
  return kernel == Kernel::Forward        ? "forward"
         : kernel == Kernel::Backward     ? "backward"
         : kernel == Kernel::ValueAndGrad ? "value_and_grad"
                                          : "double_backward";
}

template <class T>
class RowKernels : public testing::Test {
 protected:
  // Calls test(problem, kernel) for both families and all kernels.
  template <class Test>
  static void for_all(int64_t rows, int64_t classes, const Test& test) {
    for (const Spaces spaces : kSpaces) {
      const Problem<T> problem(rows, classes, spaces);
      for (const Kernel kernel : kKernels) {
        SCOPED_TRACE(name_of(kernel) + ", spaces " + std::to_string(spaces.p) + " and " + std::to_string(spaces.q));
        test(problem, kernel);
      }
    }
  }
};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(RowKernels, Types, );

TYPED_TEST(RowKernels, RangesFromThreadsGiveTheBitsOfOneCall) {
  this->for_all(61, 1003, [](const Problem<TypeParam>& problem, Kernel kernel) {
    Outputs<TypeParam> whole(problem), split(problem);
    run(kernel, problem, whole, 0, problem.rows, nullptr);
    std::vector<std::thread> threads;
    for (const auto& [begin, end] : {std::pair{0, 1}, {1, 20}, {20, 47}, {47, 61}}) {
      threads.emplace_back([&, begin = begin, end = end] { run(kernel, problem, split, begin, end, nullptr); });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    expect_same_bits(split, whole);
  });
}

TYPED_TEST(RowKernels, RangeWritesItsOwnRowsOnly) {
  this->for_all(9, 130, [](const Problem<TypeParam>& problem, Kernel kernel) {
    Outputs<TypeParam> whole(problem), part(problem), expected(problem);
    run(kernel, problem, whole, 0, problem.rows, nullptr);
    run(kernel, problem, part, 4, 7, nullptr);
    const auto keep = [](auto& to, const auto& from, size_t n) {
      std::copy(from.begin() + static_cast<std::ptrdiff_t>(4 * n), from.begin() + static_cast<std::ptrdiff_t>(7 * n),
                to.begin() + static_cast<std::ptrdiff_t>(4 * n));
    };
    keep(expected.loss, whole.loss, 1);
    keep(expected.stat, whole.stat, td::KlDivStat::kSize);
    keep(expected.d_coefficient, whole.d_coefficient, 1);
    keep(expected.grad_p, whole.grad_p, 130);
    keep(expected.grad_q, whole.grad_q, 130);
    expect_same_bits(part, expected);
  });
}

TYPED_TEST(RowKernels, PartsOfALongRowMayBeVisitedInAnyOrderAndByAnyThread) {
  this->for_all(2, 100003, [](const Problem<TypeParam>& problem, Kernel kernel) {
    Outputs<TypeParam> threads(problem), backwards(problem), serial(problem);
    run(kernel, problem, threads, 0, problem.rows, &for_each_thread);
    run(kernel, problem, backwards, 0, problem.rows, &for_each_backwards);
    run(kernel, problem, serial, 0, problem.rows, nullptr);
    expect_same_bits(threads, backwards);
    // Serial sums have another order.
    const double tolerance = std::is_same_v<TypeParam, double> ? 1e-11 : 2e-6;
    expect_near_rows(threads.loss, serial.loss, 1, tolerance, "loss");
    expect_near_rows(threads.d_coefficient, serial.d_coefficient, 1, 100 * tolerance, "d_coefficient");
    expect_near_rows(threads.grad_p, serial.grad_p, problem.classes, tolerance, "grad_p");
    expect_near_rows(threads.grad_q, serial.grad_q, problem.classes, tolerance, "grad_q");
  });
}

TYPED_TEST(RowKernels, GradientMayOverwriteItsOwnSide) {
  for (const Spaces spaces : kSpaces) {
    const Problem<TypeParam> problem(7, 3001, spaces);
    for (const bool wrt_q : {false, true}) {
      Outputs<TypeParam> fresh(problem);
      std::vector<TypeParam>& expected = wrt_q ? fresh.grad_q : fresh.grad_p;
      KERNEL(kl_div_value_and_grad)
      ({problem.rows_in(), nullptr, 0.5, fresh.stat.data(), wrt_q, problem.write(expected)}, 0, 7, nullptr);

      Problem<TypeParam> overwritten = problem;
      Outputs<TypeParam> in_place(problem);
      std::vector<TypeParam>& side = wrt_q ? overwritten.q : overwritten.p;
      KERNEL(kl_div_value_and_grad)
      ({overwritten.rows_in(), nullptr, 0.5, in_place.stat.data(), wrt_q, problem.write(side)}, 0, 7, nullptr);
      expect_same_bits(side, expected, wrt_q ? "q" : "p");
      expect_same_bits(in_place.stat, fresh.stat, "stat");
    }
  }
}

#if defined(__linux__)
TYPED_TEST(RowKernels, RowOfWeightZeroIsNotRead) {
  // Three rows of one page each, the middle one unreadable: reading it ends the process.
  const int64_t page = sysconf(_SC_PAGESIZE), classes = page / static_cast<int64_t>(sizeof(TypeParam));
  for (const Spaces spaces : kSpaces) {
    Problem<TypeParam> problem(3, classes, spaces);
    problem.weight = {1.0, 0.0, 2.0};
    problem.coefficient = {1.0, 0.0, 2.0};
    void* memory[2];
    for (int k = 0; k < 2; ++k) {
      memory[k] =
          mmap(nullptr, static_cast<size_t>(3 * page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      ASSERT_NE(memory[k], MAP_FAILED);
      std::memcpy(memory[k], (k == 0 ? problem.p : problem.q).data(), static_cast<size_t>(3 * page));
      ASSERT_EQ(mprotect(static_cast<char*>(memory[k]) + page, static_cast<size_t>(page), PROT_NONE), 0);
    }
    td::RowPair rows = problem.rows_in();
    rows.p.data = memory[0];
    rows.q.data = memory[1];
    Outputs<TypeParam> forward(problem), backward(problem), both(problem);
    KERNEL(kl_div_forward)
    ({rows, problem.weight.data(), forward.loss.data(), true, forward.stat.data()}, 0, 3, nullptr);
    KERNEL(kl_div_backward)
    ({rows, problem.coefficient.data(), forward.stat.data(), problem.write(backward.grad_p),
      problem.write(backward.grad_q)},
     0, 3, nullptr);
    KERNEL(kl_div_value_and_grad)
    ({rows, problem.weight.data(), 1.0, both.stat.data(), true, problem.write(both.grad_q)}, 0, 3, nullptr);
    EXPECT_GT(forward.loss[0], 0.0);
    EXPECT_EQ(forward.loss[1], 0.0);
    EXPECT_GT(forward.loss[2], 0.0);
    for (int64_t j = classes; j < 2 * classes; ++j) {
      const size_t i = static_cast<size_t>(j);
      ASSERT_EQ(backward.grad_p[i], 0);
      ASSERT_EQ(backward.grad_q[i], 0);
      ASSERT_EQ(both.grad_q[i], 0);
    }
    for (void* block : memory) {
      munmap(block, static_cast<size_t>(3 * page));
    }
  }
}
#endif

}  // namespace
