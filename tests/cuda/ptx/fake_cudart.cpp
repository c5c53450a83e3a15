// Stands in for libcudart, for libc10_cuda and for the emulator under objects that nvcc compiled: nvcc's own <<<>>>
// stubs register their kernels and launch them here, and every launch goes to Python. So the host code that runs is
// nvcc's too, and the emulator's tests run unchanged: they know the device by simt::Buffer and by launches that throw.
#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "simt.h"

namespace {

// Python's side. A launch returns what was found in it, or "".
struct Device {
  const char* (*launch)(const char* kernel, const unsigned* grid_and_block, size_t dynamic_shared, void** arguments,
                        int order, unsigned seed, int64_t first_block);
  void (*add_buffer)(uint64_t address, uint64_t bytes, const char* name, bool initialised);
  void (*remove_buffer)(uint64_t address);
};
Device device;

struct {
  dim3 grid, block;
  size_t dynamic_shared;
  void* stream;
} configuration;
std::string findings;  // of the last launch

std::map<const void*, std::string>& kernel_names() {
  static std::map<const void*, std::string> names;  // filled by static initialisers
  return names;
}

}  // namespace

namespace simt {
Options options;
// Forward and backward are the same here: whole blocks in lockstep.
const std::vector<Schedule> schedules = {{Order::Forward, 0}, {Order::Random, 1}};
Buffer::Buffer(const void* data, size_t bytes, const char* name, bool initialised) : data_(data) {
  device.add_buffer(reinterpret_cast<uint64_t>(data), bytes, name, initialised);
}
Buffer::~Buffer() { device.remove_buffer(reinterpret_cast<uint64_t>(data_)); }
}  // namespace simt

extern "C" {
void fake_cudart_connect(const Device* d) { device = *d; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernel_names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t dynamic_shared, void* stream) {
  configuration = {grid, block, dynamic_shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* dynamic_shared, void** stream) {
  *grid = configuration.grid, *block = configuration.block;
  *dynamic_shared = configuration.dynamic_shared, *stream = configuration.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t dynamic_shared, void*) {
  const unsigned dims[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const auto& options = simt::options;
  findings = device.launch(kernel_names()[kernel].c_str(), dims, dynamic_shared, arguments,
                           static_cast<int>(options.order), options.seed, options.first_block);
  return findings.empty() ? 0 : 1;
}
int cudaGetLastError() { return findings.empty() ? 0 : 1; }
}

// What C10_CUDA_KERNEL_LAUNCH_CHECK() calls.
namespace c10::cuda {
class CUDAErrorLogCapture {
 public:
  CUDAErrorLogCapture() noexcept;
};
CUDAErrorLogCapture::CUDAErrorLogCapture() noexcept = default;
void c10_cuda_check_implementation(int error, const char*, const char*, unsigned, bool, CUDAErrorLogCapture*) {
  if (error != 0) throw std::runtime_error(findings);
}
}  // namespace c10::cuda
