"""The threads that call the handler, and what they do when it fails."""

from __future__ import annotations

import heapq
import inspect
import itertools
import math
import threading
import time
from collections.abc import Iterable, Sequence
from queue import SimpleQueue
from typing import Any

from labkit.kafka.consumer.commits import Commits
from labkit.kafka.consumer.failures import Decision, FailedRecord, Retry, SetAside, Stop, keep_trying
from labkit.kafka.consumer.lanes import Lane, LaneState, Partition
from labkit.kafka.consumer.run import Run, log, log_traceback
from labkit.kafka.consumer.steps import Step
from labkit.kafka.errors import DeliveryFailed, HandlerExit, PoisonRecord, error_text, safe_text
from labkit.kafka.producer import HandlerContext, handling
from labkit.kafka.records import Message, Record, coordinates, decoder

STAY = 256  # records a lane may handle before it lets other lanes have its worker
CONFIRM = 5.0  # seconds for a record that is set aside to be confirmed; then its lane counts as blocked
AGAIN, AGAIN_CAP = 0.5, 10.0  # seconds until a refused record is set aside again, doubling
OURS = ("labkit.kafka.", "labkit.patterns.")  # modules between the loop and the user's handler
TRACED = 1.0  # seconds between two tracebacks of one error type


class Workers:
    """A bounded pool of threads. Each takes a lane, handles its records, and leaves it when it is empty or waits."""

    def __init__(self, run: Run, commits: Commits) -> None:
        self.run, self.commits, self.spec = run, commits, run.spec
        self.decode = {topic.name: decoder(topic.value) for topic in run.spec.sources}
        self.ready: SimpleQueue[Lane | None] = SimpleQueue()  # lanes that want a worker
        self.waiting: list[tuple[float, int, Lane]] = []  # a heap: when lanes go on
        self._waiting_lock = threading.Lock()
        self._tie = itertools.count()
        self._traced: dict[type[BaseException], float] = {}  # until when errors of this type are logged in one line
        self._threads = [  # daemons: a thread that hangs in its handler must not keep the process alive
            threading.Thread(target=self._serve, name=f"lane-{number}", daemon=True)
            for number in range(run.spec.workers)
        ]

    # -- called by the thread that polls

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        for _ in self._threads:
            self.ready.put(None)

    def next_due(self) -> float | None:
        """When the next lane goes on, as time.monotonic() counts."""
        with self._waiting_lock:
            return self.waiting[0][0] if self.waiting else None

    def resume(self, now: float) -> None:
        """Give lanes whose wait is over to a worker."""
        while True:
            with self._waiting_lock:
                if not self.waiting or self.waiting[0][0] > now:
                    return
                due, _, lane = heapq.heappop(self.waiting)
            with lane.partition.lock:
                if lane.due != due or not lane.partition.active:  # this wait has ended already
                    continue
                if lane.state is LaneState.BACKING_OFF:
                    lane.to(LaneState.RUNNING)
                    self.ready.put(lane)
                    continue
                late = lane.failed if lane.state is LaneState.SETTING_ASIDE else None
                if late is None:
                    continue
                late.refused = DeliveryFailed(f"not confirmed within {CONFIRM:g} s: is the broker up?")
                late.due = time.time() + CONFIRM
                self._wait(lane, CONFIRM)
            self._report_blocked(lane, late)

    def forget(self, partitions: Iterable[Partition]) -> list[Lane]:
        """Drop all waits of these partitions. Returns the lanes whose handler still runs."""
        running = []
        for partition in partitions:
            partition.active, partition.given_up = False, True
            for lane in list(partition.lanes.values()):
                if lane.began is not None:
                    running.append(lane)
                self._recovered(lane)
        with self._waiting_lock:
            self.waiting = [entry for entry in self.waiting if entry[2].partition.active]
            heapq.heapify(self.waiting)
        return running

    # -- the threads

    def _serve(self) -> None:
        while (lane := self.ready.get()) is not None:
            try:
                self._work(lane)
            except BaseException as error:  # raised by a hook: the thread must not swallow it
                self._end(lane, error)

    def _work(self, lane: Lane) -> None:
        """Handle a lane's records until it is empty, waits, or has had its turn and others wait for a worker."""
        context, failed = HandlerContext(self.commits.producer, refuses=self.commits.refuses), lane.failed
        handling.set(context)
        if failed is not None and not self._goes_on(lane, failed):
            return
        handle = self._one_by_one if self.spec.batch is None else self._in_batches
        while handle(lane, context):
            if not self.ready.empty():
                self.ready.put(lane)
                return

    def _one_by_one(self, lane: Lane, context: HandlerContext) -> bool:
        """Handle up to STAY records. False when the lane is empty or waits.

        This runs for every record: hence the local names, and as few calls as possible.
        """
        run, commits, hooks, queue, partition = self.run, self.commits, self.run.hooks, lane.queue, lane.partition
        handler, decode = self.spec.handler, self.decode[partition.topic]
        not_before = self.spec.not_before.get(partition.topic)
        for _ in range(STAY):
            lane.began = run.clock  # before `active` is read: this worker sees the release, or the release waits for it
            if not (queue and partition.active):
                if self._rests(lane):
                    return False
                continue
            if commits.pausing:
                commits.gate.wait()
            message, record = queue[0], None
            try:
                record = context.record = decode(message)  # what its handler sends names it as the cause
                if not_before is not None and self.waits(lane, not_before(record)):
                    return False
                if hooks:
                    context.collecting = False  # what a hook sends does not belong to the record
                    for hook in hooks:
                        hook(Step.HANDLING, record)
                context.collecting = True
                result = handler(record)
                if result is not None and inspect.iscoroutine(result):
                    result.close()
                    raise TypeError("the handler returned a coroutine, which nobody runs: make it a plain `def`")
            except BaseException as error:
                if not self._failed(lane, context, message, record, error):
                    return False
                continue
            if context.outputs and not self._publish(lane, context, (message,)):
                return False
            if hooks or lane.failed is not None:
                context.collecting = False
                for hook in hooks:
                    hook(Step.HANDLED, record)
                self._recovered(lane)
            queue.popleft()
        lane.began = None
        return True

    def _in_batches(self, lane: Lane, context: HandlerContext) -> bool:
        """The same for a handler that takes batches."""
        queue, partition, hooks = lane.queue, lane.partition, self.run.hooks
        decode, done = self.decode[partition.topic], 0
        while done < STAY:
            context.record = None  # a record that was set aside before is no cause of this
            lane.began = self.run.clock
            if not (queue and partition.active):
                if self._rests(lane):
                    return False
                continue
            if self.commits.pausing:
                self.commits.gate.wait()
            # By index, because an iterator would fail when the thread that polls appends.
            most = 1 if lane.one_by_one or lane.failed else self.spec.batch or 1
            messages = [queue[number] for number in range(min(len(queue), most))]
            batch: list[Record[Any] | PoisonRecord] = []
            for message in messages:
                try:
                    batch.append(decode(message))
                except PoisonRecord as poison:
                    batch.append(poison)
            records = [one for one in batch if isinstance(one, Record)] if hooks else []
            try:
                for record, hook in itertools.product(records, hooks):
                    hook(Step.HANDLING, record)
                context.collecting = True
                result = self.spec.handler(batch)
                context.collecting = False
                if inspect.iscoroutine(result):
                    result.close()
                    raise TypeError("the handler returned a coroutine, which nobody runs: make it a plain `def`")
            except BaseException as error:
                first = batch[0] if isinstance(batch[0], Record) else None
                if not self._failed(lane, context, messages[0], first, error, len(messages)):
                    return False
                continue
            if context.outputs and not self._publish(lane, context, messages):
                return False
            for record, hook in itertools.product(records, hooks):
                hook(Step.HANDLED, record)
            self._recovered(lane)
            with partition.lock:  # a batch is finished as one
                for _ in messages:
                    queue.popleft()
            lane.one_by_one = max(0, lane.one_by_one - len(messages))
            done += len(messages)
        lane.began = None
        return True

    def _publish(self, lane: Lane, context: HandlerContext, messages: Sequence[Message]) -> bool:
        """Publish the outputs of a handler that returned. False if the partition was given up meanwhile."""
        outputs = context.take()
        if lane.partition.given_up:  # its next owner handles the record again
            lane.began = None
            return False
        self.commits.publish(lane.partition, messages, outputs)
        return True

    def _rests(self, lane: Lane) -> bool:
        """Give up a lane that is empty, or whose partition was given up. False: more has come meanwhile."""
        lane.began = None
        if not lane.partition.rest(lane):
            return False
        self.run.wake.set()
        return True

    def _recovered(self, lane: Lane) -> None:
        """If its first record had failed, report that it has recovered."""
        if lane.failed is None:
            return
        with lane.partition.lock:  # two threads may come here: only one reports
            failed, lane.failed = lane.failed, None
        if failed is not None:
            self.run.report(Step.RECOVERED, failed)

    # -- a record that fails

    def _failed(
        self,
        lane: Lane,
        context: HandlerContext,
        message: Message,
        record: Record[Any] | None,
        error: BaseException,
        many: int = 1,
    ) -> bool:
        """Drop the outputs of a failed attempt, then ask the policy. A failed batch is first tried record by record.

        True when the lane goes on at once.
        """
        context.take()
        if isinstance(error, SystemExit | KeyboardInterrupt):
            return self._end(lane, error, message)
        if not lane.partition.active:  # the next owner handles the record again, and asks its own policy
            log(f"{coordinates(message)} failed while its partition was given up: {error_text(error)}")
            lane.began = None
            self.run.wake.set()
            return False
        if many > 1:  # which of them it was shows when they come one by one; then the policy is asked
            log(f"{many} records from {coordinates(message)} on failed, now one by one: {error_text(error)}")
            lane.one_by_one, lane.began = many, None
            return True
        failed = lane.failed
        if failed is None:
            failed = lane.failed = FailedRecord(message, lambda failed: self._wake(lane, failed))
        failed.fail(record, error)
        return self._decide(lane, failed, first_time=True)

    def _goes_on(self, lane: Lane, failed: FailedRecord) -> bool:
        """Take up a lane that waited. True when its first record, or the one behind it, is handled now."""
        if failed.confirmed:
            self._finish(lane)
        elif failed.recheck and lane.partition.active:
            return self._decide(lane, failed, first_time=False)
        return True

    def _decide(self, lane: Lane, failed: FailedRecord, first_time: bool) -> bool:
        """Do what the policy decides. True when the lane goes on with its next record at once."""
        handling.get().record = failed.record or Record(failed.message, None, None)  # the cause of what is set aside
        while not failed.confirmed:
            lane.began, failed.recheck = self.run.clock, False  # the decision has the full deadline
            decision = failed.decision = self.decision(failed)
            if first_time:
                self.log_failed(failed)
                self.run.report(Step.FAILED, failed)
                first_time = False
            if failed.recheck:  # a command was put on it meanwhile
                continue
            match decision:
                case Retry(after):
                    waits = self._block(lane, failed, failed.times[-1] + after)
                case SetAside():
                    waits = self._set_aside(lane, failed, decision)
                case Stop(error):
                    return self._end(lane, error or failed.error)
            if waits:
                if lane.partition.given_up and lane.failed is failed:  # nobody else would report its end
                    self._recovered(lane)
                return False
        self._finish(lane)
        return True

    def decision(self, failed: FailedRecord) -> Decision:
        """The policy's decision; the default's if the policy fails, so that the record is neither lost nor retried in a
        busy loop."""
        try:
            decision = self.spec.on_failure(failed)
            if not isinstance(decision, Decision):
                raise TypeError(f"on_failure returned {decision!r}, not Retry, SetAside or Stop")
            if isinstance(decision, Retry) and not 0 <= decision.after < math.inf:  # NaN is not either
                raise ValueError(f"on_failure returned {decision!r}, which says no time to wait")
        except Exception as broken:
            log_traceback(broken, broken.__traceback__)
            return keep_trying(0.5)(failed)
        return decision

    def _block(self, lane: Lane, failed: FailedRecord, due: float) -> bool:
        """Let the lane wait until `due`, in seconds since 1970. False when its record got a command since the policy
        was asked."""
        failed.due = due
        self._report_blocked(lane, failed)  # before it waits: from then on another worker may have it
        with lane.partition.lock:
            if failed.recheck or failed.confirmed:
                return False
            self._back_off(lane, due - time.time())
        return True

    def _set_aside(self, lane: Lane, failed: FailedRecord, aside: SetAside) -> bool:
        """Publish the record; its lane waits for the confirmation. False if a command or the confirmation is there."""
        with lane.partition.lock:
            if failed.recheck or failed.confirmed:
                return False
            again = aside.topic in failed.in_flight  # it is on its way already
            failed.in_flight.add(aside.topic)
            lane.began = None
            lane.to(LaneState.SETTING_ASIDE)
            self._wait(lane, CONFIRM)
        if not again and not lane.partition.given_up:  # else the next owner handles the record
            try:
                self.commits.set_aside(
                    *(lane.partition, failed.message, aside),
                    lambda refused: self._on_delivery(lane, failed, aside.topic, refused),
                )
            except Exception as error:  # also when it cannot be sent at all
                self._on_delivery(lane, failed, aside.topic, error_text(error))
        return True

    def _on_delivery(self, lane: Lane, failed: FailedRecord, topic: str, refused: str | None) -> None:
        """The broker has answered about a record that was set aside. Called from any thread."""
        with lane.partition.lock:
            if refused is None:
                failed.confirmed = True
                if lane.failed is failed and lane.state is not LaneState.RUNNING:
                    lane.to(LaneState.RUNNING)
                    self.ready.put(lane)
                return
            failed.in_flight.discard(topic)
            failed.refused = DeliveryFailed(f"{topic}: {refused}")
            after = min(AGAIN_CAP, AGAIN * 2.0 ** min(failed.times_refused, 60))
            failed.times_refused, failed.due = failed.times_refused + 1, time.time() + after
        if lane.failed is failed:
            self._report_blocked(lane, failed)
        with lane.partition.lock:
            if lane.failed is failed and lane.state is LaneState.SETTING_ASIDE and not failed.in_flight:
                failed.recheck = True
                self._back_off(lane, after)

    def _report_blocked(self, lane: Lane, failed: FailedRecord) -> None:
        """Report that a lane waits. An error in a hook ends the run, not the calling thread."""
        try:
            self.run.report(Step.BLOCKED, failed)
            if lane.failed is not failed:  # it was taken away or finished meanwhile: that report may have come first
                self.run.report(Step.RECOVERED, failed)
        except BaseException as error:
            self.run.end(error)

    def _finish(self, lane: Lane) -> None:
        """Its first record is set aside: go on with the next one."""
        lane.began = self.run.clock
        self._recovered(lane)
        lane.queue.popleft()
        lane.began, lane.one_by_one = None, max(0, lane.one_by_one - 1)

    def _wake(self, lane: Lane, failed: FailedRecord) -> None:
        """See `FailedRecord.put_command`. Called from any thread."""
        with lane.partition.lock:
            if lane.failed is not failed or not lane.partition.active:
                return
            failed.recheck = True
            if lane.state is not LaneState.RUNNING:  # else its worker looks before it lets the lane wait
                lane.to(LaneState.RUNNING)
                self.ready.put(lane)

    def waits(self, lane: Lane, due: float) -> bool:
        """Whether its first record is not due yet (seconds since 1970); then the lane waits, and nothing has failed."""
        left = due - time.time()
        if left <= 0:
            return False
        with lane.partition.lock:
            self._back_off(lane, left)
        return True

    def _back_off(self, lane: Lane, seconds: float) -> None:
        """Let a lane wait. The partition's lock is held."""
        lane.began = None
        lane.to(LaneState.BACKING_OFF)
        self._wait(lane, seconds)

    def _wait(self, lane: Lane, seconds: float) -> None:
        lane.due = time.monotonic() + max(0.0, seconds)
        with self._waiting_lock:
            heapq.heappush(self.waiting, (lane.due, next(self._tie), lane))

    def _end(self, lane: Lane, error: BaseException, message: Message | None = None) -> bool:
        """End the run with an error; the lane's current record stays uncommitted."""
        if not isinstance(error, Exception):
            place = "a record" if message is None else coordinates(message)
            error = HandlerExit(
                f"the handler ended the process ({safe_text(error, of=repr)}) on {place}, which is not committed"
            )
        lane.began = None
        self.run.end(error)
        return False

    def log_failed(self, failed: FailedRecord) -> None:
        """Log one line for each failed attempt. When many errors of one type come, only the first has its traceback."""
        error, now = failed.error, time.monotonic()
        log(f"{failed.place} failed, attempt {failed.attempt}: {error_text(error)}")
        if failed.attempt == 1 and not isinstance(error, PoisonRecord) and now > self._traced.get(type(error), 0):
            self._traced[type(error)] = now + TRACED
            below = error.__traceback__
            while below is not None and below.tb_frame.f_globals.get("__name__", "").startswith(OURS):
                below = below.tb_next
            log_traceback(error, below)
