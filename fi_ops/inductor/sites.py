"""What was found and what became of it: one `Site` per attention, RoPE, sampler or linear layer, counted and recorded."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch._dynamo.utils import counters

from .options import switched_on

log = logging.getLogger("fi_ops.inductor")

KINDS = ("attention", "rope", "sampling", "linear")


@dataclass
class Site:
    """One place in a model that a rewrite looks at."""

    kind: str
    """One of KINDS."""
    name: str
    """The graph node it was found at."""
    line: str = "?"
    """Source line, where torch knows it."""
    grade: str = ""
    """What it was rewritten to; empty if it was left as it is."""
    pieces: tuple[str, ...] = ()
    """What was recognised around it."""
    reason: str = ""
    """The first check that failed, with its node: why not rewritten, or why not to a higher grade."""
    stock_is_faster: bool = False
    """It was left as it is because a measurement says so (`fuse/decline.py`)."""
    caches: tuple[str, ...] = ()
    """The graph inputs that it writes to."""


class Declined(Exception):
    """A recogniser's or a rewrite's "no": the text says which check failed, on which node, and what it saw."""


class StockIsFaster(Declined):
    """The "no" of a measurement; all other reasons are something that the ops or the recognisers lack."""


def check_switched_on(kind: str) -> None:
    """Declined where sites of this kind are to be left alone."""
    if not switched_on(kind):
        raise Declined(f"off: enable({kind}=False)")


@contextlib.contextmanager
def attempt(site: Site) -> Iterator[None]:
    """Try to rewrite a site: a "no" inside becomes its reason. So does an error, which must not take the user's model down."""
    try:
        yield
    except Declined as declined:
        site.reason, site.stock_is_faster = str(declined), isinstance(declined, StockIsFaster)
    except Exception as error:
        log.warning(
            "fi_ops: left %s (%s) as it is: %r", site.name, site.line, error, exc_info=log.isEnabledFor(logging.DEBUG)
        )
        site.reason = f"{site.name}: internal error: {error}"


@dataclass
class GraphReport:
    """The sites of one compiled graph."""

    sites: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, kind: str, fused: bool | None = None) -> int:
        return sum(s.kind == kind and (fused is None or bool(s.grade) is fused) for s in self.sites)


_recorders: list[list[GraphReport]] = []
_warned: set[str] = set()


@contextlib.contextmanager
def recording() -> Iterator[list[GraphReport]]:
    """Collect the reports of all graphs compiled inside."""
    reports: list[GraphReport] = []
    _recorders.append(reports)
    try:
        yield reports
    finally:
        _recorders[:] = [other for other in _recorders if other is not reports]  # two may be equal


def warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, stacklevel=3)


def requirements() -> dict[str, int]:
    """`FI_OPS_REQUIRE=attention:32,sampling:1`: the rewrites that every graph with a site of that kind must reach."""
    text = os.environ.get("FI_OPS_REQUIRE", "")
    required = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        kind, colon, number = item.partition(":")
        if kind not in KINDS or not colon or not number.isdigit():
            raise RuntimeError(
                f"FI_OPS_REQUIRE must be kind:count with a kind of {', '.join(KINDS)}, got {item!r}; "
                f"write for example FI_OPS_REQUIRE=attention:32"
            )
        required[kind] = int(number)
    return required


_set_aside = threading.local()


def set_aside(site: Site) -> None:
    """Keep a site that hook A declined for the report that hook B makes of the same compile."""
    _set_aside.sites = [*getattr(_set_aside, "sites", ()), site]


def take_set_aside() -> list[Site]:
    sites, _set_aside.sites = getattr(_set_aside, "sites", []), []
    return sites


def publish(report: GraphReport) -> None:
    """Count the sites of a finished graph, hand them to the recorders, check what was required of them."""
    if not report.sites:
        return
    table: Counter = counters["fi_ops"]
    for site in report.sites:
        table[f"{site.kind}_candidates"] += 1
        if site.grade:
            table[site.kind] += 1
            table[f"{site.kind}: {site.grade}"] += 1
        else:
            table[f"{site.kind}_declined"] += 1
    for reports in _recorders:
        reports.append(report)
    required = requirements()
    for kind in KINDS:
        candidates, fused = report.count(kind), report.count(kind, fused=True)
        declined = next((s for s in report.sites if s.kind == kind and not s.grade), None)
        if candidates and fused < required.get(kind, 0):
            why = f" ({declined.line}: {declined.reason})" if declined else ""
            raise RuntimeError(
                f"FI_OPS_REQUIRE asks for {required[kind]} {kind} rewrites in a graph, got {fused} of "
                f"{candidates} sites{why}; run fi_ops.explain on the function for the whole table"
            )
    for kind in ("attention", "sampling"):
        candidates, fused = report.count(kind), report.count(kind, fused=True)
        missed = [s for s in report.sites if s.kind == kind and not s.stock_is_faster]
        if candidates and not fused and missed and switched_on(kind) and not _recorders:
            site = missed[0]
            warn_once(
                f"none fused: {kind}",
                f"fi_ops: {candidates} {kind} sites found, 0 rewritten (first: {site.line}: {site.reason}); "
                f"fi_ops.explain(fn, ...) prints them all",
            )
