"""Pictures as `predict` prepares them: conditions, MNIST's images, empty sheets, what is no picture."""

from __future__ import annotations

import functools
import gzip
import json
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import picture_cases as cases
import pytest
from conftest import environment, train, write_idx
from conftest import run as python
from PIL import Image, ImageFilter

from distrib.data import formats
from distrib.errors import UserError
from distrib.pictures import files as pictures
from distrib.pictures.digit import stroke_width
from distrib.pictures.kinds import kind_of
from distrib.pictures.prepare import MOST_IMAGES, Pictures, read_pictures
from distrib.predict import load
from distrib.predict import predict as predict_pictures
from launch.predict import predict


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network, trained for some seconds."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, "--recipe", "demo", "--limit-train", 12000, "--limit-test", 500)
    return folder


@pytest.fixture
def call(command_line):
    return functools.partial(command_line, predict)


def save(pixels: np.ndarray, path: Path, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def mass(pixels: np.ndarray) -> list[float]:
    """Centre (y, x)."""
    return [float(pixels.sum(axis) @ np.arange(28)) / float(pixels.sum()) for axis in (1, 0)]


def extent(pixels: np.ndarray) -> int:
    """The longer side of what is brighter than half."""
    return 1 + max(int(np.ptp(np.flatnonzero((pixels > 127).any(axis)))) for axis in (0, 1))


DIGITS = {name: [(i + step) % 10 for step in (0, 4)] for i, name in enumerate(cases.CONDITIONS)}
"""Of each condition; `picture_cases` as a program takes all ten."""


@functools.cache
def prepared(condition: str, digit: int) -> Pictures:
    """One picture as `predict` prepares it, once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        return read_pictures(cases.make(condition, digit, Path(folder)))


def test_nearly_all_digits_are_right_under_all_conditions(run: Path) -> None:
    loaded, right = load(run), {}
    for name, digits in DIGITS.items():
        found = [result for digit in digits for result in predict_pictures(loaded, prepared(name, digit))]
        right[name] = [result["digit"] == digit for result, digit in zip(found, digits, strict=True)]
    assert len(right) > 80
    short = {name: found for name, found in right.items() if not all(found)}
    assert np.mean(list(right.values())) >= 0.95, short
    assert all(any(found) for found in right.values()), short


@pytest.mark.parametrize("condition", cases.CONDITIONS)
def test_each_condition_gives_a_centred_digit_of_mnist_size(condition: str) -> None:
    found = prepared(condition, DIGITS[condition][0])
    assert found.drawn.tolist() == [True]
    pixels = found.pixels[0]
    assert 18 <= extent(pixels) <= 22
    assert mass(pixels) == pytest.approx([14, 14], abs=0.75)
    width = stroke_width(np.asarray(Image.fromarray(np.pad(pixels, 4)).resize((288, 288))) > 127) / 8
    assert 1.2 < width < 5.5


@pytest.mark.parametrize("dark", [False, True])
def test_pictures_made_like_mnist_are_not_changed(dark: bool, tmp_path: Path) -> None:
    images = formats.load(limit_test=200).test_images[..., 0]
    for i, pixels in enumerate(images):
        found = read_pictures(save(255 - pixels if dark else pixels, tmp_path / f"{i}.png"))
        assert np.array_equal(found.pixels[0], pixels)
        assert found.inverted.tolist() == [dark]


def test_a_large_picture_of_an_mnist_image_gives_it_back(tmp_path: Path) -> None:
    images = formats.load(limit_test=50).test_images[..., 0]
    apart = []
    for i, pixels in enumerate(images):
        large = Image.fromarray(255 - pixels).resize((224, 224), Image.Resampling.BICUBIC)
        sheet = Image.new("L", (700, 400), 255)
        sheet.paste(large, (400, 20))
        sheet.save(tmp_path / f"{i}.png")
        found = read_pictures(tmp_path / f"{i}.png").pixels[0]
        assert extent(found) == pytest.approx(extent(pixels), abs=1)
        assert mass(found) == pytest.approx([14, 14], abs=0.55)  # whole pixels, as in MNIST
        apart.append(np.abs(found.astype(float) - pixels).mean() / pixels.mean())
    assert np.median(apart) < 0.45  # a shift by one pixel, either way, gives more


@pytest.mark.parametrize(
    ("ink", "ground", "dark"),
    [
        (cases.BLACK, cases.WHITE, True),
        (cases.WHITE, cases.BLACK, False),
        ((20, 20, 90), (200, 200, 90), True),
    ],
)
def test_inverted_says_whether_the_ink_is_dark(ink, ground, dark: bool, tmp_path: Path) -> None:
    picture, _ = cases.coloured(ink, ground, 3, np.random.default_rng(0))
    picture.save(tmp_path / "3.png")
    assert read_pictures(tmp_path / "3.png").inverted.tolist() == [dark]


def empty_sheets() -> dict[str, Image.Image]:
    rng = np.random.default_rng(1)
    sheets = {
        f"{grey} {side}": np.full((side, side), grey, np.float32)
        for grey in (0, 128, 255)
        for side in (1, 28, 300)
    }
    sheets |= {f"noise {s}": 180 + rng.normal(0, s, (300, 300)) for s in (5, 20, 60)}
    for kind in ("gradient", "vignette"):
        light = 215 * cases.lit(kind, 480, 640, 0.5, rng)[..., 0]
        sheets[kind] = light + rng.normal(0, 6, light.shape)
    lines = cases.ruled(480, 480, 60, 3, 0, 5)
    sheets["lined"] = 255 - 200 * lines
    sheets["squared"] = 255 - 200 * np.maximum(lines, lines.T)
    sheets["frame"] = np.pad(np.full((300, 300), 255.0), 40)
    found = {name: cases.image(values) for name, values in sheets.items()}
    found["texture"] = found["noise 20"].filter(ImageFilter.GaussianBlur(1.5))
    found["transparent"] = Image.new("RGBA", (300, 300))
    return found


@pytest.mark.parametrize("name", empty_sheets())
def test_nothing_is_drawn_on_an_empty_sheet(name: str, tmp_path: Path) -> None:
    empty_sheets()[name].save(tmp_path / "empty.png")
    found = read_pictures(tmp_path / "empty.png")
    assert found.drawn.tolist() == [False]
    assert not found.pixels.any()


def test_what_is_said_of_an_empty_sheet(run: Path, tmp_path: Path, call) -> None:
    Image.new("L", (300, 300), 255).save(tmp_path / "empty.png")
    seven = cases.make("black on white", 7, tmp_path)
    assert call(run, tmp_path / "empty.png")[1] == f"{tmp_path / 'empty.png'}: nothing drawn\n"
    code, out, _ = call(run, tmp_path / "empty.png", seven, "--json")
    first, second = json.loads(out)
    assert code == 0
    assert (first["digit"], first["class"], first["probability"]) == (None, None, 0)
    assert (second["digit"], second["class"]) == (7, "7")
    assert second["probability"] == max(second["probabilities"])
    code, out, _ = call(run, tmp_path / "empty.png", "--draw")
    assert code == 0


def test_as_is_only_scales(tmp_path: Path) -> None:
    pixels = np.zeros((28, 28), np.uint8)
    pixels[2:12, 3:6] = 255
    for name, light in (("white", pixels), ("black", 255 - pixels)):
        found = read_pictures(save(light, tmp_path / f"{name}.png"), as_is=True)
        assert np.array_equal(found.pixels[0], light)
        assert found.inverted.tolist() == [False]
    large = save(np.kron(pixels, np.ones((4, 4), np.uint8)), tmp_path / "large.png")
    assert np.abs(read_pictures(large, as_is=True).pixels[0].astype(int) - pixels).mean() < 3


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_taken_as_they_are_and_dark_ones_inverted(suffix: str, tmp_path: Path) -> None:
    images = formats.load(limit_test=30).test_images[..., 0]
    for name, content, dark in (("white", images, False), ("black", 255 - images, True)):
        path = tmp_path / (name + suffix)
        write_idx(path, content)
        found = read_pictures(path)
        assert np.array_equal(found.pixels, images)
        assert found.inverted.tolist() == [dark] * 30
        assert np.array_equal(read_pictures(path, as_is=True).pixels, content)


def test_pages_and_animations(tmp_path: Path) -> None:
    pages = [Image.open(cases.make("black on white", digit, tmp_path)).convert("L") for digit in (3, 8)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    found = read_pictures(tmp_path / "pages.tif")
    one = [read_pictures(cases.make("black on white", digit, tmp_path)).pixels[0] for digit in (3, 8)]
    assert np.abs(found.pixels.astype(int) - np.stack(one)).max() <= 2
    assert found.name(1) == f"{tmp_path / 'pages.tif'}[1]"
    for ext in ("gif", "png", "webp"):
        pages[0].save(tmp_path / f"moving.{ext}", save_all=True, append_images=pages[1:])
        with pytest.raises(UserError, match="an animation of 2 frames"):
            read_pictures(tmp_path / f"moving.{ext}")


FOREIGN = {
    b"": "an empty file",
    b"%PDF-1.7\n": "a PDF document",
    b"\0\0\0\x18ftypheic\0\0": "a HEIC picture",
    b"\0\0\0\x18ftypisom\0\0": "a video",
    b"\x1a\x45\xdf\xa3\x01": "a video",
    b"PK\x03\x04\x14\0": "a zip archive",
    b"<!DOCTYPE html><html><body>404": "an HTML page",
    b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">': "an SVG drawing",
    b"%!PS-Adobe-3.0 EPSF-3.0\n": "a PostScript document",
    b"7": "a text file",
    b"label,pixel0\n5,0\n": "a text file",
    b"version https://git-lfs.github.com/spec/v1\n": "a pointer of Git LFS",
    bytes(range(128, 256)): "an unknown kind",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("content", FOREIGN)
def test_what_is_no_picture_is_named(content: bytes, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "digit.png"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError) as error:
        read_pictures(path)
    assert FOREIGN[content].removeprefix("an unknown") in str(error.value)
    assert str(error.value).startswith(f"{path}: is ")
    assert "\n" not in str(error.value)


def test_text_cut_inside_a_letter_is_text() -> None:
    assert kind_of("ä".encode() * 1023 + b"x" + b"\xc3").startswith("a text file")


def test_folders_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        read_pictures(tmp_path)
    data = cases.make("black on white", 3, tmp_path).read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_pictures(tmp_path / "half.png")


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG file of 8 bits, RGB, whose compressed rows are given."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_too_large_pictures_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, zlib.compress(b"\0" * 1000)))
    with pytest.raises(UserError, match="more than 178 megapixels: scale it down"):
        read_pictures(tmp_path / "bomb.png")
    head = b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 9000, 9000, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "large.bmp").write_bytes(head)
    with pytest.raises(UserError, match=r"9000×9000 pixels; of this kind \(BMP, RGB\) at most 45 megapixels"):
        read_pictures(tmp_path / "large.bmp")


def test_an_idx_file_that_unpacks_to_very_much_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("distrib.pictures.prepare.MOST_IMAGES", 10)
    assert MOST_IMAGES >= 60_000
    write_idx(tmp_path / "many.gz", np.zeros((11, 28, 28), np.uint8))
    with pytest.raises(UserError, match="unpacks to more than 10 images"):
        read_pictures(tmp_path / "many.gz")


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_a_png_read_in_strips_is_the_same(
    mode: str, orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    noisy = np.clip(rng.normal(128, 50, (211, 160, 4)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(noisy)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = picture.convert("RGB").quantize(64) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "noise.png", exif=exif)
    whole = pictures.read_sheets(tmp_path / "noise.png", lambda sheet: sheet)
    monkeypatch.setattr(pictures, "STRIP_BYTES", 4000)
    monkeypatch.setattr(pictures, "WORK_PIXELS", 1700)
    step = pictures.read_sheets(
        tmp_path / "noise.png", lambda sheet: sheet
    )  # in strips: larger than 16 sheets
    monkeypatch.setattr(pictures, "_plain_png", lambda _: False)
    same = pictures.read_sheets(tmp_path / "noise.png", lambda sheet: sheet)
    assert whole is not None
    assert step is not None
    assert same is not None
    assert whole[0].light.shape[:2] == ((160, 211) if orientation == 6 else (211, 160))
    assert np.array_equal(step[0].light, same[0].light)
    assert (step[0].alpha is None) == (same[0].alpha is None)


PEAK = """
import sys
from pathlib import Path
from distrib.pictures.prepare import read_pictures
from launch.bench.measure import peak_bytes
assert read_pictures(Path(sys.argv[1])).drawn.tolist() == [True]
print(peak_bytes())
"""


def test_a_large_picture_takes_little_memory(tmp_path: Path) -> None:
    """96 megapixels, 288 MB unpacked."""
    width, height = 12_000, 8_000
    white, pen = (
        b"\0" + b"\xff" * (3 * width),
        b"\0" + b"\xff" * 15_000 + b"\0" * 2400 + b"\xff" * (3 * width - 17_400),
    )
    packer = zlib.compressobj(1)
    rows = (
        b"".join(packer.compress(pen if 2000 <= y < 6000 else white) for y in range(height)) + packer.flush()
    )
    (tmp_path / "large.png").write_bytes(png(width, height, rows))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "large.png"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300e6


def test_names_steer_no_terminal(run: Path, tmp_path: Path, call) -> None:
    path = tmp_path / "a\x1b[2J\n.png"
    path.write_bytes(b"%PDF-1.7")
    code, out, err = call(run, path)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()
    assert "a?[2J?.png: is a PDF document" in err


def test_under_a_launcher_rank_0_alone_predicts(run: Path, tmp_path: Path) -> None:
    picture = cases.make("black on white", 3, tmp_path)
    alone = python("-m", "launch.cli", "predict", run, picture).stdout
    assert alone.count("\n") == 1
    assert python("-m", "launch.cli", "predict", run, picture, ranks=2).stdout == alone
