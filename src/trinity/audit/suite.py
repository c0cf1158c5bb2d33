"""A suite of probes over one model, and what it leaves behind.

    results.json        every number with its interval, n, unit, seed and the command that made it
    load_shares.json    how much each expert read of each kind of text, layer by layer
    report.md           the same for people

`base`: bits per byte by kind of text, verbatim extraction by duplicate count, expert use by kind of text. Any model
can be asked, a fine-tuned one too, as long as its tokenizer is the one the data was made with.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trinity.audit.bits_per_byte import bits_per_byte
from trinity.audit.measure import Measure
from trinity.audit.memorisation import memorisation
from trinity.audit.passages import heldout_texts, strata
from trinity.audit.reading import Watch, read
from trinity.audit.report import render
from trinity.audit.routing import load_table, routing
from trinity.base.durable import folder_aside, write_durably, write_json
from trinity.base.errors import DataError, UsageError, nearest
from trinity.base.lineage import read_lineage, write_lineage
from trinity.ckpt.opened import OpenedModel
from trinity.config.audit import AuditConfig
from trinity.config.load import to_dict
from trinity.data.mix import Corpus

SUITES = ("base",)
RESULTS, LOAD_SHARES, REPORT = "results.json", "load_shares.json", "report.md"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Everything one audit found."""

    suite: str
    model: str
    data: str  # fingerprint of the corpus
    trained_on_data: bool | None  # whether the model's lineage names this corpus; None where it names none
    context: int
    config: AuditConfig
    command: str
    seconds: float
    measures: list[Measure]
    load_shares: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        traced = {"seed": self.config.seed, "command": self.command}
        return {
            "suite": self.suite,
            "model": self.model,
            "data": self.data,
            "trained_on_data": self.trained_on_data,
            "context": self.context,
            "config": to_dict(self.config),
            "command": self.command,
            "seconds": round(self.seconds, 1),
            "results": [measure.as_json() | traced for measure in self.measures],
        }


def check_config(config: AuditConfig, context: int, limit: int) -> None:
    """Refuse what the model's context cannot hold."""
    if not 2 <= context <= limit:
        raise UsageError(f"A context of {context} tokens does not suit this model.", f"It may be 2 to {limit}.")
    if config.prefix_tokens + config.suffix_tokens > limit:
        raise UsageError(
            f"{config.prefix_tokens} + {config.suffix_tokens} tokens of a passage exceed the context of {limit}.",
            "Lower prefix_tokens or suffix_tokens.",
        )


def run_suite(
    suite: str,
    opened: OpenedModel,
    corpus: Corpus,
    config: AuditConfig,
    *,
    command: str,
    watch: Watch,
    context: int | None = None,
) -> Audit:
    """Run all probes of a suite. `context`: tokens read at once, the model's own limit when absent."""
    if suite not in SUITES:
        raise UsageError(f"There is no suite '{suite}'.", nearest(suite, list(SUITES)))
    limit = opened.model.config.max_position_embeddings
    context = limit if context is None else context
    check_config(config, context, limit)
    if opened.tokenizer.fingerprint != corpus.tokenizer.fingerprint:
        raise DataError(
            f"{corpus.path} was made with another tokenizer ({corpus.tokenizer.fingerprint}) than {opened.name} has "
            f"({opened.tokenizer.fingerprint}).",
            "Tokenize the documents with the model's tokenizer.json first.",
        )
    begun = time.monotonic()
    texts = heldout_texts(corpus, opened.tokenizer, config)
    kinds = [text.kind for text in texts]
    readings = read(opened.model, [text.ids for text in texts], opened.tokenizer.bos_id, context, watch)
    text_bytes = np.array([text.bytes for text in texts], dtype=np.float64)
    measures = [
        *bits_per_byte(readings.nats, text_bytes, kinds, config),
        *memorisation(opened.model, strata(corpus, config), config, watch),
        *routing(readings.expert_tokens, kinds, config),
    ]
    return Audit(
        suite=suite,
        model=opened.name,
        data=corpus.fingerprint,
        trained_on_data=None
        if (own := opened.lineage.get("parents", {}).get("data")) is None
        else own == corpus.fingerprint,
        context=context,
        config=config,
        command=command,
        seconds=time.monotonic() - begun,
        measures=measures,
        load_shares=load_table(readings.expert_tokens, kinds, config),
    )


def refuse_other_folder(out: Path) -> None:
    """An audit may replace an older audit and nothing else."""
    if out.is_file():
        raise UsageError(f"{out} is a file.", "Give --out the name of a folder.")
    if out.is_dir() and any(out.iterdir()) and read_lineage(out).get("kind") != "audit":
        raise UsageError(
            f"{out} exists and is not an audit; replacing it would lose its files.", "Choose another --out."
        )


def write_audit(out: Path, audit: Audit) -> None:
    """Write the audit as a sealed folder; an older audit there is replaced."""
    refuse_other_folder(out)
    with folder_aside(out) as aside:
        write_json(aside / RESULTS, audit.as_json())
        write_json(aside / LOAD_SHARES, audit.load_shares)
        write_durably(aside / REPORT, render(audit.as_json(), audit.load_shares))
        write_lineage(aside, "audit", {"model": audit.model, "data": audit.data}, {"command": audit.command})
