/// Everything: the functions and the modules. Include functional.h alone where torch::nn is not needed; it compiles
/// several times faster.
#pragma once

#include <torch_divergence/functional.h>
#include <torch_divergence/modules.h>
#include <torch_divergence/version.h>
