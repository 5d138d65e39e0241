"""The 50 classes of the zero-shot probe, fixed before any model was trained, and accuracy on held-out styles."""

import torch

from icons import Icons

CLASSES = (
    "airplane ambulance anchor apple axe backpack balloon banana bat bear bee bell bicycle bird book brain bus "
    "butterfly cactus camera candle car carrot castle cat chair cherries clock cloud crab crown deer dog door drum "
    "egg eye fish flower ghost guitar hammer heart key ladder leaf lemon mushroom umbrella scissors"
).split()
STYLES = {
    "line": ("tabler", "ph", "hugeicons"),
    "coloured": ("twemoji", "fluent-emoji-flat", "flat-color-icons", "icon-park"),
    "3-D": ("fluent-emoji",),
    "silhouette": ("game-icons",),
}


def probe(held: Icons) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """style → (picture indices, labels into CLASSES): every held-out picture named exactly like a class."""
    place = {c: i for i, c in enumerate(CLASSES)}
    out = {}
    for style, sets in STYLES.items():
        at = [i for i, (s, c) in enumerate(zip(held.sets, held.concepts, strict=True)) if s in sets and c in place]
        out[style] = (torch.tensor(at), torch.tensor([place[held.concepts[i]] for i in at]))
    return out
