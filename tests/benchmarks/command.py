"""The command: which benchmarks run, and in which form their rows are printed."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

from benchmarks import (
    aggregating,
    consuming,
    importing,
    pictures,
    retrying,
    sending,
    servers,
    stalls,
    stores,
    transacting,
    views,
    waiting,
)
from benchmarks.bench import Bench, say
from benchmarks.report import Moment, Row, json_document, markdown_table, measured, text_table

BENCHMARKS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "consume": consuming.consume,
    "consume-modes": consuming.consume_modes,
    "send": sending.send,
    "transactions": transacting.transactions,
    "visible": transacting.visible,
    "stall": stalls.stall,
    "slow-handler": stalls.slow_handler,
    "aggregation": aggregating.aggregation,
    "imports": importing.imports,
    "progress": importing.progress,
    "wait": waiting.wait,
    "store": stores.store,
    "retries": retrying.retries,
    "board": pictures.board,
    "view": views.view,
    "reader": views.reader,
    "start": servers.start,
    "kill": servers.kill,
    "pod": servers.pod,
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Exits with code 2 for what it does not know, naming what there is."""
    about = "\n".join(f"  {name:14} {benchmark.__doc__}" for name, benchmark in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="make bench",
        description=f"Measure labkit. Through make: make bench ARGS='--json consume'\n\nbenchmarks:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run, by default all")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each run; the median counts (%(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", dest="form", const=json_document, help="one JSON document")
    form.add_argument("--markdown", action="store_const", dest="form", const=markdown_table, help="for the document")
    parser.set_defaults(form=text_table)
    found = parser.parse_args(arguments)
    if unknown := [name for name in found.names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if found.rounds < 1:
        parser.error("--rounds must be at least 1")
    return found


def main(arguments: list[str]) -> int:
    """The exit code: 0 also when a goal was missed, as these are measurements and no tests. 1: a benchmark failed."""
    chosen = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that everything is cleared away
    before, failed = Moment.now(), False
    rows: list[Row] = []
    try:
        with Bench(chosen.rounds) as bench:
            for name in chosen.names or BENCHMARKS:
                say(f"{name}: {BENCHMARKS[name].__doc__}")
                try:
                    rows += BENCHMARKS[name](bench)
                except Exception:  # the others have cost minutes, and their figures stand
                    traceback.print_exc()
                    failed = True
    except KeyboardInterrupt:
        say("stopped; nothing is left behind")
        if rows:
            print(chosen.form(rows, measured(before)))
        return 130
    print(chosen.form(rows, measured(before)))
    return int(failed)
