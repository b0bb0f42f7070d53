"""The forms in which people store weights: each is read correctly, or refused in one line that says
what it is."""

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import randomise, write_weights
from safetensors.torch import save_file
from torch import Tensor

from artifacts.student import how_to_use, open_student
from common.files import write_json
from common.names import (
    EXPERTS, dit_files, dit_tensors, fingerprint, fingerprint_files, role_file)
from common.names import COMFY, comfy_to_official, official_names, plain_names
from common.ranks import generator
from common.weights import (
    LazyTensor, describe_model, only_weights, open_tensors, safetensors_metadata)
from frozen.load import load_text, load_vae
from model import PRESETS, build_dit, collate, load_dit

KEYS = Path(__file__).parent / "fixtures/keys"
FULL = "diffusion_pytorch_model.safetensors"


def state_of(preset: str = "tiny") -> dict[str, Tensor]:
    """Random weights of a preset under official names."""
    return randomise(build_dit(preset).requires_grad_(False), "forms", preset)


def loaded(path: Path, preset: str = "tiny") -> dict[str, Tensor]:
    return dict(load_dit(path, preset).state_dict())


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 0.0) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.allclose(got[name], want[name].float(), rtol=0, atol=atol), name


# ------------------------------------------------------------------------ prefixes and wrappers

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "transformer.",
            "net.", "generator.model.", "model.model.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("preset", ["tiny", "hunyuan-tiny"])
def test_a_prefix_before_every_name_is_stripped(prefix, preset, tmp_path):
    state = state_of(preset)
    save_file({prefix + name: t for name, t in state.items()}, tmp_path / "a.safetensors")
    assert_same(loaded(tmp_path / "a.safetensors", preset), state)


def test_wrappers_inside_names_and_other_networks_in_the_file_are_stripped(tmp_path):
    state = state_of()
    wrapped = {re.sub(r"blocks\.(\d+)\.", r"blocks.\1._checkpoint_wrapped_module._orig_mod.",
                      f"_fsdp_wrapped_module.{name}"): t for name, t in state.items()}
    others = {"first_stage_model.encoder.weight": torch.ones(3), "logvar": torch.ones(1)}
    save_file({f"model.{name}": t for name, t in wrapped.items()} | others,
              tmp_path / "a.safetensors")
    assert_same(loaded(tmp_path / "a.safetensors"), state)


def test_two_networks_of_a_kind_in_one_file_are_refused_by_their_prefixes(tmp_path):
    state = state_of()
    both = {f"{prefix}.{name}": t.clone() for prefix in ("generator", "generator_ema")
            for name, t in state.items()}
    save_file(both, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="several networks .*'generator.', 'generator_ema.'"):
        loaded(tmp_path / "a.safetensors")


# -------------------------------------------------------------------------------------- ComfyUI

# ComfyUI's names of HunyuanVideo's tensors, from the official ones; written from its own rules.
TO_COMFY = (("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
            ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
            ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
            ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
            ("_mod.linear.", "_mod.lin."), ("_attn_qkv.", "_attn.qkv."), ("mlp.fc1.", "mlp.0."),
            ("mlp.fc2.", "mlp.2."), ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
            ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
            (".q_norm.weight", ".norm.query_norm.scale"),
            (".k_norm.weight", ".norm.key_norm.scale"), ("_attn_proj.", "_attn.proj."),
            (".modulation.linear.", ".modulation.lin."), ("_in.mlp.2.", "_in.out_layer."),
            ("_in.mlp.0.", "_in.in_layer."))


def to_comfy(name: str) -> str:
    for ours, theirs in TO_COMFY:
        name = name.replace(ours, theirs)
    return name


def test_comfyui_s_names_of_every_hunyuan_tensor_lead_back_to_the_official_ones():
    names = json.loads((KEYS / "hunyuan_dit.json").read_text())["keys"]
    comfy = [to_comfy(name) for name in names]
    assert "double_blocks.3.img_attn.qkv.weight" in comfy and len(set(comfy)) == len(names)
    assert [comfy_to_official(name) for name in comfy] == list(names)
    assert all(any(pattern.search(name) for name in comfy) for pattern, _ in COMFY[:-2])


def test_a_hunyuan_dit_as_comfyui_saves_it_is_read(tmp_path):
    state = state_of("hunyuan-tiny")
    save_file({f"model.model.{to_comfy(name)}": t for name, t in state.items()},
              tmp_path / "a.safetensors")
    assert_same(loaded(tmp_path / "a.safetensors", "hunyuan-tiny"), state)


@pytest.fixture
def comfy(tmp_path):
    """ComfyUI's folder of models with a small Wan in it, and the official folder it was made of."""
    official = write_weights(tmp_path / "official")
    models = tmp_path / "ComfyUI/models"
    for folder in ("diffusion_models", "vae", "text_encoders", "loras"):
        (models / folder).mkdir(parents=True)
    shutil.copy(official / FULL, models / "diffusion_models/wan2.1_t2v_fp32.safetensors")
    shutil.copy(official / "Wan2.1_VAE.safetensors", models / "vae/wan_2.1_vae.safetensors")
    [t5] = official.glob("models_t5*")
    from safetensors import safe_open
    with safe_open(t5, "pt") as f:
        tensors, about = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118
    names = official_names(tensors, "text_encoder", reverse=True)
    tokens = (official / "google/umt5-xxl/spiece.model").read_bytes()
    names["spiece_model"] = torch.frombuffer(bytearray(tokens), dtype=torch.uint8)
    save_file(names, models / "text_encoders/umt5_xxl_fp16.safetensors", about)
    return models, official


def test_a_lora_s_settings_are_part_of_its_identity(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "lora.safetensors")
    prints = []
    for alpha in (8, 16):
        for lora in (tmp_path, tmp_path / "lora.safetensors"):
            prints.append(fingerprint_files(lora))
        write_json(tmp_path / "adapter_config.json", {"lora_alpha": alpha})
    assert len(set(prints[0:1] + prints[2:3] + [fingerprint_files(tmp_path)])) == 3
    assert prints[1] != prints[3] != fingerprint_files(tmp_path / "lora.safetensors")


def same_folders(weights: Path, official: Path) -> None:
    assert fingerprint(weights) == fingerprint(official)
    z = torch.randn(1, 16, 2, 2, 2, generator=generator("z"))
    with torch.no_grad():
        assert torch.equal(load_vae(weights).decode(z), load_vae(official).decode(z))
    texts = ["a red disc moves left", "a green ring moves up"]
    ours, theirs = (collate(load_text(folder, dtype=torch.float32, text_len=16).encode_each(texts))
                    for folder in (weights, official))
    assert torch.equal(ours["text"], theirs["text"])


def test_comfyui_s_folder_of_models_is_a_weight_folder(comfy):
    models, official = comfy
    same_folders(models, official)
    (models / "diffusion_models/sub").mkdir()
    shutil.copy(official / FULL, models / "diffusion_models/sub/wan2.1_i2v.safetensors")
    message = r"dit: expected one .*sub/wan2.1_i2v.safet.*give `dit: FILE`"
    with pytest.raises(FileNotFoundError, match=message):
        dit_files(models)
    (models / "vae/wan_2.1_vae.safetensors").rename(models / "vae/wan_2.1_vae.gguf")
    (models / "vae/wan_2.1_vae.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(ValueError, match="wan_2.1_vae.gguf: is a GGUF file"):
        load_vae(models)
    (models / "vae/wan_2.1_vae.gguf").unlink()
    (models / "vae/wan_2.1_vae.safetensors").symlink_to("../../blobs/0a")
    with pytest.raises(FileNotFoundError, match="no such weight file, only a link to .*blobs/0a"):
        load_vae(models)
    (models / "vae/wan_2.1_vae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="vae: expected one existing file, got none"):
        load_vae(models)


def test_a_list_of_files_is_a_weight_folder(comfy, tmp_path):
    models, official = comfy
    path = tmp_path / "mine.yaml"
    path.write_text("dit: ComfyUI/models/diffusion_models/wan2.1_t2v_fp32.safetensors\n"
                    "vae: official/Wan2.1_VAE.safetensors\n"
                    "text_encoder: ComfyUI/models/text_encoders/umt5_xxl_fp16.safetensors\n")
    same_folders(path, official)
    before = fingerprint_files(path)
    (official / "Wan2.1_VAE.safetensors").write_bytes(
        (official / "Wan2.1_VAE.safetensors").read_bytes() + b" ")
    assert fingerprint_files(path) != before
    for text, message in (("diT: a\n", "unknown key 'diT'; did you mean 'dit'"),
                          ("- a\n", "expected lines `ROLE: FILE`, for dit, dit_high"),
                          ("dit: [\n", "is not valid YAML"),
                          ("vae: nowhere\n", "vae: expected one existing file, got .*nowhere")):
        path.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            role_file(path, "vae")


# ------------------------------------------------------------------------------ dtypes and scales

@pytest.mark.parametrize("dtype, atol", [
    (torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-7),
    (torch.float8_e4m3fn, 0.07), (torch.float8_e5m2, 0.13)])
def test_floats_of_every_width_are_read(dtype, atol, tmp_path):
    state = {name: t.clamp(-0.5, 0.5) for name, t in state_of().items()}
    save_file({name: t.to(dtype) for name, t in state.items()}, tmp_path / "a.safetensors")
    assert_same(loaded(tmp_path / "a.safetensors"), state, atol)


def json_tensor(**facts: object) -> Tensor:
    """A description of a layer as ComfyUI stores it: JSON as bytes."""
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def fp8_of(state: dict[str, Tensor], end: str, shape: tuple[int, ...]
           ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Matrices of a state as fp8 that fills its range, and their scales under `layer + end`."""
    stored, scales = {}, {}
    for name, t in state.items():
        if name.endswith(".weight") and t.ndim == 2:
            top = t.abs().amax(1) if shape else t.abs().amax()
            scale = (top / 448).clamp(min=1e-12)
            scales[name.removesuffix(".weight") + end] = scale.reshape(shape)
            stored[name] = (t / (scale[:, None] if shape else scale)).to(torch.float8_e4m3fn)
        else:
            stored[name] = t
    return stored, scales


SMALL = {name: 1e-3 * t for name, t in state_of().items()}  # beneath fp8's own range


@pytest.mark.parametrize("end, shape, more", [
    (".scale_weight", (), "input"), (".scale_weight", (-1,), "input"),
    (".weight_scale", (), "comfy"), (".weight_scale", (-1, 1), "comfy"),
    (".weight_scale", (-1, 1, 1), "input")])
def test_scaled_fp8_is_read_by_its_scales(end, shape, more, tmp_path):
    stored, scales = fp8_of(SMALL, end, shape)
    stored |= scales
    for layer in (name.removesuffix(end) for name in scales):
        stored[f"{layer}.scale_input" if more == "input" else f"{layer}.comfy_quant"] = (
            torch.ones(()) if more == "input" else json_tensor(format="float8_e4m3fn"))
    if more == "input":
        stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file({f"model.diffusion_model.{name}": t for name, t in stored.items()},
              tmp_path / "a.safetensors")
    got = loaded(tmp_path / "a.safetensors")
    for name, t in SMALL.items():
        assert (got[name] - t).abs().max() <= 0.07 * t.abs().max() + 1e-9, name
    one = dit_tensors(tmp_path / "a.safetensors")["blocks.1.ffn.0.weight"]
    assert torch.equal(one.read(slice(3, 7)), one.read()[3:7])  # each rank its rows


def test_hunyuan_s_fp8_release_is_read_with_the_scales_in_its_map(tmp_path):
    state = {name: 1e-3 * t for name, t in state_of("hunyuan-tiny").items()}
    stored, scales = fp8_of(state, "", ())
    torch.save({"module": stored}, tmp_path / "a_fp8.pt")
    with pytest.raises(ValueError, match="without its scale .*needs its …_fp8_map.pt"):
        dit_tensors(tmp_path / "a_fp8.pt")
    torch.save(scales, tmp_path / "a_fp8_map.pt")
    got = loaded(tmp_path / "a_fp8.pt", "hunyuan-tiny")
    for name, t in state.items():
        assert (got[name] - t).abs().max() <= 0.07 * t.abs().max() + 1e-9, name


OTHER_FORM = "shows that the weights are quantised in a form that is not supported: use bf16"
LAYER = "blocks.1.ffn.0"  # a matrix of [256, 128]


@pytest.mark.parametrize("more, scheme", [
    ({}, "without its scale .HunyuanVideo"),
    ({"weight": torch.full((256, 128), 448.0).to(torch.float8_e5m2)}, "448 and without its scale"),
    ({"scale_weight": torch.ones(256, 4, 1)}, r"\[256, 4, 1\] .*: scales per block are not supp"),
    ({"weight_scale": torch.ones(1, 128)}, r"\[1, 128\] for a weight .*: scales per block"),
    ({"weight_scale": torch.ones(256, 4, dtype=torch.uint8)}, "holds uint8 .*scales per block"),
    ({"weight_scale_inv": torch.ones(2, 1)}, OTHER_FORM),
    ({"weight_scale": torch.ones(()), "comfy_quant": json_tensor(format="nvfp4")}, OTHER_FORM),
    ({"weight_scale": torch.ones(()), "comfy_quant": json_tensor(format="float8_e4m3fn", rot=1)},
     OTHER_FORM),
    ({"comfy_quant": torch.ones(50, dtype=torch.uint8)}, "comfy_quant: is not valid JSON"),
    ({"weight.scale": torch.ones(2, 1)}, OTHER_FORM),
    ({"weight_scale_2": torch.ones(())}, OTHER_FORM),
    ({"weight._scale": torch.ones(256, 1)}, OTHER_FORM),
    ({"scale_weight": torch.ones(()), "weight_scale": torch.ones(())}, OTHER_FORM),
    ({"weight.absmax": torch.ones(4)}, OTHER_FORM),
    ({"weight.quant_state.bitsandbytes__nf4": torch.ones(4, dtype=torch.uint8)}, OTHER_FORM),
    ({"qweight": torch.ones(4, dtype=torch.int32)}, OTHER_FORM)])
def test_weights_quantised_in_another_form_are_refused(more, scheme, tmp_path):
    stored, scales = fp8_of(SMALL, ".weight_scale", ())
    del scales[f"{LAYER}.weight_scale"]
    save_file(stored | scales | {f"{LAYER}.{name}": t for name, t in more.items()},
              tmp_path / "a.safetensors")
    for read in (dit_tensors, fingerprint):  # before a network is built, on every rank alike
        with pytest.raises(ValueError, match=scheme) as error:
            read(tmp_path / "a.safetensors")
        assert LAYER in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("component, prefix, anchor", [
    ("llm", "model.", "embed_tokens.weight"),
    ("llm", "language_model.model.", "embed_tokens.weight"),
    ("clip_text", "text_model.", "embeddings.token_embedding.weight")])
def test_the_other_text_encoders_take_prefixes_and_scales_too(component, prefix, anchor, tmp_path):
    scaled = torch.full((3, 4), 2.0).to(torch.float8_e4m3fn)
    save_file({f"{prefix}{anchor}": torch.ones(3, 4), f"{prefix}layers.0.q.weight": scaled,
               f"{prefix}layers.0.q.scale_weight": torch.tensor(0.5), "scaled_fp8": scaled[:0],
               "lm_head.weight": torch.ones(3, 4)}, tmp_path / "a.safetensors")
    got = plain_names(open_tensors(tmp_path / "a.safetensors"), component)
    assert got.keys() == {anchor, "layers.0.q.weight"}
    assert torch.equal(got["layers.0.q.weight"].read(), torch.ones(3, 4))
    save_file({f"{prefix}{anchor}": torch.ones(3, 4, dtype=torch.int8)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="int8, shows that the weights are quantised"):
        plain_names(open_tensors(tmp_path / "b.safetensors"), component)


# ------------------------------------------------------------------- variants, shards, old files

def write_form(folder: Path, form: str, state: dict[str, Tensor]) -> Path:
    """The weights in one of the forms that are read; returns what `weights` is then."""
    names = sorted(state)
    halves = {"0": names[::2], "1": names[1::2]}
    if form in ("fp16 variant", "bin"):
        diffusers = official_names(state, "transformer", reverse=True)
        (folder / "transformer").mkdir()
        if form == "bin":
            torch.save(diffusers, folder / "transformer/diffusion_pytorch_model.bin")
        else:
            save_file(diffusers, folder / "transformer/diffusion_pytorch_model.fp16.safetensors")
    elif form in ("bin shards", "fp16 shards"):
        end = "bin" if form == "bin shards" else "safetensors"
        index = {}
        for i, half in halves.items():
            file = f"diffusion_pytorch_model-0000{i}-of-00002.{end}"
            part = {name: state[name] for name in half}
            (torch.save if end == "bin" else save_file)(part, folder / file)
            index |= dict.fromkeys(half, file)
        middle = "" if end == "bin" else "fp16."
        write_json(folder / f"diffusion_pytorch_model.{end}.index.{middle}json",
                   {"weight_map": index})
    elif form == "old torch":
        torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
        return folder / "old.pt"
    elif form == "another suffix":
        save_file(state, folder / "weights.bin")
        return folder / "weights.bin"
    elif form == "hub cache":
        (folder / "blobs").mkdir()
        save_file(state, folder / "blobs/0a1b2c")
        (folder / "snapshots/abc").mkdir(parents=True)
        (folder / "snapshots/abc" / FULL).symlink_to("../../blobs/0a1b2c")
        return folder / "snapshots/abc"
    elif form == "full next to variant":
        save_file({name: t + 1 for name, t in state.items()},
                  folder / "diffusion_pytorch_model.fp16.safetensors")
        save_file(state, folder / FULL)
    else:
        torch.save({form: state}, folder / "wrapped.pth")
        return folder / "wrapped.pth"
    return folder


@pytest.mark.parametrize("form", [
    "fp16 variant", "bin", "bin shards", "fp16 shards", "old torch", "another suffix",
    "hub cache", "full next to variant", "module", "state_dict", "ema"])
def test_each_stored_form_is_read(form, tmp_path):
    state = state_of()
    weights = write_form(tmp_path, form, state)
    assert_same(loaded(weights), state)
    save_file(state, tmp_path / "plain.safetensors")
    assert fingerprint(weights) == fingerprint(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("place", [0, 147_500, 299_999])
def test_an_identity_depends_on_the_beginning_middle_and_end_of_a_tensor_and_of_a_file(
        place, tmp_path):
    prints = []
    for value in (0.0, 1.0):
        big = torch.zeros(300, 1000)
        big.view(-1)[place] = value
        save_file({"patch_embedding.weight": big}, tmp_path / "a.safetensors")
        prints.append((fingerprint(tmp_path / "a.safetensors"),
                       fingerprint_files(tmp_path / "a.safetensors")))
    assert prints[0][0] != prints[1][0] and prints[0][1] != prints[1][1]


def test_a_tensor_is_read_without_the_rest_of_its_file(tmp_path):
    data, shape = 1 << 40, [1 << 19, 1 << 19]  # a terabyte, of which the disk has a page
    header = json.dumps({"__metadata__": {"accvideo": "{}"}, "patch_embedding.weight": {
        "dtype": "F32", "shape": shape, "data_offsets": [0, data]}}).encode()
    with (tmp_path / "a.safetensors").open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + data)
    [tensor] = open_tensors(tmp_path / "a.safetensors").values()
    assert tensor.read(slice(7, 8)).shape == (1, 1 << 19)
    assert safetensors_metadata(tmp_path / "a.safetensors") == {"accvideo": "{}"}


# ------------------------------------------------------------------------------------- refusals

def torch_with_code() -> bytes:
    out = io.BytesIO()
    torch.save({"a": Path("code")}, out)
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n"
REFUSED = {
    "an LFS pointer": (LFS, "is a Git LFS pointer, not the weights: run `git lfs pull`"),
    "an empty file": (b"", "not a complete safetensors file"),
    "a web page": (b"<!DOCTYPE html><html>login</html>", "is a web page, not weights"),
    "GGUF": (b"GGUF\x03\0\0\0", "is a GGUF file, whose weights are quantised: use bf16"),
    "a dtype that does not exist": (
        b"\x40\0\0\0\0\0\0\0" + json.dumps({"a": {"dtype": "abc", "shape": [1], "data_offsets":
                                                     [0, 4]}}).ljust(64).encode() + b"1234",
        "not a complete safetensors file (Error while deserializing header"),
    "a pickle of protocol 5": (b"\x80\x05\x95", "is a file of torch.save despite its name"),
    "a cut file": (b"\xff\xff\xff\0\0\0\0\0{\"a\"", "not a complete safetensors file"),
    "noise": (b"\x12\x34" * 40, "not a complete safetensors file"),
    "torch's": (torch_with_code(), "is a file of torch.save despite its name: let it end")}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_of_another_kind_is_refused_by_what_it_is(kind, tmp_path):
    content, message = REFUSED[kind]
    path = tmp_path / FULL
    path.write_bytes(content)
    for read in (open_tensors, fingerprint):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "code.pt").write_bytes(torch_with_code())
    with pytest.raises(ValueError, match="damaged, or contains code, which is never read"):
        open_tensors(tmp_path / "code.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "five.pt", pickle_protocol=5)
    with pytest.raises(ValueError, match="five.pt: cannot be read as weights"):
        open_tensors(tmp_path / "five.pt")
    (tmp_path / "noise.bin").write_bytes(b"\x12\x34" * 40)
    with pytest.raises(ValueError, match="noise.bin: not a complete safetensors file"):
        open_tensors(tmp_path / "noise.bin")


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_safetensors_file_whose_length_has_the_bytes_of_a_pickle_is_read(length, tmp_path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    content = length.to_bytes(8, "little") + header.ljust(length) + b"\3\4"
    (tmp_path / "a.safetensors").write_bytes(content)
    assert open_tensors(tmp_path / "a.safetensors")["a"].read().tolist() == [3, 4]


def test_a_student_s_folder_with_a_gguf_alone_is_refused_by_what_it_is(tmp_path):
    (tmp_path / "student-Q8_0.gguf").write_bytes(b"GGUF\3\0\0\0")
    for read in (open_student, how_to_use):
        with pytest.raises(ValueError, match="student-Q8_0.gguf: is a GGUF file, whose weights"):
            read(tmp_path)


@pytest.mark.parametrize("tensors, message", [
    ({"blocks.0.ffn.0.lora_A.weight": torch.ones(4, 8)}, "is a LoRA .* as --lora"),
    ({"diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.ones(4, 8)}, "is a LoRA"),
    ({"lora_unet_blocks_0.hada_w1_a": torch.ones(4, 8)}, "is a LoRA"),
    ({"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.ones(4)}, r"is a LoRA .*q\.diff"),
    ({"blocks.0.ffn.0.diff_b": torch.ones(4)}, "is a LoRA"),
    ({"patch_embedding.weight": torch.ones(4, 8, dtype=torch.int8)}, "int8, shows that"),
    ({"a.weight": torch.ones(4, 1, dtype=torch.uint8)}, "a.weight, uint8, shows that")])
def test_tensors_of_another_kind_are_refused_before_a_network_is_built(tensors, message,
                                                                           tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        dit_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("index, message", [
    ({"weight_map": {"a": "../b.safetensors"}}, "files in its folder, got ../b"),
    ({"weight_map": {"a": "/etc/b.safetensors"}}, "files in its folder, got /etc"),
    ({"weight_map": {"a": 3}}, "weight_map.a: expected text, got 3"),
    ({"weight_map": {"a": f"{FULL}.index.json"}}, "json: not a complete safetensors file"),
    ({"weight_map": {"a": "gone"}}, "gone: no such weight file, only a link to blobs/0a: download"),
    ({"weight_map": {"a": "self"}}, "self: no such weight file"),
    ([1], r"expected a JSON object, got \[1\]: an index of shards"),
    ({"other": 1}, "the object has no key weight_map")])
def test_an_index_of_another_shape_or_that_points_outside_is_refused(index, message, tmp_path):
    write_json(tmp_path / f"{FULL}.index.json", index)
    (tmp_path / "gone").symlink_to("blobs/0a")
    (tmp_path / "self").symlink_to(".")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dit_tensors(tmp_path)


HIGH, LOW = (f"wan2.2_t2v_{level}_noise_14B_fp16.safetensors" for level in ("high", "low"))


def save_experts(root: Path, places: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Two different DiTs at two places under a folder; returns both under our names."""
    both = {}
    for number, (expert, place) in enumerate(zip(EXPERTS, places, strict=True)):
        state = {name: t + number for name, t in state_of().items()}
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, root / place)
        both |= {f"{expert}.{name}": t for name, t in state.items()}
    return both


@pytest.mark.parametrize("places, weights", [
    ((f"high_noise_model/{FULL}", f"low_noise_model/{FULL}"), "."),
    ((f"transformer/{FULL}", f"transformer_2/{FULL}"), "."),
    ((f"diffusion_models/{HIGH}", f"diffusion_models/{LOW}"), "."),
    ((HIGH, LOW), HIGH), ((HIGH, LOW), LOW), (("a.safetensors", "b.safetensors"), "files.yaml")])
def test_both_experts_of_wan_2_2_are_read_from_every_layout(places, weights, tmp_path):
    state = save_experts(tmp_path, places)
    (tmp_path / "files.yaml").write_text(f"dit_high: {places[0]}\ndit_low: {places[1]}\n")
    tensors = dit_tensors(tmp_path / weights)
    assert_same({name: t.read() for name, t in tensors.items()}, state)
    assert fingerprint(tmp_path / weights) == fingerprint(tmp_path / "files.yaml")
    dit = load_dit(tmp_path / weights, "tiny-experts")
    assert_same({name: p.detach() for name, p in dit.named_parameters()}, state)
    with pytest.raises(ValueError, match="expected 1 DiT.* by preset 'tiny', got 2 .Wan 2.2 A14B"):
        load_dit(tmp_path / weights, "tiny")


@pytest.mark.parametrize("name, message", [
    ("diffusion_pytorch_model-00002-of-00003.safetensors", "is one of 3 shards: get the others"),
    (HIGH, f"{LOW}: is missing: get both DiTs of Wan 2.2"),
    ("low_noise_model/" + FULL, "is one of the two DiTs of Wan 2.2 A14B: point `weights` at"),
    ("high_noise_model/config.json", "low_noise_model: is missing: get both DiTs of Wan 2.2"),
    ("model_index.json", "transformer_2: is missing: get both DiTs of Wan 2.2"),
    ("files.yaml", "files.yaml: dit_low: expected one existing file")])
def test_a_part_of_a_model_is_not_taken_for_all_of_it(name, message, tmp_path):
    state, path = state_of(), tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "transformer").mkdir(exist_ok=True)
    save_file(state, tmp_path / "transformer" / FULL)
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".yaml":
        path.write_text("dit_high: transformer\n")
    else:
        write_json(path, {"boundary_ratio": 0.875})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dit_tensors(tmp_path if path.suffix == ".json" else path)
    if name == "model_index.json":  # Wan 2.1's
        write_json(path, {"boundary_ratio": None})
        assert_same(loaded(tmp_path), state)


@pytest.mark.parametrize("weights", ["transformer", "transformer_2", f"transformer/{FULL}"])
def test_one_expert_of_a_diffusers_folder_is_refused(weights, tmp_path):
    save_experts(tmp_path, (f"transformer/{FULL}", f"transformer_2/{FULL}"))
    with pytest.raises(ValueError, match="is one of the two DiTs of Wan 2.2 A14B"):
        dit_tensors(tmp_path / weights)
    write_json(tmp_path / "model_index.json", {"boundary_ratio": 0.875})
    with pytest.raises(ValueError, match="boundary_ratio is 0.875, preset 'tiny-experts' has 0.5"):
        load_dit(tmp_path, "tiny-experts")


def test_one_dit_in_place_of_two_experts_is_refused(tmp_path):
    save_file(state_of(), tmp_path / FULL)
    with pytest.raises(ValueError, match="expected 2 DiT.* by preset 'tiny-experts', got 1"):
        load_dit(tmp_path, "tiny-experts")


def test_wan_2_2_ti2v_is_refused_by_its_name(tmp_path):
    sizes = dataclasses.replace(PRESETS["tiny"], in_dim=48, out_dim=48)
    with torch.device("meta"):
        state = build_dit(sizes).to_empty(device="cpu").state_dict()
    save_file(state, tmp_path / FULL)
    with pytest.raises(ValueError, match="is Wan 2.2 TI2V-5B, whose VAE and times .* Wan 2.2 A14B"):
        load_dit(tmp_path, "tiny")


def test_among_files_of_one_model_the_plain_name_and_safetensors_are_preferred(tmp_path):
    stem = "diffusion_pytorch_model"
    for name in (f"{stem}.bin.index.json", f"{stem}.fp16.safetensors.index.json",
                 f"{FULL}.index.json"):
        (tmp_path / name).touch()
        assert only_weights(tmp_path, stem).name == name  # each is preferred to those before it
        (tmp_path / "vae.safetensors").touch()
    for path in tmp_path.glob("*.json"):
        path.unlink()
    for name in (f"{stem}_old.safetensors", f"{stem}.fp16.safetensors", FULL):
        (tmp_path / name).touch()
    assert only_weights(tmp_path, stem).name == FULL


def test_a_student_next_to_its_teacher_s_shards_is_refused_as_ambiguous(tmp_path):
    save_file(state_of(), tmp_path / FULL)
    write_json(tmp_path / f"{FULL}.index.json", {"weight_map": {"a": FULL}})
    with pytest.raises(FileNotFoundError, match=rf"got {FULL}.index.json, {FULL}: name the file"):
        dit_files(tmp_path)


@pytest.mark.parametrize("keys, model", [
    ("wan_t2v_1_3b", "Wan 2.1 T2V 1.3B"), ("wan_t2v_14b", "Wan 2.1 T2V 14B"),
    ("wan_i2v_14b", "Wan 2.1 I2V 14B"), ("hunyuan_dit", "HunyuanVideo")])
def test_a_released_checkpoint_is_recognised_by_its_names_and_shapes(keys, model):
    shapes = json.loads((KEYS / f"{keys}.json").read_text())["keys"]
    tensors = {name: LazyTensor(tuple(shape), torch.bfloat16, Path("a"), lambda rows=None: None)
               for name, shape in shapes.items()}
    found = describe_model(plain_names(tensors, "transformer"))
    assert found.startswith(f"; it looks like {model}")
    if keys == "wan_i2v_14b":
        tensors = {name: t for name, t in tensors.items() if "img_emb" not in name}
        assert describe_model(tensors) == "; it looks like Wan 2.2 I2V A14B"
        tensors["vace_patch_embedding.weight"] = tensors["patch_embedding.weight"]
        assert describe_model(tensors) == "; it looks like Wan 2.1 VACE"


def test_the_wrong_model_is_named(tmp_path):
    save_file(state_of("hunyuan-tiny"), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="it looks like a HunyuanVideo DiT of another size"):
        load_dit(tmp_path / "a.safetensors", "tiny")
    assert PRESETS["tiny"].dim == 128
