"""Scripted players: what they record is what the dataset would hold, and each of them beats random play."""

import gzip
import signal
import subprocess
import sys
import time
from pathlib import Path

import ale_py
import numpy as np
import pytest
from conftest import ROOT, SMALL, environment, load, run, train
from test_env import plain_env

GAMES = ("freeway", "pong", "basic_math")
ROWS = 300


@pytest.fixture
def players():
    return load("benchmarks/players.py")


def record(folder: Path, *flags, code: int = 0) -> subprocess.CompletedProcess:
    flags = ("--rows", ROWS, "--jobs", 2, "--games", *GAMES, *flags)
    return run("benchmarks/players.py", "--data-dir", folder, *flags, cwd=folder, code=code)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder: Path, game: str, checkpoint: int) -> dict[str, np.ndarray]:
    logs, columns = folder / game / "1/replay_logs", {}
    for field in ("observation", "action", "reward", "terminal"):
        with gzip.open(logs / f"$store$_{field}_ckpt.{checkpoint}.gz") as file:
            columns[field] = np.load(file)
    return columns


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    record(folder)
    return folder


@pytest.mark.parametrize("game", load("benchmarks/players.py").PLAYERS)
def test_frames_are_those_of_gymnasium(players, game):
    """To one grey level, resets included. The oracle's emulator does not look ahead, so that this leaves no trace."""
    played, plain = players.Game(game, 0.3, [7], sticky=0), plain_env(game)
    oracle, terminal = plain.unwrapped.ale, True
    oracle.setInt("random_seed", played.ale.getInt("random_seed"))  # the console's memory at its start depends on it
    oracle.loadROM(ale_py.roms.get_rom_path(game))
    other = plain_env(game)
    other.reset()
    of_reset = other.unwrapped.ale.getEpisodeFrameNumber()  # a reset takes some frames, in a few games
    for step in range(200):
        if terminal:
            plain.env.env.noops = played.ale.getEpisodeFrameNumber() - of_reset
            stack, _ = plain.reset()
        frame = played.frame()
        assert frame.dtype == np.uint8 and frame.any()
        assert abs(frame.astype(int) - stack[-1]).max() <= 1, step
        action = played.choose()
        reward, terminal = played.step(action)
        stack, *expected = plain.step(action)
        assert [reward, terminal] == expected[:2], step
        if terminal:
            played.reset()


def test_splits_are_the_benchmarks(players):
    atc = load("pretrain_atc.py")
    splits = {"ID": atc.ID_GAMES, "near-OOD": atc.NEAR_OOD_GAMES, "far-OOD": atc.FAR_OOD_GAMES}
    assert players.SPLITS.keys() == splits.keys()
    for split, least in {"ID": 6, "near-OOD": 3, "far-OOD": 2}.items():
        assert len(players.SPLITS[split]) >= least
        assert set(players.SPLITS[split]) <= set(splits[split])
    assert sorted(players.PLAYERS) == sorted(sum(players.SPLITS.values(), ()))


def test_layout_padding_and_terminals(players, tmp_path):
    """3 blank rows before every episode, and nowhere else; the rows between are those of the game played again."""
    rows = 1_000
    players.name_source(tmp_path, "breakout")
    players.record(tmp_path, "breakout", 2, rows, 5)
    columns = read(tmp_path, "Breakout", 2)
    dtypes = {"observation": np.uint8, "action": np.int32, "reward": np.float32, "terminal": np.uint8}
    assert {field: column.dtype for field, column in columns.items()} == dtypes
    assert {len(column) for column in columns.values()} == {rows + 1}
    starts = np.append(0, np.flatnonzero(columns["terminal"]) + 1)
    assert len(starts) > 2
    padding = (starts[:, None] + np.arange(3)).ravel()
    padding = padding[padding <= rows]
    assert np.array_equal(np.flatnonzero(~columns["observation"].any((1, 2))), padding)
    assert not any(columns[field][padding].any() for field in columns)

    game = players.Game("breakout", 0.6, [5, 2])
    for row in np.delete(np.arange(rows + 1), padding):
        assert np.array_equal(game.frame(), columns["observation"][row])
        action = game.choose()
        played = (action, *game.step(action))
        assert played == tuple(columns[field][row] for field in ("action", "reward", "terminal"))
        if played[-1]:
            game.reset()
    assert columns["reward"].sum() > 0


def test_quality_grows(players, tmp_path):
    """Of the player that only walks up, the other actions are random: two thirds of all that are."""
    players.name_source(tmp_path, "freeway")
    for checkpoint, share in {1: 1.0, 2: 0.6, 3: 0.3, 4: 0.1, 5: 0.05}.items():
        players.record(tmp_path, "freeway", checkpoint, 1_500, 0)
        other = (read(tmp_path, "Freeway", checkpoint)["action"][3:] != 1).mean()  # action 1 is UP
        expected = 2 / 3 * share
        assert abs(other - expected) < 4 * (expected * (1 - expected) / 1_500) ** 0.5, checkpoint


def test_episodes_begin_with_up_to_30_noops(players):
    game, frames = players.Game("pong", 1.0, [0]), set()
    for _ in range(200):
        frames.add(game.ale.getEpisodeFrameNumber())
        game.reset()
    assert min(frames) == 0 and max(frames) == 30


def test_pretraining_and_fine_tuning_read_recordings(recorded, tmp_path):
    flags = [*SMALL, "--data-dir", recorded, "--runs", 1, "--batch-size", 8]
    games = ["--games", "pong", "freeway", "--checkpoints", 1, 2, 3, 4, 5, "--rows-per-checkpoint", ROWS]
    train("pretrain_atc.py", *flags, *games, "--total-steps", 2, cwd=tmp_path)
    checkpoint = tmp_path / "runs/pretrain_atc__0/checkpoint.pt"
    assert checkpoint.exists()
    shards = {path.name.rsplit("_", 2)[0] for path in (tmp_path / "cache").iterdir()}
    assert shards == {f"{game}_1_{n}" for game in ("pong", "freeway") for n in range(1, 6)}
    flags += ["--game", "basic_math", "--checkpoints", 5, "--checkpoint", checkpoint, "--num-transitions", ROWS]
    flags += ["--epochs", 1, "--eval-episodes", 1, "--max-episode-steps", 5]
    run("finetune_bc.py", *flags, cwd=tmp_path)
    assert "scripted_play" in (tmp_path / "results/bc/atc/basic_math/seed0.json").read_text()


def test_recordings_are_kept_and_the_rest_is_made(recorded, tmp_path):
    """The same files come out of one process, of a call for a part, and of another that makes the rest."""
    record(tmp_path, "--jobs", 1, "--games", "Pong")
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.gz")}
    assert len(first) == 20
    lost = tmp_path / "Pong/1/replay_logs/$store$_action_ckpt.2.gz"
    lost.unlink()
    record(tmp_path)
    assert files(tmp_path) == files(recorded)
    changed = {path for path, written in first.items() if path.stat().st_mtime_ns != written}
    assert changed and all(path.name.endswith("ckpt.2.gz") for path in changed)
    observations = [content for name, content in files(recorded).items() if "observation" in name]
    assert len(set(observations)) == 15  # no two checkpoints are alike


def test_another_seed_plays_otherwise(players, recorded, tmp_path):
    players.name_source(tmp_path, "pong")
    players.record(tmp_path, "pong", 5, ROWS, seed=1)
    assert (read(tmp_path, "Pong", 5)["observation"] != read(recorded, "Pong", 5)["observation"]).any()


def test_an_interrupted_recording_leaves_nothing_half_written(recorded, tmp_path):
    """Ended in all ways and at many times: the processes go, files are whole, and the next call goes on."""
    command = [sys.executable, ROOT / "benchmarks/players.py", "--data-dir", tmp_path, "--rows", ROWS, "--jobs", 2]
    command = [*map(str, command), "--games", *GAMES]
    for number, seconds in ((signal.SIGKILL, 0), (signal.SIGTERM, 0.05), (signal.SIGINT, 0.1)):
        before = len(list(tmp_path.rglob("*.gz")))
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
        while len(list(tmp_path.rglob("*.gz"))) <= before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.send_signal(number)
        assert process.wait(timeout=60)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "a process is left"
            time.sleep(0.05)
        whole = files(recorded)
        assert all(whole[name] == content for name, content in files(tmp_path).items() if not name.endswith(".tmp"))
    record(tmp_path)
    assert {name: content for name, content in files(tmp_path).items() if not name.endswith(".tmp")} == whole


def test_a_file_appears_whole(players, tmp_path, monkeypatch):
    """Cut off before a file gets its name, a recording leaves temporary files only."""
    players.name_source(tmp_path, "pong")
    monkeypatch.setattr(Path, "replace", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        players.record(tmp_path, "pong", 5, ROWS, 0)
    assert {path.suffix for path in (tmp_path / "Pong/1").rglob("*") if path.is_file()} == {".tmp"}


def test_mistakes_are_told(tmp_path):
    other = tmp_path / "Freeway/1/replay_logs/$store$_action_ckpt.1.gz"
    other.parent.mkdir(parents=True)
    other.touch()
    assert "recordings of another source (dqn_replay)" in record(tmp_path, code=1).stderr
    (tmp_path / "Freeway/source.txt").write_text("rainbow")
    assert "recordings of another source (rainbow)" in record(tmp_path, code=1).stderr
    assert "Choose --games from: breakout" in record(tmp_path, "--games", "chess", code=1).stderr
    assert "Choose --data-dir DIR" in run("benchmarks/players.py", cwd=tmp_path, code=1).stderr


def test_table_of_scores(tmp_path):
    flags = ("--scores", "--games", "basic_math", "--episodes", 3, "--jobs", 2)
    printed = run("benchmarks/players.py", *flags, cwd=tmp_path).stdout
    (row,) = [line for line in printed.splitlines() if line.startswith("| basic_math")]
    _, split, player, random, difference, normalised, rate = row.strip("| ").split(" | ")
    assert (split, random) == ("far-OOD", "0.0 ± 0.0")
    mean, error = map(float, player.split(" ± "))
    assert float(difference) == pytest.approx(mean / error, rel=0.2)
    assert float(normalised) == pytest.approx(mean / 3.57, rel=0.02)
    assert float(rate.replace(",", "")) > 0


EPISODES = {"surround": 8, "tennis": 5, "pong": 10}  # which are long; 20 of the others


@pytest.mark.slow
@pytest.mark.parametrize("game", load("benchmarks/players.py").PLAYERS)
def test_players_beat_random_play(players, game):
    """By four standard errors of the difference; what the table says, with another seed."""
    episodes = range(EPISODES.get(game, 20))
    player = [players.score(game, 0.05, episode, 1) for episode in episodes]
    random = [players.score(game, 1.0, episode, 1) for episode in episodes]
    error = (np.var([player, random], axis=1, ddof=1).sum() / len(episodes)) ** 0.5
    assert np.mean(player) - np.mean(random) > 4 * error
