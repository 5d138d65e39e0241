"""A byte flipped in every file of a run: refused by every command, or without effect on what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file


def figures(document: dict) -> dict:
    return {"alphas": document["alphas"], "held_out": document["held_out"]}


def exported(cli, run: Path, alpha: float) -> dict[str, object] | None:
    """The weights that were written, or None where the run was refused."""
    made = cli("export", run, "--alpha", alpha, "--output", "export", "--overwrite", "--json")
    if made.code == 4:
        return None
    assert made.code == 0, made.stderr
    return {name: t.sum().item() for name, t in load_file("export/open_clip_model.safetensors").items()}


@pytest.mark.slow
def test_a_flipped_byte_is_refused_or_has_no_effect_on_what_is_written(cli, split_run, tmp_path):
    shutil.copytree(split_run, tmp_path / "run")
    run = Path("run")
    whole = cli("evaluate", run, "--json")
    assert whole.code == 0, whole.stderr
    shutil.rmtree(tmp_path / "run/evaluations")
    weights = {alpha: exported(cli, run, alpha) for alpha in (0.5, 1.0, 0.25)}
    refused = unharmed = 0
    for file in sorted(p for p in (tmp_path / "run").iterdir() if p.is_file()):
        content = file.read_bytes()
        for place in (1, len(content) // 2, len(content) - 2):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            measured = cli("evaluate", run, "--json")
            if measured.code == 0:
                assert figures(measured.document) == figures(whole.document), file.name
            else:
                assert measured.code == 4, measured.stderr
                assert file.name in json.dumps(measured.document["error"]["message"])
            shutil.rmtree(tmp_path / "run/evaluations", ignore_errors=True)
            found = {alpha: exported(cli, run, alpha) for alpha in weights}
            assert all(state in (None, weights[alpha]) for alpha, state in found.items()), file.name
            harmed = measured.code == 4 or None in found.values()
            refused, unharmed = refused + harmed, unharmed + (not harmed)
            if file.name != "timing.json":
                assert harmed, file.name
        file.write_bytes(content)
    print(f"{refused + unharmed} bytes flipped in a run: {refused} refused, {unharmed} without effect, 0 silent")
    assert refused >= 20
