"""Small exports: one weight file in any type, and what a run changed in the pre-trained weights, for every α."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import make_model
from hubs import list_little
from safetensors.torch import load_file

from clipfit import AdaptConfig, ExportConfig, adapt, export
from clipfit.config.outputs import FormatOptions
from clipfit.errors import ClipfitError, ModelError, UsageError
from clipfit.formats import difference, encoding
from clipfit.formats.difference import DIFFERENCE, RESTORE, restore
from clipfit.formats.encoding import Encoding
from clipfit.formats.proof import BOUNDS, pictures_of
from clipfit.formats.safetensors import SafetensorsFile
from clipfit.formats.subject import subject_of
from clipfit.model.named import Additions
from clipfit.runs import files
from clipfit.runs.run import open_run


@pytest.fixture(scope="module")
def lora_run(split, models, tmp_path_factory):
    """A run of low-rank tuning on `split`; never written to."""
    output = tmp_path_factory.mktemp("lora") / "run"
    quick = {"recipe": {"epochs": 2, "batch_size": 4}, "lora": {"rank": 4}}
    return adapt(AdaptConfig(split, "finetune", models["vit"], output=output, tuning="lora", **quick)).run


@pytest.fixture(scope="module")
def exported(split_run, tmp_path_factory):
    """What is written of `split_run`, not proved; never written to."""
    folder = tmp_path_factory.mktemp("exported")
    made = difference.Difference()
    made.write(subject_of(open_run(split_run), 0.5, Additions(), made.name, FormatOptions()), folder)
    return folder


# --- one file


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_one_file_holds_the_model_in_any_type(split_run, tmp_path, dtype, stored):
    made = export(ExportConfig(split_run, format="safetensors", dtype=dtype, alpha=0.25, output=tmp_path / "out"))
    state, expected = load_file(made.output / "model.safetensors"), open_run(split_run).state(0.25)
    assert state.keys() == expected.keys()
    assert torch.equal(state.pop("logit_scale"), expected["logit_scale"])  # rounded, it would be wrong in every logit
    assert {str(t.dtype).removeprefix("torch.") for t in state.values()} == {stored}
    assert all(torch.equal(t, expected[name].to(t.dtype)) for name, t in state.items())
    assert made.proof.identical_pixels.largest_difference <= BOUNDS[dtype] * 100
    assert made.proof.identical_pixels.same_labels == 6


def test_a_file_that_is_not_what_was_written_is_refused(split_run, tmp_path):
    run, fmt = open_run(split_run), SafetensorsFile()
    subject = subject_of(run, 0.5, Additions(), fmt.name, FormatOptions())
    fmt.write(subject, tmp_path)
    file = tmp_path / "model.safetensors"
    state, about = files.read_tensors(file)
    other = {name: t + 1 if name == "token_embedding.weight" else t for name, t in state.items()}
    for found in ((other, about), (state, {**about, "alpha": 0.25})):
        files.write_tensors(file, *found)
        with pytest.raises(ClipfitError, match="holds another model than was written"):
            fmt.prove(subject, tmp_path, pictures_of(run, subject.model))


# --- a difference in few bytes


def low_rank(*shape: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(*shape[:-1], rank, generator=generator), torch.randn(rank, shape[-1], generator=generator)
    return 1e-3 * up @ down


def test_the_rank_is_found_where_there_is_one_and_nowhere_else():
    thirds = torch.cat([low_rank(64, 64, rank=4, seed=k) for k in range(3)])  # of rank 12 as one matrix
    plain, full = low_rank(64, 32, rank=4), torch.randn(192, 64, generator=torch.Generator().manual_seed(1))
    changed = {"thirds": thirds, "plain": plain, "full": full, "bias": torch.ones(64)}
    found = encoding.factors(changed, 4)
    assert set(found) == {"thirds", "plain"}
    assert [tuple(part.shape) for part in found["thirds"]] == [(3, 64, 4), (3, 4, 64)]
    for name in found:
        up, down = found[name]
        torch.testing.assert_close((up @ down).reshape(changed[name].shape), changed[name], atol=1e-8, rtol=1e-5)


def test_looking_for_the_rank_draws_no_number_of_anyone_else():
    before = torch.get_rng_state()
    encoding.factors({"plain": low_rank(64, 32, rank=4)}, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("dtype", "step"), [("int8", 1 / 254), ("fp16", 2**-11), ("fp32", 2**-22)])
def test_what_is_stored_is_within_half_a_step(dtype, step, low):
    before = {"a": torch.zeros(64, 32), "b": torch.zeros(5), "same": torch.ones(3)}
    after = {"a": low_rank(64, 32, rank=4), "b": torch.tensor([1e-9, 0.0, -2e-9, 5e-10, 0.0]), "same": torch.ones(3)}
    changed = encoding.changes(before, after)
    assert set(changed) == {"a", "b"}
    encoded = encoding.encode(changed, encoding.factors(changed, 4), Encoding(dtype, low))
    assert set(encoded.tensors) == ({"a.up", "a.down", "b"} if low else {"a", "b"})
    assert all(t.dtype == encoding.DTYPES[dtype] for t in encoded.tensors.values())
    for alpha in (0.0, 0.5, 1.0):
        restored = encoding.add(before, encoded, alpha)
        assert torch.equal(restored["same"], before["same"])
        for name, times in (("a", 20 if low else 1), ("b", 1)):  # a product sums 4 pairs of factors, each rounded
            bound = alpha * times * step * 1.01 * float(after[name].abs().max())
            assert float((restored[name] - alpha * after[name]).abs().max()) <= bound


def test_alpha_0_is_the_pretrained_model_to_the_bit():
    before = {"a": torch.tensor([-0.0, 1.0])}
    encoded = encoding.encode({"a": torch.ones(2)}, {}, Encoding("int8"))
    assert encoding.add(before, encoded, 0.0)["a"] is before["a"]


def test_models_of_two_architectures_have_no_difference():
    with pytest.raises(ModelError, match="not the same architecture"):
        encoding.changes({"a": torch.ones(1)}, {"b": torch.ones(1)})


# --- the export


@pytest.mark.parametrize(("kind", "share"), [("split_run", 0.30), ("lora_run", 0.05)])
def test_it_is_small_and_near_at_every_alpha(kind, share, request, tmp_path):
    run = open_run(request.getfixturevalue(kind))
    made = export(ExportConfig(run.path, format="difference", output=tmp_path / "out"))
    in_full = (run.path / "model.safetensors").stat().st_size
    assert (made.output / DIFFERENCE).stat().st_size < share * in_full
    document = json.loads((made.output / "proof.json").read_text())
    assert document["identical_pixels"]["largest_difference"] <= 1e-2
    assert document["further"]["α = 1"]["largest_difference"] <= 1e-2
    for alpha in (0.0, 0.3, 1.0):
        state = restore(made.output, alpha).state()
        for name, tensor in run.state(alpha).items():
            torch.testing.assert_close(state[name], tensor, atol=2e-5, rtol=0)
            assert alpha or torch.equal(state[name], tensor)
    assert torch.equal(restore(made.output).state()["visual.proj"], restore(made.output, 0.5).state()["visual.proj"])


def test_of_the_encodings_the_smallest_that_is_near_is_taken_and_all_are_shown(lora_run, tmp_path, monkeypatch):
    def encodings(folder: Path) -> list[dict]:
        return json.loads((folder / "proof.json").read_text())["encodings"]

    first = encodings(export(ExportConfig(lora_run, format="difference", output=tmp_path / "one")).output)
    assert {row["encoding"] for row in first} == {f"{low}{t}" for low in ("", "low rank, ") for t in encoding.DTYPES}
    near = [row for row in first if row["largest_difference"] <= difference.NEAR]
    assert first[0] == min(near, key=lambda row: row["bytes"])
    monkeypatch.setattr(difference, "NEAR", -1.0)
    folder = export(ExportConfig(lora_run, format="difference", output=tmp_path / "two")).output
    exact = encodings(folder)
    assert exact[0]["largest_difference"] == min(row["largest_difference"] for row in exact)
    card = (folder / "README.md").read_text("utf-8")
    rows = [line for line in card.splitlines() if line.startswith(tuple(f"| {row['encoding']} |" for row in exact))]
    assert [line.split(" | ")[0].strip("| ") for line in rows] == [row["encoding"] for row in exact]


def test_what_is_too_far_is_not_kept(split_run, tmp_path, monkeypatch):
    monkeypatch.setattr(difference, "BOUND", 1e-9)
    with pytest.raises(ClipfitError, match="reads another model"):
        export(ExportConfig(split_run, format="difference", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_bound_is_of_a_logit_and_not_of_a_cosine(split_run, exported, monkeypatch):
    """A hundredth of a logit is, at a scale of 100, a ten-thousandth of a cosine."""
    made, run = difference.Difference(), open_run(split_run)
    subject = subject_of(run, 0.5, Additions(), made.name, FormatOptions())
    pictures = pictures_of(run, subject.model)

    def differs() -> float:
        proof = made.prove(subject, exported, pictures)
        return max(proof.identical_pixels.largest_difference, proof.further["α = 1"].largest_difference)

    far = differs()
    assert float(subject.model.scale) > 10
    monkeypatch.setattr(difference, "BOUND", 1.1 * far)
    assert differs() == far
    monkeypatch.setattr(difference, "BOUND", 0.9 * far)
    with pytest.raises(ClipfitError, match="reads another model"):
        differs()


def test_other_weights_are_refused(exported, tmp_path, models):
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="changed since") as refused:
        restore(exported, model=str(other))
    assert refused.value.exit_code == 4
    shutil.copytree(models["vit"].removeprefix("local-dir:"), tmp_path / "moved")
    assert restore(exported, 0.5, model=str(tmp_path / "moved")).source.model == f"local-dir:{tmp_path / 'moved'}"


def test_an_alpha_beyond_is_refused(exported):
    with pytest.raises(UsageError, match="from 0 to 1"):
        restore(exported, 1.5)


def restored_by_script(folder: Path, monkeypatch, *arguments: object) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [RESTORE, *map(str, arguments)])
        runpy.run_path(str(folder / RESTORE), run_name="__main__")


def test_the_script_beside_it_needs_nothing_of_clipfit(exported, split_run, tmp_path, monkeypatch):
    restored_by_script(exported, monkeypatch, exported, tmp_path / "made", "--alpha", 0.3)
    model = open_clip.create_model(f"local-dir:{tmp_path / 'made'}")
    expected = restore(exported, 0.3).state()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    assert "clipfit" not in (exported / RESTORE).read_text("utf-8").replace('"clipfit"', "").replace("`clipfit`", "")


def refused_by_script(folder: Path, monkeypatch, capsys, code: int, *arguments: object) -> str:
    """What it says, the usage that argparse shows left out: one line."""
    with pytest.raises(SystemExit) as ended:
        restored_by_script(folder, monkeypatch, *arguments)
    assert ended.value.code == code
    said = re.sub(r"^usage:.*?(?=restore\.py: error)", "", capsys.readouterr().err, flags=re.DOTALL)
    assert said.count("\n") == 1, said
    return said


def test_the_script_refuses_other_weights(exported, tmp_path, monkeypatch, capsys):
    other = make_model(tmp_path / "other", seed=1)
    for model in (f"local-dir:{other}", other):
        told = (exported, tmp_path / "made", "--model", model)
        assert f"{model} has other weights" in refused_by_script(exported, monkeypatch, capsys, 4, *told)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (("--model", "no/where"), "no/where cannot be loaded (here is no such folder"),
        (("--model", "."), ". cannot be loaded ("),
        (("--model", "hf-hub:nobody/nothing"), "hf-hub:nobody/nothing cannot be loaded ("),
        (("--model", "Little-bare"), "Little-bare cannot be loaded (Required pretrained weights"),
        (("--model", "RN50", "--pretrained", "openai:gone.pt"), "RN50 / openai:gone.pt cannot be loaded (Pretrained"),
        (("--pretrained", "gone.pt"), "gone.pt cannot be loaded (--pretrained goes with a name of open_clip's)"),
    ],
)
def test_the_script_says_in_a_sentence_that_weights_cannot_be_had(
    exported, tmp_path, monkeypatch, capsys, caplog, told, words
):
    list_little(tmp_path, "Little-bare")
    monkeypatch.chdir(tmp_path)
    assert words in refused_by_script(exported, monkeypatch, capsys, 4, exported, "made", *told)
    assert not caplog.records
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("alpha", ["1.5", "-0.1", "nan"])
def test_the_script_refuses_an_alpha_beyond(exported, tmp_path, monkeypatch, capsys, alpha):
    told = (exported, tmp_path / "made", f"--alpha={alpha}")
    assert "--alpha must be from 0 to 1; found" in refused_by_script(exported, monkeypatch, capsys, 2, *told)
    assert not (tmp_path / "made").exists()


def test_the_script_refuses_a_folder_of_something_else(exported, tmp_path, monkeypatch, capsys):
    said = refused_by_script(exported, monkeypatch, capsys, 2, tmp_path, tmp_path / "made")
    assert said.endswith("has no difference.safetensors\n")


def test_a_run_that_is_no_plain_clip_at_any_alpha_is_refused(cli, split, models):
    assert cli("adapt", split, "--method", "atha", "--model", models["vit"], "--output", "run").code == 0
    for alpha in (0.5, 0):
        told = ("--format", "difference", "--alpha", alpha)
        refused = cli("export", "run", *told)
        refused.fails(2, "the format difference cannot hold edits of patch tokens", "use the run itself.")
        assert "--alpha 0" not in refused.stderr  # it would be refused, too


def test_a_run_that_goes_on_from_another_holds_what_it_changed_itself(cli, split, split_run, tmp_path):
    assert cli("adapt", split, "--model", split_run, "--output", "run").code == 0
    assert cli("export", split_run, "--output", "before").code == 0
    done = cli("export", "run", "--format", "difference", "--output", "out", "--json")
    assert done.code == 0, done.stderr
    state = restore(tmp_path / "out", 1.0, model=str(tmp_path / "before")).state()
    for name, tensor in open_run(tmp_path / "run").finetuned().items():
        torch.testing.assert_close(state[name], tensor, atol=2e-5, rtol=0)
