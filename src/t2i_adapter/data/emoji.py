"""Pairs of Fluent Emoji: SVG icons are read from their package and rendered; OpenCV finds the outlines.

The icons come from the npm package @iconify-json/fluent-emoji-flat (MIT, Microsoft Corporation): the .tgz that
`npm pack` writes, its folder, or its icons.json alone. Rendering needs the extra `[emoji]`.
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
_MAX_BYTES = 64 * 2**20  # of icons.json; the real one has 6 MB
_MAX_UNPACKED = 2**29  # bytes of the archive that are read
_MAX_SIDE = 4096  # in an icon's coordinates
_MAX_BODY = 2**18  # characters of SVG; the longest emoji has 13,000
_CANNY = (100, 200)
_OUTLINE_COLORS = 8  # flat art has few colours; their boundaries are the outlines
_TONES = re.compile(r"(-(medium-light|medium-dark|light|medium|dark))+$")
_UNSAFE = re.compile(
    r"<[!?]|<\s*/?\s*(image|feImage|script|style|foreignObject|svg)\b|href\s*=\s*[\"'](?!\s*#)|url\((?!\s*[\"']?#)",
    re.I,
)
"""SVG that defines entities, names files, runs code, or refers to another document."""
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Icon:
    """One emoji: its name in the package ("red-apple") and its SVG document."""

    name: str
    svg: str

    @property
    def words(self) -> str:
        """ "red apple"."""
        return self.name.replace("-", " ")

    @property
    def is_toned(self) -> bool:
        """Whether the name ends in a skin tone."""
        return bool(_TONES.search(self.name))

    @property
    def split(self) -> str:
        """ "test" for a fixed tenth of the names, chosen by a hash of the name, so it is equal in all versions of the
        package.

        All skin tones of an emoji are in one split: no test picture is a recoloured training picture.
        """
        digest = hashlib.sha256(_TONES.sub("", self.name).encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


def read_icons(package: Path) -> list[Icon]:
    """All icons of a .tgz, a package folder or an icons.json, sorted by name. Raises UserError."""
    source = f"{package}: {_ICONS}"
    try:
        data = parse_json(_read_file(package, _ICONS))
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}.") from None
    icons = data.get("icons") if isinstance(data, dict) else None
    if not isinstance(icons, dict) or not icons:
        raise UserError(f"{source} has no icons; the format is Iconify's: {{'icons': {{name: {{'body': ...}}}}}}.")
    sides = (data.get("width", data.get("height", 16)), data.get("height", 16))
    return [_icon(name, icons[name], sides, source) for name in sorted(icons)]


def read_categories(package: Path) -> dict[str, str]:
    """Name -> category of each icon, in words ("food and drink"); empty if the package has no categories."""
    try:
        groups = parse_json(_read_file(package, _METADATA)).get("categories", {})
        return {name: group.lower().replace("&", "and") for group, names in groups.items() for name in names}
    except (UserError, ValueError, AttributeError, TypeError):
        return {}  # categories only add words to captions


def caption(icon: Icon, background: str | None = "white") -> str:
    """ "flat emoji of a red apple on a white background"; ends after "apple" if `background` is None."""
    article = "an" if icon.words[0] in "aeiou" else "a"
    return f"flat emoji of {article} {icon.words}" + (f" on a {SPACED[background]} background" if background else "")


def render(icon: Icon, size: int, background: str | None = "white") -> Image.Image:
    """The icon at size x size pixels: RGB on a CSS colour, or RGBA if `background` is None. Raises UserError."""
    try:
        png = _resvg().svg_to_bytes(svg_string=icon.svg, width=size, height=size)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((size, size))
    except ValueError as error:
        raise UserError(f"icon {icon.name!r} cannot be rendered: {error}.", kind="unreadable") from None
    if background is None:
        return picture
    ground = Image.new("RGBA", picture.size, COLORS[background])
    return Image.alpha_composite(ground, picture).convert("RGB")


def condition(picture: Image.Image, kind: str) -> Image.Image:
    """The outlines of an RGB picture (H,W), as an RGB picture (H,W), white on black.

    `kind`: "outline" marks the boundaries between flat colours, one pixel wide; "canny" is OpenCV's Canny.
    """
    if kind not in CONDITIONS:
        raise UserError(f"unknown condition {kind!r}; allowed: {', '.join(CONDITIONS)}.")
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
    """Writes a split's emoji, all or `num` spread evenly over the names, to the image folder out/split; returns it.

    The layout is that of `shapes.write_dataset`, with the column `name` (the emoji's) instead of shapes and scene.
    Raises UserError.
    """
    _check_write(split, condition, background)
    icons = [icon for icon in read_icons(package) if icon.split == split]
    num = min(num or len(icons), len(icons))
    icons = [icons[i * len(icons) // num] for i in range(num)]
    folder = out / split
    if (folder / "metadata.jsonl").exists() and not overwrite:
        raise UserError(f"{folder} already holds a dataset; name another folder, or allow overwriting.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_write_sample(folder, i, icon, size, condition, background) for i, icon in enumerate(icons)]
    # The table is written last: a folder that has one is complete.
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
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
            raise UserError(f"unknown {what} {value!r}; allowed: {shown}.")


def _color_boundaries(picture: Image.Image) -> np.ndarray:
    """(H,W) uint8: 255 at pixels whose colour class differs from the pixel to the right or below."""
    classes = np.asarray(picture.quantize(_OUTLINE_COLORS, dither=Image.Dither.NONE))
    # An antialiased edge is a class of its own, a pixel wide; the median replaces it by a neighbour's class.
    classes = cv2.medianBlur(np.ascontiguousarray(classes), 3)
    lines = np.zeros(classes.shape, np.uint8)
    lines[:, :-1][classes[:, :-1] != classes[:, 1:]] = 255
    lines[:-1][classes[:-1] != classes[1:]] = 255
    return lines


def _read_file(package: Path, name: str) -> bytes:
    """One file of the package, which is an archive, a folder, or an icons.json with other files beside it.

    Raises UserError.
    """
    if package.suffix == ".json":
        package = package.parent if name != _ICONS else package
    if package.is_dir():
        package = package / name
    if not package.is_file():
        raise UserError(f"{package}: no such file; name the .tgz of `npm pack @iconify-json/fluent-emoji-flat`.")
    if package.suffix == ".json":
        return package.read_bytes()
    try:
        return _member(package, name)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{package} is neither an icons.json nor a tar archive: {error}.") from None


def _member(archive: Path, name: str) -> bytes:
    """The bytes of package/`name` in the archive. No member's name is used as a path on the disk. Raises UserError."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.offset_data + member.size > _MAX_UNPACKED:
                raise UserError(
                    f"{archive}: unpacks to more than {_MAX_UNPACKED:,} bytes, too large for an icon package."
                )
            if member.name in (f"package/{name}", name) and member.isreg() and member.size <= _MAX_BYTES:
                file = tar.extractfile(member)
                assert file is not None  # it is a regular file
                return file.read()
    plain = f"{archive.name.removesuffix('.gz').removesuffix('.tgz').removesuffix('.tar')}.tar"
    raise UserError(
        f"{archive}: there is no {name} in it, so it is no emoji package. Unpack an archive of pairs before you name "
        f"it: gzip -dc {archive.name} > {plain}"
    )


def _icon(name: str, entry: Any, sides: tuple[int, int], source: str) -> Icon:
    body = entry.get("body") if isinstance(entry, dict) else None
    if not isinstance(body, str) or not _NAME.fullmatch(name):
        raise UserError(f"{source}: icon {name!r} is not of the form {{'body': '<svg content>'}} with a plain name.")
    width, height = entry.get("width", sides[0]), entry.get("height", sides[1])
    if not all(type(side) in (int, float) and 0 < side <= _MAX_SIDE for side in (width, height)):
        raise UserError(f"{source}: icon {name!r} is {width!r} x {height!r}; allowed are sides up to {_MAX_SIDE}.")
    if len(body) > _MAX_BODY or _UNSAFE.search(body):
        raise UserError(f"{source}: icon {name!r} is longer than {_MAX_BODY:,} characters, or holds more than shapes.")
    return Icon(name, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>')


def _resvg() -> ModuleType:
    try:
        import resvg_py
    except ImportError:
        raise UserError("rendering emoji needs an extra: pip install 'sdxl-t2i-adapter[emoji]'") from None
    return resvg_py
