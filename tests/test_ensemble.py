"""The weight ensemble: ends to the bit, the middle as a float64 average, statistics left alone."""

from __future__ import annotations

import pytest
import torch

from clipfit import ModelError
from clipfit.ensemble import interpolate


def states(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random tensors of several shapes and magnitudes; one floating-point and one integer tensor do not change."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"scalar": (), "vector": (5,), "matrix": (4, 3), "kernel": (2, 3, 2, 2)}
    magnitude = 10.0 ** float(torch.randint(-6, 6, (), generator=g))
    before = {name: magnitude * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    after = {name: t + magnitude * torch.randn(t.shape, generator=g) for name, t in before.items()}
    for state in (before, after):
        state["frozen"] = torch.full((400,), 0.1).cumsum(0)
        state["bn.running_var"] = torch.tensor([0.3, 7.0])
        state["bn.num_batches_tracked"] = torch.tensor(12)
    return before, after


@pytest.mark.parametrize("alpha", [0, 0.0, 1, 1.0])
def test_the_ends_are_the_given_tensors_themselves(alpha):
    before, after = states(0)
    ours = interpolate(before, after, alpha)
    expected = after if alpha else before
    assert ours.keys() == expected.keys()
    assert all(ours[name] is expected[name] for name in expected)


@pytest.mark.parametrize("seed", range(20))
def test_in_between_it_is_the_average_to_float32_rounding(seed):
    before, after = states(seed)
    alpha = float(torch.rand((), generator=torch.Generator().manual_seed(seed + 100))) if seed else 0.5
    ours = interpolate(before, after, alpha)
    for name in ("scalar", "vector", "matrix", "kernel"):
        b, a = before[name].double(), after[name].double()
        rounding = torch.finfo(torch.float32).eps * (b.abs() + a.abs()) * 2
        assert ours[name].dtype == torch.float32
        assert ((ours[name].double() - (alpha * a + (1 - alpha) * b)).abs() <= rounding).all()
    for name in ("frozen", "bn.running_var", "bn.num_batches_tracked"):
        assert torch.equal(ours[name], before[name])


def test_equal_tensors_pass_bit_for_bit_where_arithmetic_would_not():
    same = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    alpha = 0.3
    assert not torch.equal((1 - alpha) * same + alpha * same, same)
    assert interpolate({"w": same}, {"w": same.clone()}, alpha)["w"] is same


def test_half_precision_is_averaged_in_float32():
    b, a = torch.tensor([1.0, 2.0], dtype=torch.float16), torch.tensor([1.001, 4.0], dtype=torch.float16)
    ours = interpolate({"w": b}, {"w": a}, 0.25)["w"]
    assert ours.dtype == torch.float16
    assert torch.equal(ours, (0.25 * a.double() + 0.75 * b.double()).half())


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("bn.num_batches_tracked", torch.tensor(1), torch.tensor(2)),
        ("bn.running_mean", torch.tensor([0.5]), torch.tensor([0.6])),
        ("bn.running_var", torch.tensor([0.5]), torch.tensor([0.6])),
    ],
)
def test_statistics_that_changed_are_refused(name, before, after):
    with pytest.raises(ModelError, match=f"{name} is a statistic that fine-tuning must leave alone"):
        interpolate({name: before}, {name: after}, 0.5)


def test_other_architectures_are_refused():
    with pytest.raises(ModelError, match="not the same architecture: only one of them has b"):
        interpolate({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, 0.5)
    with pytest.raises(ModelError, match=r"a has shape \[1\] before and \[2\] after"):
        interpolate({"a": torch.ones(1)}, {"a": torch.ones(2)}, 0.5)
