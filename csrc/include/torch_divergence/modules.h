/// Losses as modules: what does not change between batches is set once, at construction.
#pragma once

#include <torch_divergence/modules/js_div.h>
#include <torch_divergence/modules/kl_div.h>
