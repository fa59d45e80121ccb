# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "torchvision==0.29.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6",
#   "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0"]
# ///
"""Fine-tuning by behaviour cloning on one game of Atari-PB (arXiv 2406.06037), then 100 episodes of play for the score.

On a frozen pre-trained ResNet-50 f, a fresh neck g and head h learn the actions a that the replay's player took:

    loss = -mean_i log softmax( h(g(f(o_i))) )[a_i]        o, the augmented (shifted, scaled) stacks of 4 frames

    python finetune_bc.py --game pong --checkpoint runs/pretrain_atc__0/checkpoint.pt --data-dir /data/dqn_replay
    python finetune_bc.py --game pong                            # baseline "random": a frozen random backbone
    python finetune_bc.py --game pong --no-freeze-backbone       # baseline "e2e": everything learned from scratch

Without --data-dir the game is played here at random, as a smoke test. The score goes to
results/bc/<method>/<game>/seed<k>.json; where that is there already, nothing is done, so that a sweep that was cut off
can be started again as it is. `eval_iqm.py` makes the table of all results.
"""

import atexit
import fcntl
import gzip
import json
import math
import mmap
import os
import platform
import resource
import signal
import threading
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
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map


# === arguments ========================================================================================================
@dataclass
class Args:
    game: str  # to fine-tune on, as ms_pacman or MsPacman: one of the benchmark's 65
    checkpoint: Path | None = None  # of a pretrain_*.py run, or the original authors' .pth; none: a random backbone
    freeze_backbone: bool = True  # train neck and head only
    method: str = ""  # name in the results; none given: [objective], [objective]_e2e, random or e2e
    epochs: int = 100  # passes over the data
    batch_size: int = 512  # samples of a step; an epoch's last batch has those that are left
    learning_rate: float = 1e-3  # AdamW's, after the warm-up
    weight_decay: float = 1e-4  # AdamW's, on all parameters alike
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's decay rates for the means of the gradient and of its square
    adam_eps: float = 1e-8  # AdamW's term against division by zero
    max_grad_norm: float = 0.5  # gradients are scaled down to this L2 norm; inf leaves them alone
    width_multiplier: float = 1.0  # of the ResNet's channels; as in pre-training
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottleneck blocks of the four stages; as in pre-training

    data_dir: Path | None = None  # the DQN Replay Dataset; none given: the game played here at random, as a smoke test
    runs: tuple[int, ...] = (1, 2, 3, 4, 5)  # runs of the DQN agent to read
    checkpoints: tuple[int, ...] = (50,)  # replay checkpoints to read, of each run
    num_transitions: int = 50_000  # rows to read, the same number from each checkpoint's start; fewer: few-shot
    play_rows: int = 1_000  # rows to play where there is no --data-dir
    cache_dir: Path = Path("cache")  # for prepared and played data; all scripts and runs may share it
    num_workers: int = 2  # processes that read batches ahead; 0: the training process reads them itself

    eval_episodes: int = 100  # episodes that make the score
    max_episode_steps: int = 27_000  # agent steps after which an episode is cut off
    epsilon: float = 0.001  # probability of a random action in evaluation
    video: bool = False  # write the first episode as a GIF into the run's folder

    seed: int = 0  # of the initialisation, the order of the samples, the augmentation and the evaluation
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train and to act
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bfloat16 autocast on GPUs and CPUs that compute in it
    compile: bool = torch.cuda.is_available()  # torch.compile the training step
    results: Path = Path("results")  # folder of the results
    overwrite: bool = False  # replace the result, if there is one
    log_every: int = 20  # steps between entries in TensorBoard


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


# === scores [shared] ==================================================================================================
# A random agent's score and the reference's: DQN's after 50M frames, for the far-OOD games Rainbow's after 2M steps.
SCORES = {
    "air_raid": (579.25, 7479.5), "alien": (227.8, 2484.49), "amidar": (5.8, 1207.74), "assault": (222.4, 1525.24),
    "asterix": (210.0, 2711.41), "asteroids": (719.1, 698.37), "atlantis": (12850.0, 853640.0),
    "bank_heist": (14.2, 601.79), "basic_math": (0.0033, 3.57), "battle_zone": (2360.0, 17784.84),
    "beam_rider": (363.9, 5852.42), "berzerk": (123.7, 487.48), "bowling": (23.1, 30.12), "boxing": (0.1, 77.99),
    "breakout": (1.7, 96.23), "carnival": (700.8, 4784.84), "centipede": (2090.9, 2583.03),
    "chopper_command": (811.0, 2690.61), "crazy_climber": (10780.5, 104568.76), "demon_attack": (152.1, 6361.58),
    "double_dunk": (-18.6, -6.54), "elevator_action": (4387.0, 439.77), "enduro": (0.0, 628.91),
    "fishing_derby": (-91.7, 0.58), "freeway": (0.0, 26.27), "frostbite": (65.2, 367.07), "gopher": (257.6, 5479.9),
    "gravitar": (173.0, 330.07), "hero": (1027.0, 17325.44), "human_cannonball": (1.0767, 5.56),
    "ice_hockey": (-11.2, -5.84), "jamesbond": (29.0, 573.31), "journey_escape": (-19977.0, -3671.09),
    "kangaroo": (52.0, 11485.98), "klax": (0.3734, 2124.75), "krull": (1598.0, 6097.63),
    "kung_fu_master": (258.5, 23435.38), "montezuma_revenge": (0.0, 0.0), "ms_pacman": (307.3, 3402.4),
    "name_this_game": (2292.3, 7278.65), "othello": (-21.3233, -2.01), "phoenix": (761.4, 4996.58),
    "pitfall": (-229.4, -73.81), "pong": (-20.7, 16.61), "pooyan": (371.2, 3211.96), "private_eye": (24.9, -16.04),
    "qbert": (163.9, 10117.5), "riverraid": (1338.5, 11638.93), "road_runner": (11.5, 36925.47),
    "robotank": (2.2, 59.77), "seaquest": (68.4, 1600.66), "skiing": (-17098.1, -15824.61),
    "solaris": (1236.3, 1436.4), "space_invaders": (148.0, 1794.24), "star_gunner": (664.0, 42165.22),
    "surround": (-9.9833, -7.81), "tennis": (-23.8, -1.5), "time_pilot": (3568.0, 3654.37),
    "tutankham": (11.4, 103.84), "up_n_down": (533.4, 8488.31), "venture": (0.0, 39.13),
    "video_pinball": (16256.9, 63406.11), "wizard_of_wor": (563.5, 2065.8), "yars_revenge": (3092.9, 23909.38),
    "zaxxon": (32.5, 4538.57),
}  # fmt: skip


def normalize(game: str, score: float) -> float:
    """DQN-normalised score, (score - low) / (high - low), low and high the lesser and the greater of `SCORES[game]`.

    Montezuma's Revenge, where both are 0, is kept from a division by 0 as in the original code: 0 stays 0.
    """
    low, high = sorted(SCORES[game])
    return (score - low) / (high - low + 1e-6)


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


# === learning-rate schedule [shared] ==================================================================================
def lr_multiplier(step: int, total_steps: int) -> float:
    """Of the learning rate: linearly from 0.1 to 1 in the first 10% of all steps, then a cosine down to 0.1."""
    warm_up = 0.1 * total_steps
    if step < warm_up:
        return 0.1 + 0.9 * step / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / (total_steps - warm_up)))


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


# === pre-trained backbone [shared] ====================================================================================
def make_backbone(args) -> tuple[ResNet, str]:
    """The backbone that the arguments ask for, initialised or loaded, and the method's name in the results."""
    backbone = ResNet(args.width_multiplier, args.blocks)
    if args.checkpoint:
        method = load_backbone(backbone, args.checkpoint) + ("" if args.freeze_backbone else "_e2e")
    else:
        method = "random" if args.freeze_backbone else "e2e"
    return backbone.requires_grad_(not args.freeze_backbone), args.method or method  # frozen, autograd leaves it out


# === evaluation [shared] ==============================================================================================
def play_episodes(game: str, act, episodes: int, max_steps: int, epsilon: float, seed: int, record: bool = False):
    """Raw scores [episodes] of complete episodes; to record, the first one's frames too, a list of uint8 [84, 84].

    One environment for each episode, so that each counts once however long it is: no sticky actions, up to 30 no-ops
    at the start, all lives. `act` maps the stacks of the n that still run, uint8 [n, 4, 84, 84], which these are [n],
    and the actions and rewards of their last steps [n], to actions [n]; with probability epsilon an action is drawn
    from all of the game's instead.
    """
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    options = dict(noop_max=30, use_fire_reset=False, reward_clipping=False, max_num_frames_per_episode=4 * max_steps)
    env = AtariVectorEnv(game, episodes, **options)
    rng = np.random.default_rng(seed)
    stacks, _ = env.reset(seed=int(rng.integers(2**30)))  # [episodes, 4, 84, 84]
    scores, running, frames, step = np.zeros(episodes), np.full(episodes, True), [], 0
    actions, rewards = np.zeros(episodes, int), np.zeros(episodes)
    with tqdm(desc=f"evaluating on {game}", total=episodes, unit="episode", leave=False) as bar:
        while running.any():
            bar.set_postfix_str(f"step {(step := step + 1)}", refresh=False)
            if running[0] and record:
                frames.append(stacks[0, -1].copy())
            which = running.nonzero()[0]
            greedy = act(stacks[running], which, actions[running], rewards[running])
            actions = rng.integers(env.single_action_space.n, size=episodes)
            actions[which] = np.where(rng.random(episodes)[running] < epsilon, actions[running], greedy)
            stacks, rewards, terminated, truncated, _ = env.step(actions)
            scores[running] += rewards[running]
            running &= ~(terminated | truncated)
            bar.update(episodes - running.sum() - bar.n)
    env.close()
    return scores, frames


def save_gif(path: Path, frames: list[np.ndarray]) -> None:
    """At the game's speed, 15 frames a second, three times as large."""
    images = [Image.fromarray(frame).resize((252, 252), Image.Resampling.NEAREST) for frame in frames]
    with atomic_write(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=1000 / 15, loop=0)


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


# === runs and results [shared] ========================================================================================
def find_run(args, suite: str, method: str, game: str) -> tuple[Path | None, Path, dict]:
    """Paths of the result, None if it is there already, and of the run's folder, and the arguments in plain types.

    Ends the program with an error if result or run had other arguments, those in FREE_ARGS aside.
    """
    if WORLD_SIZE > 1:
        raise SystemExit(f"{Path(__file__).name} is one process: run it without torchrun, many of them for many games.")
    if method != Path(method).name or method == "..":
        raise SystemExit(f"--method must be the plain name of a folder, not {method}.")
    result = args.results / suite / method / game / f"seed{args.seed}.json"
    run_dir = Path("runs") / f"{Path(__file__).stem}__{method}__{game}__{args.seed}"
    plain_args = json.loads(json.dumps(asdict(args), default=str))
    for path in [path for path in (result, run_dir / "args.json") if path.exists() and not args.overwrite]:
        with clear_errors(path, "To make it again: --overwrite"):
            then = json.loads(path.read_text())
            then = then.get("args", then)
        changed = {name: was for name, was in then.items() if name not in FREE_ARGS and plain_args.get(name) != was}
        if changed:
            raise SystemExit(f"{path} was made with {changed}. Choose another --method, or --overwrite.")
    check_writable(result.parent)
    check_writable(run_dir)
    if result.exists() and not args.overwrite:
        print(f"{result} is there already. To make it again: --overwrite")
        result = None
    return result, run_dir, plain_args


def save_result(path: Path, game: str, scores: np.ndarray, args: dict) -> None:
    """Writes the result of a fine-tuning, at its end, to <results>/<suite>/<method>/<game>/seed<k>.json."""
    result = {"suite": path.parts[-4], "method": path.parts[-3], "game": game}
    result["split"] = "id" if game in ID_GAMES else "near_ood" if game in NEAR_OOD_GAMES else "far_ood"
    result |= {"seed": args["seed"], "score": scores.mean(), "episode_scores": scores.tolist()}
    result |= {"normalized_score": normalize(game, scores.mean()), "checkpoint": args["checkpoint"], "args": args}
    modules = {"torch": torch, "numpy": np, "ale_py": ale_py}
    result["versions"] = {"python": platform.python_version()} | {name: m.__version__ for name, m in modules.items()}
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=2).encode())


# === fine-tuning ======================================================================================================
FREE_ARGS = "data_dir cache_dir num_workers device compile results overwrite log_every video".split()  # may change


class Policy(nn.Module):
    """Stacks [b, 4, 84, 84] in [0, 1] -> logits [b, 18], of which a game uses the first"""

    def __init__(self, backbone: ResNet):
        super().__init__()
        self.backbone = backbone  # f
        self.neck = Neck(backbone.channels, games=1)  # g
        self.head = GameLinear(1, 512, 18)  # h

    def forward(self, stacks: torch.Tensor) -> torch.Tensor:
        game_id = torch.zeros(len(stacks), dtype=torch.long, device=stacks.device)
        return self.head(self.neck(self.backbone(stacks), game_id), game_id)


def finetune(args: Args) -> None:
    at_least_0 = "seed num_workers learning_rate weight_decay adam_eps max_grad_norm epsilon"
    at_least_1 = "epochs batch_size num_transitions play_rows eval_episodes max_episode_steps log_every"
    check_numbers(args, at_least_0, at_least_1)
    if not all(0 <= beta < 1 for beta in args.betas) or args.epsilon > 1:
        raise SystemExit("--betas must be at least 0 and below 1, --epsilon at most 1.")
    game, device = parse_game(args.game), find_device(args.device)
    if args.data_dir:
        args.play_rows = 0  # by which results of a smoke test are told from these
    torch.manual_seed(args.seed)
    backbone, method = make_backbone(args)
    result, run_dir, plain_args = find_run(args, "bc", method, game)
    if result is None:
        return

    # The game's data, the policy and its optimizer.
    shards = prepare(args, (game,), args.num_transitions // max(len(args.runs) * len(args.checkpoints), 1))
    env = AtariVectorEnv(game, 1)
    num_actions = int(env.single_action_space.n)
    env.close()
    for _, path in shards:
        if (most := open_shard(path)["fields"]["action"].max()) >= num_actions:
            raise SystemExit(f"{path} has action {most}, but {game} only {num_actions} actions: another game's data?")
    data = Windows(shards, HISTORY + 1, args.batch_size, args.seed, "all")
    policy = Policy(backbone).to(device, memory_format=torch.channels_last)
    model = torch.compile(policy) if args.compile else policy
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    adam = dict(lr=args.learning_rate, betas=args.betas, eps=args.adam_eps, weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(parameters, **adam, fused=True)
    precision = autocast(device, args.precision)

    # An unfinished run of the same arguments starts afresh; if it is cut off, what there was before does not count.
    hold(run_dir)
    if find_run(args, "bc", method, game)[0] is None:  # by now, of another process
        return
    for path in [*files_of(run_dir), *run_dir.glob(".*.tmp"), result]:
        path.unlink(missing_ok=True)
    writer = open_writer(run_dir, plain_args, 0)
    print(f"{game}: {method}, seed {args.seed}, on {data.size:,} transitions; run: {run_dir}", flush=True)

    steps = range(args.epochs * data.batches)
    options = dict(num_workers=args.num_workers, multiprocessing_context="fork" if args.num_workers else None)
    options |= dict(pin_memory=device.type == "cuda", generator=torch.Generator())  # not the augmentation's generator
    stops = signal.SIGINT, signal.SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # in the loader's workers, for good: this process stops them
    batches = iter(DataLoader(data, batch_size=None, sampler=steps, **options))
    if args.num_workers:  # whom this process, after an error, would else wait for without end
        atexit.register(batches._shutdown_workers)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    bar = tqdm(zip(steps, batches, strict=True), "fine-tuning", len(steps), unit="step", leave=False)
    recent, clock, images = [], time.perf_counter(), 0
    for step, batch in bar:
        batch = {name: torch.as_tensor(array).to(device, non_blocking=True) for name, array in batch.items()}
        lr = args.learning_rate * lr_multiplier(step, len(steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with precision:
            logits = model(augment(stack_frames(batch["frames"], batch["starts"])).squeeze(1))  # [b, 18]
        action = batch["action"][:, -1].long()  # [b]
        loss = F.cross_entropy(logits.float(), action)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()  # here, so that the next forward pass has the gradients' memory
        accuracy = (logits.argmax(1) == action).float().mean()
        recent.append(torch.stack([loss.detach(), grad_norm, accuracy]))
        images += len(action)
        if (step + 1) % args.log_every and step + 1 < len(steps):
            continue  # without waiting for the device
        values = torch.stack(recent).mean(0).tolist()
        if not all(math.isfinite(value) for value in values):
            bar.close()
            raise SystemExit(f"Loss or gradient norm is not finite before step {step + 1}: lower --learning-rate?")
        scalars = dict(zip(("losses/loss", "losses/grad_norm", "losses/accuracy"), values, strict=True))
        scalars |= {"charts/learning_rate": lr, "charts/images_per_second": images / (time.perf_counter() - clock)}
        with clear_errors(run_dir, "Is the disk full?"):
            for name, value in scalars.items():
                writer.add_scalar(name, value, step + 1)
        bar.set_postfix({"loss": f"{values[0]:.3f}", "images/s": f"{scalars['charts/images_per_second']:.0f}"})
        recent, clock, images = [], time.perf_counter(), 0

    @torch.no_grad()
    def act(stacks: np.ndarray, *_) -> np.ndarray:
        with precision:
            logits = policy(torch.from_numpy(stacks).to(device) / 255)
        return logits[:, :num_actions].argmax(1).cpu().numpy()

    parts = ("neck", "head") if args.freeze_backbone else ("backbone", "neck", "head")
    with atomic_write(run_dir / "policy.pt") as file:
        torch.save({part: getattr(policy, part).state_dict() for part in parts}, file)
    evaluation = (args.eval_episodes, args.max_episode_steps, args.epsilon, args.seed, args.video)
    scores, frames = play_episodes(game, act, *evaluation)
    if args.video:
        save_gif(run_dir / "episode.gif", frames)
    with clear_errors(run_dir, "Is the disk full?"):
        writer.add_scalar("eval/score", scores.mean(), len(steps))
        writer.close()
    save_result(result, game, scores, plain_args)  # last: a run that has its result is done
    print(f"{result}: {scores.mean():.2f} points, normalised {normalize(game, scores.mean()):.3f}", flush=True)


if __name__ == "__main__":
    finetune(tyro.cli(Args, description=__doc__))
