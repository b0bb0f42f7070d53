"""Prompts from real videos: a multimodal model on this disk writes a caption for each (Fig. 3).

    python -m tools.caption FOLDER_OR_FILES --model FOLDER [--out prompts.jsonl] [--images DIR]
    torchrun --nproc-per-node 8 -m tools.caption …       # rerun to resume

In:  videos, and a folder with a model as transformers saves it: InternVL 2.5 or 3, Qwen2.5-VL,
     Qwen3-VL, or another one that takes videos (docs/captions.md).
Out: prompts.jsonl, one {"prompt": …, "video": …} per line, for synvid.py; with --images also each
     video's first frame as "image". prompts.captions/ is the record, with a file per rank in a
     folder for each combination of model, instruction and options: it has all captions, and the
     reason for each that is left out. A rerun does not write these captions again.
"""

import argparse
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from common.config import Shared
from common.files import append_log, crc32_of_json, error_summary, read_log, write_json_lines
from common.names import fingerprint_files
from common.ranks import (
    cli, compute_dtype, gather_values, lock_run_folder, on_first_rank, print_line, progress_bar,
    setup_distributed)
from common.video import decode_video, read_frames, write_image

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
INSTRUCTION = """Describe this video in one paragraph of 100 to 150 words, from which it could be \
filmed again: the people and objects in detail, their motion and the order of events, the \
atmosphere, the background, the camera and the style. Write only what can be seen, without an \
introduction."""
REFUSAL = re.compile(r"(?i)(i['’]m|i am|i can(not|['’]t)|sorry|as an ai|unfortunately)\b")
Clip = tuple[np.ndarray, dict]  # frames uint8 [T, H, W, 3], transformers' video_metadata


def find_videos(paths: list[Path]) -> list[Path]:
    """The given videos and those in the given folders and below, in order, each once."""
    found = []
    for path in paths:
        inside = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in SUFFIXES)
        if not path.is_file() and not inside:
            raise FileNotFoundError(f"{path}: expected a video, or a folder with some "
                                    f"({', '.join(SUFFIXES)}), got none: correct the path")
        found += inside or [path]
    return list(dict.fromkeys(path.resolve() for path in found))


def sample_frames(path: Path, count: int) -> Clip:
    """`count` frames of a video, evenly spaced from the first to the last, where a shorter video
    repeats some. Raises OSError if it cannot be decoded to its end."""
    text = decode_video(path, "-f", "framecrc").decode()
    unit = Fraction(re.search(r"#tb 0: (\d+/\d+)", text)[1])  # seconds
    times = [unit * int(time) for time in re.findall(r"^0, *-?\d+, *(-?\d+),", text, re.M)]
    indices = np.linspace(0, len(times) - 1, count).round().astype(int)
    chosen, places = np.unique(indices, return_inverse=True)
    return read_frames(path, chosen)[places], {
        "total_num_frames": len(times), "frames_indices": indices.tolist(),
        "fps": float(max(1, len(times) - 1) / (times[-1] - times[0] or unit))}


def load_captioner(args: argparse.Namespace,
                   device: torch.device) -> Callable[[list[Clip]], list[tuple[str, bool]]]:
    """A function from clips to the caption of each, and whether it ended within --max_tokens.

    Raises ValueError if transformers is missing, or cannot load the folder.
    """
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        import transformers
        processor = transformers.AutoProcessor.from_pretrained(args.model, **options)
        processor.tokenizer.padding_side = "left"  # a caption continues the end of its request
        processor.video_processor.do_sample_frames = False  # sample_frames has
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            args.model, dtype=compute_dtype(device), use_safetensors=True, **options).to(device)
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, ValueError) as e:
        raise ValueError(f"{args.model}: cannot be loaded ({error_summary(e)}): pip install "
                         "transformers torchvision; docs/captions.md lists the models") from e
    ends = torch.tensor(model.generation_config.eos_token_id, device=device)

    def describe(clips: list[Clip]) -> list[tuple[str, bool]]:
        chats = [[{"role": "user", "content": [{"type": "video", "video": frames},
                                               {"type": "text", "text": args.instruction}]}]
                 for frames, _ in clips]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True,
            return_tensors="pt", processor_kwargs={"video_metadata": [facts for _, facts in clips]})
        inputs = inputs.to(device, model.dtype)
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


def write_captions(out: Path, lines: list[dict]) -> None:
    """Write the lines that have no "error"; print the others, and how many there are."""
    prompts = [line for line in lines if "error" not in line]
    write_json_lines(out, prompts)
    for line in lines:
        if "error" in line:
            print_line(f"{line['video']}: left out: {line['error']}", error=True)
    repeated = len(prompts) - len({prompt["prompt"] for prompt in prompts})
    print(f"{out} has {len(prompts)} prompts of {len(lines)} videos, {len(lines) - len(prompts)} "
          f"were left out; {repeated} prompts repeat another")


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
    add("--max_tokens", type=int, default=400, help="a longer caption is left out (400)")
    add("--batch", type=int, default=4, help="videos captioned at once (4)")
    add("--device", default="auto", help="cpu, cuda, or auto: a GPU if there is one")
    args = parser.parse_args(argv)
    if args.out.suffix != ".jsonl" or min(args.frames, args.max_tokens, args.batch) < 1:
        parser.error("give --out FILE.jsonl, and --frames, --max_tokens, --batch of at least 1")
    if not (args.model / "config.json").is_file():
        raise FileNotFoundError(f"{args.model}: contains no config.json: give the folder of a "
                                "model as transformers saves it")
    out, images = args.out.resolve(), args.images and args.images.resolve()
    folder = out.with_suffix(".captions")
    if out.exists() and not folder.exists():
        raise ValueError(f"{out}: exists, and is not of this tool: choose another --out")
    videos = [os.path.relpath(path, out.parent) for path in find_videos(args.videos)]
    settings = crc32_of_json([fingerprint_files(args.model), args.instruction, args.frames,
                              args.max_tokens, images and str(images)])
    ranks = setup_distributed(Shared(device=args.device), captions=settings, videos=videos)
    with lock_run_folder(folder):
        record = on_first_rank(lambda: {
            line["video"]: line for log in folder.glob(f"{settings}/rank*.jsonl")
            for line in read_log(log)})
        todo = [video for video in videos if video not in record][ranks.rank::ranks.world]
        describe = load_captioner(args, ranks.device) if todo else None
        bar = progress_bar(len(todo), "caption", ranks.rank, unit="video")
        for start in range(0, len(todo), args.batch):
            clips = {}
            for video in todo[start:start + args.batch]:
                try:
                    clips[video] = sample_frames(out.parent / video, args.frames)
                except OSError as e:  # not written to the record's files: a rerun tries again
                    record[video] = {"video": video, "error": error_summary(e)}
            captions = describe(list(clips.values())) if clips else []
            for (video, (frames, _)), (text, complete) in zip(clips.items(), captions, strict=True):
                record[video] = line = {"video": video, "prompt": " ".join(text.split())}
                if error := caption_error(line["prompt"], complete):
                    line["error"] = error
                elif images:
                    image = images / f"{Path(video).stem[:80]}_{crc32_of_json(video)}.png"
                    write_image(image, frames[0])
                    line["image"] = os.path.relpath(image, out.parent)
                append_log(folder / f"{settings}/rank{ranks.rank:03d}.jsonl", line)
            bar.update(min(args.batch, len(todo) - start))
        bar.close()
        for lines in gather_values(record):
            record |= lines
        on_first_rank(lambda: write_captions(out, [record[video] for video in videos]))


if __name__ == "__main__":
    cli(main)
