"""`clipfit evaluate`, of a run or of few-shot episodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from clipfit.cli.common import keeping, print_json
from clipfit.cli.options import Json, under
from clipfit.config import EpisodesConfig, EvaluateConfig
from clipfit.config.options import Declared, declared_by
from clipfit.errors import ClipfitError, UsageError

DEFAULT_METHODS = ("zero-shot", "finetune", "cite", "atha")
OF_RUNS = declared_by(EvaluateConfig)
OF_EPISODES = {key: option for key, option in declared_by(EpisodesConfig).items() if key not in OF_RUNS}
Alpha = Annotated[float | None, typer.Option(help="One ratio, in place of --alphas.", show_default=False)]
PerClass = Annotated[bool, typer.Option("--per-class", help="Show every class.", show_default=False)]


def options() -> list[Declared]:
    """Those of a run, then what episodes have beside. How many episodes has no default here: none, then a run."""
    of_episodes = {**OF_EPISODES, "episodes": replace(OF_EPISODES["episodes"], default=None)}
    return [*OF_RUNS.values(), *(under("episodes", option) for option in of_episodes.values())]


def command(
    values: Mapping[str, Any], *, alpha: Alpha = None, per_class: PerClass = False, as_json: Json = False
) -> None:
    """Measure base, new and union accuracy on held-out images, with zero-shot beside."""
    if alpha is not None:
        if "alphas" in values:
            raise UsageError("--alpha and --alphas exclude each other: give one of them.")
        values = {**values, "alphas": (alpha,)}
    if "episodes" in values:
        require_of_one_kind(values, per_class)
        compare(values, as_json)
        return
    require_of_one_kind(values)
    config = EvaluateConfig(**values)

    from clipfit import evaluate
    from clipfit.report.console import Console

    with Console() as console:
        try:
            result = evaluate(config, console)
        except ClipfitError as error:
            if error.found is not None:
                console.evaluated(error.found, per_class)
            raise
        console.evaluated(result, per_class)
    if as_json:
        print_json(result.as_json())


def compare(values: Mapping[str, Any], as_json: bool) -> None:
    """`evaluate --episodes`."""
    config = episodes_config(values)

    from clipfit import episodes
    from clipfit.report.console import Console

    kept = f"finished episodes are kept in {config.output}; the same command goes on from there"
    with keeping(kept), Console() as console:
        report = episodes(config, console)
        console.compared(report)
    if as_json:
        print_json(report.as_json())


def episodes_config(values: Mapping[str, Any]) -> EpisodesConfig:
    """With the place and the methods filled in. Raises UsageError."""
    if "data" not in values:
        raise UsageError("--episodes adapts anew in each: give --data DIR, --model and --method.")
    place = Path("episodes") / values["data"].resolve().name
    return EpisodesConfig(**{"output": place, "contenders": DEFAULT_METHODS, **values})


def require_of_one_kind(values: Mapping[str, Any], per_class: bool = False) -> None:
    """Raises UsageError for what would be ignored: an option of episodes without them, or the other way round."""
    if "episodes" in values:
        names = [key for key in values if key in OF_RUNS and key not in declared_by(EpisodesConfig)]
        names += ["per_class"] * per_class
        why = "--episodes adapts anew in each"
    else:
        names = [key for key in OF_EPISODES if key in values]
        why = "it belongs to --episodes"
    for name in names:
        flag = OF_EPISODES[name].flag if name in OF_EPISODES else f"--{name.replace('_', '-')}"
        raise UsageError(f"{'a run' if name == 'run' else flag} has no effect here: {why}; leave it out.")
