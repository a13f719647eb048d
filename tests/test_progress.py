"""What is said of a long computation where there is no terminal."""

import time

import pytest

from snlp_jax.io import progress
from snlp_jax.io.progress import Progress, duration


def test_lines_tell_the_step_the_share_and_what_is_left() -> None:
    bar = Progress("evaluating", 4)
    assert bar.line(7.0) == "evaluating (0% after 7 s)"
    bar.begin("one")
    assert bar.line(7.0) == "evaluating: one (0% after 7 s)"
    bar.begin("two")  # one is done
    assert bar.line(600.0) == "evaluating: two (25% after 10 min, 30 min left)"
    bar.advance(10)
    assert bar.line(8000.0) == "evaluating: two (100% after 2.2 h, 0 s left)"
    assert duration(99) == "99 s"


def test_nothing_is_said_before_its_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.05)
    with Progress("short", 1):
        pass
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
    with Progress("long", 1) as bar:
        bar.begin("step")
        time.sleep(0.3)
    said = capsys.readouterr()
    assert said.err.startswith("long: step (0% after 0 s)\n") and said.out == ""


def test_names_are_no_markup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal: a path may hold brackets."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Progress("reading a[/b]", 2) as bar:
        bar.begin("c[bold]")
        bar.note("d[/e]")
    said = capsys.readouterr()
    assert "reading a[/b]: c[bold]" in said.err and "d[/e]" in said.err and said.out == ""
