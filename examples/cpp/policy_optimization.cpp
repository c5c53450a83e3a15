// CartPole-v1 by TRPO and by PPO, a policy's step bounded, or penalised, by KL(old || new): the C++ twin of
// ../python/policy_optimization.py, with the environment written out.
//
// TRPO (Schulman et al., "Trust Region Policy Optimization", 2015) takes one step of td::trust_region_step a batch, and
// the KL measured after it is checked to be within the bound each time. PPO (Schulman et al., "Proximal Policy
// Optimization Algorithms", 2017) takes several epochs of td::ppo_clip_loss. Either must reach a mean return of 475
// over 100 episodes, which is when CartPole-v1 counts as solved, from each of 3 seeds; the program fails if it does
// not.
//
//     policy_optimization            about 15 seconds
//     policy_optimization --quick    one seed
#include <torch/torch.h>
#include <torch_divergence/torch_divergence.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <numbers>
#include <stdexcept>
#include <string>
#include <vector>

#include "program.h"

namespace td = torch_divergence;
namespace nn = torch::nn;
using torch::Tensor;

constexpr int64_t kEnvironments = 16, kSteps = 128;  // a batch is 2048 steps
constexpr double kDiscount = 0.99, kTrace = 0.95;
constexpr double kMaxKL = 0.01;
constexpr double kSolved = 475, kEnough = 490;  // training goes on until it has a margin
constexpr int64_t kEpisodes = 100;
constexpr int64_t kRows = 512;  // of a batch, in a step of Adam
constexpr int kBatches = 150;   // at most

// `count` poles on carts side by side, as CartPole-v1 of Gymnasium has them (Barto, Sutton and Anderson, "Neuronlike
// adaptive elements that can solve difficult learning control problems", 1983): explicit Euler steps of 0.02 s, a
// reward of 1 for each. An episode terminates where the cart leaves 2.4 m or the pole 12 degrees, and is cut off after
// 500 steps; the step that follows starts the next one, without a reward.
class CartPole {
 public:
  struct Step {
    Tensor reward, terminated, truncated;  // (count), the latter two bool
  };

  CartPole(int64_t count, uint64_t seed)
      : generator_(at::make_generator<at::CPUGeneratorImpl>(seed)),
        state_(start(count)),
        steps_(torch::zeros({count}, torch::kLong)),
        done_(torch::zeros({count}, torch::kBool)) {}

  // (count, 4): position, velocity, angle, angular velocity.
  Tensor state() const { return state_.t().to(torch::kFloat); }

  // `action` holds 0, push to the left, or 1, to the right.
  Step step(const Tensor& action) {
    constexpr double gravity = 9.8, pole_mass = 0.1, total_mass = 1.1, half_length = 0.5, force = 10, tau = 0.02;
    constexpr double max_position = 2.4, max_angle = 12 * std::numbers::pi / 180;
    constexpr int64_t max_steps = 500;
    const auto v = state_[1], angle = state_[2], w = state_[3];
    const auto sine = angle.sin(), cosine = angle.cos();
    // Without friction; `push` is the cart's acceleration if the pole had none.
    const auto push = (force * (2 * action - 1) + pole_mass * half_length * w.square() * sine) / total_mass;
    const auto turn =
        (gravity * sine - cosine * push) / (half_length * (4.0 / 3.0 - pole_mass * cosine.square() / total_mass));
    const auto pull = push - pole_mass * half_length * turn * cosine / total_mass;
    const auto next = state_ + tau * torch::stack({v, pull, w, turn});
    state_ = torch::where(done_, start(done_.size(0)), next);
    steps_ = torch::where(done_, 0, steps_ + 1);
    const auto reward = (~done_).to(torch::kFloat);
    const auto terminated = (state_[0].abs() > max_position) | (state_[2].abs() > max_angle);
    const auto truncated = steps_ >= max_steps;
    done_ = terminated | truncated;
    return {reward, terminated, truncated};
  }

 private:
  Tensor start(int64_t count) const { return torch::rand({4, count}, generator_, torch::kDouble) * 0.1 - 0.05; }

  at::Generator generator_;
  Tensor state_, steps_, done_;  // (4, count) float64, (count)
};

// Braces, since they evaluate left to right: each layer draws its random start in the order of the Python program.
nn::Sequential network(int64_t outputs) {
  return nn::Sequential{nn::Linear(4, 64), nn::Tanh(), nn::Linear(64, 64), nn::Tanh(), nn::Linear(64, outputs)};
}

// What the policy saw and did, with advantages by generalised advantage estimation (Schulman et al., 2016).
struct Batch {
  Tensor states, actions, returns, advantages;
};

Batch collect(CartPole& env, nn::Sequential policy, nn::Sequential value) {
  torch::NoGradGuard no_grad;
  std::vector<Tensor> states{env.state()}, actions, rewards, goes_on, same_episode;
  for (int64_t t = 0; t < kSteps; ++t) {
    actions.push_back(torch::multinomial(policy->forward(states.back()).softmax(-1), 1, true).squeeze(-1));
    const auto [reward, terminated, truncated] = env.step(actions.back());
    rewards.push_back(reward);
    goes_on.push_back((~terminated).to(torch::kFloat));
    same_episode.push_back((~(terminated | truncated)).to(torch::kFloat));
    states.push_back(env.state());
  }
  const auto estimates = value->forward(torch::stack(states)).squeeze(-1);
  std::vector<Tensor> advantages(kSteps);
  auto advantage = torch::zeros({kEnvironments});
  for (int64_t t = kSteps - 1; t >= 0; --t) {
    const auto target = rewards[t] + kDiscount * estimates[t + 1] * goes_on[t];
    advantage = target - estimates[t] + kDiscount * kTrace * advantage * same_episode[t];
    advantages[t] = advantage;
  }
  states.pop_back();
  const auto raw = torch::stack(advantages);
  return {torch::stack(states).flatten(0, 1), torch::stack(actions).flatten(),
          (raw + estimates.slice(0, 0, kSteps)).flatten(), ((raw - raw.mean()) / (raw.std() + 1e-8)).flatten()};
}

Tensor log_prob(const Tensor& logits, const Tensor& actions) {
  return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1);
}

// The old policy on a batch, before an update.
struct Old {
  Tensor logits, log_prob;

  Old(nn::Sequential policy, const Batch& batch) {
    torch::NoGradGuard no_grad;
    logits = policy->forward(batch.states);
    log_prob = ::log_prob(logits, batch.actions);
  }
};

double measured_kl(nn::Sequential policy, const Batch& batch, const Old& old) {
  torch::NoGradGuard no_grad;
  return td::kl_div(policy->forward(batch.states), old.logits).item<double>();
}

// One step within the trust region. Returns KL(old || new).
double trpo_update(nn::Sequential policy, const Batch& batch) {
  const Old old(policy, batch);
  const auto surrogate = [&] {
    const auto ratio = (log_prob(policy->forward(batch.states), batch.actions) - old.log_prob).exp();
    return (ratio * batch.advantages).mean();
  };
  const auto kl = [&] { return td::kl_div(policy->forward(batch.states), old.logits); };
  const auto result =
      td::trust_region_step(policy->parameters(), surrogate, kl, td::TrustRegionOptions().max_kl(kMaxKL).damping(0.1));
  const double measured = measured_kl(policy, batch, old);
  if (measured > kMaxKL || result.kl != (result.accepted ? measured : 0))
    throw std::runtime_error("FAILED: KL(old || new) is " + std::to_string(measured) + ", reported as " +
                             std::to_string(result.kl) + ", for a trust region of " + std::to_string(kMaxKL));
  return measured;
}

// The rows of a batch in random order, in parts of 512.
std::vector<Tensor> shuffled(at::Generator& generator) {
  return torch::randperm(kEnvironments * kSteps, generator, torch::kLong).split(kRows);
}

// Six epochs of the clipped surrogate. Returns KL(old || new).
double ppo_update(nn::Sequential policy, torch::optim::Adam& optimizer, const Batch& batch, at::Generator& generator) {
  const Old old(policy, batch);
  for (int epoch = 0; epoch < 6; ++epoch) {
    for (const auto& rows : shuffled(generator)) {
      const auto logits = policy->forward(batch.states.index({rows}));
      descend(optimizer, td::ppo_clip_loss(log_prob(logits, batch.actions.index({rows})), old.log_prob.index({rows}),
                                           batch.advantages.index({rows})));
    }
  }
  return measured_kl(policy, batch, old);
}

// Mean return of the policy's likeliest actions over 100 episodes, all at once.
double evaluate(nn::Sequential policy, uint64_t seed) {
  torch::NoGradGuard no_grad;
  CartPole env(kEpisodes, seed);
  auto total = torch::zeros({kEpisodes}), running = torch::ones({kEpisodes}, torch::kBool);
  while (running.any().item<bool>()) {
    const auto [reward, terminated, truncated] = env.step(policy->forward(env.state()).argmax(-1));
    total += reward * running;
    running &= ~(terminated | truncated);
  }
  return total.mean().item<double>();
}

// Trains until the mean return is enough, then measures it on episodes that did not choose the policy.
bool solve(bool trpo, uint64_t seed) {
  torch::manual_seed(seed);
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  CartPole env(kEnvironments, seed);
  auto policy = network(2), value = network(1);
  torch::optim::Adam policy_optimizer(policy->parameters(), torch::optim::AdamOptions(1e-3));
  torch::optim::Adam value_optimizer(value->parameters(), torch::optim::AdamOptions(3e-3));

  const char* name = trpo ? "trpo" : "ppo";
  std::printf("%s, seed %d\n", name, static_cast<int>(seed));
  double largest_kl = 0, score = 0;
  for (int number = 1; number <= kBatches && score < kEnough; ++number) {
    const auto batch = collect(env, policy, value);
    const double kl = trpo ? trpo_update(policy, batch) : ppo_update(policy, policy_optimizer, batch, generator);
    largest_kl = std::max(largest_kl, kl);
    for (int epoch = 0; epoch < 5; ++epoch) {
      for (const auto& rows : shuffled(generator)) {
        const auto estimate = value->forward(batch.states.index({rows})).squeeze(-1);
        descend(value_optimizer, (estimate - batch.returns.index({rows})).square().mean());
      }
    }
    if (number % 5 == 0) {
      score = evaluate(policy, 1000 + number);
      std::printf("  batch %3d  mean return %5.1f  KL(old || new) %.5f\n", number, score, kl);
    }
  }
  const double final_score = evaluate(policy, seed + 1);
  std::printf("%s: mean return %.1f over %d episodes, largest KL %.5f\n", name, final_score,
              static_cast<int>(kEpisodes), largest_kl);
  return final_score >= kSolved;
}

int run(bool quick) {
  torch::set_num_threads(1);  // such small models gain nothing from a second thread
  bool solved = true;
  for (const bool trpo : {true, false}) {
    for (uint64_t seed = 0; seed < (quick ? 1 : 3); ++seed) solved = solve(trpo, seed) && solved;
  }
  if (!solved) std::fprintf(stderr, "FAILED: a mean return of %g was expected\n", kSolved);
  return solved ? 0 : 1;
}

int main(int argc, char** argv) { return run_program(argc, argv, run); }
