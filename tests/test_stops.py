"""What a stopped `adapt` says is there, is there; and what is there, it says."""

from __future__ import annotations

import errno
import signal
from typing import Any

import pytest

from clipfit import AdaptConfig, adapt, folding, interrupts, ranks
from clipfit.runs import manifest, place
from clipfit.verbs import adapt as adapt_verb
from clipfit.verbs import on_shots

WHOLE, STATE, NOTHING = "run is written and whole", "state.safetensors is kept; the same command with --resume", ""


def told_to_end(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def lost(*_: Any) -> None:
    raise ranks.Lost("gone")


@pytest.mark.parametrize(
    ("owner", "name", "call", "happens", "more", "says"),
    [
        pytest.param(place, "_put", 1, told_to_end, {}, WHOLE, id="while the run is moved into place"),
        pytest.param(on_shots, "accuracy", 2, told_to_end, {}, WHOLE, id="after it is there"),
        pytest.param(place, "_finish", 2, lost, {}, WHOLE, id="another process is lost meanwhile"),
        pytest.param(adapt_verb, "write_run", 1, told_to_end, {}, NOTHING, id="while it is written"),
        pytest.param(adapt_verb, "write_run", 1, told_to_end, {"save_every": 2}, STATE, id="written, with a state"),
        pytest.param(ranks.Ranks, "require_same", 1, lost, {"save_every": 2}, STATE, id="lost after training"),
        pytest.param(folding, "_one", 2, told_to_end, {"save_every": 2, "forecast": True}, STATE, id="in a fold"),
    ],
)
def test_it_says_what_is_there(flat, models, tmp_path, monkeypatch, owner, name, call, happens, more, says):
    """`happens`: before that call of the function is done, or of one that moves the run into place, after."""
    usual, calls = getattr(owner, name), []

    def disturbed(*given: Any) -> Any:
        calls.append(name)
        if len(calls) != call:
            return usual(*given)
        if owner is place:
            usual(*given)
            return happens()
        happens()
        return usual(*given)

    monkeypatch.setattr(owner, name, disturbed)
    config = AdaptConfig(flat, model=models["vit"], output=tmp_path / "run", recipe={"epochs": 1}, **more)
    with interrupts.raising(), pytest.raises(interrupts.Stopped) as stopped:
        adapt(config)
    assert says in str(stopped.value)
    assert bool(says) == bool(str(stopped.value))
    run, state = tmp_path / "run", place.resume_folder(tmp_path / "run") / "state.safetensors"
    assert (run.exists() and manifest.is_sealed(run), state.exists()) == (says == WHOLE, says == STATE)


def test_what_could_not_be_moved_into_place_is_not_called_whole(tmp_path, monkeypatch):
    def fails(*_: Any) -> None:
        told_to_end()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, "_put", fails)
    with interrupts.raising(), pytest.raises(interrupts.Stopped) as stopped, place.building(tmp_path / "run", False):
        pass
    assert (str(stopped.value), (tmp_path / "run").exists()) == ("", False)
