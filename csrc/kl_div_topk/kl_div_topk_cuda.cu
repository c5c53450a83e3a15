// CUDA kernels of the top-k KL divergence; formulas in kl_div_topk.h, teams and rows in core/cuda_rows.cuh.
//
// What has the size of a row is read once, in float for float and the half types (again in double where the loss is so
// small that sums in float are not enough); what has the size of k is in double, and every block that has a part of the
// row does it for itself. Nothing of size k is kept: entries are made again from memory where they are needed.
#include <c10/macros/Macros.h>

#include "core/cuda_launch.cuh"
#include "core/cuda_rows.cuh"
#include "core/cuda_sides.cuh"
#include "kl_div_topk/kl_div_topk.h"

namespace torch_divergence::cuda {
namespace {

// log sum e^x = max + log1p(others), so that a sum of nearly 1 has the digits of what it lacks.
struct SmallLse {
  double max = -kInf<double>, others = 0;

  // x(e): the e-th exponent, -inf for none.
  template <class X>
  __device__ static SmallLse of(const Team& team, int64_t n, const X& x) {
    double top[1] = {-kInf<double>};
    for (int64_t e = team.rank; e < n; e += team.size) top[0] = x(e) > top[0] ? x(e) : top[0];
    team.max(top);
    double sums[2] = {};  // of what is below the maximum, and how often that is taken
    for (int64_t e = team.rank; e < n; e += team.size) {
      const double v = x(e);
      if (v == -kInf<double>) continue;
      if (v == top[0]) {
        ++sums[1];
      } else {
        sums[0] += std::exp(v - top[0]);
      }
    }
    team.sum(sums);
    return {top[0], sums[1] > 1 ? sums[0] + (sums[1] - 1) : sums[0]};
  }
  __device__ double value() const { return max + std::log1p(others); }
};

__device__ void assert_valid(bool valid) {
  CUDA_KERNEL_ASSERT(valid && "kl_div_topk: indices out of range or twice in a row, or log_probs of a mass above 1");
}

// One class of K, or the tail.
struct Term {
  bool there;  // false: padding
  int64_t index;
  double given_q, log_p, log_q, p, q, l;
};

// The classes of K and the tail of one row, as a team sees them. T is the type of the input.
template <class T>
class TopkRow {
 public:
  const TopkRows& rows;
  Team team;
  RowPointer<const char> x;
  Term tail{};
  bool has_tail = false;
  bool valid;  // false: a class that is none or (`sorted`: ascending, padding last) there twice, or a mass above 1

  __device__ TopkRow(const TopkRows& rows_, const Team& team_, int64_t row, bool sorted)
      : rows(rows_),
        team(team_),
        x(rows_.input, row),
        index_(rows_.indices + row * rows_.k),
        log_probs_(rows_.log_probs + row * rows_.k) {
    set_p(row, sorted);
  }

  __device__ const int64_t* indices() const { return index_; }

  // Q from the row's statistics.
  __device__ void set_q(const TopkStat& stat) {
    shift_ = stat.shift, log_sum_ = stat.log_sum;
    if (rows.tail == kTailRenormBoth) {
      shift_ = log_sum_ = 0;
      if (rows.space == kLogits) {
        double top[1] = {-kInf<double>};
        for_given([&](double q) { top[0] = q > top[0] ? q : top[0]; });
        team.max(top);
        shift_ = top[0];
      }
      log_sum_ = SmallLse::of(team, rows.k, [&](int64_t e) {
                   return log_probs_[e] == -kInf<double> ? -kInf<double> : raw_log_q(given(e));
                 }).value();
    }
    tail.log_q = rows.reads_all() ? stat.log_tail(rows.temperature) : -kInf<double>;
    tail.q = tail.given_q = std::exp(tail.log_q);
    // Nothing is outside: what is missing of the teacher's mass is rounding.
    const bool no_tail = rows.derived_tail() && tail.log_q == -kInf<double> && tail.p <= tolerance_;
    has_tail = rows.tail == kTailBucket && !no_tail;
    if (!has_tail) tail.p = 0;
    tail.l = !has_tail || tail.log_p == tail.log_q ? 0 : tail.log_p - tail.log_q;
  }

  // The statistics of Q from the sum over the classes outside K.
  __device__ TopkStat finish(const Lse& outside) const {
    TopkStat stat;
    stat.tail_max = std::isinf(outside.max) ? 0 : outside.max, stat.tail_log_sum = std::log(outside.sum);
    if (rows.space != kLogits) return stat;
    double top[1] = {outside.max};
    for_given([&](double q) { top[0] = q > top[0] ? q : top[0]; });
    team.max(top);
    stat.shift = std::isinf(top[0]) ? 0 : top[0];
    const double inv_t = 1 / rows.temperature;
    double sum[1] = {0};
    for_given([&](double q) { sum[0] += std::exp((q - stat.shift) * inv_t); });
    team.sum(sum);
    // Of no classes the maximum says nothing.
    if (outside.sum != 0) sum[0] += outside.sum * std::exp((stat.tail_max - stat.shift) * inv_t);
    stat.log_sum = std::log(sum[0]);
    return stat;
  }

  // f(e, term) for this thread's classes of K.
  template <class F>
  __device__ void for_entries(const F& f) const {
    for (int64_t e = team.rank; e < rows.k; e += team.size) {
      const Term term = entry(e);
      if (term.there) f(e, term);
    }
  }
  // The same and, for one thread, the tail where there is one, as number k.
  template <class F>
  __device__ void for_terms(const F& f) const {
    for_entries(f);
    if (team.rank == 0 && has_tail) f(rows.k, tail);
  }

  // This thread's share of the loss.
  __device__ double loss_of(const Term& term) const {
    // Do P and Q both sum to 1?
    const bool unit =
        rows.tail == kTailRenormBoth || (rows.derived_tail() && rows.space == kLogits && has_tail && tail.p > 0);
    const double a = rows.reverse ? term.q : term.p, b = rows.reverse ? term.p : term.q,
                 ratio = rows.reverse ? -term.l : term.l;
    if (!unit) return topk_term(a, ratio);
    return std::fabs(ratio) < 0.5 ? a * phi_small(ratio) : topk_term(a, ratio) + (b - a);
  }
  __device__ double loss() const {
    double sum[1] = {0};
    for_terms([&](int64_t, const Term& term) { sum[0] += loss_of(term); });
    team.sum(sum);
    // Nothing but padding has no distribution to renormalise.
    return empty_ && rows.renormalises_p() ? std::numeric_limits<double>::quiet_NaN() : sum[0];
  }

 private:
  __device__ double given(int64_t e) const { return load_entry<T>(x, index_[e]); }
  // f(q as it was given) for this thread's classes of K.
  template <class F>
  __device__ void for_given(const F& f) const {
    for (int64_t e = team.rank; e < rows.k; e += team.size)
      if (log_probs_[e] != -kInf<double>) f(given(e));
  }
  __device__ double raw_log_q(double q) const {
    if (rows.space == kLogits) return (q - shift_) / rows.temperature;
    return rows.space == kProbs ? std::log(q) : q;
  }
  __device__ Term entry(int64_t e) const {
    Term term{};
    const double a = log_probs_[e];
    term.there = a != -kInf<double>;
    if (!term.there) return term;
    term.index = index_[e];
    term.given_q = given(e);
    term.log_p = rows.renormalises_p() ? a - lse_ : a, term.p = std::exp(a - max_) * factor_;
    term.log_q = raw_log_q(term.given_q) - log_sum_, term.q = std::exp(term.log_q);
    term.l = term.log_p == term.log_q ? 0 : term.log_p - term.log_q;
    return term;
  }

  __device__ void set_p(int64_t row, bool sorted) {
    double bad[1] = {0};
    for (int64_t e = team.rank; e < rows.k; e += team.size) {
      const int64_t index = index_[e];
      const bool wrong = index < 0 || index >= rows.classes || (sorted && e > 0 && index == index_[e - 1]);
      if (log_probs_[e] != -kInf<double> && wrong) ++bad[0];
    }
    team.sum(bad);
    const SmallLse sum = SmallLse::of(team, rows.k, [&](int64_t e) { return log_probs_[e]; });
    max_ = sum.max, lse_ = sum.value();
    empty_ = max_ == -kInf<double>;
    const double scale = std::exp(max_);
    tolerance_ = kMassTolerance;
    if (rows.rounding > 0 && !empty_) {
      double spread[1] = {0};
      for (int64_t e = team.rank; e < rows.k; e += team.size)
        if (log_probs_[e] != -kInf<double>) spread[0] += std::exp(log_probs_[e] - max_) * std::fabs(log_probs_[e]);
      team.sum(spread);
      tolerance_ += rows.rounding * scale * spread[0];
    }
    valid = bad[0] == 0 && !(std::expm1(lse_) > tolerance_);
    factor_ = rows.renormalises_p() ? 1 / (1 + sum.others) : scale;
    tail.log_p = -kInf<double>;
    if (rows.tail != kTailBucket) return;
    if (rows.tail_log_prob != nullptr) {
      tail.log_p = rows.tail_log_prob[row];
      tail.p = std::exp(tail.log_p);
    } else if (!(lse_ >= 0)) {  // the two forms of log(1 - mass): by what is exact of mass and of 1 - mass
      tail.p = -std::expm1(lse_);
      tail.log_p = lse_ < -0.7 ? std::log1p(-std::exp(lse_)) : std::log(tail.p);
    }
  }

  const int64_t* index_;
  const double* log_probs_;
  double max_, lse_, factor_, tolerance_;
  bool empty_;
  double shift_ = 0, log_sum_ = 0;
};

// Walks the classes of K, which are ascending, beside a thread's pieces.
class ClassesOfK {
 public:
  __device__ ClassesOfK(const int64_t* indices, int64_t k) : indices_(indices), left_(k + 1) {
    --indices_;
    advance();
  }
  // v = fill for the classes of K.
  template <class T, class A>
  __device__ void mask(const Piece<T>& piece, A fill, A (&v)[kPiece<T>]) {
    constexpr int R = kRun<T>;
#pragma unroll
    for (int r = 0; r < kPiece<T>; r += R) {
      const int64_t at = piece.at(r);
      while (next_ < at) advance();
      for (; next_ < at + R; advance()) {
#pragma unroll
        for (int i = 0; i < R; ++i)
          if (next_ == at + i) v[r + i] = fill;
      }
    }
  }

 private:
  __device__ void advance() { next_ = --left_ > 0 ? __ldg(++indices_) : std::numeric_limits<int64_t>::max(); }

  const int64_t* indices_;
  int64_t left_, next_;
};

// A thread's share of log sum e^(x/T) outside K, in A; of probabilities their sum, as that of a maximum of 0.
template <class T, class A>
__device__ Lse outside(const TopkRow<T>& row, const RowTask& task, const Pieces& pieces) {
  constexpr int K = kPiece<T>;
  ClassesOfK in_k(row.indices(), row.rows.k);
  Sum<A> sum;
  if (row.rows.space == kProbs) {
    task.template for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      A v[K], of_piece = 0;
      load_piece(row.x, pieces, piece, A(0), v);
      in_k.mask(piece, A(0), v);
#pragma unroll
      for (int i = 0; i < K; ++i) of_piece += v[i] < 0 ? std::numeric_limits<A>::quiet_NaN() : v[i];
      sum.add(of_piece);
    });
    return {0, sum.value()};
  }
  const Exp<A> exp(1 / row.rows.temperature);
  A max = -kInf<A>;
  task.template for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    A v[K], of_piece = 0;
    load_piece(row.x, pieces, piece, -kInf<A>, v);
    in_k.mask(piece, -kInf<A>, v);
    A top = max;
#pragma unroll
    for (int i = 0; i < K; ++i) top = v[i] > top ? v[i] : top;
    if (top > max) sum *= exp(max - top), max = top;
#pragma unroll
    for (int i = 0; i < K; ++i) of_piece += v[i] == -kInf<A> ? 0 : exp(v[i] - max);
    sum.add(of_piece);
  });
  return {static_cast<double>(max), sum.value()};
}

// An error of e in the logarithms of Q is a relative one of e sqrt(2/L) in the loss and in its gradient. Below this L,
// sums in float are not enough.
constexpr double kSumInDouble = 1e-2;
constexpr int kReductions = 2;

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    forward(const TopkForward k, const RowGrid grid, double* workspace, int launch) {
  using A = Arithmetic<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const double weight = weight_of(k.weight, task.row);
  TopkStat stat;
  double loss = 0;
  if (weight != 0) {
    TopkRow<T> row(k.rows, task.team, task.row, true);
    assert_valid(row.valid);
    const Pieces pieces(k.rows.classes, row.x);
    const double inv_t = 1 / k.rows.temperature;
    const auto merge = [&](const Lse& part) { return merged(task.team, part, inv_t); };
    Lse sum;
    if (k.rows.reads_all()) {
      if (!task.reduce(
              0, sum, [&] { return outside<T, A>(row, task, pieces); }, merge))
        return;
      stat = row.finish(sum);
    }
    row.set_q(stat);
    loss = row.loss();
    if constexpr (!std::is_same_v<A, double>) {
      if (k.rows.reads_all() && std::fabs(loss) < kSumInDouble) {
        if (!task.reduce(
                1, sum, [&] { return outside<T, double>(row, task, pieces); }, merge))
          return;
        stat = row.finish(sum);
        row.set_q(stat);
        loss = row.loss();
      }
    }
    loss *= weight;
  }
  if (!task.writes()) return;
  stat.store(k.stat + TopkStat::kSize * task.row);
  store_loss(k, task.row, loss);
}

// What a gradient takes from the whole row.
struct Totals {
  double p, q;        // sums of the slopes where the side is normalised, else 0
  double tail_ratio;  // G_t/P_t where the tail is what the log_probs leave
  bool p_is_0, q_is_0;

  template <class T>
  __device__ explicit Totals(const TopkRow<T>& row) {
    const TopkRows& rows = row.rows;
    double sums[3] = {};
    row.for_terms([&](int64_t, const Term& term) {
      const TopkSlope s = topk_slope(rows.reverse, term.p, term.q, term.l);
      sums[0] += s.p, sums[1] += s.q, sums[2] += row.loss_of(term);
    });
    row.team.sum(sums);
    const bool infinite = std::isinf(sums[2]);
    p = rows.renormalises_p() ? sums[0] : 0, q = rows.normalises_q() ? sums[1] : 0;
    p_is_0 = infinite && !rows.reverse && (rows.renormalises_p() || rows.derived_tail());
    q_is_0 = infinite && rows.reverse && rows.normalises_q();
    tail_ratio = rows.derived_tail() && row.has_tail && row.tail.p > 0
                     ? topk_slope(rows.reverse, row.tail.p, row.tail.q, row.tail.l).p / row.tail.p
                     : 0;
  }
  // gamma, and what a log-probability gets, of a class of K
  template <class T>
  __device__ TopkSlope of_entry(const TopkRow<T>& row, const Term& term) const {
    const TopkSlope s = topk_slope(row.rows.reverse, term.p, term.q, term.l);
    return {p_is_0 ? 0 : s.p - term.p * (p + tail_ratio), q_is_0 ? 0 : s.q - term.q * q};
  }
  // and of the tail
  template <class T>
  __device__ TopkSlope of_tail(const TopkRow<T>& row) const {
    TopkSlope s{0, 0};
    if (row.has_tail) s = topk_slope(row.rows.reverse, row.tail.p, row.tail.q, row.tail.l);
    return {p_is_0 ? 0 : s.p, q_is_0 ? 0 : s.q - row.tail.q * q};
  }
};

__device__ double per_entry(const TopkRows& rows, double gamma, double q) {
  return rows.space == kLogits ? gamma / rows.temperature : rows.space == kProbs ? topk_per_prob(gamma, q) : gamma;
}

// Zeros for what has the size of k. Of several blocks of a row one writes them.
__device__ void store_zeros(const RowTask& task, int64_t k, double* of_log_probs, double* of_tail) {
  if (of_log_probs != nullptr)
    for (int64_t e = task.team.rank; e < k; e += task.team.size) of_log_probs[task.row * k + e] = 0;
  if (of_tail != nullptr && task.team.rank == 0) of_tail[task.row] = 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward(const TopkBackward k, const RowGrid grid, double* workspace, int launch) {
  using A = Arithmetic<T>;
  constexpr int K = kPiece<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const TopkRows& rows = k.rows;
  RowPointer<char> grad(k.grad_input, task.row);
  const double c = k.coefficient[task.row];
  if (task.first_segment()) store_zeros(task, rows.k, k.grad_log_probs, k.grad_tail);
  if (c == 0) {
    store_zeros<T>(task, grad, Pieces(rows.classes, grad));
    return;
  }
  TopkRow<T> row(rows, task.team, task.row, false);
  assert_valid(row.valid);
  const Pieces pieces(rows.classes, row.x, grad);
  const auto stat = TopkStat::load(k.stat + TopkStat::kSize * task.row);
  row.set_q(stat);
  const Totals totals(row);
  const TopkSlope of_tail = totals.of_tail(row);
  if (grad.data != nullptr) {
    const bool probs = rows.space == kProbs, exponential = rows.reads_all() && !probs;
    double factor = !rows.reads_all() ? 0 : c * per_entry(rows, of_tail.q, row.tail.given_q);
    if (exponential) factor = stat.empty_tail() ? 0 : factor * std::exp(-stat.tail_log_sum);
    const Exp<A> exp(1 / rows.temperature);
    const A gain = static_cast<A>(factor), top = static_cast<A>(stat.tail_max);
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      A g[K];
      if (exponential) load_piece(row.x, pieces, piece, -kInf<A>, g);
#pragma unroll
      for (int i = 0; i < K; ++i) g[i] = exponential ? exp(g[i] - top) * gain : gain;
      store_piece(grad, pieces, piece, g);
    });
  }
  task.team.sync();  // entries of K overwrite what a thread beside may have written
  row.for_entries([&](int64_t e, const Term& term) {
    const TopkSlope g = totals.of_entry(row, term);
    if (grad.data != nullptr && task.holds(pieces, term.index))
      store_entry<T>(grad, term.index, c * per_entry(rows, g.q, term.given_q));
    if (k.grad_log_probs != nullptr && task.first_segment()) k.grad_log_probs[task.row * rows.k + e] = c * g.p;
  });
  if (k.grad_tail != nullptr && task.writes()) k.grad_tail[task.row] = c * of_tail.p;
}

// sum w d outside K, d = v/T | v | v/q: this thread's share.
template <class T>
__device__ double mean_outside(const TopkRow<T>& row, const RowTask& task, const Pieces& pieces,
                               const RowPointer<const char>& v, const TopkStat& stat) {
  constexpr int K = kPiece<T>;
  ClassesOfK in_k(row.indices(), row.rows.k);
  const bool probs = row.rows.space == kProbs;
  const Exp<double> exp(1 / row.rows.temperature);
  const double weight = std::exp(-stat.tail_log_sum), per_v = probs ? 1 : 1 / row.rows.temperature;
  double sum = 0;
  task.template for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    double d[K], w[K];
    load_piece(v, pieces, piece, 0.0, d);
    if (!probs) load_piece(row.x, pieces, piece, -kInf<double>, w);
#pragma unroll
    for (int i = 0; i < K; ++i) w[i] = probs ? 1 : exp(w[i] - stat.tail_max);
    in_k.mask(piece, 0.0, w);
#pragma unroll
    for (int i = 0; i < K; ++i) sum += w[i] == 0 ? 0 : w[i] * d[i];
  });
  return sum * weight * per_v;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    double_backward(const TopkDoubleBackward k, const RowGrid grid, double* workspace, int launch) {
  constexpr int K = kPiece<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const TopkRows& rows = k.rows;
  RowPointer<const char> v(k.v_input, task.row);
  RowPointer<char> out(k.d_input, task.row);
  const double c = k.coefficient[task.row], t = rows.temperature;
  // A row of coefficient 0 may hold anything; its gradient, of which d_coefficient is made, is asked for only where it
  // had a weight.
  TopkRow<T> row(rows, task.team, task.row, true);
  assert_valid(row.valid || c == 0);
  if (!row.valid || (c == 0 && k.d_coefficient == nullptr)) {
    if (task.first_segment()) store_zeros(task, rows.k, k.d_log_probs, k.d_tail);
    if (k.d_coefficient != nullptr && task.writes()) k.d_coefficient[task.row] = 0;
    store_zeros<T>(task, out, Pieces(rows.classes, out));
    return;
  }
  const Pieces pieces(rows.classes, row.x, v, out);
  const auto stat = TopkStat::load(k.stat + TopkStat::kSize * task.row);
  Sums<1> mean_sum;
  if (v.data != nullptr && rows.reads_all() && !stat.empty_tail()) {
    const auto part = [&] { return Sums<1>{{mean_outside(row, task, pieces, v, stat)}}; };
    if (!task.reduce(0, mean_sum, part, [&](const Sums<1>& x) { return merged(task.team, x); })) return;
  }
  const double mean = mean_sum.x[0];
  row.set_q(stat);

  // log P and log Q along v. Before sums are known, without what they take away.
  const auto p_dot_of = [&](int64_t e) { return k.v_log_probs != nullptr ? k.v_log_probs[task.row * rows.k + e] : 0; };
  const auto q_dot_of = [&](const Term& term) {
    const double d = v.data != nullptr ? load_entry<T>(v, term.index) : 0;
    return rows.space == kLogits ? d / t : rows.space == kProbs ? topk_per_prob(d, term.given_q) : d;
  };
  double dots[2] = {};
  row.for_entries([&](int64_t e, const Term& term) {
    dots[0] += topk_times(term.p, p_dot_of(e)), dots[1] += topk_times(term.q, q_dot_of(term));
  });
  task.team.sum(dots);
  double mu = dots[1] + (rows.space == kLogits && rows.reads_all() ? row.tail.q * mean : 0);
  if (!rows.normalises_q()) mu = 0;
  const double p_shift = rows.renormalises_p() ? dots[0] : 0, tail_q_dot = mean - mu;
  double tail_p_dot = 0;
  if (!rows.derived_tail()) {
    tail_p_dot = k.v_tail != nullptr ? k.v_tail[task.row] : 0;
  } else if (row.tail.p > 0) {
    tail_p_dot = -dots[0] / row.tail.p;
  }
  const auto p_dot = [&](int64_t e) { return e < rows.k ? p_dot_of(e) - p_shift : tail_p_dot; };
  const auto q_dot = [&](int64_t e, const Term& term) { return e < rows.k ? q_dot_of(term) - mu : tail_q_dot; };
  const auto slope_dot = [&](int64_t e, const Term& term) {
    return topk_slope_dot(rows.reverse, term.p, term.q, term.l, p_dot(e), q_dot(e, term));
  };

  const Totals totals(row);
  double sums[3] = {};  // of the loss's derivative and of the slopes'
  row.for_terms([&](int64_t e, const Term& term) {
    const TopkSlope s = topk_slope(rows.reverse, term.p, term.q, term.l), dot = slope_dot(e, term);
    if (!totals.p_is_0) sums[0] += topk_times(p_dot(e), s.p);
    if (!totals.q_is_0) sums[0] += topk_times(q_dot(e, term), s.q);
    sums[1] += dot.p, sums[2] += dot.q;
  });
  task.team.sum(sums);
  const double sum_p = rows.renormalises_p() ? sums[1] : 0, sum_q = rows.normalises_q() ? sums[2] : 0;
  const TopkSlope tail_dot = row.has_tail ? slope_dot(rows.k, row.tail) : TopkSlope{0, 0};
  const double ratio = totals.tail_ratio != 0 ? tail_dot.p / row.tail.p - totals.tail_ratio * tail_p_dot : 0;
  if (k.d_coefficient != nullptr && task.writes()) k.d_coefficient[task.row] = sums[0];

  const TopkSlope of_tail = totals.of_tail(row);
  const double tail_gamma_dot = totals.q_is_0 ? 0 : tail_dot.q - row.tail.q * (tail_q_dot * totals.q + sum_q);
  if (out.data != nullptr) {
    const bool probs = rows.space == kProbs, exponential = rows.reads_all() && !stat.empty_tail() && !probs;
    double flat = 0;
    if (probs && rows.reads_all() && !stat.empty_tail())
      flat = c * topk_per_prob(tail_gamma_dot - of_tail.q * mean, row.tail.given_q);
    const Exp<double> exp(1 / t);
    const double inv_t = rows.space == kLogits ? 1 / t : 1, share = exponential ? std::exp(-stat.tail_log_sum) : 0,
                 a = c * of_tail.q * inv_t, b = c * tail_gamma_dot * inv_t;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      double w[K] = {}, d[K] = {};
      if (exponential) load_piece(row.x, pieces, piece, -kInf<double>, w);
      if (exponential && v.data != nullptr) load_piece(v, pieces, piece, 0.0, d);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        const double part = exponential ? exp(w[i] - stat.tail_max) * share : 0;
        w[i] = c == 0 ? 0 : part == 0 ? flat : part * ((d[i] * inv_t - mean) * a + b);
      }
      store_piece(out, pieces, piece, w);
    });
  }
  task.team.sync();  // as in backward()
  if (task.first_segment()) store_zeros(task, rows.k, k.d_log_probs, k.d_tail);
  if (c == 0) return;
  row.for_entries([&](int64_t e, const Term& term) {
    const TopkSlope dot = slope_dot(e, term);
    const double along_p = p_dot(e), along_q = q_dot(e, term);
    if (k.d_log_probs != nullptr && task.first_segment()) {
      const double taken = term.p * (along_p * (totals.p + totals.tail_ratio) + sum_p + ratio);
      k.d_log_probs[task.row * rows.k + e] = totals.p_is_0 ? 0 : c * (dot.p - taken);
    }
    if (out.data == nullptr || !task.holds(pieces, term.index)) return;
    double h = totals.q_is_0 ? 0 : dot.q - term.q * (along_q * totals.q + sum_q);
    if (rows.space == kProbs) h -= topk_times(totals.of_entry(row, term).q, q_dot_of(term));
    store_entry<T>(out, term.index, c * per_entry(rows, h, term.given_q));
  });
  if (k.d_tail != nullptr && task.writes()) k.d_tail[task.row] = totals.p_is_0 ? 0 : c * tail_dot.p;
}

}  // namespace

int64_t kl_div_topk_workspace(int64_t rows, int64_t classes) { return RowGrid(rows, classes).workspace(kReductions); }

void kl_div_topk_forward(const TopkForward& k, int64_t rows, double* workspace, Stream stream) {
  dispatch_type(k.rows.input.dtype,
                [&]<class T>() { launch_rows(&forward<T>, k, rows, workspace, stream, kReductions); });
}

void kl_div_topk_backward(const TopkBackward& k, int64_t rows, double* workspace, Stream stream) {
  dispatch_type(k.rows.input.dtype, [&]<class T>() { launch_rows(&backward<T>, k, rows, workspace, stream, 0); });
}

void kl_div_topk_double_backward(const TopkDoubleBackward& k, int64_t rows, double* workspace, Stream stream) {
  dispatch_any(k.rows.input.dtype, [&]<class T>() { launch_rows(&double_backward<T>, k, rows, workspace, stream, 1); });
}

}  // namespace torch_divergence::cuda
