"""A part of the model as an ONNX graph, `model.onnx`, for onnxruntime and whatever else reads ONNX."""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clipfit.config.outputs import FormatOptions
from clipfit.errors import ClipfitError
from clipfit.formats import consumer, parts, proof
from clipfit.formats.card import Usage
from clipfit.formats.parts import Part
from clipfit.formats.proof import Pictures, Proof
from clipfit.formats.stored import OPENED
from clipfit.formats.subject import Subject, write_about
from clipfit.model.named import Additions
from clipfit.runs import files
from clipfit.runs.run import Run

SCRIPT = "_consume_onnx.py"
MODEL, FLOAT = "model.onnx", "float.onnx"  # the second while an int8 graph is proved
ONE_FILE = 1.8e9  # bytes: a file of Protocol Buffers ends at 2 GiB; beyond it the weights lie beside
QUANTIZED = ["MatMul", "Gemm"]  # the towers' products; onnxruntime has no kernel for every convolution in int8


class Onnx:
    """A part as a graph with a free batch dimension."""

    name = "onnx"
    libraries = ("onnx", "onnxscript", "onnxruntime", "tokenizers")

    def holds(self, run: Run, additions: Additions, options: FormatOptions) -> str | None:
        """A classifier holds every run."""
        return parts.unheld(additions, options)

    def write(self, subject: Subject, folder: Path) -> None:
        """Raises OutputError where the place cannot be written or has no room."""
        files.require_room(folder, 3 * subject.model.bytes)
        quantize = subject.options.quantize is not None
        part = parts.part_of(subject)
        with files.writing(folder), parts.quiet():
            write_graph(part, folder / (FLOAT if quantize else MODEL))
            if quantize:
                _quantized(folder / FLOAT, folder / MODEL, parts.json_facts(part))
        parts.write_beside(subject, folder)
        write_about(subject, folder)

    def usage(self, subject: Subject, folder: Path) -> Usage:
        """By onnxruntime."""
        outputs = _OUTPUTS[subject.options.part or "classifier"]
        if subject.options.part == "text":
            return Usage("onnx", f"{TEXT_EXAMPLE}\n{outputs}")
        return Usage("onnx", f"{PIXELS_EXAMPLE}\n{outputs} {OPENED}")

    def prove(self, subject: Subject, folder: Path, pictures: Pictures) -> Proof:
        """onnxruntime's logits; of an int8 graph, beside those of the graph that it was made from.

        Raises:
            ClipfitError: they differ, where they are not rounded to 8 bits on purpose.
        """
        ask = functools.partial(consumer.consume, SCRIPT, folder)
        if subject.options.quantize is None:
            return proof.prove(subject, pictures, ask)
        proved = proof.prove(subject, pictures, ask, math.inf)
        bound = proof.bound(subject)
        if not (found := proved.further["before quantisation"].largest_difference) <= bound:
            raise ClipfitError(
                f"{proved.consumer} reads another model from the graph before it is quantised: its logits differ by "
                f"up to {found:g} (at most {bound:g} may be rounding); it is not kept: please report it."
            )
        for path in folder.glob(f"{FLOAT}*"):
            path.unlink()
        return proved


def write_graph(part: Part, path: Path) -> None:
    """One file, or beyond 1.8 GB one of the graph and one of the weights beside it, called as it with `.data`."""
    program = torch.onnx.export(
        parts.traced(part), dynamo=True, input_names=list(part.inputs), output_names=list(part.outputs), verbose=False,
        custom_translation_table={torch.ops.aten.sort.stable: _sorted},
    )  # fmt: skip
    assert program is not None
    model = program.model
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # where in which file of this machine it comes from
        node.doc_string = None
    for value in (model.graph.inputs[0], *model.graph.outputs):
        assert value.shape is not None
        value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])
    model.producer_name = "clipfit"
    model.metadata_props.update(parts.json_facts(part))
    program.save(path, external_data=parts.bytes_of(part) > ONE_FILE)


def _sorted(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """aten::sort.stable, which the exporter has no translation of: by TopK, whose ties go to the lower index."""
    op = importlib.import_module("onnxscript").opset18
    count = op.Reshape(op.Gather(op.Shape(x), op.Constant(value_int=dim)), op.Constant(value_ints=[1]))
    values, indices = op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)
    return values, indices


def _quantized(source: Path, target: Path, facts: Mapping[str, str]) -> None:
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    onnx: Any = importlib.import_module("onnx")
    large = source.with_name(f"{source.name}.data").exists()
    quantization.quantize_dynamic(
        source, target, op_types_to_quantize=QUANTIZED, per_channel=True, weight_type=quantization.QuantType.QInt8,
        use_external_data_format=large,
    )  # fmt: skip
    model = onnx.load(target, load_external_data=False)
    onnx.helper.set_model_props(model, dict(facts))
    target.write_bytes(model.SerializeToString(deterministic=True))


PIXELS_EXAMPLE = """
With onnxruntime, NumPy and Pillow, in this folder (`preprocess.py` is part of the export):

```python
import json, onnxruntime
from PIL import Image
from preprocess import pixels

session = onnxruntime.InferenceSession("model.onnx")
facts = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
found = session.run(None, {"pixels": pixels(Image.open("image.jpg"), facts["preprocess"])[None]})
```
"""
TEXT_EXAMPLE = """
With onnxruntime, NumPy and tokenizers, in this folder:

```python
import numpy, onnxruntime
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession("model.onnx")
ids = [text.ids for text in Tokenizer.from_file("tokenizer.json").encode_batch(["a photo of a cat"])]
found = session.run(None, {"tokens": numpy.array(ids)})
```
"""
_OUTPUTS = {
    "classifier": '`found` is logits and probabilities over `facts["classes"]`, (n, C) each.',
    "image": "`found` is one array of embeddings (n, D), of unit norm.",
    "text": "`found` is one array of embeddings (n, D), of unit norm.",
}


def facts_in(path: Path) -> dict[str, Any]:
    """What the metadata of a graph says."""
    onnx: Any = importlib.import_module("onnx")
    return {one.key: json.loads(one.value) for one in onnx.load(path, load_external_data=False).metadata_props}
