"""What VBench wants to find on disk: names, prompts and numbers of videos, and our record of them.

One flat folder of <prompt>-<i>.mp4, i = 0 … 4, with the prompt of all_dimension.txt byte for byte
even when the video was made from an augmented one, and nothing else: VBench takes the suffix of the
first file for that of all. Prompts of temporal_flickering.txt want i = 0 … 24. Our record lies in a
folder beside it. Scores are read by evaluation/vbench.py.
Source: VBench's README and vbench/__init__.py (Huang et al. 2024).
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from common.files import read_json, write_json
from common.prompts import read_prompts
from common.ranks import seed_of

VIDEOS, FLICKERING_VIDEOS = 5, 25  # a prompt
PART = re.compile(r"\..*\.\d+-[0-9a-f]+\.part\.mp4", re.DOTALL)  # as files.replace_file names it
NAME_BYTES = 255 - len(".." + "4194304-01234567" + ".part.mp4")  # what that leaves of a name


class Video(NamedTuple):
    """One video that VBench wants."""
    file: str
    prompt: str                                   # VBench's own
    made_from: str                                # the augmented one, or the same
    i: int
    seed: int


def wanted_videos(original: str | Path, augmented: str | Path | None,
                  flickering: str | Path | None, seed: int) -> list[Video]:
    """All videos that VBench wants for its prompts, those of a repeated prompt once.

    Args: original, its all_dimension.txt; augmented, a file of as many prompts in the same order,
    to sample from; flickering, its temporal_flickering.txt; seed, of which with prompt and i a
    video's own is a function: sample.py makes the same video of `made_from` and that seed.
    Raises as read_prompts does, and ValueError if the files do not fit together, or if a prompt
    cannot be a file name.
    """
    prompts = [prompt.text for prompt in read_prompts(original)]
    sources = prompts if augmented is None else [p.text for p in read_prompts(augmented)]
    if len(sources) != len(prompts):
        raise ValueError(f"{augmented}: got {len(sources)} prompts; wanted {len(prompts)}, one for "
                         f"each of {original}, line by line")
    still = [] if flickering is None else [prompt.text for prompt in read_prompts(flickering)]
    if absent := set(still) - set(prompts):
        absent = next(prompt for prompt in still if prompt in absent)
        raise ValueError(f"{flickering}: got the prompt {absent!r:.90}; wanted prompts of "
                         f"{original} only: take both files from the same VBench")
    made_from: dict[str, str] = {}
    for prompt, source in zip(prompts, sources, strict=True):
        made_from.setdefault(prompt, source)
    counts = dict.fromkeys(made_from, VIDEOS) | dict.fromkeys(still, FLICKERING_VIDEOS)
    for prompt, count in counts.items():
        size = len(f"{prompt}-{count - 1}.mp4".encode())
        if "/" in prompt or size > NAME_BYTES:
            got = "a slash in it" if "/" in prompt else f"{size} bytes as a file name"
            raise ValueError(f"{original}: the prompt {prompt!r:.90} cannot be a file name: got "
                             f"{got}; wanted none and at most {NAME_BYTES}: VBench's own prompts "
                             "fit; give longer ones with --vbench_prompts")
    return [Video(f"{prompt}-{i}.mp4", prompt, made_from[prompt], i,
                  seed_of("vbench", seed, prompt, i))
            for prompt, count in counts.items() for i in range(count)]


def record_folder(folder: Path) -> Path:
    """Where the record of a folder of videos lies, and all else that must not lie in it."""
    return folder.absolute().with_name(f"{folder.absolute().name}.record")


def open_record(folder: Path, videos: list[Video], about: dict[str, Any]) -> list[int]:
    """Begin or go on: write the record of what the folder's videos are, say which are to be made.

    Args: about, what they share: JSON values. Files cut off by a crash are removed.
    Returns indices of videos. Raises ValueError if the folder has files that its record does not
    know, or videos made with another `about`, seed or prompt.
    """
    path, wanted = record_folder(folder) / "videos.json", {v.file: v._asdict() for v in videos}
    about = json.loads(json.dumps(about))
    shape = {"about": dict, "videos": [{"file": str, "made_from": str}]}
    known = read_json(path, shape) if path.exists() else {"about": about, "videos": []}
    there = {file.name for file in folder.iterdir()} if folder.exists() else set()
    before = {v["file"]: v for v in known["videos"] if v["file"] in there}
    for name in sorted(there - before.keys()):
        if not PART.fullmatch(name):
            raise ValueError(f"{folder}: got {name:.90}, which {path} does not know; wanted only "
                             "the videos made for VBench: move it, or choose another --out")
        (folder / name).unlink()
    for key in about if before else ():
        if known["about"].get(key) != about[key]:
            raise ValueError(f"{folder}: has {len(before)} videos of {key} "
                             f"{known['about'].get(key)!r:.200}; got {about[key]!r:.200}: go on "
                             "with the settings they were made with, or choose another --out")
    for name in wanted:
        if name in before and wanted[name] != before[name]:
            raise ValueError(f"{folder / name}: was made from {before[name]['made_from']!r:.200}; "
                             f"got {wanted[name]['made_from']!r:.200}: give the same files, or "
                             "choose another --out")
    write_json(path, {"about": about, "videos": list((before | wanted).values())})
    return [i for i, video in enumerate(videos) if video.file not in before]
