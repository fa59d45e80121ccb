# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "torchvision==0.29.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6",
#   "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0"]
# ///
"""Rainbow (1710.02298): fine-tunes a pre-trained ResNet-50 on one game by playing it, then plays 100 episodes.

A new neck g and head h on the frozen backbone f learn the distribution of the return of each action a: 51 atoms z from
-10 to 10 have the probabilities p(o, a) = softmax(h(g(f(o)))[a]) (C51, 1707.06887), and Q = sum_j z_j p_j. The target
network p' is p with averaged weights. Transitions i are drawn in proportion to priority_i^0.5 (1511.05952). At step s:

    G    = sum_{k<n} gamma^k sign(r_{s+k})       n-step return up to a lost life or the game's end; n = 10
    a*   = argmax_a Q(o_{s+n}, a)                double Q-learning (1509.06461)
    m    = p'(o_{s+n}, a*) moved to the atoms G + gamma^n z (G, if an episode ended), and projected onto z
    L_i  = -sum_j m_j log p(o_s, a_s)_j          cross-entropy, the new priority
    loss = mean_i w_i L_i                        w_i = priority_i^(-0.5 beta) / max_j w_j

    python finetune_rainbow.py --game pong --checkpoint runs/pretrain_atc__0/checkpoint.pt
    python finetune_rainbow.py --game pong                            # baseline "random": a frozen random backbone
    python finetune_rainbow.py --game pong --no-freeze-backbone       # baseline "e2e": everything is learned
    python finetune_rainbow.py --game klax --encoder nature --save-replay DIR --save-replay-every 50000     # records

The result, with the settings of the Atari Pre-training Benchmark (2406.06037), is results/rainbow/<method>/<game>/
seed<k>.json. The same command continues a run that was cut off, and does nothing if the result is there already.
"""

import copy
import gzip
import json
import math
import os
import signal
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import ale_py
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

# === processes and precision [shared] =================================================================================
RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1  # number of this process, its number on this machine, number of processes
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process
    RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16 if `precision` is bf16, or is auto and the hardware has instructions for it."""
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16" or (precision == "auto" and native))


# === arguments ========================================================================================================
@dataclass
class Args:
    game: str  # such as ms_pacman or MsPacman: one of the benchmark's 65
    checkpoint: Path | None = None  # of a pretrain_*.py run, or the original authors' .pth; default: a random backbone
    freeze_backbone: bool = True  # train the neck and the head only; the Nature CNN is always trained
    method: str = ""  # name in the results; default: the objective, <objective>_e2e, random, e2e or nature
    total_steps: int = 50_000  # agent steps of training; each is one action and 4 frames of the game
    learning_starts: int = 2_000  # agent steps with random actions before the first update
    updates_per_step: float = 2.0  # updates for each agent step after learning_starts; 0.25 is one every fourth step
    batch_size: int = 32  # transitions in an update
    learning_rate: float = 1e-4  # of Adam
    adam_eps: float = 1.5e-4  # epsilon of Adam
    max_grad_norm: float = 10.0  # gradients are clipped to this L2 norm; inf turns clipping off
    target_momentum: float = 0.99  # of the target network, after every update; 1 leaves it as initialised
    discount: float = 0.99  # gamma
    n_steps: int = 10  # n: steps whose rewards are summed before the target network estimates the rest
    atoms: int = 51  # atoms of the return's distribution
    max_return: float = 10.0  # the last atom; the first one is minus this
    replay_capacity: int = 100_000  # transitions that can be drawn: the latest ones
    priority_exponent: float = 0.5  # of prioritised replay; 0 draws all transitions alike
    importance_exponent: float = 0.4  # beta of prioritised replay at the first update, annealed to 1 at the last
    exploration_steps: int = 10_000  # agent steps after learning_starts over which epsilon falls linearly from 1
    exploration_final: float = 0.01  # epsilon after that: the probability of a random action

    encoder: Literal["resnet", "nature"] = "resnet"  # f: the ResNet-50, or DQN's small network, trained from scratch
    width_multiplier: float = 1.0  # scales the ResNet's channels; as in pre-training
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottleneck blocks of the four stages; as in pre-training
    episodic_life: bool = True  # a lost life ends an episode for learning; the game itself goes on
    repeat_action_probability: float = 0.0  # of sticky actions in training; 0.25 in the DQN Replay Dataset
    replay_dir: Path | None = None  # folder for the file of frames, on a fast local disk; default: the run's folder
    save_replay: Path | None = None  # record what is played into this folder, in DQN Replay's layout, run = seed
    save_replay_every: int = 1_000_000  # agent steps in a recorded replay checkpoint
    save_replay_rows: int = 0  # rows to record of each replay checkpoint, from its start; 0 records all
    eval_episodes: int = 100  # episodes of the evaluation; the score is their mean
    max_episode_steps: int = 27_000  # agent steps after which an episode is cut off, in training, too
    epsilon: float = 0.001  # probability of a random action in the evaluation
    video: bool = False  # write the first episode's first two minutes into the run's folder, as a GIF

    seed: int = 0  # of initialisation, environment, exploration, sampling, augmentation and evaluation
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # trains and acts
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the ResNet; auto: bfloat16 where the hardware supports it
    compile: bool = torch.cuda.is_available()  # torch.compile the update and the action
    results: Path = Path("results")  # folder of the results
    overwrite: bool = False  # replace the result and the run if there are any
    log_every: int = 1_000  # agent steps between entries in TensorBoard
    save_every: int = 10_000  # agent steps between checkpoints, and one at the end and on Ctrl-C or SIGTERM


# === resnet-50 [shared] ===============================================================================================
class Norm(nn.GroupNorm):
    """Group normalisation (1803.08494) with 4 groups and no parameters: [b, c, h, w] -> the same"""

    def __init__(self, channels: int):
        super().__init__(4, channels, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        # group_norm, compiled for a GPU, crashes in its backward pass (torch 2.11); these operations do not.
        y = x.permute(0, 2, 3, 1).unflatten(3, (4, -1)).float()  # [b, h, w, 4, c/4]
        variance, mean = torch.var_mean(y, (1, 2, 4), correction=0, keepdim=True)
        y = (y - mean) * (variance + self.eps).rsqrt()
        return y.to(x.dtype).flatten(3).permute(0, 3, 1, 2)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolution, and a shortcut: [b, c, h, w] -> [b, 4 planes, h/stride, w/stride]"""

    def __init__(self, in_channels: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, planes, 1, bias=False), Norm(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), Norm(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), Norm(4 * planes)
        self.downsample = nn.Identity()
        if stride > 1 or in_channels != 4 * planes:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, 4 * planes, 1, stride, bias=False), Norm(4 * planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-50 (1512.03385) without max-pool, named as in torchvision: [b, 4, 84, 84] -> [b, channels, 6, 6]"""

    def __init__(self, width_multiplier: float, blocks: tuple[int, int, int, int]):
        super().__init__()
        if width_multiplier <= 0 or width_multiplier * 16 % 1 or min(blocks) < 1:
            raise SystemExit("--width-multiplier must be a multiple of 1/16, and each of --blocks at least 1.")
        channels = width = int(64 * width_multiplier)
        self.conv1, self.bn1 = nn.Conv2d(4, width, 7, 2, 3, bias=False), Norm(width)
        for i in range(4):
            stage = nn.Sequential()
            for j in range(blocks[i]):
                stage.append(Bottleneck(channels, width * 2**i, stride=2 if i > 0 and j == 0 else 1))
                channels = 4 * width * 2**i
            self.add_module(f"layer{i + 1}", stage)
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # [b, 64, 42, 42], with a --width-multiplier of 1
        x = self.layer2(self.layer1(x))  # [b, 256, 42, 42], [b, 512, 21, 21]
        return self.layer4(self.layer3(x))  # [b, 1024, 11, 11], [b, 2048, 6, 6]


# === neck and head [shared] ===========================================================================================
class Neck(nn.Module):
    """Map times the game's embedding, averaged, LayerNorm, MLP: maps [b, c, 6, 6], game_id [b] -> [b, 512]"""

    def __init__(self, channels: int, games: int):
        super().__init__()
        self.spatial_embed = nn.Parameter(torch.randn(games, channels * 6 * 6))
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU())

    def forward(self, maps: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        embed = F.embedding(game_id, self.spatial_embed).view(maps.shape)  # [b, c, 6, 6]
        return self.mlp(self.norm((maps * embed).mean((2, 3))))


class GameLinear(nn.Module):
    """A linear layer for each game, y = x W_game + b_game: x [b, d], game_id [b] -> [b, a]"""

    def __init__(self, games: int, features: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(games, features, outputs))
        self.bias = nn.Parameter(torch.randn(games, outputs))

    def forward(self, x: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight  # [games, b, a]; this is cheaper than a matrix per sample (512 MB where a = 512)
        return y[game_id, torch.arange(len(x), device=x.device)] + F.embedding(game_id, self.bias)


# === frame stacks and augmentation [shared] ===========================================================================
HISTORY = 3  # a stack is a row's frame and the frames of the 3 rows before it


def stack_frames(frames: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
    """Every stack of 4 consecutive frames in windows of rows, oldest first; frames of an earlier episode are zeroed.

    frames uint8 [b, 3+n, 84, 84], is_first bool [b, 3+n] -> uint8 [b, n, 4, 84, 84]
    """
    episode = is_first.unfold(1, 4, 1).cumsum(-1)  # [b, n, 4], episodes that began within the stack, up to this frame
    same = episode == episode[..., -1:]  # frames of the same episode as the stack's last frame
    return frames.unfold(1, 4, 1).movedim(-1, 2) * same[..., None, None]


def augment(stacks: torch.Tensor) -> torch.Tensor:
    """Random shift (repeats the edge) and intensity, one draw a sample: uint8 [b, n, 4, 84, 84] -> float32, 0 to 1.1"""
    b, device = len(stacks), stacks.device
    # Every process draws for all samples and takes its part, so that any number of processes computes the same.
    shift = torch.randint(-4, 5, (WORLD_SIZE * b, 2, 1), device=device).chunk(WORLD_SIZE)[RANK]
    rows, columns = (torch.arange(84, device=device) + shift).clamp(0, 83).unbind(1)  # [b, 84] each
    sample = torch.arange(b, device=device)[:, None, None]
    pixels = stacks.permute(0, 3, 4, 1, 2)[sample, rows[:, :, None], columns[:, None, :]]  # [b, 84, 84, n, 4]
    noise = torch.randn(WORLD_SIZE * b, 1, 1, 1, 1, device=device).chunk(WORLD_SIZE)[RANK].clamp(-2, 2)
    return (pixels * ((1 + 0.05 * noise) / 255)).permute(0, 3, 4, 1, 2)


# === random numbers [shared] ==========================================================================================
def seed_step(seed: int, step: int) -> None:
    """Makes PyTorch's random numbers a function of both, mixed: its CPU generator uses 32 bits of a seed only."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


# === networks =========================================================================================================
class Nature(nn.Sequential):
    """DQN's convolutions (Mnih et al. 2015): [b, 4, 84, 84] -> [b, 64, 7, 7]"""

    def __init__(self):
        first, second, third = nn.Conv2d(4, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU())


class Network(nn.Module):
    """f, g and h. forward applies g and h to f's maps -> logits of the return's atoms [b, actions, atoms]"""

    def __init__(self, args: Args, backbone: nn.Module, actions: int):
        super().__init__()
        self.backbone, self.shape = backbone, (actions, args.atoms)
        if args.encoder == "nature":
            self.neck = nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU())
            self.head = nn.Linear(512, actions * args.atoms)
        else:
            self.neck = Neck(backbone.channels, games=1)
            self.head = GameLinear(1, 512, actions * args.atoms)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        game_id = torch.zeros(len(maps), dtype=torch.long, device=maps.device)
        game_id = [game_id] if isinstance(self.neck, Neck) else []  # the Nature network has no layers for each game
        return self.head(self.neck(maps.float(), *game_id), *game_id).unflatten(1, self.shape)


# === distributional returns [shared] ==================================================================================
def project(probabilities: torch.Tensor, atoms: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Moves the probabilities of atoms, [b, n] both, to the nearest points of the support [n] (1707.06887, alg. 1)"""
    last = len(support) - 1
    position = ((atoms - support[0]) / (support[last] - support[0]) * last).clamp(0, last)  # [b, n], 0 to n - 1
    distance = (position[:, :, None] - torch.arange(last + 1, device=support.device)).abs()  # [b, n, n], to each point
    return (probabilities[:, :, None] * (1 - distance).clamp(min=0)).sum(1)


# === objective: Rainbow ===============================================================================================
class Rainbow(nn.Module):
    """The online and the target network, which share a frozen backbone; `act` and `update` never wait for the device"""

    def __init__(self, args: Args, backbone: nn.Module, actions: int, device: torch.device):
        super().__init__()
        self.args = args
        self.online = Network(args, backbone, actions)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.frozen = not any(parameter.requires_grad for parameter in backbone.parameters())
        if self.frozen:
            self.target.backbone = backbone
        self.target.backbone.eval()  # also the online network's, if it is frozen
        self.register_buffer("support", torch.linspace(-args.max_return, args.max_return, args.atoms))  # z
        self.to(device, memory_format=torch.channels_last)
        self.precision = autocast(device, "fp32" if args.encoder == "nature" else args.precision)
        if self.frozen and self.precision._enabled:
            backbone.bfloat16()  # once, not in every pass
        learned = {name: parameter for name, parameter in self.online.named_parameters() if parameter.requires_grad}
        self.learned, self.averages = list(learned.values()), [self.target.get_parameter(name) for name in learned]
        options = dict(eps=args.adam_eps, fused=True, capturable=device.type == "cuda")
        self.optimizer = torch.optim.Adam(self.learned, args.learning_rate, **options)
        self.optimizer._warned_capturable_if_run_uncaptured = True  # no warning before the capture
        for x in self.learned:  # Adam would allocate its state at the first step; a graph needs it before
            state = {"exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}
            self.optimizer.state[x] = state | {"step": torch.zeros((), device=device)}
        if args.compile:
            self.act = torch.compile(self.act, dynamic=False)
            self.losses = torch.compile(self.losses, dynamic=False)

    def q(self, logits: torch.Tensor) -> torch.Tensor:
        """Q = sum_j z_j p_j: [..., atoms] -> [...]"""
        return (logits.softmax(-1) * self.support).sum(-1)

    @torch.no_grad()
    def act(self, stacks: torch.Tensor) -> torch.Tensor:
        """Q of the target network, which is the player: stacks uint8 [n, 4, 84, 84] -> [n, actions]"""
        with self.precision:
            maps = self.target.backbone(stacks / 255)
        return self.q(self.target(maps))  # in fp32: the values of actions often differ by less than bfloat16 resolves

    def losses(self, stacks: torch.Tensor, action: torch.Tensor, n_step_return: torch.Tensor, done: torch.Tensor):
        """All o_s, then all o_s+n [2b, 4, 84, 84]; a_s, G and if an episode ended [b] -> L, Q and Q's target [3, b]"""
        with self.precision:
            if self.frozen:  # f = f', which needs no gradients: one pass is enough
                maps, next_maps = self.online.backbone(stacks).chunk(2)
                target_maps = next_maps
            else:
                obs, next_obs = stacks.chunk(2)
                maps = self.online.backbone(obs)  # first: weights that autocast casts in no_grad get no gradient
                with torch.no_grad():
                    next_maps, target_maps = self.online.backbone(next_obs), self.target.backbone(next_obs)
        i = torch.arange(len(action), device=action.device)
        with torch.no_grad():
            best = self.q(self.online(next_maps)).argmax(1)  # a* [b]
            p = self.target(target_maps)[i, best].softmax(1)  # p'(o_s+n, a*) [b, atoms]
            discount = self.args.discount**self.args.n_steps * ~done  # [b], gamma^n, or 0 where an episode ended
            atoms = n_step_return[:, None] + discount[:, None] * self.support  # [b, atoms]
            m = project(p, atoms, self.support)
        logits = self.online(maps)[i, action]  # [b, atoms]
        cross_entropy = (m * -logits.log_softmax(1)).sum(1).clamp(1e-5, 1e5)  # as in the original: no priority is 0
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
            for average, statistic in zip(self.target.backbone.buffers(), self.online.backbone.buffers(), strict=True):
                average.copy_(statistic)  # for those who put BatchNorm into the ResNet, which has none
        return torch.cat([torch.stack([loss, grad_norm]), losses.flatten()]).detach()


# === CUDA graphs ======================================================================================================
class Graph:
    """Calls a function of tensors with arrays. On CUDA, the first call captures its kernels; all calls replay them."""

    def __init__(self, function, device: torch.device, state: tuple | list = ()):
        self.function, self.device, self.graph, self.state = function, device, None, state  # tensors that it changes

    def capture(self, arrays: dict[str, np.ndarray]) -> None:
        self.pinned = {name: torch.from_numpy(array).pin_memory() for name, array in arrays.items()}
        self.inputs = {name: tensor.to(self.device) for name, tensor in self.pinned.items()}
        before, stream = [tensor.clone() for tensor in self.state], torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.random.fork_rng([self.device]), torch.cuda.stream(stream):
            for _ in range(3):  # these compile, and they allocate what libraries keep
                self.function(**self.inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):  # which first waits for the device
            self.output = self.function(**self.inputs)
        for tensor, value in zip(self.state, before, strict=True):
            tensor.copy_(value)  # in place: the graph knows tensors by their addresses

    def __call__(self, **arrays: np.ndarray) -> np.ndarray:
        if self.device.type != "cuda":
            return self.function(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
        if self.graph is None:
            self.capture(arrays)
        for name, array in arrays.items():
            self.pinned[name][: len(array)] = torch.from_numpy(array)  # it may have fewer rows than at the first call
            self.inputs[name].copy_(self.pinned[name], non_blocking=True)
        self.graph.replay()
        return self.output.cpu().numpy()  # the only wait


# === replay ===========================================================================================================
TRANSITION = np.dtype([("action", "u1"), ("reward", "f4"), ("is_first", "?"), ("ends", "?"), ("terminal", "?")])


class SumTree:
    """Priorities of `size` slots. A node is the sum of its 64 children: 3 levels for 100,000 slots, not 17."""

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
        node, left = np.zeros(len(uniform), int), uniform * self.levels[-1].sum()
        for level in reversed(self.levels):
            sums = level.reshape(-1, 64)[node].cumsum(1)  # [b, 64]
            left = np.minimum(left, np.nextafter(sums[:, -1], 0))  # rounding never leads to a slot of priority 0
            child = (sums <= left[:, None]).sum(1)
            left -= np.where(child > 0, sums[np.arange(len(node)), child - 1], 0)
            node = node * 64 + child
        return node


class Replay:
    """The latest transitions. Row i (o_i, a_i, r_i and what became of it) is in slot i modulo `size`.

    `is_first` marks a game's first row, `terminal` its last one, `ends` the last one of an episode for learning. A row
    can be drawn once its n steps or its episode's end are known, until it is older than `capacity`. A file holds the
    frames; `save_every` more slots keep what a checkpoint needs until the next one is written.
    """

    def __init__(self, args: Args, path: Path):
        self.capacity, self.n_steps, self.exponent = args.replay_capacity, args.n_steps, args.priority_exponent
        self.discounts = args.discount ** np.arange(self.n_steps)  # gamma^k
        self.size = args.replay_capacity + HISTORY + args.save_every
        self.fields, self.tree = np.zeros(self.size, TRANSITION), SumTree(self.size)
        self.rows, self.ready, self.max_priority = 0, 0, 1.0  # rows played, rows with a known future and so a priority
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:  # a disk without room for all frames is an error now, not a crash later
            os.posix_fallocate(file.fileno(), 0, self.size * 84 * 84)
        self.map = np.memmap(path, np.uint8, "r+", shape=(self.size, 84, 84))
        self.frames = self.map.view(np.ndarray)

    def add(self, frame: np.ndarray, *fields) -> None:
        """Adds a row: o [84, 84] and TRANSITION's fields. Rows whose future is now known get the greatest priority."""
        slot = self.rows % self.size
        self.frames[slot], self.fields[slot] = frame, fields
        self.rows += 1
        ready = self.rows if self.fields["ends"][slot] else max(self.ready, self.rows - self.n_steps)
        if ready > self.ready:
            self.tree.set(np.arange(self.ready, ready) % self.size, self.max_priority**self.exponent)
        self.ready = ready
        if self.rows > self.capacity:  # this row is too old now
            self.tree.set(np.array([self.rows - 1 - self.capacity]) % self.size, 0)

    def sample(self, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict]:
        """Draws a slot from each of b equal parts of the sum of priorities -> slots [b], priorities [b] and a batch:

        frames uint8 [2b, 4, 84, 84] and is_first [2b, 4] of b stacks now, then of the b stacks n steps later; action,
        n_step_return (G) and done [b]. Where done, the episode ends within the n steps: the later stack is that of now.
        """
        slots = self.tree.draw((np.arange(batch_size) + rng.random(batch_size)) / batch_size)
        steps = self.fields[(slots[:, None] + np.arange(self.n_steps)) % self.size]  # [b, n]
        ended = steps["ends"].cumsum(1) - steps["ends"] > 0  # [b, n], the episode ended before this step
        n_step_return = (np.sign(steps["reward"]) * ~ended) @ self.discounts
        done = steps["ends"].any(1)
        last = np.concatenate([slots, np.where(done, slots, slots + self.n_steps)])  # [2b], of each stack
        window = (last[:, None] + np.arange(-HISTORY, 1)) % self.size  # [2b, 4]
        batch = {"frames": self.frames[window], "is_first": self.fields["is_first"][window], "done": done}
        batch |= {"action": steps["action"][:, 0].astype(int), "n_step_return": n_step_return.astype(np.float32)}
        return slots, self.tree.levels[0][slots], batch

    def set_losses(self, slots: np.ndarray, losses: np.ndarray) -> None:
        self.tree.set(slots, losses.astype(float) ** self.exponent)
        self.max_priority = max(self.max_priority, float(losses.max()))

    def state_dict(self) -> dict:
        """Everything but the frames, which it brings to the disk"""
        self.map.flush()
        state = {"fields": torch.tensor(self.fields.view(np.uint8)), "priorities": torch.tensor(self.tree.levels[0])}
        return state | {"rows": self.rows, "ready": self.ready, "max_priority": self.max_priority}

    def load_state_dict(self, state: dict) -> None:
        self.fields = state["fields"].numpy().view(TRANSITION)
        self.tree.set(np.arange(self.size), state["priorities"].numpy()[: self.size])
        self.rows, self.ready, self.max_priority = state["rows"], state["ready"], state["max_priority"]


# === environment ======================================================================================================
class Environment:
    """One game. Its state is a function of the seed, the episode and the actions since its reset."""

    def __init__(self, args: Args):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        options = dict(noop_max=30, use_fire_reset=False, reward_clipping=False)
        options |= dict(repeat_action_probability=args.repeat_action_probability)
        self.env = AtariVectorEnv(args.game, 1, max_num_frames_per_episode=4 * args.max_episode_steps, **options)
        self.num_actions = int(self.env.single_action_space.n)
        self.args = args
        self.reset(0)

    def reset(self, episode: int) -> None:
        seed = int(np.random.default_rng([self.args.seed, episode]).integers(2**30))
        stacks, info = self.env.reset(seed=seed)
        self.stack, self.lives, self.score, self.terminal = stacks[0], info["lives"][0], 0.0, False  # stack [4, 84, 84]
        self.episode, self.actions = episode, []

    def step(self, action: int) -> tuple:
        """Plays a step and returns its row for `Replay.add`. An episode for learning ends by a lost life, too."""
        frame, is_first = self.stack[-1], not self.actions
        stacks, rewards, terminated, truncated, info = self.env.step(np.array([action]))
        self.terminal = bool(terminated[0] or truncated[0])
        ends = self.terminal or (self.args.episodic_life and info["lives"][0] < self.lives)
        self.stack, self.lives, self.score = stacks[0], info["lives"][0], self.score + float(rewards[0])
        self.actions.append(action)
        return frame, action, rewards[0], is_first, ends, self.terminal


# === recordings =======================================================================================================
REPLAY_FILES = {"observation": "|u1", "action": "<i4", "reward": "<f4", "terminal": "|u1"}  # of the DQN Replay Dataset
PADDING = 3  # blank rows before every episode in the dataset


def name_source(args: Args, is_new: bool) -> Path:
    """Notes in source.json that the game's recordings are Rainbow's. Returns the folder of this run's."""
    folder = args.save_replay / "".join(word.capitalize() for word in args.game.split("_"))
    path, temporary = args.save_replay / "source.json", args.save_replay / f"source_{args.game}_{args.seed}.tmp"
    sources = json.loads(path.read_text()) if path.exists() else {}
    if is_new and sources.get(args.game) != "rainbow" and any(folder.rglob("*.gz")):
        raise SystemExit(f"{folder} has recordings of another source. Choose another --save-replay.")
    logs = folder / f"{args.seed}" / "replay_logs"
    logs.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(sources | {args.game: "rainbow"}, indent=2))
    temporary.replace(path)
    return logs


def record(args: Args, replay: Replay) -> bool:
    """Writes a replay checkpoint as in the dataset if its rows are complete now, and returns whether they are."""
    most = args.save_replay_rows + 1 if args.save_replay_rows else None  # readers leave the last row out
    number, row = divmod(replay.rows - 1, args.save_replay_every)
    if row + 1 != min(most or math.inf, args.save_replay_every):
        return False
    slots = np.arange(replay.rows - 1 - row, replay.rows) % replay.size
    padding = np.repeat(np.flatnonzero(replay.fields["is_first"][slots]), PADDING)
    slots = np.insert(slots, padding, -1)[:most]  # -1: a blank row
    folder = name_source(args, is_new=False)
    for name, dtype in REPLAY_FILES.items():
        column = replay.frames if name == "observation" else replay.fields[name]
        path = folder / f"$store$_{name}_ckpt.{number + 1}.gz"
        with gzip.open(path.with_suffix(".tmp"), "wb", compresslevel=1) as file:
            header = {"descr": dtype, "fortran_order": False, "shape": (len(slots), *column.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
            for part in np.array_split(slots, math.ceil(len(slots) / 1000)):  # 7 MB of frames
                rows = column[part].astype(dtype)
                rows[part < 0] = 0
                file.write(rows.tobytes())
        path.with_suffix(".tmp").replace(path)
    return True


# === files [shared] ===================================================================================================
@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, unlike any other process's; the file is then renamed, so that `path` is whole or absent."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    yield temporary
    temporary.replace(path)


def make_folder(path: Path) -> None:
    """Makes a folder, or says that nothing can be written there: before the work, not after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({error.strerror}). Choose another folder.") from error


def expand_user(args) -> None:
    """In `--cache-dir=~/x` the shell leaves the ~ as it is."""
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, value.expanduser())


# === games [shared] ===================================================================================================
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


# === scores [shared] ==================================================================================================
# Scores of a random agent and of the reference: DQN after 50M frames; for far-OOD games, Rainbow after 2M agent steps.
TABLE = """
    air_raid 579.25 7479.5, alien 227.8 2484.49, amidar 5.8 1207.74, assault 222.4 1525.24, asterix 210.0 2711.41,
    asteroids 719.1 698.37, atlantis 12850.0 853640.0, bank_heist 14.2 601.79, basic_math 0.0033 3.57,
    battle_zone 2360.0 17784.84, beam_rider 363.9 5852.42, berzerk 123.7 487.48, bowling 23.1 30.12, boxing 0.1 77.99,
    breakout 1.7 96.23, carnival 700.8 4784.84, centipede 2090.9 2583.03, chopper_command 811.0 2690.61,
    crazy_climber 10780.5 104568.76, demon_attack 152.1 6361.58, double_dunk -18.6 -6.54, elevator_action 4387.0 439.77,
    enduro 0.0 628.91, fishing_derby -91.7 0.58, freeway 0.0 26.27, frostbite 65.2 367.07, gopher 257.6 5479.9,
    gravitar 173.0 330.07, hero 1027.0 17325.44, human_cannonball 1.0767 5.56, ice_hockey -11.2 -5.84,
    jamesbond 29.0 573.31, journey_escape -19977.0 -3671.09, kangaroo 52.0 11485.98, klax 0.3734 2124.75,
    krull 1598.0 6097.63, kung_fu_master 258.5 23435.38, montezuma_revenge 0.0 0.0, ms_pacman 307.3 3402.4,
    name_this_game 2292.3 7278.65, othello -21.3233 -2.01, phoenix 761.4 4996.58, pitfall -229.4 -73.81,
    pong -20.7 16.61, pooyan 371.2 3211.96, private_eye 24.9 -16.04, qbert 163.9 10117.5, riverraid 1338.5 11638.93,
    road_runner 11.5 36925.47, robotank 2.2 59.77, seaquest 68.4 1600.66, skiing -17098.1 -15824.61,
    solaris 1236.3 1436.4, space_invaders 148.0 1794.24, star_gunner 664.0 42165.22, surround -9.9833 -7.81,
    tennis -23.8 -1.5, time_pilot 3568.0 3654.37, tutankham 11.4 103.84, up_n_down 533.4 8488.31, venture 0.0 39.13,
    video_pinball 16256.9 63406.11, wizard_of_wor 563.5 2065.8, yars_revenge 3092.9 23909.38, zaxxon 32.5 4538.57"""
SCORES = {game: (float(random), float(reference)) for game, random, reference in map(str.split, TABLE.split(","))}


def normalize(game: str, score: float) -> float:
    """DQN-normalised score, (score - low) / (high - low), where low and high are the two scores of the game, sorted"""
    low, high = sorted(SCORES[game])
    return (score - low) / (high - low + 1e-6)  # as in the original code: both are 0 in montezuma_revenge


# === checkpoint files [shared] ========================================================================================
def load_checkpoint(path: Path) -> dict:
    """Content of a checkpoint of a pretrain_*.py run or of the benchmark's authors, whose names become ours."""
    scalar, codes = np._core.multiarray.scalar, np.typecodes["AllInteger"] + np.typecodes["Float"]
    allowed = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *(type(np.dtype(code)) for code in codes)]
    try:
        with torch.serialization.safe_globals(allowed):  # the authors' DT files hold NumPy scalars
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for part in ["backbone", *(content.keys() & {"neck", "head"})]:
            state, content[part] = content[part], {}
            for name, value in state.items():
                name = name.removeprefix("_orig_mod.").removeprefix("module.").replace(".shortcut.", ".downsample.")
                if not name.startswith("stem."):  # the authors' files hold the first convolution twice
                    content[part][name] = value
        return content
    except Exception as error:
        raise SystemExit(f"{path} is no checkpoint of pretrain_*.py or the authors: {type(error).__name__}") from error


def describe(content: dict) -> dict:
    """What results say of a checkpoint: a digest of its backbone, and the steps and the data of its pre-training"""
    digest, args, pretraining = 0, content.get("args"), None
    for _, value in sorted(content["backbone"].items()):
        digest = zlib.crc32(value.numpy().tobytes(), digest)
    if args:  # the authors' files have none
        data = args.get("data", "dqn_replay" if args["data_dir"] else "random_play")
        pretraining = {"step": content["step"], "total_steps": args["total_steps"], "data": data}
        if content["step"] < args["total_steps"]:
            print(f"Unfinished pre-training: {content['step']} of {args['total_steps']} steps", flush=True)
    return {"backbone": f"{digest:08x}", "pretraining": pretraining}


# === pre-trained backbone [shared] ====================================================================================
def load_part(module: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise SystemExit(f"{path} has another network: set --width-multiplier and --blocks as in its run.") from error


def make_backbone(args) -> tuple[ResNet, str, dict]:
    """The backbone, loaded or initialised, the method's name in the results, and what they say of the checkpoint"""
    backbone, method = ResNet(args.width_multiplier, args.blocks), "random" if args.freeze_backbone else "e2e"
    facts = {"backbone": None, "pretraining": None}
    if args.checkpoint:
        content = load_checkpoint(args.checkpoint)
        load_part(backbone, content["backbone"], args.checkpoint)
        method = content.get("objective", args.checkpoint.absolute().parent.name) + "_e2e" * (not args.freeze_backbone)
        facts = describe(content)
    return backbone.requires_grad_(not args.freeze_backbone), args.method or method, facts


# === evaluation [shared] ==============================================================================================
def play_episodes(game: str, policy, args) -> tuple[np.ndarray, list[np.ndarray]]:
    """Raw scores of args.eval_episodes complete episodes, and the frames of the first one if args.video is True.

    Each has an environment of its own, with up to 30 no-ops at the start and without sticky actions. `policy` maps the
    stacks uint8 [n, 4, 84, 84], indices, last actions and last rewards [n] of running episodes to action values [n, a].
    """
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    options = dict(noop_max=30, use_fire_reset=False, reward_clipping=False, num_threads=1)
    episodes, most_frames = args.eval_episodes, 4 * args.max_episode_steps
    envs = [AtariVectorEnv(game, 1, max_num_frames_per_episode=most_frames, **options) for _ in range(episodes)]
    num_actions, rng = envs[0].single_action_space.n, np.random.default_rng(args.seed)
    seed = int(rng.integers(2**30))
    starts = thread_map(lambda i: envs[i].reset(seed=seed + i), range(episodes), desc="starting games", leave=False)
    stacks = np.concatenate([stack for stack, _ in starts])  # [episodes, 4, 84, 84]
    scores, running, frames = np.zeros(episodes), np.full(episodes, True), []
    actions, rewards = np.zeros(episodes, int), np.zeros(episodes)
    bar = tqdm(desc=f"evaluating on {game}", total=episodes, unit="episode", leave=False)
    while running.any():
        if args.video and running[0] and len(frames) < 1800:  # two minutes
            frames.append(stacks[0, -1].copy())
        which = running.nonzero()[0]
        values = policy(stacks[which], which, actions[which], rewards[which])
        actions = rng.integers(num_actions, size=episodes)
        greedy = rng.random(episodes)[which] >= args.epsilon
        actions[which[greedy]] = values[greedy, :num_actions].argmax(1)
        for i in which:
            envs[i].send(actions[i : i + 1])  # this does not wait: a thread of each environment plays
        for i in which:
            (stacks[i],), (rewards[i],), (terminated,), (truncated,), _ = envs[i].recv()
            running[i] = not (terminated or truncated)
        scores[which] += rewards[which]
        bar.update(len(which) - running.sum())
    bar.close()
    return scores, frames


def save_gif(path: Path, frames: list[np.ndarray]) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 / 15, loop=0)  # the game's speed


# === results [shared] =================================================================================================
def find_result(args, suite: str, method: str, game: str, facts: dict) -> tuple[Path, dict]:
    """The result's path, and the arguments and facts in plain types. A result made with others ends the script."""
    if WORLD_SIZE > 1:
        raise SystemExit(f"{Path(__file__).name} is a single process: start it without torchrun.")
    path = args.results / suite / method / game / f"seed{args.seed}.json"
    plain_args = json.loads(json.dumps(asdict(args) | facts | {"game": game, "method": method}, default=str))
    if path.exists() and not args.overwrite:
        old = json.loads(path.read_text())["args"]
        changed = {name: x for name, x in old.items() if name not in MAY_CHANGE and plain_args.get(name) != x}
        if changed:
            raise SystemExit(f"{path} was made with {changed}. Choose another --method, or --overwrite.")
        print(f"{path} is there already. To make it again: --overwrite")
    return path, plain_args


def save_result(path: Path, game: str, scores: np.ndarray, args: dict) -> None:
    """Writes a result: a smoke test if any data was random play, or if the evaluation was not the benchmark's."""
    evaluation = [args["eval_episodes"], args["max_episode_steps"], args["epsilon"]]
    sources = [args["data"], args["pretraining"] and args["pretraining"]["data"]]
    result = {"suite": path.parts[-4], "method": path.parts[-3], "game": game, "seed": args["seed"]}
    result["split"] = "id" if game in ID_GAMES else "near_ood" if game in NEAR_OOD_GAMES else "far_ood"
    result |= {"score": scores.mean(), "normalized_score": normalize(game, scores.mean())}
    result |= {"smoke_test": "random_play" in sources or evaluation != [100, 27_000, 0.001]}
    result |= {name: args[name] for name in ("checkpoint", "backbone", "pretraining", "data")}
    result |= {"episode_scores": scores.tolist(), "args": args}
    result["versions"] = {module.__name__: module.__version__ for module in (torch, np, ale_py)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2))
    print(f"{path}: {result['score']:.2f} points, normalised {result['normalized_score']:.3f}", flush=True)


# === fine-tuning ======================================================================================================
MAY_CHANGE = "checkpoint replay_dir device compile results overwrite log_every video".split()  # all others must stay


def check(args: Args) -> None:
    """Ends the script if arguments do not go together."""
    for name in ("batch_size", "n_steps", "eval_episodes", "max_episode_steps", "log_every", "save_every"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1.")
    if not args.n_steps < args.learning_starts < args.total_steps or args.replay_capacity <= args.n_steps:
        raise SystemExit("Needed: --n-steps < --learning-starts < --total-steps, and --n-steps < --replay-capacity.")
    if args.encoder == "nature" and args.checkpoint:
        raise SystemExit("--encoder nature is trained from scratch: leave --checkpoint out.")
    rows = min(args.save_replay_rows or math.inf, args.save_replay_every)
    if args.save_replay and (args.total_steps % args.save_replay_every or args.replay_capacity < rows):
        raise SystemExit(f"--total-steps must be a multiple of --save-replay-every, --replay-capacity at least {rows}.")


def train(model: Rainbow, replay: Replay, env: Environment, writer: SummaryWriter, plain_args: dict, checkpoint: Path):
    """Plays and learns from the replay's last step on."""
    args, device = model.args, model.support.device
    stops = []  # signals received: the first one ends the run after the step, the same again ends it at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stops.append(number), signal.signal(number, signal.SIG_DFL)))
    moments = [x for state in model.optimizer.state.values() for x in state.values()]
    act, update = Graph(model.act, device), Graph(model.update, device, [*model.state_dict().values(), *moments])
    updates = max(0, int((replay.rows - args.learning_starts) * args.updates_per_step))
    last_update = int((args.total_steps - args.learning_starts) * args.updates_per_step)
    recent, clock = [], time.perf_counter()
    bar = tqdm(range(replay.rows, args.total_steps), f"rainbow on {args.game}", args.total_steps, initial=replay.rows)
    bar.set_postfix_str("the first update compiles, about a minute" if args.compile else "")
    for step in bar:
        seed_step(args.seed, step)  # a run that is continued draws the same
        rng = np.random.default_rng([args.seed, step, 1])
        exploration = [args.learning_starts, args.learning_starts + max(args.exploration_steps, 1)]
        epsilon = np.interp(step, exploration, [1, args.exploration_final])
        if rng.random() < epsilon:
            action = int(rng.integers(env.num_actions))
        else:
            action = int(act(stacks=env.stack[None]).argmax())
        replay.add(*env.step(action))
        done = step + 1
        if env.terminal:
            writer.add_scalar("charts/episodic_return", env.score, done)
            writer.add_scalar("charts/episodic_length", len(env.actions), done)
            bar.set_postfix_str(f"return {env.score:g}")
            env.reset(env.episode + 1)

        while updates < int((done - args.learning_starts) * args.updates_per_step):
            beta = np.interp(updates, [0, last_update], [args.importance_exponent, 1])
            slots, priorities, batch = replay.sample(args.batch_size, rng)
            weight = (priorities.min() / priorities) ** beta  # w [b]; the tree's priorities have their exponent already
            values = update(**batch, weight=weight.astype(np.float32))
            if not np.isfinite(values).all():
                raise SystemExit(f"Loss {values[0]} or gradient norm {values[1]} is not finite at step {done}.")
            cross_entropy, q, target_q = values[2:].reshape(3, -1)
            replay.set_losses(slots, cross_entropy)
            recent.append([values[0], values[1], q.mean(), target_q.mean()])
            updates += 1

        if recent and done % args.log_every == 0:
            rate = len(recent) / args.updates_per_step / (time.perf_counter() - clock)
            scalars = {"charts/SPS": rate, "charts/epsilon": epsilon, "charts/beta": beta}
            names = ("losses/loss", "losses/grad_norm", "losses/q", "losses/target_q")
            for name, value in (scalars | dict(zip(names, np.mean(recent, 0), strict=True))).items():
                writer.add_scalar(name, value, done)
            recent, clock = [], time.perf_counter()
        recorded = args.save_replay and record(args, replay)
        if stops or recorded or done % args.save_every == 0 or done == args.total_steps:
            writer.flush()  # first, so that nothing before the checkpoint is missing from the charts
            state = {"args": plain_args, "model": model.state_dict()}
            state |= {"optimizer": model.optimizer.state_dict()["state"], "replay": replay.state_dict()}
            with whole_file(checkpoint) as temporary:
                torch.save(state | {"episode": env.episode, "actions": env.actions}, temporary)
        if stops:
            raise SystemExit(f"Stopped by a signal after step {done}. To go on: the same command without --overwrite")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def finetune(args: Args) -> None:
    check(args)
    args.game, device = parse_game(args.game, sorted(SCORES)), torch.device(args.device)
    torch.set_num_threads(torch.get_num_threads() if args.device == "cpu" else 1)  # idle threads slow other runs
    torch.manual_seed(args.seed)
    backbone, method, facts = make_backbone(args)
    if args.encoder == "nature":
        backbone, method = Nature(), args.method or "nature"
    result, plain_args = find_result(args, "rainbow", method, args.game, facts | {"data": "online"})
    run_dir = Path("runs", f"{Path(__file__).stem}__{method}__{args.game}__{args.seed}")
    checkpoint = run_dir / "checkpoint.pt"
    frames = args.replay_dir / f"{run_dir.name}.bin" if args.replay_dir else run_dir / "frames.bin"
    if result.exists() and not args.overwrite:
        if checkpoint.exists() and checkpoint.stat().st_mtime < result.stat().st_mtime:  # killed just after its result
            frames.unlink(missing_ok=True)
            checkpoint.unlink()
        return

    continued = checkpoint.exists() and not args.overwrite
    if continued:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        changed = {k: old for k, old in state["args"].items() if k not in MAY_CHANGE and plain_args.get(k) != old}
        if changed:
            raise SystemExit(f"{checkpoint} was made with {changed}. Choose another --method, or --overwrite.")
        if not frames.exists():
            raise SystemExit(f"{frames} is missing, which {checkpoint} needs. To begin anew: --overwrite")
    if args.save_replay:
        name_source(args, is_new=not continued)
    for path in [] if continued else [result, checkpoint, frames, *run_dir.glob("events.*")]:
        path.unlink(missing_ok=True)
    env = Environment(args)
    model, replay = Rainbow(args, backbone, env.num_actions, device), Replay(args, frames)
    if continued:
        model.load_state_dict(state["model"])
        model.optimizer.load_state_dict(model.optimizer.state_dict() | {"state": state["optimizer"]})
        replay.load_state_dict(state["replay"])
        env.reset(state["episode"])
        for action in state["actions"]:
            env.step(action)

    writer = SummaryWriter(run_dir, purge_step=replay.rows + 1)  # hides what was logged after the checkpoint
    (run_dir / "args.json").write_text(json.dumps(plain_args, indent=2))
    table = "".join(f"|{name}|{value}|\n" for name, value in plain_args.items())
    writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{table}")
    print(f"{run_dir}: from step {replay.rows:,} of {args.total_steps:,}", flush=True)
    train(model, replay, env, writer, plain_args, checkpoint)

    # The score of the target network, which has been the player in training, too
    parts = ("neck", "head") if model.frozen else ("backbone", "neck", "head")
    torch.save({part: getattr(model.target, part).state_dict() for part in parts}, run_dir / "policy.pt")
    act = Graph(model.eval().act, device)
    scores, film = play_episodes(args.game, lambda stacks, *_: act(stacks=stacks)[: len(stacks)], args)
    writer.add_scalar("eval/score", scores.mean(), args.total_steps)
    writer.close()
    save_result(result, args.game, scores, plain_args)
    if args.video:
        save_gif(run_dir / "episode.gif", film)
    for path in (frames, checkpoint):  # gigabytes that nobody needs once there is a result
        path.unlink()


if __name__ == "__main__":
    finetune(tyro.cli(Args, description=__doc__))
