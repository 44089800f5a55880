"""What `labkit doctor` looks at in a cluster that labkit has not set up: how it is set, and what it allows."""

from __future__ import annotations

from dataclasses import dataclass

from labkit.cli.doctor import Check, Problem
from labkit.kafka import capabilities
from labkit.kafka.errors import LabkitError
from labkit.lab.runs import LEARNER, Run, learner
from labkit.runtime.connect import Connection

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
        if not has:
            return "this login may not read the brokers' settings (DescribeConfigs): what they allow is tried below"
        brokers = self._brokers()
        replicas, confirm = int(has["default.replication.factor"]), int(has["min.insync.replicas"])
        both = f"default.replication.factor={replicas}, min.insync.replicas={confirm}, {brokers} brokers"
        if replicas > brokers or confirm > replicas:
            raise Problem(
                f"{both}: no topic can be made, or none can be written",
                f"set default.replication.factor to no more than {brokers}, min.insync.replicas to no more than that, "
                f"{RESTART}",
            )
        lines = [both]
        if has["auto.create.topics.enable"] == "true":
            lines.append(
                "auto.create.topics.enable=true: other clients make a topic by a misspelt name, labkit's never"
            )
        else:
            lines.append("auto.create.topics.enable=false")
        delay = int(has["group.initial.rebalance.delay.ms"])
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
        capabilities.commit_an_offset(self.connection.cluster, self.run.name("group"), self._topic)
        return f"may commit under labkit.{learner()}."

    def transactions(self) -> str:
        cluster = self.connection.cluster
        try:
            capabilities.make_a_transaction(cluster, self.run.name("transaction"), self._topic)
        except capabilities.Refused as refused:
            log = self._transaction_log()
            if refused.is_forbidden or log is None:
                raise  # the fix is to give the right
            brokers = self._brokers()
            raise Problem(
                f"{refused}; the log of transactions has replication factor {log[0]}, min.isr {log[1]}, and there are "
                f"{brokers} brokers",
                "set transaction.state.log.replication.factor and transaction.state.log.min.isr to no more than "
                f"{brokers} {RESTART}; if the topic {capabilities.TRANSACTION_LOG} exists already, change that",
            ) from refused
        log = self._transaction_log()
        has = f"; their log has replication {log[0]}, min.isr {log[1]}" if log else ""
        return f"may be made under labkit.{learner()}.{has}"

    @property
    def _topic(self) -> str:
        return self.run.name("try")

    def _brokers(self) -> int:
        return len(self.connection.cluster.describe().brokers)

    def _transaction_log(self) -> tuple[int, int] | None:
        """Its replicas, and how many must confirm: as it is, or as the settings would make it; None if unknown."""
        if (found := capabilities.replication(self.connection.cluster, capabilities.TRANSACTION_LOG)) is not None:
            return found
        has = capabilities.broker_settings(self.connection.cluster)
        wanted = [has.get(f"transaction.state.log.{name}") for name in ("replication.factor", "min.isr")]
        return (int(wanted[0]), int(wanted[1])) if wanted[0] and wanted[1] else None
