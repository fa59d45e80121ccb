# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""ATC, augmented temporal contrast (Stooke et al., arXiv 2009.08319): pre-trains a ResNet-50 on Atari videos.

The features of a stack of frames o_s must identify the stack k = 3 steps later among those of all samples in the batch.
f is the ResNet-50, g the neck, h the head; f' and g' are momentum (moving-average) copies of f and g; both stacks are
augmented (random shift, random intensity):

    q_i = h(g(f(o_i,s)))     query: the present of sample i
    c_i = g'(f'(o_i,s+k))    key: the near future of the same video
    loss = -mean_i log( exp(q_i . c_i / T) / sum_j exp(q_i . c_j / T) )

Samples whose episode ends before step s+k are left out of the mean, but their keys still serve as negatives.
Data, network and schedule are those of the Atari Pre-training Benchmark (arXiv 2406.06037).

    python pretrain_atc.py --batch-size 16 --total-steps 100    # smoke test: plays 1,000 random steps of each game
    python pretrain_atc.py --data-dir /data/dqn_replay          # the benchmark: 50 games, 10M frames, 100 epochs
    torchrun --nproc-per-node 8 pretrain_atc.py --data-dir /data/dqn_replay
"""

import copy
import gzip
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import ale_py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map


# === arguments ========================================================================================================
@dataclass
class Args:
    total_steps: int = 1_953_125  # optimizer steps; the default is 100 epochs of 10M samples
    batch_size: int = 512  # samples in a step, summed over all processes
    learning_rate: float = 3e-4  # of AdamW, after the warm-up
    weight_decay: float = 1e-5  # AdamW's, for all parameters
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's decay rates
    adam_eps: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float = 0.5  # gradients are clipped to this L2 norm; inf turns clipping off
    future_offset: int = 3  # k: the key is this many steps later than the query
    temperature: float = 1.0  # T: similarities are divided by it
    width_multiplier: float = 1.0  # scales the ResNet's channels; a multiple of 1/16
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottleneck blocks of the four stages; 3 4 6 3 is a ResNet-50

    games: tuple[str, ...] = ()  # such as ms_pacman or MsPacman; default: the benchmark's 50 pre-training games
    data_dir: Path | None = None  # the DQN Replay Dataset; default: a smoke test on random play
    runs: tuple[int, ...] = (1, 2)  # runs of the DQN agent to read, for each game
    checkpoints: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # replay checkpoints to read, for each run
    rows_per_checkpoint: int = 10_000  # rows to read from the start of each checkpoint, blank ones included
    play_rows: int = 1_000  # rows to play in each game when there is no --data-dir
    cache_dir: Path = Path("cache")  # for prepared data; all scripts and runs can share it
    num_workers: int = 4  # threads that read batches ahead

    seed: int = 0  # of initialisation, sample order and augmentation
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # under torchrun, cuda is one GPU per process
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bfloat16 autocast where the hardware supports it
    compile: bool = torch.cuda.is_available()  # torch.compile the objective
    run_name: str = ""  # folder in runs/; default: <script>__<seed>
    resume: bool = False  # continue from the run's checkpoint if there is one
    overwrite: bool = False  # delete an existing run of this name
    log_every: int = 20  # steps between entries in TensorBoard
    eval_every: int = 10_000  # steps between evaluations on held-out samples; the last step has one as well
    save_every: int = 2_000  # steps between checkpoints; the last step and a signal make one as well


# === protocol [shared] ================================================================================================
class Method(nn.Module):
    """What the training loop asks of an objective. All parameters are in child modules: checkpoints hold only those.

    `forward(batch)` gets frames uint8 [b, length, 84, 84], game_id [b] and is_first, action, reward, terminal,
    return_to_go [b, length]. It returns the loss, a mean over the b samples, and a dict of scalar metrics.
    """

    name: str  # in checkpoints and results
    length: int  # rows of a sample

    def update_target(self, step: int) -> None:
        """Called after each optimizer step, for momentum networks; `step` counts from 0."""

    def picture(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """An image [channels, h, w] for TensorBoard, or None. Called after evaluations, by one process alone."""


# === objective: ATC ===================================================================================================
class Objective(Method):
    """Augmented temporal contrast."""

    name = "atc"

    def __init__(self, args: Args):
        super().__init__()
        self.args = args
        self.length = HISTORY + 1 + args.future_offset
        self.backbone = ResNet(args.width_multiplier, args.blocks)  # f
        self.neck = Neck(self.backbone.channels, len(DQN_REPLAY_GAMES))  # g
        self.head = GameLinear(len(DQN_REPLAY_GAMES), 512, 512)  # h
        online = nn.ModuleDict({"backbone": self.backbone, "neck": self.neck})
        self.target = copy.deepcopy(online).requires_grad_(False)  # f', g'

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        stacks = stack_frames(batch["frames"], batch["is_first"])  # [b, 1+k, 4, 84, 84]
        obs = augment(stacks[:, :1]).squeeze(1)  # o_s [b, 4, 84, 84]
        next_obs = augment(stacks[:, -1:]).squeeze(1)  # o_s+k [b, 4, 84, 84]
        done = batch["terminal"][:, HISTORY:-1].any(1)  # [b], the episode ends before step s+k
        return self.loss(obs, next_obs, batch["game_id"], done)

    def loss(self, obs, next_obs, game_id, done):  # the formula above
        query = self.head(self.neck(self.backbone(obs), game_id), game_id)  # q [b, 512]
        with torch.no_grad():
            key = self.target.neck(self.target.backbone(next_obs), game_id)  # c [b, 512]
        loss, accuracy = info_nce(similarities(query, key, self.args.temperature), keep=~done)
        return loss, {"accuracy": accuracy}

    def update_target(self, step: int) -> None:
        update_momentum(self.target, self, tau=0.99 + 0.009 * step / self.args.total_steps)


# === contrast [shared] ================================================================================================
def similarities(query: torch.Tensor, key: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """q_i . c_j / T of this process's queries [b, d] and all processes' keys -> [b, WORLD_SIZE * b]"""
    with torch.autocast(query.device.type, enabled=False):
        keys = key.float()
        if WORLD_SIZE > 1:  # keys carry no gradient, so that a plain all_gather will do
            keys = keys.new_empty(WORLD_SIZE * len(key), key.shape[1])
            dist.all_gather_into_tensor(keys, key.float())
        return query.float() @ keys.T / temperature


def info_nce(logits: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE (1807.03748): logits as `similarities` returns them -> loss and accuracy, means over samples to keep"""
    own = torch.arange(len(logits), device=logits.device) + RANK * len(logits)  # column of each query's own key
    loss = F.cross_entropy(logits, own, reduction="none")
    return masked_mean(loss, keep), masked_mean(logits.argmax(1) == own, keep)


# === masked mean [shared] =============================================================================================
def masked_mean(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Mean of values [b] where keep [b] is True, scaled so that DDP's average over processes is the global mean."""
    count = keep.sum().float()
    if WORLD_SIZE > 1:
        dist.all_reduce(count)
    return (values * keep).sum() * WORLD_SIZE / count.clamp(min=1)


# === momentum networks [shared] =======================================================================================
@torch.no_grad()
def update_momentum(target: nn.ModuleDict, online: nn.Module, tau: float) -> None:
    """target = tau target + (1 - tau) online, for each part of `online` that `target` has a copy of"""
    parameters = [parameter for name in target for parameter in getattr(online, name).parameters()]
    torch._foreach_lerp_(list(target.parameters()), parameters, 1 - tau)


# === neck and head [shared] ===========================================================================================
class Neck(nn.Module):
    """Map times the game's embedding, averaged, LayerNorm, MLP: maps [b, c, 6, 6], game_id [b] -> [b, 512]"""

    def __init__(self, channels: int, games: int):
        super().__init__()
        self.spatial_embed = nn.Parameter(torch.randn(games, channels * 6 * 6))  # N(0, 1), as in the original code
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU())

    def forward(self, maps: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        embed = F.embedding(game_id, self.spatial_embed).view(maps.shape)  # [b, c, 6, 6]
        return self.mlp(self.norm((maps * embed).mean((2, 3))))


class GameLinear(nn.Module):
    """A linear layer for each game, y = x W_game + b_game: x [b, d], game_id [b] -> [b, a]"""

    def __init__(self, games: int, features: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(games, features, outputs))  # N(0, 1), as in the original code
        self.bias = nn.Parameter(torch.randn(games, outputs))

    def forward(self, x: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight  # [games, b, a]; this is cheaper than a matrix per sample (512 MB where a = 512)
        return y[game_id, torch.arange(len(x), device=x.device)] + F.embedding(game_id, self.bias)


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
    """ResNet-50 (1512.03385) without max-pool; torchvision's names, bn a norm: [b, 4, 84, 84] -> [b, channels, 6, 6]"""

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


# === data [shared] ====================================================================================================
# A replay checkpoint is four gzipped .npy files. Its first rows are prepared once, as a shard: a file of ROWs.
FIELDS = [("is_first", "?"), ("action", "u1"), ("reward", "i1"), ("terminal", "?"), ("return_to_go", "<f4")]
ROW = np.dtype([("frame", "u1", (84, 84)), *FIELDS])  # 7,064 bytes; is_first marks an episode's first row
PADDING = 3  # blank rows before every episode in the dataset


def read_npy(path: Path, rows: float, most: int | None = None) -> np.ndarray:
    """The first `rows` rows of a gzipped .npy, the rest not decompressed; checks that they are from 0 to `most`."""
    try:
        with gzip.open(path) as file:
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)  # as np.save writes it
            if fortran_order:
                raise ValueError("its array is in Fortran order")
            count = int(min(rows, shape[0]))
            content = file.read(count * math.prod(shape[1:]) * dtype.itemsize)
            file.read(1)  # at the end of the file, gzip then checks its checksum
        values = np.frombuffer(content, dtype).reshape(count, *shape[1:])
        if most and (values.min(initial=0) < 0 or values.max(initial=0) > most):
            raise ValueError(f"its numbers are not all from 0 to {most}")
        return values
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SystemExit(f"{path} cannot be read ({error}). If it is damaged, download it again.") from error


def save_shard(path: Path, rows: int, frame: np.ndarray, action: np.ndarray, reward: np.ndarray, terminal: np.ndarray):
    """Writes the first `rows` rows as a shard. Rewards and terminals may have more rows, for the returns-to-go."""
    reward = np.sign(np.nan_to_num(reward.astype(np.float32)))  # clipped to their signs, as DQN does
    terminal = terminal.astype(bool)
    to_end = np.append(reward[::-1].cumsum()[::-1], 0)  # sum of the rewards of a row and of all later rows
    last = np.append(np.flatnonzero(terminal), len(reward) - 1)  # last rows of the episodes
    end = last[np.searchsorted(last, np.arange(rows))]  # last row of each row's episode
    return_to_go = to_end[:rows] - to_end[1 + end]
    reward = reward[:rows]
    terminal = terminal[:rows]

    # Padding is blank rows, 3 at most, at the start of an episode. The file may start within padding.
    blank = ~frame.any((1, 2)) & (action == 0) & (reward == 0) & ~terminal
    padding = np.full(rows, False)
    for first in [0, *(np.flatnonzero(terminal) + 1)]:
        padding[first : first + PADDING] = np.logical_and.accumulate(blank[first : first + PADDING])
    history = HISTORY if padding[0] else 0  # blank rows that the file's first row needs if it begins an episode
    shard = np.zeros(history + np.count_nonzero(~padding), ROW)
    columns = dict(frame=frame, action=action, reward=reward, terminal=terminal, return_to_go=return_to_go)
    for name, column in columns.items():
        shard[name][history:] = column[~padding]
    shard["is_first"][1:] = shard["terminal"][:-1]
    shard["is_first"][history : history + 1] = padding[0]  # a slice, as there may be no such row
    with whole_file(path) as temporary:
        shard.tofile(temporary)


def game_folder(data_dir: Path, game: str) -> Path:
    return data_dir.expanduser() / "".join(word.capitalize() for word in game.split("_"))


def find_files(args, game: str, run: int, checkpoint: int) -> list[Path]:
    """A checkpoint's files, as the bucket names them or as Atari-PB's and SGI's download scripts do."""
    folder = game_folder(args.data_dir, game)
    for layout in (f"{run}/replay_logs/$store$_%s_ckpt.{checkpoint}.gz", f"%s_{run}_{checkpoint}.gz"):
        files = [folder / (layout % field) for field in ("observation", "action", "reward", "terminal")]
        if all(file.exists() for file in files):
            return files
    raise SystemExit(f"{folder} lacks files of run {run}, checkpoint {checkpoint}. Where to get them: docs/data.md")


def prepare_shard(args, rows: int, game: str, run: int, checkpoint: int) -> Path:
    """The shard of a checkpoint's first `rows` rows; it is made unless the cache has it."""
    files = find_files(args, game, run, checkpoint)
    # Sizes and times are in the name, so that a file that was replaced is prepared again.
    versions = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    path = args.cache_dir / f"{game}_{run}_{checkpoint}_{rows}_{zlib.crc32(repr(versions).encode()):08x}.bin"
    if not path.exists():
        frame = read_npy(files[0], rows, most=255)
        action = read_npy(files[1], rows, most=17)
        reward = read_npy(files[2], math.inf)[:-1]  # the last row may be stale
        terminal = read_npy(files[3], math.inf, most=1)[:-1]
        lengths = {len(frame), len(action), min(len(reward), rows), min(len(terminal), rows)}
        if lengths != {rows} or len(reward) != len(terminal) or frame.size != rows * 84 * 84:
            raise SystemExit(f"{files[0]} has not {rows} usable rows of 84 x 84, or its files differ: read fewer rows.")
        save_shard(path, rows, frame.reshape(rows, 84, 84), action, reward, terminal)
    return path


def play_shard(args, rows: int, game: str) -> Path:
    """A shard of random play with sticky actions; it is made unless the cache has it."""
    path = args.cache_dir / f"{game}_played_{rows}.bin"
    if not path.exists():
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        options = dict(repeat_action_probability=0.25, use_fire_reset=False, reward_clipping=False)
        env = AtariVectorEnv(game, 1, autoreset_mode=AutoresetMode.SAME_STEP, **options)
        stack, _ = env.reset(seed=0)  # [1, 4, 84, 84]
        rng = np.random.default_rng(0)
        played = []  # frame, action, reward and terminal of each row
        for _ in range(rows):
            frame = stack[0, -1].copy()
            action = rng.integers(env.single_action_space.n)
            stack, reward, terminated, truncated, _ = env.step(np.array([action]))
            played.append((frame, action, reward[0], terminated[0] or truncated[0]))
        save_shard(path, rows, *(np.array(column) for column in zip(*played, strict=True)))
    return path


def prepare(args, games: list[str], rows: int) -> tuple[list[tuple[int, Path]], str]:
    """(game_id, path) of the games' shards, and where their data comes from: own play, if there is no args.data_dir."""
    args.cache_dir = args.cache_dir.expanduser()  # as the shell leaves the ~ of --cache-dir=~/x
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    if args.data_dir is None:
        print(f"No --data-dir: this is a smoke test on {args.play_rows:,} rows of random play a game.", flush=True)
        make = play_shard
        jobs = [(args.play_rows, game) for game in games]
        sources = {"random_play"}
    else:
        make = prepare_shard
        runs, checkpoints = dict.fromkeys(args.runs), dict.fromkeys(args.checkpoints)  # each of them once
        jobs = [(rows, game, run, checkpoint) for game in games for run in runs for checkpoint in checkpoints]
        sources = set()
        for game in games:
            note = game_folder(args.data_dir, game) / "source.txt"  # of data that is not from the bucket
            sources.add(note.read_text().strip() if note.exists() else "dqn_replay")
        if not jobs or rows < 1:
            raise SystemExit("There must be at least one of --runs, one of --checkpoints and one row to read of each.")
    # Four at a time, so that no more than four files' rows are in memory.
    paths = thread_map(lambda job: make(args, *job), jobs, max_workers=4, desc="preparing data", leave=False, **BAR)
    shards = []
    for (_, game, *_), path in zip(jobs, paths, strict=True):
        game_id = DQN_REPLAY_GAMES.index(game) if game in DQN_REPLAY_GAMES else 0  # far-OOD games have none
        shards.append((game_id, path))
    return shards, "+".join(sorted(sources))


# === windows [shared] =================================================================================================
class Windows:
    """Batches of windows. A window is `length` consecutive rows of a shard, a sample. Each epoch has a new order.

    `part` is "held_out", the last 1% of each shard's windows, or "train", the windows that share no row with those.
    """

    def __init__(self, shards: list[tuple[int, Path]], length: int, batch_size: int, seed: int, part: str):
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))  # as every shard stays open
        self.files = [os.open(path, os.O_RDONLY) for _, path in shards]
        self.game_ids = torch.tensor([game_id for game_id, _ in shards])
        self.length = length
        self.seed = seed
        windows = np.array([path.stat().st_size // ROW.itemsize for _, path in shards]) - length + 1  # of each shard
        held_out = np.ceil(windows * 0.01).astype(int)
        if part == "train":
            first = 0  # row of a shard's first window
            counts = windows - held_out - length + 1
        else:
            first = windows - held_out
            counts = held_out
        self.ends = counts.cumsum()
        self.offset = first + counts - self.ends  # window i of all shards is at row i + offset[shard]
        self.size = int(self.ends[-1])
        least = batch_size if part == "train" else WORLD_SIZE
        if counts.min() < 1 or self.size < least:
            raise SystemExit(f"Too few {part} samples of {length} rows: use more rows or lower --batch-size.")
        self.batch_size = min(batch_size, self.size // WORLD_SIZE * WORLD_SIZE)  # held-out samples may be fewer
        self.batches = self.size // self.batch_size  # in an epoch
        self.epoch = -1

    def choose(self, i: int) -> np.ndarray:
        """The windows [b] of this process's part of batch i, which seed and i alone decide"""
        epoch, i = divmod(i, self.batches)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        batch = self.order[i * self.batch_size : (i + 1) * self.batch_size]
        return np.split(batch, WORLD_SIZE)[RANK]

    def read(self, window: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows [b] -> their rows uint8 [b, length, 7064], game_id [b]"""
        shard = np.searchsorted(self.ends, window, side="right")
        start = (window + self.offset[shard]) * ROW.itemsize  # byte of the shard at which a window starts
        shape = len(window), self.length, ROW.itemsize
        rows = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
        for sample, s, byte in zip(rows.numpy(), shard.tolist(), start.tolist(), strict=True):
            if os.preadv(self.files[s], [sample], byte) != sample.nbytes:
                raise SystemExit("A shard in --cache-dir is cut short. Delete that folder: it will be made again.")
        return rows, self.game_ids[shard]

    def batch(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.read(self.choose(i))


def unpack(rows: torch.Tensor, game_id: torch.Tensor, device: torch.device | str) -> dict[str, torch.Tensor]:
    """A batch of `Windows` on the device: frames uint8 [b, length, 84, 84], ROW's fields [b, length], game_id [b]"""
    rows = rows.to(device, non_blocking=True)
    sizes = [ROW[name].itemsize for name in ROW.names]  # bytes of each field
    frames, is_first, action, reward, terminal, return_to_go = rows.split(sizes, dim=2)
    return {
        "frames": frames.unflatten(2, (84, 84)),
        "is_first": is_first.squeeze(2).bool(),
        "action": action.squeeze(2).long(),
        "reward": reward.squeeze(2).view(torch.int8),
        "terminal": terminal.squeeze(2).bool(),
        "return_to_go": return_to_go.view(torch.float32).squeeze(2),
        "game_id": game_id.to(device, non_blocking=True),
    }


def read_ahead(data: Windows, steps: range, threads: int) -> Iterator[tuple[int, tuple]]:
    """(step, batch) of the steps in order. Threads read the next batches while one is used."""
    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(data.read, data.choose(step)) for step in steps[:threads]]
        for step in steps:
            if step + threads in steps:
                pending.append(pool.submit(data.read, data.choose(step + threads)))
            yield step, pending.pop(0).result()


# === files [shared] ===================================================================================================
@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, unlike any other process's; the file is then renamed, so that `path` is whole or absent."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    yield temporary
    temporary.replace(path)


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


# === learning-rate schedule [shared] ==================================================================================
def lr_multiplier(step: int, total_steps: int) -> float:
    """Rises linearly from 0.1 to 1 over the first 10% of the steps, then falls to 0.1 along a cosine."""
    warm_up = 0.1 * total_steps
    if step < warm_up:
        return 0.1 + 0.9 * step / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / (total_steps - warm_up)))


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


# === training [shared] ================================================================================================
MAY_CHANGE = """data_dir cache_dir num_workers device compile run_name resume overwrite log_every eval_every
    save_every""".split()  # when a run is resumed; all other arguments must stay


def check_args(args: Args) -> None:
    for name in ("total_steps", "batch_size", "play_rows", "num_workers", "log_every", "eval_every", "save_every"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1.")
    if args.batch_size % WORLD_SIZE > 0:
        raise SystemExit(f"--batch-size {args.batch_size} is not a multiple of {WORLD_SIZE} processes.")
    if args.resume and args.overwrite:
        raise SystemExit("--resume continues a run and --overwrite deletes it: choose one of the two.")


def restore(path: Path, plain_args: dict, objective: Method, optimizer: torch.optim.Optimizer) -> int:
    """Loads the checkpoint of a run with the same arguments, and returns the number of its steps."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    changed = {}
    for name, value in state["args"].items():
        if name not in MAY_CHANGE and plain_args.get(name) != value:
            changed[name] = value
    if changed:
        raise SystemExit(f"{path} was trained with {changed}: resume with these, or choose --run-name.")
    for name, part in objective.named_children():
        part.load_state_dict(state[name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def save(path: Path, step: int, plain_args: dict, objective: Method, optimizer: torch.optim.Optimizer) -> None:
    state = {"format": "atari-pb/1", "objective": objective.name, "step": step, "args": plain_args}
    state |= {"games": plain_args["games"], "optimizer": optimizer.state_dict()}
    for name, part in objective.named_children():  # backbone, neck, head and, with momentum networks, target
        state[name] = part.state_dict()
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def mean(entries: list[torch.Tensor]) -> list[float]:
    """The mean of entries [n] over the list and over all processes. This waits for the device."""
    values = torch.stack(entries).mean(0)
    if WORLD_SIZE > 1:
        dist.all_reduce(values)
    return (values / WORLD_SIZE).tolist()


@torch.no_grad()
def evaluate(objective: Method, held_out: Windows, device: torch.device, precision: torch.autocast) -> dict[str, float]:
    """Loss and metrics on the same held-out samples each time, augmented in the same way"""
    objective.eval()
    torch.manual_seed(0)
    results = []
    for i in range(min(10, held_out.batches)):
        with precision:
            loss, metrics = objective(unpack(*held_out.batch(i), device))
        results.append(torch.stack([loss, *metrics.values()]))
    objective.train()
    names = ["eval/loss", *(f"eval/{name}" for name in metrics)]
    return dict(zip(names, mean(results), strict=True))


def train(args: Args) -> None:
    # The run's folder, the processes and the device
    args.games = list(dict.fromkeys(parse_game(name, DQN_REPLAY_GAMES) for name in args.games)) or ID_GAMES
    check_args(args)
    if WORLD_SIZE > 1 and args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    device, precision = set_up_device(args.device, args.precision, args.compile)
    run_dir = Path("runs", args.run_name or f"{Path(__file__).stem}__{args.seed}")
    checkpoint = run_dir / "checkpoint.pt"
    if (run_dir / "args.json").exists() and not (args.resume or args.overwrite):
        raise SystemExit(f"{run_dir} exists. Choose --resume to continue it, --overwrite, or another --run-name.")
    run_dir.mkdir(parents=True, exist_ok=True)
    if WORLD_SIZE > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # preparing the data may take that long

    # The objective, its data and its optimizer
    torch.manual_seed(args.seed)
    objective = Objective(args).to(device, memory_format=torch.channels_last)
    if LOCAL_RANK > 0:
        dist.barrier()  # the first process of each machine prepares the data for the others
    shards, source = prepare(args, args.games, args.rows_per_checkpoint)
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier()
    data = Windows(shards, objective.length, args.batch_size, args.seed, "train")
    held_out = Windows(shards, objective.length, args.batch_size, args.seed, "held_out")
    learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, args.learning_rate, args.betas, args.adam_eps, args.weight_decay, fused=True)

    # The state of a run that is resumed
    facts = asdict(args) | {"samples": data.size, "data": source}
    plain_args = json.loads(json.dumps(facts, default=str))  # lists and strings, as checkpoints have them
    start = restore(checkpoint, plain_args, objective, optimizer) if args.resume and checkpoint.exists() else 0
    model = torch.compile(objective) if args.compile else objective
    if WORLD_SIZE > 1:
        found = [None] * WORLD_SIZE
        dist.all_gather_object(found, {"step": start, "samples": data.size, "held_out": held_out.size, "data": source})
        if any(other != found[0] for other in found):
            raise SystemExit(f"Processes differ in what they have found: {found}. Give all the same runs/ and data.")
        model = nn.parallel.DistributedDataParallel(model)
    if RANK == 0:
        if args.overwrite:  # now that all above has worked
            for path in [*run_dir.glob("events.*"), checkpoint]:
                path.unlink(missing_ok=True)
        writer = SummaryWriter(run_dir, purge_step=start + 1)  # hides what was logged after the checkpoint
        (run_dir / "args.json").write_text(json.dumps(plain_args, indent=2))
        print(f"{run_dir}: {len(args.games)} games, {data.size:,} samples, {held_out.size:,} held out", flush=True)

    stops = catch_signals()  # one ends the run after a step
    finished = start  # steps
    recent = []  # loss, norm of the gradients and metrics of the steps since the last log entry, on the device
    clock = time.perf_counter()
    bar = tqdm(total=args.total_steps, initial=start, unit="step", disable=RANK > 0, **BAR)
    if args.compile:
        bar.set_postfix_str("compiling, about a minute")
    for step, batch in read_ahead(data, range(start, args.total_steps), args.num_workers):
        # Augmentation and masks depend on seed and step alone, mixed: PyTorch's CPU generator uses 32 bits of a seed.
        torch.manual_seed(int(np.random.default_rng([args.seed, step]).integers(2**32)))
        optimizer.param_groups[0]["lr"] = args.learning_rate * lr_multiplier(step, args.total_steps)
        with precision:
            loss, metrics = model(unpack(*batch, device))
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(learned, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()  # here, so that the next forward pass can use the gradients' memory
        objective.update_target(step)

        finished = step + 1
        recent.append(torch.stack([loss, grad_norm, *metrics.values()]).detach())
        bar.update()
        last = finished == args.total_steps
        stop = bool(stops)
        if WORLD_SIZE > 1:  # all stop at the same step; they ask each other now and then, as that waits for the device
            stop = finished % 20 == 0 and mean([grad_norm.new_tensor([len(stops)])])[0] > 0
        evaluates = last or finished % args.eval_every == 0
        saves = last or stop or finished % args.save_every == 0
        if not (evaluates or saves or finished % args.log_every == 0):
            continue  # without waiting for the device
        names = ["losses/loss", "losses/grad_norm", *(f"losses/{name}" for name in metrics)]
        scalars = dict(zip(names, mean(recent), strict=True))
        if not math.isfinite(scalars["losses/loss"] + scalars["losses/grad_norm"]):
            last_good = f"Last good: {checkpoint}"
            raise SystemExit(f"Loss or gradient norm is not finite at step {finished}: {scalars}. {last_good}")
        if evaluates:
            scalars |= evaluate(objective, held_out, device, precision)
        rate = len(recent) * args.batch_size / (time.perf_counter() - clock)  # samples per second, evaluations included
        scalars |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": rate}
        bar.set_postfix_str(f"loss {scalars['losses/loss']:.3f}, {rate:.0f} samples/s", refresh=False)
        if RANK == 0:
            for name, value in scalars.items():
                writer.add_scalar(name, value, finished)
            picture = objective.picture(unpack(*held_out.batch(0), device)) if evaluates else None
            if picture is not None:
                writer.add_image("eval/picture", picture, finished)
            if saves:
                writer.flush()  # first, so that nothing before the checkpoint is missing from the charts
                save(checkpoint, finished, plain_args, objective, optimizer)
        if stop:
            break
        recent = []
        clock = time.perf_counter()

    bar.close()
    if RANK == 0:
        writer.close()
        print(f"{checkpoint}: {finished} of {args.total_steps} steps done", flush=True)
    if WORLD_SIZE > 1:
        dist.barrier()  # until the checkpoint is written: torchrun kills the others once one has ended
        dist.destroy_process_group()
    if finished < args.total_steps:
        raise SystemExit("Stopped by a signal. To go on: --resume")


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
