"""A consumer of an exported graph: onnxruntime and nothing of clipfit or torch, in a process of its own.

    python _consume_onnx.py MODEL_FOLDER REQUEST_FOLDER

Reads request.json and request.safetensors, writes answer.json and answer.safetensors beside them.
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from safetensors.numpy import load_file, save_file


def session_of(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def mean_of(texts: np.ndarray, templates: int) -> np.ndarray:
    """Unit-norm texts (T·C, D), one template after the other → classes (C, D): means, brought back to unit norm."""
    if templates == 1:
        return texts
    means = texts.reshape(templates, -1, texts.shape[1]).mean(0)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def logits_of(
    session: onnxruntime.InferenceSession, given: np.ndarray, tensors: dict[str, np.ndarray], templates: int
) -> np.ndarray:
    """(n, C): the graph's own, or by the embeddings of the tower that it is not."""
    parts = [session.run(None, {session.get_inputs()[0].name: given[k : k + 16]}) for k in range(0, len(given), 16)]
    first = np.concatenate([outputs[0] for outputs in parts])
    if session.get_outputs()[0].name == "logits":
        return first
    if session.get_inputs()[0].name == "tokens":
        return tensors["scale"] * tensors["image_embeddings"] @ mean_of(first, templates).T + tensors["bias"]
    return tensors["scale"] * first @ tensors["text_embeddings"].T + tensors["bias"]


def tokens_of(file: Path, texts: list[str]) -> np.ndarray:
    """(n, context length)"""
    from tokenizers import Tokenizer

    return np.array([text.ids for text in Tokenizer.from_file(str(file)).encode_batch(texts)])


def main(folder: Path, exchange: Path) -> None:
    request = json.loads((exchange / "request.json").read_text("utf-8"))
    tensors = load_file(exchange / "request.safetensors")
    session = session_of(folder / "model.onnx", request["threads"])
    name = session.get_inputs()[0].name
    answer = {"logits": logits_of(session, tensors[name], tensors, request["templates"])}
    errors: dict[str, str] = {}
    if name == "pixels":
        see = runpy.run_path(str(folder / "preprocess.py"))["pixels"]
        constants = json.loads(session.get_modelmeta().custom_metadata_map["preprocess"])
        answer["probe"] = see(Image.fromarray(tensors["probe"]), constants)
        answer["file_pixels"] = np.full_like(tensors["pixels"], np.nan)  # (n, 3, H, W)
        for index, file in enumerate(request["files"]):
            try:
                with Image.open(file) as opened:
                    answer["file_pixels"][index] = see(opened, constants)
            except Exception as error:  # whatever a decoder says: clipfit names the file
                errors[str(index)] = f"{type(error).__name__}: {error}"
        if request["files"]:
            answer["file_logits"] = logits_of(session, answer["file_pixels"], tensors, request["templates"])
    elif (folder / "tokenizer.json").exists():
        answer["tokens"] = tokens_of(folder / "tokenizer.json", [*request["texts"], *request["plain_texts"]])
    if (folder / "float.onnx").exists():
        before = session_of(folder / "float.onnx", request["threads"])
        answer["further: before quantisation"] = logits_of(before, tensors[name], tensors, request["templates"])
    save_file({name: np.ascontiguousarray(array) for name, array in answer.items()}, exchange / "answer.safetensors")
    record = {"consumer": f"onnxruntime {onnxruntime.__version__}", "errors": errors}
    (exchange / "answer.json").write_text(json.dumps(record), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
