"""The page of a service in a notebook: in a frame and as a link, wherever JupyterLab runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HEIGHT = 560  # pixels of a frame: the form, and an import with some bad rows
HOST = "127.0.0.1"
ELSEWHERE = (
    "If JupyterLab runs on another machine, your browser does not reach this address: install jupyter-server-proxy "
    "there, and start JupyterLab again."
)


@dataclass(frozen=True)
class Page:
    """What a service answers at `port` of this machine. The last line of a cell shows it.

    Where jupyter-server-proxy is installed, JupyterLab passes the page on, so that it is shown wherever the browser is.
    """

    port: int
    height: int = HEIGHT

    @property
    def url(self) -> str:
        """Its address; behind JupyterLab's proxy without the host, which is the browser's to know."""
        server = proxying_server()
        return f"{server['base_url']}proxy/{self.port}/" if server else f"http://{HOST}:{self.port}/"

    @property
    def origins(self) -> tuple[str, ...]:
        """The addresses at which a browser may have found it, for a service that serves only pages of such `origins`.

        Not among them is another name of JupyterLab, such as that of a JupyterHub. Add it.
        """
        direct = f"http://{HOST}:{self.port}"
        if (server := proxying_server()) is None:
            return (direct,)
        tunnel = f"{urlsplit(server['url']).scheme}://{HOST}:{server['port']}"
        return direct, server["url"], tunnel

    def __repr__(self) -> str:
        return f"the page at {self.url}"

    def _repr_html_(self) -> str:
        url = escape(self.url)
        note = "" if url.startswith("/") else f" {ELSEWHERE}"
        frame = f'<iframe src="{url}" title="{url}" width="100%" height="{self.height}" style="border: 0"></iframe>'
        return f'{frame}<p><a href="{url}" target="_blank" rel="noopener">Open it in a tab of its own</a>.{note}</p>'


def proxying_server() -> dict[str, Any] | None:
    """What the Jupyter server of this kernel tells of itself, if it has jupyter-server-proxy."""
    from jupyter_core.paths import jupyter_runtime_dir

    if find_spec("jupyter_server_proxy") is None:
        return None
    facts = Path(jupyter_runtime_dir()) / f"jpserver-{os.environ.get('JPY_PARENT_PID')}.json"
    try:
        found: dict[str, Any] = json.loads(facts.read_text())
    except (OSError, ValueError):  # no server has started this kernel
        return None
    return found
