"""How far an import has got: the reports of importers, and the value that the store makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from labkit.kafka.errors import LabkitError
from labkit.kafka.topics import Topic
from labkit.services.contacts.jobs import MOST, Job


class JobFinished(msgspec.Struct, frozen=True):
    """A command for the store: this job, of `total`, is done, or was given up."""

    job: int
    total: int
    failed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.job <= self.total <= MOST:
            raise ValueError(f"there is no job {self.job:,} of {self.total:,}: it needs 1 ≤ job ≤ total ≤ {MOST:,}")


@dataclass(frozen=True)
class Progress:
    """The value of an import in the store."""

    total: int
    done: int = 0
    failed: int = 0
    done_jobs: bytes = field(default=b"", repr=False)
    """A bit for each job that is done, so that a job counts once even if it is reported twice."""
    failed_jobs: bytes = field(default=b"", repr=False)

    @property
    def completed(self) -> bool:
        """Whether every job was done or given up."""
        return self.done + self.failed == self.total


def progress(value: Progress | None, command: JobFinished) -> Progress:
    """The update function of the store.

    A job that was given up counts as done once a replay has done it; a job that is done stays done. Raises LabkitError
    for a command of an import with another number of jobs.
    """
    before = Progress(command.total) if value is None else value
    if command.total != before.total:
        raise LabkitError(f"job {command.job} is one of {command.total:,}, and its import has {before.total:,} jobs")
    done, failed = int.from_bytes(before.done_jobs), int.from_bytes(before.failed_jobs)
    bit = 1 << (command.job - 1)
    if command.failed:
        failed |= bit & ~done
    else:
        done, failed = done | bit, failed & ~bit
    return Progress(before.total, done.bit_count(), failed.bit_count(), _bitmap(done), _bitmap(failed))


def _bitmap(bits: int) -> bytes:
    return bits.to_bytes((bits.bit_length() + 7) // 8)


@dataclass(frozen=True)
class Reports:
    """Reports a finished job to the store, by a command with the key of its import: so one partition has them all.

    The key is the request and its number of jobs: `YYY-6`. In a handler, the command goes with what the handler sends.
    """

    commands: Topic[JobFinished]

    def __call__(self, job: Job, failed: bool = False) -> None:
        self.commands.send(JobFinished(job.number, job.total, failed), f"{job.request}-{job.total}")
