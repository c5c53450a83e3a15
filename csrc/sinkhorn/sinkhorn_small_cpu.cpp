// Entropic optimal transport between few points, from the first iteration to the last: a problem in each lane of a
// vector, because a loop over so few atoms would leave its lanes empty. Compiled once per instruction set
// (CPU_CAPABILITY). All but the exponentials is in double; costs are computed once.
#include <algorithm>
#include <limits>
#include <memory>

#include "core/vec_exp2.h"
#include "sinkhorn/sinkhorn.h"
#include "sinkhorn/sinkhorn_iteration.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

using namespace transport;
using D = Vec<double>;
constexpr double kLowest = std::numeric_limits<double>::lowest();

// Two vectors: what the arithmetic on one waits for leaves time for the other. In float they are one.
constexpr int kProblems = 2 * kLanes<double>;
static_assert(kProblems <= kSmallLanes && kLanes<float> == kProblems);

// Of some of the problems.
struct Mask {
  D bits[2];

  TD_INLINE Mask() : Mask(false) {}
  TD_INLINE Mask(bool all) : Mask(all ? D(0.0) == D(0.0) : D(0.0), all ? D(0.0) == D(0.0) : D(0.0)) {}
  TD_INLINE Mask(D first, D second) : bits{first, second} {}
  TD_INLINE friend Mask operator&(const Mask& a, const Mask& b) {
    return {a.bits[0] & b.bits[0], a.bits[1] & b.bits[1]};
  }
  TD_INLINE friend Mask operator|(const Mask& a, const Mask& b) {
    return {a.bits[0] | b.bits[0], a.bits[1] | b.bits[1]};
  }
  TD_INLINE friend Mask operator!(const Mask& a) {
    const D ones = D(0.0) == D(0.0);
    return {a.bits[0] ^ ones, a.bits[1] ^ ones};
  }
  TD_INLINE friend bool any(const Mask& a) { return CPU_CAPABILITY::any(a.bits[0] | a.bits[1]); }
};

// A number of each problem.
struct Lanes {
  D v[2];

  TD_INLINE Lanes() : Lanes(0.0) {}
  TD_INLINE Lanes(double all) : v{D(all), D(all)} {}
  TD_INLINE Lanes(D first, D second) : v{first, second} {}
  TD_INLINE static Lanes load(const double* from) { return {D::loadu(from), D::loadu(from + kLanes<double>)}; }
  TD_INLINE void store(double* to) const {
    v[0].store(to);
    v[1].store(to + kLanes<double>);
  }

  TD_INLINE friend Lanes operator+(const Lanes& a, const Lanes& b) { return {a.v[0] + b.v[0], a.v[1] + b.v[1]}; }
  TD_INLINE friend Lanes operator-(const Lanes& a, const Lanes& b) { return {a.v[0] - b.v[0], a.v[1] - b.v[1]}; }
  TD_INLINE friend Lanes operator*(const Lanes& a, const Lanes& b) { return {a.v[0] * b.v[0], a.v[1] * b.v[1]}; }
  TD_INLINE friend Lanes operator/(const Lanes& a, const Lanes& b) { return {a.v[0] / b.v[0], a.v[1] / b.v[1]}; }
  TD_INLINE friend Lanes operator-(const Lanes& a) { return {a.v[0].neg(), a.v[1].neg()}; }
  TD_INLINE friend Mask operator<(const Lanes& a, const Lanes& b) { return {a.v[0] < b.v[0], a.v[1] < b.v[1]}; }
  TD_INLINE friend Mask operator>(const Lanes& a, const Lanes& b) { return {a.v[0] > b.v[0], a.v[1] > b.v[1]}; }
  TD_INLINE friend Mask operator<=(const Lanes& a, const Lanes& b) { return {a.v[0] <= b.v[0], a.v[1] <= b.v[1]}; }
  TD_INLINE friend Mask operator==(const Lanes& a, const Lanes& b) { return {a.v[0] == b.v[0], a.v[1] == b.v[1]}; }
  TD_INLINE friend Lanes where(const Mask& condition, const Lanes& a, const Lanes& b) {
    return {select(condition.bits[0], a.v[0], b.v[0]), select(condition.bits[1], a.v[1], b.v[1])};
  }
  // A NaN may be lost here.
  TD_INLINE friend Lanes max_of(const Lanes& a, const Lanes& b) {
    return {CPU_CAPABILITY::max_of(a.v[0], b.v[0]), CPU_CAPABILITY::max_of(a.v[1], b.v[1])};
  }
  TD_INLINE friend Lanes abs(const Lanes& a) { return {a.v[0].abs(), a.v[1].abs()}; }
  TD_INLINE friend Lanes sqrt(const Lanes& a) { return {a.v[0].sqrt(), a.v[1].sqrt()}; }
  TD_INLINE friend Lanes exp(const Lanes& a) { return {a.v[0].exp(), a.v[1].exp()}; }
  TD_INLINE friend Lanes expm1(const Lanes& a) { return {a.v[0].expm1(), a.v[1].expm1()}; }
  TD_INLINE friend Lanes log(const Lanes& a) { return {a.v[0].log(), a.v[1].log()}; }
  TD_INLINE friend Lanes log1p(const Lanes& a) { return {a.v[0].log1p(), a.v[1].log1p()}; }
  TD_INLINE friend Lanes log2(const Lanes& a) { return {a.v[0].log2(), a.v[1].log2()}; }
};

TD_INLINE Vec<float> narrowed(const Lanes& a) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.v[0])), _mm512_cvtpd_ps(a.v[1]), 1);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(a.v[0])), _mm256_cvtpd_ps(a.v[1]), 1);
#else
  double wide[kProblems];
  float lanes[kProblems];
  a.store(wide);
  for (int i = 0; i < kProblems; ++i) lanes[i] = static_cast<float>(wide[i]);
  return Vec<float>::loadu(lanes);
#endif
}
TD_INLINE Lanes widened(Vec<float> v) {
#if defined(CPU_CAPABILITY_AVX512)
  return {D(_mm512_cvtps_pd(_mm512_castps512_ps256(v))), D(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)))};
#elif defined(CPU_CAPABILITY_AVX2)
  return {D(_mm256_cvtps_pd(_mm256_castps256_ps128(v))), D(_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)))};
#else
  float lanes[kProblems];
  double wide[kProblems];
  v.store(lanes);
  for (int i = 0; i < kProblems; ++i) wide[i] = static_cast<double>(lanes[i]);
  return Lanes::load(wide);
#endif
}

// The problems that are solved side by side, padded to one size by atoms without weight.
template <class A>
class Group {
 public:
  explicit Group(const SmallSolve& call) : call_(call) {}

  void solve(int64_t first, int64_t count) {
    first_ = first, count_ = count, n_ = m_ = 0;
    for (int64_t s = first; s < first + count; ++s) n_ = std::max(n_, rows(s)), m_ = std::max(m_, cols(s));
    read_weights();
    call_.cost == kCostMatrix ? read_matrix() : read_points();
    set_cost_range();
    iterate();
  }

 private:
  void iterate() {
    if (call_.init != nullptr)
      read(call_.init, call_.col_start, m_, [&](int64_t j, Lanes v) { (call_.symmetric ? f_ : g_)[j] = v; });
    const TaskOf<Lanes> task{n_,
                             m_,
                             a_,
                             b_,
                             eps_,
                             call_.rho_a,
                             call_.rho_b,
                             call_.symmetric,
                             static_cast<double>(std::numeric_limits<A>::epsilon()),
                             call_.tol,
                             call_.max_iter,
                             f_,
                             g_,
                             update_,
                             residual_,
                             last_r_,
                             last_g_,
                             d_r_,
                             d_g_,
                             gram_};
    const OneThread<Lanes> team;
    ProgressOf<Lanes> progress;
    Iteration<OneThread<Lanes>, Lanes> iteration(team, task, progress);
    for (iteration.start(low_, high_, all_finite_, call_.init != nullptr); any(!progress.done); iteration.advance()) {
      const bool of_rows = progress.side == Side::Rows, to_f = of_rows && !call_.symmetric;
      soft_min(of_rows, progress.pass_eps, progress.takes_part, to_f ? g_ : f_, to_f ? f_ : update_);
    }
    write(static_cast<A*>(call_.f), call_.row_start, n_, f_);
    write(static_cast<A*>(call_.g), call_.col_start, m_, g_);
    write_one(call_.value, progress.value);
    write_one(call_.marginal_error, progress.marginal_error);
    write_one(call_.iterations, progress.iterations);
    write_one(call_.converged, where(progress.converged, Lanes(1), Lanes(0)));
  }

  int64_t rows(int64_t s) const { return call_.row_start[s + 1] - call_.row_start[s]; }
  int64_t cols(int64_t s) const { return call_.col_start[s + 1] - call_.col_start[s]; }
  // Lanes beyond the last problem repeat it.
  int64_t problem(int lane) const { return first_ + std::min<int64_t>(lane, count_ - 1); }

  // f(l, entry(s, l) of each problem s), 0 past its end, for l < n
  template <class Entry, class F>
  void gather(int64_t n, const Entry& entry, const F& f) const {
    for (int64_t l = 0; l < n; ++l) {
      double lanes[kProblems];
      for (int k = 0; k < kProblems; ++k) lanes[k] = entry(problem(k), l);
      f(l, Lanes::load(lanes));
    }
  }
  template <class F>
  void read(const double* from, const int64_t* start, int64_t n, const F& f) const {
    gather(
        n, [&](int64_t s, int64_t l) { return start[s] + l < start[s + 1] ? from[start[s] + l] : 0; }, f);
  }
  void write(A* to, const int64_t* start, int64_t n, const Lanes* from) const {
    for (int64_t l = 0; l < n; ++l) {
      double lanes[kProblems];
      from[l].store(lanes);
      for (int64_t k = 0; k < count_; ++k)
        if (start[first_ + k] + l < start[first_ + k + 1]) to[start[first_ + k] + l] = static_cast<A>(lanes[k]);
    }
  }
  template <class T>
  void write_one(T* to, Lanes v) const {
    double lanes[kProblems];
    v.store(lanes);
    for (int64_t k = 0; k < count_; ++k) to[first_ + k] = static_cast<T>(lanes[k]);
  }

  void read_weights() {
    const auto side = [&](const double* weight, const int64_t* start, int64_t n, Lanes* w, Lanes* log_w) {
      read(weight, start, n, [&](int64_t l, Lanes v) {
        w[l] = v;
        log_w[l] = where(v > Lanes(0), log2(v), Lanes(kNoScore));
      });
    };
    side(call_.a, call_.row_start, n_, a_, log_a_);
    side(call_.b, call_.col_start, m_, b_, log_b_);
    gather(
        1, [&](int64_t s, int64_t) { return call_.eps[s]; }, [&](int64_t, Lanes v) { eps_ = v; });
  }
  void read_matrix() {
    const A* const from = static_cast<const A*>(call_.matrix);
    gather(
        n_ * m_,
        [&](int64_t s, int64_t l) {
          const int64_t row = (call_.one_matrix ? 0 : call_.row_start[s]) + l / m_;
          return static_cast<double>(from[row * m_ + l % m_]);
        },
        [&](int64_t l, Lanes c) { cost_[l] = c; });
  }
  void read_points() {
    Lanes offset_x[kSmallAtoms], offset_y[kSmallAtoms], x[kSmallAtoms], y[kSmallAtoms];
    std::fill_n(cost_, n_ * m_, Lanes(0));
    std::fill_n(offset_x, n_, Lanes(0.5));
    std::fill_n(offset_y, m_, Lanes(0.5));
    for (int64_t k = 0; k < call_.dims; ++k) {
      const auto coordinate = [&](const void* points, const int64_t* start, int64_t n, Lanes* to, Lanes* offset) {
        const A* const from = static_cast<const A*>(points);
        gather(
            n,
            [&](int64_t s, int64_t l) {
              return start[s] + l < start[s + 1] ? static_cast<double>(from[(start[s] + l) * call_.dims + k]) : 0;
            },
            [&](int64_t l, Lanes v) {
              to[l] = v;
              offset[l] = where(v == Lanes(0), offset[l], Lanes(0));  // only of a zero vector
            });
      };
      coordinate(call_.x, call_.row_start, n_, x, offset_x);
      coordinate(call_.y, call_.col_start, m_, y, offset_y);
      for (int64_t i = 0; i < n_; ++i)
        for (int64_t j = 0; j < m_; ++j) {
          const Lanes d = x[i] - y[j];
          cost_[i * m_ + j] = cost_[i * m_ + j] + d * d;
        }
    }
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < m_; ++j) {
        Lanes& c = cost_[i * m_ + j];
        if (call_.cost == kEuclidean) c = sqrt(c);
        if (call_.cost == kHalfSqEuclidean || call_.cost == kCosine) c = 0.5 * c;
        if (call_.cost == kCosine) c = c + (offset_x[i] + offset_y[j]);
      }
  }
  void set_cost_range() {
    low_ = kInf<double>, high_ = -kInf<double>, all_finite_ = true;
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < m_; ++j) {
        const Lanes c = cost_[i * m_ + j];
        const Mask counts = (a_[i] > Lanes(0)) & (b_[j] > Lanes(0)), infinite = c == Lanes(kInf<double>);
        low_ = where(counts & (c < low_), c, low_);
        high_ = where(counts & !infinite & (c > high_), c, high_);
        all_finite_ = all_finite_ & !(counts & infinite);
      }
  }

  // The soft c-transform of `potential` onto the rows or the columns, for the problems that take part.
  void soft_min(bool of_rows, const Lanes& eps, const Mask& on, const Lanes* potential, Lanes* out) const {
    const int64_t n = of_rows ? n_ : m_, m = of_rows ? m_ : n_, row = of_rows ? m_ : 1, col = of_rows ? 1 : m_;
    const Lanes* const log_weight = of_rows ? log_b_ : log_a_;
    const Lanes per_eps = kLog2e / eps, unit = -eps / kLog2e;
    const Mask flat = on & all_finite_ & (eps > high_ - low_);
    Lanes score[kSmallAtoms], top[kSmallAtoms], sum[kSmallAtoms];
    for (int64_t j = 0; j < m; ++j)
      score[j] = where(log_weight[j] > Lanes(kNoScore), log_weight[j] + potential[j] * per_eps, Lanes(kNoScore));
    for (int64_t i = 0; i < n; ++i) {
      const Lanes* const cost = cost_ + i * row;
      Lanes z[kSmallAtoms];
      top[i] = kLowest;
      for (int64_t j = 0; j < m; ++j) {
        z[j] = score[j] - cost[j * col] * per_eps;
        top[i] = max_of(z[j], top[i]);
      }
      sum[i] = sum_of_powers(z, m, top[i]);
    }
    for (int64_t i = 0; i < n; ++i) {
      Lanes value = (top[i] + Lanes(log2_of(sum[i].v[0]), log2_of(sum[i].v[1]))) * unit;
      if (any(flat)) value = where(flat, flat_soft_min(of_rows, cost_ + i * row, col, eps, potential), value);
      out[i] = where(on, value, out[i]);
    }
  }
  // sum_j 2^(z_j - top) for j < m, in A
  static Lanes sum_of_powers(const Lanes* z, int64_t m, const Lanes& top) {
    if constexpr (std::is_same_v<A, double>) {
      Lanes sum;
      for (int64_t j = 0; j < m; ++j) {
        const Lanes t = z[j] - top;
        sum = sum + Lanes(exp2_of(t.v[0]), exp2_of(t.v[1]));
      }
      return sum;
    } else {
      Vec<float> sum(0.f);
      for (int64_t j = 0; j < m; ++j) sum = sum + exp2_of(narrowed(z[j] - top));
      return widened(sum);
    }
  }
  // SoftMinFlat of a row.
  Lanes flat_soft_min(bool of_rows, const Lanes* cost, int64_t col, const Lanes& eps, const Lanes* potential) const {
    const int64_t m = of_rows ? m_ : n_;
    const Lanes* const weight = of_rows ? b_ : a_;
    Lanes best = kLowest, sum = 0, mass = 0;
    for (int64_t j = 0; j < m; ++j) {
      const Lanes gain = where(weight[j] > Lanes(0), potential[j] - cost[j * col], Lanes(kNoScore));
      best = max_of(gain, best);
      mass = mass + weight[j];
    }
    for (int64_t j = 0; j < m; ++j) {
      const Lanes term = weight[j] * expm1((potential[j] - cost[j * col] - best) / eps);
      sum = sum + where(weight[j] > Lanes(0), term, Lanes(0));
    }
    return -(best + eps * log1p(sum / mass) + eps * log(mass));
  }

  const SmallSolve& call_;
  int64_t first_ = 0, count_ = 0, n_ = 0, m_ = 0;
  Lanes eps_, low_, high_;
  Mask all_finite_;
  Lanes a_[kSmallAtoms], b_[kSmallAtoms], log_a_[kSmallAtoms], log_b_[kSmallAtoms];
  Lanes cost_[kSmallAtoms * kSmallAtoms];
  Lanes f_[kSmallAtoms], g_[kSmallAtoms], update_[kSmallAtoms], residual_[kSmallAtoms], last_r_[kSmallAtoms],
      last_g_[kSmallAtoms], d_r_[kSmallAtoms * kMemory], d_g_[kSmallAtoms * kMemory], gram_[kMemory * kMemory];
};

}  // namespace

void sinkhorn_solve_small(const SmallSolve& call, int64_t begin, int64_t end) {
  const auto each = [&](auto group) {
    for (int64_t s = begin; s < end; s += kProblems) group.solve(s, std::min<int64_t>(kProblems, end - s));
  };
  call.is_double ? each(Group<double>(call)) : each(Group<float>(call));
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
