"""What training changes: tensors and their moments, every one by name, and the optimisers that change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from clipfit import ranks
from clipfit.config import Recipe
from clipfit.errors import ModelError
from clipfit.methods import Group
from clipfit.model import sharding
from clipfit.model.clip import Clip

Parameters = Mapping[str, torch.nn.Parameter]


class Trained:
    """Named parameters in groups of their own learning rate and decay, by AdamW or by SGD with momentum.

    A name is that on disk: open_clip's for a weight of the CLIP, `clipfit.…` for what is attached, `<method>.…` for a
    method's own parameters. Moments go by the same names.
    """

    def __init__(self, groups: Sequence[Group], usual_rate: float):
        """`usual_rate`: that of groups without a learning rate of their own."""
        self.parameters: dict[str, torch.nn.Parameter] = {n: p for g in groups for n, p in g.parameters.items()}
        self._optimisers: list[torch.optim.Optimizer] = []
        by_adamw = [_options(part, usual_rate) for g in groups if g.momentum is None for part in _alike(g)]
        by_sgd = [{**_options(g, usual_rate), "momentum": g.momentum} for g in groups if g.momentum is not None]
        # a fused step on a CPU takes the numbers of a tensor, its gradient and moments as they lie in memory
        fused = all(parameter.is_contiguous() for parameter in self.parameters.values())
        if by_adamw:
            self._optimisers.append(torch.optim.AdamW(by_adamw, fused=fused))
        if by_sgd:
            self._optimisers.append(torch.optim.SGD(by_sgd))
        self._peaks: list[float] = [group["lr"] for group in self._groups]

    @classmethod
    def of(cls, clip: Clip, groups: Sequence[Group], recipe: Recipe) -> Trained:
        """The trainable weights of a CLIP and what is trained beside them.

        The recipe's weight decay is for matrices; none for norms and biases (vectors and scalars).
        """
        moving = {name: p for name, p in clip.model.named_parameters() if p.requires_grad}
        matrices = {name: p for name, p in moving.items() if p.ndim >= 2}
        vectors = {name: p for name, p in moving.items() if p.ndim < 2}
        weights = [Group(matrices, weight_decay=recipe.weight_decay), Group(vectors)]
        return cls([*weights, *groups], recipe.learning_rate)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimiser in self._optimisers for group in optimiser.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients, and give their memory back."""
        for optimiser in self._optimisers:
            optimiser.zero_grad(set_to_none=True)

    def step(self, annealed: float) -> None:
        """One step of every optimiser, every learning rate times `annealed`."""
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * annealed
        for optimiser in self._optimisers:
            optimiser.step()

    @property
    def in_shares(self) -> bool:
        """Whether each of several processes holds a part of it alone."""
        return any(map(ranks.in_shares, self.parameters.values()))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a later step depends on, by name: parameters, and `<name>/<moment>`.

        What is in shares is put together for the first of the processes, which all ask for it; the others are given
        nothing in its place.
        """
        found = {name: p.detach() for name, p in self.parameters.items()}
        names: dict[torch.Tensor, str] = {p: name for name, p in self.parameters.items()}
        for optimiser in self._optimisers:
            for parameter, moments in optimiser.state.items():
                found |= {f"{names[parameter]}/{kind}": torch.as_tensor(moment) for kind, moment in moments.items()}
        return {name: sharding.put_together(tensor) for name, tensor in found.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go back to what `tensors` gave.

        Raises:
            ModelError: names or shapes are those of another training.
        """
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            owner, _, kind = name.rpartition("/")
            if owner:
                moments.setdefault(owner, {})[kind] = tensor
        if tensors.keys() - {f"{p}/{k}" for p, kinds in moments.items() for k in kinds} != self.parameters.keys():
            raise ModelError("the saved state is of another training: its tensors have other names.")
        for name, parameter in self.parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ModelError(f"the saved state is of another training: {name} has another shape.")
            parameter.copy_(sharding.share_of(tensors[name], parameter))
        for optimiser in self._optimisers:
            numbered = [p for group in optimiser.param_groups for p in group["params"]]
            names = {p: name for name, p in self.parameters.items()}
            saved = {
                i: {kind: sharding.share_of(moment, p) for kind, moment in moments[names[p]].items()}
                for i, p in enumerate(numbered)
                if names[p] in moments
            }
            optimiser.load_state_dict({"state": saved, "param_groups": optimiser.state_dict()["param_groups"]})


def _options(group: Group, usual_rate: float) -> dict[str, Any]:
    rate = usual_rate if group.learning_rate is None else group.learning_rate
    return {"params": list(group.parameters.values()), "lr": rate, "weight_decay": group.weight_decay}


def _alike(group: Group) -> list[Group]:
    """Tensors that are whole and those in shares apart: no fused step takes both at once."""
    whole = {name: p for name, p in group.parameters.items() if not ranks.in_shares(p)}
    shares = {name: p for name, p in group.parameters.items() if name not in whole}
    return [replace(group, parameters=part) for part in (whole, shares) if part or not shares]
