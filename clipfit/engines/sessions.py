"""A graph in a file, opened by a library that computes it on the processor, with as many threads as torch has."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from clipfit.errors import ModelError, first_line

Arrays: TypeAlias = "Sequence[np.ndarray[Any, Any]]"


@dataclass(frozen=True)
class Session:
    """A graph that is ready. compute: inputs in the graph's order → outputs in its order. facts: its metadata."""

    compute: Callable[[Arrays], Arrays]
    facts: Mapping[str, str]


def opened(file: Path, runtime: str, precision: str) -> Session:
    """A graph, ready to be computed; by one thread at a time.

    Raises:
        ModelError: the library cannot compute it.
    """
    try:
        return _onnxruntime(file) if runtime == "onnxruntime" else _openvino(file, precision)
    except Exception as error:  # whatever a library says of a graph that it does not know
        raise ModelError(
            f"{runtime} cannot compute {file.name} ({first_line(error)}): choose another --runtime."
        ) from error


def _onnxruntime(file: Path) -> Session:
    library: Any = importlib.import_module("onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    facts = session.get_modelmeta().custom_metadata_map
    return Session(lambda arrays: session.run(None, dict(zip(names, arrays, strict=True))), facts)


def _openvino(file: Path, precision: str) -> Session:
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",  # it would choose by itself
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,  # all threads for one batch
        "ENABLE_CPU_PINNING": False,  # two processes would be put on the same cores
    }
    library: Any = importlib.import_module("openvino")
    core = library.Core()
    graph = core.read_model(str(file))
    told = _plain(graph.get_rt_info()["framework"]) if graph.has_rt_info("framework") else {}
    facts = {name: _plain(value) for name, value in told.items()}
    model = core.compile_model(graph, "CPU", settings)
    return Session(lambda arrays: list(model(list(arrays)).values()), facts)


def _plain(value: Any) -> Any:
    """What is inside, of what OpenVINO has wrapped."""
    return getattr(value, "value", value)


def openvino_has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 on this processor."""
    library: Any = importlib.import_module("openvino")
    return "BF16" in library.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
