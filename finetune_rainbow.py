# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "torchvision==0.29.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6",
#   "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0"]
# ///
"""Fine-tuning online by Rainbow (1710.02298) on one game of Atari-PB (2406.06037), then 100 episodes for the score.

On a frozen pre-trained ResNet-50 f, a fresh neck g and head h learn the distribution of the return of every action a,
p(o, a) = softmax( h(g(f(o)))[a] ) over 51 atoms z from -10 to 10 (C51, 1707.06887). With Q = sum_j z_j p_j, ' for the
target network (a moving average of the online one), transitions drawn in proportion to priority^0.5 (1511.05952):

    G    = sum_{k<n} gamma^k sign(r_{s+k})                             n = 10 steps, gamma = 0.99
    a*   = argmax_a Q(o_{s+n}, a)                                      double Q-learning (1509.06461)
    m    = projection onto z of the atoms G + gamma^n z, with the probabilities p'(o_{s+n}, a*)
    loss = mean_i w_i ( -sum_j m_j log p(o_s, a_s)_j )                 the bracket is the sample's new priority
    w_i  = (priority_i^0.5)^-beta / max, beta from 0.4 to 1

Where an episode ends in the n steps, by a lost life, the game's end or its time-out, G ends, and the atoms are at G.

    python finetune_rainbow.py --game pong --checkpoint runs/pretrain_atc__0/checkpoint.pt
    python finetune_rainbow.py --game pong                            # baseline "random": a frozen random backbone
    python finetune_rainbow.py --game pong --no-freeze-backbone       # baseline "e2e": everything learned from scratch
    python finetune_rainbow.py --game klax --encoder nature --save-replay DIR ...     # docs/recreating-data.md

The score goes to results/rainbow/<method>/<game>/seed<k>.json; where that is there already, nothing is done. The same
command continues a run that was cut off, from its last checkpoint, exactly. `--dueling` (1511.06581) and `--noisy`
(1706.10295) add what the benchmark leaves out of Rainbow. `eval_iqm.py` makes the table of all results.
"""

import copy
import fcntl
import gzip
import json
import math
import os
import platform
import signal
import threading
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
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


# === arguments ========================================================================================================
@dataclass
class Args:
    game: str  # to fine-tune on, as ms_pacman or MsPacman: one of the benchmark's 65
    checkpoint: Path | None = None  # of a pretrain_*.py run, or the original authors' .pth; none: a random backbone
    freeze_backbone: bool = True  # train neck and head only; the Nature CNN always learns
    method: str = ""  # name in the results; none given: [objective], [objective]_e2e, random, e2e or nature
    total_steps: int = 50_000  # agent steps of training, each an action and 4 frames
    learning_starts: int = 2_000  # agent steps at random before the first update
    updates_per_step: float = 2.0  # updates for each agent step from then on; 0.25: one every fourth
    batch_size: int = 32  # transitions of an update
    learning_rate: float = 1e-4  # Adam's
    adam_eps: float = 1.5e-4  # Adam's term against division by zero
    max_grad_norm: float = 10.0  # gradients are scaled down to this L2 norm; inf leaves them alone
    target_momentum: float = 0.99  # of the target network, the online network's moving average over the updates
    discount: float = 0.99  # gamma
    n_steps: int = 10  # n, steps of which the rewards are added up before the target's value takes over
    atoms: int = 51  # of the return's distribution, at equal distances
    max_return: float = 10.0  # the last atom; the first is minus this
    replay_capacity: int = 100_000  # transitions kept, the latest
    priority_exponent: float = 0.5  # of a transition's loss in its probability of being drawn; 0: all alike
    importance_exponent: float = 0.4  # beta at the first update, of the weights that correct for it; 1 at the last
    exploration_steps: int = 10_000  # agent steps from learning_starts on in which random actions become rarer
    exploration_final: float = 0.01  # probability of a random action after them
    dueling: bool = False  # a value and an advantage stream in the head, each a layer on the neck's hidden units
    noisy: bool = False  # noise in the weights of the head (and the Nature CNN's last layer) instead of random actions

    encoder: Literal["resnet", "nature"] = "resnet"  # the benchmark's ResNet-50, or DQN's small network, from scratch
    width_multiplier: float = 1.0  # of the ResNet's channels; as in pre-training
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottleneck blocks of the four stages; as in pre-training

    episodic_life: bool = True  # a lost life ends an episode for learning; the game goes on
    repeat_action_probability: float = 0.0  # of the training environment; 0.25: the sticky actions of DQN Replay
    replay_dir: Path | None = None  # a folder of this run's own for the frames, memory-mapped; none: they are in RAM
    save_replay: Path | None = None  # write what was played into this folder, laid out as DQN Replay, run = seed
    save_replay_every: int = 1_000_000  # agent steps of a replay checkpoint
    save_replay_rows: int = 0  # rows to write of each, from its start, and one more, which readers ignore; 0: all

    eval_episodes: int = 100  # episodes that make the score
    max_episode_steps: int = 27_000  # agent steps after which an episode is cut off, in training too
    epsilon: float = 0.001  # probability of a random action in evaluation
    video: bool = False  # write the first episode as a GIF into the run's folder

    seed: int = 0  # of the initialisation, the environment, exploration, sampling, augmentation and the evaluation
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to train and to act
    precision: Literal["auto", "bf16", "fp32"] = (
        "auto"  # auto: bfloat16 for the ResNet where the hardware computes in it
    )
    compile: bool = torch.cuda.is_available()  # torch.compile the update and the choice of actions
    results: Path = Path("results")  # folder of the results
    overwrite: bool = False  # replace the result, if there is one, and start an unfinished run afresh
    log_every: int = 1_000  # agent steps between entries in TensorBoard
    save_every: int = 10_000  # agent steps between checkpoints; the replay holds as many more frames than its capacity


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


# === networks =========================================================================================================
class Nature(nn.Sequential):
    """DQN's convolutions (Mnih et al. 2015): [b, 4, 84, 84] -> [b, 64, 7, 7]"""

    def __init__(self):
        convolutions = nn.Conv2d(4, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)
        super().__init__(*(layer for convolution in convolutions for layer in (convolution, nn.ReLU())))


class NoisyLinear(nn.Module):
    """A linear layer with noise of learned strength, W = mu + sigma * e_out e_in^T (1706.10295, equations 9-11)

    `draw_noise` draws e; in evaluation mode there is none.
    """

    def __init__(self, features: int, outputs: int):
        super().__init__()
        bound = features**-0.5
        self.weight = nn.Parameter(torch.empty(outputs, features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((outputs, features), 0.5 * bound))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), 0.5 * bound))
        self.register_buffer("noise_in", torch.zeros(features), persistent=False)
        self.register_buffer("noise_out", torch.zeros(outputs), persistent=False)

    def draw_noise(self) -> None:
        for noise in (self.noise_in, self.noise_out):
            noise.normal_()
            noise.copy_(noise.sign() * noise.abs().sqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return F.linear(x, self.weight, self.bias)
        weight = self.weight + self.weight_sigma * self.noise_out[:, None] * self.noise_in
        return F.linear(x, weight, self.bias + self.bias_sigma * self.noise_out)


def draw_noise(network: nn.Module) -> None:
    """New noise for all of the network's noisy layers, if it has any."""
    for module in network.modules():
        if isinstance(module, NoisyLinear):
            module.draw_noise()


class Network(nn.Module):
    """f, g and h. Maps, as f makes them of stacks -> logits of the return's atoms [b, actions, atoms]

    f is called by Rainbow's `encode`, as one pass of it can serve several uses.
    """

    def __init__(self, args: Args, backbone: nn.Module, actions: int):
        super().__init__()
        self.shape = (actions, args.atoms)
        self.backbone = backbone  # f
        linear = NoisyLinear if args.noisy else nn.Linear
        if args.encoder == "nature":
            self.neck = nn.Sequential(nn.Flatten(), linear(64 * 7 * 7, 512), nn.ReLU())  # g
        else:
            self.neck = Neck(backbone.channels, games=1)
            linear = NoisyLinear if args.noisy else partial(GameLinear, 1)
        self.head = linear(512, actions * args.atoms)  # h
        self.value = linear(512, args.atoms) if args.dueling else None

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        game_id = torch.zeros(len(maps), dtype=torch.long, device=maps.device)  # every game is the only one here
        maps = maps.float()  # g and h take part in no autocast: actions often differ by less than bfloat16 resolves
        x = self.neck(maps, game_id) if isinstance(self.neck, Neck) else self.neck(maps)  # [b, 512]
        streams = [h(x, game_id) if isinstance(h, GameLinear) else h(x) for h in (self.head, self.value) if h]
        logits = streams[0].unflatten(1, self.shape)
        if self.value:  # 1511.06581, equation 9
            logits = logits - logits.mean(1, keepdim=True) + streams[1][:, None]
        return logits


# === distributional returns [shared] ==================================================================================
def project(probabilities: torch.Tensor, atoms: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Shares each moved atom's probability between its two neighbours on the support (1707.06887, algorithm 1).

    probabilities [b, n] of the moved atoms [b, n]; support [n], at equal distances -> probabilities [b, n] on it
    """
    last = len(support) - 1
    position = ((atoms - support[0]) / (support[last] - support[0]) * last).clamp(0, last)  # [b, n], 0 to n - 1
    lower = position.floor().clamp(max=last - 1)  # so that the last atom itself has a lower neighbour, of share 0
    share, lower = position - lower, lower.long()
    projected = torch.zeros_like(probabilities).scatter_add_(1, lower, probabilities * (1 - share))
    return projected.scatter_add_(1, lower + 1, probabilities * share)


# === objective: Rainbow ===============================================================================================
class Rainbow(nn.Module):
    """The online and the target network, which share a backbone that is frozen."""

    def __init__(self, args: Args, backbone: nn.Module, actions: int):
        super().__init__()
        self.online = Network(args, backbone, actions)
        self.frozen = not any(parameter.requires_grad for parameter in backbone.parameters())
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        if self.frozen:
            self.target.backbone = backbone
        pairs = zip(self.online.parameters(), self.target.parameters(), strict=True)
        self.learned, self.averages = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
        self.n_step_discount = args.discount**args.n_steps  # gamma^n
        self.register_buffer("support", torch.linspace(-args.max_return, args.max_return, args.atoms))  # z

    def q(self, logits: torch.Tensor) -> torch.Tensor:
        """Q = sum_j z_j p_j: [..., atoms] -> [...]"""
        return (logits.softmax(-1) * self.support).sum(-1)

    def act(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps of the target network's backbone -> its greedy actions [b]"""
        return self.q(self.target(maps)).argmax(1)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target = momentum target + (1 - momentum) online"""
        torch._foreach_lerp_(self.averages, self.learned, 1 - momentum)

    def encode(self, stacks: torch.Tensor) -> list[torch.Tensor]:
        """b stacks now and b stacks n steps later, [2b, 4, 84, 84] in [0, 1] -> maps of f now, f later and f' later"""
        if self.frozen:  # one pass, without gradient, is all three
            with torch.no_grad():
                now, later = self.online.backbone(stacks).chunk(2)
            return [now, later, later]
        now, later = stacks.chunk(2)
        with torch.no_grad():
            maps_later = [self.online.backbone(later), self.target.backbone(later)]
        return [self.online.backbone(now), *maps_later]

    def forward(self, maps: list[torch.Tensor], action: torch.Tensor, n_step_return: torch.Tensor, done: torch.Tensor):
        """Maps as `encode` gives them; action, n_step_return (G), done [b] -> [3, b]

        Each sample's cross-entropy, the Q of its action, and the target's opinion of what that Q should be.
        """
        i = torch.arange(len(action), device=action.device)
        with torch.no_grad():
            best = self.q(self.online(maps[1])).argmax(1)  # a*
            p = self.target(maps[2])[i, best].softmax(1)  # [b, atoms]
            atoms = n_step_return[:, None] + self.n_step_discount * ~done[:, None] * self.support  # [b, atoms]
            m = project(p, atoms, self.support)
        logits = self.online(maps[0])[i, action]  # [b, atoms]
        cross_entropy = -(m * logits.log_softmax(1)).sum(1)  # clamped as in the original: no priority is 0
        return torch.stack([cross_entropy.clamp(1e-5, 1e5), self.q(logits.detach()), (p * atoms).sum(1)])


# === replay ===========================================================================================================
TRANSITION = np.dtype([("action", "u1"), ("reward", "f4"), ("starts", "?"), ("ends", "?"), ("terminal", "?")])


class SumTree:
    """Non-negative priorities of `size` slots, to be drawn from; a node is the sum of its 64 children.

    Where a binary tree of 100,000 slots has 17 levels, this one has 3, and a level costs NumPy about the same.
    """

    def __init__(self, size: int):
        self.levels = [np.zeros(math.ceil(size / 64) * 64)]
        while len(self.levels[-1]) > 64:
            self.levels.append(np.zeros(math.ceil(len(self.levels[-1]) / 64 / 64) * 64))

    def set(self, slots: np.ndarray, priorities: np.ndarray | float) -> None:
        self.levels[0][slots] = priorities
        for children, parents in zip(self.levels, self.levels[1:], strict=False):
            slots = slots // 64
            parents[slots] = children.reshape(-1, 64)[slots].sum(1)

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """The slots [b] that hold the shares uniform [b], in [0, 1), of the sum of all priorities."""
        node, left = np.zeros(len(uniform), int), uniform * self.levels[-1].sum()
        for level in reversed(self.levels):
            sums = level.reshape(-1, 64)[node].cumsum(1)  # [b, 64]
            left = np.minimum(left, np.nextafter(sums[:, -1], 0))  # rounding does not lead to a slot of priority 0
            child = (sums <= left[:, None]).sum(1)
            left -= np.where(child > 0, sums[np.arange(len(node)), child - 1], 0)
            node = node * 64 + child
        return node


class Replay:
    """The last transitions, as single frames: row i is in slot i modulo `size`, of o_i, a_i, r_i and what came of them.

    `starts` marks the first row of a game, `ends` the last one of an episode as learning sees it, `terminal` of the
    game. A row can be drawn from when its n steps are there, or the episode's end, until it is older than `capacity`.
    The slots beyond the capacity keep what a checkpoint needs until the next one is written; the frames that came since
    are written to a file then, or are in it already if it is memory-mapped.
    """

    def __init__(self, args: Args, path: Path):
        self.capacity, self.n_steps, self.exponent = args.replay_capacity, args.n_steps, args.priority_exponent
        self.discounts = args.discount ** np.arange(self.n_steps)  # gamma^k
        self.size = args.replay_capacity + HISTORY + args.save_every
        self.fields, self.tree = np.zeros(self.size, TRANSITION), SumTree(self.size)
        self.rows = 0  # played so far
        self.saved = 0  # of them, those that are on disk
        self.ready = 0  # of them, those that have had their n steps, or their episode's end, and so got a priority
        self.max_priority = 1.0
        self.path, shape = path, (self.size, 84, 84)
        if not path.exists():
            with atomic_write(path) as file:  # all its blocks: on a full disk, a map of a file with holes would crash
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        if path.stat().st_size != math.prod(shape):
            raise SystemExit(
                f"{path} has not the {math.prod(shape):,} bytes it was made with: --overwrite starts again."
            )
        self.map = np.memmap(path, np.uint8, "r+", shape=shape) if args.replay_dir else None
        self.frames = np.zeros(shape, np.uint8) if self.map is None else self.map.view(np.ndarray)

    def add(self, frame: np.ndarray, *fields) -> None:
        """A row: o [84, 84], and TRANSITION's fields. Those whose future is known now get the greatest priority."""
        slot = self.rows % self.size
        self.frames[slot], self.fields[slot] = frame, fields
        self.rows += 1
        ready = self.rows if self.fields["ends"][slot] else max(self.ready, self.rows - self.n_steps)
        if ready > self.ready:
            self.tree.set(np.arange(self.ready, ready) % self.size, self.max_priority**self.exponent)
        self.ready = ready
        if self.rows > self.capacity:  # too old from now on
            self.tree.set(np.array([self.rows - 1 - self.capacity]) % self.size, 0)

    def sample(self, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict]:
        """Slots [b], one of each b-th part of the sum; their probabilities, up to a factor; a batch of arrays.

        frames uint8 [2b, 4, 84, 84] and starts [2b, 4]: b stacks now, b stacks n steps later; action [b]; n_step_return
        [b]; done [b], whether the episode ends on the way: then the stack later is the one now.
        """
        slots = self.tree.draw((np.arange(batch_size) + rng.random(batch_size)) / batch_size)
        steps = self.fields[(slots[:, None] + np.arange(self.n_steps)) % self.size]  # [b, n]
        before = steps["ends"].cumsum(1) - steps["ends"]  # episodes that end before a step
        n_step_return = (np.sign(steps["reward"]) * (before == 0)) @ self.discounts
        done = steps["ends"].any(1)
        last = np.concatenate([slots, np.where(done, slots, slots + self.n_steps)])  # [2b], of each stack
        window = (last[:, None] + np.arange(-HISTORY, 1)) % self.size  # [2b, 4]
        batch = {"frames": self.frames[window], "starts": self.fields["starts"][window], "done": done}
        batch |= {"action": steps["action"][:, 0].astype(int), "n_step_return": n_step_return.astype(np.float32)}
        return slots, self.tree.levels[0][slots], batch

    def set_losses(self, slots: np.ndarray, losses: np.ndarray) -> None:
        self.tree.set(slots, losses.astype(float) ** self.exponent)
        self.max_priority = max(self.max_priority, float(losses.max()))

    def checksum(self) -> int:
        """Of the last frames, by which the file that belongs to a checkpoint is known."""
        rows = np.arange(max(0, self.rows - min(1000, self.capacity)), self.rows)
        return zlib.crc32(self.frames[rows % self.size])

    def state_dict(self) -> dict:
        """All but the frames, which it brings to disk."""
        if self.map is not None:
            self.map.flush()
        else:
            with clear_errors(self.path, "Is the disk full? To go on from the last checkpoint: the same command again"):
                slots = np.arange(self.saved, self.rows) % self.size
                with open(self.path, "r+b") as file:
                    for part in filter(len, np.split(slots, np.flatnonzero(slots == 0))):
                        file.seek(part[0] * 84 * 84)
                        file.write(self.frames[part[0] : part[-1] + 1])
                    file.flush()
                    os.fsync(file.fileno())
        self.saved = self.rows
        arrays = {"fields": self.fields.view(np.uint8), "priorities": self.tree.levels[0]}
        state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        state |= {"rows": self.rows, "ready": self.ready, "max_priority": self.max_priority}
        return state | {"checksum": self.checksum()}

    def load_state_dict(self, state: dict) -> None:
        self.fields = state["fields"].numpy().view(TRANSITION)
        self.tree.set(np.arange(self.size), state["priorities"].numpy()[: self.size])
        self.rows = self.saved = state["rows"]
        self.ready, self.max_priority = state["ready"], state["max_priority"]
        if self.map is None:
            with open(self.path, "rb") as file:
                file.readinto(self.frames)
        if self.checksum() != state["checksum"]:
            raise ValueError(f"{self.path} is missing, damaged or of another run")

    def export(self, first: int, most: float, files: list[Path]) -> None:
        """Writes the rows from `first` on, but at most so many, with DQN Replay's padding rows; rewards are raw."""
        slots = np.arange(first, self.rows) % self.size
        padding = np.repeat(np.flatnonzero(self.fields["starts"][slots]), PADDING)
        slots = np.insert(slots, padding, -1)[: int(min(most, len(slots) + len(padding)))]  # -1: a blank row
        columns = [self.frames, *(self.fields[name] for name in REPLAY.names[1:])]
        for path in files:  # of an earlier try: no half of it stays beside a half of this
            path.unlink(missing_ok=True)
        for path, name, column in zip(files, REPLAY.names, columns, strict=True):
            dtype = REPLAY[name]
            with atomic_write(path) as file, gzip.open(file, "wb", compresslevel=1) as stream:
                header = {"descr": dtype.base.str, "fortran_order": False, "shape": (len(slots), *dtype.shape)}
                np.lib.format.write_array_header_1_0(stream, header)
                for chunk in np.array_split(slots, math.ceil(len(slots) / 1000)):  # 7 MB of frames
                    rows = column[chunk].astype(dtype.base)
                    rows[chunk < 0] = 0
                    stream.write(rows.tobytes())


# === environment ======================================================================================================
class Environment:
    """One environment, whose state is a function of (seed, episode, the actions since its reset).

    That is how a run goes on in the middle of a game. `stack` uint8 [4, 84, 84] is what the player sees; `lives`,
    `score`, the sum of raw rewards, and `terminal` are the game's.
    """

    def __init__(self, args: Args, game: str):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        options = dict(noop_max=30, use_fire_reset=False, reward_clipping=False)
        options |= dict(repeat_action_probability=args.repeat_action_probability)
        self.env = AtariVectorEnv(game, 1, max_num_frames_per_episode=4 * args.max_episode_steps, **options)
        self.num_actions = int(self.env.single_action_space.n)
        self.seed, self.episodic_life = args.seed, args.episodic_life
        self.reset(0)

    def reset(self, episode: int) -> None:
        """Begins an episode. The environment's own reset, a step that belongs to no transition, never comes about."""
        seed = int(np.random.default_rng([self.seed, episode]).integers(2**30))
        stacks, info = self.env.reset(seed=seed)
        self.stack, self.lives, self.score, self.terminal = stacks[0], info["lives"][0], 0.0, False
        self.episode, self.actions = episode, []

    def step(self, action: int) -> tuple[float, bool]:
        """The raw reward, and whether the episode that learning sees is over: by a lost life, the game or its time"""
        stacks, rewards, terminated, truncated, info = self.env.step(np.array([action]))
        self.actions.append(action)
        self.terminal = bool(terminated[0] or truncated[0])
        lost = self.episodic_life and info["lives"][0] < self.lives
        self.stack, self.lives = stacks[0], info["lives"][0]
        self.score += float(rewards[0])
        return float(rewards[0]), self.terminal or bool(lost)

    def state_dict(self) -> dict:
        return {"episode": self.episode, "actions": torch.tensor(self.actions, dtype=torch.uint8)}

    def load_state_dict(self, state: dict) -> None:
        self.reset(state["episode"])
        for action in state["actions"].tolist():
            self.step(action)


# === fine-tuning ======================================================================================================
FREE_ARGS = "device compile results overwrite log_every video".split()  # may change when a run is continued


def check(args: Args) -> None:
    """Ends the program, with what to do, if a number is out of its range or does not go with another."""
    at_least_0 = """seed updates_per_step learning_rate adam_eps max_grad_norm target_momentum discount max_return
        priority_exponent importance_exponent exploration_steps exploration_final repeat_action_probability
        save_replay_rows epsilon"""
    at_least_1 = """total_steps batch_size n_steps atoms replay_capacity save_replay_every eval_episodes
        max_episode_steps log_every save_every"""
    check_numbers(args, at_least_0, at_least_1)
    at_most_1 = "target_momentum discount importance_exponent exploration_final repeat_action_probability epsilon"
    for name in at_most_1.split():
        if getattr(args, name) > 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at most 1.")
    if args.atoms < 2 or args.max_return == 0:
        raise SystemExit("--atoms must be at least 2, --max-return above 0.")
    if not args.n_steps < args.learning_starts < args.total_steps or args.replay_capacity <= args.n_steps:
        raise SystemExit("--learning-starts must be between --n-steps and --total-steps, --replay-capacity above.")
    if args.encoder == "nature" and args.checkpoint:
        raise SystemExit("--encoder nature is learned from scratch: leave --checkpoint out.")
    if args.save_replay and args.total_steps % args.save_replay_every:
        raise SystemExit("--save-replay: --total-steps must be a multiple of --save-replay-every.")
    if args.save_replay and args.replay_capacity < min(args.save_replay_rows or math.inf, args.save_replay_every):
        raise SystemExit("--save-replay: --replay-capacity must be at least --save-replay-rows or --save-replay-every.")
    for folder in filter(None, (args.replay_dir, args.save_replay)):
        check_writable(folder)


def own(folder: Path, owner: list[str]) -> None:
    """Holds a folder and marks it as an owner's for good; an error if it is another's, or has files, but no mark."""
    hold(folder)
    mark = folder / "run.json"
    with clear_errors(folder, "Choose another --replay-dir or --save-replay."):
        if mark.exists():
            if (found := json.loads(mark.read_text())) != owner:
                raise ValueError(f"it belongs to {found}")
        elif others := [path.name for path in folder.glob("[!.]*")]:
            raise ValueError(f"it has files already, such as {others[0]}")
        else:
            with atomic_write(mark) as file:
                file.write(json.dumps(owner).encode())


def finetune(args: Args) -> None:
    # What is to be done, and where it goes.
    check(args)
    game, device = parse_game(args.game), find_device(args.device)
    torch.manual_seed(args.seed)
    backbone, method = (Nature(), args.method or "nature") if args.encoder == "nature" else make_backbone(args)
    result, run_dir, plain_args = find_run(args, "rainbow", method, game)
    checkpoint, replay_dir = run_dir / "checkpoint.pt", args.replay_dir or run_dir
    if result is None and not checkpoint.exists():
        return
    frames, owner = replay_dir / "frames.bin", [game, str(run_dir.resolve())]

    def tidy_up() -> None:  # gigabytes that nobody needs once there is a result
        for path in (frames, replay_dir / "run.json", checkpoint):
            path.unlink(missing_ok=True)

    hold(run_dir)
    if args.replay_dir:
        own(replay_dir, owner)
    for leftover in run_dir.glob(".*.tmp"):  # what was being written as the run was killed
        leftover.unlink()
    if result is None:  # and killed as it tidied up
        tidy_up()
        return
    exports = {}  # what to write of a replay checkpoint, by the step after which it has been played
    if args.save_replay:
        every, rows = args.save_replay_every, args.save_replay_rows + 1 if args.save_replay_rows else math.inf
        for first in range(0, args.total_steps, every):
            files = replay_layouts(args.save_replay, game, args.seed, first // every + 1)[0]
            exports[first + min(rows, every)] = first, rows, files
        own(files[0].parent, owner)

    # The environment, the networks and the optimizer.
    env = Environment(args, game)
    model = Rainbow(args, backbone, env.num_actions).to(device, memory_format=torch.channels_last)
    small = args.encoder == "nature" and args.precision == "auto"  # convolutions that bfloat16 makes no faster
    precision = autocast(device, "fp32" if small else args.precision)
    with precision:
        if model.frozen and torch.is_autocast_enabled(device.type):  # its weights are cast once, not in every pass
            backbone.to(torch.get_autocast_dtype(device.type))
    compiled = partial(torch.compile, dynamic=False) if args.compile else lambda function: function
    encode, update = compiled(model.encode), compiled(model)
    act_on_one = dict(backbone=compiled(model.target.backbone), choose=compiled(model.act))  # in evaluation n changes
    optimizer = torch.optim.Adam(model.learned, args.learning_rate, eps=args.adam_eps, fused=True)
    rng, step, updates = np.random.default_rng(args.seed), 0, 0
    all_updates = int((args.total_steps - args.learning_starts) * args.updates_per_step)

    def save_checkpoint() -> None:
        content = {"step": step, "updates": updates, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        content |= {"replay": replay.state_dict(), "env": env.state_dict()}
        content["rng"] = {"numpy": rng.bit_generator.state, "cpu": torch.get_rng_state()}
        if device.type == "cuda":
            content["rng"]["cuda"] = torch.cuda.get_rng_state()
        with atomic_write(checkpoint) as file:
            torch.save(content, file)

    # The run as far as it has come, or afresh.
    if checkpoint.exists() and not args.overwrite:
        with clear_errors(checkpoint, "To start the run again: --overwrite"):
            content = load_torch(checkpoint)
            replay = Replay(args, frames)
            for name, part in {"model": model, "optimizer": optimizer, "replay": replay, "env": env}.items():
                part.load_state_dict(content[name])
            rng.bit_generator.state = content["rng"]["numpy"]
            torch.set_rng_state(content["rng"]["cpu"])
            if "cuda" in content["rng"] and device.type == "cuda":
                torch.cuda.set_rng_state(content["rng"]["cuda"])
            step, updates = content["step"], content["updates"]
            del content  # half a gigabyte, if the backbone learns
    else:
        for path in [*files_of(run_dir), frames, result]:  # if this is cut off, the old result does not count
            path.unlink(missing_ok=True)
        replay = Replay(args, frames)
        save_checkpoint()

    @torch.no_grad()
    def act(stacks: np.ndarray, *_, backbone=model.target.backbone, choose=model.act) -> np.ndarray:
        with precision:
            maps = backbone(torch.from_numpy(stacks).to(device) / 255)
        return choose(maps).cpu().numpy()

    # Training: play a step, learn from the replay.
    writer = open_writer(run_dir, plain_args, step)
    print(f"{game}: {method}, seed {args.seed}, from step {step:,} of {args.total_steps:,}; run: {run_dir}", flush=True)
    stops = []
    before = {number: signal.signal(number, lambda n, _: stops.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(desc=f"rainbow on {game}", total=args.total_steps, initial=step, unit="step", leave=False)
    recent, clock = [], time.perf_counter()
    while step < args.total_steps:
        share = min((step - args.learning_starts) / max(args.exploration_steps, 1), 1)
        epsilon = 0.0 if args.noisy else 1 - share * (1 - args.exploration_final)
        if step < args.learning_starts:
            epsilon = 1.0
        if rng.random() < epsilon:
            action = int(rng.integers(env.num_actions))
        else:
            draw_noise(model.target)
            action = int(act(env.stack[None], **act_on_one)[0])
        frame, starts = env.stack[-1], not env.actions
        reward, ends = env.step(action)
        replay.add(frame, action, reward, starts, ends, env.terminal)
        step += 1
        bar.update()
        if env.terminal:
            with clear_errors(run_dir, "Is the disk full?"):
                writer.add_scalar("charts/episode_return", env.score, step)
                writer.add_scalar("charts/episode_length", len(env.actions), step)
            bar.set_postfix_str(f"return {env.score:g}")
            env.reset(env.episode + 1)

        while updates < int((step - args.learning_starts) * args.updates_per_step):
            beta = args.importance_exponent + (1 - args.importance_exponent) * updates / all_updates
            slots, probabilities, batch = replay.sample(args.batch_size, rng)
            batch = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
            weights = torch.from_numpy((probabilities.min() / probabilities) ** beta).float().to(device)  # [b]
            with precision:
                maps = encode(augment(stack_frames(batch["frames"], batch["starts"])).squeeze(1))
            draw_noise(model)
            outputs = update(maps, batch["action"], batch["n_step_return"], batch["done"])  # [3, b]
            loss = (weights * outputs[0]).mean()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.learned, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            model.update_target(args.target_momentum)
            values = torch.cat([torch.stack([loss, grad_norm]), outputs.flatten()]).detach().cpu()
            if not values.isfinite().all():
                bar.close()
                where = f"step {step}: loss {values[0]:.4g}, gradient norm {values[1]:.4g}"
                raise SystemExit(
                    f"Stopped at {where}: lower --learning-rate? The last checkpoint is good: {checkpoint}"
                )
            cross_entropy, q, target_q = values[2:].view(3, -1)
            replay.set_losses(slots, cross_entropy.numpy())
            recent.append(torch.stack([*values[:2], q.mean(), target_q.mean()]))
            updates += 1

        if recent and step % args.log_every == 0:
            scalars = zip(("loss", "grad_norm", "q", "target_q"), torch.stack(recent).mean(0).tolist(), strict=True)
            scalars = {f"losses/{name}": value for name, value in scalars} | {"charts/epsilon": epsilon}
            rate = len(recent) / (time.perf_counter() - clock)
            scalars |= {"charts/importance_exponent": beta, "charts/updates_per_second": rate}
            with clear_errors(run_dir, "Is the disk full?"):
                for name, value in scalars.items():
                    writer.add_scalar(name, value, step)
            recent, clock = [], time.perf_counter()
        if step in exports:
            replay.export(*exports[step])
        if stops or step in exports or step % args.save_every == 0 or step == args.total_steps:
            with clear_errors(run_dir, "Is the disk full?"):
                writer.flush()  # what the checkpoint goes on from is charted
            save_checkpoint()
        if stops:
            bar.close()
            again = ", but without --overwrite" if args.overwrite else ""
            raise SystemExit(f"Stopped by a signal after step {step}. To go on: the same command again{again}")
    bar.close()
    for number, handler in before.items():
        signal.signal(number, handler)

    # The score, of the target network, which has been the player all along.
    model.eval()
    parts = {name: part for name, part in model.target.named_children() if not (name == "backbone" and model.frozen)}
    with atomic_write(run_dir / "policy.pt") as file:
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    evaluation = (args.eval_episodes, args.max_episode_steps, args.epsilon, args.seed, args.video)
    scores, video = play_episodes(game, act, *evaluation)
    if args.video:
        save_gif(run_dir / "episode.gif", video)
    with clear_errors(run_dir, "Is the disk full?"):
        writer.add_scalar("eval/score", scores.mean(), args.total_steps)
        writer.close()
    save_result(result, game, scores, plain_args)
    tidy_up()
    print(f"{result}: {scores.mean():.2f} points, normalised {normalize(game, scores.mean()):.3f}", flush=True)


if __name__ == "__main__":
    finetune(tyro.cli(Args, description=__doc__))
