"""What librdkafka says, and the setting that a user is told to look at. No broker needed: these are its words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from confluent_kafka import KafkaError

from labkit.kafka.cluster import Cluster
from labkit.kafka.connection_errors import explain, is_final
from labkit.kafka.consumer import Consumer
from labkit.kafka.topics import Topic

PASSWORD = "corr3ct h0rse's=staple"
LOGIN = {
    "security.protocol": "SASL_SSL",
    "ssl.ca.location": "ca.pem",
    "sasl.mechanism": "PLAIN",
    "sasl.username": "ada",
    "sasl.password": PASSWORD,
}
HANDSHAKE = "ssl://b:1/bootstrap: SSL handshake failed: "
VERIFY = "error:0A000086:SSL routines::certificate verify failed"
FINAL = [
    (KafkaError._AUTHENTICATION, "SASL authentication error: invalid credentials", "sasl.username, sasl.password"),
    (
        KafkaError._AUTHENTICATION,
        "SASL PLAIN mechanism handshake failed: Broker: Unsupported SASL mechanism: broker's supported mechanisms: X",
        "does not take this sasl.mechanism",
    ),
    (
        KafkaError._AUTHENTICATION,
        "SASL PLAIN mechanism handshake failed: Broker: Request not valid in current SASL state",
        "asks for no login: set security.protocol",
    ),
    (KafkaError._SSL, f"{HANDSHAKE}{VERIFY}: broker certificate could not be verified", "set ssl.ca.location"),
    (KafkaError._TRANSPORT, f"ssl://b:1/bootstrap: {VERIFY}", "expired, or was made for another host name"),
    (
        KafkaError._TRANSPORT,
        "Receive failed: error:0A00045C:SSL routines::tlsv13 alert certificate required: SSL alert number 116",
        "set ssl.certificate.location and ssl.key.location",
    ),
    (
        KafkaError._SSL,
        f"{HANDSHAKE}error:0A00010B:SSL routines::wrong version number: connecting to a PLAINTEXT broker listener?",
        "security.protocol",
    ),
]
CLOSED = "Does security.protocol fit this port? With TLS, set SSL or SASL_SSL. With a login, set SASL_SSL or SASL_PLAIN"
PASSING = [
    (KafkaError._AUTHENTICATION, "SaslAuthenticateRequest failed: Local: Broker transport failure", "of the login"),
    (KafkaError._AUTHENTICATION, "SASL PLAIN mechanism handshake failed: Local: Timed out: brokers", "of the login"),
    (KafkaError._TRANSPORT, "Connect to ipv4#127.0.0.1:9 failed: Connection refused", "host and port"),
    (KafkaError._TRANSPORT, "Connection setup timed out in state CONNECT (after 5000ms)", "reachable from here"),
    (KafkaError._RESOLVE, "Failed to resolve 'no.such.host:9092': Name or service not known", "host name"),
    (KafkaError._ALL_BROKERS_DOWN, "1/1 brokers are down", CLOSED),
    (KafkaError._TRANSPORT, "Send failed: Broken pipe", CLOSED),
    (KafkaError._TRANSPORT, "Receive failed: Connection reset by peer", CLOSED),
    (KafkaError._TRANSPORT, "whatever else", CLOSED),
    (KafkaError._TRANSPORT, "Disconnected: verify that security.protocol is correctly configured", CLOSED),
    (KafkaError._TRANSPORT, f"{HANDSHAKE}Disconnected: connecting to a PLAINTEXT broker listener?", CLOSED),
]


@pytest.mark.parametrize(("code", "words", "says"), FINAL + PASSING)
def test_words_lead_to_a_setting(code: int, words: str, says: str) -> None:
    error = KafkaError(code, words)
    told = explain(error, LOGIN)
    assert says in told
    assert told.endswith(f"sasl.username=ada, ssl.ca.location=ca.pem; librdkafka: {words}]")
    assert PASSWORD not in told
    assert is_final(error) == ((code, words, says) in FINAL)


def test_the_protocol_is_told_when_none_is_set() -> None:
    assert "[now security.protocol=PLAINTEXT; " in explain(KafkaError(KafkaError._TRANSPORT, "Broken pipe"), {})


def test_words_that_nobody_knows_are_told_as_they_are() -> None:
    assert explain(KafkaError(KafkaError._INVALID_ARG, "something else"), LOGIN) == "something else"


def test_settings_that_no_client_can_be_made_with(tmp_path: Path) -> None:
    def told(words: str, **files: Path) -> str:
        security = {f"ssl.{name}.location": str(file) for name, file in files.items()}
        return explain(KafkaError(KafkaError._INVALID_ARG, words), security)

    assert told("No provider for SASL mechanism GSSAPI: recompile").startswith("sasl.mechanism is not set")
    missing, there = tmp_path / "no.pem", tmp_path / "client.p12"
    there.touch()
    assert told("ssl.ca.location failed: BIO lib", ca=missing) == (
        f"ssl.ca.location names {missing}, which cannot be read: {os.strerror(errno.ENOENT)}"
    )
    words = "Failed to parse ssl.keystore.location PKCS#12 file: mac verify failure"
    assert told(words, keystore=there) == f"ssl.keystore.location names {there}, which cannot be used: {words}"


def test_what_shows_a_cluster_shows_no_password() -> None:
    cluster = Cluster("127.0.0.1:1", tuple(LOGIN.items()))
    topic = Topic(cluster, "orders", 1, int)
    consumer = Consumer(topic, print, group="billing")
    assert PASSWORD not in f"{cluster!r} {cluster} {topic!r} {consumer!r}"
