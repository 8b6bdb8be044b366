"""Decode image files; preparation, training, evaluation and prediction all use this decoder."""

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from simplest_vit.errors import UserError, first_line

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ModuleNotFoundError:  # the extra [heic]
    pillow_heif = None  # type: ignore[assignment]

# Only these formats are opened. Pillow supports more, but starts external programs for some (Ghostscript for EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "PPM", "TIFF", *(("HEIF",) if pillow_heif else ()))
HEIC_REMEDY = 'HEIC photos need pip install "simplest-vit[heic]"'
_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm"
HEIC_SUFFIXES = (".heic", ".heif")
SUFFIXES = (*_SUFFIXES.split(), *(HEIC_SUFFIXES if pillow_heif else ()))
_JPEG, _HEIC = b"\xff\xd8", (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypheim", b"ftyphevc")
_ORIENTATION = 0x0112  # the EXIF tag
_PHOTOMETRIC = 0x0106  # the TIFF tag; 0 if white is 0
_MAX_PIXELS = 2 * 89_478_485  # Pillow's limit, against files that decompress to more than the memory
Image.MAX_IMAGE_PIXELS = None  # `open_image` checks; Pillow's own check warns from half of that on


def decode_image(content: bytes, channels: int, min_size: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Decode an image file to upright grey or RGB pixels.

    The picture is rotated as its EXIF orientation says, 16 bits become 8 (the upper ones), a palette is looked up and
    transparency dropped. JPEG goes through libjpeg-turbo directly, 1.5 times as fast as through Pillow; what it refuses
    (CMYK, slightly damaged JPEG) and all other formats go through Pillow. Bytes after the image, such as the video of a
    motion photo, are ignored.

    Args:
      channels: 1 for grey, 3 for RGB; other images are converted.
      min_size: (height, width) that is enough: a JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8.

    Returns:
      Pixels, uint8 [H, W, channels].

    Raises:
      UserError: If the file is damaged, truncated, not an image, or has more than 179 million pixels.
    """
    try:
        with open_image(content) as image:
            if content.startswith(_JPEG):
                orientation, colours = _orientation(image), "GRAY" if channels == 1 else "RGB"
                height, width = min_size[::-1] if orientation > 4 else min_size
                try:
                    pixels = simplejpeg.decode_jpeg(content, colours, min_height=height, min_width=width, min_factor=2)
                    return _turn(pixels, orientation)
                except ValueError as error:
                    if "premature end" in str(error).lower():  # Pillow fills what is missing with grey
                        raise ValueError("the JPEG is truncated") from error
            image.load()
            return _turn(_eight_bits(image, channels), _orientation(image))
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise UserError(f"not a complete image ({_reason(error, content)})") from error


def image_size(content: bytes) -> tuple[int, int]:
    """Return the (height, width) of an image when it is upright, from its header; a UserError if that is damaged."""
    try:
        with open_image(content) as image:
            height, width, orientation = image.height, image.width, _orientation(image)
    except Exception as error:
        raise UserError(f"not an image ({_reason(error, content)})") from error
    return (width, height) if orientation > 4 else (height, width)


def open_image(content: bytes) -> Image.Image:
    """Open an image file with Pillow without decoding it: only formats that need no other program, no huge images."""
    image = Image.open(io.BytesIO(content), formats=_FORMATS)
    height, width = image.height, image.width
    if height * width > _MAX_PIXELS:
        raise ValueError(f"{height:,} x {width:,} = {height * width:,} pixels, expected at most {_MAX_PIXELS:,}")
    return image


def eval_image(content: bytes, image_shape: tuple[int, int, int], resize: int) -> np.ndarray:
    """Decode an image for evaluation and prediction: resize the shorter side, crop the centre.

    Args:
      image_shape: (H, W, C) of the result; H and W are equal.
      resize: Pixels of the shorter side before the crop, at least H.

    Returns:
      Pixels, uint8 [H, W, C].

    Raises:
      UserError: If the file is damaged or not an image.
    """
    crop, _, channels = image_shape
    pixels = decode_image(content, channels, (resize, resize))
    height, width = pixels.shape[:2]
    # As torchvision rounds: the longer side down, the corner of the crop to the nearest pixel.
    new_height, new_width = (resize * side // min(height, width) for side in (height, width))
    top, left = round((new_height - crop) / 2), round((new_width - crop) / 2)
    if (new_height, new_width) == (height, width):
        return pixels[top : top + crop, left : left + crop]
    y, x = height / new_height, width / new_width
    return resize_box(pixels, (left * x, top * y, (left + crop) * x, (top + crop) * y), crop)  # only what is kept


def resize_box(pixels: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Resize a box (left, top, right, bottom: fractions are allowed) of an image to uint8 [size, size, C].

    The filter is bilinear and antialiased.
    """
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    resized = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    return resized.reshape(size, size, -1)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, C], C = 1 or 3, as a PNG file; TFDS's own encoder needs TensorFlow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _eight_bits(image: Image.Image, channels: int) -> np.ndarray:
    """Return the pixels of an image, uint8 [H, W, channels], as stored in the file."""
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):  # Pillow scales PGM to 16 bits
        pixels = (np.asarray(image) >> 8).astype(np.uint8)
        # Pillow inverts a TIFF whose 0 is white only if it has 8 bits.
        is_inverted = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0  # type: ignore[attr-defined]
        return np.repeat((255 - pixels if is_inverted else pixels)[..., None], channels, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, which have no fixed range; expected 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate or mirror pixels [H, W, C] upright, by one of EXIF's eight orientations."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1, which is upright, if it is missing or invalid."""
    if image.format == "TIFF":  # Pillow gives its upright size, and rotates it when it is loaded
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # an image with damaged metadata is still usable
        return 1
    return orientation if orientation in range(1, 9) else 1


def _reason(error: Exception, content: bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        return HEIC_REMEDY if content[4:12] in _HEIC and not pillow_heif else "unknown format"
    return first_line(error)
