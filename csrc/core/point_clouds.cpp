#include "core/point_clouds.h"

#include <c10/util/Exception.h>

#include <array>

#include "core/transport_checks.h"

namespace torch_divergence {

PointClouds checked_point_clouds(const char* name, const at::Tensor& x, const at::Tensor& y,
                                 const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& b) {
  const std::optional<at::Tensor> given_x = x, given_y = y;
  check_together(name, {{"x", given_x}, {"y", given_y}, {"a", a}, {"b", b}});
  constexpr const char* kNames[] = {"x", "y", "a", "b"};
  constexpr const char* kShapes[] = {"(N, D) or (B, N, D)", "(M, D) or (B, M, D)", "(N) or (B, N)", "(M) or (B, M)"};
  std::array<std::optional<at::Tensor>, 4> t{x, y, a, b};
  const auto own_dims = [](size_t k) -> int64_t { return k < 2 ? 2 : 1; };

  std::optional<c10::SymInt> batch;
  for (size_t k = 0; k < 4; ++k) {
    if (!t[k].has_value()) continue;
    const auto sizes = t[k]->sym_sizes();
    TORCH_CHECK_VALUE(t[k]->dim() == own_dims(k) || t[k]->dim() == own_dims(k) + 1, name, ": ", kNames[k],
                      " has shape ", sizes, ", expected ", kShapes[k]);
    const auto points = t[k]->sym_size(-own_dims(k));
    TORCH_CHECK_VALUE(points != 0, name, ": ", kNames[k], " has no points: its shape is ", sizes,
                      ", expected at least one");
    if (k >= 2) {
      const auto expected = t[k - 2]->sym_size(-2);
      TORCH_CHECK_VALUE(points == expected, name, ": ", kNames[k], " has shape ", sizes, ", expected ", expected,
                        " weights, one a point of ", kNames[k - 2]);
    }
    if (t[k]->dim() == own_dims(k)) continue;
    if (!batch.has_value()) batch = sizes[0];
    TORCH_CHECK_VALUE(sizes[0] == *batch, name, ": ", kNames[k], " has a batch of ", sizes[0], ", expected ", *batch,
                      ", as another argument has");
  }
  TORCH_CHECK_VALUE(x.sym_size(-1) != 0, name, ": x has points of no dimension: its shape is ", x.sym_sizes(),
                    ", expected at least one");
  TORCH_CHECK_VALUE(x.sym_size(-1) == y.sym_size(-1), name, ": y has points of dimension ", y.sym_size(-1),
                    ", expected ", x.sym_size(-1), ", as x has");
  if (batch.has_value()) {
    for (size_t k = 0; k < 4; ++k) {
      if (!t[k].has_value()) continue;
      c10::SymDimVector sizes{*batch};
      const auto own = t[k]->sym_sizes().slice(t[k]->dim() - own_dims(k));
      sizes.append(own.begin(), own.end());
      t[k] = t[k]->expand_symint(sizes);
    }
  }
  return {*t[0], *t[1], t[2], t[3]};
}

}  // namespace torch_divergence
