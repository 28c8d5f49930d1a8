"""Making a ReLU model: the forward against transformers, sampling, training, its file, its checkpoint, and refusals.

The models are tiny and random; a SiLU model of random weights has a next-token distribution like any other, and its ReLU
twin another one, which training must bring nearer.
"""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse.models import Shape, write_checkpoint
from vllm_powerquant.cli import main
from vllm_powerquant.errors import PowerQuantConfigError, PowerQuantUnsupportedError
from vllm_powerquant.model import prepare_model
from vllm_powerquant.sparse import relufy as verb
from vllm_powerquant.sparse.checkpoint import Checkpoint
from vllm_powerquant.sparse.deltas import Deltas, fingerprint, load_deltas, save_deltas
from vllm_powerquant.sparse.distil import Divergence, Trainer, Training, divergence_of_chunk, score
from vllm_powerquant.sparse.families import read_config
from vllm_powerquant.sparse.llama import Decoder, Rotary, Weights, hidden_states, load_weights, relu, silu
from vllm_powerquant.sparse.relufy import SHIPPED_DELTAS, Text, relufy
from vllm_powerquant.sparse.sampling import END, RANDOM, Sampler, Script, end_ids, rows_that_fit, scripts

CPU = torch.device("cpu")
SILU = Shape(activation="silu", num_layers=3, active_share=0.5)
SMALL = Training(rank=8, attention_rank=4, length=32, batch=8, micro_batch=8, steps=6, lr=3e-3, bf16=False)
WINDOWS = torch.randint(3, 320, (96, 32), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, not to be changed."""
    return write_checkpoint(SILU, tmp_path_factory.mktemp("silu") / "silu")


@pytest.fixture(scope="module")
def weights(folder) -> Weights:
    return load_weights(Checkpoint(folder), read_config(Checkpoint(folder).config), CPU)


@pytest.fixture(scope="module")
def model(folder):
    return read_config(Checkpoint(folder).config)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("She said it is 7 o'clock, and the quick brown fox walked home through the rain. " * 60)
    return path


def random_deltas(weights: Weights, size: float = 0.02) -> Deltas:
    generator = torch.Generator().manual_seed(5)
    deltas = Deltas.initial(weights, 8, 4, generator)
    for name, tensor in deltas.tensors.items():
        if not name.endswith(".a"):
            tensor.normal_(0, size, generator=generator)
    return deltas


# ---- forward


@pytest.mark.parametrize(
    "shape", [SILU, replace(SILU, tied=True, num_kv_heads=4), replace(SILU, num_kv_heads=1, activation="relu")], ids=str
)
def test_forward_is_the_one_of_transformers(shape, tmp_path):
    folder = write_checkpoint(shape, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint = Checkpoint(folder)
    model = read_config(checkpoint.config)
    weights = load_weights(checkpoint, model, CPU).to(torch.float32)
    ids = WINDOWS[:2].long()
    with torch.no_grad():
        wanted = theirs(ids).logits
        activation = silu if shape.activation == "silu" else relu
        hidden, active = hidden_states(weights, ids, model, Rotary.of(model, 32, CPU), activation)
        torch.testing.assert_close(hidden @ weights.head.T, wanted, rtol=1e-4, atol=1e-4)
        # the gates themselves, from their modules
        positive = []
        for layer in theirs.model.layers:
            layer.mlp.gate_proj.register_forward_hook(lambda m, i, out: positive.append((out > 0).float().mean()))
        theirs(ids)
        torch.testing.assert_close(active, torch.stack(positive), rtol=1e-3, atol=1e-3)
        if shape.activation == "silu":
            decoder = Decoder(weights, model, 2, 32)
            steps = [decoder.logits(ids[:, i], torch.tensor([i]), 8 if i < 8 else 32) for i in range(32)]
            torch.testing.assert_close(torch.stack(steps, 1), wanted, rtol=1e-4, atol=1e-4)


def test_divergence_and_its_gradient_are_those_of_plain_autograd():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(50, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    head = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    p, q = (x @ head.T for x in (teacher, student))
    wanted = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
    (gradient,) = torch.autograd.grad(wanted, student)
    again = student.detach().float().requires_grad_()
    got = Divergence.apply(again, teacher.float(), head.float(), head.float(), divergence_of_chunk)
    (3 * got).backward()
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    torch.testing.assert_close(again.grad.double(), 3 * gradient, rtol=1e-4, atol=1e-6)


# ---- sampling


def test_samples_have_the_models_distribution(weights, model):
    rows = 20_000
    sampler = Sampler(weights.to(torch.float32), model, [Script([7], ([7], [7]))], [], rows, 2)
    drawn = torch.bincount(sampler.round(3)[:, 1].long(), minlength=320) / rows
    logits = Decoder(weights.to(torch.float32), model, 1, 2).logits(torch.tensor([7]), torch.tensor([0]), 2)
    p = logits[0].softmax(-1)
    # the standard error of a share p is sqrt(p / rows)
    assert ((drawn - p).abs() < 5 * (p / rows).sqrt() + 1e-4).all()
    assert float((drawn - p.roll(1)).abs().sum()) > 0.3


def test_samples_follow_their_script(weights, model):
    ends = list(range(0, 160))  # half of the vocabulary: turns are short
    chat = Script([5, 6, RANDOM], ([200, 201, 202], [210, 211]))
    sampler = Sampler(weights.to(torch.float32), model, [chat, Script([9], ([9], [9]))], ends, 6, 48)
    tokens = sampler.round(0)
    assert torch.equal(tokens, sampler.round(0)) and not torch.equal(tokens, sampler.round(1))
    assert tokens.shape == (6, 48) and tokens.dtype == torch.int32
    assert len(set(tokens[::2, 2].tolist())) > 1
    for row in range(6):
        ids = tokens[row].tolist()
        script = chat if row % 2 == 0 else Script([9], ([9], [9]))
        assert [x if y != RANDOM else y for x, y in zip(ids, script.start, strict=False)] == script.start
        at, turn = len(script.start), 0
        while at < len(ids):
            at += 1
            if ids[at - 1] in ends:
                forced = script.after[turn % 2]
                assert ids[at : at + len(forced)] == forced[: len(ids) - at]
                at, turn = at + len(forced), turn + 1
        assert turn > 3
    assert END not in tokens and RANDOM not in tokens


def test_scripts_of_the_embedded_model_open_turns_as_its_template_does():
    tokenizer = AutoTokenizer.from_pretrained(prepare_model())
    eos = end_ids(tokenizer, {"eos_token_id": 2})
    assert eos == [0, 2]
    found = scripts(tokenizer, eos)
    assert len(found) == 8 and [script.start for script in found[:4]] == [[1], [1, RANDOM], [0], [0, RANDOM]]
    chat = found[-1]
    two = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "No"}]
    wanted = tokenizer.apply_chat_template(two, tokenize=False)
    said = [tokenizer(word)["input_ids"] for word in ("Hi", "Yes", "No")]
    ids = [*chat.start, *said[0], 2, *chat.after[0], *said[1], 2, *chat.after[1], *said[2], 2]
    assert tokenizer.decode(ids) + "\n" == wanted


def test_a_template_without_ends_gives_a_simple_turn(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    tokenizer.chat_template = messages + "{% if add_generation_prompt %}[answer]{% endif %}"
    chat = scripts(tokenizer, [0])[-1]
    assert tokenizer.decode(chat.start).startswith("[user]Tell me") and tokenizer.decode(chat.start).endswith("[answer]")
    tokenizer.chat_template = None
    assert [script.start for script in scripts(tokenizer, [0])] == [[0], [0, RANDOM]]


def test_rounds_divide_what_is_wanted(weights, model):
    assert rows_that_fit(weights, model, 32, 10) == 10
    assert rows_that_fit(weights, model, 32, 100) == 50


# ---- deltas


def test_rounding_moves_no_entry_by_more_than_half_a_step(weights):
    deltas = random_deltas(weights)
    rounded = deltas.rounded()
    for name, tensor in deltas.tensors.items():
        if name.endswith((".a", ".b")):
            step = tensor.abs().amax(-1, keepdim=True) / 127
            assert ((tensor - rounded.tensors[name]).abs() <= step * 0.5001).all()
        else:
            torch.testing.assert_close(rounded.tensors[name], tensor, rtol=1e-3, atol=1e-6)
    twice = rounded.rounded()
    assert all(torch.allclose(tensor, twice.tensors[name], rtol=1e-6) for name, tensor in rounded.tensors.items())


def test_a_file_holds_what_was_saved(weights, tmp_path):
    deltas = random_deltas(weights)
    save_deltas(tmp_path / "x.safetensors", deltas, "abc", {"steps": 3})
    got = load_deltas(tmp_path / "x.safetensors")
    assert (got.original, got.recipe) == ("abc", {"steps": 3})
    wanted = deltas.rounded().tensors
    assert got.deltas.tensors.keys() == wanted.keys()
    assert all(torch.equal(got.deltas.tensors[name], wanted[name]) for name in wanted)


def test_the_written_checkpoint_is_the_model_that_was_trained(folder, weights, model, tmp_path):
    deltas = random_deltas(weights).rounded()
    save_deltas(tmp_path / "x.safetensors", deltas, fingerprint(Checkpoint(folder), model), {})
    done = relufy(folder, tmp_path / "student", deltas=tmp_path / "x.safetensors", eval_windows=0, progress=False)
    assert done.perplexity is None and done.steps == 0
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text()) | {"hidden_act": "relu"}
    assert (tmp_path / "student" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert "silu with ReLU" in (tmp_path / "student" / "README.md").read_text()
    ids = WINDOWS[:2].long()
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)(ids).logits
        student = deltas.applied(weights, torch.float16).to(torch.float32)
        hidden, _ = hidden_states(student, ids, model, Rotary.of(model, 32, CPU), relu)
        got = hidden @ student.head.T
        plain, _ = hidden_states(weights.to(torch.float32), ids, model, Rotary.of(model, 32, CPU), relu)
    # but for norms, which the file rounds to the original's type
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=5e-3)
    assert (plain @ weights.head.float().T - wanted).abs().max() > 0.05


def test_deltas_change_every_part_of_every_layer(folder, weights, tmp_path):
    checkpoint, deltas = Checkpoint(folder), random_deltas(weights)
    for name, tensor in load_file(folder / "model.safetensors").items():
        same = torch.equal(deltas.merged(name, tensor), tensor)
        assert same == (name in ("model.embed_tokens.weight", "lm_head.weight")), name
    assert checkpoint.shards == {"model.safetensors": sorted(load_file(folder / "model.safetensors"))}


def test_a_fingerprint_tells_checkpoints_apart(folder, model, tmp_path):
    other = write_checkpoint(SILU, tmp_path / "other", seed=1)
    assert fingerprint(Checkpoint(other), model) != fingerprint(Checkpoint(folder), model)
    shutil.copytree(folder, tmp_path / "same")
    assert fingerprint(Checkpoint(tmp_path / "same"), model) == fingerprint(Checkpoint(folder), model)


# ---- training


def train(weights, model, settings, windows=WINDOWS) -> tuple[Trainer, list]:
    trainer, seen = Trainer(weights, model, windows, settings), []
    while not trainer.done:
        trainer.advance(seen.append)
    return trainer, seen


def test_training_lowers_the_divergence_and_reaches_the_share(weights, model):
    settings = replace(SMALL, rank=16, attention_rank=16, batch=16, micro_batch=16, steps=150)
    windows = torch.randint(3, 320, (1000, 32), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    held_out = torch.randint(3, 320, (16, 32), generator=torch.Generator().manual_seed(2))
    free, seen = train(weights, model, replace(settings, active_share=1.0), windows)
    sparse, seen_sparse = train(weights, model, replace(settings, active_share=0.3), windows)
    plain = Deltas.initial(weights, 8, 8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = {name: divergence(weights, model, x, held_out) for name, x in (("plain", plain), ("free", free.deltas))}
    assert found["free"] < 0.7 * found["plain"], found
    assert seen[-1].pressure == 0 and seen[-1].active > 0.4
    assert seen_sparse[0].active > 0.4 and seen_sparse[-1].active == pytest.approx(0.3, rel=0.1)
    scored = score(sparse.deltas.applied(weights, torch.float32), model, held_out)
    assert sum(scored.active) / len(scored.active) == pytest.approx(0.3, rel=0.15)


def divergence(weights, model, deltas, ids) -> float:
    original, student = weights.to(torch.float32), deltas.applied(weights, torch.float32)
    rotary = Rotary.of(model, ids.shape[1], CPU)
    wanted, _ = hidden_states(original, ids, model, rotary, silu)
    got, _ = hidden_states(student, ids, model, rotary, relu)
    p, q = ((x @ original.head.T).log_softmax(-1) for x in (wanted, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_micro_batches_change_nothing_but_rounding(weights, model):
    whole, parts = (train(weights, model, replace(SMALL, micro_batch=n, active_share=1.0))[0] for n in (8, 3))
    for name, tensor in whole.deltas.tensors.items():
        # Adam divides by the gradient's size: where that is nearly zero, rounding decides the step's sign
        assert (tensor - parts.deltas.tensors[name]).abs().mean() < 2e-5, name


def test_a_restored_trainer_goes_on_as_if_it_had_never_stopped(weights, model):
    whole, seen = train(weights, model, SMALL)
    first = Trainer(weights, model, WINDOWS, SMALL)
    for _ in range(3):
        first.advance()
    second = Trainer(weights, model, WINDOWS, SMALL)
    second.restore(first.state())
    again = []
    while not second.done:
        second.advance(again.append)
    assert [(x.step, x.kl, x.active, x.pressure) for x in again] == [(x.step, x.kl, x.active, x.pressure) for x in seen[3:]]
    for name, tensor in whole.deltas.tensors.items():
        assert torch.equal(tensor, second.deltas.tensors[name]), name


def test_every_window_is_seen_once_an_epoch(weights, model):
    trainer = Trainer(weights, model, torch.arange(20, dtype=torch.int32)[:, None].expand(20, 32), SMALL)
    seen = []
    for trainer.step in range(5):
        seen += trainer._rows()[:, 0].tolist()
    assert sorted(seen[:20]) == list(range(20)) and sorted(seen[20:]) == list(range(20)) and seen[:20] != seen[20:]


def test_a_time_limit_sets_the_steps(weights, model):
    trainer = Trainer(weights, model, WINDOWS, replace(SMALL, steps=None, minutes=0.05))
    for _ in range(17):
        assert trainer.steps is None
        trainer.advance(None, seconds_left=1.0)
    step_seconds = trainer.seconds / 17
    assert 0.2 < (trainer.steps - 16) * step_seconds < 5


# ---- the verb


def arguments(folder, output, text, *more) -> list[str]:
    given = ["relufy", str(folder), "-o", str(output), "--text", str(text), "--steps", "6", "--length", "32", "--batch", "4"]
    return [*given, "--rank", "8", "--attention-rank", "4", "--device", "cpu", "--eval-windows", "1", "--json", *more]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(folder, text, tmp_path, monkeypatch, capsys):
    assert main(arguments(folder, tmp_path / "whole", text, "--sampled", "1000")) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["steps"] == 6 and whole["train_tokens"] == 6 * 4 * 32 and len(whole["active_by_layer"]) == 3

    advance = Trainer.advance

    def interrupted(self, *args):
        advance(self, *args)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupted)
        assert main(arguments(folder, tmp_path / "parts", text, "--sampled", "1000")) == 130
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["relufy"]
    kept = load_deltas(tmp_path / "parts" / "relufy" / "deltas.safetensors")
    assert (kept.recipe["steps"], kept.recipe["result"]) == (3, "unfinished")

    assert main(arguments(folder, tmp_path / "parts", text, "--sampled", "1000", "--lr", "0.1")) == 1
    assert "lr was 0.008, now 0.1; give the same to go on" in capsys.readouterr().err

    assert main(arguments(folder, tmp_path / "parts", text, "--sampled", "1000")) == 0
    parts = json.loads(capsys.readouterr().out)
    differing = {key for key in whole if whole[key] != parts[key]}
    assert differing <= {"output", "deltas", "seconds"}
    wanted, got = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert sorted(path.name for path in (tmp_path / "parts" / "relufy").iterdir()) == [
        "deltas.safetensors",
        "samples.safetensors",
    ]
    # the deltas alone make the same checkpoint
    file = tmp_path / "whole" / "relufy" / "deltas.safetensors"
    assert main(["relufy", str(folder), "-o", str(tmp_path / "again"), "--deltas", str(file)]) == 0
    assert "ReLU in place of SiLU" in capsys.readouterr().out
    got = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    recipe = load_deltas(file).recipe
    assert recipe["settings"]["lr"] == 0.008 and recipe["settings"]["text"]["sampled"] == 1000
    assert recipe["result"]["perplexity"] == whole["perplexity"] and recipe["versions"]["torch"] == torch.__version__
    # a ReLU model now
    assert main(["relufy", str(tmp_path / "again"), "-o", str(tmp_path / "twice"), "--deltas", str(file)]) == 1
    assert "is a ReLU model already" in capsys.readouterr().err


def test_interrupted_sampling_keeps_whole_rounds(folder, tmp_path, monkeypatch):
    taken = []
    one_round = Sampler.round

    def counted(self, seed, tick=lambda tokens: None):
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(seed)
        return one_round(self, seed, tick)

    def samples(name):
        return load_file(tmp_path / name / "relufy" / "samples.safetensors")["tokens"]

    settings = replace(SMALL, steps=1)
    wanted = Text(sampled=200 * 32)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sampler, "round", counted)
        relufy(folder, tmp_path / "a", text=wanted, training=settings, device="cpu", eval_windows=0, progress=False)
    assert len(samples("a")) == 100
    taken.clear()
    monkeypatch.setattr(Sampler, "round", counted)
    relufy(folder, tmp_path / "a", text=wanted, training=settings, device="cpu", eval_windows=0, progress=False)
    monkeypatch.undo()
    relufy(folder, tmp_path / "b", text=wanted, training=settings, device="cpu", eval_windows=0, progress=False)
    assert len(taken) == 2 and torch.equal(samples("a"), samples("b")) and len(samples("b")) == 200
    # and another run may use them
    again = Text(samples=tmp_path / "b" / "relufy" / "samples.safetensors")
    relufy(folder, tmp_path / "c", text=again, training=settings, device="cpu", eval_windows=0, progress=False)
    same = [load_file(tmp_path / name / "model.safetensors") for name in "bc"]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


@pytest.mark.parametrize(
    "shape, said",
    [
        (replace(SILU, activation="relu"), "is a ReLU model already"),
        (Shape("opt", hidden_size=128, num_kv_heads=4, rank=128), "is a ReLU model already"),
        (Shape("falcon", hidden_size=128, num_kv_heads=1, activation="gelu"), "takes llama and mistral models with SiLU"),
    ],
    ids=["relu", "opt", "falcon"],
)
def test_models_that_are_refused(shape, said, text, tmp_path):
    folder = write_checkpoint(shape, tmp_path / "model")
    with pytest.raises(PowerQuantUnsupportedError, match=said):
        relufy(folder, tmp_path / "out", text=Text([text]), training=SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        ((), "no text to train on: give files"),
        (("--deltas", "{text}", "--sampled", "100", "--steps", "1"), "not both"),
        (("--deltas", "{text}"), "can't be read"),
        (("--deltas", "nowhere.safetensors"), "nowhere.safetensors can't be read"),
        (("--text", "nowhere.txt", "--steps", "1", "--length", "32"), "cannot read nowhere.txt"),
        (("--text", "{text}"), "either a number of steps"),
        (("--text", "{text}", "--steps", "1", "--minutes", "1"), "either a number of steps"),
        (("--steps", "5"), "which needs --text"),
        (("--text", "{text}", "--minutes", "-1"), "minutes must be positive, got -1"),
        (("--text", "{text}", "--steps", "1", "--rank", "0"), "rank must be positive, got 0"),
        (("--text", "{text}", "--steps", "1", "--attention-rank", "-1"), "attention_rank must be 0 or more"),
        (("--text", "{text}", "--steps", "1", "--length", "300"), "length must be 2 to the model's context of 256"),
        (("--text", "{text}", "--steps", "1", "--active-share", "0"), "active_share must be above 0"),
        (("--text", "{text}", "--steps", "1", "--slide", "1"), "slide must be"),
        (("--text", "{text}", "--steps", "1", "--lr", "nan"), "lr must be positive"),
        (("--sampled", "-5", "--steps", "1"), "sampled must be"),
        (("--text", "{text}", "--steps", "1", "--save-every", "0"), "save_every must be"),
        (("--text", "{text}", "--steps", "1", "--length", "32", "--device", "tpu"), "device must be one"),
        (("--text", "{text}", "--steps", "1", "--length", "32", "--seed", "-1"), "seed must be 0 to 4294967295, got -1"),
        (
            ("--text", "{text}", "--steps", "1", "--length", "32", "--batch", "9999"),
            "a step takes 9999 windows of 32 tokens",
        ),
        (("--text", "{text}", "--steps", "1", "--eval-windows", "9999", "--length", "32"), "eval_windows must be 0 to"),
        (("--samples", "{text}", "--steps", "1", "--length", "32"), "can't be read"),
    ],
    ids=str,
)
def test_requests_that_are_refused(more, said, folder, text, tmp_path, capsys):
    given = [word.format(text=text) for word in more]
    assert main(["relufy", str(folder), "-o", str(tmp_path / "out"), "--json", *given]) == 1
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1 and not told.out
    assert not (tmp_path / "out" / "config.json").exists()


def test_output_folders_that_are_refused(folder, text, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for output, said in (
        (tmp_path / "full", "is not empty"),
        (text, "cannot write"),
        (tmp_path / "no" / "out", "cannot write"),
        (Path("/proc/out"), "cannot write"),
    ):
        assert main(arguments(folder, output, text)) == 1
        assert said in capsys.readouterr().err
    assert (tmp_path / "full" / "x").read_text() == "mine"


def test_a_second_run_in_the_same_folder_is_refused(folder, text, tmp_path, monkeypatch, capsys):
    advance = Trainer.advance

    def with_another(self, *args):
        if self.step == 0:
            assert main(arguments(folder, tmp_path / "out", text)) == 1
            told = capsys.readouterr().err
            assert "another run is writing" in told and str(os.getpid()) in told and told.count("\n") == 1
        advance(self, *args)

    monkeypatch.setattr(Trainer, "advance", with_another)
    assert main(arguments(folder, tmp_path / "out", text)) == 0
    assert [path.name for path in (tmp_path / "out" / "relufy").iterdir()] == ["deltas.safetensors"]


def test_a_checkpoint_without_a_tensor_is_one_error(folder, text, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.gate_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert main(arguments(tmp_path / "m", tmp_path / "out", text)) == 1
    assert "lacks 1 tensors, the first is model.layers.0.mlp.gate_proj.weight" in capsys.readouterr().err
    assert main(arguments("nowhere", tmp_path / "out", text)) == 1
    assert "takes a checkpoint's folder, and 'nowhere' is none" in capsys.readouterr().err


def test_deltas_of_another_model_are_refused(folder, weights, model, tmp_path):
    own = fingerprint(Checkpoint(folder), model)
    path = tmp_path / "x.safetensors"
    save_deltas(path, random_deltas(weights), "of another", {})
    with pytest.raises(PowerQuantConfigError, match="made for another model"):
        relufy(folder, tmp_path / "out", deltas=path)
    cut = Deltas({name: tensor[:2] for name, tensor in random_deltas(weights).tensors.items()})
    save_deltas(path, cut, own, {})
    with pytest.raises(PowerQuantConfigError, match="is damaged"):
        relufy(folder, tmp_path / "out", deltas=path)
    assert not (tmp_path / "out").exists()


def test_a_damaged_state_is_one_error(folder, text, tmp_path, capsys):
    work = tmp_path / "out" / "relufy"
    work.mkdir(parents=True)
    (work / "state.pt").write_bytes(b"not a state")
    assert main(arguments(folder, tmp_path / "out", text)) == 1
    told = capsys.readouterr().err
    assert "state.pt can't be read" in told and "to begin anew" in told and told.count("\n") == 1


def test_divergence_of_training_is_one_error(folder, text, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out", text, "--lr", "1e30")) == 1
    assert "training diverged at step" in capsys.readouterr().err


# ---- the shipped deltas


def test_shipped_deltas_make_a_relu_model_that_is_nearly_the_original(tmp_path, capsys):
    assert SHIPPED_DELTAS.stat().st_size <= 12_000_000
    file = load_deltas(SHIPPED_DELTAS)
    assert {"settings", "steps", "train_tokens", "device", "versions", "result"} <= file.recipe.keys()
    assert main(["relufy", "-o", str(tmp_path / "smollm2-relu"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] < 60
    checkpoint = Checkpoint(tmp_path / "smollm2-relu")
    model = read_config(checkpoint.config)
    assert model.activation == "relu"
    weights = load_weights(checkpoint, model, CPU).to(torch.float32)
    windows = verb._held_out(AutoTokenizer.from_pretrained(tmp_path / "smollm2-relu"), 256, 1)
    found = score(weights, model, windows)
    original = Checkpoint(prepare_model())
    teacher = load_weights(original, read_config(original.config), CPU).to(torch.float32)
    wanted = score(teacher, read_config(original.config), windows, silu)
    assert found.nll - wanted.nll < 0.5
    assert sum(found.active) / len(found.active) == pytest.approx(file.recipe["result"]["active_share"], abs=0.05)
