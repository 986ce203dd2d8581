"""`make pictures`: the pictures of the training report in docs/pictures.

A small run and a small sweep are trained, which takes some minutes. Their reports are rendered by headless Chromium, as
wide as a screen and as narrow as a telephone, and printed; pdftoppm of poppler makes pictures of printed pages.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageOps

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
RENDERER = ("pdftoppm",)
WIDTHS = (1200, 400)  # pixels: a screen's window, and a telephone
TALL = 8000  # pixels, more than any report; what is empty at the end is cut off
MARGIN = 24  # of what is empty, so many pixels stay
COLORS = 96  # reports have few, and edges of letters between them
DPI = 64  # of printed pages


class MissingProgramError(Exception):
    """A program that this needs is not installed."""


@dataclass(frozen=True)
class Subject:
    """What there is a report of.

    Attributes:
        name: of its pictures.
        words: of the command line that trains it.
    """

    name: str
    words: tuple[str, ...]


COMMON = ("dataset=digits", "model.hidden_channels=32", "seed=0")
SUBJECTS = (
    Subject("run", (*COMMON, "model.num_layers=16", "epochs=25")),
    Subject("sweep", ("-m", *COMMON, "model.num_layers=4,8,16", "optimizer.lr=0.003,0.01", "epochs=15")),
)


def program(names: Sequence[str], package: str) -> str:
    """Return the path of the first of some programs that is installed.

    Raises:
        MissingProgramError: none is; the message says what to install.
    """
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise MissingProgramError(f"{' or '.join(names)} is missing: install it (on Debian: apt install {package})")
    return found


def train(subject: Subject, folder: Path) -> Path:
    """Train what a picture is of; return its report."""
    command = [sys.executable, "-m", "recollect", "train", *subject.words, f"run_dir={folder}"]
    subprocess.run(command, check=True, cwd=folder.parent, stdout=subprocess.DEVNULL)
    return folder / "report.html"


def chromium(browser: str, page: Path, *options: str) -> None:
    """Let the browser do something with a page; its profile is a new one."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", *options, page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def screenshot(browser: str, page: Path, width: int, folder: Path) -> Image.Image:
    """Return a picture of a whole page, as it is in a window of a width in pixels."""
    file = folder / "screenshot.png"
    chromium(browser, page, f"--screenshot={file}", f"--window-size={width},{TALL}")
    return trimmed(Image.open(file).convert("RGB"))


def printed(browser: str, renderer: str, page: Path, folder: Path) -> Image.Image:
    """Return a picture of a page's first two sheets, side by side."""
    document = folder / "printed.pdf"
    chromium(browser, page, f"--print-to-pdf={document}", "--no-pdf-header-footer")
    subprocess.run([renderer, "-r", str(DPI), "-png", "-l", "2", str(document), str(folder / "sheet")], check=True)
    return beside([Image.open(sheet).convert("RGB") for sheet in sorted(folder.glob("sheet*.png"))])


def trimmed(image: Image.Image) -> Image.Image:
    """Cut off what is empty below: all rows at the end that have the colour of the last pixel."""
    empty = Image.new("RGB", image.size, image.getpixel((image.width - 1, image.height - 1)))
    box = ImageChops.difference(image, empty).getbbox()
    end = image.height if box is None else min(box[3] + MARGIN, image.height)
    return image.crop((0, 0, image.width, end))


def beside(images: Sequence[Image.Image]) -> Image.Image:
    """Put pictures side by side, with a frame around each."""
    framed = [ImageOps.expand(image, border=1, fill="#cbd2d9") for image in images]
    height = max(image.height for image in framed)
    total = Image.new("RGB", (sum(image.width for image in framed) + MARGIN * (len(framed) - 1), height), "white")
    left = 0
    for image in framed:
        total.paste(image, (left, 0))
        left += image.width + MARGIN
    return total


def save(image: Image.Image, path: Path) -> None:
    """Write a picture with few colours, as small as PNG can be without a loss beside that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def main(words: Sequence[str] | None = None) -> int:
    """Make all pictures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the pictures")
    options = parser.parse_args(words)
    try:
        browser, renderer = program(BROWSERS, "chromium"), program(RENDERER, "poppler-utils")
    except MissingProgramError as error:
        print(f"make pictures: {error}", file=sys.stderr)
        return 1
    for subject in SUBJECTS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            print(f"training: {subject.name} ...", flush=True)
            page = train(subject, folder / subject.name)
            images = {f"{subject.name}-{width}": screenshot(browser, page, width, folder) for width in WIDTHS}
            images[f"{subject.name}-print"] = printed(browser, renderer, page, folder)
        for name, image in images.items():
            path = options.out / f"{name}.png"
            save(image, path)
            print(f"{path}: {image.width} x {image.height}, {path.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
