"""Image files of every kind against PIL and NumPy, and the same pixels for training as for prediction."""

import io
import itertools
import zlib

import numpy as np
import pytest
from conftest import jpeg, smooth_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import input_pipeline
from simplest_vit.data.decode import decode_image, eval_image, image_size
from simplest_vit.errors import UserError


def encoded(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
def test_images_are_turned_as_pil_turns_them(orientation, image_format):
    image = Image.fromarray(smooth_image(0, 40, 64))
    content = encoded(image, image_format, exif=oriented(orientation))
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened)).astype(int)
    pixels = decode_image(content, 3)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= (3 if image_format == "JPEG" else 0)  # two JPEG decoders
    assert image_size(content) == pixels.shape[:2]


def test_a_jpeg_is_turned_behind_other_segments_and_at_reduced_scale():
    image = Image.fromarray(smooth_image(0, 400, 640))
    content = encoded(image, "JPEG", exif=oriented(6), icc_profile=bytes(70_000), comment=b"x" * 1000)
    exif_at = content.index(b"\xff\xe1")
    icc = content[content.index(b"\xff\xe2") : content.index(b"\xff\xdb")]
    moved = content[:2] + icc + content[exif_at : content.index(b"\xff\xe2")] + content[content.index(b"\xff\xdb") :]
    for file in (content, moved):
        assert image_size(file) == (640, 400)
        assert decode_image(file, 3, (300, 100)).shape == (320, 200, 3)
        assert decode_image(file, 3, (300, 201)).shape == (640, 400, 3)


def test_damaged_exif_does_not_damage_the_picture():
    content = jpeg(smooth_image(0), exif=oriented(6))
    at = content.index(b"Exif\0\0") + 6
    for damaged in (content[:at] + b"XX" + content[at + 2 :], content[:at] + b"\xff" * 20 + content[at + 20 :]):
        np.testing.assert_array_equal(decode_image(damaged, 3), decode_image(jpeg(smooth_image(0)), 3))


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_of_16_bits_the_upper_8_count(image_format, channels):
    values = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    content = encoded(Image.fromarray(values), image_format)
    expected = np.repeat((values // 256).astype(np.uint8)[..., None], channels, axis=2)
    np.testing.assert_array_equal(decode_image(content, channels), expected)
    assert abs(eval_image(content, (48, 48, channels), 48).mean() - 127) < 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_0_is_white_is_not_inverted(bits, channels):
    values = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    stored = ~values if bits == 16 else (values // 256).astype(np.uint8)  # which Pillow inverts when it saves them
    content = encoded(Image.fromarray(stored), "TIFF", tiffinfo={0x0106: 0})
    expected = np.repeat((values // 256).astype(np.uint8)[..., None], channels, axis=2)
    np.testing.assert_array_equal(decode_image(content, channels), expected)


@pytest.mark.parametrize("most", [1023, 65535])
def test_a_pgm_of_more_than_8_bits_is_read(most):
    values = np.linspace(0, most, 48 * 64).astype(">u2").reshape(48, 64)
    pixels = decode_image(b"P5 64 48 %d\n" % most + values.tobytes(), 1)[..., 0].astype(int)
    assert np.abs(pixels - 255 * (values / most)).max() <= 1


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_range_are_refused(mode):
    content = encoded(Image.fromarray(np.ones((4, 4), {"F": np.float32, "I": np.int32}[mode])), "TIFF")
    with pytest.raises(UserError, match=r"32 bits.* expected 8 or 16 bits"):
        decode_image(content, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_palette_and_transparency_become_plain_pixels(channels):
    rgb = smooth_image(5)
    alpha = np.linspace(0, 255, 48 * 64).astype(np.uint8).reshape(48, 64, 1)
    palette = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE)
    mode = "L" if channels == 1 else "RGB"
    cases = {
        "RGBA": (encoded(Image.fromarray(np.concatenate([rgb, alpha], 2)), "PNG"), Image.fromarray(rgb)),
        "P": (encoded(palette, "PNG"), palette.convert("RGB")),
        "P with one transparent colour": (encoded(palette, "PNG", transparency=0), palette.convert("RGB")),
        "P with transparent colours": (encoded(palette, "PNG", transparency=bytes(range(256))), palette.convert("RGB")),
        "LA": (encoded(Image.fromarray(rgb).convert("LA"), "PNG"), Image.fromarray(rgb).convert("L")),
        "1": (encoded(Image.fromarray(rgb).convert("1"), "PNG"), Image.fromarray(rgb).convert("1")),
        "CMYK": (encoded(Image.fromarray(rgb).convert("CMYK"), "TIFF"), Image.fromarray(rgb)),
    }
    for name, (content, expected) in cases.items():
        pixels = np.asarray(expected.convert(mode)).reshape(48, 64, channels)
        np.testing.assert_array_equal(decode_image(content, channels), pixels, err_msg=name)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_an_image_that_would_fill_the_memory_is_refused(image_format):
    content = bytearray(encoded(Image.fromarray(smooth_image(0)), image_format))
    if image_format == "PNG":
        content[16:24] = (60_000).to_bytes(4) * 2
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    else:
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = (60_000).to_bytes(2) * 2
    for function in (lambda c: decode_image(c, 3), lambda c: eval_image(c, (8, 8, 3), 9)):
        with pytest.raises(UserError, match=r"not a complete image .*3,?600,?000,?000 pixels") as error:
            function(bytes(content))
        assert "\n" not in str(error.value)


FILES = [
    encoded(Image.fromarray(smooth_image(0, 16, 20)).convert(mode), image_format, **options)
    for image_format, mode, options in (
        ("JPEG", "RGB", {"exif": oriented(5)}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {"exif": oriented(5)}),
        ("PNG", "P", {"transparency": bytes(9)}),
        ("PNG", "I;16", {}),
        ("TIFF", "RGB", {"exif": oriented(5), "compression": "tiff_lzw"}),
        ("TIFF", "I;16", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGBA", {}),
        ("BMP", "RGB", {}),
    )
]


@settings(max_examples=400)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
    st.sampled_from([1, 3]),
)
@pytest.mark.filterwarnings("ignore")
def test_a_mutated_file_is_an_image_or_one_line(content, changes, cut, channels):
    mutated = bytearray(content[: len(content) - int(cut**4 * len(content))])
    for where, value in changes:
        mutated[int(where * len(mutated)) : int(where * len(mutated)) + 1] = bytes([value])
    for function in (
        lambda c: decode_image(c, channels),
        lambda c: eval_image(c, (8, 8, channels), 9),
        image_size,
    ):
        try:
            function(bytes(mutated))
        except UserError as error:
            message = str(error)
            if "\n" in message or "<" in message:
                raise


def test_training_and_prediction_see_the_same_pixels(tmp_path, make_config):
    files = {
        "turned.jpg": jpeg(smooth_image(0, 40, 64), exif=oriented(6)),
        "deep.png": encoded(Image.fromarray(np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)), "PNG"),
        "deep.tif": encoded(Image.fromarray(np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)), "TIFF"),
        "palette.png": encoded(Image.fromarray(smooth_image(2)).convert("P"), "PNG", transparency=bytes(9)),
        "grey.jpg": jpeg(smooth_image(3), "L"),
        "cmyk.jpg": jpeg(smooth_image(4), "CMYK"),
    }
    for split, (name, content) in itertools.product(("train", "val"), files.items()):
        (tmp_path / split / name).mkdir(parents=True)  # a class of its own, whose label tells the order
        (tmp_path / split / name / name).write_bytes(content)
    data = {"dir": tmp_path / "tfds", "manual_dir": str(tmp_path), "image_size": 32, "batch_size": 6}
    for budget in (10**9, 0):
        config = make_config("image_folder", **data, device_budget_bytes=budget)
        dataset = input_pipeline.load(config.data)
        (batch,) = input_pipeline.eval_batches(dataset, batch_size=6, sharding=None)
        seen = np.asarray(batch["image"]) * np.array(dataset.std) + np.array(dataset.mean)
        predicted = [eval_image(files[name], dataset.image_shape, dataset.eval_resize) for name in sorted(files)]
        predicted = np.stack(predicted)[batch["label"].argmax(1)]
        np.testing.assert_allclose(seen * 255, predicted, atol=1e-3)


@pytest.mark.parametrize("shape", [(103, 206), (206, 103), (49, 98), (103, 120)])
def test_the_sides_are_torchvisions_where_a_float_falls_short(shape):
    """torchvision resizes the longer side to int(size * long / short); by a factor it would be 511, not 512."""
    pixels = np.random.default_rng(0).integers(256, size=(*shape, 3)).astype(np.uint8)
    new_height, new_width = (int(256 * side / min(shape)) for side in shape)
    resized = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR)
    left, top = round((new_width - 256) / 2), round((new_height - 256) / 2)
    expected = np.asarray(resized.crop((left, top, left + 256, top + 256))).astype(int)
    found = eval_image(encoded(Image.fromarray(pixels), "PNG"), (256, 256, 3), 256)
    assert np.abs(found - expected).max() <= 1


def test_decoding_at_reduced_scale_gives_nearly_the_same_picture():
    content = jpeg(smooth_image(4, 512, 768))
    assert image_size(content) == (512, 768)
    assert decode_image(content, 3, (200, 200)).shape == (256, 384, 3)
    assert decode_image(content, 3, (300, 300)).shape == (512, 768, 3)
    reduced = eval_image(content, (56, 56, 3), 64).astype(int)
    with Image.open(io.BytesIO(content)) as image:
        full = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR))[4:60, 20:76]
    assert np.abs(reduced - full).mean() < 1.5
