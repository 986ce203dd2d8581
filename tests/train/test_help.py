from __future__ import annotations

from recollect.train._config import defaults, groups
from recollect.train._help import help_text


def test_every_group_option_and_key_is_there():
    text = help_text()
    words = text.split()
    for group, options in groups().items():
        assert f"{group}=" in words
        assert set(options) <= set(words)
    for key in defaults():
        assert any(word.startswith(f"{key}=") for word in words), key


def test_lines_fit_a_terminal():
    assert max(map(len, help_text().splitlines())) <= 120
