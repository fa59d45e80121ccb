"""download_data.py, against files in the sources' formats that a server on this machine sends (tests/data).

tests/data/truth.json tells what was played: rows and CRC-32 of the frames, actions and rewards' signs of each episode.
The files were written by TensorFlow and by Hugging Face's library, from games played for this purpose. The table of
montezuma_revenge, of which only the training split is here, has its stacks' bytes in another order, and a time-out.
"""

import functools
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
TRUTH = json.loads((DATA / "truth.json").read_text())
SAMPLE = (DATA / "rlu/Breakout/run_1-00001-of-00050").read_bytes()  # 5 games, 1,083 rows, 1,098 with padding
ROWS = {"rlu": 1098, "breakout": 1381 + 7 * 3, "montezuma_revenge": 1130 + 3 * 3}  # all rows with padding


# ---- what the tests share --------------------------------------------------------------------------------------------
class Server:
    """Serves `files` (path: content). `faults` (path: (fault, requests)): break off, stall, be slow, answer a code."""

    def __init__(self):
        self.files, self.faults, self.requests, self.sent = {}, {}, [], 0
        self.go_on = threading.Event()  # ends stalls
        server = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self):
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
                super().setup()

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = self.path.partition("?")[0]
                server.requests.append(f"{self.command} {path}")
                fault, times = server.faults.get(path, ("", 0))
                server.faults[path] = (fault, times - 1)
                fault = fault if times > 0 else ""
                if path not in server.files or isinstance(fault, int):
                    return self.send_error(fault or 404)
                content = server.files[path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                if self.command == "HEAD":
                    return None
                for i in range(0, len(content), 2**14):
                    if fault in ("break", "stall") and i >= len(content) // 2:
                        server.go_on.wait(20 if fault == "stall" else 0)
                        return None
                    time.sleep(0.1 if fault == "slow" else 0)
                    try:
                        self.wfile.write(content[i : i + 2**14])
                    except OSError:  # the client has gone
                        return None
                    server.sent += len(content[i : i + 2**14])

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that has gone
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, game: str, run: int, checkpoint: int, content: bytes = SAMPLE) -> str:
        """Serves a file of RL Unplugged; returns its path."""
        path = f"/{game}/run_{run}-{checkpoint:05}-of-00050"
        self.files[path] = content
        return path

    def add_hub(self) -> None:
        """Serves the files of JAT as the hub does."""
        for folder in (DATA / "jat").iterdir():
            entries = []
            for file in folder.iterdir():
                name = f"{folder.name}/{file.name}"
                entries.append({"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40})
                self.files[f"/datasets/jat-project/jat-dataset/resolve/main/{name}"] = file.read_bytes()
            listing = f"/api/datasets/jat-project/jat-dataset/tree/main/{folder.name}"
            self.files[listing] = json.dumps(entries).encode()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.go_on.set()
    server.http.shutdown()
    server.http.server_close()


@functools.cache
def module():
    spec = importlib.util.spec_from_file_location("download_data", ROOT / "download_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.ale_py.ALEInterface.setLoggerMode(module.ale_py.LoggerMode.Error)
    return module


def command(folder: Path, *args) -> list[str]:
    return [sys.executable, str(ROOT / "download_data.py"), "--data-dir", str(folder), *map(str, args)]


def environment(folder: Path) -> dict[str, str]:
    here = {"HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "127.0.0.1"}
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | here


def download(folder: Path, *args, code: int = 0, **options) -> str:
    """Runs the script into folder/data; returns what it printed, the progress bar left out."""
    started = command(folder / "data", *args)
    done = subprocess.run(started, env=environment(folder), capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + "\n".join(line for line in done.stderr.splitlines() if "checkpoint/s" not in line)


def convert(
    folder: Path, game: str = "breakout", source: str = "rl_unplugged", run: int = 1, checkpoint: int = 1, **args
):
    """Converts one checkpoint in this process, where its errors can be seen."""
    args = module().Args(folder, source, **({"rows_per_checkpoint": 500, "retries": 0, "timeout": 5} | args))
    bar = tqdm(disable=True)
    bar.megabytes = 0
    module().claim_folder(args, game)
    (folder / f"{module().game_folder(Path(), game)}/{run}/replay_logs").mkdir(parents=True, exist_ok=True)
    if source == "jat":
        module().convert_jat(args, game, [(run, checkpoint)], bar)
    else:
        module().convert_rl_unplugged(args, game, run, checkpoint, bar)


def error_of(*args, **options) -> str:
    with pytest.raises(SystemExit) as error:
        convert(*args, **options)
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    return message


def read(folder: Path, game: str, run: int, checkpoint: int) -> dict[str, np.ndarray]:
    """A checkpoint's arrays, as the DQN Replay Dataset has them."""
    data = {}
    for field in ("observation", "action", "reward", "terminal"):
        with gzip.open(folder / f"{game}/{run}/replay_logs/$store$_{field}_ckpt.{checkpoint}.gz") as file:
            data[field] = np.load(file)
    return data


def episodes(data: dict[str, np.ndarray]) -> list[dict]:
    """The whole episodes of a checkpoint, from three blank rows to a terminal, described as in truth.json."""
    found, first = [], 0
    for last in np.flatnonzero(data["terminal"]):
        blank, rows = slice(first, first + 3), slice(first + 3, last + 1)
        if not any(data[field][blank].any() for field in data):
            actions, signs = data["action"][rows].astype("<i4"), np.sign(data["reward"][rows]).astype("<f4")
            crcs = [zlib.crc32(array.tobytes()) for array in (data["observation"][rows], actions, signs)]
            names = ("frames_crc32", "actions_crc32", "reward_signs_crc32")
            found.append({"rows": len(actions), **dict(zip(names, crcs, strict=True)), "reward_signs_sum": signs.sum()})
        first = last + 1
    return found


def played(episodes: list[dict]) -> list[dict]:
    """Without what the layout cannot tell: whether a game was over or cut."""
    return [{name: value for name, value in episode.items() if name != "terminal"} for episode in episodes]


def field(number: int, content: bytes) -> bytes:
    """A protobuf field that holds bytes."""
    encoded, length = bytes([number << 3 | 2]), len(content)
    while length > 127:
        encoded, length = encoded + bytes([length & 127 | 128]), length >> 7
    return encoded + bytes([length]) + content


def numbers(values: np.ndarray | list[int], packed: int) -> bytes:
    """A protobuf list of numbers: the first `packed` of them together, the others a field each."""
    if isinstance(values, np.ndarray):
        key, each = 1 << 3 | 5, [value.tobytes() for value in values.astype("<f4")]
    else:
        key, each = 1 << 3 | 0, [bytes([value]) for value in values]
    together = field(1, b"".join(each[:packed])) if packed else b""
    return together + b"".join(bytes([key]) + value for value in each[packed:])


def record(rows: int = 20, packed: int = 10**9, **changes) -> bytes:
    """An episode as a TFRecord, with features changed or, if None, left out."""
    png = io.BytesIO()
    Image.fromarray(np.full((84, 84), 7, np.uint8)).save(png, "PNG")
    features = {"observations": [png.getvalue()] * rows, "actions": [0] * rows}
    features |= {"unclipped_rewards": np.zeros(rows), "discounts": np.ones(rows)} | changes
    entries = b""
    for name, values in features.items():
        if values is None:
            continue
        if isinstance(values, np.ndarray):
            kind, content = 2, numbers(values, packed)
        elif isinstance(values[0], bytes):
            kind, content = 1, b"".join(field(1, value) for value in values)
        else:
            kind, content = 3, numbers(values, packed)
        entries += field(1, field(1, name.encode()) + field(2, field(kind, content)))
    message = field(1, entries)
    return len(message).to_bytes(8, "little") + b"crc." + message + b"crc."


# ---- what is converted -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", ["rlu over http", "rlu in a folder"])
def test_rl_unplugged_equals_what_was_played(tmp_path, server, source):
    server.add("Breakout", 1, 1)
    url = server.url if source == "rlu over http" else DATA / "rlu"
    shown = download(tmp_path, "--games", "Breakout", "--runs", 1, "--checkpoints", 1, "--url", url,
                     "--rows-per-checkpoint", ROWS["rlu"] - 1)  # fmt: skip
    data = read(tmp_path / "data", "Breakout", 1, 1)
    assert {name: (array.dtype, array.shape[1:]) for name, array in data.items()} == {
        "observation": (np.uint8, (84, 84)), "action": (np.int32, ()), "reward": (np.float32, ()),
        "terminal": (np.uint8, ()),
    }  # fmt: skip
    assert [len(array) for array in data.values()] == [ROWS["rlu"]] * 4
    assert episodes(data) == played(TRUTH["rlu"])
    assert data["terminal"].sum() == len(TRUTH["rlu"]) and data["terminal"][-1]
    assert (tmp_path / "data/Breakout/source.txt").read_text() == "rl_unplugged\n"
    row = next(line.split() for line in shown.splitlines() if line.startswith("breakout"))
    mean = np.mean([episode["reward_signs_sum"] for episode in TRUTH["rlu"]])
    assert row == ["breakout", "1", "1", str(ROWS["rlu"]), "5", f"{mean:.2f}"]


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_jat_equals_what_was_played(tmp_path, server, where):
    server.add_hub()
    url = DATA / "jat" if where == "folder" else server.url
    for game, folder in (("breakout", "Breakout"), ("montezuma_revenge", "MontezumaRevenge")):
        download(tmp_path, "--source", "jat", "--games", game, "--runs", 1, "--checkpoints", 1, "--url", url,
                 "--rows-per-checkpoint", ROWS[game] - 1)  # fmt: skip
        data = read(tmp_path / "data", folder, 1, 1)
        truth = [episode for episode in played(TRUTH["jat"][game.replace("_", "")]) if episode["rows"] != 334]
        assert len(truth) == (7 if game == "breakout" else 3)
        assert sorted(episodes(data), key=repr) == sorted(truth, key=repr)
        assert data["terminal"].sum() == len(truth)  # the time-out among them
        assert (tmp_path / "data" / folder / "source.txt").read_text() == "jat\n"


@pytest.mark.parametrize("packed", [0, 1, 7, 29, 30])
def test_lists_of_numbers_may_be_packed_or_not(tmp_path, server, packed):
    """Protobuf allows both and any mixture."""
    actions, rewards = [t % 4 for t in range(30)], np.arange(30) / 8 - 1
    server.add("Breakout", 1, 1, gzip.compress(record(30, packed, actions=actions, unclipped_rewards=rewards)))
    convert(tmp_path, url=server.url, rows_per_checkpoint=32)
    data = read(tmp_path, "Breakout", 1, 1)
    np.testing.assert_array_equal(data["action"][3:], actions)
    np.testing.assert_array_equal(data["reward"][3:], rewards.astype(np.float32))


@pytest.mark.parametrize("same", [0, 1, 2])
def test_a_time_out_is_found_whatever_the_next_game_begins_with(tmp_path, same):
    """Also if the last frames, one or two, of the game before are the next one's first."""
    rng = np.random.default_rng(0)
    games = rng.integers(1, 255, (2, 40, 84, 84), dtype=np.uint8)
    games[0, 40 - same :] = games[1, 0]
    stacks = []
    for frames in games:
        padded = np.concatenate([frames[[0, 0, 0]], frames])
        for t in range(len(frames)):
            png = io.BytesIO()
            Image.fromarray(padded[t : t + 4].transpose(1, 2, 0)).save(png, "PNG")
            stacks.append({"bytes": png.getvalue(), "path": None})
    columns = {"image_observations": [stacks], "discrete_actions": [[1] * 80], "rewards": [[0.0] * 80]}

    def change(table):
        return pa.table({name: pa.array(columns[name], table.schema.field(name).type) for name in columns})

    convert(tmp_path / "out", source="jat", url=jat_folder(tmp_path, change), rows_per_checkpoint=85)
    data = read(tmp_path / "out", "Breakout", 1, 1)
    assert list(np.flatnonzero(data["terminal"])) == [42, 85]
    for first, frames in zip((3, 46), games, strict=True):
        assert not data["observation"][first - 3 : first].any()
        np.testing.assert_array_equal(data["observation"][first : first + 40], frames)


def test_jat_rows_are_dealt_out_in_order_and_none_twice(tmp_path):
    """Whatever is asked for first: pre-training's checkpoints have the first rows, fine-tuning's the next."""
    options = {"game": "breakout", "source": "jat", "url": str(DATA / "jat")}
    convert(tmp_path / "all", rows_per_checkpoint=ROWS["breakout"] - 1, **options)
    data = read(tmp_path / "all", "Breakout", 1, 1)
    rows = np.flatnonzero(data["observation"].any((1, 2)))  # without padding
    actions = pq.read_table(next((DATA / "jat/atari-breakout").glob("train-*")))["discrete_actions"].to_pylist()
    actions = np.concatenate(actions)  # the training split comes first
    np.testing.assert_array_equal(data["action"][rows][: len(actions)], actions)
    args = module().Args(tmp_path / "few", "jat", url=str(DATA / "jat"), rows_per_checkpoint=50)
    bar = tqdm(disable=True)
    bar.megabytes = 0
    for run in (1, 2, 5):
        (tmp_path / f"few/Breakout/{run}/replay_logs").mkdir(parents=True)
    module().claim_folder(args, "breakout")
    module().convert_jat(args, "breakout", [(5, 50), (1, 2)], bar)
    module().convert_jat(args, "breakout", [(2, 1), (1, 1)], bar)
    for place, (run, checkpoint) in {0: (1, 1), 1: (1, 2), 10: (2, 1), 24: (5, 50)}.items():
        few = read(tmp_path / "few", "Breakout", run, checkpoint)
        assert len(few["action"]) == 51
        real = few["observation"].any((1, 2))
        expected = rows[place * 51 :][: real.sum()]
        for name in few:
            np.testing.assert_array_equal(few[name][real], data[name][expected], err_msg=f"{place} {name}")
    assert len(set(module().JAT_ORDER)) == len(module().JAT_ORDER) == 5 * 51


def test_checkpoint_50_of_rl_unplugged_is_its_last_file(tmp_path, server):
    """File 49 or 48 stands in for it, under the number that readers look for."""
    for run in range(1, 6):
        server.add("Breakout", run, 49)
        server.files[f"/StarGunner/run_{run}-00048-of-00049"] = SAMPLE
    options = ["--games", "breakout", "star_gunner", "--url", server.url, "--rows-per-checkpoint", 300]
    download(tmp_path, *options, "--for", "finetuning")
    found = sorted(str(path.relative_to(tmp_path / "data")) for path in tmp_path.glob("data/*/*/*/*observation*"))
    expected = [f"{game}/{run}/replay_logs/$store$_observation_ckpt.50.gz"
                for game in ("Breakout", "StarGunner") for run in range(1, 6)]  # fmt: skip
    assert found == expected
    assert sorted(server.requests) == sorted(f"GET {path}" for path in server.files)
    assert episodes(read(tmp_path / "data", "Breakout", 3, 50)) == played(TRUTH["rlu"])[:1]
    download(tmp_path, *options, "--runs", 1, "--checkpoints", 49)
    assert len(list(tmp_path.glob("data/*/1/*/*observation_ckpt.49.gz"))) == 2  # star_gunner's is file 48


@pytest.mark.parametrize(("game", "numbers"), [("breakout", (49, 50)), ("star_gunner", (48, 49))])
def test_rows_are_not_written_twice_under_two_numbers(tmp_path, server, game, numbers):
    shown = download(tmp_path, "--games", game, "--checkpoints", *numbers, "--url", server.url, code=1)
    assert f"The last file of {game}, {numbers[0]}, stands in for" in shown and not server.requests


def test_what_is_given_twice_counts_once(tmp_path, server):
    server.add("Breakout", 1, 2)
    shown = download(tmp_path, "--games", "breakout", "Breakout", "--runs", 1, 1, "--checkpoints", 2, 2,
                     "--url", server.url, "--rows-per-checkpoint", 300)  # fmt: skip
    assert len(server.requests) == 1 and shown.count("breakout") == 1


def test_pre_training_is_the_default(tmp_path, server):
    """Runs 1 and 2, checkpoints 1 to 10, of all games that a source has: 46 and 56 of the benchmark's 65."""
    for run in (1, 2):
        for checkpoint in range(1, 11):
            server.add("Breakout", run, checkpoint)
    download(tmp_path, "--games", "breakout", "--url", server.url, "--rows-per-checkpoint", 30)
    assert len(server.requests) == len(list(tmp_path.glob("data/*/*/*/*observation*"))) == 20
    assert module().Args(tmp_path).rows_per_checkpoint == 10_000
    sources = {source: module().choose_games(source, ()) for source in ("rl_unplugged", "jat")}
    assert [len(games) for games in sources.values()] == [46, 56]
    for source, of_id, of_near in (("rl_unplugged", 38, 8), ("jat", 47, 8)):
        assert len(set(module().ID_GAMES) & set(sources[source])) == of_id
        assert len(set(module().NEAR_OOD_GAMES) & set(sources[source])) == of_near
    assert "surround" in sources["jat"]


def test_documentation_tells_which_source_has_which_game():
    rows = [line.split(" | ") for line in (ROOT / "docs/data.md").read_text().splitlines() if line.count("|") == 5][2:]
    table = {row[0].strip("| "): [cell.strip("| ") for cell in row[1:]] for row in rows}
    sources = module().SOURCES
    assert list(table) == [*module().ID_GAMES, *module().NEAR_OOD_GAMES, *module().FAR_OOD_GAMES]
    for game, (_, *has) in table.items():
        assert has == ["yes" if game in sources[source] else "-" for source in ("rl_unplugged", "jat")], game


def test_games_that_a_source_lacks_are_named(tmp_path):
    shown = download(tmp_path, "--games", "pong", "skiing", "AirRaid", code=1)
    assert "skiing (--source jat has it)" in shown and "air_raid (docs/data.md" in shown and "pong" not in shown
    assert "carnival (--source rl_unplugged has it)" in download(
        tmp_path, "--source", "jat", "--games", "carnival", code=1
    )
    assert "Unknown game 'tetris'" in download(tmp_path, "--games", "tetris", code=1)
    assert not (tmp_path / "data").exists()


def test_pong_without_the_last_point_is_noticed(tmp_path, server):
    whole, lost = np.zeros(60), np.zeros(60)
    whole[2:23] = lost[2:22] = -1
    content = gzip.compress(record(60, unclipped_rewards=whole) + record(60, unclipped_rewards=lost) + record(60))
    server.add("Pong", 1, 1, content)
    shown = download(tmp_path, "--games", "pong", "--runs", 1, "--checkpoints", 1, "--url", server.url,
                     "--rows-per-checkpoint", 150)  # fmt: skip
    assert "The winner has 21 points in 1 of 2 games" in shown
    assert "It has 20 in 1: there, the source has lost the reward of the last step" in shown


SMALL = ("--width-multiplier", 0.125, "--blocks", 1, 1, 1, 1, "--runs", 1, "--checkpoints", 1, "--batch-size", 8)


@pytest.mark.parametrize(
    ("script", "source"),
    [("pretrain_atc.py", "rl_unplugged"), ("pretrain_dt.py", "jat"), ("finetune_bc.py", "rl_unplugged")],
)
def test_converted_data_trains(tmp_path, script, source):
    url = DATA / {"rl_unplugged": "rlu", "jat": "jat"}[source]
    download(tmp_path, "--source", source, "--games", "breakout", "--url", url, "--runs", 1, "--checkpoints", 1,
             "--rows-per-checkpoint", 600)  # fmt: skip
    flags = ["--games", "breakout", "--rows-per-checkpoint", 600, "--total-steps", 2, "--log-every", 1]
    if script == "finetune_bc.py":
        flags = ["--game", "breakout", "--num-transitions", 600, "--epochs", 1]
        flags += ["--eval-episodes", 1, "--max-episode-steps", 20]
    started = [sys.executable, ROOT / script, "--data-dir", tmp_path / "data", *SMALL, *flags]
    done = subprocess.run(
        list(map(str, started)), cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- downloads that go wrong -----------------------------------------------------------------------------------------
def test_reading_stops_early(tmp_path, server):
    """Of a file of 22 MB only the beginning is sent: what 1,000 rows take, and what the sockets hold."""
    content = gzip.decompress(SAMPLE)
    compress = zlib.compressobj(1, wbits=31)
    server.add("Breakout", 1, 1, b"".join(compress.compress(content) for _ in range(60)) + compress.flush())
    convert(tmp_path, url=server.url, rows_per_checkpoint=1000)
    time.sleep(0.2)
    assert len(server.files["/Breakout/run_1-00001-of-00050"]) > 20e6
    assert server.sent < 6e6


def test_a_download_that_breaks_off_starts_again(tmp_path, server):
    path = server.add("Breakout", 1, 1)
    server.faults[path] = ("break", 1)
    convert(tmp_path, url=server.url, retries=1, rows_per_checkpoint=1000)
    assert len(server.requests) == 2
    assert episodes(read(tmp_path, "Breakout", 1, 1)) == played(TRUTH["rlu"])[:4]


@pytest.mark.parametrize("fault", ["break", "stall", 404, 403, 503])
def test_a_download_that_keeps_failing_is_named(tmp_path, server, fault):
    path = server.add("Breakout", 1, 1)
    server.faults[path] = (fault, 9)
    clock = time.monotonic()
    message = error_of(tmp_path, url=server.url, retries=1, timeout=0.5, rows_per_checkpoint=1000)
    assert server.url + path in message and "Give the same command again later" in message
    assert len(server.requests) == (1 if fault in (403, 404) else 2)
    assert time.monotonic() - clock < 5
    assert not list(tmp_path.rglob("*.gz*"))


def test_a_server_that_is_not_there_is_named(tmp_path):
    assert "refused" in error_of(tmp_path, url="http://127.0.0.1:9")
    assert "No such file" in error_of(tmp_path, url=str(tmp_path / "nowhere"))


def test_one_failure_ends_the_program_at_once(tmp_path, server):
    server.add("Breakout", 1, 1)
    server.faults[server.add("Breakout", 1, 2)] = ("stall", 9)
    shown = download(tmp_path, "--games", "breakout", "--runs", 1, "--checkpoints", 1, 2, 3, "--url", server.url,
                     "--rows-per-checkpoint", 1000, code=1)  # fmt: skip
    assert shown.count("\n") <= 1 and "run_1-00003-of-00050 cannot be read: HTTP Error 404" in shown


def test_a_kill_and_the_same_command_give_the_same_bytes(tmp_path, server):
    stalls = server.add("Breakout", 1, 2)
    server.add("Breakout", 1, 1)
    options = ["--games", "breakout", "--runs", 1, "--checkpoints", 1, 2, "--url", server.url]
    options += ["--rows-per-checkpoint", 1000, "--workers", 1]
    download(tmp_path / "uninterrupted", *options)
    server.faults[stalls] = ("stall", 1)
    process = subprocess.Popen(
        command(tmp_path / "data", *options), env=environment(tmp_path), stderr=subprocess.DEVNULL
    )
    first = tmp_path / "data/Breakout/1/replay_logs/$store$_observation_ckpt.1.gz"
    deadline = time.monotonic() + 20
    while not (first.exists() and len(server.requests) == 4) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = first.stat().st_mtime_ns
    first.with_name("$store$_action_ckpt.2.gz").write_bytes(b"of another attempt")
    download(tmp_path, *options)
    assert first.stat().st_mtime_ns == written and len(server.requests) == 5
    whole = tmp_path / "uninterrupted/data"
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*") if p.is_file())
    assert len(names) == 9
    for name in names:
        assert (whole / name).read_bytes() == (tmp_path / "data" / name).read_bytes(), name


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    options = [
        "--games",
        "breakout",
        "--runs",
        1,
        "--checkpoints",
        1,
        "--url",
        DATA / "rlu",
        "--rows-per-checkpoint",
        1000,
    ]
    shown = download(tmp_path, *options, code=1, preexec_fn=limit)
    assert "observation_ckpt.1.gz cannot be written" in shown and "Make room" in shown
    assert sorted(path.name[8:14] for path in tmp_path.rglob("*_ckpt*")) == ["action", "reward", "termin"]
    download(tmp_path, *options)
    assert episodes(read(tmp_path / "data", "Breakout", 1, 1)) == played(TRUTH["rlu"])[:4]


# ---- bad input -------------------------------------------------------------------------------------------------------
def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


def small_png() -> bytes:
    png = io.BytesIO()
    Image.fromarray(np.zeros((84, 80), np.uint8)).save(png, "PNG")
    return png.getvalue()


BAD = {
    "no gzip": (b"<html>" * 1000, "damaged"),
    "empty": (b"", "incomplete"),
    "cut off": (SAMPLE[:200_000], "incomplete"),
    "damaged gzip": (flipped(SAMPLE, 150_000), "damaged"),
    "damaged record": (gzip.compress(flipped(record(600), 40)), "damaged"),
    "damaged image": (gzip.compress(flipped(record(600), len(record(600)) // 2 // 89 * 89)), "damaged"),
    "huge record": (gzip.compress(b"\xff" * 8 + record()), "a record of"),
    "a field missing": (gzip.compress(record(discounts=None)), "discounts"),
    "lengths that differ": (gzip.compress(record(actions=[0] * 19)), "lists of"),
    "an episode of no rows": (gzip.compress(record(0, observations=[b""], actions=[0])), "lists of"),
    "another size": (gzip.compress(record(1, observations=[small_png()])), "80, 84"),
    "no image": (gzip.compress(record(1, observations=[b"GIF89a"])), "cannot be decoded"),
    "an action of no kind": (gzip.compress(record(actions=[4] * 20)), "actions from 4 to 4"),
    "too few rows": (gzip.compress(record() * 3), "69 rows"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_of_rl_unplugged_are_named(tmp_path, server, what):
    content, expected = BAD[what]
    path = server.add("Breakout", 1, 1, content)
    message = error_of(tmp_path, url=server.url)
    assert server.url + path in message and expected in message
    assert not list(tmp_path.rglob("*.gz*"))


@pytest.mark.parametrize("at", range(1000, len(SAMPLE), 40_000))
def test_a_damaged_byte_is_an_error_or_leaves_everything_as_it_was(tmp_path, server, at):
    """A damaged byte in what is read is found by gzip, protobuf or PNG."""
    server.add("Breakout", 1, 1, flipped(SAMPLE, at))
    try:
        convert(tmp_path, url=server.url, rows_per_checkpoint=ROWS["rlu"] - 1)
    except SystemExit:
        assert not list(tmp_path.rglob("*.gz*"))
    else:
        assert episodes(read(tmp_path, "Breakout", 1, 1)) == played(TRUTH["rlu"])


def jat_folder(folder: Path, change=lambda table: table, **names) -> str:
    """A folder like JAT's with the training split of breakout, changed."""
    table = pq.read_table(next((DATA / "jat/atari-breakout").glob("train-*")))
    (folder / "atari-breakout").mkdir()
    pq.write_table(change(table), folder / "atari-breakout/train-00000-of-00001.parquet")
    return str(folder)


def with_actions(table, action: int):
    lists = [[action] * len(row) for row in table["discrete_actions"]]
    return table.set_column(table.schema.get_field_index("discrete_actions"), "discrete_actions", pa.array(lists))


def still(table):
    """Every image is the first one, of an episode in which the ball has been served."""
    images = table["image_observations"].to_pylist()
    lists = [[row[9 * (i % 2)] for i in range(len(row))] for row in images]
    column = pa.array(lists, table.schema.field("image_observations").type)
    return table.set_column(table.schema.get_field_index("image_observations"), "image_observations", column)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda table: with_actions(table, 4), "actions from 4 to 4"),
        (lambda table: with_actions(table, -1), "actions from -1 to -1"),
        (lambda table: table.drop_columns("rewards"), "rewards"),
        (still, "of the stacks continue the one before"),
    ],
)
def test_bad_files_of_jat_are_named(tmp_path, change, expected):
    message = error_of(tmp_path, source="jat", url=jat_folder(tmp_path, change))
    assert "train-00000-of-00001.parquet is damaged or of another format" in message and expected in message
    assert not list(tmp_path.rglob("*.gz*"))


def test_stacks_in_another_order_are_refused(tmp_path):
    (tmp_path / "atari-alien").symlink_to(DATA / "jat/atari-montezumarevenge")
    assert "0% of the stacks continue" in error_of(tmp_path, game="alien", source="jat", url=str(tmp_path))
    assert not list(tmp_path.rglob("*.gz*"))


def test_a_damaged_or_missing_file_of_jat_is_named(tmp_path, server):
    (tmp_path / "atari-breakout").mkdir()
    assert "has no files train-" in error_of(tmp_path, source="jat", url=str(tmp_path))
    content = next((DATA / "jat/atari-breakout").glob("train-*")).read_bytes()
    (tmp_path / "atari-breakout/train-00000-of-00001.parquet").write_bytes(content[:500_000])
    assert "is damaged" in error_of(tmp_path, source="jat", url=str(tmp_path))
    shown = download(tmp_path, "--source", "jat", "--games", "breakout", "--url", server.url, code=1)
    assert f"{server.url}/datasets/jat-project/jat-dataset/tree/main/atari-breakout cannot be read" in shown
    server.add_hub()
    name = "/datasets/jat-project/jat-dataset/resolve/main/atari-breakout/train-00000-of-00001.parquet"
    server.faults[name] = (403, 9)
    shown = download(tmp_path, "--source", "jat", "--games", "breakout", "--url", server.url, code=1)
    assert f"{server.url}{name} cannot be read: " in shown and "403" in shown


def test_jat_tells_how_many_rows_there_are(tmp_path):
    message = error_of(tmp_path, source="jat", url=str(DATA / "jat"), checkpoint=2, rows_per_checkpoint=1000)
    assert "1,381 rows" in message and "2,002 are needed" in message


def test_jat_says_which_packages_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(module(), "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install pyarrow huggingface_hub"):
        module().main(module().Args(tmp_path, "jat"))


def test_sources_are_not_mixed(tmp_path):
    options = ["--games", "breakout", "--runs", 1, "--rows-per-checkpoint", 300]
    download(tmp_path, *options, "--checkpoints", 1, "--url", DATA / "rlu")
    shown = download(tmp_path, "--source", "jat", *options, "--checkpoints", 2, "--url", DATA / "jat", code=1)
    assert "has data from rl_unplugged, not from jat" in shown
    assert len(list(tmp_path.rglob("*.gz"))) == 4


def test_data_that_tells_no_source_can_be_adopted(tmp_path):
    """As another program's, or as that of this script when its notes were still in one source.json."""
    options = ["--games", "breakout", "--runs", 1, "--rows-per-checkpoint", 300, "--checkpoints", 1]
    options += ["--url", DATA / "rlu"]
    shown = download(tmp_path, *options)
    note = tmp_path / "data/Breakout/source.txt"
    note.unlink()
    (tmp_path / "data/source.json").write_text('{"breakout": "rl_unplugged"}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.gz")}
    refused = download(tmp_path, *options, code=1)
    assert "has data from a source that no source.txt names" in refused and refused.count("\n") <= 1
    assert f"if it is from rl_unplugged all the same, write that word into {note}" in refused
    assert not note.exists()
    note.write_text("rl_unplugged")
    assert download(tmp_path, *options) == shown
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.gz")} == before


def test_the_source_is_noted_before_there_is_data(tmp_path, server):
    """A folder in which a download has failed has no data, and may get that of another source."""
    server.faults[server.add("Breakout", 1, 1)] = (404, 9)
    note = tmp_path / "data/Breakout/source.txt"
    download(tmp_path, "--games", "breakout", "--url", server.url, code=1)
    assert note.read_text() == "rl_unplugged\n"
    download(tmp_path, "--source", "jat", "--games", "breakout", "--url", DATA / "jat", "--runs", 1,
             "--checkpoints", 1, "--rows-per-checkpoint", 300)  # fmt: skip
    assert note.read_text() == "jat\n"


# ---- many at once, and places that cannot be written -----------------------------------------------------------------
AT_ONCE = """import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("download_data", sys.argv.pop(1))
module = sys.modules["download_data"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
args = module.tyro.cli(module.Args)
folder = args.data_dir.parent
(folder / f"ready{sys.argv[-1]}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
module.main(args)
"""


def at_once(folder: Path, *many: list) -> list[str]:
    """Runs the script with each of these flags, all into folder/data and from the same moment on."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for i, flags in enumerate(many):
        started = [sys.executable, "-c", AT_ONCE, ROOT / "download_data.py", "--data-dir", folder / "data", *flags]
        started += ["--retries", i]  # tells them apart
        started = list(map(str, started))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(subprocess.Popen(started, env=environment(folder), **pipes))
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ready*"))) < len(many) and time.monotonic() < deadline:
        time.sleep(0.01)
    (folder / "go").touch()
    shown = [process.communicate(timeout=60)[0] for process in processes]
    assert not [text for text in shown if "Traceback" in text], shown
    return [f"code {process.returncode} {text}" for process, text in zip(processes, shown, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("attempt", range(2))
@pytest.mark.parametrize("games", [("breakout", "pong"), ("breakout", "breakout")])
def test_downloads_at_once_lose_nothing(tmp_path, server, attempt, games):
    """Two of each game, as on two machines: what is there afterwards is what one after another would have left."""
    for game in ("Breakout", "Pong"):
        for checkpoint in (1, 2):
            server.add(game, 1, checkpoint)
    options = ["--url", server.url, "--runs", 1, "--checkpoints", 1, 2, "--rows-per-checkpoint", 300, "--games"]
    shown = at_once(tmp_path, *([*options, game] for game in games * 2))
    assert all(text.startswith("code 0") for text in shown), shown
    download(tmp_path / "alone", *options, *set(games))
    assert contents(tmp_path / "data") == contents(tmp_path / "alone/data")
    assert len(contents(tmp_path / "data")) == (2 * 4 + 1) * len(set(games))


def test_two_who_write_a_file_at_once_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with module().whole_file(path) as one, module().whole_file(path) as other:
        one.write_bytes(b"1" * 9)
        other.write_bytes(b"2" * 8)
    assert contents(tmp_path) in ({"file": b"1" * 9}, {"file": b"2" * 8})


@pytest.mark.parametrize("attempt", range(3))
def test_of_two_sources_at_once_one_fills_a_folder(tmp_path, attempt):
    options = ["--games", "breakout", "--runs", 1, "--checkpoints", 1, "--rows-per-checkpoint", 1000]
    many = {"rl_unplugged": [*options, "--url", DATA / "rlu"]}
    many["jat"] = [*options, "--url", DATA / "jat", "--source", "jat"]
    shown = at_once(tmp_path, *many.values())
    source = (tmp_path / "data/Breakout/source.txt").read_text().strip()
    for name, text in zip(many, shown, strict=True):
        assert text.startswith("code 0" if name == source else "code 1"), shown
        assert name == source or "Choose another --data-dir" in text
    download(tmp_path / "alone", *many[source])
    assert contents(tmp_path / "data") == contents(tmp_path / "alone/data")


def test_a_checkpoint_that_another_download_finished_is_left_as_it_is(tmp_path):
    """Readers know a file by its time: a shard made of it would have to be made again."""
    options = {"url": str(DATA / "rlu"), "rows_per_checkpoint": 300}
    convert(tmp_path, **options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.gz")}
    convert(tmp_path, **options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.gz")} == before and len(before) == 4


@pytest.mark.parametrize("place", ["data", "data/Breakout", "data/Breakout/1", "data/Breakout/1/replay_logs", "/proc"])
def test_a_place_that_cannot_be_written_is_told_before_the_download(tmp_path, server, place):
    """A file in the place of a folder, or no permission."""
    server.add("Breakout", 1, 1)
    options = ["--games", "breakout", "--runs", 1, "--checkpoints", 1, "--url", server.url]
    if place == "/proc":
        options += ["--data-dir", "/proc/data"]
    else:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    started = command(tmp_path / "data", *options)
    done = subprocess.run(started, env=environment(tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search(r"^(FileExists|NotADirectory|FileNotFound)Error: .*data", done.stderr, re.MULTILINE), done.stderr
    assert not server.requests


def test_a_tilde_is_the_home_folder(tmp_path):
    (tmp_path / "mirror").symlink_to(DATA / "rlu")
    started = [sys.executable, ROOT / "download_data.py", "--data-dir=~/x", "--url=~/mirror", "--games", "breakout"]
    started += ["--runs", "1", "--checkpoints", "1", "--rows-per-checkpoint", "300"]
    subprocess.run(started, env=environment(tmp_path) | {"HOME": str(tmp_path)}, cwd=tmp_path, check=True, timeout=60)
    assert len(list((tmp_path / "x/Breakout").rglob("*.gz"))) == 4 and not (tmp_path / "~").exists()


def test_a_bar_in_a_file_writes_few_lines(tmp_path, server):
    """Two seconds of download would be twenty lines on a terminal. Here they are the first and the last."""
    server.faults[server.add("Breakout", 1, 1)] = ("slow", 9)
    options = ["--games", "breakout", "--runs", 1, "--checkpoints", 1, "--url", server.url]
    options += ["--rows-per-checkpoint", ROWS["rlu"] - 1]
    clock = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        subprocess.run(command(tmp_path / "data", *options), env=environment(tmp_path), stderr=log, check=True)
    lines = (tmp_path / "log").read_text().replace("\r", "\n").split("\n")
    assert time.monotonic() - clock > 2
    assert 1 <= sum("checkpoint" in line for line in lines) <= 2


def test_files_of_another_length_are_not_taken(tmp_path):
    options = ["--games", "breakout", "--runs", 1, "--checkpoints", 1, "--url", DATA / "rlu", "--rows-per-checkpoint"]
    download(tmp_path, *options, 300)
    assert "is there for --rows-per-checkpoint 300" in download(tmp_path, *options, 400, code=1)


@pytest.mark.parametrize("flags", [("--runs", 6), ("--checkpoints", 51)])
def test_runs_and_checkpoints_that_do_not_exist_are_refused(tmp_path, flags):
    assert "must be" in download(tmp_path, "--games", "breakout", "--url", DATA / "rlu", *flags, code=1)
