/// Losses as free functions.
///
/// The prediction (`input`) comes first and the `target` second, as everywhere in PyTorch; the direction of a
/// divergence is named, never implied by the order. Functions, defaults and errors are the same as in the Python
/// package.
#pragma once

#include <torch_divergence/export.h>
#include <torch_divergence/functional/common.h>
#include <torch_divergence/functional/cross_entropy.h>
#include <torch_divergence/functional/distillation.h>
#include <torch_divergence/functional/entropy.h>
#include <torch_divergence/functional/fisher_vector_product.h>
#include <torch_divergence/functional/gan.h>
#include <torch_divergence/functional/gaussian_kl.h>
#include <torch_divergence/functional/gaussian_wasserstein.h>
#include <torch_divergence/functional/js_div.h>
#include <torch_divergence/functional/kl_div.h>
#include <torch_divergence/functional/kl_div_topk.h>
#include <torch_divergence/functional/kl_estimate.h>
#include <torch_divergence/functional/ppo.h>
#include <torch_divergence/functional/sinkhorn.h>
#include <torch_divergence/functional/sliced_wasserstein.h>
#include <torch_divergence/functional/trust_region.h>
#include <torch_divergence/functional/vae.h>
#include <torch_divergence/functional/wasserstein.h>
#include <torch_divergence/functional/wasserstein_1d.h>
#include <torch_divergence/functional/wgan.h>

#include <string>

namespace torch_divergence {

/// The version of this library, e.g. "0.1.0".
TD_API std::string version();

/// The version of torch this library was built against. It runs only with the same major and minor version.
TD_API std::string torch_version();

/// The instruction set of the CPU kernels in use: "DEFAULT", "AVX2" or "AVX512". It is PyTorch's own choice, made once:
/// the best that the processor offers, or what the environment variable ATEN_CPU_CAPABILITY says: default, avx2,
/// avx512.
TD_API std::string cpu_capability();

/// Gives back the one block of memory that is kept for the next large gradient. Gradients of 2 MB and more are written
/// to huge pages where the system has them, and the block freed last is kept, because fresh pages cost more time than
/// the arithmetic.
TD_API void empty_cache();

}  // namespace torch_divergence
