#pragma once
#include <c10/core/Device.h>

#include "simt.h"

namespace c10::cuda {
struct CUDAGuard : simt::DeviceGuard {
  explicit CUDAGuard(c10::Device) {}
};
}  // namespace c10::cuda
