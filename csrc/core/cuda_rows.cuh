// What the row-wise CUDA kernels share: teams of threads and their reductions, rows in 128-bit pieces, long rows split
// over blocks.
//
// A row is worked on by a team: a warp where rows are short, else a block. Where rows are few and long, a row is split
// into segments, a block each, and every reduction over the row ends a launch: the next launch merges the segments'
// results, in their order, from a workspace. So all sums have a fixed order, without atomics and without waiting.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/cuda_math.cuh"
#include "core/rows.h"

namespace torch_divergence::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 256;  // of a block
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks that a multiprocessor's registers must have room for. Without a number ptxas spills double's to make it two.
template <class T>
inline constexpr int kBlocks = std::is_same_v<T, double> ? 1 : 2;

struct Team {
  int size;  // kWarp or kThreads
  int rank;

  // x[n] becomes op over the team of x[n], for all of its threads. All must call.
  template <class T, int N, class Op>
  __device__ void reduce(T (&x)[N], const Op& op) const {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int n = 0; n < N; ++n) x[n] = op(x[n], __shfl_xor_sync(kAllLanes, x[n], offset));
    }
    if (size == kWarp) return;
    __shared__ T parts[kWarps][N];
    if (rank % kWarp == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) parts[rank / kWarp][n] = x[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      x[n] = parts[0][n];
      for (int w = 1; w < kWarps; ++w) x[n] = op(x[n], parts[w][n]);
    }
    __syncthreads();  // the next reduction writes parts again
  }
  __device__ void sync() const {
    if (size == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  template <int N>
  __device__ void sum(double (&x)[N]) const {
    reduce(x, [](double a, double b) { return a + b; });
  }
  template <class A, int N>
  __device__ void max(A (&x)[N]) const {
    reduce(x, [](A a, A b) { return b > a ? b : a; });
  }
};

// -- Rows in pieces -------------------------------------------------------------------------------------------------

// A type that is known when the kernel runs: float, Half or BFloat16.
struct AnyFloat {};

// How many classes of type T a thread takes at once.
template <class T>
inline constexpr int kPiece = std::is_same_v<T, double> ? 4 : 8;
// How many of them are neighbours: 16 bytes, so that a warp's 128-bit accesses lie side by side.
template <class T>
inline constexpr int kRun = std::is_same_v<T, double>  ? 2
                            : std::is_same_v<T, float> ? 4
                                                       : 8;

// 16 bytes of T in memory, as values of A. __ldg and __stwb because nvcc splits plain 128-bit accesses.
template <class T>
struct Pack {  // c10::Half, c10::BFloat16
  static constexpr int kSize = 8;
  template <class A>
  __device__ static void load(const T* p, A* x) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = static_cast<float>(T(static_cast<uint16_t>(words[k] & 0xffffu), T::from_bits()));
      x[2 * k + 1] = static_cast<float>(T(static_cast<uint16_t>(words[k] >> 16), T::from_bits()));
    }
  }
  template <class A>
  __device__ static void store(T* p, const A* x) {
    const auto bits = [](A v) { return static_cast<unsigned>(T(static_cast<float>(v)).x); };
    unsigned words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      words[k] = bits(x[2 * k]) | bits(x[2 * k + 1]) << 16;
    }
    __stwb(reinterpret_cast<uint4*>(p), make_uint4(words[0], words[1], words[2], words[3]));
  }
};
template <>
struct Pack<float> {
  static constexpr int kSize = 4;
  template <class A>
  __device__ static void load(const float* p, A* x) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(p));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
  template <class A>
  __device__ static void store(float* p, const A* x) {
    const auto at = [&](int k) { return static_cast<float>(x[k]); };
    __stwb(reinterpret_cast<float4*>(p), make_float4(at(0), at(1), at(2), at(3)));
  }
};
template <>
struct Pack<double> {
  static constexpr int kSize = 2;
  __device__ static void load(const double* p, double* x) {
    const double2 v = __ldg(reinterpret_cast<const double2*>(p));
    x[0] = v.x, x[1] = v.y;
  }
  __device__ static void store(double* p, const double* x) {
    __stwb(reinterpret_cast<double2*>(p), make_double2(x[0], x[1]));
  }
};

__device__ __forceinline__ int bytes_of(DType type) { return type == DType::Double ? 8 : type == DType::Float ? 4 : 2; }

// f(T()) for the type T that `type` names.
template <class T, class F>
__device__ __forceinline__ void with_type(DType type, const F& f) {
  if constexpr (!std::is_same_v<T, AnyFloat>) {
    f(T());
  } else if (type == DType::Half) {
    f(c10::Half());
  } else if (type == DType::BFloat16) {
    f(c10::BFloat16());
  } else {
    f(float());
  }
}

// f.template operator()<T>() for the type of a row.
template <class F>
void dispatch_type(DType type, const F& f) {
  if (type == DType::Double) return f.template operator()<double>();
  if (type == DType::Half) return f.template operator()<c10::Half>();
  if (type == DType::BFloat16) return f.template operator()<c10::BFloat16>();
  return f.template operator()<float>();
}
// For a kernel in double: double, or a type that is known when it runs.
template <class F>
void dispatch_any(DType type, const F& f) {
  if (type == DType::Double) return f.template operator()<double>();
  f.template operator()<AnyFloat>();
}

// One row of an operand. Byte is char or const char.
template <class Byte>
struct RowPointer {
  Byte* data = nullptr;  // null: no such operand
  DType type = DType::Float;
  int64_t stride = 1;
  bool packed = false;  // pieces start at multiples of 16 bytes

  RowPointer() = default;
  template <class Rows>
  __device__ RowPointer(const Rows& rows, int64_t row)
      : data(static_cast<Byte*>(rows.data)), type(rows.dtype), stride(rows.layout.class_stride) {
    if (data != nullptr) data += rows.layout.offset(row) * bytes_of(type);
  }
  // Entries between the last multiple of 16 bytes and the row's first one.
  __device__ int lead() const { return static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16) / bytes_of(type); }
  __device__ void align(int lead) {
    packed =
        stride == 1 && (reinterpret_cast<uintptr_t>(data) - static_cast<uintptr_t>(lead * bytes_of(type))) % 16 == 0;
  }
};

// What a thread takes at once: kPiece<T> classes in runs of kRun<T>, of which some may lie outside of the row.
template <class T>
struct Piece {
  int64_t first;
  int gap;  // from a run to the next

  __device__ int64_t at(int k) const { return first + k / kRun<T> * gap + k % kRun<T>; }
};

// The row's classes as its pieces see them: runs begin at multiples of their length, less lead, which aligns as many
// operands as agree; the others, and strided ones, are read entry by entry.
struct Pieces {
  int64_t classes;
  int lead = 0;

  template <class... Pointers>
  __device__ explicit Pieces(int64_t classes_, Pointers&... operands) : classes(classes_) {
    int size = 16;  // of the narrowest type, which has most entries in 16 bytes
    [[maybe_unused]] const auto look = [&](const auto& x) {
      if (x.data != nullptr && x.stride == 1 && bytes_of(x.type) < size) size = bytes_of(x.type), lead = x.lead();
    };
    (look(operands), ...);
    (operands.align(lead), ...);
  }
  // The piece of a thread whose run is number `run`, where runs of a piece are `size` apart.
  template <class T>
  __device__ Piece<T> piece(int64_t run, int size) const {
    return {run * kRun<T> - lead, size * kRun<T>};
  }
};

template <class T, class A>
__device__ __forceinline__ void load_piece(const RowPointer<const char>& row, const Pieces& pieces,
                                           const Piece<T>& piece, A fill, A (&x)[kPiece<T>]) {
  constexpr int R = kRun<T>;
  with_type<T>(row.type, [&](auto zero) {
    using Entry = decltype(zero);
    const Entry* const data = reinterpret_cast<const Entry*>(row.data);
#pragma unroll
    for (int r = 0; r < kPiece<T>; r += R) {
      const int64_t at = piece.at(r);
      if (row.packed && at >= 0 && at + R <= pieces.classes) {
#pragma unroll
        for (int k = 0; k < R; k += Pack<Entry>::kSize) Pack<Entry>::load(data + at + k, x + r + k);
      } else {
#pragma unroll
        for (int k = 0; k < R; ++k)
          x[r + k] = at + k >= 0 && at + k < pieces.classes ? static_cast<A>(data[(at + k) * row.stride]) : fill;
      }
    }
  });
}

template <class T, class A>
__device__ __forceinline__ void store_piece(const RowPointer<char>& row, const Pieces& pieces, const Piece<T>& piece,
                                            const A (&x)[kPiece<T>]) {
  constexpr int R = kRun<T>;
  with_type<T>(row.type, [&](auto zero) {
    using Entry = decltype(zero);
    Entry* const data = reinterpret_cast<Entry*>(row.data);
#pragma unroll
    for (int r = 0; r < kPiece<T>; r += R) {
      const int64_t at = piece.at(r);
      if (row.packed && at >= 0 && at + R <= pieces.classes) {
#pragma unroll
        for (int k = 0; k < R; k += Pack<Entry>::kSize) Pack<Entry>::store(data + at + k, x + r + k);
      } else {
#pragma unroll
        for (int k = 0; k < R; ++k)
          if (at + k >= 0 && at + k < pieces.classes) data[(at + k) * row.stride] = static_cast<Entry>(x[r + k]);
      }
    }
  });
}

// A piece's entries in turn, in a loop that is not unrolled: what takes hundreds of instructions a class stays small,
// and x in registers. append() drops the first; next() takes it, and after as many as there are x is as it was.
template <class A, int K>
__device__ __forceinline__ void append(A (&x)[K], A last) {
#pragma unroll
  for (int k = 1; k < K; ++k) x[k - 1] = x[k];
  x[K - 1] = last;
}
template <class A, int K>
__device__ __forceinline__ A next(A (&x)[K]) {
  const A first = x[0];
  append(x, first);
  return first;
}

template <class T>
__device__ __forceinline__ Arithmetic<T> load_entry(const RowPointer<const char>& row, int64_t at) {
  Arithmetic<T> x = 0;
  with_type<T>(row.type, [&](auto zero) {
    x = static_cast<Arithmetic<T>>(reinterpret_cast<const decltype(zero)*>(row.data)[at * row.stride]);
  });
  return x;
}
template <class T, class A>
__device__ __forceinline__ void store_entry(const RowPointer<char>& row, int64_t at, A x) {
  with_type<T>(row.type, [&](auto zero) {
    using Entry = decltype(zero);
    reinterpret_cast<Entry*>(row.data)[at * row.stride] = static_cast<Entry>(x);
  });
}

// -- Rows over teams and blocks -------------------------------------------------------------------------------------

// How the rows of a call are spread.
struct RowGrid {
  static constexpr int64_t kShort = 1024;    // classes up to which a warp takes a row
  static constexpr int64_t kManyRows = 256;  // this many blocks keep a GPU busy
  static constexpr int64_t kSegment = 8192;  // classes that are worth a block
  static constexpr int kSlot = 8;            // doubles that a segment leaves for a reduction

  int64_t rows, classes;
  int64_t segment = 0;  // classes of one; 0: rows are not split
  int segments = 1;

  RowGrid(int64_t rows_, int64_t classes_) : rows(rows_), classes(classes_) {
    if (rows >= kManyRows || classes < 2 * kSegment) return;
    segment = (classes + kThreads * kSegment - 1) / (kThreads * kSegment) * kSegment;  // at most kThreads segments
    segments = static_cast<int>((classes + segment - 1) / segment);
  }
  // Of doubles, for a kernel with so many reductions over the row.
  int64_t workspace(int reductions) const { return segments == 1 ? 0 : rows * segments * reductions * kSlot; }
  int64_t blocks() const {
    return classes <= kShort ? (rows + kWarps - 1) / kWarps : rows * static_cast<int64_t>(segments);
  }
};

// A team's part in one launch.
class RowTask {
 public:
  Team team;
  int64_t row;

  // Reductions are numbered; launch k ends with the k-th. Without segments one launch does all.
  __device__ RowTask(const RowGrid& grid, double* workspace, int launch)
      : team{grid.classes <= RowGrid::kShort ? kWarp : kThreads, 0},
        workspace_(workspace),
        launch_(launch),
        segments_(grid.segments),
        segment_classes_(grid.segment) {
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t block = blockIdx.x;
    if (team.size == kWarp) {
      row = block * kWarps + thread / kWarp;
    } else {
      row = block / segments_;
      segment_ = static_cast<int>(block % segments_);
    }
    team.rank = thread % team.size;
    rows_ = grid.rows;
  }
  __device__ bool valid() const { return row < rows_; }
  __device__ bool first_launch() const { return launch_ == 0; }
  // The thread that writes what there is one of a row.
  __device__ bool writes() const { return team.rank == 0 && segment_ == 0; }

  // Is the team's segment the row's first, or the row?
  __device__ bool first_segment() const { return segment_ == 0; }
  // Is the class in the team's segment?
  __device__ bool holds(const Pieces& pieces, int64_t at) const {
    if (segments_ == 1) return true;
    const int64_t segment = (at + pieces.lead) / segment_classes_;
    return segment_ == (segment < segments_ ? segment : segments_ - 1);
  }

  // f(piece) for this thread's pieces of the row, or of the team's segment of it.
  template <class T, class F>
  __device__ __forceinline__ void for_pieces(const Pieces& pieces, const F& f) const {
    constexpr int R = kRun<T>;
    static_assert(RowGrid::kSegment % (kThreads * kPiece<T>) == 0, "a segment ends where a piece's last run does");
    const int64_t all = (pieces.lead + pieces.classes + R - 1) / R, per = segments_ == 1 ? all : segment_classes_ / R;
    const int64_t first = segment_ * per, last = segment_ + 1 == segments_ ? all : first + per;
    const int step = team.size * (kPiece<T> / R);
    for (int64_t run = first + team.rank; run < last; run += step) f(pieces.piece<T>(run, team.size));
  }

  // The sums of the whole row from part(), this thread's: merged() is of all threads' sums, or of all segments'.
  // False: the sums are left to the next launch, and this one ends.
  template <class Whole, class Part, class Merged>
  __device__ __forceinline__ bool reduce(int number, Whole& whole, const Part& part, const Merged& merged) const {
    if (segments_ == 1 || launch_ == number) {
      whole = merged(part());
      if (segments_ == 1) return true;
      if (team.rank == 0) whole.store(slot(number, segment_));
      return false;
    }
    if (launch_ < number) return false;  // a reduction before this one is not needed: its launch has nothing to do
    Whole mine{};
    if (team.rank < segments_) mine = Whole::load(slot(number, team.rank));
    whole = merged(mine);
    return true;
  }

 private:
  __device__ double* slot(int number, int segment) const {
    return workspace_ + ((number * rows_ + row) * segments_ + segment) * RowGrid::kSlot;
  }
  double* workspace_;
  int launch_, segments_, segment_ = 0;
  int64_t segment_classes_, rows_ = 0;
};

// -- What rows have in common ---------------------------------------------------------------------------------------

// A row's weight; NaN where it is none.
inline __device__ double weight_of(const double* weight, int64_t row) {
  if (weight == nullptr) return 1;
  const double w = weight[row];
  return w >= 0 && std::isfinite(w) ? w : std::numeric_limits<double>::quiet_NaN();
}

// The loss of a row into a call of either number of operands.
template <class Forward>
__device__ void store_loss(const Forward& k, int64_t row, double loss) {
  if (k.loss_is_double) {
    static_cast<double*>(k.loss)[row] = loss;
  } else {
    static_cast<float*>(k.loss)[row] = static_cast<float>(loss);
  }
}

// A row of a forward call: statistics(task, stat) finds what it leaves, the loss among it, unless its weight is 0.
// False: that is left to the next launch.
template <class Forward, class Stat, class F>
__device__ __forceinline__ void forward_row(const Forward& k, const RowGrid& grid, double* workspace, int launch,
                                            double Stat::*loss, const F& statistics) {
  const RowTask task(grid, workspace, launch);
  if (!task.valid()) return;
  const double weight = weight_of(k.weight, task.row);
  Stat stat{};
  if (weight != 0 && !statistics(task, stat)) return;
  if (!task.writes()) return;
  stat.store(k.stat + Stat::kSize * task.row);
  store_loss(k, task.row, weight != 0 ? weight * (stat.*loss) : 0);
}

template <class T>
__device__ void store_zeros(const RowTask& task, const RowPointer<char>& row, const Pieces& pieces) {
  if (row.data == nullptr) return;
  const Arithmetic<T> zeros[kPiece<T>] = {};
  task.for_pieces<T>(pieces, [&](const Piece<T>& piece) { store_piece(row, pieces, piece, zeros); });
}

// What a team adds up.
template <int N>
struct Sums {
  double x[N] = {};

  __device__ static Sums load(const double* from) {
    Sums sums;
    for (int n = 0; n < N; ++n) sums.x[n] = from[n];
    return sums;
  }
  __device__ void store(double* to) const {
    for (int n = 0; n < N; ++n) to[n] = x[n];
  }
};
template <int N>
__device__ Sums<N> merged(const Team& team, Sums<N> sums) {
  team.sum(sums.x);
  return sums;
}

}  // namespace torch_divergence::cuda
