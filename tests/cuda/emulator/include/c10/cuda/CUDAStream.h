#pragma once
#include "simt.h"

namespace c10::cuda {
inline cudaStream_t getCurrentCUDAStream() { return simt::current_stream(); }
}  // namespace c10::cuda
