"""Speed and memory of finetune_rainbow.py against the plain way of doing the same, on the same machine in the same run.

    python benchmarks/rainbow.py                 all parts; appends the figures to benchmarks/rainbow.json
    python benchmarks/rainbow.py resnet          updates/s on the frozen full ResNet-50, batch 32
    python benchmarks/rainbow.py nature          agent steps/s with the Nature CNN
    python benchmarks/rainbow.py replay          sampled batches/s and memory at 100,000 transitions

Ours is the script itself in a subprocess, timed by its TensorBoard entries, here one for each step with an update. The
plain way is below: everything in fp32, a pass through the backbone for each of the three uses of its output, the target
distribution sample by sample, and a replay of the published single-file structure: each transition with both stacks,
n-step returns put together as they are played, a binary sum tree of Python loops. Networks, augmentation, environment,
allocator and all numbers are the same, an update for each agent step.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import ALLOCATOR, ROOT, ROUNDS, begin, load, median, record, shown, start, table, take_turns
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SEED = 0
NATURE = ["--game", "freeway", "--encoder", "nature", "--learning-starts", "100"]
SETTINGS = {  # arguments of the script; timed are the agent steps from the second number to the third
    "resnet": (["--game", "pong", "--learning-starts", "20", "--updates-per-step", "1"], 21, 24),
    "nature": ([*NATURE, "--updates-per-step", "1"], 105, 155),
}


# === the plain way ====================================================================================================
class PlainReplay:
    """Both stacks of every transition, and priorities in a binary tree whose sums Python loops keep and descend."""

    def __init__(self, capacity: int, n_steps: int, discount: float):
        self.capacity, self.discount, self.recent = capacity, discount, deque(maxlen=n_steps)
        self.obs = np.zeros((capacity, 4, 84, 84), np.uint8)
        self.next_obs = np.zeros((capacity, 4, 84, 84), np.uint8)
        self.actions, self.rewards = np.zeros(capacity, np.int64), np.zeros(capacity, np.float32)
        self.dones = np.zeros(capacity, bool)
        self.leaves = 2 ** (capacity - 1).bit_length()
        self.sums = np.zeros(2 * self.leaves)
        self.position = self.size = 0
        self.max_priority = 1.0

    def set_priority(self, index: int, priority: float) -> None:
        node = index + self.leaves
        self.sums[node] = priority**0.5
        while node > 1:
            node //= 2
            self.sums[node] = self.sums[2 * node] + self.sums[2 * node + 1]

    def add(self, obs, action, reward, next_obs, done) -> None:
        self.recent.append((obs, action, reward))
        if len(self.recent) < self.recent.maxlen and not done:
            return
        n_step_return = 0.0
        for _, _, r in reversed(self.recent):
            n_step_return = r + self.discount * n_step_return
        i = self.position
        self.obs[i], self.actions[i] = self.recent[0][:2]
        self.rewards[i], self.next_obs[i], self.dones[i] = n_step_return, next_obs, done
        self.set_priority(i, self.max_priority)
        self.position, self.size = (i + 1) % self.capacity, min(self.size + 1, self.capacity)
        if done:
            self.recent.clear()

    def sample(self, batch_size: int, beta: float, rng: np.random.Generator) -> tuple:
        indices = []
        segment = self.sums[1] / batch_size
        for i in range(batch_size):
            mass, node = (i + rng.random()) * segment, 1
            while node < self.leaves:
                node *= 2
                if mass >= self.sums[node]:
                    mass -= self.sums[node]
                    node += 1
            indices.append(min(node - self.leaves, self.size - 1))
        priorities = self.sums[np.array(indices) + self.leaves]
        weights = (self.size * priorities / self.sums[1]) ** -beta
        batch = self.obs[indices], self.actions[indices], self.rewards[indices]
        return indices, weights / weights.max(), (*batch, self.next_obs[indices], self.dones[indices])

    def nbytes(self) -> int:
        arrays = self.obs, self.next_obs, self.actions, self.rewards, self.dones, self.sums
        return sum(array.nbytes for array in arrays)


def plain(module, args, first: int, last: int) -> list[float]:
    """Seconds at which the agent steps from `first` to `last` were done."""
    torch.manual_seed(SEED)
    backbone = module.Nature() if args.encoder == "nature" else module.ResNet(args.width_multiplier, args.blocks)
    env = module.Environment(args, args.game)
    online = module.Network(args, backbone.requires_grad_(args.encoder == "nature"), env.num_actions)
    target = module.copy.deepcopy(online).requires_grad_(False)
    parameters = [parameter for parameter in online.parameters() if parameter.requires_grad]
    averages = [q for p, q in zip(online.parameters(), target.parameters(), strict=True) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=args.adam_eps)
    replay = PlainReplay(args.replay_capacity, args.n_steps, args.discount)
    support = torch.linspace(-args.max_return, args.max_return, args.atoms)
    spacing = support[1] - support[0]
    rng, updates, times = np.random.default_rng(SEED), 0, []

    def logits(network, stacks):
        return network(network.backbone(stacks))

    for step in range(1, last + 1):
        stack = env.stack
        if step <= args.learning_starts:
            action = int(rng.integers(env.num_actions))
        else:
            with torch.no_grad():
                q = (logits(target, torch.from_numpy(stack[None]) / 255).softmax(-1) * support).sum(-1)
            action = int(q.argmax())
        reward, ends = env.step(action)
        replay.add(stack, action, np.sign(reward), env.stack, ends)
        if env.terminal:
            env.reset(env.episode + 1)
        while updates < int((step - args.learning_starts) * args.updates_per_step):
            indices, weights, batch = replay.sample(args.batch_size, 0.4, rng)
            obs, actions, rewards, next_obs, dones = map(torch.from_numpy, batch)
            obs, next_obs = (module.augment(stacks[:, None]).squeeze(1) for stacks in (obs, next_obs))
            with torch.no_grad():
                best = (logits(online, next_obs).softmax(-1) * support).sum(-1).argmax(1)
                p = logits(target, next_obs).softmax(-1)[torch.arange(len(best)), best]
                moved = rewards[:, None] + args.discount**args.n_steps * ~dones[:, None] * support
                position = ((moved.clamp(support[0], support[-1]) - support[0]) / spacing).clamp(0, args.atoms - 1)
                lower, upper = position.floor().long(), position.ceil().long()
                m = torch.zeros_like(p)
                for i in range(len(p)):
                    m[i].index_add_(0, lower[i], p[i] * (upper[i].float() + (lower[i] == upper[i]) - position[i]))
                    m[i].index_add_(0, upper[i], p[i] * (position[i] - lower[i].float()))
            chosen = logits(online, obs)[torch.arange(len(best)), actions].log_softmax(-1)
            losses = -(m * chosen).sum(-1)
            loss = (torch.from_numpy(weights).float() * losses).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            for average, parameter in zip(averages, parameters, strict=True):
                average.data.mul_(args.target_momentum).add_(parameter.data, alpha=1 - args.target_momentum)
            for i, value in zip(indices, losses.tolist(), strict=True):
                replay.set_priority(i, value)
                replay.max_priority = max(replay.max_priority, value)
            updates += 1
        if step >= first:
            times.append(time.perf_counter())
    return times


# === measuring ========================================================================================================
def steps_per_second(arguments: list[str], first: int, last: int, way: str, environment: dict) -> dict[str, float]:
    """Agent steps per second of one run, of ours in a precision or of the plain way."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*arguments, "--total-steps", str(last)]
        if way == "plain":
            command = [sys.executable, __file__, "--plain", str(first), str(last), *options]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
            seconds = float(done.stdout.splitlines()[-1])
        else:
            quick = f"""--log-every 1 --eval-episodes 1 --max-episode-steps {last + 1} --exploration-steps 0
                --exploration-final 0 --precision""".split()
            command = [sys.executable, str(ROOT / "finetune_rainbow.py"), *options, *quick, way]
            subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
            events = EventAccumulator(str(next(Path(folder, "runs").iterdir())), {"scalars": 0})
            events.Reload()
            at = {event.step: event.wall_time for event in events.Scalars("charts/epsilon")}
            seconds = at[last] - at[first]
    return {"steps per second": (last - first) / seconds}


def replay_figures(module) -> dict:
    """Batches of 32 per second, and bytes, of both replays at 100,000 transitions; plays a simulated game."""
    args = module.Args(game="pong")
    rng = np.random.default_rng(SEED)
    frames = rng.integers(0, 256, (64, 4, 84, 84), np.uint8)
    found = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = module.Replay(args, Path(folder) / "frames.bin"), PlainReplay(100_000, 10, 0.99)
        for i in range(100_000 + args.n_steps):
            ends, reward = i % 1000 == 999, float(i % 10 == 0)
            ours.add(frames[i % 64, -1], i % 6, reward, i % 1000 == 0, ends, ends)
            theirs.add(frames[i % 64], i % 6, reward, frames[(i + 1) % 64], ends)
        samples = {"ours": (2000, lambda: ours.sample(32, rng)), "plain": (200, lambda: theirs.sample(32, 0.4, rng))}
        for _ in range(ROUNDS):
            for way, (batches, sample) in samples.items():
                clock = time.perf_counter()
                for _ in range(batches):
                    sample()
                found[way].append(batches / (time.perf_counter() - clock))
        found["bytes"] = ours.frames.nbytes + ours.fields.nbytes + sum(x.nbytes for x in ours.tree.levels)
        found["plain_bytes"] = theirs.nbytes()
    return found


def main(parts: list[str]) -> None:
    parts = parts or ["resnet", "nature", "replay"]
    begin(__doc__.partition("\n")[0])
    figures, rows, environment = {}, [], os.environ | ALLOCATOR
    for name in [name for name in SETTINGS if name in parts]:
        ways = {way: partial(steps_per_second, *SETTINGS[name], way, environment) for way in ("auto", "plain")}
        found = figures[name] = take_turns(ways)
        rates = [of["steps per second"] for of in found.values()]
        target = "2.5" if name == "resnet" else "1"
        rows.append([name, *map(shown, rates), f"{median(rates[0]) / median(rates[1]):.2f} ({target})"])
    if rows:
        table("Agent steps per second", ["", "ours", "plain", "ours / plain (target)"], rows)
    if "replay" in parts:
        found = figures["replay"] = replay_figures(load("finetune_rainbow"))
        rows = [["ours", shown(found["ours"]), f"{found['bytes'] / 1e9:.3f}"]]
        rows += [["plain", shown(found["plain"]), f"{found['plain_bytes'] / 1e9:.3f}"]]
        table("A replay of 100,000 transitions", ["", "batches of 32 per second", "GB"], rows)
    record("rainbow", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        module, (first, last) = load("finetune_rainbow"), map(int, sys.argv[2:4])
        times = plain(module, module.tyro.cli(module.Args, args=sys.argv[4:]), first, last)
        print(times[-1] - times[0])
    else:
        start([], main)
