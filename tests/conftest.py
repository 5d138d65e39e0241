"""Little models with random weights and little folders of images: the suite runs offline on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before open_clip is imported: nothing here may reach a network

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from clipfit import AdaptConfig, adapt
from clipfit.cli import app
from clipfit.data.files import heif_is_installed
from clipfit.formats import consumer
from clipfit.methods import METHODS, Embeddings, Objective, Task, Term
from clipfit.methods.batch import Batch
from clipfit.model import clip, loading
from clipfit.model.clip import Clip
from clipfit.prompts import prompts
from clipfit.streams import Rows

# before a test writes an ONNX graph: torch's exporter registers a device, for which a first backward after it starts
# threads, and then no forked process (tests/processes.py) has a backward any more
torch.ones((), requires_grad=True).backward()

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
# the models' own recipe, so that every command ends within seconds
QUICK = {"recipe": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3}}


def make_model(folder: Path, vision: Mapping[str, Any] = VISION, seed: int = 0, **text: Any) -> Path:
    """A `local-dir:` folder of a CLIP with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    quick_gelu = text.pop("quick_gelu", False)
    config = {"embed_dim": 32, "vision_cfg": dict(vision), "text_cfg": {**TEXT, **text}, "quick_gelu": quick_gelu}
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name in ("token_embedding.weight", "positional_embedding"):
                tensor.mul_(20)  # as initialised, all texts would nearly be the same
        for name, tensor in model.named_buffers():
            if "running_" in name:  # as initialised, a batch-norm hardly differs from none
                tensor.uniform_(-0.2, 0.2) if name.endswith("mean") else tensor.uniform_(0.2, 0.4)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    record = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(record), "utf-8")
    (folder / "clipfit.json").write_text(json.dumps({"adapt": QUICK}), "utf-8")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_signal_is_ignored() -> None:
    """As in a terminal, however the suite was started: in the background of a script SIGINT is ignored."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`--model` by name: vit, resnet, eos (pooling at the end-of-text token), bidirectional (no causal mask)."""
    root = tmp_path_factory.mktemp("models")
    folders = {
        "vit": make_model(root / "vit"),
        "resnet": make_model(root / "resnet", RESNET),
        "eos": make_model(root / "eos", pool_type="eos", eos_id=49407),
        "bidirectional": make_model(root / "bidirectional", no_causal_mask=True),
        "quick": make_model(root / "quick", quick_gelu=True),
    }
    return {name: f"local-dir:{folder}" for name, folder in folders.items()}


@pytest.fixture
def vit(models: dict[str, str]) -> clip.Clip:
    """A freshly loaded little ViT CLIP."""
    return loading.load(models["vit"])


@pytest.fixture(autouse=True)
def consumers_run_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Consumers of exports run in this process, which has torch already; gives what starts them in their own."""
    in_their_own = consumer.start

    def run_here(script: Path, arguments: Sequence[str], exchange: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), *arguments])
            runpy.run_path(str(script), run_name="__main__")

    monkeypatch.setattr(consumer, "start", run_here)
    return in_their_own


def of_python(code: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a program in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def script_at(path: Path) -> ModuleType:
    """A script that is no part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Noise around a colour, both from the seed: (width, height)."""
    draw = np.random.default_rng(seed)
    colour = draw.integers(40, 215, 3)
    noise = draw.integers(-40, 40, (size[1], size[0], 3))
    return Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8))


def make_classes(root: Path, counts: Mapping[str, int], seed: int = 0) -> Path:
    """`root/<class>/<k>.png`."""
    for c, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            picture(1000 * seed + 100 * c + k).save(root / name / f"{k}.png")
    return root


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of three images; never written to."""
    return make_classes(tmp_path_factory.mktemp("flat") / "pets", {"tabby_cat": 3, "dog": 3, "fish": 3, "owl": 3})


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train: three classes; test: one of them is lacking, two others are new. Never written to."""
    root = tmp_path_factory.mktemp("split") / "animals"
    make_classes(root / "train", {"bee": 2, "cow": 2, "dog": 2})
    make_classes(root / "test", {"Ant-Lion": 2, "cow": 3, "dog": 2, "elk": 2}, seed=1)
    return root


@pytest.fixture(scope="session")
def split_run(split: Path, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of cite on `split`; never written to."""
    output = tmp_path_factory.mktemp("runs") / "animals-cite"
    return adapt(AdaptConfig(split, model=models["vit"], output=output)).run


@dataclass(frozen=True)
class Result:
    """What a command printed and returned."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        assert self.stdout.count("\n") == 1, self.stdout
        return json.loads(self.stdout)

    def fails(self, code: int, *words: str) -> None:
        """It ended with `code`, one sentence on stderr, and that sentence holds the words."""
        assert self.code == code, self.stderr
        assert self.stdout == ""
        assert "Traceback" not in self.stderr
        errors = [line for line in self.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1, self.stderr
        assert self.stderr.splitlines()[-1] == errors[0]
        for word in words:
            assert word in errors[0]


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings stay float64, so that a comparison can be tight: the encoders end with `.float()`."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def task_of(clip: Clip, names: Sequence[str], method: str, **options: Any) -> tuple[Task, Objective]:
    """A method's objective on the given model, which gets the method's edits where it has some."""
    configured = METHODS[method].configure(options)
    if edits := METHODS[method].edits(configured):
        clip = clip.with_additions(replace(clip.additions, edits=edits))
    task = Task(clip, clip.tokenize(prompts(names, "a photo of a {}")))
    return task, METHODS[method].build(task, configured)


def terms_of(objective: Objective, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Term]:
    """An objective's losses of normalised images (B, 3, H, W) and labels (B,)."""
    return plain_terms(objective, Batch.of(images, labels.tolist(), Rows(0, tuple(range(len(labels))))))


def plain_terms(objective: Objective, batch: Batch) -> dict[str, Term]:
    """The losses of a batch by one graph of everything."""
    rows = objective.classes(batch)
    texts = objective.clip.read(objective.tokens[list(rows.numbers)], rows)
    teacher_u = objective.teacher(batch.images) if objective.teacher else None
    return objective.terms(Embeddings(objective.embed(batch, texts), texts.embeddings, teacher_u), batch)


Cli = Callable[..., Result]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `clipfit` in this process, from an empty folder: everything is written below tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        return Result(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Called, it makes pillow-heif one that is not installed."""

    def remove() -> None:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        heif_is_installed.cache_clear()

    yield remove
    heif_is_installed.cache_clear()
