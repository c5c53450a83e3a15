/// What the losses share: their enums.
#pragma once

#include <torch_divergence/export.h>

#include <cstdint>

namespace torch_divergence {

/// How a tensor describes its distribution along the class dimension.
enum class Space : std::uint8_t {
  Logits,    ///< any real numbers; the distribution is softmax(x / temperature)
  LogProbs,  ///< log-probabilities, taken as they are
  Probs,     ///< probabilities, taken as they are
};

/// Which distribution stands in front in KL(. || .).
enum class Direction : std::uint8_t {
  Forward,  ///< KL(target || input): covers every mode of the target
  Reverse,  ///< KL(input || target): seeks one mode of the target
};

/// What happens to the losses of the rows.
enum class Reduction : std::uint8_t {
  None,  ///< one value a row, w * l
  Sum,   ///< sum(w * l)
  Mean,  ///< sum(w * l) / sum(w), or sum(w * l) / normalizer
};

/// The names that Python and the operators use: "logits", "forward", "mean", ...
TD_API const char* to_string(Space space);
TD_API const char* to_string(Direction direction);
TD_API const char* to_string(Reduction reduction);

}  // namespace torch_divergence
