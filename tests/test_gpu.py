"""What only a CUDA device can show; skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipfit import AdaptConfig, EvaluateConfig, adapt, evaluate
from clipfit.config.lora import LoraSettings
from clipfit.data import augment
from clipfit.events import Silent, StepReport
from clipfit.methods import METHODS
from clipfit.model import loading
from clipfit.model.devices import resolve_device
from clipfit.model.lora import Adapters
from clipfit.streams import Rows
from clipfit.training import step
from clipfit.training.graphs import Recorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize(
    ("method", "tuning"), [("cite", "full"), ("atha", "full"), ("cite+atha", "full"), ("atha", "lora")]
)
def test_adapting_and_evaluating_on_the_gpu(
    method: str, tuning: str, precision: str, split: Path, models: dict[str, str], tmp_path: Path
) -> None:
    config = AdaptConfig(
        split, method, models["vit"], tuning=tuning, device="cuda", precision=precision, output=tmp_path / "run"
    )
    result = adapt(config)
    rows = evaluate(EvaluateConfig(result.run, alphas=(0.0, 0.5, 1.0), device="cuda")).rows
    assert [row.alpha for row in rows] == [0.0, 0.5, 1.0]
    assert all(value == value for value in result.losses.values())


def test_gpu_and_cpu_give_the_same_features(models: dict[str, str]) -> None:
    noise = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = []
    for device in ("cpu", "cuda"):
        backbone = loading.load(models["vit"], device=device)
        with torch.no_grad():
            features.append(backbone.encode_image(backbone.normalize(noise)).cpu())
    torch.testing.assert_close(features[0], features[1], atol=1e-4, rtol=1e-4)


def test_a_dropout_mask_of_a_text_that_is_cut_shorter_has_the_same_numbers():
    adapters = Adapters(LoraSettings(), 0, torch.device("cuda"))
    with adapters.drawing(Rows(0, (3, 5))):
        whole, cut = (adapters.mask("text", 1, length, 512) for length in (77, 9))
    assert torch.equal(whole[:, :, :9], cut)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_gives_the_same_bytes(
    split: Path, models: dict[str, str], tmp_path: Path, method: str, tuning: str
) -> None:
    """In bf16, in which attention's fused kernels compute."""
    weights, said = [], []
    progress = Silent()
    progress.say = said.append  # type: ignore[method-assign]
    for name in ("one", "two"):
        config = AdaptConfig(
            split, method, models["vit"], tuning=tuning, device="cuda", precision="bf16", output=tmp_path / name
        )
        weights.append((adapt(config, progress).run / "finetuned.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert not any("no deterministic kernel" in text for text in said)


def test_crops_are_resized_as_on_the_cpu_but_for_rounding() -> None:
    draw = torch.Generator().manual_seed(0)
    crops = [torch.randint(256, (3, *sides), generator=draw, dtype=torch.uint8) for sides in ((90, 70), (24, 31))]
    ours = augment.resized_on(torch.device("cuda"), crops, (32, 40)).cpu()
    expected = torch.stack([augment.resized(crop, (32, 40)) for crop in crops])
    assert (ours.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("given", [{}, {"gradient_checkpointing": True}, {"context": True}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_recorded_steps_give_the_bytes_of_those_that_are_not(
    split: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method, precision, given
) -> None:
    recorders: list[Recorder] = []

    class Watched(Recorder):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            self.works &= len(recorders) == 0
            recorders.append(self)

    monkeypatch.setattr(step, "Recorder", Watched)
    weights = []
    for name in ("recorded", "plain"):
        config = AdaptConfig(
            split, method, models["vit"], device="cuda", precision=precision, output=tmp_path / name, forecast=False,
            context=given.get("context", False),
            recipe={"epochs": 6, **{key: value for key, value in given.items() if key != "context"}},
        )  # fmt: skip
        weights.append((adapt(config).run / "finetuned.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert [recorder.works for recorder in recorders] == [True, False]
    assert recorders[0]._recorded


def recorded_run(split: Path, model: str, output: Path, progress: Any = None, **given: Any) -> bytes:
    config = AdaptConfig(
        split, "cite", model, device="cuda", precision="bf16", output=output, forecast=False,
        recipe={"epochs": 6}, **given,
    )  # fmt: skip
    return (adapt(config, progress).run / "finetuned.safetensors").read_bytes()


def test_a_run_that_is_gone_on_with_has_the_bytes_of_one_that_was_recorded_throughout(
    split: Path, models: dict[str, str], tmp_path: Path
) -> None:
    class Stopping(Silent):
        def step(self, report: StepReport) -> None:
            if report.step == report.steps - 2:
                raise KeyboardInterrupt

    expected = recorded_run(split, models["vit"], tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        recorded_run(split, models["vit"], tmp_path / "run", Stopping(), save_every=1)
    assert recorded_run(split, models["vit"], tmp_path / "run", resume=True) == expected


def test_a_recording_that_fails_is_said_and_changes_no_byte(
    split: Path, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = recorded_run(split, models["vit"], tmp_path / "recorded")
    usual, said, stream = Recorder._recording, [], torch.cuda.current_stream()

    def waiting(recorder: Recorder, work: Any) -> Any:
        def waits() -> Any:
            losses = work()
            torch.cuda.synchronize()  # which no recording permits
            return losses

        return usual(recorder, waits)

    monkeypatch.setattr(Recorder, "_recording", waiting)
    progress = Silent()
    progress.say = said.append  # type: ignore[method-assign]
    assert recorded_run(split, models["vit"], tmp_path / "plain", progress) == expected
    assert len([text for text in said if "no longer recorded as CUDA graphs" in text]) == 1
    assert torch.cuda.current_stream() == stream


def test_convolutions_in_fp32_are_in_fp32() -> None:
    device = resolve_device("cuda")
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 64, 32, 32, generator=draw), torch.randn(64, 64, 3, 3, generator=draw)
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    found = torch.nn.functional.conv2d(x.to(device), weight.to(device)).cpu()
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()  # with 10 bits a thousandth
