// What lets one header serve g++ and nvcc.
#pragma once

// Always inlined: a copy emitted out of line from an AVX-512 object could be the one that the linker keeps for
// everybody.
#if defined(__CUDACC__)
#define TD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TD_HOST_DEVICE inline __attribute__((always_inline))
#endif
