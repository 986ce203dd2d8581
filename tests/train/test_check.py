from __future__ import annotations

from recollect.train._check import documented
from recollect.train._config import defaults


def test_every_key_of_the_config_files_is_documented_and_no_other():
    keys = {
        key if ".options." not in key else key.rpartition(".")[0]
        for key in {**defaults(), **defaults("model=gcn"), **defaults("model=import"), **defaults("dataset=file")}
    }
    assert keys == set(documented())


def test_every_meaning_is_a_text():
    assert all(about["help"] for about in documented().values())
