"""What the scripts read is what was played: from replay files to batches, their order and their augmentation.

Real play, recorded here by a plain loop around gymnasium's environment, is written as replay files; the expected rows,
stacks and returns come from what the loop kept in lists.
"""

import gzip
import mmap
import re
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import ale_py
import cv2
import gymnasium
import numpy as np
import pytest
import torch
from ale_py import roms
from conftest import SMALL, load, run
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from torch.utils.data import DataLoader

gymnasium.register_envs(ale_py)
FIELDS = {"observation": np.uint8, "action": np.int32, "reward": np.float32, "terminal": np.uint8}
BUCKET, FLAT = "{game}/{run}/replay_logs/$store$_{field}_ckpt.{checkpoint}.gz", "{game}/{field}_{run}_{checkpoint}.gz"


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
    columns = ([row.stack[-1] for row in rows], *([row[i] for row in rows] for i in (1, 2, 3)))
    paths = {}
    for (field, dtype), column in zip(FIELDS.items(), columns, strict=True):
        paths[field] = data_dir / layout.format(game=game, run=1, field=field, checkpoint=number)
        paths[field].parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(paths[field], "wb", compresslevel=1) as stream:
            np.save(stream, changes.get(field, np.array(column, dtype)))
    return paths


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


def check_windows(module, shards: list, files: list, length: int) -> None:
    """Every window of the shards, in their order, against the rows of `files`: (game_id, real rows, begins blank)."""
    windows = module.Windows(shards, length, 10**6, 0, "all")
    assert windows.batches == 1
    batch = windows[0]
    stacks = module.stack_frames(torch.as_tensor(batch["frames"]), torch.as_tensor(batch["starts"])).numpy()
    w = 0
    for game_id, real, begins_blank in files:
        rows = [(BLANK, 0)] * 3 * begins_blank + real  # a window's first 3 rows are but history
        for begin in range(len(rows) - length + 1):
            expected = rows[begin : begin + length]
            assert batch["game_id"][w] == game_id
            np.testing.assert_array_equal(batch["frames"][w], [row.stack[-1] for row, _ in expected])
            assert batch["starts"][w].tolist() == [row.first for row, _ in expected]
            assert batch["action"][w].tolist() == [row.action for row, _ in expected]
            assert batch["reward"][w].tolist() == [sign(row.reward) for row, _ in expected]
            assert batch["terminal"][w].tolist() == [row.terminal for row, _ in expected]
            assert batch["return_to_go"][w].tolist() == [togo for _, togo in expected]
            for n, (row, _) in enumerate(expected[3:]):
                assert row.real  # padding is never a sample's own row
                np.testing.assert_array_equal(stacks[w, n], row.stack)
            w += 1
    assert w == len(batch["frames"])


@pytest.fixture
def atc():
    return load("pretrain_atc.py")


@pytest.fixture
def in_order(atc, monkeypatch):
    """Windows come in the order of their rows."""
    begin = atc.Windows.__init__

    def begin_in_order(self, *args):
        begin(self, *args)
        self.epoch, self.order = 0, np.arange(self.size, dtype=np.uint32)

    monkeypatch.setattr(atc.Windows, "__init__", begin_in_order)


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
def test_reader_returns_what_was_played(atc, in_order, breakout, pong, tmp_path, padded, skip, length):
    """Every field of every window and every stack, of games that end, are cut, and go on beyond the rows read."""
    files, shards = [], []
    for game, game_id, episodes in (("breakout", 13, breakout), ("pong", 39, pong)):
        file = file_of(episodes, padded, skip)
        read = len(file) - len(episodes[-1]) - 3 * padded - 30  # amid the last but one episode
        assert not any(row.terminal for row in file[read - 5 : read])
        write(tmp_path, game.capitalize(), file)
        real = real_rows(file, read)
        assert {sign(row.reward) for row, _ in real} >= ({-1, 0, 1} if game == "breakout" else {-1, 0})
        assert real[-1][1] != sum(sign(row.reward) for row in file[read - 1 : read])  # more is to come after the last
        files.append((game_id, real, not file[0].real))
        shards.append((game_id, atc.prepare_shard(tmp_path / "cache", tmp_path, read, game, 1, 1)))
    check_windows(atc, shards, files, length)


@pytest.mark.parametrize("padded", [True, False])
def test_rows_may_end_anywhere(atc, in_order, breakout, tmp_path, padded):
    """Also within or right before the padding, or with an episode's first row."""
    file = file_of(breakout, padded)
    write(tmp_path, "Breakout", file)
    for read in range(30, 50):
        path = atc.prepare_shard(tmp_path / "cache", tmp_path, read, "breakout", 1, 1)
        check_windows(atc, [(13, path)], [(13, real_rows(file, read), padded)], 4)


def test_first_real_row_of_a_padded_file_is_a_sample(atc, in_order, breakout, tmp_path):
    write(tmp_path, "Breakout", file_of(breakout, padded=True))
    path = atc.prepare_shard(tmp_path / "cache", tmp_path, 40, "breakout", 1, 1)
    batch = atc.Windows([(13, path)], 4, 1, 0, "all")[0]
    stack = atc.stack_frames(torch.as_tensor(batch["frames"]), torch.as_tensor(batch["starts"]))[0, 0].numpy()
    first = breakout[0][0].stack
    assert first[3].any()
    assert not first[:3].any()
    np.testing.assert_array_equal(stack, first)


def test_last_row_of_a_file_is_never_used(atc, in_order, breakout, tmp_path):
    """Whatever it holds; all rows but it can be read."""
    file = file_of(breakout, padded=True)
    stale = Row(np.full((4, 84, 84), 255, np.uint8), 17, 1000.0, 1)
    write(tmp_path, "Breakout", [*file[:-1], stale])
    read = len(file) - 1
    path = atc.prepare_shard(tmp_path / "cache", tmp_path, read, "breakout", 1, 1)
    check_windows(atc, [(13, path)], [(13, real_rows(file, read), True)], 4)
    with pytest.raises(SystemExit, match=f"{read} usable rows"):
        atc.prepare_shard(tmp_path / "cache", tmp_path, read + 1, "breakout", 1, 1)


@pytest.mark.parametrize("padded", [True, False])
def test_black_frame_is_not_padding(atc, in_order, breakout, tmp_path, padded):
    """A real one: amid an episode, or as the first one or two of it, with action 0 and no reward, or three moved."""
    whole = breakout[5]
    episodes = [blacken(whole[20 * k : 20 * k + 20], range(0), 0) for k in range(5)]
    for k, episode in enumerate(episodes):  # five short ones, of which each begins as after a reset
        for i in range(3):
            stack = episode[i].stack.copy()
            stack[: 3 - i] = 0
            episode[i] = episode[i]._replace(stack=stack)
        episode[0] = episode[0]._replace(first=True)
        episode[-1] = episode[-1]._replace(terminal=int(k < 4))
    changes = (range(0), 0), (range(0, 1), 0), (range(0, 2), 0), (range(8, 14), 0), (range(0, 3), 1)
    episodes = [blacken(episode, *change) for episode, change in zip(episodes, changes, strict=True)]
    file = file_of(episodes, padded)
    write(tmp_path, "Breakout", file)
    path = atc.prepare_shard(tmp_path / "cache", tmp_path, len(file) - 1, "breakout", 1, 1)
    check_windows(atc, [(13, path)], [(13, real_rows(file, len(file) - 1), padded)], 4)


def test_black_frame_soon_after_a_files_beginning_is_not_padding(atc, in_order, breakout, tmp_path):
    """Where the file begins amid an episode, with a frame that is not black."""
    file = blacken(breakout[5][20:60], range(1, 3), 0)
    write(tmp_path, "Breakout", file)
    path = atc.prepare_shard(tmp_path / "cache", tmp_path, 39, "breakout", 1, 1)
    check_windows(atc, [(13, path)], [(13, real_rows(file, 39), False)], 4)


def test_a_black_first_row_after_the_padding_is_real(atc, in_order, breakout, tmp_path):
    """Of the file, and of a later episode: no more than three rows are padding."""
    black = Row(np.zeros((4, 84, 84), np.uint8), 0, 0.0, 0, first=True)
    second = [row._replace(first=False) for row in breakout[0]]  # its stacks begin as those after a black frame
    file = file_of([[black, *second], [black, *second[:-1]]], padded=True)
    write(tmp_path, "Breakout", file)
    path = atc.prepare_shard(tmp_path / "cache", tmp_path, len(file) - 1, "breakout", 1, 1)
    check_windows(atc, [(13, path)], [(13, real_rows(file, len(file) - 1), True)], 4)


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("padded", [True, False])
def test_atc_leaves_out_futures_of_other_episodes(atc, in_order, monkeypatch, breakout, tmp_path, padded, offset):
    """What ATC makes of real windows: the stacks of now and of later, and whether the episode ends in between."""
    file = file_of(breakout, padded)
    write(tmp_path, "Breakout", file)
    path = atc.prepare_shard(tmp_path / "cache", tmp_path, len(file) - 1, "breakout", 1, 1)
    objective = atc.ATC(atc.Args(width_multiplier=0.125, blocks=(1, 1, 1, 1), future_offset=offset))
    windows = atc.Windows([(13, path)], objective.length, 10**6, 0, "all")
    given = []
    monkeypatch.setattr(objective, "loss", lambda *args: given.extend(args))
    monkeypatch.setattr(atc, "augment", lambda stacks: stacks / 255)
    objective({name: torch.as_tensor(array) for name, array in windows[0].items()})
    obs, next_obs = ((stacks * 255).round().byte().numpy() for stacks in given[:2])
    game_id, done = given[2:]
    assert (game_id == 13).all()

    real = [row for row in file[:-1] if row.real]
    samples = real[0 if padded else 3 :][: len(real) - offset - (0 if padded else 3)]
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


def test_dt_returns_to_go_end_with_the_episode_not_with_the_shard(atc, in_order, monkeypatch, pong, tmp_path):
    """By hand: episodes end with rows 20 and 45 of a file of 60, of which 40 rows are read."""
    reward, terminal = np.zeros(60, np.float32), np.zeros(60, np.uint8)
    reward[[5, 18, 20, 30, 43, 45, 50]] = 7, -2, 1, 1, 1, -1, 1
    terminal[[20, 45]] = 1
    write(tmp_path, "Pong", pong[1][:60], reward=reward, terminal=terminal)
    path = atc.prepare_shard(tmp_path / "cache", tmp_path, 40, "pong", 1, 1)
    dt, given = load("pretrain_dt.py"), []
    objective = dt.DT(dt.Args(width_multiplier=0.125, blocks=(1, 1, 1, 1)))
    monkeypatch.setattr(objective, "loss", lambda *inputs: given.extend(inputs))
    batch = atc.Windows([(39, path)], objective.length, 10**6, 0, "all")[0]
    objective({name: torch.as_tensor(array) for name, array in batch.items()})
    of_row = [1] * 6 + [0] * 13 + [1] * 2 + [1] * 10 + [0] * 13  # 7 - 2 + 1 are 1 - 1 + 1; 1 + 1 - 1 from row 21 to 30
    windows = 40 - 11 + 1  # of 3 rows before, and 8 steps
    assert given[2].tolist() == [of_row[first + 3 : first + 11] for first in range(windows)]
    steps = [[row > 20 and first + 3 <= 20 for row in range(first + 3, first + 11)] for first in range(windows)]
    assert given[4].tolist() == steps  # past the end
    assert objective.neck.largest_return[39] == 1


# Files and the cache.
def test_prepare_numbers_the_games(atc, breakout, tmp_path):
    """In the order of the games and their checkpoints; far-OOD games, which no table knows, are 0."""
    for game in ("Breakout", "MsPacman", "Klax"):
        for number in (1, 2):
            write(tmp_path, game, file_of(breakout, padded=True)[:20], FLAT, number)
    args = atc.Args(data_dir=tmp_path, cache_dir=tmp_path / "cache", runs=(1,), checkpoints=(2, 1))
    shards = atc.prepare(args, ("ms_pacman", "klax", "breakout"), 15)
    assert [game_id for game_id, _ in shards] == [35, 35, 0, 0, 13, 13]
    begins = [f"{game}_1_{number}_" for game in ("ms_pacman", "klax", "breakout") for number in (2, 1)]
    assert all(path.name.startswith(begin) for (_, path), begin in zip(shards, begins, strict=True))


def test_both_layouts_give_the_same_shard(atc, breakout, tmp_path):
    file, shards = file_of(breakout, padded=True), []
    for folder, layout in (("bucket", BUCKET), ("flat", FLAT)):
        write(tmp_path / folder, "Breakout", file, layout)
        shards.append(atc.prepare_shard(tmp_path / "cache", tmp_path / folder, 100, "breakout", 1, 1))
    assert shards[0] != shards[1]
    assert shards[0].read_bytes() == shards[1].read_bytes()


@pytest.mark.parametrize("layout", [BUCKET, FLAT])
def test_checkpoint_50_falls_back(atc, breakout, tmp_path, layout):
    """To 49, then to 48; no other checkpoint does."""
    file = file_of(breakout, padded=True)
    for number in (48, 49, 50):
        begin = number - 40  # another part of the play
        write(tmp_path, "Breakout", file[begin:], layout, number)
        path = atc.prepare_shard(tmp_path / "cache", tmp_path, 15, "breakout", 1, 50)
        np.testing.assert_array_equal(atc.open_shard(path)["frame"][0], file[begin].stack[-1])
    with pytest.raises(SystemExit, match=r"_(47|ckpt\.47)\.gz"):
        atc.prepare_shard(tmp_path / "cache", tmp_path, 15, "breakout", 1, 47)


def test_only_the_rows_asked_for_are_decompressed(atc, breakout, tmp_path):
    """What follows them may be damaged: no one notices."""
    file = file_of(breakout, padded=True)[:60]
    noise = np.random.default_rng(0).integers(256, size=(150, 84, 84), dtype=np.uint8)  # a megabyte, compressed or not
    long = [*file, *(Row(frame[None], 0, 0.0, 0) for frame in noise)]
    paths = write(tmp_path, "Breakout", long)
    intact = atc.prepare_shard(tmp_path / "cache", tmp_path, 50, "breakout", 1, 1).read_bytes()
    content = paths["observation"].read_bytes()
    paths["observation"].write_bytes(content[:-500_000] + b"\xff" * 500_000)
    with pytest.raises((OSError, EOFError, zlib.error)), gzip.open(paths["observation"]) as stream:
        stream.read()
    assert atc.prepare_shard(tmp_path / "cache", tmp_path, 50, "breakout", 1, 1).read_bytes() == intact


def test_shards_are_kept_until_the_source_changes(atc, breakout, tmp_path):
    def prepare(rows=50):
        path = atc.prepare_shard(tmp_path / "cache", tmp_path, rows, "breakout", 1, 1)
        return path, path.stat().st_mtime_ns, len(atc.open_shard(path)), atc.open_shard(path)["fields"]["action"][10]

    file = file_of(breakout, padded=True)
    write(tmp_path, "Breakout", file)
    before = prepare()
    assert prepare() == before  # not written again
    assert prepare(rows=30)[2] == 30  # other rows, another shard
    assert prepare() == before
    write(tmp_path, "Breakout", file)  # downloaded again, to the same content
    assert prepare() == before
    write(tmp_path, "Breakout", [row._replace(action=5) for row in file])
    assert before[3] != 5
    assert prepare()[3] == 5
    assert not list(tmp_path.glob("cache/**/*.tmp"))


# Errors, as a user meets them.
def script_error(tmp_path: Path, *args, script: str = "pretrain_atc.py") -> str:
    """The line with which a script ends that is given a small replay of breakout and these arguments."""
    small = ["--cache-dir", "cache", "--num-workers", "0", *SMALL, "--data-dir", "data", "--runs", "1"]
    if script == "pretrain_atc.py":
        small += ["--games", "breakout", "--checkpoints", "1", "--total-steps", "1", "--batch-size", "4"]
        small += ["--rows-per-checkpoint", "50"]
    done = run(script, *small, *args, cwd=tmp_path, code=1)
    *before, message = done.stderr.splitlines()
    assert all(not line.strip() or "preparing" in line for line in before), done.stderr  # nothing but a progress bar
    assert not (tmp_path / "results").exists()
    return message


@pytest.fixture
def data(breakout, tmp_path) -> dict[str, Path]:
    """A small replay of breakout; its files by their fields."""
    return write(tmp_path / "data", "Breakout", file_of(breakout, padded=True)[:60])


class Evil:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def resave(path: Path, change) -> None:
    with gzip.open(path) as stream:
        array = np.load(stream)
    with gzip.open(path, "wb") as stream:
        np.save(stream, change(array), allow_pickle=True)


def test_missing_data_dir_is_an_error(tmp_path):
    message = script_error(tmp_path, "--data-dir", tmp_path / "nowhere")
    assert message.startswith("Missing")
    assert str(tmp_path / "nowhere" / "Breakout") in message


def test_missing_file_is_an_error(tmp_path, data):
    data["reward"].unlink()
    message = script_error(tmp_path)
    assert message.startswith("Missing")
    assert data["reward"].name in message
    assert data["action"].name not in message


DAMAGES = {
    "frames of floats": ("observation", lambda a: a.astype(np.float32)),
    "frames of another size": ("observation", lambda a: a[:, :80]),
    "an action that no game has": ("action", lambda a: np.where(np.arange(len(a)) == 9, 18, a)),
    "pickled objects": ("terminal", lambda a: np.array([Evil(Path("evil"))] * len(a), object)),
}
MORE_DAMAGES = {
    "frames of 16 bits": ("observation", lambda a: a.astype(np.uint16) * 2),
    "frames in another order": ("observation", lambda a: np.asfortranarray(a)),  # column-major
    "frames of text": ("observation", lambda a: a.astype("U3")),
    "actions of floats": ("action", lambda a: a.astype(np.float32)),
    "a negative action": ("action", lambda a: np.where(np.arange(len(a)) == 9, -1, a)),
    "rewards in rows": ("reward", lambda a: a[:, None]),
    "a single number": ("terminal", lambda a: np.array(0, np.uint8)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_content_is_an_error(tmp_path, data, damage):
    field, change = DAMAGES[damage]
    resave(data[field], change)
    message = script_error(tmp_path)
    assert data[field].name in message
    assert not (tmp_path / "evil").exists()  # what is pickled is not run


@pytest.mark.parametrize("damage", MORE_DAMAGES)
def test_wrong_content_is_an_error_of_the_reader(atc, tmp_path, data, damage):
    field, change = MORE_DAMAGES[damage]
    resave(data[field], change)
    with pytest.raises(SystemExit, match=re.escape(data[field].name)):
        atc.prepare_shard(tmp_path / "cache", tmp_path / "data", 50, "breakout", 1, 1)


def test_differing_lengths_are_an_error(tmp_path, data):
    resave(data["terminal"], lambda a: a[:-1])
    message = script_error(tmp_path)
    assert data["observation"].name in message
    assert "differ in length" in message


def test_truncated_file_is_an_error(atc, tmp_path, data):
    observation, reward = data["observation"].read_bytes(), data["reward"].read_bytes()
    data["observation"].write_bytes(observation[: len(observation) // 2])
    assert data["observation"].name in script_error(tmp_path)
    data["observation"].write_bytes(observation)
    for size in (0, 5, 50, len(reward) - 20):
        data["reward"].write_bytes(reward[:size])
        with pytest.raises(SystemExit, match=re.escape(data["reward"].name)):
            atc.prepare_shard(tmp_path / "cache", tmp_path / "data", 50, "breakout", 1, 1)


def test_what_is_not_gzip_is_an_error(tmp_path, data):
    data["action"].write_bytes(gzip.decompress(data["action"].read_bytes()))
    assert data["action"].name in script_error(tmp_path)


def test_too_few_rows_in_a_file_are_an_error(tmp_path, data):
    message = script_error(tmp_path, "--rows-per-checkpoint", "60")
    assert data["observation"].name in message
    assert "59 usable rows" in message


@pytest.mark.parametrize("rows", ["3", "8"])  # of which none, or five, are more than padding
def test_too_few_rows_for_a_sample_are_an_error(tmp_path, data, rows):
    assert "breakout" in script_error(tmp_path, "--rows-per-checkpoint", rows).lower()


def test_fewer_transitions_than_files_are_an_error(tmp_path, breakout):
    write(tmp_path / "data", "Breakout", file_of(breakout, padded=True)[:60], number=48)
    write(tmp_path / "data", "Breakout", file_of(breakout, padded=True)[:60], number=47)
    args = ["--game", "breakout", "--checkpoints", "47", "48", "--num-transitions", "1"]
    assert "rows" in script_error(tmp_path, *args, script="finetune_bc.py")


def test_fewer_samples_than_processes_are_an_error(atc, monkeypatch, tmp_path, data):
    path = atc.prepare_shard(tmp_path / "cache", tmp_path / "data", 50, "breakout", 1, 1)
    monkeypatch.setattr(atc, "WORLD_SIZE", 8)
    with pytest.raises(SystemExit):
        atc.Windows([(13, path)], 7, 8, 0, "held_out")  # a single one


def test_batch_larger_than_the_samples_is_an_error(tmp_path, data):
    message = script_error(tmp_path, "--batch-size", "64")
    assert "fewer than 64" in message


def test_unknown_game_is_an_error(tmp_path):
    message = script_error(tmp_path, "--games", "pong", "tetris")
    assert message.startswith("Unknown game 'tetris'")


def test_damaged_shard_is_an_error(atc, tmp_path, data):
    path = atc.prepare_shard(tmp_path / "cache", tmp_path / "data", 50, "breakout", 1, 1)
    path.write_bytes(path.read_bytes()[:20_000])
    assert path.name in script_error(tmp_path, "--data-dir", tmp_path / "data")


# The order of samples.
@pytest.fixture(scope="session")
def numbered(cache, tmp_path_factory) -> list[tuple[int, Path]]:
    """Shards of real play of different lengths; return_to_go has the row's number, and 1,000 more for each shard."""
    shards = []
    for s, (path, rows) in enumerate(zip(sorted(cache.glob("prepared/*.npy")), (950, 150, 403, 777), strict=True)):
        shard = np.load(path)[:rows]
        shard["fields"]["return_to_go"] = 1000 * s + np.arange(rows)
        shards.append((s, tmp_path_factory.mktemp("numbered") / f"{s}.npy"))
        np.save(shards[-1][1], shard)
    return shards


LENGTHS = (950, 150, 403, 777)  # of the numbered shards


def places(batch: dict) -> list[tuple[int, int]]:
    """(shard, first row) of a batch's windows."""
    for window in batch["return_to_go"]:
        assert (np.diff(window) == 1).all()  # consecutive rows
    found = [divmod(int(first), 1000) for first in batch["return_to_go"][:, 0]]
    assert batch["game_id"].tolist() == [shard for shard, _ in found]
    return found


@pytest.mark.parametrize("length", [4, 7])
def test_epoch_visits_every_window_once(atc, numbered, length):
    """Training: all windows but the dropped last batch; held out: the last 1%; no row is in both."""
    train = atc.Windows(numbered, length, 32, 0, "train")
    held_out = atc.Windows(numbered, length, 1, 0, "held_out")
    visited = [place for i in range(train.batches) for place in places(train[i])]
    kept = [place for i in range(held_out.batches) for place in places(held_out[i])]
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
    assert sorted(place for i in range(single.batches) for place in places(single[i])) == expected


def test_all_windows_are_visited_once(atc, numbered):
    """Fine-tuning: with a short last batch, also in the second epoch, which has another order."""
    data = atc.Windows(numbered, 4, 512, 0, "all")
    expected = [(shard, first) for shard, rows in enumerate(LENGTHS) for first in range(rows - 3)]
    batches = [places(data[i]) for i in range(2 * data.batches)]
    assert [len(batch) for batch in batches] == 2 * [512, 512, 512, 512, len(expected) - 4 * 512]
    epochs = [[place for batch in part for place in batch] for part in (batches[:5], batches[5:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]
    assert epochs[0] != expected


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_batch_is_the_same_however_it_is_reached(atc, numbered):
    """By another object, after other batches, or in a worker process. Seeds and epochs differ."""
    data = atc.Windows(numbered, 7, 64, 3, "train")
    order = [data.batches + 1, 0, 5, 2 * data.batches - 1, 5]
    batches = [data[i] for i in order]
    assert same(batches[2], batches[4])
    assert not same(batches[0], atc.Windows(numbered, 7, 64, 3, "train")[1])  # the next epoch's
    assert not same(batches[1], atc.Windows(numbered, 7, 64, 4, "train")[0])  # another seed's
    for i, batch in zip(order, batches, strict=True):
        assert same(batch, atc.Windows(numbered, 7, 64, 3, "train")[i])
    fresh = atc.Windows(numbered, 7, 64, 3, "train")
    loaded = list(DataLoader(fresh, sampler=order, batch_size=None, num_workers=2))
    assert len(loaded) == len(batches)
    for batch, other in zip(loaded, batches, strict=True):
        assert same({name: np.asarray(value) for name, value in batch.items()}, other)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("part", ["train", "held_out", "all"])
def test_ranks_share_the_batch_of_one_process(atc, monkeypatch, numbered, part, world_size):
    """In order and, but for a short last batch of "all", in equal parts."""
    batch_size = 6 if part == "held_out" else 96
    single = atc.Windows(numbered, 7, batch_size, 0, part)
    whole = [single[i] for i in range(single.batches)]
    assert len(whole) >= 2
    pieces = []
    monkeypatch.setattr(atc, "WORLD_SIZE", world_size)
    for rank in range(world_size):
        monkeypatch.setattr(atc, "RANK", rank)
        data = atc.Windows(numbered, 7, batch_size, 0, part)
        assert data.batches == single.batches
        pieces.append([data[i] for i in range(data.batches)])
    for i, batch in enumerate(whole):
        parts = [piece[i] for piece in pieces]
        assert same(batch, {name: np.concatenate([one[name] for one in parts]) for name in batch})
        if len(batch["action"]) == batch_size:
            assert {len(one["action"]) for one in parts} == {batch_size // world_size}


def test_pages_are_read_as_they_are_needed(atc, numbered):
    """Mapped files are marked as read at random: else of what is not in RAM many times what is needed would be read."""
    atc.Windows(numbered, 7, 64, 0, "train")
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for _, path in numbered:
        marks = [re.search("VmFlags: (.*)", mapping)[1].split() for mapping in mappings if str(path) in mapping]
        assert marks and all("rr" in of for of in marks)


def test_windows_are_asked_for_while_they_come_from_the_disk(atc, numbered, monkeypatch):
    """All of a batch, each whole; not after a batch that was in RAM."""
    map_shard, asked = atc.map_shard, []

    def spied(path: Path) -> SimpleNamespace:
        base = SimpleNamespace(madvise=lambda *advice: asked.append((path, *advice)))
        return SimpleNamespace(offset=map_shard(path).offset, base=base)

    data = atc.Windows(numbered, 7, 64, 0, "train")
    monkeypatch.setattr(atc, "map_shard", spied)
    blocks = iter([0, 8, 8, 8, 8, 16, 16, 16])  # read by the process so far, before and after each of four batches
    monkeypatch.setattr(atc.resource, "getrusage", lambda _: SimpleNamespace(ru_inblock=next(blocks)))
    for is_cold in (True, True, False, True):
        asked.clear()
        batch = data[0]
        assert len(asked) == 64 * is_cold
        for window, (path, advice, start, length) in zip(batch["frames"], asked, strict=is_cold):
            assert advice == mmap.MADV_WILLNEED
            assert start % mmap.PAGESIZE == 0 and length <= 7 * 7064 + mmap.PAGESIZE
            content = path.read_bytes()[start : start + length]
            assert all(frame.tobytes() in content for frame in window)


# Replay that the script plays itself.
def test_own_replay_is_what_the_environment_returned(atc, monkeypatch, tmp_path):
    """Padded, of the right length, and frame by frame what ALE shows for the same seeds and actions, sticky ones."""
    game, rows, seeds = "klax", 600, []
    AtariVectorEnv = atc.AtariVectorEnv

    class Spy(AtariVectorEnv):
        def reset(self, *, seed):
            seeds.append(seed)
            return super().reset(seed=seed)

    monkeypatch.setattr(atc, "AtariVectorEnv", Spy)
    atc.play_game(tmp_path, rows, game)
    files = {field: tmp_path / BUCKET.format(game="Klax", run=1, field=field, checkpoint=1) for field in FIELDS}
    columns = {}
    for field, dtype in FIELDS.items():
        with gzip.open(files[field]) as stream:
            columns[field] = np.load(stream)
        assert columns[field].dtype == dtype
        assert rows < len(columns[field]) <= rows + 4  # readers leave out the last row
    observation, action, reward, terminal = columns.values()

    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.25)
    ended, i = True, 0
    for seed in seeds:  # an episode each
        assert ended
        assert not any(column[i : i + 3].any() for column in columns.values())
        i, ended = i + 3, False
        ale.setInt("random_seed", seed)
        ale.loadROM(roms.get_rom_path(game))
        ale.reset_game()
        screen = ale.getScreenGrayscale()
        while not ended and i < len(action):
            frame = cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)
            np.testing.assert_array_equal(observation[i], frame, err_msg=f"row {i}")
            points, screens = 0, []
            for _ in range(4):
                points += ale.act(ale.getMinimalActionSet()[action[i]])
                screens.append(ale.getScreenGrayscale())
                if ale.game_over():
                    break
            screen = np.maximum(*screens[-2:]) if len(screens) == 4 else screens[-1]
            ended = ale.game_over()
            assert (reward[i], terminal[i]) == (points, ended), i
            i += 1
    assert i == len(action)
    assert terminal.sum() >= 2  # several episodes
    assert set(action) == set(range(len(ale.getMinimalActionSet())))
    assert len(set(seeds)) == len(seeds)


def test_own_replay_is_played_once(atc, monkeypatch, tmp_path):
    atc.play_game(tmp_path / "one", 50, "pong")
    atc.play_game(tmp_path / "other", 50, "pong")
    files = sorted(path for path in tmp_path.glob("one/**/*") if path.is_file())
    assert len(files) == 4
    for path in files:  # the same, wherever it is played
        other = tmp_path / "other" / path.relative_to(tmp_path / "one")
        assert gzip.decompress(path.read_bytes()) == gzip.decompress(other.read_bytes())
    before = [(path, path.stat().st_mtime_ns) for path in files]
    monkeypatch.setattr(atc, "AtariVectorEnv", None)  # cannot be played again
    atc.play_game(tmp_path / "one", 50, "pong")
    assert [(path, path.stat().st_mtime_ns) for path in files] == before


def test_own_replay_can_be_read(atc, cache):
    """1,000 rows of each game: history of the first stack and all rows but padding; starts follow terminals."""
    for path in cache.glob("prepared/*.npy"):
        fields = atc.open_shard(path)["fields"]
        ends = fields["terminal"].sum()
        assert len(fields) == 3 + 1000 - 3 * (1 + ends)
        expected = [False, False, False, True, *fields["terminal"][3:-1].tolist()]
        assert fields["starts"].tolist() == expected


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
