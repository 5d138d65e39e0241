"""One resumable optimisation loop for every stage of the recipe.

Step k draws its batch from a generator seeded by (stage, k, process), so a run that was interrupted goes on exactly
where it was. Under torchrun every process takes a part of the batch and gradients are averaged: on CPUs two processes
of one thread do up to 1.8 times the work of one process of two. Checkpoints are safetensors: weights, AdamW's moments,
and the history as JSON in the metadata.
"""

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

SAVE_EVERY = 120  # seconds
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them


def half() -> torch.autocast:
    """Products in bf16 where the processor has them: 2.4 times as fast as fp32 there, hopeless elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def run(
    name: str,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    loss_of: Callable[[torch.Generator], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    out: Path,
    warmup: int = 200,
    check: Callable[[], str] | None = None,
) -> None:
    """Minimise loss_of over the optimiser's parameters; its learning rates are peaks, cosine to zero."""
    path = out / f"{name}.safetensors"
    peaks = [group["lr"] for group in optimiser.param_groups]
    first, history = load(path, module, optimiser) if path.exists() else (0, {"seconds": 0.0})
    print(f"{name}: from step {first} of {steps}, process {RANK} of {PROCESSES}", flush=True)
    started = last_saved = time.monotonic()
    before = history["seconds"]
    mean: dict[str, float] = {}
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) * 2**24 + step * PROCESSES + RANK)
        rate = min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        loss, shown = loss_of(generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(moving(optimiser))
        nn.utils.clip_grad_norm_(moving(optimiser), 1.0)
        optimiser.step()
        for key, value in shown.items():
            mean[key] = 0.98 * mean.get(key, value) + 0.02 * value
        now = time.monotonic()
        history["seconds"] = before + now - started
        if RANK > 0:
            continue
        if (step + 1) % 20 == 0:
            pace = (now - started) / (step + 1 - first)
            text = " ".join(f"{k} {v:.4f}" for k, v in mean.items())
            print(f"{name} {step + 1}/{steps} {text} | {pace * 1000:.0f} ms a step", flush=True)
        if now - last_saved > SAVE_EVERY or step + 1 == steps:
            save(path, module, optimiser, {"step": step + 1, **history, "mean": mean})
            last_saved = now
        if check and ((step + 1) % 1000 == 0 or step + 1 == steps):
            print(f"{name} {step + 1}: {check()}", flush=True)


def average_gradients(parameters: list[torch.Tensor]) -> None:
    """Over the processes that torchrun started."""
    if PROCESSES == 1:
        return
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, mean in zip(grads, (flat / PROCESSES).split([g.numel() for g in grads]), strict=True):
        g.copy_(mean.view_as(g))


def save(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, history: dict) -> None:
    tensors = {f"model.{k}": v.contiguous() for k, v in module.state_dict().items()}
    for i, parameter in enumerate(moving(optimiser)):
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{i}.{key}"] = value.contiguous()
    part = path.with_suffix(".part")
    save_file(tensors, part, {"history": json.dumps(history)})
    part.rename(path)


def load(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[int, dict]:
    module.load_state_dict(weights(path))
    tensors = load_file(path)
    for i, parameter in enumerate(moving(optimiser)):
        mine = {k.rsplit(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"optimiser.{i}.")}
        if mine:
            optimiser.state[parameter] = mine
    with safe_open(path, "pt") as file:
        history = json.loads(file.metadata()["history"])
    return history["step"], {"seconds": history["seconds"]}


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a stage's checkpoint, without the optimiser's state."""
    return {k.removeprefix("model."): v for k, v in load_file(path).items() if k.startswith("model.")}


def moving(optimiser: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every parameter that the optimiser moves, in a fixed order."""
    return [p for g in optimiser.param_groups for p in g["params"]]


def decayed(parameters: Iterable[nn.Parameter], rate: float) -> list[dict]:
    """Matrices with weight decay; vectors and scalars without."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "lr": rate},
        {"params": [p for p in parameters if p.ndim <= 1], "lr": rate, "weight_decay": 0.0},
    ]


def adamw(groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW as every stage uses it; a group may have its own decay."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
