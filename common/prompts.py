"""Prompt files. The suffix decides what a file is:

.txt, none      one prompt per line; surrounding spaces are removed
.jsonl, .ndjson one JSON object per line, {"prompt": "…", "image": "photo.jpg"}, or one string
.json           a list of such objects or strings
.csv, .tsv      a table whose header names a prompt column; cells may be quoted

A prompt's key or column is one of TEXT_KEYS, its image's one of IMAGE_KEYS; others are ignored.
Images are relative to the file. Prompts are data: none is read as a path or a flag.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from common import files
from common.files import abbreviate
from common.video import decode_image

TEXT_KEYS = ("prompt", "prompt_en", "caption", "text")  # prompt_en: VBench's
IMAGE_KEYS = ("image", "image_path")
EXAMPLE = '{"prompt": "…", "image": "photo.jpg"}'

# The first line of a JSON file: brackets alone, an object, or strings in a list. A prompt such as
# `["Stop" sign] a road` ends otherwise.
JSON_LINE = re.compile(r'[\[{\s]+$|\[?\s*{\s*"|\[\s*".*[\],]$')


class Prompt(NamedTuple):
    """What a video is made from: a text and, for an image-to-video model, its first frame."""
    text: str
    image: Path | None = None


def digest_texts(prompts: list[Prompt]) -> str:
    """SHA-256 over the texts of prompts and the bytes of their images, each read once."""
    digests = {image: hashlib.sha256(image.read_bytes()).hexdigest()
               for image in dict.fromkeys(image for _, image in prompts)
               if image is not None and image.is_file()}
    lines = [[text, digests.get(image)] for text, image in prompts]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def heldout_prompts(weights: str | Path, images: bool) -> Path:
    """Where a weight folder of the small world keeps its held-out captions."""
    return Path(weights) / f"prompts_heldout.{'jsonl' if images else 'txt'}"


def read_prompts(path: str | Path, images: bool = False) -> list[Prompt]:
    """The prompts of a UTF-8 file; blank lines are ignored.

    images: whether the model starts from an image. Then rank 0 decodes every image as a check.
    Raises FileNotFoundError if the file is missing; ValueError naming the line or entry that cannot
    be read, has no prompt or several, or whose image is missing, broken or not expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file; expected one prompt per line, in "
                                "UTF-8")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: expected prompts as .txt, .jsonl, .json, .csv or .tsv, got a "
                         f"{path.suffix} file: convert it")
    text = files.read_text(path).removeprefix("\ufeff").replace("\r\n", "\n")
    prompts, places = [], {}
    try:
        for place, entry in reader(text):
            prompts.append(prompt := to_prompt(entry, place, path.parent))
            places.setdefault(prompt.image, place)
            if images != (prompt.image is not None):
                needs = f"starts from one: give lines {EXAMPLE} in a .jsonl file"
                raise ValueError(f'{place} has {"no" if images else "an"} "image"; the preset\'s '
                                 f"model {needs if images else 'takes none'}")
        if not prompts:
            raise ValueError("got an empty prompt file; expected one prompt per line")
        if images and os.environ.get("RANK", "0") == "0":
            check_images(places)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return prompts


# ------------------------------------------------------ forms of a file: (place, entry) of each

def read_text(text: str) -> Iterator[tuple[str, str]]:
    """One prompt per line. Raises ValueError if the first one is JSON or the header of a table."""
    lines = [(f"line {i}", s) for i, line in enumerate(text.split("\n"), 1) if (s := line.strip())]
    for place, line in lines[:1]:
        names = [name.strip(' "') for name in re.split("[,;\t]", line.lower())]
        is_header = all(map(str.isidentifier, names)) and not set(names).isdisjoint(TEXT_KEYS)
        if JSON_LINE.match(line) or is_header:
            raise ValueError(f"{place}: expected one prompt per line, got "
                             f"{'the header of a table' if is_header else 'JSON'}, {line:.80}: "
                             f"rename the file to {'.csv or .tsv' if is_header else '.json(l)'}")
    yield from lines


def read_json_lines(text: str) -> Iterator[tuple[str, Any]]:
    """One JSON object or string per line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", parse(line, f"line {number}")


def read_json(text: str) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON list."""
    entries = parse(text, "the file")
    if not isinstance(entries, list):
        raise ValueError(f"expected a JSON list of prompts, got {abbreviate(entries)}")
    for number, entry in enumerate(entries, 1):
        yield f"entry {number}", entry


def parse(text: str, place: str) -> Any:
    """The value of JSON text. Raises ValueError naming the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{place} is not JSON ({e}); expected {EXAMPLE} or a string per "
                         "prompt: correct it, or give one prompt per line in a .txt file") from e


def read_table(text: str, delimiter: str = ",") -> Iterator[tuple[str, dict]]:
    """The rows of a table by the names in its header; rows of empty cells are skipped."""
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
        for keys, least in ((TEXT_KEYS, 1), (IMAGE_KEYS, 0)):
            if not least <= sum(name in keys for name in names) <= 1:
                raise ValueError(f"expected a header with one of {', '.join(keys)}, once, got "
                                 f"{abbreviate(names)}: rename the columns")
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"line {rows.line_num}: expected {len(names)} cells, as the header"
                                 f" has: put a prompt with {delimiter!r} in it into quotes")
            if any(row.values()):
                yield f"line {rows.line_num}", row
    except csv.Error as e:
        raise ValueError(f"line {rows.line_num + 1} is not a row of a table ({e}): quote a cell "
                         'that contains quotes, and double those: "say ""hi"""') from e


READERS = {"": read_text, ".txt": read_text, ".jsonl": read_json_lines, ".ndjson": read_json_lines,
           ".json": read_json, ".csv": read_table, ".tsv": lambda text: read_table(text, "\t")}


# ------------------------------------------------------------------------------------ one prompt

def to_prompt(entry: Any, place: str, folder: Path) -> Prompt:
    """The prompt in a string or an object. Raises ValueError naming the place."""
    named = {"prompt": entry} if isinstance(entry, str) else entry
    pairs = [(name.strip().lower(), value) for name, value in named.items()
             if value is not None and str(value).strip()] if isinstance(named, dict) else []
    texts = [value for name, value in pairs if name in TEXT_KEYS]
    files = [value for name, value in pairs if name in IMAGE_KEYS]
    values = [*texts, *files]
    if len(texts) != 1 or len(files) > 1 or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{place}: expected one prompt and at most one image, as {EXAMPLE}, got "
                         f"{abbreviate(entry)}")
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for value in values for c in value):
        raise ValueError(f"{place} is not UTF-8 text: {abbreviate(entry)} contains a NUL or half "
                         "of a surrogate pair: remove it")
    return Prompt(texts[0].strip(), folder / files[0] if files else None)


def check_images(places: dict[Path, str]) -> None:
    """Decode each image. Raises ValueError naming the place of the first one that is broken."""
    def check(image: Path, place: str) -> None:
        try:
            decode_image(image)
        except (FileNotFoundError, ValueError) as e:
            raise ValueError(f"{place}: {e}") from e

    with ThreadPoolExecutor(8) as pool:  # PIL releases the interpreter's lock
        list(pool.map(check, places, places.values()))
