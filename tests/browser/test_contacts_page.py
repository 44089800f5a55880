"""The page of imports in a real browser, with all services behind it: what one sees, and sees once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from importing import World
from playwright.sync_api import Browser, Page, expect
from processes import wait_until
from uploading import FILE, HEADER, Sender
from uploading import upload as upload_directly

from labkit.patterns.notice_window import Bounds
from labkit.runtime import shared_broker
from labkit.runtime.broker import free_ports
from labkit.runtime.postgres import Postgres
from labkit.services import contacts
from labkit.services.contacts import ContactsJobs
from labkit.services.http import HOST

WAIT = 60.0  # seconds that only end a hang
ONE = HEADER + b"Ada,a@example.org\n"
expect.set_options(timeout=WAIT * 1000)


@pytest.fixture(scope="module")
def world(state_dir: Path) -> Iterator[World]:
    with Postgres() as postgres, shared_broker.shared_broker() as lease, World(lease.cluster, postgres.dsn) as world:
        yield world


@pytest.fixture(scope="module")
def notifications(world: World) -> Iterator[None]:
    """A WebSocket service that nobody kills."""
    with world.notifying(world.main):
        yield


@pytest.fixture
def opened(chromium: Browser, world: World) -> Iterator[Callable[..., Page]]:
    """Opens the page in a browser of its own, with such options. No script may fail, and none be forbidden."""
    problems: list[str] = []
    with ExitStack() as contexts:

        def open_page(front: ContactsJobs = world.main, **options: Any) -> Page:
            context = contexts.enter_context(chromium.new_context(**options))
            page = context.new_page()
            page.set_default_timeout(WAIT * 1000)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda said: "Content Security" in said.text and problems.append(said.text))
            page.goto(front.url)
            return page

        yield open_page
        world.open_gates()
    assert problems == []


@pytest.fixture
def page(opened: Callable[..., Page], notifications: None) -> Page:
    page = opened()
    connected(page)
    return page


def connected(page: Page) -> None:
    expect(page.locator("#connection")).to_have_text("Connected")


def upload(page: Page, data: bytes | None = None, name: str = "contacts.csv") -> None:
    """Choose a file, of these bytes."""
    content = FILE.read_bytes() if data is None else data
    page.set_input_files("#files", {"name": name, "mimeType": "text/csv", "buffer": content})


def shown(page: Page, text: str, name: str = "contacts.csv") -> None:
    """Wait until this is the state of that import."""
    of = page.locator("#imports > li").filter(has=page.get_by_role("heading", name=name, exact=True))
    expect(of.locator(".now")).to_have_text(text)


def bad_rows(page: Page) -> list[tuple[int, str]]:
    """Those of all imports on the page, as they are shown."""
    rows = page.locator("#imports tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(c => c.innerText))"
    )
    return [(int(line.replace(",", "")), reason) for line, reason in rows]


def request_of(page: Page) -> str:
    """The request of this page's first import."""
    return str(page.evaluate("Object.keys(JSON.parse(Object.values(sessionStorage)[0]).names)[0]"))


def stored_bad_rows(world: World, page: Page) -> list[tuple[int, str]]:
    """What the importers have stored of it."""
    return [tuple(row) for row in contacts.bad_rows(world.dsn, request_of(page))]


# -- an import ---------------------------------------------------------------------------------------------------------


def test_an_import_is_seen_from_its_upload_to_its_end(world: World, page: Page) -> None:
    world.gate.hold()
    upload(page)
    shown(page, "Accepted, 10 jobs")
    expect(page.locator(".working")).to_have_text("10 jobs being worked on")
    world.gate.let(3)
    shown(page, "3 of 10 jobs processed")
    expect(page.locator(".working")).to_have_text("7 jobs being worked on")
    bar = page.get_by_role("progressbar", name="Jobs of contacts.csv")
    assert bar.evaluate("bar => [bar.value, bar.max]") == [3, 10]
    expect(page.locator("#uploads > li")).to_have_count(0)
    world.gate.let()
    shown(page, "Completed, 10 jobs")
    expect(page.locator(".working")).to_have_text("")
    stored = stored_bad_rows(world, page)
    expect(page.locator("#imports tbody tr")).to_have_count(len(stored))
    assert bad_rows(page) == stored
    assert len(stored) > 3
    expect(page.locator("#news")).to_have_text(f"contacts.csv: Completed, 10 jobs. {len(stored)} rows are not imported")


@pytest.mark.long
def test_several_imports_one_after_the_other_the_newest_first(world: World, page: Page) -> None:
    names = ["a.csv", "b.csv", "c.csv"]
    files = [{"name": name, "mimeType": "text/csv", "buffer": ONE} for name in names]
    page.set_input_files("#files", files[:2])
    for name in names[:2]:
        shown(page, "Completed, 1 job", name)
    page.set_input_files("#files", files[2:])
    shown(page, "Completed, 1 job", "c.csv")
    assert page.locator("#imports h2").all_inner_texts() == names[::-1]


@pytest.mark.long
def test_the_upload_itself_is_shown(page: Page) -> None:
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 500_000}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    page.evaluate(
        """() => {
            window.seen = new Set();
            const look = () => seen.add(document.querySelector("#uploads .now")?.textContent);
            new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
        }"""
    )
    upload(page, b"name,email,notes\n" + (b"Ada,a@example.org," + b"x" * 100_000 + b"\n") * 5, "large.csv")
    expect(page.locator("#imports h2")).to_have_text("large.csv")
    parts = [re.fullmatch(r"([\d.]+) of 0.5 MB uploaded", text or "") for text in page.evaluate("[...seen]")]
    assert {float(part[1]) for part in parts if part} & {0.1, 0.2, 0.3, 0.4}


def test_what_is_in_a_file_is_text_and_of_many_bad_rows_the_first_ones_are_listed(world: World, page: Page) -> None:
    evil = "<img src=x onerror=alert(1)>"
    rows = "".join(f'Ada,"{evil}{number}"\n' for number in range(1200))
    upload(page, HEADER + rows.encode(), "<b>.csv")
    shown(page, "Completed, 12 jobs", "<b>.csv")
    expect(page.locator(".bad h3")).to_have_text("1,200 rows are not imported")
    expect(page.locator(".more")).to_have_text("and 200 more")
    assert bad_rows(page) == stored_bad_rows(world, page)[:1000]
    assert evil in bad_rows(page)[0][1]
    assert page.locator("img").count() == 0


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(b"", "the file is empty", marks=pytest.mark.long),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1"),
        pytest.param(
            HEADER + b"x" * 2_100_000, "the file is larger than 2,000,000 bytes", id="large", marks=pytest.mark.long
        ),
    ],
)
def test_a_file_that_is_not_taken_is_there_with_the_reason_and_the_next_one_is_taken(
    page: Page, data: bytes, why: str
) -> None:
    upload(page, data, "holiday.png")
    expect(page.locator("#uploads .now")).to_have_text(re.compile(f"^Not taken: .*{why}"))
    expect(page.locator("#news")).to_contain_text(why)
    expect(page.get_by_role("button", name="Upload again")).to_be_hidden()
    upload(page, ONE)
    shown(page, "Completed, 1 job")
    expect(page.locator("#uploads > li")).to_have_count(0)


@pytest.mark.long
def test_an_upload_for_which_there_is_no_place_is_sent_again_by_a_button(world: World, page: Page) -> None:
    again = page.get_by_role("button", name="Upload again")
    with ExitStack() as held:
        for _ in range(4):
            held.enter_context(closing(Sender(world.main, "Content-Length: 99")))
        upload(page, ONE)
        expect(page.locator("#uploads .now")).to_have_text(re.compile("^Not taken: 4 imports are under way"))
        expect(again).to_be_visible()
    assert upload_directly(world.main, b"")[0] == 400  # there is a place again: those have gone
    again.click()
    shown(page, "Completed, 1 job")


# -- the connection ----------------------------------------------------------------------------------------------------


def open_in_mid_import(world: World, front: ContactsJobs, opened: Callable[..., Page]) -> Page:
    """A page on which three of ten jobs are done, and the others wait."""
    page = opened(front)
    connected(page)
    world.gate.hold()
    upload(page)
    world.gate.let(3)
    shown(page, "3 of 10 jobs processed")
    return page


def finish_unseen(world: World, page: Page) -> None:
    """Have the import end while nobody can tell the page."""
    expect(page.locator("#connection")).to_have_text("Connection lost, catching up …")
    world.gate.let()
    wait_until(lambda: request_of(page) in world.ended(), WAIT, "the end of the import")
    for channel, notice in world.heard():  # by a producer that doubles: what it tells has a position of its own
        world.notices.send(notice, channel)
    world.notices.flush()


def test_what_happens_while_the_connection_is_lost_is_shown_once_it_is_back(
    world: World, opened: Callable[..., Page]
) -> None:
    front = world.front()
    with world.notifying(front):
        page = open_in_mid_import(world, front, opened)
    finish_unseen(world, page)
    shown(page, "3 of 10 jobs processed")
    with world.notifying(front):
        shown(page, "Completed, 10 jobs")
        connected(page)
        expect(page.locator("#news")).to_contain_text("contacts.csv: Completed")  # and not: too much was missed
        upload(page, ONE, "next.csv")
        shown(page, "Completed, 1 job", "next.csv")
        assert bad_rows(page) == stored_bad_rows(world, page)
        shown(page, "Completed, 10 jobs")


@pytest.mark.long
def test_when_too_much_was_missed_the_state_is_read_again(world: World, opened: Callable[..., Page]) -> None:
    front = world.front()
    with world.notifying(front):
        page = open_in_mid_import(world, front, opened)
    finish_unseen(world, page)
    with world.notifying(front, bounds=Bounds(window=4)):
        shown(page, "Completed, 10 jobs")
        expect(page.locator("#news")).to_have_text("Too much was missed: the state was read again.")
        connected(page)
        assert bad_rows(page) == stored_bad_rows(world, page)


@pytest.mark.long
def test_a_reload_in_mid_import_goes_on_where_it_is(
    world: World, opened: Callable[..., Page], notifications: None
) -> None:
    page = open_in_mid_import(world, world.main, opened)
    page.reload()
    shown(page, "3 of 10 jobs processed")
    world.gate.let()
    for _ in range(2):
        shown(page, "Completed, 10 jobs")
        expect(page.locator("#imports tbody tr")).to_have_count(len(stored_bad_rows(world, page)))
        assert bad_rows(page) == stored_bad_rows(world, page)
        page.reload()


@pytest.mark.long
def test_bad_rows_that_were_told_before_any_job_was_counted_are_there_after_a_reload(world: World, page: Page) -> None:
    world.counting.hold()
    upload(page, HEADER + b"Ada,none\n")
    expect(page.locator(".bad h3")).to_have_text("1 row is not imported")
    page.reload()
    connected(page)
    shown(page, "Uploaded")
    world.counting.let()
    shown(page, "Completed, 1 job")
    expect(page.locator(".bad h3")).to_have_text("1 row is not imported")
    assert bad_rows(page) == stored_bad_rows(world, page)


@pytest.mark.long
def test_a_channel_that_is_unknown_to_the_service_is_replaced(page: Page) -> None:
    forge = "([name, text]) => sessionStorage.setItem(name, text.replace(/(?<=channel.:.{20})./, '?'))"
    page.evaluate(f"Object.entries(sessionStorage).forEach({forge})")
    page.reload()
    connected(page)
    upload(page, ONE)
    shown(page, "Completed, 1 job")


@pytest.mark.long
def test_two_tabs_never_mix(world: World, opened: Callable[..., Page], notifications: None) -> None:
    pages = {name: opened() for name in ("one.csv", "other.csv")}
    world.gate.hold()
    for name, page in pages.items():
        connected(page)
        upload(page, name=name)
        shown(page, "Accepted, 10 jobs", name)
    world.gate.let()
    for name, page in pages.items():
        shown(page, "Completed, 10 jobs", name)
        assert page.locator("#imports h2").all_inner_texts() == [name]
        assert bad_rows(page) == stored_bad_rows(world, page)


ATTACK = """async (service) => {
    const answer = await fetch(`${service}/channels`, { method: "POST" }).then((it) => it.status, () => "refused");
    const socket = new WebSocket(`${service.replace("http", "ws")}/notifications`);
    const line = await new Promise((done) => {
        socket.onopen = () => done("open");
        socket.onclose = () => done("refused");
    });
    return [answer, line];
}"""


@pytest.mark.long
def test_a_page_of_another_origin_gets_nothing(world: World, page: Page, opened: Callable[..., Page]) -> None:
    service = f"http://{HOST}:{world.main.notifications_port}"
    assert page.evaluate(ATTACK, service) == [201, "open"]
    elsewhere = f"http://{HOST}:{free_ports()[0]}/"
    page.context.route(
        f"{elsewhere}**", lambda route: route.fulfill(body="<h1>Win a prize</h1>", content_type="text/html")
    )
    page.goto(elsewhere)
    assert page.evaluate(ATTACK, service) == ["refused", "refused"]


@pytest.mark.long
def test_a_page_that_the_service_does_not_know_says_so(
    world: World, opened: Callable[..., Page], notifications: None
) -> None:
    """As one behind a proxy whose address nobody gave to the service."""
    stranger = world.front(notifications_port=world.main.notifications_port)
    page = opened(stranger)
    expect(page.locator("#connection")).to_contain_text(f"does not serve pages of {stranger.url}")
    upload(page, ONE)
    expect(page.locator("#uploads .now")).to_have_text("Waiting for the notification service …")


# -- for everybody -----------------------------------------------------------------------------------------------------


def test_all_is_done_with_the_keyboard_alone(page: Page) -> None:
    page.on("filechooser", lambda _: None)  # in time: the browser is told so while we go on
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Choose files")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "bad.csv", "mimeType": "text/csv", "buffer": HEADER + b"Ada,none\n" * 50})
    shown(page, "Completed, 1 job", "bad.csv")
    page.keyboard.press("Tab")
    rows = page.get_by_role("region", name="Bad rows of bad.csv")
    expect(rows).to_be_focused()
    assert rows.evaluate("rows => getComputedStyle(rows).outlineStyle") == "solid"
    page.keyboard.press("End")
    scrolled = "rows => rows.scrollTop || new Promise((done) => rows.addEventListener('scroll', done, { once: true }))"
    rows.evaluate(scrolled)


@pytest.mark.long
def test_a_file_is_dropped(page: Page) -> None:
    dropped = page.evaluate_handle(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["name,email\\nAda,a@example.org\\n"], "dropped.csv"));
            return data;
        }"""
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": dropped})
    expect(page.locator("#drop")).to_have_class("over")
    page.dispatch_event("h1", "drop", {"dataTransfer": dropped})  # beside the field will do
    shown(page, "Completed, 1 job", "dropped.csv")
    expect(page.locator("#drop")).not_to_have_class("over")


@pytest.mark.long
def test_on_a_phone_nothing_is_wider_than_the_screen(opened: Callable[..., Page], notifications: None) -> None:
    page = opened(viewport={"width": 360, "height": 640})
    connected(page)
    name = f"{'contacts' * 20}.csv"
    upload(page, HEADER + b"Ada," + b"x" * 250 + b"\n", name)
    shown(page, "Completed, 1 job", name)
    upload(page, HEADER + b"\xff", name)
    expect(page.locator("#uploads .now")).to_contain_text("line 2")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.long
def test_it_is_dark_for_who_wants_it_dark(opened: Callable[..., Page], notifications: None) -> None:
    def brightness(page: Page, of: str) -> float:
        colour = page.evaluate(f"getComputedStyle(document.body).{of}")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    for scheme, dark in (("light", False), ("dark", True)):
        page = opened(color_scheme=scheme)
        paper, text = brightness(page, "backgroundColor"), brightness(page, "color")
        assert (paper < text) == dark
        assert abs(paper - text) > 180
