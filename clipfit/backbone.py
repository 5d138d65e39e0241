"""The one place that knows open_clip: loading a pre-trained CLIP, encoding images and texts, preprocessing."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import normalize, pil_to_tensor

from clipfit.errors import ModelError, UsageError

LOCAL_DIR = "local-dir:"
DEFAULT_TAG = "openai"
TINY = "clipfit-tiny"
TINY_FOLDER = Path(__file__).parent / "assets" / TINY
OFFLINE_HELP = (
    "without a network use --model clipfit-tiny (ships with clipfit), --model local-dir:FOLDER "
    "(an open_clip_config.json beside its weights) or --pretrained FILE.safetensors"
)


@dataclass(frozen=True)
class Source:
    """Where pre-trained weights came from, and what they are: enough to load the same ones again."""

    model: str
    pretrained: str | None
    sha256: str  # of all tensors after loading: see state_sha256
    model_cfg: Mapping[str, Any]  # open_clip's architecture, with the activation the weights were trained with
    preprocess_cfg: Mapping[str, Any]
    adapt_defaults: Mapping[str, Any] = field(default_factory=dict)  # the model's own recipe, see config.Recipe


class Backbone:
    """A CLIP of open_clip's `CLIP` class (ViT or ResNet), in evaluation mode, with what belongs to it.

    The model stays in evaluation mode during adaptation too: dropout off, batch-norm statistics as pre-trained.
    """

    def __init__(self, model: open_clip.CLIP, source: Source, device: torch.device):
        self.model = model.eval().to(device)
        self.source = source
        self.device = device
        self.precision = "fp32"  # of the towers; embeddings and losses are float32 always
        self.model.logit_scale.requires_grad_(False)  # τ is frozen; tiny batches would ruin it
        self._tokenizer = _tokenizer(source)
        self._geometry = _geometry(source)
        visual_size = model.visual.image_size
        self.image_size: tuple[int, int] = visual_size if isinstance(visual_size, tuple) else (visual_size,) * 2

    @property
    def scale(self) -> torch.Tensor:
        """τ⁻¹ = exp(logit_scale): a scalar."""
        return self.model.logit_scale.detach().exp().reshape(())

    @property
    def embed_dim(self) -> int:
        """D, the width of the joint embedding."""
        return int(self.source.model_cfg["embed_dim"])

    @property
    def bytes(self) -> int:
        """What the weights take on disk."""
        return sum(t.numel() * t.element_size() for t in self.state().values())

    def state(self) -> dict[str, torch.Tensor]:
        """θ: parameters and buffers by open_clip's names, detached, not copied."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set θ.

        Raises:
            ModelError: the names or shapes are not this architecture's.
        """
        try:
            self.model.load_state_dict(dict(state))
        except RuntimeError as error:
            raise ModelError(f"the weights do not fit {self.source.model}: {_first_line(error)}.") from error

    def frozen_copy(self) -> Backbone:
        """An independent copy whose weights never get a gradient."""
        model = copy.deepcopy(self.model)
        model.requires_grad_(False)
        copied = Backbone(model, self.source, self.device)
        copied.precision = self.precision
        return copied

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts → token ids (n, context length) int64."""
        tokens: torch.Tensor = self._tokenizer(list(texts))
        return tokens.to(self.device)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, H, W) → unit-norm embeddings u (B, D), float32."""
        with self._autocast():
            features = self.model.encode_image(images)
        return F.normalize(features.float(), dim=1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (n, context length) → unit-norm embeddings t (n, D), float32.

        Under a causal mask nothing behind the end-of-text token can change its features, so the sequence is cut
        behind the longest one; exact, and several times faster for class names. open_clip's `encode_text` refuses a
        shorter sequence, hence these lines.
        """
        with self._autocast():
            features = self._cut_text_features(tokens)
        return F.normalize(features.float(), dim=1)

    def _cut_text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        m = self.model
        if m.attn_mask is None or m.text_pool_type not in ("argmax", "eos"):
            features: torch.Tensor = m.encode_text(tokens)
            return features
        is_end = tokens == (m.text_eos_id if m.text_pool_type == "eos" else tokens.amax(1, keepdim=True))
        ends = is_end.int().argmax(1)  # (n,) the first end-of-text
        length = int(ends.max()) + 1
        dtype = m.transformer.get_cast_dtype()
        x = m.token_embedding(tokens[:, :length]).to(dtype) + m.positional_embedding[:length].to(dtype)
        x = m.ln_final(m.transformer(x, attn_mask=m.attn_mask[:length, :length]))  # (n, length, width)
        x = x[torch.arange(len(x), device=x.device), ends]  # (n, width)
        if m.text_projection is None:
            return x
        return m.text_projection(x) if isinstance(m.text_projection, torch.nn.Linear) else x @ m.text_projection

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def geometry(self, picture: Image.Image) -> torch.Tensor:
        """An RGB picture resized and cropped as the model wants it: (3, H, W) uint8."""
        for step in self._geometry:
            picture = step(picture)
        tensor: torch.Tensor = pil_to_tensor(picture)
        return tensor

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) → float32 on the model's device, by the model's mean and standard deviation."""
        cfg = self.source.preprocess_cfg
        out: torch.Tensor = normalize(images.to(self.device).float() / 255, cfg["mean"], cfg["std"])
        return out


def _geometry(source: Source) -> list[Any]:
    """The part of open_clip's own evaluation transform that comes before ToTensor and Normalize."""
    cfg = open_clip.transform.PreprocessCfg(**source.preprocess_cfg)
    steps = open_clip.transform.image_transform_v2(cfg, is_train=False).transforms
    kinds = [type(step).__name__ for step in steps]
    if not kinds[-2].endswith("ToTensor") or kinds[-1] != "Normalize":
        raise ModelError(f"this open_clip preprocesses in an unknown way ({', '.join(kinds)}); please report it.")
    return list(steps[:-2])


def load(model: str, pretrained: str | None = None, device: torch.device | str = "cpu") -> Backbone:
    """Load a pre-trained CLIP.

    Args:
        model: `clipfit-tiny`, `local-dir:FOLDER`, or a name of open_clip (`ViT-B-16`).
        pretrained: for open_clip's names: one of its tags (default `openai`) or a local weight file.

    Raises:
        UsageError: no such model or tag; the nearest names are given.
        ModelError: the weights cannot be had or do not fit, or the model is not of open_clip's CLIP class.
    """
    name, folder = model, None
    if model == TINY:
        folder, pretrained = TINY_FOLDER, None
    elif model.startswith(LOCAL_DIR):
        folder, pretrained = Path(model.removeprefix(LOCAL_DIR)).expanduser(), None
    if folder is not None:
        record = _folder_record(folder)
        name = f"{LOCAL_DIR}{folder}"
    else:
        pretrained = pretrained or DEFAULT_TAG
        record = _builtin_record(model, pretrained)
    create = {"model_name": name, "pretrained": pretrained, "require_pretrained": True}
    with _quiet():
        try:
            loaded = open_clip.create_model(**create, quick_gelu=record["model_cfg"]["quick_gelu"])
        except Exception as error:
            raise ModelError(
                f"the weights of {model}{f' / {pretrained}' if pretrained else ''} cannot be loaded "
                f"({_first_line(error)}); {OFFLINE_HELP}."
            ) from error
    if type(loaded) is not open_clip.CLIP:
        raise ModelError(f"{model} is a {type(loaded).__name__}; clipfit adapts models of open_clip's CLIP class only.")
    source = Source(
        model=model,
        pretrained=pretrained,
        sha256=state_sha256(loaded.state_dict()),
        model_cfg=record["model_cfg"],
        preprocess_cfg=_plain(open_clip.get_model_preprocess_cfg(loaded)),
        adapt_defaults=record.get("adapt", {}),
    )
    return Backbone(loaded, source, torch.device(device))


def rebuild(source: Source, state: Mapping[str, torch.Tensor], device: torch.device | str = "cpu") -> Backbone:
    """A backbone from recorded facts and weights, without the pre-trained ones."""
    with _quiet():
        model = open_clip.CLIP(**copy.deepcopy(dict(source.model_cfg)))
    backbone = Backbone(model, source, torch.device(device))
    backbone.load_state(state)
    return backbone


def reload(source: Source, device: torch.device | str = "cpu") -> Backbone:
    """Load the recorded pre-trained weights again.

    Raises:
        ModelError: they cannot be had, or are not the recorded ones.
    """
    backbone = load(source.model, source.pretrained, device)
    if backbone.source.sha256 != source.sha256:
        raise ModelError(
            f"the weights of {source.model} changed since the run was made: expected SHA-256 {source.sha256[:16]}…, "
            f"found {backbone.source.sha256[:16]}…; restore them, or adapt again."
        )
    return backbone


def state_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors in order of name: the same for every container."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def resolve_device(device: str) -> torch.device:
    """`auto` → CUDA if there is one, else the CPU.

    Raises:
        UsageError: the named device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products on CUDA need
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used here ({_first_line(error)}); try --device cpu.") from error


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` → bf16 on a CUDA device with native bf16, else fp32 (a CPU without it is hundreds of times slower)."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _builtin_record(model: str, pretrained: str) -> dict[str, Any]:
    if ":" in model:
        raise UsageError(f"{model!r} cannot be loaded directly: download its folder and pass --model local-dir:FOLDER.")
    model = model.replace("/", "-")  # as open_clip reads "ViT-B/16"
    config = open_clip.get_model_config(model)
    if config is None:
        raise UsageError(f"unknown model {model!r}{_nearest(model, [TINY, *open_clip.list_models()])}.")
    config.setdefault("quick_gelu", False)
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if tag:
        # the activation belongs to the weights, not to the name (open_clip #771)
        config["quick_gelu"] = bool(tag.get("quick_gelu", False))
    elif Path(pretrained).is_file():
        beside = Path(pretrained).with_name("open_clip_config.json")
        if beside.is_file():
            config["quick_gelu"] = bool(_folder_record(beside.parent)["model_cfg"]["quick_gelu"])
    else:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise UsageError(
            f"{pretrained!r} is neither a file nor a pretrained tag of {model}{_nearest(pretrained, tags)}; "
            f"its tags are {', '.join(tags) or 'none'}."
        )
    return {"model_cfg": config}


def _folder_record(folder: Path) -> dict[str, Any]:
    file = folder / "open_clip_config.json"
    try:
        record = json.loads(file.read_text("utf-8"))
        record["model_cfg"].setdefault("quick_gelu", False)
        extra = folder / "clipfit.json"
        if extra.is_file():
            record["adapt"] = json.loads(extra.read_text("utf-8")).get("adapt", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is no model folder: it needs {file.name} and weights ({error}).") from error
    return dict(record)


def _tokenizer(source: Source) -> Any:
    text = source.model_cfg["text_cfg"]
    if text.get("hf_tokenizer_name"):
        with _quiet():
            try:
                return open_clip.get_tokenizer(source.model)
            except Exception as error:
                raise ModelError(f"the tokenizer of {source.model} cannot be had ({_first_line(error)}).") from error
    context = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    return open_clip.SimpleTokenizer(context_length=context, **(text.get("tokenizer_kwargs") or {}))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's types only: tuples become lists."""
    return dict(json.loads(json.dumps(dict(cfg))))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:;")[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs through the root logger; what matters of it reaches people as our own errors."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
