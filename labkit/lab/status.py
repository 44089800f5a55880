"""How a lab stands, as text: the table that a notebook shows for it, and the line above a board."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

import psutil

from labkit.lab import runs
from labkit.lab.board.sampler import Sampler
from labkit.lab.faults.kafka_connect import Connect
from labkit.lab.faults.servers import ServerFaults
from labkit.lab.pods.deployment import Deployment
from labkit.lab.pods.pod import UP
from labkit.runtime.jars import missing
from labkit.runtime.server import ServerState
from labkit.runtime.which_kafka import Connection

_ORIGIN: Mapping[Literal["external", "compose", "embedded", "private"], str] = {
    "external": "your own cluster",
    "compose": "the broker of docker-compose.yml",
    "embedded": "embedded Apache Kafka",
    "private": "an embedded Apache Kafka of its own",
}


def kafka_line(connection: Connection) -> str:
    """Which Kafka a lab is connected to, and as whom."""
    return f"{_ORIGIN[connection.origin]} at {connection.cluster.bootstrap} {runs.known_as(connection.origin)}"


def lab_table(
    notebook: str, run: runs.Run, connection: Connection, deployments: Iterable[Deployment], closed: str
) -> str:
    """A lab as HTML. `closed` says what to do if it is."""
    lacking = ", ".join(missing(notebook))  # a section would need it, perhaps where there is no network any more
    rows: Mapping[str, str] = {
        **({"state": f"closed: {closed}"} if closed else {}),
        "Kafka": kafka_line(connection),
        "run": f"{run.id}: topics and groups are named <code>{html.escape(run.prefix)}…</code>",
        "running": ", ".join(map(repr, deployments)) or "nothing yet",
        "memory": f"{_memory(deployments) / 1e6:,.0f} MB in this notebook and its pods",
        **({"not here yet": f"{lacking}: fetched when needed, or now by <code>labkit fetch</code>"} if lacking else {}),
        "other labs": ", ".join(name.split(".")[2] for name, _ in runs.living() if name != run.prefix) or "none",
    }
    left = "style='text-align:left'"
    lines = "".join(f"<tr><th {left}>{name}</th><td>{text}</td></tr>" for name, text in rows.items())
    return f"<table><caption {left}><b>Lab {html.escape(notebook)}</b></caption>{lines}</table>"


def status_line(
    deployments: Iterable[Deployment],
    sampler: Sampler,
    brokers: Sequence[ServerFaults],
    workers: Iterable[Connect],
) -> str:
    """How many pods run and how fast, and what is wrong with Kafka, with Kafka Connect, or with the last sample."""
    pods = [_deployment(one, sampler.rate.get(one.name, 0.0)) for one in deployments]
    away = [f"{one.name} {one.state.value}" for one in brokers if one.state is not ServerState.RUNNING]
    kafka = away or [sampler.trouble or "Kafka up"]
    return " · ".join([*pods, *kafka, *(one.status_line() for one in workers)])


def _deployment(deployment: Deployment, rate: float) -> str:
    pods = deployment.pods
    running = sum(pod.state in UP for pod in pods)
    again = [f"pod {pod.index} restarted {pod.restarts}×" for pod in pods if pod.restarts]
    more = f" ({', '.join(again)})" if again else ""
    handles = f" · {rate:,.0f} records/s" if deployment.topics else ""
    return f"{deployment.name}: {running} of {len(pods)} pods running{more}{handles}"


def _memory(deployments: Iterable[Deployment]) -> int:
    """Bytes of memory that this process and its pods hold."""
    children = [pod.child for deployment in deployments for pod in deployment.pods]
    used = 0
    for process in (os.getpid(), *(child.pid for child in children if child is not None)):
        with suppress(psutil.Error):  # it has just ended
            used += psutil.Process(process).memory_info().rss
    return used
