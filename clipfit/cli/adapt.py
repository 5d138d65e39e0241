"""`clipfit adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfit.cli.common import print_json

ARG, OPT = typer.Argument, typer.Option


def command(
    shots: Annotated[Path, ARG(help="Folder of class folders (or {train,test}/<class>), manifest, or CoOp split.")],
    method: Annotated[str, OPT(help="What is optimised: cite, atha, cite+atha, finetune or flyp.")] = "cite",
    alpha: Annotated[float, OPT(help="Ensemble ratio: 0 = pre-trained, 1 = fine-tuned.")] = 0.5,
    output: Annotated[Path | None, OPT(help="Where the run goes.  [default: runs/<folder>-<method>]")] = None,
    overwrite: Annotated[bool, OPT("--overwrite", help="Replace a run that exists.")] = False,
    as_json: Annotated[bool, OPT("--json", help="One JSON document on stdout.")] = False,
    shots_per_class: Annotated[
        int | None, OPT("--shots", help="Draw so many images a class; the others are held out.")
    ] = None,
    classes: Annotated[Path | None, OPT(help="Class names: folder<TAB>name a line, or JSON.")] = None,
    image_root: Annotated[Path | None, OPT(help="Where paths in a manifest or split file start.")] = None,
    skip_bad_images: Annotated[
        bool, OPT("--skip-bad-images", help="Leave out what cannot be read, and count it.")
    ] = False,
    cache_gib: Annotated[float, OPT(min=0, help="Memory for decoded shots, GiB.")] = 2.0,
    model: Annotated[str, OPT(help="clipfit-tiny, an open_clip name, or local-dir:FOLDER.")] = "ViT-B-16",
    pretrained: Annotated[
        str | None,
        OPT(help="A tag of open_clip's, or a local weight file.  [default: openai]"),
    ] = None,
    device: Annotated[str, OPT(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    precision: Annotated[str, OPT(help="auto, fp32 or bf16; auto is bf16 on GPUs that are fast at it.")] = "auto",
    seed: Annotated[int, OPT(help="Of the draw, the order and the crops.")] = 0,
    tuning: Annotated[str, OPT(help="Which weights move: full, or lora (adapters, merged at the end).")] = "full",
    lora_rank: Annotated[int | None, OPT(help="[default: the method's paper: atha 16, finetune 2]")] = None,
    lora_alpha: Annotated[float | None, OPT(help="[default: the method's paper: atha 8, finetune 1]")] = None,
    lora_dropout: Annotated[float | None, OPT(help="[default: 0.25]")] = None,
    context: Annotated[
        bool, OPT("--context", help="Also learn vectors in place of the template's first words (CoOp's way).")
    ] = False,
    template: Annotated[str | None, OPT(help='Default: "a photo of a {}".')] = None,
    learning_rate: Annotated[
        float | None, OPT(help="[default: the model's own, else the paper's 5e-6; lora: 2e-4]")
    ] = None,
    weight_decay: Annotated[float | None, OPT(help="[default: the model's own, else 0.1; lora: the method's]")] = None,
    epochs: Annotated[
        int | None, OPT(help="[default: the model's own, else the paper's 20; lora: the method's]")
    ] = None,
    batch_size: Annotated[
        int | None, OPT(help="[default: the model's own, else the paper's 32; lora: the method's]")
    ] = None,
    crop_scale: Annotated[tuple[float, float] | None, OPT(help="Share of the area that a random crop shows.")] = None,
    scl_weight: Annotated[float | None, OPT(help="cite: λ, paper 0.7.")] = None,
    vld_weight: Annotated[float | None, OPT(help="cite: η, paper 0.1.")] = None,
    literal_scl: Annotated[
        bool | None,
        OPT("--literal-scl", help="cite: eq. 4 as printed, positive pair left out."),
    ] = None,
    head_ratio: Annotated[
        float | None, OPT(help="atha: ρ, share of the patches moved towards a text, paper 0.1.")
    ] = None,
    tail_ratio: Annotated[float | None, OPT(help="atha: γ, share of the patches moved away, paper 0.1.")] = None,
    head_strength: Annotated[float | None, OPT(help="atha: a starts so at the head block, paper 0.8.")] = None,
    head_block: Annotated[int | None, OPT(help="atha: that block, from 0.  [default: 7/12 of the depth]")] = None,
    tail_strength: Annotated[float | None, OPT(help="atha: b starts so at every block, paper 0.01.")] = None,
    text_block: Annotated[int | None, OPT(help="atha: gives the class tokens.  [default: the last but one]")] = None,
    class_token_inverse: Annotated[str | None, OPT(help="atha: least-squares (default) or transpose.")] = None,
    soft_edits: Annotated[
        bool | None, OPT("--soft-edits", help="atha: softmax weights over classes, not the best and worst.")
    ] = None,
    strength_rate: Annotated[float | None, OPT(help="atha: learning rate of the strengths, 1e-3.")] = None,
    logit_scale: Annotated[
        float | None, OPT(help="atha: fixed scale of the logits.  [default: the model's; lora: 4, at one shot 2]")
    ] = None,
) -> None:
    """Fine-tune CLIP on labelled images and write a run: fine-tuned weights, and the ensemble at alpha."""
    from clipfit import AdaptConfig, adapt
    from clipfit.report.console import Console

    config = AdaptConfig(
        shots, method, model, pretrained, alpha, shots_per_class, classes, image_root, skip_bad_images,
        int(cache_gib * 2**30), seed, device, precision, output, overwrite,
        recipe={
            "template": template, "learning_rate": learning_rate, "weight_decay": weight_decay, "epochs": epochs,
            "batch_size": batch_size, "crop_scale": crop_scale,
        },
        method_options={
            "scl_weight": scl_weight, "vld_weight": vld_weight, "literal_scl": literal_scl,
            "head_ratio": head_ratio, "tail_ratio": tail_ratio, "head_strength": head_strength,
            "head_block": head_block, "tail_strength": tail_strength, "text_block": text_block,
            "class_token_inverse": class_token_inverse, "soft_edits": soft_edits, "strength_rate": strength_rate,
            "logit_scale": logit_scale,
        },
        tuning=tuning,
        context=context,
        lora={"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout},
    )  # fmt: skip
    with Console() as console:
        result = adapt(config, console)
        console.adapted(result)
    if as_json:
        print_json(result.as_json())
