# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "torchvision==0.29.1", "gymnasium==1.4.0", "ale-py==0.12.1", "numpy==2.4.6",
#   "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2", "pillow==13.0.0"]
# ///
"""MAE, the masked autoencoder (He et al., arXiv 2111.06377), on a ResNet: pre-trains a ResNet-50 on Atari images.

The ResNet-50 f turns a stack of frames into 6 x 6 cells. 90% of the cells are hidden; from the others a transformer
reconstructs the pixels of all. p is a random choice of 3 cells, o a stack, o~ its augmented (randomly shifted and
scaled) version:

    x = cells of f(o~), each through an MLP, plus its position                     36 tokens
    z = Encoder([cls, x_p])                                                        attends to the visible tokens
    y = Decoder(z in their places, a mask token in all others, plus positions)     attends to all tokens
    loss = mean over all pixels of (y - o)^2

He et al. hide 75% of the patches from the whole encoder, and their loss is on hidden patches alone.
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
import signal
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache
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

# === processes and precision [shared] =================================================================================
RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1  # number of this process, its number on this machine, number of processes
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process
    RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16 if `precision` is bf16, or is auto and the hardware has instructions for it."""
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16" or (precision == "auto" and native))


# === arguments ========================================================================================================
@dataclass
class Args:
    total_steps: int = 1_953_125  # optimizer steps; the default is 100 epochs of 10M samples
    batch_size: int = 512  # samples in a step, summed over all processes
    learning_rate: float = 3e-4  # of AdamW, after the warm-up
    weight_decay: float = 0.05  # of AdamW, for all parameters
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    adam_eps: float = 1e-8  # of AdamW
    max_grad_norm: float = math.inf  # gradients are clipped to this L2 norm; inf turns clipping off
    mask_ratio: float = 0.9  # share of the 36 cells that is hidden
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
    eval_every: int = 10_000  # steps between evaluations on 10 batches of held-out samples, and one at the end
    save_every: int = 2_000  # steps between checkpoints, and one at the end and on Ctrl-C or SIGTERM


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
    """ResNet-50 (1512.03385) without max-pool, named as in torchvision: [b, 4, 84, 84] -> [b, channels, 6, 6]"""

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
        x = x + self.attn_out(attention(*self.attn_qkv(self.attn_norm(x)).chunk(3, 2), self.causal))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


# === masked autoencoder [shared] ======================================================================================
CELLS = torch.arange(36)  # the 6 x 6 cells, row by row
POSITION = torch.cat([sin_cos(CELLS % 6, 256), sin_cos(CELLS // 6, 256)], 1)  # [36, 512], codes of column and row


class Encoder(nn.Module):
    """Makes tokens of the ResNet's 36 cells, and applies a transformer to the visible ones."""

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
        """[b, n, 512] -> [b, 1+n, 512]; the first one is the cls token"""
        return self.norm(self.blocks(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)))


class Decoder(nn.Module):
    """Reconstructs all pixels from the tokens of a few cells, by transformer blocks and a linear layer for each game"""

    def __init__(self, games: int, blocks: list[nn.Module]):
        super().__init__()
        self.embed, self.mask_token = nn.Linear(512, 512), nn.Parameter(torch.zeros(1, 1, 512))
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(512)
        self.recon_weight = nn.Parameter(torch.randn(games, 512, 784) * (2 / math.sqrt(512 + 784)))
        self.recon_bias = nn.Parameter(torch.zeros(games, 784))
        self.register_buffer("position", F.pad(POSITION, (0, 0, 1, 0)), persistent=False)  # cls: 0

    def tokens(self, encoded: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """Encoded tokens [b, 1+n, 512] in their places, by `mask`'s rank [b, 36], and mask tokens in all others"""
        cls, seen = F.relu(self.embed(encoded)).tensor_split([1], 1)
        cells = torch.cat([seen, self.mask_token.expand(len(seen), 36 - seen.shape[1], -1)], 1)  # [b, 36, 512], by rank
        cells = cells.gather(1, rank[..., None].expand(-1, -1, 512))  # [b, 36, 512], by place
        return torch.cat([cls, cells], 1) + self.position  # [b, 37, 512]

    def forward(self, x: torch.Tensor, game_id: torch.Tensor, *memory: torch.Tensor) -> torch.Tensor:
        """x [b, 37, 512], game_id [b] and further inputs of the blocks -> pixels [b, 4, 84, 84]"""
        for block in self.blocks:
            x = block(x, *memory)
        cells = game_linear(self.norm(x)[:, 1:], game_id, self.recon_weight, self.recon_bias).float()  # [b, 36, 784]
        return cells.view(-1, 6, 6, 4, 14, 14).permute(0, 3, 1, 4, 2, 5).reshape(-1, 4, 84, 84)


def game_linear(x: torch.Tensor, game_id: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A linear layer for each game, y = x W_g + b_g: x [b, n, d], weight [games, d, a], bias [games, a] -> [b, n, a]

    Samples of a game share pages, and a page needs one matrix product. A matrix for each sample would take 800 MB, and
    all games' matrices on all samples a third of the ResNet's operations.
    """
    b, games = len(x), len(weight)
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


def mask(tokens: torch.Tensor, keep: int, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps the `keep` tokens of each sample with the least noise [b, 36], which is uniform unless it is given.

    tokens [b, 36, 512] -> kept tokens [b, keep, 512], rank [b, 36]: a cell's place in the order by noise
    """
    if noise is None:
        noise = torch.rand(WORLD_SIZE * len(tokens), 36, device=tokens.device).chunk(WORLD_SIZE)[RANK]
    order = noise.argsort(1)  # [b, 36]
    return tokens.gather(1, order[:, :keep, None].expand(-1, -1, 512)), order.argsort(1)


def pixel_loss(target: torch.Tensor, pixels: torch.Tensor, masked: torch.Tensor):
    """Mean squared error over all pixels and, as a metric, over masked ones: [b, 4, 84, 84] twice, [b, 1, 84, 84]"""
    error = (pixels - target).square().mean(1, keepdim=True)  # [b, 1, 84, 84]
    return error.mean(), {"masked_error": (error.detach() * masked).sum() / masked.sum().clamp(min=1)}


# === frame stacks and augmentation [shared] ===========================================================================
HISTORY = 3  # a stack is a row's frame and the frames of the 3 rows before it


def stack_frames(frames: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
    """Every stack of 4 consecutive frames in windows of rows, oldest first; frames of an earlier episode are zeroed.

    frames uint8 [b, 3+n, 84, 84], is_first bool [b, 3+n] -> uint8 [b, n, 4, 84, 84]
    """
    episode = is_first.unfold(1, 4, 1).cumsum(-1)  # [b, n, 4], episodes that began within the stack, up to this frame
    same = episode == episode[..., -1:]  # frames of the same episode as the stack's last frame
    return frames.unfold(1, 4, 1).movedim(-1, 2) * same[..., None, None]


def augment(stacks: torch.Tensor) -> torch.Tensor:
    """Random shift (repeats the edge) and intensity, one draw a sample: uint8 [b, n, 4, 84, 84] -> float32, 0 to 1.1"""
    b, device = len(stacks), stacks.device
    # Every process draws for all samples and takes its part, so that any number of processes computes the same.
    shift = torch.randint(-4, 5, (WORLD_SIZE * b, 2, 1), device=device).chunk(WORLD_SIZE)[RANK]
    rows, columns = (torch.arange(84, device=device) + shift).clamp(0, 83).unbind(1)  # [b, 84] each
    sample = torch.arange(b, device=device)[:, None, None]
    pixels = stacks.permute(0, 3, 4, 1, 2)[sample, rows[:, :, None], columns[:, None, :]]  # [b, 84, 84, n, 4]
    noise = torch.randn(WORLD_SIZE * b, 1, 1, 1, 1, device=device).chunk(WORLD_SIZE)[RANK].clamp(-2, 2)
    return (pixels * ((1 + 0.05 * noise) / 255)).permute(0, 3, 4, 1, 2)


# === random numbers [shared] ==========================================================================================
def seed_step(seed: int, step: int) -> None:
    """Makes PyTorch's random numbers a function of both, mixed: its CPU generator uses 32 bits of a seed only."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


# === objective: MAE ===================================================================================================
class Objective(nn.Module):
    def __init__(self, args: Args):
        super().__init__()
        self.length = HISTORY + 1  # rows of a sample
        self.keep = max(1, int(36 * (1 - args.mask_ratio)))  # visible cells
        self.backbone = ResNet(args.width_multiplier, args.blocks)  # f
        self.neck = Encoder(self.backbone.channels, len(DQN_REPLAY_GAMES))
        self.head = Decoder(len(DQN_REPLAY_GAMES), [Block() for _ in range(3)])

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics of a batch, as `unpack` returns it."""
        stacks = stack_frames(batch["frames"], batch["is_first"])  # o [b, 1, 4, 84, 84]
        return self.loss(augment(stacks).squeeze(1), stacks.squeeze(1) / 255, batch["game_id"])  # of o~ and o

    def reconstruct(self, obs, game_id, noise=None):
        """obs [b, 4, 84, 84] -> pixels [b, 4, 84, 84], and which of them were masked [b, 1, 84, 84]"""
        seen, rank = mask(self.neck.tokens(self.backbone(obs), game_id), self.keep, noise)  # x_p [b, keep, 512]
        tokens = self.head.tokens(self.neck(seen), rank)  # z in their places, mask tokens in others [b, 37, 512]
        masked = (rank >= self.keep).view(-1, 1, 6, 6).repeat_interleave(14, 2).repeat_interleave(14, 3)
        return self.head(tokens, game_id), masked

    def loss(self, obs, target, game_id, noise=None):
        return pixel_loss(target, *self.reconstruct(obs, game_id, noise))

    @torch.no_grad()
    def picture(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The first samples' last frames: input, masked input, reconstruction [1, 8 * 84, 3 * 84]"""
        stacks = stack_frames(batch["frames"][:8], batch["is_first"][:8]).squeeze(1) / 255  # [8, 4, 84, 84]
        pixels, masked = self.reconstruct(stacks, batch["game_id"][:8])
        columns = torch.cat([stacks, stacks.masked_fill(masked, 0.5), pixels], 3)  # [8, 4, 84, 3 * 84]
        return columns[:, -1].flatten(0, 1).clamp(0, 1)[None]


# === files [shared] ===================================================================================================
@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, unlike any other process's; the file is then renamed, so that `path` is whole or absent."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    yield temporary
    temporary.replace(path)


def make_folder(path: Path) -> None:
    """Makes a folder, or says that nothing can be written there: before the work, not after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({error.strerror}). Choose another folder.") from error


def expand_user(args) -> None:
    """In `--cache-dir=~/x` the shell leaves the ~ as it is."""
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, value.expanduser())


# === games [shared] ===================================================================================================
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
# The first rows of a replay checkpoint, which is four gzipped .npy files, are prepared once as a shard, a file of ROWs.
FIELDS = [("is_first", "?"), ("action", "u1"), ("reward", "i1"), ("terminal", "?"), ("return_to_go", "<f4")]
ROW = np.dtype([("frame", "u1", (84, 84)), *FIELDS])  # 7,064 bytes; is_first marks an episode's first row
PADDING = 3  # blank rows before every episode in the dataset


def read_npy(path: Path, rows: float, most: float = math.inf) -> np.ndarray:
    """The first `rows` rows of a gzipped .npy, the rest not decompressed; checks that they are integers to `most`."""
    try:
        with gzip.open(path) as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            (total, *shape), fortran_order, dtype = read_header(file)
            if fortran_order and shape:
                raise ValueError("its array is in Fortran order, not in C order")
            count = int(min(rows, total))
            content = file.read(count * math.prod(shape) * dtype.itemsize)
            file.read(1)  # if that was all, this compares the file's checksum
        values = np.frombuffer(content, dtype).reshape(count, *shape)
        if most < math.inf and not (np.array_equal(values, values.astype(np.uint8)) and values.max() <= most):
            raise ValueError(f"it holds {dtype} from {values.min()} to {values.max()}, not integers from 0 to {most}")
        return values
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SystemExit(f"{path} cannot be read ({error}). If it is damaged, download it again.") from error


def save_shard(path: Path, rows: int, frame: np.ndarray, action: np.ndarray, reward: np.ndarray, terminal: np.ndarray):
    """Writes the first `rows` rows as a shard. Rewards and terminals may have more rows, for the returns-to-go."""
    reward, terminal = np.sign(np.nan_to_num(reward.astype(np.float32))), terminal.astype(bool)
    to_end = np.append(reward[::-1].cumsum()[::-1], 0)  # sum of the rewards of a row and of all later rows
    last = np.append(np.flatnonzero(terminal), len(reward) - 1)  # last rows of the episodes
    return_to_go = to_end[:rows] - to_end[1 + last[np.searchsorted(last, np.arange(rows))]]
    reward, terminal = reward[:rows], terminal[:rows]

    blank = ~frame.any((1, 2)) & (action == 0) & (reward == 0) & ~terminal
    padding = np.full(rows, False)
    padding[:PADDING] = np.logical_and.accumulate(blank[:PADDING])  # the rows may begin amid padding
    for first in np.flatnonzero(terminal) + 1:
        padding[first : first + PADDING] = blank[first : first + PADDING].all()
    shard = np.zeros(HISTORY + np.count_nonzero(~padding), ROW)
    columns = dict(frame=frame, action=action, reward=reward, terminal=terminal, return_to_go=return_to_go)
    for name, column in columns.items():
        shard[name][HISTORY:] = column[~padding]
    shard["is_first"][1:] = shard["terminal"][:-1]
    shard["is_first"][HISTORY : HISTORY + 1] = padding[0]  # a slice, as there may be no such row
    with whole_file(path) as temporary:
        shard[0 if padding[0] else HISTORY :].tofile(temporary)  # blank rows only before an episode's first row


def game_folder(data_dir: Path, game: str) -> Path:
    return data_dir / "".join(word.capitalize() for word in game.split("_"))


def find_files(args, game: str, run: int, checkpoint: int) -> list[Path]:
    """A checkpoint's files, as the bucket names them or as Atari-PB's and SGI's download scripts do."""
    folder = game_folder(args.data_dir, game)
    stand_ins = [n for n in (49, 48) if n not in args.checkpoints] if checkpoint == 50 else []  # a few runs lack 50
    for n in (checkpoint, *stand_ins):
        for layout in (f"{run}/replay_logs/$store$_%s_ckpt.{n}.gz", f"%s_{run}_{n}.gz"):
            files = [folder / (layout % field) for field in ("observation", "action", "reward", "terminal")]
            if all(file.exists() for file in files):
                if n != checkpoint:
                    print(f"{game}: checkpoint {n} of run {run} stands in for checkpoint {checkpoint}.", flush=True)
                return files
    raise SystemExit(f"{folder} lacks files of run {run}, checkpoint {checkpoint}. Where to get them: docs/data.md")


def prepare_shard(args, rows: int, game: str, run: int, checkpoint: int) -> Path:
    """The shard of a checkpoint's first `rows` rows; it is made unless the cache has it."""
    files = find_files(args, game, run, checkpoint)
    versions = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    path = args.cache_dir / f"{game}_{run}_{checkpoint}_{rows}_{zlib.crc32(repr(versions).encode()):08x}.bin"
    if not path.exists():
        frame, action = read_npy(files[0], rows, most=255), read_npy(files[1], rows, most=17)
        reward, terminal = read_npy(files[2], math.inf), read_npy(files[3], math.inf, most=1)
        reward, terminal = reward[:-1], terminal[:-1]  # the last row may be stale
        if frame.size != rows * 84 * 84 or not 0 < len(action) == rows <= len(reward) == len(terminal):
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
        frames, numbers = np.zeros((rows, 84, 84), np.uint8), np.zeros((3, rows), int)
        for row in range(rows):
            frames[row], action = stack[0, -1], rng.integers(env.single_action_space.n)
            stack, reward, terminated, truncated, _ = env.step(np.array([action]))
            numbers[:, row] = action, reward[0], terminated[0] or truncated[0]
        save_shard(path, rows, frames, *numbers)
    return path


def prepare(args, games: list[str], rows: int) -> tuple[list[tuple[int, Path]], str]:
    """(game_id, path) of the games' shards, and where their data comes from: own play, if there is no args.data_dir."""
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(rows, game, run, checkpoint) for game in games for run in args.runs for checkpoint in args.checkpoints]
    make, sources = prepare_shard, set()
    if args.data_dir is None:
        jobs = [(args.play_rows, game) for game in games]
        make, sources = play_shard, {"random_play"}
        print(f"No --data-dir: this is a smoke test on {args.play_rows:,} rows of random play a game.", flush=True)
    else:
        for game in games:
            note = game_folder(args.data_dir, game) / "source.txt"  # by download_data.py and Rainbow's recordings
            sources.add(note.read_text().strip() if note.exists() else "dqn_replay")
    if not jobs or rows < 1:
        raise SystemExit("There must be at least one of --runs, one of --checkpoints and one row to read of each.")
    paths = thread_map(lambda job: make(args, *job), jobs, desc="preparing data", leave=False)
    game_ids = [DQN_REPLAY_GAMES.index(game) if game in DQN_REPLAY_GAMES else 0 for _, game, *_ in jobs]  # far-OOD: 0
    return list(zip(game_ids, paths, strict=True)), "+".join(sorted(sources))


# === windows [shared] =================================================================================================
class Windows:
    """Batches of windows, which are `length` consecutive rows of a shard: one read each. Each epoch has a new order.

    `part` is "held_out", the last 1% of each shard's windows, or "train", the windows that share no row with those.
    """

    def __init__(self, shards: list[tuple[int, Path]], length: int, batch_size: int, seed: int, part: str):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 2 * len(shards) + 100 > most != resource.RLIM_INFINITY:  # twice: for training and held-out samples
            raise SystemExit(f"{len(shards)} shards are too many for {most} open files: raise `ulimit -Hn`.")
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.files = [os.open(path, os.O_RDONLY) for _, path in shards]
        self.game_ids = torch.tensor([game_id for game_id, _ in shards])
        self.shape = length, ROW.itemsize  # of a window
        windows = np.array([path.stat().st_size // ROW.itemsize for _, path in shards]) - length + 1
        held_out = np.ceil(windows * 0.01).astype(int)
        counts = {"train": windows - held_out - length + 1, "held_out": held_out}[part]
        first = windows - held_out if part == "held_out" else 0  # row of a shard's first window
        self.ends = counts.cumsum()
        self.offset = first + counts - self.ends  # window i of all shards is at row i + offset[shard]
        self.size = int(self.ends[-1])
        self.epoch_order = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(self.size))
        if counts.min() < 1 or self.size < (batch_size if part == "train" else WORLD_SIZE):
            raise SystemExit(f"Too few {part} samples of {length} rows: use more rows or lower --batch-size.")
        self.batch_size = min(batch_size, self.size // WORLD_SIZE * WORLD_SIZE)  # held-out samples may be fewer
        self.batches = self.size // self.batch_size  # in an epoch

    def batch(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's part of batch i, which seed and i alone decide: rows uint8 [b, length, 7064], game_id [b]"""
        epoch, i = divmod(i, self.batches)
        window = self.epoch_order(epoch)[i * self.batch_size : (i + 1) * self.batch_size]
        window = np.split(window, WORLD_SIZE)[RANK]
        shard = np.searchsorted(self.ends, window, side="right")
        rows = torch.empty((len(window), *self.shape), dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
        for sample, s, row in zip(rows.numpy(), shard.tolist(), (window + self.offset[shard]).tolist(), strict=True):
            if os.preadv(self.files[s], [sample], row * ROW.itemsize) != sample.nbytes:
                raise SystemExit("A shard in --cache-dir is cut short. Delete that folder: it will be made again.")
        return rows, self.game_ids[shard]


def unpack(rows: torch.Tensor, game_id: torch.Tensor, device: torch.device | str) -> dict[str, torch.Tensor]:
    """A batch of `Windows` on the device: frames uint8 [b, length, 84, 84], ROW's fields [b, length], game_id [b]"""
    rows, game_id = rows.to(device, non_blocking=True), game_id.to(device, non_blocking=True)
    frames, is_first, action, reward, terminal, return_to_go = rows.split([84 * 84, 1, 1, 1, 1, 4], dim=2)
    return {
        "frames": frames.unflatten(2, (84, 84)),
        "is_first": is_first.squeeze(2).bool(),
        "action": action.squeeze(2).long(),
        "reward": reward.squeeze(2).view(torch.int8),
        "terminal": terminal.squeeze(2).bool(),
        "return_to_go": return_to_go.view(torch.float32).squeeze(2),
        "game_id": game_id,
    }


def read_ahead(data: Windows, steps: range, threads: int):
    """(step, batch) of the steps in order. Threads read the next batches while one is used."""
    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(data.batch, step) for step in steps[:threads]]
        for step in steps:
            if step + threads in steps:
                pending.append(pool.submit(data.batch, step + threads))
            yield step, pending.pop(0).result()


# === learning-rate schedule [shared] ==================================================================================
def lr_multiplier(step: int, total_steps: int) -> float:
    """Rises linearly from 0.1 to 1 over the first 10% of the steps, then falls to 0.1 along a cosine."""
    warm_up = 0.1 * total_steps
    if step < warm_up:
        return 0.1 + 0.9 * step / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / (total_steps - warm_up)))


# === training [shared] ================================================================================================
MAY_CHANGE = """data_dir cache_dir num_workers device compile run_name resume overwrite log_every eval_every
    save_every""".split()  # when a run is resumed; all other arguments must stay


def train(args: Args) -> None:
    # The run's folder, the processes and the device
    args.games = list(dict.fromkeys(parse_game(name, DQN_REPLAY_GAMES) for name in args.games)) or ID_GAMES
    for name in ("total_steps", "batch_size", "play_rows", "num_workers", "log_every", "eval_every", "save_every"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1.")
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1"}.items():  # as other launchers set them
        if WORLD_SIZE == 1 and os.environ.get(name, "") not in ("", alone):
            raise SystemExit(f"{name} is {os.environ[name]!r}, but not set by torchrun. Use torchrun, or unset {name}.")
    if args.batch_size % WORLD_SIZE:
        raise SystemExit(f"--batch-size {args.batch_size} is not a multiple of {WORLD_SIZE} processes.")
    run_dir = Path("runs", args.run_name or f"{Path(__file__).stem}__{args.seed}")
    checkpoint = run_dir / "checkpoint.pt"
    if run_dir.exists() and args.resume == args.overwrite:
        raise SystemExit(f"{run_dir} exists. Choose --resume to continue it, --overwrite, or another --run-name.")
    device = torch.device(args.device)
    if WORLD_SIZE > 1 and args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD_SIZE > 1:  # two hours: the others wait while one prepares the data
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))

    # The objective and its data, which the first process of each machine prepares for the others
    torch.manual_seed(args.seed)
    objective = Objective(args).to(device)
    if args.compile or device.type == "cpu":  # on CUDA, group_norm is slow in this layout unless it is compiled
        objective.to(memory_format=torch.channels_last)
    if LOCAL_RANK > 0:
        dist.barrier()
    shards, source = prepare(args, args.games, args.rows_per_checkpoint)
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier()
    data = Windows(shards, objective.length, args.batch_size, args.seed, "train")
    held_out = Windows(shards, objective.length, args.batch_size, args.seed, "held_out")
    learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, args.learning_rate, args.betas, args.adam_eps, args.weight_decay, fused=True)

    # The arguments in plain types, as JSON and checkpoints have them, and the state of a run that is resumed
    plain_args = json.loads(json.dumps(asdict(args) | {"samples": data.size, "data": source}, default=str))
    start = 0
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        changed = {k: old for k, old in state["args"].items() if k not in MAY_CHANGE and plain_args.get(k) != old}
        if changed:
            raise SystemExit(f"{checkpoint} was trained with {changed}: resume with these, or choose --run-name.")
        for name, part in objective.named_children():
            part.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    model = torch.compile(objective) if args.compile else objective
    if WORLD_SIZE > 1:
        model = nn.parallel.DistributedDataParallel(model)
    precision = autocast(device, args.precision)

    if RANK == 0:
        for path in [*run_dir.glob("events.*"), checkpoint] if args.overwrite else ():  # now that all above has worked
            path.unlink(missing_ok=True)
        writer = SummaryWriter(run_dir, purge_step=start + 1)  # hides what was logged after the checkpoint
        (run_dir / "args.json").write_text(json.dumps(plain_args, indent=2))
        table = "".join(f"|{name}|{value}|\n" for name, value in plain_args.items())
        writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{table}")
        print(f"{run_dir}: {len(args.games)} games, {data.size:,} samples, {held_out.size:,} held out", flush=True)
    stops = []  # signals received: the first one ends the run after the step (under torchrun, at the next log)
    for number in (signal.SIGINT, signal.SIGTERM):  # the same signal again ends it at once
        signal.signal(number, lambda number, _: (stops.append(number), signal.signal(number, signal.SIG_DFL)))
    steps, done, recent, clock = range(start, args.total_steps), start, [], time.perf_counter()
    bar = tqdm(total=args.total_steps, initial=start, unit="step", disable=RANK > 0, dynamic_ncols=True)
    bar.set_postfix_str("compiling, about a minute" if args.compile else "")
    for step, batch in read_ahead(data, steps, args.num_workers):
        seed_step(args.seed, step)  # of augmentation: a run that is resumed draws the same
        optimizer.param_groups[0]["lr"] = args.learning_rate * lr_multiplier(step, args.total_steps)
        with precision:
            loss, metrics = model(unpack(*batch, device))
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(learned, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()  # here, so that the next forward pass can use the gradients' memory
        if hasattr(objective, "update_target"):  # an objective with momentum networks
            objective.update_target(step)
        recent.append(torch.stack([loss.detach(), grad_norm, *metrics.values()]))
        bar.update()

        done = step + 1
        last = done == args.total_steps
        logs, evaluates, saves = (last or done % n == 0 for n in (args.log_every, args.eval_every, args.save_every))
        if not (logs or evaluates or saves or (stops and WORLD_SIZE == 1)):
            continue  # without waiting for the device
        names = ["stops", "losses/loss", "losses/grad_norm", *(f"losses/{name}" for name in metrics)]
        values = [grad_norm.new_tensor([len(stops)]), torch.stack(recent).mean(0)]
        if evaluates:  # always on the same samples, augmented in the same way
            objective.eval()
            torch.manual_seed(0)
            results = []
            for i in range(min(10, held_out.batches)):
                with torch.no_grad(), precision:
                    loss, metrics = objective(unpack(*held_out.batch(i), device))
                results.append(torch.stack([loss, *metrics.values()]))
            objective.train()
            names += ["eval/loss", *(f"eval/{name}" for name in metrics)]
            values.append(torch.stack(results).mean(0))
        values = torch.cat(values)
        if WORLD_SIZE > 1:
            dist.all_reduce(values)  # all stop at the same step
        scalars = dict(zip(names, (values / WORLD_SIZE).tolist(), strict=True))
        stopped = scalars.pop("stops")
        if not math.isfinite(scalars["losses/loss"] + scalars["losses/grad_norm"]):
            raise SystemExit(f"Loss or gradient norm is not finite at step {done}: {scalars}. Last good: {checkpoint}")
        rate = len(recent) * args.batch_size / (time.perf_counter() - clock)  # samples per second, evaluations included
        scalars |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": rate}
        bar.set_postfix_str(f"loss {scalars['losses/loss']:.3f}, {rate:.0f} samples/s")
        if RANK == 0:
            for name, value in scalars.items():
                writer.add_scalar(name, value, done)
            if evaluates and hasattr(objective, "picture"):  # MAE and SiamMAE
                writer.add_image("eval/picture", objective.picture(unpack(*held_out.batch(0), device)), done)
            if saves or stopped:
                writer.flush()  # first, so that nothing before the checkpoint is missing from the charts
                name = getattr(objective, "name", Path(__file__).stem.removeprefix("pretrain_"))
                state = {"format": "atari-pb/1", "objective": name, "step": done, "args": plain_args}
                state |= {"games": args.games, "optimizer": optimizer.state_dict()}
                state |= {name: part.state_dict() for name, part in objective.named_children()}  # backbone, neck, ...
                with whole_file(checkpoint) as temporary:
                    torch.save(state, temporary)
        if stopped:
            break
        recent, clock = [], time.perf_counter()

    bar.close()
    if RANK == 0:
        writer.close()
        print(f"{checkpoint}: {done} of {args.total_steps} steps done", flush=True)
    if WORLD_SIZE > 1:
        dist.barrier()  # until the checkpoint is written: torchrun kills the others once one has ended
        dist.destroy_process_group()
    if done < args.total_steps:
        raise SystemExit("Stopped by a signal. To go on: --resume")


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
