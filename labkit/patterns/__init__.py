"""The patterns, fit for production: retries, views, stores, aggregation, mediator, notices. No Jupyter anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.lazy import lazy_names

if TYPE_CHECKING:
    from labkit.patterns.aggregation import AtomicKeyValueStore as AtomicKeyValueStore
    from labkit.patterns.aggregation import Command as Command
    from labkit.patterns.aggregation import ImportKey as ImportKey
    from labkit.patterns.blocked_lanes import BlockedLanes as BlockedLanes
    from labkit.patterns.dead_letters import DeadLetters as DeadLetters
    from labkit.patterns.key_value_store import KeyValueStore as KeyValueStore
    from labkit.patterns.key_value_store import StoreClosed as StoreClosed
    from labkit.patterns.key_value_store import StoreNotReady as StoreNotReady
    from labkit.patterns.mediator import Mediator as Mediator
    from labkit.patterns.mediator import Refused as Refused
    from labkit.patterns.mediator_states import Process as Process
    from labkit.patterns.mediator_states import ProcessState as ProcessState
    from labkit.patterns.mediator_states import Step as Step
    from labkit.patterns.mediator_states import StepCommand as StepCommand
    from labkit.patterns.mediator_states import StepReply as StepReply
    from labkit.patterns.notice_window import Bounds as Bounds
    from labkit.patterns.notifications import Notifications as Notifications
    from labkit.patterns.notifications import Outcome as Outcome
    from labkit.patterns.projection import Projection as Projection
    from labkit.patterns.projection import Staleness as Staleness
    from labkit.patterns.retries import Policy as Policy
    from labkit.patterns.retries import RetryingConsumer as RetryingConsumer
    from labkit.patterns.retries import blocking as blocking
    from labkit.patterns.retries import dead_letter as dead_letter
    from labkit.patterns.retries import exponential as exponential
    from labkit.patterns.retries import fixed as fixed
    from labkit.patterns.retries import retry_topics as retry_topics
    from labkit.patterns.views import PostgresView as PostgresView
    from labkit.patterns.views import SqliteView as SqliteView
    from labkit.patterns.views import ViewOutdated as ViewOutdated
    from labkit.patterns.views import ViewTakenBack as ViewTakenBack
    from labkit.patterns.views import ViewUnavailable as ViewUnavailable
else:
    __all__, __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "aggregation": "AtomicKeyValueStore Command ImportKey",
            "blocked_lanes": "BlockedLanes",
            "projection": "Projection Staleness",
            "dead_letters": "DeadLetters",
            "key_value_store": "KeyValueStore StoreClosed StoreNotReady",
            "mediator": "Mediator Refused",
            "mediator_states": "Process ProcessState Step StepCommand StepReply",
            "notice_window": "Bounds",
            "notifications": "Notifications Outcome",
            "retries": "Policy RetryingConsumer blocking dead_letter exponential fixed retry_topics",
            "views": "PostgresView SqliteView ViewOutdated ViewTakenBack ViewUnavailable",
        },
    )
