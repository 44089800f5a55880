"""The board: what it redraws and when, and its buttons, without a browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import ipywidgets
import pytest
from processes import wait_until

from labkit.lab.board.board import Board, _log_html
from labkit.lab.board.panels import completed_panel, lag_panel, retries_panel
from labkit.lab.faults.target import Action
from labkit.lab.history import History, Sample
from labkit.lab.pods.pod import Pod, PodState

PANELS = [
    lag_panel(["orders"]),
    retries_panel(["shop"], ["charged"]),
    completed_panel("charged", ["orders"]),
]


class FakePod(Pod):
    """In a state of ours. Tells its deployment what was asked of it."""

    def __init__(self, deployment: FakeDeployment, index: int, state: str = "running") -> None:
        super().__init__(cast(Any, deployment), index)
        self._state = PodState(state)

    @property
    def state(self) -> PodState:
        return self._state

    def do(self, verb: str, options: Mapping[str, float]) -> str:
        self.deployment.note(verb, self.index)
        return verb


class FakeDeployment:
    """Notes what was asked of it and its pods. Called, as a board does to look it up, it gives itself."""

    def __init__(self, *states: str, name: str = "shop") -> None:
        self.name, self.history = name, History()
        self.calls: list[tuple[object, ...]] = []
        self.called = threading.Event()
        self.trouble: Exception | None = None
        self.become(*states)

    def become(self, *states: str) -> None:
        self.pods = [FakePod(self, i, state) for i, state in enumerate(states)]

    def __call__(self) -> list[FakeDeployment]:
        return [self]

    def note(self, *call: object) -> None:
        self.calls.append((*call, threading.current_thread() is threading.main_thread()))
        self.called.set()
        if self.trouble is not None:
            raise self.trouble

    def scale(self, replicas: int) -> None:
        self.note("scale", replicas)


def tick(history: History, value: float = 1.0, at: float | None = None) -> None:
    now = time.time() if at is None else at
    history.record([Sample(now, "lag", "orders/0", value), Sample(now, "completed", "charged", value)])


Make = Callable[..., Board]


@pytest.fixture
def make() -> Iterator[Make]:
    boards: list[Board] = []

    def board(history: History | None = None, **changed: object) -> Board:
        given: dict[str, object] = {"status": lambda: "shop: 2 of 2 pods running", **changed}
        boards.append(Board(history or History(), PANELS, **given))  # type: ignore[arg-type]
        return boards[-1]

    yield board
    for each in boards:
        each.close()


def buttons(board: Board) -> dict[str, ipywidgets.Button]:
    return {each.widget.description: each.widget for each in board._all_buttons()}


def status(board: Board) -> str:
    text: str = board._says.value
    return text


def test_frames_follow_the_history_and_rest_with_it(make: Make) -> None:
    history = History()
    tick(history)
    board = make(history)
    board.start()
    assert board.frames == 1
    first = bytes(board._picture.value)
    assert first.startswith(b"\x89PNG")
    board.redraw()
    board.redraw()
    assert board.frames == 1, "nothing changed, yet a frame was drawn"
    tick(history, 500)
    wait_until(lambda: board.frames == 2 and bytes(board._picture.value) != first, what="the new figures are drawn")


def test_a_history_at_rest_for_the_whole_picture_is_drawn_once(make: Make) -> None:
    history = History()
    now = time.time()
    for ago in range(90, 0, -1):
        tick(history, at=now - ago)
    board = make(history)
    for _ in range(3):
        tick(history)
        board.redraw()
    assert board.frames == 1
    history.note("freeze", "shop-1", "freeze pod 1", stands=True, since=now)
    board.redraw()
    assert board.frames == 2


def test_closing_ends_the_thread_and_leaves_the_last_picture(make: Make) -> None:
    history = History()
    tick(history)
    board = make(history, deployments=FakeDeployment("running", "running"))
    board.start()
    thread = board._thread
    assert thread is not None
    assert thread.is_alive()
    board.close()
    assert not thread.is_alive()
    assert board.closed
    assert all(button.disabled for button in buttons(board).values())
    assert "closed" in status(board)
    drawn = board.frames
    tick(history, 9)
    board.redraw()
    board.start()
    assert board.frames == drawn
    board.close()


def test_displaying_starts_it_and_gives_the_widget(make: Make) -> None:
    board = make()
    bundle = board._repr_mimebundle_()
    assert board._thread is not None
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == board.widget.model_id
    assert bundle["text/plain"] == repr(board)
    assert "Lag · Retries · Completed" in repr(board)
    thread = board._thread
    board._repr_mimebundle_()
    assert board._thread is thread


def test_no_output_widget_is_used(make: Make) -> None:
    def within(widget: ipywidgets.Widget) -> Iterator[ipywidgets.Widget]:
        yield widget
        for child in getattr(widget, "children", ()):
            yield from within(child)

    board = make(deployments=FakeDeployment("running"), actions=[Action("Stop it", "Stops it.", lambda: None)])
    assert not [w for w in within(board.widget) if isinstance(w, ipywidgets.Output)]


@pytest.mark.parametrize(
    ("state", "enabled"),
    [
        ("starting", {"Kill shop-0"}),
        ("running", {"Kill shop-0", "Freeze shop-0", "Slow shop-0", "Restart shop-0"}),
        ("frozen", {"Kill shop-0", "Recover shop-0"}),
        ("slow", {"Kill shop-0", "Freeze shop-0", "Slow shop-0", "Restart shop-0", "Recover shop-0"}),
        ("draining", {"Kill shop-0"}),
        ("restarting", {"Recover shop-0"}),
        ("stopped", set()),
    ],
)
def test_buttons_are_enabled_when_they_make_sense(make: Make, state: str, enabled: set[str]) -> None:
    board = make(deployments=FakeDeployment(state, "running"))
    board.redraw()
    on_pod = {name: button for name, button in buttons(board).items() if name.endswith("shop-0")}
    assert len(on_pod) == 5
    assert {name for name, button in on_pod.items() if not button.disabled} == enabled
    assert all(button.tooltip for button in buttons(board).values())
    if state == "stopped":
        assert on_pod["Kill shop-0"].tooltip == "It is stopped: deploy it again."


def test_the_last_pod_cannot_be_removed(make: Make) -> None:
    deployment = FakeDeployment("running", "running")
    board = make(deployments=deployment)
    board.redraw()
    assert not buttons(board)["Remove a pod of shop"].disabled
    deployment.become("running")
    board.redraw()
    assert buttons(board)["Remove a pod of shop"].disabled


@pytest.mark.parametrize(
    ("name", "state", "call"),
    [
        ("Kill shop-1", "running", ("kill", 1)),
        ("Freeze shop-1", "running", ("freeze", 1)),
        ("Recover shop-1", "frozen", ("recover", 1)),
        ("Slow shop-1", "running", ("slow", 1)),
        ("Restart shop-1", "running", ("restart", 1)),
        ("Add a pod to shop", "running", ("scale", 3)),
        ("Remove a pod of shop", "running", ("scale", 1)),
    ],
)
def test_a_click_calls_the_twin_in_a_thread_of_its_own(
    make: Make, name: str, state: str, call: tuple[object, ...]
) -> None:
    deployment = FakeDeployment("running", state)
    board = make(deployments=deployment)
    board.redraw()
    assert board._pods is not None
    board._pods._choice.value = "shop-1"
    buttons(board)[name].click()
    assert deployment.called.wait(5)
    assert deployment.calls == [(*call, False)]


def test_the_choice_of_a_pod_outlives_changes_of_state_and_number(make: Make) -> None:
    deployment = FakeDeployment("running", "running")
    board = make(deployments=deployment)
    board.redraw()
    assert board._pods is not None
    choice = board._pods._choice
    choice.value = "shop-1"
    deployment.become("restarting", "frozen", "running")
    board.redraw()
    assert choice.value == "shop-1"
    assert [label for label, _ in choice.options] == ["shop-0 · restarting", "shop-1 · frozen", "shop-2"]
    assert not buttons(board)["Recover shop-1"].disabled
    deployment.become("running")
    board.redraw()
    assert choice.value == "shop-0"
    assert "Kill shop-0" in buttons(board)


def test_a_deployment_that_replaces_another_is_followed(make: Make) -> None:
    running = {"shop": FakeDeployment("running", "running")}
    board = make(deployments=lambda: [running["shop"]])
    board.redraw()
    before, running["shop"] = running["shop"], FakeDeployment("running")
    buttons(board)["Kill shop-0"].click()
    assert running["shop"].called.wait(5)
    assert before.calls == []
    wait_until(lambda: buttons(board)["Remove a pod of shop"].disabled, what="the new one's only pod is shown")


def test_the_chosen_pod_stays_while_its_deployment_has_none(make: Make) -> None:
    """As while it is replaced: the next click would hit another service."""
    manager, bookings = FakeDeployment("running", name="manager"), FakeDeployment("running", "running", name="bookings")
    board = make(deployments=lambda: [manager, bookings])
    board.redraw()
    choice = board._pods._choice
    choice.value = "bookings-1"
    bookings.become()
    board.redraw()
    assert choice.value is None
    bookings.become("running", "running")
    board.redraw()
    assert choice.value == "bookings-1"
    bookings.become("running")
    board.redraw()
    assert choice.value == "bookings-0"


def test_a_pod_that_is_gone_is_told(make: Make) -> None:
    deployment = FakeDeployment("running")
    board = make(deployments=deployment)
    board.redraw()
    kill = buttons(board)["Kill shop-0"]
    deployment.become()
    kill.click()
    wait_until(lambda: "There is no shop-0 now." in status(board), what="the message is shown")


def test_an_action_that_fails_is_told_until_the_next_one(make: Make) -> None:
    deployment = FakeDeployment("running")
    deployment.trouble = RuntimeError("pod 0 did not\nanswer <in> 5 s")
    board = make(deployments=deployment)
    board.redraw()
    buttons(board)["Kill shop-0"].click()
    wait_until(lambda: "Kill shop-0: pod 0 did not answer &lt;in&gt; 5 s" in status(board), what="the message is shown")
    wait_until(lambda: not buttons(board)["Kill shop-0"].disabled, what="the button is back")
    deployment.trouble = None
    buttons(board)["Kill shop-0"].click()
    wait_until(lambda: "did not" not in status(board), what="the message is gone")


def test_a_button_is_disabled_while_its_action_is_under_way(make: Make) -> None:
    go, calls = threading.Event(), []

    def wait() -> None:
        calls.append(1)
        assert go.wait(10)

    board = make(actions=[Action("Stop the provider", "Every call fails.", wait)])
    board.redraw()
    button = buttons(board)["Stop the provider"]
    button.click()
    assert button.disabled
    button.click()
    go.set()
    wait_until(lambda: not button.disabled, what="the action is over")
    assert calls == [1]


def test_an_action_says_why_it_cannot_be_done(make: Make) -> None:
    reason = "Needs Lab(…, cluster='private')."
    board = make(actions=[Action("Kill the broker", "SIGKILL.", lambda: None, lambda: reason)])
    board.redraw()
    button = buttons(board)["Kill the broker"]
    assert button.disabled
    assert button.tooltip == reason


def test_a_click_that_has_come_too_late_is_told_why_not(make: Make) -> None:
    """The browser may have drawn the button before: its click was under way."""
    calls: list[int] = []
    reason: list[str | None] = [None]
    board = make(actions=[Action("Kill the broker", "SIGKILL.", lambda: calls.append(1), lambda: reason[0])])
    board.redraw()
    reason[0] = "It is down."
    buttons(board)["Kill the broker"].click()
    wait_until(lambda: "It is down." in status(board), what="the reason is shown")
    assert buttons(board)["Kill the broker"].disabled
    assert calls == []


def test_what_goes_wrong_in_a_frame_is_in_the_status_line(make: Make) -> None:
    def broken() -> list[str]:
        raise OSError("log is gone")

    board = make(log=broken)
    board.start()
    assert "log: log is gone" in status(board)
    assert "2 of 2 pods" in status(board)
    assert board._thread is not None
    assert board._thread.is_alive()

    def no_status() -> str:
        raise KeyError("shop")

    other = make(status=no_status)
    other.redraw()
    assert "status: " in status(other)
    assert other.frames == 1


class Untellable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_an_error_without_a_text_ends_neither_the_frames_nor_a_click(make: Make) -> None:
    """correctness 36"""

    def broken() -> Any:
        raise Untellable

    board = make(log=broken, actions=[Action("Break", "It cannot.", broken)])
    board.redraw()
    assert "log: (its text cannot be read: RuntimeError)" in status(board)
    button = buttons(board)["Break"]
    button.click()
    wait_until(lambda: "Break: (its text cannot be read" in status(board), what="the message is shown")
    assert not button.disabled


def test_figures_that_stop_coming_are_told(make: Make) -> None:
    history = History()
    tick(history, at=1_000.0)
    board = make(history, clock=lambda: 1_004.0)
    board.redraw()
    assert "no new figures" not in status(board)
    late = make(history, clock=lambda: 1_010.0)
    late.redraw()
    assert "no new figures since" in status(late)


def test_the_log_is_escaped_bounded_and_names_pods() -> None:
    lines = ["shop-1 | <script>alert(1)</script>", "12:30:01 shop-0 | \x1b[31mred\x1b[0m", "x" * 5000]
    text = _log_html(lines)
    assert "<script>" not in text
    assert "<b>shop-1</b> | &lt;script&gt;" in text
    assert "12:30:01 <b>shop-0</b> | red" in text
    assert "\x1b" not in text
    assert "(3,000 characters more)" in text


def test_the_log_keeps_the_newest_lines(make: Make) -> None:
    board = make(log=lambda: [f"shop-0 | line {i}" for i in range(500)])
    board.redraw()
    assert "line 499\n" not in board._lines.value
    assert "line 499" in board._lines.value
    assert "line 300\n" in board._lines.value
    assert "line 299\n" not in board._lines.value


def test_snapshot_and_table(make: Make) -> None:
    history = History()
    now = time.time()
    for ago in range(100, 0, -1):
        tick(history, 100 - ago, now - ago)
    board = make(history)
    image = board.snapshot()
    assert len(image.data) <= 30_000
    assert "2 of 2 pods" in image.alt
    table = board.table().set_index(["metric", "label"])
    assert table.loc[("lag", "orders/0"), "now"] == 99
    assert make().snapshot().data.startswith(b"\x89PNG")
    assert list(make().table().columns) == ["metric", "label", "now", "highest"]


def test_history_is_a_tidy_frame_and_keeps_faults() -> None:
    history = History()
    assert list(history.frame().columns) == ["time", "seconds", "metric", "label", "value"]
    tick(history, 3, at=1_000.0)
    tick(history, 4, at=1_002.5)
    frame = history.frame()
    assert frame["seconds"].tolist() == [0.0, 0.0, 2.5, 2.5]
    assert frame["time"].dtype.kind == "M"
    history.note("freeze", "shop-1", "freeze pod 1", stands=True, since=1_001.0)
    assert [fault.target for fault in history.standing()] == ["shop-1"]
    assert history.end("freeze", "shop-0", 1_002.0) is None
    ended = history.end("freeze", "shop-1", 1_002.0)
    assert ended is not None
    assert (ended.end, ended.instant, history.standing()) == (1_002.0, False, [])
    assert [s.value for s in history.snapshot(since=1_001.0).samples] == [4, 4]
