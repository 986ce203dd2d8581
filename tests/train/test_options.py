from __future__ import annotations

from recollect.train._config import defaults
from recollect.train._options import OPTIONS, preset, rows


def test_every_option_stands_under_its_own_name():
    for table in OPTIONS.values():
        assert [settings.name for settings in table.values()] == list(table)


def test_a_line_is_a_preset_of_its_graph_and_network():
    for name, row in rows().items():
        assert name == f"{row['dataset']}_{row['model']}"
        assert preset(name)[0] == {"optimizer": "adam", "training": "autoscale"} | {
            group: row[group] for group in ("dataset", "model")
        }


def test_every_column_is_a_key_of_each_line_that_has_a_value_in_it():
    for name, row in rows().items():
        found = set(preset(name)[1])
        assert found <= set(defaults(f"dataset={row['dataset']}", f"model={row['model']}"))
        assert found >= {key for key, cell in row.items() if cell} - {"dataset", "model", "row"}


def test_every_line_says_where_its_numbers_are_from():
    named = {row["row"] for row in rows().values()} - {"own"}
    own = {name for name, row in rows().items() if row["row"] == "own"}
    assert {"cora_gcn", "citeseer_gcn2", "ogbn-arxiv_gcn", "reddit_gcn"} <= own
    assert named <= set(rows())
