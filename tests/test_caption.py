"""Prompts from videos: the frames a model sees, the record, and two models built on the spot."""

import enum
import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import CAPTIONS, randomise
from processes import in_processes

import synvid
from common.prompts import read_prompts
from common.ranks import Ranks
from common.video import decode_image, write_video
from small_world.clips import make_clips
from tools import caption


def write_grey(path: Path, levels: range) -> Path:
    """A video whose frames are uniform, of these grey levels."""
    frames = np.stack([np.full((32, 48, 3), level, np.uint8) for level in levels])
    write_video(path, frames, 12)
    return path


def grey(frames: np.ndarray) -> list[int]:
    return frames[:, 16, 24, 0].tolist()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of four videos; read it only."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        write_grey(folder / f"{i}.mp4", range(40 + 10 * i, 45 + 10 * i))
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, videos):
    """run(options…) captions run.videos, four videos of grey levels, by run.describe, which prints
    the levels that it sees; returns the prompts' texts by video."""
    def main(*options: str) -> dict[str, str]:
        main.seen.clear()
        caption.main([str(main.videos), f"--model={tmp_path / 'model'}", f"--out={main.out}",
                      "--frames=3", "--batch=2", "--device=cpu", *options])
        lines = map(json.loads, main.out.read_text().splitlines())
        return {Path(line["video"]).name: line["prompt"] for line in lines}

    def describe(clips: list[caption.Clip]) -> list[tuple[str, bool]]:
        texts = [f"grey {grey(frames)}" for frames, _ in clips]
        main.seen.extend(texts)
        return [main.answers.pop(0) if main.answers else (text, True) for text in texts]

    main.seen, main.answers, main.describe = [], [], describe
    main.out, main.videos = tmp_path / "out/prompts.jsonl", tmp_path / "videos"
    shutil.copytree(videos, main.videos)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.setattr(caption, "load_captioner", lambda *_: lambda clips: main.describe(clips))
    return main


# --------------------------------------------------------------------------------- the videos

@pytest.mark.parametrize("length,indices", [(23, [0, 3, 6, 9, 13, 16, 19, 22]),
                                            (3, [0, 0, 1, 1, 1, 1, 2, 2]), (1, [0] * 8)])
def test_the_frames_are_evenly_spaced_and_those_of_the_video(tmp_path, length, indices):
    frames, metadata = caption.sample_frames(
        write_grey(tmp_path / "a.mp4", range(20, 20 + 10 * length, 10)), 8)
    np.testing.assert_allclose(grey(frames), [20 + 10 * i for i in indices], atol=2)  # of H.264
    assert metadata["frames_indices"] == indices and metadata["total_num_frames"] == length
    assert metadata["fps"] == 12


def test_videos_and_captions_that_cannot_be_used_are_left_out_by_name(run, capfd):
    data = (run.videos / "0.mp4").read_bytes()
    (run.videos / "cut.mp4").write_bytes(data[:len(data) * 2 // 3])
    (run.videos / "text.mp4").write_text("no video")
    (run.videos / "notes.txt").write_text("not asked for")
    write_grey(run.videos / "5.mp4", range(90, 95))
    run.answers = [("one\n\ntwo ", True), (" \n", True), ("I’m sorry, but", True),
                   ("half a", False), ("one two", True)]
    assert run() == {"0.mp4": "one two", "5.mp4": "one two"}
    out, err = capfd.readouterr()
    assert "2 prompts of 7 videos, 5 were left out; 1 prompts repeat" in out
    for name, reason in (("1", "is empty"), ("2", "refused"), ("3", "did not end"), ("cut", ""),
                         ("text", "")):
        assert any(f"/{name}.mp4: left out: " in line and reason in line
                   for line in err.splitlines()), name


def test_a_resumed_run_repeats_no_caption(run):
    complete = run()
    run.out = run.out.with_name("killed.jsonl")
    whole, batches = run.describe, []

    def killed(clips):
        batches.append(clips)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return whole(clips)

    run.describe = killed
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(run.seen) == 2 and not run.out.exists()
    [log] = run.out.with_suffix(".captions").glob("*/rank000.jsonl")
    log.write_bytes(log.read_bytes()[:-9])  # killed while it wrote the second line
    run.describe = whole
    texts = run()
    assert len(run.seen) == 3 and list(texts.items()) == list(complete.items())
    assert run() == texts and not run.seen
    assert run("--instruction=Rhyme") == texts and len(run.seen) == 4  # other settings: all again


def test_the_first_frames_make_a_prompt_file_for_image_to_video(run):
    run(f"--images={run.out.parent / 'first'}")
    prompts = read_prompts(run.out, images=True)
    assert [grey(decode_image(prompt.image)[None])[0] for prompt in prompts] == [
        json.loads(prompt.text.removeprefix("grey "))[0] for prompt in prompts]


def test_wrong_input_is_one_line(run, tmp_path, monkeypatch):
    run()
    monkeypatch.chdir(tmp_path)
    Path("notes.jsonl").write_text('"a prompt of mine"\n')
    Path("empty").mkdir()
    for videos, option, message in (
            (run.videos, "--out=notes.jsonl", "notes.jsonl: exists, and is not of this tool"),
            (run.videos, "--model=nowhere", "nowhere: contains no config.json: give the folder"),
            ("empty", "--batch=1", "empty: expected a video, or a folder with some"),
            ("nowhere.mp4", "--batch=1", "nowhere.mp4: expected a video")):
        run.videos = videos
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(option)
    assert not run.seen and Path("notes.jsonl").read_text() == '"a prompt of mine"\n'


def test_without_transformers_the_tool_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    args = types.SimpleNamespace(model=tmp_path)
    with pytest.raises(ValueError, match="pip install transformers torchvision"):
        caption.load_captioner(args, torch.device("cpu"))


# --------------------------------------------------------------------------------- the models

def stand_in_torchvision() -> None:
    """Modules with the few functions of torchvision that transformers resizes a video with: its
    wheels need a torch of their own kind, and none is among the requirements of these tests."""
    names = ("torchvision", "torchvision.io", "torchvision.transforms",
             "torchvision.transforms.functional", "torchvision.transforms.v2",
             "torchvision.transforms.v2.functional")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    mode = enum.Enum("InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING "
                     "LANCZOS")
    modules["torchvision"].__version__ = "0.28.0"
    modules["torchvision.transforms"].InterpolationMode = mode
    modules["torchvision.transforms.functional"].pil_to_tensor = None
    functional = modules["torchvision.transforms.v2.functional"]
    functional.InterpolationMode = mode
    functional.grayscale_to_rgb = lambda video: video
    functional.resize = lambda video, size, **_: F.interpolate(
        video.flatten(0, -4).float(), size, mode="area").unflatten(0, video.shape[:-3])
    functional.normalize = lambda video, mean, std, inplace=False: (
        (video - torch.as_tensor(mean).view(-1, 1, 1)) / torch.as_tensor(std).view(-1, 1, 1))
    sys.modules.update(modules)


TEMPLATE = ("{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'video' %}VIDEO "
            "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}")
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2}


def make_tokenizer(**special: str):
    """A tokenizer of the small world's words, with a model's special tokens by name."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<unk>", "<pad>", "<end>", *sorted({word for text in CAPTIONS for word in
                                                 text.split()})]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>",
                                   eos_token="<end>", extra_special_tokens=special)


def make_internvl():
    """Model and processor of a tiny InternVL."""
    import transformers as T
    tokenizer = make_tokenizer(start_image_token="<img>", end_image_token="</img>",
                               context_image_token="<IMG_CONTEXT>", video_token="<video>")
    size = {"height": 16, "width": 16}
    processor = T.InternVLProcessor(
        T.GotOcr2ImageProcessor(size=size), tokenizer, T.InternVLVideoProcessor(size=size),
        image_seq_length=4, chat_template=TEMPLATE.replace("VIDEO", "<video>"))
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": [16, 16], "patch_size": [4, 4]}
    model = T.InternVLForConditionalGeneration(T.InternVLConfig(
        vision_config=vision, image_token_id=tokenizer.context_image_token_id,
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **TEXT}))
    return model, processor


def make_qwen():
    """Model and processor of a tiny Qwen2.5-VL."""
    import transformers as T
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
             "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    tokenizer, size = make_tokenizer(**names), {"shortest_edge": 28 ** 2, "longest_edge": 56 ** 2}
    processor = T.Qwen2_5_VLProcessor(
        T.Qwen2VLImageProcessor(size=size), tokenizer,
        T.Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        chat_template=TEMPLATE.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"))
    vision = {"hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 32, "depth": 1,
              "num_heads": 2, "fullatt_block_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    model = T.Qwen2_5_VLForConditionalGeneration(T.Qwen2_5_VLConfig(
        vision_config=vision, text_config={"vocab_size": len(tokenizer), "rope_parameters": rope,
                                           **TEXT},
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}))
    return model, processor


@torch.no_grad()
def expected_text(model, processor, video: Path) -> str:
    """The caption of one video, along the documented way of transformers' chat models."""
    frames, metadata = caption.sample_frames(video, 8)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "video": frames},
                                      {"type": "text", "text": caption.INSTRUCTION}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"video_metadata": [metadata]})
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=400)
    return processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def caption_by_both(ranks: Ranks, folder: Path) -> None:
    """Caption the folder's videos by each model on all ranks, and one by one on the first."""
    stand_in_torchvision()
    for make in (make_internvl, make_qwen):
        model, processor = make()
        randomise(model.eval(), make.__name__)
        with torch.no_grad():  # far from each other, so that the video decides about the words
            for p in model.parameters():
                p.mul_(2 if p.ndim > 1 else 1)
        model.generation_config.update(
            eos_token_id=2, pad_token_id=1, suppress_tokens=[1], begin_suppress_tokens=[2],
            no_repeat_ngram_size=1)  # so that each text has a word and an end
        path, out = folder / make.__name__, folder / f"{make.__name__}.jsonl"
        if ranks.rank == 0:
            model.save_pretrained(path)
            processor.save_pretrained(path)
        dist.barrier()
        caption.main([str(folder / "videos"), f"--model={path}", f"--out={out}", "--batch=2"])
        if ranks.rank == 0:
            texts = {line["video"]: line["prompt"]
                     for line in map(json.loads, out.read_text().splitlines())}
            assert texts == {video: expected_text(model, processor, folder / video)
                             for video in texts}
            assert len(texts) == 5 and len(set(texts.values())) > 2, texts


def test_batches_and_ranks_caption_as_one_by_one_and_synvid_takes_the_prompts(tmp_path,
                                                                              make_config):
    (tmp_path / "videos").mkdir()
    clips, _, _ = make_clips(0, 0, 5)
    for i, clip in enumerate(clips):
        write_video(tmp_path / f"videos/{i}.mp4", clip[:, :, 32 * (i == 2):], 8)  # one is wider
    in_processes(2, caption_by_both, tmp_path)
    config = make_config(run=str(tmp_path / "run"))
    synvid.main([str(config), f"--prompts={tmp_path / 'make_qwen.jsonl'}", "--count=2"])
    assert len(list((tmp_path / "run/synvid").glob("*/*.safetensors"))) == 2
