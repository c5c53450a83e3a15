/// Losses as modules: what does not change between batches is set once, at construction.
#pragma once

#include <torch_divergence/modules/cross_entropy.h>
#include <torch_divergence/modules/distillation.h>
#include <torch_divergence/modules/entropy.h>
#include <torch_divergence/modules/gan.h>
#include <torch_divergence/modules/gaussian_kl.h>
#include <torch_divergence/modules/js_div.h>
#include <torch_divergence/modules/kl_div.h>
#include <torch_divergence/modules/kl_div_topk.h>
#include <torch_divergence/modules/kl_estimate.h>
#include <torch_divergence/modules/ppo.h>
#include <torch_divergence/modules/sinkhorn.h>
#include <torch_divergence/modules/sliced_wasserstein.h>
#include <torch_divergence/modules/vae.h>
#include <torch_divergence/modules/wasserstein_1d.h>
#include <torch_divergence/modules/wgan.h>
