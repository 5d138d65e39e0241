"""`clipfit predict`: a row an input, in order, whatever the input is; probabilities, candidates, zero-shot."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Cli, Result, picture
from PIL import Image
from safetensors import safe_open

import clipfit
from clipfit import DataError, EvaluateConfig, evaluate
from clipfit.data.stream import Inputs
from clipfit.measure import evaluations


def rows_of(result: Result) -> list[dict]:
    assert result.code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def images(root: Path, count: int = 5) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        picture(k).save(root / f"{k}.png")
    return root


# ---- rows


def test_a_row_an_input_in_order(cli: Cli, split_run, tmp_path):
    """Files, a folder with folders, a glob, a list, an archive and stdin; what `evaluate` measures is what rows say."""
    images(tmp_path / "in" / "b", 2), images(tmp_path / "in", 2)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "list.csv").write_text("path,other\nin/1.png,x\nin/0.png,y\n")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(tmp_path / "in/1.png", "000.png")
        archive.add(tmp_path / "in/notes.txt", "000.txt")
        archive.add(tmp_path / "in/0.png", "deep/001.png")
    rows = rows_of(cli("predict", split_run, "in/0.png", "in", "in/b/*.png", "list.csv", "shard.tar", "--top", 2))
    assert [row["path"] for row in rows] == [
        "in/0.png", "in/0.png", "in/1.png", "in/b/0.png", "in/b/1.png", "in/b/0.png", "in/b/1.png", "in/1.png",
        "in/0.png", "shard.tar/000.png", "shard.tar/deep/001.png",
    ]  # fmt: skip
    assert list(rows[0]) == ["path", "label", "probability", "top", "abstained", "error", "calibrated"]
    picture_of = [0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0]
    for number in (0, 1):
        assert len({row["probability"] for row, of in zip(rows, picture_of, strict=True) if of == number}) == 1
    for row in rows:
        assert (row["error"], row["calibrated"], row["abstained"]) == (None, False, False)
        first, second = row["top"]
        assert (row["label"], row["probability"]) == (first["label"], first["probability"])
        assert first["probability"] >= second["probability"]


def test_rows_say_what_evaluate_measured(cli: Cli, split, split_run, tmp_path):
    """The same pixels, texts and weights: logits of the stored evaluation, as probabilities, at two ratios."""
    run = shutil.copytree(split_run, tmp_path / "run")
    kept = evaluate(EvaluateConfig(run, alphas=(0.5, 1.0), data=split / "test")).kept
    for alpha in (0.5, 1.0):
        table = evaluations.read(kept).tables(alpha)["union"]
        found, names = [split / name for name in table.ids], table.candidates
        (tmp_path / "names.txt").write_text("\n".join(names))
        rows = rows_of(cli("predict", run, *found, "--alpha", alpha, "--classes", tmp_path / "names.txt"))
        expected = table.logits.softmax(1)
        assert [row["label"] for row in rows] == [names[i] for i in expected.argmax(1)]
        assert [row["probability"] for row in rows] == pytest.approx(expected.max(1).values.tolist(), abs=1e-5)


def test_paths_on_stdin(split_run, tmp_path, monkeypatch):
    images(tmp_path / "in", 2)
    odd = tmp_path / "in" / "a\nb.png"
    shutil.copy(tmp_path / "in/0.png", odd)
    for text, names in (
        (b"in/1.png\r\n\nin/0.png", ["in/1.png", "in/0.png"]),
        (b"in/1.png\0in/a\nb.png\0", ["in/1.png", "in/a\nb.png"]),
        (b"", []),
    ):
        found = list(Inputs([Path("-")], image_root=tmp_path, stdin=io.BytesIO(text)))
        assert [item.name for item in found] == names
        assert all(item.path.is_file() for item in found)


def test_lists_by_their_column(cli: Cli, split_run, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images(tmp_path / "in", 2)
    (tmp_path / "l.csv").write_text("id,file\n1,in/1.png\n2,\n3,in/0.png\n")
    (tmp_path / "l.jsonl").write_text('{"file": "in/1.png"}\n{"file": 3}\nnot JSON\n{"file": "in/0.png"}\n')
    parquet.write_table(pyarrow.table({"file": ["in/1.png", None, "in/0.png"]}), tmp_path / "l.parquet")
    rows = rows_of(cli("predict", split_run, "l.csv", "l.jsonl", "l.parquet", "--column", "file"))
    assert [row["path"] for row in rows] == [
        "in/1.png", "l.csv:3", "in/0.png", "in/1.png", "l.jsonl:2", "l.jsonl:3", "in/0.png", "in/1.png", "l.parquet:2",
        "in/0.png",
    ]  # fmt: skip
    assert [row["path"] for row in rows if row["error"]] == ["l.csv:3", "l.jsonl:2", "l.jsonl:3", "l.parquet:2"]
    cli("predict", split_run, "l.csv").fails(3, "no column 'path'", "'id', 'file'", "--column")
    cli("predict", split_run, "gone.csv").fails(3, "gone.csv", "does not exist")


def test_a_list_of_which_no_image_is_found_says_where_its_paths_start(cli: Cli, split_run, tmp_path):
    """As predict's own rows, which name images as they were given."""
    images(tmp_path / "in", 1)
    words = "paths in a list start at its folder, or at --image-root"
    assert cli("predict", split_run, "in", "--output", "out/rows.csv").code == 0
    again = cli("predict", split_run, "out/rows.csv")
    assert (again.code, words in again.stderr) == (0, True)
    there = cli("predict", split_run, "out/rows.csv", "--image-root", tmp_path)
    assert (rows_of(there)[0]["error"], words in there.stderr) == (None, False)


# ---- what is wrong with an input is its row


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data do not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * min((width + 1) * height, 10**5)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def test_every_hostile_file_is_one_row(cli: Cli, split_run, tmp_path):
    folder = images(tmp_path / "in", 1)
    os.mkfifo(folder / "fifo.jpg")
    (folder / "bomb.png").write_bytes(png_of(30_000, 30_000))
    (folder / "long.png").write_bytes(png_of(1, 500))
    (folder / "folder.jpg").mkdir()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "\x1b[31mred\n.png").write_bytes(b"")
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write((folder / "0.png").read_bytes()[:40])
    result = cli("predict", split_run, "in", "in/none.jpg", "in/no*.webp", "x.tar")
    rows = rows_of(result)
    assert [row["path"] for row in rows] == [
        "in/\x1b[31mred\n.png", "in/0.png", "in/bomb.png", "in/empty.png", "in/fifo.jpg", "in/folder.jpg",
        "in/gone.png", "in/long.png", "in/text.jpg", "in/\\xff.png", "in/none.jpg", "in/no*.webp", "x.tar",
    ]  # fmt: skip
    assert [row["path"] for row in rows if not row["error"]] == ["in/0.png", "in/long.png"]
    for row in rows:
        if row["error"]:
            assert (row["label"], row["probability"], row["top"], row["abstained"]) == (None, None, [], False)
    result.stdout.encode("ascii")
    assert "13 rows; 11 with errors" in result.stderr
    assert "\x1b[31m" not in result.stderr


def test_two_stars_go_into_no_links_to_folders_and_name_a_file_once(cli: Cli, split_run, tmp_path):
    images(tmp_path / "in/deep", 2)
    for name in ("up", "again", ".hidden"):
        (tmp_path / "in/deep" / name).symlink_to("..")
    images(tmp_path / "in/.kept", 1)
    expected = ["in/deep/0.png", "in/deep/1.png"]
    for pattern in ("in/**/*.png", "in/**", "in/**/[01].png", "**/deep/?.png"):
        assert [row["path"] for row in rows_of(cli("predict", split_run, pattern))] == expected
    assert len(rows_of(cli("predict", split_run, str(tmp_path / "in/**/*.png")))) == 2
    # folders that are meant are gone into, and so are names with a dot; two stars in a name are one
    assert [row["path"] for row in rows_of(cli("predict", split_run, "**/deep"))] == expected
    assert [row["path"] for row in rows_of(cli("predict", split_run, "in/**/.kept/*.png"))] == ["in/.kept/0.png"]
    assert [row["path"] for row in rows_of(cli("predict", split_run, "in/**/**.png"))] == expected


def test_inputs_after_an_archive_of_three_bytes_are_read(cli: Cli, split_run, tmp_path):
    images(tmp_path / "in", 1)
    (tmp_path / "torn.tar.gz").write_bytes(b"\x1f\x8b\x08")
    rows = rows_of(cli("predict", split_run, "torn.tar.gz", "in"))
    assert [row["path"] for row in rows] == ["torn.tar.gz", "in/0.png"]
    assert "is damaged" in rows[0]["error"]


def test_a_picture_that_would_fill_the_memory_when_resized(split_run):
    model = clipfit.load(split_run)
    for given in (np.zeros((2, 1001), np.uint8), Image.new("L", (2, 1001))):
        with pytest.raises(
            DataError, match=r"given cannot be taken \((1001 x 2|2 x 1001) pixels are too long to resize"
        ):
            model.view(given)
    assert model.view(np.zeros((2, 1000), np.uint8)).shape == (3, *model.clip.image_size)


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_what_may_not_be_read_is_a_row(split_run):
    folder = images(Path("/tmp") / f"clipfit-{os.getpid()}", 2)  # where another user may come by
    try:
        (folder / "1.png").chmod(0)
        (folder / "shut").mkdir(mode=0)
        model = clipfit.load(split_run)
        os.seteuid(65534)
        try:
            found = list(Inputs([folder]))
            assert [item.error is None for item in found] == [True, True, False]
            assert model.view(found[0].path).shape == (3, 32, 32)
            with pytest.raises(DataError, match="Permission denied"):
                model.view(found[1].path)
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(folder)


def test_damaged_archives_end_with_a_row(tmp_path):
    images(tmp_path / "in", 3)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "in/0.png", "0.png")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.add(tmp_path / "in/1.png", "1.png")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "torn.tar").write_bytes(data[: len(data) - 11_000])
    (tmp_path / "none.tar").write_bytes(b"no archive at all")
    whole = [(item.name.split("/")[-1], item.error is None) for item in Inputs([tmp_path / "a.tar"])]
    assert whole == [("0.png", True), ("link.png", False), ("1.png", True)]
    torn = list(Inputs([tmp_path / "torn.tar"]))
    assert torn[-1].name == str(tmp_path / "torn.tar")
    assert "damaged" in torn[-1].error
    (none,) = Inputs([tmp_path / "none.tar"])
    assert "damaged" in none.error


# ---- which model


def test_the_newest_run_an_export_and_zero_shot(cli: Cli, split, models, tmp_path):
    images(tmp_path / "in", 2)
    assert cli("adapt", split, "--model", models["vit"]).code == 0
    assert cli("export", "runs/animals-cite").code == 0
    (tmp_path / "names.txt").write_text("ant\nelk\n")
    newest, named = rows_of(cli("predict", "in")), rows_of(cli("predict", "runs/animals-cite", "in"))
    exported = rows_of(cli("predict", "exports/animals-cite-open_clip-0.5", "in"))
    assert newest == named == exported
    zero = rows_of(cli("predict", "--model", models["vit"], "--classes", "names.txt", "in"))
    at_zero = rows_of(cli("predict", "runs/animals-cite", "in", "--alpha", 0, "--classes", "names.txt"))
    assert zero == at_zero
    assert {one["label"] for row in zero for one in row["top"]} == {"ant", "elk"}
    added = rows_of(cli("predict", "in", "--add-classes", "names.txt"))
    assert {one["label"] for one in added[0]["top"]} == {"bee", "cow", "dog", "ant", "elk"}
    cli("predict", "--model", models["vit"], "in").fails(2, "no classes of its own", "--classes")
    cli("predict", "exports/animals-cite-open_clip-0.5", "in", "--alpha", 1).fails(2, "no other ratio")
    cli("predict", "runs/animals-cite").fails(2, "give images after it")
    cli("predict", "runs/typo", "in").fails(2, "there is no run", "runs/typo")


def test_wrong_usage_answers_at_once(cli: Cli, split_run, tmp_path):
    images(tmp_path / "in", 1)
    cli("predict").fails(2, "INPUTS")
    cli("predict", "in").fails(2, "no run is named")
    cli("predict", split_run, "in", "--resume").fails(2, "--resume needs --output")
    cli("predict", split_run, "in", "--output", "x.txt").fails(2, "x.txt", ".jsonl")
    cli("predict", split_run, "in", "--classes", "a", "--add-classes", "b").fails(2, "give one")
    cli("predict", split_run, "in", "--output", "a.npy.csv", "--html", "a.npy.csv").fails(2, "different files")
    cli("predict", split_run, "in/0.png", "--output", "in/0.csv", "--template", "no braces").fails(2, "template")
    cli("predict", split_run, "list.csv", "--output", "list.csv").fails(3, "does not exist")


def test_abstention_and_a_summary(cli: Cli, split_run, tmp_path):
    images(tmp_path / "in", 4)
    all_rows = rows_of(cli("predict", split_run, "in"))
    _, second, third, _ = sorted(row["probability"] for row in all_rows)
    least = (second + third) / 2
    summed = cli("predict", split_run, "in", "--abstain-below", least, "--output", "out.jsonl", "--json").document
    assert (summed["rows"], summed["abstained"], summed["errors"], summed["classes"]) == (4, 2, 0, 3)
    for row, before in zip(map(json.loads, (tmp_path / "out.jsonl").open()), all_rows, strict=True):
        abstained = before["probability"] < least
        assert row == {**before, "abstained": abstained, "label": None if abstained else before["label"]}
    assert "--output" in cli("predict", split_run, "in", "--json").document["error"]["message"]


@pytest.mark.parametrize("classes", ["dog cow bee", "bee cow dog elk"])
def test_probabilities_are_calibrated_where_the_temperature_holds(cli: Cli, split_run, tmp_path, classes):
    run = shutil.copytree(split_run, tmp_path / "run")
    images(tmp_path / "in", 2)
    (tmp_path / "names.txt").write_text("\n".join(classes.split()))
    plain = clipfit.load(run).logits(tmp_path / "in/0.png", classes.split())
    document = {"value": 4.0, "alpha": 0.5, "classes": ["bee", "cow", "dog"], "template": "a photo of a {}"}
    (run / "folds.json").write_text(json.dumps({"temperature": document}))
    for options, holds in (((), True), (("--alpha", 1), False), (("--template", "a {}"), False)):
        row = rows_of(cli("predict", run, "in", "--classes", "names.txt", *options))[0]
        assert row["calibrated"] == (holds and len(classes.split()) == 3)
        if not options:
            expected = (plain / (4 if row["calibrated"] else 1)).softmax(1).max().item()
            assert row["probability"] == pytest.approx(expected, rel=1e-5)
    (run / "folds.json").write_text(json.dumps({"temperature": {**document, "value": 0}}))
    cli("predict", run, "in").fails(4, "folds.json")


# ---- other files


def test_csv_and_parquet_say_what_the_lines_say(cli: Cli, split_run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    images(tmp_path / "in", 3)
    (tmp_path / 'in/a,\n"b.png').write_bytes(b"")
    lines = rows_of(cli("predict", split_run, "in", "--abstain-below", 0.5))
    for name in ("out.csv", "out.parquet"):
        assert cli("predict", split_run, "in", "--abstain-below", 0.5, "--output", name).code == 0
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == [
        {key: row[key] for key in ("path", "label", "probability", "top", "abstained", "calibrated", "error")}
        for row in lines
    ]
    with open(tmp_path / "out.csv", newline="") as file:
        table = list(csv.DictReader(file))
    texts = [{key: "" if value is None else value for key, value in row.items()} for row in lines]
    shown = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in texts]
    assert [dict(sorted(row.items())) for row in table] == [dict(sorted(row.items())) for row in shown]


def test_without_pyarrow_parquet_says_what_to_install(cli: Cli, split_run, tmp_path, monkeypatch):
    images(tmp_path / "in", 1)
    (tmp_path / "l.parquet").write_bytes(b"")
    monkeypatch.setattr("clipfit.data.lists.find_spec", lambda name: None)
    cli("predict", split_run, "in", "--output", "o.parquet").fails(2, "clipfit[parquet]")
    cli("predict", split_run, "l.parquet").fails(2, "clipfit[parquet]")


def test_embeddings_are_a_vector_a_row(cli: Cli, split_run, tmp_path):
    images(tmp_path / "in", 3)
    (tmp_path / "in/1.png").write_bytes(b"")
    assert cli("predict", split_run, "in", "--embeddings", "e.npy").code == 0
    assert cli("predict", split_run, "in", "--embeddings", "e.safetensors", "--output", "o.jsonl").code == 0
    found = np.load(tmp_path / "e.npy")
    with safe_open(tmp_path / "e.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("embeddings"), found)
    expected = clipfit.load(split_run).embed_images([tmp_path / "in/0.png", tmp_path / "in/2.png"])
    torch.testing.assert_close(torch.from_numpy(found[[0, 2]]), expected)
    assert np.isnan(found[1]).all()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") and path.suffix != ".lock"]
    cli("predict", split_run, "in", "--embeddings", "e.npy").fails(2, "e.npy exists already", "--overwrite")


def test_evaluate_measures_zero_shot_clip(cli: Cli, split, split_run, models, tmp_path):
    """As the run does at α = 0; without a run there is nothing held out to speak of, and no new classes but listed."""
    (tmp_path / "new.txt").write_text("Ant Lion\nelk\n")
    found = cli("evaluate", "--model", models["vit"], "--data", split / "test", "--new-classes", "new.txt", "--json")
    of_run = cli("evaluate", split_run, "--data", split / "test", "--alpha", 0, "--json").document["alphas"][0]
    document = found.document
    assert (document["run"], document["method"], document["held_out"]) == (None, "zero-shot", True)
    (row,) = document["alphas"]
    for part, n in (("base", 5), ("new", 4), ("union", 9)):
        assert row[part]["n"] == n
    assert row["new"]["accuracy"] == of_run["new"]["accuracy"]
    alone = cli("evaluate", "--model", models["vit"], "--data", split, "--json").document
    assert (sorted(alone["base_classes"]), alone["new_classes"]) == (["Ant Lion", "cow", "dog", "elk"], [])
    cli("evaluate", "--model", models["vit"]).fails(2, "--data")
    cli("evaluate", split_run, "--model", models["vit"], "--data", split).fails(2, "zero-shot")
    cli("evaluate", "--model", models["vit"], "--data", split, "--alpha", 1).fails(2, "alpha")


def test_adapt_says_where_zero_shot_is_near_chance_or_near_perfect(cli: Cli, flat, models, tmp_path):
    assert "near chance" in cli("adapt", flat, "--model", models["vit"], "--epochs", 1).stderr


def test_a_closed_pipe_ends_quietly(cli: Cli, split_run, tmp_path, monkeypatch):
    images(tmp_path / "in", 1)

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("clipfit.cli.predict.sys", SimpleNamespace(stdout=Closed()))
    result = cli("predict", split_run, "in")
    assert (result.code, result.stdout) == (0, "")
    assert "error" not in result.stderr
