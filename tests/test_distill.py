"""Stage 2: Algorithm 1 in the paper's order, its losses, its data order, and resuming."""

import copy
import itertools
import json
import math
import os
import shutil
import signal
from collections import deque
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from processes import in_processes, run_script
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import distill
import model
from common.config import load_config
from common.ranks import AgreedError, generator, local_rows
from common.weights import save_tensors
from model import WanConfig, key_times
from training import data as loading
from training import monitor
from training.checkpoint import Saver, check_same_run, resume, save_state, tensors_of
from training.monitor import Journal, held_out_errors, step_flops, teacher_errors

SMALL = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=3, text_dim=8, text_len=4,
                  freq_dim=16)
M3 = key_times("wan", 6, 5.0, [0, 2, 4, 6])[::-1]
KILLED = Path(__file__).parent / "killed_stage.py"


class FakeSynVid:
    """Random trajectories in memory with SynVid's interface."""

    def __init__(self, t_key, count=12, shape=(16, 2, 4, 4)):
        self.t_key, self.count, self.manifest = t_key, count, {"shape": list(shape)}

    def __len__(self):
        return self.count

    def read(self, i, ks=None):
        g = generator("fake", i)
        x = torch.randn(len(self.t_key), *self.manifest["shape"], generator=g)
        x = x if ks is None else x[ks]
        return x, {"text": torch.randn(1 + i % 4, 8, generator=g)}, f"prompt {i}"


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A small random teacher as one file, of preset `small`."""
    monkeypatch.setitem(model.PRESETS, "small", SMALL)
    dit = model.build_dit("small")
    dit.init_weights(generator("teacher"))
    with torch.no_grad():
        dit.head.head.weight.normal_(std=0.2, generator=generator("head"))
    path = tmp_path / "teacher.safetensors"
    save_tensors(path, dit.state_dict(), {})
    return path


def settings(weights, tmp_path, **changes):
    base = {"preset": "small", "weights": str(weights), "run": str(tmp_path / "run"), "n": 6,
            "key": [0, 2, 4, 6], "shift": 5.0, "batch": 4, "micro_batch": 4, "iterations": 6,
            "held_out": 3, "lr": 1e-3, "clip": None, "head_dim": 8, "checkpointing": False}
    return distill.Config(**{**base, **changes})


def run(cfg, ranks, steps=None, nets=None):
    """Distill in this process; returns nets and each iteration's figures."""
    loader = loading.Loader(cfg, FakeSynVid(M3), ranks)
    nets = nets or lively(distill.build(cfg, M3, ranks))
    lines = [{"k": k, **log.gather()} for _, k, log in
             itertools.islice(distill.algorithm_1(cfg, nets, loader), steps)]
    return nets, lines


def lively(nets):
    """With heads whose last layer is not zero: else L_adv has no gradient in the first pass."""
    for k, head in enumerate(nets.heads):
        nn.init.normal_(head[-1].weight, generator=generator("lively", k))
    return nets


def parameters(nets):
    return torch.cat([local_rows(p)[0].flatten() for p in nets.student.parameters()])


class Recorder(nn.Module):
    """A network that records its calls: the time, whether a gradient flows, and the taps."""

    def __init__(self, name, events):
        super().__init__()
        self.name, self.events, self.scale = name, events, nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond, taps=(), features_only=False):
        kind = "generated" if x.requires_grad else "stored"
        self.events.append((self.name, round(float(t[0]), 6), *([kind, *taps] if taps else [])))
        return (None, [x.flatten(2).transpose(1, 2)]) if taps else self.scale * x

    def token_grid(self, T, H, W):
        return T, H, W


@pytest.mark.parametrize("checkpointing", [False, True])
def test_calls_follow_algorithm_1_for_m_3(monkeypatch, ranks, checkpointing):
    events = []
    cfg = distill.Config(key=[0, 2, 4, 6], n=6, batch=2, micro_batch=2, iterations=3, held_out=1,
                         updates="literal", checkpointing=checkpointing)
    loader = loading.Loader(cfg, FakeSynVid(M3), ranks)
    heads = distill.make_heads(cfg, 16)
    queues = [deque() for _ in range(4)]
    nets = distill.TrainState(Recorder("student", events), Recorder("teacher", events), heads, {},
                              M3, [1, 2, 2], queues)
    for name in ("update_student", "update_heads"):
        monkeypatch.setattr(distill, name, lambda cfg, nets, *loss, _n=name: events.append(
            (_n, *[x for x in loss if isinstance(x, str)])))
    for k, head in enumerate(heads):
        head.register_forward_hook(lambda *_, k=k: events.append(("head", k)))
    noise = loading.fresh_noise
    monkeypatch.setattr(loading, "fresh_noise", lambda *a: events.append(("noise",)) or noise(*a))
    monkeypatch.setattr(distill, "functional_call", lambda head, params, args: head(*args))

    def data(step):
        events.append(("data", step))
        return loader.read(step)

    for _ in distill.algorithm_1(cfg, nets, data):
        events.append(("queues", [len(q) for q in queues]))

    t, expected = [round(x, 6) for x in M3], []
    for step, k in enumerate((2, 1, 0)):
        tap = 1 if k == 0 else 2
        expected += [("data", step), ("student", t[k + 1]), ("update_student", "traj")]
        expected += [("noise",)] if k == 2 else []
        expected += [("student", t[k + 1]), ("teacher", t[k], "generated", tap),
                     ("teacher", t[k], "stored", tap), ("head", k), ("head", k), ("head", k),
                     *[("student", t[k + 1])] * checkpointing,  # recomputed, activations kept
                     ("update_student", "adv"), ("update_heads",),
                     ("queues", [0, int(k == 1), int(k == 2), 0])]
    assert events == expected


def test_oracle_student_has_zero_trajectory_loss():
    x, _, _ = FakeSynVid(M3).read(0)
    x_key = list(x[:, None])
    slope = {M3[k + 1]: (x_key[k] - x_key[k + 1]) / (M3[k] - M3[k + 1]) for k in range(3)}
    for k in range(3):
        loss = distill.traj_loss(lambda x, t, cond: slope[float(t[0])], x_key, M3, k, {})
        assert loss.item() == 0


def test_losses_at_zero_logits_are_those_of_a_coin_toss():
    zero = torch.zeros(2, 3)
    assert distill.head_loss(zero, zero, "nonsaturating").item() == pytest.approx(2 * math.log(2))
    assert distill.head_loss(zero, zero, "hinge").item() == 2
    assert distill.student_adv_loss(zero, "nonsaturating").item() == pytest.approx(math.log(2))
    assert distill.student_adv_loss(zero, "printed").item() == pytest.approx(-math.log(2))


def test_adversarial_forms_push_logits_of_generated_latents_up():
    for form in ("nonsaturating", "printed", "hinge"):
        fake = torch.tensor([-1.0, 0.5], requires_grad=True)
        distill.student_adv_loss(fake, form).backward()
        assert (fake.grad < 0).all()


def test_fresh_heads_are_undecided_and_differ_by_seed_alone():
    cfg = distill.Config(head_dim=8)
    a, b = distill.make_heads(cfg, 24), distill.make_heads(cfg, 24)
    assert len(a) == 5 and len(distill.make_heads(distill.Config(heads="shared"), 24)) == 1
    assert a[2](torch.randn(2, 24, 4, 5)).abs().max() == 0
    for c in (1, 8):  # only the last layer's weight is zero: the others would never learn
        [head] = distill.make_heads(distill.Config(heads="shared", head_dim=c), 24)
        assert [bool(p.any()) for p in head.parameters() if p.ndim > 1] == [True, True, False]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(a[0][0].weight, a[1][0].weight)


def test_teacher_and_head_stay_frozen_while_the_generated_latent_gets_a_gradient(weights):
    teacher = model.load_dit(weights, "small").requires_grad_(False)
    [head] = distill.make_heads(distill.Config(heads="shared", head_dim=8), 24)
    nn.init.normal_(head[-1].weight)
    x_gen = torch.randn(2, 16, 2, 4, 4, requires_grad=True)
    x_real, cond = torch.randn(2, 16, 2, 4, 4), {"text": torch.randn(2, 3, 8)}
    loss, loss_head, real, fake = distill.adv_losses(head, teacher, x_gen, x_real, M3[1], cond, 2,
                                                     "nonsaturating")
    loss.backward()
    assert x_gen.grad.abs().max() > 0
    assert all(p.grad is None for p in [*teacher.parameters(), *head.parameters()])
    x_gen.grad = None
    loss_head.backward()
    assert x_gen.grad is None and head[0].weight.grad.abs().max() > 0
    assert 0 <= real <= 1 and 0 <= fake <= 1


def test_queue_entries_are_detached_and_hold_prompt_and_latents(weights, tmp_path, ranks):
    nets, _ = run(settings(weights, tmp_path), ranks, steps=1)
    assert [len(q) for q in nets.queues] == [0, 0, 1, 0]
    x_gen, x_key, cond = nets.queues[2][0]
    assert not x_gen.requires_grad and len(x_key.host) == 4 and cond["text"].shape[0] == 4


def test_every_trajectory_is_read_once_before_any_is_repeated(weights, tmp_path, ranks):
    cfg = settings(weights, tmp_path, batch=3, micro_batch=1)
    loader = loading.Loader(cfg, FakeSynVid(M3), ranks)
    first = {i: FakeSynVid(M3).read(i)[0] for i in range(9)}
    seen = [next(i for i, x in first.items() if torch.equal(x[k], b.x_key[k][0]))
            for step in range(3) for k in [2 - step] for b in loader(step)]
    assert sorted(seen) == list(range(9)) and seen != list(range(9))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_learn_the_same_up_to_rounding(weights, tmp_path, ranks):
    plain, _ = run(settings(weights, tmp_path, lr=1e-4), ranks, steps=2)
    torch._dynamo.reset()
    fused, _ = run(settings(weights, tmp_path, lr=1e-4, compile=True), ranks, steps=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert 0 < (parameters(plain) - parameters(fused)).abs().max() < 1e-5


def test_the_teacher_s_errors_are_read_from_the_log_of_an_earlier_start(weights, tmp_path, ranks,
                                                                        monkeypatch):
    cfg = settings(weights, tmp_path)
    nets, loader = distill.build(cfg, M3, ranks), loading.Loader(cfg, FakeSynVid(M3), ranks)
    journal = Journal(tmp_path, 0, ranks)
    journal.append({"step": 1, "k": 0})
    first = teacher_errors(cfg, nets.teacher, loader, ranks, journal)
    assert first.keys() == {"endpoint_teacher", "velocity_teacher"} and len(
        first["velocity_teacher"]) == 3
    monkeypatch.delattr(monitor, "held_out_errors")
    monkeypatch.setattr(monitor, "draw_curves", lambda *_: None)
    journal.append({"step": 2, "k": 1})
    journal.extend({"endpoint": 0.5, **first})
    journal.append({"step": 3, "k": 0})
    journal = Journal(tmp_path, 2, ranks)  # resumed from a checkpoint of step 2
    assert [line["step"] for line in journal.lines] == [1, 2]
    assert teacher_errors(cfg, nets.teacher, loader, ranks, journal) == first


def test_a_log_line_or_picture_that_cannot_be_written_is_a_warning_and_the_line_comes_later(
        tmp_path, ranks, monkeypatch, capsys):
    def fails(*_):
        raise OSError(28, "No space left on device")

    journal = Journal(tmp_path, 0, ranks)
    with monkeypatch.context() as m:
        for name in ("append_log", "write_text", "draw_curves"):
            m.setattr(monitor, name, fails)
        journal.append({"step": 1, "k": 1})
        journal.extend({"endpoint": 0.5})
    assert capsys.readouterr().out.count("No space left on device; training continues") == 3
    assert (tmp_path / "log.jsonl").read_text() == ""
    monkeypatch.setattr(monitor, "draw_curves", lambda *_: None)
    journal.append({"step": 2, "k": 0})
    journal.extend({"endpoint": 0.4})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(x["step"], x.get("endpoint")) for x in lines] == [(1, 0.5), (2, 0.4)]
    assert all(datetime.fromisoformat(x["time"]).tzinfo for x in lines)


def test_signals_are_collected_but_for_nohup_s_and_a_second_ctrl_c_ends_the_process_at_once():
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT]
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        caught = distill.catch_signals()
        for number in numbers:
            os.kill(os.getpid(), number)
        assert caught == numbers and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a command
        caught = distill.catch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert caught == []
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_accumulated_micro_batches_equal_one_batch(weights, tmp_path, ranks):
    full, _ = run(settings(weights, tmp_path, lr=1e-4), ranks)
    parts, _ = run(settings(weights, tmp_path, lr=1e-4, micro_batch=1), ranks)
    assert (parameters(full) - parameters(parts)).abs().max() < 1e-5


def test_activation_checkpointing_changes_no_parameter(weights, tmp_path, ranks):
    plain, _ = run(settings(weights, tmp_path), ranks, steps=2)
    saved, _ = run(settings(weights, tmp_path, checkpointing=True), ranks, steps=2)
    assert (parameters(plain) - parameters(saved)).abs().max() < 1e-6


def algorithm_1_by_hand(cfg, student, teacher, heads, t, batches, noises, taps):
    """Algorithm 1 in plain torch, from the paper and docs/decisions.md alone; returns the log.

    Args: t[k] = t'_k; of each iteration, batches its (l by k, cond) and noises its z.
    """
    def adamw(net):
        return torch.optim.AdamW(net.parameters(), betas=(cfg.beta1, cfg.beta2),
                                 weight_decay=cfg.weight_decay)

    def update(opt, base, step):
        params = opt.param_groups[0]["params"]
        norm = torch.cat([p.grad.flatten() for p in params]).norm()
        for p in params:
            p.grad *= 1 if cfg.clip is None else min(1, cfg.clip / (norm + 1e-6))
        progress = step / (len(batches) - 1)
        opt.param_groups[0]["lr"] = base * ((1 - progress) + progress * cfg.lr_final)
        opt.step()
        opt.zero_grad()
        return norm.item()

    def velocity(x, s, cond):
        return student(x, torch.full((len(x),), s, dtype=torch.float64), cond)

    def features(x, s, cond, tap):
        frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        f = teacher(x, torch.full((len(x),), s, dtype=torch.float64), cond, taps=(tap,))[1][0]
        f = (f - f.mean(-1, keepdim=True)) / (f.var(-1, False, keepdim=True) + 1e-5).sqrt()
        return f.reshape(len(x) * frames, rows, columns, -1).movedim(-1, 1)

    m, queues, lines = len(t) - 1, {k: [] for k in range(len(t))}, []
    by_traj = adamw(student)
    by_adv = adamw(student) if cfg.updates == "separate" else by_traj
    by_head = [adamw(head) for head in heads]
    for step, (latents, cond) in enumerate(batches):
        k, line = m - 1 - step % m, {}
        slope = (latents[k] - latents[k + 1]) / (t[k] - t[k + 1])                     # Eq. 6
        loss_traj = (velocity(latents[k + 1], t[k + 1], cond) - slope).square().mean()
        loss_traj.backward()
        if cfg.updates != "combined":
            line["grad_traj"] = update(by_traj, cfg.lr, step)
        if k == m - 1:
            queues[m].append((noises[step], latents, cond))
        x, latents, cond = queues[k + 1].pop()
        x_gen = x + (t[k] - t[k + 1]) * velocity(x, t[k + 1], cond)                   # Eq. 5
        queues[k].append((x_gen.detach(), latents, cond))
        index = 0 if cfg.heads == "shared" else k
        f_gen = features(x_gen, t[k], cond, taps[k])
        fake = copy.deepcopy(heads[index]).requires_grad_(False)(f_gen)
        loss_adv = {"nonsaturating": -fake.sigmoid().log(), "hinge": -fake,           # Eq. 7
                    "printed": (1 - fake.sigmoid()).log()}[cfg.adv_form].mean()
        (cfg.lambda_adv * loss_adv).backward()
        fake = heads[index](f_gen.detach())                                           # Eq. 8
        real = heads[index](features(latents[k], t[k], cond, taps[k]))
        if cfg.adv_form == "hinge":
            loss_head = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
        else:
            loss_head = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
        (cfg.lambda_adv * loss_head).backward()
        name = "grad_sum" if cfg.updates == "combined" else "grad_adv"
        line[name] = update(by_adv, cfg.lr, step)
        line["grad_head"] = update(by_head[index], cfg.lr_heads or cfg.lr, step)
        lines.append({**line, "k": k, "loss_traj": loss_traj.item(), "loss_adv": loss_adv.item(),
                      "loss_head": loss_head.item(), "acc_real": (real > 0).float().mean().item(),
                      "acc_fake": (fake < 0).float().mean().item()})
    return lines


@pytest.mark.parametrize("changes", [
    {},
    {"updates": "literal", "adv_form": "printed", "heads": "shared", "clip": 0.5, "beta1": 0.9,
     "lr_heads": 3e-3, "lr_final": 0.2, "weight_decay": 0.1},
    {"updates": "separate", "adv_form": "hinge", "micro_batch": 1, "tap": 1, "tap_data": 0},
    {"micro_batch": 2, "checkpointing": True, "clip": 1.0, "lambda_adv": 1.0}],
    ids=["combined", "literal", "separate", "accumulated"])
def test_two_passes_over_k_equal_algorithm_1_by_hand(changes, weights, tmp_path, ranks):
    key, count = [0, 1, 4, 6], 9  # uneven; trajectories without those held out
    cfg = settings(weights, tmp_path, key=key, head_dim=16, **changes)
    t_key = key_times("wan", 6, 5.0, key)[::-1]
    data = FakeSynVid(t_key)
    nets = lively(distill.build(cfg, t_key, ranks))
    student, teacher = (model.load_dit(weights, "small") for _ in range(2))
    heads = copy.deepcopy(nets.heads)
    order = torch.cat([torch.randperm(count, generator=generator("order", 0, epoch))
                       for epoch in range(3)]).tolist()
    batches, noises = [], []
    for step in range(6):
        x, conds, _ = zip(*map(data.read, order[4 * step:4 * step + 4]), strict=True)
        text = nn.utils.rnn.pad_sequence([cond["text"] for cond in conds], batch_first=True)
        batches.append((torch.stack(x, 1), {"text": text}))
        noises.append(torch.stack([torch.randn(16, 2, 4, 4, generator=generator(
            "z", 0, step, slot)) for slot in range(4)]))
    taps = (cfg.tap_data, cfg.tap, cfg.tap) if "tap" in changes else (1, 2, 2)
    by_hand = algorithm_1_by_hand(cfg, student, teacher.requires_grad_(False), heads, t_key,
                                  batches, noises, taps)
    lines = [{"k": k, **log.gather()} for _, k, log in distill.algorithm_1(
        cfg, nets, loading.Loader(cfg, data, ranks))]
    for line, other in zip(lines, by_hand, strict=True):
        assert {name: line[name] for name in other} == pytest.approx(other, rel=1e-4, abs=1e-5)
    for net, other in ((nets.student, student), (nets.heads, heads)):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert (local_rows(p)[0] - q).abs().max() < 5e-5  # a step is 1e-3


def test_switching_a_loss_off_leaves_its_calls_out(weights, tmp_path, ranks):
    _, lines = run(settings(weights, tmp_path, adv=False), ranks, steps=2)
    assert "loss_adv" not in lines[0] and "loss_traj" in lines[0] and "grad_traj" in lines[0]
    cfg = settings(weights, tmp_path, traj=False)
    nets, lines = run(cfg, ranks, steps=2, nets=distill.build(cfg, M3, ranks))
    assert "loss_traj" not in lines[0] and "loss_adv" in lines[0] and "grad_adv" in lines[0]
    assert lines[0]["loss_head"] == pytest.approx(2 * math.log(2), rel=1e-6)


def test_trajectory_loss_falls_and_the_held_out_error_with_it(weights, tmp_path, ranks):
    cfg = settings(weights, tmp_path, iterations=60, adv=False, lr=5e-3)
    loader = loading.Loader(cfg, FakeSynVid(M3), ranks)
    nets = distill.build(cfg, M3, ranks)
    before = held_out_errors(cfg, nets.student, loader, ranks)
    _, lines = run(cfg, ranks, nets=nets)
    assert lines[-1]["loss_traj"] < 0.9 * next(x for x in lines if x["k"] == 0)["loss_traj"]
    after = held_out_errors(cfg, nets.student, loader, ranks)
    assert all(b < a for a, b in zip(before["velocity"], after["velocity"], strict=True))
    assert len(after["velocity"]) == 3 and after["endpoint"] < 0.9 * before["endpoint"]


def test_held_out_error_of_an_exact_student_is_zero(weights, tmp_path, ranks):
    cfg = settings(weights, tmp_path, micro_batch=2)
    loader = loading.Loader(cfg, FakeSynVid(M3), ranks)
    x = torch.stack([loader.data.read(9 + j)[0] for j in range(3)], 1)

    def oracle(x_t, t, cond):  # held-out rows come as 9, 10 and then 11, 11
        k = M3.index(float(t[0])) - 1
        slopes = (x[k] - x[k + 1]) / (M3[k] - M3[k + 1])
        near = torch.cdist(x_t.flatten(1), x[k + 1].flatten(1)).argmin(1)
        return slopes[near]

    errors = held_out_errors(cfg, oracle, loader, ranks)
    assert errors["endpoint"] < 1e-10 and max(errors["velocity"]) < 1e-10


def keep(cfg, nets, loader, ranks, meta):
    """Write a checkpoint and wait for it."""
    saver = Saver(Path(cfg.run) / "distill", ranks, cfg.keep)
    save_state(saver, nets, loader, meta)
    saver.wait()


def test_resuming_gives_the_same_bits_at_every_k(weights, tmp_path, ranks):
    cfg = settings(weights, tmp_path, updates="separate")
    undisturbed, _ = run(cfg, ranks)
    meta = {"config": asdict(cfg), "teacher": "t", "synvid": "s", "count": 9}
    loader = loading.Loader(cfg, FakeSynVid(M3), ranks)
    for steps in (1, 2, 3):
        nets, _ = run(cfg, ranks, steps=steps)
        keep(cfg, nets, loader, ranks, meta)
        fresh = distill.build(cfg, M3, ranks)
        resume(cfg, fresh, loader, ranks, meta)
        assert fresh.step == steps
        run(cfg, ranks, nets=fresh)
        assert torch.equal(parameters(fresh), parameters(undisturbed))


def test_checkpoint_after_an_evaluation_holds_every_optimizer_state(weights, tmp_path, ranks):
    cfg = settings(weights, tmp_path)
    nets, _ = run(cfg, ranks, steps=1)
    names = tensors_of(nets, {}).keys()
    held_out_errors(cfg, nets.student, loading.Loader(cfg, FakeSynVid(M3), ranks), ranks)
    assert tensors_of(nets, {}).keys() == names
    moments = [name for name in names if name.startswith("opt_traj/")]
    assert len(moments) == 3 * len(list(nets.student.parameters()))


def test_resuming_with_other_settings_is_an_error_that_names_them(weights, tmp_path, ranks):
    cfg = settings(weights, tmp_path)
    nets, _ = run(cfg, ranks, steps=1)
    loader = loading.Loader(cfg, FakeSynVid(M3), ranks)
    meta = {"config": asdict(cfg), "teacher": "t", "synvid": "s", "count": 9}
    keep(cfg, nets, loader, ranks, meta)
    other = asdict(settings(weights, tmp_path, lr=2e-3))
    with pytest.raises(AgreedError, match="lr=0.001, the config has 0.002"):  # printed once
        resume(cfg, nets, loader, ranks, {**meta, "config": other})
    longer = asdict(settings(weights, tmp_path, iterations=9))
    resume(cfg, nets, loader, ranks, {**meta, "config": longer})
    falling = {**meta, "config": {**meta["config"], "lr_final": 0.1}}
    with pytest.raises(ValueError, match=r"iterations=6, which its learning rate depends on "
                                         r"\(lr_final\), the config has 9: set iterations back"):
        check_same_run(Path("step"), falling, {**meta, "config": {**longer, "lr_final": 0.1}})
    check_same_run(Path("step"), falling, falling)
    for key in ("teacher", "synvid"):
        with pytest.raises(ValueError, match=f"{key}={meta[key]}, the config has other"):
            resume(cfg, nets, loader, ranks, {**meta, key: "other"})
    loader.count = 8
    with pytest.raises(ValueError, match="expected the 9 trajectories .*, got 8"):
        resume(cfg, nets, loader, ranks, meta)


def test_trajectories_added_later_change_nothing(weights, tmp_path, ranks):
    cfg = settings(weights, tmp_path)
    undisturbed, _ = run(cfg, ranks)
    nets, _ = run(cfg, ranks, steps=2)
    meta = {"config": asdict(cfg), "teacher": "t", "synvid": "s", "count": 9}
    keep(cfg, nets, loading.Loader(cfg, FakeSynVid(M3), ranks), ranks, meta)
    more, fresh = loading.Loader(cfg, FakeSynVid(M3, 20), ranks), distill.build(cfg, M3, ranks)
    resume(cfg, fresh, more, ranks, meta)
    list(distill.algorithm_1(cfg, fresh, more))
    assert torch.equal(parameters(fresh), parameters(undisturbed))


@pytest.mark.parametrize("m", [2, 3, 5])
def test_curves_of_a_panel_differ_in_colour_but_those_of_one_k_do_not(m, tmp_path, monkeypatch):
    drawn, plot = {}, Axes.plot

    def noted(axes, *args, **options):
        drawn.setdefault(axes, []).append((options["label"], options["color"]))
        return plot(axes, *args, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    names = ("loss_traj", "acc_real", "acc_fake", "grad_traj", "grad_adv", "grad_sum", "grad_head",
             "endpoint", "endpoint_teacher")
    line = {"step": 1, "velocity": [0.5] * m, **dict.fromkeys(names, 0.5)}
    monitor.draw_curves(tmp_path / "a.png", [{**line, "k": k} for k in range(m)])
    assert [len(curves) for curves in drawn.values()] == [m, 2 * m, 4, 2]
    for curves in drawn.values():
        labelled = [colour for label, colour in curves if label]
        assert len(set(labelled)) == len(labelled)
        assert [colour for label, colour in curves if not label] in ([], labelled)


def test_operations_of_an_iteration_are_those_torch_counts(weights, tmp_path, ranks):
    cfg = settings(weights, tmp_path, traj=True, adv=True)
    nets = distill.build(cfg, M3, ranks)
    tokens = math.prod(nets.student.token_grid(2, 4, 4))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run(cfg, ranks, steps=1, nets=nets)
    assert counter.get_total_flops() == pytest.approx(
        step_flops(cfg, nets.student, nets.taps[2], tokens), rel=0.35)


@pytest.mark.parametrize("changes, message", [
    ({"batch": 5, "micro_batch": 2}, "batch: expected a multiple of 2 .*, got 5"),
    ({"traj": False, "adv": False}, "traj and adv are both off"),
    ({"iterations": 0}, "iterations: .*got 0"), ({"held_out": 0}, "held_out: .*got 0"),
    ({"tap": 6}, "tap: expected a block 0 … 2, got 6"), ({"lr": -1.0}, "lr: .*got -1.0"),
    ({"beta1": 1.0}, "beta1: .*got 1.0"), ({"head_dim": 12}, "head_dim: .*got 12"),
    ({"peak_tflops": 0.0}, "peak_tflops: .*got 0.0")])
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        cfg = load_config(distill.Config, "distill", [f"{k}={v}" for k, v in changes.items()])
        distill.check_config(cfg, 1)


def test_holding_out_everything_is_an_error(weights, tmp_path, ranks):
    with pytest.raises(ValueError, match="held_out: expected fewer than the 12 traj.*, got 12"):
        loading.Loader(settings(weights, tmp_path, held_out=12), FakeSynVid(M3), ranks)


# ---------------------------------------------------------------------- as a user runs it

QUICK = {"iterations": 8, "batch": 4, "micro_batch": 2, "held_out": 2, "save_every": 1,
         "eval_every": 8, "lr": 1e-3, "head_dim": 8, "keep": 2, "checkpointing": False,
         "export_dtype": "fp32"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_weights, run_stage):
    """One complete run of the command, in <folder>/a; the folder and the config for others."""
    folder = tmp_path_factory.mktemp("distill")
    config = {"weights": str(tiny_weights), "height": 16, "width": 16, "frames": 5, "n": 4,
              "key": [0, 2, 4], "device": "cpu", "distill": QUICK,
              "synvid": {"prompts": str(tiny_weights / "prompts.txt"), "count": 10, "videos": 0}}
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    run_stage("synvid", path, "--run", folder / "a")
    done = run_stage("distill", path, "--run", folder / "a")
    (folder / "a.out").write_text(done.stdout)
    (folder / "a.err").write_text(done.stderr)
    return folder, path


def test_a_missing_small_synvid_is_made_first(make_weights, make_config, tmp_path, ranks):
    weights = make_weights(tmp_path / "tiny", sizes=WanConfig(**model.TINY))  # its process's sizes
    config = make_config(weights=str(weights), synvid={"count": 2, "batch": 2})
    assert len(loading.open_synvid(load_config(distill.Config, "distill", [str(config)]))) == 2


def test_the_command_trains_and_exports_a_student(undisturbed):
    folder, _ = undisturbed
    printed = (folder / "a.out").read_text()
    assert "memory plan" in printed and "held-out endpoint error" in printed
    assert "8 iterations of 4 samples" in printed and "GPU-hours at 400 TFLOP/s" in printed
    bar = (folder / "a.err").read_bytes()  # in a file, each state of the bar is a line
    assert b"\r" not in bar and bar.splitlines()[-1].startswith(b"distill: 100%")
    path = folder / "a/student.safetensors"
    with safe_open(path, "pt") as f:
        about = json.loads(f.metadata()["accvideo"])
        names = set(f.keys())
    assert about["t_key"] == key_times("wan", 4, 7.0, [0, 2, 4]) and about["iterations"] == 8
    assert names == set(dict(model.build_dit("tiny").named_parameters()))
    lines = [json.loads(x) for x in (folder / "a/distill/log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, 9))
    assert [x["k"] for x in lines[:3]] == [1, 0, 1]
    assert {"loss_traj", "loss_adv", "loss_head", "acc_real", "acc_fake", "grad_traj", "grad_adv",
            "grad_head", "lr", "s_data", "tokens_per_s", "time"} <= lines[0].keys()
    assert "endpoint" in lines[7] and len(lines[7]["velocity"]) == 2
    assert (folder / "a/distill/curves.png").read_bytes()[:4] == b"\x89PNG"
    kept = sorted(p.name for p in (folder / "a/distill").glob("step_*"))
    assert kept == ["step_000007", "step_000008"]


def test_killed_and_terminated_it_ends_with_the_same_weights(undisturbed, run_stage, tmp_path):
    folder, config = undisturbed
    run = tmp_path / "b"
    os.symlink(folder / "a/synvid", _made(run) / "synvid")
    for place, count, status, more in (("start", 1, -signal.SIGKILL, []),
                                       ("iteration", 3, -signal.SIGKILL, []),
                                       ("terminated", 3, 0, ["--save_every", "100"])):
        done = run_script(KILLED, tmp_path / place, 0, place, count, 1, "distill", config, "--run",
                          run, *more)
        assert done.returncode == status and (tmp_path / place).exists(), done.stderr
    assert "resuming from" in done.stdout and "rerun the same command to resume" in done.stdout
    log = run / "distill/log.jsonl"
    count = log.read_text().count("\n")
    assert max(p.name for p in (run / "distill").glob("step_*")) == f"step_{count:06d}"
    assert 2 < count < 8
    run_stage("distill", config, "--run", run)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 9))
    ours, theirs = (load_file(p / "student.safetensors") for p in (run, folder / "a"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_export_that_is_missing_at_the_checkpoint_is_made_on_resuming(undisturbed, run_stage,
                                                                         tmp_path):
    folder, config = undisturbed
    shutil.copytree(folder / "a", tmp_path / "run")
    path = tmp_path / "run/synvid/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["t"] = [math.nextafter(t, 2) for t in manifest["t"]]  # as another library rounds
    path.write_text(json.dumps(manifest))
    done = run_stage("distill", config, f"run={tmp_path / 'run'}", "iterations=9", "export_every=8")
    assert "resuming from" in done.stdout
    ours, theirs = (load_file(p) for p in (tmp_path / "run/student_000008.safetensors",
                                           folder / "a/student.safetensors"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _made(path):
    path.mkdir(parents=True)
    return path


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(undisturbed, run_stage, tmp_path):
    folder, config = undisturbed
    os.symlink(folder / "a/synvid", _made(tmp_path / "e") / "synvid")
    done = run_stage("distill", config, "--run", tmp_path / "e", "--lr", "1e30", "--clip", "none",
                     "--seed", "1", check=False)  # another seed takes the same SynVid
    assert done.returncode == 1 and "error: iteration" in done.stderr and "is nan" in done.stderr
    assert "rerun the same command" in done.stderr and "in another --run" in done.stderr
    assert not (tmp_path / "e/student.safetensors").exists()
    steps = [line["step"] for line in map(json.loads, (tmp_path / "e/distill/log.jsonl")
                                          .read_text().splitlines())]
    kept = [int(p.name[5:]) for p in (tmp_path / "e/distill").glob("step_*")]
    assert kept and max(kept) == steps[-1]  # though it was still being written


def refused(ranks, folder, argv):
    """One of two processes: settings that cannot work, of which each rank has the same error."""
    errors = []
    for change in ("sp=3", "batch=3", "held_out=10"):
        with pytest.raises(ValueError) as error:
            distill.main([*argv, change])
        errors.append(str(error.value))
    (folder / f"{ranks.rank}.json").write_text(json.dumps(errors))


def test_an_error_that_all_ranks_have_is_printed_by_one(undisturbed, tmp_path):
    folder, config = undisturbed
    argv = [str(config), f"run={tmp_path / 'run'}", f"synvid={folder / 'a/synvid'}"]
    in_processes(2, partial(refused, argv=argv), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [text.split(":")[0] for text in first] == ["sp, cfg_parallel", "batch", "held_out"]
    assert second == ["", "", ""]


def test_a_missing_synvid_of_another_preset_is_an_error_that_names_the_command(
        tmp_path, monkeypatch, ranks):
    monkeypatch.setitem(model.PRESETS, "small", SMALL)
    cfg = distill.Config(preset="small", run=str(tmp_path))
    cfg.path = "my.yaml"
    with pytest.raises(ValueError, match="python synvid.py my.yaml"):
        loading.open_synvid(cfg)
