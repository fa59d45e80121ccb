"""Scripted players: a few lines a game that play from the console's memory, and record what they play as a data set.

    python benchmarks/players.py --data-dir DIR     records all games, in the layout of the DQN Replay Dataset
    python benchmarks/players.py --scores           prints the table in docs/players.md

They make data worth learning from where nothing can be downloaded. A recording is run 1 with checkpoints 1 to 5, whose
quality grows: 100%, 60%, 30%, 10% and 5% of the actions are random. Pre-training reads it with --data-dir DIR --runs 1
--checkpoints 1 2 3 4 5, and behaviour cloning reads the last one, with --runs 1 --checkpoints 5. A file has --rows rows
to use, and a last one that readers leave out. What is recorded already is kept, and the rest is made: the same command
goes on where it was cut off. The same --seed gives the same files, however many --jobs there are.

Games are played as in the dataset: up to 30 no-ops at the start, sticky actions (0.25), 4 frames a step, the maximum of
the last two, grayscale, 84 x 84 by area interpolation, and 3 blank rows before an episode. The addresses in the
console's memory are from the public annotations of AtariARI (1906.08226) and OC_Atari (2306.08649), except those of
basic_math and human_cannonball and the heading in skiing, which were found by trying. All that the players read is
visible on the screen.
"""

import gzip
import io
import itertools
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import ale_py
import numpy as np
import tyro
from tqdm import tqdm

RANDOM_SHARES = {1: 1.0, 2: 0.6, 3: 0.3, 4: 0.1, 5: 0.05}  # of the actions, by checkpoint
SOURCE = "scripted_play"
PADDING = 3  # blank rows before every episode in the dataset
MAX_STEPS = 27_000  # steps after which an episode is cut off
FIELDS = {"action": (np.int32, ()), "reward": (np.float32, ()), "terminal": (np.uint8, ())}  # the dataset's files
FIELDS["observation"] = np.uint8, (84, 84)  # written last


# === arguments ========================================================================================================
@dataclass
class Args:
    data_dir: Path | None = None  # folder to record into
    scores: bool = False  # print a table of scores
    games: tuple[str, ...] = ()  # such as pong; default: all that have a player
    rows: int = 10_000  # rows of each checkpoint, blank ones included
    episodes: int = 20  # of each score
    jobs: int = os.cpu_count()  # processes at a time
    seed: int = 0  # of the games and the random actions


# === players ==========================================================================================================
# A player has `act(ram, ale)`, which names the action for the console's memory, a list of 128 bytes. Each episode has
# a new player, which sees every step.


def towards(difference: float, less: str, more: str, near: float) -> str:
    """The action that makes the difference smaller, or none if it is small."""
    if difference > near:
        return more
    if difference < -near:
        return less
    return "NOOP"


def reflect(position: float, low: float, high: float) -> float:
    """Where a ball is that would be at `position` if there were no walls at `low` and `high`"""
    span = high - low
    offset = (position - low) % (2 * span)
    return low + min(offset, 2 * span - offset)


class Repeat:
    """Plays the same actions over and over."""

    def __init__(self, *actions: str):
        self.actions = itertools.cycle(actions)

    def act(self, ram: list[int], ale: ale_py.ALEInterface) -> str:
        return next(self.actions)


class Breakout:
    """Moves the paddle to where the falling ball will meet it, walls included; else follows the ball."""

    BALL_X, BALL_Y, PADDLE_X = 99, 101, 72
    WALLS = 57, 201
    PADDLE_Y = 180
    before = None  # the ball, a step ago

    def act(self, ram, ale):
        ball = x, y = ram[self.BALL_X], ram[self.BALL_Y]
        if y == 0:  # the ball is not in play
            self.before = None
            return "FIRE"
        vx, vy = np.subtract(ball, self.before or ball)
        self.before = ball
        if vy > 0:
            x = reflect(x + vx * min((self.PADDLE_Y - y) / vy, 30), *self.WALLS)
        middle = ram[self.PADDLE_X] + 8
        return towards(x - middle, "LEFT", "RIGHT", near=10)


class Pong:
    """Moves the paddle to where the coming ball will meet it, walls included; brakes in time, as the paddle glides."""

    BALL_X, BALL_Y, PADDLE_Y = 49, 54, 51
    WALLS = 44, 207
    PADDLE_X = 188
    before = None  # ball and paddle, a step ago

    def act(self, ram, ale):
        now = x, y, paddle = ram[self.BALL_X], ram[self.BALL_Y], ram[self.PADDLE_Y]
        if y == 0:  # the ball is not in play
            self.before = None
            return "NOOP"
        vx, vy, glide = np.subtract(now, self.before or now)
        self.before = now
        if vx > 0:
            y = reflect(y + vy * (self.PADDLE_X - x) / vx, *self.WALLS)
        middle = paddle + glide + 7
        return towards(y - middle, "RIGHT", "LEFT", near=8)  # RIGHT is up


class Aim:
    """Keeps the memory's byte `own` near the byte `target`, plus an offset, and fires at every second step."""

    def __init__(self, own: int, target: int, offset: int = 0, near: int = 0):
        self.own, self.target, self.offset, self.near = own, target, offset, near
        self.step = 0

    def act(self, ram, ale):
        self.step += 1
        move = towards(ram[self.target] + self.offset - ram[self.own], "LEFT", "RIGHT", self.near)
        if self.step % 2:
            return move
        return move.replace("NOOP", "") + "FIRE"


class Skiing:
    """Turns the skis towards the middle of the next gate, the more the farther it is to the side."""

    X, HEADING = 25, 15  # the heading is 8 for straight down, less for left
    OBJECT_X, OBJECT_KIND, OBJECT_Y = 62, 70, 86  # of the first of 8 objects; gates are of kind 2, y grows upwards
    OWN_Y = 130

    def act(self, ram, ale):
        x, gates = ram[self.X], []
        for i in range(8):
            if ram[self.OBJECT_KIND + i] == 2 and ram[self.OBJECT_Y + i] < self.OWN_Y:
                gates.append((ram[self.OBJECT_Y + i], ram[self.OBJECT_X + i] + 16))
        middle = max(gates)[1] if gates else x
        heading = 8 + np.clip((middle - x) / 8, -3, 3)
        return towards(heading - ram[self.HEADING], "LEFT", "RIGHT", near=0.5)


class Asterix:
    """Leaves a lane before its lyre comes; else runs to the nearest lane with food, and along it."""

    LANE, X = 39, 41
    OBJECT_X, OBJECT_KIND = 42, 29  # of the first of 8 lanes; odd kinds are lyres, which are deadly

    def act(self, ram, ale):
        lane, x = ram[self.LANE], ram[self.X]
        objects = {i: ram[self.OBJECT_X + i] for i in range(8) if 0 < ram[self.OBJECT_X + i] <= 160}
        deadly = [i for i in objects if ram[self.OBJECT_KIND + i] % 2 == 1 and abs(objects[i] - x) < 30]
        food = [i for i in objects if ram[self.OBJECT_KIND + i] % 2 == 0]
        if lane in deadly:
            for other, move in ((lane - 1, "UP"), (lane + 1, "DOWN")):
                if 0 <= other < 8 and other not in deadly:
                    return move
            return "RIGHT" if objects[lane] < x else "LEFT"
        if lane in food:
            return "RIGHT" if objects[lane] > x else "LEFT"
        for target in sorted(food, key=lambda i: abs(i - lane)):
            if target > lane and lane + 1 not in deadly:
                return "DOWN"
            if target < lane and lane - 1 not in deadly:
                return "UP"
        return "NOOP"


class Seaquest:
    """Stays in the lowest lane, near the middle, turns towards what comes there, and fires."""

    X, Y, FACES_LEFT, ENEMY_X = 70, 97, 86, 30
    LOWEST_LANE = 108

    def act(self, ram, ale):
        x, enemy, faces_left = ram[self.X], ram[self.ENEMY_X], ram[self.FACES_LEFT] > 0
        move = towards(self.LOWEST_LANE - ram[self.Y], "UP", "DOWN", near=6)
        if move == "NOOP" and 0 < enemy < 160 and faces_left != (enemy < x):
            move = towards(enemy - x, "LEFT", "RIGHT", near=0)
        if move == "NOOP":
            move = towards(80 - x, "LEFT", "RIGHT", near=30)
        return move.replace("NOOP", "") + "FIRE"


class BasicMath:
    """Adds the two numbers, dials the sum's digits with UP, units first, and submits it with FIRE."""

    FIRST, SECOND, TENS, UNITS = 52, 58, 69, 70  # digits on the screen; 10 is a blank
    CURSOR, ASKS = 9, 2  # the cursor is at 2 on the units, at 1 on the tens
    step = 0

    def act(self, ram, ale):
        self.step += 1
        if self.step % 2 or not ram[self.ASKS]:  # a button must be released before it counts again
            return "NOOP"
        tens, units = divmod(ram[self.FIRST] + ram[self.SECOND], 10)
        if ram[self.UNITS] != units:
            return "UP" if ram[self.CURSOR] == 2 else "RIGHT"
        if tens and ram[self.TENS] != tens:
            return "UP" if ram[self.CURSOR] == 1 else "LEFT"
        return "FIRE"


class HumanCannonball:
    """Turns the cannon to the angle whose flat arc ends in the water tower at this speed, and fires."""

    SPEED, ANGLE = 56, 57  # binary-coded decimals
    FLIES = 52  # not 0 from the shot until the next man is in the cannon
    LOWEST = 20  # degrees

    def act(self, ram, ale):
        if ram[self.FLIES]:
            return "NOOP"
        speed, angle = (int(f"{ram[address]:x}") for address in (self.SPEED, self.ANGLE))
        flat = 34.2 * (30 / max(speed, 1)) ** (5 / 3)  # fits the hits of all angles at speeds from 28 to 41
        turn = towards(max(flat, self.LOWEST) - angle, "DOWN", "UP", near=0.5)
        return turn.replace("NOOP", "FIRE")


class LookAhead:
    """Goes on as it does, unless that loses a point within 6 steps; then takes the action that lasts longest."""

    STEPS = 6
    last = "NOOP"

    def act(self, ram, ale):
        actions, state, lasts = {action.name: action for action in ale.getMinimalActionSet()}, ale.cloneState(), {}
        for name in (self.last, *actions):
            lasts[name] = self.steps_before_a_loss(actions[name], ale)
            ale.restoreState(state)
            if lasts[name] == self.STEPS:
                break
        self.last = max(lasts, key=lasts.get)
        return self.last

    def steps_before_a_loss(self, action: ale_py.Action, ale: ale_py.ALEInterface) -> int:
        for step in range(self.STEPS):
            if min(ale.act(action) for _ in range(4)) < 0 or ale.game_over():
                return step
        return self.STEPS


ID = {
    "breakout": Breakout,
    "demon_attack": partial(Repeat, "FIRE"),
    "enduro": partial(Repeat, "FIRE"),  # the accelerator
    "freeway": partial(Repeat, "UP"),
    "road_runner": partial(Repeat, "LEFT"),
    "skiing": Skiing,
    "space_invaders": partial(Aim, own=28, target=26, offset=8, near=4),  # below the invaders' left column
    "tennis": partial(Aim, own=26, target=16),  # along the baseline with the ball
}
NEAR_OOD = {"asterix": Asterix, "pong": Pong, "seaquest": Seaquest}
FAR_OOD = {"basic_math": BasicMath, "human_cannonball": HumanCannonball, "surround": LookAhead}
SPLITS = {"ID": tuple(ID), "near-OOD": tuple(NEAR_OOD), "far-OOD": tuple(FAR_OOD)}
PLAYERS = ID | NEAR_OOD | FAR_OOD


# === game =============================================================================================================
def area_weights(source: int, target: int = 84) -> np.ndarray:
    """[target, source]: the part of each target pixel that each source pixel covers"""
    edges = np.linspace(0, source, target + 1)[:, None]
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (overlap.clip(0) * target / source).astype(np.float32)


class Game:
    """A game and its player, with a share of random actions."""

    def __init__(self, name: str, random_share: float, seed: list[int], sticky: float = 0.25):
        self.name, self.random_share = name, random_share
        self.rng = np.random.default_rng([*seed, *name.encode()])
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", sticky)
        self.ale.setInt("random_seed", int(self.rng.integers(2**31)))
        self.ale.loadROM(ale_py.roms.get_rom_path(name))
        self.actions = self.ale.getMinimalActionSet()
        self.names = [action.name for action in self.actions]
        height, width = self.ale.getScreenDims()
        self.rows, self.columns = area_weights(height), area_weights(width).T
        self.screens = np.zeros((2, height, width), np.uint8)  # the last two
        self.reset()

    def reset(self) -> None:
        self.ale.reset_game()
        for _ in range(self.rng.integers(31)):
            self.ale.act(ale_py.Action.NOOP)
        self.ale.getScreenGrayscale(self.screens[1])
        self.screens[0] = 0
        self.steps = 0
        self.player = PLAYERS[self.name]() if self.random_share < 1 else None

    def frame(self) -> np.ndarray:
        """What the agent sees, uint8 [84, 84]"""
        screen = self.screens.max(0).astype(np.float32)
        return np.rint(self.rows @ screen @ self.columns).astype(np.uint8)

    def choose(self) -> int:
        """The player's action or a random one, as its index in the minimal action set"""
        choice = self.player.act(self.ale.getRAM().tolist(), self.ale) if self.player else None
        if choice is None or self.rng.random() < self.random_share:
            return int(self.rng.integers(len(self.actions)))
        return self.names.index(choice)

    def step(self, action: int) -> tuple[float, bool]:
        """Plays 4 frames. Returns the reward, and whether the episode has ended."""
        reward = 0.0
        for number in range(4):
            reward += self.ale.act(self.actions[action])
            if number >= 2:
                self.ale.getScreenGrayscale(self.screens[number - 2])
            if self.ale.game_over():
                break
        self.steps += 1
        return reward, self.ale.game_over() or self.steps == MAX_STEPS


# === recordings =======================================================================================================
@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, unlike any other process's; the file is then renamed, so that `path` is whole or absent."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    yield temporary
    temporary.replace(path)


def game_folder(data_dir: Path, name: str) -> Path:
    return data_dir / "".join(word.capitalize() for word in name.split("_"))


def replay_files(data_dir: Path, name: str, checkpoint: int) -> dict[str, Path]:
    logs = game_folder(data_dir, name) / "1" / "replay_logs"
    return {field: logs / f"$store$_{field}_ckpt.{checkpoint}.gz" for field in FIELDS}


def name_source(data_dir: Path, name: str) -> None:
    """Makes the game's folders, and notes in its source.txt who played."""
    folder = game_folder(data_dir, name)
    note = folder / "source.txt"
    source = note.read_text().strip() if note.exists() else "dqn_replay"
    if source != SOURCE and any(folder.rglob("*.gz")):
        raise SystemExit(f"{folder} has recordings of another source ({source}). Choose another --data-dir.")
    (folder / "1" / "replay_logs").mkdir(parents=True, exist_ok=True)
    with whole_file(note) as temporary:
        temporary.write_text(SOURCE)


def record(data_dir: Path, name: str, checkpoint: int, rows: int, seed: int) -> int:
    """Plays and writes a checkpoint's files. Returns the number of their rows."""
    count = rows + 1  # readers leave the last row out
    columns = {field: np.zeros((count, *shape), dtype) for field, (dtype, shape) in FIELDS.items()}
    game = Game(name, RANDOM_SHARES[checkpoint], [seed, checkpoint])
    row = PADDING
    while row < count:
        columns["observation"][row] = game.frame()
        columns["action"][row] = action = game.choose()
        columns["reward"][row], terminal = game.step(action)
        columns["terminal"][row] = terminal
        row += 1
        if terminal:
            row += PADDING
            game.reset()
    for field, path in replay_files(data_dir, name, checkpoint).items():
        content = io.BytesIO()
        np.save(content, columns[field])
        with whole_file(path) as temporary:
            temporary.write_bytes(gzip.compress(content.getvalue(), 1, mtime=0))
    return count


# === scores ===========================================================================================================
def score(name: str, random_share: float, episode: int, seed: int) -> float:
    """Score of an episode"""
    game = Game(name, random_share, [seed, 0, episode])
    total, terminal = 0.0, False
    while not terminal:
        reward, terminal = game.step(game.choose())
        total += reward
    return total


def speed(name: str) -> float:
    """Rows that are played and written in a second of processor time."""
    with TemporaryDirectory() as folder:
        name_source(Path(folder), name)
        clock = time.process_time()
        rows = record(Path(folder), name, checkpoint=5, rows=4_000, seed=0)
        return rows / (time.process_time() - clock)


def print_table(args: Args, names: list[str]) -> None:
    from common import load, processor  # with PyTorch, which takes seconds to import

    normalize, shares = load("eval_iqm").normalize, (RANDOM_SHARES[5], 1.0)
    jobs = [(score, name, share, n, args.seed) for name in names for share in shares for n in range(args.episodes)]
    scores = {(name, share): [] for name in names for share in shares}
    for (_, name, share, *_), value in run_all(jobs, args.jobs, "scores", "episode"):
        scores[name, share].append(value)
    rates = {name: rate for (_, name), rate in run_all([(speed, name) for name in names], args.jobs, "speed", "game")}
    print(f"{processor()}, means ± standard errors of {args.episodes} episodes\n")
    print("| game | split | player | random play | difference | normalised | rows/s |\n|---|---|---|---|---|---|---|")
    for name in names:
        split = next(split for split, games in SPLITS.items() if name in games)
        means = [np.mean(scores[name, share]) for share in shares]
        errors = [np.std(scores[name, share], ddof=1) / args.episodes**0.5 for share in shares]
        player, random = (f"{mean:,.1f} ± {error:,.1f}" for mean, error in zip(means, errors, strict=True))
        difference = (means[0] - means[1]) / np.hypot(*errors)
        row = f"{player} | {random} | {difference:.1f} | {normalize(name, means[0]):.2f} | {rates[name]:,.0f}"
        print(f"| {name} | {split} | {row} |")


# === processes ========================================================================================================
def run(job: tuple) -> tuple:
    function, *arguments = job
    return job, function(*arguments)


def run_all(jobs: list[tuple], processes: int, title: str, unit: str) -> list[tuple]:
    """Runs jobs, functions with their arguments, in processes. Returns pairs of a job and its result."""
    ignore_interrupts = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # they are the parent's: it ends the processes
    with multiprocessing.get_context("spawn").Pool(processes, *ignore_interrupts) as pool:
        interval = 0.1 if sys.stderr.isatty() else 30
        results = pool.imap_unordered(run, jobs)
        return list(tqdm(results, title, len(jobs), unit=unit, mininterval=interval))


def main(args: Args) -> None:
    known = {name.replace("_", ""): name for name in PLAYERS}
    names = [known.get(name.replace("_", "").lower()) for name in args.games] or list(PLAYERS)
    if None in names:
        raise SystemExit(f"Choose --games from: {' '.join(PLAYERS)}")
    if not args.data_dir and not args.scores:
        raise SystemExit("Choose --data-dir DIR, to record, or --scores.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes: NumPy's matrices are small
    if args.data_dir:
        folder, jobs = args.data_dir.expanduser(), []
        for name in sorted(names, key=lambda name: PLAYERS[name] is not LookAhead):  # the slow ones first
            name_source(folder, name)
            for checkpoint in RANDOM_SHARES:
                if not all(path.exists() for path in replay_files(folder, name, checkpoint).values()):
                    jobs.append((record, folder, name, checkpoint, args.rows, args.seed))
        run_all(jobs, args.jobs, "recording", "file")
    if args.scores:
        print_table(args, names)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
