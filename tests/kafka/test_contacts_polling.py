"""The baseline in which everybody polls: it counts what that costs."""

from __future__ import annotations

import threading

import pytest
from consuming import Journal
from processes import wait_until
from uploading import MINE, Served

from labkit.kafka.consumer.steps import Step
from labkit.lab.pods.travel import pack, unpack
from labkit.runtime.broker import free_ports
from labkit.services import contacts
from labkit.services.clients import ask
from labkit.services.contacts import (
    DownstreamService,
    Job,
    PolledFront,
    PollingBrowsers,
    ReportsDownstream,
)


@pytest.mark.long
def test_whoever_polls_pays_for_each_question_and_sees_the_end(dsn: str) -> None:
    downstream_port, port = free_ports()
    downstream = DownstreamService(downstream_port)
    front = PolledFront(port, dsn, downstream.url, every=0.02)
    request, figures, journal = contacts.request_of(MINE.id, "one"), Journal(), Journal()
    report = unpack(pack(ReportsDownstream(downstream.url)))
    browsers = unpack(pack(PollingBrowsers(front.url, (request,), every=0.02)))
    stop = threading.Event()
    browsing = threading.Thread(target=browsers.run, args=(stop, journal))

    def counted(journal: Journal, name: str) -> float:
        return max((one.counts.get(name, 0) for one in journal.of(Step.MEASURED)), default=0)

    with Served() as served:
        served.serve(downstream)
        served.serve(front, figures)
        assert ask(f"{front.url}/imports/{request}")[0] == 404
        assert ask(f"{front.url}/imports/{request}/3", "PUT")[0] == 202
        browsing.start()
        for number in (1, 2, 2):  # one is reported again
            report(Job(request, number, 3))
        wait_until(lambda: ask(f"{front.url}/imports/{request}")[1]["finished"] == 2, 20, "two jobs in the table")
        wait_until(lambda: counted(journal, "requests") > 20, 20, "questions")
        report(Job(request, 3, 3))
        wait_until(lambda: ask(f"{front.url}/imports/{request}")[1]["finished"] == 3, 20, "the third")
        stop.set()
        browsing.join(60)
        assert not browsing.is_alive()
        wait_until(lambda: counted(figures, "queries") > counted(journal, "requests"), 20, "queries of both who ask")
    assert 1 <= counted(journal, "changes") <= 3 < counted(journal, "requests")
    assert journal.of(Step.MEASURED)[-1].gauges["p99 ms"] > 0
