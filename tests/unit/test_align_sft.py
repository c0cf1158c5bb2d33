"""Fine-tuning: the loss is what transformers would compute, it falls on unseen pairs, and a failure leaves nothing."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from trinity.align import sft
from trinity.align.conversations import Conversations, as_batch, pack, read_conversations
from trinity.align.sft import count_learnt, count_steps, fine_tune, plan_rows
from trinity.base.errors import ConfigError, TrainingHalted
from trinity.base.lineage import read_lineage
from trinity.ckpt.hf import write_hf
from trinity.ckpt.model_folder import write_model_folder
from trinity.ckpt.opened import OpenedModel, open_model
from trinity.cli.main import main
from trinity.config.align import AlignConfig
from trinity.model.attend import Packed
from trinity.model.init import build_model
from trinity.model.loss import plain_loss
from trinity.model.transformer import Transformer
from trinity.recipes.table import recipe
from trinity.text.tokenizer import Tokenizer

LENGTH = 128


def pair(word: str, more: str = "") -> str:
    question, answer = f"How is {word} spelt?", f"It is spelt {'-'.join(word)}.{more}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


WORDS = [a + b + c for a in "bdfgkl" for b in "aei" for c in ("n", "st", "ck")]


@pytest.fixture(scope="module")
def base(debug_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with selection biases that are not zero."""
    folder = tmp_path_factory.mktemp("models") / "base"
    folder.mkdir()
    model = build_model(recipe("debug").model, 3)
    for bias in model.expert_biases():
        bias.copy_(torch.linspace(-0.1, 0.1, len(bias)) / 3)
    write_model_folder(folder, model, Tokenizer.load(debug_data), torch.float32)
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text("".join(map(pair, WORDS[:-6])))
    return path


def settings(**changes) -> AlignConfig:
    return AlignConfig(**{"sequence_length": LENGTH, "batch_tokens": 4 * LENGTH, "epochs": 1.0, **changes})


def conversations_of(path: Path, opened: OpenedModel, length: int = LENGTH) -> Conversations:
    return read_conversations(path, opened.tokenizer, length, strict=True)


def loss_on(model: Transformer, conversations: Conversations, pad_id: int) -> float:
    """Nats per assistant token, by the plain twin of the loss."""
    rows = list(pack(conversations.rendered, torch.arange(len(conversations.rendered)).numpy(), LENGTH))
    batch = as_batch(rows, LENGTH, pad_id)
    with torch.no_grad():
        hidden = model(batch.tokens, attend=Packed(batch.document_ids)).hidden.flatten(0, 1)
    targets = batch.targets.flatten()
    return float(plain_loss(hidden, model.lm_head.weight, targets, 0.0, int((targets >= 0).sum()))[1])


def test_the_loss_of_a_packed_batch_is_what_transformers_computes_with_masked_labels(base, chat, tmp_path):
    from transformers import AfmoeForCausalLM

    opened = open_model(base)
    conversations = conversations_of(chat, opened)
    write_hf(tmp_path, opened.model)
    theirs = AfmoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    longest = max(len(rendered.tokens) for rendered in conversations.rendered)
    shape = (len(conversations.rendered), longest)
    ids, labels, mask = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100), torch.zeros(shape)
    for row, rendered in enumerate(conversations.rendered):
        tokens, spoken = torch.tensor(rendered.tokens), torch.tensor(rendered.mask)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(spoken, tokens, -100)
        mask[row, : len(tokens)] = 1
    with torch.no_grad():
        expected = float(theirs(input_ids=ids, attention_mask=mask, labels=labels).loss)
    rows = len(plan_rows(conversations, settings()))
    assert rows < len(conversations.rendered), "several conversations share a row"
    whole = settings(batch_tokens=rows * LENGTH)
    history = fine_tune(opened, conversations, whole, chat, tmp_path / "out", lambda step: None)
    assert len(history) == 1 and history[0].loss == pytest.approx(expected, rel=1e-5)


def test_a_few_steps_lower_the_loss_on_unseen_pairs_and_leave_the_biases(base, chat, tmp_path, capsys):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(map(pair, WORDS[-6:])))
    opened = open_model(base)
    unseen, biases = conversations_of(held, opened), [bias.clone() for bias in opened.model.expert_biases()]
    before = loss_on(opened.model, unseen, opened.tokenizer.pad_id)
    config = settings(epochs=3.0, muon_lr=0.02, adamw_lr=3e-3, batch_tokens=2 * LENGTH)
    conversations = conversations_of(chat, opened)
    shown = []
    history = fine_tune(opened, conversations, config, chat, tmp_path / "out", shown.append)
    assert shown == history and len(history) == count_steps(conversations, config)
    tuned = open_model(tmp_path / "out")
    assert loss_on(tuned.model, unseen, tuned.tokenizer.pad_id) < 0.6 * before
    assert all(bool(bias.any()) for bias in biases)
    for old, new in zip(biases, tuned.model.expert_biases(), strict=True):
        assert torch.equal(old, new), "bit for bit"
    changed = [name for name, tensor in tuned.model.state_dict().items()
               if not torch.equal(tensor, open_model(base).model.state_dict()[name])]  # fmt: skip
    assert len(changed) == len(list(tuned.model.parameters())), "everything else learns"
    assert tuned.ends_turns and tuned.tokenizer.fingerprint == opened.tokenizer.fingerprint
    lineage = read_lineage(tmp_path / "out")
    assert lineage["kind"] == "fine-tuned model" and lineage["made_by"]["selection_biases"] == "frozen"
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count('"kind": "step"') == len(history)
    assert main(["generate", str(tmp_path / "out"), "--prompt", "It", "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"]


def test_the_same_call_gives_the_same_weights(base, chat, tmp_path):
    for name in ("one", "two"):
        opened = open_model(base)
        fine_tune(opened, conversations_of(chat, opened), settings(), chat, tmp_path / name, lambda step: None)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_a_loss_or_gradient_that_is_no_number_ends_the_run_and_leaves_nothing(base, chat, tmp_path, monkeypatch):
    opened = open_model(base)
    conversations = conversations_of(chat, opened)
    with torch.no_grad():
        opened.model.lm_head.weight[40] = math.nan
    with pytest.raises(TrainingHalted, match="loss became nan .* at step 1"):
        fine_tune(opened, conversations, settings(), chat, tmp_path / "out", lambda step: None)
    monkeypatch.setattr(sft, "_step", lambda *_: (1.0, math.inf))
    with pytest.raises(TrainingHalted, match="gradient inf at step 1"):
        fine_tune(open_model(base), conversations, settings(), chat, tmp_path / "out", lambda step: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epochs", [0.0, -1.0, math.inf])
def test_epochs_that_teach_nothing_are_refused(base, chat, tmp_path, epochs):
    opened = open_model(base)
    with pytest.raises(ConfigError, match="align.epochs"):
        fine_tune(opened, conversations_of(chat, opened), settings(epochs=epochs), chat, tmp_path / "out", print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epochs", [0.01, 0.25, 1.0, 2.5])
def test_epochs_are_counted_in_conversations(base, chat, epochs):
    conversations = conversations_of(chat, open_model(base))
    count = len(conversations.rendered)
    read = [id(rendered) for row in plan_rows(conversations, settings(epochs=epochs)) for rendered in row]
    assert len(set(read)) == count_learnt(conversations, settings(epochs=epochs)) == math.ceil(min(1, epochs) * count)
    assert len(read) == pytest.approx(epochs * count, abs=1)
    assert max(read.count(each) for each in set(read)) == math.ceil(epochs)


def test_the_command_tells_what_it_learnt_from(base, chat, tmp_path, capsys):
    data = tmp_path / "chat.jsonl"
    data.write_text(chat.read_text() + "{broken\n" + pair("bo", " word" * LENGTH))
    command = ["align", "sft", str(base), "--data", str(data), "--set", "epochs=0.25"]
    command += ["--set", f"sequence_length={LENGTH}", "--set", f"batch_tokens={4 * LENGTH}"]
    usable = len(WORDS) - 6 + 1
    assert main([*command, "--out", str(tmp_path / "a"), "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    expected = {"conversations": math.ceil(usable / 4), "usable": usable, "skipped": 1, "cut": 1}
    assert {key: told[key] for key in expected} == expected
    assert captured.err.startswith(f"skipped {data}:{usable}: not a conversation")
    assert main([*command, "--out", str(tmp_path / "b")]) == 0
    sentence = capsys.readouterr().out
    assert re.match(rf"Learnt from {expected['conversations']} of {usable} conversations \(1 lines", sentence)
    assert main([*command, "--out", str(tmp_path / "b")]) == 2, "an existing folder is not overwritten"
    assert main([*command, "--out", str(tmp_path / "c"), "--strict"]) == 1
    assert f"{data}:{usable}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "chat.jsonl"]
