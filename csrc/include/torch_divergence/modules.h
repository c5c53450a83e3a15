/// Losses as modules: what does not change between batches is set once, at construction.
#pragma once

#include <torch_divergence/modules/cross_entropy.h>
#include <torch_divergence/modules/entropy.h>
#include <torch_divergence/modules/kl_div.h>
