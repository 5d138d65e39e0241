"""What `export` takes beside the format: refused in a sentence where the format does not take it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipfit import ExportConfig
from clipfit.config import outputs
from clipfit.config.outputs import FormatOptions, Takes
from clipfit.errors import UsageError
from clipfit.formats import FORMATS, proof
from clipfit.formats.open_clip import OpenClipFolder


@pytest.fixture
def _parts(monkeypatch):
    """A table of two formats."""
    table = {
        "open_clip": Takes("a folder"),
        "parts": Takes("in parts", ("classifier", "image"), ("fp32", "fp16"), ("int8",)),
    }
    monkeypatch.setattr(outputs, "FORMATS", table)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"part": "image"}, "does not take --part image: leave --part out, or choose --format parts."),
        ({"dtype": "fp16"}, "does not take --dtype fp16: it takes fp32, or choose --format parts."),
        ({"quantize": "int8"}, "does not take --quantize int8: leave --quantize out, or choose --format parts."),
    ],
)
def test_an_option_that_the_format_does_not_take_names_those_that_do(given, words):
    with pytest.raises(UsageError, match=f"the format open_clip {words}"):
        ExportConfig(**given)


@pytest.mark.parametrize(("flag", "value"), [("--part", "image"), ("--quantize", "int8")])
def test_it_is_refused_before_anything_is_read(cli, flag, value):
    cli("export", "nowhere", flag, value).fails(2, f"the format open_clip does not take {flag} {value}: leave {flag} ")


def test_what_is_not_given_is_the_formats_default_and_tells_no_folder(monkeypatch):
    monkeypatch.setitem(outputs.FORMATS, "open_clip", Takes("", ("classifier", "image"), ("fp32", "fp16"), ("int8",)))
    usual = ExportConfig()
    assert (usual.format_options, usual.suffix) == (FormatOptions("classifier"), "")
    asked = ExportConfig(part="image", dtype="fp16", quantize="int8")
    assert (asked.format_options, asked.suffix) == (FormatOptions("image", "fp16", "int8"), "-image-fp16-int8")


def test_a_library_that_is_missing_is_named_with_the_extra_that_has_it(cli, split_run, tmp_path, monkeypatch):
    class Needy(OpenClipFolder):
        libraries = ("json", "no_such_library")

    monkeypatch.setitem(FORMATS, "open_clip", Needy())
    cli("export", split_run).fails(2, "needs no_such_library", "pip install 'clipfit[open_clip]'")
    assert not list(tmp_path.iterdir())


def test_the_document_and_the_folder_say_what_was_asked(cli, split_run, tmp_path):
    told = cli("export", split_run, "--json").document
    assert {key: told[key] for key in ("format", "part", "dtype", "quantize")} == {
        "format": "open_clip", "part": None, "dtype": "fp32", "quantize": None,
    }  # fmt: skip
    about = (tmp_path / told["output"] / "clipfit.json").read_text()
    assert '"export": {\n    "dtype": "fp32",\n    "format": "open_clip"' in about


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_type_that_loses_the_adaptation_is_refused_with_what_to_do(cli, split_run, monkeypatch, dtype):
    monkeypatch.setattr(proof, "bound", lambda subject: 1e-4)
    words = (f"--dtype {dtype} loses too much of this run", "leave out --dtype")
    cli("export", split_run, "--format", "safetensors", "--dtype", dtype, "--output", "out").fails(2, *words)
    assert not Path("out").exists()
