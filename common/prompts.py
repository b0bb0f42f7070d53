"""Prompt files: text, JSON lines, JSON, CSV and TSV, told apart by what they hold.

text        one prompt a line; outer spaces do not count
JSON lines  one object a line, {"prompt": "…", "image": "photo.jpg"}, or one string
JSON        a list of such objects or strings, or an object that holds one such list
CSV, TSV    a header, one of whose columns is a prompt's; commas, semicolons or tabs between

A prompt's key or column is named as in TEXT_KEYS, its image's as in IMAGE_KEYS; others are not
read. Images are relative to the file. Prompts are data: nothing in one is a path or a flag.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from common.video import decode_image

TEXT_KEYS = ("prompt", "prompt_en", "caption", "text")  # prompt_en: VBench's
IMAGE_KEYS = ("image", "image_path")
JSON_LINES, TABLES = (".jsonl", ".ndjson"), {".csv": ",;\t", ".tsv": "\t", ".tab": "\t"}
OTHER = (".yaml", ".yml", ".toml", ".xml", ".html", ".parquet", ".xlsx")  # not text of prompts
WANTED = '{"prompt": "…", "image": "photo.jpg"}'

# Brackets, a string in quotes and what may follow it in JSON, or in a list as Python prints it; a
# prompt like `["Stop" sign] a road` goes on otherwise.
QUOTED = r'''(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')'''
JSON_START = re.compile(rf'''\s*[\[{{][\s\[{{]*{QUOTED}\s*'''
                        r'''(?::|,\s*(?:["'{]|\Z)|\]\s*(?:,|\n|\Z)|\Z)''')
BRACKETS = re.compile(r"[\s\[\]{},]+")


Entries = Iterator[tuple[str, Any]]  # a place in the file, and what to_prompt takes


class Prompt(NamedTuple):
    """What a video is made from: a text and, for an image-to-video model, its first frame."""
    text: str
    image: Path | None = None


def digest_texts(prompts: list[Prompt]) -> str:
    """SHA-256 over the texts of prompts and the sizes of their images."""
    lines = [[text, image.stat().st_size if image is not None and image.exists() else None]
             for text, image in prompts]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def heldout_prompts(weights: str | Path, images: bool) -> Path:
    """Where a weight folder of the small world keeps its held-out captions."""
    return Path(weights) / f"prompts_heldout.{'jsonl' if images else 'txt'}"


def read_prompts(path: str | Path, images: bool = False) -> list[Prompt]:
    """The prompts of a UTF-8 file, in any form that this file's docstring lists; blank lines are
    ignored. Of text and JSON lines only line feeds end a line.

    images: whether the model starts from an image; then all of them are decoded, to be sure (by
    the first of several ranks).
    Raises FileNotFoundError if there is no such file; ValueError naming the line (in JSON also the
    entry) that is not UTF-8, not what the file's form wants, has no prompt or several, or whose
    image is missing, broken or not wanted; ValueError if the file holds no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file; want one prompt a line, in UTF-8")
    text = decode(path)
    form = form_of(path, text)
    if images and form is read_text:
        raise ValueError(f"{path}: the model starts from images; wanted a .jsonl file with lines "
                         f"{WANTED}, or a .csv file with columns prompt,image")
    prompts: dict[str, Prompt] = {}
    for place, entry in form(path, text):
        prompts[place] = prompt = to_prompt(entry, f"{path}: {place}", path.parent)
        if (prompt.image is not None) != images:
            have, want = ("no", "starts from one") if images else ("an", "takes none")
            raise ValueError(f'{path}: {place} has {have} "image"; the preset\'s model {want}')
    if not prompts:
        raise ValueError(f"{path}: got an empty prompt file; want one prompt a line")
    if images and os.environ.get("RANK", "0") == "0":
        check_images(path, prompts)
    return list(prompts.values())


def decode(path: Path) -> str:
    """A file's text, without a byte order mark. Raises ValueError naming a line not in UTF-8."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    at = data.find(b"\0")
    reason = "a NUL byte"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at, reason = error.start, error.reason
    if at < 0:
        return text
    line, byte = data.count(b"\n", 0, at) + 1, at - data.rfind(b"\n", 0, at)
    raise ValueError(f"{path}: line {line} is not UTF-8 ({reason} at its byte {byte}): save the "
                     "file as UTF-8")


# -------------------------------------------------------------------------- forms of a file

def form_of(path: Path, text: str) -> Callable[[Path, str], Entries]:
    """The reader for a file of this text: the content decides, the suffix where that leaves a
    doubt. Raises ValueError for a suffix of another kind of file."""
    suffix, start = path.suffix.lower(), text.lstrip()
    first = start.partition("\n")[0]
    if start[:1] in ("[", "{"):
        whole = parsed(start)
        if isinstance(whole, list) or isinstance(whole, dict) and suffix not in JSON_LINES:
            return read_json
        if isinstance(parsed(first), dict):
            return read_lines
    if suffix in JSON_LINES:
        return read_lines
    if suffix == ".json" or looks_like_json(start):
        return read_json
    if suffix in TABLES or is_header(first):
        return read_table
    if suffix in OTHER:
        raise ValueError(f"{path}: got a {suffix} file; wanted prompts as .txt, .jsonl, .json, "
                         ".csv or .tsv")
    return read_text


def parsed(text: str) -> Any:
    """The value of JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def each_key_once(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object of these keys and values. Raises ValueError if a key is there twice."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key "{next(k for k in keys if keys.count(k) > 1)}" is there twice')
    return entry


def looks_like_json(text: str) -> bool:
    """Whether text, or a line, begins as JSON does, be it valid or not, and not as a prompt."""
    line = text.partition("\n")[0]
    return bool(JSON_START.match(text) or BRACKETS.fullmatch(line))


def is_header(line: str) -> bool:
    """Whether the first line of a file without a table's suffix is nevertheless a table's header:
    names only, one of them a prompt's, and no spaces between, as prose has them after commas."""
    for comma in "\t,;":
        names = names_of(line, comma)
        if len(names) > 1 and any(name in TEXT_KEYS for name in names):
            known = all(name in TEXT_KEYS + IMAGE_KEYS for name in names)
            return known or all(re.fullmatch(r'["\w]*', name) for name in line.strip().split(comma))
    return False


def names_of(header: str, comma: str) -> list[str]:
    """The names in a table's header."""
    return [name.strip(' "\r').lower() for name in header.split(comma)]


def read_text(path: Path, text: str) -> Entries:
    """One prompt a line. Raises ValueError naming a line that is JSON or a table's header."""
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.strip():
            if looks_like_json(line):
                raise ValueError(f"{path}: line {number}: got {line:.80}, which looks like JSON; "
                                 "wanted one prompt a line: give JSON in a file of its own")
            if number == 1 and line.lower() in TEXT_KEYS:
                raise ValueError(f"{path}: line 1: got {line}, as the header of a table; wanted a "
                                 "prompt: rename the file to .csv, or leave the line out")
            yield f"line {number}", line


def read_lines(path: Path, text: str) -> Entries:
    """One JSON object or string a line. Raises ValueError naming a line that is not JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.strip():
            try:
                yield f"line {number}", json.loads(line, object_pairs_hook=each_key_once)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error}); wanted lines "
                                 f"{WANTED}") from error


def read_json(path: Path, text: str) -> Entries:
    """The elements of a JSON list, or of the one list in a JSON object, or an object that is a
    prompt itself. Raises ValueError naming a line that is not JSON, or what is there instead."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: line {getattr(error, 'lineno', 1)} is not JSON ({error}): "
                         "repair it, or give one prompt a line in a .txt file") from error
    if not isinstance(whole, list | dict):
        raise ValueError(f"{path}: line 1: got {text.strip():.80}; wanted a JSON list of prompts")
    start = len(text) - len(text.lstrip())
    if isinstance(whole, dict):
        inside = list(elements(path, text, start))  # keys and values in turn
        start, own = object_list(path, [key for _, _, key in inside[::2]], inside[1::2])
        if own:
            yield f"line {text.count(chr(10), 0, start) + 1}", whole
            return
    for number, (line, _, value) in enumerate(elements(path, text, start), 1):
        yield f"line {line}, entry {number}", value


def object_list(path: Path, keys: list[str], values: list[tuple]) -> tuple[int, bool]:
    """Where in a JSON object its one list begins, False; or its own place, True, if it is itself a
    prompt. values: as `elements` has them. Raises ValueError if it is neither."""
    own = [key for key, (_, _, value) in zip(keys, values, strict=True)
           if key.strip().lower() in TEXT_KEYS and isinstance(value, str)]
    lists = [(key, at) for key, (_, at, value) in zip(keys, values, strict=True)
             if isinstance(value, list)]
    if len(set(keys)) == len(keys) and len(lists) + bool(own) == 1:
        return (values[0][1], True) if own else (lists[0][1], False)
    names = ", ".join(f'"{key:.40}"' for key in [*own, *(key for key, _ in lists)] or keys[:5])
    raise ValueError(f"{path}: line 1: got a JSON object of {names or 'nothing'}; wanted one list "
                     "of prompts in it, and nothing else that may be one")


def elements(path: Path, text: str, start: int) -> Iterator[tuple[int, int, Any]]:
    """Line, place and value of each element of the valid JSON list that begins at `start` in the
    text; of an object its keys and values in turn. Raises ValueError for a key that is twice in one
    element."""
    between, decoder = re.compile(r"[\s,:]*"), json.JSONDecoder(object_pairs_hook=each_key_once)
    line, seen, at = 1, 0, start + 1
    while text[(at := between.match(text, at).end())] not in "]}":
        line, seen = line + text.count("\n", seen, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {line} is not JSON ({error})") from error
        yield line, at, value
        at = end


def read_table(path: Path, text: str) -> Entries:
    """Rows of CSV or TSV as objects of the header's names; rows of empty cells are left out.

    Raises ValueError naming the line that has another number of cells or a stray quote, or the
    header if it names no prompt, or several.
    """
    text = text.replace("\r\n", "\n")
    commas = TABLES.get(path.suffix.lower(), "\t,;")
    first = next((line for line in text.split("\n") if line.strip()), "")
    comma = next((c for c in commas if set(names_of(first, c)[1:]) - {""}
                  and not set(TEXT_KEYS).isdisjoint(names_of(first, c))), commas[0])
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True)
    names: list[str] = []
    while True:
        place = f"line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{path}: {place} is no row of a table ({error}): put a cell with "
                             'quotes in it into quotes, and double those inside: "say ""hi"""'
                             ) from error
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if not names:
            names = check_header(row, f"{path}: {place}")
            continue
        if len(row) != len(names):
            raise ValueError(f"{path}: {place}: got {len(row)} cells; wanted {len(names)}, as the "
                             f"header has: put a prompt with {comma!r} in it into quotes")
        yield place, {name: cell for name, cell in zip(names, row, strict=True)
                      if name in TEXT_KEYS + IMAGE_KEYS}


def check_header(row: list[str], where: str) -> list[str]:
    """The names of a header's cells. Raises ValueError unless one names prompts, one at most
    images."""
    names = [name.strip().lower() for name in row]
    for keys, least in ((TEXT_KEYS, 1), (IMAGE_KEYS, 0)):
        if not least <= sum(name in keys for name in names) <= 1:
            raise ValueError(f"{where}: got a header of {', '.join(row):.80}; wanted one of "
                             f"{', '.join(keys)} in it, once: name the column so, others otherwise")
    return names


# ------------------------------------------------------------------------------------- one prompt

def to_prompt(entry: Any, where: str, folder: Path) -> Prompt:
    """The prompt in a string or an object. Raises ValueError beginning with `where`."""
    got = json.dumps(entry, ensure_ascii=False)[:80]
    entry = {"prompt": entry} if isinstance(entry, str) else entry
    found: dict[tuple, list] = {TEXT_KEYS: [], IMAGE_KEYS: []}
    for name, value in entry.items() if isinstance(entry, dict) else ():
        for keys in found:
            if name.strip().lower() in keys and value is not None and str(value).strip():
                found[keys].append(value)
    texts, files = found.values()
    if len(texts) > 1 or len(files) > 1:
        raise ValueError(f"{where}: got {got}; wanted one prompt, and one image at most: leave out "
                         "what is not meant")
    if not texts or not all(isinstance(value, str) for value in (*texts, *files)):
        raise ValueError(f"{where}: got {got}; wanted {WANTED}")
    for value in (*texts, *files):
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{where} is not JSON of UTF-8 text (got {value[:80]!r}, with half of "
                             "a surrogate pair or a NUL in it): leave that out")
    return Prompt(texts[0].strip(), folder / files[0] if files else None)


def check_images(path: Path, prompts: dict[str, Prompt]) -> None:
    """Decode the image of each place's prompt. Raises ValueError naming the first in fault."""
    def fault(image: Path) -> Exception | None:
        try:
            decode_image(image)
        except (FileNotFoundError, ValueError) as error:
            return error
        return None

    places: dict[Path, str] = {}
    for place, prompt in prompts.items():
        places.setdefault(prompt.image, place)
    with ThreadPoolExecutor(8) as pool:  # PIL lets other threads run
        for image, error in zip(places, pool.map(fault, places), strict=True):
            if error is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise ValueError(f"{path}: {places[image]}: {error}") from error
