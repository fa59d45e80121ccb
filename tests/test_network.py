"""The network and the objectives against torchvision and against numbers computed with the original code."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import float64, load
from golden.fill import fill_array, make_batch, make_noise
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
OBJECTIVES = ("curl", "atc", "mae", "siammae", "r3m", "bc", "spr", "idm", "spr_idm", "dt", "cql")
modules = {name: load(f"pretrain_{name}.py") for name in OBJECTIVES}
atc = modules["atc"]
TINY = {"width_multiplier": 0.0625, "blocks": (1, 1, 1, 1)}


def slow(name: str):
    return pytest.param(name, marks=pytest.mark.slow)


def golden(name: str) -> dict:
    return dict(np.load(GOLDEN / f"{name}.npz", allow_pickle=False))


def fill(modules: dict[str, nn.Module], numbers: dict, prefix: str = "given/") -> None:
    """Gives every parameter listed in `numbers` the values that its canonical name stands for."""
    given = {name: tuple(map(int, shape.split("x"))) for name, shape in (x.split() for x in numbers["param_names"])}
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            values = fill_array(f"{prefix}{part}.{name}", given.pop(f"{part}.{name}"))
            parameter.data = torch.from_numpy(values).view(parameter.shape).to(parameter.dtype)
    if not prefix.endswith("target/"):
        assert not given, f"the golden network has more parameters: {list(given)}"


def check(numbers: dict, parts: dict[str, nn.Module], loss: torch.Tensor) -> None:
    """Loss to 1e-5 and the gradient norm of each part to 1e-4, relative.

    The golden numbers were computed in float32, which leaves 1e-6 and 6e-5; ours are in float64 and add nothing.
    """
    loss.backward()
    assert loss.item() == pytest.approx(float(numbers["loss"]), rel=1e-5)
    for name, part in parts.items():
        norm = sum(parameter.grad.double().square().sum().item() for parameter in part.parameters()) ** 0.5
        assert norm == pytest.approx(float(numbers[f"grad_norm_{name}"]), rel=1e-4), name


def check_features(numbers: dict, objective: nn.Module, obs: torch.Tensor, game_id: torch.Tensor) -> None:
    with torch.no_grad():
        features = {"backbone_slice": objective.backbone(obs)}
        if "neck_slice" in numbers:  # of those that end in 512 features
            features["neck_slice"] = objective.neck(features["backbone_slice"], game_id)
    maps = features["backbone_slice"]
    assert maps.mean().item() == pytest.approx(float(numbers["backbone_mean"]), rel=1e-5)
    assert maps.std(correction=0).item() == pytest.approx(float(numbers["backbone_std"]), rel=1e-5)
    for name, values in features.items():
        found = values.flatten()[:: values.numel() // 64][:64]
        np.testing.assert_allclose(found, numbers[name], rtol=1e-3, atol=1e-4)


def stacks_of(batch: dict, name: str) -> torch.Tensor:
    return torch.from_numpy(batch[name]).float().squeeze(1) / 255


def golden_network(name: str) -> tuple[dict, nn.Module, dict[str, nn.Module], tuple, tuple]:
    """Numbers, the objective with the golden parameters, its parts, its stacks with their games, its loss's inputs

    In float64, as `exact` sets it.
    """
    numbers = golden("cql_dist" if name == "cql" else name)
    batch = make_batch("given/", n=4, t={"spr": 5, "spr_idm": 5, "dt": 8}.get(name, 1), two_futures=name == "r3m")
    objective = modules[name].Objective(modules[name].Args())
    parts = {"backbone": objective.backbone, "neck": objective.neck, "head": objective.head}
    fill(parts, numbers)
    if hasattr(objective, "target"):
        fill(dict(objective.target.items()), numbers, "given/target/")
    stacks = torch.from_numpy(batch["obs"]) / 255  # [4, t, 4, 84, 84]
    obs, next_obs = stacks[:, 0], torch.from_numpy(batch["next_obs"])[:, 0] / 255
    game_id, done = (torch.from_numpy(batch[key][:, 0]) for key in ("game_id", "done"))
    action, rtg, done = torch.from_numpy(batch["action"]), torch.from_numpy(batch["rtg"]).double(), done.bool()
    noise, none_done = torch.from_numpy(make_noise("given/", 4, 36)), torch.zeros(4, 8, dtype=torch.bool)
    inputs = {
        "curl": (obs, obs, game_id),
        "atc": (obs, next_obs, game_id, done),
        "mae": (obs, obs, game_id, noise),
        "siammae": (obs, next_obs, next_obs, game_id, noise),
        "r3m": (obs, next_obs[:, :1].squeeze(1), next_obs[:, 1:].squeeze(1), game_id, done),
        "bc": (obs, action[:, 0], game_id),
        "spr": (obs, stacks[:, 1:], action[:, :4], game_id, none_done[:, :4]),
        "idm": (obs, next_obs, action[:, 0], game_id, done),
        "spr_idm": (obs, stacks[:, 1:], action[:, :4], game_id, none_done[:, :4]),
        "dt": (stacks, action, rtg, game_id, none_done),
        "cql": (obs, next_obs, action[:, 0], rtg[:, 0], done, game_id),
    }
    images = stacks.flatten(0, 1), game_id.repeat_interleave(stacks.shape[1])
    return numbers, objective, parts, images, inputs[name]


@pytest.fixture
def exact():
    with float64():
        yield


@pytest.mark.parametrize("name", OBJECTIVES)
def test_golden(name, exact):
    """Features, loss, metrics and gradient norms of the whole network on the golden parameters and batch."""
    numbers, objective, parts, images, inputs = golden_network(name)
    check_features(numbers, objective, *images)
    loss, metrics = objective.loss(*inputs)
    check(numbers, parts, loss)
    accuracy = [float(value) for key, value in numbers.items() if key.endswith("_acc")]
    assert [metrics["accuracy"].item() for _ in accuracy] == pytest.approx(accuracy)
    assert len(accuracy) == ("accuracy" in metrics and name != "cql")
    if name == "spr_idm":  # there it is minus the mean cosine
        assert metrics["spr_loss"].item() == pytest.approx(float(numbers["log_spr_loss"]), rel=1e-4)
        assert metrics["idm_loss"].item() == pytest.approx(float(numbers["log_idm_loss"]), rel=1e-5)
    if name == "cql":
        assert metrics["td_loss"].item() == pytest.approx(float(numbers["log_kl_loss"]), rel=1e-5)
        assert metrics["conservative_loss"].item() == pytest.approx(float(numbers["log_cql_loss"]), rel=1e-5)


@pytest.mark.parametrize("name", [name if name in ("atc", "bc") else slow(name) for name in OBJECTIVES])
def test_golden_with_the_compiled_norm(name, exact, monkeypatch):
    """Features, loss and gradient norms with the norm as it is compiled on GPUs, of plain operations."""
    numbers, objective, parts, images, inputs = golden_network(name)
    with torch.no_grad():
        native = objective.backbone(images[0][:2])
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        plain = objective.backbone(images[0][:2])
    torch.testing.assert_close(plain, native, rtol=1e-10, atol=1e-10)
    assert not torch.equal(plain, native)  # the other norm was run
    check(numbers, parts, objective.loss(*inputs)[0])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 6, 6), (2, 64, 21, 21), (2, 12, 1, 5)])
def test_norm_of_plain_operations_equals_group_norm(shape, channels_last, monkeypatch):
    """Forward and backward, in float64, and with bf16 input, whose statistics are computed in fp32."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    norm, upstream = atc.Norm(shape[1]), torch.randn(shape).double()
    x = (5 + 3 * torch.randn(shape)).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert not [*norm.parameters()] and not norm.state_dict()
    results = []
    with float64():
        for function in (norm, lambda x: F.group_norm(x, 4)):
            leaf = x.double().requires_grad_()
            y = function(leaf)
            results.append((y, *torch.autograd.grad((y * upstream).sum(), leaf)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not channels_last or results[0][0].is_contiguous(memory_format=torch.channels_last)

    low = x.bfloat16()
    y = norm(low)
    assert y.dtype == torch.bfloat16 and y.stride() == (low.stride() if channels_last else y.stride())
    expected = F.group_norm(low.float(), 4).bfloat16()  # to the last bit, or the one before
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-6)
    assert (y == expected).float().mean() > 0.99


def test_norm_is_native_when_it_is_not_compiled():
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(atc.Norm(8)(x), F.group_norm(x, 4))


def test_compiled_norm_keeps_no_native_group_norm():
    """What torch.compile makes of the norm, forward and backward, contains no native_group_norm."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(atc.Norm(8), backend=backend, fullgraph=True)(torch.randn(2, 8, 5, 5))
    assert any("var_mean" in target for target in seen) and not any("group_norm" in target for target in seen)


def test_fine_tuning_policy_is_the_golden_network_for_one_game():
    """The policy's logits are those of the golden network's parts when its only table row is that game's."""
    bc, numbers, batch = load("finetune_bc.py"), golden("bc"), make_batch("given/", n=4)
    backbone = bc.ResNet(1.0, (3, 4, 6, 3))
    parts = {"backbone": backbone, "neck": bc.Neck(2048, 60), "head": bc.GameLinear(60, 512, 18)}
    fill(parts, numbers)
    policy = bc.Policy(backbone.requires_grad_(False))
    row = {name: x[17:18] if name == "spatial_embed" else x for name, x in parts["neck"].state_dict().items()}
    policy.neck.load_state_dict(row)
    policy.head.load_state_dict({name: x[17:18] for name, x in parts["head"].state_dict().items()})
    obs, game_id = stacks_of(batch, "obs"), torch.full((4,), 17)
    expected = parts["head"](parts["neck"](backbone(obs), game_id), game_id)
    torch.testing.assert_close(policy(obs), expected)
    policy(obs).sum().backward()
    assert all(parameter.grad is None for parameter in policy.backbone.parameters())
    assert all(parameter.grad is not None for parameter in policy.neck.parameters())
    assert not policy.backbone(obs).requires_grad  # no graph was kept for it either


def test_schedule_golden(monkeypatch):
    numbers = golden("schedule")
    found = [atc.lr_multiplier(step, 1000) for step in range(1000)]
    np.testing.assert_allclose(found, numbers["lr_multiplier"], rtol=1e-12)
    taus = []
    monkeypatch.setattr(atc, "update_momentum", lambda target, online, tau: taus.append(tau))
    objective = atc.Objective(atc.Args(total_steps=1000, **TINY))
    for step in range(1000):
        objective.update_target(step)
    np.testing.assert_allclose(taus, numbers["momentum"], rtol=1e-12)


def test_update_target_is_the_moving_average():
    objective = atc.Objective(atc.Args(total_steps=10, **TINY))
    for parameter in objective.target.parameters():
        parameter.data.normal_()
    before = {name: x.clone() for name, x in objective.target.named_parameters()}
    objective.update_target(5)
    online = dict(objective.named_parameters())
    tau = 0.99 + 0.009 * 5 / 10
    assert len(before) > 10
    for name, x in objective.target.named_parameters():
        torch.testing.assert_close(x.data, tau * before[name] + (1 - tau) * online[name].data)


class NormWithoutParameters(nn.GroupNorm):
    """torchvision initialises its norms' weights, so they exist; they stay 1 and 0."""

    def __init__(self, channels: int):
        super().__init__(4, channels)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_resnet_equals_torchvision(memory_format):
    torch.manual_seed(0)
    ours = atc.ResNet(1.0, (3, 4, 6, 3)).to(torch.float64, memory_format=memory_format)
    theirs = torchvision.models.resnet50(norm_layer=NormWithoutParameters)
    theirs.conv1, theirs.maxpool = nn.Conv2d(4, 64, 7, 2, 3, bias=False), nn.Identity()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert all("bn" in name or "downsample.1" in name or name.startswith("fc.") for name in missing)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 23_458_048
    x = torch.rand(2, 4, 84, 84).to(torch.float64, memory_format=memory_format)
    features = nn.Sequential(*list(theirs.double().children())[:-2])  # without average pooling and classifier
    assert ours(x).shape == (2, 2048, 6, 6)
    torch.testing.assert_close(ours(x), features(x), rtol=1e-10, atol=1e-10)


def test_game_linear_is_a_matrix_for_each_game():
    layer = atc.GameLinear(5, 7, 3)
    x, game_id = torch.randn(4, 7), torch.tensor([4, 0, 4, 2])
    expected = torch.stack([row @ layer.weight[game] + layer.bias[game] for row, game in zip(x, game_id, strict=True)])
    torch.testing.assert_close(layer(x, game_id), expected)


def test_info_nce_leaves_samples_out_but_keeps_them_as_negatives():
    query, key, keep = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([True, False, True])
    loss, accuracy = atc.info_nce(atc.similarities(query, key, temperature=2.0), keep)
    logits = (query @ key.T / 2).tolist()
    losses = [math.log(sum(math.exp(x) for x in row)) - row[i] for i, row in enumerate(logits)]
    assert loss.item() == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)
    hits = [row.index(max(row)) == i for i, row in enumerate(logits)]
    assert accuracy.item() == pytest.approx((hits[0] + hits[2]) / 2)
    assert atc.info_nce(query @ key.T, torch.zeros(3, dtype=torch.bool))[0].item() == 0  # none kept: no loss, no NaN


@pytest.mark.parametrize("games", [[0, 1, 0, 4, 0, 0, 0], [3], [3, 1] * 32, [1] * 64, [4, *[0] * 21, *[2] * 42]])
def test_game_linear_of_tokens_is_a_matrix_for_each_game(games):
    """Pages of one or several samples, full or not: outputs and gradients are those of one product a sample."""
    x, game_id = torch.randn(len(games), 6, 7), torch.tensor(games)
    weight, bias = torch.randn(5, 7, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    found = modules["mae"].game_linear(x, game_id, weight, bias)
    expected = torch.stack([x[i] @ weight[game] + bias[game] for i, game in enumerate(games)])
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * upstream).sum(), (weight, bias)) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_mask_keeps_the_tokens_of_the_least_noise():
    tokens, noise = torch.randn(5, 36, 512), torch.rand(5, 36)
    visible, ids_restore = modules["mae"].random_masking(tokens, 3, noise)
    assert visible.shape == (5, 3, 512) and ids_restore.shape == (5, 36)
    for i in range(5):
        least = sorted(range(36), key=lambda j, i=i: noise[i, j])
        for j in range(3):
            assert torch.equal(visible[i, j], tokens[i, least[j]])
        assert ids_restore[i].tolist() == [least.index(cell) for cell in range(36)]
    assert modules["mae"].draw_noise(tokens).shape == (5, 36)


@pytest.mark.parametrize("name", ["mae", "siammae"])
def test_masked_pixels_are_those_of_hidden_cells(name):
    """What `reconstruct` calls masked are the pixels of the cells with the most noise, 14 x 14 each."""
    objective, noise = modules[name].Objective(modules[name].Args(**TINY, mask_ratio=0.9)), torch.rand(2, 36)
    views = [torch.rand(2, 4, 84, 84)] * (1 if name == "mae" else 2)
    with torch.no_grad():
        pixels, masked = objective.reconstruct(*views, torch.tensor([3, 5]), noise)
    assert pixels.shape == (2, 4, 84, 84) and masked.shape == (2, 1, 84, 84)
    for i, cell in itertools.product(range(2), range(36)):
        row, column = 14 * (cell // 6), 14 * (cell % 6)
        is_hidden = cell not in noise[i].argsort()[:3]
        assert (masked[i, 0, row : row + 14, column : column + 14] == is_hidden).all()


@pytest.mark.parametrize("name", ["mae", "siammae"])
def test_default_masks_leave_the_papers_numbers_of_cells(name):
    assert modules[name].Objective(modules[name].Args(**TINY)).keep == {"mae": 3, "siammae": 1}[name]


def window_batch(length: int, b: int = 3) -> dict[str, torch.Tensor]:
    """Windows whose row i shows frames of brightness 10 i, action i, reward 1 and a return-to-go of -i."""
    zeros = torch.zeros(b, length, dtype=torch.uint8)
    frames = torch.arange(length, dtype=torch.uint8).mul(10)[None, :, None, None].expand(b, length, 84, 84)
    fields = {
        "is_first": zeros.bool(),
        "action": zeros.long() + torch.arange(length),
        "reward": (zeros + 1).to(torch.int8),
        "terminal": zeros.bool(),
        "return_to_go": zeros.float() - torch.arange(length),
    }
    return {"frames": frames, "game_id": torch.arange(b)} | fields


@pytest.mark.parametrize("name", OBJECTIVES)
def test_forward_takes_the_right_rows(name, monkeypatch):
    """What `loss` is given of a window: the stack of now, those of the future, the actions between, episodes' ends."""
    module = modules[name]
    objective = module.Objective(module.Args(**TINY))
    monkeypatch.setattr(module, "augment", lambda stacks: stacks / 255)
    given = []
    monkeypatch.setattr(objective, "loss", lambda *inputs: given.append(inputs))
    batch = window_batch(objective.length, b=4)
    batch["terminal"][0, -1] = True  # the last stack ends its episode
    batch["terminal"][1, 3] = True  # the stack of now does
    if objective.length > 5:
        batch["terminal"][2, 4], batch["terminal"][3, -2] = True, True  # the next one, the last but one
    objective(batch)
    now = torch.tensor([0, 10, 20, 30]) / 255

    def shows(stacks: torch.Tensor, later: int) -> bool:
        return torch.allclose(stacks, (now + 10 * later / 255).view(4, 1, 1))

    (obs, *rest), last = given[0], objective.length - 4
    assert obs.shape == ((4, 8, 4, 84, 84) if name == "dt" else (4, 4, 84, 84))
    assert all(shows(obs[:, j], j) for j in range(8)) if name == "dt" else shows(obs, 0)
    if name == "curl":
        view, game_id = rest
        assert shows(view, 0)
    elif name == "atc":
        key, game_id, done = rest
        assert shows(key, last) and last == 3 and done.tolist() == [False, True, True, True]
    elif name == "mae":
        target, game_id, noise = rest
        assert shows(target, 0) and noise.shape == (4, 36)
    elif name == "siammae":
        future, target, game_id, _ = rest
        later = [offset for i in range(4) for offset in (1, 2, 3) if shows(future[i], offset)]
        assert len(later) == 4 and torch.allclose(future, target)
    elif name == "r3m":
        near, far, game_id, done = rest
        assert shows(near, 3) and shows(far, 6) and done.tolist() == [False, True, True, True]
    elif name == "bc":
        action, game_id = rest
        assert action.tolist() == [3] * 4
    elif name == "dt":
        action, return_to_go, game_id, done = rest
        assert action.tolist() == [list(range(3, 11))] * 4
        assert return_to_go.tolist() == [list(range(-3, -11, -1))] * 4
        kept = [8, 1, 2, 7]  # the last step of an episode is
        assert done.tolist() == [[False] * steps + [True] * (8 - steps) for steps in kept]
        assert objective.neck.largest_return.tolist() == [-3] * 4 + [-math.inf] * 56
    elif name == "cql":
        future, action, n_step_return, done, game_id = rest
        assert shows(future, 3) and action.tolist() == [3] * 4 and done.tolist() == [False, True, True, True]
        assert n_step_return.tolist() == pytest.approx([1 + 0.99 + 0.99**2, 1, 1 + 0.99, 1 + 0.99 + 0.99**2])
    elif name in ("spr", "spr_idm"):
        future, action, game_id, done = rest
        assert all(shows(future[:, j], j + 1) for j in range(4)) and future.shape[1] == 4
        assert action.tolist() == [[3, 4, 5, 6]] * 4
        assert done.tolist() == [[False] * 4, [True] * 4, [False] + [True] * 3, [False] * 3 + [True]]
    else:
        future, action, game_id, done = rest
        assert shows(future, 1) and action.tolist() == [3] * 4 and done.tolist() == [False, True, False, False]
    assert game_id.tolist() == [0, 1, 2, 3]


def test_siammae_draws_its_offsets_uniformly(monkeypatch):
    module, given = modules["siammae"], []
    objective = module.Objective(module.Args(**TINY))
    monkeypatch.setattr(module, "augment", lambda stacks: stacks / 255)
    monkeypatch.setattr(objective, "loss", lambda *inputs: given.append(inputs[1]))
    objective(window_batch(objective.length, b=600))
    offsets = ((given[0][:, -1, 0, 0] * 255).round().long() - 30).div(10, rounding_mode="floor").bincount()
    assert len(offsets) == 4 and offsets[0] == 0 and offsets[1:].min() > 150


def test_augmented_views_are_drawn_independently_and_shared_within_a_sample():
    """CURL's views and the stacks of ATC, R3M, IDM, SiamMAE and CQL differ in their draw; SPR's and DT's share one."""
    independent, shared = ("curl", "atc", "r3m", "idm", "siammae", "cql"), ("spr", "spr_idm", "dt")
    for name in independent + shared:
        objective = modules[name].Objective(modules[name].Args(**TINY))
        batch = window_batch(objective.length, b=8)
        batch["frames"] = torch.full_like(batch["frames"], 100)  # all that differs is the intensity
        given = []
        objective.loss = lambda *inputs, given=given: given.append(inputs)
        objective(batch)
        stacks = list(given[0][0].unbind(1)) if name == "dt" else [x for x in given[0] if x.ndim == 4]  # [b, 4, 84, 84]
        stacks += given[0][1].unbind(1) if name in ("spr", "spr_idm") else []
        assert len(stacks) == {"r3m": 3, "siammae": 3, "spr": 5, "spr_idm": 5, "dt": 8}.get(name, 2)
        stacks = stacks[:2] if name == "siammae" else stacks  # the third is the target, not augmented
        for i, j in itertools.combinations(range(len(stacks)), 2):
            equal = (stacks[i] - stacks[j]).abs().amax((1, 2, 3)) < 1e-6
            assert equal.all() if name in shared else not equal.any(), name


def test_action_loss_leaves_samples_out():
    """Cross-entropy and accuracy by hand, of the samples to keep alone."""
    logits = torch.eye(18)[torch.tensor([5, 5, 1, 2])] * 9
    action, keep = torch.tensor([5, 4, 1, 0]), torch.tensor([True, True, True, False])
    loss, metrics = modules["idm"].action_loss(logits, action, keep)
    right = math.log(1 + 17 * math.exp(-9))
    assert loss.item() == pytest.approx((right + right + right + 9) / 3, rel=1e-4)
    assert metrics["accuracy"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", [name if name in ("atc", "dt") else slow(name) for name in OBJECTIVES])
def test_compiles_without_a_graph_break(name):
    """As on GPUs by default; "eager" runs the one graph that was captured, forward and backward."""
    torch._dynamo.reset()
    objective = modules[name].Objective(modules[name].Args(**TINY))
    loss, _ = torch.compile(objective, backend="eager", fullgraph=True)(window_batch(objective.length))
    loss.backward()
    assert all(parameter.grad is not None for parameter in objective.head.parameters())


def random_stacks(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 4, 84, 84)


def test_cql_of_squared_errors_by_hand():
    """Variant M: Q itself, bootstrapped from the momentum network's largest value, but for samples that are done."""
    module = modules["cql"]
    objective = module.Objective(module.Args(**TINY, loss="mse", discount=0.9, n_steps=2, conservative_weight=0.3))
    for parameter in objective.target.parameters():
        parameter.data.mul_(0.5)
    obs, next_obs, game_id, action = random_stacks(3), random_stacks(3), torch.tensor([5, 0, 5]), [2, 17, 0]
    returns, done = [1.5, -1.0, 0.25], [False, True, False]
    q, next_q = (
        network.head(network.neck(network.backbone(x), game_id), game_id).tolist()
        for network, x in ((objective, obs), (objective.target, next_obs))
    )
    td = [(q[i][action[i]] - returns[i] - 0.9**2 * (not done[i]) * max(next_q[i])) ** 2 for i in range(3)]
    gap = [math.log(sum(math.exp(x) for x in q[i])) - q[i][action[i]] for i in range(3)]
    loss, metrics = objective.loss(obs, next_obs, *map(torch.tensor, (action, returns, done)), game_id)
    assert loss.item() == pytest.approx(sum(td) / 3 + 0.3 * sum(gap) / 3, rel=1e-4)
    assert metrics["td_loss"].item() == pytest.approx(sum(td) / 3, rel=1e-4)
    assert objective.name == "cql_mse" and module.Objective(module.Args(**TINY)).name == "cql"
    loss.backward()
    assert all(parameter.grad is None for parameter in objective.target.parameters())


def test_cql_discounts_rewards_up_to_an_episodes_end(monkeypatch):
    """By hand: rewards 1, -1, 0, 1, 1 from the present on, n = 5, gamma = 1/2; the third sample ends with its -1."""
    module = modules["cql"]
    objective = module.Objective(module.Args(**TINY, n_steps=5, discount=0.5))
    given = []
    monkeypatch.setattr(objective, "loss", lambda *inputs: given.append(inputs))
    batch = window_batch(objective.length)
    batch["reward"] = torch.tensor([9, 9, 9, 1, -1, 0, 1, 1, 9], dtype=torch.int8).repeat(3, 1)
    batch["terminal"][0, [2, 8]] = True  # neither of the last episode's end nor of what comes after the n steps
    batch["terminal"][1, 7] = True
    batch["terminal"][2, [4, 6]] = True
    objective(batch)
    _, _, _, n_step_return, done, _ = given[0]
    assert n_step_return.tolist() == [1 - 1 / 2 + 1 / 8 + 1 / 16] * 2 + [1 - 1 / 2]
    assert done.tolist() == [False, True, True]


def test_cql_momentum_network_is_the_whole_network():
    objective = modules["cql"].Objective(modules["cql"].Args(**TINY, total_steps=10))
    assert objective.target.keys() == {"backbone", "neck", "head"}
    before = [x.clone() for x in objective.target.parameters()]
    for parameter in objective.head.parameters():
        parameter.data.add_(1)
    objective.update_target(9)
    after = list(objective.target.parameters())
    changed = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert changed == [False] * (len(before) - 2) + [True] * 2
    torch.testing.assert_close(after[-1] - before[-1], torch.full_like(after[-1], 0.01))


def test_dt_sees_no_action_before_it_was_taken():
    """What step j is predicted from: returns and stacks up to j, actions before j, and nothing later."""
    module = modules["dt"]
    neck = module.Trajectory(64, 60, steps=8)
    inputs = [torch.randn(1, 8, 512), torch.randint(18, (1, 8)), torch.randn(1, 8)]
    x = neck(*inputs)
    for step in range(8):
        others = torch.randn(512), 17 - inputs[1][0, step], 5.0
        for which, first in enumerate((step, step + 1, step)):  # features, action, return: the first x that changes
            changed = [values.clone() for values in inputs]
            changed[which][0, step] = others[which]
            same = torch.isclose(neck(*changed), x, atol=1e-5).all(2)[0]
            assert same[:first].all() and not same[first:].any()
    torch.testing.assert_close(neck(*(values[:, :3] for values in inputs)), x[:, :3])  # as play begins: fewer steps


@pytest.mark.parametrize("name", ["spr_idm", "dt"])
def test_what_lies_beyond_an_episodes_end_is_left_out(name):
    """Stacks, actions and returns from there on change neither loss nor metrics; those before do."""
    torch.manual_seed(0)
    module = modules[name]
    objective = module.Objective(module.Args(**TINY))
    steps = 4 if name == "spr_idm" else 8
    stacks, action, game_id = random_stacks(3, 9), torch.randint(18, (3, steps)), torch.tensor([1, 1, 4])
    returns, done = torch.randn(3, steps), torch.zeros(3, steps, dtype=torch.bool)
    done[2, 2:] = True

    def loss() -> list[float]:
        with torch.no_grad():
            if name == "dt":
                loss, metrics = objective.loss(stacks[:, :8], action, returns, game_id, done)
            else:
                loss, metrics = objective.loss(stacks[:, 0], stacks[:, 1:5], action, game_id, done)
            return [x.item() for x in (loss, *metrics.values())]

    before = loss()
    first = 2 if name == "dt" else 3  # a stack beyond the end: SPR's prediction j + 1 is left out with the target j + 1
    stacks[2, first:], action[2, 2:], returns[2, 2:] = random_stacks(9 - first), 17 - action[2, 2:], 5
    assert loss() == pytest.approx(before, rel=1e-5)
    action[2, 1] = 17 - action[2, 1]
    assert loss()[0] != pytest.approx(before[0], rel=1e-5)


def test_dt_keeps_the_largest_return_of_each_game():
    """Of training, not of evaluation; what play without fine-tuning aims at."""
    module = modules["dt"]
    objective = module.Objective(module.Args(**TINY))
    for returns in (-2.0, 5.0, 1.0):
        batch = window_batch(objective.length)
        batch["return_to_go"] = torch.full((3, 11), returns)
        batch["return_to_go"][0, :3] = 99  # of rows that are no steps of the sample
        objective(batch)
    objective.eval()
    with torch.no_grad():
        batch["return_to_go"] += 100
        objective(batch)
    assert objective.neck.largest_return[:4].tolist() == [5, 5, 5, -math.inf]
    assert objective.neck.state_dict()["largest_return"].shape == (60,)


def test_dt_keeps_the_largest_return_of_all_processes(monkeypatch):
    """Another process has seen a return of 7 in game 3, and one of 4 in game 0."""
    module = modules["dt"]
    objective = module.Objective(module.Args(**TINY))

    def all_reduce(seen, op):
        assert op == module.dist.ReduceOp.MAX
        seen[3], seen[0] = max(seen[3], 7), max(seen[0], 4)

    monkeypatch.setattr(module, "WORLD_SIZE", 2)
    monkeypatch.setattr(module.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(module, "augment", lambda stacks: stacks / 255)
    monkeypatch.setattr(objective, "loss", lambda *inputs: None)
    batch = window_batch(objective.length, b=2) | {"return_to_go": torch.full((2, objective.length), 5.0)}
    objective(batch)
    assert objective.neck.largest_return[:4].tolist() == [5, 5, -math.inf, 7]


@pytest.mark.parametrize("loss", ["distributional", "mse"])
def test_cql_computes_values_in_float32(loss):
    """Of online and momentum network. In bfloat16, values of actions that differ by less than 1% would be the same."""
    objective = modules["cql"].Objective(modules["cql"].Args(**TINY, loss=loss))
    stacks, game_id = torch.rand(3, 4, 84, 84), torch.tensor([1, 0, 1])
    for network in (objective, objective.target):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            maps = network.backbone(stacks)
            found = objective.logits(network, stacks, game_id)
        assert maps.dtype == torch.bfloat16
        with torch.no_grad():
            expected = network.head(network.neck(maps.float(), game_id), game_id).unflatten(1, (18, -1))
        torch.testing.assert_close(found, expected)
