"""The client that makes transactions: its settings, three kinds of errors, and an end for calls that never come back.

Every call raises `MustAbort` if nothing of the transaction can take effect, `Unanswered` if the same call has to be
made again later, and LabkitError if the process has to end. Ending is always safe: the next process with this id
settles an open transaction.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as DeliveryReport
from confluent_kafka import Producer as Client

from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.watchdog import Watchdog
from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.kafka.producer import COPY_MAX_BYTES, Output

TIMEOUT = 10.0  # seconds; then the broker aborts an open transaction, and fences its process
START = 60.0  # seconds for `init_transactions`
CALL = 5.0  # seconds for one call at most
NO_ANSWER = 15.0  # seconds for a call to return, whatever its timeout: librdkafka can lose one for ever
BATCH_BYTES = 1_000_000  # of records that are sent together; the client's own default
EXIT_NO_ANSWER = 71  # exit code of a process whose call was lost
LOG = "__transaction_state"
TAKEN = (KafkaError._FENCED, KafkaError.FENCED_INSTANCE_ID, KafkaError.INVALID_PRODUCER_EPOCH)

Reported = Callable[[KafkaError | None, DeliveryReport | None], None]


class MustAbort(Exception):
    """Nothing of this transaction can take effect."""

    def __init__(self, why: str, code: int = 0) -> None:
        super().__init__(why)
        self.code = code


class Unanswered(Exception):
    """The result is not known yet: make the same call again at a later turn."""


class TransactionalClient:
    """Used by one thread. `slot` names its owner in errors. A batch has at most `most` bytes, or is one record: a
    broker refuses a whole batch that is too large."""

    def __init__(self, cluster: Cluster, transactional_id: str, slot: str, most: int | None = None) -> None:
        self.cluster, self.slot = cluster, slot
        self.over = False  # fenced, or fatal: it must not be called any more
        self._watchdog = Watchdog(NO_ANSWER, EXIT_NO_ANSWER)
        self._watchdog.what = f"{slot}: a call of the client does not come back"
        self._client = Client(
            cluster.config(
                {
                    "transactional.id": transactional_id,
                    "transaction.timeout.ms": int(TIMEOUT * 1000),  # a dead process holds readers back for so long
                    "delivery.timeout.ms": int(TIMEOUT * 1000),  # must not be longer
                    "topic.metadata.propagation.max.ms": 3000,  # else a missing topic is reported after 10 s only
                    "topic.metadata.refresh.interval.ms": 1000,
                    "partitioner": "murmur2_random",
                    "linger.ms": 5,  # a commit flushes at once; with 0 each output would wake the sending thread
                    "batch.size": min(BATCH_BYTES, most or BATCH_BYTES),
                    "retry.backoff.ms": 1,  # a commit retries until its markers are written: with 100 it takes 100 ms
                    "retry.backoff.max.ms": 50,
                    "message.max.bytes": COPY_MAX_BYTES,  # for copies; `Producer.output` has checked the others
                    "compression.type": "zstd",
                    "queue.buffering.max.messages": 1_000_000,
                    "delivery.report.only.error": True,
                }
            )
        )

    def start(self, topic: str, stop: threading.Event) -> None:
        """Take this id over from its former owner, and settle the transaction that it left open."""
        self._watchdog.start("transactional calls")
        until = time.monotonic() + START
        with suppress(KafkaException):  # connect first: without a connection the client asks every 0.5 s only
            self._client.list_topics(topic, timeout=1.0)
        while not stop.is_set():
            try:
                self._call(self._client.init_transactions, CALL)
                return
            except (Unanswered, MustAbort) as error:
                self._check_log()
                if time.monotonic() > until:
                    raise ClusterUnreachable(
                        f"{self.cluster.bootstrap} did not let {self.slot} begin within {START:g} s: {error}"
                    ) from error
        self.over = True

    def _check_log(self) -> None:
        """Raise LabkitError if there are too few brokers for the transaction log: the client would only wait."""
        with suppress(ClusterUnreachable):
            about = self.cluster.ask(lambda client: client.list_topics(timeout=CALL))
            if LOG not in about.topics:
                raise LabkitError(
                    f"the brokers at {self.cluster.bootstrap} cannot make the transaction log, which exactly once "
                    "needs: set their transaction.state.log.replication.factor and transaction.state.log.min.isr to no "
                    f"more than there are brokers, {len(about.brokers)}"
                )

    def begin(self) -> None:
        self._call(self._client.begin_transaction)

    def send_offsets(self, offsets: list[TopicPartition], metadata: object, wait: float) -> None:
        """Raises MustAbort also when it is unanswered: a second such call can be lost for ever."""
        try:
            self._call(self._client.send_offsets_to_transaction, offsets, metadata, wait)
        except Unanswered as error:
            raise MustAbort(str(error)) from error

    def produce(self, output: Output, reported: Reported) -> None:
        """Queue an output. A later call calls `reported` with its delivery report."""
        o = output
        try:
            self._client.produce(o.topic, o.value, o.key, o.partition, reported, None, 0, o.headers)  # type: ignore[arg-type]
        except BufferError as error:
            self._client.poll(0.1)
            raise Unanswered("the buffer of unsent records is full") from error
        except KafkaException as caught:  # the transaction failed meanwhile, or there is no such partition any more
            failure: KafkaError = caught.args[0]
            if failure.fatal():
                self.end(failure.str(), failure.code())
            reported(failure, None)
            raise MustAbort(failure.str(), failure.code()) from caught

    def flush(self, wait: float) -> int:
        """Wait at most so many seconds; return how many outputs are unconfirmed then."""
        try:
            return int(self._client.flush(wait))
        except SystemError:  # it was fenced meanwhile: the next call raises
            return 0

    def commit(self, wait: float) -> None:
        self._call(self._client.commit_transaction, wait)

    def abort(self, wait: float) -> None:
        self._call(self._client.abort_transaction, wait)

    def close(self, is_open: bool) -> None:
        """Abort an open transaction, which would hold readers back until it times out."""
        if is_open and not self.over:
            with suppress(Exception):
                self.abort(1.0)
        self._watchdog.close()

    def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            with self._watchdog:
                function(*arguments)
        except KafkaException as caught:
            error: KafkaError = caught.args[0]
            if not error.fatal() and error.code() not in TAKEN:  # FENCED_INSTANCE_ID says abortable, and is final
                if error.txn_requires_abort():
                    raise MustAbort(error.str(), error.code()) from caught
                if error.retriable():
                    raise Unanswered(error.str()) from caught
            self.end(error.str(), error.code())

    def end(self, why: str, code: int = 0) -> NoReturn:
        """Raise the error with which the process ends; from now on the client is not called any more."""
        self.over = True
        raise self.taken(why) if code in TAKEN else LabkitError(f"{self.slot} cannot go on: {why}")

    def taken(self, why: str) -> LabkitError:
        """The error of a slot that another process has now."""
        return LabkitError(
            f"{self.slot} was taken over while this process had it: by another one that was given the same slot, or "
            f"because this one was frozen or cut off for more than {TIMEOUT:g} s. It ends; its successor handles what "
            f"it had not committed. Give each process a slot of its own [librdkafka: {why}]"
        )
