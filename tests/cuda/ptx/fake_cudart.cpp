// Stands in for libcudart under an object that nvcc compiled: nvcc's own <<<>>> stubs register their kernels and launch
// them here, and every launch goes to a callback. So the host code that runs is nvcc's too.
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

struct dim3 {
  unsigned x, y, z;
};

using Callback = int (*)(const char* kernel, const unsigned* grid_and_block, size_t dynamic_shared, void** arguments);

namespace {
Callback callback;
int last_error;
struct {
  dim3 grid, block;
  size_t dynamic_shared;
  void* stream;
} configuration;
std::map<const void*, std::string>& kernel_names() {
  static std::map<const void*, std::string> names;  // filled by static initialisers
  return names;
}
constexpr int kErrorUnknown = 999;
}  // namespace

extern "C" {
void fake_cudart_set_callback(Callback c) { callback = c; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, void*, void*,
                            int*) {
  kernel_names()[host] = device;
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
  last_error =
      callback != nullptr ? callback(kernel_names()[kernel].c_str(), dims, dynamic_shared, arguments) : kErrorUnknown;
  return last_error;
}
int cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t dynamic_shared, void* stream) {
  return __cudaLaunchKernel(kernel, grid, block, arguments, dynamic_shared, stream);
}
int cudaPeekAtLastError() { return last_error; }
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
const char* cudaGetErrorString(int error) { return error == 0 ? "no error" : "launch refused, see the findings"; }
}
