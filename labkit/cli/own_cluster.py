"""What `labkit doctor` looks at in a cluster that labkit has not set up: how it is set, and what it allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from labkit.cli.doctor import Check, Problem
from labkit.kafka import capabilities
from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError
from labkit.lab.runs import LEARNER, Run, learner
from labkit.runtime.which_kafka import Connection

RESTART = "in the settings of each broker, and restart it"


@dataclass(frozen=True)
class OwnCluster:
    """The cluster, and the names of what is tried there."""

    connection: Connection
    run: Run

    def checks(self) -> dict[str, tuple[Check, str]]:
        allow = (
            f"give this login the three rights of docs/own-cluster.md for the prefix labkit.{learner()}. "
            f"(or set {LEARNER} to the name that it has them for)"
        )
        return {
            "release": (self.release, "labkit is tried with Kafka 3.9 and 4.x: use one of them"),
            "settings": (self.settings, f"change them {RESTART}"),
            "topics": (self.topics, allow),
            "groups": (self.groups, allow),
            "transact.": (self.transactions, allow),
        }

    def release(self) -> str:
        found = capabilities.release(self.connection.cluster)
        if found == capabilities.OLDER:
            raise LabkitError(f"Kafka {found}, by the requests that it knows")
        return f"Kafka {found}, by the requests that it knows"

    def settings(self) -> str:
        """Most of them can be lived with: the text says what they do."""
        has = capabilities.broker_settings(self.connection.cluster)
        if not {"default.replication.factor", "min.insync.replicas"} <= has.keys():
            return "this login may not read the brokers' settings (DescribeConfigs): what they allow is tried below"
        brokers = len(self.connection.cluster.describe().brokers)
        replicas, confirm = int(has["default.replication.factor"]), int(has["min.insync.replicas"])
        both = f"default.replication.factor={replicas}, min.insync.replicas={confirm}; brokers: {brokers}"
        if replicas > brokers or confirm > replicas:
            raise Problem(
                f"{both}: no topic can be made, or none can be written",
                f"set default.replication.factor to no more than {brokers}, min.insync.replicas to no more than that, "
                f"{RESTART}",
            )
        lines = [both]
        if has.get("auto.create.topics.enable", "true") == "true":
            lines.append(
                "auto.create.topics.enable=true: other clients make a topic by a misspelt name, labkit's never"
            )
        else:
            lines.append("auto.create.topics.enable=false")
        delay = int(has.get("group.initial.rebalance.delay.ms", "3000"))
        slow = f": a new group's first record waits so long. For a class set it to 0 {RESTART}" if delay > 500 else ""
        lines.append(f"group.initial.rebalance.delay.ms={delay}{slow}")
        return "\n".join(lines)

    def topics(self) -> str:
        """Make one, look at it, and delete it. The other checks need one too, so a second one is left to them."""
        cluster, name = self.connection.cluster, self.run.name("deleted")
        cluster.create_topic(self._topic, 1)
        cluster.create_topic(name, 1)
        cluster.delete_topics([name])
        replicas, confirm = capabilities.replication(cluster, self._topic) or (1, 1)
        if confirm > replicas:
            raise Problem(
                f"a new topic has replication factor {replicas} and min.insync.replicas={confirm}: nothing can be "
                "written",
                f"set min.insync.replicas to no more than default.replication.factor, {RESTART}",
            )
        return (
            f"may be made and deleted under labkit.{learner()}.; replication {replicas}, min.insync.replicas {confirm}"
        )

    def groups(self) -> str:
        commit = partial(capabilities.commit_an_offset, group=self.run.name("group"), topic=self._topic)
        return self._tried(commit, "__consumer_offsets", "offsets.topic.replication.factor", "min.insync.replicas")

    def transactions(self) -> str:
        make = partial(capabilities.make_a_transaction, transactional_id=self.run.name("id"), topic=self._topic)
        own = "transaction.state.log"
        return self._tried(make, "__transaction_state", f"{own}.replication.factor", f"{own}.min.isr")

    def _tried(self, attempt: Callable[[Cluster], None], log: str, factor: str, least: str) -> str:
        """Try what Kafka keeps in a topic of its own, `log`, for which there are these two settings."""
        cluster, refused = self.connection.cluster, None
        try:
            attempt(cluster)
        except capabilities.Refused as error:
            if error.is_forbidden:
                raise
            refused = error
        has = capabilities.broker_settings(cluster)
        found = capabilities.replication(cluster, log) or (has and (has.get(factor, "?"), has.get(least, "?")))
        brokers = len(cluster.describe().brokers)
        text = f"{log} has replication {found[0]}, min.insync.replicas {found[1]}; brokers: {brokers}" if found else ""
        if refused is None:
            return f"may be used under labkit.{learner()}.; {text}".rstrip("; ")
        fix = f"set {factor} and {least} to no more than {brokers} {RESTART}; if the topic {log} exists, change it, too"
        raise Problem(f"{refused}; {text}".rstrip("; "), fix)

    @property
    def _topic(self) -> str:
        return self.run.name("try")
