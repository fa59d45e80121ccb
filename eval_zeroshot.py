# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "ale-py==0.12.1", "numpy==2.4.6", "tyro==1.0.17", "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""Zero-shot play: a pre-trained policy plays 100 episodes of each game of its pre-training, without fine-tuning.

f is the ResNet-50, g the neck, h the head. At the stack of frames o_t the player takes the action a with the largest

    h(g(f(o_t)))_a                            of BC, the logit
    Q(o_t, a)                                 of CQL, the expected return
    h(Transformer(..., R_t, g(f(o_t))))_a     of DT, the logit, given up to 8 steps' returns-to-go R, stacks and actions
    R_0 = max R,  R_t+1 = R_t - sign(reward_t)     with the largest return-to-go of the game in pre-training

    python eval_zeroshot.py --checkpoint runs/pretrain_dt__0/checkpoint.pt --games pong ms_pacman
"""

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
from PIL import Image
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
    checkpoint: Path  # of a pretrain_bc.py, pretrain_dt.py or pretrain_cql.py run, or the original authors' .pth
    games: tuple[str, ...] = ()  # such as ms_pacman or MsPacman; default: all games of the pre-training
    method: str = ""  # name in the results; default: the objective; for the authors' files their folder's name
    eval_episodes: int = 100  # episodes to play in each game; the score is their mean
    max_episode_steps: int = 27_000  # agent steps after which an episode is cut off
    epsilon: float = 0.001  # probability of a random action
    video: bool = False  # write the first two minutes of the first episode beside the result, as a GIF
    seed: int = 0  # of the environments and the random actions
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # computes the actions
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bfloat16 autocast where the hardware supports it
    results: Path = Path("results")  # folder of zeroshot/<method>/<game>/seed<k>.json; a game that has it is skipped
    overwrite: bool = False  # replace results that are there


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


# === transformer [shared] =============================================================================================
def sin_cos(position: torch.Tensor, channels: int) -> torch.Tensor:
    """Fixed codes of positions [n]: [sin, cos] at c/2 frequencies 1 / 10000^(i / (c/2)) -> [n, c]"""
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
    """Softmax attention with 4 heads; if causal, not to later tokens: [b, n, 512], [b, m, 512] twice -> [b, n, 512]"""
    heads = [x.unflatten(2, (4, -1)).transpose(1, 2) for x in (query, key, value)]  # [b, 4, n or m, 128] each
    return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Pre-norm transformer block, self-attention and an MLP, each added to its input: [b, n, 512] -> [b, n, 512]"""

    def __init__(self, causal: bool = False):
        super().__init__()
        self.causal = causal
        self.attn_norm, self.mlp_norm = nn.LayerNorm(512), nn.LayerNorm(512)
        self.attn_qkv, self.attn_out = xavier_linear(512, 3 * 512, bias=False), xavier_linear(512, 512)
        self.mlp_in, self.mlp_out = xavier_linear(512, 2048), xavier_linear(2048, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.attn_qkv(self.attn_norm(x)).chunk(3, dim=2)  # [b, n, 512] each
        x = x + self.attn_out(attention(query, key, value, self.causal))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


# === decision transformer [shared] ====================================================================================
class Trajectory(nn.Module):
    """A causal transformer over steps of play. Each step is three tokens: return-to-go, stack and action."""

    def __init__(self, channels: int, games: int, steps: int):
        super().__init__()
        self.spatial_embed = nn.Parameter(torch.randn(games, channels * 6 * 6))  # N(0, 1), as in the original code
        self.spatial_norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU())
        self.action_embed = nn.Parameter(torch.randn(18, 512))  # E, for all games
        self.rtg_embed = nn.Linear(1, 512)  # V, v
        self.blocks = nn.Sequential(*(Block(causal=True) for _ in range(4)))
        self.out_norm = nn.LayerNorm(512)
        self.register_buffer("position", sin_cos(torch.arange(3 * steps), 512), persistent=False)  # P
        self.register_buffer("largest_return", torch.full((games,), -math.inf))  # in training; zero-shot play's target

    def features(self, maps: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        """g: maps [b, c, 6, 6], game_id [b] -> [b, 512]"""
        embed = F.embedding(game_id, self.spatial_embed).view(maps.shape)  # [b, c, 6, 6]
        return self.mlp(self.spatial_norm((maps * embed).mean((2, 3))))

    def forward(self, features: torch.Tensor, action: torch.Tensor, return_to_go: torch.Tensor) -> torch.Tensor:
        """Features [b, t, 512], action and scaled return_to_go [b, t] of t <= `steps` steps -> x at s_j [b, t, 512]"""
        returns = self.rtg_embed(return_to_go[..., None])  # r [b, t, 512]
        actions = F.embedding(action, self.action_embed)  # e [b, t, 512]
        tokens = torch.stack([returns, features, actions], 2).flatten(1, 2)  # [b, 3t, 512]
        return self.out_norm(self.blocks(tokens + self.position[: tokens.shape[1]]))[:, 1::3]


# === policy ===========================================================================================================
class Policy(nn.Module):
    """The networks of a checkpoint, which play episodes of one game side by side"""

    def __init__(self, content: dict, precision: torch.autocast):
        super().__init__()
        self.args = content["args"]
        self.precision = precision  # autocast, for f alone
        self.is_dt = "action_embed" in content["neck"]
        self.backbone = ResNet(self.args["width_multiplier"], self.args["blocks"])  # f
        size = self.backbone.channels, len(DQN_REPLAY_GAMES)
        self.neck = Trajectory(*size, self.args["context_steps"]) if self.is_dt else Neck(*size)  # g
        self.atoms = content["head"]["weight"].unflatten(2, (18, -1)).shape[3]  # 1 if the outputs are the values
        self.head = GameLinear(len(DQN_REPLAY_GAMES), 512, 18 * self.atoms)  # h
        for name, part in self.named_children():
            part.load_state_dict(content[name])

    def forward(self, *step: np.ndarray) -> np.ndarray:
        """Action values [n, 18] by the stacks, indices, last actions and last rewards that `play_episodes` gives"""
        stacks, which, actions, rewards = (torch.from_numpy(values).to(self.head.weight.device) for values in step)
        game_id = torch.full((len(stacks),), self.game_id, device=stacks.device)
        with self.precision:
            maps = self.backbone(stacks / 255)  # [n, 2048, 6, 6]
        maps = maps.float()  # the rest is in fp32: the values of actions often differ by less than bfloat16 resolves
        features = self.neck.features(maps, game_id) if self.is_dt else self.neck(maps, game_id)  # [n, 512]
        if self.is_dt:
            if self.history:  # the last step's action and reward are known now
                self.history[-1][1][which] = actions
                self.return_to_go[which] -= rewards.sign().float()
            else:
                self.return_to_go = self.neck.largest_return[self.game_id].repeat(len(which))  # R [episodes]
            s = torch.zeros(len(self.return_to_go), 512, device=stacks.device)  # 0 for episodes that have ended
            s[which] = features
            step = s, which.new_zeros(len(s)), self.return_to_go.clone()
            self.history = [*self.history, step][-self.args["context_steps"] :]
            s, a, R = (torch.stack(steps, 1)[which] for steps in zip(*self.history, strict=True))  # [n, t, ...]
            features = self.neck(s, a, self.args["return_scale"] * R)[:, -1]  # x at s_t [n, 512]
        values = self.head(features, game_id).unflatten(1, (18, -1))  # [n, 18, atoms]
        if self.atoms > 1:
            z = torch.linspace(-self.args["max_return"], self.args["max_return"], self.atoms, device=stacks.device)
            values = (values.softmax(2) * z).sum(2, keepdim=True)  # Q = sum_j z_j p_j
        return values.squeeze(2).cpu().numpy()


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


# === zero-shot play ===================================================================================================
MAY_CHANGE = "checkpoint games device results overwrite video".split()  # after a result


def from_authors(content: dict, path: Path) -> dict:
    """A checkpoint of the original authors in the form of ours"""
    names = """spatial_embed.weight spatial_embed, weights.weight weight, biases.weight bias, act_embedder.weight
        action_embed, rtg_embedder rtg_embed, transformer_encoder.layers blocks, 0.norm attn_norm, 0.fn.to_qkv attn_qkv,
        0.fn.to_out.0 attn_out, 1.norm mlp_norm, 1.fn.net.0 mlp_in, 1.fn.net.3 mlp_out"""  # parts of theirs, and ours
    for part in ("neck", "head"):
        for theirs, ours in map(str.split, names.split(",")):
            content[part] = {name.replace(theirs, ours): value for name, value in content[part].items()}
    content["head"]["weight"] = content["head"]["weight"].unflatten(1, (512, -1))
    if "max_rtg" in content:
        content["neck"].pop("pos_embed")
        content["neck"]["largest_return"] = torch.tensor([content["max_rtg"].get(i, -math.inf) for i in range(60)])
    args = {"width_multiplier": 1.0, "blocks": (3, 4, 6, 3), "context_steps": 8, "return_scale": 0.01, "max_return": 10}
    return content | {"objective": path.absolute().parent.name, "games": ID_GAMES, "args": args}


def evaluate(args: Args) -> None:
    if min(args.eval_episodes, args.max_episode_steps) < 1:
        raise SystemExit("--eval-episodes and --max-episode-steps must be at least 1.")
    device, precision = set_up_device(args.device, args.precision, compiles=False)
    content = load_checkpoint(args.checkpoint)
    try:
        facts = describe(content, ("backbone", "neck", "head")) | {"data": None}  # as nothing is fine-tuned
        content = content if "args" in content else from_authors(content, args.checkpoint)
        policy = Policy(content, precision).to(device).eval()
    except (KeyError, RuntimeError) as error:
        raise SystemExit(f"{args.checkpoint} holds no policy. BC, DT and CQL learn one.") from error
    for game in dict.fromkeys(parse_game(name, content["games"]) for name in args.games) or content["games"]:
        policy.game_id, policy.history = DQN_REPLAY_GAMES.index(game), []
        if policy.is_dt and policy.neck.largest_return[policy.game_id].isinf():
            raise SystemExit(f"{args.checkpoint} has seen nothing of {game}: choose other --games.")
        result, plain_args = find_result(args, "zeroshot", args.method or content["objective"], game, facts)
        if result.exists() and not args.overwrite:
            continue
        result.unlink(missing_ok=True)  # with --overwrite: so that a run that is cut off leaves no old one
        with torch.no_grad():
            scores, film = play_episodes(game, policy, args)
        save_result(result, game, scores, plain_args)
        if args.video:  # at the game's speed
            gif = result.with_suffix(".gif")
            film[0].save(gif, save_all=True, append_images=film[1:], duration=1000 / 15, loop=0)


if __name__ == "__main__":
    evaluate(tyro.cli(Args, description=__doc__))
