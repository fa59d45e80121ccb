"""10,000 rows out of the `.gz` files of a replay checkpoint: seconds and memory, against reading them the plain way.

    python benchmarks/prepare.py

The plain way decompresses whole files and slices: `np.load(gzip.open(path))[:10_000]`. Ours decompresses what it needs,
and then goes on: it leaves out the padding, sums up returns-to-go, and writes the shard that training maps into memory.
Files are of 200,000 and of 1,000,000 frames, the latter as DQN Replay's: 10,000 played rows of Ms. Pac-Man, over and
over. They lie in the page cache, as after a download. Of a process's memory, importing a script and PyTorch takes
0.6 GB, libraries mapped from the disk included.
"""

import gzip
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from common import begin, in_new_process, load, median, peak_memory, record, shown, start, table, take_turns

GAME, ROWS, PLAYED = "ms_pacman", 10_000, 10_000


def write_files(source: Path, folder: Path, frames: int) -> None:
    """Replay files of so many frames, the source's over and over, in gzip as one stream (RFC 1952)."""
    module = load("pretrain_atc")
    pairs = zip(*(module.replay_layouts(where, GAME, 1, 1)[0] for where in (source, folder)), strict=True)
    for played, path in pairs:
        with gzip.open(played) as file:
            rows = np.load(file)[:PLAYED]
        path.parent.mkdir(parents=True, exist_ok=True)
        content, dtype = rows.tobytes(), rows.dtype.str
        compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        part = compressor.compress(content) + compressor.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
        with open(path, "wb") as file:
            header = gzip.io.BytesIO()
            shape = (frames, *rows.shape[1:])
            np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
            checksum = zlib.crc32(header.getvalue())
            first = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
            file.write(b"\x1f\x8b\x08\0\0\0\0\0\0\xff")  # gzip's header: deflate, no name, no time, an unknown system
            file.write(first.compress(header.getvalue()) + first.flush(zlib.Z_FULL_FLUSH))
            for _ in range(frames // PLAYED):
                file.write(part)
                checksum = zlib.crc32(content, checksum)
            size = len(header.getvalue()) + len(content) * (frames // PLAYED)
            file.write(zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS).flush())  # the end of the stream
            file.write(checksum.to_bytes(4, "little") + (size % 2**32).to_bytes(4, "little"))


def ours(module, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        clock = time.perf_counter()
        module.prepare_shard(Path(cache), folder, ROWS, GAME, 1, 1)
        return {"seconds": time.perf_counter() - clock}


def plain(module, folder: Path) -> dict[str, float]:
    clock, arrays = time.perf_counter(), []
    for path in module.replay_layouts(folder, GAME, 1, 1)[0]:
        with gzip.open(path) as file:
            arrays.append(np.load(file)[:ROWS])
    return {"seconds": time.perf_counter() - clock}


def peak(way: str, folder: str) -> dict[str, float]:
    """The peak of the memory in GB of a process that prepares once, and of what was added after its imports."""
    module = load("pretrain_atc")
    before = peak_memory()
    {"ours": ours, "plain": plain}[way](module, Path(folder))
    return {"GB": peak_memory(), "own GB": peak_memory() - before}


def main(_: list[str]) -> None:
    begin(__doc__.partition("\n")[0])
    rows, figures, module = [], {}, load("pretrain_atc")
    with tempfile.TemporaryDirectory() as folder:
        module.play_game(Path(folder, "played"), PLAYED, GAME)
        for frames, target in ((200_000, 12), (1_000_000, 60)):
            data = Path(folder, str(frames))
            write_files(Path(folder, "played"), data, frames)
            found = take_turns({"ours": partial(ours, module, data), "plain": partial(plain, module, data)})
            peaks = {way: in_new_process(["peak", way, str(data)]) for way in found}
            figures[frames] = {"seconds": found, "memory": peaks}
            seconds = [of["seconds"] for of in found.values()]
            ratio = f"{median(seconds[1]) / median(seconds[0]):.1f} (target {target})"
            memory = [f"{of['GB']:.2f}, {of['own GB']:.2f}" for of in peaks.values()]
            rows.append([f"{frames:,}", *map(shown, seconds), ratio, *memory])
    header = ["frames in the file", "ours, s", "plain, s", "plain / ours"]
    header += ["ours, peak GB, and without the imports' (target 0.4)", "plain, peak GB, and without the imports'"]
    table("10,000 rows of a replay checkpoint", header, rows)
    record("prepare", figures)


if __name__ == "__main__":
    start([peak], main)
