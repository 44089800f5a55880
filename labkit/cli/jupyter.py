"""A JupyterLab from this environment, on the loopback interface only. It ends with its owner."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from labkit.closing import Closing
from labkit.kafka.errors import LabkitError
from labkit.runtime.broker import wait_until_ready
from labkit.runtime.home import locked, state_dir
from labkit.runtime.supervisor import is_held

START_SECONDS = 60.0  # a cold start on a slow disk; 2 s is usual
STOP_SECONDS = 15.0  # Jupyter gives each kernel 5 s to end
# Without this a pop-up that asks whether to fetch news would cover the notebook.
_PAGE = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}


class AlreadyRunning(LabkitError):
    """Another process serves the same notebooks: at `link`, to which `page` leads a browser."""

    def __init__(self, link: str, page: Path) -> None:
        super().__init__(f"JupyterLab runs on these notebooks already, at {link}")
        self.link, self.page = link, page


class Instance(Closing):
    """The one JupyterLab of a folder of notebooks: its log, its settings and its address, in a private folder.

    It is locked as long as this process lives. Whoever makes one first removes those of dead processes. Raises
    AlreadyRunning if a living process has that of `root`, and LabkitError while that process is still starting.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock, labs = state_dir() / "labs.lock", state_dir() / "labs"
        folder = labs / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        self.log, self.run = folder / "jupyter.log", folder / "run"
        self.page, address = self.run / "open.html", self.run / "address"
        with locked(self._lock):
            if is_held(address):
                if link := address.read_text():
                    raise AlreadyRunning(link, self.page)
                raise LabkitError("another `labkit lab` is starting on these notebooks: it prints the address")
            for each in labs.glob("*/"):
                if not is_held(each / "run" / "address"):
                    shutil.rmtree(each, ignore_errors=True)  # a JupyterLab that is just dying may still write there
            self.run.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._address = os.open(address, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            fcntl.flock(self._address, fcntl.LOCK_EX)

    def announce(self, link: str) -> None:
        """Say where it is: to who comes second, and to a browser by a file, as a command line is for everybody."""
        with open(os.open(self.page, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={escape(link)}">\n')
        os.pwrite(self._address, link.encode(), 0)

    def close(self) -> None:
        """Let others have it. Only the log stays, until the next one is made. May be called again."""
        if self._address >= 0:
            with locked(self._lock):
                shutil.rmtree(self.run, ignore_errors=True)
            os.close(self._address)
            self._address = -1


class Jupyter(Closing):
    """A running JupyterLab on the notebooks of `instance`. `close` shuts its kernels down.

    `extra` are further command line options. The user's own Jupyter settings hold, below ours.

    Raises LabkitError when JupyterLab is not installed or does not start.
    """

    def __init__(self, instance: Instance, *, port: int = 8888, extra: Sequence[str] = ()) -> None:
        from importlib.util import find_spec

        from labkit.runtime.child import Child

        if find_spec("jupyterlab") is None:
            raise LabkitError("JupyterLab is not installed here: pip install 'labkit[lab]', or use `make lab`")
        self.log, self._run = instance.log, instance.run
        self._token = secrets.token_hex(24)
        (self._run / "labconfig").mkdir(exist_ok=True)
        (self._run / "labconfig" / "page_config.json").write_text(json.dumps(_PAGE))
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}",
            "--ServerApp.port_retries=50",
            f"--ServerApp.root_dir={instance.root}",
            "--ServerApp.open_browser=False",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--LabApp.news_url=",
            *(["--allow-root"] if os.geteuid() == 0 else []),
            *extra,
        ]
        environment = {
            **os.environ,
            "JUPYTER_TOKEN": self._token,  # every user of the machine could read it in the command line
            "JUPYTER_RUNTIME_DIR": str(self._run),
            "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel python3 is this environment's
            "JUPYTER_CONFIG_PATH": os.pathsep.join(
                filter(None, [str(self._run), os.environ.get("JUPYTER_CONFIG_PATH")])
            ),
        }
        self._child = Child(command, env=environment, cwd=instance.root, output=instance.log)

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_until_ready(self) -> str:
        """Wait until it answers. Returns its address, without token. Raises LabkitError with the end of the log."""
        from urllib.error import URLError
        from urllib.request import ProxyHandler, build_opener

        direct = build_opener(ProxyHandler({})).open  # without the proxy that the environment may name
        facts = self._run / f"jpserver-{self._child.pid}.json"

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
