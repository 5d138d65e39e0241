"""`clipfit evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfit.cli.common import keeping, print_json
from clipfit.config import EpisodesConfig, EvaluateConfig, parse_alphas, parse_numbers, parse_part
from clipfit.errors import UsageError

ARG, OPT = typer.Argument, typer.Option
DEFAULT_METHODS = ("zero-shot", "finetune", "cite", "atha")
OF_EPISODES = ("method", "model", "pretrained", "precision", "way", "shots", "query", "seed", "part", "output")
OF_RUNS = ("run", "new_classes", "per_class")


def require_of_one_kind(context: typer.Context, episodes: bool) -> None:
    """Raises UsageError for what would be ignored: an option of episodes without them, or the other way round."""
    for name in OF_RUNS if episodes else OF_EPISODES:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = "a run" if name == "run" else f"--{name.replace('_', '-')}"
            why = "--episodes adapts anew in each" if episodes else "it belongs to --episodes"
            raise UsageError(f"{option} has no effect here: {why}; leave it out.")


def compare(config: EpisodesConfig, as_json: bool) -> None:
    """`evaluate --episodes`."""
    from clipfit import episodes
    from clipfit.report.console import Console

    kept = f"finished episodes are kept in {config.output}; the same command goes on from there"
    with keeping(kept), Console() as console:
        report = episodes(config, console)
        console.compared(report)
    if as_json:
        print_json(report.as_json())


def command(
    context: typer.Context,
    run: Annotated[Path | None, ARG(help="A run of adapt's.  [default: the newest below runs/]")] = None,
    data: Annotated[Path | None, OPT(help="Other labelled images than the run's own held-out ones.")] = None,
    new_classes: Annotated[Path | None, OPT(help="Names of classes that were not trained on, one a line.")] = None,
    classes: Annotated[Path | None, OPT(help="Class names for --data: folder<TAB>name a line, or JSON.")] = None,
    image_root: Annotated[Path | None, OPT(help="Where paths in a manifest or split file start.")] = None,
    alpha: Annotated[float | None, OPT(help="One ratio.  [default: the run's]")] = None,
    alphas: Annotated[str | None, OPT(help="Several: first:last:step (0:1:0.1) or a list (0,0.5,1).")] = None,
    per_class: Annotated[bool, OPT("--per-class", help="Show every class.")] = False,
    skip_bad_images: Annotated[bool, OPT("--skip-bad-images", help="Leave out what cannot be read.")] = False,
    batch_size: Annotated[
        int, OPT(help="Images a forward pass; episodes train with a method's own (cite:batch_size=8).")
    ] = 128,
    device: Annotated[str, OPT(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Annotated[bool, OPT("--json", help="One JSON document on stdout.")] = False,
    episodes: Annotated[
        int | None, OPT(help="Few-shot episodes of --data instead of a run: adapt in each, compare --method.")
    ] = None,
    method: Annotated[
        list[str] | None, OPT(help="episodes: zero-shot, cite, atha+lora, atha:tail_ratio=0, …; may be repeated.")
    ] = None,
    model: Annotated[str, OPT(help="episodes: clipfit-tiny, an open_clip name, or local-dir:FOLDER.")] = "ViT-B-16",
    pretrained: Annotated[str | None, OPT(help="episodes: a tag of open_clip's, or a local weight file.")] = None,
    precision: Annotated[str, OPT(help="episodes: auto, fp32 or bf16.")] = "auto",
    way: Annotated[int, OPT(help="episodes: classes of each.")] = 5,
    shots: Annotated[str, OPT(help="episodes: shots a class, one number or several.")] = "1,5",
    query: Annotated[int, OPT(help="episodes: images a class to measure on.")] = 15,
    seed: Annotated[int, OPT(help="episodes: of their draw.")] = 0,
    part: Annotated[str, OPT(help="episodes: k/n, this process does every n-th from the k-th.")] = "1/1",
    output: Annotated[
        Path | None, OPT(help="episodes: where finished ones are kept.  [default: episodes/<folder>]")
    ] = None,
) -> None:
    """Measure base, new and union accuracy on held-out images, with zero-shot beside."""
    from clipfit import evaluate
    from clipfit.report.console import Console

    if alpha is not None and alphas is not None:
        raise UsageError("--alpha and --alphas exclude each other: give one of them.")
    require_of_one_kind(context, episodes is not None)
    ratios = parse_alphas(alphas) if alphas is not None else None if alpha is None else (alpha,)
    if episodes is not None:
        if data is None:
            raise UsageError("--episodes adapts anew in each: give --data DIR, --model and --method.")
        place = output or Path("episodes") / data.resolve().name
        drawn = EpisodesConfig(
            data, place, tuple(method or DEFAULT_METHODS), model, pretrained, episodes, way,
            parse_numbers("--shots", shots), None, query, ratios or (0.5, 1.0), seed, parse_part(part), classes,
            image_root, skip_bad_images, batch_size, device=device, precision=precision,
        )  # fmt: skip
        compare(drawn, as_json)
        return
    config = EvaluateConfig(
        run, data, new_classes, classes, image_root, ratios, skip_bad_images, batch_size, device=device
    )
    with Console() as console:
        result = evaluate(config, console)
        console.evaluated(result, per_class)
    if as_json:
        print_json(result.as_json())
