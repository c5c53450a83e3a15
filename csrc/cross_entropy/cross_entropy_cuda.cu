// CUDA kernels of cross-entropy; formulas in cross_entropy.h, teams and rows in core/cuda_rows.cuh.
//
// Class labels over logits: in float for float and the half types, with compensated sums; a row is read once. With
// label smoothing, where q - p' may be small beside both, in double. Two sides in logits of float and the half types
// without smoothing: H(P) + KL(P || Q), by the rows of entropy and kl_div, in float, but for P's gradient. Everything
// else, and the double backward: in double for all types.
#include <c10/macros/Macros.h>

#include "core/cuda_launch.cuh"
#include "core/cuda_row_pair.cuh"
#include "core/cuda_single_row.cuh"
#include "cross_entropy/cross_entropy.h"
#include "entropy/entropy_rows.cuh"
#include "kl_div/kl_div_rows.cuh"

namespace torch_divergence::cuda {
namespace {

// -- Both sides in logits, in float: H(P, Q) = H(P) + KL(P || Q) ----------------------------------------------------

// What such a row leaves: the divergence's statistics in the first places, and its loss.
struct LogitsStat {
  static constexpr int kSize = CrossEntropyStat::kSize;
  KlDivStat kl;
  double loss;

  __device__ void store(double* x) const {
    static_assert(KlDivStat::kSize <= CrossEntropyStat::kLoss);
    CrossEntropyStat stat{};
    stat.loss = loss;
    stat.store(x);
    kl.store(x);
  }
};

template <class TP, class TQ>
__global__ void __launch_bounds__(kThreads, kBlocks<TP>)
    forward_logits(const CrossEntropyForward k, const RowGrid grid, double* workspace, int launch) {
  using Rows = LogitRows<TP, TQ>;
  forward_row(k, grid, workspace, launch, &LogitsStat::loss, [&](const RowTask& task, LogitsStat& stat) {
    Rows rows(k.rows, task.row);
    const Pieces pieces(k.rows.classes, rows.p, rows.q);
    const double inv_t = inverse_temperature<typename Rows::A>(k.rows.temperature);
    EntropyStat entropy{};
    if (!entropy_of_logits<TP>(task, 0, rows.p, pieces, inv_t, entropy)) return false;
    if (!kl_of_logits(task, 1, rows, pieces, inv_t, stat.kl)) return false;
    stat.loss = entropy.entropy + stat.kl.kl;
    return true;
  });
}

template <class TP, class TQ>
__global__ void __launch_bounds__(kThreads, kBlocks<TP>)
    backward_logits(const CrossEntropyBackward k, const RowGrid grid, double* workspace, int launch) {
  kl_gradients<TP, TQ, CrossEntropyStat::kSize>(k, grid, workspace, launch);
}

// -- The target is a distribution, any space ------------------------------------------------------------------------

// Both sides of a row with what its statistics tell of them.
template <class T>
struct Distributions {
  static constexpr int K = kPiece<T>;
  struct Entry {
    double t, x, p, q, n_p, n;
  };

  const CrossEntropyRows& rows;
  RowPointer<const char> p, q;
  double inv_t, uniform, keep;
  NegLog p_side, q_side;
  CrossEntropyStat stat{};
  Split<double> centre{0};

  __device__ Distributions(const CrossEntropyRows& rows_, int64_t row)
      : rows(rows_),
        p(rows_.p, row),
        q(rows_.q, row),
        inv_t(1 / rows_.temperature),
        uniform(rows_.smoothing / static_cast<double>(rows_.classes)),
        keep(1 - rows_.smoothing),
        p_side(rows_.p_space, inv_t, {}),
        q_side(rows_.q_space, inv_t, {}) {}
  __device__ void set(const CrossEntropyStat& known) {
    stat = known;
    p_side.top = stat.top_p, p_side.log_z = stat.log_z_p;
    q_side.top = stat.top_q, q_side.log_z = stat.log_z_q;
    const ExactSum c = two_sum(stat.top_p, -stat.base);
    centre = Split<double>(c.sum, c.error);
  }

  // f(entry, k) for the classes of a piece.
  template <class F>
  __device__ __forceinline__ void for_classes(const Pieces& pieces, const Piece<T>& piece, const F& f) const {
    double t[K], x[K];
    load_piece(p, pieces, piece, p_side.padding, t);
    load_piece(q, pieces, piece, q_side.padding, x);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const auto of_p = p_side(t[k]), of_q = q_side(x[k]);
      f(Entry{t[k], x[k], of_p.prob, of_q.prob, of_p.neg_log, of_q.neg_log}, k);
    }
  }

  // n around its value at P's largest class; for P in logits.
  __device__ double around(const Entry& e) const {
    return q_side.space == kLogits ? (stat.base - e.x) * inv_t : e.n + stat.base;
  }
  // u of both sides in logits
  __device__ double difference(const Entry& e) const { return difference_minus(e.t, e.x, centre) * inv_t; }
  // p'
  __device__ double target(const Entry& e) const { return rows.smoothing == 0 ? e.p : e.p * keep + uniform; }

  // Gradients of an entry, before the row's coefficient.
  __device__ double gradient_q(const Entry& e) const {
    const double mixed = target(e);
    if (q_side.space == kLogProbs) return -mixed;
    if (q_side.space == kProbs) return mixed == 0 ? 0 : -mixed / e.q;
    if (rows.from_logits() && rows.smoothing == 0) {
      const double l = difference(e) + stat.near;
      if (std::fabs(l) < 0.5) return e.p * std::expm1(-l) * inv_t;
    }
    return (e.q * stat.mixed_mass(rows) - mixed) * inv_t;
  }
  __device__ double gradient_p(const Entry& e) const {
    if (p_side.space == kLogits)
      return e.p == 0 || std::isinf(stat.plain) ? 0 : e.p * (around(e) - stat.mean) * inv_t * keep;
    if (e.p == 0 && e.n == kInf<double>) return 0;  // a class that neither side has
    return (p_side.space == kLogProbs ? share(e.p, e.n) : e.n) * keep;
  }
};

// The largest entries of both sides, where they are in logits, and the first class that has P's.
struct Tops {
  TopScan p, q;
  double at = 0;

  __device__ static Tops load(const double* x) { return {{x[0], x[1], x[2]}, {x[3], x[4], x[5]}, x[6]}; }
  __device__ void store(double* x) const {
    x[0] = p.top, x[1] = p.ties, x[2] = p.below, x[3] = q.top, x[4] = q.ties, x[5] = q.below, x[6] = at;
  }
};
__device__ Tops merged(const Team& team, Tops part, double inv_t) {
  double top[2] = {part.p.top, part.q.top};
  team.max(top);
  double first[1] = {part.p.top == top[0] ? -part.at : -kInf<double>};
  team.max(first);
  part.p.raise(top[0], inv_t), part.q.raise(top[1], inv_t);
  double sums[4] = {part.p.ties, part.p.below, part.q.ties, part.q.below};
  team.sum(sums);
  return {{top[0], sums[0], sums[1]}, {top[1], sums[2], sums[3]}, -first[0]};
}

// A thread's entries of one side.
template <class T>
__device__ void scan_piece(const double (&x)[kPiece<T>], double inv_t, TopScan& scan) {
  double top = x[0];
#pragma unroll
  for (int k = 1; k < kPiece<T>; ++k) top = x[k] > top ? x[k] : top;
  scan.raise(top, inv_t);
  double ties = 0, below = 0;
#pragma unroll
  for (int k = 0; k < kPiece<T>; ++k) {
    if (x[k] == scan.top) {
      ties += x[k] == -kInf<double> ? 0 : 1;
    } else {
      below += std::exp((x[k] - scan.top) * inv_t);
    }
  }
  scan.ties += ties, scan.below += below;
}

// A row's statistics in double, by reductions `number` and the next. False: they are left to the next launch.
template <class T>
__device__ bool statistics(const RowTask& task, int number, const Pieces& pieces, Distributions<T>& row) {
  constexpr int K = kPiece<T>;
  const CrossEntropyRows& rows = row.rows;
  const bool p_logits = rows.p_space == kLogits, q_logits = rows.q_space == kLogits;
  CrossEntropyStat stat{};
  if (p_logits || q_logits) {
    Tops tops;
    const auto part = [&] {
      Tops mine;
      task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
        double v[K];
        if (p_logits) {
          const double before = mine.p.top;
          load_piece(row.p, pieces, piece, -kInf<double>, v);
          scan_piece<T>(v, row.inv_t, mine.p);
          if (mine.p.top > before) {
#pragma unroll
            for (int i = K; i-- > 0;)
              if (v[i] == mine.p.top) mine.at = static_cast<double>(piece.at(i));
          }
        }
        if (q_logits) {
          load_piece(row.q, pieces, piece, -kInf<double>, v);
          scan_piece<T>(v, row.inv_t, mine.q);
        }
      });
      return mine;
    };
    if (!task.reduce(number, tops, part, [&](const Tops& x) { return merged(task.team, x, row.inv_t); })) return false;
    if (q_logits) {
      const LogSum sum = tops.q.finish();
      stat.top_q = sum.top, stat.log_z_q = sum.log_z;
    }
    if (p_logits) {
      const LogSum sum = tops.p.finish();
      stat.top_p = sum.top, stat.log_z_p = sum.log_z;
      const double x = load_entry<T>(row.q, static_cast<int64_t>(tops.at));
      stat.base = rows.q_space == kProbs ? std::log(x) : x;
    }
  }
  row.set(stat);
  Sums<5> sums;
  const auto part = [&] {
    Sum<double> plain, mean, mass, all, grown;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      Sums<5> of_piece;
      auto& [plain_, mean_, mass_, all_, grown_] = of_piece.x;
      row.for_classes(pieces, piece, [&](const auto& e, int i) {
        // A p that only underflowed meets q = 0 with +inf.
        plain_ += e.p == 0 && e.n_p < kInf<double> && e.n == kInf<double> ? e.n : share(e.p, e.n);
        if (p_logits) mean_ += share(e.p, row.around(e));
        mass_ += e.p;
        if (rows.smoothing != 0) all_ += piece.at(i) >= 0 && piece.at(i) < pieces.classes ? e.n : 0;
        if (p_logits && q_logits) {
          // E_p[expm1(-u)]; far from 0 as p e^-u - p, with p e^-u = e^((x - base)/T - log_z_p), right where p is 0 too.
          const double u = row.difference(e);
          grown_ +=
              std::fabs(u) < 0.5 ? e.p * std::expm1(-u) : std::exp((e.x - stat.base) * row.inv_t - stat.log_z_p) - e.p;
        }
      });
      plain.add(plain_), mean.add(mean_), mass.add(mass_), all.add(all_), grown.add(grown_);
    });
    return Sums<5>{{plain.value(), mean.value(), mass.value(), all.value(), grown.value()}};
  };
  if (!task.reduce(number + 1, sums, part, [&](const Sums<5>& x) { return merged(task.team, x); })) return false;
  stat.plain = sums.x[0], stat.mean = sums.x[1], stat.mass = p_logits ? 1 : sums.x[2];
  stat.near = std::log1p(sums.x[4]);
  stat.set_loss(rows, sums.x[3]);
  row.set(stat);
  return true;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_any(const CrossEntropyForward k, const RowGrid grid, double* workspace, int launch) {
  forward_row(k, grid, workspace, launch, &CrossEntropyStat::loss, [&](const RowTask& task, CrossEntropyStat& stat) {
    Distributions<T> row(k.rows, task.row);
    const Pieces pieces(k.rows.classes, row.p, row.q);
    if (!statistics(task, 0, pieces, row)) return false;
    stat = row.stat;
    return true;
  });
}

// The statistics in double that a row left, or, if it left the float family's, found again.
template <class T>
__device__ bool double_statistics(const RowTask& task, int number, const Pieces& pieces, const double* left,
                                  Distributions<T>& row) {
  if (row.rows.by_logits()) return statistics(task, number, pieces, row);
  row.set(CrossEntropyStat::load(left + CrossEntropyStat::kSize * task.row));
  return true;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_any(const CrossEntropyBackward k, const RowGrid grid, double* workspace, int launch) {
  using Row = Distributions<T>;
  constexpr int K = Row::K;
  backward_pair<T, T, Row>(k, grid, workspace, launch, [&](const RowTask& task, BackwardPair<Row>& pair) {
    Row& row = pair.rows;
    if (!double_statistics(task, 0, pair.pieces, k.stat, row)) return;
    task.for_pieces<T>(pair.pieces, [&](const Piece<T>& piece) {
      double g_p[K], g_q[K];
      row.for_classes(pair.pieces, piece, [&](const auto& e, int i) {
        g_p[i] = pair.coefficient * row.gradient_p(e);
        g_q[i] = pair.coefficient * row.gradient_q(e);
      });
      pair.store(piece, g_p, g_q);
    });
  });
}

// With dots for derivatives along (v_p, v_q): (log p). = (v - <p,v>)/T | v | v/p for logits | log_probs | probs, and
// n. = -(log q)., p. = p (log p). (v for probs), p'. = (1 - s) p., M'. = sum p'.:
//   P's gradient.   (1 - s) times: [p. (n - N) + p (n. - N.)]/T | p. n + p n. | n.
//   Q's gradient.   [q (log q). M' + q M'. - p'.]/T | -p'. | (p' (log q). - p'.)/q
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    double_backward(const CrossEntropyDoubleBackward k, const RowGrid grid, double* workspace, int launch) {
  constexpr int K = kPiece<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  DoubleBackwardPair<T, Distributions<T>> pair(k, task.row);
  Distributions<T>& row = pair.rows;
  const Pieces& pieces = pair.pieces;
  if (!double_statistics(task, 0, pieces, k.stat, row)) return;
  const double inv_t = row.inv_t;
  const int p_space = k.rows.p_space, q_space = k.rows.q_space;
  // f(entry, v_p, v_q, k) for the classes of a piece.
  const auto for_classes = [&](const Piece<T>& piece, const auto& f) {
    double v_p[K], v_q[K];
    pair.load_directions(piece, v_p, v_q);
    row.for_classes(pieces, piece, [&](const auto& e, int i) { f(e, v_p[i], v_q[i], i); });
  };
  Sums<3> means;
  const auto part_means = [&] {
    Sums<3> sums;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      for_classes(piece, [&](const auto& e, double v_p, double v_q, int) {
        sums.x[0] += p_space == kProbs ? v_p : e.p * v_p;
        sums.x[1] += e.q * v_q;
        sums.x[2] += (v_p == 0 ? 0 : v_p * row.gradient_p(e)) + (v_q == 0 ? 0 : v_q * row.gradient_q(e));
      });
    });
    return sums;
  };
  if (!task.reduce(2, means, part_means, [&](const auto& x) { return merged(task.team, x); })) return;
  if (!pair.more_than(k, task, means.x[2])) return;
  const double mean_p = means.x[0], mean_q = means.x[1];
  const auto dots = [&](const auto& e, double v_p, double v_q, double& p_dot, double& log_q_dot) {
    p_dot = p_space == kProbs ? v_p : e.p * (p_space == kLogits ? (v_p - mean_p) * inv_t : v_p);
    log_q_dot = q_space == kLogits ? (v_q - mean_q) * inv_t : q_space == kProbs ? v_q / e.x : v_q;
    if (e.n == kInf<double>) log_q_dot = 0;
  };
  // N. = sum p. n + p n.; from logits p. sums to 0, and any origin of n will do.
  Sums<1> n_dots;
  if (p_space == kLogits) {
    const auto part_dots = [&] {
      Sums<1> sums;
      task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
        for_classes(piece, [&](const auto& e, double v_p, double v_q, int) {
          double p_dot, log_q_dot;
          dots(e, v_p, v_q, p_dot, log_q_dot);
          sums.x[0] += share(p_dot, row.around(e)) - e.p * log_q_dot;
        });
      });
      return sums;
    };
    if (!task.reduce(3, n_dots, part_dots, [&](const auto& x) { return merged(task.team, x); })) return;
  }
  const double c = pair.coefficient, n_dot = n_dots.x[0], mass = row.stat.mixed_mass(k.rows),
               mass_dot = p_space == kLogits ? 0 : row.keep * mean_p;
  task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    double h_p[K], h_q[K];
    for_classes(piece, [&](const auto& e, double v_p, double v_q, int i) {
      double p_dot, log_q_dot;
      dots(e, v_p, v_q, p_dot, log_q_dot);
      double h;
      if (p_space == kProbs) {
        h = -log_q_dot;
      } else if (e.p == 0 || (p_space == kLogits && std::isinf(row.stat.plain))) {
        h = 0;
      } else if (p_space == kLogits) {
        h = (p_dot * (row.around(e) - row.stat.mean) - e.p * (log_q_dot + n_dot)) * inv_t;
      } else {
        h = p_dot * e.n - e.p * log_q_dot;
      }
      h_p[i] = c * h * row.keep;
      const double mixed_dot = row.keep * p_dot;
      if (q_space == kLogits) {
        h = (e.q * (log_q_dot * mass + mass_dot) - mixed_dot) * inv_t;
      } else if (q_space == kLogProbs) {
        h = -mixed_dot;
      } else {
        h = e.q == 0 ? 0 : (row.target(e) * log_q_dot - mixed_dot) / e.q;
      }
      h_q[i] = c * h;
    });
    pair.store(piece, h_p, h_q);
  });
}

// -- The target is a class label, over logits -----------------------------------------------------------------------

// The label of a row that is read.
__device__ int64_t label_of(const LabelRows& rows, int64_t row) {
  const int64_t label = rows.labels[row];
  CUDA_KERNEL_ASSERT(label >= 0 && label < rows.classes && "cross_entropy: target is no class");
  return label;
}

// What label smoothing computes in is double.
template <class T, bool kSmooth>
using LabelArithmetic = std::conditional_t<kSmooth, double, Arithmetic<T>>;

// f(k) where class piece.at(k) is the label: once, or not at all.
template <class T, class F>
__device__ __forceinline__ void at_label(const Piece<T>& piece, int64_t label, const F& f) {
  constexpr int R = kRun<T>;
#pragma unroll
  for (int r = 0; r < kPiece<T>; r += R) {
    const int64_t in_run = label - piece.at(r);
    if (in_run >= 0 && in_run < R) {
#pragma unroll
      for (int k = 0; k < R; ++k)
        if (in_run == k) f(r + k);
    }
  }
}

// A thread's sums of LabelScan.
template <class A>
class ThreadLabel {
 public:
  __device__ explicit ThreadLabel(double inv_t) : exp_(inv_t) {}
  template <int K>
  __device__ __forceinline__ void add(const A (&x)[K]) {
    A most = x[0];
#pragma unroll
    for (int k = 1; k < K; ++k) most = x[k] > most ? x[k] : most;
    if (most > max_) {
      sum_ *= exp_(max_ - most);
      max_ = most;
    }
    const A max = max_ == -kInf<A> ? 0 : max_;
    A sum = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) sum += exp_(x[k] - max);
    sum_.add(sum);
  }
  __device__ A max() const { return max_; }
  __device__ LabelScan sums() const { return {static_cast<double>(max_), sum_.value()}; }

 private:
  A max_ = -kInf<A>;
  Sum<A> sum_;
  Exp<A> exp_;
};

// LabelScan, as a segment leaves it.
struct RowLabel : LabelScan {
  __device__ static RowLabel load(const double* x) { return {{x[0], x[1], x[2], x[3]}}; }
  __device__ void store(double* x) const { x[0] = max, x[1] = sum, x[2] = count, x[3] = drop; }
};
template <bool kSmooth>
__device__ RowLabel merged_label(const Team& team, RowLabel part, double inv_t) {
  double top[1] = {part.max};
  team.max(top);
  part.raise(top[0], inv_t);
  if constexpr (kSmooth) {
    double sums[3] = {part.sum, part.count, part.drop};
    team.sum(sums);
    return {{top[0], sums[0], sums[1], sums[2]}};
  } else {
    double sums[1] = {part.sum};
    team.sum(sums);
    return {{top[0], sums[0]}};
  }
}

template <class T, bool kSmooth>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    forward_labels(const LabelForward k, const RowGrid grid, double* workspace, int launch) {
  using A = LabelArithmetic<T, kSmooth>;
  constexpr int K = kPiece<T>;
  forward_row(k, grid, workspace, launch, &LabelStat::loss, [&](const RowTask& task, LabelStat& stat) {
    const double inv_t = inverse_temperature<A>(k.rows.temperature);
    const int64_t label = label_of(k.rows, task.row);
    RowPointer<const char> row(k.rows.x, task.row);
    const Pieces pieces(k.rows.classes, row);
    RowLabel whole;
    const auto part = [&] {
      ThreadLabel<A> thread(inv_t);
      RowLabel dropped;
      task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
        A x[K];
        load_piece(row, pieces, piece, -kInf<A>, x);
        double drop = 0;
        [[maybe_unused]] int count = 0;
        A own = -kInf<A>;
        at_label<T>(piece, label, [&](int at) { own = x[at], x[at] = -kInf<A>; });
        thread.add(x);
        if constexpr (kSmooth) {
          // Around the thread's largest so far; all classes count, the label's too.
          dropped.raise(thread.max(), inv_t);
          at_label<T>(piece, label, [&](int at) { x[at] = own; });
#pragma unroll
          for (int i = 0; i < K; ++i)
            if (piece.at(i) >= 0 && piece.at(i) < pieces.classes) {
              drop += (dropped.centre() - x[i]) * inv_t;
              ++count;
            }
          dropped.drop += drop, dropped.count += count;
        }
      });
      RowLabel sums{thread.sums()};
      sums.count = dropped.count, sums.drop = dropped.drop;
      return sums;
    };
    if (!task.reduce(0, whole, part, [&](const RowLabel& x) { return merged_label<kSmooth>(task.team, x, inv_t); }))
      return false;
    stat = whole.finish(load_entry<T>(row, label), inv_t, k.rows.smoothing, k.rows.classes);
    return true;
  });
}

template <class T, bool kSmooth>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_labels(const LabelBackward k, const RowGrid grid, double* workspace, int launch) {
  using A = LabelArithmetic<T, kSmooth>;
  constexpr int K = kPiece<T>;
  backward_row<T>(k, grid, workspace, launch, [&](const RowTask& task, const BackwardRow& row) {
    const int64_t label = label_of(k.rows, task.row);
    const auto stat = LabelStat::load(k.stat + LabelStat::kSize * task.row);
    const double inv_t = inverse_temperature<A>(k.rows.temperature), c = row.coefficient * inv_t;
    const A own = static_cast<A>(row.coefficient * label_gradient(k.rows, stat, inv_t)),
            base = static_cast<A>(stat.base == -kInf<double> ? 0 : stat.base),
            factor = static_cast<A>(c * std::exp(-stat.log_z)),
            uniform = static_cast<A>(c * k.rows.smoothing / static_cast<double>(k.rows.classes));
    const Exp<A> exp(inv_t);
    task.for_pieces<T>(row.pieces, [&](const Piece<T>& piece) {
      A x[K];
      load_piece(row.x, row.pieces, piece, -kInf<A>, x);
#pragma unroll
      for (int i = 0; i < K; ++i) {
        x[i] = exp(x[i] - base) * factor;
        if constexpr (kSmooth) x[i] -= uniform;
      }
      at_label<T>(piece, label, [&](int at) { x[at] = own; });
      store_piece(row.grad, row.pieces, piece, x);
    });
  });
}

// -- The target is a class label, over log-probabilities or probabilities -------------------------------------------

// p' of the classes other than the label, what the label has more, and derivatives of -p' log q in an entry x of Q.
struct FreeLabel {
  bool probs;
  double uniform, own;

  __device__ explicit FreeLabel(const LabelRows& rows)
      : probs(rows.space == kProbs),
        uniform(rows.smoothing / static_cast<double>(rows.classes)),
        own(1 - rows.smoothing) {}
  __device__ double of_label() const { return uniform + own; }
  __device__ double gradient(double x, double p) const { return p == 0 ? 0 : probs ? -p / x : -p; }
  // along v
  __device__ double second(double x, double p, double v) const { return p == 0 || !probs ? 0 : p * v / (x * x); }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    forward_labels_free(const LabelForward k, const RowGrid grid, double* workspace, int launch) {
  constexpr int K = kPiece<T>;
  forward_row(k, grid, workspace, launch, &LabelStat::loss, [&](const RowTask& task, LabelStat& stat) {
    const int64_t label = label_of(k.rows, task.row);
    RowPointer<const char> row(k.rows.x, task.row);
    const Pieces pieces(k.rows.classes, row);
    const bool probs = k.rows.space == kProbs, smooth = k.rows.smoothing != 0;
    Sums<1> all;
    const auto part = [&] {
      Sum<double> sum;
      task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
        double x[K], terms = 0;
        load_piece(row, pieces, piece, probs ? 1.0 : 0.0, x);
#pragma unroll
        for (int i = 0; i < K; ++i) {
          if (smooth) {
            terms -= probs ? std::log(x[i]) : x[i];
          } else if (probs ? !(x[i] >= 0) : std::isnan(x[i])) {
            terms = std::numeric_limits<double>::quiet_NaN();
          }
        }
        sum.add(terms);
      });
      return Sums<1>{{sum.value()}};
    };
    if (!task.reduce(0, all, part, [&](const auto& x) { return merged(task.team, x); })) return false;
    stat = free_label_stat(k.rows, load_entry<T>(row, label), all.x[0]);
    return true;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    backward_labels_free(const LabelBackward k, const RowGrid grid, double* workspace, int launch) {
  constexpr int K = kPiece<T>;
  backward_row<T>(k, grid, workspace, launch, [&](const RowTask& task, const BackwardRow& row) {
    const int64_t label = label_of(k.rows, task.row);
    const FreeLabel target(k.rows);
    const double own = row.coefficient * target.gradient(load_entry<T>(row.x, label), target.of_label());
    task.for_pieces<T>(row.pieces, [&](const Piece<T>& piece) {
      double x[K] = {};
      if (target.uniform != 0) load_piece(row.x, row.pieces, piece, 1.0, x);
#pragma unroll
      for (int i = 0; i < K; ++i) x[i] = row.coefficient * target.gradient(x[i], target.uniform);
      at_label<T>(piece, label, [&](int at) { x[at] = own; });
      store_piece(row.grad, row.pieces, piece, x);
    });
  });
}

// -- The target is a class label: double backward -------------------------------------------------------------------

// From logits H v = q (v - <q, v>)/T^2; by differences from v_y, in which the label's own part is the sum of the
// others'.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    double_backward_labels(const LabelDoubleBackward k, const RowGrid grid, double* workspace, int launch) {
  constexpr int K = kPiece<T>;
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  RowPointer<const char> row_x(k.rows.x, task.row), row_v(k.v, task.row);
  RowPointer<char> d_x(k.d_x, task.row);
  const Pieces pieces(k.rows.classes, row_x, row_v, d_x);
  const double coefficient = k.coefficient[task.row];
  const LabelRows& rows = k.rows;
  int64_t label = rows.labels[task.row];
  if (coefficient == 0 && (label < 0 || label >= rows.classes)) {  // a row that was left out
    if (!task.first_launch()) return;
    if (k.d_coefficient != nullptr && task.writes()) k.d_coefficient[task.row] = 0;
    return store_zeros<T>(task, d_x, pieces);
  }
  label = label_of(rows, task.row);
  const auto stat = LabelStat::load(k.stat + LabelStat::kSize * task.row);
  const bool logits = rows.space == kLogits;
  // The one that the statistics were made with.
  const double inv_t = std::is_same_v<T, double> || rows.smoothing != 0 ? 1 / rows.temperature
                                                                        : inverse_temperature<float>(rows.temperature);
  const FreeLabel target(rows);
  const double v_label = load_entry<T>(row_v, label), base = stat.base == -kInf<double> ? 0 : stat.base;
  // f(q, v - v_y, k) | f(x, v, k) for the classes of a piece of logits | of another space.
  const auto for_classes = [&](const Piece<T>& piece, const auto& f) {
    double x[K], v[K];
    load_piece(row_x, pieces, piece, logits ? -kInf<double> : 1.0, x);
    load_piece(row_v, pieces, piece, logits ? v_label : 0.0, v);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if (logits) {
        f(std::exp((x[i] - base) * inv_t - stat.log_z), v[i] - v_label, i);
      } else {
        f(x[i], v[i], i);
      }
    }
  };
  Sums<2> sums;
  const auto part = [&] {
    Sums<2> x;
    task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
      for_classes(piece, [&](double q, double v, int) {
        if (logits) {
          x.x[0] += q * v, x.x[1] += v;
        } else {
          x.x[0] += v == 0 ? 0 : v * target.gradient(q, target.uniform);
        }
      });
    });
    return x;
  };
  if (!task.reduce(0, sums, part, [&](const auto& x) { return merged(task.team, x); })) return;
  if (k.d_coefficient != nullptr && task.writes()) {
    // <v, q - p'> = sum q (v - v_y) - s/K sum (v - v_y)
    k.d_coefficient[task.row] =
        logits ? (sums.x[0] - target.uniform * sums.x[1]) * inv_t
               : sums.x[0] + (v_label == 0 ? 0 : v_label * target.gradient(load_entry<T>(row_x, label), target.own));
  }
  if (d_x.data == nullptr) return;
  if (coefficient == 0) return store_zeros<T>(task, d_x, pieces);
  const double c = coefficient * (logits ? inv_t * inv_t : 1), mean = sums.x[0],
               own = logits ? 0 : target.second(load_entry<T>(row_x, label), target.of_label(), v_label);
  task.for_pieces<T>(pieces, [&](const Piece<T>& piece) {
    double h[K];
    for_classes(piece, [&](double q, double v, int i) {
      h[i] = c * (logits ? q * (v - mean) : target.second(q, target.uniform, v));
    });
    if (!logits) at_label<T>(piece, label, [&](int at) { h[at] = c * own; });
    store_piece(d_x, pieces, piece, h);
  });
}

// -- Launchers ------------------------------------------------------------------------------------------------------

constexpr int kForward = 3, kBackward = 2, kBackwardLogits = 3, kDoubleBackward = 4;  // reductions

// f.template operator()<T, kSmooth>()
template <class F>
void dispatch_label(const LabelRows& rows, const F& f) {
  if (rows.smoothing == 0) return dispatch_type(rows.x.dtype, [&]<class T>() { f.template operator()<T, false>(); });
  dispatch_any(rows.x.dtype, [&]<class T>() { f.template operator()<T, true>(); });
}

}  // namespace

int64_t cross_entropy_workspace(int64_t rows, int64_t classes) {
  return RowGrid(rows, classes).workspace(kDoubleBackward);
}

void cross_entropy_forward(const CrossEntropyForward& k, int64_t rows, double* workspace, Stream stream) {
  if (k.rows.by_logits()) {
    return dispatch_float_types(k.rows, [&]<class TP, class TQ>() {
      launch_rows(&forward_logits<TP, TQ>, k, rows, workspace, stream, kForward);
    });
  }
  dispatch_any(k.rows.p.dtype, [&]<class T>() { launch_rows(&forward_any<T>, k, rows, workspace, stream, 2); });
}

void cross_entropy_backward(const CrossEntropyBackward& k, int64_t rows, double* workspace, Stream stream) {
  if (k.rows.by_logits() && k.grad_p.data == nullptr) {
    return dispatch_float_types(k.rows, [&]<class TP, class TQ>() {
      launch_rows(&backward_logits<TP, TQ>, k, rows, workspace, stream, kBackwardLogits);
    });
  }
  dispatch_any(k.rows.p.dtype, [&]<class T>() {
    launch_rows(&backward_any<T>, k, rows, workspace, stream, k.rows.by_logits() ? kBackward : 0);
  });
}

void cross_entropy_double_backward(const CrossEntropyDoubleBackward& k, int64_t rows, double* workspace,
                                   Stream stream) {
  dispatch_any(k.rows.p.dtype,
               [&]<class T>() { launch_rows(&double_backward<T>, k, rows, workspace, stream, kDoubleBackward); });
}

int64_t cross_entropy_labels_workspace(int64_t rows, int64_t classes) { return RowGrid(rows, classes).workspace(1); }

void cross_entropy_labels_forward(const LabelForward& k, int64_t rows, double* workspace, Stream stream) {
  if (k.rows.space != kLogits)
    return dispatch_any(k.rows.x.dtype,
                        [&]<class T>() { launch_rows(&forward_labels_free<T>, k, rows, workspace, stream, 1); });
  dispatch_label(k.rows, [&]<class T, bool kSmooth>() {
    launch_rows(&forward_labels<T, kSmooth>, k, rows, workspace, stream, 1);
  });
}

void cross_entropy_labels_backward(const LabelBackward& k, int64_t rows, double* workspace, Stream stream) {
  if (k.rows.space != kLogits)
    return dispatch_any(k.rows.x.dtype,
                        [&]<class T>() { launch_rows(&backward_labels_free<T>, k, rows, workspace, stream, 0); });
  dispatch_label(k.rows, [&]<class T, bool kSmooth>() {
    launch_rows(&backward_labels<T, kSmooth>, k, rows, workspace, stream, 0);
  });
}

void cross_entropy_labels_double_backward(const LabelDoubleBackward& k, int64_t rows, double* workspace,
                                          Stream stream) {
  dispatch_any(k.rows.x.dtype,
               [&]<class T>() { launch_rows(&double_backward_labels<T>, k, rows, workspace, stream, 1); });
}

}  // namespace torch_divergence::cuda
