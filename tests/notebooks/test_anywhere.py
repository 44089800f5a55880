"""labkit from a wheel, from a bundle, in a dev container and on Binder: their steps, as written, in a fresh copy of the
repository.

Nothing but the bundle's wheels is downloaded: a new environment finds what is installed in the one that runs the tests.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

import pytest
from processes import wait_until
from running_lab import ask, assert_nothing_is_left, environment, read_address, started

from labkit.cli.lab import FIRST, ROOT
from labkit.runtime.home import cache_dir

pytestmark = pytest.mark.long
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What a clone of the repository would hold."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git clone")
    for name in filter(None, listed.stdout.decode().split("\0")):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python whose environments find the packages of this one, and JupyterLab its files. labkit is not among them."""
    packages = Path(sysconfig.get_path("purelib"))
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\n"{sys.executable}" "$@" || exit\n[ "$2" = venv ] || exit 0\n'
        f'echo "{packages}" > "$3/{packages.relative_to(sys.prefix)}/borrowed.pth"\n'
        f'ln -s "{sys.prefix}/share" "{sys.prefix}/etc" "$3"\n'
    )
    path.chmod(0o755)
    return path


def run(command: list[str | Path], env: dict[str, str], cwd: Path, timeout: float = 280) -> str:
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def serves(address: str) -> bool:
    with suppress(URLError):
        return ask(address, f"lab/tree/notebooks/{FIRST}") == 200
    return False


def test_a_wheel_brings_its_notebooks(copy: Path, python: Path, tmp_path: Path) -> None:
    for name in ("comparison/03.json", ".ipynb_checkpoints/old.ipynb"):  # what lies about where it is built
        (copy / "notebooks" / name).parent.mkdir()
        (copy / "notebooks" / name).write_text("{}")
    env = environment(tmp_path / "state", **OFFLINE)
    run([python, "-m", "venv", tmp_path / "env", "--without-pip"], env, tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    run([python, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy], env, tmp_path)
    (wheel,) = tmp_path.glob("labkit-*.whl")
    sources = [path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.ipynb")]
    sources += [path.relative_to(ROOT) for path in (ROOT / "notebooks" / "solutions").glob("*.py")]
    packed = [name for name in zipfile.ZipFile(wheel).namelist() if "notebooks" in name]
    assert sorted(packed) == sorted(f"labkit/{path}" for path in sources)

    run([python, "-m", "pip", "install", "--no-deps", wheel], env, tmp_path)
    shutil.rmtree(copy)
    empty = tmp_path / "empty"
    empty.mkdir()
    labkit = tmp_path / "env" / "bin" / "labkit"
    with started([labkit, "lab", "--no-browser"], env, cwd=empty) as lab:
        said, address = read_address(lab)
        assert f"Your copies of the notebooks are in {empty / 'work'}" in said
        assert ask(address, f"api/contents/{FIRST}") == 200
        assert ask(address, f"lab/tree/{FIRST}") == 200
    shown = "from labkit.lab.exercises import solution; print(solution('{}'))"
    cell = re.findall(r"^# %% (\S+)", (ROOT / sources[-1]).read_text(), re.MULTILINE)[0]
    assert "No " not in run([python, "-c", shown.format(cell)], env, empty / "work")

    shutil.rmtree(next((tmp_path / "env").rglob("site-packages/labkit/notebooks")))
    refused = subprocess.run([labkit, "lab"], env=env, cwd=empty, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "labkit: this labkit came without its notebooks" in refused.stderr
    assert_nothing_is_left(tmp_path)


@pytest.mark.timeout(1800)
def test_a_bundle_needs_no_network(copy: Path, python: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "state", PYTHON=str(python))
    run(["make", "environment"], {**env, **OFFLINE}, copy)
    ignored = shutil.ignore_patterns("rocksdbjni*")
    shutil.copytree(
        cache_dir() / "jars", copy / "bundle" / "jars", ignore=ignored
    )  # what is there is not fetched again
    run(["make", "bundle"], env, copy, timeout=1500)
    bundle = shutil.move(copy / "bundle", tmp_path / "bundle")
    shutil.rmtree(copy)

    empty = tmp_path / "empty"
    empty.mkdir()
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    cut_off = {name: value for name, value in env.items() if not name.lower().startswith("pip_")}
    cut_off |= {**nowhere, "PYTHON": sys.executable, "LABKIT_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    run(["sh", bundle / "install.sh"], cut_off, empty, timeout=1200)
    said = run([empty / ".venv" / "bin" / "labkit", "doctor"], cut_off, empty)
    assert re.search(r"ok +jars: +all are here", said), said
    with started([empty / ".venv" / "bin" / "labkit", "lab", "--no-browser"], cut_off, cwd=empty) as lab:
        said, address = read_address(lab)
        assert f"Your copies of the notebooks are in {empty / 'work'}" in said
        assert ask(address, f"lab/tree/{FIRST}") == 200
    assert_nothing_is_left(tmp_path)

    (bundle / "made-for").write_text("3.9 Linux elsewhere")
    command = ["sh", bundle / "install.sh"]
    refused = subprocess.run(command, env=cut_off, cwd=empty, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "are for Python 3.9 Linux elsewhere, and" in refused.stderr
    assert (empty / ".venv").exists()


def test_the_steps_of_the_dev_container(copy: Path, python: Path, tmp_path: Path) -> None:
    text = (copy / ".devcontainer" / "devcontainer.json").read_text()
    steps = json.loads(re.sub(r"(?m)^\s*//.*", "", text))
    env = environment(tmp_path / "state", PYTHON=str(python), **OFFLINE)  # which make asks for
    run(["sh", "-c", steps["postCreateCommand"]], env, copy)
    with started(["sh", "-c", f"exec {steps['postAttachCommand']}"], env, cwd=copy) as lab:
        said, address = read_address(lab)
        assert "Kafka is at 127.0.0.1:" in said
        assert f"{copy / 'work'}" in said
        assert ask(address, f"lab/tree/{FIRST}") == 200
        assert address in run(["sh", "-c", steps["postAttachCommand"]], env, copy)  # somebody comes again
    assert_nothing_is_left(tmp_path)


def test_the_steps_of_binder(copy: Path, python: Path, tmp_path: Path) -> None:
    env = environment(tmp_path / "state", JUPYTER_TOKEN="binder", **OFFLINE)
    run([python, "-m", "venv", tmp_path / "env", "--without-pip"], env, tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    env["PATH"] = f"{python.parent}:{env['PATH']}"
    run([copy / ".binder" / "postBuild"], env, copy)
    root = [f"--ServerApp.{name}" for name in ("ip=127.0.0.1", f"root_dir={copy}", "allow_root=True")]
    with started(
        [python, "-m", "jupyterlab", "--no-browser", *root], env, cwd=copy, stderr=subprocess.STDOUT
    ) as served:
        assert served.stdout
        found = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in served.stdout)))
        wait_until(lambda: serves(f"{found[0]}?token=binder"), 20, "notebook 00")  # it is told before it is so
    code = "from labkit import Lab\nwith Lab('binder') as lab: print(lab.topic('orders').name)"
    assert "binder" in run([python, "-c", code], env, copy / "notebooks")
    run([python.parent / "labkit", "down"], env, copy)
    assert_nothing_is_left(tmp_path)
