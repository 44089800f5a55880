"""TLS and logins against a real broker that asks for them: what works, and which setting a mistake names."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from confluent_kafka.admin import ResourceType
from consuming import fresh_group, fresh_topic
from lab_helpers import Order, Shipped, diagnosed, orders, ships_all, values, wait_ready
from processes import wait_until
from secured import PASSWORD, STORE, USER, Secured, secured_broker

from labkit import Lab
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import ClientRefused, ClusterUnreachable, LabkitError
from labkit.kafka.producer import Producer
from labkit.kafka.topics import Topic
from labkit.runtime import which_kafka
from labkit.runtime.which_kafka import connect

SOON = 30.0  # seconds, for a machine that stands still
WRONG = "wr0ng-passw0rd"
SECRETS = (PASSWORD, WRONG, STORE)

Settings = dict[str, str]
Connect = Callable[[str, Mapping[str, str]], Cluster]

TLS = {"security.protocol": "SSL", "ssl.ca.location": "{ca}"}
LOGIN = {
    "security.protocol": "SASL_SSL",
    "ssl.ca.location": "{ca}",
    "sasl.mechanism": "SCRAM-SHA-512",
    "sasl.username": USER,
    "sasl.password": PASSWORD,
}
BARE = {name: value for name, value in LOGIN.items() if not name.startswith("ssl.")} | {
    "security.protocol": "SASL_PLAINTEXT"
}
OWN = {"ssl.keystore.location": "{client}", "ssl.keystore.password": STORE}
JAAS = f'org.apache.kafka.common.security.scram.ScramLoginModule required username="{USER}" password="{PASSWORD}";'
JAVA = {name: value for name, value in LOGIN.items() if name not in ("sasl.username", "sasl.password")} | {
    "sasl.jaas.config": JAAS,
    "key.deserializer": "org.apache.kafka.common.serialization.StringDeserializer",
}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with secured_broker(tmp_path_factory.mktemp("broker") / "secured") as secured:
        yield secured


def filled(settings: Mapping[str, str], secured: Secured) -> Settings:
    """The settings with the files of this broker's certificates."""
    files = {"{ca}": secured.certificates.pem("ca"), "{stranger}": secured.certificates.pem("stranger")}
    files["{client}"] = secured.certificates.store("client")
    return {name: str(files.get(value, value)) for name, value in settings.items()}


@pytest.fixture
def through(
    secured: Secured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, Mapping[str, str]], Cluster]:
    """Connect to one of the listeners (or an address), as a user does: by the two environment variables."""

    def connected(listener: str, settings: Mapping[str, str]) -> Cluster:
        file = tmp_path / "client.properties"
        file.write_text("".join(f"{name}={value}\n" for name, value in filled(settings, secured).items()))
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", secured.address(listener) if listener.isupper() else listener)
        monkeypatch.setenv("KAFKA_CLIENT_CONFIG", str(file))
        with connect() as connection:
            assert connection.origin == "external"
            assert connection.cluster_id == secured.broker.cluster_id
            return connection.cluster

    return connected


@pytest.mark.parametrize(
    ("listener", "settings"),
    [
        pytest.param("LOGIN", LOGIN, id="SCRAM-512 over TLS"),
        pytest.param("TLS", TLS, id="TLS", marks=pytest.mark.long),
        pytest.param("LOGIN", LOGIN | {"sasl.mechanism": "SCRAM-SHA-256"}, id="SCRAM-256", marks=pytest.mark.long),
        pytest.param("LOGIN", JAVA, id="a Java client's file", marks=pytest.mark.long),
        pytest.param("BARE", BARE, id="SCRAM without TLS", marks=pytest.mark.long),
        pytest.param("MUTUAL", TLS | OWN, id="mutual TLS", marks=pytest.mark.long),
    ],
)
def test_right_settings_connect(through: Connect, listener: str, settings: Settings) -> None:
    assert through(listener, settings).topics() is not None


# By what is wrong: where the client connects, its settings, and which of them the message says to look at.
REFUSED = {
    "wrong password": ("LOGIN", LOGIN | {"sasl.password": WRONG}, "sasl.password"),
    "certificate of another authority": ("TLS", TLS | {"ssl.ca.location": "{stranger}"}, "set ssl.ca.location"),
    "no certificate of the client": ("MUTUAL", TLS, "ssl.certificate.location"),
}
REFUSED_TOO = {
    "unknown user": ("LOGIN", LOGIN | {"sasl.username": "nobody"}, "check sasl.username"),
    "wrong password without TLS": ("BARE", BARE | {"sasl.password": WRONG}, "sasl.password"),
    "mechanism not offered": ("LOGIN", LOGIN | {"sasl.mechanism": "PLAIN"}, "set one"),
    "mechanism not set": (
        "LOGIN",
        {name: value for name, value in LOGIN.items() if name != "sasl.mechanism"},
        "sasl.mechanism is not set",
    ),
    "no user": ("LOGIN", {**TLS, "security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN"}, "sasl.username"),
    "no authority": ("TLS", {"security.protocol": "SSL"}, "set ssl.ca.location"),
    "login to plain text": ("PLAINTEXT", BARE, "set security.protocol"),
    "login to TLS": ("TLS", LOGIN, "set security.protocol"),
    "authority's file missing": ("TLS", TLS | {"ssl.ca.location": "no/such.pem"}, "ssl.ca.location names"),
    "keystore's password": ("MUTUAL", TLS | OWN | {"ssl.keystore.password": WRONG}, "ssl.keystore.location"),
}
CLOSED = {"plain text to TLS": ("TLS", {}, "security.protocol fit")}
CLOSED_TOO = {
    "plain text to TLS with login": ("LOGIN", {}, "security.protocol fit"),
    "plain login to TLS": ("LOGIN", BARE, "security.protocol fit"),
    "plain text to login": ("BARE", {}, "security.protocol fit"),
    "TLS to TLS with login": ("LOGIN", TLS, "security.protocol fit"),
    "TLS to plain text": ("PLAINTEXT", TLS, "security.protocol fit"),
    "login over TLS to plain login": ("BARE", LOGIN, "security.protocol fit"),
    "nobody there": ("127.0.0.1:9", LOGIN, "host and port"),
    "no such host": ("no.such.host.invalid:9092", LOGIN, "host name"),
}


@pytest.mark.parametrize("name", [*REFUSED, *(pytest.param(name, marks=pytest.mark.long) for name in REFUSED_TOO)])
def test_a_refusal_is_told_without_waiting(
    name: str, through: Connect, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(which_kafka, "PATIENCE", 3600.0)  # who waited for that would never end
    listener, settings, setting = (REFUSED | REFUSED_TOO)[name]
    with pytest.raises(ClusterUnreachable) as told:
        through(listener, settings)
    assert isinstance(told.value.__cause__, ClientRefused)
    assert setting in str(told.value)
    everything = "".join(traceback.format_exception(told.value)) + repr(told.value) + "".join(capfd.readouterr())
    assert not [secret for secret in SECRETS if secret in everything]


@pytest.mark.parametrize("name", [*CLOSED, *(pytest.param(name, marks=pytest.mark.long) for name in CLOSED_TOO)])
def test_a_closed_connection_names_what_may_not_fit(
    name: str, through: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(which_kafka, "PATIENCE", 3.0)  # all of which is waited for: it might be a broker that starts
    listener, settings, setting = (CLOSED | CLOSED_TOO)[name]
    with pytest.raises(ClusterUnreachable, match=r"^KAFKA_BOOTSTRAP_SERVERS says ") as told:
        through(listener, settings)
    assert setting in str(told.value)
    assert not [secret for secret in SECRETS if secret in str(told.value)]


@pytest.mark.long
def test_one_address_of_two_that_refuses_does_not_hide_the_other(through: Connect, secured: Secured) -> None:
    both = f"{secured.address('MUTUAL')},{secured.address('TLS')}"
    assert through(both, TLS).bootstrap == both
    with pytest.raises(ClusterUnreachable, match=r"ssl\.certificate\.location"):
        through(f"{secured.address('MUTUAL')},{secured.address('MUTUAL', 'localhost')}", TLS)


@pytest.mark.long
@pytest.mark.parametrize(
    "ask",
    [
        lambda cluster: cluster.create_topic("orders", 1),
        lambda cluster: Consumer(Topic(cluster, "orders", 1, int), print, group=fresh_group()).run(threading.Event()),
    ],
    ids=["a question", "a consumer"],
)
def test_who_asks_with_a_wrong_password_is_refused(secured: Secured, ask: Callable[[Cluster], None]) -> None:
    with pytest.raises(ClientRefused, match=r"sasl\.password"):
        ask(Cluster(secured.address("LOGIN"), tuple(filled(LOGIN | {"sasl.password": WRONG}, secured).items())))


@pytest.mark.long
def test_a_consumer_whose_login_is_withdrawn_ends(secured: Secured) -> None:
    secured.set_password("bob", "f1rst-passw0rd")
    login = LOGIN | {"sasl.username": "bob", "sasl.password": "f1rst-passw0rd", "sasl.mechanism": "SCRAM-SHA-256"}
    cluster = Cluster(secured.address("AGAIN"), tuple(filled(login, secured).items()))
    topic = fresh_topic(cluster)
    ended: list[BaseException] = []
    handled, stop = threading.Event(), threading.Event()

    def run() -> None:
        try:
            Consumer(topic, lambda record: handled.set(), group=fresh_group()).run(stop)
        except LabkitError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        sender = Producer(cluster)
        sender.send(topic.name, b"1")
        sender.flush()
        assert handled.wait(SOON)
        secured.set_password("bob", "sec0nd-passw0rd")
        wait_until(lambda: ended, SOON, "the end of the consumer")
    finally:
        stop.set()
        thread.join(20)
    assert isinstance(ended[0], ClientRefused)
    assert "sasl.username=bob" in str(ended[0])
    assert "passw0rd" not in str(ended[0])


@pytest.mark.long
def test_a_lab_works_over_tls_with_a_login(through: Connect, secured: Secured, state_dir: Path) -> None:
    through("LOGIN", LOGIN)
    begun = time.time()
    lab = Lab("secured")
    try:
        assert lab.cluster.bootstrap == secured.address("LOGIN")
        source, shipped = lab.topic("orders", 2, Order), lab.topic("shipped", 2, Shipped)
        shop = lab.deploy("shop", Consumer(source, lambda record: shipped.send(Shipped(record.value.id))), replicas=2)
        wait_ready(shop)
        load = lab.load(source, orders(50), rate=1000)
        load.wait()
        wait_until(lambda: len(values(shipped)) == 50, 20, "all to be shipped")
        assert sorted(value.id for value in values(shipped)) == list(range(50))
        processes = [psutil.Process(pod.child.pid) for pod in shop.pods if pod.child]
        assert len(processes) == 2
        shown = [*(" ".join((*one.cmdline(), *one.environ().values())) for one in processes), repr(lab), repr(source)]
        shown += [lab._repr_html_(), *(line.text for line in shop.log)]
        written = [*texts(state_dir, begun)]
        assert any(lab.run.id in text for text in written)
        shown += written
        assert not [secret for secret in SECRETS if any(secret in text for text in shown)]
    finally:
        lab.close()
    assert not [name for name in lab.cluster.topics() if name.startswith(lab.run.prefix)]


THREE = (ResourceType.TOPIC, ResourceType.GROUP, ResourceType.TRANSACTIONAL_ID)


def as_user(user: str, secured: Secured, through: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a learner who logs in as this new user."""
    secured.set_password(user, PASSWORD)
    monkeypatch.setenv("LABKIT_LEARNER", user)
    through("LOGIN", LOGIN | {"sasl.username": user})


@pytest.mark.long
def test_a_lab_works_with_three_rights_for_a_prefix(
    through: Connect, secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/own-cluster.md gives them: topics, groups and transactional ids that begin with `labkit.<learner>.`."""
    secured.allow("grace", *THREE)
    as_user("grace", secured, through, monkeypatch)
    ships_all("prefixed")
    found = diagnosed(monkeypatch)
    assert not [one for one in found.values() if one.fix]
    assert "may not read the brokers' settings" in found["settings"].text
    assert "under labkit.grace." in found["topics"].text


@pytest.mark.long
def test_rights_of_another_prefix_are_no_rights(
    through: Connect, secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    secured.allow("linus", *THREE)
    as_user("linus", secured, through, monkeypatch)
    monkeypatch.setenv("LABKIT_LEARNER", "linu")
    assert diagnosed(monkeypatch)["topics"].fix.startswith("give this login the three rights")
    with pytest.raises(LabkitError, match="could not be created"):
        Lab("foreign")


@pytest.mark.long
@pytest.mark.parametrize(("kind", "check"), [*zip(THREE, ("topics", "groups", "transact."), strict=True)])
def test_each_right_that_lacks_is_a_finding(
    kind: ResourceType, check: str, through: Connect, secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = f"without-{kind.name.lower().replace('_', '-')}"[:20]
    secured.allow(user, *(one for one in THREE if one != kind))
    as_user(user, secured, through, monkeypatch)
    finding = diagnosed(monkeypatch)[check]
    assert f"prefix labkit.{user}. (or set LABKIT_LEARNER" in finding.fix


def texts(folder: Path, since: float) -> Iterator[str]:
    """What the files below `folder` say that were written to since then. Some may be deleted meanwhile."""
    for path, _, names in os.walk(folder):
        for file in (Path(path, name) for name in names):
            with suppress(FileNotFoundError):
                if file.is_file() and file.stat().st_mtime >= since - 1:  # there are sockets, too
                    yield file.read_text(errors="replace")


@pytest.mark.long
def test_an_error_that_is_kept_keeps_no_client_trying(secured: Secured) -> None:
    """Its traceback holds what `describe` had in hand; a client among that would go on with the wrong password."""
    cluster = Cluster(secured.address("LOGIN"), tuple(filled(LOGIN | {"sasl.password": WRONG}, secured).items()))
    mine = psutil.Process()
    before = mine.num_threads()
    with pytest.raises(ClientRefused) as told:
        cluster.describe()
    wait_until(lambda: mine.num_threads() <= before, 20, f"the end of the client's threads, and {told.value} kept")
