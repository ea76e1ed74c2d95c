"""What was skipped or changed while data were read: counted, with the first three named, so that it is never silent."""
from __future__ import annotations

import sys
from typing import Any, Dict, List

from pruning import distributed

# What happened -> {"count": how often, "first": where it happened first}, as records keep it.
Faults = Dict[str, Dict[str, Any]]

NAMED = 3
NAME_LENGTH = 60


def note(faults: Faults, what: str, where: str) -> None:
    """Count a fault, and keep its place if it is one of the first three."""
    fault = faults.setdefault(what, {"count": 0, "first": []})
    fault["count"] += 1
    if len(fault["first"]) < NAMED:
        fault["first"].append(_printable(where))


def sentences(faults: Faults) -> List[str]:
    """Return a sentence a kind of fault, such as 'Captions skipped because they are empty: 2 (line 7; line 9).'"""
    return [f"{what}: {fault['count']:,}{_places(fault)}." for what, fault in faults.items()]


def tell(faults: Faults) -> None:
    """Print the sentences, in one of several processes."""
    for sentence in sentences(faults) if distributed.is_main else ():
        print(sentence, file=sys.stderr)


def _places(fault: Dict[str, Any]) -> str:
    more = "; …" if fault["count"] > len(fault["first"]) else ""
    return f" ({'; '.join(fault['first'])}{more})" if fault["first"] else ""


def _printable(text: str) -> str:
    """Return text from an untrusted file as one short line, with escapes for what a terminal would obey."""
    short = text if len(text) <= NAME_LENGTH else text[:NAME_LENGTH] + "…"
    return short if short.isprintable() else repr(short)[1:-1]
