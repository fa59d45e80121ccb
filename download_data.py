# /// script
# requires-python = ">=3.11"
# dependencies = ["ale-py==0.12.1", "numpy==2.4.6", "tyro==1.0.17", "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""Downloads Atari data and writes it in the layout of the DQN Replay Dataset, which the training scripts read.

The bucket of the DQN Replay Dataset (Agarwal et al., arXiv 1907.04543) has been closed since 2025. Two sources remain:

    rl_unplugged    the same data, episode by episode, of 46 of the benchmark's 65 games (arXiv 2006.13888)
    jat             play of expert agents, without sticky actions, of 56 games (arXiv 2402.09844)

Only the rows that are asked for are read, in RL Unplugged some 5 to 25 MB a checkpoint. Files appear whole or not at
all, and what is there is skipped: after an interruption, the same command goes on. docs/data.md has the details.

    python download_data.py --games pong qbert --data-dir /data/dqn_replay
    python download_data.py --games pong qbert --data-dir /data/dqn_replay --for finetuning
    python pretrain_atc.py --games pong qbert --data-dir /data/dqn_replay
"""

import gzip
import io
import os
import sys
import time
import traceback
import uuid
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal
from urllib.error import HTTPError
from urllib.request import urlopen

import ale_py
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm


# === arguments ========================================================================================================
@dataclass
class Args:
    data_dir: Path  # folder to write to; give it to the other scripts as --data-dir
    source: Literal["rl_unplugged", "jat"] = "rl_unplugged"  # where the data comes from; jat needs two more packages
    games: tuple[str, ...] = ()  # such as ms_pacman or MsPacman; default: all that the source has
    purpose: Annotated[Literal["pretraining", "finetuning"], tyro.conf.arg(name="for")] = "pretraining"
    """sets the defaults of --runs and --checkpoints"""
    runs: tuple[int, ...] = ()  # default: 1 2 for pre-training, 1 2 3 4 5 for fine-tuning
    checkpoints: tuple[int, ...] = ()  # default: 1 to 10 for pre-training, 50 for fine-tuning (the source's last)
    rows_per_checkpoint: int = 10_000  # rows to write, padding included; one more follows, which readers leave out
    url: str = ""  # a mirror of the source, or a local folder with its files
    workers: int = 4  # downloads at once
    timeout: float = 60  # seconds without data after which a connection counts as broken
    retries: int = 5  # how often a broken download is started again, after 1, 2, 4, ... seconds


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


# === sources ==========================================================================================================
ALL_GAMES = [*DQN_REPLAY_GAMES, *FAR_OOD_GAMES]
LACKING = {  # the benchmark's games that a source does not have
    "rl_unplugged": """air_raid asteroids berzerk bowling elevator_action montezuma_revenge pitfall private_eye skiing
        solaris tennis tutankham journey_escape venture basic_math human_cannonball klax othello surround""".split(),
    "jat": "air_raid carnival elevator_action journey_escape pooyan basic_math human_cannonball klax othello".split(),
}
SOURCES = {source: [game for game in ALL_GAMES if game not in lacking] for source, lacking in LACKING.items()}


def choose_games(source: str, names: tuple[str, ...]) -> list[str]:
    """ALE's names of the games to download, each once."""
    games = list(dict.fromkeys(parse_game(name, ALL_GAMES) for name in names)) or SOURCES[source]
    lacking = []
    for game in games:
        if game not in SOURCES[source]:
            others = [f"--source {other} has it" for other in SOURCES if game in SOURCES[other]]
            lacking.append(f"{game} ({others[0] if others else 'docs/data.md tells how to play it yourself'})")
    if lacking:
        raise SystemExit(f"{source} does not have {', '.join(lacking)}.")
    return games


@cache
def count_actions(game: str) -> int:
    """Size of the game's minimal action set. An action is an index in it."""
    ale = ale_py.ALEInterface()
    ale.loadROM(str(ale_py.roms.get_rom_path(game)))
    return len(ale.getMinimalActionSet())


# === replay checkpoints ===============================================================================================
# A checkpoint is four gzipped .npy files. Before each episode are 3 blank rows. Its last row has terminal 1, even if it
# was cut or timed out: the layout has no other mark.
REPLAY = np.dtype([("observation", "u1", (84, 84)), ("action", "<i4"), ("reward", "<f4"), ("terminal", "u1")])
PADDING = 3


class Checkpoint:
    """The rows of a checkpoint, while they are read one by one."""

    def __init__(self, rows: int):
        self.rows = np.zeros(rows, REPLAY)
        self.count = 0

    def add(self, frame: np.ndarray, action: int, reward: float, terminal: bool, start: bool) -> bool:
        """Adds a row, preceded by padding if it starts an episode; returns whether there is room for more."""
        if start:
            self.rows["terminal"][: self.count][-1:] = 1  # the game before has ended, if only by a time-out
            self.count += PADDING
        if self.count < len(self.rows):
            self.rows[self.count] = (frame, action, reward, terminal)
            self.count += 1
        return self.count < len(self.rows)


def game_folder(data_dir: Path, game: str) -> Path:
    return data_dir.expanduser() / "".join(word.capitalize() for word in game.split("_"))


def replay_file(data_dir: Path, game: str, run: int, checkpoint: int, field: str) -> Path:
    return game_folder(data_dir, game) / f"{run}/replay_logs/$store$_{field}_ckpt.{checkpoint}.gz"


def claim_folder(args: Args, game: str) -> None:
    """Writes down where the game's data will come from. A folder has data from one source."""
    folder = game_folder(args.data_dir, game)
    note = folder / "source.txt"
    has_data = any(folder.rglob("*.gz"))  # looked for first: another download may bring both, the note before the data
    source = note.read_text().strip() if note.exists() else "a source that no source.txt names"
    if has_data and source != args.source:
        advice = f"Choose another --data-dir or, if it is from {args.source} all the same, write that word into {note}"
        raise SystemExit(f"{folder} has data from {source}, not from {args.source}. {advice}.")
    if source != args.source:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(note) as temporary:
            temporary.write_text(f"{args.source}\n")


def write_checkpoint(args: Args, game: str, run: int, checkpoint: int, rows: np.ndarray) -> None:
    """Writes the four files, the observations last: if they are there, the checkpoint is complete."""
    contents = {}
    for field in ("action", "reward", "terminal", "observation"):
        array = io.BytesIO()
        np.save(array, np.ascontiguousarray(rows[field]))
        path = replay_file(args.data_dir, game, run, checkpoint, field)
        contents[path] = gzip.compress(array.getbuffer(), compresslevel=4, mtime=0)  # no time: always the same bytes
    claim = game_folder(args.data_dir, game) / "source.txt"
    if claim.read_text().strip() != args.source:
        raise SystemExit(f"Another download fills {claim.parent} from another source. Choose another --data-dir.")
    if path.exists():
        return  # another download was faster
    try:
        for path, content in contents.items():
            with whole_file(path) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"{path} cannot be written ({error}). Make room, then give the same command again.") from error


def read_checkpoint(data_dir: Path, game: str, run: int, checkpoint: int) -> tuple[int, list[np.ndarray]]:
    """Number of rows, and the rewards of each episode that lies in the checkpoint from its start to its end."""
    with gzip.open(replay_file(data_dir, game, run, checkpoint, "reward")) as file:
        reward = np.load(file)
    with gzip.open(replay_file(data_dir, game, run, checkpoint, "terminal")) as file:
        terminal = np.load(file)
    with gzip.open(replay_file(data_dir, game, run, checkpoint, "observation")) as file:
        file.read(128)  # the header
        starts_amid_episode = any(file.read(PADDING * 84 * 84))
    episodes = np.split(reward, np.flatnonzero(terminal) + 1)[:-1]  # the last part has no end
    return len(reward), episodes[starts_amid_episode:]


def decode_png(png: bytes, mode: str) -> np.ndarray:
    """The pixels of a PNG: uint8 [84, 84] of mode L (gray), [84, 84, 4] of mode RGBA"""
    try:
        image = Image.open(io.BytesIO(png), formats=("PNG",))
        size, pixels = (image.mode, *image.size), image.tobytes()
    except Exception as error:  # Pillow raises errors of many kinds
        raise ValueError(f"an image that cannot be decoded: {error}") from error
    if size != (mode, 84, 84):
        raise ValueError(f"an image of {size} instead of {(mode, 84, 84)}")
    return np.frombuffer(pixels, np.uint8).reshape(84, 84, -1).squeeze()


def check_episode(images: list, actions: list, *others: list, num_actions: int) -> None:
    lengths = [len(images), len(actions), *map(len, others)]
    if min(lengths) != max(lengths) or not lengths[0]:
        raise ValueError(f"an episode with lists of {lengths} entries")
    if not 0 <= min(actions) <= max(actions) < num_actions:
        raise ValueError(f"actions from {min(actions)} to {max(actions)}, of which the game has {num_actions}")


# === RL Unplugged =====================================================================================================
# A file is a gzip of TFRecords, each a protobuf message tf.train.Example with one episode. File k is checkpoint k; both
# start at 0. There is no file 50: the last one, 49 or 48, stands in for it and is written as checkpoint 50.
RL_UNPLUGGED = "https://storage.googleapis.com/rl_unplugged/atari_episodes_ordered"
RL_UNPLUGGED_FILES = {"carnival": 49, "gravitar": 49, "star_gunner": 49}  # per run; 50 for the other games
MAX_RECORD = 2**28  # bytes; the longest episode, of 27,000 steps, is smaller


def download(url: str, timeout: float, bar: tqdm) -> Iterator[bytes]:
    """The bytes of a URL, piece by piece; the connection is closed as soon as no more are wanted."""
    with urlopen(url, timeout=timeout) as response:
        while piece := response.read(2**16):
            show_progress(bar, len(piece))
            yield piece


def read_records(pieces: Iterable[bytes]) -> Iterator[memoryview]:
    """The records of a gzipped file of TFRecords: 8 bytes length, 4 bytes CRC, the record, 4 bytes CRC"""
    inflate, buffer = zlib.decompressobj(wbits=31), bytearray()
    for piece in pieces:
        buffer += inflate.decompress(piece)
        while len(buffer) >= 12:
            end = 12 + int.from_bytes(buffer[:8], "little")
            if end > MAX_RECORD:
                raise ValueError(f"a record of {end - 12} bytes")
            if len(buffer) < end + 4:
                break
            yield memoryview(bytes(buffer[12:end]))
            del buffer[: end + 4]
    if buffer or not inflate.eof:
        raise EOFError("the file is incomplete")


def read_integer(message: memoryview, at: int) -> tuple[int, int]:
    """A protobuf integer, 7 bits per byte and the lowest bits first; and where it ends"""
    value = 0
    for i in range(10):
        value |= (message[at + i] & 127) << 7 * i
        if message[at + i] < 128:
            return value, at + i + 1
    raise ValueError("an integer of more than 10 bytes")


def read_fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field of a protobuf message"""
    at = 0
    while at < len(message):
        key, at = read_integer(message, at)
        if key & 7 == 2:  # a string, a list or a message, after its length
            length, at = read_integer(message, at)
            end = at + length
        elif key & 7 == 0:  # an integer
            _, end = read_integer(message, at)
        elif key & 7 == 5:  # a float
            end = at + 4
        else:
            raise ValueError("a record that is no tf.train.Example")
        if end > len(message):
            raise ValueError("a field that is longer than its record")
        yield key >> 3, message[at:end]
        at = end


def read_example(record: memoryview) -> dict[str, list | np.ndarray]:
    """The features of a tf.train.Example by name: lists of PNGs, arrays of numbers"""
    example = {}
    for _, features in read_fields(record):
        for _, feature in read_fields(features):
            feature = dict(read_fields(feature))  # 1: name, 2: values
            for kind, values in read_fields(feature[2]):
                items = [item for _, item in read_fields(values)]  # numbers are packed together, or a field each
                if kind == 2:
                    items = np.frombuffer(b"".join(items), "<f4")
                if kind == 3:
                    items = np.frombuffer(b"".join(items), np.uint8)  # integers below 128, as actions are, take a byte
                example[str(feature[1], "utf-8")] = items
    return example


def read_rl_unplugged(pieces: Iterable[bytes], rows: int, num_actions: int) -> Checkpoint:
    """The file's first rows, or all if it has fewer."""
    checkpoint = Checkpoint(rows)
    for record in read_records(pieces):
        example = read_example(record)
        images, actions, rewards = example["observations"], example["actions"], example["unclipped_rewards"]
        check_episode(images, actions, rewards, example["discounts"], num_actions=num_actions)
        for t in range(len(images)):
            frame = decode_png(images[t], "L")
            if not checkpoint.add(frame, actions[t], rewards[t], terminal=t == len(images) - 1, start=t == 0):
                return checkpoint
    return checkpoint


def convert_rl_unplugged(args: Args, game: str, run: int, checkpoint: int, bar: tqdm) -> None:
    """Downloads and writes one checkpoint. A download that breaks off starts again."""
    base = args.url or RL_UNPLUGGED
    base = base.rstrip("/") if "://" in base else Path(base).resolve().as_uri()
    num_files = RL_UNPLUGGED_FILES.get(game, 50)
    name = f"run_{run}-{min(checkpoint, num_files - 1):05}-of-{num_files:05}"
    url = f"{base}/{game_folder(Path(), game)}/{name}"
    num_actions = count_actions(game)
    tries = 1 if url.startswith("file:") else 1 + args.retries
    for i in range(tries):
        try:
            data = read_rl_unplugged(download(url, args.timeout, bar), args.rows_per_checkpoint + 1, num_actions)
            break
        except (OSError, HTTPException, EOFError) as error:
            if i == tries - 1 or (isinstance(error, HTTPError) and error.code in (401, 403, 404, 410)):
                advice = "Give the same command again later, or a mirror or a local folder as --url"
                raise SystemExit(f"{url} cannot be read: {error}. {advice}.") from error
            time.sleep(2**i)
        except (ValueError, KeyError, IndexError, zlib.error) as error:
            advice = "Give a mirror or a local folder as --url, or leave this file out"
            raise SystemExit(f"{url} is damaged or of another format: {error!r}. {advice}.") from error
    if data.count < len(data.rows):
        raise SystemExit(f"{url} has only {data.count:,} rows, padding included. Lower --rows-per-checkpoint.")
    write_checkpoint(args, game, run, checkpoint, data.rows)
    bar.update()


# === JAT ==============================================================================================================
# A file is a Parquet table with an episode in each row: lists of images, actions and rewards. The channels of an image
# are the frames of a stack, the newest one last. After a time-out, the next game follows in the same lists.
JAT = "jat-project/jat-dataset"
JAT_COLUMNS = ("image_observations", "discrete_actions", "rewards")
JAT_OTHER_ORDER = ("kung_fu_master", "montezuma_revenge")  # bytes of the stacks are in the order [4, 84, 84]
JAT_ORDER = [(run, checkpoint) for run in (1, 2) for checkpoint in range(1, 11)]  # pre-training has the first rows,
JAT_ORDER += [(run, 50) for run in range(1, 6)]  # fine-tuning the next
JAT_ORDER += [(run, n) for run in range(1, 6) for n in range(51) if (run, n) not in JAT_ORDER]


def jat_files(args: Args, game: str, bar: tqdm) -> Iterator[Path]:
    """The game's files, the training split first. Each is downloaded when its turn comes."""
    folder = f"atari-{game.replace('_', '')}"
    if args.url and "://" not in args.url:
        paths = [path for split in ("train", "test") for path in sorted(Path(args.url, folder).glob(f"{split}-*"))]
        if not paths:
            raise SystemExit(f"{Path(args.url, folder)} has no files train-*. Give another --url, or leave {game} out.")
        yield from paths
        return
    from huggingface_hub import HfApi

    hub = HfApi(args.url or None)
    url = f"{hub.endpoint}/datasets/{JAT}/tree/main/{folder}"
    try:
        names = sorted(entry.path for entry in hub.list_repo_tree(JAT, folder, repo_type="dataset"))
        for split in ("train", "test"):
            for name in names:
                if name.startswith(f"{folder}/{split}-"):
                    url = f"{hub.endpoint}/datasets/{JAT}/resolve/main/{name}"
                    path = Path(hub.hf_hub_download(JAT, name, repo_type="dataset"))
                    show_progress(bar, path.stat().st_size)
                    yield path
    except Exception as error:  # of many kinds; the library has tried again where that can help
        reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        raise SystemExit(f"{url} cannot be read: {reason}. Give the same command again later.") from error


def read_jat_episodes(path: Path) -> Iterator[tuple[list, np.ndarray, np.ndarray]]:
    """PNGs, actions and rewards of each list"""
    import pyarrow.parquet

    for row in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1, columns=JAT_COLUMNS):
        images, actions, rewards = (row.column(name).flatten() for name in JAT_COLUMNS)
        yield images.field("bytes"), actions.to_numpy(zero_copy_only=False), rewards.to_numpy(zero_copy_only=False)


def convert_jat(args: Args, game: str, jobs: list[tuple[int, int]], bar: tqdm) -> None:
    """Writes the checkpoints `jobs` (run, checkpoint) of a game, whose rows are dealt out in the order JAT_ORDER."""
    size, num_actions = args.rows_per_checkpoint + 1, count_actions(game)
    wanted = {JAT_ORDER.index(job): job for job in jobs}
    row, stack, path = 0, None, Path(JAT)
    for path in jat_files(args, game, bar):
        try:
            for images, actions, rewards in read_jat_episodes(path):
                check_episode(images, actions, rewards, num_actions=num_actions)
                for t in range(len(images)):
                    place, offset = divmod(row, size)
                    row += 1
                    if offset == 0:
                        data, shifts = Checkpoint(size), []
                    if place not in wanted and row // size not in wanted:
                        continue  # neither this row nor the next, which is compared with it, is wanted
                    image = decode_png(images[t].as_py(), "RGBA")  # [84, 84, 4]
                    if game in JAT_OTHER_ORDER:
                        image = image.transpose(2, 0, 1).reshape(84, 84, 4)
                    before, stack = stack, np.ascontiguousarray(image.transpose(2, 0, 1))  # [4, 84, 84]
                    if place not in wanted:
                        continue
                    start = t == 0
                    if not start:
                        shifts.append(np.array_equal(stack[:3], before[1:]))
                        start = not shifts[-1] and (stack == stack[0]).all()  # the first stack after a time-out
                    has_room = data.add(stack[3], actions[t], rewards[t], t == len(images) - 1, start)
                    if not has_room:
                        if np.mean(shifts) < 0.9:
                            raise ValueError(f"only {np.mean(shifts):.0%} of the stacks continue the one before")
                        write_checkpoint(args, game, *wanted.pop(place), data.rows)
                        bar.update()
                        if not wanted:
                            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            advice = f"Delete it and give the same command again, or leave {game} out"
            raise SystemExit(f"{path} is damaged or of another format: {error!r}. {advice}.") from error
    advice = "Lower --rows-per-checkpoint, or ask for fewer --runs and --checkpoints"
    raise SystemExit(f"{path.parent} has {row:,} rows; about {size * (max(wanted) + 1):,} are needed. {advice}.")


# === main =============================================================================================================
def show_progress(bar: tqdm, num_bytes: int) -> None:
    bar.megabytes += num_bytes / 1e6
    bar.set_postfix_str(f"{bar.megabytes:,.0f} MB", refresh=False)
    bar.update(0)


def show_table(data_dir: Path, jobs: list[tuple[str, int, int]]) -> None:
    """Prints what the files now hold, and whether games of Pong have all their points."""
    print("game               run  checkpoint    rows  whole episodes  mean return")
    points = []  # the winner's, in each game of Pong
    for game, run, checkpoint in jobs:
        rows, episodes = read_checkpoint(data_dir, game, run, checkpoint)
        mean = f"{np.mean([rewards.sum() for rewards in episodes]):.2f}" if episodes else "-"
        print(f"{game:18} {run:3} {checkpoint:11} {rows:7} {len(episodes):15} {mean:>12}")
        if game == "pong":
            points += [max((rewards > 0).sum(), (rewards < 0).sum()) for rewards in episodes]
    if points:
        print(f"The winner has 21 points in {points.count(21)} of {len(points)} games of Pong.")
    if 20 in points:
        print(f"It has 20 in {points.count(20)}: there, the source has lost the reward of the last step.")


def main(args: Args) -> None:
    args.url = os.path.expanduser(args.url)
    games = choose_games(args.source, args.games)
    runs, checkpoints = set(args.runs), set(args.checkpoints)
    if args.purpose == "finetuning":
        runs, checkpoints = runs or {1, 2, 3, 4, 5}, checkpoints or {50}
    else:
        runs, checkpoints = runs or {1, 2}, checkpoints or set(range(1, 11))
    if not (runs <= set(range(1, 6)) and checkpoints <= set(range(51))):
        raise SystemExit("--runs must be from 1 to 5, and --checkpoints from 0 to 50.")
    if args.source == "jat":
        os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(max(1, round(args.timeout))))
        if not (find_spec("pyarrow") and find_spec("huggingface_hub")):
            uv = "with uv: uv run --with pyarrow --with huggingface_hub download_data.py ..."
            raise SystemExit(f"--source jat needs two more packages: pip install pyarrow huggingface_hub ({uv}).")

    jobs = [(game, run, checkpoint) for game in games for run in sorted(runs) for checkpoint in sorted(checkpoints)]
    missing = []
    for game in games:
        last = RL_UNPLUGGED_FILES.get(game, 50) - 1
        if args.source == "rl_unplugged" and sum(checkpoint >= last for checkpoint in checkpoints) > 1:
            advice = f"Give one of --checkpoints {last} to 50"
            raise SystemExit(f"The last file of {game}, {last}, stands in for the checkpoints after it. {advice}.")
        claim_folder(args, game)
    for job in jobs:
        file = replay_file(args.data_dir, *job, "observation")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            missing.append(job)
        elif (rows := read_checkpoint(args.data_dir, *job)[0]) != args.rows_per_checkpoint + 1:
            raise SystemExit(f"{file} is there for --rows-per-checkpoint {rows - 1}. Choose that, or delete the file.")

    seconds = 0.1 if sys.stderr.isatty() else 30  # between two lines of the bar: in a file they stay
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(missing), unit="checkpoint", miniters=0, mininterval=seconds)
    bar.megabytes = 0.0
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    with ThreadPoolExecutor(args.workers) as pool:
        if args.source == "rl_unplugged":
            futures = [pool.submit(convert_rl_unplugged, args, *job, bar) for job in missing]
        else:
            by_game = {game: [job[1:] for job in missing if job[0] == game] for game, _, _ in missing}
            futures = [pool.submit(convert_jat, args, game, numbers, bar) for game, numbers in by_game.items()]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException as error:  # end at once: no download in progress leaves a file that is not whole
            bar.close()
            if isinstance(error, SystemExit):
                print(error, file=sys.stderr)
            else:
                traceback.print_exc()
            os._exit(1)
    bar.close()
    show_table(args.data_dir, jobs)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
