"""What is done when the broker does not answer a question: asked again, by whom, and for how long. No broker needed."""

from __future__ import annotations

import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, Self

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient  # type: ignore[attr-defined]

from labkit.kafka.cluster import PASSING, Cluster, admin
from labkit.kafka.errors import ClientRefused, ClusterUnreachable

NOWHERE = Cluster("127.0.0.1:1")
SILENCE = [TimeoutError(), KafkaException(KafkaError(KafkaError._TIMED_OUT))]


def kafka(code: int) -> KafkaException:
    return KafkaException(KafkaError(code))


class Question:
    """Ends in these errors, one after the other, and then in an answer. Notes the admin client of each time."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.clients: list[AdminClient] = []

    def __call__(self, client: AdminClient) -> str:
        self.clients.append(client)
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def test_a_question_that_is_answered_is_asked_once_and_keeps_its_client() -> None:
    before, question = admin(NOWHERE), Question()
    assert NOWHERE.ask(question) == "answer"
    assert question.clients == [before]
    assert admin(NOWHERE) is before


@pytest.mark.parametrize("silence", SILENCE, ids=["future", "client"])
def test_silence_is_asked_once_more_by_a_new_client(silence: Exception) -> None:
    question = Question(silence)
    assert NOWHERE.ask(question, patience=0) == "answer"
    first, second = question.clients
    assert first is not second
    assert admin(NOWHERE) is second


@pytest.mark.parametrize("silence", SILENCE, ids=["future", "client"])
def test_a_second_silence_is_an_error_with_the_address_however_patient(silence: Exception) -> None:
    question = Question(silence, silence)
    told = r"^topic orders: no answer from 127\.0\.0\.1:1 \(.+\).*`labkit status`"
    with pytest.raises(ClusterUnreachable, match=told):
        NOWHERE.ask(question, patience=60, about="topic orders: ")
    assert len(question.clients) == 2


def test_a_silence_before_what_passes_still_counts() -> None:
    passing = [kafka(KafkaError._TRANSPORT)] * 2
    assert NOWHERE.ask(Question(SILENCE[0], *passing)) == "answer"
    question = Question(SILENCE[0], *passing, SILENCE[1])
    with pytest.raises(ClusterUnreachable):
        NOWHERE.ask(question)
    assert len(question.clients) == 4


@pytest.mark.parametrize(
    "ask",
    [Cluster.topics, lambda cluster: cluster.delete_topics(["orders"]), Cluster.describe],
    ids=["topics", "delete", "describe"],
)
def test_settings_with_which_there_is_no_client_are_told(ask: Callable[[Cluster], object]) -> None:
    odd = Cluster("127.0.0.1:1", (("security.protocol", "SASL_SSL"), ("sasl.mechanism", "NOPE")))
    with pytest.raises(ClientRefused, match=r"the client settings for 127\.0\.0\.1:1 do not work: "):
        ask(odd)


@pytest.mark.parametrize("code", PASSING)
def test_what_passes_is_asked_again(code: int) -> None:
    question = Question(kafka(code))
    assert NOWHERE.ask(question) == "answer"
    assert len(question.clients) == 2


def test_what_passes_is_asked_again_until_patience_is_over() -> None:
    question = Question(*[kafka(KafkaError.NOT_COORDINATOR)] * 1000)
    begun = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=r"no answer from 127\.0\.0\.1:1 "):
        NOWHERE.ask(question, patience=0.5)
    assert time.monotonic() - begun >= 0.5
    assert len(question.clients) <= 6


def test_one_more_code_can_pass() -> None:
    unknown = KafkaError.UNKNOWN_TOPIC_OR_PART
    assert NOWHERE.ask(Question(kafka(unknown)), also=unknown) == "answer"
    question = Question(kafka(unknown))
    with pytest.raises(ClusterUnreachable):
        NOWHERE.ask(question)
    assert len(question.clients) == 1


def test_any_other_error_is_raised_at_once() -> None:
    refused = kafka(KafkaError.CLUSTER_AUTHORIZATION_FAILED)
    question = Question(refused)
    with pytest.raises(ClusterUnreachable, match=r"127\.0\.0\.1:1") as told:
        NOWHERE.ask(question)
    assert told.value.__cause__ is refused
    assert len(question.clients) == 1


def test_an_error_that_is_not_kafkas_goes_through() -> None:
    wrong = ValueError("not a name")
    question = Question(wrong)
    with pytest.raises(ValueError, match="not a name") as told:
        NOWHERE.ask(question)
    assert told.value is wrong
    assert len(question.clients) == 1


class ComingBroker:
    """Speaks as much Kafka as a broker that is just starting again: by its own records it is in the cluster, a moment
    later it is not yet, and knows of no broker and no topic."""

    def __init__(self) -> None:
        self.asked = 0
        broker = self

        class Connection(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                broker._serve(self.rfile, self.wfile)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, stream: BinaryIO, out: BinaryIO) -> None:
        while size := stream.read(4):
            api, version, correlation = struct.unpack(">hhi", stream.read(int.from_bytes(size, "big"))[:8])
            if api == 3:
                answer = self._metadata()
            else:  # the versions it speaks: 0 of this request, 0 to 4 of metadata
                answer = struct.pack(">hihhhhhh", 35 if version else 0, 2, 18, 0, 0, 3, 0, 4)
            out.write(struct.pack(">ii", 4 + len(answer), correlation) + answer)

    def _metadata(self) -> bytes:
        self.asked += 1
        itself = struct.pack(">ih9sih", 1, 9, b"127.0.0.1", self.port, -1)  # id, address, no rack
        brokers = itself if self.asked == 1 else b""
        # Throttle time, brokers, the cluster's id, controller, no topics.
        return struct.pack(">ii", 0, len(brokers) // len(itself)) + brokers + struct.pack(">h4sii", 4, b"test", 1, 0)


def test_a_broker_that_is_not_in_its_cluster_yet_is_no_answer() -> None:
    """In a process of its own: the client's `describe_cluster` ends it, by a failed assertion."""
    with ComingBroker() as broker:
        code = f"from labkit.kafka.cluster import Cluster; Cluster('127.0.0.1:{broker.port}').describe(1)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert broker.asked > 1
    assert done.returncode == 1, done.stderr
    assert f"ClusterUnreachable: no Kafka answers at 127.0.0.1:{broker.port}" in done.stderr
