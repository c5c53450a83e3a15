// The Fisher information of softmax(z/T) with respect to z, times a vector: F v = q (v - <q, v>)/T^2 a row.
//
// It is the Hessian of KL(old || new) in new's logits at new = old. F is symmetric, and its derivative along u is the
// third cumulant, symmetric in all three:  (dF[u]) v = F[(u - <q, u>)(v - <q, v>)]/T.
//
// A class of logit -inf is as if it were not there, whatever v holds for it. A row of such classes only gives NaN.
#pragma once
#include <cstdint>

#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/rows.h"

namespace torch_divergence {

struct FisherVectorProduct {
  RowsIn logits, v;
  int64_t classes;
  double temperature;
  RowsOut product;
};

// On CUDA: all rows, on a stream; workspace: of as many doubles as fisher_vector_product_workspace() says, on the same
// device.
namespace cuda {
int64_t fisher_vector_product_workspace(int64_t rows, int64_t classes);
void fisher_vector_product(const FisherVectorProduct&, int64_t rows, double* workspace, Stream);
}  // namespace cuda

TD_DECLARE_CPU_KERNEL(fisher_vector_product, (const FisherVectorProduct&, int64_t begin, int64_t end, ForEach columns))

}  // namespace torch_divergence
