"""Pictures good and bad, the places they come from, and vision models against transformers itself."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from adasid import config
from adasid.encoders import images, places
from adasid.encoders.base import ABSENT, identity_of, open_encoder
from adasid.errors import InputError, TransientError
from adasid.files import location
from tests import s3

pytest.importorskip("PIL")
from PIL import Image, ImageDraw

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\..*")  # pytest forgets the filter of the first test
KEY = "content.encoders.visual"
CPU = torch.device("cpu")
BYTES, PIXELS = 1_000_000, 4_000_000


def scene(width: int = 60, height: int = 40) -> Image.Image:
    """Draw a picture whose upper left quarter is red, on blue."""
    picture = Image.new("RGB", (width, height), (20, 40, 220))
    ImageDraw.Draw(picture).rectangle((0, 0, width // 2 - 1, height // 2 - 1), fill=(220, 30, 20))
    return picture


def noise(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def stored(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, side: int = 0) -> Image.Image:
    picture = images.decode(data, BYTES, PIXELS, side)
    assert isinstance(picture, Image.Image), picture
    assert picture.mode == "RGB"
    return picture


def near(picture: Image.Image, x: int, y: int, color: tuple[int, int, int]) -> bool:
    return bool(np.abs(np.subtract(picture.getpixel((x, y)), color)).max() <= 12)


RED, BLUE, WHITE = (220, 30, 20), (20, 40, 220), (255, 255, 255)


@pytest.mark.parametrize("kind", images.FORMATS)
def test_every_allowed_format_is_decoded(kind: str) -> None:
    picture = decoded(stored(scene(), kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {})))
    assert picture.size == (60, 40)
    assert near(picture, 10, 10, RED) and near(picture, 50, 30, BLUE)


def test_the_orientation_of_exif_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show it
    picture = decoded(stored(scene(), "JPEG", quality=95, exif=exif))
    assert picture.size == (40, 60)
    assert near(picture, 30, 10, RED) and near(picture, 5, 10, BLUE)  # the upper left corner is now the upper right


def test_unreadable_exif_does_not_matter() -> None:
    picture = decoded(stored(scene(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fbroken"))
    assert picture.size == (60, 40)


def transparent(mode: str) -> Image.Image:
    """Make the right half of a scene transparent, over black."""
    picture = scene().convert("RGBA")
    picture.paste((0, 0, 0, 0), (30, 0, 60, 40))
    return picture.convert(mode)


def test_transparent_parts_are_white() -> None:
    half = Image.new("RGBA", (20, 20), (220, 30, 20, 128))
    palette = transparent("RGBA").quantize(8, Image.Quantize.FASTOCTREE)
    key = Image.new("RGB", (20, 20), (1, 2, 3))
    for data in (
        stored(transparent("RGBA"), "PNG"),
        stored(palette, "PNG"),
        stored(transparent("RGBA"), "WEBP", lossless=True),
        stored(transparent("RGBA"), "GIF"),
        stored(transparent("LA"), "PNG"),
    ):
        assert near(decoded(data), 50, 30, WHITE)
    assert b"tRNS" in stored(palette, "PNG") and near(decoded(stored(palette, "PNG")), 10, 10, RED)
    assert near(decoded(stored(half, "PNG")), 5, 5, (237, 142, 137))
    assert near(decoded(stored(key, "PNG", transparency=(1, 2, 3))), 5, 5, WHITE)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in (RED, BLUE, WHITE)]
    data = stored(frames[0], kind, save_all=True, append_images=frames[1:])
    with Image.open(BytesIO(data)) as file:
        assert file.n_frames == 3
    assert near(decoded(data), 5, 5, RED)


def test_other_kinds_of_pixels_become_rgb() -> None:
    cmyk = scene().convert("CMYK")
    assert near(decoded(stored(cmyk, "JPEG", quality=95)), 50, 30, cmyk.convert("RGB").getpixel((50, 30)))
    grey = decoded(stored(Image.new("L", (9, 9), 77), "PNG"))
    assert grey.getpixel((3, 3)) == (77, 77, 77)
    assert decoded(stored(Image.new("1", (9, 9), 1), "PNG")).getpixel((3, 3)) == WHITE
    deep = Image.fromarray(np.full((9, 9), 0x8000, np.uint16))
    assert decoded(stored(deep, "PNG")).getpixel((3, 3)) == (128, 128, 128)
    assert decoded(stored(deep, "TIFF")).getpixel((3, 3)) == (128, 128, 128)
    dark = Image.fromarray(np.full((9, 9), 200, np.uint16))
    assert decoded(stored(dark, "PNG")).getpixel((3, 3)) == (1, 1, 1)
    for values, expected in ((0.5, 128), (128.0, 128), (np.nan, 0), (1e9, 255)):
        real = Image.fromarray(np.full((9, 9), values, np.float32))
        assert decoded(stored(real, "TIFF")).getpixel((3, 3)) == (expected,) * 3


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size() -> None:
    data = stored(scene(1600, 1200), "JPEG", quality=90)
    picture = decoded(data, side=100)
    assert picture.size == (200, 150)
    assert near(picture, 20, 20, RED) and near(picture, 180, 130, BLUE)
    assert decoded(data, side=5000).size == decoded(data).size == (1600, 1200)


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _jpeg() -> bytes:
    return stored(noise(1, 400, 300), "JPEG", quality=95)


def _flipped(data: bytes, start: int, size: int) -> bytes:
    return data[:start] + bytes(255 - byte for byte in data[start : start + size]) + data[start + size :]


def _gif_bomb() -> bytes:
    side = 60_000
    frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02L\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + frame


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "no bytes": (lambda: b"", images.EMPTY_FILE),
    "more bytes than allowed": (lambda: b"\xff\xd8\xff" + bytes(BYTES), images.TOO_MANY_BYTES),
    "an HTML page": (lambda: b"<!DOCTYPE html><html><body>404 <svg></svg></body></html>", images.NOT_A_PICTURE),
    "a page after blanks": (lambda: b"\n\n  <html><img></html>", images.NOT_A_PICTURE),
    "a PDF": (lambda: b"%PDF-1.7\n1 0 obj", images.NOT_A_PICTURE),
    "plain text": (lambda: b"no picture here", images.NOT_A_PICTURE),
    "JSON": (lambda: b'{"error": "expired"}', images.NOT_A_PICTURE),
    "a zip file": (lambda: b"PK\x03\x04" + bytes(100), images.NOT_A_PICTURE),
    "a pickle": (lambda: b"\x80\x04\x95cos\nsystem\n", images.NOT_A_PICTURE),
    "a film": (lambda: b"\0\0\0\x18ftypmp42" + bytes(100), images.NOT_A_PICTURE),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", images.NOT_A_PICTURE),
    "zeros": (lambda: bytes(1000), images.NOT_A_PICTURE),
    "random bytes": (lambda: np.random.default_rng(0).bytes(1000), images.NOT_A_PICTURE),
    "SVG": (lambda: b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", images.UNSUPPORTED_PICTURE),
    "SVG with a byte-order mark": (lambda: b"\xef\xbb\xbf<SVG/>", images.UNSUPPORTED_PICTURE),
    "an icon": (lambda: stored(scene(32, 32), "ICO"), images.UNSUPPORTED_PICTURE),
    "JPEG 2000": (lambda: stored(scene(), "JPEG2000"), images.UNSUPPORTED_PICTURE),
    "a Photoshop file": (lambda: b"8BPS\0\1" + bytes(100), images.UNSUPPORTED_PICTURE),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic" + bytes(100), images.UNSUPPORTED_PICTURE),
    "DDS": (lambda: stored(scene(), "DDS"), images.UNSUPPORTED_PICTURE),
    "a portable pixmap": (lambda: stored(scene(), "PPM"), images.NOT_A_PICTURE),
    "more pixels than allowed": (lambda: stored(Image.new("1", (2001, 2000)), "PNG"), images.TOO_MANY_PIXELS),
    "a bomb of 900 million pixels": (lambda: _png(30_000, 30_000, zlib.compress(bytes(100))), images.TOO_MANY_PIXELS),
    "a bomb of 100 million pixels": (lambda: _png(10_000, 10_000), images.TOO_MANY_PIXELS),
    "a GIF bomb": (_gif_bomb, images.TOO_MANY_PIXELS),
    "a tracking pixel": (lambda: stored(Image.new("RGB", (1, 1)), "GIF"), images.TOO_SMALL),
    "a line": (lambda: stored(Image.new("RGB", (1, 50)), "PNG"), images.TOO_SMALL),
    "a rule": (lambda: stored(Image.new("RGB", (1001, 10)), "PNG"), images.TOO_SMALL),
    "half a JPEG": (lambda: _jpeg()[: len(_jpeg()) // 2], images.TRUNCATED),
    "the head of a JPEG": (lambda: _jpeg()[:100], images.TRUNCATED),
    "three bytes of a JPEG": (lambda: _jpeg()[:3], images.TRUNCATED),
    "half a PNG": (lambda: stored(noise(1), "PNG")[:1500], images.TRUNCATED),
    "the head of a PNG": (lambda: stored(noise(1), "PNG")[:20], images.TRUNCATED),
    "half a WebP": (lambda: stored(noise(1), "WEBP", lossless=True)[:400], images.TRUNCATED),
    "half a GIF": (lambda: stored(noise(1), "GIF")[:1200], images.TRUNCATED),
    "half a BMP": (lambda: stored(noise(1), "BMP")[:1200], images.TRUNCATED),
    "the head of a BMP": (lambda: stored(noise(1), "BMP")[:20], images.TRUNCATED),
    "a PNG of broken data": (lambda: _png(20, 20, b"not compressed"), images.UNDECODABLE),
    "a PNG without data": (lambda: _png(20, 20, zlib.compress(b"")), images.TRUNCATED),
    "a PNG of no size": (lambda: _png(0, 0), images.UNDECODABLE),
    "a WebP of flipped bits": (lambda: _flipped(stored(noise(1), "WEBP"), 20, 60), images.UNDECODABLE),
    "a TIFF without a directory": (lambda: b"II*\0\xff\xff\xff\x7f", images.UNDECODABLE),
    "a JPEG of no frame": (lambda: b"\xff\xd8\xff\xd9", images.UNDECODABLE),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_content_has_a_reason(name: str) -> None:
    make, reason = BAD[name]
    assert images.decode(make(), BYTES, PIXELS) == reason
    assert images.decode(make(), BYTES, PIXELS, side=64) == reason


def test_warnings_of_pillow_are_silent() -> None:
    code = (
        "import sys, warnings; from adasid.encoders.images import decode; warnings.simplefilter('error')\n"
        "print(decode(sys.stdin.buffer.read(), 10**6, 10**6))"
    )
    run = subprocess.run([sys.executable, "-c", code], input=_png(10_000, 10_000), capture_output=True, check=True)
    assert run.stdout.decode().strip() == images.TOO_MANY_PIXELS and not run.stderr


def test_any_damage_gives_a_picture_or_a_reason() -> None:
    known = {make_reason[1] for make_reason in BAD.values()}
    random = np.random.default_rng(3)
    found = set()
    for kind in images.FORMATS:
        whole = stored(noise(2), kind)
        for _ in range(60):
            data = bytearray(whole[: int(random.integers(1, len(whole) + 1))] if random.random() < 0.3 else whole)
            for position in random.integers(0, min(len(data), int(random.choice([64, 10_000]))), 4):
                data[position] = int(random.integers(256))
            result = images.decode(bytes(data), BYTES, PIXELS)
            found.add(result if isinstance(result, str) else "picture")
    assert found <= {*known, "picture"} and {"picture", images.TRUNCATED, images.UNDECODABLE} <= found


EVERYWHERE = ("/", "s3://lake", "s3://no-such-bucket-of-tests", "http://127.0.0.1:9")


def read(
    path: str | None,
    data: bytes | None = None,
    root: str | Path | None = None,
    web: bool = False,
    roots: tuple[str, ...] = EVERYWHERE,
) -> bytes | str:
    rules = places.Rules(1000, None if root is None else location(root), roots, web)
    return places.read(places.Place(data, path), rules)


def test_pictures_are_read_from_bytes_paths_and_uris(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"content")
    assert read("/nowhere.jpg", b"bytes win") == b"bytes win"
    assert read(str(tmp_path / "a b.jpg")) == b"content"
    assert read("a b.jpg", root=tmp_path) == read("./x/../a b.jpg", root=tmp_path) == b"content"
    assert read(f"file://{tmp_path}/a%20b.jpg") == read(f"file:{tmp_path}/a%20b.jpg") == b"content"
    assert read(f"file://localhost{tmp_path}/a%20b.jpg") == b"content"


def test_a_place_without_a_picture_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1001))
    (tmp_path / "whole").write_bytes(bytes(1000))
    os.mkfifo(tmp_path / "pipe")
    root = tmp_path / "root"
    root.mkdir()
    assert read(None) == ABSENT
    assert read(None, bytes(1001)) == read(str(tmp_path / "large")) == images.TOO_MANY_BYTES
    assert read(str(tmp_path / "whole")) == bytes(1000)
    assert read(str(tmp_path / "none.jpg")) == read("none.jpg", root=root) == places.MISSING_FILE
    assert read(f"{tmp_path}/whole/inner.jpg") == places.MISSING_FILE
    assert read(str(tmp_path)) == read(str(tmp_path / "pipe")) == places.UNREADABLE_FILE
    assert read("/zero\0byte") == read("/" + "long" * 2000) == places.UNREADABLE_FILE
    for path in ("../whole", "a/../../whole", ".."):
        assert read(path, root=root) == places.OUTSIDE_ROOT
    assert read("whole") == places.OUTSIDE_ROOT
    assert read("..whole", root=root) == places.MISSING_FILE
    for uri in ("ftp://host/a.jpg", "data:image/png;base64,aaaa", "hdfs://host/a", "javascript://x"):
        assert read(uri) == places.UNKNOWN_SCHEME
    assert read("http://127.0.0.1:9/a.jpg") == places.WEB_NOT_ALLOWED
    for address in ("http://[::1", "http://127.0.0.1:x/", "http://127.0.0.1:9/a.jpg", "http://127.0.0.1:9/é b"):
        assert read(address, web=True) == places.UNREADABLE_FILE


def test_only_named_places_are_read(tmp_path: Path) -> None:
    shop, other = tmp_path / "shop", tmp_path / "shop-of-others"
    for folder in (shop, other):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"content")
    assert read(f"{shop}/a.jpg", root=shop, roots=()) == read(f"{shop}/./a.jpg", roots=(f"{shop}/",)) == b"content"
    for path in (f"{other}/a.jpg", f"{shop}/../shop-of-others/a.jpg", f"file://{other}/a.jpg", "s3://lake/a.jpg"):
        assert read(path, root=shop, roots=("s3://lake/pictures",)) == places.OUTSIDE_ROOT
    for address in ("http://127.0.0.1:9/a", "HTTPS://127.0.0.1:9/a", "http://localhost:9/"):
        assert read(address, web=True, roots=()) == places.WEB_NOT_ALLOWED


def test_a_place_is_compared_whatever_its_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop, link = tmp_path / "shop", tmp_path / "link"
    shop.mkdir()
    (shop / "a.jpg").write_bytes(b"content")
    link.symlink_to(shop)
    monkeypatch.chdir(tmp_path)
    for root in (f"file://{shop}", f"{tmp_path}/other/../shop", "shop", str(link)):
        assert read(f"{shop}/a.jpg", roots=(root,)) == b"content"
    assert (
        read(f"{link}/a.jpg", root=shop.resolve(), roots=()) == read(f"{link}/a.jpg", roots=(str(shop),)) == b"content"
    )
    rules = places.Rules(1000, None, ("s3a://lake/pictures/", "http://127.0.0.1:9/open"), True)
    assert rules.allow("s3://lake/pictures/a.jpg") and not rules.allow("s3://lake/others/a.jpg")
    assert places.normal("S3A://lake/a/") == "s3://lake/a" and read("s3a://lake/a.jpg", roots=()) == places.OUTSIDE_ROOT
    assert rules.allow("http://127.0.0.1:9/open/a.jpg") and rules.allow("s3://lake/pictures/a%2F..%2Fb.jpg")
    assert places.Rules(1, None, ("https://Images.example/",)).allow("HTTPS://images.Example/a")
    for address in ("http://127.0.0.1:9/open/../a.jpg", "http://127.0.0.1:9/open/%2e%2E/a.jpg"):
        assert not rules.allow(address) and places.read(places.Place(None, address), rules) == places.WEB_NOT_ALLOWED
    latin = pc.cast(pa.array([b"caf\xe9.jpg", b"a.jpg"]), pa.string(), safe=False)
    assert [place.path for place in places.places(latin)] == ["caf\ufffd.jpg", "a.jpg"]


@pytest.fixture
def website() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            redirects = {
                "/here": "/picture",
                "/file": "file:///etc/hostname",
                "/ftp": "ftp://127.0.0.1/a",
                "/loop": "/loop",
            }
            if self.path in redirects:
                self.send_response(302)
                self.send_header("Location", redirects[self.path])
            else:
                self.send_response({"/gone": 410, "/broken": 500, "/closed": 403}.get(self.path, 200))
            body = {"/picture": b"content", "/%C3%A9%20b": b"quoted", "/large": bytes(1001), "/stream": bytes(5000)}
            content = body.get(self.path, b"error page")
            if self.path != "/stream":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_pictures_are_fetched_from_the_web_where_that_is_allowed(website: str) -> None:
    assert (
        read(f"{website}/picture", web=True, roots=(website,))
        == read(f"{website}/here", web=True, roots=(website,))
        == b"content"
    )
    assert (
        read(f"{website}/é b", web=True, roots=(website,))
        == read(f"{website}/%C3%A9%20b", web=True, roots=(website,))
        == b"quoted"
    )
    assert (
        read(f"{website}/large", web=True, roots=(website,))
        == read(f"{website}/stream", web=True, roots=(website,))
        == images.TOO_MANY_BYTES
    )
    assert read(f"{website}/gone", web=True, roots=(website,)) == places.MISSING_FILE
    for path in ("broken", "closed", "file", "ftp", "loop"):
        assert read(f"{website}/{path}", web=True, roots=(website,)) == places.UNREADABLE_FILE
    assert read(f"{website}/picture") == places.WEB_NOT_ALLOWED


def test_pictures_are_read_from_object_storage(bucket: str, server: int) -> None:
    pytest.importorskip("obstore")
    location(f"{bucket}/inner/a.jpg").write_bytes(b"content")
    location(f"{bucket}/large.jpg").write_bytes(bytes(1001))
    assert read(f"{bucket}/inner/a.jpg") == read("inner/a.jpg", root=bucket) == b"content"
    assert read(f"{bucket}/large.jpg") == images.TOO_MANY_BYTES
    assert read(f"{bucket}/none.jpg") == read(f"{bucket}/inner") == places.MISSING_FILE
    assert read("../inner/a.jpg", root=bucket) == places.OUTSIDE_ROOT
    assert read("s3://no-such-bucket-of-tests/a.jpg") == places.MISSING_FILE
    s3.ask(server, "/_fault", "PUT", b"denied")
    try:
        assert read(f"{bucket}/inner/a.jpg") == places.UNREADABLE_FILE
    finally:
        s3.ask(server, "/_fault", "PUT")


def test_a_process_with_too_many_open_files_is_a_passing_fault(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "a").write_bytes(b"content")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    opened = []
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open(tmp_path, os.O_RDONLY))
        with pytest.raises(TransientError, match="does not answer"):
            read(str(tmp_path / "a"))
    finally:
        for number in opened:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read(str(tmp_path / "a")) == b"content"


def test_a_column_of_pictures_may_be_a_struct_bytes_or_text() -> None:
    struct_of = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": b"a", "path": "x"}, None, {"bytes": None, "path": "y"}, {"bytes": b"", "path": " "}]
    expected = [places.Place(b"a", "x"), places.Place(None, None), places.Place(None, "y"), places.Place(b"", None)]
    column = pa.array(rows, struct_of)
    assert list(places.places(column)) == expected
    assert list(places.places(column.slice(1, 2))) == expected[1:3]
    assert list(places.places(pa.array([b"a", None]))) == [places.Place(b"a", None), places.Place(None, None)]
    assert list(places.places(pa.array(["a", ""]))) == [places.Place(None, "a"), places.Place(None, None)]
    assert list(places.places(pa.nulls(1))) == [places.Place(None, None)]
    for other in (pa.array([1]), pa.array([{"url": "a"}]), pa.array([["a"]])):
        with pytest.raises(InputError, match="the pictures are"):
            list(places.places(other))


def _processor(kind: str, **changes: object) -> dict[str, object]:
    half = [0.5, 0.5, 0.5]
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
        "resample": 3,
        "size": {"height": 32, "width": 32},
        **changes,
    }


_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_SMALL, "image_size": 32, "patch_size": 8}
_WORDS = {**_SMALL, "vocab_size": 50, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write small models with random weights, as transformers writes them."""
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = {
        "siglip": library.SiglipModel(library.SiglipConfig(text_config=_WORDS, vision_config=_VISION)),
        "clip": library.CLIPModel(library.CLIPConfig(text_config=_WORDS, vision_config=_VISION, projection_dim=24)),
        "vit": library.ViTModel(library.ViTConfig(**_VISION)),
        "vit-without-pooler": library.ViTModel(library.ViTConfig(**_VISION), add_pooling_layer=False),
        "resnet": library.ResNetModel(
            library.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
    }
    processors = {
        "siglip": _processor("Siglip"),
        "clip": _processor(
            "CLIP", size={"shortest_edge": 32}, do_center_crop=True, crop_size={"height": 32, "width": 32}
        ),
        "resnet": _processor("ConvNext", size={"shortest_edge": 32}, crop_pct=0.875),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.eval().save_pretrained(folder / name)
        text = json.dumps(processors.get(name, _processor("ViT")))
        (folder / name / "preprocessor_config.json").write_text(text)
    return {name: folder / name for name in made}


def settings(**changes: object) -> config.Encoder:
    return config.Encoder.model_validate({"field": "image", "batch": 3, **changes})


def opened(chosen: config.Encoder, root: Path | None = None):
    return open_encoder(KEY, chosen, fitted=None, root=root, offline=True, device=CPU)


def refusal(chosen: config.Encoder) -> str:
    with pytest.raises(InputError) as error:
        opened(chosen)
    message = str(error.value)
    assert message.startswith(KEY) and "\n" not in message
    return message


PICTURES = [noise(seed) for seed in range(6)] + [scene()]
FLAT = noise(6, 40, 40).resize((30, 3))  # its height may be taken for the number of channels


def column(pictures: list[Image.Image]) -> pa.Array:
    return pa.array([stored(picture, "PNG") for picture in pictures])


def _expected(folder: Path, name: str) -> np.ndarray:
    """Compute vectors with transformers alone, one picture at a time."""
    from transformers import AutoImageProcessor, AutoModel

    processor, model = (
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        AutoModel.from_pretrained(folder).eval(),
    )
    rows = []
    with torch.no_grad():
        for picture in PICTURES:
            values = processor(images=picture, return_tensors="pt")["pixel_values"]
            if name == "clip":
                vision = model.vision_model(pixel_values=values)
                rows.append(model.visual_projection(vision.pooler_output)[0])
            elif name == "siglip":
                rows.append(model.vision_model(pixel_values=values).pooler_output[0])
            elif name == "vit-without-pooler":
                rows.append(model(pixel_values=values).last_hidden_state[0].mean(0))
            else:
                rows.append(model(pixel_values=values).pooler_output[0].flatten())
    vectors = torch.stack(rows)
    return (vectors / vectors.norm(dim=1, keepdim=True)).numpy()


@pytest.mark.parametrize(
    ("name", "width"), [("siglip", 32), ("clip", 24), ("vit", 32), ("vit-without-pooler", 32), ("resnet", 16)]
)
def test_a_vision_model_gives_the_vectors_of_transformers(models: dict[str, Path], name: str, width: int) -> None:
    encoder = opened(settings(model=str(models[name])))
    vectors, reasons = encoder.encode(column(PICTURES))
    assert reasons == [None] * 7 and encoder.width == width
    np.testing.assert_allclose(vectors, _expected(models[name], name), atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    assert encoder.seconds > 0
    np.testing.assert_array_equal(encoder.encode(column(PICTURES)).vectors, vectors)
    narrow = opened(settings(model=str(models[name]), width=8, batch=1)).encode(column(PICTURES)).vectors
    cut = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(narrow, cut, atol=1e-5)


def test_bad_pictures_among_good_ones_have_reasons(models: dict[str, Path], tmp_path: Path) -> None:
    scene().save(tmp_path / "scene.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = scene().transpose(Image.Transpose.ROTATE_90)  # as the camera stores what must be turned back
    rows = [
        {"bytes": stored(scene(), "PNG"), "path": None},
        {"bytes": None, "path": "scene.png"},
        None,
        {"bytes": b"<html>", "path": "scene.png"},
        {"bytes": None, "path": "../scene.png"},
        {"bytes": None, "path": "https://127.0.0.1/a.jpg"},
        {"bytes": stored(turned, "TIFF", exif=exif), "path": None},
        {"bytes": stored(Image.new("RGB", (1, 1)), "PNG"), "path": None},
    ]
    encoder = opened(settings(model=str(models["siglip"])), root=tmp_path)
    vectors, reasons = encoder.encode(pa.array(rows))
    bad = [ABSENT, images.NOT_A_PICTURE, places.OUTSIDE_ROOT, places.WEB_NOT_ALLOWED]
    assert reasons == [None, None, *bad, None, images.TOO_SMALL]
    good = np.array([0, 1, 6])
    np.testing.assert_allclose(vectors[good], np.tile(vectors[0], (3, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.isin(np.arange(8), good), atol=1e-5)
    strict = opened(settings(model=str(models["siglip"]), max_pixels=60 * 40 - 1), root=tmp_path)
    assert strict.encode(pa.array(rows)).reasons[:2] == [images.TOO_MANY_PIXELS] * 2
    assert encoder.encode(pa.nulls(4)).reasons == [ABSENT] * 4
    assert encoder.encode(pa.array([], pa.binary())).vectors.shape == (0, 32)


def test_a_picture_of_three_rows_is_no_exception(models: dict[str, Path]) -> None:
    encoder = opened(settings(model=str(models["siglip"])))
    vectors, reasons = encoder.encode(column([FLAT, FLAT.resize((32, 32), Image.Resampling.BICUBIC)]))
    assert reasons == [None, None]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


def test_many_threads_decode_alike(models: dict[str, Path]) -> None:
    limits = {"max_bytes": BYTES, "max_pixels": PIXELS}
    encoder = opened(settings(model=str(models["siglip"]), batch=2, **limits))
    rows = pa.array([make() for make, _ in BAD.values()] + [stored(picture, "JPEG") for picture in PICTURES])
    whole = encoder.encode(rows)
    single = opened(settings(model=str(models["siglip"]), batch=64, **limits)).encode(rows)
    assert whole.reasons == single.reasons == [reason for _, reason in BAD.values()] + [None] * len(PICTURES)
    np.testing.assert_allclose(whole.vectors, single.vectors, atol=1e-5)


def test_the_identity_of_a_vision_model_is_that_of_its_files(models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def identity(folder: Path, **changes: object):
        return identity_of(KEY, settings(model=str(folder), **changes), fitted=None, offline=True)

    first = identity(models["vit"])
    assert first == opened(settings(model=str(models["vit"]))).identity
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in models["vit"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert identity(copy, batch=9, max_pixels=7) == first != identity(copy, width=8)
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] * (1 + 1e-6)}, copy / "model.safetensors", {"format": "pt"})
    assert identity(copy) != first


def test_a_model_that_cannot_encode_pictures_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert "33 is more than the 32 values" in refusal(settings(model=str(models["vit"]), width=33))
    assert "neither a local folder" in refusal(settings(model=str(tmp_path / "nothing")))
    assert "content.offline=false" in refusal(settings(model="adasid-tests/no-such-model"))
    weights = load_file(models["vit"] / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((models["vit"] / name).read_bytes())
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert "pickled weights" in refusal(settings(model=str(tmp_path)))
    (tmp_path / "pytorch_model.bin").unlink()
    dropped = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != dropped}, tmp_path / "model.safetensors")
    assert "no weights for" in refusal(settings(model=str(tmp_path)))
    (tmp_path / "preprocessor_config.json").unlink()
    assert "cannot be loaded as a vision model" in refusal(settings(model=str(tmp_path)))
