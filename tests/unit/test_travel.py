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
from labkit.lab.travel import CannotTravel, pack, unpack

IMPORTS = """
import dataclasses, enum, functools, math, threading, time
from typing import Annotated, ClassVar, Generic, Optional, TypeVar
import msgspec
from msgspec import Struct, field
from msgspec.json import decode, encode
"""
SEND = """
import sys
from labkit.lab.travel import pack
print(check(), file=sys.stderr)
sys.stdout.buffer.write(pack(check))
"""
RECEIVE = "import sys\nfrom labkit.lab.travel import unpack\nprint(unpack(sys.stdin.buffer.read())())\n"


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


STRUCTS = {
    "fields and defaults": (
        """
        class Order(Struct):
            id: int
            customer: str = "nobody"
            tags: list[str] = field(default_factory=list)
            more: dict[str, int] = {}

        def check():
            one, other = Order(1), Order(2, "ada")
            one.tags.append("x")
            return one, other, encode(other), decode(b'{"id": 3, "unknown": 1}', type=Order)
        """,
        """
        (Order(id=1, customer='nobody', tags=['x'], more={}), Order(id=2, customer='ada', tags=[], more={}),
        b'{"id":2,"customer":"ada","tags":[],"more":{}}', Order(id=3, customer='nobody', tags=[], more={}))
        """,
    ),
    "a field that is wrong is refused": (
        """
        class Order(Struct, forbid_unknown_fields=True):
            id: Annotated[int, msgspec.Meta(ge=0)]

        def check():
            said = []
            for raw in (b'{"id": -1}', b'{"id": 1, "more": 2}', b'{}'):
                try:
                    decode(raw, type=Order)
                except msgspec.ValidationError as error:
                    said.append(str(error))
            return said
        """,
        """
        ['Expected `int` >= 0 - at `$.id`', 'Object contains unknown field `more`',
        'Object missing required field `id`']
        """,
    ),
    "tag, rename and frozen": (
        """
        class Paid(Struct, tag="paid", rename="camel", frozen=True):
            order_id: int

        class Refused(Struct, tag="refused", tag_field="type"):
            why: str

        def check():
            try:
                Paid(1).order_id = 2
            except AttributeError as error:
                changed = str(error)
            return encode(Paid(1)), encode(Refused("no")), changed, len({Paid(1), Paid(1)})
        """,
        '(b\'{"type":"paid","orderId":1}\', b\'{"type":"refused","why":"no"}\', "immutable type: \'Paid\'", 1)',
    ),
    "a union by tags": (
        """
        class Paid(Struct, tag=True):
            id: int

        class Refused(Struct, tag=True):
            why: str

        def check():
            return [decode(encode(one), type=Paid | Refused) for one in (Paid(1), Refused("no"))]
        """,
        "[Paid(id=1), Refused(why='no')]",
    ),
    "inheritance": (
        """
        class Event(Struct):
            id: int
            def name(self):
                return f"event {self.id}"

        class Paid(Event):
            amount: float = 0.5
            id: int = 7
            def name(self):
                return "paid " + super().name()

        def check():
            return Paid(), Paid().name(), Event(1).name(), issubclass(Paid, Event), Paid.__struct_fields__
        """,
        # The order of fields matters where they are given by position.
        "(Paid(id=7, amount=0.5), 'paid event 7', 'event 1', True, ('id', 'amount'))",
    ),
    "methods": (
        """
        class Money(Struct, order=True):
            cents: int

            def plus(self, other):
                return Money(self.cents + other.cents)

            @property
            def euros(self):
                return self.cents / 100

            @classmethod
            def zero(cls):
                return cls(0)

            @staticmethod
            def of(euros):
                return Money(round(euros * 100))

            def __str__(self):
                return f"{self.euros} EUR"

        def check():
            return str(Money.of(1.5).plus(Money.zero())), Money(1).plus(Money(2)), Money(1) < Money(2)
        """,
        "('1.5 EUR', Money(cents=3), True)",
    ),
    "what a class holds beside its fields": (
        """
        class Renewal(Struct, kw_only=True):
            price: float = 5.0
            id: int
            LIMIT: ClassVar[int] = 3
            kinds = ("a", "b")

        def check():
            return Renewal(id=1), Renewal.LIMIT, Renewal.kinds, Renewal.__doc__, Renewal.__module__
        """,
        "(Renewal(price=5.0, id=1), 3, ('a', 'b'), None, '__main__')",
    ),
    "a check after decoding": (
        """
        class Range(Struct):
            low: int
            high: int
            def __post_init__(self):
                if self.low > self.high:
                    raise ValueError("low > high")

        class Even(Range):
            def __post_init__(self):
                super().__post_init__()
                if self.low % 2:
                    raise ValueError("odd")

        def check():
            said = []
            for low, high, kind in ((2, 1, Range), (2, 1, Even), (1, 1, Even)):
                try:
                    said.append(decode(encode({"low": low, "high": high}), type=kind))
                except msgspec.ValidationError as error:
                    said.append(str(error))
            return said
        """,
        "['low > high', 'low > high', 'odd']",
    ),
    "unset": (
        """
        class Patch(Struct):
            id: int
            name: str | None | msgspec.UnsetType = msgspec.UNSET

        def check():
            return encode(Patch(1)), Patch(2).name is msgspec.UNSET
        """,
        "(b'{\"id\":1}', True)",
    ),
    "nested and generic": (
        """
        T = TypeVar("T")

        class Item(Struct):
            name: str

        class Envelope(Struct, Generic[T]):
            body: T
            items: list["Item"] = []
            first: Optional[Item] = None

        def check():
            return decode(encode(Envelope(1, [Item("a")], Item("b"))), type=Envelope[int])
        """,
        "Envelope(body=1, items=[Item(name='a')], first=Item(name='b'))",
    ),
    "arrays and omitted defaults": (
        """
        class Point(Struct, array_like=True):
            x: int
            y: int = 0

        class Sparse(Struct, omit_defaults=True):
            x: int = 1
            y: int = 2

        def check():
            return encode(Point(1)), encode(Sparse(y=3))
        """,
        "(b'[1,0]', b'{\"y\":3}')",
    ),
}


@pytest.mark.parametrize(("source", "expected"), STRUCTS.values(), ids=STRUCTS)
def test_a_struct_of_a_notebook_arrives(source: str, expected: str) -> None:
    assert arrives(source) == " ".join(expected.split())


OTHERS = {
    "a dataclass that was decoded before": (
        """
        @dataclasses.dataclass
        class Order:
            id: int
            tags: list[str] = dataclasses.field(default_factory=list)

        def check():
            return decode(b'{"id": 1}', type=Order), encode(Order(2))
        """,
        '(Order(id=1, tags=[]), b\'{"id":2,"tags":[]}\')',
    ),
    "a dataclass that holds its own kind": (
        """
        @dataclasses.dataclass
        class Node:
            name: str
            next: "Node | None" = None
            def last(self):
                return self if self.next is None else self.next.last()

        def check():
            return Node("a", Node("b")).last().name
        """,
        "b",
    ),
    "an enum": (
        """
        class Colour(enum.Enum):
            RED = "red"

        class Car(Struct):
            colour: Colour

        def check():
            return decode(b'{"colour": "red"}', type=Car).colour is Colour.RED
        """,
        "True",
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


@pytest.mark.parametrize(("source", "expected"), OTHERS.values(), ids=OTHERS)
def test_other_definitions_arrive(source: str, expected: str) -> None:
    assert arrives(source) == " ".join(expected.split())


def test_a_struct_of_a_module_by_value() -> None:
    source = """
        import cloudpickle, types
        module = types.ModuleType("orders_of_mine")
        exec("from msgspec import Struct\\nclass Order(Struct):\\n    id: int\\n    n: int = 2", module.__dict__)
        sys = __import__("sys")
        sys.modules["orders_of_mine"] = module
        cloudpickle.register_pickle_by_value(module)
        Order = module.Order

        def check():
            return Order(1), encode(Order(1))
    """
    assert arrives(source) == '(Order(id=1, n=2), b\'{"id":1,"n":2}\')'


def test_a_topic_travels_as_its_coordinates() -> None:
    cells = notebook("class Order(Struct):\n    id: int\n")
    topic = Topic(Cluster("127.0.0.1:1", (("sasl.password", "secret"),)), "labkit.a.b.c.orders", 4, cells["Order"])
    there = unpack(pack(topic))
    assert (there.cluster, there.name, there.partitions) == (topic.cluster, topic.name, 4)
    assert there.value is not cells["Order"]
    assert there.value(1).id == 1


def test_one_class_stays_one_class() -> None:
    """The type a topic decodes to is the one that the handler compares with."""
    cells = notebook("class Order(Struct):\n    id: int\ndef check(value):\n    return isinstance(value, Order)\n")
    topic, check = unpack(pack((Topic(Cluster("127.0.0.1:1"), "orders", 4, cells["Order"]), cells["check"])))
    assert check(topic.value(1))


def test_a_struct_that_a_pod_can_import_travels_by_its_name() -> None:
    from labkit.lab.telemetry import PodReport

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
    "a Struct's method": "class A(Struct):\n    def x(self):\n        return lab\ndef handler(record):\n    A()",
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


def test_a_struct_field_of_its_own_type_is_refused_by_name() -> None:
    cells = notebook("class Node(Struct):\n    next: 'Node | None' = None\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["__main__"], "Node", cells["Node"], raising=False)
        with pytest.raises(CannotTravel, match=r"Node\.next.*own type.*dataclass"):
            pack(cells["Node"])


def test_two_structs_that_hold_each_other_are_refused_by_name() -> None:
    cells = notebook("class A(Struct):\n    b: 'B | None' = None\nclass B(Struct):\n    a: A\n")
    with pytest.raises(CannotTravel, match=r"'B' is not defined\. Define that class first"):
        pack(cells["A"])
    with pytest.MonkeyPatch.context() as patch:
        for name in "AB":
            patch.setattr(sys.modules["__main__"], name, cells[name], raising=False)
        with pytest.raises(CannotTravel, match=r"A\.b.*own type.*dataclass"):
            pack(cells["A"])
