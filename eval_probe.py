# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "torchvision==0.29.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6",
#   "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0"]
# ///
"""What a backbone's features tell of Atari-PB's games (arXiv 2406.06037), without fine-tuning: a cheap first look.

Held-out samples, which no pre-training on the same data has seen, go through each model and through a random backbone.
With x_i the features of a stack in game g, a_i the action taken on it, r_i the reward that came of it:

    action probe   minimises -mean_i log softmax(W_g x_i + b_g)[a_i]; its accuracy on samples that it was not trained on
    reward probe   the same for sign(r_i), each sign of a game weighted alike; balanced accuracy: of each game, the mean
                   over its signs of the share of samples that were told right, where a constant guess gets 1/2 or 1/3
    RankMe         exp(-sum_k p_k log p_k), p_k = sigma_k / sum sigma, the singular values of [x_1, ...] (2210.02885)
    dormant rate   (d - exp(-sum_j m_j log m_j)) / d, m_j the mean |x_ij| over i, over all d units summing to 1

x is the ResNet-50's map averaged over its cells, standardised for the probes: what every checkpoint has and fine-tuning
takes. The benchmark's own monitor took the neck's features: --features neck.

    python eval_probe.py --models runs/pretrain_atc__0/checkpoint.pt runs/pretrain_mae__0/checkpoint.pt
    python eval_probe.py --models runs/pretrain_*/checkpoint.pt --data-dir /data/dqn_replay

Give it the games and the data of the pre-training. Prints a table; writes reports/probe.md, probe.json and probe.png.
"""

import gzip
import json
import math
import mmap
import os
import resource
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import ale_py
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map


# === arguments ========================================================================================================
@dataclass
class Args:
    models: tuple[Path, ...] = ()  # checkpoints of pretrain_*.py runs, or the original authors' .pth
    features: Literal["backbone", "neck"] = "backbone"  # neck: of checkpoints whose neck is the spatial MLP
    width_multiplier: float = 1.0  # of the ResNet's channels; as in pre-training
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottleneck blocks of the four stages; as in pre-training

    games: tuple[str, ...] = ()  # as ms_pacman or MsPacman; none given: the benchmark's 50 pre-training games
    data_dir: Path | None = None  # the DQN Replay Dataset; none given: games played here at random, as a smoke test
    runs: tuple[int, ...] = (1, 2)  # runs of the DQN agent to read, of each game
    checkpoints: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # replay checkpoints to read, of each run
    rows_per_checkpoint: int = 10_000  # rows to read from the start of each checkpoint, padding rows included
    play_rows: int = 1_000  # rows to play of each game where there is no --data-dir
    cache_dir: Path = Path("cache")  # for prepared and played data; all scripts and runs may share it

    samples: int = 20_000  # held-out samples to take, at most
    epochs: int = 100  # of the probes, over nine tenths of the samples
    batch_size: int = 512  # samples of a step of the probes
    learning_rate: float = 1e-4  # AdamW's
    weight_decay: float = 1e-5  # AdamW's
    rank_samples: int = 5_000  # samples for RankMe and the dormant rate, at most
    resamples: int = 1_000  # of the bootstrap
    rank_resamples: int = 100  # of RankMe's bootstrap, which takes long with many units

    seed: int = 0  # of the random backbone, the choice of samples, the order of training and the bootstrap
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to compute
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bfloat16 autocast on GPUs and CPUs that compute in it
    output_dir: Path = Path("reports")  # where probe.md, probe.json and probe.png go


# === games [shared] ===================================================================================================
ID_GAMES = tuple(  # the 50 games of pre-training
    """air_raid amidar asteroids atlantis bank_heist battle_zone berzerk bowling boxing breakout carnival centipede
    chopper_command crazy_climber demon_attack double_dunk elevator_action enduro fishing_derby freeway frostbite gopher
    gravitar hero ice_hockey jamesbond kangaroo krull kung_fu_master montezuma_revenge ms_pacman name_this_game phoenix
    pitfall private_eye qbert road_runner robotank skiing solaris space_invaders star_gunner tennis time_pilot tutankham
    up_n_down video_pinball wizard_of_wor yars_revenge zaxxon""".split()
)
NEAR_OOD_GAMES = tuple("alien assault asterix beam_rider journey_escape pong pooyan riverraid seaquest venture".split())
FAR_OOD_GAMES = tuple("basic_math human_cannonball klax othello surround".split())
TABLE_GAMES = sorted(ID_GAMES + NEAR_OOD_GAMES)  # the DQN Replay games; game_id is a game's place in this list


def parse_game(name: str) -> str:
    """ALE's name of a game given as `ms_pacman` or `MsPacman`."""
    games = {game.replace("_", ""): game for game in sorted(ID_GAMES + NEAR_OOD_GAMES + FAR_OOD_GAMES)}
    if name.replace("_", "").lower() not in games:
        raise SystemExit(f"Unknown game {name!r}. Known are: {' '.join(games.values())}")
    return games[name.replace("_", "").lower()]


# === files [shared] ===================================================================================================
@contextmanager
def atomic_write(path: Path):
    """A file to write that takes the place of `path` in one move once it is complete, and vanishes on an error."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f".{path.name}.*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > 3600:  # what a process was writing as it was killed
                    other.unlink()
        with open(temporary, "wb") as file:
            yield file
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{path} cannot be written ({error!r}).") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_writable(folder: Path) -> None:
    """Ends the program if no file could be written into a folder that is there or is to be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise SystemExit(f"{folder} cannot be written: {existing} is no folder, or a protected one. Choose another.")


# === errors [shared] ==================================================================================================
@contextmanager
def clear_errors(name: Path | str, advice: str):
    """Turns whatever goes wrong with what has that name, a file, into one line that names it and says what to do."""
    try:
        yield
    except Exception as error:
        raise SystemExit(f"{name} cannot be used ({error!r}). {advice}") from error


# === torch files [shared] =============================================================================================
def load_torch(path: Path, mapped: bool = False) -> dict:
    """What torch.save wrote, its tensors left in the file if `mapped`; an error if a bit of it has changed."""
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():
            raise ValueError(f"its part {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


# === numbers [shared] =================================================================================================
def check_numbers(args, at_least_0: str, at_least_1: str) -> None:
    """Ends the program if one of the arguments of these names is less or not finite; --max-grad-norm may be inf."""
    for least, names in enumerate((at_least_0, at_least_1)):
        for name in names.split():
            value = getattr(args, name)
            limit = math.inf if isinstance(value, float) else 2**63
            if not least <= value < limit and (name, value) != ("max_grad_norm", math.inf):
                raise SystemExit(f"--{name.replace('_', '-')} must be at least {least}, and below {limit}.")


# === processes [shared] ===============================================================================================
RANK = int(os.environ.get("RANK", 0))  # torchrun's number for this process, among all
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # among this machine's
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many there are


# === replay files [shared] ============================================================================================
HISTORY = 3  # rows of a stack of 4 frames before its own row
PADDING = 3  # blank rows before every episode in DQN Replay files
REPLAY = np.dtype([("observation", "u1", (84, 84)), ("action", "i4"), ("reward", "f4"), ("terminal", "u1")])  # files


def replay_layouts(data_dir: Path, game: str, run: int, checkpoint: int) -> list[list[Path]]:
    """Where a replay checkpoint's files are: as the bucket has them, or as Atari-PB's and SGI's download scripts do."""
    folder = data_dir / "".join(word.capitalize() for word in game.split("_"))
    layouts = (f"{run}/replay_logs/$store$_{{}}_ckpt.{checkpoint}.gz", f"{{}}_{run}_{checkpoint}.gz")
    return [[folder / layout.format(field) for field in REPLAY.names] for layout in layouts]


# === data [shared] ====================================================================================================
FIELDS = np.dtype([("starts", "?"), ("action", "u1"), ("reward", "i1"), ("terminal", "?"), ("return_to_go", "<f4")])
ROW = np.dtype([("frame", "u1", (84, 84)), ("fields", FIELDS)])  # a row of a prepared shard, 7,064 bytes


def read_rows(path: Path, row: np.dtype, rows: float) -> tuple[np.ndarray, int]:
    """The first `rows` rows of a gzipped .npy, or all if fewer, decompressing no more; and how many it holds."""
    with clear_errors(path, "If it is damaged, download it again."), gzip.open(path) as file:
        np.lib.format.read_magic(file)
        (total, *shape), column_major, dtype = np.lib.format.read_array_header_1_0(file)
        fits = shape == [*row.shape] and np.can_cast(dtype, row.base, "no" if shape else "same_kind")
        if not fits or column_major or total < 0:
            raise ValueError(f"it holds rows of {dtype} {shape}, not of {row.base} {list(row.shape)}")
        count = min(rows, total)
        content = file.read(count * math.prod(shape) * dtype.itemsize)
        if count == total:  # gzip's checksum is at the end
            file.read(1)
        return np.frombuffer(content, dtype).reshape(count, *shape), total


def content_key(file: Path) -> tuple[int, bytes]:
    """A gzip file's size and last 8 bytes, its content's checksum and length: of other content they are others."""
    with clear_errors(file, "Make it readable."), open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 8, 0))
        return size, stream.read()


def prepare_shard(cache_dir: Path, data_dir: Path, rows: int, game: str, run: int, checkpoint: int) -> Path:
    """Makes, once, an .npy of ROWs of a replay checkpoint's first `rows` rows, padding left out; returns its path.

    Rewards become their signs (NaN: 0), return_to_go their sum up to the episode's end, even beyond `rows`; start marks
    an episode's first row. A file that begins with padding keeps 3 blank rows in front, as history of its first stack.
    """
    numbers = (50, 49, 48) if checkpoint == 50 else (checkpoint,)  # a few runs lack checkpoint 50
    layouts = [files for number in numbers for files in replay_layouts(data_dir, game, run, number)]
    files = next((files for files in layouts if any(file.is_file() for file in files)), layouts[0])
    if missing := [str(file) for file in files if not file.is_file()]:
        raise SystemExit(f"Missing {', '.join(missing)}: download it, or ask for games, runs and checkpoints you have.")
    key = zlib.crc32(repr(("shard/2", [*map(content_key, files)], rows)).encode())  # of changed files, another
    path = cache_dir / "prepared" / f"{game}_{run}_{checkpoint}_{key:08x}.npy"
    if path.exists():
        return path
    needed = (rows, rows, math.inf, math.inf)  # all rewards and terminals, for return_to_go
    rows_and_totals = map(read_rows, files, (REPLAY[name] for name in REPLAY.names), needed)
    (frame, action, reward, terminal), (total, *totals) = zip(*rows_and_totals, strict=True)
    if totals != [total] * 3:
        raise SystemExit(f"{files[0]} and its action, reward and terminal files differ in length. Download them again.")
    if not 0 < rows < total:  # a file's last row may be stale: it is never used
        raise SystemExit(f"{files[0]} has {max(total - 1, 0)} usable rows, not {rows}: choose another number.")
    if action.min() < 0 or action.max() > 17:
        raise SystemExit(f"{files[1]} has actions from {action.min()} to {action.max()}, outside 0 to 17.")
    reward, terminal = np.sign(np.nan_to_num(reward[:-1].astype(np.float32))), terminal[:-1] != 0
    to_file_end = np.append(np.cumsum(reward[::-1])[::-1], 0)  # [total], the sum of row i's and all later rewards
    ends = np.append(np.flatnonzero(terminal), total - 2)  # every episode's last row
    return_to_go = to_file_end[:rows] - to_file_end[ends[np.searchsorted(ends, np.arange(rows))] + 1]
    reward, terminal = reward[:rows], terminal[:rows]

    blank = ~frame.any((1, 2)) & (action == 0) & (reward == 0) & ~terminal
    real = np.full(rows, True)
    real[:PADDING] = ~np.logical_and.accumulate(blank[:PADDING])  # a file may begin amid the padding
    for first in np.flatnonzero(terminal) + 1:
        real[first : first + PADDING] = not blank[first : first + PADDING].all()
    shard = np.zeros(HISTORY + np.count_nonzero(real), ROW)
    shard["frame"][HISTORY:] = frame[real]
    for name, column in zip(FIELDS.names[1:], (action, reward, terminal, return_to_go), strict=True):
        shard["fields"][name][HISTORY:] = column[real]
    shard["fields"]["starts"][1:] = shard["fields"]["terminal"][:-1]
    shard["fields"]["starts"][HISTORY : HISTORY + 1] = not real[0]
    with atomic_write(path) as file:
        np.save(file, shard[HISTORY:] if real[0] else shard, allow_pickle=False)
    return path


def play_game(data_dir: Path, num_rows: int, game: str) -> None:
    """Plays `num_rows` rows of a game, with sticky actions, into a replay of run 1, checkpoint 1; once.

    Each step the player repeats its last action or, with probability 0.1, draws another: that shows more of a game.
    """
    files = replay_layouts(data_dir, game, 1, 1)[0]
    if all(file.exists() for file in files):
        return
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    options = dict(repeat_action_probability=0.25, noop_max=0, use_fire_reset=False, reward_clipping=False)
    env = AtariVectorEnv(game, 1, **options)
    rng = np.random.default_rng(zlib.crc32(game.encode()))
    rows, done, action = [], True, 0
    while len(rows) <= num_rows:  # one more than asked for: readers leave the last one out
        if done:
            stack, _ = env.reset(seed=int(rng.integers(2**31)))  # [1, 4, 84, 84]
            rows += [(np.zeros((84, 84)), 0, 0, 0)] * PADDING
        if rng.random() < 0.1:
            action = rng.integers(env.single_action_space.n)
        frame = stack[0, -1]
        stack, reward, terminated, truncated, _ = env.step(np.array([action]))
        done = terminated[0] or truncated[0]
        rows.append((frame, action, reward[0], done))
    for path, name, column in zip(files, REPLAY.names, zip(*rows, strict=True), strict=True):
        with atomic_write(path) as file, gzip.open(file, "wb", compresslevel=1) as stream:
            np.save(stream, np.array(column, REPLAY[name].base), allow_pickle=False)


def prepare(args, games: tuple, rows: int) -> list[tuple[int, Path]]:
    """(game_id, path) of every shard of games, args.runs and args.checkpoints; without args.data_dir, of own play."""
    data_dir, runs, checkpoints = args.data_dir, args.runs, args.checkpoints
    for numbers in (runs, checkpoints):
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
            raise SystemExit("--runs and --checkpoints must name at least one each, each once, and none below 0.")
    check_writable(args.cache_dir)
    # Threads are enough: what takes the time, in ALE, zlib and NumPy, goes on side by side.
    pool = dict(max_workers=min(8, os.cpu_count()), leave=False, disable=LOCAL_RANK > 0)
    if data_dir is None:
        data_dir, runs, checkpoints, rows = args.cache_dir / f"played_{args.play_rows}", (1,), (1,), args.play_rows
        if LOCAL_RANK == 0:
            print(f"No --data-dir: a smoke test on {rows:,} rows of random play a game, kept in {data_dir}", flush=True)
        thread_map(partial(play_game, data_dir, rows), games, desc="playing", **pool)
    jobs = [(game, run, checkpoint) for game in games for run in runs for checkpoint in checkpoints]
    make = partial(prepare_shard, args.cache_dir, data_dir, rows)
    paths = thread_map(make, *zip(*jobs, strict=True), desc="preparing", **pool)
    game_ids = [TABLE_GAMES.index(game) if game in TABLE_GAMES else 0 for game, _, _ in jobs]  # far-OOD games have none
    return list(zip(game_ids, paths, strict=True))


@cache  # by each process of its own
def map_shard(path: Path) -> np.memmap:
    shard = np.load(path, mmap_mode="r", allow_pickle=False)
    shard.base.madvise(mmap.MADV_RANDOM)  # else, of what is not in RAM, the system reads many times what is needed
    return shard


@cache
def open_shard(path: Path) -> np.ndarray:
    with clear_errors(path, "Delete it: it will be prepared again."):
        return map_shard(path).view(ROW, np.ndarray)  # np.memmap is slow to slice


class Windows(Dataset):
    """Batches of windows, `length` consecutive rows of a shard. Batch i is a function of (seed, i, rank, world size).

    Every epoch takes all windows in a new order. `part` is "train", "held_out" (each shard's last 1% of windows, which
    share no row with training windows) or "all". A batch is a dict of arrays: frames uint8 [b, length, 84, 84]; starts,
    action, reward, terminal, return_to_go [b, length]; game_id [b]; b is batch_size / WORLD_SIZE, or less at the end of
    an epoch of "all".
    """

    def __init__(self, shards: list[tuple[int, Path]], length: int, batch_size: int, seed: int, part: str):
        game_ids, self.paths = zip(*shards, strict=True)
        self.game_ids, self.length, self.seed, self.epoch = np.array(game_ids), length, seed, None
        self.cold = True  # whether batches have lately come from the disk, not from RAM
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))  # 1,000 shards are open at once
        windows = np.array([len(open_shard(path)) for path in self.paths]) - length + 1
        held_out = np.ceil(windows * 0.01).astype(int)
        counts = {"train": windows - held_out - length + 1, "held_out": held_out, "all": windows}[part]
        first = windows - held_out if part == "held_out" else 0  # row of a shard's first window
        if counts.min() < 1:
            raise SystemExit(f"{self.paths[counts.argmin()]} is too short for windows of {length} rows: use more rows.")
        self.ends = counts.cumsum()
        self.offset = first + counts - self.ends  # window i of all is at row i + offset[shard]
        self.size = int(self.ends[-1])
        if self.size < (least := batch_size if part == "train" else WORLD_SIZE):
            raise SystemExit(f"{self.size} {part} samples, fewer than {least}: use more rows or lower --batch-size.")
        self.batch_size = min(batch_size, self.size // WORLD_SIZE * WORLD_SIZE)  # held-out samples may be fewer
        self.batches = math.ceil(self.size / self.batch_size) if part == "all" else self.size // self.batch_size

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        epoch, batch = divmod(i, self.batches)
        if epoch != self.epoch:  # half a second and 40 MB for the benchmark's 10M windows
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(np.arange(self.size, dtype=np.uint32))
        windows = self.order[batch * self.batch_size : (batch + 1) * self.batch_size].astype(np.int64)
        window = np.array_split(windows, WORLD_SIZE)[RANK]
        shard = np.searchsorted(self.ends, window, side="right")
        places = list(zip(shard.tolist(), (window + self.offset[shard]).tolist(), strict=True))
        read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock  # blocks, from the disk, so far
        for s, row in places if self.cold else ():  # all that is not in RAM is to be read at once, not page by page
            mapped = map_shard(self.paths[s])
            start = mapped.offset + row * ROW.itemsize
            before = start % mmap.PAGESIZE  # bytes of the first page
            mapped.base.madvise(mmap.MADV_WILLNEED, start - before, before + self.length * ROW.itemsize)
        frames = np.empty((len(window), self.length, 84, 84), np.uint8)
        fields = np.empty((len(window), self.length), FIELDS)
        whole = fields.view("u8")  # each row's as one number: that is faster to copy than field by field
        for j, (s, row) in enumerate(places):
            rows = open_shard(self.paths[s])[row : row + self.length]
            frames[j], whole[j] = rows["frame"], rows["fields"].view("u8")
        self.cold = resource.getrusage(resource.RUSAGE_SELF).ru_inblock > read
        others = {name: fields[name].copy() for name in FIELDS.names}
        return {"frames": frames, "game_id": self.game_ids[shard]} | others


# === frame stacks and augmentation [shared] ===========================================================================
def stack_frames(frames: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Every stack of 4 frames in windows of rows, oldest frame first, frames of the episode before it zeroed.

    frames uint8 [b, 3+n, 84, 84], starts bool [b, 3+n] (True on an episode's first row) -> uint8 [b, n, 4, 84, 84]
    """
    episode = starts.unfold(1, 4, 1).cumsum(-1)  # [b, n, 4], how many starts up to a frame
    same = episode == episode[..., -1:]  # whether the frame is of the episode of the stack's last, its own
    return frames.unfold(1, 4, 1).movedim(-1, 2) * same[..., None, None]


def own_part(drawn: torch.Tensor) -> torch.Tensor:
    """This process's part [b, ...] of what all draw alike [WORLD_SIZE * b, ...]: several compute what one would."""
    return drawn.chunk(WORLD_SIZE)[RANK]


def augment(stacks: torch.Tensor) -> torch.Tensor:
    """Random shift, then random intensity: uint8 [b, n, 4, 84, 84] -> float32, [0, 1] times the intensity.

    The shift, up to 4 pixels each way, repeats the edge; the intensity is 1 + 0.05 clamp(N(0, 1), -2, 2). A sample's
    stacks and frames share one draw: call it once for each view that has its own.
    """
    b, device = len(stacks), stacks.device
    shift = own_part(torch.randint(-4, 5, (WORLD_SIZE * b, 2, 1), device=device))
    rows, columns = (torch.arange(84, device=device) + shift).clamp(0, 83).unbind(1)  # [b, 84] each
    sample = torch.arange(b, device=device)[:, None, None]
    pixels = stacks.permute(0, 3, 4, 1, 2)[sample, rows[:, :, None], columns[:, None, :]]  # [b, 84, 84, n, 4]
    noise = own_part(torch.randn(WORLD_SIZE * b, 1, 1, 1, 1, device=device)).clamp(-2, 2)
    return (pixels * ((1 + 0.05 * noise) / 255)).permute(0, 3, 4, 1, 2)


# === resnet-50 [shared] ===============================================================================================
norm = partial(nn.GroupNorm, 4, affine=False)  # 4 groups, no parameters


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution around a shortcut: [b, c, h, w] -> [b, 4 planes, h/s, w/s]"""

    def __init__(self, in_channels: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, planes, 1, bias=False), norm(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), norm(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), norm(4 * planes)
        self.downsample = nn.Identity()
        if stride > 1 or in_channels != 4 * planes:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, 4 * planes, 1, stride, bias=False), norm(4 * planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-50 (1512.03385), named as torchvision's, without max-pool: [b, 4, 84, 84] -> [b, 2048 width, 6, 6]"""

    def __init__(self, width_multiplier: float, blocks: tuple[int, int, int, int]):
        super().__init__()
        if not 0 < width_multiplier <= 8 or width_multiplier * 16 % 1 or not 1 <= min(blocks) <= max(blocks) <= 100:
            raise SystemExit("--width-multiplier must be a multiple of 1/16, up to 8, all of --blocks from 1 to 100.")
        channels = width = int(64 * width_multiplier)
        self.conv1, self.bn1 = nn.Conv2d(4, width, 7, 2, 3, bias=False), norm(width)
        for i in range(4):
            stage = nn.Sequential()
            for j in range(blocks[i]):
                stage.append(Bottleneck(channels, width * 2**i, stride=2 if i > 0 and j == 0 else 1))
                channels = 4 * width * 2**i
            self.add_module(f"layer{i + 1}", stage)
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # [b, 64, 42, 42]
        x = self.layer2(self.layer1(x))  # [b, 256, 42, 42], [b, 512, 21, 21]
        return self.layer4(self.layer3(x))  # [b, 1024, 11, 11], [b, 2048, 6, 6]


# === neck [shared] ====================================================================================================
class Neck(nn.Module):
    """Maps times the game's learned embedding, averaged, through an MLP: [b, c, 6, 6], game_id [b] -> [b, 512]"""

    def __init__(self, channels: int, games: int):
        super().__init__()
        self.spatial_embed = nn.Parameter(torch.randn(games, channels * 6 * 6))
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU())

    def forward(self, maps: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        embed = F.embedding(game_id, self.spatial_embed).view(maps.shape)  # [b, c, 6, 6]
        return self.mlp(self.norm((maps * embed).mean((2, 3))))


# === game linear [shared] =============================================================================================
def game_linear(x: torch.Tensor, game_id: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A linear layer for each game, y = x W_g + b_g: x [b, d], weight [games, d, a], bias [games, a] -> [b, a]"""
    every = x @ weight  # [games, b, a]: about 1% of the ResNet's work; a matrix for each sample would take 512 MB
    return every[game_id, torch.arange(len(x), device=x.device)] + F.embedding(game_id, bias)


class GameLinear(nn.Module):
    """`game_linear` of its own tables: x [b, d], game_id [b] -> [b, a]"""

    def __init__(self, games: int, features: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(games, features, outputs))
        self.bias = nn.Parameter(torch.randn(games, outputs))

    def forward(self, x: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        return game_linear(x, game_id, self.weight, self.bias)


# === device [shared] ==================================================================================================
def find_device(name: str) -> torch.device:
    """The device of that name, ready to use; on CUDA under torchrun, this process's own GPU."""
    with clear_errors(name, "Choose a --device that there is, such as cpu or cuda."):
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", LOCAL_RANK if WORLD_SIZE > 1 else device.index or 0)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16 if `precision` is bf16, or is auto and the hardware has instructions for it."""
    on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else on_cpu
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16" or (precision == "auto" and native))


# === checkpoint files [shared] ========================================================================================
def load_backbone(backbone: nn.Module, path: Path) -> str:
    """Loads the backbone of our checkpoint or of the original authors' .pth; returns the name of its objective."""
    with clear_errors(path, "It must be a checkpoint of a pretrain_*.py run or a .pth of the Atari-PB authors."):
        content = load_torch(path, mapped=True)
        state = {}
        for name, value in content["backbone"].items():
            name = name.removeprefix("_orig_mod.").removeprefix("module.").replace(".shortcut.", ".downsample.")
            if not name.startswith("stem."):  # the authors' files hold the first convolution twice
                state[name] = value
        shapes, expected = ({name: tuple(x.shape) for name, x in d.items()} for d in (state, backbone.state_dict()))
    if shapes != expected:
        name = min(dict(shapes.items() ^ expected.items()))
        found = f"{name} is {shapes.get(name)}, not {expected.get(name)}"
        raise SystemExit(f"{path} has another network ({found}): set --width-multiplier and --blocks as in its run.")
    backbone.load_state_dict(state)
    return content.get("objective", path.stem)


# === models ===========================================================================================================
class Network(nn.Module):
    """A model's backbone, or also its neck: stacks [b, 4, 84, 84] in [0, 1], game_id [b] -> features [b, d]"""

    def __init__(self, args: Args, path: Path | None):
        super().__init__()
        torch.manual_seed(args.seed)
        self.backbone = ResNet(args.width_multiplier, args.blocks)  # f
        self.neck = Neck(self.backbone.channels, len(TABLE_GAMES)) if args.features == "neck" else None  # g
        self.name = load_backbone(self.backbone, path) if path else "random"
        if path and self.neck:
            with clear_errors(path, "--features backbone needs no neck."):
                state = load_torch(path, mapped=True)["neck"]
                shapes, expected = ({name: x.shape for name, x in of.items()} for of in (state, self.neck.state_dict()))
            if shapes != expected:
                raise SystemExit(f"{path} has no spatial-MLP neck: --features backbone")
            self.neck.load_state_dict(state)

    def forward(self, stacks: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        maps = self.backbone(stacks)  # [b, 2048, 6, 6]
        return self.neck(maps, game_id) if self.neck else maps.float().mean((2, 3))


# === samples ==========================================================================================================
class Samples:
    """Held-out stacks of 4 frames, the same ones in the same order for every model, and what is to be told of them.

    No pre-training on the same data is trained on any row of them: those with longer windows hold out more rows.
    """

    def __init__(self, args: Args, games: tuple[str, ...]):
        shards = prepare(args, games, args.rows_per_checkpoint)
        self.windows = Windows(shards, HISTORY + 1, 128, args.seed, "held_out")
        self.windows.batches = math.ceil(self.windows.size / self.windows.batch_size)  # the last and short one, too
        self.windows[0]  # draws the order, of which the first are taken
        self.windows.order = self.windows.order[: args.samples]
        self.batches = range(math.ceil(len(self.windows.order) / self.windows.batch_size))
        batches = [self.windows[i] for i in self.batches]
        columns = [np.concatenate([batch[name] for batch in batches]) for name in ("game_id", "action", "reward")]
        self.game = torch.from_numpy(np.unique(columns[0], return_inverse=True)[1])  # [n], 0, 1, ...
        self.action = torch.from_numpy(columns[1][:, -1]).long()  # [n]
        self.sign = torch.from_numpy(columns[2][:, -1]).long() + 1  # [n], of the next reward: 0, 1 or 2
        # To test, the last tenth of each shard's windows: frames next to each other are nearly the same. Those before
        # that share rows with them are left out of the training.
        window = self.windows.order.astype(np.int64)
        shard, ends = np.searchsorted(self.windows.ends, window, side="right"), self.windows.ends
        left, tenth = ends[shard] - window, np.diff(ends, prepend=0)[shard] // 10  # left in the shard: its last has 1
        self.test = torch.from_numpy(left <= tenth)  # bool [n]
        self.train = torch.from_numpy(left > tenth + HISTORY)  # bool [n]
        games = torch.arange(int(self.game.max()) + 1)
        if not all((self.game[part][:, None] == games).any(0).all() for part in (self.test, self.train)):
            few = f"{len(self.game)} held-out samples are too few to train and test on, in each game"
            raise SystemExit(f"{few}: use more rows, such as --play-rows 5000 (1,000 give 10), or raise --samples.")


@torch.no_grad()
def extract(network: Network, samples: Samples, device: torch.device, precision: torch.autocast) -> torch.Tensor:
    """Features float32 [n, d] of all samples."""
    network, features = network.to(device, memory_format=torch.channels_last), []
    with tqdm(desc=network.name, total=len(samples.game), unit="images", leave=False) as bar:
        for i in samples.batches:
            batch = {key: torch.from_numpy(array).to(device) for key, array in samples.windows[i].items()}
            stacks = stack_frames(batch["frames"], batch["starts"]).squeeze(1)
            stacks = stacks.to(memory_format=torch.channels_last)
            with precision:
                features.append(network(stacks / 255, batch["game_id"]).float())
            bar.update(len(stacks))
    if not (features := torch.cat(features)).isfinite().all():
        raise SystemExit(f"{network.name} has features that are not finite: leave its checkpoint out.")
    return features


# === measures =========================================================================================================
def probe(features: torch.Tensor, samples: Samples, args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Trains a linear layer for each game; the actions and the signs it tells of the test samples, [test] each."""
    device = features.device
    game, action, sign = (x.to(device) for x in (samples.game, samples.action, samples.sign))
    train, test = (part.nonzero().flatten() for part in (samples.train, samples.test))
    std, mean = torch.std_mean(features[train], 0, correction=0)
    x = (features - mean) / torch.where(std > 1e-6, std, torch.inf)  # [n, d]; a unit that never changes tells nothing
    kinds = 3 * game + sign  # a game's sign
    weight = 1 / kinds[train].bincount(minlength=int(kinds.max()) + 1)  # of each kind, so that its samples weigh 1
    weight *= len(train) / weight.isfinite().sum()  # all samples together weigh as much as they are
    layer = nn.Module()  # from 0: the problem is convex, and where it starts must not matter
    layer.weight = nn.Parameter(torch.zeros(int(game.max()) + 1, x.shape[1], 18 + 3, device=device))
    layer.bias = nn.Parameter(torch.zeros(len(layer.weight), 18 + 3, device=device))
    adam = torch.optim.AdamW(layer.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in tqdm(range(args.epochs), "probes", unit="epoch", leave=False):
        for i in train[torch.randperm(len(train), generator=generator)].to(device).split(args.batch_size):
            logits = game_linear(x[i], game[i], layer.weight, layer.bias)  # [b, 21]
            loss = F.cross_entropy(logits[:, :18], action[i])
            loss += (weight[kinds[i]] * F.cross_entropy(logits[:, 18:], sign[i], reduction="none")).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    with torch.no_grad():
        logits = game_linear(x[test], game[test], layer.weight, layer.bias)
    return logits[:, :18].argmax(1).cpu().numpy(), logits[:, 18:].argmax(1).cpu().numpy()


def balanced_accuracy(hits: np.ndarray, game: np.ndarray, sign: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Of samples that occur `times` [r, n]: the mean over games of the mean over signs of the share of hits -> [r]

    hits, game, sign [n]. Only games with several signs among the n count (NaN: there is none), and in a resample only
    the games and signs that it has.
    """
    kinds = np.unique(np.stack([game, sign]), axis=1)  # [2, kinds]
    kinds = kinds[:, np.bincount(kinds[0])[kinds[0]] > 1]
    if not kinds.size:
        return np.full(len(times), math.nan)
    member = (game[:, None] == kinds[0]) & (sign[:, None] == kinds[1])  # [n, kinds]
    count = times @ member.astype(float)  # [r, kinds]
    recall = (times @ (member * hits[:, None])) / np.maximum(count, 1)
    of_game = kinds[0][:, None] == np.unique(kinds[0])  # [kinds, games]
    signs = (count > 0) @ of_game.astype(float)  # [r, games], how many a game has
    return ((recall @ of_game) / np.maximum(signs, 1)).sum(1) / np.maximum((signs > 0).sum(1), 1)


def entropy_rank(values: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of values [..., d], at least 0, normalised to sum 1: how many of them there effectively are"""
    p = values / values.sum(-1, keepdim=True)
    return (-torch.xlogy(p, p).sum(-1)).exp()


def rank_me(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """RankMe of features x [n, d] whose rows occur `times` [r, n] -> [r]

    The singular values of the repeated rows are the roots of the eigenvalues of x^T diag(times) x.
    """
    x, eigenvalues = x.double(), []
    for row in tqdm(times.double(), "RankMe", unit="resample", leave=False, disable=len(times) == 1):
        eigenvalues.append(torch.linalg.eigvalsh((x * row[:, None]).mT @ x))
    return entropy_rank(torch.stack(eigenvalues).clamp(min=0).sqrt())


def dormant_rate(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Dormant rate of features x [n, d] whose rows occur `times` [r, n] -> [r]"""
    return 1 - entropy_rank(times.double() @ x.double().abs()) / x.shape[1]


def estimate(statistic, n: int, resamples: int, seed: int, centre: bool = False) -> dict[str, float | None]:
    """Value and 95% bootstrap interval of a statistic, which maps how often each of n samples occurs [r, n] to [r].

    None stands for NaN. A resample repeats some samples and lacks others: a RankMe is lower by that, and a balanced
    accuracy higher where a game loses a rare sign. To `centre` is to take the spread of such a statistic, not its
    place: around the value, the resamples' deviations from their mean.
    """
    value = float(statistic(np.ones((1, n)))[0])
    resampled = statistic(np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples))
    low, high = np.percentile(resampled, [2.5, 97.5]) + centre * (value - resampled.mean())
    ends = {"value": value, "low": float(low), "high": float(high)}
    return {name: None if math.isnan(end) else end for name, end in ends.items()}


def measure(features: torch.Tensor, samples: Samples, args: Args) -> dict[str, dict[str, float | None]]:
    """Estimates of action and reward probe, RankMe and dormant rate."""
    actions, signs = probe(features, samples, args)
    game, action, sign = (x[samples.test].numpy() for x in (samples.game, samples.action, samples.sign))
    n, x = len(game), features[: args.rank_samples]

    def of_features(statistic):
        return lambda times: statistic(x, torch.as_tensor(times, device=x.device)).cpu().numpy()

    return {
        "action": estimate(lambda times: times @ (actions == action) / n, n, args.resamples, args.seed),
        "reward": estimate(partial(balanced_accuracy, signs == sign, game, sign), n, args.resamples, args.seed, True),
        "rank_me": estimate(of_features(rank_me), len(x), args.rank_resamples, args.seed, centre=True),
        "dormant": estimate(of_features(dormant_rate), len(x), args.resamples, args.seed),
    }


def baselines(samples: Samples) -> dict[str, float]:
    """What needs no features, on the test samples: each game's commonest action in training; a constant sign."""
    train, test = samples.train, samples.test
    actions = torch.zeros(int(samples.game.max()) + 1, 18).index_put(
        (samples.game[train], samples.action[train]), torch.ones(int(train.sum())), accumulate=True
    )  # [games, 18], how often each was taken
    majority = (actions.argmax(1)[samples.game[test]] == samples.action[test]).float().mean().item()
    game, sign = samples.game[test].numpy(), samples.sign[test].numpy()
    constant = balanced_accuracy(sign == 1, game, sign, np.ones((1, len(game))))[0]
    return {"action": majority} | ({} if math.isnan(constant) else {"reward": float(constant)})


# === report ===========================================================================================================
MEASURES = {"action": "action accuracy", "reward": "reward balanced accuracy", "rank_me": "RankMe"}
MEASURES |= {"dormant": "dormant rate"}


def as_markdown(results: dict, constant: dict) -> str:
    """A table with aligned columns."""
    lines = [["model", *MEASURES.values()]]
    for name, row in results.items():
        ends = [estimate.values() for estimate in row.values()]
        lines.append([name, *("-" if None in of else "{:.3f} [{:.3f}, {:.3f}]".format(*of) for of in ends)])
    lines.append(["no features", *(f"{constant[key]:.3f}" if key in constant else "-" for key in MEASURES)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(results: dict, constant: dict) -> Figure:
    """A panel for each measure, a bar for each model, a line its interval; dashed: what needs no features."""
    figure = Figure((10, 1.1 + 0.25 * len(results)), layout="constrained")
    for panel, (measure, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for y, row in enumerate(results.values()):
            value, low, high = row[measure].values()
            if value is not None:
                panel.barh(y, value, color="tab:gray" if y == 0 else "tab:blue")
                panel.plot([low, high], [y, y], color="black", linewidth=1.2)
            else:  # of rewards alone
                panel.text(0, y, "no game has two signs to test", va="center", fontsize=7)
        if measure in constant:
            panel.axvline(constant[measure], color="black", linestyle="--", linewidth=0.8)
        panel.set_yticks(range(len(results)), results if measure == "action" else [], parse_math=False)
        panel.set_ylim(len(results) - 0.5, -0.5)
        panel.set_title(title, fontsize=9, loc="left")
        panel.tick_params(labelsize=8, left=False)
        panel.spines[["top", "right", "left"]].set_visible(False)
    caption = "lines: 95% bootstrap intervals over samples; dashed: the game's commonest action, a constant guess"
    figure.supxlabel(caption, fontsize=8)
    return figure


def main(args: Args) -> None:
    at_least_1 = "rows_per_checkpoint play_rows samples epochs batch_size rank_samples resamples rank_resamples"
    check_numbers(args, "seed learning_rate weight_decay", at_least_1)
    check_writable(args.output_dir)
    if WORLD_SIZE > 1:
        raise SystemExit("eval_probe.py is one process: run it without torchrun.")
    games = tuple(dict.fromkeys(map(parse_game, args.games))) or ID_GAMES
    if unknown := [game for game in games if game not in TABLE_GAMES]:
        raise SystemExit(f"--games {' '.join(unknown)}: far-OOD games have no data of pre-training. Leave them out.")
    device = find_device(args.device)
    precision = autocast(device, args.precision)
    networks = [Network(args, path) for path in (None, *args.models)]
    objectives = [network.name for network in networks]
    for network, path in zip(networks[1:], args.models, strict=True):
        if objectives.count(network.name) > 1:  # several models of an objective go by their folders
            network.name = path.resolve().parent.name
    names = [network.name for network in networks]
    if len(set(names)) < len(names):
        raise SystemExit(f"--models {', '.join(names[1:])}: two of one name. Give each once, or rename a run's folder.")

    samples = Samples(args, games)
    constant, results = baselines(samples), {}
    for network in tqdm(networks, "models", leave=False):
        results[network.name] = measure(extract(network, samples, device, precision), samples, args)
    about = f"{len(samples.game):,} held-out samples of {len(games)} games, {int(samples.test.sum()):,} of them to test"
    table = as_markdown(results, constant)
    with atomic_write(args.output_dir / "probe.md") as file:
        file.write(f"# Probes of {args.features} features\n\n![Probes](probe.png)\n\n{about}\n\n{table}".encode())
    with atomic_write(args.output_dir / "probe.json") as file:
        content = {"results": results, "constant": constant, "samples": len(samples.game)}
        content["args"] = json.loads(json.dumps(asdict(args), default=str))
        file.write(json.dumps(content, indent=2, allow_nan=False).encode())
    with atomic_write(args.output_dir / "probe.png") as file:
        draw(results, constant).savefig(file, format="png", dpi=150)
    print(f"{about}\n\n{table}\nWritten to {args.output_dir}: probe.md, probe.json, probe.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
