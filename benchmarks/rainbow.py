"""Speed of Rainbow against the plain way of doing the same, in turns on the same machine.

    python benchmarks/rainbow.py            all parts; appends the figures to benchmarks/rainbow.json
    python benchmarks/rainbow.py resnet     finetune_rainbow.py, frozen ResNet-50; on CUDA one run, then six at once
    python benchmarks/rainbow.py nature     record_replay.py; on CUDA an update every fourth agent step
    python benchmarks/rainbow.py draws      a draw from 50,000 priorities and their update, array against tree of sums

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
LAST = {"resnet": 1000, "nature": 5000} if ON_GPU else {"resnet": 24, "nature": 150}  # agent steps of a run
SCRIPTS = {"resnet": "finetune_rainbow", "nature": "record_replay"}
RESNET = ["--game", "pong", "--total-steps", str(LAST["resnet"]), "--eval-episodes", "1"]
NATURE = ["--game", "freeway", "--total-steps", str(LAST["nature"]), "--steps-per-checkpoint", str(LAST["nature"])]
NATURE += ["--data-dir", "data", "--rows-per-checkpoint", "0", "--replay-capacity", "10000", "--learning-starts", "100"]
SETTINGS = {  # arguments; timed are the agent steps from the first number on, in steps of the second
    "resnet": ([*RESNET, "--learning-starts", "20", "--updates-per-step", "1"], 21, 1),
    "nature": ([*NATURE, "--updates-per-step", "1"], 110, 10),
}
if ON_GPU:
    SETTINGS["resnet"] = ([*RESNET, "--learning-starts", "200", "--updates-per-step", "2"], 300, 50)
    SETTINGS["nature"] = ([*NATURE, "--updates-per-step", "0.25"], 500, 100)


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


def plain(setting: str) -> list:
    """Agent steps, every so many, and the times at which they were done"""
    torch.manual_seed(0)
    module, (arguments, _, every) = load(SCRIPTS[setting]), SETTINGS[setting]
    args = module.tyro.cli(module.Args, args=[*arguments, "--device", DEVICE.type])
    env = module.Environment(args)
    backbone = [module.make_backbone(args)[0]] if setting == "resnet" else []
    online = module.Network(args, *backbone, env.num_actions).to(DEVICE)
    target = module.copy.deepcopy(online).requires_grad_(False)
    parameters = [parameter for parameter in online.parameters() if parameter.requires_grad]
    averages = [q for p, q in zip(online.parameters(), target.parameters(), strict=True) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=args.adam_eps)
    replay = PlainReplay(10_000, args.n_steps, args.discount)
    support = torch.linspace(-args.max_return, args.max_return, args.atoms, device=DEVICE)
    spacing = support[1] - support[0]
    rng, updates, times = np.random.default_rng(0), 0, []

    def logits(network, stacks):
        return network(network.backbone(stacks))

    for step in range(1, args.total_steps + 1):
        stack = env.stack
        if step <= args.learning_starts:
            action = int(rng.integers(env.num_actions))
        else:
            with torch.no_grad():
                q = (logits(target, torch.from_numpy(stack[None]).to(DEVICE) / 255).softmax(-1) * support).sum(-1)
            action = int(q.argmax())
        _, _, reward, _, life_over, _ = env.step(action)
        replay.add(stack, action, np.sign(reward), env.stack, life_over)
        if env.game_over:
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
    arguments, _, every = SETTINGS[setting]
    command = [sys.executable, __file__, "--plain", setting]
    if way == "ours":
        command = [sys.executable, str(ROOT / f"{SCRIPTS[setting]}.py"), *arguments, "--device", DEVICE.type]
        command += ["--log-every", str(every), "--max-episode-steps", str(LAST[setting] + 1)]
        command += ["--exploration-steps", "1", "--exploration-final", "0"]
    with open(Path(folder, "log"), "w") as log:
        return subprocess.Popen(command, cwd=folder, env=os.environ | ALLOCATOR, stdout=log, stderr=subprocess.STDOUT)


def steps_per_second(setting: str, way: str, runs: int) -> dict[str, float]:
    """Agent steps per second of so many runs at once, taken together, while all of them train"""
    _, first, _ = SETTINGS[setting]
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


def seconds_of_draws() -> dict[str, dict[str, list[float]]]:
    """Seconds of a draw of 32 and of their new priorities: of fine-tuning's array and of the recorder's tree"""
    replays = {}
    for name, of_its_own in (("finetune_rainbow", {}), ("record_replay", {"data_dir": Path("data")})):
        module = load(name)
        args = module.Args("pong", **of_its_own)
        args.replay_capacity = 100_000  # of the tree
        replay = module.Replay(args)
        for _ in range(50_000):
            replay.add(0, 0, 0, False, False, False)
        replays[name] = replay
        module.make_batch = lambda *_: {}  # which both have
    rng = np.random.default_rng(0)

    def draw(replay) -> dict[str, float]:
        for _ in range(3000):
            rows, _, _ = replay.sample(32, rng)
            replay.set_losses(rows, rng.exponential(2, 32))
        clock = time.perf_counter()
        for _ in range(3000):
            rows, _, _ = replay.sample(32, rng)
            replay.set_losses(rows, rng.exponential(2, 32))
        return {"seconds": (time.perf_counter() - clock) / 3000}

    ways = {"array": partial(draw, replays["finetune_rainbow"]), "tree": partial(draw, replays["record_replay"])}
    return take_turns(ways, ROUNDS)


def main(parts: list[str]) -> None:
    parts = parts or ["resnet", "nature", "draws"]
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
    if rows:
        table("Speed", ["", "unit", "ours", "plain", "ours / plain"], rows)
    if "draws" in parts:
        found = figures["draws"] = seconds_of_draws()
        rows = [[way, shown([1e6 * seconds for seconds in of["seconds"]])] for way, of in found.items()]
        table("A draw of 32 from 50,000 priorities and their update", ["", "microseconds"], rows)
    record("rainbow", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        print(json.dumps(plain(sys.argv[2])))
    else:
        main(sys.argv[1:])
