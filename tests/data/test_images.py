"""Reading image files: what comes out, and what is refused from the header alone."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from deit_fast.data import DeiTImageProcessor, load_image


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels and whose body holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8))


def test_a_file_is_read_as_rgb(tmp_path, image):
    for mode in ("RGB", "RGBA", "L", "P", "1"):
        image.convert(mode).save(tmp_path / "image.png")
        read = load_image(tmp_path / "image.png")
        assert read.mode == "RGB" and read.size == (30, 20)


def test_exif_orientation_is_honoured(tmp_path, image):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    image.save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "image.png")), np.rot90(np.asarray(image), -1))


def test_broken_exif_leaves_the_image_as_it_is(tmp_path, image):
    for broken in (b"Exif\0\0neither", b"Exif\0\0II*\0\x08"):
        image.save(tmp_path / "image.webp", exif=broken)
        assert load_image(tmp_path / "image.webp").size == image.size


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_grey_keeps_its_range(tmp_path, kind):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"image.{kind}")
    assert np.array_equal(np.asarray(load_image(tmp_path / f"image.{kind}"))[:, :, 0], values >> 8)


def test_colours_of_four_inks_are_those_of_three(tmp_path, image):
    for mode in ("RGB", "CMYK"):
        image.resize((96, 96)).convert(mode).save(tmp_path / f"{mode}.jpg", quality=95)
    three, four = (np.asarray(load_image(tmp_path / f"{mode}.jpg"), dtype=float) for mode in ("RGB", "CMYK"))
    assert np.abs(three - four).mean() < 12


@pytest.mark.filterwarnings("error")
def test_a_transparent_palette_keeps_its_colours(tmp_path, image):
    palette = image.quantize(16)
    palette.save(tmp_path / "image.png", transparency=bytes([0, 128, *[255] * 14]))
    assert np.array_equal(np.asarray(load_image(tmp_path / "image.png")), np.asarray(palette.convert("RGB")))


def test_the_processor_takes_paths(tmp_path, image):
    image.save(tmp_path / "image.png")
    processor = DeiTImageProcessor()
    from_path = processor(str(tmp_path / "image.png"), return_tensors="pt").pixel_values
    assert torch.equal(from_path, processor(image, return_tensors="pt").pixel_values)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not an image"),
        (b"just some text", "not an image"),
        (b"\xff\xd8\xff\xe0 not a jpeg", "not an image"),
        (png(0, 5), "not an image"),
        (png(40_000, 25_000), "1000000000 pixels"),
        (png(15_000, 12_000), "180000000 pixels"),
        (png(30, 20), "cannot be decoded"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, message):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value)


def test_too_many_pixels_are_refused_with_pillows_own_limit_off(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("the image was decoded"))
    (tmp_path / "bomb.png").write_bytes(png(40_000, 25_000))
    with pytest.raises(ValueError, match=r"bomb\.png.*1,000,000,000 pixels"):
        load_image(tmp_path / "bomb.png")


def test_a_truncated_file_is_named(tmp_path, image):
    image.save(tmp_path / "image.jpg")
    content = (tmp_path / "image.jpg").read_bytes()
    (tmp_path / "image.jpg").write_bytes(content[:-50])
    with pytest.raises(ValueError, match=r"image\.jpg.*truncated"):
        load_image(tmp_path / "image.jpg")


def test_floating_point_files_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "image.tiff")
    with pytest.raises(ValueError, match=r"image\.tiff.*'F'"):
        load_image(tmp_path / "image.tiff")


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            load_image(path)
