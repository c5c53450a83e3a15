/// KL divergence from a teacher known by its top-k log-probabilities.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch_divergence/functional/common.h>

#include <cstdint>
#include <optional>

namespace torch_divergence {

/// What is done about the classes that a top-k teacher does not name.
enum class Tail : std::uint8_t {
  Bucket,  ///< together they are one more class: a KL divergence, and a lower bound of that from the whole teacher
  Zero,    ///< left out of the sum; not a divergence, may be negative
  RenormTarget,  ///< left out, the teacher's k probabilities divided by their sum
  RenormBoth,    ///< left out, both sides' k probabilities divided by their sums
};

/// "bucket", "zero", "renorm_target" or "renorm_both".
TD_API const char* to_string(Tail tail);

/// Options of `kl_div_topk`. Each setter returns the options, so that calls chain.
struct TD_API KLDivTopKOptions {
  /// What is done about the classes that are not in `indices`.
  TORCH_ARG(Tail, tail) = Tail::Bucket;
  /// Forward is KL(teacher || input), Reverse is KL(input || teacher).
  TORCH_ARG(Direction, direction) = Direction::Forward;
  /// What `input` holds.
  TORCH_ARG(Space, space) = Space::Logits;
  /// Divides logits, and logits only. Positive; must be 1 for other spaces. The log-probabilities are already at it.
  TORCH_ARG(double, temperature) = 1.0;
  /// The class dimension of all three tensors.
  TORCH_ARG(std::int64_t, dim) = -1;
  /// Weights of the rows, as for `kl_div`. A row of weight 0 contributes exactly nothing, whatever it holds.
  TORCH_ARG(std::optional<at::Tensor>, row_weight) = std::nullopt;
  /// None returns one value a row; Sum and Mean return a scalar.
  TORCH_ARG(Reduction, reduction) = Reduction::Mean;
  /// A positive scalar tensor that replaces the denominator of Mean. A constant: must not require grad.
  TORCH_ARG(std::optional<at::Tensor>, normalizer) = std::nullopt;

 public:
  /// The same with a number: `.normalizer(64.0)`.
  KLDivTopKOptions& normalizer(double value);
};

/// The KL divergence from a teacher of which only k log-probabilities a row are known:
///
///     sum_e a_e (log a_e - log b_e),    Forward: a = teacher, b = input;  Reverse: a = input, b = teacher
///
/// over the classes in `indices` and, with Tail::Bucket, the rest as one class. The teacher's mass in the rest is
/// 1 - sum(exp(log_probs)) unless `tail_log_prob` gives its logarithm; the student's is summed over those classes.
///
/// Shapes. `input` (*, classes), `indices` (int64, each class at most once a row) and `log_probs` (*, k) with k >= 1
/// and the classes at `options.dim()` in all three; `tail_log_prob` (*). Entries of -inf in `log_probs` are padding,
/// whatever their index. Dtypes as for `kl_div`.
///
/// Differentiable in `input`, `log_probs` and `tail_log_prob`, to any order. A mass of the log_probs in (1, 1 + 1e-3]
/// leaves no tail; so does one in [1 - 1e-3, 1) where the student has nothing outside. Values and gradients at zeros
/// and infinities are those of `kl_div`; where the value is +inf, log_probs that are renormalised, or made into a tail,
/// get gradient 0. In the reverse direction a tail of the student that the teacher lacks is +inf.
///
/// @throws c10::ValueError naming the argument, what it was and what was expected; on the CPU also for indices out of
///   range or twice in a row, and for log_probs of a mass above 1 + 1e-3.
///
/// Example:
///
///     namespace td = torch_divergence;
///     auto [log_probs, indices] = at::log_softmax(teacher, -1).topk(16);
///     td::kl_div_topk(student, indices, log_probs).backward();
TD_API at::Tensor kl_div_topk(const at::Tensor& input, const at::Tensor& indices, const at::Tensor& log_probs,
                              const std::optional<at::Tensor>& tail_log_prob, const KLDivTopKOptions& options);

/// Without `tail_log_prob`.
TD_API at::Tensor kl_div_topk(const at::Tensor& input, const at::Tensor& indices, const at::Tensor& log_probs,
                              const KLDivTopKOptions& options);

/// With the default options: forward, from logits, Tail::Bucket, the mean over the rows.
TD_API at::Tensor kl_div_topk(const at::Tensor& input, const at::Tensor& indices, const at::Tensor& log_probs);

}  // namespace torch_divergence
