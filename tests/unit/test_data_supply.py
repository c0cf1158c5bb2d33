"""What a run says of its text and vocabulary before it begins: epochs, and rows that nothing uses."""

from dataclasses import replace
from pathlib import Path

import pytest

from trinity.base.errors import ConfigError
from trinity.config.load import override
from trinity.config.phases import PhaseConfig
from trinity.data.documents import Document, writing_documents
from trinity.data.loader import Loader
from trinity.data.mix import write_mix
from trinity.data.supply import remarks
from trinity.data.tokenise import tokenise
from trinity.data.tokens import TokenFolder
from trinity.recipes.table import recipe
from trinity.text.train_bpe import train_bpe
from trinity.train.loop import train


def said_of(config, data: Path, *later: Path) -> list[str]:
    return list(remarks(config, Loader(data, config.data, 1, {str(path): path for path in later})))


def test_a_run_says_how_often_it_reads_its_text_and_which_rows_nothing_uses(debug_data: Path, tmp_path: Path):
    config = override(recipe("debug"), ["model.vocab_size=4096", "train.tokens=1M", "train.evaluate_bytes=64"])
    held = TokenFolder.open(debug_data).train.num_tokens
    said: list[str] = []

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, debug_data, tmp_path / "run", said.append, stop)
    times = 1_000_448 / held  # whole steps
    assert f"1M tokens of the {held / 1000:.3g}K in {debug_data}: {times:.3g} times over." in said[0]
    assert "4,096 rows of vocabulary, the tokenizer 512 entries: 3,584 rows are never used" in said[1]


def test_a_run_of_less_than_one_epoch_with_a_padded_vocabulary_says_nothing(debug_data: Path):
    config = override(recipe("debug"), ["model.vocab_size=515", "train.tokens=48K", "optim.decay_tokens=8K"])
    assert said_of(config, debug_data) == []


def test_each_source_is_counted_by_its_share_in_each_phase(tmp_path: Path):
    tokenizer = train_bpe(iter(["words and more words\n" * 9]), 300)
    for name, count in (("web", 60), ("code", 40)):
        with writing_documents(tmp_path / f"{name}-text", {}, {}) as (writer, _):
            for number in range(count):
                writer.write(Document(f"{name} {number} and more words", f"{number}", name))
        tokenise(tmp_path / f"{name}-text", tokenizer, tmp_path / name, 0.1)
    mix = write_mix([(tmp_path / "web", 0.75), (tmp_path / "code", 0.25)], tmp_path / "mix").path
    phase = PhaseConfig(name="late", from_tokens=64 * 1024, mix=str(mix))
    config = replace(override(recipe("debug"), ["train.tokens=128K", "model.vocab_size=300"]), phases=(phase,))
    web, code = (TokenFolder.open(tmp_path / name).train.num_tokens for name in ("web", "code"))
    first, second = config.phase_at(0).end, config.horizon - config.phase_at(0).end
    said = said_of(config, tmp_path / "web", mix)
    assert f"{(first + 0.75 * second) / web:.3g} times over" in said[0] and str(tmp_path / "web") in said[0]
    assert f"{0.25 * second / code:.3g} times over" in said[1] and len(said) == 2


def test_a_tokenizer_with_more_entries_than_rows_is_refused(debug_data: Path, tmp_path: Path):
    config = recipe("debug")
    config = replace(config, model=replace(config.model, vocab_size=400))
    with pytest.raises(ConfigError, match="has 512 entries; the model has room for 400"):
        train(config, debug_data, tmp_path / "run", lambda _: None, lambda _: None)
