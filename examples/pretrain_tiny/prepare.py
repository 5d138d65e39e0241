"""Turn the renders into training and held-out arrays: python prepare.py RENDERS DATA

DATA/{train,held}/mono.npy    (N, 64, 64) uint8: alpha of one-colour icons
DATA/{train,held}/colour.npy  (M, 64, 64, 4) uint8: RGBA
DATA/{train,held}/index.json  one row per picture, mono first: [set, name, concept]
DATA/receipt.json             how many pictures each rule took out
"""

import collections
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
SIDE = 64
STYLE_WORDS = frozenset(
    "outline outlined outlines bold duotone fill filled line linear thin regular solid sharp rounded round twotone "
    "broken duo flat remix alt free baseline monochrome loop transition sm lg md xs xl px semibold".split()
)
STYLE_PAIRS = ("two tone", "skin tone")
MIN_SETS = 4  # a concept is learnt only if so many training sets draw it
MAX_WORDS = 4
SAME_DRAWING = 0.97  # correlation of two thumbnails above which they are the same drawing
SKIN = re.compile(r"-(light|medium-light|medium|medium-dark|dark)-skin-tone")
NOT_THINGS = re.compile(r"^(brand|logo|logos|flag|flags|file-type|letter|number|currency)-|-(logo|brand)$")


def concept_of(name: str, suffixes: list[str]) -> str:
    """The words of an icon's name without style words and numbers ("guitar-line-24" → "guitar")."""
    for suffix in suffixes:
        if suffix and name.endswith("-" + suffix):
            name = name.removesuffix("-" + suffix)
            break
    words = [w for w in re.split(r"[-_]", name.lower()) if w and not w.isdigit() and w not in STYLE_WORDS]
    text = " ".join(words)
    for pair in STYLE_PAIRS:
        text = text.replace(pair, "").strip()
    return text


def grey(pictures: np.ndarray) -> torch.Tensor:
    """(n, 64, 64[, 4]) uint8 → (n, 64, 64) float: roughly the darkness on white, for hashes and coverage.

    (Colours are premultiplied by alpha, which makes soft edges a little darker here, on both sides of a comparison.)
    """
    if pictures.ndim == 3:
        return torch.from_numpy(pictures).float() / 255
    rgba = torch.from_numpy(pictures).float() / 255
    return (1 - rgba[..., :3].mean(-1)) * rgba[..., 3] * 0.8 + 0.2 * rgba[..., 3]


def thumbnails(pictures: np.ndarray) -> torch.Tensor:
    """Perceptual hash: the drawing cut to its box, at 16 x 16, zero mean, unit norm: (n, 256) float."""
    out = torch.empty(len(pictures), 256)
    for start in range(0, len(pictures), 4096):
        g = grey(pictures[start : start + 4096])
        ink = g > 0.1
        columns, rows = ink.any(1).float(), ink.any(2).float()
        left, top = columns.argmax(1), rows.argmax(1)
        right, bottom = SIDE - columns.flip(1).argmax(1), SIDE - rows.flip(1).argmax(1)
        sx, sy = (right - left).float() / SIDE, (bottom - top).float() / SIDE
        cx, cy = (right + left).float() / SIDE - 1, (bottom + top).float() / SIDE - 1
        zero = torch.zeros_like(sx)
        theta = torch.stack([torch.stack([sx, zero, cx], 1), torch.stack([zero, sy, cy], 1)], 1)
        grid = F.affine_grid(theta, [len(g), 1, 48, 48], align_corners=False)
        boxed = F.grid_sample(g[:, None], grid, align_corners=False)
        small = F.avg_pool2d(boxed, 3).flatten(1)
        out[start : start + 4096] = F.normalize(small - small.mean(1, keepdim=True), dim=1)
    return out


def load(renders: Path, icons: Path) -> list[dict]:
    sets = []
    for record_path in sorted(renders.glob("*.json")):
        record = json.loads(record_path.read_text())
        source = json.loads((icons / f"{record['prefix']}.json").read_text())
        suffixes = sorted(source.get("suffixes", {}), key=len, reverse=True)
        shape = (-1, SIDE, SIDE) if record["channels"] == 1 else (-1, SIDE, SIDE, 4)
        pixels = np.memmap(renders / f"{record['prefix']}.bin", np.uint8, "c").reshape(shape)
        record |= {"pixels": pixels, "concepts": [concept_of(n, suffixes) for n in record["names"]]}
        sets.append(record)
    return sets


def usable(record: dict) -> np.ndarray:
    """Which pictures of a set show something, and are no brand, flag, letter or second skin tone."""
    coverage = grey(record["pixels"]).mean((1, 2)).numpy()
    named = [
        not NOT_THINGS.search(n) and not SKIN.search(n) and 0 < len(c.split()) <= MAX_WORDS and len(c) > 2
        for n, c in zip(record["names"], record["concepts"], strict=True)
    ]
    return (coverage > 0.01) & (coverage < 0.9) & np.array(named)


def joined(records: list[tuple[dict, np.ndarray]], channels: int) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    chosen = [(r, np.flatnonzero(k)) for r, k in records if r["channels"] == channels]
    shape = (0, SIDE, SIDE) if channels == 1 else (0, SIDE, SIDE, 4)
    pixels = np.concatenate([np.empty(shape, np.uint8)] + [r["pixels"][at] for r, at in chosen])
    rows = [(r["prefix"], r["names"][i], r["concepts"][i]) for r, at in chosen for i in at]
    return pixels, rows


def first_of_same(rows: list[tuple[str, str, str]], hashes: torch.Tensor) -> np.ndarray:
    """One of several nearly identical drawings of a concept within a set (24 px and 20 px, rounded and sharp)."""
    groups = collections.defaultdict(list)
    for i, (prefix, _, concept) in enumerate(rows):
        groups[prefix, concept].append(i)
    keep = np.ones(len(rows), bool)
    for members in groups.values():
        same = hashes[members] @ hashes[members].T > SAME_DRAWING
        for k in range(1, len(members)):
            earlier = [j for j in range(k) if keep[members[j]]]
            keep[members[k]] = not same[k, earlier].any()
    return keep


def near(hashes: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    """For each hash, whether any of the others is nearly identical."""
    return np.concatenate([((h @ others.T).amax(1) > SAME_DRAWING).numpy() for h in hashes.split(1024)])


def main(renders: Path, data: Path) -> None:
    sets = load(renders, HERE / "node_modules/@iconify/json/json")
    held_out = {s for group in json.loads((HERE / "sets.json").read_text())["held_out"].values() for s in group}
    receipt: dict[str, object] = {"rendered": sum(len(s["names"]) for s in sets)}
    kept = [(s, usable(s)) for s in sets]
    receipt["usable"] = int(sum(k.sum() for _, k in kept))

    parts: dict[str, dict[int, tuple]] = {"train": {}, "held": {}}
    for part, inside in (("train", False), ("held", True)):
        for channels in (1, 4):
            pixels, rows = joined([(s, k) for s, k in kept if (s["prefix"] in held_out) is inside], channels)
            parts[part][channels] = (pixels, rows, thumbnails(pixels))
    held_hashes = torch.cat([parts["held"][c][2] for c in (1, 4)])

    for channels in (1, 4):
        pixels, rows, hashes = parts["train"][channels]
        once = first_of_same(rows, hashes)
        pixels, rows, hashes = pixels[once], [r for r, k in zip(rows, once, strict=True) if k], hashes[once]
        clean = ~near(hashes, held_hashes)
        receipt[f"channels {channels}"] = {"same drawing twice in a set": int((~once).sum()),
                                           "nearly identical to a held-out drawing": int((~clean).sum())}  # fmt: skip
        parts["train"][channels] = (pixels[clean], [r for r, k in zip(rows, clean, strict=True) if k], hashes[clean])

    drawn_by = collections.defaultdict(set)
    for channels in (1, 4):
        for prefix, _, concept in parts["train"][channels][1]:
            drawn_by[concept].add(prefix)
    vocabulary = {c for c, by in drawn_by.items() if len(by) >= MIN_SETS}
    run_together = {c.replace(" ", ""): c for c in sorted(vocabulary)}
    for channels in (1, 4):
        pixels, rows, _ = parts["train"][channels]
        rows = [(p, n, c if c in vocabulary else run_together.get(c, "")) for p, n, c in rows]
        known = np.array([bool(c) for *_, c in rows])
        parts["train"][channels] = (pixels[known], [r for r in rows if r[2]], None)

    for part in ("train", "held"):
        folder = data / part
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "mono.npy", parts[part][1][0])
        np.save(folder / "colour.npy", parts[part][4][0])
        index = parts[part][1][1] + parts[part][4][1]
        (folder / "index.json").write_text(json.dumps(index))
        receipt[part] = {"pictures": len(index), "coloured": len(parts[part][4][1]),
                         "sets": len({r[0] for r in index}), "concepts": len({r[2] for r in index})}  # fmt: skip
    (data / "receipt.json").write_text(json.dumps(receipt, indent=2))
    print(json.dumps(receipt, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
