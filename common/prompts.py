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

from common.files import abbreviate, parse_json, read_text
from common.names import fingerprint, fingerprint_files
from common.video import decode_image

TEXT_KEYS = ("prompt", "prompt_en", "caption", "text")  # prompt_en: VBench's
IMAGE_KEYS = ("image", "image_path")
LARGEST = 1 << 30  # bytes of a prompt file: 100,000 long captions have 80 MB
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
    digests = {image: image and hashlib.sha256(image.read_bytes()).hexdigest()
               for image in {image for _, image in prompts}}
    lines = [[text, digests[image]] for text, image in prompts]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def fingerprints(weights: str | Path, prompts: list[Prompt]) -> dict[str, str]:
    """Fingerprints of the files that the teacher's latents are made from."""
    return {"teacher": fingerprint(weights), "encoders": fingerprint_files(weights),
            "prompts": digest_texts(prompts)}


def heldout_prompts(weights: str | Path, images: bool) -> Path:
    """Where a weight folder of the small world keeps its held-out captions."""
    return Path(weights) / f"prompts_heldout.{'jsonl' if images else 'txt'}"


def read_prompts(path: str | Path, images: bool = False) -> list[Prompt]:
    """The prompts of a UTF-8 file; blank lines are ignored.

    images: whether the model starts from an image. Then rank 0 decodes every image as a check.
    Raises FileNotFoundError if the file is missing; ValueError naming the line or entry that cannot
    be read, has no prompt or several, or lacks an image, and an image that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: expected .txt, .jsonl, .json, .csv or .tsv: convert the file")
    text = read_text(path, LARGEST).removeprefix("\ufeff").replace("\r\n", "\n")
    try:
        entries = READERS[path.suffix.lower()](text)
        prompts = {place: to_prompt(entry, place, path.parent) for place, entry in entries}
        for place, prompt in prompts.items():
            if images != (prompt.image is not None):
                needs = f"starts from one: give lines {EXAMPLE} in a .jsonl file"
                raise ValueError(f'{place} has {"no" if images else "an"} "image"; the preset\'s '
                                 f"model {needs if images else 'takes none'}")
        if not prompts:
            raise ValueError("got an empty prompt file; expected one prompt per line")
        if images and os.environ.get("RANK", "0") == "0":
            with ThreadPoolExecutor(8) as pool:  # PIL releases the interpreter's lock
                list(pool.map(lambda image: decode_image(image).shape,  # no pixels are kept
                              {prompt.image: None for prompt in prompts.values()}))
    except (ValueError, OSError) as e:
        raise ValueError(f"{path}: {e}") from e
    return list(prompts.values())


def to_prompt(entry: str | dict, place: str, folder: Path) -> Prompt:
    """The prompt in a string or an object. Raises ValueError naming the place."""
    values = {"prompt": entry} if isinstance(entry, str) else entry
    texts, images = ([value for name, value in values.items() if name.strip().lower() in keys
                      and (value.strip() if isinstance(value, str) else value is not None)]
                     for keys in (TEXT_KEYS, IMAGE_KEYS))
    if len(texts) != 1 or len(images) > 1 or not all(isinstance(x, str) for x in texts + images):
        raise ValueError(f"{place}: expected one prompt and at most one image, as {EXAMPLE}, got "
                         f"{abbreviate(entry)}")
    if re.search("[\0\ud800-\udfff]", "".join(texts + images)):
        raise ValueError(f"{place} is not UTF-8 text: remove NUL or \\ud… in {abbreviate(entry)}")
    return Prompt(texts[0].strip(), folder / images[0] if images else None)


# ------------------------------------------------------ forms of a file: (place, entry) of each

def text_prompts(text: str) -> Iterator[tuple[str, str]]:
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


def json_line_prompts(text: str) -> Iterator[tuple[str, Any]]:
    """One JSON object or string per line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"line {number}"
            yield place, parse_json(line, place, dict | str, f"give {EXAMPLE} or a string")


def json_prompts(text: str) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON list."""
    entries = parse_json(text, "the file", [dict | str], f"give a list of {EXAMPLE} or strings")
    yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))


def table_prompts(text: str, delimiter: str = ",") -> Iterator[tuple[str, dict]]:
    """The rows of a table by the names in its header; rows of empty cells are skipped."""
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for name in TEXT_KEYS + IMAGE_KEYS:
            if (rows.fieldnames or []).count(name) > 1:
                raise ValueError(f"line 1: expected one column '{name}', got several: rename some")
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"line {rows.line_num}: expected {len(rows.fieldnames)} cells, as "
                                 f"the header has, with {delimiter!r} between them: quote a prompt "
                                 "that contains it")
            if any(row.values()):
                yield f"line {rows.line_num}", row
    except csv.Error as e:
        raise ValueError(f"line {rows.line_num + 1} is not a row of a table ({e}): quote a cell "
                         'that contains quotes, and double those: "say ""hi"""') from e


READERS = {"": text_prompts, ".txt": text_prompts, ".jsonl": json_line_prompts,
           ".ndjson": json_line_prompts, ".json": json_prompts, ".csv": table_prompts,
           ".tsv": lambda text: table_prompts(text, "\t")}
