"""The page of a service in a notebook: where the browser finds it, and what it says where it is from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labkit.lab.pages import ELSEWHERE, Page
from labkit.services.notifications.pages import origins_of

FACTS = {"url": "http://localhost:8890/user/ada/", "base_url": "/user/ada/", "port": 8890, "pid": 4711}
DIRECT = "http://127.0.0.1:7001"


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where servers tell of themselves. None has started this process."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("JPY_PARENT_PID", "4711")
    return tmp_path


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """jupyter-server-proxy is installed."""
    (tmp_path / "packages" / "jupyter_server_proxy").mkdir(parents=True)
    (tmp_path / "packages" / "jupyter_server_proxy" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))


def serve(runtime: Path, **facts: Any) -> None:
    (runtime / "jpserver-4711.json").write_text(json.dumps({**FACTS, **facts}))


def test_without_a_proxy_it_is_on_this_machine_and_says_what_helps_elsewhere(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labkit.lab.pages.find_spec", lambda name: None)
    serve(runtime)
    page = Page(7001, height=400)
    assert page.url == "http://127.0.0.1:7001/"
    assert page.origins == (DIRECT,)
    shown = page._repr_html_()
    assert '<iframe src="http://127.0.0.1:7001/"' in shown
    assert 'height="400"' in shown
    assert '<a href="http://127.0.0.1:7001/"' in shown
    assert ELSEWHERE in shown
    assert page.url in repr(page)


@pytest.mark.usefixtures("proxy")
def test_behind_the_proxy_it_is_at_the_servers_own_address(runtime: Path) -> None:
    serve(runtime)
    page = Page(7001)
    assert page.url == "/user/ada/proxy/7001/"
    assert origins_of(page.origins) == origins_of([DIRECT, "http://localhost:8890"])
    assert '<iframe src="/user/ada/proxy/7001/"' in page._repr_html_()
    assert ELSEWHERE not in page._repr_html_()
    serve(runtime, url="https://lab.example.org:8890/", base_url="/")
    assert page.url == "/proxy/7001/"
    assert {"https://lab.example.org:8890", "https://localhost:8890"} < origins_of(page.origins)


@pytest.mark.usefixtures("proxy")
def test_a_kernel_that_no_server_has_started_needs_no_proxy(runtime: Path) -> None:
    assert Page(7001).url == "http://127.0.0.1:7001/"
    (runtime / "jpserver-4711.json").write_text("{")
    assert Page(7001).origins == (DIRECT,)
