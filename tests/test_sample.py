"""sample.py: its noise and steps, its files and their record, and the errors of bad options."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from pixels import read_video
from tqdm import tqdm

import sample
from artifacts import student as student_file
from artifacts import videos
from artifacts.student import student_facts
from common.config import Shared, load_config
from common.files import read_log, write_json
from common.names import dit_tensors, fingerprint, official_names
from common.ranks import Ranks, Timer, generator
from common.weights import open_tensors, safetensors_metadata, save_tensors
from frozen import unipc
from model import key_times, load_dit, time_grid

N, KEY = 4, [0, 1, 4]  # a short grid, with uneven key timesteps


def write_student(path: Path, weights: Path, moved: float = 0.02, diffusers: bool = False,
                  **facts) -> Path:
    """A student file as distill.py writes it: the teacher's weights, moved a little."""
    tensors = {name: t.read() for name, t in dit_tensors(weights).items()}
    tensors = {name: t + moved * torch.randn(t.shape, generator=generator(name))
               for name, t in tensors.items()}
    about = {"family": "wan", "preset": "tiny", "key": KEY, "n": N, "shift": 7.0, "cfg_scale": 1.0,
             "embedded_guidance": 6.016, "t_key": key_times("wan", N, 7.0, KEY), "height": 16,
             "width": 32, "frames": 5, "fps": 8, "dtype": "fp32", "teacher": fingerprint(weights),
             **facts}
    tensors = official_names(tensors, "transformer", reverse=True) if diffusers else tensors
    save_tensors(path, tensors, {"accvideo": json.dumps(about)})
    return path


@pytest.fixture
def run(tiny_weights, tmp_path, make_config):
    """sample.main for a small config: run(options…) -> folder of the videos."""
    config = make_config(n=N, key=KEY, width=32)

    def main(*options: str) -> Path:
        sample.main([str(config), *options])
        return tmp_path / "run/samples"

    main.config, main.folder, main.weights = config, tmp_path, tiny_weights
    return main


@pytest.fixture
def student(run):
    return write_student(run.folder / "run/student.safetensors", run.weights)


class Stub(torch.nn.Module):
    """v(x, t) = mean(text) · x + t, which records the times and texts of its calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, cond):
        self.calls.append((t.tolist(), cond["text"]))
        return cond["text"].mean((1, 2)).view(-1, 1, 1, 1, 1) * x + t.float().view(-1, 1, 1, 1, 1)


def stub_batch(*means: float) -> tuple[torch.Tensor, list[dict]]:
    noise = torch.randn(len(means), 16, 2, 4, 6, generator=generator("stub"))
    return noise, [{"text": torch.full((3, 2), mean)} for mean in means]


def denoise(dit, noise, times, conds, uncond=None, cfg_scale=1.0):
    timer = Timer(torch.device("cpu"))
    unconds = uncond and [uncond] * len(conds)
    x = unipc.sample_batch(dit, noise, times, conds, unconds, cfg_scale, timer, tqdm(disable=True))
    return x, timer.laps()


# ------------------------------------------------------------------------------ noise and steps

def test_denoising_equals_a_loop_written_by_hand():
    times, (noise, conds) = time_grid("wan", N, 7.0)[KEY].tolist(), stub_batch(0.3, -0.2)
    dit, mean = Stub(), torch.tensor([0.3, -0.2]).view(2, 1, 1, 1, 1)
    x, seconds = denoise(dit, noise, times, conds)
    want = noise
    for t, t_next in ((times[0], times[1]), (times[1], times[2])):
        want = want + (t_next - t) * (mean * want + t)
    assert torch.allclose(x, want, atol=1e-6)
    assert [t for t, _ in dit.calls] == [[t, t] for t in times[:-1]]
    assert len(seconds) == 2


def test_guidance_is_uncond_plus_scale_times_the_difference():
    noise, conds = stub_batch(0.5, 0.1)
    dit = Stub()
    x, _ = denoise(dit, noise, [1.0, 0.0], conds, {"text": torch.full((1, 2), 0.2)}, 3.0)
    mean = torch.tensor([0.2 + 3 * (0.5 - 0.2), 0.2 + 3 * (0.1 - 0.2)]).view(2, 1, 1, 1, 1)
    assert torch.allclose(x, noise - (mean * noise + 1), atol=1e-5)
    assert len(dit.calls) == 2


def fast_videos(monkeypatch) -> None:
    """Videos are written as their pixels' bytes: H.264 takes a second."""
    def write(path: Path, video: torch.Tensor, fps: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video.numpy().tobytes())

    monkeypatch.setattr(sample, "write_video", write)


def record_denoise(monkeypatch) -> list[tuple]:
    calls, real = [], unipc.sample_batch

    def spy(dit, noise, times, conds, uncond, *rest):
        calls.append((noise, times, uncond))
        return real(dit, noise, times, conds, uncond, *rest)

    monkeypatch.setattr(sample, "sample_batch", spy)
    fast_videos(monkeypatch)
    return calls


def test_student_and_teacher_start_from_the_same_noise_of_the_seed(run, student, monkeypatch):
    calls = record_denoise(monkeypatch)
    run("--prompt", "a red disc", "--seed", "3")
    run("--prompt", "a red disc", "--seed", "3", "--teacher")
    run("--prompt", "a red disc", "--seed", "2", "--count", "2", "--batch", "2", "--out",
        str(run.folder / "other"))
    run("--prompt", "a blue disc", "--seed", "3")
    a, b, both, other = (noise for noise, _, _ in calls)
    assert torch.equal(a, b) and torch.equal(a, both[1:])
    assert not torch.equal(both[0], both[1]) and not torch.equal(a, other)


def test_each_is_sampled_at_its_own_times_and_only_the_teacher_is_guided(run, student, monkeypatch):
    calls = record_denoise(monkeypatch)
    guided = ("--prompt", "a red disc", "--cfg_scale", "2")
    out = run(*guided)
    run(*guided, "--teacher")
    run(*guided, "--teacher", "--steps", "2")
    assert [times for _, times, _ in calls] == [
        key_times("wan", N, 7.0, KEY), time_grid("wan", N, 7.0).tolist(),
        time_grid("wan", 2, 7.0).tolist()]
    assert [uncond is None for _, _, uncond in calls] == [True, False, False]
    counts = [video["evaluations"] for who in ("student2", "teacher4", "teacher2")
              for video in read_videos(out, who)]
    assert counts == [2, 8, 4]


def test_guidance_given_for_a_student_is_reported_and_changes_no_file(run, student, monkeypatch,
                                                                      capsys):
    fast_videos(monkeypatch)
    run("--prompt", "a red disc")
    assert "no effect" not in capsys.readouterr().out
    out = run("--prompt", "a red disc", "--cfg_scale", "2", "--negative_prompt", "blur")
    said = capsys.readouterr().out
    assert "cfg_scale, negative_prompt: no effect for a student, which has guidance built" in said
    assert len(list(out.glob("*/*.mp4"))) == 1
    cfg = load_config(sample.Config, "sample", [str(run.config), "--shift", "3"])
    sample.sampling_times(cfg, False)
    assert "sampled at its own times, not by the config's shift 3.0" in capsys.readouterr().out


def test_a_missing_ffmpeg_is_reported_before_sampling(run, student, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(run.folder / "absent"))
    monkeypatch.setattr(sample, "setup_distributed", None)
    with pytest.raises(ValueError, match="ffmpeg: cannot write .*absent.*: install imageio-ffmpeg"):
        run("--prompt", "a dog")


def test_a_shipped_config_alone_has_no_prompts_to_sample():
    for path in Path("configs").glob("*.yaml"):
        cfg = load_config(sample.Config, "sample", [str(path), "weights=assets/tiny"])
        with pytest.raises(ValueError, match="prompt: got none; give --prompt"):
            videos.collect_prompts(cfg)


def test_a_student_with_diffusers_names_is_the_same_student(run, student):
    other = write_student(run.folder / "diffusers.safetensors", run.weights, diffusers=True)
    cpu, shared = torch.device("cpu"), Shared(weights=str(run.weights))
    a, b = (student_file.load_student(shared, path, cpu).state_dict() for path in (student, other))
    teacher = load_dit(run.weights, "tiny").state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["head.head.weight"], teacher["head.head.weight"])


# --------------------------------------------------------------------------- what is written

def test_the_same_command_writes_the_same_bytes_into_another_folder(run, student):
    prompts = run.folder / "prompts.txt"
    prompts.write_text("A red disc!\na blue disc\n")
    options = ("--prompt_file", str(prompts), "--count", "2", "--batch", "3")
    a, b = run.folder / "a", run.folder / "b"
    run(*options, "--out", str(a))
    run(*options, "--out", str(b))
    assert sorted(path.name for path in a.iterdir()) == [
        ".student2", "student2", "student2.jsonl"]
    files = [video["file"] for video in read_videos(a)]
    assert sorted(files) == sorted(f"student2/{path.name}" for path in (a / "student2").iterdir())
    assert [re.sub("_[0-9a-f]{8}_", "_", file) for file in files] == [
        f"student2/a-{colour}-disc_seed{seed}.mp4" for colour in ("blue", "red")
        for seed in (0, 1)]
    assert len({(a / file).read_bytes() for file in files}) == 4
    assert all((a / file).read_bytes() == (b / file).read_bytes() for file in files)


def read_videos(out: Path, who: str = "student2") -> list[dict]:
    """The record's last line of each video, by name of the file."""
    lines = {line["file"]: line for line in read_log(out / f"{who}.jsonl") if "file" in line}
    return [lines[file] for file in sorted(lines)]


def test_only_missing_videos_are_made_again(run, student, monkeypatch, capsys):
    calls = record_denoise(monkeypatch)
    options = ("--prompt", "a red disc", "--count", "4")
    out = run(*options)
    first = read_videos(out)
    lost, cut, unrecorded, kept = (out / video["file"] for video in first)
    before = [path.read_bytes() for path in (lost, cut, unrecorded)]
    lost.unlink()
    cut.write_bytes(before[1][:-1])
    part = cut.with_name(f".{cut.name}.4711-0a1b2c3d.part.mp4")  # left by a killed process
    part.write_bytes(before[1][:100])
    record = out / "student2.jsonl"
    lines = [line for line in record.read_text().splitlines() if unrecorded.name not in line]
    record.write_text("\n".join([*lines[:-1], lines[-1], '{"file": "stud']))  # killed as it wrote
    calls.clear()
    run(*options)
    assert len(calls) == 3 and not part.exists()
    assert [path.read_bytes() for path in (lost, cut, unrecorded)] == before
    again = read_videos(out)
    assert again[3] == first[3] and [v["file"] for v in again] == [v["file"] for v in first]
    assert "3 of 4 videos were made now" in capsys.readouterr().out
    run(*options)
    assert len(calls) == 3 and "0 of 4 videos were made now" in capsys.readouterr().out
    assert read_videos(out) == again and kept.exists()


def test_another_student_setting_or_prompt_makes_new_files(run, student, monkeypatch):
    fast_videos(monkeypatch)
    out, same = run("--prompt", "a red disc"), ("--prompt", "a red disc")
    old = {path: path.read_bytes() for path in out.glob("*/*.mp4")}
    run("--prompt", "a red disc?")
    run(*same, "--fps", "9")
    write_student(student, run.weights, moved=0.03)
    run(*same)
    assert len(list(out.glob("*/*.mp4"))) == 4
    assert all(path.read_bytes() == data for path, data in old.items())


def test_a_prompt_is_text_whatever_it_looks_like(run, student, monkeypatch):
    fast_videos(monkeypatch)
    for prompt in ("--teacher", "../../etc/<b>$x^2$ %s {0}", "none", "一只 🦊", "🦊"):
        out = run(f"--prompt={prompt}")
        assert read_log(out / "student2.jsonl")[-1]["prompt"] == prompt
    assert sorted(path.name.partition("_")[0] for path in (out / "student2").iterdir()) == [
        "etc-b-x-2-s-0", "none", "teacher", "video", "一只"]


def test_a_prompt_takes_precedence_over_the_config_s_prompt_file():
    cfg = sample.Config(prompt=" a red disc ", prompt_file="nowhere.txt")
    assert videos.collect_prompts(cfg) == [("a red disc", None)]


@pytest.mark.parametrize("who", ["student2", f"teacher{N}"])
def test_a_run_reports_the_seconds_of_every_phase(run, student, capsys, monkeypatch, who):
    fast_videos(monkeypatch)
    out = run(f"--teacher={who != 'student2'}", "--prompt", "a red disc", "--count", "2")
    record, steps = read_videos(out, who), int(who[7:])
    assert [len(video["seconds"]["steps"]) for video in record] == [steps, steps]
    assert [video["seed"] for video in record] == [0, 1]
    printed = capsys.readouterr().out
    seconds = ", ".join(rf"{name} \d+\.\d\d s" for name in (
        "load", "text", "noise", "steps", "decode", "save"))
    assert re.search(rf"2 videos, {steps} evaluations per video; the slowest process: {seconds} "
                     r"for 2 videos; peak memory (0\.[1-9]|[1-9])", printed)
    assert f"{who}.jsonl" in printed


def test_two_ranks_write_what_one_writes(run, student, monkeypatch, capsys):
    prompts = run.folder / "prompts.txt"
    prompts.write_text("a red disc\na blue disc\na green disc\n")
    fast_videos(monkeypatch)
    alone = run.folder / "one"
    run("--prompt_file", str(prompts), "--out", str(alone))
    missing, gathered = {}, [None, None]
    monkeypatch.setattr(sample, "on_first_rank", lambda work: missing)  # both find nothing done
    for rank in (1, 0):  # one after the other; the last one gathers
        ranks = Ranks(rank, 2, torch.device("cpu"), None)

        def gather(result, rank=rank):
            gathered[rank] = result
            return gathered

        monkeypatch.setattr(sample, "setup_distributed", lambda *_, ranks=ranks, **__: ranks)
        monkeypatch.setattr(sample, "gather_values", gather)
        out = run("--prompt_file", str(prompts))
    files = sorted(alone.glob("*/*.mp4"))
    assert len(files) == 3
    assert all(p.read_bytes() == (out / "student2" / p.name).read_bytes() for p in files)
    assert sorted(video["index"] for video in read_videos(out)) == [0, 1, 2]
    assert "3 of 3 videos were made now" in capsys.readouterr().out


# --------------------------------------------------------------------------- what is refused

def test_a_missing_student_names_the_command_that_makes_it(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="student.safetensors: .*`python distill.py CONF"):
        run("--prompt", "a red disc")
    (tmp_path / "student.safetensors").symlink_to("blobs/0a")
    with pytest.raises(FileNotFoundError, match="only a link to blobs/0a"):
        run("--prompt", "a red disc", "--student", str(tmp_path / "student.safetensors"))


def test_a_student_is_sampled_without_its_teacher_s_dit(run, student, tmp_path):
    with_it = read_video(next(run("--prompt", "a red disc").glob("*/*.mp4")))
    own = tmp_path / "no DiT"
    shutil.copytree(run.weights, own, ignore=shutil.ignore_patterns("diffusion_*", "config.json"))
    out = run("--prompt", "a red disc", "--weights", str(own), "--out", str(tmp_path / "b"))
    assert out and torch.equal(read_video(next((tmp_path / "b").glob("*/*.mp4"))), with_it)


@pytest.mark.parametrize("form", ["folder", "shards", "diffusers shards"])
def test_a_student_s_key_times_are_read_from_a_folder_and_from_shards_too(form, run, student,
                                                                          tmp_path):
    tensors = {name: t.read() for name, t in open_tensors(student).items()}
    if form.startswith("diffusers"):
        tensors = official_names(tensors, "transformer", reverse=True)
    folder, about = tmp_path / "student", safetensors_metadata(student)
    folder.mkdir()
    names = sorted(tensors)
    parts = [names] if form == "folder" else [names[::2], names[1::2]]
    index = {}
    for i, part in enumerate(parts):
        file = f"diffusion_pytorch_model-{i}.safetensors"
        save_tensors(folder / file, {name: tensors[name] for name in part}, about)
        index |= dict.fromkeys(part, file)
    if len(parts) > 1:
        write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": index})
    plain = student_facts(student, load_config(sample.Config, "sample", [str(run.config)]))
    cfg = load_config(sample.Config, "sample", [str(run.config)])
    assert student_facts(folder, cfg) == plain
    ours, theirs = (student_file.load_student(cfg, path, torch.device("cpu")).state_dict()
                    for path in (folder, student))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("facts, message", [
    ({"preset": "wan-t2v-14b"}, "preset is 'wan-t2v-14b', the config's 'tiny'"),
    ({"family": "hunyuan"}, "family is 'hunyuan', the config's 'wan'"),
    ({"t_key": [0.0, 0.5, 1.0]}, r"t_key: expected times falling .*, got \[0.0, 0.5, 1.0\]"),
])
def test_a_student_of_another_teacher_is_refused_naming_both(run, facts, message):
    write_student(run.folder / "run/student.safetensors", run.weights, **facts)
    with pytest.raises(ValueError, match=message):
        run("--prompt", "a red disc")


def test_files_that_are_not_a_student_are_refused(run, student):
    shutil.copy(run.weights / "diffusion_pytorch_model.safetensors", student)  # says nothing
    with pytest.raises(ValueError, match="'accvideo' metadata: .* has no key family"):
        run("--prompt", "x")
    with pytest.raises(ValueError, match="misses .* tensor"):  # named, but it is no DiT
        run("--prompt", "x", "--student", str(run.weights / "Wan2.1_VAE.safetensors"))
    student.write_bytes(student.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        run("--prompt", "x")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_student_of_another_project_takes_the_config_s_key_timesteps(run, student, suffix,
                                                                      capsys):
    path = run.folder / f"released.{suffix}"
    tensors = {name: t.read() for name, t in dit_tensors(student).items()}
    if suffix == "pt":
        torch.save({"module": tensors}, path)
    else:
        save_tensors(path, tensors, {})
    for options, out in (((), "own"), (("--student", str(path)), "foreign")):
        run("--prompt", "a red disc", "--out", str(run.folder / out), *options)
    own, foreign = (next((run.folder / out).glob("*/*.mp4")) for out in ("own", "foreign"))
    assert own.name == foreign.name and own.read_bytes() == foreign.read_bytes()
    assert "has no metadata of this project" in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    (("--promt", "x"), "unknown option '--promt'; did you mean 'prompt'"),
    ((), "prompt: got none; give --prompt"),
    (("--prompt", "  "), "prompt: got none"),
    (("--prompt_file", "nowhere.txt"), "nowhere.txt: no such prompt file"),
    (("--prompt", "x", "--frames", "6"), "frames: expected 4n .*got 6"),
    (("--prompt", "x", "--height", "40"), "height: expected 16n.*got 40"),
    (("--prompt", "x", "--width", "0"), "width: expected .*, got 0"),
    (("--prompt", "x", "--count", "0"), "count: expected .*, got 0"),
    (("--prompt", "x", "--steps", "three"), "steps: expected int, got 'three'"),
    (("--prompt", "x", "--steps", "3"), "steps: got 3; .* was distilled for 2 steps"),
    (("--prompt", "x", "--teacher", "--steps", "0"), "steps: expected .*, got 0"),
    (("--prompt", "x", "--teacher", "--student", "s.safetensors"), "both --teacher and --student"),
    (("--prompt", "x", "--preset", "wan-t2v-14b"), "preset is 'tiny', the config's 'wan-t2v-14b'"),
    (("--prompt", "x", "--teacher", "--preset", "huge"), "preset: .*got 'huge'"),
    (("--prompt", "x", "--lora_scale", "2"), "lora_scale: got 2.0 without a LoRA"),
])
def test_bad_options_are_refused_by_name(run, student, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*options)
    assert not list((run.folder / "run").rglob("*.mp4"))
