# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "ale-py==0.12.1", "numpy==2.4.6", "tyro==1.0.17", "tensorboard==2.21.0",
#   "tqdm==4.70.1"]
# ///
"""Trains Rainbow (1710.02298) with DQN's small network on one game, from scratch, and records what it plays.

The recordings are laid out as the DQN Replay Dataset: the other scripts read them by --data-dir. The n-th million of
agent steps is replay checkpoint n, and the seed is the number of the run. Of each, its first rows are recorded:

    <data-dir>/<Game>/<seed>/replay_logs/$store$_{observation,action,reward,terminal}_ckpt.<n>.gz

With the defaults, this is the data on which the Atari Pre-training Benchmark (2406.06037) clones the far-OOD games:

    python record_replay.py --game klax --data-dir /data/far_ood
    python finetune_bc.py --game klax --data-dir /data/far_ood --runs 1 --checkpoints 2

The loss is that of finetune_rainbow.py, whose docstring explains it. The same command continues a run that was cut off,
and does nothing if its recordings are complete. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 write a checkpoint and end the run.
"""

import copy
import gzip
import json
import math
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import ale_py
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# === arguments ========================================================================================================
@dataclass
class Args:
    game: str  # such as ms_pacman or MsPacman: one of the benchmark's 65
    data_dir: Path  # folder to record into; give it to the other scripts as --data-dir
    steps_per_checkpoint: int = 1_000_000  # agent steps of a replay checkpoint
    rows_per_checkpoint: int = 50_000  # rows to record of each, and one that readers leave out; 0 records all
    total_steps: int = 2_000_000  # agent steps; each is one action and 4 frames of the game
    learning_starts: int = 20_000  # agent steps with random actions before the first update
    updates_per_step: float = 1.0  # updates for each agent step after learning_starts; 0.25 is one every fourth step
    batch_size: int = 32  # transitions in an update
    learning_rate: float = 1e-4  # of Adam
    adam_eps: float = 1.5e-4  # epsilon of Adam
    max_grad_norm: float = 10.0  # gradients are clipped to this L2 norm; inf turns clipping off
    target_momentum: float = 0.99  # of the target network, after every update; 1 leaves it as initialised
    discount: float = 0.99  # gamma
    n_steps: int = 10  # n: steps whose rewards are summed before the target network estimates the rest
    atoms: int = 51  # atoms of the return's distribution
    max_return: float = 10.0  # the last atom; the first one is minus this
    replay_capacity: int = 1_000_000  # transitions that can be drawn: the latest ones
    priority_exponent: float = 0.5  # of prioritised replay; 0 draws all transitions alike
    importance_exponent: float = 0.4  # beta of prioritised replay at the first update, annealed to 1 at the last
    exploration_steps: int = 1_000_000  # agent steps after learning_starts over which epsilon falls linearly from 1
    exploration_final: float = 0.02  # epsilon after that: the probability of a random action

    episodic_life: bool = True  # a lost life ends an episode for learning; the game itself goes on
    repeat_action_probability: float = 0.0  # of sticky actions; 0.25 in the DQN Replay Dataset
    max_episode_steps: int = 27_000  # agent steps after which an episode is cut off

    seed: int = 1  # of initialisation, environment, exploration, sampling and augmentation; the number of the run
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # trains and acts
    precision: Literal["auto", "bf16", "fp32"] = "fp32"  # of the convolutions; auto: bfloat16 where supported
    compile: bool = torch.cuda.is_available()  # torch.compile the update and the action
    overwrite: bool = False  # begin anew, and replace this run's recordings
    log_every: int = 1_000  # agent steps between entries in TensorBoard
    save_every: int = 100_000  # agent steps between checkpoints


# === objective: Rainbow [shared] ======================================================================================
class Rainbow(nn.Module):
    """The online network p and the target network p'. `update` and `act` never wait for the device."""

    def __init__(self, args: Args, network: nn.Module, device: torch.device, precision: torch.autocast):
        super().__init__()
        self.args = args
        self.precision = precision  # autocast, for f alone
        self.online = network
        self.target = copy.deepcopy(network).requires_grad_(False).eval()
        self.frozen = not any(parameter.requires_grad for parameter in network.backbone.parameters())
        if self.frozen:  # f' = f: both networks share the module
            self.target.backbone = network.backbone.eval()
        self.register_buffer("support", torch.linspace(-args.max_return, args.max_return, args.atoms))  # z [atoms]
        self.to(device, memory_format=torch.channels_last)
        if self.frozen and precision._enabled:
            network.backbone.bfloat16()  # once, not in every pass
        learned = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self.learned = list(learned.values())
        self.averages = [self.target.get_parameter(name) for name in learned]  # the target's, of the same names
        options = dict(eps=args.adam_eps, fused=True, capturable=device.type == "cuda")
        self.optimizer = torch.optim.Adam(self.learned, args.learning_rate, **options)
        if args.compile:
            self.losses = torch.compile(self.losses, dynamic=False)
            self.act = torch.compile(self.act, dynamic=False)

    def losses(self, stacks: torch.Tensor, action: torch.Tensor, n_step_return: torch.Tensor, done: torch.Tensor):
        """All o_s, then all o_s+n [2b, 4, 84, 84]; a_s, G and done [b] -> L, Q and Q's target [3, b]"""
        with self.precision:
            if self.frozen:  # f needs no gradients: one pass is enough
                maps, next_maps = self.online.backbone(stacks).chunk(2)  # f(o_s), f(o_s+n) [b, channels, 6, 6]
                target_maps = next_maps  # f'(o_s+n)
            else:
                obs, next_obs = stacks.chunk(2)
                maps = self.online.backbone(obs)  # before no_grad: autocast would keep weights it casts there
                with torch.no_grad():
                    next_maps, target_maps = self.online.backbone(next_obs), self.target.backbone(next_obs)
        i = torch.arange(len(action), device=action.device)
        with torch.no_grad():
            best = self.q(self.online(next_maps)).argmax(1)  # a* [b]
            p = self.target(target_maps)[i, best].softmax(1)  # p'(o_s+n, a*) [b, atoms]
            discount = self.args.discount**self.args.n_steps * ~done  # [b], gamma^n, or 0 where an episode ended
            atoms = n_step_return[:, None] + discount[:, None] * self.support  # [b, atoms]
            m = project(p, atoms, self.support)  # [b, atoms]
        logits = self.online(maps)[i, action]  # [b, atoms]
        cross_entropy = -(m * logits.log_softmax(1)).sum(1)  # L [b]
        cross_entropy = cross_entropy.clamp(1e-5, 1e5)  # as in the original code: a priority of 0 is never drawn again
        return torch.stack([cross_entropy, self.q(logits.detach()), (p * atoms).sum(1)])

    def update(self, frames, is_first, action, n_step_return, done, weight) -> torch.Tensor:
        """One update on a batch of `Replay.sample` with weights w [b] -> [2 + 3b]: loss, gradient norm and `losses`"""
        stacks = augment(stack_frames(frames, is_first)).squeeze(1)  # [2b, 4, 84, 84]
        losses = self.losses(stacks, action, n_step_return, done)
        loss = (weight * losses[0]).mean()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.learned, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():  # target = momentum target + (1 - momentum) online
            torch._foreach_lerp_(self.averages, self.learned, 1 - self.args.target_momentum)
        return torch.cat([torch.stack([loss, grad_norm]), losses.flatten()]).detach()

    @torch.no_grad()
    def act(self, stacks: torch.Tensor) -> torch.Tensor:
        """Q of the target network, which is the player: stacks uint8 [n, 4, 84, 84] -> [n, actions]"""
        with self.precision:
            maps = self.target.backbone(stacks / 255)
        return self.q(self.target(maps))

    def q(self, logits: torch.Tensor) -> torch.Tensor:
        """Q = sum_j z_j p_j: [..., atoms] -> [...]"""
        return (logits.softmax(-1) * self.support).sum(-1)


# === distributional returns [shared] ==================================================================================
def project(probabilities: torch.Tensor, atoms: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Projects the probabilities of any atoms, [b, n] both, onto the support [n] (1707.06887, algorithm 1).

    Each probability is split linearly between the two points of the support next to its atom -> [b, n]
    """
    last = len(support) - 1
    position = ((atoms - support[0]) / (support[last] - support[0]) * last).clamp(0, last)  # [b, n], 0 to n - 1
    distance = (position[:, :, None] - torch.arange(last + 1, device=support.device)).abs()  # [b, n, n], to each point
    share = (1 - distance).clamp(min=0)  # 1 where the atom is on the point, 0 from the next point on
    return (probabilities[:, :, None] * share).sum(1)


# === network ==========================================================================================================
class Network(nn.Module):
    """DQN's (Mnih et al. 2015), with 51 atoms for each action. forward: maps [n, 64, 7, 7] -> [n, actions, atoms]"""

    def __init__(self, args: Args, actions: int):
        super().__init__()
        first, second, third = nn.Conv2d(4, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)
        self.backbone = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU())  # f
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU())  # g
        self.head = nn.Linear(512, actions * args.atoms)  # h
        self.shape = (actions, args.atoms)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(maps.float())).unflatten(1, self.shape)


# === replay ===========================================================================================================
class SumTree:
    """Priorities of `size` slots. A node is the sum of its 64 children: 4 levels for 1,000,000 slots, not 20."""

    def __init__(self, size: int):
        self.levels = [np.zeros(math.ceil(size / 64) * 64)]  # the leaves first, the root's children last
        while len(self.levels[-1]) > 64:
            self.levels.append(np.zeros(math.ceil(len(self.levels[-1]) / 64 / 64) * 64))

    def set(self, slots: np.ndarray, priorities: np.ndarray | float) -> None:
        self.levels[0][slots] = priorities
        for children, parents in zip(self.levels[:-1], self.levels[1:], strict=True):
            slots = slots // 64
            parents[slots] = children.reshape(-1, 64)[slots].sum(1)

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """The slots [b] at the shares uniform [b], in [0, 1), of the sum of all priorities"""
        node = np.zeros(len(uniform), int)
        left = uniform * self.levels[-1].sum()
        for level in reversed(self.levels):
            sums = level.reshape(-1, 64)[node].cumsum(1)  # [b, 64]
            left = np.minimum(left, np.nextafter(sums[:, -1], 0))  # rounding never leads to a slot of priority 0
            child = (sums <= left[:, None]).sum(1)
            left -= np.where(child > 0, sums[np.arange(len(node)), child - 1], 0)
            node = node * 64 + child
        return node


class Replay:
    """The latest transitions: row i is in slot i modulo `size`.

    A row can be drawn once its n steps, or the end of its life within them, are known, until it is older than
    `capacity`. `save_every` more slots keep what a checkpoint needs until the next one is written.
    """

    def __init__(self, args: Args):
        self.n_steps, self.discount, self.exponent = args.n_steps, args.discount, args.priority_exponent
        self.capacity = args.replay_capacity
        self.size = args.replay_capacity + HISTORY + args.save_every
        self.frames = np.zeros((self.size, 84, 84), np.uint8)
        self.transitions = np.zeros(self.size, TRANSITION)
        self.tree = SumTree(self.size)  # of the priorities, to the power of the exponent
        self.rows = 0  # rows played
        self.ready = 0  # rows whose future is known
        self.saved = 0  # rows whose frames are in the file
        self.greatest_loss = 1.0  # the priority of rows that no update has seen

    def add(self, frame: np.ndarray, *transition) -> None:
        """Adds a row: o [84, 84] and TRANSITION's fields."""
        slot = self.rows % self.size
        self.frames[slot], self.transitions[slot] = frame, transition
        self.rows += 1
        life_over = self.transitions["life_over"][slot]
        ready = self.rows if life_over else max(self.ready, self.rows - self.n_steps)
        self.tree.set(np.arange(self.ready, ready) % self.size, self.greatest_loss**self.exponent)
        self.ready = ready
        if self.rows > self.capacity:  # this row is too old now
            self.tree.set(np.array([self.rows - 1 - self.capacity]) % self.size, 0)

    def sample(self, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict]:
        """Draws a slot from each of b equal parts of the sum of priorities: slots [b], priorities [b] and a batch"""
        slots = self.tree.draw((np.arange(batch_size) + rng.random(batch_size)) / batch_size)
        return slots, self.tree.levels[0][slots], make_batch(self, slots)

    def set_losses(self, slots: np.ndarray, losses: np.ndarray) -> None:
        self.tree.set(slots, losses.astype(float) ** self.exponent)
        self.greatest_loss = max(self.greatest_loss, float(losses.max()))

    def state_dict(self) -> dict:
        """Everything but the frames"""
        state = {"transitions": torch.tensor(self.transitions.view(np.uint8))}
        state["priorities"] = torch.tensor(self.tree.levels[0])
        return state | {"rows": self.rows, "ready": self.ready, "greatest_loss": self.greatest_loss}

    def load_state_dict(self, state: dict) -> None:
        self.transitions = state["transitions"].numpy().view(TRANSITION)
        self.tree.set(np.arange(self.size), state["priorities"].numpy()[: self.size])
        self.rows, self.ready, self.greatest_loss = state["rows"], state["ready"], state["greatest_loss"]

    def save_frames(self, path: Path) -> None:
        """Writes the frames that are new since the last time into their slots of the file."""
        path.touch()
        with open(path, "r+b") as file:
            for row in range(self.saved, self.rows):
                slot = row % self.size
                file.seek(slot * 84 * 84)
                file.write(self.frames[slot])
        self.saved = self.rows

    def load_frames(self, path: Path) -> None:
        with open(path, "rb") as file:
            file.readinto(self.frames)
        self.saved = self.rows


# === transitions [shared] =============================================================================================
# is_first: the row's frame is the first of a game. life_over: an episode for learning ends with this step, as a life is
# lost or the game is over. game_over: the game ends with this step, lost, won or cut off.
TRANSITION = np.dtype([("action", "u1"), ("reward", "f4"), ("is_first", "?"), ("life_over", "?"), ("game_over", "?")])


def make_batch(replay, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of b rows: action a_s, n_step_return G and done [b]; frames uint8 [2b, 4, 84, 84] and is_first [2b, 4].

    The first b windows of frames are those of o_s, the others those of o_s+n. Where done, o_s stands for o_s+n: the
    target is G alone, so that any stack will do.
    """
    size = len(replay.frames)  # in a replay that is a ring, the first row follows the last one
    steps = replay.transitions[(rows[:, None] + np.arange(replay.n_steps)) % size]  # [b, n]
    ended = steps["life_over"].cumsum(1) - steps["life_over"] > 0  # [b, n], whether an earlier step ended the episode
    discounts = replay.discount ** np.arange(replay.n_steps)  # gamma^k [n]
    n_step_return = (np.sign(steps["reward"]) * ~ended) @ discounts  # G [b]
    done = steps["life_over"].any(1)  # an episode for learning ends within the n steps: no return follows them
    newest = np.concatenate([rows, np.where(done, rows, rows + replay.n_steps)])  # [2b], the stacks' last rows
    window = (newest[:, None] + np.arange(-HISTORY, 1)) % size  # [2b, 4]
    batch = {"frames": replay.frames[window], "is_first": replay.transitions["is_first"][window], "done": done}
    batch["action"] = steps["action"][:, 0].astype(int)
    batch["n_step_return"] = n_step_return.astype(np.float32)
    return batch


# === CUDA graphs [shared] =============================================================================================
class Graph:
    """Calls a function of tensors with NumPy arrays. On CUDA, the fourth call captures its kernels, which are replayed
    from then on. The first three compile, and allocate what libraries and the optimizer keep."""

    def __init__(self, function, device: torch.device):
        self.function, self.device = function, device
        self.calls = 0

    def __call__(self, **arrays: np.ndarray) -> np.ndarray:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.device.type != "cuda":
            return self.function(**tensors).numpy()
        self.calls += 1
        if self.calls == 1:
            self.pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            self.inputs = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            self.stream = torch.cuda.Stream(self.device)
            self.graph = torch.cuda.CUDAGraph()
        for name, tensor in tensors.items():
            self.pinned[name][: len(tensor)] = tensor  # the last rows stay as they were if these are fewer
            self.inputs[name].copy_(self.pinned[name], non_blocking=True)
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):  # not on the default stream, as PyTorch asks of calls before a capture
                return self.function(**self.inputs).cpu().numpy()
        if self.calls == 4:
            with torch.cuda.graph(self.graph, stream=self.stream):  # which first waits for the device
                self.output = self.function(**self.inputs)
        self.graph.replay()
        return self.output.cpu().numpy()  # the only wait


# === environment [shared] =============================================================================================
class Environment:
    """One game. Its state is a function of the seed, the episode and the actions since its reset."""

    def __init__(self, args: Args):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        options = dict(noop_max=30, use_fire_reset=False, reward_clipping=False)
        options["repeat_action_probability"] = args.repeat_action_probability
        options["max_num_frames_per_episode"] = 4 * args.max_episode_steps
        self.env = AtariVectorEnv(args.game, 1, **options)
        self.num_actions = int(self.env.single_action_space.n)
        self.args = args
        self.reset(0)

    def reset(self, episode: int) -> None:
        seed = int(np.random.default_rng([self.args.seed, episode]).integers(2**30))
        stacks, info = self.env.reset(seed=seed)
        self.stack, self.lives = stacks[0], info["lives"][0]  # stack [4, 84, 84]
        self.episode = episode
        self.actions = []  # since the reset
        self.score = 0.0
        self.game_over = False

    def step(self, action: int) -> tuple:
        """Plays a step and returns its row for `Replay.add`."""
        frame = self.stack[-1]
        is_first = not self.actions
        stacks, rewards, terminated, truncated, info = self.env.step(np.array([action]))
        self.game_over = bool(terminated[0] or truncated[0])
        life_over = self.game_over or (self.args.episodic_life and info["lives"][0] < self.lives)
        self.stack, self.lives = stacks[0], info["lives"][0]
        self.actions.append(action)
        self.score += float(rewards[0])
        return frame, action, rewards[0], is_first, life_over, self.game_over


# === frame stacks and augmentation [shared] ===========================================================================
HISTORY = 3  # a stack is a row's frame and those of the 3 rows before it: 4 frames


def stack_frames(frames: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
    """Every stack of 4 consecutive frames in windows of rows, oldest first; frames of an earlier episode are zeroed.

    frames uint8 [b, 3+n, 84, 84], is_first bool [b, 3+n] -> uint8 [b, n, 4, 84, 84]
    """
    size = HISTORY + 1
    episode = is_first.unfold(1, size, 1).cumsum(-1)  # [b, n, 4], episodes begun within the stack, up to this frame
    same = episode == episode[..., -1:]  # frames of the same episode as the stack's last frame
    return frames.unfold(1, size, 1).movedim(-1, 2) * same[..., None, None]


def augment(stacks: torch.Tensor) -> torch.Tensor:
    """Random shift (repeats the edge) and intensity, one draw a sample: uint8 [b, n, 4, 84, 84] -> float32, 0 to 1.1"""
    b = len(stacks)
    device = stacks.device
    # Every process draws for all samples and takes its part, so that any number of processes computes the same.
    shift = torch.randint(-4, 5, (WORLD_SIZE * b, 2, 1), device=device).chunk(WORLD_SIZE)[RANK]
    rows, columns = (torch.arange(84, device=device) + shift).clamp(0, 83).unbind(1)  # [b, 84] each
    sample = torch.arange(b, device=device)[:, None, None]
    pixels = stacks.permute(0, 3, 4, 1, 2)[sample, rows[:, :, None], columns[:, None, :]]  # [b, 84, 84, n, 4]
    noise = torch.randn(WORLD_SIZE * b, 1, 1, 1, 1, device=device).chunk(WORLD_SIZE)[RANK].clamp(-2, 2)
    return (pixels * ((1 + 0.05 * noise) / 255)).permute(0, 3, 4, 1, 2)


# === processes and precision [shared] =================================================================================
RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1  # number of this process, its number on its machine, number of processes
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process
    RANK = int(os.environ["RANK"])
    LOCAL_RANK = int(os.environ["LOCAL_RANK"])
    WORLD_SIZE = int(os.environ["WORLD_SIZE"])
# Options of progress bars. In a log file, a bar prints a line every 30 seconds.
BAR = {"dynamic_ncols": True} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 60}


def set_up_device(device: str, precision: str, compiles: bool) -> tuple[torch.device, torch.autocast]:
    """The device, and autocast to bfloat16 if `precision` is bf16, or is auto and the hardware supports it"""
    device = torch.device(device)
    native = torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = precision == "bf16" or (precision == "auto" and native)
    if RANK == 0:
        print(f"Device: {device}, precision: {'bfloat16' if bf16 else 'float32'}", flush=True)
    if compiles and not any(shutil.which(name) for name in ("gcc", "clang", os.environ.get("CC", ""))):
        raise SystemExit("torch.compile needs a compiler, and there is none: install gcc and g++, or use --no-compile.")
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


# === files [shared] ===================================================================================================
@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, unlike any other process's; the file is then renamed, so that `path` is whole or absent."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    yield temporary
    temporary.replace(path)


# === games [shared] ===================================================================================================
# ID, in distribution: for pre-training. OOD, out of distribution: for fine-tuning alone.
ID_GAMES = """air_raid amidar asteroids atlantis bank_heist battle_zone berzerk bowling boxing breakout carnival
    centipede chopper_command crazy_climber demon_attack double_dunk elevator_action enduro fishing_derby freeway
    frostbite gopher gravitar hero ice_hockey jamesbond kangaroo krull kung_fu_master montezuma_revenge ms_pacman
    name_this_game phoenix pitfall private_eye qbert road_runner robotank skiing solaris space_invaders star_gunner
    tennis time_pilot tutankham up_n_down video_pinball wizard_of_wor yars_revenge zaxxon""".split()  # for pre-training
NEAR_OOD_GAMES = "alien assault asterix beam_rider journey_escape pong pooyan riverraid seaquest venture".split()
FAR_OOD_GAMES = "basic_math human_cannonball klax othello surround".split()
DQN_REPLAY_GAMES = sorted(ID_GAMES + NEAR_OOD_GAMES)  # game_id is a game's place in this list


def parse_game(name: str, games: list[str]) -> str:
    """ALE's name of one of these games: `ms_pacman` for both `ms_pacman` and `MsPacman`"""
    for game in games:
        if game.replace("_", "") == name.replace("_", "").lower():
            return game
    raise SystemExit(f"Unknown game {name!r}. Choose from: {' '.join(games)}")


# === signals [shared] =================================================================================================
def catch_signals() -> list[int]:
    """A list to which the signals that should end the run are added as they arrive"""
    received = []

    def note(number, _):
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # the last one is Slurm's warning
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored, and so it stays
            signal.signal(number, note)
    return received


# === playing and learning [shared] ====================================================================================
def train(model: Rainbow, replay: Replay, env: Environment, writer: SummaryWriter) -> Iterator[int]:
    """Plays and learns, from the replay's last row on. After each step it yields how many have been played."""
    args, device = model.args, model.support.device
    act, update = Graph(model.act, device), Graph(model.update, device)
    exploration = [args.learning_starts, args.learning_starts + args.exploration_steps]
    last_update = int((args.total_steps - args.learning_starts) * args.updates_per_step)
    recent = []  # loss, gradient norm, Q and its target of the updates since the last entry in TensorBoard
    logged = replay.rows  # steps played until that entry
    clock = time.perf_counter()
    for step in range(replay.rows, args.total_steps):
        # Augmentation depends on seed and step alone, mixed: PyTorch's CPU generator uses 32 bits of a seed.
        torch.manual_seed(int(np.random.default_rng([args.seed, step]).integers(2**32)))
        rng = np.random.default_rng([args.seed, step, 1])  # of the exploration and of the replay's draws
        epsilon = np.interp(step, exploration, [1, args.exploration_final])
        if rng.random() < epsilon:
            action = int(rng.integers(env.num_actions))
        else:
            action = int(act(stacks=env.stack[None]).argmax())
        replay.add(*env.step(action))
        played = step + 1
        if env.game_over:
            writer.add_scalar("charts/episodic_return", env.score, played)
            writer.add_scalar("charts/episodic_length", len(env.actions), played)
            env.reset(env.episode + 1)

        # The updates due before and after this step, rounded down: --updates-per-step may be a fraction.
        updates_before = int(max(0, step - args.learning_starts) * args.updates_per_step)
        updates_after = int(max(0, played - args.learning_starts) * args.updates_per_step)
        for i in range(updates_before, updates_after):
            rows, priorities, batch = replay.sample(args.batch_size, rng)
            beta = np.interp(i, [0, last_update], [args.importance_exponent, 1])
            weight = (priorities.min() / priorities) ** beta  # w [b]; the priorities have their exponent already
            values = update(**batch, weight=weight.astype(np.float32))  # [2 + 3b]
            loss, grad_norm = values[:2]
            cross_entropy, q, target_q = values[2:].reshape(3, -1)  # [b] each
            if not np.isfinite(values).all():
                raise SystemExit(f"Loss {loss} or gradient norm {grad_norm} is not finite at step {played}.")
            replay.set_losses(rows, cross_entropy)
            recent.append([loss, grad_norm, q.mean(), target_q.mean()])

        if recent and played % args.log_every == 0:
            rate = (played - logged) / (time.perf_counter() - clock)  # agent steps per second
            scalars = {"charts/SPS": rate, "charts/epsilon": epsilon, "charts/beta": beta}
            names = ("losses/loss", "losses/grad_norm", "losses/q", "losses/target_q")
            scalars |= dict(zip(names, np.mean(recent, 0), strict=True))
            for name, value in scalars.items():
                writer.add_scalar(name, value, played)
            recent = []
            logged = played
            clock = time.perf_counter()
        yield played  # here the caller shows the progress, and may write a checkpoint


# === recording ========================================================================================================
DTYPES = {"action": "<i4", "reward": "<f4", "terminal": "|u1", "observation": "|u1"}  # of the DQN Replay Dataset
PADDING = 3  # blank rows before every episode in the dataset


def write_file(path: Path, column: np.ndarray, slots: np.ndarray, dtype: str) -> None:
    """Writes these slots of a column, in a file of the dataset; -1 is a blank row."""
    with whole_file(path) as temporary, gzip.open(temporary, "wb", compresslevel=1) as file:
        header = {"descr": dtype, "fortran_order": False, "shape": (len(slots), *column.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
        for part in np.array_split(slots, math.ceil(len(slots) / 1000)):  # 7 MB of frames
            rows = column[part].astype(dtype)
            rows[part < 0] = 0
            file.write(rows.tobytes())


def record(args: Args, replay: Replay, logs: Path) -> int:
    """Writes a replay checkpoint if its rows are complete now. Returns its number, or 0 if there was none to write."""
    number, row = divmod(replay.rows - 1, args.steps_per_checkpoint)
    most = args.rows_per_checkpoint + 1 if args.rows_per_checkpoint else args.steps_per_checkpoint
    if row + 1 != min(most, args.steps_per_checkpoint):
        return 0
    slots = np.arange(replay.rows - 1 - row, replay.rows) % replay.size
    rows = replay.transitions[slots]
    firsts = np.flatnonzero(rows["is_first"])
    padded = np.insert(slots, np.repeat(firsts, PADDING), -1)
    if args.rows_per_checkpoint:
        padded = padded[:most]
    columns = {"action": replay.transitions["action"], "reward": replay.transitions["reward"]}
    columns |= {"terminal": replay.transitions["game_over"], "observation": replay.frames}
    for name, column in columns.items():
        write_file(logs / f"$store$_{name}_ckpt.{number + 1}.gz", column, padded, DTYPES[name])
    games = np.split(rows["reward"], firsts)[1:-1]  # whole ones
    mean = f"{np.mean([rewards.sum() for rewards in games]):.2f}" if games else "-"
    print(f"{logs}: checkpoint {number + 1}, {len(padded):,} rows, {len(games)} games, mean return {mean}", flush=True)
    return number + 1


MAY_CHANGE = "device compile overwrite log_every".split()  # between the parts of a run


def main(args: Args) -> None:
    for name in "batch_size n_steps exploration_steps max_episode_steps log_every save_every".split():
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1.")
    if not args.n_steps < args.learning_starts < args.total_steps or args.replay_capacity <= args.n_steps:
        raise SystemExit("Needed: --n-steps < --learning-starts < --total-steps, and --n-steps < --replay-capacity.")
    rows = min(args.rows_per_checkpoint or math.inf, args.steps_per_checkpoint)
    if args.total_steps % args.steps_per_checkpoint or args.replay_capacity < rows:
        multiple = "--total-steps must be a multiple of --steps-per-checkpoint"
        raise SystemExit(f"{multiple}, and --replay-capacity at least {rows}.")
    args.game = parse_game(args.game, [*DQN_REPLAY_GAMES, *FAR_OOD_GAMES])
    device, precision = set_up_device(args.device, args.precision, args.compile)

    args.data_dir = args.data_dir.expanduser().resolve()
    game_dir = args.data_dir / "".join(word.capitalize() for word in args.game.split("_"))
    logs = game_dir / f"{args.seed}" / "replay_logs"
    source = game_dir / "source.txt"
    last = args.total_steps // args.steps_per_checkpoint
    run_dir = Path("runs", f"{Path(__file__).stem}__{args.game}__{args.seed}")
    checkpoint, frames = run_dir / "checkpoint.pt", run_dir / "frames.bin"
    if any(game_dir.rglob("*.gz")) and not (source.exists() and source.read_text().strip() == "rainbow"):
        raise SystemExit(f"{game_dir} has recordings of another source. Choose another --data-dir.")
    continued = checkpoint.exists() and not args.overwrite
    if any(logs.glob("*.gz")) and not continued and not args.overwrite:
        if (logs / f"$store$_observation_ckpt.{last}.gz").exists():
            print(f"{logs} is complete. To record it again: --overwrite")
            frames.unlink(missing_ok=True)  # of a run that was killed just as it ended
            return
        raise SystemExit(f"{logs} has recordings of another run. Choose another --seed or --data-dir, or --overwrite.")

    plain_args = json.loads(json.dumps(asdict(args), default=str))
    if continued:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        changed = {k: old for k, old in state["args"].items() if k not in MAY_CHANGE and plain_args.get(k) != old}
        if changed:
            raise SystemExit(f"{checkpoint} was made with {changed}. Give the same, or --overwrite.")
    for folder in (logs, run_dir):
        folder.mkdir(parents=True, exist_ok=True)
    with whole_file(source) as temporary:
        temporary.write_text("rainbow\n")
    if device.type != "cpu":
        torch.set_num_threads(1)  # idle threads would slow other runs
    torch.manual_seed(args.seed)
    env = Environment(args)
    model = Rainbow(args, Network(args, env.num_actions), device, precision)
    replay = Replay(args)
    if continued:
        model.load_state_dict(state["model"])
        model.optimizer.load_state_dict(model.optimizer.state_dict() | {"state": state["optimizer"]})
        replay.load_state_dict(state["replay"])
        replay.load_frames(frames)
        env.reset(state["episode"])
        for action in state["actions"]:
            env.step(action)
    else:
        for path in [checkpoint, frames, *run_dir.glob("events.*"), *logs.glob("*.gz")]:
            path.unlink(missing_ok=True)
    writer = SummaryWriter(run_dir, purge_step=replay.rows + 1)  # hides what was logged after the checkpoint
    with whole_file(run_dir / "args.json") as temporary:
        temporary.write_text(json.dumps(plain_args, indent=2))

    def save() -> None:
        writer.flush()  # first, so that nothing before the checkpoint is missing from the charts
        replay.save_frames(frames)
        state = {"args": plain_args, "replay": replay.state_dict(), "episode": env.episode, "actions": env.actions}
        state |= {"model": model.state_dict(), "optimizer": model.optimizer.state_dict()["state"]}
        with whole_file(checkpoint) as temporary:
            torch.save(state, temporary)

    save()  # where there is a checkpoint, the recordings are those of a run that goes on
    compiling = ", the first update compiles for about a minute" if args.compile else ""
    print(f"{run_dir}: from step {replay.rows:,} of {args.total_steps:,}{compiling}", flush=True)
    stops = catch_signals()  # one ends the run after a step
    steps = train(model, replay, env, writer)
    bar = tqdm(steps, f"recording {args.game}", args.total_steps, initial=replay.rows, unit="step", **BAR)
    for played in bar:
        bar.set_postfix_str(f"score {env.score:g}", refresh=False)
        number = record(args, replay, logs)
        if number or stops or played % args.save_every == 0:
            save()
        if number == last:
            break
        if stops:
            raise SystemExit(f"Stopped by a signal after step {played}. To go on: the same command without --overwrite")
    writer.close()
    checkpoint.unlink()
    frames.unlink()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
