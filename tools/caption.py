"""Prompts from real videos: a multimodal model on this disk writes a caption of each (Fig. 3).

    python -m tools.caption FOLDER_OR_FILES --model FOLDER [--out prompts.jsonl] [--images DIR]
    torchrun --nproc-per-node 8 -m tools.caption …       # rerun to resume

In:  videos, and a folder with a model as transformers saves it: InternVL 2.5 or 3, Qwen2.5-VL,
     Qwen3-VL, or another one that takes videos (docs/captions.md).
Out: prompts.jsonl, one {"prompt": …, "video": …} per line, for synvid.py; with --images also each
     video's first frame as "image". prompts.captions/ is the record, one file per rank: it also
     has the videos and captions that were left out, with the reason. What it has of the same
     model, instruction and options is not written again.
"""

import common  # noqa: F401 (before torch, see common)
import argparse
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from common.files import append_log, crc32_of_json, error_summary, read_log, write_text
from common.names import fingerprint_files
from common.ranks import (
    Ranks, cli, compute_dtype, lock_run_folder, on_first_rank, print_line, progress_bar,
    setup_distributed)
from common.video import decode_video, read_frames, write_image

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
INSTRUCTION = """Describe this video in one paragraph of 100 to 150 words, from which it could be \
filmed again: the people and objects in detail, their motion and the order of events, the \
atmosphere, the background, the camera and the style. Write only what can be seen, without an \
introduction."""
REFUSAL = re.compile(r"(i['’]m|i am) (very |so )?(sorry|unable|not able)\b|i (cannot|can['’]t)\b|"
                     r"sorry\b|as an ai\b|unfortunately,? i\b", re.IGNORECASE)
Clip = tuple[np.ndarray, dict[str, Any]]  # frames uint8 [T, H, W, 3], transformers' video_metadata


# -------------------------------------------------------------------------------- the videos

def find_videos(paths: list[Path]) -> list[Path]:
    """The videos given, and those in folders and below, in order, each once."""
    found = {path: sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in SUFFIXES)
             if path.is_dir() else [path] * path.exists() for path in paths}
    if empty := [path for path, videos in found.items() if not videos]:
        raise FileNotFoundError(f"{empty[0]}: expected a video, or a folder with some "
                                f"({', '.join(SUFFIXES)}), got none: correct the path")
    return list(dict.fromkeys(path.resolve() for videos in found.values() for path in videos))


def frame_times(path: Path) -> list[float]:
    """The time of each frame of a video file in seconds. Raises OSError as read_frames."""
    lines = decode_video(path, "-f", "framecrc").decode().splitlines()
    unit = next(Fraction(line.split()[-1]) for line in lines if line.startswith("#tb"))
    times = [float(int(line.split(",")[2]) * unit) for line in lines if not line.startswith("#")]
    if not times:
        raise OSError("it contains no frame")
    return times


def sample_frames(path: Path, count: int) -> Clip | OSError:
    """`count` frames of a video, evenly spaced from the first to the last, where a shorter video
    repeats some; or the error if it cannot be decoded to its end."""
    try:
        times = frame_times(path)
        indices = np.linspace(0, len(times) - 1, count).round().astype(int)
        chosen, places = np.unique(indices, return_inverse=True)
        fps = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else 1.0
        return read_frames(path, chosen)[places], {
            "total_num_frames": len(times), "fps": fps, "frames_indices": indices.tolist()}
    except OSError as e:
        return e


# --------------------------------------------------------------------------------- the model

def load_captioner(args: argparse.Namespace,
                   device: torch.device) -> Callable[[list[Clip]], list[tuple[str, bool]]]:
    """A function from clips to the caption of each, and whether it ended within --max_tokens.

    Raises ValueError if transformers is missing, or cannot load the folder.
    """
    options = {"local_files_only": True, "trust_remote_code": False}
    request = {"role": "user", "content": [{"type": "video"},
                                           {"type": "text", "text": args.instruction}]}
    try:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        processor = transformers.AutoProcessor.from_pretrained(args.model, **options)
        if getattr(processor, "video_processor", None) is None:
            raise ValueError("its processor takes no videos")
        text = processor.apply_chat_template([request], add_generation_prompt=True)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            args.model, dtype=compute_dtype(device), use_safetensors=True, **options).to(device)
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as e:
        missing = isinstance(e, ImportError) or "torchvision" in str(e)
        remedy = ("pip install transformers torchvision, of versions that fit torch" if missing
                  else "give a model that docs/captions.md lists")
        raise ValueError(f"{args.model}: cannot be loaded ({error_summary(e)}): {remedy}") from e
    processor.tokenizer.padding_side = "left"  # a caption continues the end of its request
    ends = torch.tensor(model.generation_config.eos_token_id, device=device)

    @torch.no_grad()
    def describe(clips: list[Clip]) -> list[tuple[str, bool]]:
        frames, metadata = map(list, zip(*clips, strict=True))
        inputs = processor(text=[text] * len(clips), videos=frames, video_metadata=metadata,
                           do_sample_frames=False, add_special_tokens=False, padding=True,
                           return_tensors="pt").to(device, model.dtype)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=args.max_tokens)
        ids = ids[:, inputs["input_ids"].shape[1]:]
        return list(zip(processor.batch_decode(ids, skip_special_tokens=True),
                        torch.isin(ids, ends).any(1).tolist(), strict=True))

    return describe


def caption_error(text: str, complete: bool) -> str:
    """Why a caption cannot be a prompt; "" if it can."""
    if not text:
        return "the caption is empty"
    if REFUSAL.match(text):
        return f"the model refused: {text:.80}"
    return "" if complete else "the caption did not end within --max_tokens"


# ------------------------------------------------------------------------ record and prompts

def read_record(folder: Path, settings: str) -> dict[str, dict]:
    """The line of each video that was captioned with these settings (a checksum), by its path from
    the prompt file: "text", "error", "image"."""
    lines = [line for log in folder.glob("rank*.jsonl") for line in read_log(log)
             if line.get("settings") == settings]  # a text replaces an older error of reading
    return {line["video"]: line for line in sorted(lines, key=lambda line: "text" in line)}


def caption_videos(args: argparse.Namespace, todo: list[str], log: Path, settings: str,
                   ranks: Ranks) -> dict[str, dict]:
    """The lines of this rank's videos as in read_record; they are added to the log batch by batch.
    """
    record = {}
    describe = load_captioner(args, ranks.device) if todo else None
    bar = progress_bar(len(todo), "caption", ranks.rank, unit="video")
    with ThreadPoolExecutor(args.batch) as pool:
        for start in range(0, len(todo), args.batch):
            batch = todo[start:start + args.batch]
            paths = [args.out.parent / video for video in batch]
            clips = dict(zip(batch, pool.map(sample_frames, paths, [args.frames] * len(batch)),
                             strict=True))
            lines = [{"video": video, "error": error_summary(clips.pop(video))}
                     for video in batch if isinstance(clips[video], OSError)]
            captions = describe(list(clips.values())) if clips else []
            for (video, (frames, _)), (text, complete) in zip(clips.items(), captions, strict=True):
                text = " ".join(text.replace("\0", " ").split())
                lines.append({"video": video, "text": text, "error": caption_error(text, complete)})
                if args.images and not lines[-1]["error"]:
                    path = args.images / f"{Path(video).stem[:80]}_{crc32_of_json(video)}.png"
                    write_image(path, torch.tensor(frames[0]).permute(2, 0, 1) / 127.5 - 1)
                    lines[-1]["image"] = os.path.relpath(path, args.out.parent)
            for line in lines:
                append_log(log, {**line, "settings": settings})
                record[line["video"]] = line
                if line["error"]:
                    print_line(f"{line['video']}: left out: {line['error']}", error=True)
            bar.update(len(batch))
    bar.close()
    return record


def write_captions(out: Path, lines: list[dict]) -> None:
    """Write the prompts among a record's lines, and print how many there are.

    Raises ValueError if there is none.
    """
    used = [line for line in lines if not line["error"]]
    if not used:
        raise ValueError(f"{out}: not one of {len(lines)} videos has a usable caption: try "
                         "another --instruction or --model")
    prompts = [{"prompt": line["text"], "video": line["video"]}
               | ({"image": line["image"]} if "image" in line else {}) for line in used]
    write_text(out, "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in prompts))
    print(f"{out} has {len(used)} prompts of {len(lines)} videos, {len(lines) - len(used)} were "
          f"left out; {len(used) - len({line['text'] for line in used})} prompts repeat another")


def main(argv: list[str] | None = None) -> None:
    """Caption the videos that the record lacks, on all ranks, and write the prompts."""
    parser = argparse.ArgumentParser("python -m tools.caption", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("videos", type=Path, nargs="+", help="videos, or folders of them")
    add("--model", type=Path, required=True, help="folder of the multimodal model")
    add("--out", type=Path, default="prompts.jsonl", help="the prompt file to write, a .jsonl")
    add("--images", type=Path, help="folder to write each video's first frame to")
    add("--frames", type=int, default=8, help="frames of a video that the model sees (8)")
    add("--instruction", default=INSTRUCTION, help="what the model is asked for")
    add("--max_tokens", type=int, default=400, help="a longer caption counts as cut (400)")
    add("--batch", type=int, default=4, help="videos captioned at once (4)")
    add("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one")
    args = parser.parse_args(argv)
    if args.out.suffix != ".jsonl" or min(args.frames, args.max_tokens, args.batch) < 1:
        parser.error("give --out FILE.jsonl, and --frames, --max_tokens, --batch of at least 1")
    if not (args.model / "config.json").is_file():
        raise FileNotFoundError(f"{args.model}: no config.json there: give the folder of a model "
                                "as transformers saves it")
    args.out, args.images = args.out.resolve(), args.images and args.images.resolve()
    folder = args.out.with_suffix(".captions")
    if args.out.exists() and not folder.exists():
        raise ValueError(f"{args.out}: exists, and is not of this tool: choose another --out")
    videos = [os.path.relpath(path, args.out.parent) for path in find_videos(args.videos)]
    settings = crc32_of_json([fingerprint_files(args.model), args.instruction, args.frames,
                              args.max_tokens, args.images and str(args.images)])
    ranks = setup_distributed(args.device, same={"settings": settings, "videos": videos})
    with lock_run_folder(folder):
        record = on_first_rank(lambda: read_record(folder, settings))
        todo = [video for video in videos if "text" not in record.get(video, {})]
        parts: list = [None] * ranks.world
        dist.all_gather_object(parts, caption_videos(
            args, todo[ranks.rank::ranks.world], folder / f"rank{ranks.rank:03d}.jsonl", settings,
            ranks))
        for part in parts:
            record |= part
        on_first_rank(lambda: write_captions(args.out, [record[video] for video in videos]))


if __name__ == "__main__":
    cli(main)
