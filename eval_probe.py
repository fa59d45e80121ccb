# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6", "tyro==1.0.17", "tqdm==4.70.1",
#   "matplotlib==3.11.2"]
# ///
"""Probes: what a pre-trained backbone's features tell about the games, without fine-tuning.

x_i are the d features of stack i of game g, a_i is the action taken on it, r_i the reward that followed. The samples
are from the last 1% of each shard, on which no pre-training with the same data is trained. The measures are

    action probe   accuracy of W_g x_i + b_g, trained to minimise -mean_i log softmax(W_g x_i + b_g)[a_i]
    reward probe   the same for sign(r_i); all signs of a game weigh the same, in training and in the accuracy
    RankMe         exp(-sum_k p_k log p_k), p_k = sigma_k / sum sigma, singular values of [x_1, ...] (arXiv 2210.02885)
    dormant rate   1 - exp(-sum_j m_j log m_j) / d, m_j = mean |x_j| / sum over units of mean |x|

x is the ResNet-50's map averaged over its cells, standardised for the probes. The Atari Pre-training Benchmark (arXiv
2406.06037) monitored the neck's features: --features neck.

    python eval_probe.py --models runs/pretrain_*/checkpoint.pt --data-dir /data/dqn_replay

Give it the games and data of the pre-training. Prints a table; writes reports/probe.md, probe.json and probe.png.
"""

import gzip
import json
import math
import os
import shutil
import sys
import tempfile
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
from matplotlib.figure import Figure
from torch import nn
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
    models: tuple[Path, ...] = ()  # checkpoints of pretrain_*.py runs, or the original authors' .pth
    features: Literal["backbone", "neck"] = "backbone"  # neck: only of checkpoints with the spatial-MLP neck
    width_multiplier: float = 1.0  # scales the ResNet's channels; as in pre-training
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottleneck blocks of the four stages; as in pre-training

    games: tuple[str, ...] = ()  # such as ms_pacman or MsPacman; default: the benchmark's 50 pre-training games
    data_dir: Path | None = None  # the DQN Replay Dataset; default: a smoke test on random play
    runs: tuple[int, ...] = (1, 2)  # runs of the DQN agent to read, for each game
    checkpoints: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # replay checkpoints to read, for each run
    rows_per_checkpoint: int = 10_000  # rows to read from the start of each checkpoint, padding included
    play_rows: int = 1_000  # rows to play in each game when there is no --data-dir
    cache_dir: Path = Path("cache")  # for prepared data; all scripts and runs can share it

    held_out: float = 0.01  # share of a shard, its end, to take samples from; more: of rows no pre-training has read
    samples: int = 20_000  # held-out samples to take, at most, the same number of each shard
    epochs: int = 100  # passes of the probes over their training samples
    batch_size: int = 512  # samples in a step of the probes
    learning_rate: float = 1e-4  # of the probes' AdamW
    weight_decay: float = 1e-5  # of the probes' AdamW
    rank_samples: int = 5_000  # samples for RankMe and the dormant rate, at most
    resamples: int = 1_000  # resamples of the bootstrap
    rank_resamples: int = 100  # resamples of RankMe's bootstrap, which takes longest

    seed: int = 0  # of the random backbone, the order of the probes' training and the bootstrap
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # computes features and probes
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bfloat16 autocast where the hardware supports it
    output_dir: Path = Path("reports")  # folder of probe.md, probe.json and probe.png


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


# === features =========================================================================================================
class Features(nn.Module):
    """x of stacks [b, 4, 84, 84] in [0, 1], by a model's backbone [b, 2048] or also its neck [b, 512]"""

    def __init__(self, args: Args, path: Path | None):
        super().__init__()
        torch.manual_seed(args.seed)
        self.backbone = ResNet(args.width_multiplier, args.blocks)
        self.neck = Neck(self.backbone.channels, len(DQN_REPLAY_GAMES)) if args.features == "neck" else None
        if path:
            content = load_checkpoint(path)
            neck = {name.replace("embed.weight", "embed"): x for name, x in content.get("neck", {}).items()}  # authors'
            try:
                self.backbone.load_state_dict(content["backbone"])
            except RuntimeError as error:
                raise SystemExit(f"{path} has another network: set its --width-multiplier and --blocks.") from error
            try:
                if self.neck:
                    self.neck.load_state_dict(neck)
            except RuntimeError as error:
                raise SystemExit(f"{path} has no spatial-MLP neck: use --features backbone.") from error

    def forward(self, stacks: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        maps = self.backbone(stacks)  # [b, 2048, 6, 6]
        return self.neck(maps, game_id) if self.neck else maps.float().mean((2, 3))


# === probes ===========================================================================================================
def probe(x: torch.Tensor, samples, args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Trains linear layers on features x [n, d] -> whether they tell actions and reward signs of test samples [test]"""
    game, action, sign, kind = samples.game, samples.action, samples.kind % 3, samples.kind
    std, mean = torch.std_mean(x[samples.train], 0, correction=0)
    x = (x - mean) / torch.where(std > 1e-6, std, torch.inf)  # 0 for a unit that never changes
    weight = 1 / kind[samples.train].bincount(minlength=int(kind.max()) + 1)[kind]  # [n]
    weight /= weight[samples.train].mean()  # all kinds, the signs of the games, weigh the same in training
    layer = GameLinear(int(game.max()) + 1, x.shape[1], 18 + 3).to(x.device)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)  # the problem is convex: the start must not matter
    optimizer = torch.optim.AdamW(layer.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    torch.manual_seed(args.seed)
    train = samples.train.nonzero().squeeze(1)
    for _ in tqdm(range(args.epochs), "probes", unit="epoch", leave=False, **BAR):
        for i in train[torch.randperm(len(train), device=x.device)].split(args.batch_size):
            logits = layer(x[i], game[i])  # [b, 21]
            sign_loss = weight[i] * F.cross_entropy(logits[:, 18:], sign[i], reduction="none")  # [b]
            loss = F.cross_entropy(logits[:, :18], action[i]) + sign_loss.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        logits = layer(x, game)  # [n, 21]
    hits = logits[:, :18].argmax(1) == action, logits[:, 18:].argmax(1) == sign
    return hits[0][samples.test].cpu().numpy(), hits[1][samples.test].cpu().numpy()


# === measures =========================================================================================================
def balanced_accuracy(hits: np.ndarray, kind: np.ndarray) -> float:
    """Mean over games of the mean over their signs of the share of hits [n]; kind [n] is 3 * game + sign (0, 1, 2).

    A constant guess gets 1/2 or 1/3. Games with a single sign are left out; NaN if there are no others.
    """
    size = 3 * (kind.max() // 3 + 1)
    count = np.bincount(kind, minlength=size).reshape(-1, 3)  # [games, signs]
    right = np.bincount(kind, hits, minlength=size).reshape(-1, 3)  # [games, signs]
    signs = (count > 0).sum(1)  # [games]
    accuracy = (right / np.maximum(count, 1)).sum(1) / np.maximum(signs, 1)  # [games]
    return accuracy[signs > 1].mean() if signs.max() > 1 else math.nan


def effective_number(values: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of values [d], at least 0, normalised to sum 1: d if they are equal, 1 if all but one are 0"""
    p = values / values.sum()
    return (-torch.xlogy(p, p).sum()).exp()


def rank_me(x: torch.Tensor) -> torch.Tensor:
    singular_values = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()  # of x [n, d]
    return effective_number(singular_values)


def dormant_rate(x: torch.Tensor) -> torch.Tensor:
    return 1 - effective_number(x.abs().mean(0)) / x.shape[1]  # x [n, d]


def estimate(statistic, columns: tuple, resamples: int, seed: int) -> dict[str, float]:
    """Value of a statistic of columns [n, ...] and its 95% interval by the bootstrap; empty if the value is NaN.

    A resample lacks some samples, which lowers RankMe, for example: the interval has its spread, but not its place.
    """
    value, n, rng = float(statistic(*columns)), len(columns[0]), np.random.default_rng(seed)
    again = []
    for _ in tqdm(range(0 if math.isnan(value) else resamples), "bootstrap", leave=False, **BAR):
        i = rng.integers(n, size=n)
        again.append(float(statistic(*(column[i] for column in columns))))
    if not again:
        return {}
    low, high = np.nanpercentile(again, [2.5, 97.5]) - np.nanmean(again)
    return {"value": value, "low": value + low, "high": value + high}


def measure(x: torch.Tensor, samples, args: Args) -> dict[str, dict[str, float]]:
    """All measures of features x [n, d]"""
    action_hits, sign_hits = probe(x, samples, args)
    kind, x = samples.kind[samples.test].cpu().numpy(), x[:: math.ceil(len(x) / args.rank_samples)].double()
    return {
        "action": estimate(np.mean, (action_hits,), args.resamples, args.seed),
        "reward": estimate(balanced_accuracy, (sign_hits, kind), args.resamples, args.seed),
        "rank_me": estimate(rank_me, (x,), args.rank_resamples, args.seed),
        "dormant": estimate(dormant_rate, (x,), args.resamples, args.seed),
    }


def without_features(samples) -> dict[str, dict[str, float]]:
    """Accuracy of each game's commonest action in training, balanced accuracy of a constant sign"""
    kind = 18 * samples.game + samples.action  # [n], an action of a game
    commonest = kind[samples.train].bincount(minlength=18 * 60).view(60, 18).argmax(1)[samples.game]  # [n]
    accuracy = (commonest == samples.action)[samples.test].float().mean().item()
    kind = samples.kind[samples.test].cpu().numpy()  # [test], a sign of a game
    balanced = balanced_accuracy(kind % 3 == 1, kind)
    return {"action": {"value": accuracy}, "reward": {} if math.isnan(balanced) else {"value": balanced}}


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


# === samples ==========================================================================================================
class Samples:
    """Stacks that no pre-training on the same data is trained on, and what the probes shall tell of them"""

    def __init__(self, args: Args, games: list[str]):
        shards, _ = prepare(args, games, args.rows_per_checkpoint)
        self.device, self.shards, columns = torch.device(args.device), [], []
        for game_id, path in shards:
            rows = np.memmap(path, ROW, "r")
            held_out = math.ceil((len(rows) - HISTORY) * args.held_out)  # samples, the shard's last ones
            rows = rows[-held_out - HISTORY :]
            taken = min(held_out, max(args.samples // len(shards), 1))
            place = np.linspace(0, held_out - 1, taken).round().astype(int)  # [taken] of the held-out samples
            self.shards.append((game_id, rows, place))
            action, reward = (rows[name][HISTORY:][place].astype(int) for name in ("action", "reward"))
            # The last tenth is for the test, as frames next to each other are nearly the same. Samples that share rows
            # with it are left out of the training.
            tested = max(held_out // 10, 1)
            test = place >= held_out - tested
            train = place < held_out - tested - HISTORY
            columns.append([np.full(taken, game_id), action, reward, train, test])
        game_id, self.action, reward, train, test = torch.from_numpy(np.concatenate(columns, 1)).to(self.device)
        self.game = game_id.unique(return_inverse=True)[1]  # [n], 0, 1, ...
        self.kind = 3 * self.game + reward + 1  # [n], a game and the sign of its reward
        self.train, self.test = train.bool(), test.bool()  # [n] each
        if min(len(self.game[part].unique()) for part in (self.train, self.test)) < len(games):
            raise SystemExit(f"{len(test)} held-out samples are too few: use more rows, such as --play-rows 5000.")


@torch.no_grad()
def extract(network: Features, samples: Samples, precision: torch.autocast) -> torch.Tensor:
    """Features [n, d] of all samples"""
    features = []
    for game_id, rows, place in tqdm(samples.shards, "features", unit="shard", leave=False, **BAR):
        frames, is_first = (torch.from_numpy(rows[name].copy()).to(samples.device) for name in ("frame", "is_first"))
        stacks = stack_frames(frames[None], is_first[None])[0, place]  # [taken, 4, 84, 84]
        for part in stacks.split(512):
            with precision:
                x = network(part / 255, torch.full((len(part),), game_id, device=samples.device))
            features.append(x.float())
    return torch.cat(features)


# === report ===========================================================================================================
TITLES = {"action": "action accuracy", "reward": "reward balanced accuracy", "rank_me": "RankMe"}
TITLES |= {"dormant": "dormant rate"}


def as_markdown(results: dict) -> str:
    """A table with aligned columns"""
    width = max(map(len, results))
    lines = [f"| {'model':{width}} |" + "".join(f" {title:>24} |" for title in TITLES.values())]
    lines.append(f"| {'-' * width} |" + f" {'-' * 23}: |" * len(TITLES))
    for name, row in results.items():
        line = f"| {name:{width}} |"
        for measure in TITLES:
            numbers = [f"{value:.3f}" for value in row.get(measure, {}).values()]  # value, low and high; or less
            cell = f"{numbers[0]} [{numbers[1]}, {numbers[2]}]" if len(numbers) == 3 else "".join(numbers) or "-"
            line += f" {cell:>24} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def draw(results: dict, constant: dict) -> Figure:
    """A panel for each measure, a bar for each model, a line for its interval; dashed: without features"""
    figure = Figure((10, 1.1 + 0.25 * len(results)), layout="constrained")
    for panel, (measure, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        for y, row in enumerate(results.values()):
            if row[measure]:
                panel.barh(y, row[measure]["value"], color="tab:gray" if y == 0 else "tab:blue")
                panel.plot([row[measure]["low"], row[measure]["high"]], [y, y], color="black")
        if not any(row[measure] for row in results.values()):
            panel.text(0.5, 0.5, "no game with\ntwo reward signs", transform=panel.transAxes, ha="center", va="center")
        if constant.get(measure):
            panel.axvline(constant[measure]["value"], color="black", linestyle="--")
        panel.set_yticks(range(len(results)), results if measure == "action" else [], parse_math=False)
        panel.invert_yaxis()
        panel.set_title(title, fontsize=9)
    figure.supxlabel("lines: 95% bootstrap intervals over samples; dashed: without features", fontsize=8)
    return figure


def main(args: Args) -> None:
    for name in "play_rows samples epochs batch_size rank_samples resamples rank_resamples".split():
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1.")
    games = list(dict.fromkeys(parse_game(name, DQN_REPLAY_GAMES) for name in args.games)) or ID_GAMES
    paths = {"random": None} | {path.absolute().parent.name: path for path in args.models}
    if len(paths) <= len(args.models):
        raise SystemExit("--models go by the names of their folders, and two have the same one: rename a folder.")
    device, precision = set_up_device(args.device, args.precision, compiles=False)
    networks = {name: Features(args, path).to(device).eval() for name, path in paths.items()}
    args.output_dir = args.output_dir.expanduser()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.output_dir).close()  # fails now, not after the work, if it cannot be written
    samples, results = Samples(args, games), {}
    for name, network in networks.items():
        results[name] = measure(extract(network, samples, precision), samples, args)
    constant = without_features(samples)
    table = as_markdown(results | {"no features": constant})
    about = f"{len(samples.test):,} held-out samples of {len(games)} games, {int(samples.test.sum()):,} of them to test"
    content = {"results": results, "constant": constant, "samples": len(samples.test), "args": asdict(args)}
    with whole_file(args.output_dir / "probe.json") as file:
        file.write_text(json.dumps(content, indent=2, default=str))
    with whole_file(args.output_dir / "probe.md") as file:
        file.write_text(f"# Probes of {args.features} features\n\n![](probe.png)\n\n{about}\n\n{table}")
    with whole_file(args.output_dir / "probe.png") as file:
        draw(results, constant).savefig(file, format="png", dpi=150)
    print(f"{about}\n\n{table}\nWritten to {args.output_dir}: probe.json, probe.md, probe.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
