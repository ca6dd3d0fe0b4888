"""Fluent Emoji as pictures drawn by others: SVG icons with names, rendered, with outlines found by OpenCV.

The icons come from the npm package @iconify-json/fluent-emoji-flat (MIT, Microsoft Corporation), as the .tgz that
`npm pack` leaves, its folder, or its icons.json alone. Rendering needs the extra `[emoji]`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import parse_json
from .shapes import COLORS, SPACED

CONDITIONS = ("outline", "canny")
SPLITS = ("train", "test")

_ICONS, _METADATA = "icons.json", "metadata.json"
_MAX_BYTES = 64 * 2**20  # the whole set is 6 MB of JSON; more is not an icon set
_MAX_UNPACKED = 2**29
_MAX_SIDE = 4096  # of an icon's own coordinates
_MAX_BODY = 2**18  # letters of SVG; the longest emoji has 13,000
_CANNY = (100, 200)
_OUTLINE_COLORS = 8  # flat art has few colours; the boundaries between them are its outlines
_TONES = re.compile(r"(-(medium-light|medium-dark|light|medium|dark))+$")
_REACHING = re.compile(
    r"<[!?]|<\s*/?\s*(image|feImage|script|style|foreignObject|svg)\b|href\s*=\s*[\"'](?!\s*#)|url\((?!\s*[\"']?#)",
    re.I,
)
"""SVG that defines entities, names files, runs, or leaves its own document."""
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Icon:
    """One emoji: its name as in the package ("red-apple") and a whole SVG document."""

    name: str
    svg: str

    @property
    def words(self) -> str:
        """ "red apple"."""
        return self.name.replace("-", " ")

    @property
    def is_toned(self) -> bool:
        """Whether this is one of the skin tones of an emoji."""
        return bool(_TONES.search(self.name))

    @property
    def split(self) -> str:
        """ "test" for a fixed tenth of the names, by a hash of the name; the same in every version of the package.

        The skin tones of one emoji go together: a test picture is no recoloured training picture.
        """
        digest = hashlib.sha256(_TONES.sub("", self.name).encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


def read_icons(package: Path) -> list[Icon]:
    """All icons of a .tgz, a package folder or an icons.json, sorted by name. Nothing else of the package is read."""
    source = f"{package}: {_ICONS}"
    try:
        data = parse_json(_read_file(package, _ICONS))
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}") from None
    icons = data.get("icons") if isinstance(data, dict) else None
    if not isinstance(icons, dict) or not icons:
        raise UserError(
            f"{source} has no icons; expected the format of Iconify: {{'icons': {{name: {{'body': ...}}}}}}"
        )
    sides = (data.get("width", data.get("height", 16)), data.get("height", 16))
    return [_icon(name, icons[name], sides, source) for name in sorted(icons)]


def read_categories(package: Path) -> dict[str, str]:
    """The category of each icon ("Food & Drink" -> "food and drink"), by name; none where the package has no table."""
    try:
        groups = parse_json(_read_file(package, _METADATA)).get("categories", {})
        return {name: group.lower().replace("&", "and") for group, names in groups.items() for name in names}
    except (UserError, ValueError, AttributeError, TypeError):
        return {}  # categories only add words to captions


def caption(icon: Icon, background: str | None = "white") -> str:
    """ "flat emoji of a red apple on a white background"; without a background's name, as far as that."""
    article = "an" if icon.words[0] in "aeiou" else "a"
    return f"flat emoji of {article} {icon.words}" + (f" on a {SPACED[background]} background" if background else "")


def render(icon: Icon, size: int, background: str | None = "white") -> Image.Image:
    """The icon at size x size: RGB on a CSS colour, or RGBA where `background` is None."""
    try:
        png = _resvg().svg_to_bytes(svg_string=icon.svg, width=size, height=size)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((size, size))
    except ValueError as error:
        raise UserError(f"icon {icon.name!r} cannot be drawn: {error}") from None
    if background is None:
        return picture
    ground = Image.new("RGBA", picture.size, COLORS[background])
    return Image.alpha_composite(ground, picture).convert("RGB")


def condition(picture: Image.Image, kind: str) -> Image.Image:
    """Outlines of an RGB picture, white on black, RGB, of the same size.

    "outline": the boundaries between its flat colours, one pixel wide; "canny": OpenCV's Canny.
    """
    if kind not in CONDITIONS:
        raise UserError(f"unknown condition {kind!r}; allowed: {', '.join(CONDITIONS)}")
    array = np.asarray(picture)
    lines = cv2.Canny(array, *_CANNY) if kind == "canny" else _color_boundaries(picture)
    return Image.fromarray(np.repeat(lines[..., None], 3, axis=2))


def write_dataset(
    out: Path,
    *,
    package: Path,
    num: int | None = None,
    split: str = "train",
    size: int = 128,
    condition: str = "outline",
    background: str = "white",
    overwrite: bool = False,
) -> Path:
    """Write a split's emoji to out/split as a `datasets` image folder, all or `num` spread evenly; returns that folder.

    The layout is that of `shapes.write_dataset`, with the emoji's name in the place of the scene.
    """
    _check_write(split, condition, background)
    icons = [icon for icon in read_icons(package) if icon.split == split]
    num = min(num or len(icons), len(icons))
    icons = [icons[i * len(icons) // num] for i in range(num)]
    folder = out / split
    if (folder / "metadata.jsonl").exists() and not overwrite:
        raise UserError(f"{folder} already holds a data set; choose another folder or allow to overwrite it")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_write_sample(folder, i, icon, size, condition, background) for i, icon in enumerate(icons)]
    # The table comes last: a folder with one is complete.
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _write_sample(folder: Path, number: int, icon: Icon, size: int, kind: str, background: str) -> dict[str, str]:
    name, condition_name = f"{number:05d}.png", f"{number:05d}_cond.png"
    picture = render(icon, size, background)
    picture.save(folder / name, optimize=True)
    condition(picture, kind).save(folder / condition_name, optimize=True)
    return {
        "file_name": name,
        "conditioning_image_file_name": condition_name,
        "text": caption(icon, background),
        "name": icon.name,
    }


def _check_write(split: str, kind: str, background: str) -> None:
    for what, value, allowed in (
        ("split", split, SPLITS),
        ("condition", kind, CONDITIONS),
        ("background", background, tuple(COLORS)),
    ):
        if value not in allowed:
            shown = ", ".join(allowed[:8]) + (", ..." if len(allowed) > 8 else "")
            raise UserError(f"unknown {what} {value!r}; allowed: {shown}")


def _color_boundaries(picture: Image.Image) -> np.ndarray:
    """(H,W) uint8: 255 where the colour class differs from that of the pixel to the right or below."""
    classes = np.asarray(picture.quantize(_OUTLINE_COLORS, dither=Image.Dither.NONE))
    # Antialiased rims are a class of their own, a pixel wide; the median gives them to a neighbour.
    classes = cv2.medianBlur(np.ascontiguousarray(classes), 3)
    lines = np.zeros(classes.shape, np.uint8)
    lines[:, :-1][classes[:, :-1] != classes[:, 1:]] = 255
    lines[:-1][classes[:-1] != classes[1:]] = 255
    return lines


def _read_file(package: Path, name: str) -> bytes:
    """One file of the package; `package` may also be that file itself, or an icons.json with others beside it."""
    if package.suffix == ".json":
        package = package.parent if name != _ICONS else package
    if package.is_dir():
        package = package / name
    if not package.is_file():
        raise UserError(f"{package}: no such file; give the .tgz of `npm pack @iconify-json/fluent-emoji-flat`")
    if package.suffix == ".json":
        return package.read_bytes()
    try:
        return _member(package, name)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{package} is neither an icons.json nor a tar archive: {error}") from None


def _member(archive: Path, name: str) -> bytes:
    """package/`name` out of the archive, into memory: no member's path is ever used as a path on disk."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.offset_data + member.size > _MAX_UNPACKED:
                raise UserError(f"{archive}: unpacks to more than {_MAX_UNPACKED:,} bytes; that is no icon set")
            if member.name in (f"package/{name}", name) and member.isreg() and member.size <= _MAX_BYTES:
                file = tar.extractfile(member)
                assert file is not None  # a regular file has content
                return file.read()
    raise UserError(f"{archive} has no {name} in it")


def _icon(name: str, entry: Any, sides: tuple[int, int], source: str) -> Icon:
    body = entry.get("body") if isinstance(entry, dict) else None
    if not isinstance(body, str) or not _NAME.fullmatch(name):
        raise UserError(f"{source}: icon {name!r} is not of the form {{'body': '<svg content>'}} under a plain name")
    width, height = entry.get("width", sides[0]), entry.get("height", sides[1])
    if not all(type(side) in (int, float) and 0 < side <= _MAX_SIDE for side in (width, height)):
        raise UserError(f"{source}: icon {name!r} is {width!r} x {height!r}; allowed are sides up to {_MAX_SIDE}")
    if len(body) > _MAX_BODY or _REACHING.search(body):
        raise UserError(f"{source}: icon {name!r} is longer than {_MAX_BODY:,} letters, or not of shapes alone")
    return Icon(name, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>')


def _resvg() -> ModuleType:
    try:
        import resvg_py
    except ImportError:
        raise UserError("drawing emoji needs the extra: pip install 'sdxl-t2i-adapter[emoji]'") from None
    return resvg_py
