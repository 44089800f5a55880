"""Where a Kafka cluster is, how to log in to it, and its administration."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from confluent_kafka import ConsumerGroupState, KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ConfigResource,
    NewPartitions,
    NewTopic,
    TopicDescription,
)

from labkit.kafka.clients import forget, kept
from labkit.kafka.connection_errors import explain, is_final
from labkit.kafka.errors import (
    ClientRefused,
    ClusterUnreachable,
    LabkitError,
    NotAllowed,
    TopicMismatch,
    TopicMissing,
)

T = TypeVar("T")

ANSWER = 5.0  # seconds to wait for one answer of the broker; then a new client asks again

ADMINS = 8  # clusters with an admin client that is kept

# What all of labkit's clients have in common.
_COMMON = {
    # A lab's clients sit beside the broker: a broker that restarts is found again within a tenth of a second.
    "socket.connection.setup.timeout.ms": 5000,
    "reconnect.backoff.ms": 20,
    "reconnect.backoff.max.ms": 200,
    "log_level": 0,  # librdkafka prints to stderr; what matters comes back as an error
}
# A producer asks for its topics again and again. A broker that creates topics on request would bring deleted ones back.
_NOTHING_MADE_BY_ASKING = {"allow.auto.create.topics": False}


@dataclass(frozen=True)
class ClusterInfo:
    """What a broker says of its cluster."""

    cluster_id: str
    brokers: frozenset[int]
    """The ids of those that are in it now."""


@dataclass(frozen=True)
class Partition:
    """The brokers, by their ids, that have a partition's records."""

    leader: int
    """Who takes and gives them; -1 while nobody does."""
    replicas: frozenset[int]
    in_sync: frozenset[int]
    """Those that have all of them; as Kafka knows it, which misses a broker some seconds after its death."""


@dataclass(frozen=True)
class Cluster:
    """The coordinates of a cluster: plain data, so it can travel to another process.

    `security` holds librdkafka client properties (SASL, TLS), left out of the repr because they carry passwords.
    """

    bootstrap: str
    security: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Client properties: how to reach the cluster, with `own` on top."""
        return {"bootstrap.servers": self.bootstrap, **_COMMON, **dict(self.security), **_NOTHING_MADE_BY_ASKING, **own}

    def describe(self, timeout: float = 5.0) -> ClusterInfo:
        """Ask for the cluster's id, waiting at most `timeout` seconds. A refusal is raised at once.

        Raises ClientRefused when the settings, the login or a certificate are refused, else ClusterUnreachable.
        """
        heard: list[KafkaError] = []
        security = dict(self.security)
        # A new client: only its error callback learns why a connection failed, and an old client knows old brokers.
        held = [_client(self, heard.append)]
        until, addresses, wait = time.monotonic() + timeout, self.bootstrap.count(",") + 1, 0.1
        refused: dict[str, KafkaError] = {}  # by broker; while one has not refused, we go on asking
        failure: KafkaException | None = None
        while (left := until - time.monotonic()) > 0 and len(refused) < addresses:
            try:
                # Not `describe_cluster`: the answer of a broker that is just starting names no broker, and librdkafka
                # then ends the process by a failed assertion. The first wait is short, so that refusals are noticed.
                answer = held[0].list_topics(timeout=min(wait, left))
                return ClusterInfo(str(answer.cluster_id), frozenset(answer.brokers))
            except KafkaException as error:
                failure, wait = error.with_traceback(None), 2 * wait  # its traceback would keep the client alive
            held[0].poll(0.01)
            # The error's text begins with the broker it is about: `ssl://127.0.0.1:9093/bootstrap: …`.
            refused = {error.str().partition(": ")[0]: error for error in heard if is_final(error)}
        # The error must not keep the client alive, which would go on trying. A thread destroys the client, because
        # that lasts as long as the lookup of an unknown host name.
        threading.Thread(target=held.clear, name="end of a client", daemon=True).start()
        if refused:
            why = explain(list(refused.values())[-1], security)
            raise ClientRefused(f"Kafka at {self.bootstrap} refuses this client: {why}") from failure
        # "All brokers are down" is no reason: prefer any other error.
        reasons = [one for one in heard if one.code() != KafkaError._ALL_BROKERS_DOWN] or heard
        why = explain(reasons[-1], security) if reasons else f"silent for {timeout:g} s"
        raise ClusterUnreachable(f"no Kafka answers at {self.bootstrap}: {why}") from failure

    def topics(self) -> dict[str, int]:
        """Every topic's name and number of partitions."""
        found = self.ask(lambda client: client.list_topics(timeout=ANSWER)).topics
        return {name: len(topic.partitions) for name, topic in found.items() if not topic.error}

    def partitions(self, name: str, at_once: bool = False) -> dict[int, Partition]:
        """Which brokers have each partition of a topic. With `at_once` it does not wait for a Kafka that is down.

        Raises TopicMissing, ClusterUnreachable.
        """
        wait, patience = (1.0, 0.0) if at_once else (ANSWER, 10.0)
        found = self.ask(lambda client: client.list_topics(name, timeout=wait), patience).topics[name]
        if not found.partitions:
            raise TopicMissing(f"topic {name} does not exist at {self.bootstrap}")
        return {
            number: Partition(one.leader, frozenset(one.replicas), frozenset(one.isrs))
            for number, one in sorted(found.partitions.items())
        }

    def create_topic(self, name: str, partitions: int, config: Mapping[str, str] | None = None) -> None:
        """Make a topic; one that already exists with as many partitions and this cleanup policy is left as it is.

        Returns once the broker knows the topic: it can be listed, read and consumed at once.
        Raises TopicMismatch when it exists in another way, NotAllowed, ClusterUnreachable.
        """
        asked = dict(config or {})
        new = NewTopic(name, num_partitions=partitions, replication_factor=-1, config=asked)

        def make(client: AdminClient) -> bool:
            try:
                made = client.create_topics([new], operation_timeout=ANSWER, request_timeout=ANSWER)
                made[name].result(ANSWER + 1)
            except KafkaException as error:
                code = error.args[0].code()
                if code in PASSING or code in (KafkaError._TIMED_OUT, KafkaError.INVALID_REPLICATION_FACTOR):
                    raise
                if code != KafkaError.TOPIC_ALREADY_EXISTS:
                    kind = NotAllowed if code in FORBIDDEN else LabkitError
                    raise kind(f"topic {name} could not be created: {_reason(error)}") from error
                return False
            return True

        # On a busy machine a broker may miss its heartbeats for a moment: the controller then counts it as down.
        made = self.ask(make, about=f"topic {name}: ", also=KafkaError.INVALID_REPLICATION_FACTOR)
        # The controller has answered. The broker learns of the topic a moment later: until then it is unknown there.
        unknown = KafkaError.UNKNOWN_TOPIC_OR_PART
        self.ask(lambda client: self._described(client, name), about=f"topic {name}: ", also=unknown)
        if not made:
            self._compare(name, partitions, asked.get("cleanup.policy"))

    def _compare(self, name: str, partitions: int, cleanup: str | None) -> None:
        """Raises TopicMismatch when a topic is not as requested. `cleanup` None: any cleanup policy will do."""
        there = self.topics().get(name, partitions)
        if there != partitions:
            raise TopicMismatch(
                f"topic {name} exists with {there} partitions, not {partitions}: use that number or another name"
            )
        if cleanup is not None:
            unknown = KafkaError.UNKNOWN_TOPIC_OR_PART  # just made: this broker does not know it yet
            found = self.ask(lambda client: self._configured(client, name), about=f"topic {name}: ", also=unknown)
            has = found["cleanup.policy"]
            if set(has.split(",")) != set(cleanup.split(",")):
                raise TopicMismatch(
                    f"topic {name} exists with cleanup.policy {has}, not {cleanup}: ask for that or use another name"
                )

    def add_partitions(self, name: str, to: int) -> bool:
        """Give a topic more partitions, so that it has `to`; False if it has as many already.

        Its keys belong elsewhere from then on. Returns once the broker lists the new partitions. Raises TopicMismatch
        when it has more, as Kafka takes none away; TopicMissing; LabkitError when Kafka refuses; ClusterUnreachable.
        """
        has = self.topics().get(name)
        if has is None:
            raise TopicMissing(f"topic {name} does not exist at {self.bootstrap}")
        if has > to:
            raise TopicMismatch(
                f"topic {name} has {has} partitions, not {to}, and Kafka takes none away: use a topic of another name"
            )
        if has == to:
            return False
        refused: list[str] = []

        def add(client: AdminClient) -> None:
            try:
                asked = client.create_partitions(
                    [NewPartitions(name, to)], operation_timeout=ANSWER, request_timeout=ANSWER
                )
                asked[name].result(ANSWER + 1)
            except KafkaException as error:
                code = error.args[0].code()
                if code in PASSING or code == KafkaError._TIMED_OUT:
                    raise
                refused.append(_reason(error))  # perhaps an earlier call without an answer has added them

        self.ask(add, about=f"topic {name}: ")
        until = time.monotonic() + (1.0 if refused else ANSWER)
        while self.topics().get(name) != to:  # the broker learns of it a moment later
            if time.monotonic() > until:
                why = ", ".join(refused) or "they are not listed"
                raise LabkitError(f"topic {name} was not given {to} partitions: {why}")
            time.sleep(0.02)
        return True

    def topic_config(self, name: str) -> dict[str, str]:
        """All settings of a topic, defaults included, by name. Raises TopicMissing, ClusterUnreachable."""

        def asked(client: AdminClient) -> dict[str, str]:
            try:
                return self._configured(client, name)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise TopicMissing(f"topic {name} does not exist at {self.bootstrap}") from error
                raise

        return self.ask(asked, about=f"topic {name}: ")

    def topic_id(self, name: str) -> str:
        """The topic's UUID, which a topic deleted and made anew does not share.

        Raises TopicMissing, ClusterUnreachable.
        """
        if found := self.topic_ids([name]):
            return found[name]
        raise TopicMissing(f"topic {name} does not exist at {self.bootstrap}")

    def topic_ids(self, names: Collection[str]) -> dict[str, str]:
        """The UUIDs of those of these topics that exist, by name. Raises ClusterUnreachable."""

        def asked(client: AdminClient) -> dict[str, str]:
            found = {}
            for name, answer in client.describe_topics(TopicCollection([*names]), request_timeout=ANSWER).items():
                try:
                    found[name] = str(answer.result(ANSWER + 1).topic_id)
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                        raise
            return found

        return self.ask(asked, about=f"topic {', '.join(names)}: ")

    @staticmethod
    def _configured(client: AdminClient, name: str) -> dict[str, str]:
        resource = ConfigResource(ConfigResource.Type.TOPIC, name)
        answer = client.describe_configs([resource], request_timeout=ANSWER)[resource].result(ANSWER + 1)
        return {entry.name: entry.value for entry in answer.values()}

    @staticmethod
    def _described(client: AdminClient, name: str) -> TopicDescription:
        asked = client.describe_topics(TopicCollection([name]), request_timeout=ANSWER)
        described: TopicDescription = asked[name].result(ANSWER + 1)
        return described

    def delete_topics(self, names: Collection[str]) -> None:
        """Delete topics; those that are already gone are passed over. Returns once the broker lists them no more.

        Raises LabkitError when some are left, and all others are gone then; NotAllowed when the cluster forbids it.
        """
        if names:
            asked = admin(self).delete_topics(list(names), operation_timeout=10)
            left = self._failed(asked, ignore={KafkaError.UNKNOWN_TOPIC_OR_PART})
            gone = set(names) - left.keys()
            # The controller has answered; the broker hears of it a moment later.
            until = time.monotonic() + ANSWER
            while not self.topics().keys().isdisjoint(gone) and time.monotonic() < until:
                time.sleep(0.02)
            self._raise_undeleted("topic", left)

    def delete_groups(self, names: Collection[str]) -> None:
        """Delete consumer groups; those that are unknown, or still have a member, are passed over.

        Raises LabkitError when some are left, and all others are gone then; NotAllowed when the cluster forbids it.
        """
        if names:
            asked = admin(self).delete_consumer_groups(list(names), request_timeout=10)
            ignore = {KafkaError.GROUP_ID_NOT_FOUND, KafkaError.NON_EMPTY_GROUP}
            self._raise_undeleted("group", self._failed(asked, ignore))

    def groups(self) -> dict[str, bool]:
        """Every consumer group's name, and whether it has members."""
        listing = self.ask(lambda client: client.list_consumer_groups(request_timeout=ANSWER).result(ANSWER + 1))
        empty = (ConsumerGroupState.EMPTY, ConsumerGroupState.DEAD)
        return {group.group_id: group.state not in empty for group in listing.valid}

    def members(self, groups: Collection[str]) -> dict[str, list[frozenset[tuple[str, int]]]]:
        """The (topic, partition)s of each member of these groups; no members of one that is gone.

        Raises ClusterUnreachable.
        """
        if not groups:
            return {}

        def asked(client: AdminClient) -> dict[str, list[frozenset[tuple[str, int]]]]:
            found = {}
            for name, answer in client.describe_consumer_groups(list(groups), request_timeout=ANSWER).items():
                try:
                    there = answer.result(ANSWER + 1).members
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
                        raise
                    there = []
                found[name] = [_places(one.assignment) for one in there]
            return found

        return self.ask(asked)

    def ask(
        self, question: Callable[[AdminClient], T], patience: float = 10.0, about: str = "", also: int | None = None
    ) -> T:
        """Ask the process's admin client a question that may be repeated. It is repeated while the broker restarts or
        is not found yet, and while it answers with the error code `also`.

        Raises ClusterUnreachable for any other error, and for these when they last longer than `patience` seconds; its
        message begins with `about`. Raises ClientRefused when a login or a certificate is refused.
        """
        until, silent_before, looked = time.monotonic() + patience, False, False
        while True:
            client = admin(self)  # held here: if another thread replaces it, this question goes on
            try:
                return question(client)
            except (KafkaException, TimeoutError) as error:
                code = error.args[0].code() if isinstance(error, KafkaException) else KafkaError._TIMED_OUT
                # The next question goes to a new client: after a broker was frozen or killed, an old client may keep
                # the former leaders, or wait for ever for a controller that answers everybody else.
                if admin(self) is client:
                    forget(self, _client)
                # The error that is raised must not keep the client alive, which would go on trying.
                del client
                error.with_traceback(None)
                if self.security and not looked:  # only `describe` can tell a refused login from silence
                    looked = True
                    self._raise_refusal(about)
                silent = code == KafkaError._TIMED_OUT
                again = (silent and not silent_before) or (code in (*PASSING, also) and time.monotonic() < until)
                if not again:
                    raise ClusterUnreachable(
                        f"{about}no answer from {self.bootstrap} ({_reason(error)}): is the broker up? "
                        "`labkit status` tells"
                    ) from error
                silent_before = silent_before or silent
                time.sleep(0.1)  # nothing signals when the outage is over

    def _raise_refusal(self, about: str) -> None:
        """Raise ClientRefused if that is why there is no answer."""
        try:
            self.describe(2.0)
        except ClientRefused as refusal:
            raise ClientRefused(f"{about}{refusal}") from refusal
        except ClusterUnreachable:
            pass

    @staticmethod
    def _failed(asked: Mapping[str, Future[Any]], ignore: Collection[int]) -> dict[str, KafkaException | TimeoutError]:
        """Wait for all that was asked; returns what failed, and why, but for the error codes `ignore`."""
        until = time.monotonic() + 15
        failed: dict[str, KafkaException | TimeoutError] = {}
        for name, future in asked.items():
            try:
                future.result(max(0.0, until - time.monotonic()))
            except (KafkaException, TimeoutError) as error:
                if isinstance(error, TimeoutError) or error.args[0].code() not in ignore:
                    failed[name] = error
        return failed

    def _raise_undeleted(self, what: str, left: Mapping[str, KafkaException | TimeoutError]) -> None:
        if left:
            error = next(iter(left.values()))
            forbidden = isinstance(error, KafkaException) and error.args[0].code() in FORBIDDEN
            raise (NotAllowed if forbidden else LabkitError)(
                f"{len(left)} {what}{'s' * (len(left) != 1)} at {self.bootstrap} could not be deleted: {_reason(error)}"
            ) from error


# Errors that pass: of a broker that has just started or has handed the group to another one, and of a connection that
# is just ending or beginning.
PASSING = (
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.OFFSET_NOT_AVAILABLE,
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError._NOENT,  # "no leaders found"
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._DESTROY_BROKER,  # the client has just been told that the cluster is without this broker
)

# What a cluster with access control lists answers to a login that may not do what it asks for.
FORBIDDEN = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)


def _places(assignment: Any) -> frozenset[tuple[str, int]]:
    return frozenset((one.topic, one.partition) for one in assignment.topic_partitions) if assignment else frozenset()


def _client(cluster: Cluster, hear: Callable[[KafkaError], object] | None = None) -> AdminClient:
    """A new admin client; it calls `hear` with its errors. Raises ClientRefused when no client takes these settings."""
    try:
        return AdminClient(cluster.config({} if hear is None else {"error_cb": hear}))
    except KafkaException as error:
        why = explain(error.args[0], dict(cluster.security))
        raise ClientRefused(f"the client settings for {cluster.bootstrap} do not work: {why}") from error


def admin(cluster: Cluster) -> AdminClient:
    """The process's admin client for `cluster`. Raises ClientRefused."""
    return kept(_client, cluster, most=ADMINS)


def _reason(error: Exception) -> str:
    first = error.args[0] if error.args else error
    return first.str() if isinstance(first, KafkaError) else str(error) or type(error).__name__
