"""`make pictures`: what it says where a browser is missing, and what it makes of screenshots. No browser is needed."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from recollect.train._config import parse, parse_override

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "tools" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_a_missing_browser_is_named_in_one_line(pictures, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pictures.main(["--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"make pictures: chromium or .* is missing: .*apt install chromium\)\n", printed.err)
    assert not (tmp_path / "out").exists()


def test_a_program_is_found_by_any_of_its_names(pictures, monkeypatch, tmp_path):
    program = tmp_path / "second"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pictures.program(("first", "second"), "package") == str(program)


def test_what_is_empty_below_is_cut_off(pictures):
    image = Image.new("RGB", (100, 3000), "white")
    image.paste((0, 0, 0), (10, 20, 90, 500))
    cut = pictures.trimmed(image)
    assert cut.size == (100, 500 + pictures.MARGIN)
    assert cut.getpixel((50, 499)) == (0, 0, 0)
    assert cut.getpixel((50, 501)) == (255, 255, 255)


def test_an_empty_picture_stays(pictures):
    assert pictures.trimmed(Image.new("RGB", (100, 300), "white")).size == (100, 300)


def test_sheets_are_side_by_side(pictures):
    sheets = [Image.new("RGB", (50, 80), color) for color in ("red", "blue")]
    both = pictures.beside(sheets)
    assert both.size == (2 * 52 + pictures.MARGIN, 82)
    assert both.getpixel((25, 40)) == (255, 0, 0)
    assert both.getpixel((52 + pictures.MARGIN + 25, 40)) == (0, 0, 255)
    assert both.getpixel((52 + pictures.MARGIN // 2, 40)) == (255, 255, 255)


def test_a_picture_is_saved_with_few_colours(pictures, tmp_path):
    gradient = Image.linear_gradient("L").convert("RGB")
    path = tmp_path / "new" / "picture.png"
    pictures.save(gradient, path)
    with Image.open(path) as saved:
        assert saved.mode == "P"
        assert len(saved.convert("RGB").getcolors()) <= pictures.COLORS
        assert saved.size == gradient.size


def test_what_is_trained_are_settings_that_there_are(pictures):
    for subject in pictures.SUBJECTS:
        words = [word for word in subject.words if word != "-m"]
        swept = {word for word in words if parse_override(word).is_sweep_override()}
        assert bool(swept) == ("-m" in subject.words)
        parse([word.partition(",")[0] for word in words])


def test_the_page_shows_what_is_made(pictures):
    """The commands of the page are those of the pictures, and each picture is there, small, and shown."""
    text = (ROOT / "docs" / "report.md").read_text()
    shown = set(re.findall(r"\]\(pictures/([\w-]+)\.png\)", text))
    kinds = [*map(str, pictures.WIDTHS), "print"]
    assert shown == {f"{subject.name}-{kind}" for subject in pictures.SUBJECTS for kind in kinds}
    for name in shown:
        path = pictures.PICTURES / f"{name}.png"
        assert path.stat().st_size < 150_000
        if not name.endswith("print"):
            with Image.open(path) as image:
                assert image.width == int(name.rpartition("-")[2])
    commands = re.findall(r"^\.venv/bin/recollect train (.*)$", text, re.MULTILINE)
    for subject, command in zip(pictures.SUBJECTS, commands, strict=True):
        assert set(command.split()) == set(subject.words) - {"seed=0"}
