"""A real JupyterLab on copies of the notebooks, and a real Chromium."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from notebook_page import NotebookPage
from playwright.sync_api import Browser, sync_playwright

from labkit.cli.jupyter import Instance, Jupyter
from labkit.cli.lab import ROOT

FLAGS = (
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WINDOW = {"width": 1280, "height": 1000}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JupyterLab's folder: a copy of notebooks/, to which a test may add its own."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return folder


@pytest.fixture(scope="module")
def jupyter(root: Path, state_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    """The JupyterLab that `make lab` starts, with the application in reach of the tests."""
    own = tmp_path_factory.mktemp("jupyter")
    settings = own / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # Every cell is in the page, not only those in sight.
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    extra = (
        "--LabApp.expose_app_in_browser=True",
        f"--LabServerApp.user_settings_dir={own / 'settings'}",
        f"--LabServerApp.workspaces_dir={own / 'workspaces'}",
    )
    with Instance(root) as instance, Jupyter(instance, extra=extra) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Chromium as it is installed here. Without one tests are skipped; in CI that is a failure."""
    path = find_chromium()
    if path is None:
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse("there is no Chromium on this machine (Debian: apt install chromium)")
    flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def notebook(chromium: Browser, jupyter: Jupyter) -> Iterator[NotebookPage]:
    """A window of its own, in which a test opens a notebook."""
    with chromium.new_context(viewport=WINDOW) as context:
        page = context.new_page()
        page.set_default_timeout(30_000)
        opened = NotebookPage(page)
        yield opened
        opened.close()


def find_chromium() -> str | None:
    """A Chromium on this machine, for tests: none is ever downloaded."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    mac = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
    return next(filter(None, map(shutil.which, names)), None) or shutil.which(mac)
