"""What a notebook's kernel goes through: kill -9, interrupts, two at once, cells that run again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from kernels import ROOT, kernel, pid_of, run
from nbclient import NotebookClient
from processes import wait_until

SETUP = """
import json, os, time, psutil
from dataclasses import dataclass
from labkit import Lab
from labkit.kafka import Consumer
from labkit.runtime.shared_broker import status

@dataclass
class Order:
    id: int

lab = Lab("kernels", pace=1)
orders = lab.topic("orders", value=Order)
done = lab.topic("done", value=Order)

def work(record):
    time.sleep(0.01)
    done.send(record.value, key=record.key)

shop = lab.deploy("shop", Consumer(orders, work), replicas=2)
load = lab.load(orders, (Order(n) for n in range(100_000)), rate=100)
lab.wait_ready(shop)
"""
FACTS = """
print(json.dumps({
    "pods": [pod.child.pid for pod in shop.pods],
    "children": [child.pid for child in psutil.Process().children(recursive=True)],
    "bootstrap": lab.cluster.bootstrap,
    "broker": [status().pid, status().restarts],
}))
"""


def open_port(bootstrap: str) -> bool:
    host, _, port = bootstrap.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, int(port))) == 0


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def of_this_lab(state: Path) -> list[psutil.Process]:
    """Every process that was started with this state folder: pods, supervisors, the broker."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("LABKIT_STATE") == str(state) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def pods(state: Path) -> list[psutil.Process]:
    """Those that are pods, or watch over one."""
    return [one for one in of_this_lab(state) if "labkit.lab.pods.process" in one.cmdline()]


@pytest.mark.long
def test_kill_9_of_a_kernel_with_a_frozen_pod_leaves_nothing(tmp_path: Path) -> None:
    """correctness 30: within 5 s. This machine may stand still: test_runtime_broker.py holds the waits against that."""
    with kernel(tmp_path) as (manager, client):
        run(client, SETUP)
        run(client, "shop.pods[0].freeze()")
        facts = json.loads(run(client, FACTS))
        assert open_port(facts["bootstrap"])
        os.kill(pid_of(manager), signal.SIGKILL)
        wait_until(lambda: all(map(gone, facts["pods"])), 10, "the end of the pods with their kernel")
        wait_until(lambda: not of_this_lab(tmp_path), 60, "the end of all that the kernel started")
        assert not open_port(facts["bootstrap"])
        with kernel(tmp_path) as (_, again):  # and the next run works
            assert "running" in run(again, SETUP + "print(shop)")


@pytest.mark.long
def test_interrupting_a_cell_harms_no_broker_and_no_pod(tmp_path: Path) -> None:
    """correctness 30: Jupyter's interrupt goes to the kernel's whole process group."""
    with kernel(tmp_path) as (manager, client):
        run(client, SETUP)
        before = json.loads(run(client, FACTS))
        begin(client, "time.sleep(60)")
        interrupt(manager, client)
        after = json.loads(run(client, FACTS))
        assert (after["pods"], after["broker"]) == (before["pods"], before["broker"])
        assert open_port(after["bootstrap"])
        assert "lives" in run(client, "load.stop()\nassert lab.settle(120), lab.settle(0)\nprint('lives')")


def begin(client: BlockingKernelClient, code: str) -> None:
    """Begin a cell that is to be interrupted: it runs when this returns.

    After a failed cell a kernel refuses what is queued behind it, for a moment that nothing tells the end of, unless
    the cell says that its failure stops nothing.
    """
    client.execute(f"print('busy', flush=True)\n{code}", stop_on_error=False)
    while client.get_iopub_msg(timeout=10)["msg_type"] != "stream":
        pass


def interrupt(manager: KernelManager, client: BlockingKernelClient) -> None:
    """Interrupt the cell that runs, and see that it ends by it."""
    manager.interrupt_kernel()
    reply = client.get_shell_msg(timeout=180)
    assert reply["content"].get("ename") == "KeyboardInterrupt", reply["content"]


@pytest.mark.long
@pytest.mark.parametrize(
    "call",
    [
        'lab = Lab("kernels", pace=1)',
        'shop = lab.deploy("shop", Consumer(orders, work), replicas=2)',
        "lab.settle(0.1)",
    ],
    ids=("Lab", "deploy", "settle"),
)
def test_an_interrupt_inside_of_what_a_cell_calls(call: str, tmp_path: Path) -> None:
    """correctness 30: the cells run again, the broker is unharmed, and no pod of an earlier one is left."""
    with kernel(tmp_path) as (manager, client):
        run(client, SETUP)
        before, many = json.loads(run(client, FACTS)), len(pods(tmp_path))
        for turn in range(3):
            begin(client, f"while True:\n    {call}")
            time.sleep(0.37 * turn)  # so that it meets the call at different places
            interrupt(manager, client)
        run(client, SETUP)
        after = json.loads(run(client, FACTS))
        if "Lab" not in call:  # between two labs nobody holds the broker: it may end
            assert after["broker"] == before["broker"]
        wait_until(lambda: len(pods(tmp_path)) == many, 60, "the end of the earlier cells' pods")
        assert "lives" in run(client, "load.stop()\nassert lab.settle(120), lab.settle(0)\nlab.close()\nprint('lives')")
        wait_until(lambda: not pods(tmp_path), 60, "the end of every pod")


@pytest.mark.long
def test_two_notebooks_that_start_at_once_share_one_broker(tmp_path: Path) -> None:
    """correctness 31"""
    with kernel(tmp_path) as (_, one), kernel(tmp_path) as (_, two):
        code = "from labkit import Lab; lab = Lab('twin'); print(lab.cluster.bootstrap, lab.run.id)"
        for client in (one, two):
            client.execute(code)
        told = []
        for client in (one, two):
            while (message := client.get_iopub_msg(timeout=180))["msg_type"] != "stream":
                assert message["msg_type"] != "error", message["content"]["traceback"]
            told.append(message["content"]["text"].split())
        assert told[0][0] == told[1][0]
        assert told[0][1] != told[1][1]


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["00_start_here.ipynb"])
def test_restart_and_run_all_twice_in_a_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_STATE", str(tmp_path))
    monkeypatch.setenv("LABKIT_PACE", "10")
    book = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(book, timeout=90, kernel_name="python3", resources=resources)
    for _ in range(2):  # execute() starts a kernel of its own each time
        client.execute()
    wait_until(lambda: not of_this_lab(tmp_path), 10, "the end of every process")
