"""Kernels as JupyterLab starts them, and cells that run in them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def kernel(state: Path, **more: str) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    """A kernel with a LABKIT_STATE of its own, as on another machine, and with `more` in its environment."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env={**os.environ, "LABKIT_STATE": str(state), **more}, cwd=str(ROOT / "notebooks"))
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=180)
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def pid_of(manager: KernelManager) -> int:
    assert manager.provisioner is not None
    return int(manager.provisioner.process.pid)  # type: ignore[attr-defined]


def run(client: BlockingKernelClient, code: str) -> str:
    """What a cell prints. Fails with the cell's traceback."""
    printed: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            printed.append(message["content"]["text"])

    reply = client.execute_interactive(code, timeout=180, output_hook=hear)
    content = reply["content"]
    assert content["status"] == "ok", "\n".join(content.get("traceback", []))
    return "".join(printed)
