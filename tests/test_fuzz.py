"""Files and command lines with seeded damage: each is read as before, or refused in one line that a
stage prints as its error. A traceback, an endless loop and another result fail."""

import contextlib
import json
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tqdm import tqdm

import distill
import evaluate
import sample
import synvid
from artifacts import student as student_file
from artifacts import trajectories
from common.config import load_config
from common.files import append_log, crc32_of_json, read_log, write_json
from common.names import dit_tensors, read_list, role_file
from common.prompts import read_prompts
from common.ranks import cli, draw_noise
from common.weights import save_tensors
from experts import check_sizes
from model import PRESETS, check_model
from tools import paper
from training.checkpoint import Saver, latest_checkpoint, load_checkpoint

SECONDS = 10        # of CPU time for one case; each takes a few hundredths
MEMORY = 4 << 30    # bytes for all cases of a test
NASTY = ("1e999999999", "-1", "0", "1e9", "9" * 30, "9" * 5000, "null", "[]", "{}", '"x"', "NaN",
         "-Infinity", "true", "[[1, 2], [3]]", '{"a": {"b": [1]}}', "[" * 2000 + "]" * 2000, "",
         "1.5", "\0", "\\ud800", "é", "~", "&a [*a]", "!!int x", "!!timestamp y", "<<", ": ", "\n")
VALUES = [None, True, -1, 0, 10 ** 9, 10 ** 30, 1.5, float("nan"), float("inf"), "", "x", "../x",
          "x" * 100_000, [], [[]], [1, "x"], {}, {"a": [None]}, list(range(10_000))]
TOKEN = re.compile(rb'-?[0-9][-+.0-9eE]*|"[^"]*"|[A-Za-z_]+')


class Hang(BaseException):
    """A case that computed for too long; no reader catches it."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """An endless loop or a flood of memory inside ends in an error that no reader expects. CPU time
    is counted, not the clock's, which a busy machine makes long."""
    def stop(*_: Any) -> None:
        raise Hang(f"took more than {SECONDS} s of CPU time")

    handler = signal.signal(signal.SIGPROF, stop)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def damaged_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bytes with one or two small changes, as disks, editors and people make them."""
    for _ in range(draw.choice((1, 1, 2))):
        a = draw.randrange(len(data) + 1)
        b = min(len(data), a + draw.choice((1, 1, 3, 20, 200)))
        tokens = list(TOKEN.finditer(data[:20_000]))
        kind = draw.randrange(8)
        if kind == 0:
            data = data[:a] + bytes(draw.randrange(256) for _ in range(b - a)) + data[b:]
        elif kind == 1:
            data = data[:a] + data[b:]
        elif kind == 2:
            data = data[:b] + data[a:]
        elif kind == 3:
            data = data[:a]
        elif kind == 4:
            data = data[:a] + draw.choice(NASTY).encode() + data[a:]
        elif tokens:
            at = draw.choice(tokens)
            data = data[:at.start()] + draw.choice(NASTY).encode() + data[at.end():]
    return data


def damaged_value(draw: random.Random, value: Any) -> Any:
    """A JSON value with one part of it replaced, left out or doubled."""
    value = json.loads(json.dumps(value))
    above, key, at = None, None, value
    while isinstance(at, dict | list) and at and (above is None or draw.random() < 0.7):
        above, key = at, draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
        at = at[key]
    if above is None or draw.random() < 0.05:
        return draw.choice(VALUES)
    if draw.random() < 0.2:
        del above[key]
    else:
        above[key] = draw.choice([*VALUES, [at], [at, at], {"a": at}])
    return value


def survive(cases: Iterator[Any], read: Callable[[Any], Any], right: Any = None) -> None:
    """Read each case: the result is `right` (None: any), or else an error of one short line."""
    refused = 0
    with bounded():
        for number, case in enumerate(cases):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                got = read(case)
            except (ValueError, OSError) as e:  # which common.ranks.cli prints in a line
                line = str(e)
                assert "\n" not in line and 0 < len(line) < 2000, f"case {number}: {line[:300]}"
                refused += 1
            except BaseException as e:
                raise AssertionError(f"case {number}, {repr(case)[:300]}: {e!r:.300}") from e
            else:
                assert right is None or got == right, f"case {number}: {repr(case)[:300]}"
    assert refused > number / 20


def in_file(path: Path, count: int, seed: str) -> Iterator[bytes]:
    """Damage a file again and again; it is restored in the end."""
    data, draw = path.read_bytes(), random.Random(seed)
    try:
        for _ in range(count):
            case = damaged_bytes(draw, data)
            path.write_bytes(case)
            yield case[:500]
    finally:
        path.write_bytes(data)


def in_json(path: Path, count: int, seed: str, finish: Callable = lambda value: value
            ) -> Iterator[Any]:
    """Damage the values of a JSON file again and again; `finish` may sign them."""
    data, draw = path.read_bytes(), random.Random(seed)
    try:
        for _ in range(count):
            value = finish(damaged_value(draw, json.loads(data)))
            path.write_text(json.dumps(value))
            yield value
    finally:
        path.write_bytes(data)


def in_header(path: Path, count: int, seed: str) -> Iterator[str]:
    """Damage the header of a safetensors file again and again: its values, those of the JSON in its
    metadata, its bytes."""
    data, draw = path.read_bytes(), random.Random(seed)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    try:
        for number in range(count):
            about = header.get("__metadata__", {})
            if number % 3 == 0 and about:
                name = draw.choice(list(about))
                text = json.dumps(damaged_value(draw, json.loads(about[name])))
                text = json.dumps({**header, "__metadata__": {**about, name: text}}).encode()
            elif number % 3 == 1:
                text = json.dumps(damaged_value(draw, header)).encode()
            else:
                text = damaged_bytes(draw, data[8:end])
            length = len(text) if draw.random() < 0.9 else draw.choice((0, 1, 2 ** 40, 2 ** 63))
            path.write_bytes(length.to_bytes(8, "little") + text + data[end:])
            yield text[:400].decode(errors="replace")
    finally:
        path.write_bytes(data)


def sum_of(tensors: Any) -> list[str]:
    """The contents of tensors, to compare."""
    return [f"{name} {trajectories.crc32(value)}" for name, value in sorted(tensors)]


@pytest.fixture
def config(make_config):
    return make_config()


def student_cases(tmp_path, config) -> tuple[Path, Callable]:
    cfg = load_config(sample.Config, "sample", [str(config)])
    path = tmp_path / "student.safetensors"
    tensors = {name: t.read() for name, t in dit_tensors(cfg.weights).items()}
    about = {name: getattr(cfg, name) for name in student_file.SETTINGS}
    about |= {"t_key": [1.0, 0.9, 0.0], "teacher": "0" * 32, "dtype": "bf16"}
    save_tensors(path, tensors, {"accvideo": json.dumps(about)})

    def read(_: Any) -> list[str]:
        student_file.student_facts(path, cfg)
        student_file.how_to_use(path)
        dit = student_file.load_student(cfg, path, torch.device("cpu"))
        return sum_of(dit.state_dict().items())

    return path, read


def test_a_student_with_a_damaged_header_is_refused(tmp_path, config):
    path, read = student_cases(tmp_path, config)
    right = read(None)
    survive(in_header(path, 60, "student"), read, right)
    assert read(None) == right


@pytest.fixture
def store(config, tmp_path, monkeypatch):
    """A SynVid of two trajectories, made without a network, and its reader."""
    cfg = load_config(synvid.Config, "synvid", [str(config)])
    folder, teacher = tmp_path / "run/synvid", trajectories.fingerprint(cfg.weights)
    monkeypatch.setattr(trajectories, "fingerprint", lambda weights: teacher)  # not damaged here
    manifest = trajectories.make_manifest(cfg)
    trajectories.open_manifest(folder, cfg)
    for i in range(2):
        x = draw_noise((len(manifest["stored"]), *manifest["shape"]), [("x", i)])[0].half()
        trajectories.write_trajectory(folder, manifest, i, f"prompt {i}", x,
                                      {"text": torch.ones(3, 4)}, "")

    def read(_: Any) -> list:
        data = trajectories.SynVid(folder, cfg)
        return [(sum_of([("x", x), *cond.items()]), prompt)
                for x, cond, prompt in (data.read(i) for i in range(len(data)))]

    return folder, read


def test_a_synvid_with_a_damaged_manifest_or_header_is_refused(store):
    folder, read = store
    right = read(None)
    survive(in_json(folder / "manifest.json", 60, "values"), read, right)
    survive(in_file(folder / "manifest.json", 60, "bytes"), read, right)
    survive(in_header(folder / "000/000001.safetensors", 60, "header"), read, right)
    survive(in_file(folder / "000/000000.safetensors", 40, "file"), read, right)
    assert read(None) == right


def test_prompts_out_of_a_damaged_synvid_are_refused(store):
    folder, _ = store
    path = folder / "000/000001.safetensors"
    survive(in_header(path, 60, "fig5"), lambda _: paper.stored_prompt(path))


def signed(meta: Any) -> Any:
    """A checkpoint's meta with the checksum of its present values, as a forger writes it."""
    if not isinstance(meta, dict):
        return meta
    meta.pop("crc32", None)
    return {**meta, "crc32": crc32_of_json(meta)}


def test_a_damaged_checkpoint_is_refused(tmp_path, ranks):
    saver = Saver(tmp_path, ranks, 2)
    state = {"student/a": torch.arange(6.).view(2, 3), "heads/b": torch.tensor(4.)}
    saver.save(3, state, {"config": {"lr": 1.0}, "count": 2, "teacher": "x", "synvid": "y"})
    saver.wait()
    folder = tmp_path / "step_000003"

    def read(_: Any) -> list:
        found = latest_checkpoint(tmp_path, ranks)
        if found is None:
            return []
        into = {"student/a": torch.zeros(2, 3), "heads/b": torch.tensor(0.)}
        load_checkpoint(found[0], into)
        return [found[1]["step"], found[1]["config"],
                sum_of(into.items())]

    right = read(None)
    survive(in_json(folder / "meta.json", 60, "values"), read, right)
    survive(in_file(folder / "meta.json", 60, "bytes"), read, right)
    survive(in_header(folder / "rank_00000.safetensors", 60, "header"), read, right)
    survive(in_json(folder / "meta.json", 80, "forged", signed), read)
    assert read(None) == right


CONFIG = {"family": "wan", "weights": "assets/tiny", "height": 48, "fps": 23.976,
          "key": [0, 10, 50], "negative_prompt": "", "shift": 7.0, "cfg_scale": 5.0,
          "synvid": {"prompts": "a.txt", "count": 3, "keep": "key", "compile": False},
          "distill": {"lr": "5e-6", "batch": 16, "heads": "per_timestep", "clip": None},
          "sample": {"solver": "euler"}, "evaluate": {}}
STAGES = {"synvid": synvid.Config, "distill": distill.Config, "sample": sample.Config,
          "evaluate": evaluate.Config}


def settings(stage: str, argv: list[str]) -> None:
    """Read a stage's settings as the stage does, help too."""
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):
        check_model(load_config({**STAGES, "paper": paper.Config}[stage], stage, argv))


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_config_is_refused(stage, tmp_path):
    path, draw = tmp_path / "a.yaml", random.Random(stage)
    path.write_text(yaml.safe_dump(CONFIG))
    survive(in_file(path, 50, stage), lambda _: settings(stage, [str(path)]))
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefgh"))
    merges = "a: &a {x: 1}\n" + "".join(
        f"{b}: &{b} {{!!merge <<: [{', '.join([f'*{a}'] * 9)}]}}\n"
        for a, b in pairwise("abcdefghi"))
    for text in (f"{bomb}key: *h\n", f"{bomb}n: *h\n", f"{bomb}? *h\n: 1\n", f"{bomb}? [*h]\n: 1\n",
                 merges, "".join(f"k{i}: 1\n" for i in range(1000)), "? [a]\n: b\n",
                 "<<: 3\n", "!!python/object:os.system {x: 1}\n", "- " * 1000,
                 f"key: {'9 ' * 999}\n"):
        survive(iter([text]), lambda text: (path.write_text(text), settings(stage, [str(path)])))
    options = [f"--{name}={value}" for name, value in CONFIG.items() if not isinstance(value, dict)]
    options += [f"--{name}={value}" for name, value in CONFIG[stage].items()] + ["--help", "-h"]

    def lines() -> Iterator[list[str]]:
        for _ in range(80):
            argv = draw.sample(options, 3)
            argv[0] = damaged_bytes(draw, argv[0].encode()).decode(errors="replace")
            yield argv

    survive(lines(), lambda argv: settings(stage, argv))


@pytest.mark.parametrize("name, text", [
    ("a.txt", "a red disc moves left\na café\n\n[0:05] a dog\n"),
    ("a.json", json.dumps([{"prompt_en": "a", "dimension": ["x"]}, "b"], indent=1)),
    ("a.jsonl", '{"prompt": "a", "image": null}\n{"caption": "b"}\n'),
    ("a.csv", 'id,prompt\n1,"a, b"\n2,"say ""hi"""\n'), ("a.tsv", "caption\tid\na\t1\nb\t2\n")])
def test_a_damaged_prompt_file_is_refused(name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")

    def read(_: Any) -> None:
        prompts = read_prompts(path)
        assert prompts and all(p.text and p.text == p.text.strip() for p in prompts)

    survive(in_file(path, 150, name), read)


def test_damaged_files_next_to_weights_are_refused(tiny_weights, tmp_path):
    folder = Path(shutil.copytree(tiny_weights, tmp_path / "weights"))
    config, sizes = folder / "config.json", PRESETS["tiny"]
    survive(in_json(config, 40, "sizes"), lambda _: check_sizes(folder, sizes, "tiny"))
    survive(in_file(config, 40, "bytes"), lambda _: check_sizes(folder, sizes, "tiny"))
    shard = folder / "diffusion_pytorch_model.safetensors"
    shard.rename(folder / "a.safetensors")
    index = Path(f"{shard}.index.json")
    write_json(index, {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(
        dit_tensors(folder / "a.safetensors"), "a.safetensors")})
    survive(in_json(index, 40, "index"), lambda _: dit_tensors(folder))
    survive(in_file(index, 40, "index"), lambda _: dit_tensors(folder))
    own = tmp_path / "list.yaml"
    own.write_text("dit: weights/a.safetensors\nvae: weights/Wan2.1_VAE.safetensors\n")
    survive(in_file(own, 60, "list"), lambda _: (read_list(own), role_file(own, "vae")))


@pytest.mark.parametrize("file", ["Wan2.1_VAE.safetensors", "models_t5_umt5-random.safetensors"])
def test_an_encoder_with_a_damaged_header_is_refused(file, tiny_weights, tmp_path):
    from frozen.load import load_text, load_vae
    folder = Path(shutil.copytree(tiny_weights, tmp_path / "weights"))
    load = load_vae if "VAE" in file else lambda path: load_text(path).encoder
    survive(in_header(folder / file, 40, file), lambda _: load(folder))


def test_a_damaged_log_keeps_its_complete_lines(tmp_path):
    path, draw = tmp_path / "log.jsonl", random.Random("log")
    for step in range(5):
        append_log(path, {"step": step, "k": 0, "loss_traj": 0.5})
    data = path.read_bytes()
    with bounded():
        for _ in range(300):
            path.write_bytes(damaged_bytes(draw, data))
            lines = read_log(path, "step", "k")
            assert all(line["step"] >= -10 ** 31 and line["k"] >= -10 ** 31 for line in lines)


@pytest.mark.parametrize("stage, option", [
    ("synvid", "count"), ("synvid", "batch"), ("sample", "count"), ("sample", "steps"),
    ("evaluate", "count"), ("evaluate", "batch"), ("distill", "batch"), ("distill", "head_dim")])
def test_a_size_that_a_typo_makes_is_refused_when_settings_are_read(stage, option):
    for value in ("1e9", "1e12", "1e999999999"):
        with pytest.raises(ValueError, match=f"{option}: expected .* got "):
            settings(stage, [f"--{option}", value])


def test_the_default_config_finds_shipped_files_from_every_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(synvid.Config, "synvid", [])
    assert Path(cfg.weights).is_dir() and Path(cfg.prompts).is_file()
    assert not Path(cfg.run).is_absolute()  # results are relative to the working directory


def test_an_error_has_a_line_of_its_own_after_a_progress_bar(no_ranks, capsys):
    def work() -> None:
        bar = tqdm(total=3, mininterval=0)
        bar.update()
        raise ValueError("a.txt: expected 2, got 1")

    with pytest.raises(SystemExit):
        cli(work)
    assert capsys.readouterr().err.splitlines()[-1] == "error: a.txt: expected 2, got 1"
