"""`labkit lab` before and around JupyterLab: copies, the address, what is missing."""

from __future__ import annotations

import socket
import stat
import sys
import webbrowser
from pathlib import Path

import psutil
import pytest

from labkit.cli import lab
from labkit.cli.jupyter import Jupyter
from labkit.kafka.errors import LabkitError

PAGE = Path("/private/open.html")
LINK = "http://127.0.0.1:8888/lab/tree/00_start_here.ipynb?token=x"


@pytest.fixture
def desktop(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with a desktop and a browser; the addresses it was asked to open."""
    opened: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", lambda link: opened.append(link) or True)
    return opened


def test_a_browser_is_opened_and_the_address_printed(desktop: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lab.show(LINK, PAGE)
    assert desktop == ["file:///private/open.html"]
    assert LINK in capsys.readouterr().out


def test_no_browser_when_told_so(desktop: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lab.show(LINK, None)
    assert desktop == []
    assert LINK in capsys.readouterr().out


def test_no_browser_on_the_machine(
    desktop: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda _: False)
    lab.show(LINK, PAGE)
    said = capsys.readouterr().out
    assert "No browser on this machine" in said
    assert LINK in said


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS always has a desktop")
def test_no_text_browser_without_a_desktop(desktop: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    lab.show(LINK, PAGE)
    assert desktop == []


def test_outside_a_clone_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(LabkitError, match="clone of the repository"):
        lab.prepare_work(tmp_path)


def test_a_work_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / lab.FIRST).write_text("{}")
    (tmp_path / "work").write_text("")
    with pytest.raises(LabkitError, match="make that folder writable"):
        lab.prepare_work(tmp_path)


@pytest.mark.long
def test_jupyter_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    with (
        Jupyter(tmp_path, tmp_path / "log", extra=["--ServerApp.port_retries=wrong"]) as jupyter,
        pytest.raises(LabkitError, match=r"(?s)JupyterLab ended at once.*port_retries"),
    ):
        jupyter.wait_until_ready()


def test_jupyter_takes_the_next_port_and_keeps_its_token_to_itself(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Jupyter(tmp_path, tmp_path / "log", port=port) as jupyter:
            address = jupyter.wait_until_ready()
            link, page = jupyter.link(lab.FIRST), jupyter.page(lab.FIRST)
            assert address.startswith("http://127.0.0.1:")
            assert f":{port}/" not in address
            assert link in page.read_text()
            assert (stat.S_IMODE(page.stat().st_mode), stat.S_IMODE(page.parent.stat().st_mode)) == (0o600, 0o700)
            token = link.partition("token=")[2]
            assert token not in " ".join(psutil.Process(jupyter.pid).cmdline())
    assert not page.exists()
