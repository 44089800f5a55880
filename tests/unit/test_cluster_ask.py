"""What is done when the broker does not answer a question: asked again, by whom, and for how long. No broker needed."""

from __future__ import annotations

import time

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient  # type: ignore[attr-defined]

from labkit.kafka.cluster import PASSING, Cluster, admin
from labkit.kafka.errors import ClusterUnreachable

NOWHERE = Cluster("127.0.0.1:1")
SILENCE = [TimeoutError(), KafkaException(KafkaError(KafkaError._TIMED_OUT))]


def kafka(code: int) -> KafkaException:
    return KafkaException(KafkaError(code))


class Question:
    """Ends in these errors, one after the other, and then in an answer. Notes the admin client of each time."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.clients: list[AdminClient] = []

    def __call__(self) -> str:
        self.clients.append(admin(NOWHERE))
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


def test_a_question_that_is_answered_is_asked_once_and_keeps_its_client() -> None:
    before, question = admin(NOWHERE), Question()
    assert NOWHERE.ask(question) == "answer"
    assert question.clients == [before]
    assert admin(NOWHERE) is before


@pytest.mark.parametrize("silence", SILENCE, ids=["future", "client"])
def test_silence_is_asked_once_more_by_a_new_client(silence: Exception) -> None:
    question = Question(silence)
    assert NOWHERE.ask(question, patience=0) == "answer"
    first, second = question.clients
    assert first is not second
    assert admin(NOWHERE) is second


@pytest.mark.parametrize("silence", SILENCE, ids=["future", "client"])
def test_a_second_silence_is_an_error_with_the_address_however_patient(silence: Exception) -> None:
    question = Question(silence, silence)
    told = r"^topic orders: no answer from 127\.0\.0\.1:1 \(.+\).*`labkit status`"
    with pytest.raises(ClusterUnreachable, match=told):
        NOWHERE.ask(question, patience=60, about="topic orders: ")
    assert len(question.clients) == 2


def test_a_silence_before_what_passes_still_counts() -> None:
    passing = [kafka(KafkaError._TRANSPORT)] * 2
    assert NOWHERE.ask(Question(SILENCE[0], *passing)) == "answer"
    question = Question(SILENCE[0], *passing, SILENCE[1])
    with pytest.raises(ClusterUnreachable):
        NOWHERE.ask(question)
    assert len(question.clients) == 4


@pytest.mark.parametrize("code", PASSING)
def test_what_passes_is_asked_again(code: int) -> None:
    question = Question(kafka(code))
    assert NOWHERE.ask(question) == "answer"
    assert len(question.clients) == 2


def test_what_passes_is_asked_again_until_patience_is_over() -> None:
    question = Question(*[kafka(KafkaError.NOT_COORDINATOR)] * 1000)
    begun = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=r"no answer from 127\.0\.0\.1:1 "):
        NOWHERE.ask(question, patience=0.5)
    assert 0.5 <= time.monotonic() - begun < 5
    assert 2 <= len(question.clients) <= 6


def test_one_more_code_can_pass() -> None:
    unknown = KafkaError.UNKNOWN_TOPIC_OR_PART
    assert NOWHERE.ask(Question(kafka(unknown)), also=unknown) == "answer"
    question = Question(kafka(unknown))
    with pytest.raises(ClusterUnreachable):
        NOWHERE.ask(question)
    assert len(question.clients) == 1


def test_any_other_error_is_raised_at_once() -> None:
    refused = kafka(KafkaError.CLUSTER_AUTHORIZATION_FAILED)
    question = Question(refused)
    with pytest.raises(ClusterUnreachable, match=r"127\.0\.0\.1:1") as told:
        NOWHERE.ask(question)
    assert told.value.__cause__ is refused
    assert len(question.clients) == 1


def test_an_error_that_is_not_kafkas_goes_through() -> None:
    wrong = ValueError("not a name")
    question = Question(wrong)
    with pytest.raises(ValueError, match="not a name") as told:
        NOWHERE.ask(question)
    assert told.value is wrong
    assert len(question.clients) == 1
