"""What `predict` is given."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from clipfit.config import shared
from clipfit.config.options import Checked, argument, option
from clipfit.errors import UsageError

OUTPUTS = (".jsonl", ".csv", ".parquet")
VECTORS = (".safetensors", ".npy")
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class PredictConfig(Checked):
    """Everything `predict` is given. The first of `inputs` is the run or export if it is one and others follow."""

    inputs: tuple[Path, ...] = argument(
        "[RUN | EXPORT] INPUT…: a run or an export (else the newest run), then image files, folders, globs, "
        "lists of paths (.csv, .jsonl, .parquet), .tar archives, or - for paths on stdin."
    )
    _: KW_ONLY
    model: str | None = option(None, "Zero-shot: this model in place of a run, as in adapt; needs --classes.")
    pretrained: str | None = shared.pretrained()
    alpha: float | None = shared.alpha_of_run()
    classes: Path | None = option(
        None, "Candidate classes, one a line.", default_is="those that the run was trained on"
    )
    add_classes: Path | None = option(None, "More candidates, beside those that the run was trained on.")
    template: str | None = option(None, "The text of a class; {} stands for its name.", default_is="the run's own")
    templates: Path | None = shared.templates("the run's own")
    top: int = option(5, "Most probable classes that a row lists.", low=1)
    abstain_below: float | None = option(None, "Least probability of a label; below it a row abstains.", low=0, high=1)
    output: Path | None = option(None, "File of the rows, .jsonl, .csv or .parquet.", default_is="JSON lines on stdout")
    embeddings: Path | None = option(None, "File of the image embeddings, .safetensors or .npy: a vector a row.")
    html: Path | None = option(None, "One page of thumbnails by predicted class, least certain first.")
    resume: bool = option(False, "Go on where the same command with the same --output was stopped.")
    overwrite: bool = option(False, "Replace files that exist.")
    column: str = option("path", "Column or key of the paths in lists.")
    image_root: Path | None = option(None, "Where relative paths of lists and stdin start.", default_is="the list")
    batch_size: int = option(64, "Images a forward pass.", low=1)
    device: str = shared.device()
    precision: str = shared.precision()
    runtime: str | None = shared.runtime(None)
    engine: str = option("local", "ray: on a Ray cluster, or its own on this machine (clipfit[ray]).", choices=ENGINES)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_suffix(self.output, OUTPUTS, "--output")
        self._require_suffix(self.embeddings, VECTORS, "--embeddings")
        if self.resume and self.overwrite:
            raise UsageError("--resume goes on with rows and --overwrite replaces them: give one of them.")
        if self.resume and self.output is None:
            raise UsageError("--resume needs --output, beside which the rows so far are kept.")
        if self.classes and self.add_classes:
            raise UsageError("--classes stands in place of the run's classes, --add-classes beside them: give one.")
        if self.model is None and self.pretrained:
            raise UsageError("--pretrained belongs to --model, but the weights are a run's: leave it out.")
        if self.model is not None and self.alpha is not None:
            raise UsageError("--alpha is a ratio of a run, but --model is zero-shot: leave one of them out.")
        if self.model is not None and self.add_classes:
            raise UsageError("--model has no classes of its own to add to: give --classes.")
        if self.engine == "ray" and self.html:
            raise UsageError("--html draws thumbnails of what is decoded here: leave it out with --engine ray.")
        if self.template is not None and self.templates is not None:
            raise UsageError("--templates lists what --template is one of: give one of them.")
        if self.template is not None and self.template.count("{}") != 1:
            raise UsageError(f"template must contain {{}} exactly once; found {self.template!r}.")

    @staticmethod
    def _require_suffix(file: Path | None, known: tuple[str, ...], flag: str) -> None:
        if file is not None and file.suffix.lower() not in known:
            raise UsageError(f"{flag} is written by its ending, one of {', '.join(known)}; found {file}.")
