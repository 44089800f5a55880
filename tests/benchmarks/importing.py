"""Imports of contacts: how many a second, by so many importers; and their progress in pages, by polling and by push."""

from __future__ import annotations

import asyncio
import csv
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psycopg

from benchmarks.aggregating import PATIENCE
from benchmarks.bench import Bench, say
from benchmarks.report import Row
from labkit.kafka.consumer import Consumer
from labkit.kafka.consumer.steps import Step
from labkit.kafka.lag import committed_offsets
from labkit.kafka.topics import Topic
from labkit.patterns.aggregation import AtomicKeyValueStore, Command, ImportKey
from labkit.runtime.broker import free_ports
from labkit.runtime.postgres import Postgres
from labkit.services import contacts
from labkit.services.contacts import (
    ContactsJob,
    Counted,
    DownstreamService,
    Importer,
    ImportNotice,
    Job,
    JobFinished,
    Notices,
    PolledFront,
    Progress,
    Reports,
    ReportsDownstream,
)
from labkit.services.contacts.emails import NoEmail, email_address
from labkit.services.contacts.importer import STORE, TABLES
from labkit.services.notifications import NotificationService

CONTACTS, SIZE, PARTITIONS = 50_000, 100, 8
IMPORTERS = (1, 2, 4)
PAGES, JOBS, RATE = (
    20,
    50,
    50,
)  # a page for each import of so many jobs, which end at this rate, of all imports together
EVERY = 1.0  # seconds from one question to the next
SECRET = "a secret of some length"


def imports(bench: Bench) -> Iterator[Row]:
    """Contacts imported a second: by 1, 2 and 4 importers, and by a script without Kafka that reads the file."""
    file = bench.folder / "contacts.csv"
    contacts.write_csv(file, contacts.contacts(CONTACTS))
    with Postgres() as server:
        peer = by_script(database(server, "script"), file)
        say(f"  a script: {peer:,.0f} contacts/s")
        for importers in IMPORTERS:
            rate = by_importers(bench, database(server, f"importers{importers}"), file, importers)
            note = f"peer: one process without Kafka; {CONTACTS:,} contacts in jobs of {SIZE}, stored in one PostgreSQL"
            yield Row(f"imports, {importers} importer{'s' * (importers > 1)}", rate, "contacts/s", peer, None, note)


def database(server: Postgres, name: str) -> str:
    """A database of its own."""
    with psycopg.connect(server.dsn, autocommit=True) as client:
        client.execute(f"create database {name}".encode())
    return server.dsn.replace("dbname=postgres", f"dbname={name}")


def by_script(dsn: str, file: Path) -> float:
    """What one would write by hand: it does not tell how far it is, and begins anew when it is killed."""
    with psycopg.connect(dsn, autocommit=True) as client, open(file, encoding="utf-8", newline="") as text:
        client.execute(TABLES)
        began, rows = time.perf_counter(), csv.DictReader(text)
        while part := list(islice(rows, SIZE)):
            good = []
            for row in part:
                with suppress(NoEmail):
                    email = email_address(row["email"])
                    good.append(("YYY", email, row["name"], row["phone"], row["notes"], rows.line_num, 1, None))
            with client.transaction(), client.cursor() as cursor:
                cursor.executemany(STORE, good)
        return CONTACTS / (time.perf_counter() - began)


def by_importers(bench: Bench, dsn: str, file: Path, importers: int) -> float:
    """Contacts a second of so many processes, from the first job that is sent to the last that is committed."""
    jobs, commands = bench.topic("jobs", PARTITIONS, ContactsJob), bench.topic("commands", PARTITIONS, JobFinished)
    group, context = bench.group(), get_context("spawn")
    ready, stop = context.Barrier(importers + 1), context.Event()
    arguments = (jobs, commands, dsn, group, importers, ready, stop)
    processes = [context.Process(target=importing, args=arguments, daemon=True) for _ in range(importers)]
    for process in processes:
        process.start()
    try:
        ready.wait(PATIENCE)
        began = time.perf_counter()
        count = contacts.send_jobs(file, jobs, "YYY", SIZE)
        while sum(committed_offsets(jobs.cluster, group).values()) < count:
            assert all(process.is_alive() for process in processes), "an importer has ended"
            assert time.perf_counter() < began + PATIENCE, "not all jobs were committed"
            time.sleep(0.02)  # nothing tells of a commit
        return CONTACTS / (time.perf_counter() - began)
    finally:
        stop.set()
        for process in processes:
            process.join(10)
            process.kill()


def importing(
    jobs: Topic[ContactsJob], commands: Topic[JobFinished], dsn: str, group: str, importers: int, ready: Any, stop: Any
) -> None:
    """An importer, in this process. It is ready when it has its share of the partitions."""

    def report(step: Step, subject: Any) -> None:
        if step is Step.ASSIGNED or step is Step.REVOKED:
            held.difference_update(subject) if step is Step.REVOKED else held.update(one[:2] for one in subject)
            if len(held) == PARTITIONS // importers and not waited.is_set():
                waited.set()
                threading.Thread(target=ready.wait, daemon=True).start()

    held, waited = set[tuple[str, int]](), threading.Event()
    with closing(Importer(dsn, Reports(commands))) as importer:
        Consumer(jobs, importer, group, commit_interval=0.1).run(stop, report)


# -- telling how far it is ---------------------------------------------------------------------------------------------


class Told(NamedTuple):
    """What it took to tell pages how far their imports are."""

    delays: list[float]
    """Milliseconds from the end of each job until its page has seen it."""
    requests: int
    queries: int


def progress(bench: Bench) -> Iterator[Row]:
    """The progress of imports in their pages, by polling and by push: delay, requests and queries."""
    with Postgres() as server:
        polled = by_polling(database(server, "polling"))
    pushed = by_push(bench)
    for name, told in {"push": pushed, "polling": polled}.items():
        note = (
            f"{PAGES} pages, each with an import of {JOBS} jobs; {RATE} jobs end in a second; {told.requests:,} "
            f"requests and {told.queries:,} queries for {PAGES * JOBS:,} changes"
        )
        if name == "polling":
            note += f"; both the page and the service that it asks ask every {EVERY:g} s"
        quantiles = statistics.quantiles(told.delays, n=100, method="inclusive")
        yield Row(f"progress seen, by {name}, p50", quantiles[49], "ms", note=note)
        yield Row(f"progress seen, by {name}, p99", quantiles[98], "ms")


def by_polling(dsn: str) -> Told:
    """Page → front service and its table → the service to which importers report."""
    downstream_port, port = free_ports()
    downstream = DownstreamService(downstream_port)
    front, seen, asked = PolledFront(port, dsn, downstream.url, EVERY), Seen(), 0

    async def page(session: aiohttp.ClientSession, number: int) -> Page:
        request = f"import-{number}"
        async with session.put(f"{front.url}/imports/{request}/{JOBS}") as answer:
            assert answer.status == 202, await answer.text()
        return request, listen(session, request)

    async def listen(session: aiohttp.ClientSession, request: str) -> None:
        nonlocal asked
        finished = 0
        while finished < JOBS:
            asked += 1
            async with session.get(f"{front.url}/imports/{request}") as answer:
                finished = (await answer.json())["finished"]
            seen.note(request, finished)
            await asyncio.sleep(EVERY)

    with serving(downstream), serving(front) as figures:
        delays = asyncio.run(watched(page, ReportsDownstream(downstream.url), seen))
    return Told(delays, asked, int(figures["queries"]))  # those that it told in the end


def by_push(bench: Bench) -> Told:
    """Importers' reports → the store that counts them → notices → the WebSocket service → page."""
    notices, commands = bench.topic("notices", 4, ImportNotice), bench.topic("commands", 4, JobFinished)
    values = Topic(commands.cluster, f"{commands.name}-values", 4, Progress)
    values.create({"cleanup.policy": "compact"})
    store = AtomicKeyValueStore(commands, values, _advance, ImportKey.parse, Counted(Notices(notices)))
    service, seen = NotificationService(free_ports()[0], notices, SECRET), Seen()

    async def page(session: aiohttp.ClientSession, _: int) -> Page:
        async with session.post(f"{service.url}/channels", headers={"Origin": service.url}) as answer:
            opened = await answer.json()
        socket = await session.ws_connect(f"{service.url}/notifications", origin=service.url)
        await socket.send_json({name: opened[name] for name in ("channel", "key", "position")})
        assert (await socket.receive_json())["outcome"] == "nothing missed"
        request = contacts.request_of(opened["channel"], "import")
        return request, listen(socket, request)

    async def listen(socket: aiohttp.ClientWebSocketResponse, request: str) -> None:
        finished = 0
        while finished < JOBS:
            if notice := (await socket.receive_json()).get("notice"):
                finished = notice["done"]
                seen.note(request, finished)
        await socket.close()

    with serving(service), serving(store.consumer("one", commit_interval=0.02)):
        return Told(asyncio.run(watched(page, Reports(commands), seen)), 2 * PAGES, 0)


def _advance(value: Progress | None, command: Command[ImportKey, JobFinished]) -> Progress:
    assert command.value is not None
    return contacts.progress(value, command.value)


Page = tuple[str, Coroutine[Any, Any, None]]
"""Its request, and what it does until it has seen the end."""


class Seen:
    """When pages saw how many jobs have finished."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[float, int]]] = {}

    def note(self, request: str, finished: int) -> None:
        """So many, now."""
        self._seen.setdefault(request, []).append((time.monotonic(), finished))

    def delays(self, ended: Mapping[tuple[str, int], float]) -> list[float]:
        """Milliseconds from the end of each job until as many were seen."""
        return [
            1000 * (next(at for at, finished in self._seen[request] if finished >= number) - begun)
            for (request, number), begun in ended.items()
        ]


async def watched(
    page: Callable[[aiohttp.ClientSession, int], Awaitable[Page]], report: Callable[[Job], object], seen: Seen
) -> list[float]:
    """The delays of all jobs, whose ends are reported while pages look on."""
    async with aiohttp.ClientSession() as session:
        pages = [await page(session, number) for number in range(PAGES)]
        listening = asyncio.gather(*(listen for _, listen in pages))
        ended = await asyncio.to_thread(work, [request for request, _ in pages], report)
        await asyncio.wait_for(listening, PATIENCE)
    return seen.delays(ended)


def work(requests: list[str], report: Callable[[Job], object]) -> dict[tuple[str, int], float]:
    """Report the jobs, at a steady rate; when each ended."""
    ended: dict[tuple[str, int], float] = {}
    began = time.monotonic()
    for number in range(1, JOBS + 1):
        for request in requests:
            time.sleep(max(0.0, began + len(ended) / RATE - time.monotonic()))
            ended[request, number] = time.monotonic()
            report(Job(request, number, JOBS))
    return ended


@contextmanager
def serving(service: Any) -> Iterator[dict[str, float]]:
    """A service in a thread, and the counts that it reports."""
    stop, up, figures = threading.Event(), threading.Event(), dict[str, float]()

    def report(step: Step, subject: Any) -> None:
        if step is Step.MEASURED:
            figures.update(subject.counts)
        up.set()

    thread = threading.Thread(target=service.run, args=(stop, report))
    thread.start()
    try:
        assert up.wait(PATIENCE)
        yield figures
    finally:
        stop.set()
        thread.join()
