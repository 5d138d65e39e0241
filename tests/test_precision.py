"""`--precision auto`: bf16 where the processor multiplies in it and the model is large; and what stays float32."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Cli, task_of
from families import FAMILIES, make_family
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from clipfit import AdaptConfig, EvaluateConfig, UsageError, adapt, evaluate, load
from clipfit.config.lora import LoraSettings
from clipfit.engines import TORCH, Engine
from clipfit.methods import METHODS
from clipfit.methods.batch import Batch
from clipfit.model import bf16, devices, loading, lora
from clipfit.model.clip import FrozenImageTower
from clipfit.streams import Rows
from clipfit.training.step import accumulate, embedded

CPU = torch.device("cpu")
PROBES = {"_is_avx512_bf16_supported": "cpu", "_is_amx_tile_supported": "cpu", "_is_mkldnn_bf16_supported": "mkldnn"}


class Machine:
    """A processor by what torch's probes say of it."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self._patch = patch
        patch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        patch.delenv("DNNL_MAX_CPU_ISA", raising=False)

    def has(self, *probes: str) -> None:
        """These say yes, and all others no."""
        mkldnn = {name: lambda said=name in probes: said for name, owner in PROBES.items() if owner == "mkldnn"}
        self._patch.setattr(torch.ops, "mkldnn", SimpleNamespace(**mkldnn))
        for name, owner in PROBES.items():
            if owner == "cpu":
                self._patch.setattr(torch.cpu, name, lambda said=name in probes: said, raising=False)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def _all_are_large(monkeypatch) -> None:
    monkeypatch.setattr(devices, "LARGE", 0)


def of_size(parameters: int) -> SimpleNamespace:
    return SimpleNamespace(visual=torch.nn.Linear(parameters, 1, bias=False, device="meta"))


@pytest.mark.parametrize(
    ("probes", "expected"),
    [
        (("_is_avx512_bf16_supported", "_is_mkldnn_bf16_supported"), "bf16"),
        (("_is_amx_tile_supported", "_is_mkldnn_bf16_supported"), "bf16"),
        (tuple(PROBES), "bf16"),
        (("_is_mkldnn_bf16_supported",), "fp32"),  # AVX-512 without bf16: it would be emulated
        (("_is_avx512_bf16_supported",), "fp32"),  # oneDNN would not use it
        ((), "fp32"),
    ],
)
def test_auto_follows_what_the_processor_can(machine, probes, expected):
    machine.has(*probes)
    assert devices.resolve_precision("auto", CPU) == expected
    assert devices.resolve_precision("fp32", CPU) == "fp32"


def test_a_torch_without_the_probes_says_no(monkeypatch):
    for name, owner in PROBES.items():
        if owner == "cpu":
            monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert devices.resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize(
    ("told", "expected"),
    [("AVX2", "fp32"), ("avx512_core", "fp32"), ("AVX512_CORE_BF16", "bf16"), ("AVX512_CORE_AMX", "bf16")],
)
def test_what_onednn_is_told_to_leave_alone_counts(machine, monkeypatch, told, expected):
    machine.has(*PROBES)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", told)
    assert devices.resolve_precision("auto", CPU) == expected


def test_without_onednn_it_is_no(machine, monkeypatch):
    machine.has(*PROBES)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert devices.resolve_precision("auto", CPU) == "fp32"


def test_a_small_image_tower_stays_in_float32(machine):
    machine.has(*PROBES)
    sizes = (devices.LARGE - 1, devices.LARGE)
    assert [devices.resolve_precision("auto", CPU, of_size(n)) for n in sizes] == ["fp32", "bf16"]
    assert devices.resolve_precision("bf16", CPU, of_size(1)) == "bf16"


@pytest.mark.usefixtures("_all_are_large")
def test_a_run_says_what_it_was_made_in_and_is_measured_in_what_is_fast_here(split, models, tmp_path, machine):
    machine.has(*PROBES)
    run = adapt(AdaptConfig(split, model=models["vit"], output=tmp_path / "run", recipe={"epochs": 1})).run
    assert json.loads((run / "config.json").read_text("utf-8"))["precision"] == "bf16"
    there = evaluate(EvaluateConfig(run))
    assert (there.features, load(run).clip.precision) == ("bf16", "bf16")
    assert load(run).at(0.0).clip.precision == "bf16"
    machine.has()  # another one
    here = evaluate(EvaluateConfig(run))
    assert (here.features, here.as_json()["features"]) == ("fp32", "fp32")
    assert load(run).clip.precision == "fp32"
    assert load(run, precision="bf16").at(0.0).clip.precision == "bf16"
    assert evaluate(EvaluateConfig(run, precision="bf16")).features == "bf16"
    zero_shot = EvaluateConfig(model=models["vit"], data=split / "test", precision="bf16")
    assert evaluate(zero_shot).features == "bf16"


def test_the_command_line_says_the_type(cli: Cli, split_run: Path, split: Path):
    done = cli("evaluate", split_run, "--precision", "bf16")
    assert "features are computed in bf16" in done.stderr
    assert ", features in bf16" in done.stderr
    done = cli("predict", split_run, split / "test" / "cow", "--precision", "bf16")
    assert "on cpu in bf16" in " ".join(done.stderr.split())
    cli("predict", split_run, split / "test" / "cow", "--precision", "fp16").fails(2, "auto, fp32, bf16", "'fp16'")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [None, 2])
def test_weights_gradients_embeddings_and_losses_are_float32_in_bf16(models, method, size):
    """And the losses are near those in float32; the towers alone are in bf16."""
    found = {}
    for precision in ("fp32", "bf16"):
        clip = loading.load(models["vit"])
        clip.precision = precision
        task, objective = task_of(clip, ["ant", "bee", "cow"], method)
        draw = torch.Generator().manual_seed(0)
        images = torch.randn(4, 3, *clip.image_size, generator=draw)
        batch = Batch.of(images, [0, 1, 2, 1], Rows(0, (0, 1, 2, 3)))
        texts, seen, e = embedded(objective, batch, size)
        tensors = [*texts.columns, *seen.columns, e.t, *([e.teacher_u] if objective.teacher else [])]
        assert {t.dtype for t in tensors if t is not None} == {torch.float32}
        assert {term.value.dtype for term in objective.terms(e, batch).values()} == {torch.float32}
        found[precision] = accumulate(objective, batch, size).total
        trained = [p for p in task.clip.model.parameters() if p.grad is not None]
        assert trained
        assert {dtype for p in trained for dtype in (p.dtype, p.grad.dtype)} == {torch.float32}
        differ = task.clip.model.visual(images).dtype  # outside of autocast: the weights were never cast
        assert differ == torch.float32
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.05)


# ---- what autocast alone leaves slow on a processor


def test_attention_of_another_kind_computes_as_it_is():
    """Pooling by attention has other keys than queries; that of another width has no weight of all three."""
    for width in (32, 48):
        pool = torch.nn.Sequential(torch.nn.MultiheadAttention(32, 4, kdim=width, vdim=width, batch_first=True)).eval()
        bf16.prepare(pool, CPU, "bf16")
        bf16.round_products(pool)
        query, key = torch.randn(2, 3, 32), torch.randn(2, 5, width)
        with torch.no_grad(), bf16.autocast(CPU, "bf16"):
            seen, weights = pool[0](query, key, key)
        assert (seen.shape, weights.shape) == ((2, 3, 32), (2, 3, 5))


def test_masks_of_both_kinds_are_torchs():
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x, hidden = torch.randn(2, 5, 32), torch.ones(5, 5, dtype=torch.bool).triu(1)
    added = torch.zeros(5, 5).masked_fill(hidden, -torch.inf)
    expected = attention(x, x, x, need_weights=False, attn_mask=added)[0]
    bf16.prepare(attention, CPU, "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        for mask in (hidden, added, added.expand(8, 5, 5)):
            found = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
            assert found.dtype == torch.bfloat16
            assert torch.allclose(found.float(), expected, atol=0.02)
    assert torch.equal(attention(x, x, x, need_weights=False, attn_mask=added)[0], expected)  # no autocast, no bf16


def test_a_teacher_is_forgotten_when_nobody_has_it(models):
    clip = loading.load(models["vit"])
    clip.precision = "bf16"
    teacher = FrozenImageTower(clip)
    held = weakref.ref(teacher.visual.transformer.resblocks[0].attn.in_proj_weight)
    gc.collect()
    gc.disable()
    try:
        del teacher
        assert held() is None
    finally:
        gc.enable()


class Types(TorchDispatchMode):
    """Notes in which number types what was computed, and what was copied to be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[torch.dtype]] = {}
        self.most_copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [part for part in torch.utils._pytree.tree_leaves(args) if isinstance(part, torch.Tensor)]
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if given:
            self.found.setdefault(name, set()).add(given[0].dtype)
        if name in ("clone", "_to_copy", "copy_", "expand") and isinstance(made, torch.Tensor):
            self.most_copied = max(self.most_copied, made.numel())
        return made


def noted(work: Callable[[], object]) -> Types:
    with Types() as types:
        work()
    return types


def test_no_weight_is_copied_for_every_token_of_a_tower_without_a_gradient(models):
    """torch's attention turns its input round, and then multiplies a batch of copies of its weight."""
    clip = loading.load(models["vit"])
    clip.precision = "bf16"
    images = torch.randn(3, 3, *clip.image_size)
    largest = max(p.numel() for p in clip.model.visual.parameters())
    teacher = FrozenImageTower(clip)
    assert teacher.visual.transformer.resblocks[0].attn.in_proj_weight.dtype == torch.bfloat16
    for tower in (teacher, torch.no_grad()(clip.encode_image)):
        types = noted(lambda tower=tower: tower(images))
        assert types.most_copied <= max(largest, images.numel())
        assert "bmm" not in types.found
        assert types.found["addmm"] == {torch.bfloat16}
    prepared = sum(type(part).__module__ == bf16.__name__ for part in clip.model.modules())
    with bf16.usual(clip.model):
        assert not any(type(part).__module__ == bf16.__name__ for part in clip.model.modules())
    assert sum(type(part).__module__ == bf16.__name__ for part in clip.model.modules()) == prepared > 0
    clip.precision = "fp32"
    assert not any(type(part).__module__ == bf16.__name__ for part in clip.model.modules())


def test_attention_and_the_patch_embedding_that_is_trained_are_in_float32_beside_products_in_bf16(models):
    clip = loading.load(models["vit"])
    clip.precision = "bf16"
    images, tokens = torch.randn(3, 3, *clip.image_size), clip.tokenize(["an ant", "a bee"])
    found = noted(lambda: (clip.encode_image(images).sum() + clip.encode_text(tokens).sum()).backward()).found
    attending = [types for name, types in found.items() if "scaled_dot_product" in name]
    assert attending
    assert set.union(*attending) == {torch.float32}
    assert found["convolution"] == {torch.float32}
    assert torch.bfloat16 in found["mm"] | found["addmm"]
    with torch.no_grad():
        assert noted(lambda: clip.encode_image(images)).found["convolution"] == {torch.float32}
        assert torch.equal(clip.encode_image(images), FrozenImageTower(clip)(images))
    assert torch.equal(clip.encode_image(images).detach(), FrozenImageTower(clip)(images))


@pytest.mark.parametrize(
    ("name", "tuning"),
    [("vit", "full"), ("vit", "lora"), ("eos", "full"), ("bidirectional", "full"), ("resnet", "full")],
)
def test_what_is_computed_in_place_of_torchs_attention_is_that_attention(models, name, tuning):
    """Beside float32, where embeddings and gradients differ by what bf16 rounds; with LoRA's attention too."""
    found = {}
    for precision in ("fp32", "bf16"):
        clip = loading.load(models[name])
        clip.precision = precision
        images = torch.randn(3, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
        tokens = clip.tokenize(["an ant", "a bee with a long name"])
        with lora.adapted(clip, LoraSettings(dropout=0.0), 0) if tuning == "lora" else contextlib.nullcontext():
            u = clip.encode_image(images, rows=Rows(0, (0, 1, 2)))
            t = clip.encode_text(tokens, rows=Rows(0, (0, 1)))
            (u[:, 0].sum() + t[:, 0].sum()).backward()
            gradient = torch.cat([p.grad.flatten() for p in clip.model.parameters() if p.grad is not None])
        found[precision] = u.detach(), t.detach(), gradient
    for plain, rounded in zip(*found.values(), strict=True):
        assert 0 < (plain - rounded).norm() / plain.norm() < 0.03


def test_a_run_in_bf16_has_float32_weights(split, models, tmp_path):
    config = AdaptConfig(split, model=models["vit"], precision="bf16", output=tmp_path / "run", recipe={"epochs": 1})
    state = load_file(adapt(config).run / "finetuned.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["vit", *FAMILIES])
def test_rounded_weights_of_products_have_the_bits_of_autocast(models, tmp_path, name):
    """Of a teacher, and of what evaluate and predict compute with."""
    folder = models["vit"] if name == "vit" else make_family(name, tmp_path)
    clip = loading.load(folder)
    clip.precision = "bf16"
    images = torch.randn(2, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = clip.encode_image(images)
        before = sum(p.element_size() * p.numel() for p in clip.model.visual.parameters())
        assert torch.equal(FrozenImageTower(clip)(images), expected)
        Engine(TORCH, "bf16").attach(clip)
        assert torch.equal(clip.encode_image(images), expected)
        after = sum(p.element_size() * p.numel() for p in clip.model.visual.parameters())
    assert after < 0.8 * before


def test_evaluate_in_bf16_rounds_no_weights_before_it_averages_them(split, models, tmp_path):
    """Rounded ones are those at each ratio: the figures are those of a fresh process at that ratio."""
    run = adapt(AdaptConfig(split, model=models["vit"], output=tmp_path / "run", recipe={"epochs": 1})).run
    together = evaluate(EvaluateConfig(run, alphas=(0.0, 0.5, 1.0), precision="bf16"))
    assert together.kept is not None
    several = {path.name: load_file(path)["logits"] for path in together.kept.glob("*.safetensors")}
    for alpha in (0.5, 1.0):
        alone = evaluate(EvaluateConfig(run, alphas=(alpha,), precision="bf16"))
        assert alone.kept is not None
        for path in alone.kept.glob("*.safetensors"):
            assert torch.equal(load_file(path)["logits"], several[path.name])


def test_each_of_several_processes_has_a_gpu_of_its_own(monkeypatch):
    told = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.tensor(0.0))
    assert devices.resolve_device("auto") == devices.resolve_device("cuda") == torch.device("cuda:1")
    assert devices.resolve_device("cpu") == torch.device("cpu")
    assert chosen == ["cuda:1"] * 2
    with pytest.raises(UsageError, match="a GPU of its own: give --device cuda, not cuda:0"):
        devices.resolve_device("cuda:0")
