"""Font faces that are installed on the system: their families, and the characters that each face draws."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont

from .drawing import render_ink

#: The font families of each split. The test split has three styles (regular script, sans serif, serif), in designs that
#: are not trained on. Other families of the system are not used: they may be copies of these under another name.
FAMILIES = {
    "train": ("LXGW WenKai", "Noto Sans CJK", "Noto Serif CJK", "TW-Sung", "Unifont", "WenQuanYi Micro Hei"),
    "val": ("HanaMin",),
    "test": ("BabelStone Han", "TW-Kai", "WenQuanYi Zen Hei"),
}

#: The Debian package of each family.
PACKAGES = {
    "BabelStone Han": "fonts-babelstone-han",
    "HanaMin": "fonts-hanazono",
    "LXGW WenKai": "fonts-lxgw-wenkai",
    "Noto Sans CJK": "fonts-noto-cjk",
    "Noto Serif CJK": "fonts-noto-cjk",
    "TW-Kai": "fonts-cns11643-kai",
    "TW-Sung": "fonts-cns11643-sung",
    "Unifont": "fonts-unifont",
    "WenQuanYi Micro Hei": "fonts-wqy-microhei",
    "WenQuanYi Zen Hei": "fonts-wqy-zenhei",
}

WEIGHTS = "Thin|ExtraLight|Light|DemiLight|Regular|Medium|SemiBold|Bold|Black|Heavy"
REGIONS = "JP|KR|SC|TC|HK|CN|TW"
#: The parts of a face's name that do not change its design.
STYLE_SUFFIX = re.compile(rf"[ -](?:Mono|Sharp|{WEIGHTS}|{REGIONS})\b|(?<=[a-z])[A-Z]$")

UNASSIGNED = "\U0010ffff\ufdd0\u0378"  # two noncharacters and an unassigned code point
MAX_LOOKALIKES = 8  # if more characters than this look the same in a face, their image is a placeholder


@dataclass(frozen=True, order=True)
class Face:
    """One font face. The order of faces does not depend on where their files are."""

    family: str
    name: str
    style: str
    index: int  # in the file
    file: Path

    def open(self, em: int) -> ImageFont.FreeTypeFont:
        """Open the face at `em` pixels per font unit square.

        The basic layout engine is used: shaping changes nothing here, and is not available everywhere.
        """
        return ImageFont.truetype(str(self.file), em, self.index, layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True)
class Coverage:
    """The characters that a face draws."""

    present: list[bool]  # for each character
    num_blank: int
    num_boxes: int
    digest: str  # equal for faces whose images are all equal


def family_of(name: str) -> str:
    """Return a face's name without weight, region, width and part letter.

    For example, "Noto Sans Mono CJK JP" is of the family "Noto Sans CJK".
    """
    return STYLE_SUFFIX.sub("", name)


def system_fonts() -> list[Path]:
    """Return the font files that are installed, each once."""
    # Imported here because it takes half a second, and worker processes do not need it.
    from matplotlib.font_manager import findSystemFonts

    return sorted(file for file in {Path(name).resolve() for name in findSystemFonts()} if file.is_file())


def find_faces(files: Iterable[Path], families: Iterable[str]) -> list[Face]:
    """Return all faces of these families in the files, sorted. Files that are not fonts are skipped."""
    wanted, faces = set(families), []
    for file in files:
        for index in range(256):
            try:
                font = ImageFont.truetype(str(file), 16, index)
            except OSError:  # not a font, or no more faces in the file
                break
            name, style = (text or "" for text in font.getname())
            if family_of(name) in wanted:
                faces.append(Face(family_of(name), name, style, index, file))
    return sorted(faces)


def check_coverage(face: Face, characters: Sequence[str], em: int) -> Coverage:
    """Draw all characters and check each image, as fonts list characters that they draw blank or as a box.

    An image is a box if it equals the image of an unassigned character, or if more than `MAX_LOOKALIKES` different
    characters share it.
    """
    font = face.open(em)
    images = [_image_digest(font, character) for character in characters]
    missing = {_image_digest(font, character) for character in UNASSIGNED}
    frequency = Counter(images)
    blank = [image == b"" for image in images]
    boxes = [bool(image) and (image in missing or frequency[image] > MAX_LOOKALIKES) for image in images]
    present = [not (a or b) for a, b in zip(blank, boxes, strict=True)]
    return Coverage(present, sum(blank), sum(boxes), hashlib.sha256(b"".join(images)).hexdigest())


def _image_digest(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """Return a checksum of the character's image; an empty one for a glyph that is blank or damaged."""
    try:
        image = render_ink(font, character)
    except OSError:  # as FreeType's errors are raised
        return b""
    if image is None:
        return b""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
