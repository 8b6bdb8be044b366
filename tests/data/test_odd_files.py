"""Every odd file through the four doors, which must agree: prepare, training, evaluation and prediction."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
from conftest import jpeg, smooth_image
from PIL import EpsImagePlugin, Image

import input_pipeline
from simplest_vit.data.builders.base import checked
from simplest_vit.data.decode import decode_image, eval_image, open_image
from simplest_vit.data.streaming import random_resized_crop
from simplest_vit.errors import UserError

PHOTO = smooth_image(0, 120, 160)


def encoded(image_format, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(PHOTO).convert(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def changed(content, at, new):
    return content[:at] + new + content[at + len(new) :]


def png_of_size(width, height):
    """Returns the header of a PNG, which is all that is needed to refuse it."""
    content = bytearray(encoded("PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


JPEG, PROGRESSIVE = jpeg(PHOTO), jpeg(PHOTO, progressive=True)
HUFFMAN = JPEG.index(b"\xff\xc4")
MP4 = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40
RANDOM = np.random.default_rng(0).bytes(5000)

SOUND = {
    "plain": JPEG,
    "progressive": PROGRESSIVE,
    "grey": jpeg(PHOTO, "L"),
    "CMYK": jpeg(PHOTO, "CMYK"),
    "JFIF of major version 0": changed(JPEG, JPEG.index(b"JFIF\0") + 5, b"\0"),
    "junk before a marker": JPEG[:HUFFMAN] + b"\0\0\0" + JPEG[HUFFMAN:],
    "fill bytes before a marker": JPEG[:HUFFMAN] + b"\xff\xff" + JPEG[HUFFMAN:],
    "motion photo": JPEG + MP4,
    "random trailer": JPEG + RANDOM,
    "trailer with a start of scan": JPEG + b"\xff\xda" + RANDOM,
    "two JPEGs": JPEG + PROGRESSIVE,
    "thumbnail": jpeg(PHOTO, comment=jpeg(PHOTO[:16, :16])),
    "MPO": encoded("MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
    "PNG": encoded("PNG"),
    "PNG, palette and transparency": encoded("PNG", "P", transparency=bytes(9)),
    "PNG, grey and alpha": encoded("PNG", "LA"),
    "PNG, trailer": encoded("PNG") + RANDOM,
    "GIF": encoded("GIF", "P"),
    "WEBP": encoded("WEBP"),
    "AVIF": encoded("AVIF"),
    "TIFF": encoded("TIFF", compression="tiff_lzw"),
    "BMP": encoded("BMP"),
    "PGM": encoded("PPM", "L"),
}
BROKEN = {
    "empty": b"",
    "text": b"no image",
    "only the start": JPEG[:2],
    "header only": JPEG[:HUFFMAN],
    "cut": JPEG[:-700],
    "cut, the end appended": JPEG[:-700] + b"\xff\xd9",
    "progressive, cut": PROGRESSIVE[:-700],
    "progressive, cut, the end appended": PROGRESSIVE[:-700] + b"\xff\xd9",
    "without its end": JPEG[:-2],
    "broken Huffman table": changed(JPEG, HUFFMAN + 5, b"\xff" * 16),
    "without quantization": JPEG.replace(b"\xff\xdb", b"\xff\xed"),
    "PNG, cut": encoded("PNG")[:-600],
    "GIF, cut": encoded("GIF", "P")[:400],
    "TIFF, cut": encoded("TIFF")[:-600],
    "TIFF of 32 bits": encoded("TIFF", "F"),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n1 1 10 10 rectfill\n%%EOF\n",
    "PDF": b"%PDF-1.4\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PNG of 3.6 G pixels": png_of_size(60_000, 60_000),
}
DOORS = {
    "prepare": lambda content: checked(lambda: content)(),
    "train": lambda content: eval_image(content, (32, 32, 3), 32),
    "train, cropped": lambda content: random_resized_crop(content, np.random.default_rng(0), 32, 3),
    "evaluate and predict": lambda content: eval_image(content, (32, 32, 3), 37),
    "grey": lambda content: eval_image(content, (32, 32, 1), 32),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", SOUND)
def test_what_one_door_takes_all_take(name, door):
    DOORS[door](SOUND[name])


@pytest.mark.parametrize("name", ["JFIF of major version 0", "junk before a marker", "motion photo", "two JPEGs"])
def test_what_is_behind_the_image_does_not_change_it(name):
    with Image.open(io.BytesIO(JPEG)) as image:
        expected = np.asarray(image).astype(int)
    assert np.abs(decode_image(SOUND[name], 3) - expected).max() <= 3  # two decoders


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", BROKEN)
def test_what_one_door_refuses_all_refuse_in_one_line(name, door, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started Ghostscript"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    with pytest.raises(UserError, match=r"^not an? (complete )?image \(") as error:
        DOORS[door](BROKEN[name])
    assert "\n" not in str(error.value)


def test_an_image_of_169_million_pixels_is_taken_without_a_warning_of_pillow():
    with open_image(png_of_size(13_000, 13_000)) as image:  # in tests a warning is an error
        assert image.size == (13_000, 13_000)


def test_the_doors_are_those_of_the_programs(tmp_path, make_config, capfd):
    """The same through the programs: all that are broken are listed at once, by their path."""
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "all").mkdir(parents=True)
    for name, content in {**SOUND, **BROKEN}.items():
        (tmp_path / "photos/train/all" / f"{name}.jpg").write_bytes(content)
    (tmp_path / "photos/val/all/a.jpg").write_bytes(JPEG)
    config = make_config("image_folder", dir=tmp_path / "tfds", manual_dir=str(tmp_path / "photos"), image_size=16)
    with pytest.raises(UserError, match=rf"^unreadable images, listed above: {len(BROKEN)};"):
        input_pipeline.load(config.data)
    told = capfd.readouterr().err
    for name in BROKEN:
        assert f"unreadable image train/all/{name}.jpg: not a complete image (" in told
    for name in BROKEN:
        (tmp_path / "photos/train/all" / f"{name}.jpg").unlink()
    assert input_pipeline.load(config.data).train.images.shape == (len(SOUND), 16, 16, 3)
