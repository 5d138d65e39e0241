"""The guard: whether what was measured may be shipped, by what was asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from clipfit.config import EvaluateConfig
from clipfit.errors import ClipfitError, DataError, GuardError
from clipfit.measure.figures import PARTS, AlphaResult


def objection(rows: Sequence[AlphaResult], held_out: bool, config: EvaluateConfig) -> ClipfitError | None:
    """What speaks against an evaluation: None, or the error that says so.

    Every α that was asked for is judged; zero-shot alone where no other was. Only images that were not shots count.
    `--fail-if-worse` stops where a 95% paired interval lies wholly below 0, `--require` where an accuracy as measured,
    not its interval, is below the bound. What cannot be judged is a DataError, whatever the rest says: never a pass.

    Args:
        rows: by α, zero-shot's first.
        held_out: whether base (and with it union) was measured on images that were not shots.
    """
    measured = _measured(rows[0], held_out)
    if not measured and (config.fail_if_worse or config.bounds):
        return DataError(
            "the guard has nothing to judge by, for no image was held out: adapt with --shots, "
            "add a test/ folder, or pass --data with images that are no shots."
        )
    for part in config.bounds:
        if part not in measured:
            return DataError(
                f"--require {part} asks for what was not measured: held-out images are there "
                f"for {', '.join(measured)} alone; pass --data with images of the classes that lack them."
            )
    found = []
    for row in rows[1:] or rows:
        found += [*(_worse(row, measured) if config.fail_if_worse else ()), *_missed(row, held_out, config.bounds)]
    if not found:
        return None
    return GuardError(f"{'; '.join(found)}: have α chosen by the shots (adapt --alpha auto), or adapt otherwise.")


def _measured(row: AlphaResult, held_out: bool) -> dict[str, float]:
    """The accuracies on images that were not shots, by part."""
    parts = {part: getattr(row, part) for part in PARTS if held_out or part == "new"}
    found = {part: accuracy.value for part, accuracy in parts.items() if accuracy}
    mean = row.harmonic_mean if held_out else None
    return found if mean is None else {**found, "hm": mean}


def _worse(row: AlphaResult, measured: Mapping[str, float]) -> Iterator[str]:
    for part, d in row.against_zero_shot.items():
        if part in measured and d.high < 0:
            yield (
                f"at α = {row.alpha:g}, {part} is credibly worse than zero-shot "
                f"({100 * d.difference:+.1f} points, 95% interval {100 * d.low:+.1f} to {100 * d.high:+.1f})"
            )


def _missed(row: AlphaResult, held_out: bool, bounds: Mapping[str, float]) -> Iterator[str]:
    measured = _measured(row, held_out)
    for part, least in bounds.items():
        if measured[part] < least - 1e-12:  # the harmonic mean of two 0.85 must be 0.85
            yield f"at α = {row.alpha:g}, {part} is {measured[part]:.6g}, below the {least:g} required"
