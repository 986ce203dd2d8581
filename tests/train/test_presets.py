from __future__ import annotations

import csv
from importlib import resources

from recollect.train._config import defaults
from recollect.train._presets import preset_names


def table() -> list[dict[str, str]]:
    lines = (resources.files("recollect.train.conf") / "presets.csv").read_text().splitlines()
    return list(csv.DictReader(lines))


def test_every_line_is_an_option():
    assert preset_names() == sorted(f"{row['dataset']}_{row['model']}" for row in table())


def test_every_column_is_a_key_of_each_line_that_has_a_value_in_it():
    for row in table():
        keys = defaults(f"dataset={row['dataset']}", f"model={row['model']}")
        assert {key for key, cell in row.items() if cell} - {"dataset", "model", "row"} <= set(keys)


def test_every_line_says_where_its_numbers_are_from():
    rows = {row["row"] for row in table()} - {"own"}
    own = {f"{row['dataset']}_{row['model']}" for row in table() if row["row"] == "own"}
    assert {"cora_gcn", "citeseer_gcn2", "ogbn-arxiv_gcn", "reddit_gcn"} <= own
    assert rows <= set(preset_names())
