"""README.md of every export: a model card with the metadata header of the Hugging Face Hub.

Every number is read from the run's files or the proof. What users named (classes, the template, folders) stands in
code spans, where Markdown and HTML mean nothing; the header is written by huggingface_hub.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from clipfit.formats.proof import Proof
from clipfit.formats.subject import Subject, temperature_inside
from clipfit.measure import evaluations
from clipfit.measure.evaluations import StoredEvaluation
from clipfit.model.hub_name import hub_name
from clipfit.model.sources import LOCAL_DIR, Source
from clipfit.runs.run import Run
from clipfit.text import printable

NAME = "README.md"
TASK = "zero-shot-image-classification"
MOST_CLASSES = 1000  # beyond it, the rest are in clipfit.json
MOST_LOSSES = 20
MOST_TEMPLATES = 5
PARTS = {"base": "base classes", "new": "new classes", "union": "base and new together"}


@dataclass(frozen=True)
class Usage:
    """How a format's consumer loads it. library: as the Hub calls it. text: Markdown, to be followed in the folder."""

    library: str
    text: str


def card(subject: Subject, usage: Usage, proof: Proof) -> str:
    """The model card of an export: YAML between two lines of dashes, then Markdown.

    Raises:
        ModelError: an evaluation of the run is damaged.
    """
    measured = Measured.of(subject.run, subject.alpha)
    parts = [
        _introduction(subject), _classes(subject.run), measured.section(), _limits(subject, measured),
        f"## How to load it\n\n{usage.text.strip()}", _proof(proof),
    ]  # fmt: skip
    return f"---\n{_header(subject, usage, measured)}\n---\n\n" + "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Measured:
    """What is known of the accuracy at an α: rows of `evaluate --json`, or None where nothing held out was measured."""

    alpha: float
    evaluation: StoredEvaluation | None

    @classmethod
    def of(cls, run: Run, alpha: float) -> Measured:
        """By the run's newest evaluation on held-out images that has this α. Raises ModelError for a damaged one."""
        newest_first = sorted(evaluations.stored(run), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        found = (evaluations.read(file.parent) for file in newest_first)
        own = (e for e in found if e.document.get("templates", [run.template]) == list(run.templates))
        return cls(alpha, next((e for e in own if e.document["held_out"] and alpha in e.alphas), None))

    def row(self, alpha: float) -> Mapping[str, Any]:
        """The figures at an α: this one, or 0, which every evaluation has; {} where nothing was measured."""
        rows = self.evaluation.document["alphas"] if self.evaluation else ()
        return next((row for row in rows if row["alpha"] == alpha), {})

    @property
    def parts(self) -> list[str]:
        """The sets of classes that there are figures of."""
        return [part for part in PARTS if self.row(self.alpha).get(part)]

    def section(self) -> str:
        """The table: accuracies with 95% intervals, zero-shot's beside, and the paired differences."""
        if self.evaluation is None:
            return (
                "## Accuracy\n\nNone was measured on held-out images at this α. To measure it: "
                f"`clipfit evaluate RUN --alphas {self.alpha:g}`, with `--data DIR` for images of your own; "
                "then export again."
            )
        document, row = self.evaluation.document, self.row(self.alpha)
        lines = [
            f"Top-1, on held-out images ({code(document['data'])}; towers in {document['features']}). In brackets 95% "
            "intervals: Wilson's, and those of differences paired.",
            "",
            f"| | classes | images | zero-shot (α = 0) | this model (α = {self.alpha:g}) | difference, points |",
            "|---|---|---|---|---|---|",
        ]
        for part in self.parts:
            cells = (
                PARTS[part], len(self._names(part)), row[part]["n"], _accuracy(self.row(0.0)[part]),
                _accuracy(row[part]), _points(row["against_zero_shot"][part]),
            )  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        if row["harmonic_mean"] is not None:
            means = [f"{100 * self.row(alpha)['harmonic_mean']:.1f}" for alpha in (0.0, self.alpha)]
            lines += ["", f"Harmonic mean of base and new: {means[1]} % (zero-shot {means[0]} %)."]
        return "## Accuracy\n\n" + "\n".join(lines)

    def _names(self, part: str) -> list[str]:
        assert self.evaluation
        base, new = (self.evaluation.document[f"{kind}_classes"] for kind in ("base", "new"))
        return {"base": base, "new": new}.get(part, [*base, *new])

    def losses(self) -> list[str]:
        """The classes that the model knows less well than zero-shot CLIP, in words."""
        found = []
        for part in ("base", "new"):
            before, after = self.row(0.0).get(part), self.row(self.alpha).get(part)
            for name, now in (after or {}).get("per_class", {}).items():
                if before and now["accuracy"] < before["per_class"][name]["accuracy"]:
                    was = 100 * before["per_class"][name]["accuracy"]
                    found.append(f"{code(name)} {was:.0f} → {100 * now['accuracy']:.0f} % of {now['n']}")
        return found

    def results(self, dataset: str) -> list[EvalResult]:
        """The same for the header."""
        row = self.row(self.alpha)
        return [
            EvalResult(
                task_type=TASK,
                dataset_type="imagefolder",
                dataset_name=dataset,
                metric_type="accuracy",
                metric_value=row[part]["accuracy"],
                metric_name=f"accuracy, {PARTS[part]}",
            )
            for part in self.parts
        ]


def code(text: str) -> str:
    """A text as a code span, which shows it as it is; what would steer a terminal is shown instead of obeyed."""
    shown = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    # a renderer takes one space from either end, where both have one; "|" ends a cell of a table, in a span too
    padded = f" {shown} " if shown[:1] in ("`", " ") or shown[-1:] in ("`", " ") else shown
    return f"{fence}{padded}{fence}"


def _header(subject: Subject, usage: Usage, measured: Measured) -> str:
    run = subject.run
    results = measured.results(printable(Path(run.record.shots).name))
    data = ModelCardData(
        base_model=hub_name(run.source),
        library_name=usage.library,
        pipeline_tag=TASK,
        tags=["clip", "clipfit", "few-shot", run.method],
        model_name=printable(run.path.resolve().name),
        eval_results=results or None,
        ignore_metadata_errors=False,
    )
    return data.to_yaml()


def _introduction(subject: Subject) -> str:
    run, record = subject.run, subject.run.record
    counts = Counter(shot["class"] for shot in run.shots)
    fewest, most = min(counts.values(), default=0), max(counts.values(), default=0)
    a_class = str(most) if fewest == most else f"{fewest} to {most}"
    tuning = f"LoRA of rank {record.lora.rank}, merged" if record.lora else "all weights"
    return "\n".join([
        f"# {code(run.path.resolve().name)}",
        "",
        f"A CLIP model, adapted by clipfit {record.clipfit} to {len(run.base)} classes. {_task(subject)}",
        "",
        f"- pre-trained model: {_base(run.source)}, SHA-256 of its tensors `{run.source.sha256}`",
        f"- shots: {len(run.shots)} images of {len(counts)} classes, {a_class} a class",
        f"- method: `{run.method}`; trained: {tuning}; {record.recipe.epochs} epochs, seed {record.seed}",
        f"- α = {subject.alpha:g}: the average of the pre-trained weights (0) and the fine-tuned ones (1)",
        f"- text of a class: {_texts(run)}",
        "- licence: that of the pre-trained model goes on to hold; clipfit does not know it",
    ])  # fmt: skip


def _texts(run: Run) -> str:
    first, *others = run.templates
    if not others:
        return code(first)
    shown = ", ".join(map(code, (first, *others[: MOST_TEMPLATES - 1])))
    more = len(run.templates) - MOST_TEMPLATES
    more_of_them = f" and {more} more" if more > 0 else ""
    return (
        f"the mean of {len(run.templates)} unit-norm embeddings, brought back to unit norm, of {shown}{more_of_them} "
        "(`templates` in `clipfit.json`)"
    )


def _task(subject: Subject) -> str:
    """What it can be asked."""
    match subject.options.part:
        case "classifier":
            return "It tells which of the classes below fits an image best; it knows no others."
        case "image" | "text":
            return f"This part turns {subject.options.part}s into vectors, to be compared with those of the other part."
    return "It tells which of a list of names fits an image best: the classes below, or any others."


def _base(source: Source) -> str:
    """Without the folders of whose machine it was made on."""
    local = source.model.startswith(LOCAL_DIR)
    name = code(Path(source.model.removeprefix(LOCAL_DIR)).name if local else source.model)
    return f"{name} / {code(Path(source.pretrained).name)}" if source.pretrained else name


def _classes(run: Run) -> str:
    shown = ", ".join(map(code, run.base[:MOST_CLASSES]))
    more = len(run.base) - MOST_CLASSES
    return f"## Classes\n\n{shown}" + (f" and {more} more, in `clipfit.json`" if more > 0 else "")


def _limits(subject: Subject, measured: Measured) -> str:
    calibrated = subject.options.part == "classifier" and temperature_inside(subject) is not None
    lines = [
        "It answers one of the names that it is given, however little any of them fits.",
        "Its probabilities were calibrated on images that were left out of adaptations, for images like the shots."
        if calibrated
        else "Its probabilities are a softmax over these names; nobody calibrated them.",
        "What was measured holds for images like those it was measured on."
        if measured.evaluation
        else "Nobody measured it: it may be worse than the pre-trained model.",
        "Biases of the pre-trained model remain.",
    ]
    if measured.evaluation and "new" not in measured.parts:
        lines.append("No other classes than those it was trained on were measured.")
    if lost := measured.losses():
        more = f", and {len(lost) - MOST_LOSSES} more" if len(lost) > MOST_LOSSES else ""
        lines.append(f"Worse than zero-shot on these held-out images: {', '.join(lost[:MOST_LOSSES])}{more}.")
    if subject.model.additions.edits:
        lines.append("The features of an image depend on the names that it is compared with.")
    if (bias := subject.model.state().get("logit_bias")) is not None:
        lines.append(
            f"The model has a logit bias ({bias.item():g}), to be added where a sigmoid of each logit is wanted; in "
            "clipfit's probabilities, a softmax, it cancels."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _proof(proof: Proof) -> str:
    identical = proof.identical_pixels
    lines = [
        f"Loaded back by {code(proof.consumer)} in a process that knows nothing of clipfit: on the pixels of "
        f"{identical.images} {'shots' if proof.pictures == 'shots' else 'random pictures'} its logits differ from the "
        f"run's by at most {identical.largest_difference:.2g}, and {identical.same_labels} of {identical.images} best "
        "labels are the same."
    ]
    if proof.files:
        lines.append(
            f"Decoding the files itself, it gives the same best label for {proof.files.same_labels} of "
            f"{proof.files.images}."
        )
    if proof.seen_otherwise:
        lines.append(f"It sees {len(proof.seen_otherwise)} files otherwise than the run did; `proof.json` names them.")
    for way, found in proof.further.items():
        lines.append(f"By {code(way)}: at most {found.largest_difference:.2g}, {found.same_labels} labels the same.")
    return "## Proof\n\n" + " ".join(lines)


def _accuracy(part: Mapping[str, Any]) -> str:
    return f"{100 * part['accuracy']:.1f} % [{100 * part['low']:.0f}–{100 * part['high']:.0f}]"


def _points(difference: Mapping[str, float]) -> str:
    value, low, high = (f"{100 * difference[key]:+.1f}" for key in ("difference", "low", "high"))
    return f"{value} [{low}, {high}]"
