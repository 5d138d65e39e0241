"""What a run changed in the pre-trained weights, small enough to keep a hundred of: any α comes of one file.

How it is stored is chosen by measuring: of the encodings (see `encoding`) the smallest whose logits are near enough.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clipfit.config.outputs import FormatOptions
from clipfit.ensemble import State
from clipfit.errors import ModelError, OutputError, UsageError
from clipfit.formats import consumer, encoding, proof, unpacked
from clipfit.formats.card import Usage, code
from clipfit.formats.encoding import Encoded, Encoding, Factors
from clipfit.formats.open_clip import CONFIG, WEIGHTS, OpenClipFolder, reading
from clipfit.formats.proof import Pictures, Proof
from clipfit.formats.safetensors import TOKENIZER
from clipfit.formats.stored import OPENED
from clipfit.formats.subject import Subject, about, in_effect, write_about
from clipfit.measure import scoring
from clipfit.model import loading
from clipfit.model import weights as tensors
from clipfit.model.clip import Clip
from clipfit.model.named import ADDED, Additions
from clipfit.model.sources import LOCAL_DIR, TINY, Source, are_published, recorded_name
from clipfit.model.tokenizing import write_tokenizer
from clipfit.runs import files, manifest
from clipfit.runs.record import typed
from clipfit.runs.run import Run

SCRIPT = "_consume_difference.py"
DIFFERENCE, RESTORE = "difference.safetensors", "restore.py"
BOUND = 1e-2  # of a logit, for the export to be kept
NEAR = BOUND / 4  # for an encoding to be chosen: other pictures and names may differ more
PICTURES, NAMES = 32, 64  # at most, that encodings are measured on


@dataclass(frozen=True)
class Tried:
    """An encoding: what it takes, also as a share of all weights in fp32, and by how much logits differ at α = 1."""

    encoding: str
    bytes: int
    share: float
    largest_difference: float


@dataclass(frozen=True)
class DifferenceProof(Proof):
    """With the encodings that were tried, the chosen one first."""

    encodings: tuple[Tried, ...] = ()


class Difference:
    """The tensors that changed, at low precision or as products of low rank."""

    name = "difference"
    libraries = ()

    def holds(self, run: Run, additions: Additions, options: FormatOptions) -> str | None:
        """A run that is a plain CLIP at every α, for every α is in it."""
        return OpenClipFolder().holds(run, in_effect(run, 1.0), options)

    def write(self, subject: Subject, folder: Path) -> None:
        """Raises OutputError where the place cannot be written or has no room; ModelError: see Run.pretrained."""
        run = subject.run
        before = _plain(run.pretrained().state())
        chosen, tried = _chosen(run, before)
        files.require_room(folder, chosen.bytes)
        base = {"model": run.source.model, "pretrained": run.source.pretrained, "sha256": tensors.state_sha256(before)}
        described = {"base": base, "scales": dict(chosen.scales), "encodings": [asdict(one) for one in tried]}
        files.write_tensors(folder / DIFFERENCE, chosen.tensors, {**about(subject), **described})
        write_tokenizer(run.source, folder / TOKENIZER)
        files.write_text(folder / RESTORE, (consumer.SCRIPTS / SCRIPT).read_text("utf-8"))
        write_about(subject, folder)

    def prove(self, subject: Subject, folder: Path, pictures: Pictures) -> Proof:
        """open_clip's logits, of what the script in the folder makes of it: at α, and at 1, where they differ most.

        Raises:
            ClipfitError: they differ by more than a hundredth.
        """
        run = subject.run
        bound = BOUND / float(subject.model.scale)
        at_one = replace(subject, alpha=1.0, model=loading.rebuild(run.source, _plain(run.finetuned())))
        proofs = []
        with _base(run) as base:
            # how files are decoded is no matter of α: they are shown once
            for each, shown in ((subject, pictures), (at_one, replace(pictures, files=(), names=()))):
                told = [str(folder.absolute()), "--alpha", repr(each.alpha), "--model", f"{LOCAL_DIR}{base}"]
                proofs.append(proof.prove(each, shown, functools.partial(unpacked.consume, SCRIPT, told), bound))
        made, most = proofs
        tried = tuple(Tried(**one) for one in files.read_metadata(folder / DIFFERENCE)["encodings"])
        return DifferenceProof(**{**vars(made), "further": {"α = 1": most.identical_pixels}}, encodings=tried)

    def usage(self, subject: Subject, folder: Path) -> Usage:
        """By the script, with open_clip, and the encodings that were tried."""
        rows = [Tried(**one) for one in files.read_metadata(folder / DIFFERENCE)["encodings"]]
        table = "\n".join(
            f"| {row.encoding} | {row.bytes / 1e6:.1f} MB | {100 * row.share:.1f} % | {row.largest_difference:.1g} |"
            for row in rows
        )
        options, words = _where(subject.run)
        told = USAGE.format(options=options, words=words, alpha=repr(subject.alpha))
        return Usage("open_clip", f"{told}\n```python\n{reading('restored')}```\n\n{OPENED}\n{TABLE}\n{table}\n")


def _where(run: Run) -> tuple[str, str]:
    """How the script is told where the pre-trained weights are, if it has to be: its options, and in words."""
    source = run.source
    if run.record.parent or source.model.startswith(LOCAL_DIR):
        words = OF_RUN if run.record.parent else OF_FOLDER
        return " --model FOLDER", words.format(name=code(Path(source.model.removeprefix(LOCAL_DIR)).name))
    if source.model == TINY:
        return TINY_PLACE, OF_TINY
    if are_published(source):
        return "", OF_HUB + (", and `--pretrained FILE` a file." if source.pretrained else ".")
    file = code(Path((source.pretrained or "").rpartition(":")[2]).name)
    return " --pretrained FILE", OF_FILE.format(name=file, model=code(source.model))


USAGE = """
`difference.safetensors` holds what was added to the pre-trained weights, for every α from 0 to 1. These weights are not
in it. `restore.py`, which needs torch, safetensors and open_clip, takes them, after a look at their SHA-256, and writes
a folder that open_clip loads:

```sh
python restore.py . restored --alpha {alpha}{options}
```

{words}

Then:
"""
TINY_PLACE = """ --model "$(python -c 'import clipfit; print(clipfit.__path__[0])')/assets/clipfit-tiny\""""
OF_TINY = """The pre-trained weights are those of clipfit-tiny, a folder inside the clipfit package, which has to be
installed for this command. Where it is not, a copy of that folder does."""
OF_FOLDER = """`FOLDER` is the model folder that the run was made from, then called {name} (`open_clip_config.json`
beside weights). It is not part of this export: whoever made the run has it."""
OF_FILE = """`FILE` is the weight file that the run was made from, then called {name}. It is not part of this export:
whoever made the run has it. Any file of the same tensors, by open_clip's names of {model}, does as well."""
OF_RUN = """`FOLDER` is the model of the run that this one was adapted on from, then called {name}: whoever has that
run makes the folder with `clipfit export RUN --output FOLDER`."""
OF_HUB = """open_clip fetches the pre-trained weights, where it has not got them. `--model FOLDER` names a folder of
them instead"""
TABLE = """
How the difference is stored was chosen by measuring: the first row is in the file. Sizes are of the tensors, also as a
share of all weights in fp32; differences are of a logit at α = 1, the largest on the run's shots.

| encoding | size | share | largest difference |
|---|---|---|---|"""


def restore(
    folder: Path, alpha: float | None = None, model: str | None = None, device: torch.device | str = "cpu"
) -> Clip:
    """The model at α of an export in this format.

    Args:
        alpha: from 0 to 1; None: the one that was exported at. model: the folder of the pre-trained weights, where they
            are not to be had as they were.

    Raises:
        UsageError: α is not from 0 to 1. ModelError: the file is damaged, or the pre-trained weights cannot be had or
            are not those that the difference was taken from.
    """
    check = (manifest.checking(folder, DIFFERENCE),) if manifest.is_sealed(folder) else ()
    stored, described = files.read_tensors(folder / DIFFERENCE, *check)
    try:
        source = typed(described["pretrained"], Source, folder / DIFFERENCE)
        encoded = Encoded(stored, typed(described["scales"], dict[str, float], folder / DIFFERENCE))
        alpha = float(described["alpha"]) if alpha is None else alpha
        sha256 = str(described["base"]["sha256"])
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / DIFFERENCE} is no difference of clipfit's: it has no {error}.") from error
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha must be from 0 to 1; found {alpha}.")
    source = replace(source, model=recorded_name(model) if model else source.model, sha256=sha256)
    clip = loading.reload(source, device)
    clip.load_state(encoding.add(clip.state(), encoded.to(device), alpha))
    return clip


def _plain(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what has no effect: see `holds`."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(ADDED)}


def _chosen(run: Run, before: State) -> tuple[Encoded, tuple[Tried, ...]]:
    """The smallest encoding that is near enough, and what all of them came to, that one first."""
    clip = loading.rebuild(run.source, _plain(run.finetuned()))
    changed = encoding.changes(before, clip.state())
    found = encoding.factors(changed, run.record.lora.rank) if run.record.lora else {}
    pictures = proof.pictures_of(run, clip).images[:PICTURES]
    expected = _logits(clip, run, pictures)
    tried: list[tuple[Encoding, Tried]] = []
    for each in encoding.encodings(bool(found)):
        size = _restored(clip, before, changed, found, each)
        differs = float((_logits(clip, run, pictures) - expected).abs().max())
        tried.append((each, Tried(each.name, size, size / clip.bytes, differs)))
    near = [pair for pair in tried if pair[1].largest_difference <= NEAR]
    best = min(near or tried, key=lambda pair: pair[1].bytes if near else pair[1].largest_difference)
    others = sorted((one for _, one in tried if one != best[1]), key=lambda one: one.bytes)
    return encoding.encode(changed, found, best[0]), (best[1], *others)


def _restored(clip: Clip, before: State, changed: State, found: Factors, each: Encoding) -> int:
    """Make the clip what an encoding makes of the difference; its bytes. A tensor at a time: they are large."""
    state, size = clip.state(), 0
    for name, change in changed.items():
        encoded = encoding.encode({name: change}, found, each)
        state[name].copy_(encoding.add({name: before[name]}, encoded, 1.0)[name])
        size += encoded.bytes
    return size


@torch.no_grad()
def _logits(clip: Clip, run: Run, pictures: torch.Tensor) -> torch.Tensor:
    """Of uint8 pictures (n, 3, H, W) among the first base classes: (n, C)."""
    texts = scoring.texts(clip, run.base[:NAMES], run.templates)
    features = [clip.encode_image(clip.normalize(part)).cpu() for part in pictures.split(16)]
    return clip.logits(torch.cat(features), texts.embeddings)


@contextmanager
def _base(run: Run) -> Iterator[Path]:
    """The pre-trained model as open_clip loads it, while the proof needs it."""
    clip = run.pretrained()
    config: dict[str, Any] = {"model_cfg": run.source.model_cfg, "preprocess_cfg": run.source.preprocess_cfg}
    try:
        with tempfile.TemporaryDirectory(prefix="clipfit-") as place:
            files.write_tensors(Path(place) / WEIGHTS, _plain(clip.state()), {})
            files.write_json(Path(place) / CONFIG, config)
            yield Path(place)
    except OSError as error:
        raise OutputError(
            f"the export cannot be tried out in {tempfile.gettempdir()}: {error.strerror or error}."
        ) from error
