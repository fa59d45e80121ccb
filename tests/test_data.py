"""What the scripts read is what was played: from replay files to batches, their order and their augmentation.

Real play, recorded here by a plain loop around gymnasium's environment, is written as replay files; the expected rows,
stacks and returns come from what the loop kept in lists.
"""

import gzip
import re
import resource
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import ale_py
import gymnasium
import numpy as np
import pytest
import torch
from conftest import BUCKET, FIELDS, FLAT, ROOT, environment, load, write_replay
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

gymnasium.register_envs(ale_py)


class Row(NamedTuple):
    """A row of a replay file, and what the file does not say of it."""

    stack: np.ndarray  # [4, 84, 84], as the environment returned it; the file has its last frame
    action: int
    reward: float
    terminal: int
    first: bool = False  # of its episode
    real: bool = True  # not padding


BLANK = Row(np.zeros((4, 84, 84), np.uint8), 0, 0.0, 0, real=False)


def record(game: str, lengths: list[int | None]) -> list[list[Row]]:
    """Episodes of real play, each cut short after its length (None: when the game is lost); the last is unfinished."""
    env = AtariPreprocessing(gymnasium.make(game, frameskip=1, repeat_action_probability=0.25), noop_max=0)
    env = FrameStackObservation(env, 4, padding_type="zero")
    rng, action, episodes = np.random.default_rng(0), 0, []
    for number, length in enumerate(lengths):
        stack, _ = env.reset(seed=number)
        episodes.append([])
        terminal = False
        while not terminal and (length is None or len(episodes[-1]) < length):
            if rng.random() < 0.3:
                action = int(rng.integers(env.action_space.n))
            next_stack, reward, terminal, _, _ = env.step(action)
            if len(episodes[-1]) % 11 == 7:  # as some rewards of the DQN Replay Dataset
                reward = float("nan")
            if len(episodes[-1]) % 13 == 6:  # as of games that count in hundreds
                reward = -200.0
            episodes[-1].append(Row(stack, action, float(reward), int(terminal), not episodes[-1]))
            stack = next_stack
        if number + 1 < len(lengths):  # the time-out sets terminal, too
            episodes[-1][-1] = episodes[-1][-1]._replace(terminal=1)
    return episodes


def file_of(episodes: list[list[Row]], padded: bool, skip: int = 0) -> list[Row]:
    """The rows of a replay file that begins `skip` rows late, with 3 blank rows before every episode or without."""
    return [row for episode in episodes for row in [BLANK] * 3 * padded + episode][skip:]


def write(data_dir: Path, game: str, rows: list[Row], layout: str = BUCKET, number: int = 1, **changes) -> dict:
    """Writes the four files; `changes` replace columns. Returns their paths."""
    columns = [np.array([row.stack[-1] for row in rows], np.uint8)]
    columns += [np.array([row[i] for row in rows], dtype) for i, dtype in ((1, "i4"), (2, "f4"), (3, "u1"))]
    return write_replay(data_dir, game, dict(zip(FIELDS, columns, strict=True)) | changes, layout, number)


def prepare(atc, tmp_path: Path, rows: int, game: str, data: str = ".", number: int = 1, **options) -> Path:
    """The shard of a checkpoint's first `rows` rows, of the files in tmp_path or in a folder there."""
    args = atc.Args(data_dir=tmp_path / data, cache_dir=tmp_path / "cache", **options)
    args.cache_dir.mkdir(exist_ok=True)
    return atc.prepare_shard(args, rows, game, 1, number)


def sign(reward: float) -> int:
    return int(reward > 0) - int(reward < 0)  # 0 for NaN, too


def return_to_go(file: list[Row], i: int) -> int:
    """Up to the episode's end, or the file's, whose last row counts for nothing."""
    total = 0
    for row in file[i:-1]:
        total += sign(row.reward)
        if row.terminal:
            break
    return total


def real_rows(file: list[Row], count: int) -> list[tuple[Row, int]]:
    """The file's first `count` rows without the padding, each with its return-to-go."""
    rows = [file[0]._replace(first=False), *file[1:count]]  # what was before a file's first row cannot be known
    return [(row, return_to_go(file, i)) for i, row in enumerate(rows) if row.real]


def blacken(episode: list[Row], black: range, action: int) -> list[Row]:
    """The episode with these rows' frames black, in all stacks, and with this action and no reward."""
    rows = []
    for i, row in enumerate(episode):
        stack = np.array([np.zeros((84, 84)) if i - 3 + n in black else row.stack[n] for n in range(4)], np.uint8)
        rows.append(row._replace(stack=stack, **(dict(action=action, reward=0.0) if i in black else {})))
    return rows


def in_order(windows):
    """These windows, in the order of their rows."""
    windows.choose = lambda i: np.arange(windows.size)[i * windows.batch_size :][: windows.batch_size]
    return windows


def batch_of(atc, windows, i: int = 0) -> dict[str, np.ndarray]:
    """Batch i as it is on the device."""
    return {name: tensor.numpy() for name, tensor in atc.unpack(*windows.batch(i), "cpu").items()}


def check_windows(atc, shards: list, files: list, length: int) -> None:
    """Training and held-out windows of the shards against the rows of `files`: (game_id, real rows, begins blank)."""
    for part in ("train", "held_out"):
        windows = in_order(atc.Windows(shards, length, 1, 0, part))
        windows.batch_size, windows.batches = windows.size, 1
        batch = batch_of(atc, windows)
        stacks = atc.stack_frames(torch.from_numpy(batch["frames"]), torch.from_numpy(batch["is_first"])).numpy()
        w = 0
        for game_id, real, begins_blank in files:
            rows = [(BLANK, 0)] * 3 * begins_blank + real  # a window's first 3 rows are but history
            count = len(rows) - length + 1
            first_held_out = count - -(-count // 100)  # 1%, rounded up
            begins = range(first_held_out - length + 1) if part == "train" else range(first_held_out, count)
            for begin in begins:
                expected = rows[begin : begin + length]
                assert batch["game_id"][w] == game_id
                np.testing.assert_array_equal(batch["frames"][w], [row.stack[-1] for row, _ in expected])
                assert batch["is_first"][w].tolist() == [row.first for row, _ in expected]
                assert batch["action"][w].tolist() == [row.action for row, _ in expected]
                assert batch["reward"][w].tolist() == [sign(row.reward) for row, _ in expected]
                assert batch["terminal"][w].tolist() == [row.terminal for row, _ in expected]
                assert batch["return_to_go"][w].tolist() == [togo for _, togo in expected]
                for n, (row, _) in enumerate(expected[3:]):
                    assert row.real  # padding is never a sample's own row
                    np.testing.assert_array_equal(stacks[w, n], row.stack)
                w += 1
        assert w == len(batch["frames"]) == windows.size


@pytest.fixture(scope="session")
def atc():
    return load("pretrain_atc.py")


@pytest.fixture(scope="session")
def breakout() -> list[list[Row]]:
    episodes = record("ALE/Breakout-v5", [30, 1, 2, 3, 4, None, 90, 20])
    assert len(episodes[5]) > 100
    return episodes


@pytest.fixture(scope="session")
def pong() -> list[list[Row]]:
    return record("ALE/Pong-v5", [5, 130, 1, 60, 40])


# Reading.
@pytest.mark.parametrize("length", [4, 7])
@pytest.mark.parametrize(
    ("padded", "skip"),
    [(True, 0), (True, 1), (True, 2), (True, 3), (True, 6), (False, 0), (False, 7)],
    ids=["padded", "2 blank rows first", "1 blank row first", "no blank row first", "amid an episode", "bare", "late"],
)
def test_reader_returns_what_was_played(atc, breakout, pong, tmp_path, padded, skip, length):
    """Every field of every window and every stack, of games that end, are cut, and go on beyond the rows read."""
    files, shards = [], []
    for game, game_id, episodes in (("breakout", 13, breakout), ("pong", 39, pong)):
        file = file_of(episodes, padded, skip)
        read = len(file) - len(episodes[-1]) - 3 * padded - 30  # amid the last but one episode
        assert not any(row.terminal for row in file[read - 5 : read])
        write(tmp_path, game, file)
        real = real_rows(file, read)
        assert {sign(row.reward) for row, _ in real} >= ({-1, 0, 1} if game == "breakout" else {-1, 0})
        assert real[-1][1] != sum(sign(row.reward) for row in file[read - 1 : read])  # more is to come after the last
        files.append((game_id, real, not file[0].real))
        shards.append((game_id, prepare(atc, tmp_path, read, game)))
    check_windows(atc, shards, files, length)


@pytest.mark.parametrize("padded", [True, False])
def test_rows_may_end_anywhere(atc, breakout, tmp_path, padded):
    """Also within or right before the padding, or with an episode's first row."""
    file = file_of(breakout, padded)
    write(tmp_path, "breakout", file)
    for read in range(30, 50):
        path = prepare(atc, tmp_path, read, "breakout")
        check_windows(atc, [(13, path)], [(13, real_rows(file, read), padded)], 4)


def test_first_real_row_of_a_padded_file_is_a_sample(atc, breakout, tmp_path):
    write(tmp_path, "breakout", file_of(breakout, padded=True))
    path = prepare(atc, tmp_path, 40, "breakout")
    batch = atc.unpack(*in_order(atc.Windows([(13, path)], 4, 1, 0, "train")).batch(0), "cpu")
    stack = atc.stack_frames(batch["frames"], batch["is_first"])[0, 0].numpy()
    first = breakout[0][0].stack
    assert first[3].any()
    assert not first[:3].any()
    np.testing.assert_array_equal(stack, first)


def test_last_row_of_a_file_is_never_used(atc, breakout, tmp_path):
    """Whatever it holds; all rows but it can be read."""
    file = file_of(breakout, padded=True)
    stale = Row(np.full((4, 84, 84), 255, np.uint8), 17, 1000.0, 1)
    write(tmp_path, "breakout", [*file[:-1], stale])
    read = len(file) - 1
    path = prepare(atc, tmp_path, read, "breakout")
    check_windows(atc, [(13, path)], [(13, real_rows(file, read), True)], 4)
    with pytest.raises(SystemExit, match=f"has not {read + 1} usable rows"):
        prepare(atc, tmp_path, read + 1, "breakout")


@pytest.mark.parametrize("padded", [True, False])
def test_black_frame_is_not_padding(atc, breakout, tmp_path, padded):
    """A real one: amid an episode, with action 0 and no reward; after the padding, as the first one or two; moved."""
    whole = breakout[5]
    episodes = [blacken(whole[20 * k : 20 * k + 20], range(0), 0) for k in range(5)]
    for k, episode in enumerate(episodes):  # five short ones, of which each begins as after a reset
        for i in range(3):
            stack = episode[i].stack.copy()
            stack[: 3 - i] = 0
            episode[i] = episode[i]._replace(stack=stack)
        episode[0] = episode[0]._replace(first=True)
        episode[-1] = episode[-1]._replace(terminal=int(k < 4))
    first = (range(0, 1), range(0, 2)) if padded else (range(1, 2), range(1, 3))  # without padding, these would be it
    changes = (range(0), 0), (first[0], 0), (first[1], 0), (range(8, 14), 0), (range(0, 3), 1)
    episodes = [blacken(episode, *change) for episode, change in zip(episodes, changes, strict=True)]
    file = file_of(episodes, padded)
    write(tmp_path, "breakout", file)
    path = prepare(atc, tmp_path, len(file) - 1, "breakout")
    check_windows(atc, [(13, path)], [(13, real_rows(file, len(file) - 1), padded)], 4)


def test_black_frame_soon_after_a_files_beginning_is_not_padding(atc, breakout, tmp_path):
    """Where the file begins amid an episode, with a frame that is not black."""
    file = blacken(breakout[5][20:60], range(1, 3), 0)
    write(tmp_path, "breakout", file)
    path = prepare(atc, tmp_path, 39, "breakout")
    check_windows(atc, [(13, path)], [(13, real_rows(file, 39), False)], 4)


def test_a_black_first_row_after_the_padding_is_real(atc, breakout, tmp_path):
    """Of the file, and of a later episode: no more than three rows are padding."""
    black = Row(np.zeros((4, 84, 84), np.uint8), 0, 0.0, 0, first=True)
    second = [row._replace(first=False) for row in breakout[0]]  # its stacks begin as those after a black frame
    file = file_of([[black, *second], [black, *second[:-1]]], padded=True)
    write(tmp_path, "breakout", file)
    path = prepare(atc, tmp_path, len(file) - 1, "breakout")
    check_windows(atc, [(13, path)], [(13, real_rows(file, len(file) - 1), True)], 4)


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("padded", [True, False])
def test_atc_leaves_out_futures_of_other_episodes(atc, monkeypatch, breakout, tmp_path, padded, offset):
    """What ATC makes of real windows: the stacks of now and of later, and whether the episode ends in between."""
    file = file_of(breakout, padded)
    write(tmp_path, "breakout", file)
    path = prepare(atc, tmp_path, len(file) - 1, "breakout")
    objective = atc.Objective(atc.Args(width_multiplier=0.125, blocks=(1, 1, 1, 1), future_offset=offset))
    windows = in_order(atc.Windows([(13, path)], objective.length, 1, 0, "train"))
    windows.batch_size = windows.size
    given = []
    monkeypatch.setattr(objective, "loss", lambda *args: given.extend(args))
    monkeypatch.setattr(atc, "augment", lambda stacks: stacks / 255)
    objective(atc.unpack(*windows.batch(0), "cpu"))
    obs, next_obs = ((stacks * 255).round().byte().numpy() for stacks in given[:2])
    game_id, done = given[2:]
    assert (game_id == 13).all()

    real = [row for row in file[:-1] if row.real]
    samples = real[0 if padded else 3 :][: windows.size]
    assert windows.size > 200
    assert len(obs) == len(next_obs) == len(done) == len(samples)
    place = {id(row): i for i, row in enumerate(real)}
    ended = []
    for n, row in enumerate(samples):
        i, ends = place[id(row)], False
        for j in range(i, i + offset):
            ends = ends or real[j].terminal == 1
        ended.append(ends)
        np.testing.assert_array_equal(obs[n], row.stack)
        np.testing.assert_array_equal(next_obs[n], real[i + offset].stack)
    assert done.tolist() == ended
    assert 0 < sum(ended) < len(ended)


def test_dt_returns_to_go_end_with_the_episode_not_with_the_shard(atc, monkeypatch, pong, tmp_path):
    """By hand: episodes end with rows 20 and 45 of a file of 60, of which 40 rows are read."""
    reward, terminal = np.zeros(60, np.float32), np.zeros(60, np.uint8)
    reward[[5, 18, 20, 30, 43, 45, 50]] = 7, -2, 1, 1, 1, -1, 1
    terminal[[20, 45]] = 1
    write(tmp_path, "pong", pong[1][:60], reward=reward, terminal=terminal)
    path = prepare(atc, tmp_path, 40, "pong")
    dt, given = load("pretrain_dt.py"), []
    objective = dt.Objective(dt.Args(width_multiplier=0.125, blocks=(1, 1, 1, 1)))
    monkeypatch.setattr(objective, "loss", lambda *inputs: given.extend(inputs))
    data = in_order(atc.Windows([(39, path)], objective.length, 1, 0, "train"))
    data.batch_size = windows = data.size
    objective(atc.unpack(*data.batch(0), "cpu"))
    of_row = [1] * 6 + [0] * 13 + [1] * 2 + [1] * 10 + [0] * 13  # 7 - 2 + 1 are 1 - 1 + 1; 1 + 1 - 1 from row 21 to 30
    assert given[2].tolist() == [of_row[first + 3 : first + 11] for first in range(windows)]
    steps = [[row > 20 and first + 3 <= 20 for row in range(first + 3, first + 11)] for first in range(windows)]
    assert given[4].tolist() == steps  # past the end
    assert objective.neck.largest_return[39] == 1


# Files and the cache.
def test_prepare_numbers_the_games(atc, breakout, tmp_path):
    """In the order of the games and their checkpoints; far-OOD games, which the data set lacks, are 0."""
    for game in ("breakout", "ms_pacman", "klax"):
        for number in (1, 2):
            write(tmp_path, game, file_of(breakout, padded=True)[:20], FLAT, number)
    args = atc.Args(data_dir=tmp_path, cache_dir=tmp_path / "cache", runs=(1,), checkpoints=(2, 1))
    shards, source = atc.prepare(args, ("ms_pacman", "klax", "breakout"), 15)
    assert [game_id for game_id, _ in shards] == [35, 35, 0, 0, 13, 13]
    begins = [f"{game}_1_{number}_" for game in ("ms_pacman", "klax", "breakout") for number in (2, 1)]
    assert all(path.name.startswith(begin) for (_, path), begin in zip(shards, begins, strict=True))
    assert source == "dqn_replay"


def test_origin_of_the_data(atc, breakout, cache, tmp_path):
    """What a download says of each game's source; of own play, that it is random."""
    for game in ("breakout", "pong"):
        write(tmp_path, game, file_of(breakout, padded=True)[:20], FLAT)
    (tmp_path / "Pong" / "source.txt").write_text("jat\n")
    args = atc.Args(data_dir=tmp_path, cache_dir=tmp_path / "cache", runs=(1,), checkpoints=(1,))
    assert atc.prepare(args, ("pong", "breakout"), 15)[1] == "dqn_replay+jat"
    assert atc.prepare(args, ("pong",), 15)[1] == "jat"
    assert atc.prepare(atc.Args(cache_dir=cache), ("pong",), 15)[1] == "random_play"


def test_both_layouts_give_the_same_shard(atc, breakout, tmp_path):
    file, shards = file_of(breakout, padded=True), []
    for folder, layout in (("bucket", BUCKET), ("flat", FLAT)):
        write(tmp_path / folder, "breakout", file, layout)
        shards.append(prepare(atc, tmp_path, 100, "breakout", folder))
    assert shards[0] != shards[1]
    assert shards[0].read_bytes() == shards[1].read_bytes()


def test_runs_and_checkpoints_named_twice_count_once(atc, breakout, tmp_path):
    write(tmp_path, "breakout", file_of(breakout, padded=True)[:20], FLAT)
    args = atc.Args(data_dir=tmp_path, cache_dir=tmp_path / "cache", runs=(1, 1), checkpoints=(1, 1))
    shards, _ = atc.prepare(args, ("breakout",), 15)
    assert len(shards) == 1


def test_few_files_are_in_memory_at_once(atc, monkeypatch, tmp_path):
    """However many there are and however many cores: four are prepared at a time."""
    running, most, lock = [], [], threading.Lock()

    def prepare_slowly(args, rows, game, run, checkpoint):
        with lock:
            running.append(checkpoint)
            most.append(len(running))
        time.sleep(0.05)
        with lock:
            running.remove(checkpoint)
        return tmp_path

    monkeypatch.setattr(atc, "prepare_shard", prepare_slowly)
    args = atc.Args(data_dir=tmp_path, cache_dir=tmp_path / "cache", runs=(1,), checkpoints=tuple(range(30)))
    assert len(atc.prepare(args, ("breakout",), 15)[0]) == 30
    assert 1 < max(most) <= 4


def test_a_home_folder_is_found(atc, breakout, monkeypatch, tmp_path):
    """`--cache-dir=~/x` makes no folder named ~, and `--data-dir=~/y` is read."""
    write(tmp_path / "y", "breakout", file_of(breakout, padded=True))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    args = atc.Args(cache_dir=Path("~/x"), data_dir=Path("~/y"), runs=(1,), checkpoints=(1,))
    ((_, shard),), _ = atc.prepare(args, ("breakout",), 60)
    assert shard.parent == tmp_path / "x" and shard.exists() and not Path("~").exists()


def test_a_cache_that_cannot_be_written_is_an_error(atc, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/cache")):
        with pytest.raises(OSError, match=str(folder)):
            atc.prepare(atc.Args(cache_dir=folder), ("pong",), 1)


def test_only_the_rows_asked_for_are_decompressed(atc, breakout, tmp_path):
    """What follows them may be damaged: no one notices."""
    file = file_of(breakout, padded=True)[:60]
    noise = np.random.default_rng(0).integers(256, size=(150, 84, 84), dtype=np.uint8)  # a megabyte, compressed or not
    long = [*file, *(Row(frame[None], 0, 0.0, 0) for frame in noise)]
    paths = write(tmp_path, "breakout", long)
    intact = prepare(atc, tmp_path, 50, "breakout").read_bytes()
    content = paths["observation"].read_bytes()
    paths["observation"].write_bytes(content[:-500_000] + b"\xff" * 500_000)
    with pytest.raises((OSError, EOFError, zlib.error)), gzip.open(paths["observation"]) as stream:
        stream.read()
    assert prepare(atc, tmp_path, 50, "breakout").read_bytes() == intact


def test_shards_are_kept_until_the_source_changes(atc, breakout, tmp_path):
    def shard(rows=50):
        path = prepare(atc, tmp_path, rows, "breakout")
        content = np.fromfile(path, atc.ROW)
        return path, path.stat().st_mtime_ns, len(content), content["action"][10]

    file = file_of(breakout, padded=True)
    write(tmp_path, "breakout", file)
    before = shard()
    assert shard() == before  # not written again
    assert shard(rows=30)[2] == 30  # other rows, another shard
    assert shard() == before
    write(tmp_path, "breakout", [row._replace(action=5) for row in file])
    assert before[3] != 5
    assert shard()[3] == 5
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".bin"}  # nothing temporary stays


# What replay files may hold.
@pytest.fixture
def data(breakout, tmp_path) -> dict[str, Path]:
    """A small replay of breakout; its files by their fields."""
    return write(tmp_path / "data", "breakout", file_of(breakout, padded=True)[:60])


def resave(path: Path, change) -> None:
    with gzip.open(path) as stream:
        array = np.load(stream)
    with gzip.open(path, "wb") as stream:
        np.lib.format.write_array(stream, change(array))


class Evil:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dtype", ["u1", "i8", ">i4", "f8"])
def test_kinds_of_npy_files(atc, tmp_path, data, dtype):
    """Any type of whole numbers; observations with a channel of their own."""
    expected = prepare(atc, tmp_path, 50, "breakout", "data").read_bytes()
    for field, path in data.items():
        if field == "observation":
            resave(path, lambda a: a[:, None])
        else:
            resave(path, lambda a, of=dtype if field != "reward" else "f8": a.astype(of))
    assert prepare(atc, tmp_path, 50, "breakout", "data").read_bytes() == expected


def test_recordings_of_the_original_code(atc, breakout, tmp_path):
    """Far-OOD games as its replay buffer writes them: observations [n, 1, 84, 84], all other fields float64."""
    file = file_of(breakout, padded=False)[:60]
    paths = write(tmp_path, "klax", file, FLAT, 2)
    expected = prepare(atc, tmp_path, 50, "klax", number=2).read_bytes()
    resave(paths["observation"], lambda a: a[:, None])
    for field in ("action", "reward", "terminal"):
        resave(paths[field], lambda a: a.astype(np.float64))
    assert prepare(atc, tmp_path, 50, "klax", number=2).read_bytes() == expected


DAMAGES = {  # the field, what is done to it, and what the message says of it
    "frames in Fortran order": ("observation", np.asfortranarray, "Fortran order"),
    "frames of another size": ("observation", lambda a: a[:, :80], "50 usable rows of 84 x 84"),
    "frames beyond 255": ("observation", lambda a: a.astype(np.uint16) * 2, "not all from 0 to 255"),
    "an action that no game has": ("action", lambda a: np.where(np.arange(len(a)) == 9, 18, a), "not all from 0 to 17"),
    "a negative action": ("action", lambda a: np.where(np.arange(len(a)) == 9, -1, a), "not all from 0 to 17"),
    "terminals beyond 1": ("terminal", lambda a: a + 1, "not all from 0 to 1"),
    "pickled objects": ("terminal", lambda a: np.array([Evil(Path("evil"))] * len(a), object), "OBJECT"),
    "differing lengths": ("terminal", lambda a: a[:-1], "or its files differ"),
    "no rows": ("observation", lambda a: a[:0], "50 usable rows of 84 x 84"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_content_is_an_error(atc, monkeypatch, tmp_path, data, damage):
    """In one line, with the file's name and what is wrong with it."""
    field, change, message = DAMAGES[damage]
    resave(data[field], change)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        prepare(atc, tmp_path, 50, "breakout", "data")
    assert message in end.value.code and "\n" not in end.value.code
    assert str(data["observation" if "usable" in end.value.code else field]) in end.value.code
    assert not (tmp_path / "evil").exists()  # what is pickled is not run
    assert not [*(tmp_path / "cache").iterdir()]


def test_truncated_files_are_an_error(atc, tmp_path, data):
    """Wherever they are cut, and whatever a file holds that is no .gz at all."""
    for field, path in data.items():
        content = path.read_bytes()
        cuts = [0, 5, 50, len(content) // 2, *([len(content) - 20] if field in ("reward", "terminal") else [])]
        for damaged in [*(content[:size] for size in cuts), gzip.decompress(content), b"<html>not found</html>"]:
            path.write_bytes(damaged)
            with pytest.raises(SystemExit, match=re.escape(f"{path} cannot be read")):
                prepare(atc, tmp_path, 50, "breakout", "data")
        path.write_bytes(content)
    prepare(atc, tmp_path, 50, "breakout", "data")


def test_flipped_bit_in_a_reward_file_is_an_error(atc, tmp_path, data):
    """It is read to its end, where the checksum is."""
    content = bytearray(data["reward"].read_bytes())
    content[-6] ^= 1  # of the checksum itself
    data["reward"].write_bytes(content)
    with pytest.raises(SystemExit, match=r"CRC|check failed"):
        prepare(atc, tmp_path, 50, "breakout", "data")


def test_missing_files_are_an_error(atc, tmp_path, data):
    data["reward"].unlink()
    for folder in ("data", "nowhere"):
        with pytest.raises(SystemExit, match=r"/Breakout lacks files of run 1, checkpoint 1\. Where to get them:"):
            prepare(atc, tmp_path, 50, "breakout", folder)


def test_too_few_rows_in_a_file_are_an_error(atc, tmp_path, data):
    with pytest.raises(SystemExit, match="has not 60 usable rows"):  # the last of 60 may be stale
        prepare(atc, tmp_path, 60, "breakout", "data")


@pytest.mark.parametrize("rows", [3, 8])  # of which none, or five, are more than padding
def test_too_few_rows_for_a_sample_are_an_error(atc, tmp_path, data, rows):
    path = prepare(atc, tmp_path, rows, "breakout", "data")
    with pytest.raises(SystemExit, match="Too few train samples of 7 rows: use more rows"):
        atc.Windows([(13, path)], 7, 1, 0, "train")


def test_fewer_samples_than_processes_are_an_error(atc, monkeypatch, tmp_path, data):
    path = prepare(atc, tmp_path, 50, "breakout", "data")
    monkeypatch.setattr(atc, "WORLD_SIZE", 8)
    with pytest.raises(SystemExit, match="Too few held_out samples"):
        atc.Windows([(13, path)], 7, 8, 0, "held_out")  # a single one


def test_odd_rewards(atc, breakout, tmp_path):
    """NaN and infinite rewards count as 0, 1 and -1; every return-to-go is finite."""
    odd, signs = np.float32([np.nan, np.inf, -np.inf, 0.5, -200.0, -0.0]), np.resize([0, 1, -1, 1, -1, 0], 59)
    reward, terminal = np.resize(odd, 60), np.zeros(60, np.uint8)
    write(tmp_path, "breakout", file_of(breakout[5:], padded=False)[20:80], reward=reward, terminal=terminal)
    shard = np.fromfile(prepare(atc, tmp_path, 50, "breakout"), atc.ROW)
    assert shard["reward"].tolist() == signs[:50].tolist()
    assert shard["return_to_go"].tolist() == [signs[i:].sum() for i in range(50)]


# The order of samples, and how they are read.
LENGTHS = (950, 150, 403, 777)  # of the numbered shards


@pytest.fixture(scope="session")
def numbered(atc, cache, tmp_path_factory) -> list[tuple[int, Path]]:
    """Shards of real play of different lengths; return_to_go has the row's number, and 1,000 more for each shard."""
    shards, folder = [], tmp_path_factory.mktemp("numbered")
    for s, (path, rows) in enumerate(zip(sorted(cache.glob("*.bin")), LENGTHS, strict=True)):
        shard = np.fromfile(path, atc.ROW)[:rows]
        shard["return_to_go"] = 1000 * s + np.arange(rows)
        shards.append((s, folder / f"{s}.bin"))
        shard.tofile(shards[-1][1])
    return shards


def places(batch: dict) -> list[tuple[int, int]]:
    """(shard, first row) of a batch's windows."""
    for window in batch["return_to_go"]:
        assert (np.diff(window) == 1).all()  # consecutive rows
    found = [divmod(int(first), 1000) for first in batch["return_to_go"][:, 0]]
    assert batch["game_id"].tolist() == [shard for shard, _ in found]
    return found


def epoch_of(atc, windows, epoch: int = 0) -> list[dict]:
    return [batch_of(atc, windows, epoch * windows.batches + i) for i in range(windows.batches)]


@pytest.mark.parametrize("length", [4, 7])
def test_epoch_visits_every_window_once(atc, numbered, length):
    """Training: all windows but the dropped last batch; held out: the last 1%; no row is in both."""
    train = atc.Windows(numbered, length, 32, 0, "train")
    held_out = atc.Windows(numbered, length, 1, 0, "held_out")
    visited = [place for batch in epoch_of(atc, train) for place in places(batch)]
    kept = [place for batch in epoch_of(atc, held_out) for place in places(batch)]
    expected, expected_kept = [], []
    for shard, rows in enumerate(LENGTHS):
        windows = rows - length + 1
        first_kept = windows - -(-windows // 100)  # 1%, rounded up
        expected_kept += [(shard, first) for first in range(first_kept, windows)]
        expected += [(shard, first) for first in range(windows) if first + length <= first_kept]
    assert sorted(kept) == expected_kept
    assert len(visited) == len(expected) // 32 * 32 == train.batches * 32
    assert len(set(visited)) == len(visited)
    assert set(visited) <= set(expected)
    assert train.size == len(expected)
    single = atc.Windows(numbered, length, 1, 0, "train")  # nothing is dropped
    assert sorted(place for batch in epoch_of(atc, single) for place in places(batch)) == expected


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_batch_is_the_same_however_it_is_reached(atc, numbered):
    """By another object, after other batches, or by threads that read ahead. Seeds and epochs differ."""
    data = atc.Windows(numbered, 7, 64, 3, "train")
    order = [data.batches + 1, 0, 5, 2 * data.batches - 1, 5]
    batches = [batch_of(atc, data, i) for i in order]
    assert same(batches[2], batches[4])
    assert not same(batches[0], batch_of(atc, data, 1))  # the next epoch's
    assert not same(batches[1], batch_of(atc, atc.Windows(numbered, 7, 64, 4, "train")))  # another seed's
    for i, batch in zip(order, batches, strict=True):
        assert same(batch, batch_of(atc, atc.Windows(numbered, 7, 64, 3, "train"), i))


@pytest.mark.parametrize("threads", [1, 3, 50])
def test_reading_ahead_keeps_the_order(atc, numbered, threads):
    """From any step on, over epochs' ends, each batch is what it is when it is read alone. It is read once."""
    data, calls = atc.Windows(numbered, 7, 64, 3, "train"), []
    choose, read_batch = data.choose, atc.Windows(numbered, 7, 64, 3, "train").batch
    data.choose = lambda step: calls.append(step) or choose(step)
    steps = range(5, 2 * data.batches + 3)
    read = list(atc.read_ahead(data, steps, threads))
    assert [step for step, _ in read] == list(steps) == sorted(calls)
    for step, (rows, game_id) in read:
        expected_rows, expected_game_id = read_batch(step)
        assert torch.equal(rows, expected_rows) and torch.equal(game_id, expected_game_id)
    assert list(atc.read_ahead(data, range(0), threads)) == []


def test_an_error_of_a_reading_thread_is_raised(atc, numbered):
    """In the training loop, at the step whose batch it is."""
    data = atc.Windows(numbered, 7, 64, 3, "train")
    read, fourth = data.read, data.choose(3)

    def fail(windows):
        if np.array_equal(windows, fourth):
            raise OSError("Input/output error")
        return read(windows)

    data.read = fail
    batches = atc.read_ahead(data, range(100), 4)
    assert [next(batches)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="Input/output error"):
        next(batches)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("part", ["train", "held_out"])
def test_ranks_share_the_batch_of_one_process(atc, monkeypatch, numbered, part, world_size):
    """In order and in equal parts."""
    batch_size = 6 if part == "held_out" else 96
    single = atc.Windows(numbered, 7, batch_size, 0, part)
    whole = epoch_of(atc, single)
    assert len(whole) >= 2
    pieces = []
    monkeypatch.setattr(atc, "WORLD_SIZE", world_size)
    for rank in range(world_size):
        monkeypatch.setattr(atc, "RANK", rank)
        data = atc.Windows(numbered, 7, batch_size, 0, part)
        assert data.batches == single.batches
        pieces.append(epoch_of(atc, data))
    for i, batch in enumerate(whole):
        parts = [piece[i] for piece in pieces]
        assert same(batch, {name: np.concatenate([one[name] for one in parts]) for name in batch})
        assert {len(one["action"]) for one in parts} == {batch_size // world_size}


def test_batches_hold_the_bytes_of_the_shards(atc, numbered):
    """Each window is a piece of its shard's file, byte by byte."""
    data = atc.Windows(numbered, 7, 64, 0, "train")
    contents = [path.read_bytes() for _, path in numbered]
    rows, game_id = data.batch(0)
    assert rows.shape == (64, 7, 7064) and rows.dtype == torch.uint8
    for window, shard in zip(rows.numpy(), game_id.tolist(), strict=True):
        at = contents[shard].find(window.tobytes())
        assert at >= 0 and at % 7064 == 0


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from conftest import load
atc = load("pretrain_atc.py")
path, rows = Path("shard.bin"), int(sys.argv[1])
with open(path, "wb") as file:
    file.truncate(rows * atc.ROW.itemsize)
data = atc.Windows([(0, path)], 7, 64, 0, "train")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _, batch in atc.read_ahead(data, range(400), 4):
    atc.unpack(*batch, "cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_data(tmp_path):
    """400 batches, 1.3 GB of rows, of a file of 14 GB and of one of 14 MB take the same memory, 100 MB at most."""
    for rows in (2_000, 2_000_000):
        command = [sys.executable, "-c", MEMORY, str(rows)]
        path = environment(PYTHONPATH=str(ROOT / "tests"))
        done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert int(done.stdout) < 100 * 1024, rows  # kilobytes


def test_a_shard_that_is_cut_short_is_an_error(atc, numbered, tmp_path):
    """Though it was whole as the run began: never a batch that is half empty."""
    path = tmp_path / "cut.bin"
    path.write_bytes(numbered[0][1].read_bytes())
    data = atc.Windows([(0, path)], 7, 64, 0, "train")
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(SystemExit, match=r"A shard in --cache-dir is cut short\. Delete that folder"):
        list(atc.read_ahead(data, range(data.batches), 4))


def test_as_many_files_can_be_open_as_the_system_allows(atc, numbered, monkeypatch):
    """Every shard is one, and the soft limit is often 1,024."""
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 5000))
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: limits.append(values))
    atc.Windows(numbered, 7, 64, 0, "train")
    assert limits == [(5000, 5000)]


# Data that the script plays itself.
@pytest.fixture
def recorder(atc, monkeypatch) -> list:
    """Every environment that is made, with what it returned and was given."""
    made = []

    class Recorder(atc.AtariVectorEnv):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.options, self.frames, self.steps = options, [], []
            made.append(self)

        def reset(self, **options):
            stack, info = super().reset(**options)
            self.frames.append(stack[0, -1].copy())
            return stack, info

        def step(self, actions):
            stack, reward, terminated, truncated, info = super().step(actions)
            self.frames.append(stack[0, -1].copy())
            self.steps.append((int(actions[0]), float(reward[0]), bool(terminated[0] or truncated[0])))
            return stack, reward, terminated, truncated, info

    monkeypatch.setattr(atc, "AtariVectorEnv", Recorder)
    return made


def test_own_play_is_what_the_environment_returned(atc, recorder, tmp_path):
    """Row by row: the frame that was seen, the random action, the reward and whether the episode ended."""
    rows = 600
    shard = np.fromfile(atc.play_shard(atc.Args(cache_dir=tmp_path), rows, "klax"), atc.ROW)
    (env,) = recorder
    assert env.options["repeat_action_probability"] == 0.25 and not env.options["reward_clipping"]
    assert len(shard) == len(env.steps) == rows
    np.testing.assert_array_equal(shard["frame"], env.frames[:rows])
    action, reward, ended = map(np.array, zip(*env.steps, strict=True))
    assert shard["action"].tolist() == action.tolist() and set(action) == set(range(env.single_action_space.n))
    assert shard["reward"].tolist() == np.sign(reward).tolist() and reward.any()
    assert shard["terminal"].tolist() == ended.tolist() and ended.sum() >= 2  # several episodes
    assert shard["is_first"].tolist() == [False, *ended[:-1]]
    ends = [*np.flatnonzero(ended).tolist(), rows - 1]
    expected = [np.sign(reward[i : min(end for end in ends if end >= i) + 1]).sum() for i in range(rows)]
    assert shard["return_to_go"].tolist() == expected


def test_own_play_is_played_once(atc, recorder, tmp_path):
    folders = tmp_path / "one", tmp_path / "other"
    for folder in folders:
        folder.mkdir()
        atc.play_shard(atc.Args(cache_dir=folder), 50, "pong")
    one, other = (folder / "pong_played_50.bin" for folder in folders)
    assert one.read_bytes() == other.read_bytes()  # the same, wherever it is played
    before = one.stat().st_mtime_ns
    atc.play_shard(atc.Args(cache_dir=folders[0]), 50, "pong")
    assert one.stat().st_mtime_ns == before and len(recorder) == 2
    assert [*folders[0].iterdir()] == [one]


def test_own_play_can_be_read(atc, cache):
    """1,000 rows of each game, of which each follows the one before."""
    for path in cache.glob("*.bin"):
        shard = np.fromfile(path, atc.ROW)
        assert len(shard) == 1000
        assert shard["is_first"][1:].tolist() == shard["terminal"][:-1].tolist()


# Augmentation.
@pytest.fixture(scope="session")
def stacks(breakout) -> torch.Tensor:
    """[20, 3, 4, 84, 84], three consecutive real stacks a sample."""
    rows = breakout[5][3:]
    return torch.tensor(np.array([[rows[5 * i + j].stack for j in range(3)] for i in range(20)]))


def shifted(frame: np.ndarray) -> np.ndarray:
    """All 81 shifts of a frame, [81, 84, 84]: what a pixel at (y, x) shows lay at (y + dy, x + dx), or at the edge."""
    padded = np.pad(frame, 4, mode="edge")
    return np.array([padded[4 + dy : 88 + dy, 4 + dx : 88 + dx] for dy in range(-4, 5) for dx in range(-4, 5)])


def find_draws(augmented: np.ndarray, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the shift [n] and the intensity [n] of each augmented frame [n, 84, 84]; they must be exact."""
    candidates = shifted(frame).reshape(81, -1).astype(np.float32) / 255
    flat = augmented.reshape(len(augmented), -1)
    similarity = flat @ (candidates / np.linalg.norm(candidates, axis=1, keepdims=True)).T  # [n, 81]
    shift = similarity.argmax(1)
    best = candidates[shift]
    intensity = (flat * best).sum(1, dtype=np.float64) / (best * best).sum(1, dtype=np.float64)
    np.testing.assert_allclose(flat, best * intensity[:, None], atol=2e-6)
    return shift, intensity


def test_shift_and_intensity_have_their_distributions(atc, stacks):
    frame = stacks[8, 0, -1]
    assert len(np.unique(shifted(frame.numpy()), axis=0)) == 81
    torch.manual_seed(0)
    images = frame.expand(810, 1, 1, 84, 84)
    draws = [find_draws(atc.augment(images).flatten(0, 2).numpy(), frame.numpy()) for _ in range(10)]
    shift, intensity = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    counts = np.bincount(shift, minlength=81)
    assert counts.min() > 0  # all 81 offsets
    assert ((counts - 100) ** 2 / 100).sum() < 80 + 5 * 12.6  # uniform

    assert abs(intensity.min() - 0.9) < 1e-5  # clamped at two standard deviations
    assert abs(intensity.max() - 1.1) < 1e-5
    at_bound = (np.abs(intensity - 1) > 0.1 - 1e-5).mean()
    assert abs(at_bound - 0.0455) < 0.012
    assert abs(intensity.mean() - 1) < 5 * 0.048 / 90
    assert abs(intensity.std() - 0.04797) < 0.002  # of 0.05 times a normal that is clamped to [-2, 2]
    assert abs(np.median(np.abs(intensity - 1)) - 0.0337) < 0.002  # half of a normal is within 0.6745 deviations
    assert abs(np.corrcoef(shift, intensity)[0, 1]) < 0.06


def test_augmented_images_are_not_clamped(atc):
    torch.manual_seed(0)
    white = atc.augment(torch.full((200, 1, 4, 84, 84), 255, dtype=torch.uint8))
    assert white.dtype == torch.float32
    assert white.max() > 1.05
    assert white.amax((1, 2, 3, 4)).min() < 0.95
    assert not atc.augment(torch.zeros(5, 1, 4, 84, 84, dtype=torch.uint8)).any()


def test_one_draw_is_shared_by_a_sample(atc, stacks):
    """By its stacks and their frames; samples, and calls, have their own."""
    torch.manual_seed(0)
    draws = []
    for _ in range(2):
        augmented = atc.augment(stacks).numpy()
        assert augmented.shape == stacks.shape
        for sample, original in zip(augmented, stacks.numpy(), strict=True):
            (shift,), (intensity,) = find_draws(sample[0, :1], original[0, 0])
            draws.append((shift, intensity.round(5)))
            dy, dx = shift // 9 - 4, shift % 9 - 4
            padded = np.pad(original, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge")  # [3, 4, 92, 92]
            expected = padded[:, :, 4 + dy : 88 + dy, 4 + dx : 88 + dx] * (intensity / 255)
            np.testing.assert_allclose(sample, expected, atol=1e-5)
    assert len({shift for shift, _ in draws}) > 20
    assert len({intensity for _, intensity in draws}) > 30


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_augment_as_one_process(atc, monkeypatch, stacks, world_size):
    torch.manual_seed(0)
    whole = atc.augment(stacks)
    monkeypatch.setattr(atc, "WORLD_SIZE", world_size)
    pieces = []
    for rank, piece in enumerate(stacks.chunk(world_size)):
        monkeypatch.setattr(atc, "RANK", rank)
        torch.manual_seed(0)
        pieces.append(atc.augment(piece))
    assert torch.equal(torch.cat(pieces), whole)
