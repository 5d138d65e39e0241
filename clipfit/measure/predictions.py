"""Predictions are data: which images, which names they were compared with, and how well each fits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clipfit.errors import ModelError
from clipfit.measure.metrics import Accuracy, Difference, accuracy, confusion, paired_difference
from clipfit.prompts import Templates
from clipfit.runs import files

LOGITS = "logits"


@dataclass(frozen=True, eq=False)
class Predictions:
    """A table of n images by C candidates, and what it was made with.

    ids: the images' paths as their folder or manifest writes them.
    labels: the class name of each image, None where it is not known.
    logits: τ⁻¹·cos of image and class text, (n, C) float32 on the CPU.
    features: the number type of the towers, "fp32" or "bf16", and what computed the image tower where it was not torch,
        as in "fp32 by openvino".
    templates: the sentences that class names were put in, whose mean a class's text is; `template` is the first.
    """

    ids: tuple[str, ...]
    labels: tuple[str | None, ...]
    candidates: tuple[str, ...]
    logits: torch.Tensor
    alpha: float
    template: str
    features: str = "fp32"
    templates: Templates = ()

    @property
    def names(self) -> list[str]:
        """What each image is taken for: the candidate with the largest logit, the first of equals."""
        return [self.candidates[c] for c in self.logits.argmax(1).tolist()]

    def probabilities(self, temperature: float = 1.0) -> torch.Tensor:
        """softmax(logits / temperature) over the candidates: (n, C) float32; above 1 flattens, below 1 sharpens."""
        return (self.logits / temperature).softmax(1)

    def within(self, names: Collection[str]) -> Predictions:
        """The images labelled with one of the names, compared with these candidates alone; both in the table's order.

        For a model that edits patch tokens this is another table than the one it would give among those names.
        """
        columns = [c for c, name in enumerate(self.candidates) if name in names]
        rows = [i for i, label in enumerate(self.labels) if label in names]
        return replace(
            self,
            ids=tuple(self.ids[i] for i in rows),
            labels=tuple(self.labels[i] for i in rows),
            candidates=tuple(self.candidates[c] for c in columns),
            logits=self.logits[rows][:, columns],
        )

    def accuracy(self) -> Accuracy:
        """Of the images whose label is known. Raises ValueError where there are none."""
        return accuracy(*self._judged())

    def top_accuracy(self, k: int) -> float:
        """The share whose label is among the k best names, the first of equals; of the images whose label is known.

        Raises:
            ValueError: there are none.
        """
        parts = self.logits.split(4096)  # a sort of all rows at once would need three times the table
        best = [row for part in parts for row in part.argsort(dim=1, descending=True, stable=True)[:, :k].tolist()]
        found = [
            any(self.candidates[c] == label for c in row)
            for row, label in zip(best, self.labels, strict=True)
            if label is not None
        ]
        if not found:
            raise ValueError("there is no accuracy of no images")
        return sum(found) / len(found)

    def confusion(self) -> dict[tuple[str, str], int]:
        """(label, what it was taken for) → images, of those whose label is known."""
        return dict(confusion(*self._judged()))

    def gain_over(self, other: Predictions) -> Difference:
        """The accuracy minus that of other predictions for the same images.

        Raises:
            ValueError: they are for other images, or no label is known.
        """
        _require_same_images(self, other)
        (mine, truths), (theirs, _) = self._judged(), other._judged()
        return paired_difference(
            [name == truth for name, truth in zip(mine, truths, strict=True)],
            [name == truth for name, truth in zip(theirs, truths, strict=True)],
        )

    def agreement_with(self, other: Predictions) -> float:
        """The share of images that both take for the same; needs no labels."""
        _require_same_images(self, other)
        return sum(mine == theirs for mine, theirs in zip(self.names, other.names, strict=True)) / len(self.ids)

    def _judged(self) -> tuple[list[str], list[str]]:
        known = [(name, label) for name, label in zip(self.names, self.labels, strict=True) if label is not None]
        return [name for name, _ in known], [label for _, label in known]

    def save(self, path: Path) -> None:
        """A safetensors file: the logits, everything else as its metadata. Raises OutputError."""
        about = {
            "ids": self.ids,
            "labels": self.labels,
            "candidates": self.candidates,
            "alpha": self.alpha,
            "template": self.template,
            "features": self.features,
            "templates": self.templates or (self.template,),
        }
        files.write_tensors(path, {LOGITS: self.logits}, about)

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """What `save` wrote.

        Raises:
            ModelError: the file is missing, damaged or no table of predictions.
        """
        tensors, about = files.read_tensors(path)
        try:
            table = cls(
                tuple(about["ids"]), tuple(about["labels"]), tuple(about["candidates"]), tensors[LOGITS],
                float(about["alpha"]), str(about["template"]), str(about["features"]),
                tuple(about.get("templates", [about["template"]])),
            )  # fmt: skip
        except KeyError as error:
            raise ModelError(f"{path} is no table of predictions: it has no {error}.") from error
        if table.logits.shape != (len(table.ids), len(table.candidates)) or len(table.ids) != len(table.labels):
            raise ModelError(
                f"{path} does not fit together: {len(table.ids)} images, {len(table.labels)} labels and "
                f"{len(table.candidates)} candidates, but logits {tuple(table.logits.shape)}; evaluate again."
            )
        return table


def _require_same_images(one: Predictions, other: Predictions) -> None:
    if (one.ids, one.labels) != (other.ids, other.labels):
        raise ValueError("only predictions for the same images can be compared")
