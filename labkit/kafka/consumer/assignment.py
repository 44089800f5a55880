"""Which partitions this member has, and where it begins in them. The client calls all of this in the thread that
polls, in the middle of a `consume`."""

from __future__ import annotations

import time
from itertools import chain

from confluent_kafka import Consumer as Client
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from labkit.kafka.consumer.commits import REACH, Commits
from labkit.kafka.consumer.lanes import Lane, Partition
from labkit.kafka.consumer.run import Run, log
from labkit.kafka.consumer.state import restore
from labkit.kafka.consumer.steps import Step
from labkit.kafka.consumer.workers import Workers
from labkit.kafka.errors import (
    ClientRefused,
    ClusterUnreachable,
    LabkitError,
    TopicMismatch,
    TopicMissing,
    Unavailable,
    error_text,
)
from labkit.kafka.lag import committed_offsets

AWAY = 30.0  # seconds to go on asking where partitions begin
GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_ID)


class Assignment:
    """Follows the group. Partitions of co-partitioned topics come and go with those that the group assigns."""

    def __init__(self, run: Run, commits: Commits, workers: Workers) -> None:
        self.run, self.commits, self.workers = run, commits, workers
        there = run.spec.cluster.topics()
        self.co_partitioned = {
            main: [(topic.name, there.get(topic.name, 0)) for topic in others]
            for main, others in run.spec.co_partitioned.items()
        }
        self.own = {name for topics in self.co_partitioned.values() for name, _ in topics}
        # Topics whose partitions are all read from the beginning, unless a commit says otherwise. The records of a
        # co-partitioned topic are the group's own. `start` is for a group without history. We look before we join,
        # because other new members may commit before we are assigned anything.
        self.known = set(self.own)
        if run.spec.start == "latest":
            names = [topic.name for topic in run.spec.sources]
            self.known |= {name for name, _ in committed_offsets(run.spec.cluster, run.spec.group, names)}
        self.made_anew: set[str] = set()  # topics that were deleted and recreated during the run
        self.newly_assigned: set[tuple[str, int]] = set()  # during the current consume call
        self.abandoned: list[Lane] = []  # their partitions were given up while the handler ran

    def subscribed(self) -> list[str]:
        """The topics whose partitions the group assigns."""
        return [topic.name for topic in self.run.spec.sources if topic.name not in self.own]

    def gone(self, topic: str | None) -> TopicMissing:
        """The error of a topic that was deleted."""
        names = topic or ", ".join(self.run.topic_ids)
        told = f"topic {names} was deleted while group {self.run.spec.group} was reading it"
        if topic in self.made_anew:
            return TopicMissing(f"{told}, and made anew: start the consumer again to read that one from its beginning")
        return TopicMissing(f"{told}: create a topic of another name and deploy again")

    def grown(self) -> TopicMismatch | None:
        """The error of a co-partitioned topic that was given more partitions: the group does not assign those.
        Raises ClusterUnreachable."""
        there = self.run.spec.cluster.topics() if self.own else {}
        for name, count in chain(*self.co_partitioned.values()):
            if there.get(name, 0) > count:
                return TopicMismatch(
                    f"topic {name} was given more partitions, {there[name]} instead of {count}, while group "
                    f"{self.run.spec.group} was reading it: start the consumer again, to read them too"
                )
        return None

    def store_gone(self) -> TopicMissing:
        """The error of a store that does not hold this group's state any more."""
        store, group = self.run.spec.store, self.run.spec.group
        assert store is not None  # noqa: S101
        return TopicMissing(
            f"the state of group {group} is not in topic {store.short} any more: the topic was deleted and made anew, "
            "or is another one than before. The state up to the group's offsets is lost: start a group of another name "
            "with a store of another name, to handle all records again"
        )

    def assigned(self, client: Client, partitions: list[TopicPartition]) -> None:
        """The group has assigned partitions."""
        self._check_one_writer(partitions)
        self.commits.before_assignment()
        starts, fresh = self._starts(client, self._with_co_partitioned(partitions))
        states = restore(self.run, {one.partition for one in starts})
        if self.run.spec.store is not None and (self.run.stop.is_set() or self.run.fatal is not None):
            starts, fresh = [], {}  # the state may be read half only
        self.known.update(self.run.topic_ids)  # partitions that come later were added: read them all
        self.commits.assign(starts)
        if not starts:
            return
        client.resume(starts)  # in librdkafka a pause outlives a rebalance
        for one in starts:
            key = (one.topic, one.partition)
            self.run.partitions[key] = Partition(one.topic, one.partition, one.offset)
            self.run.partitions[key].state = states.get(one.partition)
            self.newly_assigned.add(key)
        # "latest" means from now on: without a commit, what is produced while the member restarts would be lost.
        if fresh and not self.commits.commit_now(fresh):
            for key in fresh:  # refused, perhaps by a rebalance: included in the next commit
                self.run.partitions[key].committed = self.run.partitions[key].commit_requested = -1
        self.run.report(Step.ASSIGNED, [(one.topic, one.partition, one.offset) for one in starts])

    def _check_one_writer(self, partitions: list[TopicPartition]) -> None:
        """Raises TopicMismatch if another member has the same number of another topic: both would write one state."""
        store = self.run.spec.store
        if store is None:
            return
        ours = [one for one in partitions if one.partition < store.partitions]  # `restore` refuses the others
        given = [{one.partition for one in ours if one.topic == topic} for topic in self.subscribed()]
        if any(numbers != given[0] for numbers in given):
            raise TopicMismatch(
                f"another member of group {self.run.spec.group} reads other topics, so that both would write the state "
                "of one partition number: end those that were started with other topics first"
            )

    def revoked(self, client: Client, partitions: list[TopicPartition]) -> None:
        """The group revokes partitions: finish what runs, up to a bound, and commit."""
        partitions = self._with_co_partitioned(partitions)
        try:
            self.release(self.run.assigned_among(partitions))
        finally:
            self.commits.unassign(partitions)
        self.run.report(Step.REVOKED, [(one.topic, one.partition) for one in partitions])

    def lost(self, client: Client, partitions: list[TopicPartition]) -> None:
        """The group gave partitions to others while this member was away: discard everything of them."""
        partitions = self._with_co_partitioned(partitions)
        self.commits.lost()
        self.forget(self.run.assigned_among(partitions))
        self.commits.unassign(partitions)
        self.run.report(Step.LOST, [(one.topic, one.partition) for one in partitions])

    def release(self, partitions: list[Partition]) -> None:
        """Give partitions up: start nothing more, wait for what runs, commit. Nothing is committed later."""
        for partition in partitions:
            partition.active = False
        until = time.monotonic() + self.run.spec.drain
        while any(lane.busy() for p in partitions for lane in list(p.lanes.values())) and time.monotonic() < until:
            self.run.wake.clear()
            self.run.wake.wait(0.01)
        lost = {p.state for p in partitions if p.state is not None and p.topic in self.made_anew}
        for state in lost:
            state.changes.clear()  # changes made from the old topic are not written either
        positions = {
            p: 0 if p.topic in self.made_anew else at  # 0: nothing of the new topic is handled
            for p in partitions
            if p.topic in self.made_anew or ((at := p.position()) > p.committed and p.state not in lost)
        }
        self.forget(partitions)
        if positions:
            self.commits.settle(positions)

    def forget(self, partitions: list[Partition]) -> None:
        """Discard everything of these partitions, also what a worker still works on."""
        for partition in partitions:
            self.run.partitions.pop((partition.topic, partition.number), None)
        self.abandoned += self.workers.forget(partitions)

    def _with_co_partitioned(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        others = [
            TopicPartition(name, one.partition)
            for one in partitions
            for name, count in self.co_partitioned.get(one.topic, ())
            if one.partition < count
        ]
        return [*partitions, *others]

    def _starts(
        self, client: Client, partitions: list[TopicPartition]
    ) -> tuple[list[TopicPartition], dict[tuple[str, int], int]]:
        """Where to begin, and which of these positions are to be committed. Asks until there is an answer."""
        spec, until = self.run.spec, time.monotonic() + AWAY
        while partitions and not self.run.stop.is_set():
            try:
                return self._ask_starts(client, partitions)
            except KafkaException as error:
                if error.args[0].code() in GONE:
                    raise self.gone(None) from error
                if time.monotonic() > until:
                    raise ClusterUnreachable(
                        f"{spec.cluster.bootstrap} did not say within {AWAY:g} s where group {spec.group} begins: "
                        f"{error.args[0].str()}"
                    ) from error
            except (Unavailable, ClusterUnreachable) as error:  # raised by `positions`
                if isinstance(error, ClientRefused) or time.monotonic() > until:
                    raise
                log(f"{spec.group}: start positions are not available yet: {error_text(error)}")
            self.run.stop.wait(0.1)
        return [], {}

    def _ask_starts(
        self, client: Client, partitions: list[TopicPartition]
    ) -> tuple[list[TopicPartition], dict[tuple[str, int], int]]:
        spec = self.run.spec
        starts: list[TopicPartition] = []
        fresh: dict[tuple[str, int], int] = {}
        stored = spec.positions and spec.positions([(one.topic, one.partition) for one in partitions])
        for one in client.committed(partitions, timeout=REACH):
            if one.error is not None:  # an error is not "nothing committed"
                raise KafkaException(one.error)
            key = (one.topic, one.partition)
            offset = one.offset if stored is None else stored.get(key, -1)
            if stored is None and self.commits.of_another_topic(one):
                log(
                    f"{spec.group}: offset {offset:,} was committed for a topic {one.topic} that was deleted since: "
                    f"partition {one.partition} of the new one is read from its beginning"
                )
                offset = -1
            if offset > 0 and self.commits.of_another_store(one):
                raise self.store_gone()
            if offset < 0:
                low, high = client.get_watermark_offsets(TopicPartition(*key), timeout=REACH)
                latest = spec.start == "latest" and one.topic not in self.known
                offset = high if latest else low
                if latest:
                    fresh[key] = offset
            if offset != one.offset and (stored is not None or one.offset >= 0):
                fresh[key] = offset  # else the lag would count another topic's records
            starts.append(TopicPartition(*key, offset))
        return starts, fresh

    def jumped(self, client: Client, partition: Partition, at: int) -> Partition:
        """The client goes on at another offset than the next one. Compaction and transaction markers make such gaps. If
        the next offset is out of the topic's range, this is logged, and a partition that goes back begins anew. The run
        ends if it keeps a state or its own positions, which belong to the lost offset."""
        topic, number, expected = partition.topic, partition.number, partition.next_offset
        low, high = client.get_watermark_offsets(TopicPartition(topic, number), cached=True)  # as of the last fetch
        if expected < low <= at:
            why = f"its records before offset {low:,} were deleted"
        elif at < expected and (at <= low or high < expected):
            why = f"it ends before that, at {high:,}"
        else:
            return partition
        told = f"group {self.run.spec.group} is to read {topic}/{number} from offset {expected:,} on, but {why}"
        if self.run.spec.positions is not None or (partition.state is not None and at < expected):
            self.run.end(LabkitError(f"{told}: rebuild what was made of its records"))
            return partition
        log(f"{told}: it goes on at the first record that is there, offset {at:,}")
        if at < expected:
            self.forget([partition])
            partition = self.run.partitions[topic, number] = Partition(topic, number, at)
            partition.committed = partition.commit_requested = -1  # else the stored offset could be skipped again
        return partition
