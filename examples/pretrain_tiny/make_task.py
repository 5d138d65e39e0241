"""Build the example task and the tuning tasks of tasks.json from held-out icon sets:

    python make_task.py DATA [--sheets DIR]      (DATA: what prepare.py wrote; needs node, as render.mjs does)

Each task folder gets train/<class>/ (8 pictures of every base class), test/<class>/ (base and new classes),
new_classes.txt and ATTRIBUTION.md; pictures are named <set>--<icon>.png. --sheets also writes a contact sheet per task.

A drawing (the variants of one icon in one family of sets, and whatever looks nearly the same) is in train or in test,
never in both. Which drawings go where is drawn with a fixed seed: the same inputs give the same bytes.
"""

import argparse
import collections
import json
import random
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from prepare import HERE, MIN_SETS, SAME_DRAWING, thumbnails

ROOT = HERE.parent.parent
SHOTS, TEST_MAX = 8, 16
PER_DRAWING = 3  # pictures of one drawing at most
LOOKS_ALIKE = 0.93  # correlation above which two icons count as one drawing; well below SAME_DRAWING
PLAIN_RGB = {"examples/shots"}  # opened with other tools too: some resize the numbers of a palette (open_clip)
SPARE = {"icon-park-outline", "meteocons"}  # icon-park in black; pictures of weather only
Icon = tuple[str, str]  # set, name


def family(prefix: str) -> str:
    return re.sub(r"^(icon-park|fluent-emoji)-.*", r"\1", prefix)


def wanted(prefix: str, name: str) -> bool:
    """Not the fourth to sixth weight of a Phosphor icon, nor a set left out above."""
    return prefix not in SPARE and (prefix != "ph" or name.endswith(("-light", "-fill", "-duotone")))


class Held:
    """The held-out icons by concept, with their thumbnails."""

    def __init__(self, folder: Path, spec: dict):
        self.rows = json.loads((folder / "index.json").read_text())
        self.mono, self.colour = (np.load(folder / f"{k}.npy", mmap_mode="c") for k in ("mono", "colour"))
        allowed = {s for g in json.loads((HERE / "sets.json").read_text())["held_out"].values() for s in g}
        assert {r[0] for r in self.rows} <= allowed
        self.spec, self.by_concept = spec, collections.defaultdict(list)
        self.by_last_word = collections.defaultdict(list)  # of a set and an icon's name: one set draws many skulls
        self.taken: set[int] = set()  # by an earlier task
        for i, (prefix, name, concept) in enumerate(self.rows):
            if wanted(prefix, name) and not any(fnmatch(f"{prefix}--{name}", p) for p in spec["not the class"]):
                self.by_concept[concept].append(i)
                self.by_last_word[prefix, name.split("-")[-1].removesuffix("s")].append(i)

    def hashes(self, at: list[int]) -> torch.Tensor:
        n = len(self.mono)
        return torch.cat([thumbnails(self.mono[i][None] if i < n else self.colour[i - n][None]) for i in at])

    def pictures(self, name: str, task: dict) -> list[int]:
        """Of icons with the class's name; in a task of one set, of icons whose name ends with it ("horned skull")."""
        if "set" not in task:
            return [i for concept in [name, *self.spec["also"].get(name, [])] for i in self.by_concept[concept]]
        return [i for word in [name, *task["also"].get(name, [])] for i in self.by_last_word[task["set"], word]]

    def drawings(self, name: str, task: dict, rng: random.Random) -> list[list[int]]:
        """The pictures of a class, grouped by drawing, in random order, without near repeats."""
        at = sorted({*self.pictures(name, task)} - self.taken, key=lambda i: self.rows[i])
        rng.shuffle(at)
        hashes = self.hashes(at)
        like = hashes @ hashes.T
        keep = [k for k in range(len(at)) if not any(like[k, j] > SAME_DRAWING for j in range(k))]
        groups: list[set[int]] = []
        for k in keep:
            mine = {k}
            for g in [g for g in groups if any(self.one_drawing(at[k], at[j], float(like[k, j])) for j in g)]:
                mine |= g
                groups.remove(g)
            groups.append(mine)
        return [[at[k] for k in sorted(g)][:PER_DRAWING] for g in groups]

    def one_drawing(self, i: int, j: int, correlation: float) -> bool:
        a, b = ((family(p), self.spec["same drawing"].get(c, c)) for p, _, c in (self.rows[i], self.rows[j]))
        return a == b or correlation > LOOKS_ALIKE


def one_of_each_first(drawings: list[list[int]]) -> list[int]:
    return [d[turn] for turn in range(PER_DRAWING) for d in drawings if turn < len(d)]


def split(name: str, drawings: list[list[int]], task: dict, rng: random.Random) -> tuple[list[int], list[int]]:
    """8 pictures of whole drawings to train on, the other drawings to test on."""
    at_least, at_most = bounds(task)
    for _ in range(1000):
        rng.shuffle(drawings)
        sizes = np.cumsum([len(d) for d in drawings])
        if SHOTS in sizes and sizes[-1] - SHOTS >= at_least:
            cut = int(np.flatnonzero(sizes == SHOTS)[0]) + 1
            return [i for d in drawings[:cut] for i in d], one_of_each_first(drawings[cut:])[:at_most]
    raise SystemExit(f"{name}: no split of {sizes[-1]} pictures in {len(drawings)} drawings")


def bounds(task: dict) -> tuple[int, int]:
    """Pictures of a class to test on: at least, at most."""
    return task["test at least"], task.get("test at most", TEST_MAX)


def choose(task: dict, held: Held) -> dict[str, dict[str, list[int]]]:
    chosen: dict[str, dict[str, list[int]]] = {"train": {}, "test": {}}
    for name in task["base"] + task["new"]:
        rng = random.Random(f"clipfit {name}")
        drawings = held.drawings(name, task, rng)
        if name in task["base"]:
            chosen["train"][name], chosen["test"][name] = split(name, drawings, task, rng)
        else:
            chosen["test"][name] = one_of_each_first(drawings)[: bounds(task)[1]]
        if len(chosen["test"][name]) < bounds(task)[0]:
            raise SystemExit(f"{name}: only {len(chosen['test'][name])} pictures to test on")
    train, test = ([i for at in chosen[part].values() for i in at] for part in ("train", "test"))
    assert len(set(train + test)) == len(train + test)
    held.taken.update(train, test)
    likeness = held.hashes(test) @ held.hashes(train).T
    assert likeness.max() <= SAME_DRAWING, "a test picture is nearly identical to a training picture"
    return chosen


def render(icons: list[Icon], side: int) -> list[Image.Image]:
    command = ["node", str(HERE / "render_task.mjs"), str(side)]
    out = subprocess.run(command, input=json.dumps(icons).encode(), stdout=subprocess.PIPE, check=True).stdout
    pictures = np.frombuffer(out, np.uint8).reshape(len(icons), side, side, 4)
    return [small(Image.fromarray(p[..., :3])) for p in pictures]


def small(picture: Image.Image) -> Image.Image:
    """With a palette: 16 greys, or 64 colours."""
    pixels = np.asarray(picture).astype(int)
    if np.ptp(pixels, axis=2).max() > 0:
        return picture.quantize(64, dither=Image.Dither.NONE)
    greys = Image.fromarray(((pixels[..., 0] + 8) // 17).astype(np.uint8), "P")
    greys.putpalette([v for g in range(16) for v in (17 * g,) * 3])
    return greys


def halftone(picture: Image.Image, period: int = 6) -> Image.Image:
    """As printed in black dots on a grid at 45°: a style that no icon set has."""
    darkness = 1 - np.asarray(picture.convert("L")) / 255
    y, x = np.mgrid[: picture.height, : picture.width]
    screen = (2 + np.cos(2 * np.pi * (x + y) / period) + np.cos(2 * np.pi * (x - y) / period)) / 4  # 0…1
    dots = 0.12 + 0.75 * darkness > screen  # white paper has small dots, black ink lets a little paper through
    return Image.fromarray(~dots).convert("1")


def attribution(icons: list[Icon], style: str) -> str:
    collections_ = json.loads((HERE / "node_modules/@iconify/json/collections.json").read_text())
    lines = ["# Where the pictures are from\n",
             "Every picture is an icon of one of these sets, drawn on white at a small size" + style + ", otherwise as",
             "published. A file `<set>--<icon>.png` is the icon `<icon>` of the set `<set>`.\n",
             "| set | name | author | licence (SPDX) | pictures |", "|---|---|---|---|---|"]  # fmt: skip
    count = collections.Counter(prefix for prefix, _ in icons)
    for prefix in sorted(count):
        info = collections_[prefix]
        author, licence = info["author"], info["license"]
        title = f"[{licence['title']}]({licence['url']})" if licence.get("url") else licence["title"]
        author_link = f"[{author['name']}]({author['url']})"
        lines.append(f"| `{prefix}` | {info['name']} | {author_link} | {title} ({licence['spdx']}) | {count[prefix]} |")
    if "game-icons" in count:
        lines.append("\nThe pictures `game-icons--*.png` are icons made by Lorc, Delapouite and the other contributors "
                     "that https://game-icons.net lists;\nthe page of an icon there names its author.")  # fmt: skip
    return "\n".join(lines) + "\n"


def write(
    folder: Path, task: dict, chosen: dict[str, dict[str, list[int]]], held: Held
) -> list[tuple[str, Image.Image]]:
    places = [(part, name, i) for part, classes in chosen.items() for name, at in classes.items() for i in at]
    icons = [(held.rows[i][0], held.rows[i][1]) for *_, i in places]
    pictures = render(icons, task["side"])
    if task.get("style") == "halftone":
        pictures = [halftone(picture) for picture in pictures]
    for part in ("train", "test"):
        shutil.rmtree(folder / part, ignore_errors=True)
    labelled = []
    for (part, name, _), (prefix, icon), picture in zip(places, icons, pictures, strict=True):
        path = folder / part / name.replace(" ", "_") / f"{prefix}--{icon}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = picture.convert("RGB") if folder.relative_to(ROOT).as_posix() in PLAIN_RGB else picture
        stored.save(path, optimize=True)
        labelled.append((f"{part} {name}", picture))
    (folder / "new_classes.txt").write_text("".join(name.replace(" ", "_") + "\n" for name in sorted(task["new"])))
    (folder / "ATTRIBUTION.md").write_text(attribution(icons, f" as a {task['style']}" if "style" in task else ""))
    return labelled


def contact_sheet(labelled: list[tuple[str, Image.Image]], path: Path, cell: int = 64) -> None:
    rows = collections.defaultdict(list)
    for label, picture in labelled:
        rows[label].append(picture.convert("RGB").resize((cell, cell)))
    longest = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (140 + cell * longest, cell * len(rows)), "white")
    for y, (label, pictures) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((4, y * cell + cell // 3), label, fill="black")
        for x, picture in enumerate(pictures):
            sheet.paste(picture, (140 + x * cell, y * cell))
    sheet.save(path)


def main(data: Path, sheets: Path | None) -> None:
    spec = json.loads((HERE / "tasks.json").read_text())
    held = Held(data / "held", spec)
    drawn_by = collections.defaultdict(set)
    for prefix, _, concept in json.loads((data / "train/index.json").read_text()):
        drawn_by[concept].add(prefix)
    own = [task for task in spec["tasks"].values() if "set" not in task and "like" not in task]
    everything = [name for task in own for name in task["base"] + task["new"]]
    assert len(set(everything)) == len(everything), "a class is in two tasks"
    unknown = [name for name in everything if len(drawn_by[name]) < MIN_SETS]
    assert not unknown, f"fewer than {MIN_SETS} training sets draw {unknown}"
    chosen_of: dict[str, dict[str, dict[str, list[int]]]] = {}
    for place, task in spec["tasks"].items():
        task = spec["tasks"][task["like"]] | task if "like" in task else task  # the same icons in another style
        chosen = chosen_of[place] = chosen_of[task["like"]] if "like" in task else choose(task, held)
        labelled = write(ROOT / place, task, chosen, held)
        size = sum(p.stat().st_size for p in (ROOT / place).rglob("*") if p.is_file())
        print(f"{place}: {len(labelled)} pictures, {size / 1e6:.2f} MB")
        if sheets:
            sheets.mkdir(parents=True, exist_ok=True)
            contact_sheet(labelled, sheets / f"{place.replace('/', '-')}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sheets", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    main(arguments.data, arguments.sheets)
