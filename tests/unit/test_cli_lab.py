"""`labkit lab` before and around JupyterLab: copies, the address, what is missing."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
import webbrowser
from pathlib import Path

import psutil
import pytest

from labkit.cli import lab
from labkit.cli.jupyter import AlreadyRunning, Instance, Jupyter
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


def test_a_clones_notebooks_come_before_those_of_the_wheel_and_without_any_the_fix_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clone, brought = tmp_path / "clone", tmp_path / "labkit" / "notebooks"
    with pytest.raises(LabkitError, match=r"came without its notebooks .*pip install --force-reinstall"):
        lab.find_notebooks(clone, brought)
    for folder in (brought, clone / "notebooks"):
        folder.mkdir(parents=True)
    (brought / lab.FIRST).write_text("{}")
    assert lab.find_notebooks(clone, brought) == (brought, tmp_path / "work")
    (clone / "notebooks" / lab.FIRST).write_text("{}")
    assert lab.find_notebooks(clone, brought) == (clone / "notebooks", clone / "work")


def test_a_work_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("")
    with pytest.raises(LabkitError, match="make that folder writable"):
        lab.prepare_work(tmp_path, tmp_path / "work")


def owner_of(work: Path) -> subprocess.Popen[str]:
    """Another process that has the JupyterLab of `work`, as if it ran, and says where its log is."""
    code = (
        "import sys, pathlib; from labkit.cli.jupyter import Instance; one = Instance(pathlib.Path(sys.argv[1])); "
        "one.log.write_text('its own'); one.announce(sys.argv[2]); print(one.log, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(work), LINK]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_second_one_gets_the_address_and_what_a_dead_one_left_goes(tmp_path: Path) -> None:
    with owner_of(tmp_path / "one" / ".." / "one") as owner:
        assert owner.stdout
        log = Path(owner.stdout.readline().strip())
        with pytest.raises(AlreadyRunning) as running:
            Instance(tmp_path / "one")
        assert running.value.link == LINK
        assert LINK in running.value.page.read_text()
        with Instance(tmp_path / "other") as other:  # on other notebooks, with a log of its own
            assert other.log != log
        assert log.read_text() == "its own"
        owner.kill()
        owner.wait()
        with Instance(tmp_path / "other"):
            assert not log.parent.exists()
        with Instance(tmp_path / "one") as one, pytest.raises(LabkitError, match="is starting on these notebooks"):
            Instance(one.root)
        assert not one.run.exists()


@pytest.mark.long
def test_jupyter_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    with (
        Instance(tmp_path) as instance,
        Jupyter(instance, extra=["--ServerApp.port_retries=wrong"]) as jupyter,
        pytest.raises(LabkitError, match=r"(?s)JupyterLab ended at once.*port_retries"),
    ):
        jupyter.wait_until_ready()


def test_jupyter_takes_the_next_port_and_keeps_its_token_to_itself(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Instance(tmp_path) as instance, Jupyter(instance, port=port) as jupyter:
            address = jupyter.wait_until_ready()
            link, page = jupyter.link(lab.FIRST), instance.page
            instance.announce(link)
            assert address.startswith("http://127.0.0.1:")
            assert f":{port}/" not in address
            assert link in page.read_text()
            assert (stat.S_IMODE(page.stat().st_mode), stat.S_IMODE(page.parent.stat().st_mode)) == (0o600, 0o700)
            token = link.partition("token=")[2]
            assert token not in " ".join(psutil.Process(jupyter.pid).cmdline())
    assert not page.exists()
