"""A model folder as other programs read it: transformers' tokenizer, template and generation defaults; round trips."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trinity
from trinity.base.durable import unsealed_differences
from trinity.base.lineage import write_lineage
from trinity.ckpt.folder import save_checkpoint, stage
from trinity.ckpt.model_folder import copy_model_files, write_model_folder
from trinity.ckpt.opened import open_model
from trinity.cli.main import main
from trinity.config.load import to_dict
from trinity.model.init import build_model
from trinity.recipes.table import recipe
from trinity.text.chat import render
from trinity.text.tokenizer import Tokenizer

TEXTS = [
    "def f(x):\n    return x + 12345\n",
    "",
    " leading",
    "Grüße 你好 🙂\r\n\t",
    "a<|im_end|>b",
    "1234567 89",
    "'s 'LL don't",
]


@pytest.fixture(scope="module")
def models(debug_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/: a pretrained model's folder with a lineage; chat/: the same as a model that ends its turns."""
    place = tmp_path_factory.mktemp("models")
    model = build_model(recipe("debug").model, 1)
    for bias in model.expert_biases():
        bias.copy_(torch.linspace(-0.1, 0.1, len(bias)) / 3)
    for name in ("base", "chat"):
        (place / name).mkdir()
        write_model_folder(place / name, model, Tokenizer.load(debug_data), torch.float32, chat=name == "chat")
        write_lineage(place / name, "fine-tuned model", {"model": "x"}, {"method": "sft"})
    return place


def test_transformers_encodes_as_we_do(models: Path):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(models / "base"), Tokenizer.load(models / "base")
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode_with_special(text), text
        assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert theirs.model_max_length == 512
    assert AutoTokenizer.from_pretrained(models / "chat").eos_token_id == ours.im_end_id


def test_the_chat_template_renders_what_we_train_and_serve(models: Path):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(models / "chat"), Tokenizer.load(models / "chat")
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2."},
        {"role": "user", "content": "And 12345 · 2?\n"},
    ]
    for opened in (False, True):
        found = theirs.apply_chat_template(messages, add_generation_prompt=opened, tokenize=True)
        ids = found["input_ids"] if not isinstance(found, list) else found
        assert ids == render(messages, ours, add_generation_prompt=opened).tokens
    with pytest.raises(Exception, match="Unknown role: wizard"):
        theirs.apply_chat_template([{"role": "wizard", "content": "x"}])


def test_the_generation_defaults_are_valid_in_transformers(models: Path):
    from transformers import GenerationConfig

    tokenizer = Tokenizer.load(models / "base")
    base, chat = (GenerationConfig.from_pretrained(models / name) for name in ("base", "chat"))
    for config in (base, chat):
        config.validate(strict=True)
    assert base.eos_token_id == tokenizer.eos_id
    assert chat.eos_token_id == sorted([tokenizer.eos_id, tokenizer.im_end_id])


def test_transformers_loads_the_folder_with_our_logits(models: Path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    ours = open_model(models / "base")
    ids = torch.tensor([[ours.tokenizer.bos_id, *ours.tokenizer.encode(TEXTS[0])]])
    with torch.no_grad():
        expected, logits = theirs(input_ids=ids).logits, ours.model.head(ours.model(ids).hidden)
    assert float((logits - expected).norm() / expected.norm()) <= 1e-5


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return open_model(folder).model.state_dict()


def test_export_and_import_change_no_value(models: Path, tmp_path: Path, capsys):
    assert main(["export", str(models / "chat"), str(tmp_path / "exported")]) == 0
    assert main(["import", str(tmp_path / "exported"), str(tmp_path / "imported")]) == 0
    told = capsys.readouterr().out
    assert "every tensor is there" in told and "float32" in told
    before, after = load_file(models / "chat" / "model.safetensors"), load_file(tmp_path / "imported/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
                 "config.json", "lineage.json"):  # fmt: skip
        assert (tmp_path / "imported" / name).read_bytes() == (models / "chat" / name).read_bytes(), name
    assert not unsealed_differences(tmp_path / "imported")
    assert open_model(tmp_path / "imported").ends_turns and not open_model(models / "base").ends_turns


def test_a_bfloat16_export_keeps_the_selection_bias(models: Path, tmp_path: Path):
    assert main(["export", str(models / "base"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    exact, half = state_of(models / "base"), state_of(tmp_path / "half")
    for name, tensor in exact.items():
        same = torch.equal(tensor, half[name])
        assert same if name.endswith("expert_bias") else torch.equal(tensor.bfloat16().float(), half[name]), name


def test_code_and_pickles_stay_behind(models: Path, tmp_path: Path, capsys):
    source, out = tmp_path / "download", tmp_path / "out"
    source.mkdir()
    copy_model_files(models / "base", source)
    unwanted = ("modeling_afmoe.py", "pytorch_model.bin", "training_args.bin", "x.pt", "y.pth", "z.pickle", "w.pkl",
                "v.ckpt", ".hidden", "run.sh")  # fmt: skip
    for name in (*unwanted, "LICENSE", "README.md", "special_tokens_map.json"):
        (source / name).write_text("{}")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_afmoe.AfmoeConfig"}
    (source / "config.json").write_text(json.dumps(config))
    assert main(["import", str(source), str(out)]) == 0
    copied = {path.name for path in out.iterdir()}
    assert not copied & set(unwanted) and {"LICENSE", "README.md", "special_tokens_map.json"} <= copied
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(out).model_type == "afmoe", "needs no code of the folder's own"


def test_a_download_made_of_links_becomes_files(models: Path, tmp_path: Path):
    (tmp_path / "snapshot").mkdir()
    for path in (models / "base").iterdir():
        os.symlink(path, tmp_path / "snapshot" / path.name)
    assert main(["import", str(tmp_path / "snapshot"), str(tmp_path / "out")]) == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", ["import", "export"])
def test_mistakes_leave_nothing(models: Path, tmp_path: Path, capsys, command: str):
    broken, out = tmp_path / "broken", tmp_path / "out"
    broken.mkdir()
    copy_model_files(models / "base", broken)
    os.truncate(broken / "model.safetensors", 10_000)
    assert main([command, str(broken), str(out)]) == 1
    assert "model.safetensors is" in capsys.readouterr().err
    assert main([command, str(models / "base"), str(broken)]) == 2
    assert f"{broken} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_the_published_tokenizer_is_encoded_the_same_by_transformers(real_data: Path):
    from transformers import PreTrainedTokenizerFast

    file = real_data / "trinity-tokenizer" / "tokenizer.json"
    if not file.exists():
        pytest.skip("the published tokenizer is not here")
    theirs, ours = PreTrainedTokenizerFast(tokenizer_file=str(file)), Tokenizer.load(file)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode_with_special(text), text
    messages = [{"role": "user", "content": "What is 12345 + 1?"}, {"role": "assistant", "content": "12346."}]
    marks = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    rendered = render(messages, ours, add_generation_prompt=False).tokens
    assert theirs.encode("<|begin_of_text|>" + marks, add_special_tokens=False) == rendered


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_of_a_folder_has_the_mode_that_the_umask_gives(models: Path, tmp_path: Path, mask: int, mode: int):
    before = os.umask(mask)
    try:
        assert main(["export", str(models / "base"), str(tmp_path / "exported")]) == 0
        assert main(["import", str(tmp_path / "exported"), str(tmp_path / "imported")]) == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "tokenizer.json", "manifest.json"}
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {oct(mode)}


def unmarked(folder: Path) -> str:
    """The tokenizer.json of a folder as it would be published: without a word on how a text begins."""
    return re.sub('"post_processor": {.*}', '"post_processor": null', (folder / "tokenizer.json").read_text())


@pytest.mark.parametrize("says", [None, True, False])
@pytest.mark.parametrize("marked", [True, False])
def test_a_prompt_has_the_ids_that_transformers_gives_it(models: Path, tmp_path: Path, marked: bool, says: bool | None):
    """marked: as we train tokenizers; not marked: as the published one is known. says: add_bos_token of the folder,
    which transformers does not heed where there is a tokenizer.json."""
    from transformers import AutoTokenizer

    source = tmp_path / "download"
    shutil.copytree(models / "base", source)
    ours = Tokenizer.load(source)
    assert ours.begins_texts
    if not marked:
        Tokenizer(unmarked(source), "unmarked").save(source)
    if says is not None:
        config = json.loads((source / "tokenizer_config.json").read_text())
        (source / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": says}))
    assert main(["import", str(source), str(tmp_path / "imported")]) == 0
    assert main(["export", str(tmp_path / "imported"), str(tmp_path / "exported")]) == 0
    for folder in (source, tmp_path / "imported", tmp_path / "exported"):
        theirs, loaded = AutoTokenizer.from_pretrained(folder), trinity.load(folder)
        for text in ("def f", " leading", "1234567 89"):
            assert theirs(text)["input_ids"] == list(loaded.prompt(text)), (folder, text)
        assert loaded.generate("def f", max_new_tokens=1).prompt_tokens == marked + len(ours.encode("def f"))
        assert len(loaded.score("def f")) == len(ours.encode("def f"))
        chat = [{"role": "user", "content": "What is 1 + 1?"}]
        found = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert found == list(loaded.chat_prompt(chat)), folder


def test_a_run_has_the_begin_mark_whatever_tokenizer_it_was_given(debug_data: Path, tmp_path: Path):
    """Its documents began with the mark; a tokenizer that was published without would not say so to other programs."""
    given = Tokenizer(unmarked(debug_data), "given")
    given.save(tmp_path / "run")
    assert not given.begins_texts and given.fingerprint == Tokenizer.load(debug_data).fingerprint
    state = {"step": 1, "model_config": to_dict(recipe("debug").model)}
    model = build_model(recipe("debug").model, 1)
    save_checkpoint(tmp_path / "run", "step-00000001", stage(model.state_dict(), {}, state))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    for place in ("run", "exported"):
        assert trinity.load(tmp_path / place).prompt("x")[0] == given.bos_id
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == (debug_data / "tokenizer.json").read_bytes()


def test_a_post_processor_of_another_kind_gives_way(debug_data: Path):
    source = json.loads((debug_data / "tokenizer.json").read_text())
    source["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    strange = Tokenizer(json.dumps(source), "strange")
    assert not strange.begins_texts and strange.with_begin_mark().begins_texts
    assert strange.with_begin_mark().encode("def f") == strange.encode("def f")
