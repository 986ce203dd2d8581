"""The documentation as a site: it builds without a warning, needs no network, and has every public name."""

import doctest
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import recollect

ROOT = Path(__file__).parents[1]
PARTS = ["recollect", *(f"recollect.{part}" for part in recollect._PARTS)]


class Loaded(HTMLParser):
    """What a page loads, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors.add(given.get("id"))
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and "href" in given and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as ``make docs`` does."""
    pytest.importorskip("mkdocs", reason="the site needs pip install 'torch-recollect[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def public(part):
    return [f"{part}.{name}" for name in importlib.import_module(part).__all__]


def test_nothing_is_loaded_from_the_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        assert [link for link in Loaded(page.read_text()).loaded if re.match(r"(https?:)?//", link)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text()), style


@pytest.mark.parametrize("part", PARTS)
def test_the_reference_has_every_public_name(part, site):
    anchors = Loaded((site / "reference" / part / "index.html").read_text()).anchors
    assert [name for name in public(part) if name not in anchors] == []


@functools.cache
def executed(module):
    """The names of what has examples in a module, as pytest finds them and runs them."""
    return {test.name for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples}


@pytest.mark.parametrize("part", PARTS)
def test_every_public_name_has_an_example_that_runs(part):
    module = importlib.import_module(part)
    values = {name: getattr(module, name) for name in module.__all__}
    documented = {name: value for name, value in values.items() if inspect.isclass(value) or inspect.isroutine(value)}
    without = [
        name
        for name, value in documented.items()
        if f"{value.__module__}.{value.__qualname__}" not in executed(value.__module__)
    ]
    assert without == []
