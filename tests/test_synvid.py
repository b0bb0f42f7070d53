"""SynVid: trajectories obey Eq. 5, their bytes depend on seed, index and prompt alone, kills lose
nothing, and user errors are reported in one line. On random weights of preset `tiny`."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import PATIENCE, in_processes, start_each
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common.files
import common.ranks
import model
import synvid
from artifacts import trajectories
from artifacts.trajectories import SynVid, initial_noise, trajectory_path
from common.config import load_config
from common.files import write_json
from common.ranks import cli
from frozen.load import load_text
from model import collate, euler_step, load_dit, time_grid, velocity


def generate(config: Path, *args) -> Path:
    """Run stage 1 in this process; returns its folder."""
    synvid.main([str(config), *map(str, args)])
    return Path(config_of(config, *args).run) / "synvid"


def config_of(config: Path, *args) -> synvid.Config:
    return load_config(synvid.Config, "synvid", [str(config), *map(str, args)])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a SynVid folder but the job's own, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(("config.yaml", ".owner"))}


@pytest.fixture(scope="module")
def made(tiny_weights, tmp_path_factory):
    """A finished folder and the config it was made with; tests must not change it."""
    root = tmp_path_factory.mktemp("made")
    args = ["--weights", tiny_weights, "--prompts", tiny_weights / "prompts.txt", "--run", root,
            "--height", 16, "--width", 16, "--frames", 5, "--n", 4, "--key", "0,2,4", "--videos", 0,
            "--device", "cpu", "--count", 7]
    path = root / "config.yaml"
    path.write_text("{}")
    return generate(path, *args), config_of(path, *args), [path, *args]


@pytest.fixture
def tmpfs(tmp_path):
    """A mounted memory disk of 1 MiB, or a skipped test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


# ------------------------------------------------------------------------------ trajectories

@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_a_stored_trajectory_satisfies_eq_5_exactly_step_by_step(make_config, cfg_scale):
    config = make_config(n=6, key=list(range(7)), cfg_scale=cfg_scale, negative_prompt="a red disc",
                         synvid={"keep": "all", "dtype": "fp32", "batch": 3, "count": 3})
    data, cfg = SynVid(generate(config), config_of(config)), config_of(config)
    x_key, conds, _ = zip(*[data.read(i) for i in range(3)], strict=True)
    x_key, times = torch.stack(x_key, 1), time_grid(cfg.family, cfg.n, cfg.shift).tolist()
    assert data.t_key == times[::-1]
    dit, uncond = load_dit(cfg.weights, cfg.preset), None
    if cfg_scale != 1:
        text = load_text(cfg.weights, "cpu", torch.float32, dit.cfg.text_len)
        uncond = collate(text.encode_each(["a red disc"]) * 3)
    for k in range(5, -1, -1):  # k + 1 is the noisier end
        with torch.no_grad():
            v = velocity(dit, x_key[k + 1], data.t_key[k + 1], collate(conds), uncond, cfg_scale)
        step = euler_step(x_key[k + 1], v, data.t_key[k + 1], data.t_key[k])
        assert torch.equal(step, x_key[k])
        assert not torch.equal(x_key[k], x_key[k + 1])


def test_key_latents_are_those_of_all_latents_and_fp16_rounds_once(make_config, tmp_path):
    config = make_config(n=6, key=[0, 2, 4, 6], synvid={"count": 3})

    def latents(*args):
        run = tmp_path / "-".join(args)
        cfg = config_of(config, "--run", run, *args)
        data = SynVid(generate(config, "--run", run, *args), cfg)
        return torch.stack([data.read(i)[0] for i in range(3)])

    reference = latents("--keep", "all", "--dtype", "fp32")
    assert torch.equal(latents("--dtype", "fp32"), reference)
    half = latents("--dtype", "fp16")
    assert torch.equal(half[:, :-1], reference[:, :-1].half().float())
    assert torch.equal(half[:, -1], reference[:, -1])  # the noise is drawn again, in fp32
    assert reference.abs().mean() > 0.1


def test_the_noise_is_a_function_of_seed_index_and_prompt_alone():
    shape = (16, 2, 2, 2)
    noise = initial_noise(0, 5, "a red disc", shape)
    torch.manual_seed(1)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, initial_noise(0, 5, "a red disc", shape))
    for other in ((1, 5, "a red disc"), (0, 6, "a red disc"), (0, 5, "a red disk")):
        assert not torch.equal(noise, initial_noise(*other, shape))


def test_the_reader_gives_prompts_conditions_and_times_in_order(made, tiny_weights):
    folder, cfg, _ = made
    data, prompts = SynVid(folder, cfg), (tiny_weights / "prompts.txt").read_text().splitlines()
    assert len(data) == 7
    assert data.t_key[0] == 0 and data.t_key[-1] == 1 and data.t_key == sorted(data.t_key)
    for i in range(7):
        x_key, cond, prompt = data.read(i)
        assert prompt == prompts[i] and x_key.dtype == torch.float32
        assert torch.equal(x_key[2], initial_noise(0, i, prompt, (16, 2, 2, 2)))
        assert cond["text"].dtype == torch.float32 and not (cond["text"] == 0).all(1).any()
    assert torch.equal(data.read(3, [1, 0])[0], data.read(3)[0][[1, 0]])
    with pytest.raises(ValueError, match="000007.safetensors: cannot be used"):
        data.read(7)


def apart(ranks, folder: Path, made: Path, args: list) -> None:
    """One of two processes with a folder each; then the second one's list of trajectories lags."""
    common.ranks.SIGHT = 0
    try:
        with common.ranks.lock_run_folder(folder / str(ranks.rank)):
            said = "no error"
    except ValueError as e:
        said = str(e)
    if ranks.rank == 1:
        trajectories.find_trajectories = lambda folder: {0, 1, 4}
    data = trajectories.open_trajectories(made, config_of(*args))
    write_json(folder / f"{ranks.rank}.json", [said, len(data), data.read(6)[2]])


def test_ranks_must_see_one_run_folder_and_take_the_first_one_s_list(made, tmp_path, tiny_weights):
    folder, _, args = made
    in_processes(2, partial(apart, made=folder, args=args), tmp_path)
    (first, *one), (second, *two) = (json.loads((tmp_path / f"{r}.json").read_text())
                                     for r in range(2))
    assert "0: rank(s) 1 do not see what rank 0 writes there" in first and second == ""
    assert one == two == [7, (tiny_weights / "prompts.txt").read_text().splitlines()[6]]
    assert not [p for p in tmp_path.rglob(".*") if p.name != ".owners"]


def test_text_states_are_stored_without_loss_and_as_bf16_where_that_holds_them():
    exact, other = torch.randn(3, 4).bfloat16().float(), torch.randn(3, 4)
    assert trajectories.bf16_if_exact(exact).dtype == torch.bfloat16
    assert torch.equal(trajectories.bf16_if_exact(exact).float(), exact)
    assert trajectories.bf16_if_exact(other) is other


def test_more_trajectories_than_prompts_take_the_prompts_in_turn(make_config, tmp_path):
    prompts = tmp_path / "two.txt"
    prompts.write_text("a red disc\n\n  a blue ring \n", encoding="utf-8")
    config = make_config(synvid={"prompts": str(prompts), "count": 5, "batch": 2})
    data = SynVid(generate(config), config_of(config))
    assert [data.read(i)[2] for i in range(5)] == ["a red disc", "a blue ring"] * 2 + ["a red disc"]
    assert not torch.equal(data.read(0)[0], data.read(2)[0])


def test_the_first_trajectories_are_decoded_to_videos_and_lost_ones_made_again(make_config):
    config = make_config(synvid={"count": 3})
    folder = generate(config)
    assert not (folder / "videos").exists()
    generate(config, "--videos", 2)
    before = contents(folder)
    assert sorted(p.name for p in (folder / "videos").iterdir()) == ["000000.mp4", "000001.mp4"]
    (folder / "videos/000001.mp4").unlink()
    generate(config, "--videos", 2)
    assert contents(folder) == before


def test_the_cost_is_printed_before_the_start_and_after_the_first_batch(make_config, capsys):
    config = make_config(synvid={"count": 5, "batch": 2})
    generate(config, "--count", 3)
    capsys.readouterr()
    generate(config)
    out = capsys.readouterr().out
    assert "2 trajectories to make, 3 of 5 exist" in out and "free at" in out
    assert "per trajectory on cpu" in out and "device-hours" in out and "left with 1 rank" in out
    assert "do not exist" not in out
    generate(config, "--start", 8, "--count", 1)
    assert "trajectories 5 to 7 do not exist and are not of this job: distill.py needs them too: " \
           "make them with --start 5 --count 3" in capsys.readouterr().out


def test_other_prompts_and_settings_without_effect_are_reported(make_config, tmp_path, capsys):
    config = make_config(synvid={"count": 2, "batch": 2})
    generate(config)
    generate(config, "--count", 3)  # more of the same
    out = capsys.readouterr().out
    assert "another prompt" not in out and "no effect" not in out
    other = tmp_path / "other.txt"
    other.write_text("a blue ring\na red disc\n", encoding="utf-8")
    generate(config, "--prompts", other, "--negative_prompt", "blurry")
    out = capsys.readouterr().out
    assert (f"trajectory 0 exists and was made from another prompt than the one in {other}: "
            "existing") in out
    assert "negative_prompt has no effect at cfg_scale 1" in out


def test_trajectories_that_are_not_finite_are_not_written(made, tmp_path):
    folder, _, _ = made
    manifest = trajectories.read_manifest(folder)
    x = torch.zeros(2, 16, 2, 2, 2, dtype=torch.float16)
    x[1, 3] = torch.inf
    with pytest.raises(ValueError, match="000000.safetensors.* after step 4 contains NaN.* prompt"):
        trajectories.write_trajectory(tmp_path, manifest, 0, "a red disc", x, {}, "")
    assert contents(tmp_path) == {}


# ----------------------------------------------------------------------- nothing but the index

def test_neither_ranks_nor_jobs_nor_their_order_change_a_byte(make_config, run_stage, tmp_path):
    config = make_config(synvid={"count": 11, "batch": 4, "videos": 2})
    reference = contents(generate(config, "--run", tmp_path / "one"))
    assert len(reference) == 1 + 11 + 2
    for start, count in ((9, 2), (0, 3), (3, 6)):  # cut batches, out of order
        jobs = generate(config, "--run", tmp_path / "jobs", "--start", start, "--count", count)
    assert contents(jobs) == reference
    done = run_stage("synvid", config, "--run", tmp_path / "ranks", ranks=2)
    assert "with 2 rank(s)" in done.stdout
    assert contents(tmp_path / "ranks/synvid") == reference


def test_a_job_with_other_encoders_is_refused_and_verify_finds_its_trajectories(
        make_config, tiny_weights, tmp_path, capsys):
    config = make_config(synvid={"count": 2, "batch": 2})
    folder, other = generate(config), tmp_path / "other"
    shutil.copytree(tiny_weights, other)
    path = other / "models_t5_umt5-random.safetensors"
    tensors = {name: value * 1.01 for name, value in load_file(path).items()}
    save_file(tensors, path, safe_open(path, "pt").metadata())
    job = config, "--weights", other, "--start", 2
    with pytest.raises(ValueError, match=r"000000.safetensors: was made with other text or image"):
        generate(*job)
    assert len(trajectories.find_trajectories(folder)) == 2
    mixed = generate(*job, "--run", tmp_path / "mixed") / "000/000002.safetensors"
    shutil.copy(mixed, folder / "000")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        generate(config, "--count", 4, "--verify", "true")
    out = capsys.readouterr().out
    assert "000003.safetensors: missing" in out
    assert "000002.safetensors: it was made with other text or image encoders than" in out
    with pytest.raises(ValueError, match="000002.safetensors: .* other text or image encoders"):
        SynVid(folder, config_of(config)).read(2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_make_the_same_trajectories_up_to_rounding(make_config, run_stage,
                                                                   tmp_path):
    config = make_config(n=4, key=[0, 2, 4], synvid={"count": 2, "batch": 2, "dtype": "fp32"})
    generate(config, "--run", tmp_path / "plain")
    run_stage("synvid", config, "compile=true", f"run={tmp_path / 'compiled'}")
    manifest = trajectories.read_manifest(tmp_path / "plain/synvid")
    for i in range(2):
        ours, theirs = (trajectories.read_trajectory(
            tmp_path / n / "synvid", manifest, i, [2, 4])[0]
                        for n in ("compiled", "plain"))
        assert 0 < (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_guidance_on_two_groups_of_ranks_changes_no_byte_and_sp_no_more_than_rounding(
        make_config, run_stage, tmp_path):
    config = make_config(height=32, cfg_scale=3.0, negative_prompt="a ring",
                         synvid={"count": 5, "batch": 2, "dtype": "fp32"})
    reference = contents(generate(config, "--run", tmp_path / "one"))
    done = run_stage("synvid", config, f"run={tmp_path / 'pairs'}", "cfg_parallel=true", ranks=2)
    assert contents(tmp_path / "pairs/synvid") == reference and "with 2 rank(s)" in done.stdout
    run_stage("synvid", config, f"run={tmp_path / 'both'}", "cfg_parallel=true", "sp=2", ranks=4)
    manifest = trajectories.read_manifest(tmp_path / "one/synvid")
    for i in range(5):
        ours, theirs = (trajectories.read_trajectory(
            tmp_path / name / "synvid", manifest, i, [0, 2, 4])
                        for name in ("both", "one"))
        assert torch.equal(ours[1]["text"], theirs[1]["text"])
        assert (ours[0] - theirs[0]).abs().max() < 1e-5 * theirs[0].abs().max()  # products' shapes
    with pytest.raises(ValueError, match="cfg_parallel: expected replicas of 2 rank"):
        generate(config, "--run", tmp_path / "few", "--cfg_parallel", "true")


def test_verify_lists_what_is_wrong_and_repair_makes_just_that_again(made, run_stage, tmp_path):
    folder, _, args = made
    arguments = [f"{str(a)[2:]}={b}" for a, b in zip(args[1::2], args[2::2], strict=True)
                 if a != "--run"]
    command = ("synvid", args[0], *arguments, f"run={tmp_path}")
    copy = Path(shutil.copytree(folder, tmp_path / "synvid"))
    done = run_stage(*command, "verify=true", ranks=2)
    assert "7 of 7 trajectories are complete, 0 are damaged or missing" in done.stdout
    trajectory_path(copy, 2).unlink()
    os.truncate(trajectory_path(copy, 3), 2000)
    raw = bytearray(trajectory_path(copy, 5).read_bytes())
    raw[-9] ^= 4
    trajectory_path(copy, 5).write_bytes(raw)
    before = contents(copy)
    done = run_stage(*command, "verify=true", ranks=2, check=False)
    assert done.returncode == 1 and "4 of 7 trajectories are complete, 3 are damaged" in done.stdout
    faults = [line for line in done.stdout.splitlines() if line.startswith(str(copy))]
    for line, i, fault in zip(faults, (2, 3, 5), ("missing", "", "checksum"), strict=True):
        assert line.startswith(f"{trajectory_path(copy, i)}: ") and fault in line
    assert contents(copy) == before
    untouched = {i: trajectory_path(copy, i).stat().st_mtime_ns for i in (0, 1, 4, 6)}
    done = run_stage(*command, "repair=true", ranks=2)
    assert "3 trajectories to make" in done.stdout and contents(copy) == contents(folder)
    assert {i: trajectory_path(copy, i).stat().st_mtime_ns for i in untouched} == untouched


def test_the_number_of_threads_changes_no_byte(made, tmp_path):
    folder, _, args = made
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert contents(generate(*args, "--run", tmp_path)) == contents(folder)
    finally:
        torch.set_num_threads(before)


def test_the_batch_size_changes_no_more_than_rounding(make_config, tmp_path):
    config = make_config(synvid={"count": 5, "dtype": "fp32"})
    latents = []
    for batch in (1, 5):
        args = ["--run", tmp_path / str(batch), "--batch", batch]
        data = SynVid(generate(config, *args), config_of(config, *args))
        latents.append(torch.stack([data.read(i)[0] for i in range(5)]))
    # fp32 matrix products of other sizes are summed in another order: some 1e-7 of each value
    assert (latents[0] - latents[1]).abs().max() <= 1e-5 * latents[0].abs().max()


# ------------------------------------------------------------------------------ nothing lost

STAGE_FILES = {module.__file__ for module in (synvid, trajectories, common.files)}


def each_call(action: Callable[[str], None]) -> Callable:
    """A profiler that acts on the function's name before each call in this stage's files, also of C
    functions."""
    def profile(frame, event, arg):
        if event in ("call", "c_call") and frame.f_code.co_filename in STAGE_FILES:
            action(frame.f_code.co_name)
    return profile


def run_until_call(variables: dict, argv: list[str], last: int) -> None:
    """Run stage 1 in a process that is killed at its call number `last`."""
    calls = itertools.count(1)
    sys.setprofile(each_call(lambda _: next(calls) < last or os.kill(os.getpid(), signal.SIGKILL)))
    cli(lambda: synvid.main(argv))


def test_killed_at_random_calls_the_same_command_ends_with_the_same_bytes(make_config, tmp_path):
    config = make_config(synvid={"count": 12, "batch": 2, "keep": "all", "dtype": "fp32"})
    calls, rng = [], random.Random(0)
    sys.setprofile(each_call(calls.append))
    try:
        reference = contents(generate(config, "--run", tmp_path / "reference"))
    finally:
        sys.setprofile(None)
    folder, done, first = tmp_path / "run/synvid", 0, calls.index("sample_trajectories")
    batch = (len(calls) - first) // 6  # calls of one of the six batches
    for _ in range(5):
        last = first + batch // 2 + rng.randrange(batch)  # a batch or two
        [victim] = start_each(1, run_until_call, [str(config)], last)
        victim.join(PATIENCE)
        assert victim.exitcode == -signal.SIGKILL
        left = {name: data for name, data in contents(folder).items() if "/." not in name}
        assert left.items() <= reference.items()  # no half-written file has its final name
        assert done <= len(left) < len(reference)
        done = len(left)
    assert done > 1
    generate(config)
    assert contents(folder) == reference


def test_dying_while_a_file_is_written_leaves_no_final_name(made, tmp_path):
    folder, _, args = made
    copy = Path(shutil.copytree(folder, tmp_path / "synvid"))
    manifest, path = trajectories.read_manifest(copy), trajectory_path(copy, 2)
    with safe_open(path, "pt") as f:
        x, cond = f.get_tensor("x"), {"text": f.get_tensor("cond.text")}
    path.unlink()

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(path, data):
        with path.open("wb") as f:
            f.write(data[:len(data) // 2])
        die()

    for owner, name, death in ((Path, "write_bytes", write_half), (os, "replace", die)):
        child = os.fork()
        if child == 0:
            setattr(owner, name, death)
            trajectories.write_trajectory(copy, manifest, 2, "a red disc moves up", x, cond, "")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = contents(copy).keys() - contents(folder).keys()
    assert left and all(name.startswith("000/.000002.safetensors.") for name in left)
    assert not path.exists()
    assert contents(generate(*args, "--run", tmp_path)) == contents(folder)


# ---------------------------------------------------------------------- one folder, one kind

OTHERS = {"n": ["--n", 8, "--key", "0,2,4,8"], "shift": ["--shift", 5], "height": ["--height", 32],
          "frames": ["--frames", 9], "cfg_scale": ["--cfg_scale", 2], "weights": None}


@pytest.fixture
def other(request, make_weights, tmp_path):
    """Arguments that differ in the key under test."""
    return OTHERS[request.param] or ["--weights", make_weights(tmp_path / "other", seed=1)]


@pytest.mark.parametrize("key, other", [(key, key) for key in OTHERS], indirect=["other"])
def test_trajectories_of_another_teacher_grid_guidance_or_size_are_refused(made, key, other):
    folder, _, args = made
    before = contents(folder)
    wrong = rf"manifest.json: {key}: expected .* by this config, got .*: .*--run"
    with pytest.raises(ValueError, match=wrong):
        SynVid(folder, config_of(*args, *other))
    with pytest.raises(ValueError, match=wrong):
        generate(*args, *other)
    assert contents(folder) == before


@pytest.mark.parametrize("key, args", {
    "stored": ["--keep", "all"], "dtype": ["--dtype", "fp32"], "seed": ["--seed", 1]}.items())
def test_a_job_of_other_storage_or_seed_is_refused(made, key, args):
    folder, _, first = made
    before = contents(folder)
    with pytest.raises(ValueError, match=f"manifest.json: {key}: expected .*, got .*--run"):
        generate(*first, *args)
    assert contents(folder) == before


def test_without_guidance_the_negative_prompt_does_not_matter_and_the_trainers_seed_never(made):
    folder, _, args = made
    assert len(SynVid(folder, config_of(*args, "--negative_prompt", "blurry", "--seed", 3))) == 7


def test_a_key_timestep_that_is_not_stored_is_named(made):
    folder, _, args = made
    with pytest.raises(ValueError, match=r"latent after step 3.*those after \[2, 4\].*--keep all"):
        SynVid(folder, config_of(*args, "--key", "0,3,4"))


def test_times_that_the_code_does_not_compute_any_more_are_an_error(made, monkeypatch):
    folder, cfg, _ = made
    grid = model.time_grid
    monkeypatch.setattr(model, "time_grid", lambda *args: grid(*args) ** 1.001)
    with pytest.raises(ValueError, match=r"manifest.json: t: expected \[.*, got \[0.0, "):
        SynVid(folder, cfg)


def test_missing_empty_and_unfinished_folders_are_named_with_the_command(made, tmp_path):
    folder, cfg, _ = made
    with pytest.raises(FileNotFoundError, match="no SynVid in this folder: .*`python synvid.py"):
        SynVid(tmp_path / "none", cfg)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    trajectory_path(copy, 4).unlink()
    trajectory_path(copy, 5).unlink()
    with pytest.raises(ValueError, match="000004.*missing, the first of a gap of 2; 5 traj"):
        SynVid(copy, cfg)
    shutil.rmtree(copy / "000")
    with pytest.raises(ValueError, match="000000.*missing, the first of a gap of 1; 0 traj"):
        SynVid(copy, cfg)
    for text, wrong in (('{"version": 1}', "expected format version 2, got 1"),
                        ("{", "is not valid JSON")):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=f"manifest.json: .*{wrong}"):
            SynVid(copy, cfg)


def test_a_manifest_that_another_job_replaces_while_this_one_runs_stops_it(made, tmp_path,
                                                                           monkeypatch):
    path, sample = tmp_path / "synvid/manifest.json", synvid.sample_trajectories

    def meddle(*args):
        write_json(path, json.loads(path.read_text()) | {"seed": 9})
        return sample(*args)

    monkeypatch.setattr(synvid, "sample_trajectories", meddle)
    with pytest.raises(ValueError, match="manifest.json: seed: .*got 9: another job .*replaced"):
        generate(*made[2], "--run", tmp_path)
    assert not (tmp_path / "synvid/000").exists()


def test_a_job_stops_whose_manifest_another_one_replaces_as_soon_as_it_is_written(
        made, tmp_path, monkeypatch):
    def write(path, manifest):
        write_json(path, manifest)
        write_json(path, manifest | {"seed": 9})

    monkeypatch.setattr(trajectories, "write_json", write)
    with pytest.raises(ValueError, match="manifest.json: seed: expected 0 by this config, got 9"):
        generate(*made[2], "--run", tmp_path)
    assert not (tmp_path / "synvid/000").exists()


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_text("{"),
    lambda path: write_json(path, json.loads(path.read_text()) | {"version": 1}),
    lambda path: write_json(path, json.loads(path.read_text()) | {"seed": 9})])
def test_a_lost_or_damaged_manifest_is_written_again_if_the_trajectories_fit(
        made, tmp_path, damage, capsys):
    folder, cfg, args = made
    copy = Path(shutil.copytree(folder, tmp_path / "synvid"))
    damage(copy / "manifest.json")
    before = contents(copy)
    with pytest.raises((ValueError, FileNotFoundError), match="python synvid.py|--repair"):
        SynVid(copy, cfg).read(0)
    with pytest.raises(ValueError, match="manifest.json: .*(--run|command that made it)"):
        generate(*args, "--run", tmp_path, "--shift", 3)
    assert contents(copy) == before
    assert contents(generate(*args, "--run", tmp_path)) == contents(folder)
    assert "manifest.json: was missing or damaged; written again" in capsys.readouterr().out


def test_prompts_may_be_appended_while_another_job_runs(made, tmp_path, monkeypatch):
    folder, cfg, args = made
    texts, longer = Path(cfg.prompts).read_text(), tmp_path / "longer.txt"
    longer.write_text(texts + "one more\n")
    sample, last = synvid.sample_trajectories, len(texts.splitlines())

    def second_job(*arguments):
        monkeypatch.setattr(synvid, "sample_trajectories", sample)
        generate(*args, "--run", tmp_path, "--prompts", longer, "--start", last, "--count", 1)
        return sample(*arguments)

    monkeypatch.setattr(synvid, "sample_trajectories", second_job)
    generate(*args, "--run", tmp_path)
    both, manifest = tmp_path / "synvid", trajectories.read_manifest(folder)
    assert contents(folder).items() <= contents(both).items()
    assert trajectories.read_trajectory(both, manifest, last, [4])[2] == "one more"


# --------------------------------------------------------------------------------- bad files

def test_a_flipped_bit_or_a_cut_anywhere_in_a_trajectory_is_found(made, tmp_path):
    folder, cfg, _ = made
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path, data = trajectory_path(copy, 2), SynVid(copy, cfg)
    x_key, cond, prompt = data.read(2)
    good, rng = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    spots = [*range(16), *rng.sample(range(16, header), 150),
             *rng.sample(range(header, len(good)), 150)]
    damaged = [good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1:] for i in spots]
    damaged += [good[:cut] for cut in (0, 1, 8, header, len(good) // 2, len(good) - 1)]
    damaged.append(good + b"x")
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="000002.safetensors: cannot be used .* --repair$"):
            data.read(2)
    path.write_bytes(good)
    again = data.read(2)
    assert torch.equal(again[0], x_key) and torch.equal(again[1]["text"], cond["text"])
    assert again[2] == prompt


def cut_while_read(ranks, folder: Path) -> None:
    """A process that reads a trajectory whose file is cut when its header has been read."""
    path, real = trajectory_path(folder, 0), trajectories.read_header
    trajectories.read_header = lambda *args: (real(*args), os.truncate(path, 100))[0]
    manifest = trajectories.read_manifest(folder)
    with pytest.raises(ValueError, match="000000.safetensors: cannot be used .* --repair$"):
        trajectories.read_trajectory(folder, manifest, 0, manifest["stored"])


def test_a_file_that_is_lost_while_it_is_read_is_an_error_and_no_signal(made, tmp_path):
    folder, _, _ = made
    shutil.copytree(folder, tmp_path / "synvid")
    in_processes(1, cut_while_read, tmp_path / "synvid")


def test_a_damaged_trajectory_deleted_as_the_error_says_is_made_again(made, tmp_path):
    folder, _, args = made
    shutil.copytree(folder, tmp_path / "synvid")
    trajectory_path(tmp_path / "synvid", 2).unlink()
    assert contents(generate(*args, "--run", tmp_path)) == contents(folder)


def test_a_trajectory_under_another_number_or_from_another_folder_is_refused(made, tmp_path):
    folder, cfg, args = made
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.copy(trajectory_path(copy, 1), trajectory_path(copy, 2))
    with pytest.raises(ValueError, match="000002.safetensors: .*it is trajectory 1 of"):
        SynVid(copy, cfg).read(2)
    foreign = generate(*args, "--run", tmp_path, "--seed", 1)
    shutil.copy(trajectory_path(foreign, 3), trajectory_path(copy, 3))
    with pytest.raises(ValueError, match="000003.safetensors: .* of manifest"):
        SynVid(copy, cfg).read(3)


def test_only_the_latents_asked_for_are_read(made, tmp_path):
    folder, cfg, _ = made
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path, data = trajectory_path(copy, 0), SynVid(copy, cfg)
    with safe_open(path, "pt") as f:
        middle = f.get_slice("x")[0].numpy().tobytes()  # after step 2: k = 1
    content = bytearray(path.read_bytes())
    content[content.find(middle)] ^= 1
    path.write_bytes(content)
    data.read(0, [2, 0])
    with pytest.raises(ValueError, match="latent after step 2 does not match its checksum"):
        data.read(0)


# --------------------------------------------------------------------------------- bad input

def test_prompts_that_look_like_flags_paths_or_markup_are_text(make_config, tmp_path):
    prompts = ["--run /etc", "../../../etc/passwd", "/dev/sda", "<b>bold</b> &lt;", "{0.__class__}",
               "%s %n", "$(reboot); `ls`", 'a "quoted" \\ one', "</s> <pad>", "红色 圆盘 🔴",
               "a\x1b[31mb", "line\u2028separator"]
    (tmp_path / "odd.txt").write_text("\n".join(prompts), encoding="utf-8")
    config = make_config(synvid={"prompts": str(tmp_path / "odd.txt")})
    data = SynVid(generate(config), config_of(config))
    assert [data.read(i)[2] for i in range(len(data))] == prompts
    assert {p.name for p in tmp_path.iterdir()} == {"run", "odd.txt", "config.yaml"}


@pytest.mark.parametrize("args, wrong", [
    (["--keep", "some"], "keep: expected key | all, got 'some'"),
    (["--dtype", "bf16"], "dtype: expected fp16 | fp32, got 'bf16'"),
    (["--count", 0], r"count: expected a number in \[1"),
    (["--start", -1], r"start: expected a number in \[0"),
    (["--batch", 0], "batch: expected .*got 0"), (["--videos", -1], "videos: expected .*got -1"),
    (["--start", 27], "start: expected less than 27, the number of prompts in .*, got 27: .*count"),
    (["--preset", "tinny"], "preset: .*got 'tinny'.*did you mean 'tiny'")])
def test_settings_that_cannot_work_are_named(make_config, args, wrong):
    with pytest.raises(ValueError, match=wrong.replace("|", r"\|")):
        generate(make_config(), *args)


def test_a_disk_that_is_too_small_is_reported_before_the_start(make_config, tmpfs):
    config = make_config(run=str(tmpfs / "run"), synvid={"count": 500})
    with pytest.raises(ValueError, match="500 trajectories need up to .*B, got .*B: free some"):
        generate(config)
    assert not list(tmpfs.rglob("*.safetensors"))


def test_a_disk_that_fills_up_is_reported_and_the_same_command_ends_with_the_same_bytes(
        make_config, tmpfs, tmp_path, monkeypatch):
    config = make_config(synvid={"count": 12, "batch": 4})
    reference = contents(generate(config, "--run", tmp_path / "complete"))
    huge = shutil.disk_usage(tmpfs)._replace(free=10 ** 12)
    (tmpfs / "filler").write_bytes(bytes(2 ** 20 - 40_000))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: huge)
        with pytest.raises(ValueError, match=r"\.safetensors: cannot be written .*No space left"):
            generate(config, "--run", tmpfs / "run")
    left = contents(tmpfs / "run/synvid")
    assert 1 < len(left) < 13 and left.items() <= reference.items()
    (tmpfs / "filler").unlink()
    assert contents(generate(config, "--run", tmpfs / "run")) == reference


def test_a_run_folder_that_cannot_be_written_is_named(make_config, tmp_path, tmpfs):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"file/synvid: cannot be written .*another folder"):
        generate(make_config(run=str(tmp_path / "file")))
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    with pytest.raises(ValueError,
                       match=r"run/synvid: cannot be written .*[Rr]ead-only.*another folder"):
        generate(make_config(run=str(tmpfs / "run")))
