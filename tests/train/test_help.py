from __future__ import annotations

import re

from recollect.train._config import defaults, groups
from recollect.train._help import help_text
from recollect.train._settings import about


def test_every_group_option_and_key_is_there():
    text = help_text()
    words = text.split()
    for group, options in groups().items():
        assert f"{group}=" in words
        assert set(options) <= set(words)
    for key in defaults():
        assert any(word.startswith(f"{key}=") for word in words) == (not about(key).group), key


def test_keys_stand_below_what_they_need():
    sections = dict(section.strip().split("\n", 1) for section in help_text().split("\n\n") if ":\n  " in section)
    found = {title.split(":")[0]: re.findall(r"(?m)^  ([\w.]+)=", keys) for title, keys in sections.items()}
    always = found.pop("keys, with the values they have if nothing is said")
    assert "training.edge_dropout" in always
    assert "training.num_parts" in found["only with training=autoscale or wholegraph"]
    assert "training.history_dtype" in found["only with training=autoscale"]
    assert found["only with objective=iwrm"] == ["objective.samples"]
    histories = next(keys for title, keys in found.items() if "model with histories" in title)
    assert "model.adjacency" in histories
    assert set(always).isdisjoint(histories)


def test_lines_fit_a_terminal():
    assert max(map(len, help_text().splitlines())) <= 120
