"""Stand-ins with the layout of the sets that examples/plans name: few classes, tiny pictures, lists of real form."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from conftest import picture

# folder, split, where the images are, a class folder or "" for one folder of all, names in the order of their numbers
SPLITS = {
    "Caltech101": ("caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories", True,
                   ["face", "leopard", "motorbike", "accordion", "airplane"]),
    "OxfordPets": ("oxford_pets", "split_zhou_OxfordPets.json", "images", False,
                   ["abyssinian", "american_bulldog", "basset_hound", "beagle"]),
    "StanfordCars": ("stanford_cars", "split_zhou_StanfordCars.json", "", False,
                     ["2000 AM General Hummer SUV", "2012 Acura RL Sedan", "2012 BMW M3", "2012 FIAT 500 Abarth"]),
    "Flowers102": ("oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg", False,
                   ["pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold"]),
    "Food101": ("food-101", "split_zhou_Food101.json", "images", True,
                ["apple_pie", "baby_back_ribs", "baklava", "beef_carpaccio"]),
    "SUN397": ("sun397", "split_zhou_SUN397.json", "SUN397", True,
               ["abbey", "airplane_cabin", "indoor apse", "outdoor church"]),
    "DTD": ("dtd", "split_zhou_DescribableTextures.json", "images", True, ["banded", "blotchy", "braided", "bubbly"]),
    "EuroSAT": ("eurosat", "split_zhou_EuroSAT.json", "2750", True,
                ["Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road"]),
    "UCF101": ("ucf101", "split_zhou_UCF101.json", "UCF-101-midframes", True,
               ["Apply_Eye_Makeup", "Apply_Lipstick", "Archery", "Baby_Crawling"]),
}  # fmt: skip
VARIANTS = ("707-320", "A300B4", "F/A-18", "MD-11", "Model B200")
# wnid → name, as in CoOp's classnames.txt, two of one name among them
WNIDS = {"n01440764": "tench", "n01443537": "goldfish", "n03773504": "missile", "n04008634": "missile"}
COUNTS = {"train": 4, "val": 1, "test": 3}  # of each class
EPISODE = 20  # of each class of the cross-domain sets: 15 queries and 5 shots


def draw(root: Path, files: Iterable[str]) -> None:
    """Pictures below the root, each of its own, by its name."""
    for name in files:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(zlib.crc32(name.encode()), (20, 18)).save(file)


def split_set(root: Path, name: str) -> None:
    """A set with a CoOp split, in which the numbers of the classes are not the order of their first appearance."""
    folder, split, inside, in_folders, names = SPLITS[name]
    lists: dict[str, list[tuple[str, int, str]]] = {}
    for part, count in COUNTS.items():
        lists[part] = []
        for k in range(count):
            for number in reversed(range(len(names))):
                file = f"{number}_{part}_{k}.jpg"
                path = f"{names[number].replace(' ', '')}/{file}" if in_folders else file
                lists[part].append((path if inside else f"cars_{part}/{path}", number, names[number]))
    draw(root, (f"{folder}/{inside or '.'}/{path}" for rows in lists.values() for path, *_ in rows))
    (root / folder / split).write_text(json.dumps(lists), "utf-8")


def aircraft(root: Path) -> None:
    """images/ and the lists of FGVCAircraft."""
    place = root / "fgvc_aircraft"
    place.mkdir()
    (place / "variants.txt").write_text("".join(f"{name}\n" for name in VARIANTS), "utf-8")
    for number, (part, count) in enumerate(COUNTS.items()):
        listed = [(f"{number}{k}{c}", name) for k in range(count) for c, name in reversed(list(enumerate(VARIANTS)))]
        draw(place, (f"images/{image}.jpg" for image, _ in listed))
        text = "".join(f"{image} {name}\n" for image, name in listed)
        (place / f"images_variant_{part}.txt").write_text(text, "utf-8")


def imagenet(root: Path) -> None:
    """ImageNet and its four variants, those of 200 classes with three of the four here."""
    names = "".join(f"{wnid} {name}\n" for wnid, name in WNIDS.items())
    numbered = [str(number) for number in range(len(WNIDS))]
    folders = {
        "imagenet/images/train": (list(WNIDS), 4),
        "imagenet/images/val": (list(WNIDS), 3),
        "imagenetv2/imagenetv2-matched-frequency-format-val": (numbered, 2),
        "imagenet-sketch/images": (list(WNIDS), 2),
        "imagenet-adversarial/imagenet-a": (list(WNIDS)[:3], 2),
        "imagenet-rendition/imagenet-r": (list(WNIDS)[1:], 2),
    }
    for inside, (classes, count) in folders.items():
        draw(root, (f"{inside}/{name}/{name}_{k}.JPEG" for name in classes for k in range(count)))
        (root / inside.split("/")[0] / "classnames.txt").write_text(names, "utf-8")
    (root / "imagenet-rendition" / "imagenet-r" / "README.txt").write_text("renditions\n", "utf-8")


def _table(file: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as text:
        csv.writer(text).writerows([columns, *rows])


def cross_domain(root: Path) -> None:
    """ISIC, EuroSAT, CropDiseases and ChestX as the CD-FSL benchmark has them, five classes of each."""
    lesions = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    truth = "ISIC2018_Task3_Training_GroundTruth"
    of_class = [(f"ISIC_{c}{k:02d}", c) for k in range(EPISODE) for c in range(5)]
    rows = [[image, *(float(c == column) for column in range(7))] for image, c in of_class]
    _table(root / "ISIC" / truth / f"{truth}.csv", ("image", *lesions), rows)
    draw(root / "ISIC", (f"ISIC2018_Task3_Training_Input/{image}.jpg" for image, _ in of_class))
    findings = ("Atelectasis", "Effusion", "Mass", "Nodule", "Pneumothorax", "No Finding", "Mass|Nodule", "Pneumonia")
    images = [(f"{c}_{k:03d}.png", finding) for c, finding in enumerate(findings) for k in range(EPISODE)]
    _table(root / "chestX" / "Data_Entry_2017.csv", ("Image Index", "Finding Labels", "Patient ID"),
           [(image, finding, 1) for image, finding in images])  # fmt: skip
    draw(root / "chestX", (f"images/{image}" for image, _ in images))
    land = ("AnnualCrop", "Forest", "Highway", "River", "SeaLake")
    crops = ("Apple___Apple_scab", "Apple___healthy", "Corn_(maize)___Common_rust_", "Grape___rot", "Tomato___mold")
    for place, names in (("EuroSAT/2750", land), ("CropDiseases/dataset/train", crops)):
        draw(root, (f"{place}/{name}/{k}.jpg" for name in names for k in range(EPISODE)))


def eleven(root: Path) -> Path:
    """The sets of CoOp with ImageNet's variants; manifests are not written yet."""
    for name in SPLITS:
        split_set(root, name)
    aircraft(root)
    imagenet(root)
    return root
