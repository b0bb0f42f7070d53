"""VBench: the folder it wants, made once and resumed, and its scores as the paper's Table 1."""

import json
import shutil

import pytest
import torch
from test_sample import KEY, N, write_student

import evaluate
import sample
from common.ranks import seed_of
from tools.vbench import FLICKERING_VIDEOS, NAME_BYTES, wanted_videos
from tools import vbench

PROMPTS = ['a "red" disc, it\'s moving', "--seed 3", "一只 café 🦊", ".hidden 100% $x {0}"]
NAMES = {f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(5)}


@pytest.fixture
def run(tiny_weights, tmp_path, make_config, monkeypatch):
    """run(options…) samples for VBench; a student, VBench's two files and augmented prompts."""
    config = make_config(n=N, key=KEY)
    write_student(tmp_path / "run/student.safetensors", tiny_weights)
    (tmp_path / "all.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]) + "\n")
    (tmp_path / "augmented.txt").write_text("\n".join(f"long {i}, or / so" for i in range(5)))
    made = []
    real = sample.write_video
    monkeypatch.setattr(sample, "write_video",
                        lambda path, *rest: (made.append(path.name), real(path, *rest)))

    def main(*options: str, file: str = "all.txt"):
        made.clear()
        sample.main([str(config), "--vbench", str(tmp_path / file), "--batch", "8", *options])
        return sorted(made)

    main.config, main.folder, main.out = config, tmp_path, tmp_path / "run/vbench/student2"
    return main


def record(out):
    return json.loads((out.with_name(f"{out.name}.record") / "videos.json").read_text())


def test_the_folder_is_flat_and_its_names_are_the_prompts_byte_for_byte(run):
    assert set(run()) == NAMES and {path.name for path in run.out.iterdir()} == NAMES
    assert {path.name for path in run.out.parent.iterdir()} == {
        "config.yaml", "student2", "student2.record"}
    kept = {path.name for path in (run.out.parent / "student2.record").iterdir()}
    assert {"videos.json", "sheet.png"} <= kept and not any(x.endswith("mp4") for x in kept)
    videos = record(run.out)["videos"]
    assert {video["file"] for video in videos} == NAMES and len(videos) == 20
    assert len({video["seed"] for video in videos}) == 20
    for video in videos:
        assert video["file"] == f"{video['prompt']}-{video['i']}.mp4"
        assert video["seed"] == seed_of("vbench", 0, video["prompt"], video["i"])
    assert len({path.read_bytes() for path in run.out.iterdir()}) == 20


def test_a_recorded_seed_and_prompt_make_the_same_video_again(run):
    run("--vbench_prompts", str(run.folder / "augmented.txt"), "--batch", "1")
    assert {path.name for path in run.out.iterdir()} == NAMES
    video = record(run.out)["videos"][7]
    assert video["made_from"] == "long 1, or / so" and video["prompt"] == PROMPTS[1]
    sample.main([str(run.config), f"--prompt={video['made_from']}", f"--seed={video['seed']}"])
    (again,) = (run.folder / "run/samples").glob("*.mp4")
    assert again.read_bytes() == (run.out / video["file"]).read_bytes()


def test_only_what_is_missing_is_made_again(run, capsys):
    run("--batch", "1")
    lost = run.out / f"{PROMPTS[2]}-3.mp4"
    before = lost.read_bytes()
    lost.unlink()
    cut = run.out / f".{lost.name}.4711-0a1b2c3d.part.mp4"  # of a killed process
    cut.write_bytes(before[:100])
    assert run("--batch", "1") == [lost.name]
    assert lost.read_bytes() == before and not cut.exists()
    assert run() == [] and "20 videos for VBench" in capsys.readouterr().out
    (run.folder / "still.txt").write_text(f"{PROMPTS[1]}\n")
    more = run("--vbench_flickering", str(run.folder / "still.txt"))
    assert more == sorted(f"--seed 3-{i}.mp4" for i in range(5, FLICKERING_VIDEOS))
    assert len(record(run.out)["videos"]) == 40


def test_other_settings_files_or_prompts_are_not_mixed_into_a_folder(run):
    (run.folder / "two.txt").write_text("\n".join(PROMPTS[:2]))
    (run.folder / "longer.txt").write_text("x\ny")
    run(file="two.txt")
    with pytest.raises(ValueError, match="student2: has 10 videos of seed 0; got 1: go on with"):
        run("--seed", "1", file="two.txt")
    with pytest.raises(ValueError, match="0.mp4: was made from .*; got .x.: give the same files"):
        run("--vbench_prompts", str(run.folder / "longer.txt"), file="two.txt")
    (run.out / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="got notes.txt, which .*videos.json does not know"):
        run(file="two.txt")
    assert len(list(run.out.glob("*.mp4"))) == 10
    (run.out / "notes.txt").unlink()
    shutil.rmtree(run.out.with_name("student2.record"))
    with pytest.raises(ValueError, match="got --seed 3-0.mp4, which .* does not know"):
        run(file="two.txt")


def test_two_ranks_make_the_files_that_one_makes(run, run_stage):
    run("--batch", "1")
    run_stage("sample", run.config, f"vbench={run.folder}/all.txt", f"out={run.folder}/two",
              ranks=2)
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()}
                for folder in (run.out, run.folder / "two"))
    assert one == two and record(run.folder / "two")["videos"] == record(run.out)["videos"]


def test_vbench_s_numbers_of_videos(tmp_path):
    original, still = tmp_path / "all.txt", tmp_path / "still.txt"
    prompts = [f"prompt {i}" for i in range(944)]
    original.write_text("\n".join(prompts + prompts[:2]))
    still.write_text("\n".join(prompts[500:575]))
    assert len(wanted_videos(original, None, None, 0)) == 4720
    videos = wanted_videos(original, None, still, 0)
    assert len(videos) == len({v.file for v in videos}) == len({v.seed for v in videos}) == 6220
    info = tmp_path / "full_info.json"
    info.write_text(json.dumps([{"prompt_en": x, "dimension": ["color"]} for x in prompts]))
    assert wanted_videos(info, None, still, 0) == videos
    assert not {v.seed for v in videos} & {v.seed for v in wanted_videos(original, None, still, 1)}


@pytest.mark.parametrize("options, message", [
    (["--vbench={}/slash.txt"], "slash.txt: the prompt 'a/b' cannot be a file name: got a slash"),
    (["--vbench={}/long.txt"], f"cannot be a file name: got {NAME_BYTES + 1} bytes as a file name"),
    (["--vbench={}/all.txt", "--vbench_prompts={}/long.txt"], "long.txt: got 1 prompts; wanted 2"),
    (["--vbench={}/all.txt", "--vbench_flickering={}/slash.txt"],
     "slash.txt: got the prompt 'a/b'; wanted prompts of .*all.txt only"),
    (["--vbench={}/none.txt"], "none.txt: no such prompt file"),
    (["--vbench_prompts={}/all.txt"], "vbench_prompts: got .* without --vbench"),
    (["--vbench={}/all.txt", "--count=2"], "vbench: got --prompt or --count"),
    (["--vbench={}/all.txt", "--prompt=x"], "vbench: got --prompt or --count"),
    (["--vbench={}/all.txt", "--preset=tiny-i2v"], "vbench: got preset tiny-i2v, which starts fr")])
def test_what_vbench_cannot_use_is_refused_before_anything_is_loaded(tmp_path, make_config, options,
                                                                     message):
    (tmp_path / "all.txt").write_text("a\nb\n")
    (tmp_path / "slash.txt").write_text("a/b\n")
    (tmp_path / "long.txt").write_text("é" * ((NAME_BYTES - 6) // 2) + "x" * (NAME_BYTES % 2 + 1))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sample.main([str(make_config()), *(option.format(tmp_path) for option in options)])
    assert not (tmp_path / "run").exists()


def test_the_longest_name_is_written(tmp_path):
    name = "x" * (NAME_BYTES - 6)
    (tmp_path / "all.txt").write_text(name)
    video = wanted_videos(tmp_path / "all.txt", None, None, 0)[4]
    sample.write_video(tmp_path / video.file, torch.zeros(3, 1, 16, 16), 8)
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
    found = vbench.totals(dict(zip(vbench.DIMENSIONS, (x / 100 for x in rest), strict=True)))
    for name, wanted in (("total", total), ("quality", quality), ("semantic", semantic)):
        assert 100 * found[name] == pytest.approx(wanted, abs=0.015), name  # both are rounded


def test_scores_worked_out_by_hand():
    least = {name: dimension.least for name, dimension in vbench.DIMENSIONS.items()}
    most = {name: dimension.most for name, dimension in vbench.DIMENSIONS.items()}
    assert set(vbench.totals(least).values()) == {0} and set(vbench.totals(most).values()) == {1}
    # half a weight of 6.5, and four times the weight of the semantic score
    found = vbench.totals(least | {"dynamic_degree": 1.0, "scene": 0.8222})
    assert found["quality"] == pytest.approx(0.5 / 6.5) and found["semantic"] == 1 / 9
    assert found["total"] == pytest.approx((4 * 0.5 / 6.5 + 1 / 9) / 5)
    # (0.85375 - 0.1462) / 0.8538, (0.9 - 0.706) / 0.2915, the others at their least
    found = vbench.totals(least | {"motion_smoothness": 0.9, "subject_consistency": 0.85375})
    assert found["quality"] == pytest.approx((0.828707 + 0.665523) / 6.5, abs=1e-6)


def test_evaluate_prints_and_writes_the_table(make_config, tmp_path, capsys):
    rest = TABLE_1["AccVideo 544p"][3:]
    scores = dict(zip(vbench.DIMENSIONS, (x / 100 for x in rest), strict=True))
    write_scores(tmp_path / "results/one", {"color": scores.pop("color")})
    write_scores(tmp_path / "results", scores)
    evaluate.main([str(make_config()), "--vbench_scores", str(tmp_path / "results")])
    text = (tmp_path / "run/evaluate/vbench.md").read_text()
    assert text in capsys.readouterr().out
    assert "| **total score** | **83.26** | | 83.26 |" in text and "Missing" not in text
    assert "| scene | 54.72 | 66.55 | 54.72 |" in text
    known = json.loads((tmp_path / "run/evaluate/vbench.json").read_text())
    assert known["missing"] == [] and known["dimensions"]["color"]["score"] == 0.9411
    assert len(known["files"]) == 16 and known["total"] == pytest.approx(0.8326, abs=1e-4)


def test_a_missing_dimension_is_named_and_gives_no_total(tmp_path, capsys):
    write_scores(tmp_path / "results", dict.fromkeys(vbench.QUALITY, 0.9) | {"color": 0.5})
    vbench.report_vbench(tmp_path / "results", tmp_path)
    known, text = json.loads((tmp_path / "vbench.json").read_text()), capsys.readouterr().out
    assert known["total"] is known["semantic"] is None and known["quality"] > 0
    assert "**total score** | **–**" in text and "no total: object_class, multiple_objects" in text
    assert known["missing"] == [name for name in vbench.SEMANTIC if name != "color"]


@pytest.mark.parametrize("name, results, message", [
    ("a_eval_results.json", [1], r"expected a JSON object, got \[1\]: .*{dimension: \[sc"),
    ("a_eval_results.json", {"colour": [0.5]}, "got the dimension colour; wanted one of subject_c"),
    ("a_eval_results.json", {"color": 0.5}, r"color: got 0.5; wanted \[score"),
    ("a_eval_results.json", {"color": []}, r"color: got \[\]; wanted \[score"),
    ("a_eval_results.json", {"color": [float("nan"), []]}, r"color: got \[nan.*evaluate this dim"),
    ("a_eval_results.json", {"color": [64.2]}, r"color: got \[64.2\]; wanted .*from 0 to 1"),
    ("a_eval_results.json", {"color": [True]}, r"color: got \[True\]"),
    ("a_eval_results.json", {"scene": [0.5]}, "scene: got it in .*a_eval_.* and in .*z_eval_resul"),
    ("a.json", {"color": [0.5]}, "no …_eval_results.json there")])
def test_results_that_vbench_did_not_write_are_refused_by_name(tmp_path, name, results, message):
    (tmp_path / name).write_text(json.dumps(results))
    if "scene" in results:
        (tmp_path / "z_eval_results.json").write_text('{"scene": [0.5]}')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        vbench.read_scores(tmp_path)
