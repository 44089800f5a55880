"""A trap: it catches a pod at a step of its consumer, so that a fault strikes where it is meant to."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from labkit.kafka.consumer.steps import Step
from labkit.kafka.producer import POD

HOLD = 5.0  # seconds that a caught pod stands still


class Trap:
    """A consumer's `on_step`: the first pod that comes to an armed step is caught there, and the step is armed no more.

    A caught pod dies at once (kill -9), or, with `kill=False`, stands still for five seconds: long enough for the
    notebook to do something to it. The trap travels to the pods with their consumer. `file` is where it keeps, by
    step, whether it is armed and whom it has caught.
    """

    def __init__(self, file: Path, *armed: Step, kill: bool = True) -> None:
        self.file, self.kill = file, kill
        for step in armed:
            self.arm(step)

    def arm(self, step: Step) -> None:
        """Catch the next pod that comes to this step."""
        self._caught(step).unlink(missing_ok=True)
        self._armed(step).touch()

    def caught(self, step: Step) -> str:
        """The name of the pod that was caught at this step; empty before that."""
        return self._caught(step).read_text() if self._caught(step).exists() else ""

    def __call__(self, step: Step, subject: object) -> None:
        try:
            self._armed(step).rename(self._caught(step))
        except FileNotFoundError:  # it is not armed, or another pod was faster
            return
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        self._caught(step).write_text(os.environ[POD])
        time.sleep(HOLD)

    def _armed(self, step: Step) -> Path:
        return self.file.with_suffix(f".{step.name}.armed")

    def _caught(self, step: Step) -> Path:
        return self.file.with_suffix(f".{step.name}.caught")
