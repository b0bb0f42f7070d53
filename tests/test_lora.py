"""LoRA: what is extracted, what other programs read of it, what is read of theirs, and training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pixels import read_video
from processes import in_processes
from test_sample import write_student

import distill
import model
import sample
from artifacts import student as student_file
from artifacts.lora import (
    build_student, is_lora, load_lora_student, lora_changes, lora_file, lora_form, student_tensors,
    with_lora)
from artifacts.student import write_together
from common.config import load_config
from common.files import read_log
from common.names import dit_tensors, fingerprint, official_names
from common.ranks import generator
from common.weights import open_tensors, safetensors_metadata, save_tensors
from model import HunyuanConfig, WanConfig, build_dit, key_times
from tools import extract_lora
from training.memory import memory_parts
from training.monitor import Log

WAN = WanConfig(dim=24, ffn_dim=64, num_heads=2, num_layers=3, text_dim=12, text_len=6,
                freq_dim=16)
I2V = WanConfig(dim=24, ffn_dim=64, num_heads=2, num_layers=2, text_dim=12, text_len=6,
                freq_dim=16, model_type="i2v", in_dim=36, image_dim=6, image_len=5)
HUNYUAN = HunyuanConfig(dim=24, ffn_dim=96, num_heads=2, num_double=2, num_single=2, text_dim=12,
                        text_len=6, pooled_dim=10, rope_dims=(4, 4, 4))
SIZES = {"wan": WAN, "i2v": I2V, "hunyuan": HUNYUAN}
HALF = 2 ** -10  # of a number, at most so much is lost in fp16: half of it a factor, two factors


def draw(name, shape, scale=1.0):
    return scale * torch.randn(shape, generator=generator("lora test", name))


def write_pair(folder: Path, sizes, rank: int | None = None, moved: float = 0.05) -> tuple:
    """A random teacher and its student, whose matrices differ in so many ranks (None: in all)."""
    teacher = {name: draw(name, p.shape, p.shape[-1] ** -0.5)
               for name, p in build_dit(sizes).named_parameters()}
    student = {}
    for name, w in teacher.items():
        delta = draw(f"{name} student", w.shape, moved)
        if rank is not None and w.ndim == 2:
            delta = draw(f"{name} B", (w.shape[0], rank), moved) @ draw(f"{name} A",
                                                                        (rank, w.shape[1]))
        student[name] = w + delta
    paths = folder / "teacher.safetensors", folder / "plain_student.safetensors"
    for path, tensors in zip(paths, (teacher, student), strict=True):
        save_tensors(path, tensors, {})
    return *paths, teacher, student


@pytest.fixture(params=["wan", "i2v", "hunyuan"])
def pair(request, tmp_path, monkeypatch):
    """extract(rank) of a pair of a family -> merged tensors, and the pair's own."""
    sizes = SIZES[request.param]
    monkeypatch.setitem(model.PRESETS, "small", sizes)

    def extract(rank, of=None):
        teacher, student, w_teacher, w_student = write_pair(tmp_path, sizes, of)
        cfg = extract_lora.Config(family=sizes.family, preset="small", weights=str(teacher),
                                  rank=rank, student=str(student), run=str(tmp_path),
                                  device="cpu")
        extract.rows = extract_lora.extract(cfg, student, tmp_path / "lora.safetensors")
        merged = with_lora(dit_tensors(teacher), tmp_path / "lora.safetensors")
        return {name: t.read() for name, t in merged.items()}, w_teacher, w_student

    extract.sizes, extract.folder = sizes, tmp_path
    return extract


def rounding(delta):
    """How far a difference may be after its factors are fp16: their numbers lose 2^-11 each, and a
    product of r of them adds up like the norms of its rows and columns."""
    return HALF * delta.norm() if delta.ndim == 2 else HALF * delta.abs().max() + 1e-7


# --------------------------------------------------------------------------------- extraction

def test_a_lora_of_full_rank_is_the_student(pair):
    merged, teacher, student = pair(1000)
    for name, w in student.items():
        form = lora_form(pair.sizes.family, name, w.shape)
        want = teacher[name] if form is None else w
        assert (merged[name] - want).abs().max() <= rounding(student[name] - teacher[name]), name
    left = {row["name"] for row in pair.rows if row["form"] == "none"}
    assert bool(left) == (pair.sizes.family == "hunyuan")
    assert left.isdisjoint(n for n in student if "blocks" in n and student[n].ndim == 2
                           and not n.startswith("txt_in"))
    for name, w in student.items():  # and before they are rounded, to fp32's accuracy
        if w.ndim == 2:
            A, B = extract_lora.low_rank_factors(w - teacher[name], min(w.shape), name)
            assert (B @ A - (w - teacher[name])).abs().max() < 1e-5


def test_a_difference_of_rank_r_is_exact_at_rank_r_and_not_below(pair):
    merged, teacher, student = pair(3, of=3)
    matrices = [row for row in pair.rows if row["form"] == "matrix"]
    assert min(row["energy"] for row in matrices) > 1 - 1e-5
    assert {row["rank"] for row in matrices} == {3}
    for row in matrices:
        delta = student[row["name"]] - teacher[row["name"]]
        assert (merged[row["name"]] - student[row["name"]]).abs().max() <= rounding(delta)
    pair(2, of=3)
    assert max(row["energy"] for row in pair.rows if row["form"] == "matrix") < 0.999


@pytest.mark.parametrize("exact", [True, False])
def test_energy_kept_is_that_of_the_singular_values(pair, exact, monkeypatch):
    if not exact:  # small matrices by the randomised decomposition too, with few columns
        monkeypatch.setattr(extract_lora, "EXACT", 0)
        monkeypatch.setattr(extract_lora, "EXTRA_COLUMNS", 4)
    _, teacher, student = pair(5)
    for row in pair.rows:
        if row["form"] != "matrix":
            continue
        S = torch.linalg.svdvals(student[row["name"]] - teacher[row["name"]]).square()
        want = (S[:5].sum() / S.sum()).item()
        assert row["energy"] == pytest.approx(want, abs=1e-5 if exact else 2e-3)
        assert row["square"] == pytest.approx(S.sum().item(), rel=1e-5)


def test_a_large_matrix_s_randomised_decomposition_is_near_the_exact_one():
    delta = draw("large", (1300, 1100)) * torch.linspace(1, 0.01, 1100) ** 2
    A, B = extract_lora.low_rank_factors(delta, 24, "large")
    S = torch.linalg.svdvals(delta).square()
    kept = 1 - ((delta - B @ A).square().sum() / S.sum()).item()
    assert kept == pytest.approx((S[:24].sum() / S.sum()).item(), rel=2e-3)
    again, _ = extract_lora.low_rank_factors(delta, 24, "large")
    assert torch.equal(A, again)


def test_a_lora_of_a_student_without_metadata_has_a_page_with_the_config_s_settings(
        tiny_weights, make_config, tmp_path, capsys):
    path, out = tmp_path / "release.safetensors", tmp_path / "lora.safetensors"
    save_tensors(path, {name: 1.01 * t.read() for name, t in dit_tensors(tiny_weights).items()}, {})
    extract_lora.main([str(make_config(n=4, key=[0, 1, 4])), f"--student={path}", f"--out={out}"])
    sample.main(["--how", str(out)])
    page = capsys.readouterr().out
    assert "They have the indices 0, 1, 4 in its teacher's grid of 4 steps with shift 7." in page


def test_the_command_writes_file_and_table_and_sample_uses_it(tiny_weights, make_config, tmp_path,
                                                              capsys):
    config = make_config(n=4, key=[0, 1, 4], lora={"rank": 8})
    write_student(tmp_path / "run/student.safetensors", tiny_weights, moved=0.002, height=16,
                  width=16, frames=5, fps=8, dtype="fp32")
    extract_lora.main([str(config), "--rank", "128"])
    assert "energy kept: 1.0000 of all" in capsys.readouterr().out
    out = tmp_path / "run/student_lora_rank128.safetensors"
    about = json.loads(safetensors_metadata(out)["accvideo"])
    assert about["t_key"] == key_times("wan", 4, 7.0, [0, 1, 4]) and about["lora_rank"] == 128
    assert about["teacher"] == fingerprint(tiny_weights)
    tensors = open_tensors(out)
    assert {t.dtype for t in tensors.values()} == {torch.float16} and is_lora(tensors)
    assert not any(name.endswith("alpha") for name in tensors)
    sample.main(["--how", str(out)])
    assert f'pipe.load_lora_weights("{out.name}")' in capsys.readouterr().out
    table = json.loads(out.with_suffix(".json").read_text())
    names = dict(build_dit("tiny").named_parameters())
    assert {row["name"] for row in table["rows"]} == names.keys()
    assert len(table["rows"]) == len(names) and table["energy"]["all"] == pytest.approx(1, abs=1e-3)
    videos = {}
    for who, options in {"student": [], "lora": ["--lora", out],
                         "none": ["--lora", out, "--lora_scale", "0"]}.items():
        sample.main([str(config), "--prompt", "a red disc", *map(str, options),
                     "--out", str(tmp_path / who)])
        videos[who] = read_video(next((tmp_path / who).glob("*/*.mp4"))).float()
    assert len(list((tmp_path / "lora/lora2").glob("a-red-disc_*_seed0.mp4"))) == 1
    apart, moved = ((videos[who] - videos["student"]).abs().mean() for who in ("lora", "none"))
    assert apart < 0.25 * moved  # H.264 rounds, too
    assert read_log(tmp_path / "lora/lora2.jsonl")[0]["values"]["times"] == about["t_key"]


# ----------------------------------------------------------------------------- other programs

def diffusers_model(sizes):
    """diffusers' own DiT of these sizes."""
    from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
    common = dict(in_channels=sizes.in_dim, out_channels=16, num_attention_heads=2,
                  attention_head_dim=12, text_dim=12)
    if sizes.family == "wan":
        image = dict(image_dim=6, added_kv_proj_dim=24) if sizes.takes_image else {}
        return WanTransformer3DModel(
            **common, freq_dim=16, ffn_dim=64, num_layers=sizes.num_layers, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", eps=1e-6, **image)
    common["text_embed_dim"] = common.pop("text_dim")
    return HunyuanVideoTransformer3DModel(
        **common, num_layers=2, num_single_layers=2, num_refiner_layers=2, mlp_ratio=4.0,
        patch_size=2, patch_size_t=1, qk_norm="rms_norm", guidance_embeds=True,
        pooled_projection_dim=10, rope_theta=256.0, rope_axes_dim=(4, 4, 4))


def covered(merged, teacher, family):
    """What diffusers applies: of Wan matrices and their biases, of HunyuanVideo what the file has.
    """
    if family == "hunyuan":
        return merged
    return {name: w if w.ndim == 2 or (name.endswith("bias") and f"{name[:-4]}weight" in merged
                                       and merged[f"{name[:-4]}weight"].ndim == 2)
            else teacher[name] for name, w in merged.items()}


def hunyuan_width(monkeypatch):
    """diffusers' loader has HunyuanVideo's width built in; here its code gets the small one's."""
    from diffusers.loaders import lora_conversion_utils as utils
    code = utils._convert_hunyuan_video_lora_to_diffusers.__code__
    inner = [c.replace(co_consts=tuple(24 if x == 3072 else x for x in c.co_consts))
             if hasattr(c, "co_consts") else c for c in code.co_consts]
    monkeypatch.setattr(utils._convert_hunyuan_video_lora_to_diffusers, "__code__",
                        code.replace(co_consts=tuple(inner)))
    return utils


def test_diffusers_own_conversion_makes_of_the_file_what_we_merge(pair, monkeypatch):
    utils = hunyuan_width(monkeypatch)
    merged, teacher, _ = pair(4)
    tensors = {name: t.read() for name, t in open_tensors(pair.folder / "lora.safetensors").items()}
    family = pair.sizes.family
    convert = (utils._convert_non_diffusers_wan_lora_to_diffusers if family == "wan" else
               utils._convert_hunyuan_video_lora_to_diffusers)
    theirs = {name.removeprefix("transformer."): t.float() for name, t in convert(tensors).items()}
    assert all("lora_" in name for name in theirs)
    want = official_names(covered(merged, teacher, family), "transformer", reverse=True)
    got = {name: w.clone() for name, w in official_names(teacher, "transformer",
                                                         reverse=True).items()}
    for name in [n for n in theirs if n.endswith("lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        got[f"{module}.weight"] += theirs[f"{module}.lora_B.weight"] @ theirs[name]
        if f"{module}.lora_B.bias" in theirs:
            got[f"{module}.bias"] += theirs[f"{module}.lora_B.bias"]
    assert got.keys() == want.keys()
    assert max((got[name] - want[name]).abs().max() for name in want) < 1e-5


def test_diffusers_load_lora_weights_gives_the_merged_student(pair, monkeypatch):
    pytest.importorskip("peft", reason="diffusers loads LoRAs by peft")
    import diffusers
    hunyuan_width(monkeypatch)
    merged, teacher, _ = pair(4)
    family, theirs = pair.sizes.family, diffusers_model(pair.sizes).eval()
    theirs.load_state_dict(official_names(teacher, "transformer", reverse=True), strict=True)
    kind = (diffusers.loaders.WanLoraLoaderMixin if family == "wan" else
            diffusers.loaders.HunyuanVideoLoraLoaderMixin)
    state = kind.lora_state_dict(str(pair.folder / "lora.safetensors"))
    kind.load_lora_into_transformer(state, transformer=theirs)
    theirs.fuse_lora()
    got = {name.replace(".base_layer", ""): w for name, w in theirs.state_dict().items()
           if ".lora_" not in name}
    want = official_names(covered(merged, teacher, family), "transformer", reverse=True)
    bias = {n.replace(".lora_B.default_0.bias", ".bias"): w for n, w in theirs.state_dict().items()
            if n.endswith("lora_B.default_0.bias")}
    assert got.keys() == want.keys() and (family == "hunyuan" or bias)
    assert max((got[name] - want[name]).abs().max() for name in want) < 1e-5


def forms_of(tensors, form):
    """Our LoRA as other programs write it."""
    out = {}
    for name, t in tensors.items():
        t, bare = t.read().float(), name.removeprefix("diffusion_model.")
        if form in ("lora_up", "kohya"):
            bare = bare.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        module, part = bare.rpartition(".lora_")[::2] if ".lora_" in bare else bare.rsplit(".", 1)
        if form == "kohya":
            sep = ".lora_" if ".lora_" in bare else "."
            out[f"lora_unet_{module.replace('.', '_')}{sep}{part}"] = t
            if part.startswith("down"):
                out[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(len(t) / 4)
        elif form == "peft":
            out[f"base_model.model.{bare.replace('.weight', '.default.weight')}"] = t
        else:
            out[{"lora_up": "diffusion_model.", "transformer": "transformer.",
                 "bare": ""}[form] + bare] = t
            if form == "lora_up" and part.startswith("down"):
                out[f"diffusion_model.{module}.alpha"] = torch.tensor(float(len(t)))
    return out


@pytest.mark.parametrize("form", ["lora_up", "kohya", "transformer", "bare", "peft"])
def test_the_same_lora_in_another_program_s_form_changes_the_same(pair, form):
    merged, teacher, _ = pair(4)
    path = pair.folder / "theirs.safetensors"
    save_tensors(path, forms_of(open_tensors(pair.folder / "lora.safetensors"), form), {})
    files = dit_tensors(pair.folder / "teacher.safetensors")
    for scale in (1.0, 0.5):
        got = {name: t.read() for name, t in with_lora(files, path, scale).items()}
        for name, w in merged.items():
            part = scale * (0.25 if form == "kohya" and w.ndim == 2 else 1.0)
            near = teacher[name] + part * (w - teacher[name])
            assert (got[name] - near).abs().max() < 1e-5, name
    rows = with_lora(files, path)  # what a rank that keeps some rows reads
    full = {name: t.read() for name, t in rows.items()}
    assert all(torch.allclose(t.read(slice(1, 3)), full[name][1:3], atol=1e-6)
               for name, t in rows.items() if t.shape[0] > 3)


def test_diffusers_own_names_of_wan_and_alpha_in_its_metadata_are_read(tmp_path):
    teacher, _, w, _ = write_pair(tmp_path, WAN)
    A, B = draw("A", (2, 24)), draw("B", (24, 2))
    for prefix, about in (("transformer.blocks.1.attn1.to_q", {"transformer.r": 2,
                                                               "transformer.lora_alpha": 4}),
                          ("lora_unet_blocks_1_attn1_to_q", {})):
        save_tensors(tmp_path / "l.safetensors", {f"{prefix}.lora_A.weight": A,
                                                  f"{prefix}.lora_B.weight": B},
                     {"lora_adapter_metadata": json.dumps(about)})
        got = with_lora(dit_tensors(teacher), tmp_path / "l.safetensors")
        q = "blocks.1.self_attn.q.weight"
        assert torch.allclose(got[q].read(), w[q] + (2 if about else 1) * B @ A, atol=1e-6)


@pytest.mark.parametrize("settings, form", [
    ({"lora_alpha": 10}, "folder"), ({"lora_alpha": 10}, "file"), ({"lora_alpha": 10}, "renamed"),
    ({"lora_alpha": 3, "lora_bias": True}, "adapter"),
    ({"lora_alpha": 10, "use_rslora": True, "lora_bias": True}, "pipeline"),
    ({"lora_alpha": 5, "rank_pattern": {"proj_out": 2}, "lora_bias": True}, "folder")])
def test_a_lora_of_peft_has_the_strength_of_peft_s_own_forward(tmp_path, settings, form):
    peft = pytest.importorskip("peft")
    teacher, _, w, _ = write_pair(tmp_path, WAN)
    theirs = diffusers_model(WAN).eval()
    theirs.load_state_dict(official_names(w, "transformer", reverse=True), strict=True)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "ffn.net.0.proj", "proj_out"], **settings)
    if form in ("folder", "file", "renamed"):
        theirs = peft.get_peft_model(theirs, config)
    else:
        theirs.add_adapter(config)
    x, text = draw("x", (1, 16, 2, 4, 4)), draw("text", (1, 6, 12))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if ".lora_" in name:
                p.copy_(draw(name, p.shape, 0.2))
        want = theirs(x, torch.tensor([500.0]), text, return_dict=False)[0]
    path = tmp_path / "lora"
    if form in ("folder", "file", "renamed"):
        theirs.save_pretrained(path)
        path = path / "adapter_model.safetensors" if form == "file" else path
    else:
        theirs.save_lora_adapter(path)
        path = next(path.iterdir())
    if form == "renamed":  # without peft's prefix, next to its settings
        tensors = open_tensors(path / "adapter_model.safetensors").items()
        save_tensors(path / "adapter_model.safetensors", {
            n.removeprefix("base_model.model."): t.read() for n, t in tensors}, {})
    if form == "pipeline":  # as save_lora_weights writes it: "transformer." before all names
        about = json.loads(safetensors_metadata(path)["lora_adapter_metadata"])
        save_tensors(path, {f"transformer.{n}": t.read() for n, t in open_tensors(path).items()}, {
            "lora_adapter_metadata": json.dumps({f"transformer.{n}": v for n, v in about.items()})})
    ours = build_dit(WAN)
    ours.load_state_dict({n: t.read() for n, t in with_lora(dit_tensors(teacher), path).items()})
    with torch.no_grad():
        got = ours(x, torch.tensor([0.5]), {"text": text})
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("setting, value", [
    ("alpha_pattern", {"q": 2}), ("use_dora", True), ("bias", "all"), ("modules_to_save", ["head"]),
    ("init_lora_weights", "pissa"), ("lora_alpha", "much")])
def test_a_lora_whose_peft_settings_change_more_is_refused(tmp_path, setting, value):
    teacher, *_ = write_pair(tmp_path, WAN)
    q = "base_model.model.blocks.1.self_attn.q"
    save_tensors(tmp_path / "l.safetensors", {f"{q}.lora_A.weight": draw("A", (2, 24)),
                                              f"{q}.lora_B.weight": draw("B", (24, 2))}, {})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4,
                                                              setting: value}))
    with pytest.raises(ValueError, match=rf"adapter_config.json: {setting}: expected "):
        with_lora(dit_tensors(teacher), tmp_path / "l.safetensors")


def test_a_lora_of_differences_alone_applies_under_any_prefix(tmp_path, monkeypatch):
    teacher, _, w, _ = write_pair(tmp_path, WAN)
    bias, norm = "blocks.0.self_attn.q.bias", "blocks.0.norm3.weight"
    for i, prefix in enumerate(("diffusion_model", "unet", "dit", "module", "pipe.dit")):
        path = tmp_path / f"{i}.safetensors"
        save_tensors(path, {f"{prefix}.{bias[:-5]}.diff_b": draw("b", (24,)),
                            f"{prefix}.{norm[:-7]}.diff": draw("n", (24,))}, {})
        monkeypatch.setitem(model.PRESETS, "small", WAN)
        cfg = sample.Config(weights=str(teacher), preset="small")
        got = dict(student_file.load_student(cfg, path, torch.device("cpu"),
                                             scale=0.5).named_parameters())
        assert torch.allclose(got[bias], w[bias] + 0.5 * draw("b", (24,)))
        assert torch.allclose(got[norm], w[norm] + 0.5 * draw("n", (24,)))


def test_comfyui_s_names_of_hunyuanvideo_are_read(tmp_path):
    teacher, *_ = write_pair(tmp_path, HUNYUAN)
    module = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_tensors(tmp_path / "l.safetensors", {f"{module}.lora_up.weight": draw("u", (72, 2)),
                                              f"{module}.lora_down.weight": draw("d", (2, 24))}, {})
    shapes = {name: t.shape for name, t in dit_tensors(teacher).items()}
    assert [*lora_changes(tmp_path / "l.safetensors", shapes)[0]] == [
        "double_blocks.0.img_attn_qkv.weight"]


def test_what_is_not_applied_is_printed_in_one_line_with_names_and_count(tmp_path, capsys):
    teacher, *_ = write_pair(tmp_path, WAN)
    q = "diffusion_model.blocks.0.self_attn.q"
    save_tensors(tmp_path / "l.safetensors", {
        f"{q}.lora_down.weight": draw("d", (2, 24)), f"{q}.lora_up.weight": draw("u", (24, 2)),
        "diffusion_model.blocks.0.cross_attn.k_img.diff_b": draw("k", (24,)),
        "diffusion_model.patch_embedding.diff": draw("p", (24, 36, 1, 2, 2))}, {})
    with_lora(dit_tensors(teacher), tmp_path / "l.safetensors")
    said = capsys.readouterr().out
    assert "2 tensor(s) are not applied" in said and said.count("\n") == 1
    assert "k_img.diff_b" in said and "patch_embedding.diff" in said


@pytest.mark.parametrize("module, shapes, message", [
    ("diffusion_model.double_blocks.0.img_attn_qkv", ((2, 24), (72, 2)),
     r"none of its 2 tensors \(such as .*double_blocks.* changes one of this DiT's: give a LoRA"),
    ("lora_unet_input_blocks_1_1_proj_in", ((2, 24), (24, 2)), "none of its 2 tensors .*input_blo"),
    ("diffusion_model.blocks.0.self_attn.q", ((2, 48), (48, 2)),
     r"change a matrix of \[48, 48\]; this DiT's is \[24, 24\]: it is a LoRA for another size")])
def test_a_lora_of_another_model_is_refused_by_what_it_is(tmp_path, module, shapes, message):
    teacher, *_ = write_pair(tmp_path, WAN)
    save_tensors(tmp_path / "l.safetensors", {f"{module}.lora_down.weight": draw("d", shapes[0]),
                                              f"{module}.lora_up.weight": draw("u", shapes[1])}, {})
    with pytest.raises(ValueError, match=message):
        with_lora(dit_tensors(teacher), tmp_path / "l.safetensors")


def test_a_dora_and_a_whole_model_are_refused_as_loras(tmp_path):
    teacher, student, *_ = write_pair(tmp_path, WAN)
    with pytest.raises(ValueError, match="looks like a Wan DiT of another size; it is not a LoRA"):
        with_lora(dit_tensors(teacher), student)
    q, path = "diffusion_model.blocks.0.self_attn.q", tmp_path / "l.safetensors"
    halves = {f"{q}.lora_A.weight": draw("A", (2, 24)), f"{q}.lora_B.weight": draw("B", (24, 2))}
    for more, message in (
            ({f"{q}.dora_scale": draw("d", (24, 1))}, "is a DoRA"),
            ({f"{q}.lora_magnitude_vector": draw("m", (24,))}, "is a DoRA"),
            ({f"transformer.{q[16:]}.lora_A.weight": draw("A", (2, 24))}, "save one LoRA"),
            ({f"{q}.diff_b": torch.ones(24, dtype=torch.int8)}, "expected one floating-point")):
        save_tensors(path, halves | more, {})
        with pytest.raises(ValueError, match=message):
            with_lora(dit_tensors(teacher), path)


def test_extract_replaces_no_file_of_another_kind(make_config, tiny_weights, tmp_path):
    write_student(tmp_path / "run/student.safetensors", tiny_weights)
    config = [str(make_config(n=4, key=[0, 1, 4])), "--rank", "2", "--out"]
    (tmp_path / "notes.json").write_text("mine")
    for name, existing in (("run/student", "student.safetensors"), ("notes", "notes.json")):
        with pytest.raises(ValueError, match=f"out: .*{existing} exists, and does not belong"):
            extract_lora.main([*config, f"{tmp_path}/{name}.safetensors"])
    assert (tmp_path / "notes.json").read_text() == "mine"


# ---------------------------------------------------------------------------------- sample.py

@pytest.fixture
def foreign(tiny_weights, tmp_path):
    """A LoRA for preset `tiny` that says nothing about itself."""
    path, q = tmp_path / "foreign.safetensors", "diffusion_model.blocks.0.self_attn.q"
    save_tensors(path, {f"{q}.lora_up.weight": draw("up", (128, 4)),
                        f"{q}.lora_down.weight": draw("down", (4, 128))}, {})
    return path


def test_a_lora_without_metadata_takes_the_config_s_key_timesteps(make_config, foreign, tmp_path,
                                                                   capsys, monkeypatch):
    args = [str(make_config()), "--prompt", "x", "--lora", str(foreign)]
    sample.main(args)
    assert "the config's key timesteps are used" in capsys.readouterr().out
    times = read_log(tmp_path / "run/samples/lora2.jsonl")[0]["values"]["times"]
    assert times == key_times("wan", 4, 7.0, [0, 2, 4])
    monkeypatch.setenv("RANK", "1")  # the first rank has printed it
    cfg = load_config(sample.Config, "sample", args)
    assert sample.sampling_times(cfg, False) == times
    assert not capsys.readouterr().out


def test_loras_where_they_do_not_belong_are_refused(make_config, foreign, tiny_weights, tmp_path):
    config, prompt = str(make_config()), ["--prompt", "x"]
    with pytest.raises(ValueError, match="together with --teacher"):
        sample.main([config, *prompt, "--lora", str(foreign), "--teacher"])
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: no such student or LoRA"):
        sample.main([config, *prompt, "--lora", "nowhere.safetensors"])
    with pytest.raises(ValueError, match="is a LoRA .* sample.py as --lora"):
        sample.main([config, *prompt, "--student", str(foreign)])
    with pytest.raises(ValueError, match="is a LoRA .* sample.py as --lora"):
        dit_tensors(foreign)
    student = write_student(tmp_path / "run/student.safetensors", tiny_weights)
    with pytest.raises(ValueError, match="lora: expected a LoRA, got .*: give it as --student"):
        sample.main([config, *prompt, "--lora", str(student), "--lora_scale", "0.3"])


def test_a_lora_made_on_other_weights_is_reported(make_config, tiny_weights, tmp_path, capsys):
    write_student(tmp_path / "run/student.safetensors", tiny_weights)
    config = str(make_config(n=4, key=[0, 1, 4]))
    extract_lora.main([config, "--rank", "2"])
    other = tmp_path / "other"
    shutil.copytree(tiny_weights, other)
    tensors = {name: t.read().half() for name, t in dit_tensors(tiny_weights).items()}
    save_tensors(other / "diffusion_pytorch_model.safetensors", tensors, {})
    cfg = load_config(sample.Config, "sample", [config, "--lora", str(
        tmp_path / "run/student_lora_rank2.safetensors")])
    sample.sampling_times(cfg, False)
    assert "was made on" not in capsys.readouterr().out
    cfg.weights = str(other)
    sample.sampling_times(cfg, False)
    assert "was made on the DiT" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was distilled from teacher"):
        extract_lora.main([config, "--weights", str(other)])


def sharded(ranks, folder):
    """Each rank's rows of the merged DiT are those of the whole."""
    cfg = sample.Config(weights=str(folder / "teacher.safetensors"), lora=str(folder / "l"),
                        preset="small", lora_scale=0.5)
    model.PRESETS["small"] = WAN
    whole = student_file.load_student(cfg, Path(cfg.lora), torch.device("cpu"))
    parts = student_file.load_student(cfg, Path(cfg.lora), torch.device("cpu"), ranks)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(p, q.full_tensor(), atol=1e-6), name


def test_ranks_read_and_merge_only_the_rows_that_they_keep(tmp_path, monkeypatch):
    teacher, student, *_ = write_pair(tmp_path, WAN)
    monkeypatch.setitem(model.PRESETS, "small", WAN)
    cfg = extract_lora.Config(preset="small", weights=str(teacher), student=str(student), rank=3,
                              run=str(tmp_path), device="cpu")
    extract_lora.extract(cfg, student, tmp_path / "l")
    in_processes(2, sharded, tmp_path)


# ------------------------------------------------------------------------- distilling a LoRA

QUICK = {"iterations": 4, "batch": 4, "micro_batch": 4, "held_out": 2, "save_every": 1,
         "eval_every": 4, "lr": 1e-3, "head_dim": 8, "checkpointing": True, "lora": 4,
         "export_dtype": "fp32"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_weights, run_stage):
    """A run of the command that trained a LoRA, in <folder>/whole, its config, and the weights."""
    folder = tmp_path_factory.mktemp("lora")
    config = {"weights": str(tiny_weights), "height": 16, "width": 16, "frames": 5, "n": 4,
              "key": [0, 2, 4], "device": "cpu", "distill": QUICK,
              "synvid": {"prompts": str(tiny_weights / "prompts.txt"), "count": 10, "videos": 0}}
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    for stage in ("synvid", "distill"):
        run_stage(stage, path, "--run", folder / "whole")
    return folder, path, tiny_weights


def read_all(path):
    return {name: t.read() for name, t in open_tensors(path).items()}


def again(trained, run: Path, run_stage, *options, ranks=1):
    """The same run in another folder, with the same trajectories: its student."""
    folder, config, _ = trained
    run.mkdir(exist_ok=True)
    if not (run / "synvid").exists():
        (run / "synvid").symlink_to(folder / "whole/synvid")
    run_stage("distill", config, f"run={run}", *options, ranks=ranks)
    return run / "student.safetensors"


def test_a_trained_lora_moves_the_blocks_matrices_alone_and_its_file_is_the_student(trained):
    folder, _, weights = trained
    run = folder / "whole"
    student, teacher = read_all(run / "student.safetensors"), dit_tensors(weights)
    moved = {name for name, w in student.items() if not torch.equal(w, teacher[name].read())}
    assert moved == {n for n, w in student.items() if n.startswith("blocks.") and w.ndim == 2}
    merged = with_lora(teacher, run / "student_lora.safetensors")
    for name in moved:
        delta = student[name] - teacher[name].read()
        assert (merged[name].read() - student[name]).abs().max() <= rounding(delta), name
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) <= 4
    same = [safetensors_metadata(run / f"student{end}.safetensors")["accvideo"]
            for end in ("", "_lora")]
    assert same[0] == same[1]
    page = student_file.how_to_use(run / "student_lora.safetensors")
    assert (run / "student_lora.md").read_text() == page and "LoraLoaderModelOnly" in page
    assert {t.dtype for t in open_tensors(run / "student_lora.safetensors").values()} == {
        torch.float16}


def test_evaluate_measures_a_lora_as_the_student_that_it_makes(trained, run_stage, tmp_path):
    folder, config, weights = trained
    files = [folder / f"whole/student{end}.safetensors" for end in ("", "_lora")]
    run_stage("evaluate", config, f"run={tmp_path}", f"students={files[0]},{files[1]}", "count=3",
              f"prompts={weights / 'prompts.txt'}", "pictures=false", "names=whole,lora",
              "c2st_steps=2")
    table = json.loads((tmp_path / "evaluate/table.json").read_text())
    few, whole, as_lora = (row["endpoint"][0] for row in table["rows"][1:4])
    assert whole != few and as_lora == pytest.approx(whole, rel=1e-2)  # the file is fp16


def test_gradients_moments_and_checkpoints_hold_the_factors_alone(trained):
    folder, _, _ = trained
    names = set(open_tensors(folder / "whole/distill/step_000004/rank_00000.safetensors"))
    ours = {name for name in names if not name.startswith(("heads/", "opt_heads/", "queue/"))}
    matrices = [n for n, p in build_dit("tiny").named_parameters() if "blocks" in n and p.ndim == 2]
    assert len(ours) == 2 * 4 * len(matrices)  # A and B, and of each two moments and the count
    assert all("lora_A" in name or "lora_B" in name for name in ours)


def test_a_run_that_trains_a_lora_resumes_with_the_same_bits(trained, run_stage, tmp_path):
    folder, _, _ = trained
    again(trained, tmp_path / "run", run_stage, "iterations=3")  # ends in the midst of a pass
    ours = again(trained, tmp_path / "run", run_stage)
    for end in ("student", "student_lora"):
        a, b = (read_all(path.with_name(f"{end}.safetensors"))
                for path in (ours, folder / "whole/student.safetensors"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_ranks_train_the_same_lora(trained, run_stage, tmp_path):  # more in test_parallel.py
    folder, _, _ = trained
    ours = read_all(again(trained, tmp_path / "run", run_stage, "micro_batch=2", ranks=2))
    theirs = read_all(folder / "whole/student.safetensors")
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-5


def test_a_fresh_lora_is_the_teacher_and_differs_by_seed_alone(tiny_weights, ranks):
    cfg = distill.Config(weights=str(tiny_weights), lora=3)
    a, b = (load_lora_student(cfg, ranks, torch.float32) for _ in range(2))
    x, t, cond = torch.randn(1, 16, 2, 4, 4), torch.tensor([0.5]), {"text": torch.randn(1, 3, 64)}
    with torch.no_grad():
        assert torch.equal(a(x, t, cond), model.load_dit(tiny_weights, "tiny")(x, t, cond))
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())
        assert p.requires_grad == (".lora_" in name)
    other = load_lora_student(distill.Config(weights=str(tiny_weights), lora=3, seed=1), ranks,
                              torch.float32)
    name = "blocks.0.ffn.0.lora_A"
    assert not torch.equal(*(net.get_parameter(name).full_tensor() for net in (a, other)))


def test_a_lora_of_hunyuanvideo_trains_too(tmp_path, monkeypatch, ranks):
    monkeypatch.setitem(model.PRESETS, "small", HUNYUAN)
    teacher, _, w, _ = write_pair(tmp_path, HUNYUAN)
    cfg = distill.Config(family="hunyuan", preset="small", weights=str(teacher), lora=2,
                         run=str(tmp_path), lr=1e-2, head_dim=8, updates="literal")
    state = distill.build(cfg, [0.0, 0.5, 1.0], ranks)
    x, t = torch.randn(1, 16, 2, 4, 4), torch.tensor([0.5])
    cond = {"text": draw("text", (1, 3, 12)), "pooled": draw("pooled", (1, 10)),
            "guidance": torch.tensor([6.0])}
    for _ in range(2):
        state.student(x, t, cond).square().mean().backward()
        distill.update_student(cfg, state, "adv", 0, Log(state.student))
    tensors = student_tensors(state.student, teacher, torch.float32)
    merged = {n: t.read() for n, t in tensors.items()}
    assert merged.keys() == w.keys()
    moved = {name for name in w if not torch.equal(merged[name], w[name])}
    assert moved == {name for name in w if w[name].ndim == 2
                     and name.startswith(("double_blocks", "single_blocks"))}
    save_tensors(tmp_path / "student.safetensors", merged, {"accvideo": "{}"})
    path = tmp_path / "student_lora.safetensors"
    write_together(path, lora_file(state.student, path), {"accvideo": "{}"}, ranks)
    again = with_lora(dit_tensors(teacher), tmp_path / "student_lora.safetensors")
    with torch.no_grad():
        for name in moved:
            assert (again[name].read() - merged[name]).abs().max() <= rounding(
                merged[name] - w[name]), name


def test_the_plans_of_a_lora_hold_moments_and_gradients_of_its_factors(ranks):
    shape, world = model.latent_shape(93, 480, 832), 8
    whole, thin = (memory_parts(distill.Config(preset="wan-t2v-14b", lora=rank), shape,
                                torch.device("cuda"), world, 1) for rank in (None, 32))
    factors = sum(p.numel() for p in build_student("wan-t2v-14b", 32).parameters()
                  if p.requires_grad)
    assert thin["gradients"] == 2 * 4 * factors / world == thin["AdamW"]
    assert thin["gradients"] < whole["gradients"] / 50
    assert thin["student"] == pytest.approx(whole["student"], rel=0.02)
    with pytest.raises(ValueError, match="lora: expected a rank 1 … 128, or none, got 129"):
        distill.check_config(distill.Config(lora=129), 1)
