"""The data loader: windows of 7 frames in batches of 512, uint8, in one process, against a Dataset of single samples.

    python benchmarks/load.py

The plain way is a Dataset whose items are single windows, read from an array of a memory-mapped .npy file, or of an
HDF5 file, and put together by the DataLoader's own collation. Both are run by a DataLoader without workers, up to the
tensors that would be copied to the device. In the second table the files are not in the page cache when a run begins
(posix_fadvise), which stands for a dataset larger than RAM: what the process makes the system read from the disk is
counted (/proc/self/io). The third shows that the number of files does not matter, and what the loader's memory grows
by: files of the full benchmark's size, but full of holes, that take no place on the disk.
"""

import gc
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from common import ALLOCATOR, begin, in_new_process, load, median, memory, record, shown, start, table, take_turns
from torch.utils.data import DataLoader, Dataset

BATCH, LENGTH, ROWS = 512, 7, 120_000  # 0.85 GB of rows
WINDOW = LENGTH * 7064  # bytes of a sample: its rows as they lie in a shard
MODULE = load("pretrain_atc")
COLUMNS = {"action": "u1", "reward": "i1", "terminal": "?"}


class SingleWindows(Dataset):
    """A window for each index, from one array for each field."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays["observation"]) - LENGTH + 1

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {name: np.asarray(array[i : i + LENGTH]) for name, array in self.arrays.items()}


def write_shards(folder: Path, shards: int, rows: int, holes: bool = False) -> None:
    """Shards as `prepare_shard` writes them, of random pixels, or of zeros that take no place."""
    row, rng = MODULE.ROW, np.random.default_rng(0)
    folder.mkdir()
    for i in range(shards):
        with open(folder / f"{i:04}.npy", "wb") as file:
            if holes:
                header = {"descr": np.lib.format.dtype_to_descr(row), "fortran_order": False, "shape": (rows,)}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + rows * row.itemsize)
            else:
                content = np.zeros(rows, row)
                content["frame"] = np.frombuffer(rng.bytes(rows * 84 * 84), np.uint8).reshape(rows, 84, 84)
                np.save(file, content)


def write_plain(folder: Path) -> None:
    """The same amount of rows as one array for each field, as .npy files and in an HDF5 file."""
    rng = np.random.default_rng(0)
    arrays = {"observation": np.frombuffer(rng.bytes(ROWS * 84 * 84), np.uint8).reshape(ROWS, 84, 84)}
    arrays |= {name: np.zeros(ROWS, dtype) for name, dtype in COLUMNS.items()}
    folder.mkdir()
    with h5py.File(folder / "data.h5", "w") as file:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
            file[name] = array


def files_of(folder: str) -> list[Path]:
    return sorted(Path(folder).iterdir())


def drop(folder: str) -> None:
    """The folder's files leave the page cache; nothing maps them at this time."""
    for path in files_of(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def batches_of(way: str, folder: str):
    if way == "ours":
        data = MODULE.Windows([(0, path) for path in files_of(folder)], LENGTH, BATCH, 0, "train")
        return iter(DataLoader(data, batch_size=None, sampler=range(data.batches)))
    if way == "HDF5":
        file = h5py.File(Path(folder, "data.h5"))
        arrays = {name: file[name] for name in ("observation", *COLUMNS)}
    else:
        arrays = {name: np.load(Path(folder, f"{name}.npy"), mmap_mode="r") for name in ("observation", *COLUMNS)}
    return iter(DataLoader(SingleWindows(arrays), batch_size=BATCH, shuffle=True))


def warm(folders: dict, batches: dict) -> dict:
    """Samples per second of each way, its files in the page cache."""
    loaders = {}
    for way, folder in folders.items():
        for path in files_of(folder):
            path.read_bytes()
        loaders[way] = batches_of("ours" if way not in batches else way, folder)
        next(loaders[way])

    def rate(way: str) -> dict[str, float]:
        number, clock = batches.get(way, 40), time.perf_counter()
        for _ in range(number):
            next(loaders[way])
        return {"samples per second": number * BATCH / (time.perf_counter() - clock)}

    return take_turns({way: partial(rate, way) for way in folders})


def cold(folders: dict) -> dict:
    """Samples per second, and bytes read from the disk for each of a sample's, of files that are not in the cache."""

    def measure(way: str) -> dict[str, float]:
        MODULE.open_shard.cache_clear()
        MODULE.map_shard.cache_clear()
        gc.collect()
        drop(folders[way])
        loader = batches_of(way, folders[way])
        before, clock = read_bytes(), time.perf_counter()
        for _ in range(3):
            next(loader)
        rate = 3 * BATCH / (time.perf_counter() - clock)
        return {"samples per second": rate, "bytes per byte": (read_bytes() - before) / (3 * BATCH * WINDOW)}

    return take_turns({way: partial(measure, way) for way in folders})


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def growth(folder: str) -> dict[str, float]:
    """Own memory (not the files') that the loader has taken after 20 batches."""
    before = memory("RssAnon")
    loader = batches_of("ours", folder)
    for _ in range(20):
        next(loader)
    return {"megabytes": (memory("RssAnon") - before) * 1024}


def main(_: list[str]) -> None:
    begin(__doc__.partition("\n")[0])
    figures, rows, ways = {}, [], {"ours": 40, "memory map": 10, "HDF5": 5}  # batches timed at a time
    with tempfile.TemporaryDirectory() as folder:
        folders = {way: f"{folder}/{'ours' if way == 'ours' else 'plain'}" for way in ways}
        write_shards(Path(folders["ours"]), 12, ROWS // 12)
        write_plain(Path(folders["HDF5"]))
        os.sync()  # the disk is at rest as the clock runs
        for allocator, environment in (("default", {}), ("as recommended", ALLOCATOR)):
            found = figures[f"warm, {allocator}"] = in_new_process(["warm", folders, ways], **environment)
            rates = {way: of["samples per second"] for way, of in found.items()}
            ratios = [f"{median(rates['ours']) / median(rates[way]):.1f}" for way in ("memory map", "HDF5")]
            rows.append([allocator, *map(shown, rates.values()), *ratios])
        header = ["allocator", "ours (target 150,000)", "memory map", "HDF5", "ours / map", "ours / HDF5 (target 15)"]
        table("Samples per second, files in the page cache", header, rows)

        found = figures["cold"] = in_new_process(["cold", folders])
        rows = [[way, *map(shown, of.values())] for way, of in found.items()]
        header = ["", "samples per second", "bytes read for each byte of a sample (target 1.5)"]
        table("Files not in the page cache", header, rows)

        folders = {shards: f"{folder}/{shards}" for shards in (50, 500)}
        for shards, place in folders.items():
            write_shards(Path(place), shards, ROWS // shards)
        found = figures["shards"] = in_new_process(["warm", folders, {}])
        rows = [[shards, shown(of["samples per second"])] for shards, of in found.items()]
        table(f"{ROWS:,} rows in as many files, in the page cache", ["files", "samples per second"], rows)

        numbers = (10, 100, 1000)
        for shards in numbers:
            write_shards(Path(folder, f"{shards} of 10000"), shards, 10_000, holes=True)
        found = figures["growth"] = {n: in_new_process(["growth", f"{folder}/{n} of 10000"]) for n in numbers}
        rows = [[f"{n * 10_000:,}", f"{of['megabytes']:.1f}"] for n, of in found.items()]
        table("Memory that the loader takes, a batch of 25 MB included", ["rows", "MB"], rows)
    record("load", figures)


if __name__ == "__main__":
    start([warm, cold, growth], main)
