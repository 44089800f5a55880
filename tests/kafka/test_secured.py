"""TLS and logins against a real broker that asks for them: what works, and how a mistake is told, soon and in words."""

from __future__ import annotations

import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from confluent_kafka import KafkaError
from consuming import fresh_group, fresh_topic
from lab_helpers import Order, Shipped, orders, values, wait_ready
from processes import wait_until
from secured import PASSWORD, STORE, USER, Secured, secured_broker

import labkit.runtime.connect as connect_module
from labkit.kafka.cluster import Cluster
from labkit.kafka.consumer import Consumer
from labkit.kafka.errors import ClientRefused, ClusterUnreachable, LabkitError
from labkit.kafka.producer import Producer
from labkit.kafka.refusal import is_final
from labkit.kafka.topics import Topic
from labkit.lab import Lab
from labkit.runtime.connect import connect

SOON = 30.0  # seconds; the product's own bounds end within 10, this is for a machine that stands still
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
        pytest.param("TLS", TLS, id="TLS"),
        pytest.param("LOGIN", LOGIN, id="SCRAM-512 over TLS"),
        pytest.param("LOGIN", LOGIN | {"sasl.mechanism": "SCRAM-SHA-256"}, id="SCRAM-256 over TLS"),
        pytest.param("LOGIN", JAVA, id="a Java client's file"),
        pytest.param("BARE", BARE, id="SCRAM without TLS"),
        pytest.param("MUTUAL", TLS | OWN, id="mutual TLS"),
    ],
)
def test_right_settings_connect(through: Connect, listener: str, settings: Settings) -> None:
    assert through(listener, settings).topics() is not None


WRONGS = {
    "wrong password": ("LOGIN", LOGIN | {"sasl.password": WRONG}, f"login of '{USER}' was refused.*sasl.password"),
    "unknown user": ("LOGIN", LOGIN | {"sasl.username": "nobody"}, "login of 'nobody' was refused.*sasl.username"),
    "mechanism not offered": ("LOGIN", LOGIN | {"sasl.mechanism": "PLAIN"}, "no sasl.mechanism=PLAIN: set SCRAM-SHA-"),
    "mechanism not set": (
        "LOGIN",
        {name: value for name, value in LOGIN.items() if name != "sasl.mechanism"},
        "sasl.mechanism is not set",
    ),
    "no user": ("LOGIN", {**TLS, "security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN"}, "sasl.username and"),
    "wrong password without TLS": ("BARE", BARE | {"sasl.password": WRONG}, f"login of '{USER}' was refused"),
    "certificate of another authority": (
        "TLS",
        TLS | {"ssl.ca.location": "{stranger}"},
        r"no authority in ssl.ca.location \(.*stranger.pem\) has signed",
    ),
    "no authority": ("TLS", {"security.protocol": "SSL"}, "no authority known to this machine.*set ssl.ca.location"),
    "another host name": ("ELSEWHERE", TLS, r"certificate is not for 127\.0\.0\.1: use the host name"),
    "expired": ("EXPIRED", TLS, "certificate has expired: whoever runs the cluster must renew it"),
    "plain text to TLS": ("TLS", {}, "speaks TLS.* set security.protocol=SSL,"),
    "plain text to TLS with login": ("LOGIN", {}, "speaks TLS.* set security.protocol=SSL,"),
    "plain login to TLS": ("LOGIN", BARE, "speaks TLS.* set security.protocol=SASL_SSL"),
    "plain text to login": ("BARE", {}, "asks for a login, set security.protocol=SASL_PLAINTEXT"),
    "TLS to TLS with login": ("LOGIN", TLS, "asks for a login, set security.protocol=SASL_SSL"),
    "TLS to plain text": ("PLAINTEXT", TLS, "speaks no TLS.* set security.protocol=PLAINTEXT"),
    "login over TLS to plain login": ("BARE", LOGIN, "speaks no TLS.* set security.protocol=SASL_PLAINTEXT"),
    "login to plain text": ("PLAINTEXT", BARE, "asks for no login: set security.protocol=PLAINTEXT"),
    "login to TLS": ("TLS", LOGIN, "asks for no login: set security.protocol=SSL"),
    "authority's file missing": (
        "TLS",
        TLS | {"ssl.ca.location": "no/such.pem"},
        "ssl.ca.location names /.*/no/such.pem, which cannot be read: No such file",
    ),
    "keystore's password": (
        "MUTUAL",
        TLS | OWN | {"ssl.keystore.password": WRONG},
        "ssl.keystore.location names .*client.p12, which cannot be used: .*PKCS",
    ),
    "no certificate of the client": ("MUTUAL", TLS, "demands one that it was not given: set ssl.certificate.location"),
    "nobody there": ("127.0.0.1:9", LOGIN, "nothing listens there"),
    "no such host": ("no.such.host.invalid:9092", LOGIN, "nobody knows this host name"),
}
AT_ONCE = {
    *("wrong password", "unknown user", "mechanism not offered", "mechanism not set", "no user", "expired"),
    *("wrong password without TLS", "certificate of another authority", "no authority", "another host name"),
    *("login to plain text", "login to TLS", "authority's file missing", "keystore's password"),
    "no certificate of the client",
}


@pytest.mark.parametrize("name", WRONGS)
def test_what_is_wrong_is_told_soon(
    name: str,
    secured: Secured,
    through: Connect,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener, settings, says = WRONGS[name]
    if name not in (*AT_ONCE, "nobody there", "plain text to TLS"):  # these are waited for as long as a user would
        monkeypatch.setattr(connect_module, "PATIENCE", 2.0)
    if name in AT_ONCE:
        monkeypatch.setattr(connect_module, "PATIENCE", 60.0)  # which is not waited for
    address = secured.address(listener) if listener.isupper() else listener
    began = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=f"(?s)^KAFKA_BOOTSTRAP_SERVERS says .*{re.escape(address)}") as told:
        through(listener, settings)
    took = time.monotonic() - began
    text = str(told.value)
    assert re.search(says, text), text
    assert re.search(r"Correct it \(KAFKA_CLIENT_CONFIG is /.*client.properties\)", text), text
    assert took < SOON, f"{took:.1f} s"
    refused = isinstance(told.value.__cause__, ClientRefused)
    assert refused == (name in AT_ONCE), text
    everything = "".join(traceback.format_exception(told.value)) + repr(told.value) + "".join(capfd.readouterr())
    assert not [secret for secret in SECRETS if secret in everything]


def test_one_address_of_two_that_refuses_does_not_hide_the_other(through: Connect, secured: Secured) -> None:
    both = f"{secured.address('EXPIRED')},{secured.address('TLS')}"
    assert through(both, TLS).bootstrap == both
    with pytest.raises(ClusterUnreachable, match="has expired"):
        through(f"{secured.address('EXPIRED')},{secured.address('EXPIRED', 'localhost')}", TLS)


@pytest.mark.parametrize(
    ("code", "words", "final"),
    [
        (KafkaError._AUTHENTICATION, "b: SASL authentication error: invalid credentials", True),
        (KafkaError._AUTHENTICATION, "b: SaslAuthenticateRequest failed: Local: Broker transport failure", False),
        (KafkaError._AUTHENTICATION, "b: SASL PLAIN mechanism handshake failed: Local: Timed out: brokers", False),
        (KafkaError._SSL, "b: SSL handshake failed", True),
        (KafkaError._TRANSPORT, "b: Connect to ipv4#127.0.0.1:9 failed: Connection refused", False),
        (KafkaError._ALL_BROKERS_DOWN, "1/1 brokers are down", False),
    ],
)
def test_a_connection_that_broke_is_no_refusal(code: int, words: str, final: bool) -> None:
    assert is_final(KafkaError(code, words)) is final


def test_a_question_tells_a_refusal_with_what_was_asked(secured: Secured) -> None:
    cluster = Cluster(secured.address("LOGIN"), tuple(filled(LOGIN | {"sasl.password": WRONG}, secured).items()))
    began = time.monotonic()
    with pytest.raises(ClientRefused, match=f"^topic orders: .*login of '{USER}' was refused"):
        cluster.create_topic("orders", 1)
    assert time.monotonic() - began < SOON


def test_a_consumer_with_a_wrong_password_ends(secured: Secured) -> None:
    cluster = Cluster(secured.address("LOGIN"), tuple(filled(LOGIN | {"sasl.password": WRONG}, secured).items()))
    consumer = Consumer(Topic(cluster, "orders", 1, int), print, group=fresh_group())
    began = time.monotonic()
    with pytest.raises(ClientRefused, match=f"login of '{USER}' was refused"):
        consumer.run(threading.Event())
    assert time.monotonic() - began < SOON


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
    assert "cannot go on" in str(ended[0])
    assert "login of 'bob' was refused" in str(ended[0])
    assert "passw0rd" not in str(ended[0])


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


def texts(folder: Path, since: float) -> Iterator[str]:
    """What the files below `folder` say that were written to since then. Some may be deleted meanwhile."""
    for path, _, names in os.walk(folder):
        for file in (Path(path, name) for name in names):
            with suppress(FileNotFoundError):
                if file.stat().st_mtime >= since - 1:
                    yield file.read_text(errors="replace")


def test_what_shows_a_cluster_shows_no_password() -> None:
    cluster = Cluster("127.0.0.1:1", (("sasl.password", PASSWORD),))
    topic = Topic(cluster, "orders", 1, int)
    consumer = Consumer(topic, print, group="billing")
    assert PASSWORD not in f"{cluster!r} {cluster} {topic!r} {consumer!r}"


def test_an_error_that_is_kept_keeps_no_client_trying(secured: Secured) -> None:
    """Its traceback holds what `describe` had in hand; a client among that would go on with the wrong password."""
    cluster = Cluster(secured.address("LOGIN"), tuple(filled(LOGIN | {"sasl.password": WRONG}, secured).items()))
    mine = psutil.Process()
    before = mine.num_threads()
    with pytest.raises(ClientRefused) as told:
        cluster.describe()
    wait_until(lambda: mine.num_threads() <= before, 20, f"the end of the client's threads, and {told.value} kept")
