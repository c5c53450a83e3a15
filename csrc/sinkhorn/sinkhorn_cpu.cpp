// CPU pair kernels of entropic optimal transport. Compiled once per instruction set (CPU_CAPABILITY); formulas in
// sinkhorn.h. Nothing the size of rows x columns is stored: costs are recomputed, a tile of a few rows at a time, from
// coordinates that stay in cache. By differences of coordinates, which cancel nothing however far the clouds are from
// the origin, or by inner products where the caller knows that they are as good (Pairs::products).
#include "sinkhorn/sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "core/vec_exp2.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

using namespace transport;

// Columns of a tile: what its rows need stays in the first-level cache.
constexpr int64_t kTile = 256;
// Rows that share the loads of their columns, in few dimensions and in many.
constexpr int kRows = 4, kBlockRows = 6;
// Vectors of columns beside them: kBlockRows times as many sums hide the latency of a multiply-add.
constexpr int kVectors = 2;
// Rows that meet a tile of columns while it is in the first-level cache.
constexpr int64_t kChunk = 48;
// Points of so few dimensions are kept in registers.
constexpr int64_t kFewDims = 4;

// A term of a sum that is only used where it is between 2^-60 and 2^100. Above the range, and for NaN, it is above
// 2^100; below it may be the least normal number, which no such sum feels.
template <class A>
TD_INLINE Vec<A> exp2_term(Vec<A> t) {
#if defined(CPU_CAPABILITY_AVX2)
  constexpr A lowest = std::is_same_v<A, float> ? A(-126) : A(-1022);
  return Vec<A>(exp2_in_range(max_of(min_of(t, Vec<A>(A(120))), Vec<A>(lowest))));
#elif defined(CPU_CAPABILITY_AVX512)
  return exp2_of(t);
#else
  return exp2_of(min_of(t, Vec<A>(A(120))));
#endif
}
constexpr bool is_usable(double sum) { return sum > 0x1p-60 && sum < 0x1p100; }

template <class A>
TD_INLINE Vec<A> load_or_zero(const void* x, int64_t at) {
  return x == nullptr ? Vec<A>(A(0)) : load<A>(static_cast<const A*>(x) + at);
}

// -- The raw cost of a tile: |x - y|^2, <x, y>, |x - y| or C; what it is multiplied by is raw_scale -------------------

double raw_scale(const Pairs& p) { return (p.cost == kHalfSqEuclidean ? 0.5 : 1.0) * (p.products ? -2.0 : 1.0); }

template <class A, int R>
using Rows = A[R][kTile];

// Rows past the end repeat the last one.
TD_INLINE int64_t row_of(const Pairs& p, int64_t i) { return std::min(i, p.rows - 1); }

// Where the coordinates of a row and of a column start, and how far apart they are.
template <class A>
struct Layout {
  const A *x, *y;
  int64_t x_stride, y_stride, panel;  // panel: entries of one, 0 if there are none

  explicit Layout(const Pairs& p)
      : x(static_cast<const A*>(p.x)),
        y(static_cast<const A*>(p.y)),
        x_stride(p.products ? kPad : p.x_stride),
        y_stride(p.products ? kPad : p.y_stride),
        panel(p.products ? kPad * p.dims : kPad) {}
  TD_INLINE const A* row(int64_t i) const { return x + i / kPad * panel + i % kPad; }
  TD_INLINE const A* column(int64_t j) const { return y + j / kPad * panel + j % kPad; }
};

template <class A, int R, int D>
TD_INLINE void squared_distances_of(const Pairs& p, int64_t i, int64_t j, int64_t count, Rows<A, R>& out) {
  const A* const x = static_cast<const A*>(p.x);
  const A* const y = static_cast<const A*>(p.y) + j;
  Vec<A> xi[R][D];
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < D; ++k) xi[r][k] = Vec<A>(x[k * p.x_stride + row_of(p, i + r)]);
  for (int64_t l = 0; l < count; l += kLanes<A>) {
    Vec<A> yk[D];
    for (int k = 0; k < D; ++k) yk[k] = load<A>(y + k * p.y_stride + l);
    for (int r = 0; r < R; ++r) {
      const Vec<A> first = xi[r][0] - yk[0];
      Vec<A> s = first * first;
      for (int k = 1; k < D; ++k) {
        const Vec<A> d = xi[r][k] - yk[k];
        s = fmadd(d, d, s);
      }
      s.store(out[r] + l);
    }
  }
}

// Any number of dimensions: R rows from i and V vectors of columns from j, in registers.
template <class A, int R, int V, bool products>
TD_INLINE void raw_block(const Pairs& p, const Layout<A>& at, int64_t i, int64_t j, Vec<A> (&s)[R][V]) {
  const A *x[R], *y[V];
  const auto each_row = [](const auto& f) __attribute__((always_inline)) { unrolled<R>(f); };
  const auto each_vector = [](const auto& f) __attribute__((always_inline)) { unrolled<V>(f); };
  each_vector([&](auto v) __attribute__((always_inline)) { y[v] = at.column(j + v * kLanes<A>); });
  each_row([&](auto r) __attribute__((always_inline)) {
    x[r] = at.row(row_of(p, i + r));
    each_vector([&](auto v) __attribute__((always_inline)) { s[r][v] = Vec<A>(A(0)); });
  });
  for (int64_t k = 0; k < p.dims; ++k) {
    Vec<A> yk[V];
    each_vector([&](auto v) __attribute__((always_inline)) { yk[v] = load<A>(y[v] + k * at.y_stride); });
    each_row([&](auto r) __attribute__((always_inline)) {
      const Vec<A> xk(x[r][k * at.x_stride]);
      each_vector([&](auto v) __attribute__((always_inline)) {
        if constexpr (products) {
          s[r][v] = fmadd(xk, yk[v], s[r][v]);
        } else {
          const Vec<A> d = xk - yk[v];
          s[r][v] = fmadd(d, d, s[r][v]);
        }
      });
    });
  }
}
// f(first column, s) for the blocks of R rows from i and `count` columns from j.
template <class A, int R, bool products, class F>
TD_INLINE void for_raw_blocks(const Pairs& p, int64_t i, int64_t j, int64_t count, const F& f) {
  const Layout<A> at(p);
  const auto blocks = [&](auto vectors, int64_t l) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::value;
    for (; l + V * kLanes<A> <= count; l += V * kLanes<A>) {
      Vec<A> s[R][V];
      raw_block<A, R, V, products>(p, at, i, j + l, s);
      f(j + l, s);
    }
    return l;
  };
  const int64_t done = blocks(std::integral_constant<int, kVectors>(), 0);
  blocks(std::integral_constant<int, 1>(), done);
}

template <class A, int R, bool products>
void raw_costs_any(const Pairs& p, int64_t i, int64_t j, int64_t count, Rows<A, R>& out) {
  for_raw_blocks<A, R, products>(
      p, i, j, count, [&](int64_t column, const auto& s) __attribute__((always_inline)) {
        constexpr int V = std::extent_v<std::remove_reference_t<decltype(s)>, 1>;
        unrolled<R>([&](auto r) __attribute__((always_inline)) {
          unrolled<V>([&](auto v)
                          __attribute__((always_inline)) { s[r][v].store(out[r] + (column - j) + v * kLanes<A>); });
        });
      });
}

template <class A, int R>
void matrix_costs(const Pairs& p, int64_t i, int64_t j, int64_t count, Rows<A, R>& out) {
  const A* const c = static_cast<const A*>(p.matrix);
  const int64_t real = std::min(count, p.cols - j);
  for (int r = 0; r < R; ++r) {
    const A* const from = c + row_of(p, i + r) * p.row_stride + j * p.col_stride;
    if (p.col_stride == 1) {
      std::memcpy(out[r], from, static_cast<size_t>(real) * sizeof(A));
    } else {
      for (int64_t l = 0; l < real; ++l) out[r][l] = from[l * p.col_stride];
    }
    for (int64_t l = real; l < count; ++l) out[r][l] = A(0);
  }
}

template <class A, int R>
TD_INLINE void raw_costs(const Pairs& p, int64_t i, int64_t j, int64_t count, Rows<A, R>& out) {
  if (p.cost == kCostMatrix) {
    matrix_costs<A, R>(p, i, j, count, out);
    return;
  }
  switch (p.products ? 0 : p.dims) {
    case 0:
      raw_costs_any<A, R, true>(p, i, j, count, out);
      break;
    case 1:
      squared_distances_of<A, R, 1>(p, i, j, count, out);
      break;
    case 2:
      squared_distances_of<A, R, 2>(p, i, j, count, out);
      break;
    case 3:
      squared_distances_of<A, R, 3>(p, i, j, count, out);
      break;
    case 4:
      squared_distances_of<A, R, 4>(p, i, j, count, out);
      break;
    default:
      raw_costs_any<A, R, false>(p, i, j, count, out);
  }
  if (p.cost == kEuclidean)
    for (int r = 0; r < R; ++r)
      for (int64_t l = 0; l < count; l += kLanes<A>) load<A>(out[r] + l).sqrt().store(out[r] + l);
}

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// f(first column, columns) for each tile.
template <class F>
TD_INLINE void for_tiles(const Pairs& p, int64_t tile, const F& f) {
  const int64_t end = padded(p.cols);
  for (int64_t j = 0; j < end; j += tile) f(j, std::min(tile, end - j));
}
template <class F>
TD_INLINE void for_tiles(const Pairs& p, const F& f) {
  for_tiles(p, kTile, f);
}

// -- Soft minima ------------------------------------------------------------------------------------------------------

// sum_r = sum_j 2^(score_j - C_rj slope - guess_r) of kRows rows in few dimensions: a pair is D differences and one
// power of 2, all in registers.
template <class A, int D>
void guessed_sums_few(const SoftMin& call, int64_t i, const A* guesses, double* sum) {
  const Pairs& p = call.pairs;
  const A *const x = static_cast<const A*>(p.x), *const y = static_cast<const A*>(p.y),
                 *const score = static_cast<const A*>(call.score);
  const Vec<A> slope(static_cast<A>(-call.inv_eps * kLog2e * raw_scale(p)));
  Vec<A> xi[kRows][D], guess[kRows];
  unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    guess[r] = Vec<A>(guesses[r]);
    unrolled<D>([&](auto k)
                    __attribute__((always_inline)) { xi[r][k] = Vec<A>(x[k * p.x_stride + row_of(p, i + r)]); });
  });
  const auto sums = [&](auto root) __attribute__((always_inline)) {
    for_tiles(
        p, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
          Vec<A> part[kRows];
          unrolled<kRows>([&](auto r) __attribute__((always_inline)) { part[r] = Vec<A>(A(0)); });
          for (int64_t l = j; l < j + count; l += kLanes<A>) {
            Vec<A> yk[D];
            unrolled<D>([&](auto k) __attribute__((always_inline)) { yk[k] = load<A>(y + k * p.y_stride + l); });
            const Vec<A> s = load<A>(score + l);
            unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
              const Vec<A> first = xi[r][0] - yk[0];
              Vec<A> c = first * first;
              unrolled<D - 1>([&](auto k) __attribute__((always_inline)) {
                const Vec<A> d = xi[r][k + 1] - yk[k + 1];
                c = fmadd(d, d, c);
              });
              if constexpr (decltype(root)::value) c = c.sqrt();
              part[r] = part[r] + exp2_term<A>(fmadd(c, slope, s - guess[r]));
            });
          }
          unrolled<kRows>([&](auto r) __attribute__((always_inline)) { sum[r] += sum_of(part[r]); });
        });
  };
  p.cost == kEuclidean ? sums(std::true_type()) : sums(std::false_type());
}

// The same of any number of rows in any dimension, a tile of columns at a time.
template <class A, bool products, bool root>
void guessed_sums_many(const SoftMin& call, int64_t i, int64_t rows, const A* guess, double* sum) {
  const Pairs& p = call.pairs;
  const A* const score = static_cast<const A*>(call.score);
  const Vec<A> slope(static_cast<A>(-call.inv_eps * kLog2e * raw_scale(p)));
  constexpr int64_t kBytes = 16384, kStep = 2 * kPad;
  const int64_t columns = kBytes / (p.dims * static_cast<int64_t>(sizeof(A))) / kStep * kStep;
  for_tiles(
      p, std::clamp(columns, kStep, kTile), [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        for (int64_t first = 0; first < rows; first += kBlockRows) {
          Vec<A> part[kBlockRows];
          for (auto& v : part) v = Vec<A>(A(0));
          for_raw_blocks<A, kBlockRows, products>(
              p, i + first, j, count, [&](int64_t column, const auto& s) __attribute__((always_inline)) {
                constexpr int V = std::extent_v<std::remove_reference_t<decltype(s)>, 1>;
                unrolled<V>([&](auto v) __attribute__((always_inline)) {
                  const Vec<A> scores = load<A>(score + column + v * kLanes<A>);
                  unrolled<kBlockRows>([&](auto r) __attribute__((always_inline)) {
                    const Vec<A> c = root ? s[r][v].sqrt() : s[r][v];
                    part[r] = part[r] + exp2_term<A>(fmadd(c, slope, scores - Vec<A>(guess[first + r])));
                  });
                });
              });
          for (int r = 0; r < kBlockRows; ++r) sum[first + r] += sum_of(part[r]);
        }
      });
}

// The same of kRows rows of a matrix.
template <class A>
void guessed_sums_matrix(const SoftMin& call, int64_t i, const A* guess, double* sum) {
  const Pairs& p = call.pairs;
  const A* const score = static_cast<const A*>(call.score);
  const Vec<A> slope(static_cast<A>(-call.inv_eps * kLog2e));
  Rows<A, kRows> tile;
  for_tiles(
      p, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        matrix_costs<A, kRows>(p, i, j, count, tile);
        for (int r = 0; r < kRows; ++r) {
          const Vec<A> near(guess[r]);
          Vec<A> part(A(0));
          for (int64_t l = 0; l < count; l += kLanes<A>)
            part = part + exp2_term<A>(fmadd(load<A>(tile[r] + l), slope, load<A>(score + j + l) - near));
          sum[r] += sum_of(part);
        }
      });
}

// rows up to kChunk; the arrays have room for whole blocks of them.
template <class A>
void guessed_sums(const SoftMin& call, int64_t i, int64_t rows, const A* guess, double* sum) {
  const Pairs& p = call.pairs;
  const auto blocks = [&](auto few) __attribute__((always_inline)) {
    for (int64_t r = 0; r < rows; r += kRows) few(call, i + r, guess + r, sum + r);
  };
  if (p.cost == kCostMatrix) return blocks(guessed_sums_matrix<A>);
  if (p.products) return guessed_sums_many<A, true, false>(call, i, rows, guess, sum);
  switch (p.dims) {
    case 1:
      return blocks(guessed_sums_few<A, 1>);
    case 2:
      return blocks(guessed_sums_few<A, 2>);
    case 3:
      return blocks(guessed_sums_few<A, 3>);
    case 4:
      return blocks(guessed_sums_few<A, 4>);
    default:
      return p.cost == kEuclidean ? guessed_sums_many<A, false, true>(call, i, rows, guess, sum)
                                  : guessed_sums_many<A, false, false>(call, i, rows, guess, sum);
  }
}

// Of kRows rows, without a guess. Each lane keeps a maximum and a sum of its own, so that no tile ends in a horizontal
// reduction.
template <class A>
void soft_min_from_maximum(const SoftMin& call, int64_t i, double (&out)[kRows]) {
  const Pairs& p = call.pairs;
  const A* const score = static_cast<const A*>(call.score);
  const Vec<A> slope(static_cast<A>(-call.inv_eps * kLog2e * raw_scale(p)));
  Rows<A, kRows> tile;
  Vec<A> best[kRows], sum[kRows];
  for (int r = 0; r < kRows; ++r) best[r] = Vec<A>(std::numeric_limits<A>::lowest()), sum[r] = Vec<A>(A(0));
  for_tiles(
      p, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        raw_costs<A, kRows>(p, i, j, count, tile);
        for (int r = 0; r < kRows; ++r) {
          Vec<A> top = best[r];
          for (int64_t l = 0; l < count; l += kLanes<A>) {
            const Vec<A> s = fmadd(load<A>(tile[r] + l), slope, load<A>(score + j + l));
            s.store(tile[r] + l);
            top = max_of(s, top);
          }
          Vec<A> part(A(0));
          for (int64_t l = 0; l < count; l += kLanes<A>) part = part + exp2_of(load<A>(tile[r] + l) - top);
          sum[r] = fmadd(sum[r], exp2_of(best[r] - top), part);
          best[r] = top;
        }
      });
  for (int r = 0; r < kRows; ++r) {
    const A top = max_lane(best[r]);
    const double total = sum_of(sum[r] * exp2_of(best[r] - Vec<A>(top)));
    out[r] = static_cast<double>(top) + std::log2(total);
  }
}

// From the guesses; where one was too far off, terms that matter may have left the range. No row depends on those
// beside it, so that the split over threads changes no bit.
template <class A>
void soft_min_rows(const SoftMin& call, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t rows = std::min(kChunk, end - i);
    A guess[kChunk];
    double sum[kChunk] = {};
    for (int64_t r = 0; r < std::min(kChunk, rows + kBlockRows - 1); ++r)  // whole blocks, and not more for a few rows
      guess[r] = static_cast<A>(call.out[i + std::min(r, rows - 1)]);
    guessed_sums<A>(call, i, rows, guess, sum);
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t last = std::min(first + kRows, rows);
      double exact[kRows];
      if (!std::all_of(sum + first, sum + last, is_usable)) soft_min_from_maximum<A>(call, i + first, exact);
      for (int64_t r = first; r < last; ++r)
        call.out[i + r] = is_usable(sum[r]) ? static_cast<double>(guess[r]) + std::log2(sum[r]) : exact[r - first];
    }
  }
}

template <class A>
void soft_min_flat_rows(const SoftMinFlat& call, int64_t begin, int64_t end) {
  const Pairs& p = call.pairs;
  const A *const g = static_cast<const A*>(call.potential), *const weight = static_cast<const A*>(call.weight);
  const Vec<A> minus_scale(static_cast<A>(-raw_scale(p))), inv_eps(static_cast<A>(call.inv_eps));
  Rows<A, 1> tile;
  for (int64_t i = begin; i < end; ++i) {
    const auto scores = [&](int64_t l, int64_t j) __attribute__((always_inline)) {
      return fmadd(load<A>(tile[0] + l), minus_scale, load<A>(g + j + l));
    };
    Vec<A> best(std::numeric_limits<A>::lowest());
    for_tiles(
        p, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
          raw_costs<A, 1>(p, i, j, count, tile);
          for (int64_t l = 0; l < count; l += kLanes<A>) best = max_of(scores(l, j), best);
        });
    const A top = max_lane(best);
    double sum = 0;
    for_tiles(
        p, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
          raw_costs<A, 1>(p, i, j, count, tile);
          Vec<A> part(A(0));
          for (int64_t l = 0; l < count; l += kLanes<A>) {
            const Vec<A> w = load<A>(weight + j + l);
            const Vec<A> term = ((scores(l, j) - Vec<A>(top)) * inv_eps).expm1();
            part = part + select(w > Vec<A>(A(0)), w * term, w);
          }
          sum += sum_of(part);
        });
    call.out[i] = static_cast<double>(top) + std::log1p(sum) / call.inv_eps;
  }
}

template <class A>
void cost_range_rows(const CostRange& call, int64_t begin, int64_t end) {
  const Pairs& p = call.pairs;
  const A* const offset = static_cast<const A*>(call.offset);
  const Vec<A> scale(static_cast<A>(raw_scale(p))), none(static_cast<A>(kNoScore));
  const Vec<A> infinite = none.neg();
  Rows<A, kRows> tile;
  for (int64_t i = begin; i < end; i += kRows) {
    Vec<A> low[kRows], high[kRows], top[kRows];
    for (int r = 0; r < kRows; ++r) low[r] = infinite, high[r] = top[r] = none;
    for_tiles(
        p, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
          raw_costs<A, kRows>(p, i, j, count, tile);
          for (int r = 0; r < kRows; ++r)
            for (int64_t l = 0; l < count; l += kLanes<A>) {
              const Vec<A> o = load<A>(offset + j + l),
                           c = select(o == none, none, fmadd(load<A>(tile[r] + l), scale, o));
              low[r] = min_of(select(o == none, infinite, c), low[r]);
              high[r] = max_of(select(c < infinite, c, none), high[r]);
              top[r] = max_of(c, top[r]);
            }
        });
    for (int64_t r = 0; r < std::min<int64_t>(kRows, end - i); ++r) {
      call.low[i + r] = static_cast<double>(min_lane(low[r]));
      call.high[i + r] = static_cast<double>(max_lane(high[r]));
      call.top[i + r] = static_cast<double>(max_lane(top[r]));
    }
  }
}

// -- First derivatives by the points ----------------------------------------------------------------------------------

// Of one row, while its columns are visited: the sums of Q and of Q times x - y, or times its direction for euclidean.
struct Pull {
  double sum = 0;
  double* direction = nullptr;  // one a dimension
};

// What multiplies x - y: Q itself, or Q/|x - y| and 0 at 0.
template <class A>
TD_INLINE Vec<A> pull_of(Vec<A> q, Vec<A> distance, bool root) {
  return root ? select(distance > Vec<A>(A(0)), q / distance, Vec<A>(A(0))) : q;
}

// Two rows in few dimensions: their sums stay in registers.
constexpr int kPullRows = 2;
template <class A, int D>
void pull_few(const SoftMin& call, int64_t i, const A* guesses, Pull* out) {
  const Pairs& p = call.pairs;
  const A *const x = static_cast<const A*>(p.x), *const y = static_cast<const A*>(p.y),
                 *const score = static_cast<const A*>(call.score);
  const Vec<A> slope(static_cast<A>(-call.inv_eps * kLog2e * raw_scale(p)));
  Vec<A> xi[kPullRows][D];
  unrolled<kPullRows>([&](auto r) __attribute__((always_inline)) {
    unrolled<D>([&](auto k)
                    __attribute__((always_inline)) { xi[r][k] = Vec<A>(x[k * p.x_stride + row_of(p, i + r)]); });
  });
  const auto sums = [&](auto root) __attribute__((always_inline)) {
    for_tiles(
        p, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
          Vec<A> sum[kPullRows], direction[kPullRows][D];
          unrolled<kPullRows>([&](auto r) __attribute__((always_inline)) {
            sum[r] = Vec<A>(A(0));
            unrolled<D>([&](auto k) __attribute__((always_inline)) { direction[r][k] = Vec<A>(A(0)); });
          });
          for (int64_t l = j; l < j + count; l += kLanes<A>) {
            Vec<A> yk[D];
            unrolled<D>([&](auto k) __attribute__((always_inline)) { yk[k] = load<A>(y + k * p.y_stride + l); });
            const Vec<A> s = load<A>(score + l);
            unrolled<kPullRows>([&](auto r) __attribute__((always_inline)) {
              Vec<A> d[D], c(A(0));
              unrolled<D>([&](auto k) __attribute__((always_inline)) {
                d[k] = xi[r][k] - yk[k];
                c = fmadd(d[k], d[k], c);
              });
              if constexpr (decltype(root)::value) c = c.sqrt();
              const Vec<A> q = exp2_term<A>(fmadd(c, slope, s - Vec<A>(guesses[r])));
              sum[r] = sum[r] + q;
              const Vec<A> pull = pull_of<A>(q, c, decltype(root)::value);
              unrolled<D>([&](auto k)
                              __attribute__((always_inline)) { direction[r][k] = fmadd(pull, d[k], direction[r][k]); });
            });
          }
          unrolled<kPullRows>([&](auto r) __attribute__((always_inline)) {
            out[r].sum += sum_of(sum[r]);
            unrolled<D>([&](auto k) __attribute__((always_inline)) { out[r].direction[k] += sum_of(direction[r][k]); });
          });
        });
  };
  p.cost == kEuclidean ? sums(std::true_type()) : sums(std::false_type());
}

// kRows rows in any dimension: Q a tile at a time, then one dimension after the other.
template <class A>
void pull_many(const SoftMin& call, int64_t i, const A* guess, Pull* out) {
  const Pairs& p = call.pairs;
  const Layout<A> at(p);
  const A* const score = static_cast<const A*>(call.score);
  const Vec<A> slope(static_cast<A>(-call.inv_eps * kLog2e * raw_scale(p)));
  const bool root = p.cost == kEuclidean;
  Rows<A, kRows> tile;
  const A* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = at.row(row_of(p, i + r));
  for_tiles(
      p, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        raw_costs<A, kRows>(p, i, j, count, tile);
        for (int r = 0; r < kRows; ++r) {
          const Vec<A> near(guess[r]);
          Vec<A> sum(A(0));
          for (int64_t l = 0; l < count; l += kLanes<A>) {
            const Vec<A> c = load<A>(tile[r] + l), q = exp2_term<A>(fmadd(c, slope, load<A>(score + j + l) - near));
            sum = sum + q;
            pull_of<A>(q, c, root).store(tile[r] + l);
          }
          out[r].sum += sum_of(sum);
        }
        for (int64_t k = 0; k < p.dims; ++k) {
          Vec<A> xk[kRows], direction[kRows];
          unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
            xk[r] = Vec<A>(x[r][k * at.x_stride]);
            direction[r] = Vec<A>(A(0));
          });
          for (int64_t l = 0; l < count; l += kLanes<A>) {
            const Vec<A> yk = load<A>(at.column(j + l) + k * at.y_stride);
            unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
              direction[r] = fmadd(load<A>(tile[r] + l), xk[r] - yk, direction[r]);
            });
          }
          unrolled<kRows>([&](auto r) __attribute__((always_inline)) { out[r].direction[k] += sum_of(direction[r]); });
        }
      });
}

// As in a soft minimum, a guess too far off is replaced by the minimum itself.
template <class A>
void point_gradient_rows(const PointGradient& call, int64_t begin, int64_t end) {
  const Pairs& p = call.pairs;
  const auto directions = std::make_unique_for_overwrite<double[]>(static_cast<size_t>(kRows * p.dims));
  const double factor = p.cost == kSqEuclidean ? 2 : 1;
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, end - i);
    Pull pull[kRows];
    for (int64_t r = 0; r < kRows; ++r) pull[r].direction = directions.get() + r * p.dims;
    const auto visit = [&] {
      A guess[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        guess[r] = static_cast<A>(call.out[i + std::min(r, rows - 1)]);
        pull[r].sum = 0;
        std::fill_n(pull[r].direction, p.dims, 0.0);
      }
      const auto few = [&](auto visit_few) {
        for (int r = 0; r < kRows; r += kPullRows) visit_few(call, i + r, guess + r, pull + r);
      };
      switch (p.products ? 0 : p.dims) {
        case 1:
          return few(pull_few<A, 1>);
        case 2:
          return few(pull_few<A, 2>);
        case 3:
          return few(pull_few<A, 3>);
        case 4:
          return few(pull_few<A, 4>);
        default:
          return pull_many<A>(call, i, guess, pull);
      }
    };
    visit();
    if (!std::all_of(pull, pull + rows, [](const Pull& v) { return is_usable(v.sum); })) {
      soft_min_rows<A>(call, i, i + rows);
      visit();
    }
    A* to = static_cast<A*>(call.gradient) + i * p.dims;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < p.dims; ++k, ++to) *to = static_cast<A>(factor * pull[r].direction[k] / pull[r].sum);
  }
}

// -- Sums of pair weights ---------------------------------------------------------------------------------------------

// z e^z - e^z + 1, by its series (k - 1)/k! z^k near 0, where the direct form cancels.
template <class A>
TD_INLINE Vec<A> entropy_density(Vec<A> z, Vec<A> e) {
  constexpr int kTerms = 13;
  Vec<A> y(A(0));
  for (int k = kTerms + 1; k >= 2; --k) {
    double coefficient = k - 1;
    for (int l = 2; l <= k; ++l) coefficient /= l;
    y = fmadd(y, z, Vec<A>(static_cast<A>(coefficient)));
  }
  return select(z.abs() < Vec<A>(A(0.5)), y * z * z, fmadd(z, e, Vec<A>(A(1)) - e));
}

template <class A>
void pair_sweep_rows(const PairSweep& call, int64_t begin, int64_t end) {
  const Pairs& p = call.pairs;
  const A* const y = static_cast<const A*>(p.y);
  const A* const x = static_cast<const A*>(p.x);
  const Vec<A> zero(A(0)), one(A(1)), scale(static_cast<A>(raw_scale(p))), inv_eps(static_cast<A>(call.inv_eps)),
      log2e(static_cast<A>(kLog2e)), ln2(static_cast<A>(1 / kLog2e));
  // Only between two weightless atoms can e^z overflow and P become 0 * inf: z is cut where no other pair comes. Below
  // the floor e^z is 0, and stays so when multiplied by z: infinite costs are there.
  const Vec<A> cut(static_cast<A>(sizeof(A) == 4 ? 80. : 300.)), floor(A(-1e4));
  const bool points = p.cost != kCostMatrix, euclidean = p.cost == kEuclidean;
  const bool moves = points && (call.vx != nullptr || call.vy != nullptr);
  const bool wants_d = call.lambda != 0 && (moves || call.v_matrix != nullptr || call.veps != 0);
  const bool second = call.second && moves;
  // The factor of x - y in d1C; that of euclidean depends on the pair.
  const Vec<A> fixed_factor(static_cast<A>(p.cost == kSqEuclidean ? 2 : 1));
  Rows<A, 1> raw;
  // Of the tile: W, z, D, <x - y, vx - vy>, Q times the factor of d1C, and what multiplies vx - vy.
  A weight[kTile], exponent[kTile], change[kTile], along[kTile], pull[kTile], push[kTile];

  const auto width = static_cast<size_t>(std::max({p.dims, call.payload_dims, int64_t{1}}) * kLanes<A>);
  const auto buffer = std::make_unique_for_overwrite<A[]>(2 * width);
  A *const gradient = buffer.get(), *const product = gradient + width;
  const auto at = [](const void* v, int64_t k, int64_t stride, int64_t n) __attribute__((always_inline)) {
    return v == nullptr ? A(0) : static_cast<const A*>(v)[k * stride + n];
  };

  for (int64_t i = begin; i < end; ++i) {
    std::fill_n(buffer.get(), 2 * width, A(0));
    double sum = 0, sum_cost = 0, sum_z = 0, entropy = 0;
    const double a_i = call.a == nullptr ? 1 : call.a[i];
    const Vec<A> f(static_cast<A>(call.f[i])), a(static_cast<A>(a_i)),
        alpha(static_cast<A>(call.alpha + (call.alpha_row == nullptr ? 0 : call.alpha_row[i]))),
        row_p(static_cast<A>(call.p == nullptr ? 0 : call.p[i]));

    for_tiles(p, [&](int64_t j, int64_t count) {
      raw_costs<A, 1>(p, i, j, count, raw);
      const auto each = [&](const auto& body) __attribute__((always_inline)) {
        for (int64_t l = 0; l < count; l += kLanes<A>) body(l);
      };
      each([&](int64_t l) __attribute__((always_inline)) {
        const Vec<A> c = load<A>(raw[0] + l) * scale;
        // Of a NaN min_of and max_of take the second.
        const Vec<A> z = max_of(floor, min_of(cut, (f + (load_or_zero<A>(call.g, j + l) - c)) * inv_eps));
        z.store(exponent + l);
        exp2_of(z * log2e).store(weight + l);
      });
      if (wants_d) {
        each([&](int64_t l) __attribute__((always_inline)) { zero.store(along + l); });
        if (moves)
          for (int64_t k = 0; k < p.dims; ++k) {
            const Vec<A> xk(at(p.x, k, p.x_stride, i)), vk(at(call.vx, k, p.x_stride, i));
            each([&](int64_t l) __attribute__((always_inline)) {
              const Vec<A> d = xk - load<A>(y + k * p.y_stride + j + l),
                           v = vk - load_or_zero<A>(call.vy, k * p.y_stride + j + l);
              fmadd(d, v, load<A>(along + l)).store(along + l);
            });
          }
        if (call.v_matrix != nullptr) {
          for (int64_t l = 0; l < count; ++l)
            change[l] =
                j + l < p.cols ? static_cast<const A*>(call.v_matrix)[i * p.row_stride + (j + l) * p.col_stride] : A(0);
        } else {
          each([&](int64_t l) __attribute__((always_inline)) { zero.store(change + l); });
        }
      }
      const int64_t rank = call.rank;
      each([&](int64_t l) __attribute__((always_inline)) {
        const Vec<A> c = load<A>(raw[0] + l), z = load<A>(exponent + l), e = load<A>(weight + l),
                     b = load<A>(static_cast<const A*>(call.b) + j + l);
        Vec<A> factor = fixed_factor;
        if (euclidean) factor = select(c > zero, one / c, zero);
        Vec<A> bracket = alpha + load_or_zero<A>(call.beta, j + l);
        if (wants_d) {
          const Vec<A> d = load<A>(change + l) + factor * load<A>(along + l) + Vec<A>(static_cast<A>(call.veps)) * z;
          bracket = fmadd(Vec<A>(static_cast<A>(call.lambda)), d, bracket);
        }
        for (int64_t k = 0; k < rank; ++k)
          bracket = fmadd(Vec<A>(static_cast<const A*>(call.t)[k * p.x_stride + i]),
                          load<A>(static_cast<const A*>(call.v) + k * p.y_stride + j + l), bracket);
        const Vec<A> plan = e * a * b;
        const Vec<A> q = plan * bracket + e * (b * row_p + a * load_or_zero<A>(call.q, j + l));
        q.store(weight + l);
        Vec<A> pulled = q * factor;
        if (second) {
          (plan * factor).store(push + l);
          if (euclidean) pulled = pulled - plan * load<A>(along + l) * factor * factor * factor;
        }
        pulled.store(pull + l);
      });
      Vec<A> part_sum(A(0)), part_cost(A(0)), part_z(A(0));
      each([&](int64_t l) __attribute__((always_inline)) {
        const Vec<A> q = load<A>(weight + l);
        part_sum = part_sum + q;
        part_cost = fmadd(q, select(q == zero, zero, load<A>(raw[0] + l)), part_cost);
        part_z = fmadd(q, load<A>(exponent + l), part_z);
      });
      sum += sum_of(part_sum);
      sum_cost += sum_of(part_cost * scale);
      sum_z += sum_of(part_z);
      if (call.entropy != nullptr) {
        Vec<A> part(A(0));
        each([&](int64_t l) __attribute__((always_inline)) {
          const Vec<A> z = load<A>(exponent + l), b = load<A>(static_cast<const A*>(call.b) + j + l);
          part = fmadd(b, entropy_density<A>(z, exp2_of(z * log2e)), part);
        });
        entropy += sum_of(part);
      }
      if (call.gradient != nullptr)
        for (int64_t k = 0; k < p.dims; ++k) {
          const Vec<A> xk(x[k * p.x_stride + i]), vk(at(call.vx, k, p.x_stride, i));
          Vec<A> total = load<A>(gradient + k * kLanes<A>);
          each([&](int64_t l) __attribute__((always_inline)) {
            total = fmadd(load<A>(pull + l), xk - load<A>(y + k * p.y_stride + j + l), total);
          });
          if (second)
            each([&](int64_t l) __attribute__((always_inline)) {
              total = fmadd(load<A>(push + l), vk - load_or_zero<A>(call.vy, k * p.y_stride + j + l), total);
            });
          total.store(gradient + k * kLanes<A>);
        }
      for (int64_t k = 0; k < call.payload_dims; ++k) {
        Vec<A> total = load<A>(product + k * kLanes<A>);
        each([&](int64_t l) __attribute__((always_inline)) {
          total =
              fmadd(load<A>(weight + l), load<A>(static_cast<const A*>(call.payload) + k * p.y_stride + j + l), total);
        });
        total.store(product + k * kLanes<A>);
      }
      if (call.matrix_out != nullptr) {
        A* const out = static_cast<A*>(call.matrix_out) + i * p.row_stride + j * p.col_stride;
        for (int64_t l = 0; l < std::min(count, p.cols - j); ++l) out[l * p.col_stride] = weight[l];
      }
    });

    if (call.sum != nullptr) call.sum[i] = sum;
    if (call.sum_cost != nullptr) call.sum_cost[i] = sum_cost;
    if (call.sum_z != nullptr) call.sum_z[i] = sum_z;
    if (call.entropy != nullptr) call.entropy[i] = entropy;
    if (call.gradient != nullptr)
      for (int64_t k = 0; k < p.dims; ++k)
        static_cast<A*>(call.gradient)[i * p.dims + k] = static_cast<A>(sum_of(load<A>(gradient + k * kLanes<A>)));
    for (int64_t k = 0; k < call.payload_dims; ++k)
      static_cast<A*>(call.product)[i * call.payload_dims + k] =
          static_cast<A>(sum_of(load<A>(product + k * kLanes<A>)));
  }
}

}  // namespace

void sinkhorn_soft_min(const SoftMin& call, int64_t begin, int64_t end) {
  call.pairs.is_double ? soft_min_rows<double>(call, begin, end) : soft_min_rows<float>(call, begin, end);
}
void sinkhorn_soft_min_flat(const SoftMinFlat& call, int64_t begin, int64_t end) {
  call.pairs.is_double ? soft_min_flat_rows<double>(call, begin, end) : soft_min_flat_rows<float>(call, begin, end);
}
void sinkhorn_point_gradient(const PointGradient& call, int64_t begin, int64_t end) {
  call.pairs.is_double ? point_gradient_rows<double>(call, begin, end) : point_gradient_rows<float>(call, begin, end);
}
void sinkhorn_cost_range(const CostRange& call, int64_t begin, int64_t end) {
  call.pairs.is_double ? cost_range_rows<double>(call, begin, end) : cost_range_rows<float>(call, begin, end);
}
void sinkhorn_pair_sweep(const PairSweep& call, int64_t begin, int64_t end) {
  call.pairs.is_double ? pair_sweep_rows<double>(call, begin, end) : pair_sweep_rows<float>(call, begin, end);
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
