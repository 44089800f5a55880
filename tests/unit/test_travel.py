"""What a notebook defines arrives in a pod as it was; what cannot live there is refused by its name."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from labkit.kafka.cluster import Cluster
from labkit.kafka.topics import Topic
from labkit.lab.pods.travel import CannotTravel, pack, unpack

IMPORTS = """
import enum, functools, math, threading, time
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Generic, TypeVar
import msgspec
from msgspec import Struct
from msgspec.json import decode, encode
"""
SEND = """
import sys
from labkit.lab.pods.travel import pack
print(check(), file=sys.stderr)
sys.stdout.buffer.write(pack(check))
"""
RECEIVE = "import sys\nfrom labkit.lab.pods.travel import unpack\nprint(unpack(sys.stdin.buffer.read())())\n"


def arrives(source: str) -> str:
    """What `check()` of a notebook returns in another process, as text: the same as in the notebook."""
    sent = subprocess.run(
        [sys.executable, "-c", IMPORTS + textwrap.dedent(source) + SEND], capture_output=True, check=False, timeout=60
    )
    assert sent.returncode == 0, sent.stderr.decode()
    there = subprocess.run(
        [sys.executable, "-c", RECEIVE], input=sent.stdout, capture_output=True, check=False, timeout=60
    )
    assert there.returncode == 0, there.stderr.decode()
    assert there.stdout.decode() == sent.stderr.decode()
    return there.stdout.decode().strip()


def notebook(source: str, **variables: Any) -> dict[str, Any]:
    """What cells define, in this process."""
    cells: dict[str, Any] = {"__name__": "__main__", **variables}
    exec(IMPORTS + textwrap.dedent(source), cells)
    return cells


DEFINITIONS = {
    "a dataclass that was decoded before": (
        """
        @dataclass
        class Order:
            id: int
            customer: str = "nobody"
            tags: list[str] = field(default_factory=list)

        def check():
            one, other = Order(1), decode(b'{"id": 2, "customer": "ada", "unknown": 1}', type=Order)
            one.tags.append("x")
            return one, other, encode(other)
        """,
        """
        (Order(id=1, customer='nobody', tags=['x']), Order(id=2, customer='ada', tags=[]),
        b'{"id":2,"customer":"ada","tags":[]}')
        """,
    ),
    "a dataclass with limits and a check": (
        """
        @dataclass
        class Range:
            low: Annotated[int, msgspec.Meta(ge=0)]
            high: int

            def __post_init__(self):
                if self.low > self.high:
                    raise ValueError("low > high")

        def check():
            said = []
            for raw in (b'{"low": -1, "high": 1}', b'{"low": 2, "high": 1}', b'{"low": 1}', b'{"low": 1, "high": 1}'):
                try:
                    said.append(decode(raw, type=Range))
                except msgspec.ValidationError as error:
                    said.append(type(error).__name__)
            return said
        """,
        "['ValidationError', 'ValidationError', 'ValidationError', Range(low=1, high=1)]",
    ),
    "a dataclass of another, with methods": (
        """
        @dataclass(frozen=True, order=True)
        class Event:
            KIND: ClassVar[str] = "event"
            id: int
            def name(self):
                return f"{self.KIND} {self.id}"

        @dataclass(frozen=True, order=True)
        class Paid(Event):
            cents: int = 50
            @property
            def euros(self):
                return self.cents / 100
            @classmethod
            def of(cls, euros):
                return cls(7, round(euros * 100))
            def name(self):
                return "paid " + super().name()

        def check():
            return Paid.of(1.5), Paid.of(1.5).name(), Paid(1).euros, Paid(1) < Paid(2), len({Event(1), Event(1)})
        """,
        "(Paid(id=7, cents=150), 'paid event 7', 0.5, True, 1)",
    ),
    "a dataclass that names its own kind, and another, in a text": (
        """
        @dataclass
        class Node:
            name: str
            next: "Node | None" = None
            def last(self):
                return self if self.next is None else self.next.last()

        @dataclass
        class Tree:
            nodes: list["Node"]
            colour: "Colour"

        class Colour(enum.Enum):
            RED = "red"

        def check():
            tree = decode(b'{"nodes": [{"name": "a", "next": {"name": "b"}}], "colour": "red"}', type=Tree)
            return tree.nodes[0].last().name, tree.colour is Colour.RED
        """,
        "('b', True)",
    ),
    "a generic dataclass": (
        """
        T = TypeVar("T")

        @dataclass
        class Envelope(Generic[T]):
            body: T

        def check():
            return decode(b'{"body": 1}', type=Envelope[int])
        """,
        "Envelope(body=1)",
    ),
    "a class whose annotation names nothing": (
        """
        class Worker:
            helper: "Helper"

        def check():
            return Worker().__annotations__
        """,
        "{'helper': 'Helper'}",
    ),
    "closures, lambdas and partials": (
        """
        def times(factor):
            return lambda x: x * factor

        double = functools.partial(times(2))

        def check():
            return [double(n) for n in range(3)], math.floor(1.5)
        """,
        "([0, 2, 4], 1)",
    ),
    "a function that calls itself": (
        """
        def check(n=3):
            return 1 if n == 0 else n * check(n - 1)
        """,
        "6",
    ),
    "a variable changed by a later cell is the one of now": (
        """
        rate = 1
        def check():
            return rate
        rate = 2
        """,
        "2",
    ),
}


@pytest.mark.parametrize(("source", "expected"), DEFINITIONS.values(), ids=DEFINITIONS)
def test_what_a_notebook_defines_arrives(source: str, expected: str) -> None:
    assert arrives(source) == " ".join(expected.split())


def test_a_topic_travels_as_its_coordinates() -> None:
    cells = notebook("@dataclass\nclass Order:\n    id: int\n")
    topic = Topic(Cluster("127.0.0.1:1", (("sasl.password", "secret"),)), "labkit.a.b.c.orders", 4, cells["Order"])
    there = unpack(pack(topic))
    assert (there.cluster, there.name, there.partitions) == (topic.cluster, topic.name, 4)
    assert there.value(1).id == 1


def test_one_class_stays_one_class() -> None:
    """The type a topic decodes to is the one that the handler compares with."""
    cells = notebook("@dataclass\nclass Order:\n    id: int\ndef check(value):\n    return isinstance(value, Order)\n")
    topic, check = unpack(pack((Topic(Cluster("127.0.0.1:1"), "orders", 4, cells["Order"]), cells["check"])))
    assert check(topic.value(1))


def test_a_struct_that_a_pod_can_import_travels_by_its_name() -> None:
    from labkit.lab.pods.telemetry import PodReport

    assert unpack(pack(PodReport)) is PodReport


class Stays:
    """Like a lab, a board, a deployment."""

    _stays_in_the_notebook = "use a topic"


REFUSED = {
    "a global": "def handler(record):\n    lab.close()",
    "an inner function": "def handler(record):\n    def inner():\n        return lab\n    inner()",
    "a lambda in it": "def handler(record):\n    return list(map(lambda x: lab, [1]))",
    "a function it calls": "def helper():\n    return lab\ndef handler(record):\n    helper()",
    "a closed-over variable": "def make(lab):\n    return lambda record: lab\nhandler = make(lab)",
    "a default": "def handler(record, lab=lab):\n    pass",
    "a partial": "def work(lab, record):\n    pass\nhandler = functools.partial(work, lab)",
    "a keyword of a partial": "def work(record, lab):\n    pass\nhandler = functools.partial(work, lab=lab)",
    "a list": "labs = lab = [lab]\ndef handler(record):\n    return lab",
    "a dict": "lab = {'a': lab}\ndef handler(record):\n    return lab",
    "a method's object": """
class Worker:
    def __init__(self):
        self.lab = lab
    def handle(self, record):
        pass
handler = Worker().handle""",
    "a method": "class Worker:\n    def handle(self, record):\n        return lab\nhandler = Worker().handle",
    "a dataclass's method": "@dataclass\nclass A:\n    def x(self):\n        return lab\ndef handler(record):\n    A()",
    "a decorated function": """
def twice(function):
    @functools.wraps(function)
    def wrapped(record):
        function(record)
        function(record)
    return wrapped
@twice
def handler(record):
    lab""",
}


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_what_stays_in_the_notebook_is_named(source: str) -> None:
    handler = notebook(source, lab=Stays())["handler"]
    with pytest.raises(CannotTravel) as refused:
        pack(handler)
    assert re.search(r"lab' \((a|holds a) Stays\)", str(refused.value)), refused.value
    assert "use a topic" in str(refused.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("out = open(path, 'w')", "out"),
        ("out = open(path, 'w+')", "out"),
        ("out = open(__file__)", "out"),  # cloudpickle alone would send a copy of what it holds
        ("out = open(path, 'ab')", "out"),
        ("out = threading.Lock()", "out"),
        ("out = threading.Event()", "out"),
        ("import socket\nout = socket.socket()", "out"),
        ("out = (n for n in range(3))", "out"),
        ("import sqlite3\nout = sqlite3.connect(':memory:')", "out"),
        ("from confluent_kafka import Producer\nout = Producer({'bootstrap.servers': '127.0.0.1:1'})", "out"),
        ("from labkit.kafka.producer import Producer\nout = Producer(cluster)", "out"),
        ("import subprocess\nout = threading.Thread(target=print)", "out"),
        ("import weakref\nclass A: pass\na = A()\nout = weakref.ref(a)", "out"),
        ("import ssl\nout = ssl.create_default_context()", "out"),
        ("class Odd:\n    def __reduce__(self):\n        raise ValueError('not today')\nout = Odd()", "out"),
    ],
)  # fmt: skip
def test_what_cannot_be_pickled_is_named(source: str, name: str, tmp_path: Path) -> None:
    cells = notebook(
        f"{source}\ndef helper():\n    return out\ndef handler(record):\n    return [helper() for _ in range(2)]",
        cluster=Cluster("127.0.0.1:1"),
        path=str(tmp_path / "out"),
        __file__=__file__,
    )
    try:
        with pytest.raises(CannotTravel, match=f"variable '{name}'") as refused:
            pack(cells["handler"])
        assert "inside the handler" in str(refused.value)
    finally:
        getattr(cells["out"], "close", lambda: None)()


@pytest.mark.parametrize(
    "source",
    [
        "def handler(record):\n    return Order(1)",
        "order = Order(1)\ndef handler(record):\n    return order",
        "@dataclass\nclass Line:\n    order: Order\ndef handler(record):\n    return Line",
        "@dataclass\nclass Line:\n    orders: 'list[Order]'\ndef handler(record):\n    return Line",
        "class Paid(Order):\n    cents: int\nOrder = Paid\ndef handler(record):\n    return Order(1, 2)",
        "topic = Topic(cluster, 'orders', 4, list[Order])\ndef handler(record):\n    topic.send(1)",
    ],
)
def test_a_struct_of_the_notebook_is_refused_by_name_with_the_fix(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = notebook(f"class Order(Struct):\n    id: int\n{source}", cluster=Cluster("127.0.0.1:1"), Topic=Topic)
    monkeypatch.setattr(sys.modules["__main__"], "Order", cells["Order"], raising=False)
    with pytest.raises(CannotTravel, match=r"from dataclasses import dataclass") as refused:
        pack(cells["handler"])
    assert f"`@dataclass` above `class {cells['Order'].__name__}:`" in str(refused.value)
