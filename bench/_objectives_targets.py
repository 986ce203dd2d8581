"""The numbers that the benchmark of objectives is to reach, computed from what was measured.

A speed-up of 25 is a ratio of 1/25 here: all targets are limits from above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench._objectives_measure import Row
from bench._report import OTHER_PART, Target, ratio

MLP = "mlp, 784-1024-1024-1024-10, B = {}"
CNN = "cnn, 32-64-128 channels, B = {}"
TRANSFORMER = "transformer, 4 x 256, T = 64, B = {}"
GNN = "gnn, 112 losses, 16 layers x 64, 5,000 nodes, 50,000 edges"

RESNET = "resnet, 32-32-64-128 channels, B = {}"
VIT = "vit, 6 x 192, patch 4, B = 32"
GPT = "gpt, 4 x 192, T = 128, B = 16"
LSTM = "lstm, 64-256, T = 64, B = 32"

OVERHEAD, PEAK = 1.35, 1.3  # of forward and Gramian, over plain forward and backward
LIKE_A_STEP = [
    form.format(batch)
    for form, batches in ((MLP, (64, 256)), (CNN, (64, 256)), (TRANSFORMER, (32, 128)))
    for batch in batches
]
DEEP = {RESNET.format(32): 1.5, RESNET.format(128): 1.5, VIT: 1.4, GPT: 1.4, LSTM: 2.0}  # the overhead; all: PEAK
UNTOLD = 1.15  # of an engine that finds the batch, over one that was told of it
CERTIFICATE = 0.02  # its share of forward and Engine.backward
WEIGHTS = {64: 1 / 4, 112: 1 / 40, 256: 1 / 40}
EQUAL = 1e-6

# Work, what is measured, which of ours, the peer, the limit of ours / peer. Beside a plain step, which frees its graph,
# stands the Gramian that frees it too; beside torchjd the one that keeps it, as torchjd does. These are the works that
# the numbers were set for; at other sizes the ratios are of interest, but are not these targets.
LIMITS: list[tuple[str, str, str, str, float]] = [
    (MLP.format(64), "gramian_seconds", "recollect", "torchjd", 1 / 25),
    (MLP.format(256), "gramian_seconds", "recollect", "torchjd", 1 / 50),
    (MLP.format(256), "peak_bytes", "recollect", "torchjd", 1 / 5),
    *((work, "seconds", "freed", "plain", OVERHEAD) for work in LIKE_A_STEP),
    *((work, "peak_bytes", "freed", "plain", PEAK) for work in LIKE_A_STEP),
    *((work, "seconds", "freed", "plain", limit) for work, limit in DEEP.items()),
    *((work, "peak_bytes", "freed", "plain", PEAK) for work in DEEP),
    *((MLP.format(batch), key, "freed", "told", UNTOLD) for batch in (64, 256) for key in ("seconds", "peak_bytes")),
    (GNN, "seconds", "recollect", "torchjd", 1 / 3),
    (GNN, "peak_bytes", "recollect", "torchjd", 1 / 2),
]
WORDS = {
    "gramian_seconds": "compute_gramian",
    "seconds": "forward and Gramian",
    "peak_bytes": "peak of forward and Gramian",
}


def name_of(row: Row) -> str:
    return f"{row['kind']}, {row['size']}"


def ratios(row: Row, key: str) -> dict[str, float | None]:
    """Recollect's number over each other system's."""
    ours = row[key].get("recollect")
    return {name: ratio(ours, value) for name, value in row[key].items() if name != "recollect"}


def targets(rows: Sequence[Row]) -> list[Target]:
    """Hold rows of all works against the numbers to reach."""
    by_name = {name_of(row): row for row in rows}
    return [_target(by_name.get(work), work, key, ours, peer, limit) for work, key, ours, peer, limit in LIMITS]


def _target(row: Row | None, work: str, key: str, ours: str, peer: str, limit: float) -> Target:
    why = OTHER_PART
    if row is not None:
        why = "; ".join(f"{name}: {row['skipped'][name]}" for name in (ours, peer) if name in row["skipped"])
    value = None if row is None else ratio(row[key].get(ours), row[key].get(peer))
    return Target(f"{work}: {WORDS[key]}, {ours} / {peer}", value, limit, why_not_measured=why or "not timed")


def certificate_targets(rows: Sequence[Row]) -> list[Target]:
    """Hold the certificate's share of steps, one row for each batch of the MLP, against the number to reach."""
    by_name = {name_of(row): row for row in rows}
    found = []
    for batch in (64, 256):
        name = MLP.format(batch)
        row = by_name.get(name)
        value = None if row is None else row["share"]
        found.append(Target(f"{name}: the certificate's share of forward and Engine.backward", value, CERTIFICATE))
    return found


def weight_targets(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Hold rows of the weights, one for each number of losses, against the numbers to reach."""
    by_size = {row["objectives"]: row for row in rows}
    found = []
    for m, limit in WEIGHTS.items():
        row = by_size.get(m, {})
        seconds = row.get("seconds", {})
        why = row.get("why_not_measured", OTHER_PART)
        value = ratio(seconds.get("recollect"), seconds.get("torchjd"))
        found.append(Target(f"UPGrad weights, m = {m}: time, recollect / torchjd", value, limit, why_not_measured=why))
        name = f"UPGrad weights, m = {m}: objective, difference from torchjd's, relative"
        difference = row.get("objective_difference")
        found.append(Target(name, None if difference is None else abs(difference), EQUAL, why_not_measured=why))
    return found
