"""Type faces of the system, in families of one design, and the characters that each can really draw."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont

from .drawing import ink

#: Families by what their faces are for: three styles (regular script, sans serif, serif) are tested on designs of which
#: no image is trained on. Others of the system are not used: they may be copies of these under another name.
FAMILIES = {
    "train": ("LXGW WenKai", "Noto Sans CJK", "Noto Serif CJK", "TW-Sung", "Unifont", "WenQuanYi Micro Hei"),
    "val": ("HanaMin",),
    "test": ("BabelStone Han", "TW-Kai", "WenQuanYi Zen Hei"),
}

#: Debian's packages that bring them.
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
SAME_DESIGN = re.compile(rf"[ -](?:Mono|Sharp|{WEIGHTS}|{REGIONS})\b|(?<=[a-z])[A-Z]$")

ABSENT = "\U0010ffff\ufdd0\u0378"  # two that never will be characters, one that is none yet
SHARED = 8  # characters that look the same in one face, at most; more than that is a placeholder


@dataclass(frozen=True, order=True)
class Face:
    """One face; their order is the same wherever the files are."""

    family: str
    name: str
    style: str
    index: int  # in the file
    file: Path

    def open(self, em: int) -> ImageFont.FreeTypeFont:
        """At `em` pixels a font unit square; the basic layout, as shaping changes nothing here and is not everywhere."""
        return ImageFont.truetype(str(self.file), em, self.index, layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True)
class Survey:
    """Which characters a face draws: present [n], counts of the others, and what is equal for faces that draw the same."""

    present: list[bool]
    blank: int
    boxes: int
    digest: str


def family_of(name: str) -> str:
    """A face's name without weights, regions, widths, and the letter of a part: 'Noto Sans CJK' of 'Noto Sans Mono CJK JP'."""
    return SAME_DESIGN.sub("", name)


def system_fonts() -> list[Path]:
    """Font files that are installed, each once."""
    # Here, as processes that draw have no need of it and it takes half a second.
    from matplotlib.font_manager import findSystemFonts

    return sorted(file for file in {Path(name).resolve() for name in findSystemFonts()} if file.is_file())


def find_faces(files: Iterable[Path], families: Iterable[str]) -> list[Face]:
    """All faces of these families in the files, in order. A file that is no font is passed over."""
    wanted, found = set(families), []
    for file in files:
        for index in range(256):
            try:
                font = ImageFont.truetype(str(file), 16, index)
            except OSError:  # no font, or no more faces in it
                break
            name, style = (said or "" for said in font.getname())
            if family_of(name) in wanted:
                found.append(Face(family_of(name), name, style, index, file))
    return sorted(found)


def survey(face: Face, characters: Sequence[str], em: int) -> Survey:
    """Draw all characters and look at them: fonts list characters that they draw as nothing, or as a box.

    A box is what also stands for a character that cannot be there, or for more than `SHARED` different ones.
    """
    font = face.open(em)
    drawn = [_look(font, character) for character in characters]
    absent = {_look(font, character) for character in ABSENT}
    times = Counter(drawn)
    blank = [look == b"" for look in drawn]
    boxes = [bool(look) and (look in absent or times[look] > SHARED) for look in drawn]
    present = [not (a or b) for a, b in zip(blank, boxes, strict=True)]
    return Survey(present, sum(blank), sum(boxes), hashlib.sha256(b"".join(drawn)).hexdigest())


def _look(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    image = ink(font, character)
    if image is None:
        return b""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
