"""Writes `manifest.csv` into the folders of those sets that come without a CoOp split: what the plans beside name.

    python examples/plans/prepare.py DATA                    # whichever of them are there
    python examples/plans/prepare.py DATA fgvc_aircraft      # one

DATA is laid out as DATASETS.md of CoOp (https://github.com/KaiyangZhou/CoOp) says; the four sets of the cross-domain
plans as the CD-FSL benchmark (https://github.com/IBM/cdfsl-benchmark) has them. Rows are in the order of the classes,
whose first half is base; paths start at the manifest's folder. Only names are read, no image is opened.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Row = tuple[Path, str, str]  # image, class, train, val or test
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
# CLIP's names, which CoOp's classnames.txt copies, call two folders "missile" and two "sunglasses"; there, images of
# the second of each can never be right. These are WordNet's own first words for one of each.
TWINS = {"n04008634": "projectile", "n04355933": "sunglass"}
# as CoOp's split of EuroSAT spells them
LAND = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}
LESIONS = {
    "MEL": "melanoma",
    "NV": "melanocytic nevus",
    "BCC": "basal cell carcinoma",
    "AKIEC": "actinic keratosis",
    "BKL": "benign keratosis",
    "DF": "dermatofibroma",
    "VASC": "vascular lesion",
}
# the seven that the CD-FSL benchmark takes, of X-rays with one finding
FINDINGS = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumothorax")


def images_in(folder: Path) -> list[Path]:
    """The images of a class folder, by name."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES and path.name[0] != ".")
    if not found:
        raise SystemExit(f"error: {folder} holds no images.")
    return found


def lines_of(file: Path) -> list[str]:
    """Its lines, empty ones aside."""
    return [line for line in file.read_text("utf-8").splitlines() if line.strip()]


def folders_in(folder: Path) -> list[Path]:
    """By name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


# ---- the sets of CoOp


def aircraft(root: Path) -> Iterator[Row]:
    """variants.txt has the order; images_variant_train.txt: `<number> <variant>` a line."""
    place = {name.strip(): i for i, name in enumerate(lines_of(root / "variants.txt"))}
    for part in ("train", "val", "test"):
        listed = [line.strip().split(" ", 1) for line in lines_of(root / f"images_variant_{part}.txt")]
        for image, variant in sorted(listed, key=lambda row: place[row[1]]):  # stable: within a class as listed
            yield root / "images" / f"{image}.jpg", variant, part


def class_names(root: Path) -> dict[str, str]:
    """Of ImageNet's folders, by classnames.txt: `n01440764 tench` a line. No two have one name."""
    names = dict(line.strip().split(" ", 1) for line in lines_of(root / "classnames.txt"))
    shared = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {wnid: TWINS.get(wnid, name) if name in shared else name for wnid, name in names.items()}


def imagenet(root: Path) -> Iterator[Row]:
    """images/{train,val}/<wnid>/: the validation images are the test, as in CoOp."""
    names = class_names(root)
    for part, folder in (("train", "train"), ("test", "val")):
        for one in folders_in(root / "images" / folder):
            yield from ((path, names[one.name], part) for path in images_in(one))


def test_folders(inside: str) -> Callable[[Path], Iterator[Row]]:
    """A set of <wnid> folders, all of it for the test."""

    def rows(root: Path) -> Iterator[Row]:
        names = class_names(root)
        for one in folders_in(root / inside):
            yield from ((path, names[one.name], "test") for path in images_in(one))

    return rows


def imagenet_v2(root: Path) -> Iterator[Row]:
    """Folders are called 0 to 999, which are the lines of classnames.txt."""
    for number, name in enumerate(class_names(root).values()):
        folder = root / "imagenetv2-matched-frequency-format-val" / str(number)
        yield from ((path, name, "test") for path in images_in(folder))


# ---- the sets of the CD-FSL benchmark: episodes draw from all images, whatever part they are of


def isic(root: Path) -> Iterator[Row]:
    """ISIC2018_Task3_Training_GroundTruth.csv: image, then 1.0 in the column of its class."""
    truth, images = root / "ISIC2018_Task3_Training_GroundTruth", root / "ISIC2018_Task3_Training_Input"
    with (truth / f"{truth.name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for column, name in LESIONS.items():
        yield from ((images / f"{row['image']}.jpg", name, "train") for row in rows if float(row[column]))


def chest_x(root: Path) -> Iterator[Row]:
    """Data_Entry_2017.csv: `Image Index`, and `Finding Labels` between bars."""
    with (root / "Data_Entry_2017.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for finding in FINDINGS:
        found = [row["Image Index"] for row in rows if row["Finding Labels"] == finding]
        yield from ((root / "images" / name, finding, "train") for name in found)


def land_use(root: Path) -> Iterator[Row]:
    """2750/<class>/, under the names that CoOp gives them."""
    for folder, name in LAND.items():
        if (root / "2750" / folder).is_dir():
            yield from ((path, name, "train") for path in images_in(root / "2750" / folder))


SETS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "fgvc_aircraft": aircraft,
    "imagenet": imagenet,
    "imagenetv2": imagenet_v2,
    "imagenet-sketch": test_folders("images"),
    "imagenet-adversarial": test_folders("imagenet-a"),
    "imagenet-rendition": test_folders("imagenet-r"),
    "ISIC": isic,
    "chestX": chest_x,
    "EuroSAT": land_use,
}


def prepare(root: Path, name: str) -> int:
    """Write the manifest of one set; how many images it has."""
    manifest = root / name / "manifest.csv"
    try:
        rows = [(path.relative_to(root / name).as_posix(), *row) for path, *row in SETS[name](root / name)]
    except OSError as error:
        raise SystemExit(f"error: {error.filename} cannot be read: {error.strerror}.") from None
    except KeyError as error:
        raise SystemExit(f"error: {root / name} has {error} among its images, but not in its list of names.") from None
    part = manifest.with_name(".manifest.csv.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "label", "split"))
        writer.writerows(rows)
    part.replace(manifest)
    return len(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("root", type=Path, help="the folder that holds all sets")
    parser.add_argument("sets", nargs="*", help=f"folders in it (default: those that are there): {', '.join(SETS)}")
    given = parser.parse_args()
    if unknown := [name for name in given.sets if name not in SETS]:
        parser.error(f"there is no set {unknown[0]!r}: choose from {', '.join(SETS)}")
    found = given.sets or [name for name in SETS if (given.root / name).is_dir()]
    if not found:
        sys.exit(f"error: {given.root} holds none of {', '.join(SETS)}.")
    for name in found:
        print(f"{given.root / name / 'manifest.csv'}: {prepare(given.root, name)} images")


if __name__ == "__main__":
    main()
