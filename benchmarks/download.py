"""Rows a second that download_data.py converts, against only decoding the same PNGs with Pillow, on one core.

    python benchmarks/download.py

The rows are those of tests/data, repeated: gray images of RL Unplugged, stacks of four of JAT. Converting
reads the files, decodes the images and writes a checkpoint in gzip; both are done in turn, five times.
"""

import gzip
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, REPEATS = 5, 8
spec = importlib.util.spec_from_file_location("download_data", ROOT / "download_data.py")
module = sys.modules["download_data"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.ale_py.ALEInterface.setLoggerMode(module.ale_py.LoggerMode.Error)


def measure(source: str, folder: Path, pngs: list[bytes]) -> None:
    args = module.Args(folder, source, url=str(folder), rows_per_checkpoint=len(pngs) - 1)
    bar, ours, plain = tqdm(disable=True), [], []
    bar.megabytes = 0
    for i in range(ROUNDS):
        args.data_dir = folder / f"{source}_{i}"
        (args.data_dir / "Breakout/1/replay_logs").mkdir(parents=True)
        module.claim_folder(args, "breakout")
        clock = time.perf_counter()
        if source == "jat":
            module.convert_jat(args, "breakout", [(1, 1)], bar)
        else:
            module.convert_rl_unplugged(args, "breakout", 1, 1, bar)
        ours.append(len(pngs) / (time.perf_counter() - clock))
        clock = time.perf_counter()
        for png in pngs:
            Image.open(io.BytesIO(png)).tobytes()
        plain.append(len(pngs) / (time.perf_counter() - clock))
    rates = statistics.median(ours), statistics.median(plain)
    print(f"{source}: {rates[0]:,.0f} rows/s converted, {rates[1]:,.0f} decoded, ratio {rates[0] / rates[1]:.2f}")


with tempfile.TemporaryDirectory() as name:
    records = gzip.decompress((ROOT / "tests/data/rlu/Breakout/run_1-00001-of-00050").read_bytes()) * REPEATS
    (Path(name) / "Breakout").mkdir()
    (Path(name) / "Breakout/run_1-00001-of-00050").write_bytes(gzip.compress(records))
    episodes = map(module.read_example, module.read_records([gzip.compress(records)]))
    images = [png for episode in episodes for png in episode["observations"]]
    measure("rl_unplugged", Path(name), images)
    table = pa.concat_tables([pq.read_table(ROOT / "tests/data/jat/atari-breakout")] * REPEATS)
    (Path(name) / "atari-breakout").mkdir()
    pq.write_table(table, Path(name) / "atari-breakout/train-00000-of-00001.parquet")
    measure("jat", Path(name), [png["bytes"] for row in table["image_observations"].to_pylist() for png in row])
