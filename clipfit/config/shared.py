"""Options that several verbs have."""

from __future__ import annotations

from typing import Any

from clipfit.config.options import argument, option

PRECISIONS = ("auto", "fp32", "bf16")
TORCH = "torch"
RUNTIMES = (TORCH, "onnxruntime", "openvino")


def alpha_of_run() -> Any:
    """The ratio at which a run is taken."""
    return option(None, "Ensemble ratio: 0 = pre-trained, 1 = fine-tuned.", low=0, high=1, default_is="the run's own")


def run_or_newest() -> Any:
    """A run, by its place."""
    return argument("A run of adapt's.", None, default_is="the newest below runs/")


def class_names(of: str = "") -> Any:
    """A file of class names."""
    return option(None, f"Class names{of}: folder<TAB>name a line, or JSON.")


def templates(default_is: str) -> Any:
    """Several texts of a class."""
    return option(
        None, "File of templates, one a line, or clip for CLIP's own: a class is the mean of its texts.",
        default_is=default_is,
    )  # fmt: skip


def image_root() -> Any:
    """Where relative paths start."""
    return option(None, "Where paths in a manifest or split file start.")


def skip_bad_images() -> Any:
    """What happens to images that cannot be read."""
    return option(False, "Leave out what cannot be read, and count it.")


def cache_bytes(of: str) -> Any:
    """Memory for decoded images."""
    return option(2 * 2**30, f"Memory for decoded {of}, GiB (in a plan: bytes).", low=0, flag="--cache-gib", unit=2**30)


def model() -> Any:
    """What is adapted."""
    return option("ViT-B-16", "clipfit-tiny, an open_clip name, hf-hub:owner/name, a folder or, in adapt, a run.")


def pretrained() -> Any:
    """Its weights."""
    return option(
        None, "A tag of open_clip's, or a local weight file: FILE or TAG:FILE.", default_is="openai, else the only one"
    )


def device() -> Any:
    """Where it is computed."""
    return option("auto", "auto, cpu, cuda, cuda:1, …")


def runtime(default: str | None = TORCH) -> Any:
    """By what it is computed. None: by torch, or what a graph is for."""
    return option(
        default, "What computes the image tower; onnxruntime, openvino (clipfit[onnx], clipfit[openvino]): on a CPU.",
        choices=RUNTIMES, default_is=None if default else f"{TORCH}; of an ONNX export onnxruntime",
    )  # fmt: skip


def precision() -> Any:
    """In what it is computed."""
    return option(
        "auto", "auto is bf16 for large models on processors and GPUs that are fast at it.", choices=PRECISIONS
    )
