"""The network and the objectives against torchvision and against numbers computed with the original code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import load
from golden.fill import fill_array, make_batch
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
atc, bc = load("pretrain_atc.py"), load("finetune_bc.py")


def golden(name: str) -> dict:
    return dict(np.load(GOLDEN / f"{name}.npz", allow_pickle=False))


def fill(modules: dict[str, nn.Module], numbers: dict, prefix: str = "given/") -> None:
    """Gives every parameter listed in `numbers` the values that its canonical name stands for."""
    given = {name: tuple(map(int, shape.split("x"))) for name, shape in (x.split() for x in numbers["param_names"])}
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            values = fill_array(f"{prefix}{part}.{name}", given.pop(f"{part}.{name}"))
            parameter.data = torch.from_numpy(values).view(parameter.shape)
    if not prefix.endswith("target/"):
        assert not given, f"the golden network has more parameters: {list(given)}"


def check(numbers: dict, parts: dict[str, nn.Module], loss: torch.Tensor) -> None:
    """Loss to 1e-5 and the gradient norm of each part to 1e-4, relative."""
    loss.backward()
    assert loss.item() == pytest.approx(float(numbers["loss"]), rel=1e-5)
    for name, part in parts.items():
        norm = sum(parameter.grad.double().square().sum().item() for parameter in part.parameters()) ** 0.5
        assert norm == pytest.approx(float(numbers[f"grad_norm_{name}"]), rel=1e-4), name


def check_features(
    numbers: dict, backbone: nn.Module, neck: nn.Module, obs: torch.Tensor, game_id: torch.Tensor
) -> None:
    with torch.no_grad():
        maps = backbone(obs)
        x = neck(maps, game_id)
    assert maps.mean().item() == pytest.approx(float(numbers["backbone_mean"]), rel=1e-5)
    assert maps.std(correction=0).item() == pytest.approx(float(numbers["backbone_std"]), rel=1e-5)
    for values, name in ((maps, "backbone_slice"), (x, "neck_slice")):
        found = values.flatten()[:: values.numel() // 64][:64]
        np.testing.assert_allclose(found, numbers[name], rtol=1e-3, atol=1e-4)


def stacks_of(batch: dict, name: str) -> torch.Tensor:
    return torch.from_numpy(batch[name]).float().squeeze(1) / 255


def test_atc_golden():
    numbers, batch = golden("atc"), make_batch("given/", n=4)
    objective = atc.ATC(atc.Args())
    parts = {"backbone": objective.backbone, "neck": objective.neck, "head": objective.head}
    fill(parts, numbers)
    fill(dict(objective.target.items()), numbers, "given/target/")
    game_id, done = (torch.from_numpy(batch[name][:, 0]) for name in ("game_id", "done"))
    obs, next_obs = stacks_of(batch, "obs"), stacks_of(batch, "next_obs")
    check_features(numbers, objective.backbone, objective.neck, obs, game_id)
    loss, metrics = objective.loss(obs, next_obs, game_id, done.bool())
    check(numbers, parts, loss)
    assert metrics["accuracy"].item() == pytest.approx(float(numbers["log_self_pred_acc"]))


def test_bc_golden():
    """The objective of pretrain_bc and of the fine-tuning: their parts are the same, with a table row for each game."""
    numbers, batch = golden("bc"), make_batch("given/", n=4)
    backbone = bc.ResNet(1.0, (3, 4, 6, 3))
    parts = {"backbone": backbone, "neck": bc.Neck(2048, 60), "head": bc.GameLinear(60, 512, 18)}
    fill(parts, numbers)
    game_id, action = (torch.from_numpy(batch[name][:, 0]) for name in ("game_id", "action"))
    obs = stacks_of(batch, "obs")
    check_features(numbers, backbone, parts["neck"], obs, game_id)
    logits = parts["head"](parts["neck"](backbone(obs), game_id), game_id)
    check(numbers, parts, nn.functional.cross_entropy(logits, action))


def test_fine_tuning_policy_is_the_golden_network_for_one_game():
    """The policy's logits are those of the golden network's parts when its only table row is that game's."""
    numbers, batch = golden("bc"), make_batch("given/", n=4)
    backbone = bc.ResNet(1.0, (3, 4, 6, 3))
    parts = {"backbone": backbone, "neck": bc.Neck(2048, 60), "head": bc.GameLinear(60, 512, 18)}
    fill(parts, numbers)
    policy = bc.Policy(backbone, freeze_backbone=True)
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


def test_schedule_golden():
    numbers = golden("schedule")
    found = [atc.lr_multiplier(step, 1000) for step in range(1000)]
    np.testing.assert_allclose(found, numbers["lr_multiplier"], rtol=1e-12)
    objective = atc.ATC(atc.Args(total_steps=1000, width_multiplier=0.0625, blocks=(1, 1, 1, 1)))
    found = [objective.update_target(step)["momentum"] for step in range(1000)]
    np.testing.assert_allclose(found, numbers["momentum"], rtol=1e-12)


def test_update_target_is_the_moving_average():
    objective = atc.ATC(atc.Args(total_steps=10, width_multiplier=0.0625, blocks=(1, 1, 1, 1)))
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
    ours = atc.ResNet(1.0, (3, 4, 6, 3)).to(memory_format=memory_format)
    theirs = torchvision.models.resnet50(norm_layer=NormWithoutParameters)
    theirs.conv1, theirs.maxpool = nn.Conv2d(4, 64, 7, 2, 3, bias=False), nn.Identity()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert all("bn" in name or "downsample.1" in name or name.startswith("fc.") for name in missing)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 23_458_048
    x = torch.rand(2, 4, 84, 84).to(memory_format=memory_format)
    features = nn.Sequential(*list(theirs.children())[:-2])  # without average pooling and classifier
    assert ours(x).shape == (2, 2048, 6, 6)
    torch.testing.assert_close(ours(x), features(x), rtol=1e-4, atol=1e-5)


def test_game_linear_is_a_matrix_for_each_game():
    layer = atc.GameLinear(5, 7, 3)
    x, game_id = torch.randn(4, 7), torch.tensor([4, 0, 4, 2])
    expected = torch.stack([row @ layer.weight[game] + layer.bias[game] for row, game in zip(x, game_id, strict=True)])
    torch.testing.assert_close(layer(x, game_id), expected)


def test_info_nce_leaves_samples_out_but_keeps_them_as_negatives():
    query, key, keep = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([True, False, True])
    loss, accuracy = atc.info_nce(query, key, keep, temperature=2.0)
    logits = (query @ key.T / 2).tolist()
    losses = [math.log(sum(math.exp(x) for x in row)) - row[i] for i, row in enumerate(logits)]
    assert loss.item() == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)
    hits = [row.index(max(row)) == i for i, row in enumerate(logits)]
    assert accuracy.item() == pytest.approx((hits[0] + hits[2]) / 2)
    assert atc.info_nce(query, key, torch.zeros(3, dtype=torch.bool))[0].item() == 0  # none kept: no loss, no NaN
