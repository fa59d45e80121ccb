"""Loading data as training does: batches of 512 windows of 7 rows (ATC's), until they are on the device.

    python benchmarks/load.py

Ours: four threads that read ahead, and `unpack`. The plain way: a Dataset of single windows of an array for each field,
memory-mapped or in an HDF5 file, and a DataLoader with four worker processes. "Empty" means that the files are not in
the page cache when a run begins, as with a dataset larger than RAM. The last table is of files that consist of holes.
"""

import os
import tempfile
import time
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from common import DEVICE, begin, in_new_process, load, median, memory, record, shown, start, table, take_turns
from torch.utils.data import DataLoader, Dataset, RandomSampler

ROUNDS = 3
BATCH, LENGTH, ROWS, SHARDS, READERS = 512, 7, 200_000, 20, 4  # 1.4 GB of rows in all; readers are threads or workers
MODULE = load("pretrain_atc")
COLUMNS = {"action": "u1", "reward": "i1", "terminal": "?"}


class SingleWindows(Dataset):
    """A window for each index; each worker opens the files for itself."""

    def __init__(self, folder: str, hdf5: bool):
        self.folder, self.hdf5, self.arrays = Path(folder), hdf5, {}

    def __len__(self) -> int:
        return ROWS - LENGTH + 1

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not self.arrays:
            file = h5py.File(self.folder / "data.h5") if self.hdf5 else None
            for name in ("observation", *COLUMNS):
                self.arrays[name] = file[name] if file else np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return {name: np.asarray(array[i : i + LENGTH]) for name, array in self.arrays.items()}


def write(folder: Path) -> None:
    """The same random frames as shards, and as one array for each field in .npy files and in an HDF5 file."""
    frames = np.random.default_rng(0).integers(0, 256, (ROWS, 84, 84), np.uint8)
    arrays = {"observation": frames} | {name: np.zeros(ROWS, dtype) for name, dtype in COLUMNS.items()}
    for name in ("ours", "plain"):
        (folder / name).mkdir()
    for i, part in enumerate(np.array_split(frames, SHARDS)):
        rows = np.zeros(len(part), MODULE.ROW)
        rows["frame"] = part
        rows.tofile(folder / "ours" / f"{i:02}.bin")
    with h5py.File(folder / "plain" / "data.h5", "w") as file:
        for name, array in arrays.items():
            np.save(folder / "plain" / f"{name}.npy", array)
            file[name] = array


def batches_of(way: str, folder: str, number: int):
    """As many batches, on the device."""
    if way == "ours":
        data = MODULE.Windows([(0, path) for path in sorted(Path(folder).iterdir())], LENGTH, BATCH, 0, "train")
        for _, batch in MODULE.read_ahead(data, range(number), READERS):
            yield MODULE.unpack(*batch, DEVICE)
        for file in data.files:
            os.close(file)
    else:
        data = SingleWindows(folder, hdf5=way == "HDF5")
        sampler = RandomSampler(data, num_samples=number * BATCH)
        for batch in DataLoader(data, BATCH, sampler=sampler, num_workers=READERS, pin_memory=DEVICE.type == "cuda"):
            yield {name: value.to(DEVICE, non_blocking=True) for name, value in batch.items()}


def rate(way: str, folder: str, cached: bool) -> dict[str, float]:
    """Samples per second from a standing start, and bytes that the machine read from its disk for each of a sample's"""
    for path in Path(folder).iterdir():
        with open(path, "rb") as file:
            if cached:
                while file.read(2**24):
                    pass
            else:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    number = {"ours": 200, "memory map": 50, "HDF5": 20}[way] if cached else 12  # batches
    read, clock = disk_reads(), time.perf_counter()
    for _ in batches_of(way, folder, number):
        pass
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - clock
    read = (disk_reads() - read) / (number * BATCH * LENGTH * MODULE.ROW.itemsize)
    return {"samples per second": number * BATCH / seconds, "bytes per byte": read}


def disk_reads() -> int:
    lines = Path("/proc/vmstat").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("pgpgin")).split()[1])


def growth(folder: str) -> dict[str, float]:
    """Own memory (not the files') that the loader has taken after 50 batches."""
    before = memory("RssAnon")
    batches = batches_of("ours", folder, 100)
    for _ in range(50):
        next(batches)
    return {"megabytes": (memory("RssAnon") - before) * 1024}


def main(_: list[str]) -> None:
    begin(__doc__.partition("\n")[0], ROUNDS)
    figures, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        os.sync()  # the disk is at rest as the clock runs
        for cached, target in ((True, "60,000"), (False, "10,000")):
            ways = {"ours": f"{folder}/ours", "memory map": f"{folder}/plain", "HDF5": f"{folder}/plain"}
            found = take_turns({way: partial(rate, way, place, cached) for way, place in ways.items()}, ROUNDS)
            figures["warm" if cached else "empty"] = found
            rates = [of["samples per second"] for of in found.values()]
            ratios = [f"{median(rates[0]) / median(plain):.1f}" for plain in rates[1:]]
            read = [f"{median(of['bytes per byte']):.1f}" for of in found.values()]
            rows.append(["warm" if cached else "empty", target, *map(shown, rates), *ratios, ", ".join(read)])
        header = ["page cache", "target", "ours", "memory map", "HDF5", "ours / memory map", "ours / HDF5"]
        header.append("disk bytes per sample byte (ours, map, HDF5)")
        table("Samples per second", header, rows)

        rows = []
        for shards in (10, 100, 1000):
            place = Path(folder, f"{shards} shards")
            place.mkdir()
            for i in range(shards):
                with open(place / f"{i:04}.bin", "wb") as file:
                    file.truncate(10_000 * MODULE.ROW.itemsize)
            found = figures[f"growth, {shards} shards"] = in_new_process(["growth", str(place)])
            rows.append([f"{shards * 10_000:,}", f"{found['megabytes']:.0f}"])
        table("Memory that the loader takes, batches of 25 MB included", ["rows", "MB"], rows)
    record("load", figures)


if __name__ == "__main__":
    start([growth], main)
