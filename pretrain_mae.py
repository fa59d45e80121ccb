# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""MAE, the masked autoencoder (He et al., arXiv 2111.06377), on a ResNet: pre-trains a ResNet-50 on Atari images.

The ResNet-50 f turns a stack of frames into a map of 6 x 6 cells. 33 of the 36 cells are hidden. From the other 3 a
transformer reconstructs the pixels of all. o is a stack, and o~ the same augmented by a random shift and a random
intensity. p are the visible cells, drawn at random:

    x = cells of f(o~), weighted by game, through an MLP, plus their positions     36 tokens
    z = Encoder([cls, x_p])                                                        attends to the visible tokens
    y = Decoder(z in their places, a mask token in all others, plus positions)     attends to all tokens
    loss = mean over all pixels of (y - o)^2

He et al. hide 75% of the patches from the whole encoder. Here f sees every pixel; only the transformer does not. Their
loss is on hidden patches alone. Their target is the image that was masked; here it is the one before augmentation.
Data, network and schedule are those of the Atari Pre-training Benchmark (arXiv 2406.06037).

    python pretrain_mae.py --batch-size 16 --total-steps 100    # smoke test: plays 1,000 random steps of each game
    python pretrain_mae.py --data-dir /data/dqn_replay          # the benchmark: 50 games, 10M frames, 100 epochs
    torchrun --nproc-per-node 8 pretrain_mae.py --data-dir /data/dqn_replay
"""

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
    weight_decay: float = 0.05  # AdamW's, for all parameters
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's decay rates
    adam_eps: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float = math.inf  # gradients are clipped to this L2 norm; inf turns clipping off
    mask_ratio: float = 0.9  # share of the 36 cells that is hidden; 0.9 leaves 3 visible
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


# === objective: MAE ===================================================================================================
class Objective(Method):
    """Masked autoencoder."""

    name = "mae"

    def __init__(self, args: Args):
        super().__init__()
        self.length = HISTORY + 1
        self.keep = max(1, int(36 * (1 - args.mask_ratio)))  # visible cells
        self.backbone = ResNet(args.width_multiplier, args.blocks)  # f
        self.neck = Encoder(self.backbone.channels, len(DQN_REPLAY_GAMES))  # its place in a checkpoint is the neck's
        self.head = Decoder(len(DQN_REPLAY_GAMES), [Block() for _ in range(3)])

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        stacks = stack_frames(batch["frames"], batch["is_first"])  # [b, 1, 4, 84, 84]
        obs = augment(stacks).squeeze(1)  # o~ [b, 4, 84, 84]
        target = stacks.squeeze(1) / 255  # o [b, 4, 84, 84]
        return self.loss(obs, target, batch["game_id"], draw_noise(obs))

    def reconstruct(self, obs, game_id, noise):
        """obs [b, 4, 84, 84] -> pixels [b, 4, 84, 84], and which of them were masked [b, 1, 84, 84]"""
        x = self.neck.tokens(self.backbone(obs), game_id)  # [b, 36, 512]
        visible, ids_restore = random_masking(x, self.keep, noise)  # x_p [b, keep, 512], [b, 36]
        z = self.neck(visible)  # [b, 1 + keep, 512]
        tokens = self.head.unshuffle(z, ids_restore)  # z in their places, mask tokens in all others [b, 37, 512]
        y = self.head(tokens, game_id)  # [b, 4, 84, 84]
        return y, masked_pixels(ids_restore, self.keep)

    def loss(self, obs, target, game_id, noise):  # the formula above
        pixels, masked = self.reconstruct(obs, game_id, noise)
        error = (pixels - target).square().mean(1, keepdim=True)  # over the 4 frames [b, 1, 84, 84]
        masked_error = (error * masked).sum() / masked.sum().clamp(min=1)
        return error.mean(), {"masked_error": masked_error}

    @torch.no_grad()
    def picture(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The first samples' last frames: input, masked input, reconstruction [1, 8 * 84, 3 * 84]"""
        stacks = stack_frames(batch["frames"][:8], batch["is_first"][:8]).squeeze(1) / 255  # [8, 4, 84, 84]
        pixels, masked = self.reconstruct(stacks, batch["game_id"][:8], draw_noise(stacks))
        columns = torch.cat([stacks, stacks.masked_fill(masked, 0.5), pixels], 3)  # [8, 4, 84, 3 * 84]
        return columns[:, -1].flatten(0, 1).clamp(0, 1)[None]


# === masked autoencoder [shared] ======================================================================================
class Encoder(nn.Module):
    """Makes tokens of the ResNet's 36 cells, and applies a transformer to the visible ones."""

    def __init__(self, channels: int, games: int):
        super().__init__()
        self.spatial_embed = nn.Parameter(torch.randn(games, channels * 6 * 6))  # N(0, 1), as in the original code
        self.mlp = nn.Sequential(nn.Linear(channels, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU())
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 512))
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.norm = nn.LayerNorm(512)
        self.register_buffer("position", grid_position(), persistent=False)

    def tokens(self, maps: torch.Tensor, game_id: torch.Tensor) -> torch.Tensor:
        """maps [b, c, 6, 6], game_id [b] -> [b, 36, 512]"""
        embed = F.embedding(game_id, self.spatial_embed).view(maps.shape)  # [b, c, 6, 6]
        return self.mlp((maps * embed).flatten(2).mT) + self.position

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[b, n, 512] -> [b, 1+n, 512]; the first one is the cls token"""
        cls = self.cls_token.expand(len(tokens), -1, -1)
        return self.norm(self.blocks(torch.cat([cls, tokens], 1)))


class Decoder(nn.Module):
    """Reconstructs all pixels from the tokens of a few cells, by transformer blocks and a linear layer for each game"""

    def __init__(self, games: int, blocks: list[nn.Module]):
        super().__init__()
        self.embed = nn.Linear(512, 512)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 512))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(512)
        # 784 = 4 frames x 14 x 14 pixels. The standard deviation is the original code's.
        self.recon_weight = nn.Parameter(torch.randn(games, 512, 784) * (2 / math.sqrt(512 + 784)))
        self.recon_bias = nn.Parameter(torch.zeros(games, 784))
        self.register_buffer("position", F.pad(grid_position(), (0, 0, 1, 0)), persistent=False)  # cls: 0

    def unshuffle(self, encoded: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """Encoded tokens [b, 1+n, 512] back in their places, and mask tokens in all others -> [b, 37, 512]"""
        cls, visible = F.relu(self.embed(encoded)).tensor_split([1], 1)
        hidden = self.mask_token.expand(len(visible), 36 - visible.shape[1], -1)
        shuffled = torch.cat([visible, hidden], 1)  # [b, 36, 512]
        cells = shuffled.take_along_dim(ids_restore[..., None], dim=1)
        return torch.cat([cls, cells], 1) + self.position

    def forward(self, x: torch.Tensor, game_id: torch.Tensor, *memory: torch.Tensor) -> torch.Tensor:
        """x [b, 37, 512], game_id [b] and further inputs of the blocks -> pixels [b, 4, 84, 84]"""
        for block in self.blocks:
            x = block(x, *memory)
        cells = self.norm(x)[:, 1:]  # [b, 36, 512], without cls
        patches = game_linear(cells, game_id, self.recon_weight, self.recon_bias).float()  # [b, 36, 784]
        patches = patches.view(-1, 6, 6, 4, 14, 14)  # row and column of the cell, frame, row and column of the pixel
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, 4, 84, 84)


def grid_position() -> torch.Tensor:
    """Codes of the 36 cells' columns and rows -> [36, 512]"""
    cells = torch.arange(36)  # row by row
    return torch.cat([sin_cos(cells % 6, 256), sin_cos(cells // 6, 256)], 1)


def draw_noise(stacks: torch.Tensor) -> torch.Tensor:
    """Uniform noise [b, 36] for `random_masking`. Every process draws for all samples and takes its part."""
    return torch.rand(WORLD_SIZE * len(stacks), 36, device=stacks.device).chunk(WORLD_SIZE)[RANK]


def random_masking(tokens: torch.Tensor, keep: int, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps `keep` random tokens of each sample, those with the least noise [b, 36].

    tokens [b, 36, 512] -> visible tokens [b, keep, 512], ids_restore [b, 36]: each cell's place in the random order
    """
    ids_shuffle = noise.argsort(1)  # [b, 36]
    ids_restore = ids_shuffle.argsort(1)
    ids_keep = ids_shuffle[:, :keep]
    return tokens.take_along_dim(ids_keep[..., None], dim=1), ids_restore


def masked_pixels(ids_restore: torch.Tensor, keep: int) -> torch.Tensor:
    """The pixels of the cells that are not kept, bool [b, 1, 84, 84]"""
    masked = (ids_restore >= keep).view(-1, 1, 6, 6)
    return masked.repeat_interleave(14, 2).repeat_interleave(14, 3)


# === linear layer of each game [shared] ===============================================================================
def game_linear(x: torch.Tensor, game_id: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A linear layer for each game, y = x W_g + b_g: x [b, n, d], weight [games, d, a], bias [games, a] -> [b, n, a]

    Samples are sorted by game into pages of equal size, so that a page needs one matrix: one for each sample would
    take 800 MB.
    """
    b = len(x)
    games = len(weight)
    size = max(1, b // games)  # samples on a page
    same_game = game_id[:, None] == torch.arange(games, device=x.device)  # [b, games]
    place = (same_game.cumsum(0) * same_game).sum(1) - 1  # [b], a sample's number among those of its game
    pages = (same_game.sum(0) + size - 1) // size  # [games], pages that each fills
    end = pages.cumsum(0)
    slot = size * (end - pages)[game_id] + place  # [b]
    total = min(b, b // size + games)  # the most pages there can be, so that shapes never change
    page_game = torch.searchsorted(end, torch.arange(total, device=x.device), right=True).clamp(max=games - 1)
    paged = x.new_zeros(total * size, *x.shape[1:]).index_copy(0, slot, x)
    matrices = F.embedding(page_game, weight.flatten(1)).view(total, *weight.shape[1:])  # [total, d, a]
    y = torch.bmm(paged.view(total, -1, x.shape[2]), matrices)  # [total, size * n, a]
    return y.view(total * size, x.shape[1], -1)[slot] + F.embedding(game_id, bias)[:, None]


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
