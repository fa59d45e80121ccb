# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""Behaviour cloning: fine-tunes a pre-trained ResNet-50 on one game, then plays 100 episodes for the score.

A new neck g and head h on the frozen backbone f learn to predict the action a that the recorded player chose on seeing
a stack of 4 frames, o. Stacks are augmented (random shift, random intensity). Data and schedule are those of the Atari
Pre-training Benchmark (arXiv 2406.06037).

    loss = -mean_i log softmax( h(g(f(o_i))) )[a_i]

    python finetune_bc.py --game pong --checkpoint runs/pretrain_atc__0/checkpoint.pt --data-dir /data/dqn_replay
    python finetune_bc.py --game pong                            # baseline "random": a frozen random backbone
    python finetune_bc.py --game pong --no-freeze-backbone       # baseline "e2e": everything is learned from scratch

Without --data-dir this is a smoke test on random play. The result is results/bc/<method>/<game>/seed<k>.json. If it is
there already, the script does nothing: to continue a sweep, run its commands again. `eval_iqm.py` makes the tables.
"""

import gzip
import json
import math
import os
import shutil
import sys
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
from gymnasium.vector import AutoresetMode
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

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


# === arguments ========================================================================================================
@dataclass
class Args:
    game: str  # such as ms_pacman or MsPacman: one of the benchmark's 65
    checkpoint: Path | None = None  # of a pretrain_*.py run, or the original authors' .pth; default: a random backbone
    freeze_backbone: bool = True  # train the neck and the head only
    method: str = ""  # name in the results; default: the objective, <objective>_e2e, random or e2e
    epochs: int = 100  # passes over the data
    batch_size: int = 512  # samples in a step; the last step of an epoch has the rest
    learning_rate: float = 1e-3  # of AdamW, after the warm-up
    weight_decay: float = 1e-4  # of AdamW, for all parameters
    max_grad_norm: float = 0.5  # gradients are clipped to this L2 norm; inf turns clipping off
    width_multiplier: float = 1.0  # scales the ResNet's channels, as in pre-training
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottleneck blocks of the four stages; as in pre-training

    data_dir: Path | None = None  # the DQN Replay Dataset; default: a smoke test on random play
    runs: tuple[int, ...] = ()  # runs of the agent to read; default: 1 to 5, of far-OOD games 1
    checkpoints: tuple[int, ...] = ()  # replay checkpoints to read, for each run; default: 50, of far-OOD games 2
    num_transitions: int = 50_000  # rows to read in all, an equal part from the start of each checkpoint; few: few-shot
    action_offset: int = 0  # added to recorded actions: 1 for the authors' basic_math and othello, which lack action 0
    play_rows: int = 1_000  # rows to play when there is no --data-dir
    cache_dir: Path = Path("cache")  # for prepared data; all scripts and runs can share it

    eval_episodes: int = 100  # episodes of the evaluation; the score is their mean
    max_episode_steps: int = 27_000  # agent steps after which an episode is cut off
    epsilon: float = 0.001  # probability of a random action in the evaluation
    video: bool = False  # write the first episode's first two minutes into the run's folder, as a GIF

    seed: int = 0  # of initialisation, sample order, augmentation and evaluation
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # trains and acts
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bfloat16 autocast where the hardware supports it
    compile: bool = torch.cuda.is_available()  # torch.compile the training step
    results: Path = Path("results")  # folder of the results
    overwrite: bool = False  # replace the result if there is one
    log_every: int = 20  # steps between entries in TensorBoard


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


# === policy ===========================================================================================================
class Policy(nn.Module):
    """Stacks [b, 4, 84, 84] in [0, 1] -> logits [b, 18]; a game with n actions uses the first n"""

    def __init__(self, backbone: ResNet):
        super().__init__()
        self.backbone = backbone  # f
        self.neck = Neck(backbone.channels, games=1)  # g
        self.head = GameLinear(1, 512, 18)  # h

    def forward(self, stacks: torch.Tensor) -> torch.Tensor:
        game_id = torch.zeros(len(stacks), dtype=torch.long, device=stacks.device)
        return self.head(self.neck(self.backbone(stacks), game_id), game_id)


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


# === checkpoint files [shared] ========================================================================================
def load_checkpoint(path: Path) -> dict:
    """Content of a checkpoint of a pretrain_*.py run or of the benchmark's authors, whose names become ours."""
    scalar, codes = np._core.multiarray.scalar, np.typecodes["AllInteger"] + np.typecodes["Float"]
    allowed = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *(type(np.dtype(code)) for code in codes)]
    try:
        with torch.serialization.safe_globals(allowed):  # the authors' DT files hold NumPy scalars
            content = torch.load(path.expanduser(), map_location="cpu", weights_only=True, mmap=True)
        for part in ["backbone", *(content.keys() & {"neck", "head"})]:
            state, content[part] = content[part], {}
            for name, value in state.items():
                name = name.removeprefix("_orig_mod.").removeprefix("module.").replace(".shortcut.", ".downsample.")
                if not name.startswith("stem."):  # the authors' files hold the first convolution twice
                    content[part][name] = value
        if "bn1.weight" in content["backbone"] and not Norm(4).state_dict():
            raise SystemExit(f"{path} has batch norms, this script has not: ablations/batch-norm.patch gives it some.")
        return content
    except Exception as error:
        raise SystemExit(f"{path} is no checkpoint of pretrain_*.py or the authors: {type(error).__name__}") from error


def describe(content: dict, parts: tuple[str, ...] = ("backbone",)) -> dict:
    """What results say of a checkpoint: a digest of the parts that are used, and how it was pre-trained"""
    digest, pretraining = 0, None
    for part in parts:
        for _, value in sorted(content[part].items()):
            digest = zlib.crc32(value.numpy().tobytes(), digest)
    if "args" in content:  # the authors' files have none
        pretraining = {"step": content["step"]} | content["args"]
        if content["step"] < content["args"]["total_steps"]:
            print(f"Unfinished pre-training: {content['step']} of {content['args']['total_steps']} steps", flush=True)
    return {"backbone": f"{digest:08x}", "pretraining": pretraining}


# === pre-trained backbone [shared] ====================================================================================
def make_backbone(args) -> tuple[ResNet, str, dict]:
    """The backbone, loaded or initialised, the method's name in the results, and what results say of the checkpoint"""
    backbone, method = ResNet(args.width_multiplier, args.blocks), "random" if args.freeze_backbone else "e2e"
    facts = {"backbone": None, "pretraining": None}
    if args.checkpoint:
        content = load_checkpoint(args.checkpoint)
        try:
            backbone.load_state_dict(content["backbone"])
        except RuntimeError as error:
            other = f"{args.checkpoint} has another network"
            raise SystemExit(f"{other}: set --width-multiplier and --blocks as in its run.") from error
        method = content.get("objective", args.checkpoint.absolute().parent.name) + "_e2e" * (not args.freeze_backbone)
        facts = describe(content)
    return backbone.requires_grad_(not args.freeze_backbone), args.method or method, facts


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


# === learning-rate schedule [shared] ==================================================================================
def lr_multiplier(step: int, total_steps: int) -> float:
    """Rises linearly from 0.1 to 1 over the first 10% of the steps, then falls to 0.1 along a cosine."""
    warm_up = 0.1 * total_steps
    if step < warm_up:
        return 0.1 + 0.9 * step / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / (total_steps - warm_up)))


# === evaluation [shared] ==============================================================================================
def play_episodes(game: str, policy, args) -> tuple[np.ndarray, list[Image.Image]]:
    """Raw scores of args.eval_episodes complete episodes, and the frames of the first one if args.video.

    Each has an environment of its own, with up to 30 no-ops at the start and without sticky actions. `policy` maps the
    stacks uint8 [n, 4, 84, 84], indices, last actions and last rewards [n] of running episodes to action values [n, a].
    """
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    options = dict(noop_max=30, use_fire_reset=False, reward_clipping=False, num_threads=1)
    episodes, most_frames = args.eval_episodes, 4 * args.max_episode_steps
    envs = [AtariVectorEnv(game, 1, max_num_frames_per_episode=most_frames, **options) for _ in range(episodes)]
    num_actions, rng = envs[0].single_action_space.n, np.random.default_rng(args.seed)
    seed = int(rng.integers(2**30))
    options = dict(desc="starting games", leave=False, **BAR)
    starts = thread_map(lambda i: envs[i].reset(seed=seed + i), range(episodes), **options)
    stacks = np.concatenate([stack for stack, _ in starts])  # [episodes, 4, 84, 84]
    scores, running, frames = np.zeros(episodes), np.full(episodes, True), []
    actions, rewards = np.zeros(episodes, int), np.zeros(episodes)
    bar = tqdm(desc=f"evaluating on {game}", total=episodes, unit="episode", leave=False, **BAR)
    while running.any():
        if args.video and running[0] and len(frames) < 1800:  # two minutes
            frames.append(Image.fromarray(stacks[0, -1].copy()))
        which = running.nonzero()[0]
        values = policy(stacks[which], which, actions[which], rewards[which])
        actions = rng.integers(num_actions, size=episodes)
        greedy = rng.random(episodes)[which] >= args.epsilon
        actions[which[greedy]] = values[greedy, :num_actions].argmax(1)
        for i in which:
            envs[i].send(actions[i : i + 1])  # does not wait: each environment plays in a thread of its own
        for i in which:
            (stacks[i],), (rewards[i],), (terminated,), (truncated,), _ = envs[i].recv()
            running[i] = not (terminated or truncated)
        scores[which] += rewards[which]
        bar.update(len(which) - running.sum())
    bar.close()
    return scores, frames


# === results [shared] =================================================================================================
def find_result(args, suite: str, method: str, game: str, facts: dict) -> tuple[Path, dict]:
    """The result's path, and its arguments and facts in plain types. Ends if there is a result made with others."""
    if WORLD_SIZE > 1:
        raise SystemExit(f"{Path(__file__).name} is a single process: start it without torchrun.")
    if "/" in method or method in (".", ".."):
        raise SystemExit(f"--method {method} is no name for a folder: choose one without a slash.")
    path = args.results.expanduser() / suite / method / game / f"seed{args.seed}.json"
    plain_args = json.loads(json.dumps(asdict(args) | facts | {"game": game, "method": method}, default=str))
    if path.exists() and not args.overwrite:
        old = json.loads(path.read_text())["args"]
        compared = old.keys() - {*MAY_CHANGE, "pretraining"}  # the backbone's digest stands for its pre-training
        changed = {name: old[name] for name in sorted(compared) if plain_args.get(name) != old[name]}
        if changed:
            raise SystemExit(f"{path} was made with {changed}. Choose another --method, or --overwrite.")
        print(f"{path} is there already. To make it again: --overwrite")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # fails now, not after the training, if it cannot be written
    return path, plain_args


def save_result(path: Path, game: str, scores: np.ndarray, args: dict) -> None:
    """Writes a result; it is a smoke test if any data was random play or the evaluation was not the benchmark's."""
    evaluation = [args["eval_episodes"], args["max_episode_steps"], args["epsilon"]]
    sources = [args["data"], args["pretraining"] and args["pretraining"]["data"]]
    result = {"suite": path.parts[-4], "method": path.parts[-3], "game": game, "seed": args["seed"]}
    result["split"] = "id" if game in ID_GAMES else "near_ood" if game in NEAR_OOD_GAMES else "far_ood"
    result |= {"score": scores.mean(), "smoke_test": "random_play" in sources or evaluation != [100, 27_000, 0.001]}
    result |= {name: args[name] for name in ("checkpoint", "backbone", "pretraining", "data")}
    result |= {"episode_scores": scores.tolist(), "args": args}
    result["versions"] = {module.__name__: module.__version__ for module in (torch, np, ale_py)}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2))
    print(f"{path}: {scores.mean():.2f} points", flush=True)


# === fine-tuning ======================================================================================================
MAY_CHANGE = "checkpoint cache_dir play_rows device compile results overwrite log_every video".split()  # after a result


def finetune(args: Args) -> None:
    for name in ("epochs", "batch_size", "play_rows", "eval_episodes", "max_episode_steps", "log_every"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1.")
    game = parse_game(args.game, [*DQN_REPLAY_GAMES, *FAR_OOD_GAMES])
    device, precision = set_up_device(args.device, args.precision, args.compile)
    recorded = game in FAR_OOD_GAMES  # by record_replay.py; the second million of steps is checkpoint 2
    args.runs = tuple(dict.fromkeys(args.runs)) or ((1,) if recorded else (1, 2, 3, 4, 5))
    args.checkpoints = tuple(dict.fromkeys(args.checkpoints)) or ((2,) if recorded else (50,))
    args.data_dir = args.data_dir and args.data_dir.expanduser().resolve()
    torch.manual_seed(args.seed)
    backbone, method, facts = make_backbone(args)
    shards, source = prepare(args, [game], args.num_transitions // (len(args.runs) * len(args.checkpoints)))
    result, plain_args = find_result(args, "bc", method, game, facts | {"data": source})
    if result.exists() and not args.overwrite:
        return

    # The data, which the device holds as a whole, the policy and its optimizer
    replay = [np.fromfile(path, ROW) for _, path in shards]
    samples = [np.arange(len(shard)) >= HISTORY for shard in replay]  # rows whose stack is in their shard
    samples = torch.from_numpy(np.concatenate(samples).nonzero()[0]).to(device)
    if len(samples) == 0:
        raise SystemExit("No samples: raise --num-transitions. The first rows of each checkpoint are only history.")
    frames = torch.from_numpy(np.concatenate([shard["frame"] for shard in replay])).to(device)  # [rows, 84, 84]
    is_first = torch.from_numpy(np.concatenate([shard["is_first"] for shard in replay])).to(device)  # [rows]
    actions = torch.from_numpy(np.concatenate([shard["action"] for shard in replay])).long().to(device)  # [rows]
    actions += args.action_offset
    num_actions, most = AtariVectorEnv(game, 1).single_action_space.n, actions[samples].max()
    if most >= num_actions:
        raise SystemExit(f"{game} has actions 0 to {num_actions - 1}, but action {most} was recorded: another game's?")
    policy = Policy(backbone).to(device, memory_format=torch.channels_last)
    policy.backbone.train(not args.freeze_backbone)
    model = torch.compile(policy) if args.compile else policy
    learned = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, args.learning_rate, weight_decay=args.weight_decay, fused=True)
    run_dir = Path("runs", f"{Path(__file__).stem}__{method}__{game}__{args.seed}")
    run_dir.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)  # with --overwrite: so that a run that is cut off leaves no old one
    writer = SummaryWriter(run_dir, purge_step=0)  # hides what an unfinished run has logged
    with whole_file(run_dir / "args.json") as temporary:
        temporary.write_text(json.dumps(plain_args, indent=2))
    print(f"{game}: {method}, seed {args.seed}, on {len(samples):,} transitions; run: {run_dir}", flush=True)

    batches, clock = math.ceil(len(samples) / args.batch_size), time.perf_counter()  # batches in an epoch
    bar = tqdm(range(args.epochs * batches), "fine-tuning", unit="step", leave=False, **BAR)
    bar.set_postfix_str("compiling, about a minute" if args.compile else "")
    for step in bar:
        if step % batches == 0:
            epoch = samples[torch.randperm(len(samples), device=device)].split(args.batch_size)  # batches
        row = epoch[step % batches]  # [b]
        window = row[:, None] + torch.arange(-HISTORY, 1, device=device)  # [b, 4]
        stacks = augment(stack_frames(frames[window], is_first[window])).squeeze(1)  # o [b, 4, 84, 84]
        action = actions[row]  # a [b]
        optimizer.param_groups[0]["lr"] = args.learning_rate * lr_multiplier(step, len(bar))
        with precision:
            logits = model(stacks)  # [b, 18]
        loss = F.cross_entropy(logits.float(), action)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(learned, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.log_every == 0 or step + 1 == len(bar):
            if not torch.isfinite(loss + grad_norm):
                raise SystemExit(f"Loss {loss} or gradient norm {grad_norm} is not finite at step {step + 1}.")
            rate = (step + 1) * args.batch_size / (time.perf_counter() - clock)  # samples per second
            scalars = {"losses/loss": loss, "losses/grad_norm": grad_norm, "charts/SPS": rate}
            scalars["losses/accuracy"] = (logits.argmax(1) == action).float().mean()
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            for name, value in scalars.items():
                writer.add_scalar(name, value, step + 1)
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} samples/s", refresh=False)

    @torch.no_grad()
    def act(stacks: np.ndarray, *_) -> np.ndarray:
        with precision:
            return policy(torch.from_numpy(stacks).to(device) / 255).float().cpu().numpy()

    policy.eval()
    parts = ("neck", "head") if args.freeze_backbone else ("backbone", "neck", "head")
    with whole_file(run_dir / "policy.pt") as temporary:
        torch.save({part: getattr(policy, part).state_dict() for part in parts}, temporary)
    scores, film = play_episodes(game, act, args)
    writer.add_scalar("eval/score", scores.mean(), len(bar))
    writer.close()
    save_result(result, game, scores, plain_args)
    if args.video:  # at the game's speed
        film[0].save(run_dir / "episode.gif", save_all=True, append_images=film[1:], duration=1000 / 15, loop=0)


if __name__ == "__main__":
    finetune(tyro.cli(Args, description=__doc__))
