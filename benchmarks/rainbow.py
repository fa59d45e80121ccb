"""Speed of finetune_rainbow.py against the plain way of doing the same, in turns on the same machine.

    python benchmarks/rainbow.py            all parts; appends the figures to benchmarks/rainbow.json
    python benchmarks/rainbow.py resnet     the frozen full ResNet-50; on CUDA one run alone, then six at once
    python benchmarks/rainbow.py nature     the Nature CNN; on CUDA an update every fourth agent step

Ours is the script itself, timed by its TensorBoard entries. The plain way is below: everything eager and in fp32, a
pass through the backbone for each of three uses, the target distribution sample by sample, and a replay of the
published single-file structure: each transition with both stacks, a sum tree of Python loops. Networks, augmentation,
environment and all numbers are the same. Of several runs at once, the time counts in which all of them train.
"""

import json
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
from common import ALLOCATOR, DEVICE, ROOT, begin, load, median, record, shown, table, take_turns
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ON_GPU = DEVICE.type == "cuda"
ROUNDS = 2 if ON_GPU else 3
NATURE = ["--game", "freeway", "--encoder", "nature", "--learning-starts", "100"]
SETTINGS = {  # arguments; timed are the agent steps from the first number to the second, in steps of the third
    "resnet": (["--game", "pong", "--learning-starts", "20", "--updates-per-step", "1"], 21, 24, 1),
    "nature": ([*NATURE, "--updates-per-step", "1"], 110, 150, 10),
}
if ON_GPU:
    SETTINGS["resnet"] = (["--game", "pong", "--learning-starts", "200", "--updates-per-step", "2"], 300, 1000, 50)
    SETTINGS["nature"] = ([*NATURE, "--updates-per-step", "0.25"], 500, 5000, 100)


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


def plain(module, args, last: int, every: int) -> list:
    """Agent steps, every so many, and the times at which they were done"""
    torch.manual_seed(0)
    backbone = module.Nature() if args.encoder == "nature" else module.ResNet(args.width_multiplier, args.blocks)
    env = module.Environment(args)
    online = module.Network(args, backbone.requires_grad_(args.encoder == "nature"), env.num_actions).to(DEVICE)
    target = module.copy.deepcopy(online).requires_grad_(False)
    parameters = [parameter for parameter in online.parameters() if parameter.requires_grad]
    averages = [q for p, q in zip(online.parameters(), target.parameters(), strict=True) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=args.adam_eps)
    replay = PlainReplay(args.replay_capacity, args.n_steps, args.discount)
    support = torch.linspace(-args.max_return, args.max_return, args.atoms, device=DEVICE)
    spacing = support[1] - support[0]
    rng, updates, times = np.random.default_rng(0), 0, []

    def logits(network, stacks):
        return network(network.backbone(stacks))

    for step in range(1, last + 1):
        stack = env.stack
        if step <= args.learning_starts:
            action = int(rng.integers(env.num_actions))
        else:
            with torch.no_grad():
                q = (logits(target, torch.from_numpy(stack[None]).to(DEVICE) / 255).softmax(-1) * support).sum(-1)
            action = int(q.argmax())
        _, _, reward, _, ends, _ = env.step(action)
        replay.add(stack, action, np.sign(reward), env.stack, ends)
        if env.terminal:
            env.reset(env.episode + 1)
        while updates < int((step - args.learning_starts) * args.updates_per_step):
            indices, weights, batch = replay.sample(args.batch_size, 0.4, rng)
            obs, actions, rewards, next_obs, dones = (torch.from_numpy(array).to(DEVICE) for array in batch)
            obs, next_obs = (module.augment(stacks[:, None]).squeeze(1) for stacks in (obs, next_obs))
            with torch.no_grad():
                best = (logits(online, next_obs).softmax(-1) * support).sum(-1).argmax(1)
                p = logits(target, next_obs).softmax(-1)[torch.arange(args.batch_size, device=DEVICE), best]
                moved = rewards[:, None] + args.discount**args.n_steps * ~dones[:, None] * support
                position = ((moved.clamp(support[0], support[-1]) - support[0]) / spacing).clamp(0, args.atoms - 1)
                lower, upper = position.floor().long(), position.ceil().long()
                m = torch.zeros_like(p)
                for i in range(len(p)):
                    m[i].index_add_(0, lower[i], p[i] * (upper[i].float() + (lower[i] == upper[i]) - position[i]))
                    m[i].index_add_(0, upper[i], p[i] * (position[i] - lower[i].float()))
            chosen = logits(online, obs)[torch.arange(args.batch_size, device=DEVICE), actions].log_softmax(-1)
            losses = -(m * chosen).sum(-1)
            loss = (torch.from_numpy(weights).float().to(DEVICE) * losses).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            for average, parameter in zip(averages, parameters, strict=True):
                average.data.mul_(args.target_momentum).add_(parameter.data, alpha=1 - args.target_momentum)
            for i, value in zip(indices, losses, strict=True):
                replay.set_priority(i, value.item())
                replay.max_priority = max(replay.max_priority, value.item())
            updates += 1
        if step % every == 0:
            times.append((step, time.time()))
    return times


# === measuring ========================================================================================================
def start(setting: str, way: str, folder: str) -> subprocess.Popen:
    arguments, _, last, every = SETTINGS[setting]
    arguments = [*arguments, "--total-steps", str(last), "--device", DEVICE.type, "--replay-capacity", "10000"]
    command = [sys.executable, __file__, "--plain", str(last), str(every), *arguments]
    if way == "ours":
        quick = f"""--log-every {every} --eval-episodes 1 --max-episode-steps {last + 1} --exploration-steps 0
            --exploration-final 0""".split()
        command = [sys.executable, str(ROOT / "finetune_rainbow.py"), *arguments, *quick]
    with open(Path(folder, "log"), "w") as log:
        return subprocess.Popen(command, cwd=folder, env=os.environ | ALLOCATOR, stdout=log, stderr=subprocess.STDOUT)


def steps_per_second(setting: str, way: str, runs: int) -> dict[str, float]:
    """Agent steps per second of so many runs at once, taken together, while all of them train"""
    _, first, _, _ = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as top:
        folders = [tempfile.mkdtemp(dir=top) for _ in range(runs)]
        processes = [start(setting, way, folder) for folder in folders]
        curves = []
        for process, folder in zip(processes, folders, strict=True):
            if process.wait():
                raise SystemExit(Path(folder, "log").read_text()[-3000:])
            if way == "ours":
                events = EventAccumulator(str(next(Path(folder, "runs").iterdir())), {"scalars": 0})
                events.Reload()
                curve = [(event.step, event.wall_time) for event in events.Scalars("charts/epsilon")]
            else:
                curve = json.loads(Path(folder, "log").read_text().splitlines()[-1])
            curves.append(np.array([point for point in curve if point[0] >= first]).T)
        begins, ends = max(times[0] for _, times in curves), min(times[-1] for _, times in curves)
        if begins >= ends:
            raise SystemExit("The runs did not train at the same time: time more steps.")
        steps = sum(np.interp(ends, times, steps) - np.interp(begins, times, steps) for steps, times in curves)
    return {"steps per second": steps / (ends - begins)}


def main(parts: list[str]) -> None:
    parts = parts or ["resnet", "nature"]
    begin(__doc__.partition("\n")[0], ROUNDS)
    figures, rows = {}, []
    for name in [name for name in SETTINGS if name in parts]:
        updates = float(SETTINGS[name][0][SETTINGS[name][0].index("--updates-per-step") + 1])
        for runs in (1, 6) if ON_GPU and name == "resnet" else (1,):
            ways = {way: partial(steps_per_second, name, way, runs) for way in ("ours", "plain")}
            found = figures[f"{name}, {runs} at once"] = take_turns(ways, ROUNDS)
            rates = [of["steps per second"] for of in found.values()]
            unit = "updates/s" if name == "resnet" else "agent steps/s"
            factor = updates if name == "resnet" else 1
            cells = [shown([factor * rate for rate in way]) for way in rates]
            rows.append([f"{name}, {runs} at once", unit, *cells, f"{median(rates[0]) / median(rates[1]):.2f}"])
    table("Speed", ["", "unit", "ours", "plain", "ours / plain"], rows)
    record("rainbow", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        module, (last, every) = load("finetune_rainbow"), map(int, sys.argv[2:4])
        print(json.dumps(plain(module, module.tyro.cli(module.Args, args=sys.argv[4:]), last, every)))
    else:
        main(sys.argv[1:])
