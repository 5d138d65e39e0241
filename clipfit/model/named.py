"""The weights of a model by the names they have on disk: open_clip's, then what is attached to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from clipfit.config.edits import EditSettings
from clipfit.config.shared import TORCH
from clipfit.errors import ModelError, first_line
from clipfit.model import compat
from clipfit.model.edits import TokenEdits
from clipfit.model.sources import Source

ADDED = "clipfit."  # before the names of tensors that open_clip's CLIP does not have


@dataclass(frozen=True)
class Additions:
    """What a model has beyond open_clip's CLIP: edits of patch tokens (ATHA), and learnt vectors for context words.

    context: the words before the class name, in whose embeddings' place the vectors stand.
    """

    edits: EditSettings | None = None
    context: str | None = None


class ImageEngine(Protocol):
    """What computes image embeddings in the place of a CLIP's image tower, by the weights that it had at one moment."""

    @property
    def runtime(self) -> str:
        """The library that does."""

    def __call__(self, images: torch.Tensor, class_tokens: torch.Tensor | None) -> torch.Tensor:
        """As `Clip.encode_image`."""


class NamedWeights:
    """θ of a CLIP: reading, copying and setting it."""

    model: compat.Model
    source: Source
    device: torch.device
    edits: TokenEdits | None
    context: torch.nn.Parameter | None  # (words, text width)
    precision: str
    tower: ImageEngine | None  # in the place of the model's own, see engines

    @property
    def scale(self) -> torch.Tensor:
        """τ⁻¹ = exp(logit_scale): a scalar."""
        return self.model.logit_scale.detach().exp().reshape(())

    @property
    def bias(self) -> torch.Tensor | None:
        """What the model adds to every logit: a scalar; None where it has none."""
        bias = self.model.logit_bias
        return None if bias is None else bias.detach().reshape(())

    def logits(self, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """τ⁻¹·u·tᵀ of embeddings (n, D) and (C, D), and the model's bias where it has one (SigLIP): (n, C).

        The bias is no class's own, and cancels in a softmax over them; it counts where a consumer takes the sigmoid.
        """
        scaled = self.scale.to(u) * u @ t.to(u).T
        return scaled if self.bias is None else scaled + self.bias.to(u)

    @property
    def features(self) -> str:
        """In what image embeddings are computed: "fp32", "bf16 by openvino"."""
        return self.precision if self.tower is None else f"{self.precision} by {self.runtime}"

    @property
    def runtime(self) -> str:
        """What computes image embeddings: "torch", "onnxruntime", "openvino"."""
        return TORCH if self.tower is None else self.tower.runtime

    @property
    def bytes(self) -> int:
        """What the weights take on disk."""
        return sum(t.numel() * t.element_size() for t in self.state().values())

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Every parameter by the name it has on disk: open_clip's, then what is attached."""
        edits = self.edits.named_parameters(prefix=ADDED.rstrip(".")) if self.edits else ()
        context = {} if self.context is None else {f"{ADDED}context": self.context}
        return {**dict(self.model.named_parameters()), **dict(edits), **context}

    def state(self) -> dict[str, torch.Tensor]:
        """θ: parameters and buffers by open_clip's names, then what is attached; detached, not copied."""
        added = {name: p for name, p in self.named_parameters().items() if name.startswith(ADDED)}
        return {name: tensor.detach() for name, tensor in {**self.model.state_dict(), **added}.items()}

    def snapshot(self, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """θ as it is now, copied; to another device where one is named."""
        return {name: tensor.to(device or self.device, copy=True) for name, tensor in self.state().items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set θ. What computes in the image tower's place computes by other weights, and goes.

        Raises:
            ModelError: the names or shapes are not those of this architecture with what is attached to it.
        """
        plain = {name: t for name, t in state.items() if not name.startswith(ADDED)}
        attached = {name: p for name, p in self.named_parameters().items() if name.startswith(ADDED)}
        try:
            self.tower = None
            if (found := state.keys() - plain.keys()) != attached.keys():
                raise RuntimeError(f"expected beside open_clip's tensors {sorted(attached)}, found {sorted(found)}")
            self.model.load_state_dict(plain)
            with torch.no_grad():
                for name, parameter in attached.items():
                    parameter.copy_(state[name])
        except RuntimeError as error:
            raise ModelError(f"the weights do not fit {self.source.model}: {first_line(error)}.") from error
