"""VBench: the videos that it expects, made and resumed, and its scores as the paper's Table 1."""

import json

import pytest
import torch
from test_sample import KEY, N, fast_videos, write_student

import sample
from artifacts.videos import NAME_BYTES, read_named_videos
from common.files import read_log
from common.prompts import Prompt, read_prompts
from common.ranks import seed_of
from tools import vbench
from tools.vbench import FLICKERING_VIDEOS, expected_videos

PROMPTS = ['a "red" disc, it\'s moving', "--seed 3", "一只 café 🦊", ".hidden 100% $x {0}"]
NAMES = {f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(5)}


@pytest.fixture
def run(tiny_weights, tmp_path, make_config, monkeypatch):
    """run(options…) writes VBench's prompt file with these options, samples its videos into
    run.out/student2, and returns the names of those that were made."""
    config = make_config(n=N, key=KEY)
    write_student(tmp_path / "run/student.safetensors", tiny_weights)
    (tmp_path / "all.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]) + "\n")
    (tmp_path / "augmented.txt").write_text("\n".join(f"long {i}, or / so" for i in range(5)))
    fast_videos(monkeypatch)
    made, real = [], sample.write_video
    monkeypatch.setattr(sample, "write_video",
                        lambda path, *rest: (made.append(path.name), real(path, *rest)))

    def main(*options: str, info: str = "all.txt", sampling: tuple = ("--batch", "8")):
        made.clear()
        vbench.main(["--info", str(tmp_path / info), "--out", str(main.prompts), *options])
        sample.main([str(config), "--prompt_file", str(main.prompts), "--out", str(main.out),
                     *sampling])
        return sorted(made)

    main.config, main.folder, main.out = config, tmp_path, tmp_path / "vbench"
    main.prompts, main.videos = tmp_path / "vbench.jsonl", main.out / "student2"
    return main


def videos_of(run) -> list[dict]:
    """The record's last line of each video, in the order in which they were first made."""
    lines = [line for line in read_log(run.out / "student2.jsonl") if "file" in line]
    return list({line["file"]: line for line in lines}.values())


def test_the_folder_is_flat_and_its_names_are_the_prompts_byte_for_byte(run):
    assert set(run()) == NAMES and {path.name for path in run.videos.iterdir()} == NAMES
    videos = videos_of(run)
    assert [video["file"] for video in videos] == [
        f"student2/{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(5)]
    assert [video["seed"] for video in videos] == [
        seed_of("vbench", 0, prompt, i) for prompt in PROMPTS for i in range(5)]
    assert len({path.read_bytes() for path in run.videos.iterdir()}) == 20


def test_a_recorded_seed_and_prompt_make_the_same_video_again(run):
    run("--prompts", str(run.folder / "augmented.txt"), sampling=())
    assert {path.name for path in run.videos.iterdir()} == NAMES
    video = videos_of(run)[7]
    assert video["prompt"] == "long 1, or / so" and video["file"] == f"student2/{PROMPTS[1]}-2.mp4"
    sample.main([str(run.config), f"--prompt={video['prompt']}", f"--seed={video['seed']}"])
    (again,) = (run.folder / "run/samples").glob("*/*.mp4")
    assert again.read_bytes() == (run.out / video["file"]).read_bytes()


def test_only_what_is_missing_is_made_again(run):
    run(sampling=())
    lost = run.videos / f"{PROMPTS[2]}-3.mp4"
    before = lost.read_bytes()
    lost.unlink()
    cut = run.videos / f".{lost.name}.4711-0a1b2c3d.part.mp4"  # of a killed process
    cut.write_bytes(before[:100])
    assert run(sampling=()) == [lost.name]
    assert lost.read_bytes() == before and not cut.exists()
    (run.folder / "still.txt").write_text(f"{PROMPTS[1]}\n")
    more = run("--flickering", str(run.folder / "still.txt"))
    assert more == sorted(f"--seed 3-{i}.mp4" for i in range(5, FLICKERING_VIDEOS))
    assert len(videos_of(run)) == 40


def test_other_settings_or_prompts_are_not_mixed_into_a_folder(run, tiny_weights):
    (run.folder / "two.txt").write_text("\n".join(PROMPTS[:2]))
    (run.folder / "longer.txt").write_text("x\ny")
    run(info="two.txt")
    for options, sampling, message in (
            (("--seed", "1"), (), "0.mp4: was made with seed .*: use what it was made with"),
            (("--prompts", str(run.folder / "longer.txt")), (), "with prompt 'a .*, got 'x': use"),
            ((), ("--fps", "9"), "0.mp4: was made with fps 8.0, got 9.0: use")):
        with pytest.raises(ValueError, match=message):
            run(*options, info="two.txt", sampling=sampling)
    write_student(run.folder / "run/student.safetensors", tiny_weights, moved=0.1)
    with pytest.raises(ValueError, match="0.mp4: was made with dit '[0-9a-f]*', got '[0-9a-f]*'"):
        run(info="two.txt")
    assert len(list(run.videos.iterdir())) == 10


def test_two_ranks_make_the_files_that_one_makes(run, run_stage, monkeypatch):
    monkeypatch.undo()  # real videos
    (run.folder / "one.txt").write_text(PROMPTS[0])
    run(info="one.txt", sampling=())
    run_stage("sample", run.config, f"prompt_file={run.prompts}", f"out={run.folder}/two", ranks=2)
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()}
                for folder in (run.videos, run.folder / "two/student2"))
    assert one == two
    lines = [json.loads(line) for line in (run.folder / "two/student2.jsonl").open()]
    assert {line["file"] for line in lines[1:]} == {
        f"student2/{PROMPTS[0]}-{i}.mp4" for i in range(5)}


def test_vbench_s_numbers_of_videos(tmp_path):
    original, still = tmp_path / "all.txt", tmp_path / "still.txt"
    prompts = [f"prompt {i}" for i in range(944)]
    original.write_text("\n".join(prompts + prompts[:2]))
    still.write_text("\n".join(prompts[500:575]))
    assert len(expected_videos(original)) == 4720
    videos = expected_videos(original, flickering=still)
    assert len(videos) == len({v["file"] for v in videos}) == len({v["seed"] for v in videos})
    assert len(videos) == 6220
    info = tmp_path / "full_info.json"
    info.write_text(json.dumps([{"prompt_en": x, "dimension": ["color"]} for x in prompts]))
    assert expected_videos(info, flickering=still) == videos
    others = expected_videos(original, flickering=still, seed=1)
    assert not {v["seed"] for v in videos} & {v["seed"] for v in others}


@pytest.mark.parametrize("options, message", [
    (["--info={}/slash.txt"], "slash.txt: expected .* file names, got 'a/b' with a slash"),
    (["--info={}/long.txt"], f"with {NAME_BYTES + 1} bytes, more than {NAME_BYTES}"),
    (["--info={}/all.txt", "--prompts={}/long.txt"], "long.txt: expected 2 prompts, .* got 1"),
    (["--info={}/all.txt", "--flickering={}/slash.txt"],
     "slash.txt: expected prompts of .*all.txt only, got 'a/b'"),
    (["--info={}/none.txt"], "none.txt: no such prompt file"),
    (["--info={}/all.txt", "--out={}/mine.jsonl"], "mine.jsonl: exists, and is not a file of VB")])
def test_prompts_that_vbench_cannot_use_are_refused(tmp_path, options, message):
    (tmp_path / "all.txt").write_text("a\nb\n")
    (tmp_path / "slash.txt").write_text("a/b\n")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a fox"}')
    (tmp_path / "long.txt").write_text("é" * ((NAME_BYTES - 6) // 2) + "x" * (NAME_BYTES % 2 + 1))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        vbench.main([f"--out={tmp_path}/v.jsonl", *(option.format(tmp_path) for option in options)])
    assert (tmp_path / "mine.jsonl").read_text() == '{"prompt": "a fox"}'
    assert not (tmp_path / "v.jsonl").exists()


@pytest.mark.parametrize("lines, options, message", [
    (['{"prompt": "a", "seed": 1, "file": "../a.mp4"}'], [], "prompt 1: file: expected .*'../a"),
    (['{"prompt": "a", "seed": 1, "file": "a"}'], [], "got 'a' with .* no .mp4"),
    (['{"prompt": "a", "seed": 1, "file": "a.mp4"}', '{"prompt": "b"}'], [],
     "prompt 2: the object has no key seed"),
    (['{"prompt": "a", "seed": 1, "file": "a.mp4"}'] * 2, [], "with a name used before"),
    (['{"prompt": "a", "seed": "1", "file": "a.mp4"}'], [], "prompt 1: seed: expected .*'1'"),
    (['{"prompt": "a", "seed": 1, "file": "a.mp4"}'], ["--count=2"], "count: got 2; .* names each"),
    (['{"prompt": "a", "seed": 1, "file": "a.mp4"}'], ["--preset=tiny-i2v"], 'has no "image"')])
def test_bad_names_are_refused_before_anything_is_loaded(tmp_path, make_config, tiny_weights, lines,
                                                         options, message):
    (tmp_path / "v.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        sample.main([str(make_config()), f"--prompt_file={tmp_path}/v.jsonl", "--teacher",
                     *options])
    assert not (tmp_path / "run").exists()


def test_a_file_key_without_a_seed_is_one_of_a_data_set_s_other_keys(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"caption": "a fox", "file": "clips/1.mp4"}\n')
    assert read_named_videos(path) == [] and read_prompts(path) == [Prompt("a fox")]


def test_the_longest_name_is_written(tmp_path):
    name = "x" * (NAME_BYTES - 6)
    (tmp_path / "all.txt").write_text(name)
    vbench.main([f"--info={tmp_path}/all.txt", f"--out={tmp_path}/v.jsonl"])
    video = read_named_videos(tmp_path / "v.jsonl")[4]
    sample.write_video(tmp_path / video["file"], torch.zeros(3, 1, 16, 16), 8)
    assert (tmp_path / f"{name}-4.mp4").exists()


# ------------------------------------------------------------------------------------ scores

def write_scores(folder, scores):
    folder.mkdir(parents=True, exist_ok=True)
    for name, score in scores.items():
        (folder / f"results_{name}_eval_results.json").write_text(
            json.dumps({name: [score, [{"video_path": "a-0.mp4", "video_results": score}]]}))
    (folder / "results_full_info.json").write_text("[]")


# Rows of the paper's Table 1 in percent: total, quality and semantic score, then the dimensions.
TABLE_1 = {
    "AccVideo 544p": (83.26, 84.58, 77.96, 94.46, 97.45, 99.18, 98.79, 75.00, 62.08, 65.64, 92.99,
                      67.33, 95.60, 94.11, 75.70, 54.72, 19.87, 23.71, 27.21),
    "HunyuanVideo 544p": (82.67, 84.43, 75.59, 94.33, 97.13, 99.03, 98.64, 76.38, 61.97, 65.57,
                          88.67, 67.69, 94.80, 92.07, 67.39, 51.23, 19.43, 23.96, 26.80),
    "PyramidFlow": (81.72, 84.74, 69.62, 96.95, 98.06, 99.49, 99.12, 64.63, 63.26, 65.01, 86.67,
                    50.71, 85.60, 82.87, 59.53, 43.20, 20.91, 23.09, 26.23)}


@pytest.mark.parametrize("method", TABLE_1)
def test_the_paper_s_dimensions_give_the_paper_s_totals(method):
    total, quality, semantic, *rest = TABLE_1[method]
    found = vbench.score_totals(dict(zip(vbench.DIMENSIONS, (x / 100 for x in rest), strict=True)))
    for name, wanted in (("total", total), ("quality", quality), ("semantic", semantic)):
        assert 100 * found[name] == pytest.approx(wanted, abs=0.015), name  # both are rounded


def test_scores_worked_out_by_hand():
    least = {name: dimension.least for name, dimension in vbench.DIMENSIONS.items()}
    most = {name: dimension.most for name, dimension in vbench.DIMENSIONS.items()}
    assert set(vbench.score_totals(least).values()) == {0}
    assert set(vbench.score_totals(most).values()) == {1}
    # half a weight of 6.5, and four times the weight of the semantic score
    found = vbench.score_totals(least | {"dynamic_degree": 1.0, "scene": 0.8222})
    assert found["quality"] == pytest.approx(0.5 / 6.5) and found["semantic"] == 1 / 9
    assert found["total"] == pytest.approx((4 * 0.5 / 6.5 + 1 / 9) / 5)
    # (0.85375 - 0.1462) / 0.8538, (0.9 - 0.706) / 0.2915, the others at their least
    found = vbench.score_totals(least | {"motion_smoothness": 0.9, "subject_consistency": 0.85375})
    assert found["quality"] == pytest.approx((0.828707 + 0.665523) / 6.5, abs=1e-6)


def test_scores_are_printed_as_the_table(tmp_path, capsys):
    scores = dict(zip(vbench.DIMENSIONS, (x / 100 for x in TABLE_1["AccVideo 544p"][3:]),
                      strict=True))
    write_scores(tmp_path / "one", {"color": scores.pop("color")})
    write_scores(tmp_path, scores)
    vbench.main(["--scores", str(tmp_path)])
    text = capsys.readouterr().out
    assert text.count("\n| ") == 1 + 3 + 16 - 1
    assert "| **total score** | **83.26** | | 83.26 |" in text and "Missing" not in text
    assert "| scene | 54.72 | 66.55 | 54.72 |" in text and "| color | 94.11 | 94.11 |" in text


def test_a_missing_dimension_is_named_and_gives_no_total(tmp_path, capsys):
    write_scores(tmp_path, dict.fromkeys(vbench.QUALITY, 0.9) | {"color": 0.5})
    vbench.main(["--scores", str(tmp_path)])
    text = capsys.readouterr().out
    assert "**total score** | **–**" in text and "**semantic score** | **–**" in text
    assert "**quality score** | **–**" not in text
    missing = [name for name in vbench.SEMANTIC if name != "color"]
    assert f"no total: {', '.join(missing)}." in text


@pytest.mark.parametrize("name, results, message", [
    ("a_eval_results.json", [1], r"expected a JSON object, got \[1\]: .*{dimension: \[sc"),
    ("a_eval_results.json", {"colour": [0.5]}, "expected dimensions of VBench.*, got colour: rem"),
    ("a_eval_results.json", {"color": 0.5}, r"color: expected a list, got 0.5: evaluate again"),
    ("a_eval_results.json", {"color": []}, r"color: expected \[score.* got \[\]"),
    ("a_eval_results.json", {"color": [float("nan"), []]}, r"color: .* got \[nan.*evaluate this"),
    ("a_eval_results.json", {"color": [64.2]}, r"color: .*from 0 to 1, got \[64.2\]"),
    ("a_eval_results.json", {"color": [True]}, r"color: .*got \[True\]"),
    ("a_eval_results.json", {"scene": [0.5]}, "z_eval_results.json: .*each in one file only.*sce"),
    ("a.json", {"color": [0.5]}, "no …_eval_results.json there")])
def test_results_that_vbench_did_not_write_are_refused_by_name(tmp_path, name, results, message):
    (tmp_path / name).write_text(json.dumps(results))
    if "scene" in results:
        (tmp_path / "z_eval_results.json").write_text('{"scene": [0.5]}')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        vbench.read_scores(tmp_path)
