// CPU kernel of the Fisher-vector product, in two visits to memory. SIMD in double for all types: <q, v> must keep the
// digits of v - <q, v> where v has a large offset.
#include "fisher_vector_product/fisher_vector_product.h"

#include "core/row_kernels.h"

namespace torch_divergence::cpu::CPU_CAPABILITY {
namespace {

// Online sums of e = e^((z - max)/T) and e v.
struct MeanScan {
  double max = -std::numeric_limits<double>::infinity(), sum = 0, dot = 0;

  void raise(double top, double inv_t) {
    if (!(top > max)) return;
    const double f = sum != 0 ? std::exp((max - top) * inv_t) : 0;
    if (sum != 0) sum *= f, dot *= f;
    max = top;
  }
  void merge(MeanScan other, double inv_t) {
    raise(other.max, inv_t);
    other.raise(max, inv_t);
    sum += other.sum, dot += other.dot;
  }
};

}  // namespace

void fisher_vector_product(const FisherVectorProduct& k, int64_t begin, int64_t end, ForEach columns) {
  const RowsIn in[] = {k.logits, k.v};
  const RowsOut out[] = {k.product};
  const double inv_t = 1 / k.temperature;
  const D lowest(-kInf<double>), zero(0.0), scale(inv_t);
  RowTiles<2, 1>(in, out, k.classes).run(begin, end, [&](int64_t, const void* const* x, void* const* y) {
    const auto read = [&](int64_t i, auto count, D& z, D& v) __attribute__((always_inline)) {
      z = load_any(x[0], k.logits.dtype, i, count, -kInf<double>);
      v = select(z == lowest, zero, load_any(x[1], k.v.dtype, i, count, 0.0));
    };
    const auto scan = [&](int64_t first, int64_t last) {
      MeanScan part;
      for (int64_t c = first; c < last; c += kChunk) {
        const int64_t n = std::min(kChunk, last - c);
        D top(-kInf<double>);
        for_lanes<double>(
            n, [&](int64_t i, auto count) __attribute__((always_inline)) {
              top = max_of(load_any(x[0], k.logits.dtype, c + i, count, -kInf<double>), top);
            });
        part.raise(max_lane(top), inv_t);
        const D max(finite_or_zero(part.max));
        D sum(0.0), dot(0.0);
        for_lanes<double>(
            n, [&](int64_t i, auto count) __attribute__((always_inline)) {
              D z, v;
              read(c + i, count, z, v);
              const D e = ((z - max) * scale).exp();
              sum = sum + e, dot = fmadd(e, v, dot);
            });
        part.sum += sum_of(sum), part.dot += sum_of(dot);
      }
      return part;
    };
    const auto total = merged_segments<MeanScan>(
        k.classes, columns, scan, [&](MeanScan& whole, const MeanScan& part) { whole.merge(part, inv_t); });
    const D max(finite_or_zero(total.max)), mean(total.dot / total.sum), factor(inv_t * inv_t / total.sum);
    for_segments(k.classes, columns, [&](int64_t first, int64_t last, int64_t) {
      for_lanes<double>(
          last - first, [&](int64_t j, auto count) __attribute__((always_inline)) {
            const int64_t i = first + j;
            D z, v;
            read(i, count, z, v);
            store_any(y[0], k.product.dtype, i, ((z - max) * scale).exp() * factor * (v - mean), count);
          });
    });
  });
}

}  // namespace torch_divergence::cpu::CPU_CAPABILITY
