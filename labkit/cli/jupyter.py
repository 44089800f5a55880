"""A JupyterLab from this environment, on the loopback interface only. It ends with its owner."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from labkit.closing import Closing
from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import wait_until_ready

START_SECONDS = 60.0  # a cold start on a slow disk; 2 s is usual
STOP_SECONDS = 15.0  # Jupyter gives each kernel 5 s to end
# Without this a pop-up that asks whether to fetch news would cover the notebook.
_PAGE = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}


class Jupyter(Closing):
    """A running JupyterLab. `close` shuts its kernels down and removes its files.

    The log goes to `log`. `extra` are further command line options. The user's own Jupyter settings hold, below ours.

    Raises LabkitError when JupyterLab is not installed or does not start.
    """

    def __init__(self, root: Path, log: Path, *, port: int = 8888, extra: Sequence[str] = ()) -> None:
        from importlib.util import find_spec

        from labkit.runtime.child import Child

        if find_spec("jupyterlab") is None:
            raise LabkitError("JupyterLab is not installed here: pip install 'labkit[lab]', or use `make lab`")
        self.log = log
        self._token = secrets.token_hex(24)
        self._folder = Path(tempfile.mkdtemp(prefix="labkit-jupyter-"))
        (self._folder / "labconfig").mkdir()
        (self._folder / "labconfig" / "page_config.json").write_text(json.dumps(_PAGE))
        (self._folder / "runtime").mkdir(mode=0o700)
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}",
            "--ServerApp.port_retries=50",
            f"--ServerApp.root_dir={root}",
            "--ServerApp.open_browser=False",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--LabApp.news_url=",
            *(["--allow-root"] if os.geteuid() == 0 else []),
            *extra,
        ]
        environment = {
            **os.environ,
            "JUPYTER_TOKEN": self._token,  # every user of the machine could read it in the command line
            "JUPYTER_RUNTIME_DIR": str(self._folder / "runtime"),
            "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel python3 is this environment's
            "JUPYTER_CONFIG_PATH": os.pathsep.join(
                filter(None, [str(self._folder), os.environ.get("JUPYTER_CONFIG_PATH")])
            ),
        }
        log.unlink(missing_ok=True)
        try:
            self._child = Child(command, env=environment, cwd=root, output=log)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_until_ready(self) -> str:
        """Wait until it answers. Returns its address, without token. Raises LabkitError with the end of the log."""
        from urllib.error import URLError
        from urllib.request import ProxyHandler, build_opener

        direct = build_opener(ProxyHandler({})).open  # without the proxy that the environment may name
        facts = self._folder / "runtime" / f"jpserver-{self._child.pid}.json"

        def answers() -> bool:
            try:
                self.address = str(json.loads(facts.read_text())["url"])
                direct(f"{self.address}api", timeout=5).close()
            except (OSError, ValueError, URLError):
                return False
            return True

        wait_until_ready("JupyterLab", self.log, answers, lambda: self._child.poll() is None, START_SECONDS)
        return self.address

    def link(self, notebook: str) -> str:
        """The address of a notebook, token included."""
        return f"{self.address}lab/tree/{quote(notebook)}?token={self._token}"

    def page(self, notebook: str) -> Path:
        """A file that leads a browser to `link`, and only this user can read. A command line is for everybody."""
        path = self._folder / "runtime" / "open.html"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={escape(self.link(notebook))}">\n')
        return path

    def wait(self) -> int:
        """Wait until it ends by itself (File → Shut Down). Returns its exit code."""
        return self._child.wait()

    def close(self) -> None:
        """Shut it down, kernels first. An interrupt meanwhile ends it at once. May be called again."""
        try:
            self._child.terminate()
            self._child.wait(STOP_SECONDS)
        except TimeoutError:
            pass
        finally:
            self._child.close()
            shutil.rmtree(self._folder, ignore_errors=True)
