"""Pattern 6: commands are counted, and an import's end is told, exactly once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from aggregating import aggregator, count, counting, noticed, notify, report, stored
from confluent_kafka import Producer as Client
from consuming import Member, Process, committed, crash_points, fresh_group, fresh_topic, put
from processes import wait_until
from stores import raw, store_topic
from transacting import values

import labkit.kafka.consumer.transactions as transactions_module
from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer.steps import Step
from labkit.kafka.consumer.transactional_client import MustAbort, TransactionalClient
from labkit.kafka.errors import LabkitError, TopicMismatch, TopicMissing
from labkit.kafka.lag import lag
from labkit.kafka.reader import Reader
from labkit.kafka.topics import Topic
from labkit.patterns.aggregation import AtomicKeyValueStore, Command, ImportKey
from labkit.patterns.dead_letters import DeadLetters
from labkit.patterns.retries import blocking
from labkit.runtime.which_kafka import Connection


def done(member: Member) -> None:
    """Wait until nothing is left to be counted."""
    consumer = member.consumer
    names = [topic.name for topic in consumer.sources]
    member.journal.wait(lambda: not sum(lag(consumer.cluster, consumer.group, names).values()), what="no lag")


def places(topic: Topic[Any]) -> set[tuple[str | None, int]]:
    """Which keys lie in which partitions."""
    with Reader(topic) as reader:
        return {(record.key, record.partition) for record in reader.read_to_end()}


def test_jobs_are_counted_and_the_end_of_an_import_is_told_once(cluster: Cluster) -> None:
    """correctness 40: not early while jobs are still to come, over a restart; the counts are where the commands are."""
    store, notices = counting(cluster, 3)
    report(store, ("a", 4), ("b", 2), ("c", 5), jobs=2)
    with Member(aggregator(store)) as member:
        done(member)
        assert stored(store.store) == {"a-4": 2, "b-2": 2, "c-5": 2}
        assert noticed(notices) == ["b"]
    report(store, ("a", 4), ("c", 5), jobs=2)
    with Member(aggregator(store)) as member, store.reads() as reads:
        done(member)
        report(store, ("c", 5), ("d", 1))
        wait_until(lambda: reads.get("d-1") == 1 and reads.get("c-5") == 5, what="a local read")
        assert reads["a-4"] == 4
    assert noticed(notices) == ["a", "b", "c", "d"]
    assert places(store.commands) == places(store.store)


def test_commands_of_one_transaction_are_merged_by_key(cluster: Cluster) -> None:
    """A thousand jobs of one import that are there at once are one record in the store, or two."""
    store, notices = counting(cluster)
    report(store, ("a", 1000), jobs=1000)
    with Member(aggregator(store, commit_interval=600)) as member:
        member.journal.wait(lambda: len(member.journal.of(Step.HANDLED)) == 1000, what="all to be counted")
    written = values(store.store)  # by the first commit, which may come at once, and by the last one
    assert written[-1] == 1000
    assert len(written) <= 2
    assert noticed(notices) == ["a"]


def test_what_cannot_be_counted_is_set_aside_and_the_rest_counts(cluster: Cluster) -> None:
    """Each with its place; the others of its key and of its batch are counted."""
    store, notices = counting(cluster)
    bad = ["YYY", "", "-3", "a-0", "a--1", "a-x", "a-2.0", "a-02", "a-٣", "a -2 "]
    put(store.commands, "job", key="a-2")
    for key in bad:
        put(store.commands, "job", key=key)
    put(store.commands, "job")
    raw(store.commands, (b"a-\xff", b'"job"'))
    put(store.commands, "job", "too many", key="a-2")
    put(store.commands, "job", key="b-2")
    with Member(aggregator(store)) as member:
        member.wait_committed({0: len(bad) + 6})
        with store.dead_letters() as letters:
            assert sorted(one.offset for one in letters.values()) == [*range(1, len(bad) + 3), len(bad) + 4]
            assert {one.topic for one in letters.values()} == {store.commands.name}
            assert "more jobs" in letters[f"{store.commands.name}/0/{len(bad) + 4}"].error
    assert stored(store.store) == {"a-2": 2, "b-2": 1}
    assert noticed(notices) == ["a"]


def distinct(jobs: set[str] | None, command: Command[ImportKey, str]) -> set[str]:
    """Keyed by job, in place: one that is reported again changes nothing."""
    jobs = set() if jobs is None else jobs
    assert command.value is not None
    jobs.add(command.value)
    return jobs


def test_a_job_that_is_reported_twice_counts_once_and_no_notice_comes_again(cluster: Cluster) -> None:
    """correctness 40: the last job too, after the import is done; a value that is changed in place has changed."""
    store, notices = counting(cluster, update=distinct, value=set[str])

    def tell(key: ImportKey, old: set[str] | None, new: set[str]) -> None:
        notify(notices, key, len(old or ()), len(new))

    store = replace(store, callback=tell)
    put(store.commands, "1", "2", "2", "1", "3", key="a-3")
    with Member(aggregator(store)) as member:
        member.wait_committed({0: 5})
        put(store.commands, "3", "3", key="a-3")
        member.wait_committed({0: 7})
    assert stored(store.store) == {"a-3": {"1", "2", "3"}}
    assert noticed(notices) == ["a"]


def fails_in_place(jobs: list[str] | None, command: Command[ImportKey, str]) -> Any:
    """Adds the job first, and then does what the job says."""
    jobs = [] if jobs is None else jobs
    what: Any = command.value
    jobs.append(what)
    ways: dict[str, Callable[[], Any]] = {
        "raises": lambda: 1 / 0,
        "does not encode": lambda: [*jobs, object()],
        "no number": lambda: [*jobs, float("nan")],
        "another type": lambda: {"jobs": jobs},
        "nothing": lambda: None,
        "too large": lambda: [*jobs, "x" * 2_000_000],
    }
    return ways.get(what, lambda: jobs)()


def test_of_an_attempt_that_fails_nothing_counts(cluster: Cluster) -> None:
    """correctness 20, 34: not what it changed in its argument, nor what it returned or sent; nothing is aborted."""
    store, notices = counting(cluster, update=fails_in_place, value=list[str])

    def tell(key: ImportKey, old: list[str] | None, new: list[str]) -> None:
        notices.send(" ".join(new))
        if "no callback" in new:
            raise ConnectionError("no answer")

    bad = ["raises", "does not encode", "no number", "another type", "nothing", "too large", "no callback"]
    put(store.commands, "1", *bad, "2", b"no JSON", "raises", "3", key="a-3")
    with Member(aggregator(replace(store, callback=tell))) as member:
        member.wait_committed({0: 12})
        with store.dead_letters() as letters:
            assert sorted(one.offset for one in letters.values()) == [*range(1, 8), 9, 10]
    assert stored(store.store) == {"a-3": ["1", "2", "3"]}
    told = values(notices)
    assert told[-1] == "1 2 3"
    assert not any(word in text for text in told for word in bad)
    assert member.journal.of(Step.MEASURED)[-1].counts["transactions aborted"] == 0


def test_a_dead_letter_is_replayed_while_others_of_its_key_run(cluster: Cluster) -> None:
    """It counts once, where its key's state is: in the partition in which another client's partitioner put it."""
    broken = True

    def update(found: int | None, command: Command[ImportKey, str]) -> int:
        if broken and command.value == "2":
            raise ConnectionError("no answer")
        return count(found, command)

    store, notices = counting(cluster, 3, update)
    keys = ["a-50", "b-50", "c-50", "d-50"]
    for key in keys:
        put(store.commands, *map(str, range(25)), partition=2, key=key)
    aggregator(store).prepare()
    with Member(aggregator(store)) as member, store.dead_letters() as letters:
        wait_until(lambda: len(letters) == 4, what="four letters")
        broken = False
        letters.replay()
        for key in keys:
            put(store.commands, *map(str, range(25)), partition=2, key=key)
        wait_until(lambda: not letters, what="the letters to go")
        done(member)
    assert stored(store.store) == dict.fromkeys(keys, 50)
    assert {partition for _, partition in places(store.store)} == {2}
    assert noticed(notices) == ["a", "b", "c", "d"]


def test_a_key_from_clients_with_two_partitioners_is_told(cluster: Cluster) -> None:
    """Its value cannot be one: nobody reads both partitions."""
    store, _ = counting(cluster, 2)
    put(store.commands, "1", partition=0, key="a-9")
    put(store.commands, "2", partition=1, key="a-9")
    with Member(aggregator(store)) as member:
        done(member)
    with store.reads() as reads:
        assert reads.scattered == {"a-9": (0, 1)}


@pytest.mark.long  # test_state_waiting.py has a second member
def test_state_goes_with_its_partitions_while_members_come_and_go(cluster: Cluster) -> None:
    """A second deployment shares the work; totals are exact, and each notice comes once."""
    store, notices = counting(cluster, 4)
    requests = [(f"r{number}", 100) for number in range(20)]
    report(store, *requests, jobs=30)
    with Member(aggregator(store)) as first:
        first.journal.wait(lambda: sum(committed(store.commands, store.group).values()) > 100, what="some work")
        with Member(aggregator(store, "two")) as second:
            second.journal.wait(lambda: len(second.journal.assigned()) == 4, what="its share")
            report(store, *requests, jobs=40)
            second.journal.wait_for(Step.COMMITTED)
            report(store, *requests, jobs=10)
        report(store, *requests, jobs=20)
        done(first)
    assert stored(store.store) == {f"{request}-100": 100 for request, _ in requests}
    assert noticed(notices) == sorted(request for request, _ in requests)


def test_after_an_abort_all_changes_go_with_the_next_transaction(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """correctness 20, 26: no update runs again; a later state is read past what was aborted."""
    aborted: list[int] = []
    calls: list[str | None] = []

    class Failing(TransactionalClient):
        def commit(self, wait: float) -> None:
            if len(aborted) < 2:
                self.flush(5.0)
                aborted.append(1)
                raise MustAbort("as asked")
            super().commit(wait)

    def update(found: int | None, command: Command[ImportKey, str]) -> int:
        calls.append(command.value)
        return count(found, command)

    monkeypatch.setattr(transactions_module, "TransactionalClient", Failing)
    store, notices = counting(cluster, update=update)
    report(store, ("a", 20), ("b", 10), jobs=10)
    with Member(aggregator(store)) as member:
        member.wait_committed({0: 20})
    assert (len(aborted), len(calls)) == (2, 20)
    assert stored(store.store) == {"a-20": 10, "b-10": 10}
    assert len(values(store.store, committed=False)) > len(values(store.store))
    report(store, ("a", 20), jobs=10)
    with Member(aggregator(store)) as member:
        member.wait_committed({0: 30})
    assert stored(store.store) == {"a-20": 20, "b-10": 10}
    assert noticed(notices) == ["a", "b"]


def test_a_state_is_read_past_aborted_records_and_tombstones(cluster: Cluster) -> None:
    """correctness 25, 26: the store ends with what was aborted, and its markers."""
    store, _ = counting(cluster)
    raw(store.store, (b"a-9", b"3"), (b"b-9", b"3"), (b"b-9", None))
    client = Client(cluster.config({"transactional.id": fresh_group()}))
    client.init_transactions(10)
    for end in (client.commit_transaction, client.abort_transaction):
        client.begin_transaction()
        client.produce(store.store.name, b"5" if end == client.commit_transaction else b"8", b"a-9", 0)
        client.flush(10)
        end(10)
    report(store, ("a", 9), ("b", 9))
    with Member(aggregator(store)) as member:
        member.wait_committed({0: 2})
    assert stored(store.store) == {"a-9": 6, "b-9": 1}


def test_a_state_that_does_not_decode_counts_nothing(cluster: Cluster) -> None:
    """Somebody else has written to the store: commands of this key are set aside, the others count."""
    store, _ = counting(cluster)
    raw(store.store, (b"a-9", b"no number"))
    report(store, ("a", 9), ("b", 9))
    with Member(aggregator(store)) as member:
        member.wait_committed({0: 2})
        with store.dead_letters() as letters:
            assert [one.key for one in letters.values()] == ["a-9"]
    with store.reads() as reads:
        assert reads["b-9"] == 1


# -- the same logic in another service


def test_another_service_calls_back_once(cluster: Cluster) -> None:
    """correctness 40: though Kafka dropped the exact value, more changes come, and it is started again."""
    store, notices = counting(cluster)
    seen = store_topic(cluster, 1, int)
    raw(store.store, (b"a-3", b"2"), (b"b-3", b"4"), (b"c-3", b"1"), (b"c-3", None))
    raw(store.store, (b"no key", b"9"))
    consumer = replace(store.follow(partial(notify, notices), seen, slot="one"), commit_interval=0.05)
    with Member(consumer) as member:
        done(member)
        assert noticed(notices) == ["b"]
        with DeadLetters(store.store, seen.name) as letters:
            assert [one.offset for one in letters.values()] == [4]
    raw(store.store, (b"a-3", b"3"), (b"b-3", b"5"), (b"a-3", b"3"))
    with Member(consumer) as member:
        done(member)
    assert noticed(notices) == ["a", "b"]


# -- kill -9


STEPS = [Step.HANDLED, Step.COMMITTING, Step.OFFSETS_SENT, Step.FLUSHED, Step.COMMITTED]
FIRST = {(Step.FLUSHED, "kill")}


@pytest.mark.parametrize(("step", "how"), crash_points(STEPS, FIRST))
def test_an_aggregator_that_is_killed_or_frozen_at_a_step_counts_each_job_once(
    cluster: Cluster, step: Step, how: str
) -> None:
    store, notices = counting(cluster)
    report(store, ("a", 5), ("b", 9), jobs=5)
    options = {"store": store.store.name, "notices": notices.name, "slot": "one"}
    with Process(store.commands, store.group, **options, crash_at=step.value, crash_how=how) as process:
        process.wait_for(step)
        if how == "kill":
            assert process.ends() == -9
        with Member(aggregator(store)) as member:
            report(store, ("b", 9), jobs=4)
            member.wait_committed({0: 14})
        if how == "freeze":
            process.thaw()
            assert process.ends() == 1
    assert stored(store.store) == {"a-5": 5, "b-9": 9}
    assert noticed(notices) == ["a", "b"]


@pytest.mark.long  # the aggregator is killed there too
@pytest.mark.parametrize("step", [Step.HANDLED, Step.FLUSHED], ids=lambda step: step.value)
def test_a_service_that_is_killed_between_notice_and_commit_has_told_once(cluster: Cluster, step: Step) -> None:
    """correctness 40: one notice, of a service with the completion logic."""
    store, notices = counting(cluster)
    seen = store_topic(cluster, 1, int)
    raw(store.store, (b"a-3", b"3"))
    options = {"store": store.store.name, "notices": notices.name, "slot": "one", "seen": seen.name}
    with Process(store.commands, seen.name, **options, crash_at=step.value) as process:
        assert process.ends() == -9
    if step is Step.FLUSHED:
        assert values(notices, committed=False) == ["a"]
    with Member(store.follow(partial(notify, notices), seen, slot="one")) as member:
        done(member)
    assert noticed(notices) == ["a"]


# -- what is refused


def test_what_cannot_keep_a_state_is_refused_with_the_fix(cluster: Cluster) -> None:
    store, _ = counting(cluster, 2)
    fewer = replace(store, store=store_topic(cluster, 1, int))
    with pytest.raises(TopicMismatch, match="same number"):
        fewer.consumer("one").prepare()
    with pytest.raises(TopicMismatch, match="compact"):
        replace(store, store=fresh_topic(cluster, 2)).consumer("one").prepare()
    with pytest.raises(TopicMissing):
        replace(store, store=replace(store.store, name=fresh_group())).consumer("one").prepare()
    with pytest.raises(LabkitError, match="dead_letter"):
        replace(store.consumer("one"), retry=blocking(1))
    for key in ("", "a-"):
        with pytest.raises(LabkitError):
            ImportKey(key, 1)
    with pytest.raises(LabkitError):
        ImportKey("a", 0)


def test_partitions_added_to_the_commands_end_the_aggregator(cluster: Cluster) -> None:
    """Keys have moved away from their state: it says so, also to who starts it again."""
    from confluent_kafka.admin import NewPartitions

    from labkit.kafka.cluster import admin

    store, _ = counting(cluster)
    report(store, ("a", 9))
    member = Member(aggregator(store))
    member.__enter__()
    member.wait_committed({0: 1})
    (future,) = admin(cluster).create_partitions([NewPartitions(store.commands.name, 2)]).values()
    future.result(10)
    assert isinstance(member.ends(30), TopicMismatch)
    with pytest.raises(TopicMismatch, match="same number"):
        aggregator(store).prepare()


@pytest.mark.long
def test_a_slow_update_lets_the_loop_poll_and_commit(cluster: Cluster) -> None:
    """A batch is cut by time: what it has counted is committed while the rest is still to come."""

    def update(found: int | None, command: Command[ImportKey, str]) -> int:
        time.sleep(0.02)  # the work itself
        return count(found, command)

    store, _ = counting(cluster, update=update)
    report(store, ("a", 100), jobs=100)
    first: list[int] = []

    def told(step: Step, subject: Any) -> None:
        if step is Step.COMMITTED:
            first.append(subject[store.commands.name, 0])

    with Member(aggregator(store, on_change=told)) as member:
        member.wait_committed({0: 100})
    assert first[0] < 100
    assert stored(store.store) == {"a-100": 100}


def test_a_store_works_without_a_typed_key_and_a_callback(cluster: Cluster) -> None:
    """As the README has it: any text for a key, any value."""
    commands, topic = fresh_topic(cluster, 1), store_topic(cluster, 1, int)

    def add(total: int | None, command: Command[str, int]) -> int:
        return (total or 0) + (command.value or 0)

    sums: AtomicKeyValueStore[str, int, int] = AtomicKeyValueStore(commands, topic, add)
    for value in (1, 2, 3):
        sums.send("a", value)
    commands.flush()
    with Member(aggregator(sums)) as member:
        member.wait_committed({0: 3})
    assert stored(topic) == {"a": 6}


@pytest.mark.long
def test_300_000_commands_with_pods_killed_and_scaled_are_counted_exactly(connection: Connection) -> None:
    """correctness 40: 10 partitions, three kill -9, 1 pod, then 3, then 2."""
    lab = Lab("aggregation")
    try:
        commands, notices = lab.topic("job-completed-commands", 10, str), lab.topic("notices", 1, str)
        store = lab.topic("jobs-completed-store", 10, int, compacted=True)
        counts = AtomicKeyValueStore(commands, store, count, key=ImportKey.parse, callback=partial(notify, notices))
        requests = [(f"r{number}", 300) for number in range(1000)]
        pods = lab.deploy("aggregator", counts.consumer())

        def counted() -> int:
            return sum(committed(commands, counts.group).values())

        report(counts, *requests, jobs=150)
        wait_until(lambda: counted() > 20_000, 60, "some work")
        pods.pods[0].kill()
        pods.scale(3)
        wait_until(lambda: counted() > 100_000, 60, "more work")
        pods.pods[1].kill()
        report(counts, *requests, jobs=150)
        pods.pods[2].kill()
        pods.scale(2)
        wait_until(lambda: counted() > 200_000, 60, "most of the work")
        assert lab.settle(120)
        assert stored(store) == {f"{request}-300": 300 for request, _ in requests}
        assert noticed(notices) == sorted(request for request, _ in requests)
    finally:
        lab._end(0)
