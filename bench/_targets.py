"""The numbers that the depth benchmark is to reach, computed from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench._exactness import LAYERS, Errors
from bench._harness import median
from bench._measure import Row
from bench._report import OTHER_PART, OTHER_SIZE, Target, ratio
from bench._systems import Workload

# What the numbers were set for; at other sizes the ratios are of interest, but are not these targets.
WORKLOAD = Workload(nodes=20_000, edges=200_000, channels=128, norm="bare")
TIMED_DEPTH = 16
TIMES = {"pyg": 0.70, "plain": 1.40, "checkpoint": 1.0}
CSR_WORKLOAD = Workload(nodes=20_000, edges=200_000, channels=128, norm="layer", csr=True)
CSR_TIMES = {"plain": 1.25, "pyg": 0.80, "checkpoint": 1.0}
CERTIFICATE = 1.03
SHALLOW, DEEP = 8, 256
GRADIENTS = {"float64, dropout": 1e-10, "float32, dropout": 1e-5}


def depth_targets(work: Workload, rows: Sequence[Row], errors: Errors) -> list[Target]:
    """Hold rows of one workload, and gradient errors at 64 layers, against the numbers to reach."""
    return [*_times(work, WORKLOAD, TIMES, rows), _flat(rows), _peaks("pyg", rows), *_gradients(errors)]


def csr_targets(work: Workload, rows: Sequence[Row], errors: Errors) -> list[Target]:
    """The same where the peers have the adjacency in CSR form."""
    peaks = [_peaks(peer, rows) for peer in ("pyg", "checkpoint")]
    times = [*_times(work, CSR_WORKLOAD, CSR_TIMES, rows), _certificate_time(work, rows)]
    return [*times, _flat(rows), *peaks, _certificate_peak(rows), *_gradients(errors)]


def _times(work: Workload, meant: Workload, limits: Mapping[str, float], rows: Sequence[Row]) -> list[Target]:
    row = next((row for row in rows if row["depth"] == TIMED_DEPTH), {})
    seconds = row.get("seconds", {}) if work == meant else {}
    why = OTHER_SIZE if work != meant else "not timed" if seconds else OTHER_PART
    return [
        Target(
            f"step time at L={TIMED_DEPTH}, recollect / {peer}",
            ratio(seconds.get("recollect"), seconds.get(peer)),
            limit,
            why_not_measured=why,
        )
        for peer, limit in limits.items()
    ]


def _certificate_time(work: Workload, rows: Sequence[Row]) -> Target:
    """By rounds, in which both run: a slow spell of the machine is longer than a few percent."""
    row = next((row for row in rows if row["depth"] == TIMED_DEPTH), {})
    found = row.get("all_seconds", {}) if work == CSR_WORKLOAD else {}
    pairs = zip(found.get("recollect", ()), found.get("uncertified", ()), strict=True)
    return Target(
        f"step time at L={TIMED_DEPTH}, with the certificate / without",
        median([with_it / without for with_it, without in pairs]),
        CERTIFICATE,
        why_not_measured=OTHER_SIZE if work != CSR_WORKLOAD else OTHER_PART,
    )


def _certificate_peak(rows: Sequence[Row]) -> Target:
    peaks = [row["peak_bytes"] for row in rows if {"recollect", "uncertified"} <= row["peak_bytes"].keys()]
    found = [ratio(peak["recollect"], peak["uncertified"]) for peak in peaks]
    return Target(
        "peak of a step, with the certificate / without, the worst depth",
        max((value for value in found if value is not None), default=None),
        1.0,
        why_not_measured=OTHER_PART,
    )


def _flat(rows: Sequence[Row]) -> Target:
    ours = {row["depth"]: row["peak_bytes"].get("recollect") for row in rows}
    return Target(
        f"peak of a step, L={DEEP} / L={SHALLOW}",
        ratio(ours.get(DEEP), ours.get(SHALLOW)),
        1.05,
        why_not_measured="not measured at both" if {SHALLOW, DEEP} <= ours.keys() else OTHER_PART,
    )


def _peaks(peer: str, rows: Sequence[Row]) -> Target:
    """Depths at which the peer was skipped, as it would need too much, are none to lose at."""
    measured = [row for row in rows if "would need" not in row.get("skipped", {}).get(peer, "")]
    against = [ratio(row["peak_bytes"].get("recollect"), row["peak_bytes"].get(peer)) for row in measured]
    known = [value for value in against if value is not None]
    return Target(
        f"peak of a step, recollect / {peer}, the worst depth",
        max(known) if known and len(known) == len(measured) else None,
        1.0,
        strict=True,
        why_not_measured="not measured at every depth",
    )


def _gradients(errors: Errors) -> list[Target]:
    found = {case: errors.get(case, {}).get("recollect") for case in GRADIENTS}
    return [
        Target(
            f"gradient error at {LAYERS} layers, {case}",
            value if isinstance(value, float) else None,
            limit,
            why_not_measured=value if isinstance(value, str) else "not measured",
        )
        for (case, limit), value in zip(GRADIENTS.items(), found.values(), strict=True)
    ]
