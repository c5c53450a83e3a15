"""CartPole-v1 by TRPO and by PPO: a policy's step bounded, or penalised, by KL(old || new).

TRPO (Schulman et al., "Trust Region Policy Optimization", 2015) takes one step of `td.trust_region_step` a batch, and
the KL measured after it is asserted to be within the bound each time. PPO (Schulman et al., "Proximal Policy
Optimization Algorithms", 2017) takes several epochs of `td.ppo_clip_loss`, and reports the same KL. Either must reach
a mean return of 475 over 100 episodes, which is when CartPole-v1 counts as solved; the program fails if it does not.

    python policy_optimization.py --algorithm trpo    half a minute
    python policy_optimization.py --algorithm ppo
"""

import argparse
import copy
import sys
import time

import gymnasium
import torch
import torch_divergence as td
from torch import Tensor, nn

ENVIRONMENTS, STEPS = 16, 128  # a batch is 2048 steps
DISCOUNT, TRACE = 0.99, 0.95
MAX_KL = 0.01
SOLVED, EPISODES = 475.0, 100


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


class Batch:
    """What the policy saw and did, with advantages by generalised advantage estimation (Schulman et al., 2016)."""

    def __init__(self, env: gymnasium.vector.VectorEnv, state: Tensor, policy: nn.Module, value: nn.Module) -> None:
        states, actions, rewards, ends, cuts = [], [], [], [], []
        with torch.no_grad():
            for _ in range(STEPS):
                action = torch.distributions.Categorical(logits=policy(state)).sample()
                following, reward, terminated, truncated, _ = env.step(action.numpy())
                states.append(state)
                actions.append(action)
                rewards.append(torch.from_numpy(reward).float())
                ends.append(torch.from_numpy(terminated))
                cuts.append(torch.from_numpy(terminated | truncated))
                state = torch.from_numpy(following).float()
            self.last_state = state
            self.states = torch.stack(states)
            estimates = value(torch.cat((self.states, state.unsqueeze(0)))).squeeze(-1)
            advantage, advantages = torch.zeros(ENVIRONMENTS), []
            for t in reversed(range(STEPS)):
                target = rewards[t] + DISCOUNT * estimates[t + 1] * ~ends[t]
                advantage = target - estimates[t] + DISCOUNT * TRACE * advantage * ~cuts[t]
                advantages.append(advantage)
            advantages.reverse()
        self.actions = torch.stack(actions).flatten()
        self.returns = (torch.stack(advantages) + estimates[:-1]).flatten()
        self.states = self.states.flatten(0, 1)
        raw = torch.stack(advantages).flatten()
        self.advantages = (raw - raw.mean()) / (raw.std() + 1e-8)


def log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def trpo_update(policy: nn.Module, batch: Batch) -> float:
    """One step within the trust region. Returns KL(old || new)."""
    with torch.no_grad():
        old_logits = policy(batch.states)
        old = log_prob(old_logits, batch.actions)

    def surrogate() -> Tensor:
        return ((log_prob(policy(batch.states), batch.actions) - old).exp() * batch.advantages).mean()

    def kl() -> Tensor:
        return td.kl_div(policy(batch.states), old_logits)

    result = td.trust_region_step(policy.parameters(), surrogate, kl, max_kl=MAX_KL, damping=0.1)
    with torch.no_grad():
        measured = kl().item()
    assert measured <= MAX_KL, f"KL(old || new) = {measured} is outside the trust region of {MAX_KL}"
    assert result.kl == (measured if result.accepted else 0.0)
    return measured


def ppo_update(policy: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, generator: torch.Generator) -> float:
    """Six epochs of the clipped surrogate. Returns KL(old || new)."""
    with torch.no_grad():
        old_logits = policy(batch.states)
        old = log_prob(old_logits, batch.actions)
    for _ in range(6):
        for rows in torch.randperm(len(batch.states), generator=generator).split(512):
            loss = td.ppo_clip_loss(
                log_prob(policy(batch.states[rows]), batch.actions[rows]), old[rows], batch.advantages[rows]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return td.kl_div(policy(batch.states), old_logits).item()


def evaluate(policy: nn.Module, seed: int) -> float:
    """Mean return of the policy's likeliest actions over 100 episodes, all at once."""
    env = gymnasium.make_vec("CartPole-v1", num_envs=EPISODES, vectorization_mode="vector_entry_point")
    state, _ = env.reset(seed=seed)
    total, running = torch.zeros(EPISODES), torch.ones(EPISODES, dtype=torch.bool)
    with torch.no_grad():
        while running.any():
            action = policy(torch.from_numpy(state).float()).argmax(-1)
            state, reward, terminated, truncated, _ = env.step(action.numpy())
            total += torch.from_numpy(reward).float() * running
            running &= ~torch.from_numpy(terminated | truncated)
    env.close()
    return total.mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=("trpo", "ppo"), default="trpo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=150, help="at most")
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    env = gymnasium.make_vec("CartPole-v1", num_envs=ENVIRONMENTS, vectorization_mode="vector_entry_point")
    state = torch.from_numpy(env.reset(seed=options.seed)[0]).float()
    policy, value = network(2), network(1)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    value_optimizer = torch.optim.Adam(value.parameters(), lr=3e-3)

    best, best_policy, largest_kl, solved = 0.0, policy, 0.0, False
    for number in range(1, options.batches + 1):
        batch = Batch(env, state, policy, value)
        state = batch.last_state
        if options.algorithm == "trpo":
            kl = trpo_update(policy, batch)
        else:
            kl = ppo_update(policy, policy_optimizer, batch, generator)
        largest_kl = max(largest_kl, kl)
        for _ in range(5):
            for rows in torch.randperm(len(batch.states), generator=generator).split(512):
                error = (value(batch.states[rows]).squeeze(-1) - batch.returns[rows]).square().mean()
                value_optimizer.zero_grad()
                error.backward()
                value_optimizer.step()
        if number % 5 == 0:
            score = evaluate(policy, seed=1000 + number)
            if score > best:
                best, best_policy = score, copy.deepcopy(policy)
            print(f"  batch {number:3d}  mean return {score:5.1f}  KL(old || new) {kl:.5f}", flush=True)
            if score >= SOLVED:
                solved = True
                break
    final = evaluate(best_policy, seed=options.seed + 1)  # on episodes that did not choose the policy
    print(f"{options.algorithm}: mean return {final:.1f} over {EPISODES} episodes, largest KL {largest_kl:.5f}")
    print(f"{time.perf_counter() - started:.1f} s")
    if not (solved and final >= SOLVED):
        print(f"not solved: {SOLVED} expected", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
