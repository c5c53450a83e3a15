// One problem of a batch, laid out for the pair kernels.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "sinkhorn/sinkhorn.h"
#include "sinkhorn/sinkhorn_solver.h"

namespace torch_divergence::transport {

// Values of a problem that no shape or dtype tells.
void check_values(const Problem& p, double rounding);
// By how much, relatively, the masses of two hard marginals may differ.
inline double mass_rounding_of(at::ScalarType type) { return type == at::kDouble ? 1e-10 : 1e-5; }
void warn_not_converged(double tol, int64_t max_iter);
// Offsets of a ragged batch over so many atoms, on the host.
std::vector<int64_t> checked_starts(const at::Tensor& offsets, int64_t atoms, const char* argument);

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Rows [0, rows) over threads, in blocks that the kernels like. In a parallel region this is a plain call.
template <class Kernel, class Call>
void run_rows(Kernel kernel, const Call& call) {
  constexpr int64_t kBlock = 4, kPairs = int64_t{1} << 15;
  const int64_t rows = call.pairs.rows, blocks = (rows + kBlock - 1) / kBlock,
                grain = std::max<int64_t>(1, kPairs / (kBlock * call.pairs.cols));
  if (blocks <= grain) return kernel(call, 0, rows);  // where a few points are, parallel_for takes as long as they do
  at::parallel_for(0, blocks, grain,
                   [&](int64_t begin, int64_t end) { kernel(call, begin * kBlock, std::min(rows, end * kBlock)); });
}

// A sweep over the pairs of one problem on a CUDA device; the call's arrays are the host's.
void sweep_on_cuda(const PairSweep& call, c10::Device device);

template <class A>
class Sample {
 public:
  // points: x (n, dims), y (m, dims), null for x again;  matrix: C (n, m). device: where sweeps run, if not here.
  Sample(int cost, int64_t n, int64_t m, int64_t dims, const A* x, const A* y,
         std::optional<c10::Device> device_ = std::nullopt)
      : device(device_),
        cost_(cost == kCosine ? kHalfSqEuclidean : cost),
        n_(n),
        m_(m),
        dims_(dims),
        offset_x_(n),
        offset_y_(m) {
    if (cost == kCostMatrix) {
      matrix_ = x;
      return;
    }
    x_ = coordinates(x, n, dims);
    y_ = y == nullptr ? x_ : coordinates(y, m, dims);
    if (cost == kCosine) {
      set_offsets(x_, offset_x_);
      set_offsets(y_, offset_y_);
    }
    if (dims_ > kDifferences && cost_ != kEuclidean) set_products();
  }

  int64_t count(Side side) const { return side == Side::Rows ? n_ : m_; }

  // (count, dims) -> dims x padded(count)
  static std::vector<A> coordinates(const A* points, int64_t count, int64_t dims) {
    const int64_t stride = padded(count);
    std::vector<A> out(static_cast<size_t>(dims * stride));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < dims; ++k) out[static_cast<size_t>(k * stride + i)] = points[i * dims + k];
    return out;
  }

  Pairs pairs(Side side, bool products = false) const {
    const bool rows = side == Side::Rows;
    const std::vector<A>&x = products ? panels_x_ : x_, &y = products ? panels_y_ : y_;
    return {std::is_same_v<A, double>,
            cost_,
            rows ? n_ : m_,
            rows ? m_ : n_,
            dims_,
            rows ? x.data() : y.data(),
            rows ? y.data() : x.data(),
            padded(rows ? n_ : m_),
            padded(rows ? m_ : n_),
            matrix_,
            rows ? m_ : 1,
            rows ? 1 : m_,
            products};
  }
  // What cosine adds to the cost of the points of a side: 1/2 for a zero vector.
  const Vector& offset(Side side) const { return side == Side::Rows ? offset_x_ : offset_y_; }

  // The extremes of C over pairs of positive weight and finite cost.
  void set_cost_range(Problem& p) const {
    CostRange call{pairs(Side::Rows), nullptr, nullptr, nullptr, nullptr};
    Vector low(static_cast<size_t>(n_)), high(low), top(low);
    const auto offset = columns(m_, kNoScore, [&](size_t j) { return p.b[j] > 0 ? offset_y_[j] : kNoScore; });
    call.offset = offset.data();
    call.low = low.data();
    call.high = high.data();
    call.top = top.data();
    run_rows(TD_CPU_KERNEL(sinkhorn_cost_range), call);
    p.cost_low = -kNoScore, p.cost_high = kNoScore;
    for (size_t i = 0; i < low.size(); ++i)
      if (p.a[i] > 0) {
        p.cost_low = std::min(p.cost_low, low[i] + offset_x_[i]);
        p.cost_high = std::max(p.cost_high, high[i] + offset_x_[i]);
        p.all_finite = p.all_finite && top[i] < -kNoScore;
      }
  }

  // The soft c-transform onto `side` of a problem over these pairs. out: going in, the potential of that side so far.
  void soft_min(const Problem& p, Side side, const Vector& potential, double eps, Vector& out) {
    const bool rows = side == Side::Rows;
    if (p.is_flat(eps)) {
      const Vector &weight = rows ? p.b : p.a, &row_offset = rows ? offset_x_ : offset_y_,
                   &col_offset = rows ? offset_y_ : offset_x_;
      const int64_t cols = rows ? m_ : n_;
      const double mass = sum_of(weight);
      const auto g =
          columns(cols, kNoScore, [&](size_t j) { return weight[j] > 0 ? potential[j] - col_offset[j] : kNoScore; });
      const auto share = columns(cols, 0, [&](size_t j) { return weight[j] / mass; });
      run_rows(TD_CPU_KERNEL(sinkhorn_soft_min_flat),
               SoftMinFlat{pairs(side), g.data(), share.data(), 1 / eps, out.data()});
      const double shift = eps * std::log(mass);
      for (size_t i = 0; i < out.size(); ++i) out[i] = row_offset[i] - (out[i] + shift);
      return;
    }
    const auto [call, row_offset] = scored(p, side, potential, eps, out);
    run_rows(TD_CPU_KERNEL(sinkhorn_soft_min), call);
    for (size_t i = 0; i < out.size(); ++i) out[i] = row_offset[i] - eps / kLog2e * out[i];
  }

  // d1C averaged over the conditional distribution of the other side's atoms: (count(side), dims). own: its potential.
  void point_gradient(const Problem& p, Side side, Vector own, const Vector& other, A* out) {
    const double k = k_of(p.eps, side == Side::Rows ? p.rho_a : p.rho_b);
    for (double& v : own) v *= k;
    const auto [call, row_offset] = scored(p, side, other, p.eps, own);
    run_rows(TD_CPU_KERNEL(sinkhorn_point_gradient), PointGradient{call, out});
  }

  template <class F>
  static std::vector<A> columns(int64_t count, double fill, const F& value) {
    std::vector<A> out(static_cast<size_t>(padded(count)), static_cast<A>(fill));
    for (size_t j = 0; j < static_cast<size_t>(count); ++j) out[j] = static_cast<A>(value(j));
    return out;
  }

  std::optional<c10::Device> device;

 private:
  void set_offsets(const std::vector<A>& points, Vector& offset) const {
    const size_t stride = static_cast<size_t>(padded(static_cast<int64_t>(offset.size())));
    for (size_t i = 0; i < offset.size(); ++i) {
      bool zero = true;
      for (size_t k = 0; k < static_cast<size_t>(dims_); ++k) zero = zero && points[k * stride + i] == 0;
      offset[i] = zero ? 0.5 : 0;
    }
  }

  // Points of up to so many dimensions always go by differences: there products save next to nothing.
  static constexpr int64_t kDifferences = 4;
  // The rounding of an inner product is that of the squares beside it, which may be so many eps, or so many times the
  // least cost. In float this keeps an entry of the plan within 2e-5 of itself, or as near as differences would.
  static constexpr double kSquaresOfEps = 128, kSquaresOfCost = 4;

  bool by_products(const Problem& p, double eps) const {
    return squares_ <= std::max(kSquaresOfEps * eps, kSquaresOfCost * p.cost_low);
  }

  // The call of a soft minimum at potentials of the other side, and what to subtract its result from. guess: going in,
  // the potential of this side; then the result's place.
  std::pair<SoftMin, const Vector&> scored(const Problem& p, Side side, const Vector& potential, double eps,
                                           Vector& guess) {
    const bool rows = side == Side::Rows, products = by_products(p, eps);
    const Vector &weight = rows ? p.b : p.a, &x_offset = products ? square_x_ : offset_x_,
                 &y_offset = products ? square_y_ : offset_y_;
    const Vector &row_offset = rows ? x_offset : y_offset, &col_offset = rows ? y_offset : x_offset;
    const double per_eps = kLog2e / eps;
    // Kept from one update to the next: for a few points, logarithms and memory cost more than the pairs.
    Vector& log_weight = log_weight_[rows];
    if (log_weight.empty()) {
      log_weight.resize(weight.size());
      for (size_t j = 0; j < weight.size(); ++j) log_weight[j] = weight[j] > 0 ? std::log2(weight[j]) : kNoScore;
    }
    std::vector<A>& score = score_[rows];
    score.resize(static_cast<size_t>(padded(static_cast<int64_t>(weight.size()))), static_cast<A>(kNoScore));
    for (size_t j = 0; j < weight.size(); ++j)
      score[j] = static_cast<A>(weight[j] > 0 ? log_weight[j] + (potential[j] - col_offset[j]) * per_eps : kNoScore);
    for (size_t i = 0; i < guess.size(); ++i) guess[i] = (row_offset[i] - guess[i]) * per_eps;
    return {SoftMin{pairs(side, products), score.data(), 1 / eps, guess.data()}, row_offset};
  }

  // The points as panels about the middle of the box around both clouds, and their squares times the cost's scale
  // beside the offsets. Of the centred points as rounded: squares and products are of the same points.
  void set_products() {
    const auto rows = static_cast<size_t>(n_), cols = static_cast<size_t>(m_),
               row_stride = static_cast<size_t>(padded(n_)), col_stride = static_cast<size_t>(padded(m_));
    panels_x_.resize(x_.size());
    panels_y_.resize(y_.size());
    square_x_ = offset_x_;
    square_y_ = offset_y_;
    const double scale = cost_ == kHalfSqEuclidean ? 0.5 : 1;
    for (size_t k = 0; k < static_cast<size_t>(dims_); ++k) {
      const A *const x = x_.data() + k * row_stride, *const y = y_.data() + k * col_stride;
      const auto [low_x, high_x] = std::minmax_element(x, x + rows);
      const auto [low_y, high_y] = std::minmax_element(y, y + cols);
      const A middle = std::midpoint(std::min(*low_x, *low_y), std::max(*high_x, *high_y));
      const auto centre = [&](const A* from, std::vector<A>& panels, Vector& square) {
        for (size_t i = 0; i < square.size(); ++i) {
          const A v = from[i] - middle;
          panels[(i / kPad * static_cast<size_t>(dims_) + k) * kPad + i % kPad] = v;
          square[i] += scale * static_cast<double>(v) * static_cast<double>(v);
        }
      };
      centre(x, panels_x_, square_x_);
      centre(y, panels_y_, square_y_);
    }
    if (std::isfinite(sum_of(square_x_)) && std::isfinite(sum_of(square_y_)))
      squares_ =
          *std::max_element(square_x_.begin(), square_x_.end()) + *std::max_element(square_y_.begin(), square_y_.end());
  }

  int cost_;
  int64_t n_, m_, dims_;
  std::vector<A> x_, y_, panels_x_, panels_y_;
  const A* matrix_ = nullptr;
  Vector log_weight_[2];  // log2 of the columns' weights, by whether the rows are x's
  std::vector<A> score_[2];
  Vector offset_x_, offset_y_, square_x_, square_y_;
  // The largest squares of both sides, in units of cost; infinite: products are never used.
  double squares_ = std::numeric_limits<double>::infinity();
};

// A PairSweep under construction: keeps the arrays that it points to. f and g are the potentials of rows and columns.
template <class A>
class Sweep {
 public:
  Sweep(const Sample<A>& sample, Side side, double eps, const Vector& f, const Vector& g)
      : rows_(static_cast<size_t>(sample.count(side))),
        cols_(sample.count(side == Side::Rows ? Side::Columns : Side::Rows)),
        device_(sample.device) {
    call.pairs = sample.pairs(side);
    call.inv_eps = 1 / eps;
    const Vector &row_offset = sample.offset(side),
                 &col_offset = sample.offset(side == Side::Rows ? Side::Columns : Side::Rows);
    Vector shifted_f = f, shifted_g = g;
    for (size_t i = 0; i < f.size(); ++i) shifted_f[i] -= row_offset[i];
    for (size_t j = 0; j < g.size(); ++j) shifted_g[j] -= col_offset[j];
    call.f = keep(std::move(shifted_f));
    call.g = columns(shifted_g);
  }

  const double* keep(Vector v) { return vectors_.emplace_back(std::move(v)).data(); }
  const A* columns(const Vector& v) {
    return arrays_.emplace_back(Sample<A>::columns(cols_, 0, [&](size_t j) { return v[j]; })).data();
  }
  // Points of the rows or of the columns, (count, dims); null stays null.
  const A* coordinates(const A* points, bool of_rows, int64_t dims) {
    if (points == nullptr) return nullptr;
    return arrays_.emplace_back(Sample<A>::coordinates(points, of_rows ? static_cast<int64_t>(rows_) : cols_, dims))
        .data();
  }
  // An output of one number a row.
  Vector& wanted(double*& slot) {
    Vector& v = vectors_.emplace_back(rows_);
    slot = v.data();
    return v;
  }
  void run() {
#ifdef TD_CUDA
    if (device_.has_value()) return sweep_on_cuda(call, *device_);
#endif
    run_rows(TD_CPU_KERNEL(sinkhorn_pair_sweep), call);
  }

  PairSweep call{};

 private:
  size_t rows_;
  int64_t cols_;
  std::optional<c10::Device> device_;
  std::deque<Vector> vectors_;
  std::deque<std::vector<A>> arrays_;
};

}  // namespace torch_divergence::transport
