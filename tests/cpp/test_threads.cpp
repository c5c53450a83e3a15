// Calls from several threads at once, and results that do not depend on the number of threads of one call.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/autograd.h>
#include <torch_divergence/functional.h>

#include <cstring>
#include <thread>
#include <utility>
#include <vector>

namespace td = torch_divergence;

namespace {

struct Result {
  at::Tensor loss, student_grad, teacher_grad;
};

Result forward_and_backward(const at::Tensor& student, const at::Tensor& teacher, const td::KLDivOptions& options) {
  const at::Tensor s = student.detach().clone().requires_grad_(), t = teacher.detach().clone().requires_grad_();
  const at::Tensor loss = td::kl_div(s, t, options);
  loss.sum().backward();
  return {loss.detach(), s.grad(), t.grad()};
}

void expect_same_bits(const at::Tensor& a, const at::Tensor& b) {
  ASSERT_EQ(a.sizes(), b.sizes());
  EXPECT_EQ(std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()), 0);
}

void expect_same_bits(const Result& a, const Result& b) {
  expect_same_bits(a.loss, b.loss);
  expect_same_bits(a.student_grad, b.student_grad);
  expect_same_bits(a.teacher_grad, b.teacher_grad);
}

// Restores the number of threads that the other tests of this process run with.
class ThreadCount {
 public:
  explicit ThreadCount(int n) : before_(at::get_num_threads()) { at::set_num_threads(n); }
  ~ThreadCount() { at::set_num_threads(before_); }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int before_;
};

TEST(Threads, ConcurrentCallsGiveTheBitsOfSequentialOnes) {
  at::manual_seed(0);
  constexpr int kThreads = 4, kRounds = 8;
  const at::Tensor teacher = at::randn({32, 1000});  // shared by all threads
  std::vector<at::Tensor> students;
  std::vector<Result> expected;
  for (int i = 0; i < kThreads; ++i) {
    students.push_back(at::randn({32, 1000}));
    expected.push_back(forward_and_backward(students.back(), teacher, {}));
  }
  std::vector<std::vector<Result>> results(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < kRounds; ++round) {
        results[i].push_back(forward_and_backward(students[i], teacher, {}));
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (int i = 0; i < kThreads; ++i) {
    ASSERT_EQ(results[i].size(), static_cast<size_t>(kRounds));
    for (const Result& result : results[i]) {
      expect_same_bits(result, expected[i]);
    }
  }
}

TEST(Threads, BackwardsOnOneLeafFromSeveralThreadsAddUp) {
  at::manual_seed(0);
  constexpr int kThreads = 4;
  const at::Tensor teacher = at::randn({16, 100}, at::kDouble);
  const at::Tensor student = at::randn({16, 100}, at::kDouble).requires_grad_();
  const at::Tensor once = torch::autograd::grad({td::kl_div(student, teacher)}, {student})[0];
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] { td::kl_div(student, teacher).backward(); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_TRUE(at::allclose(student.grad(), kThreads * once, 1e-14, 1e-16));
}

TEST(Threads, LargeOutputsAllocatedAndFreedConcurrentlyAreRight) {
  // 3 MB gradients: over the size from which storage comes from the library's own allocator, which keeps a block.
  at::manual_seed(0);
  constexpr int kThreads = 3;
  const at::Tensor teacher = at::randn({24, 32768}), student = at::randn({24, 32768});
  const Result expected = forward_and_backward(student, teacher, {});
  std::vector<std::vector<Result>> results(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 4; ++round) {
        const Result result = forward_and_backward(student, teacher, {});
        if (i == 0) {
          td::empty_cache();
        }
        results[i].push_back(result);
        if (round > 0) {
          results[i].erase(results[i].begin());  // gives its block back while others run
        }
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const auto& of_thread : results) {
    ASSERT_EQ(of_thread.size(), 1u);
    expect_same_bits(of_thread.front(), expected);
  }
}

TEST(Threads, NumberOfThreadsDoesNotChangeTheBitsOfParallelRows) {
  at::manual_seed(0);
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const at::Tensor student = at::randn({64, 3001}, dtype), teacher = at::randn({64, 3001}, dtype);
    for (const td::Reduction reduction : {td::Reduction::None, td::Reduction::Mean}) {
      const auto options = td::KLDivOptions().reduction(reduction);
      Result one;
      {
        const ThreadCount count(1);
        one = forward_and_backward(student, teacher, options);
      }
      for (const int n : {2, 3, 4}) {
        SCOPED_TRACE(n);
        const ThreadCount count(n);
        expect_same_bits(forward_and_backward(student, teacher, options), one);
      }
    }
  }
}

TEST(Threads, RunsOfTheSameNumberOfThreadsGiveTheSameBitsForFewLongRows) {
  at::manual_seed(0);
  const at::Tensor student = at::randn({1, 200001}), teacher = at::randn({1, 200001});
  for (const int n : {1, 2, 4}) {
    SCOPED_TRACE(n);
    const ThreadCount count(n);
    const Result first = forward_and_backward(student, teacher, {});
    for (int run = 0; run < 5; ++run) {
      expect_same_bits(forward_and_backward(student, teacher, {}), first);
    }
  }
}

}  // namespace
