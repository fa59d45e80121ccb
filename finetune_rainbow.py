# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.14.1", "ale-py==0.12.1", "numpy==2.4.6", "tyro==1.0.17", "tensorboard==2.21.0",
#   "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""Rainbow (1710.02298): fine-tunes a pre-trained ResNet-50 on one game by playing it, then plays 100 episodes.

A new neck g and head h on the frozen backbone f learn the distribution of the return of each action a: 51 atoms z from
-10 to 10 have the probabilities p(o, a) = softmax(h(g(f(o)))[a]) (C51, 1707.06887), and Q = sum_j z_j p_j; o is a stack
of 4 frames. The target network p' is a copy of p, with a moving average of its weights. Transition i, which begins at
step s, is drawn with a probability P_i proportional to priority_i^0.5 (1511.05952):

    G    = sum_{k<n} gamma^k sign(r_{s+k})       n-step return up to a lost life or the game's end; n = 10
    a*   = argmax_a Q(o_{s+n}, a)                double Q-learning (1509.06461)
    m    = p'(o_{s+n}, a*) moved to the atoms G + gamma^n z (to G, if an episode ended), and projected onto z
    L_i  = -sum_j m_j log p(o_s, a_s)_j          cross-entropy; also the new priority_i
    loss = mean_i w_i L_i                        w_i = (min_k P_k / P_i)^beta over the batch; beta rises to 1

Unlike the Rainbow of 1710.02298, this one has no dueling head and no noisy layers: it explores epsilon-greedily. The
target network chooses the actions. Updates see randomly shifted and brightened frames.

    python finetune_rainbow.py --game pong --checkpoint runs/pretrain_atc__0/checkpoint.pt
    python finetune_rainbow.py --game pong                            # baseline "random": a frozen random backbone
    python finetune_rainbow.py --game pong --no-freeze-backbone       # baseline "e2e": everything is learned

The result, with the settings of the Atari Pre-training Benchmark (2406.06037), is results/rainbow/<method>/<game>/
seed<k>.json. A run that was cut off begins again with the same command, which does nothing if the result is there.
"""

import copy
import json
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
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map


# === arguments ========================================================================================================
@dataclass
class Args:
    game: str  # such as ms_pacman or MsPacman: one of the benchmark's 65
    checkpoint: Path | None = None  # of a pretrain_*.py run, or the original authors' .pth; default: a random backbone
    freeze_backbone: bool = True  # train the neck and the head only
    method: str = ""  # name in the results; default: the objective, <objective>_e2e, random or e2e
    total_steps: int = 50_000  # agent steps of training; each is one action and 4 frames of the game
    learning_starts: int = 2_000  # agent steps with random actions before the first update
    updates_per_step: float = 2.0  # updates for each agent step after learning_starts; 0.25 is one every fourth step
    batch_size: int = 32  # transitions in an update
    learning_rate: float = 1e-4  # of Adam
    adam_eps: float = 1.5e-4  # epsilon of Adam
    max_grad_norm: float = 10.0  # gradients are clipped to this L2 norm; inf turns clipping off
    target_momentum: float = 0.99  # of the target network, after every update; 1 leaves it as initialised
    discount: float = 0.99  # gamma
    n_steps: int = 10  # n: steps whose rewards are summed before the target network estimates the rest
    atoms: int = 51  # atoms of the return's distribution
    max_return: float = 10.0  # the last atom; the first one is minus this
    priority_exponent: float = 0.5  # of prioritised replay; 0 draws all transitions alike
    importance_exponent: float = 0.4  # beta of prioritised replay at the first update, annealed to 1 at the end
    exploration_steps: int = 10_000  # agent steps after learning_starts over which epsilon falls linearly from 1
    exploration_final: float = 0.01  # epsilon after that: the probability of a random action

    width_multiplier: float = 1.0  # scales the ResNet's channels; as in pre-training
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottleneck blocks of the four stages; as in pre-training
    episodic_life: bool = True  # a lost life ends an episode for learning; the game itself goes on
    repeat_action_probability: float = 0.0  # of sticky actions in training
    eval_episodes: int = 100  # episodes of the evaluation; the score is their mean
    max_episode_steps: int = 27_000  # agent steps after which an episode is cut off, in training, too
    epsilon: float = 0.001  # probability of a random action in the evaluation
    video: bool = False  # write the first episode's first two minutes into the run's folder, as a GIF

    seed: int = 0  # of initialisation, environment, exploration, sampling, augmentation and evaluation
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # trains and acts
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the ResNet; auto: bfloat16 where the hardware supports it
    compile: bool = torch.cuda.is_available()  # torch.compile the update and the action
    results: Path = Path("results")  # folder of the results
    overwrite: bool = False  # replace the result if there is one
    log_every: int = 1_000  # agent steps between entries in TensorBoard


# === objective: Rainbow [shared] ======================================================================================
class Rainbow(nn.Module):
    """The online network p and the target network p'. `update` and `act` never wait for the device."""

    def __init__(self, args: Args, network: nn.Module, device: torch.device, precision: torch.autocast):
        super().__init__()
        self.args = args
        self.precision = precision  # autocast, for f alone
        self.online = network
        self.target = copy.deepcopy(network).requires_grad_(False).eval()
        self.frozen = not any(parameter.requires_grad for parameter in network.backbone.parameters())
        if self.frozen:  # f' = f: both networks share the module
            self.target.backbone = network.backbone.eval()
        self.register_buffer("support", torch.linspace(-args.max_return, args.max_return, args.atoms))  # z [atoms]
        self.to(device, memory_format=torch.channels_last)
        if self.frozen and precision._enabled:
            network.backbone.bfloat16()  # once, not in every pass
        learned = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self.learned = list(learned.values())
        self.averages = [self.target.get_parameter(name) for name in learned]  # the target's, of the same names
        options = dict(eps=args.adam_eps, fused=True, capturable=device.type == "cuda")
        self.optimizer = torch.optim.Adam(self.learned, args.learning_rate, **options)
        if args.compile:
            self.losses = torch.compile(self.losses, dynamic=False)
            self.act = torch.compile(self.act, dynamic=False)

    def losses(self, stacks: torch.Tensor, action: torch.Tensor, n_step_return: torch.Tensor, done: torch.Tensor):
        """All o_s, then all o_s+n [2b, 4, 84, 84]; a_s, G and done [b] -> L, Q and Q's target [3, b]"""
        with self.precision:
            if self.frozen:  # f needs no gradients: one pass is enough
                maps, next_maps = self.online.backbone(stacks).chunk(2)  # f(o_s), f(o_s+n) [b, channels, 6, 6]
                target_maps = next_maps  # f'(o_s+n)
            else:
                obs, next_obs = stacks.chunk(2)
                maps = self.online.backbone(obs)  # before no_grad: autocast would keep weights it casts there
                with torch.no_grad():
                    next_maps, target_maps = self.online.backbone(next_obs), self.target.backbone(next_obs)
        i = torch.arange(len(action), device=action.device)
        with torch.no_grad():
            best = self.q(self.online(next_maps)).argmax(1)  # a* [b]
            p = self.target(target_maps)[i, best].softmax(1)  # p'(o_s+n, a*) [b, atoms]
            discount = self.args.discount**self.args.n_steps * ~done  # [b], gamma^n, or 0 where an episode ended
            atoms = n_step_return[:, None] + discount[:, None] * self.support  # [b, atoms]
            m = project(p, atoms, self.support)  # [b, atoms]
        logits = self.online(maps)[i, action]  # [b, atoms]
        cross_entropy = -(m * logits.log_softmax(1)).sum(1)  # L [b]
        cross_entropy = cross_entropy.clamp(1e-5, 1e5)  # as in the original code: a priority of 0 is never drawn again
        return torch.stack([cross_entropy, self.q(logits.detach()), (p * atoms).sum(1)])

    def update(self, frames, is_first, action, n_step_return, done, weight) -> torch.Tensor:
        """One update on a batch of `Replay.sample` with weights w [b] -> [2 + 3b]: loss, gradient norm and `losses`"""
        stacks = augment(stack_frames(frames, is_first)).squeeze(1)  # [2b, 4, 84, 84]
        losses = self.losses(stacks, action, n_step_return, done)
        loss = (weight * losses[0]).mean()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.learned, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():  # target = momentum target + (1 - momentum) online
            torch._foreach_lerp_(self.averages, self.learned, 1 - self.args.target_momentum)
        return torch.cat([torch.stack([loss, grad_norm]), losses.flatten()]).detach()

    @torch.no_grad()
    def act(self, stacks: torch.Tensor) -> torch.Tensor:
        """Q of the target network, which is the player: stacks uint8 [n, 4, 84, 84] -> [n, actions]"""
        with self.precision:
            maps = self.target.backbone(stacks / 255)
        return self.q(self.target(maps))

    def q(self, logits: torch.Tensor) -> torch.Tensor:
        """Q = sum_j z_j p_j: [..., atoms] -> [...]"""
        return (logits.softmax(-1) * self.support).sum(-1)


# === distributional returns [shared] ==================================================================================
def project(probabilities: torch.Tensor, atoms: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Projects the probabilities of any atoms, [b, n] both, onto the support [n] (1707.06887, algorithm 1).

    Each probability is split linearly between the two points of the support next to its atom -> [b, n]
    """
    last = len(support) - 1
    position = ((atoms - support[0]) / (support[last] - support[0]) * last).clamp(0, last)  # [b, n], 0 to n - 1
    distance = (position[:, :, None] - torch.arange(last + 1, device=support.device)).abs()  # [b, n, n], to each point
    share = (1 - distance).clamp(min=0)  # 1 where the atom is on the point, 0 from the next point on
    return (probabilities[:, :, None] * share).sum(1)


# === networks =========================================================================================================
class Network(nn.Module):
    """f, g and h. forward applies g and h to f's maps [n, channels, 6, 6] -> logits of the atoms [n, actions, atoms]"""

    def __init__(self, args: Args, backbone: nn.Module, actions: int):
        super().__init__()
        self.backbone = backbone  # f
        self.neck = Neck(backbone.channels, games=1)  # g
        self.head = GameLinear(1, 512, actions * args.atoms)  # h
        self.shape = (actions, args.atoms)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        maps = maps.float()  # g and h in fp32: the values of actions often differ by less than bfloat16 resolves
        game_id = torch.zeros(len(maps), dtype=torch.long, device=maps.device)  # g and h know one game only
        return self.head(self.neck(maps, game_id), game_id).unflatten(1, self.shape)


# === replay ===========================================================================================================
class Replay:
    """The run's transitions. Row i can be drawn once its n steps, or the end of its life within them, are known."""

    def __init__(self, args: Args):
        self.n_steps, self.discount, self.exponent = args.n_steps, args.discount, args.priority_exponent
        self.frames = np.zeros((args.total_steps, 84, 84), np.uint8)
        self.transitions = np.zeros(args.total_steps, TRANSITION)
        self.priorities = np.zeros(args.total_steps)  # to the power of the exponent
        self.rows = 0  # rows played
        self.ready = 0  # rows that can be drawn: the first ones
        self.greatest_loss = 1.0  # the priority of rows that no update has seen

    def add(self, frame: np.ndarray, *transition) -> None:
        """Adds a row: o [84, 84] and TRANSITION's fields."""
        self.frames[self.rows], self.transitions[self.rows] = frame, transition
        self.rows += 1
        life_over = self.transitions["life_over"][self.rows - 1]
        ready = self.rows if life_over else max(self.ready, self.rows - self.n_steps)
        self.priorities[self.ready : ready] = self.greatest_loss**self.exponent
        self.ready = ready

    def sample(self, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict]:
        """Draws a row from each of b equal parts of the sum of priorities: rows [b], priorities [b] and a batch"""
        sums = self.priorities[: self.ready].cumsum()  # [ready]
        points = (np.arange(batch_size) + rng.random(batch_size)) / batch_size * sums[-1]  # [b]
        points = np.minimum(points, np.nextafter(sums[-1], 0))  # rounding never leads beyond the last row
        rows = sums.searchsorted(points, side="right")
        return rows, self.priorities[rows], make_batch(self, rows)

    def set_losses(self, rows: np.ndarray, losses: np.ndarray) -> None:
        self.priorities[rows] = losses.astype(float) ** self.exponent
        self.greatest_loss = max(self.greatest_loss, float(losses.max()))


# === transitions [shared] =============================================================================================
# is_first: the row's frame is the first of a game. life_over: an episode for learning ends with this step, as a life is
# lost or the game is over. game_over: the game ends with this step, lost, won or cut off.
TRANSITION = np.dtype([("action", "u1"), ("reward", "f4"), ("is_first", "?"), ("life_over", "?"), ("game_over", "?")])


def make_batch(replay, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of b rows: action a_s, n_step_return G and done [b]; frames uint8 [2b, 4, 84, 84] and is_first [2b, 4].

    The first b windows of frames are those of o_s, the others those of o_s+n. Where done, o_s stands for o_s+n: the
    target is G alone, so that any stack will do.
    """
    size = len(replay.frames)  # in a replay that is a ring, the first row follows the last one
    steps = replay.transitions[(rows[:, None] + np.arange(replay.n_steps)) % size]  # [b, n]
    ended = steps["life_over"].cumsum(1) - steps["life_over"] > 0  # [b, n], whether an earlier step ended the episode
    discounts = replay.discount ** np.arange(replay.n_steps)  # gamma^k [n]
    n_step_return = (np.sign(steps["reward"]) * ~ended) @ discounts  # G [b]
    done = steps["life_over"].any(1)  # an episode for learning ends within the n steps: no return follows them
    newest = np.concatenate([rows, np.where(done, rows, rows + replay.n_steps)])  # [2b], the stacks' last rows
    window = (newest[:, None] + np.arange(-HISTORY, 1)) % size  # [2b, 4]
    batch = {"frames": replay.frames[window], "is_first": replay.transitions["is_first"][window], "done": done}
    batch["action"] = steps["action"][:, 0].astype(int)
    batch["n_step_return"] = n_step_return.astype(np.float32)
    return batch


# === CUDA graphs [shared] =============================================================================================
class Graph:
    """Calls a function of tensors with NumPy arrays. On CUDA, the fourth call captures its kernels, which are replayed
    from then on. The first three compile, and allocate what libraries and the optimizer keep."""

    def __init__(self, function, device: torch.device):
        self.function, self.device = function, device
        self.calls = 0

    def __call__(self, **arrays: np.ndarray) -> np.ndarray:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.device.type != "cuda":
            return self.function(**tensors).numpy()
        self.calls += 1
        if self.calls == 1:
            self.pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            self.inputs = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            self.stream = torch.cuda.Stream(self.device)
            self.graph = torch.cuda.CUDAGraph()
        for name, tensor in tensors.items():
            self.pinned[name][: len(tensor)] = tensor  # the last rows stay as they were if these are fewer
            self.inputs[name].copy_(self.pinned[name], non_blocking=True)
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):  # not on the default stream, as PyTorch asks of calls before a capture
                return self.function(**self.inputs).cpu().numpy()
        if self.calls == 4:
            with torch.cuda.graph(self.graph, stream=self.stream):  # which first waits for the device
                self.output = self.function(**self.inputs)
        self.graph.replay()
        return self.output.cpu().numpy()  # the only wait


# === environment [shared] =============================================================================================
class Environment:
    """One game. Its state is a function of the seed, the episode and the actions since its reset."""

    def __init__(self, args: Args):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        options = dict(noop_max=30, use_fire_reset=False, reward_clipping=False)
        options["repeat_action_probability"] = args.repeat_action_probability
        options["max_num_frames_per_episode"] = 4 * args.max_episode_steps
        self.env = AtariVectorEnv(args.game, 1, **options)
        self.num_actions = int(self.env.single_action_space.n)
        self.args = args
        self.reset(0)

    def reset(self, episode: int) -> None:
        seed = int(np.random.default_rng([self.args.seed, episode]).integers(2**30))
        stacks, info = self.env.reset(seed=seed)
        self.stack, self.lives = stacks[0], info["lives"][0]  # stack [4, 84, 84]
        self.episode = episode
        self.actions = []  # since the reset
        self.score = 0.0
        self.game_over = False

    def step(self, action: int) -> tuple:
        """Plays a step and returns its row for `Replay.add`."""
        frame = self.stack[-1]
        is_first = not self.actions
        stacks, rewards, terminated, truncated, info = self.env.step(np.array([action]))
        self.game_over = bool(terminated[0] or truncated[0])
        life_over = self.game_over or (self.args.episodic_life and info["lives"][0] < self.lives)
        self.stack, self.lives = stacks[0], info["lives"][0]
        self.actions.append(action)
        self.score += float(rewards[0])
        return frame, action, rewards[0], is_first, life_over, self.game_over


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


# === playing and learning [shared] ====================================================================================
def train(model: Rainbow, replay: Replay, env: Environment, writer: SummaryWriter) -> Iterator[int]:
    """Plays and learns, from the replay's last row on. After each step it yields how many have been played."""
    args, device = model.args, model.support.device
    act, update = Graph(model.act, device), Graph(model.update, device)
    exploration = [args.learning_starts, args.learning_starts + args.exploration_steps]
    last_update = int((args.total_steps - args.learning_starts) * args.updates_per_step)
    recent = []  # loss, gradient norm, Q and its target of the updates since the last entry in TensorBoard
    logged = replay.rows  # steps played until that entry
    clock = time.perf_counter()
    for step in range(replay.rows, args.total_steps):
        # Augmentation depends on seed and step alone, mixed: PyTorch's CPU generator uses 32 bits of a seed.
        torch.manual_seed(int(np.random.default_rng([args.seed, step]).integers(2**32)))
        rng = np.random.default_rng([args.seed, step, 1])  # of the exploration and of the replay's draws
        epsilon = np.interp(step, exploration, [1, args.exploration_final])
        if rng.random() < epsilon:
            action = int(rng.integers(env.num_actions))
        else:
            action = int(act(stacks=env.stack[None]).argmax())
        replay.add(*env.step(action))
        played = step + 1
        if env.game_over:
            writer.add_scalar("charts/episodic_return", env.score, played)
            writer.add_scalar("charts/episodic_length", len(env.actions), played)
            env.reset(env.episode + 1)

        # The updates due before and after this step, rounded down: --updates-per-step may be a fraction.
        updates_before = int(max(0, step - args.learning_starts) * args.updates_per_step)
        updates_after = int(max(0, played - args.learning_starts) * args.updates_per_step)
        for i in range(updates_before, updates_after):
            rows, priorities, batch = replay.sample(args.batch_size, rng)
            beta = np.interp(i, [0, last_update], [args.importance_exponent, 1])
            weight = (priorities.min() / priorities) ** beta  # w [b]; the priorities have their exponent already
            values = update(**batch, weight=weight.astype(np.float32))  # [2 + 3b]
            loss, grad_norm = values[:2]
            cross_entropy, q, target_q = values[2:].reshape(3, -1)  # [b] each
            if not np.isfinite(values).all():
                raise SystemExit(f"Loss {loss} or gradient norm {grad_norm} is not finite at step {played}.")
            replay.set_losses(rows, cross_entropy)
            recent.append([loss, grad_norm, q.mean(), target_q.mean()])

        if recent and played % args.log_every == 0:
            rate = (played - logged) / (time.perf_counter() - clock)  # agent steps per second
            scalars = {"charts/SPS": rate, "charts/epsilon": epsilon, "charts/beta": beta}
            names = ("losses/loss", "losses/grad_norm", "losses/q", "losses/target_q")
            scalars |= dict(zip(names, np.mean(recent, 0), strict=True))
            for name, value in scalars.items():
                writer.add_scalar(name, value, played)
            recent = []
            logged = played
            clock = time.perf_counter()
        yield played  # here the caller shows the progress, and may write a checkpoint


# === fine-tuning ======================================================================================================
MAY_CHANGE = "checkpoint device compile results overwrite log_every video".split()  # once there is a result


def finetune(args: Args) -> None:
    for name in "batch_size n_steps exploration_steps eval_episodes max_episode_steps log_every".split():
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1.")
    if not args.n_steps < args.learning_starts < args.total_steps:
        raise SystemExit("Needed: --n-steps < --learning-starts < --total-steps.")
    args.game = parse_game(args.game, [*DQN_REPLAY_GAMES, *FAR_OOD_GAMES])
    device, precision = set_up_device(args.device, args.precision, args.compile)
    if device.type != "cpu":
        torch.set_num_threads(1)  # idle threads would slow other runs
    torch.manual_seed(args.seed)
    backbone, method, facts = make_backbone(args)
    result, plain_args = find_result(args, "rainbow", method, args.game, facts | {"data": "online"})
    if result.exists() and not args.overwrite:
        return

    run_dir = Path("runs", f"{Path(__file__).stem}__{method}__{args.game}__{args.seed}")
    run_dir.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)  # so that a run that is cut off leaves no old result
    writer = SummaryWriter(run_dir, purge_step=0)  # hides what an unfinished run has logged
    with whole_file(run_dir / "args.json") as temporary:
        temporary.write_text(json.dumps(plain_args, indent=2))
    env = Environment(args)
    model = Rainbow(args, Network(args, backbone, env.num_actions), device, precision)
    compiling = ", the first update compiles for about a minute" if args.compile else ""
    print(f"{run_dir}: {args.total_steps:,} agent steps{compiling}", flush=True)
    bar = tqdm(train(model, Replay(args), env, writer), "fine-tuning", args.total_steps, unit="step", **BAR)
    for _ in bar:
        bar.set_postfix_str(f"score {env.score:g}", refresh=False)

    # The target network has played in training. It is saved, and plays the evaluation.
    parts = ("neck", "head") if args.freeze_backbone else ("backbone", "neck", "head")
    with whole_file(run_dir / "policy.pt") as temporary:
        torch.save({part: getattr(model.target, part).state_dict() for part in parts}, temporary)
    act = Graph(model.act, device)  # returns as many rows as its first call
    scores, film = play_episodes(args.game, lambda stacks, *_: act(stacks=stacks)[: len(stacks)], args)
    writer.add_scalar("eval/score", scores.mean(), args.total_steps)
    writer.close()
    save_result(result, args.game, scores, plain_args)
    if args.video:  # at the game's speed
        film[0].save(run_dir / "episode.gif", save_all=True, append_images=film[1:], duration=1000 / 15, loop=0)


if __name__ == "__main__":
    finetune(tyro.cli(Args, description=__doc__))
