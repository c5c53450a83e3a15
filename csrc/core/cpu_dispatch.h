// Run-time choice of the instruction set. Every *_cpu.cpp is compiled once per set into
// namespace torch_divergence::cpu::<DEFAULT|AVX2|AVX512>; TD_CPU_KERNEL(f) is the one to call.
// at::get_cpu_capability() honours ATEN_CPU_CAPABILITY, so this library and PyTorch always agree.
#pragma once

namespace torch_divergence::cpu {
enum class Isa { Default, Avx2, Avx512 };
Isa isa();
}  // namespace torch_divergence::cpu

#if defined(__x86_64__)
#define TD_DECLARE_CPU_KERNEL(name, arguments) \
  namespace cpu::DEFAULT {                     \
  void name arguments;                         \
  }                                            \
  namespace cpu::AVX2 {                        \
  void name arguments;                         \
  }                                            \
  namespace cpu::AVX512 {                      \
  void name arguments;                         \
  }
#ifdef TD_WITHOUT_AVX512  // isa() is never Avx512 then
#define TD_BEST_CPU_KERNEL(name) &::torch_divergence::cpu::AVX2::name
#else
#define TD_BEST_CPU_KERNEL(name) &::torch_divergence::cpu::AVX512::name
#endif
#define TD_CPU_KERNEL(name)                                                                                      \
  (::torch_divergence::cpu::isa() == ::torch_divergence::cpu::Isa::Avx512 ? TD_BEST_CPU_KERNEL(name)             \
   : ::torch_divergence::cpu::isa() == ::torch_divergence::cpu::Isa::Avx2 ? &::torch_divergence::cpu::AVX2::name \
                                                                          : &::torch_divergence::cpu::DEFAULT::name)
#else
#define TD_DECLARE_CPU_KERNEL(name, arguments) \
  namespace cpu::DEFAULT {                     \
  void name arguments;                         \
  }
#define TD_CPU_KERNEL(name) (&::torch_divergence::cpu::DEFAULT::name)
#endif
