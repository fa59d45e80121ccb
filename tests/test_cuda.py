"""On a GPU: every objective at the benchmark's size, compiled; resuming; the norm; CUDA graphs; torchrun.

Skipped where there is no GPU. With one it takes some minutes, most of them to compile.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GAMES, PRETRAINING, ROOT, SMALL, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

if not torch.cuda.is_available():
    pytest.skip("There is no GPU.", allow_module_level=True)
DEVICE = torch.device("cuda")
# A script under PyTorch's deterministic algorithms: compiled gradients of embeddings are else summed in any order.
DETERMINISTIC = """import runpy, sys, torch
torch.use_deterministic_algorithms(True)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")"""


# === objectives =======================================================================================================
def two_steps(script: str, cache: str) -> dict:
    """Two steps of the compiled objective at the script's defaults, and the first loss as computed in eager fp32."""
    torch._inductor.config.fallback_random = True  # compiled code draws the random numbers that eager code does
    module = load(script)
    args = module.Args(cache_dir=Path(cache))
    shards, _ = module.prepare(args, GAMES, args.rows_per_checkpoint)
    torch.manual_seed(0)
    objective = module.Objective(args).to(DEVICE, memory_format=torch.channels_last)
    data = module.Windows(shards, objective.length, args.batch_size, 0, "train")
    learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, args.learning_rate, args.betas, args.adam_eps, args.weight_decay, fused=True)
    torch.manual_seed(1)
    with torch.no_grad():
        eager, _ = objective(module.unpack(*data.batch(0), DEVICE))
    found = {"eager": eager.item(), "losses": [], "gradient norms": []}
    torch.cuda.empty_cache()  # other objectives share the GPU
    model = torch.compile(objective, fullgraph=True)
    for step in range(2):
        torch.manual_seed(1 + step)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss, metrics = model(module.unpack(*data.batch(step), DEVICE))
        loss.backward()
        found["gradient norms"].append(torch.nn.utils.clip_grad_norm_(learned, args.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        objective.update_target(step)
        found["losses"].append(loss.item())
        found |= {name: value.item() for name, value in metrics.items()}
    found["finite"] = all(bool(x.isfinite().all()) for x in learned)
    return found


def test_objectives(cache):
    """The first loss is the eager fp32 one but for bfloat16's error; steps are finite. Four compile at a time."""
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, os.cpu_count() // 4))}

    def run(script: str) -> dict:
        command = [sys.executable, __file__, script, str(cache)]
        done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}: {done.stderr[-3000:]}"
        return json.loads(done.stdout.splitlines()[-1])

    scripts = sorted(PRETRAINING, key=lambda script: script != "pretrain_siammae.py")  # it needs the most memory
    with ThreadPoolExecutor(4) as pool:
        for script, found in zip(scripts, pool.map(run, scripts), strict=True):
            print(script, found)
            values = [*found["losses"], *found["gradient norms"]]
            assert found["finite"] and np.isfinite(values).all(), script
            assert found["losses"][0] == pytest.approx(found["eager"], rel=0.05), script


# === training loop ====================================================================================================
def train(folder: Path, *arguments, deterministic: bool = False, processes: int = 0) -> subprocess.Popen:
    """Starts pretrain_atc.py in that folder, under torchrun if a number of processes is given."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if deterministic:
        command += ["-c", DETERMINISTIC]
    command += [str(ROOT / "pretrain_atc.py"), "--games", *GAMES, *map(str, arguments)]
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1"} if deterministic else {}
    return subprocess.Popen(command, cwd=folder, env=os.environ | variables)


def test_killed_and_resumed_is_left_alone(cache, tmp_path):
    """Bit by bit, with the full network, compiled."""
    shutil.copytree(cache, tmp_path / "cache")
    options = ("--batch-size", 128, "--total-steps", 40, "--save-every", 5)
    assert train(tmp_path, *options, "--run-name", "alone", deterministic=True).wait() == 0
    killed, checkpoint = tmp_path / "runs" / "killed", tmp_path / "runs" / "killed" / "checkpoint.pt"
    process = train(tmp_path, *options, "--run-name", "killed", deterministic=True)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(checkpoint, weights_only=True)["step"] < 40
    assert train(tmp_path, *options, "--run-name", "killed", "--resume", deterministic=True).wait() == 0
    states = [torch.load(run / "checkpoint.pt", map_location="cpu") for run in (killed, tmp_path / "runs" / "alone")]
    for state in states:
        assert state.pop("step") == 40
        del state["args"]
    tensors = [torch.utils._pytree.tree_flatten(state)[0] for state in states]
    for one, other in zip(*tensors, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_torchrun(cache, tmp_path):
    """As many processes as there are GPUs, over NCCL, compute what one does."""
    shutil.copytree(cache, tmp_path / "cache")
    processes = torch.cuda.device_count()
    options = (*SMALL, "--batch-size", 64 * processes, "--total-steps", 3, "--log-every", 1, "--precision", "fp32")
    runs = {"one": 0, "all": processes}
    losses = {}
    for name, number in runs.items():
        assert train(tmp_path, *options, "--run-name", name, processes=number).wait() == 0
        events = EventAccumulator(str(tmp_path / "runs" / name))
        events.Reload()
        losses[name] = [event.value for event in events.Scalars("losses/loss")]
    assert losses["all"] == pytest.approx(losses["one"], rel=1e-2)
    assert losses["all"][0] == pytest.approx(losses["one"][0], rel=1e-4)


# === norm =============================================================================================================
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("channels", "side"), [(64, 42), (256, 42), (2048, 6)])
def test_norm(channels, side, dtype, tolerance):
    """Compiled at batch 512 in channels_last, forward and backward: group_norm in fp32 but for rounding."""
    torch._dynamo.reset()
    x, gradient = torch.randn(2, 512, channels, side, side, device=DEVICE)
    x = (3 * x + 1).to(dtype, memory_format=torch.channels_last).requires_grad_()
    gradient = gradient.to(dtype, memory_format=torch.channels_last)
    y = torch.compile(load("pretrain_atc.py").Norm(channels), dynamic=False)(x)
    (of_x,) = torch.autograd.grad(y, x, gradient)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    expected = F.group_norm(x.float().contiguous(), 4)
    (of_expected,) = torch.autograd.grad(expected, x, gradient.float().contiguous())
    for one, other in ((y, expected), (of_x, of_expected)):
        torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance)


# === Rainbow ==========================================================================================================
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("finetune_rainbow.py", {"compile": True}),
        ("finetune_rainbow.py", {"compile": False, "freeze_backbone": False}),
        ("record_replay.py", {"compile": True, "data_dir": Path("data")}),
    ],
)
def test_rainbow_in_graphs_is_rainbow_without(script, arguments):
    """Losses, priorities and actions of 20 updates with random numbers of their own, and then the weights."""
    module = load(script)
    args = module.Args(game="pong", **arguments)
    rng, b = np.random.default_rng(0), args.batch_size
    batch = {"frames": rng.integers(0, 256, (2 * b, 4, 84, 84), np.uint8), "is_first": rng.random((2 * b, 4)) < 0.1}
    batch |= {"action": rng.integers(6, size=b), "n_step_return": rng.standard_normal(b, np.float32)}
    batch |= {"done": rng.random(b) < 0.1, "weight": rng.random(b, np.float32)}
    found = []
    for in_graphs in (True, False):
        torch.manual_seed(0)
        backbone = [module.make_backbone(args)[0]] if script == "finetune_rainbow.py" else []
        _, precision = module.set_up_device("cuda", args.precision, args.compile)
        model = module.Rainbow(args, module.Network(args, *backbone, 6), DEVICE, precision)
        update, act = module.Graph(model.update, DEVICE), module.Graph(model.act, DEVICE)
        values = []
        for step in range(20):
            torch.manual_seed(step)
            if in_graphs:
                values += [update(**batch), act(stacks=batch["frames"][:1]).flatten()]
            else:
                tensors = {name: torch.from_numpy(array).to(DEVICE) for name, array in batch.items()}
                values += [model.update(**tensors).cpu().numpy()]
                values += [model.act(tensors["frames"][:1]).cpu().numpy().flatten()]
        found.append((np.concatenate(values), [x.cpu().float() for x in model.state_dict().values()]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=2e-2, atol=2e-2)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


if __name__ == "__main__":
    print(json.dumps(two_steps(*sys.argv[1:])))
