// A CUDA device for tests, without a GPU: the kernels' source, compiled by g++ as C++, runs with every CUDA thread as a
// fiber, and every load and store is checked by CUDA's rules. Only what our kernels use is here: anything else is a
// compile error, never a silent approximation. `include` comes first on the include path and takes the place of CUDA's
// headers. What it finds is in simt.cpp.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// One block runs at a time, so that one copy does; the checker knows a block's first read of it for garbage.
#define __shared__ static

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
using cudaStream_t = struct CUstream_st*;

namespace simt {

// In which order the ready threads of a block, and the blocks of a grid, run.
enum class Order { Forward, Backward, Random };

struct Options {
  Order order = Order::Random;
  unsigned seed = 1;
  // Any access to memory that is neither shared, the thread's own nor a Buffer is an error.
  bool only_buffers = false;
  // The blocks that run: one block of a huge grid shows 64-bit indices.
  int64_t first_block = 0, last_block = std::numeric_limits<int64_t>::max();
};
extern Options options;

// The orders of threads that a test should try: those in which this machine differs.
struct Schedule {
  Order order;
  unsigned seed;
};
extern const std::vector<Schedule> schedules;

// Global memory that the checker knows: bounds, and whether what is read has been written.
class Buffer {
 public:
  Buffer(const void* data, size_t bytes, const char* name, bool initialised);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

 private:
  const void* data_;
};

// Alive while a kernel may be launched: the shim of CUDAGuard. Asking for a stream without one is a finding.
struct DeviceGuard {
  DeviceGuard();
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};
cudaStream_t current_stream();

// The threads that a kernel sees.
struct Indices {
  uint3 thread, block;
  dim3 block_size{0}, grid_size{0};
};
const Indices& indices();

// Runs a kernel. Throws std::runtime_error that lists everything that was found in this launch.
void run(dim3 grid, dim3 block, void (*body)(void*), void* parameters, size_t parameter_bytes, const void* kernel);

template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block, cudaStream_t, void (*kernel)(Parameters...), Arguments&&... arguments) {
  using Call = std::tuple<void (*)(Parameters...), Parameters...>;  // by value, as a device gets them
  Call call(kernel, static_cast<Parameters>(arguments)...);
  run(
      grid, block, [](void* c) { std::apply([](auto k, const Parameters&... p) { k(p...); }, *static_cast<Call*>(c)); },
      &call, sizeof call, reinterpret_cast<const void*>(kernel));
}
#define TD_LAUNCH(kernel, grid, block, stream, ...) ::simt::launch(grid, block, stream, kernel, __VA_ARGS__)

// -- What the shims below are made of --------------------------------------------------------------------------------

enum class WarpOp { Index, Up, Down, Xor, Ballot, Sync };
void block_barrier(const char* file, int line);
uint64_t warp_op(WarpOp op, unsigned mask, uint64_t value, int argument, int width, const char* file, int line);
// Tells the checker of an access by the current thread.
void touch(const void* p, size_t bytes, bool write, const void* where);

template <class T>
T shuffle(WarpOp op, unsigned mask, T value, int argument, int width, const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take types of 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_op(op, mask, bits, argument, width, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// touch() has told the checker what the compiler would tell it in pieces.
#define SIMT_UNCHECKED __attribute__((no_sanitize("thread", "alignment"), noinline))
template <class T>
SIMT_UNCHECKED T load(const T* p) {
  touch(p, sizeof(T), false, __builtin_return_address(0));
  T v;
  std::memcpy(&v, static_cast<const void*>(p), sizeof v);
  return v;
}
template <class T>
SIMT_UNCHECKED void store(T* p, T v) {
  touch(p, sizeof(T), true, __builtin_return_address(0));
  std::memcpy(static_cast<void*>(p), &v, sizeof v);
}

}  // namespace simt

#define threadIdx (::simt::indices().thread)
#define blockIdx (::simt::indices().block)
#define blockDim (::simt::indices().block_size)
#define gridDim (::simt::indices().grid_size)

#define SIMT_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(SIMT_CALLER) { simt::block_barrier(file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_CALLER) {
  simt::warp_op(simt::WarpOp::Sync, mask, 0, 0, 32, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::WarpOp::Index, mask, v, lane, width, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::WarpOp::Up, mask, v, static_cast<int>(by), width, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::WarpOp::Down, mask, v, static_cast<int>(by), width, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::WarpOp::Xor, mask, v, with, width, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_CALLER) {
  return static_cast<unsigned>(simt::warp_op(simt::WarpOp::Ballot, mask, predicate != 0, 0, 32, file, line));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_CALLER) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_CALLER) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}

template <class T>
__forceinline__ T __ldg(const T* p) {
  return simt::load(p);
}
template <class T>
__forceinline__ T __ldcs(const T* p) {
  return simt::load(p);
}
template <class T>
__forceinline__ void __stwb(T* p, T v) {
  simt::store(p, v);
}
template <class T>
__forceinline__ void __stcs(T* p, T v) {
  simt::store(p, v);
}
inline float __uint_as_float(unsigned u) {
  float f = 0;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned u = 0;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
