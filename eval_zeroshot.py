# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "torchvision==0.29.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6",
#   "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0"]
# ///
"""Zero-shot play of Atari-PB (arXiv 2406.06037): a pre-trained policy plays its own games with no fine-tuning.

With f the ResNet-50, g the neck, h the head of a pre-training that learns a policy, on the stack o of each step:

    bc             argmax_a h(g(f(o)))_a                                        the likeliest action
    cql, cql_mse   argmax_a Q(o, a)                                             the best action
    dt             argmax_a h(Transformer(r_0, s_0, e_0, ..., r_t, s_t))_a      the likeliest action of one who will get
                                                                                the return R_t, over the last 8 steps

DT's return-to-go begins with the largest that its game had in pre-training, R_0, which its checkpoint holds, and every
step's sign(reward) is taken off it. (2106.01345 does so too, with returns chosen by hand.)

    python eval_zeroshot.py --checkpoint runs/pretrain_dt__0/checkpoint.pt
    python eval_zeroshot.py --checkpoint runs/pretrain_bc__0/checkpoint.pt --games pong ms_pacman --seed 1

The score of each game, over 100 episodes, goes to results/zeroshot/<method>/<game>/seed<k>.json; where that is there
already, nothing is done. `eval_iqm.py` makes the table of all results.
"""

import json
import math
import os
import platform
import time
import zipfile
from collections import deque
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
from tqdm import tqdm


# === arguments ========================================================================================================
@dataclass
class Args:
    checkpoint: Path  # of a run of pretrain_bc.py, pretrain_dt.py or pretrain_cql.py
    games: tuple[str, ...] = ()  # as ms_pacman or MsPacman; none given: all that it was pre-trained on
    method: str = ""  # name in the results; none given: the checkpoint's objective

    eval_episodes: int = 100  # episodes that make a score
    max_episode_steps: int = 27_000  # agent steps after which an episode is cut off
    epsilon: float = 0.001  # probability of a random action
    video: bool = False  # write the first episode of each game as a GIF into the run's folder

    seed: int = 0  # of the games and the random actions
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to act
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bfloat16 autocast on GPUs and CPUs that compute in it
    results: Path = Path("results")  # folder of the results
    overwrite: bool = False  # replace results, if there are any


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


# === decision transformer [shared] ====================================================================================
class Trajectory(nn.Module):
    """Steps of play as tokens, a return-to-go, a stack and an action each, and a causal transformer over them."""

    def __init__(self, channels: int, games: int, steps: int):
        super().__init__()
        self.spatial_embed = nn.Parameter(torch.randn(games, channels * 6 * 6))
        self.spatial_norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU())
        self.action_embed = nn.Parameter(torch.randn(18, 512))  # E, of all games
        self.rtg_embed = nn.Linear(1, 512)  # V, v
        self.blocks = nn.Sequential(*(Block(causal=True) for _ in range(4)))
        self.out_norm = nn.LayerNorm(512)
        self.register_buffer("position", sin_cos(torch.arange(3 * steps), 512), persistent=False)  # P
        self.register_buffer("largest_return", torch.full((games,), -math.inf))  # seen in training; what play aims at

    def features(self, maps: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        """g: maps [b, c, 6, 6], game_id [b] -> [b, 512]"""
        embed = F.embedding(game_id, self.spatial_embed).view(maps.shape)  # [b, c, 6, 6]
        return self.mlp(self.spatial_norm((maps * embed).mean((2, 3))))

    def forward(self, features: torch.Tensor, action: torch.Tensor, return_to_go: torch.Tensor) -> torch.Tensor:
        """Of t <= `steps` steps, features [b, t, 512], action, return_to_go (scaled) [b, t] -> x at s_j [b, t, 512]

        x at s_j is a function of the steps before and of step j's return and stack.
        """
        returns, actions = self.rtg_embed(return_to_go[..., None]), F.embedding(action, self.action_embed)  # r, e
        tokens = torch.stack([returns, features, actions], 2).flatten(1, 2)  # [b, 3t, 512]
        return self.out_norm(self.blocks(tokens + self.position[: tokens.shape[1]]))[:, 1::3]


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


# === policies =========================================================================================================
class Policy:
    """A checkpoint's networks, at play of one game at a time."""

    def __init__(self, path: Path, device: torch.device, precision: torch.autocast):
        self.path, self.device, self.precision = path, device, precision
        with clear_errors(path, "It must be a checkpoint of pretrain_bc.py, pretrain_dt.py or pretrain_cql.py."):
            content = load_torch(path, mapped=True)
            self.objective, args = content["objective"], content["args"]
            if self.objective not in ("bc", "dt", "cql", "cql_mse"):
                raise ValueError(f"{self.objective} learns no policy")
            self.games = [game for game in content["games"] if game in TABLE_GAMES]
            self.backbone = ResNet(args["width_multiplier"], args["blocks"])  # f
            if self.objective == "dt":
                self.steps, self.return_scale = args["context_steps"], args["return_scale"]
                self.neck = Trajectory(self.backbone.channels, len(TABLE_GAMES), self.steps)
            else:
                self.neck = Neck(self.backbone.channels, len(TABLE_GAMES))  # g
            atoms = args["atoms"] if self.objective == "cql" else 1
            self.head = GameLinear(len(TABLE_GAMES), 512, 18 * atoms)  # h
            for name in ("backbone", "neck", "head"):
                getattr(self, name).load_state_dict(content[name])
                getattr(self, name).to(device, memory_format=torch.channels_last)
            if self.objective == "cql":
                self.support = torch.linspace(-args["max_return"], args["max_return"], atoms, device=device)  # z

    def start(self, game: str, episodes: int) -> None:
        """Gets ready for so many episodes of a game, played side by side from their first step."""
        env = AtariVectorEnv(game, 1)
        self.num_actions, self.row = int(env.single_action_space.n), TABLE_GAMES.index(game)
        env.close()
        if self.objective == "dt":
            self.memory = deque(maxlen=self.steps)  # the last steps' features, actions, returns-to-go, of all episodes
            self.return_to_go = self.neck.largest_return[self.row].repeat(episodes)  # R [episodes]
            if not self.return_to_go.isfinite().all():
                raise SystemExit(f"{self.path} has seen nothing of {game}: choose other --games, or pre-train longer.")

    @torch.no_grad()
    def act(self, stacks: np.ndarray, which: np.ndarray, action: np.ndarray, reward: np.ndarray) -> np.ndarray:
        """As `play_episodes` asks: stacks [n, 4, 84, 84], episodes [n], last actions, rewards [n] -> actions [n]"""
        game_id = torch.full((len(stacks),), self.row, device=self.device)
        with self.precision:
            maps = self.backbone(torch.from_numpy(stacks).to(self.device) / 255)  # [n, 2048, 6, 6]
            if self.objective == "dt":
                x = self.recall(maps, game_id, which, action, reward)  # [n, 512]
            else:
                x = self.neck(maps, game_id)  # [n, 512]
            logits = self.head(x, game_id).float()  # [n, 18], for C51 [n, 18 * atoms]
        if self.objective == "cql":
            logits = (logits.unflatten(1, (18, -1)).softmax(2) * self.support).sum(2)  # Q [n, 18]
        if not logits.isfinite().all():
            raise SystemExit(f"{self.path} predicts what is not finite: choose another checkpoint.")
        return logits[:, : self.num_actions].argmax(1).cpu().numpy()

    def recall(self, maps: torch.Tensor, game_id: torch.Tensor, *last: np.ndarray) -> torch.Tensor:
        """Adds a step to the memory of the episodes that still run; the transformer's x at its stack [n, 512]."""
        which, action, reward = (torch.from_numpy(array).to(self.device) for array in last)
        if self.memory:  # the last step's action, and what came of it, are known by now
            self.memory[-1][1][which] = action
            self.return_to_go[which] -= reward.sign().float()
        features = maps.new_zeros(len(self.return_to_go), 512).float()
        features[which] = self.neck.features(maps, game_id).float()  # s
        actions = torch.zeros(len(features), dtype=torch.long, device=self.device)  # not known, and not looked at, yet
        self.memory.append((features, actions, self.return_to_go.clone()))
        features, actions, returns = (torch.stack(steps, 1)[which] for steps in zip(*self.memory, strict=True))
        return self.neck(features, actions, self.return_scale * returns)[:, -1]  # of [n, t, 512], t <= `steps`


# === zero-shot play ===================================================================================================
FREE_ARGS = "games device results overwrite video".split()  # may differ between results and a new call


def evaluate(args: Args) -> None:
    check_numbers(args, "seed epsilon", "eval_episodes max_episode_steps")
    if args.epsilon > 1:
        raise SystemExit("--epsilon must be at most 1.")
    wanted, device = list(dict.fromkeys(map(parse_game, args.games))), find_device(args.device)
    policy = Policy(args.checkpoint, device, autocast(device, args.precision))
    if unknown := [game for game in wanted if game not in policy.games]:
        raise SystemExit(f"{args.checkpoint} was pre-trained on {', '.join(policy.games)}, not {', '.join(unknown)}.")
    method = args.method or policy.objective
    for game in wanted or policy.games:
        policy.start(game, args.eval_episodes)  # all of them can be played, or none is
    for game in wanted or policy.games:
        result, run_dir, plain_args = find_run(args, "zeroshot", method, game)
        if result is None:
            continue
        policy.start(game, args.eval_episodes)
        evaluation = (args.eval_episodes, args.max_episode_steps, args.epsilon, args.seed, args.video)
        scores, frames = play_episodes(game, policy.act, *evaluation)
        if args.video:
            save_gif(run_dir / "episode.gif", frames)
        save_result(result, game, scores, plain_args)
        print(f"{result}: {scores.mean():.2f} points, normalised {normalize(game, scores.mean()):.3f}", flush=True)


if __name__ == "__main__":
    evaluate(tyro.cli(Args, description=__doc__))
