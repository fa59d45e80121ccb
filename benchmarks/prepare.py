"""10,000 rows out of the `.gz` files of a replay checkpoint: seconds and memory, against reading them the plain way.

    python benchmarks/prepare.py

The plain way decompresses whole files and slices: `np.load(gzip.open(path))[:10_000]`. Ours decompresses what it needs,
leaves out the padding, sums up returns-to-go and writes a shard. Files are of 200,000 and of 1,000,000 frames, the
latter as DQN Replay's: 10,000 rows of random play, over and over. They lie in the page cache, as after a download.
"""

import gzip
import io
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from common import begin, in_new_process, load, median, memory, record, shown, start, table, take_turns

GAME, ROWS = "ms_pacman", 10_000
MODULE = load("pretrain_atc")


def write_files(folder: Path, shard: np.ndarray, frames: int) -> None:
    """Replay files of so many frames, the shard's rows over and over, as members of a gzip file."""
    columns = {"observation": shard["frame"], "action": shard["action"].astype(np.int32)}
    columns |= {"reward": shard["reward"].astype(np.float32), "terminal": shard["terminal"].astype(np.uint8)}
    for name, column in columns.items():
        header = io.BytesIO()
        array = {"descr": column.dtype.str, "fortran_order": False, "shape": (frames, *column.shape[1:])}
        np.lib.format.write_array_header_1_0(header, array)
        path = folder / "MsPacman" / f"{name}_1_1.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(header.getvalue()) + gzip.compress(column.tobytes(), 6) * (frames // ROWS))


def ours(folder: str) -> None:
    with tempfile.TemporaryDirectory() as cache:
        MODULE.prepare_shard(MODULE.Args(data_dir=Path(folder), cache_dir=Path(cache)), ROWS, GAME, 1, 1)


def plain(folder: str) -> None:
    for path in Path(folder, "MsPacman").iterdir():
        with gzip.open(path) as file:
            np.load(file)[:ROWS]


def measure(way: str, folder: str) -> dict[str, float]:
    """Seconds, and the peak of memory in GB that a new process adds to that of its imports."""
    before, clock = memory("VmHWM"), time.perf_counter()
    {"ours": ours, "plain": plain}[way](folder)
    return {"seconds": time.perf_counter() - clock, "GB": memory("VmHWM") - before}


def main(_: list[str]) -> None:
    begin(__doc__.partition("\n")[0])
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        played = MODULE.play_shard(MODULE.Args(cache_dir=Path(folder)), ROWS, GAME)
        shard = np.fromfile(played, MODULE.ROW)[-ROWS:]
        for frames, target in ((200_000, 12), (1_000_000, 60)):
            data = Path(folder, str(frames))
            write_files(data, shard, frames)
            ways = {way: partial(in_new_process, ["measure", way, str(data)]) for way in ("ours", "plain")}
            found = figures[frames] = take_turns(ways)
            seconds = [of["seconds"] for of in found.values()]
            row = [f"{frames:,}", *map(shown, seconds), f"{median(seconds[1]) / median(seconds[0]):.0f} ({target})"]
            rows.append([*row, *(shown(of["GB"]) for of in found.values())])
    header = [
        "frames in the file",
        "ours, s",
        "plain, s",
        "plain / ours (target)",
        "ours, GB (target 0.4)",
        "plain, GB",
    ]
    table("10,000 rows of a replay checkpoint; memory beyond the imports'", header, rows)
    record("prepare", figures)


if __name__ == "__main__":
    start([measure], main)
