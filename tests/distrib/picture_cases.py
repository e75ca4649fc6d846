"""Pictures of digits under many conditions, made from strokes: `make(condition, digit, path)` writes one.

Run as a program with a run's folder to see how many of each condition `predict` gets right:
python tests/distrib/picture_cases.py runs/first
"""

from __future__ import annotations

import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


def arc(x: float, y: float, rx: float, ry: float, begin: float, end: float) -> Points:
    angles = np.radians(np.linspace(begin, end, 40))
    return list(zip(x + rx * np.cos(angles), y + ry * np.sin(angles), strict=True))


STROKES: dict[int, list[Points]] = {
    0: [arc(0.5, 0.5, 0.28, 0.4, -90, 270)],
    1: [[(0.36, 0.25), (0.52, 0.1), (0.54, 0.9)]],
    2: [[*arc(0.5, 0.32, 0.24, 0.22, 190, 390), (0.25, 0.88), (0.78, 0.86)]],
    3: [arc(0.45, 0.3, 0.24, 0.2, 200, 440) + arc(0.45, 0.68, 0.28, 0.22, -80, 150)],
    4: [[(0.42, 0.1), (0.2, 0.62), (0.8, 0.6)], [(0.6, 0.36), (0.58, 0.92)]],
    5: [[(0.75, 0.12), (0.32, 0.13), (0.29, 0.46), *arc(0.47, 0.66, 0.26, 0.23, -130, 140)]],
    6: [[(0.66, 0.1), (0.42, 0.3), *arc(0.48, 0.68, 0.24, 0.22, 190, 540)]],
    7: [[(0.22, 0.14), (0.78, 0.14), (0.44, 0.9)]],
    8: [arc(0.5, 0.3, 0.2, 0.19, 90, 450) + arc(0.5, 0.69, 0.25, 0.21, -90, 270)],
    9: [[*arc(0.5, 0.33, 0.23, 0.22, 0, 360), (0.73, 0.33), (0.68, 0.9)]],
}
"""Poly-lines in the unit square, y downward."""


def drawn(digit: int, side: int, pen: float = 0.085, turn: float = 0.0) -> np.ndarray:
    """How much of each pixel is ink, float32 (side, side), of a digit by a round pen, turned by radians."""
    fine = 4 * side
    picture = Image.new("L", (fine, fine))
    draw, radius = ImageDraw.Draw(picture), max(1.0, pen * fine / 2)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    for stroke in STROKES[digit]:
        points = [tuple(p) for p in ((np.array(stroke) - 0.5) @ rotation * 0.86 + 0.5) * fine]
        draw.line(points, fill=255, width=round(2 * radius), joint="curve")
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def on_sheet(ink: np.ndarray, height: int, width: int, at: tuple[int, int] | None = None) -> np.ndarray:
    """Ink on a sheet (H, W), in its middle or with its corner `at` (y, x)."""
    side = len(ink)
    y, x = at or ((height - side) // 2, (width - side) // 2)
    sheet = np.zeros((height, width), np.float32)
    sheet[y : y + side, x : x + side] = ink
    return sheet


def painted(ink: np.ndarray, colour: Colour, ground: np.ndarray | Colour) -> np.ndarray:
    """Light (H, W, 3) of 0 to 255."""
    share = ink[..., None]
    return np.asarray(ground, np.float32) * (1 - share) + np.asarray(colour, np.float32) * share


def image(light: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.round(light), 0, 255).astype(np.uint8))


def coloured(ink: Colour, ground: Colour, digit: int, rng: np.random.Generator, pen: float = 0.085):
    return image(painted(on_sheet(drawn(digit, 240, pen, rng.normal(0, 0.06)), 300, 300), ink, ground)), {}


def transparent(ink: Colour, hidden: Colour, digit: int, rng: np.random.Generator):
    """Ink on a transparent ground; `hidden` is the colour that the ground has and nobody sees."""
    opacity = on_sheet(drawn(digit, 240), 300, 300)
    light = np.where(opacity[..., None] > 0, np.float32(ink), np.float32(hidden))
    return image(np.dstack([light, 255 * opacity])), {}


def rounded_paper(digit: int, rng: np.random.Generator):
    opacity = Image.new("L", (400, 400))
    ImageDraw.Draw(opacity).rounded_rectangle((30, 30, 370, 370), 60, fill=255)
    light = painted(on_sheet(drawn(digit, 240), 400, 400), (20, 20, 20), WHITE)
    return image(np.dstack([light, np.asarray(opacity)])), {}


def lit(kind: str, height: int, width: int, darkest: float, rng: np.random.Generator) -> np.ndarray:
    """Light from `darkest` to 1, (H, W, 1)."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle)) / 1.42
    share = {
        "even": np.ones_like(x),
        "gradient": 0.5 + along / 2,
        "vignette": 1 - (x * x + y * y) / 2,
        "shadow": 1 / (1 + np.exp(-20 * along)),
    }[kind]
    return (darkest + (1 - darkest) * share)[..., None]


def photo(
    kind: str,
    darkest: float,
    noise: float,
    digit: int,
    rng: np.random.Generator,
    ink: Colour = (40, 40, 50),
    ground: Colour = (215, 210, 200),
    size: tuple[int, int, int] = (480, 640, 320),
    pen: float = 0.085,
    quality: int = 80,
):
    height, width, side = size
    light = painted(on_sheet(drawn(digit, side, pen, rng.normal(0, 0.06)), height, width), ink, ground)
    light = light * lit(kind, height, width, darkest, rng)
    return image(light + rng.normal(0, noise, light.shape)), {"ext": "jpg", "quality": quality}


def ruled(height: int, width: int, gap: int, thick: float, slope: float, phase: int) -> np.ndarray:
    """Lines across a sheet, (H, W)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return np.clip(thick / 2 + 0.5 - np.abs((y + slope * x + phase) % gap - gap / 2), 0, 1)


def lined(
    lines: Colour,
    gap: int,
    digit: int,
    rng: np.random.Generator,
    squared: bool = False,
    slope: float = 0.0,
    side: int = 300,
    pen: float = 0.085,
    ink: Colour = (30, 30, 60),
):
    """A digit on ruled or squared paper of 480×480."""
    ground = painted(ruled(480, 480, gap, 2, slope, int(rng.integers(gap))), lines, WHITE)
    if squared:
        ground = painted(ruled(480, 480, gap, 2, -slope, int(rng.integers(gap))).T, lines, ground)
    light = painted(on_sheet(drawn(digit, side, pen), 480, 480), ink, ground)
    return image(light + rng.normal(0, 2, light.shape)), {}


def framed(
    share: float,
    frame: Colour,
    ground: Colour,
    ink: Colour,
    digit: int,
    rng: np.random.Generator,
    skew: float = 0.0,
):
    """A sheet with something else around it, as wide as `share` of the picture on each side."""
    wide = int(400 * share)
    inside = np.zeros((400, 400), np.float32)
    inside[wide:-wide, wide:-wide] = 1
    turned = Image.fromarray(inside).rotate(rng.uniform(-skew, skew), Image.Resampling.BICUBIC)
    light = painted(on_sheet(drawn(digit, int(0.75 * (400 - 2 * wide))), 400, 400), ink, ground)
    light = painted(1 - np.asarray(turned).clip(0, 1), frame, light)
    return image(light + rng.normal(0, 3, light.shape)), {"ext": "jpg", "quality": 90}


def placed(
    height: int,
    width: int,
    side: int,
    at: tuple[int, int],
    digit: int,
    rng: np.random.Generator,
    ext: str = "png",
):
    return image(painted(on_sheet(drawn(digit, side), height, width, at), BLACK, WHITE)), {"ext": ext}


def tight(pen: float, ink: Colour, ground: Colour, digit: int, rng: np.random.Generator):
    share = drawn(digit, 240, pen)
    rows, cols = (np.flatnonzero((share > 0.4).any(axis)) for axis in (1, 0))
    return image(painted(share[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1], ink, ground)), {}


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera stores an upright picture under each of EXIF's orientations."""


def turned(orientation: int, ext: str, digit: int, rng: np.random.Generator):
    upright = image(painted(on_sheet(drawn(digit, 240), 300, 380), BLACK, WHITE))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return upright.transpose(TURNS[orientation]), {"ext": ext, "exif": exif}


def of_mode(convert: Callable[[np.ndarray], Image.Image], ext: str, digit: int, rng: np.random.Generator):
    return convert(on_sheet(drawn(digit, 240), 300, 300)), {"ext": ext}


def indexed_transparency(digit: int, rng: np.random.Generator):
    picture = Image.fromarray((on_sheet(drawn(digit, 240), 300, 300) > 0.5).astype(np.uint8)).convert("P")
    picture.putpalette([255, 0, 255, 0, 0, 0])
    return picture, {"ext": "gif", "transparency": 0}


def specks(digit: int, rng: np.random.Generator):
    dust = np.kron(rng.random((100, 100)) < 0.002, np.ones((3, 3)))
    return image(255 * (1 - np.maximum(on_sheet(drawn(digit, 240), 300, 300), dust))), {}


def blurred(digit: int, rng: np.random.Generator):
    picture = image(255 * (1 - on_sheet(drawn(digit, 240), 300, 300)))
    return picture.filter(ImageFilter.GaussianBlur(6)), {}


def smeared_board(digit: int, rng: np.random.Generator):
    smears = Image.fromarray(rng.random((12, 16), np.float32)).resize((640, 480), Image.Resampling.BICUBIC)
    ground = np.array((40, 62, 52), np.float32) + 45 * np.asarray(smears)[..., None]
    light = painted(on_sheet(drawn(digit, 340, 0.05), 480, 640), (220, 220, 212), ground)
    return image(light + rng.normal(0, 9, light.shape)), {"ext": "jpg", "quality": 75}


def _colours() -> dict[str, Callable]:
    pairs: dict[str, tuple[Colour, Colour]] = {
        "black on white": (BLACK, WHITE),
        "white on black": (WHITE, BLACK),
        "black on light grey": (BLACK, (200, 200, 200)),
        "black on mid-grey": (BLACK, (128, 128, 128)),
        "white on mid-grey": (WHITE, (128, 128, 128)),
        "grey on darker grey": ((100, 100, 100), (60, 60, 60)),
        "pencil": ((150, 150, 150), (215, 212, 205)),
        "blue on white": ((30, 50, 200), WHITE),
        "yellow on white": ((250, 230, 40), WHITE),
        "blue on black": ((20, 20, 160), BLACK),
        "red on green": ((200, 40, 40), (40, 120, 40)),
        "orange on navy": ((255, 150, 0), (10, 10, 80)),
        "cyan on pink": ((0, 200, 200), (255, 180, 190)),
    }
    made = {name: partial(coloured, *pair) for name, pair in pairs.items()}
    for name, ink, hidden in (
        ("black", BLACK, WHITE),
        ("white", WHITE, BLACK),
        ("white, hidden white", WHITE, WHITE),
        ("red", (220, 0, 0), BLACK),
    ):
        made[f"{name} on transparent"] = partial(transparent, ink, hidden)
    made["paper with transparent corners"] = rounded_paper
    made["indexed transparency"] = indexed_transparency
    for name, pen in (("hair", 0.006), ("thin", 0.015), ("fine", 0.03), ("thick", 0.15), ("marker", 0.2)):
        made[f"pen: {name}"] = partial(coloured, BLACK, WHITE, pen=pen)
    return made


def _photos() -> dict[str, Callable]:
    chalk, board = (215, 215, 205), (45, 70, 60)
    return {
        "photo: gradient": partial(photo, "gradient", 0.45, 6),
        "photo: vignette": partial(photo, "vignette", 0.4, 6),
        "photo: shadow": partial(photo, "shadow", 0.6, 5),
        "photo: noise": partial(photo, "gradient", 0.7, 22, quality=90),
        "photo: fine pen": partial(photo, "gradient", 0.5, 6, pen=0.02),
        "photo: dim": partial(photo, "gradient", 0.5, 4, ink=(20, 20, 22), ground=(80, 78, 70)),
        "photo: small digit": partial(photo, "gradient", 0.6, 5, size=(900, 1200, 150)),
        "photo: whiteboard": partial(photo, "vignette", 0.6, 4, ink=(190, 40, 50), ground=(225, 228, 232)),
        "photo: blackboard": partial(photo, "gradient", 0.6, 8, ink=chalk, ground=board),
        "photo: smeared blackboard": smeared_board,
        "JPEG of low quality": partial(photo, "even", 1, 0, quality=8, size=(120, 120, 90)),
        "specks": specks,
        "blurred": blurred,
        "lined": partial(lined, (150, 180, 220), 60),
        "lined, dark": partial(lined, (60, 60, 60), 80),
        "lined, tilted": partial(lined, (120, 150, 200), 70, slope=0.02),
        "lined, fine pen": partial(lined, (150, 180, 220), 60, pen=0.03),
        "lined, small digit": partial(lined, (150, 180, 220), 40, side=110),
        "squared": partial(lined, (175, 205, 230), 40, squared=True),
        "squared, dark": partial(lined, (90, 110, 150), 60, squared=True),
        "frame: thin": partial(framed, 0.02, BLACK, WHITE, BLACK),
        "frame: scan": partial(framed, 0.12, BLACK, WHITE, BLACK),
        "frame: wide": partial(framed, 0.2, BLACK, WHITE, BLACK),
        "frame: skewed": partial(framed, 0.08, BLACK, WHITE, BLACK, skew=2.5),
        "frame: table": partial(framed, 0.15, (110, 80, 60), (235, 230, 225), (30, 30, 40)),
        "frame: board": partial(framed, 0.06, WHITE, (30, 50, 40), (230, 230, 230)),
        "frame: light ink": partial(framed, 0.1, (20, 20, 20), (200, 200, 195), (90, 90, 150)),
    }


def _shapes() -> dict[str, Callable]:
    made: dict[str, Callable] = {
        "in the corner": partial(placed, 400, 400, 120, (5, 5)),
        "off the centre": partial(placed, 400, 400, 180, (210, 30)),
        "tall": partial(placed, 1200, 300, 250, (800, 20)),
        "wide": partial(placed, 300, 1600, 260, (20, 1200)),
        "small in a large sheet": partial(placed, 1500, 1500, 110, (1100, 300)),
        "24×24": partial(placed, 24, 24, 22, (1, 1)),
        "28×28, off the centre": partial(placed, 28, 28, 18, (9, 2)),
        "huge": partial(placed, 3000, 4000, 1500, (800, 900)),
        "BMP": partial(placed, 300, 300, 240, (30, 30), ext="bmp"),
        "WebP": partial(placed, 300, 300, 240, (30, 30), ext="webp"),
        "cut to the ink": partial(tight, 0.085, BLACK, WHITE),
        "cut to the ink, white": partial(tight, 0.085, WHITE, BLACK),
        "cut to the ink, thick": partial(tight, 0.14, BLACK, WHITE),
    }
    for orientation in TURNS:
        made[f"EXIF {orientation}"] = partial(turned, orientation, "jpg")
    made["EXIF 6 in a PNG"] = partial(turned, 6, "png")
    made["EXIF 8 in a TIFF"] = partial(turned, 8, "tif")
    return made


def _modes() -> dict[str, Callable]:
    modes: dict[str, tuple[str, Callable[[np.ndarray], Image.Image]]] = {
        "16 bits": ("png", lambda ink: Image.fromarray((65535 * (1 - ink)).astype(np.uint16))),
        "12 of 16 bits": ("tif", lambda ink: Image.fromarray((4095 * ink).astype(np.uint16))),
        "32 bits": ("tif", lambda ink: Image.fromarray((100_000 * (1 - ink)).astype(np.int32))),
        "float in [0, 1]": ("tif", lambda ink: Image.fromarray(1 - ink)),
        "float, white": ("tif", lambda ink: Image.fromarray(ink)),
        "float below 0": ("tif", lambda ink: Image.fromarray(6 * ink - 3)),
        "1 bit": ("png", lambda ink: image(255 * (1 - ink)).convert("1")),
        "palette": ("png", lambda ink: image(painted(ink, (200, 20, 20), (240, 240, 200))).quantize(16)),
        "CMYK": ("jpg", lambda ink: image(painted(ink, (20, 20, 80), WHITE)).convert("CMYK")),
        "grey and alpha": (
            "png",
            lambda ink: Image.merge("LA", (Image.new("L", ink.shape[::-1]), image(255 * ink))),
        ),
        "GIF": ("gif", lambda ink: image(255 * (1 - ink))),
    }
    return {f"mode: {name}": partial(of_mode, convert, ext) for name, (ext, convert) in modes.items()}


CONDITIONS: dict[str, Callable] = _colours() | _photos() | _shapes() | _modes()


def make(condition: str, digit: int, folder: Path) -> Path:
    """Write a picture; the same each time."""
    rng = np.random.default_rng([zlib.crc32(condition.encode()), digit])
    picture, options = CONDITIONS[condition](digit=digit, rng=rng)
    path = folder / f"{digit}-{zlib.crc32(condition.encode()):08x}.{options.pop('ext', 'png')}"
    picture.save(path, compress_level=1, **options)  # of PNGs: quick
    return path


def right(run: Path, condition: str, folder: Path, digits: Iterable[int] = range(10)) -> list[bool]:
    """Whether `predict` gets each of the digits right."""
    from distrib.predict import load, predict_files

    digits = list(digits)
    found = predict_files(load(run), [make(condition, digit, folder) for digit in digits])
    return [result["digit"] == digit for result, digit in zip(found, digits, strict=True)]


def main() -> None:
    total = []
    with tempfile.TemporaryDirectory() as folder:
        for condition in CONDITIONS:
            here = right(Path(sys.argv[1]), condition, Path(folder))
            total += here
            print(f"{condition:32} {sum(here):2} of 10", flush=True)
    print(f"{len(CONDITIONS)} conditions, {100 * np.mean(total):.2f} % of {len(total)} pictures right")


if __name__ == "__main__":
    main()
