# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "torchvision==0.29.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6",
#   "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0"]
# ///
"""MAE, a masked autoencoder (He et al., arXiv 2111.06377), here on Atari-PB's ResNet-50 (2406.06037).

Of a stack of frames as the ResNet-50 sees it, 6 x 6 cells, 90% are hidden; from the rest all pixels are reconstructed.
With f the ResNet-50, p a random choice of 3 cells, o a stack, o~ its augmentation (shifted, scaled):

    x = cells of f(o~), each through an MLP, plus its position                    36 tokens
    z = Encoder([cls, x_p])                                                       a transformer over the few seen
    y = Decoder(z at their places, a mask token at all others, plus positions)    a transformer over all
    loss = mean over all pixels of (y - o)^2

(The paper hides 75% of the patches from the whole encoder, and its loss is on those alone.)

    python pretrain_mae.py                                  # plays a small replay itself and trains on it
    python pretrain_mae.py --data-dir /data/dqn_replay      # the benchmark: 50 games, 10M frames, 100 epochs
    torchrun --nproc-per-node 8 pretrain_mae.py --data-dir /data/dqn_replay
"""

import atexit
import copy
import fcntl
import gzip
import json
import math
import mmap
import os
import resource
import signal
import threading
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Literal

import ale_py
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map


# === arguments ========================================================================================================
@dataclass
class Args:
    total_steps: int = 1_953_125  # optimizer steps; the default is 100 epochs over 10M samples
    batch_size: int = 512  # samples of a step, over all processes together
    learning_rate: float = 3e-4  # AdamW's, after the warm-up
    weight_decay: float = 0.05  # AdamW's, on all parameters alike
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's decay rates for the means of the gradient and of its square
    adam_eps: float = 1e-8  # AdamW's term against division by zero
    max_grad_norm: float = math.inf  # gradients are scaled down to this L2 norm; inf leaves them alone
    mask_ratio: float = 0.9  # the share of the 36 cells that is hidden
    width_multiplier: float = 1.0  # of the ResNet's channels, for ablations and small machines
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottleneck blocks of the four stages; 3 4 6 3 is the ResNet-50

    games: tuple[str, ...] = ()  # as ms_pacman or MsPacman; none given: the benchmark's 50 pre-training games
    data_dir: Path | None = None  # the DQN Replay Dataset; none given: games played here at random, as a smoke test
    runs: tuple[int, ...] = (1, 2)  # runs of the DQN agent to read, of each game
    checkpoints: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # replay checkpoints to read, of each run
    rows_per_checkpoint: int = 10_000  # rows to read from the start of each checkpoint, padding rows included
    play_rows: int = 1_000  # rows to play of each game where there is no --data-dir
    cache_dir: Path = Path("cache")  # for prepared and played data; all scripts and runs may share it
    num_workers: int = 2  # processes that read batches ahead; 0: the training process reads them itself

    seed: int = 0  # of the initialisation, the order of the samples and the augmentation
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # under torchrun every process takes its own GPU
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bfloat16 autocast on GPUs and CPUs that compute in it
    compile: bool = torch.cuda.is_available()  # torch.compile the objective
    run_name: str = ""  # the run's folder in runs/; none given: <script>__<seed>
    resume: bool = False  # continue the run from its checkpoint, or start it where there is none
    overwrite: bool = False  # delete an existing run of this name
    log_every: int = 20  # steps between entries in TensorBoard
    eval_every: int = 10_000  # steps between evaluations on held-out samples; there is always one at the end
    eval_samples: int = 5_120  # held-out samples to evaluate on, at most
    save_every: int = 2_000  # steps between checkpoints; there is always one at the end, and on Ctrl-C or SIGTERM


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


# === transformer [shared] =============================================================================================
def sin_cos(position: torch.Tensor, channels: int) -> torch.Tensor:
    """Fixed codes of integers [n], [sin, cos] at c/2 frequencies 1 / 10000^(i / (c/2)) -> [n, c]"""
    half = channels // 2
    angles = position[:, None] * 10000 ** -(torch.arange(half) / half)  # [n, c/2]
    return torch.cat([angles.sin(), angles.cos()], 1)


def xavier_linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias)
    nn.init.xavier_uniform_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Softmax attention in 4 heads, if causal to no later token: [b, n, 512], [b, m, 512] twice -> [b, n, 512]"""
    heads = [x.unflatten(2, (4, -1)).transpose(1, 2) for x in (query, key, value)]  # [b, 4, n or m, 128] each
    return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """A pre-norm transformer block: self-attention, then an MLP, each added to its input: [b, n, 512] -> the same"""

    def __init__(self, causal: bool = False):
        super().__init__()
        self.causal = causal
        self.attn_norm, self.mlp_norm = nn.LayerNorm(512), nn.LayerNorm(512)
        self.attn_qkv, self.attn_out = xavier_linear(512, 3 * 512, bias=False), xavier_linear(512, 512)
        self.mlp_in, self.mlp_out = xavier_linear(512, 2048), xavier_linear(2048, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn_out(attention(*self.attn_qkv(self.attn_norm(x)).chunk(3, 2), self.causal))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


# === masked autoencoder [shared] ======================================================================================
CELLS = torch.arange(36)  # of the 6 x 6, row by row
POSITION = torch.cat([sin_cos(CELLS % 6, 256), sin_cos(CELLS // 6, 256)], 1)  # [36, 512], codes of column and row


class Encoder(nn.Module):
    """The ResNet's 36 cells as tokens, and a transformer over those of them that are to be seen."""

    def __init__(self, channels: int, games: int):
        super().__init__()
        self.spatial_embed = nn.Parameter(torch.randn(games, channels * 6 * 6))
        self.mlp = nn.Sequential(nn.Linear(channels, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU())
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 512))
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(4))), nn.LayerNorm(512)
        self.register_buffer("position", POSITION.clone(), persistent=False)

    def tokens(self, maps: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        """maps [b, c, 6, 6], game_id [b] -> [b, 36, 512]"""
        embed = F.embedding(game_id, self.spatial_embed).view(maps.shape)  # [b, c, 6, 6]
        return self.mlp((maps * embed).flatten(2).mT) + self.position

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, n, 512] -> [b, 1 + n, 512], with a token of no cell, cls, in front"""
        return self.norm(self.blocks(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)))


class Decoder(nn.Module):
    """All cells' pixels from the tokens of a few, by transformer blocks and a linear layer for each game."""

    def __init__(self, games: int, blocks: list[nn.Module]):
        super().__init__()
        self.embed, self.mask_token = nn.Linear(512, 512), nn.Parameter(torch.zeros(1, 1, 512))
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(512)
        self.recon_weight = nn.Parameter(torch.randn(games, 512, 784) * (2 / math.sqrt(512 + 784)))
        self.recon_bias = nn.Parameter(torch.zeros(games, 784))
        self.register_buffer("position", F.pad(POSITION, (0, 0, 1, 0)), persistent=False)  # cls: 0

    def tokens(self, encoded: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """The decoder's tokens from those encoded, [b, 1 + n, 512], with `rank` [b, 36] as of `mask` -> [b, 37, 512]"""
        cls, seen = F.relu(self.embed(encoded)).tensor_split([1], 1)
        cells = torch.cat([seen, self.mask_token.expand(len(seen), 36 - seen.shape[1], -1)], 1)  # [b, 36, 512], by rank
        cells = cells.gather(1, rank[..., None].expand(-1, -1, 512))  # by place
        return torch.cat([cls, cells], 1) + self.position

    def forward(self, x: torch.Tensor, game_id: torch.Tensor, *memory: torch.Tensor) -> torch.Tensor:
        """x [b, 37, 512], game_id [b], what the blocks take besides -> pixels [b, 4, 84, 84]"""
        for block in self.blocks:
            x = block(x, *memory)
        cells = game_linear(self.norm(x)[:, 1:], game_id, self.recon_weight, self.recon_bias).float()  # [b, 36, 784]
        return cells.view(-1, 6, 6, 4, 14, 14).permute(0, 3, 1, 4, 2, 5).reshape(-1, 4, 84, 84)


def game_linear(x: torch.Tensor, game_id: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A linear layer for each game, y = x W_g + b_g: x [b, n, d], weight [games, d, a], bias [games, a] -> [b, n, a]

    A game's samples share pages, each of which goes through one matrix product. Here, where n is 36, a matrix for every
    sample would take 800 MB, and all games' matrices on every sample a third of the ResNet's operations.
    """
    b, games = len(x), len(weight)
    size = max(1, b // games)  # samples on a page
    same_game = game_id[:, None] == torch.arange(games, device=x.device)  # [b, games]
    place = (same_game.cumsum(0) * same_game).sum(1) - 1  # [b], a sample's place among those of its game
    pages = (same_game.sum(0) + size - 1) // size  # [games], how many each fills
    end = pages.cumsum(0)
    slot = size * (end - pages)[game_id] + place  # [b]
    total = min(b, b // size + games)  # the most pages that there can be: shapes are the same for every batch
    page_game = torch.searchsorted(end, torch.arange(total, device=x.device), right=True).clamp(max=games - 1)
    paged = x.new_zeros(total * size, *x.shape[1:]).index_copy(0, slot, x)
    matrices = F.embedding(page_game, weight.flatten(1)).view(total, *weight.shape[1:])  # [total, d, a]
    y = torch.bmm(paged.view(total, -1, x.shape[2]), matrices)  # [total, size * n, a]
    return y.view(total * size, x.shape[1], -1)[slot] + F.embedding(game_id, bias)[:, None]


def mask(tokens: torch.Tensor, keep: int, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves `keep` tokens a sample, those of the least noise; uniform noise [b, 36] is drawn where none is given.

    tokens [b, 36, 512] -> those kept [b, keep, 512], rank [b, 36]: a cell's place in the order by noise
    """
    if noise is None:
        noise = own_part(torch.rand(WORLD_SIZE * len(tokens), 36, device=tokens.device))
    order = noise.argsort(1)  # [b, 36]
    return tokens.gather(1, order[:, :keep, None].expand(-1, -1, 512)), order.argsort(1)


def pixel_mask(rank: torch.Tensor, keep: int) -> torch.Tensor:
    """Whether a pixel's cell was masked: rank [b, 36] -> bool [b, 1, 84, 84]"""
    return (rank >= keep).view(-1, 1, 6, 6).repeat_interleave(14, 2).repeat_interleave(14, 3)


def pixel_loss(pixels: torch.Tensor, target: torch.Tensor, masked: torch.Tensor):
    """Mean squared error over all pixels, and as a metric over those masked: [b, 4, 84, 84] twice, [b, 1, 84, 84]"""
    error = (pixels - target).square().mean(1, keepdim=True)  # [b, 1, 84, 84]
    return error.mean(), {"masked_error": (error.detach() * masked).sum() / masked.sum().clamp(min=1)}


def picture(*columns: torch.Tensor) -> torch.Tensor:
    """The last frames of stacks [b, 4, 84, 84] in [0, 1], a column each -> [1, b * 84, columns * 84]"""
    return torch.cat([stacks[:, -1].flatten(0, 1) for stacks in columns], 1).clamp(0, 1)[None]


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


# === learning-rate schedule [shared] ==================================================================================
def lr_multiplier(step: int, total_steps: int) -> float:
    """Of the learning rate: linearly from 0.1 to 1 in the first 10% of all steps, then a cosine down to 0.1."""
    warm_up = 0.1 * total_steps
    if step < warm_up:
        return 0.1 + 0.9 * step / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / (total_steps - warm_up)))


# === objective: MAE ===================================================================================================
class MAE(nn.Module):
    def __init__(self, args: Args):
        super().__init__()
        check_numbers(args, "mask_ratio", "")
        if args.mask_ratio >= 1:
            raise SystemExit("--mask-ratio must be below 1.")
        self.length = HISTORY + 1  # rows of a sample
        self.keep = max(1, int(36 * (1 - args.mask_ratio)))  # cells seen
        self.backbone = ResNet(args.width_multiplier, args.blocks)  # f
        self.neck = Encoder(self.backbone.channels, len(TABLE_GAMES))
        self.head = Decoder(len(TABLE_GAMES), [Block() for _ in range(3)])  # with the layer for each game

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of a batch of `Windows`."""
        stacks = stack_frames(batch["frames"], batch["starts"])  # o [b, 1, 4, 84, 84]
        return self.loss(augment(stacks).squeeze(1), stacks.squeeze(1) / 255, batch["game_id"])

    def reconstruct(self, obs, game_id, noise=None):
        """obs [b, 4, 84, 84] -> pixels [b, 4, 84, 84], which of them were masked [b, 1, 84, 84]"""
        seen, rank = mask(self.neck.tokens(self.backbone(obs), game_id), self.keep, noise)  # x_p [b, keep, 512]
        tokens = self.head.tokens(self.neck(seen), rank)  # z at their places, mask tokens at others [b, 37, 512]
        return self.head(tokens, game_id), pixel_mask(rank, self.keep)

    def loss(self, obs, target, game_id, noise=None):
        pixels, masked = self.reconstruct(obs, game_id, noise)
        return pixel_loss(pixels, target, masked)

    def pictures(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stacks = stack_frames(batch["frames"], batch["starts"]).squeeze(1) / 255  # [b, 4, 84, 84]
        pixels, masked = self.reconstruct(stacks, batch["game_id"])
        return {"input_masked_reconstruction": picture(stacks, stacks.masked_fill(masked, 0.5), pixels)}


Objective = MAE  # what the training loop below builds


# === checkpoints [shared] =============================================================================================
FREE_ARGS = """data_dir cache_dir num_workers device compile run_name resume overwrite log_every eval_every eval_samples
    save_every""".split()  # what may change when a run is resumed


def save_checkpoint(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, step: int, args: dict) -> None:
    """Plain types and tensors: the parts of the objective after `step` steps, and all that it takes to go on."""
    name = getattr(objective, "name", Path(__file__).stem.removeprefix("pretrain_"))
    content = {"format": "atari-pb/1", "objective": name, "step": step}
    content |= {name: part.state_dict() for name, part in objective.named_children()}  # backbone, neck, head, target
    content |= {"args": args, "games": args["games"], "optimizer": optimizer.state_dict()}
    content["rng"] = {"cpu": torch.get_rng_state()}  # all processes draw the same
    if torch.cuda.is_initialized():
        content["rng"]["cuda"] = torch.cuda.get_rng_state()
    with atomic_write(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, args: dict) -> int:
    """Restores what was saved; returns the steps done. Args must be as they were, apart from FREE_ARGS."""
    with clear_errors(path, "To start the run again: --overwrite"):
        content = load_torch(path)
        changed = {name: was for name, was in content["args"].items() if name not in FREE_ARGS and args[name] != was}
        if changed:
            raise SystemExit(f"{path} was trained with {changed}. Resume with the same, or choose another --run-name.")
        for name, part in objective.named_children():
            part.load_state_dict(content[name])
        optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["rng"]["cpu"])
        if "cuda" in content["rng"] and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(content["rng"]["cuda"])
        return content["step"]


# === run folders [shared] =============================================================================================
def hold(folder: Path) -> None:
    """Makes a folder and locks it for as long as this process lives; ends the program if another process has it."""
    with clear_errors(folder, "Choose another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT)  # never closed: that would give the lock back
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # as systems have it
        raise SystemExit(f"{folder} is in use by another process. Wait for its end, or choose other names.") from error
    except OSError:  # a file system without locks
        pass


def files_of(folder: Path) -> list[Path]:
    """The files of a run, without its lock and what is still being written."""
    return [path for path in folder.glob("[!.]*") if path.is_file()]


# === logging [shared] =================================================================================================
def open_writer(run_dir: Path, plain_args: dict, step: int) -> SummaryWriter:
    """TensorBoard's, for what comes after `step`; the arguments are written there and to args.json."""
    with atomic_write(run_dir / "args.json") as file:
        file.write(json.dumps(plain_args, indent=2).encode())
    threading.excepthook = lambda _: None  # an error of its thread, which writes, comes again with the next entry
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    rows = "".join(f"|{name}|{value}|\n" for name, value in plain_args.items())
    writer.add_text("hyperparameters", "|argument|value|\n|-|-|\n" + rows)
    return writer


# === training loop [shared] ===========================================================================================
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def on_device(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(array).to(device, non_blocking=True) for name, array in batch.items()}


def process_mean(values: torch.Tensor) -> torch.Tensor:
    if WORLD_SIZE > 1:
        dist.all_reduce(values)
    return values.cpu() / WORLD_SIZE


def evaluate(objective: nn.Module, data: Windows, samples: int, device: torch.device) -> tuple[dict, dict]:
    """Mean loss and metrics, and pictures, if any, of always the same held-out samples in the same augmentation."""
    results = []
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        few = {name: values[:8] for name, values in on_device(data[0], device).items()}
        pictures = objective.pictures(few) if hasattr(objective, "pictures") else {}
        for i in range(max(1, min(samples // data.batch_size, data.batches))):
            loss, metrics = objective(on_device(data[i], device))
            results.append(torch.stack([loss, *metrics.values()]))
    means = process_mean(torch.stack(results).mean(0)).tolist()
    return {f"eval/{name}": mean for name, mean in zip(["loss", *metrics], means, strict=True)}, pictures


def train(args: Args) -> None:
    # What is to be done, and where it goes.
    at_least_0 = "seed num_workers learning_rate weight_decay adam_eps max_grad_norm eval_samples"
    at_least_1 = "total_steps batch_size rows_per_checkpoint play_rows log_every eval_every save_every"
    check_numbers(args, at_least_0, at_least_1)
    if not all(0 <= beta < 1 for beta in args.betas):
        raise SystemExit("--betas must be at least 0 and below 1.")
    if args.batch_size % WORLD_SIZE:
        raise SystemExit(f"--batch-size {args.batch_size} cannot be shared among {WORLD_SIZE} processes.")
    if args.run_name != Path(args.run_name).name or args.run_name == "..":
        raise SystemExit(f"--run-name must be the plain name of a folder, not {args.run_name}.")
    if args.resume and args.overwrite:
        raise SystemExit("--resume goes on with a run, --overwrite deletes it: choose one of them.")
    args.games = tuple(dict.fromkeys(map(parse_game, args.games))) or ID_GAMES
    if unknown := [game for game in args.games if game not in TABLE_GAMES]:
        raise SystemExit(f"--games {' '.join(unknown)}: far-OOD games are only for fine-tuning. Leave them out.")
    run_dir = Path("runs") / (args.run_name or f"{Path(__file__).stem}__{args.seed}")
    checkpoint = run_dir / "checkpoint.pt"
    device = find_device(args.device)
    torch.manual_seed(args.seed)
    objective = Objective(args)  # which checks its arguments, before anything is made
    check_writable(run_dir)
    exists = f"{run_dir} exists. Go on with --resume, or choose --overwrite or another --run-name."
    is_new = not (args.resume or args.overwrite)
    if RANK == 0 and is_new and files_of(run_dir):
        raise SystemExit(exists)

    # Processes and data. The first process of a machine prepares the data, the others then find it in the cache.
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    if LOCAL_RANK > 0:
        dist.barrier()
    shards = prepare(args, args.games, args.rows_per_checkpoint)
    data = Windows(shards, objective.length, args.batch_size, args.seed, "train")
    held_out = Windows(shards, objective.length, args.batch_size, args.seed, "held_out")
    if RANK == 0:
        hold(run_dir)
        if is_new and files_of(run_dir):  # of a run that has begun meanwhile
            raise SystemExit(exists)
        old = files_of(run_dir) if args.overwrite else []  # to be deleted now that nothing is missing for the new run
        for path in [*old, *run_dir.glob(".*.tmp")]:  # and what was being written as a run was killed
            path.unlink()
    if LOCAL_RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()

    # How the objective is computed. The operations of a sample, forward and backward, are counted once.
    objective.to(device, memory_format=torch.channels_last)
    precision = autocast(device, args.precision)
    sample = {name: value[:1] for name, value in on_device(held_out[0], device).items()}
    with precision, FlopCounterMode(display=False) as counter:
        copy.deepcopy(objective)(sample)[0].backward()
    flops = counter.get_total_flops()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak_flops = next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), math.nan) * WORLD_SIZE
    model = torch.compile(objective) if args.compile else objective
    if WORLD_SIZE > 1:
        model = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    # Its optimizer, its state and its batches.
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    adam = dict(lr=args.learning_rate, betas=args.betas, eps=args.adam_eps, weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(parameters, **adam, fused=True)
    plain_args, start = json.loads(json.dumps(asdict(args) | {"samples": data.size}, default=str)), 0
    torch.manual_seed(args.seed)
    if args.resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, objective, optimizer, plain_args)
    steps = range(start, args.total_steps)
    stops, signals = (signal.SIGINT, signal.SIGTERM), []  # what asks to stop, and what has come of it
    for number in stops:
        signal.signal(number, lambda number, _: signals.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # in the loader's workers, for good: this process stops them
    options = dict(num_workers=args.num_workers, multiprocessing_context="fork" if args.num_workers else None)
    options |= dict(pin_memory=device.type == "cuda", generator=torch.Generator())  # not the augmentation's generator
    batches = iter(DataLoader(data, batch_size=None, sampler=steps, **options))
    if args.num_workers:  # whom this process, after an error, would else wait for without end
        atexit.register(batches._shutdown_workers)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)

    if RANK == 0:
        writer = open_writer(run_dir, plain_args, start)
        print(f"{run_dir}: {len(args.games)} games, {data.size:,} samples, {held_out.size:,} held out", flush=True)
    bar = tqdm(total=args.total_steps, initial=start, unit="step", disable=RANK > 0, dynamic_ncols=True)
    recent, clock = [], time.perf_counter()
    for step, batch in zip(steps, batches, strict=True):
        lr = args.learning_rate * lr_multiplier(step, args.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with precision:
            loss, metrics = model(on_device(batch, device))
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()  # here, so that the next forward pass has the gradients' memory
        charts = {"learning_rate": lr}
        if hasattr(objective, "update_target"):
            charts |= objective.update_target(step)
        recent.append(torch.stack([loss.detach(), grad_norm, *metrics.values()]))
        bar.update()

        done = step + 1
        last = done == args.total_steps
        alone_to_stop = len(signals) > 0 and WORLD_SIZE == 1
        pauses = (args.log_every, args.eval_every, args.save_every)
        if not (last or alone_to_stop) and all(done % every for every in pauses):
            continue  # without waiting for the device
        stop = process_mean(torch.tensor(float(len(signals)), device=device)) > 0  # all stop at the same step
        values = process_mean(torch.stack(recent))  # [steps since the last pause, scalars]
        for i in (~values[:, :2].isfinite().all(1)).nonzero().flatten().tolist():
            bar.close()
            where = f"step {done - len(recent) + i + 1}: loss {values[i, 0]:.4g}, gradient norm {values[i, 1]:.4g}"
            raise SystemExit(f"Stopped at {where}. The last checkpoint, if there is one, is good: {checkpoint}")
        rate = len(recent) * args.batch_size / (time.perf_counter() - clock)
        charts |= {"images_per_second": rate, "teraflops": rate * flops / 1e12, "mfu": rate * flops / peak_flops}
        scalars = {f"charts/{name}": value for name, value in charts.items() if not math.isnan(value)}
        names = ["losses/loss", "losses/grad_norm", *(f"losses/{name}" for name in metrics)]
        scalars |= dict(zip(names, values.mean(0).tolist(), strict=True))
        bar.set_postfix({"loss": f"{scalars['losses/loss']:.3f}", "images/s": f"{rate:.0f}"})
        pictures = {}
        if last or done % args.eval_every == 0:
            with precision:
                results, pictures = evaluate(objective, held_out, args.eval_samples, device)
            scalars |= results
        if RANK == 0:
            with clear_errors(run_dir, "Is the disk full?"):
                for name, value in scalars.items():
                    writer.add_scalar(name, value, done)
                for name, picture in pictures.items():
                    writer.add_image(f"eval/{name}", picture, done)
                writer.flush()  # before the checkpoint: what it goes on from is charted
            if last or stop or done % args.save_every == 0:
                save_checkpoint(checkpoint, objective, optimizer, done, plain_args)
        if stop and not last:
            bar.close()
            if WORLD_SIZE > 1:  # torchrun gives the others little time once one has ended
                dist.barrier()
            raise SystemExit(f"Stopped by a signal after step {done}. To go on: --resume")
        recent, clock = [], time.perf_counter()

    bar.close()
    if RANK == 0:
        with clear_errors(run_dir, "Is the disk full?"):
            writer.close()
        print(f"{checkpoint}: {args.total_steps} steps done", flush=True)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
