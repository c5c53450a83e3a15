#include "core/cpu_dispatch.h"

#include <ATen/Version.h>

#include <string>

namespace torch_divergence::cpu {

Isa isa() {
  static const Isa value = [] {
    const std::string capability = at::get_cpu_capability();
#ifdef TD_WITHOUT_AVX512
    if (capability == "AVX512") return Isa::Avx2;
#endif
    return capability == "AVX512" ? Isa::Avx512 : capability == "AVX2" ? Isa::Avx2 : Isa::Default;
  }();
  return value;
}

}  // namespace torch_divergence::cpu
