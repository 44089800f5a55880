"""What labs have left on a cluster, read from the cluster alone: the machine that made it may be gone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from labkit.kafka.cluster import Cluster
from labkit.kafka.errors import LabkitError, NotAllowed
from labkit.lab import runs
from labkit.runtime.which_kafka import Connection


@dataclass(frozen=True)
class Remains:
    """Topics and groups of one run; or, without a notebook and a run, a learner's last verdicts."""

    learner: str
    notebook: str
    run: str
    topics: Collection[str]
    groups: Collection[str]
    life: str = ""
    """By what the run shows that it lives. Empty if it has ended, as far as can be told."""

    @property
    def prefix(self) -> str:
        """What its names begin with."""
        return f"labkit.{self.learner}.{self.notebook}.{self.run}."


def remains(cluster: Cluster) -> list[Remains]:
    """What is on the cluster of each learner and run.

    A run of this machine lives as long as its record is locked. Of a run elsewhere, the members of its groups are what
    can be seen: one without a consumer counts as ended. Raises ClusterUnreachable.
    """
    topics, groups = cluster.topics(), cluster.groups()
    here = dict(runs.living())  # after them, or a run that began meanwhile would count as ended
    topics_of, groups_of = runs.by_run(topics), runs.by_run(groups)
    listed = [Remains(one[1], "", "", [name], []) for name in topics if (one := runs.CLASS_TOPIC.fullmatch(name))]
    for prefix in topics_of.keys() | groups_of.keys():
        _, learner, notebook, run, _ = prefix.split(".")
        life = f"process {here[prefix]} of this machine has it" if prefix in here else ""
        if not life and (busy := [name.removeprefix(prefix) for name in groups_of[prefix] if groups[name]]):
            life = f"group {', '.join(busy)} has members"
        listed.append(Remains(learner, notebook, run, topics_of[prefix], groups_of[prefix], life))
    return sorted(listed, key=lambda one: (one.learner, one.notebook, one.run))


def remove(cluster: Cluster, ended: Collection[Remains]) -> tuple[list[str], list[str]]:
    """Delete these topics and groups, but for a run that has come to life again since they were looked at: a machine
    that slept has woken. Returns the names that are still there, and why.

    Raises ClusterUnreachable when nobody can say what is there.
    """
    alive = {one.prefix: one for one in remains(cluster) if one.life}
    again = (alive[one.prefix] for one in ended if one.prefix in alive)
    why = [f"Run {one.run} of {one.learner} lives again: {one.life}." for one in again]
    forbidden = False
    gone = [one for one in ended if one.prefix not in alive]
    topics = [name for one in gone for name in one.topics]
    groups = [name for one in gone for name in one.groups]
    for delete, names in ((cluster.delete_topics, topics), (cluster.delete_groups, groups)):
        try:
            delete(names)
        except LabkitError as error:
            why.append(str(error))
            forbidden = forbidden or isinstance(error, NotAllowed)
    if forbidden:
        learners = {one.learner for one in ended}
        prefix = f"labkit.{learners.pop()}." if len(learners) == 1 else "labkit."
        why.append(runs.allowance("Delete", "topics and groups", prefix))
    there = {*cluster.topics(), *cluster.groups()}
    return sorted(there.intersection(name for one in ended for name in (*one.topics, *one.groups))), why


def warn_of_namesakes(connection: Connection) -> None:
    """Warn who uses the name of somebody who works on another machine now. Raises ClusterUnreachable."""
    if connection.origin != "external":
        return  # a Kafka of this machine
    there, here, name = remains(connection.cluster), runs.recorded(), runs.learner()
    for one in there:
        if one.life and one.learner == name and one.prefix not in here:
            print(  # noqa: T201
                f"{name} runs notebook {one.notebook} on another machine, too: {one.life}. If that is not you, set "
                f"{runs.LEARNER} to a name of your own and begin again. Until then `labkit` takes you for one learner."
            )
