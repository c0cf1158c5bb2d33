"""The model card, from measured numbers only: every figure stands with what it was measured on and what made it.

Nothing is claimed that is not computed from the configuration, read from the run folder, or found by the audit.
"""

from collections.abc import Sequence
from typing import Any

from trinity.base.lineage import fingerprint
from trinity.base.units import show_bytes, show_count
from trinity.config.model import ModelConfig
from trinity.plan.memory import kv_bytes
from trinity.plan.params import count_parameters
from trinity.release.audited import AuditRecord
from trinity.release.gate import Gate
from trinity.report.read import RunRecord

_FRONT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [afmoe, mixture-of-experts, trinity]
---
"""


def model_card(
    name: str,
    config: ModelConfig,
    lineage: dict[str, Any],
    gates: Sequence[Gate],
    audit: AuditRecord | None,
    run: RunRecord | None,
    step: int | None,
) -> str:
    """README.md of a release. `run` is the training run where there is one, read up to `step`."""
    parts = [
        f"{_FRONT}\n# {name}\n",
        f"A sparse mixture-of-experts language model of the AFMoE architecture (`AfmoeForCausalLM`), "
        f"{config.num_experts_per_tok} of {config.num_experts} experts for each token.\n",
        "## Shape\n\nComputed from `config.json`.\n",
        markdown_table(["quantity", "value"], _shape(config)),
    ]
    if run is not None:
        parts += _training(run, step)
    parts += _audit(audit, gates)
    parts += [
        "## Gates\n\nWhat was checked before this release was made.\n",
        markdown_table(["gate", "result"], [[gate.name, _gate_result(gate)] for gate in gates]),
        _CHECK,
        "## Where it came from\n\n`lineage.json` holds this in full.\n",
        markdown_table(["part", "value"], _origin(lineage)),
    ]
    return "\n".join(parts)


_CHECK = """## How to check it

`manifest.json` holds the sha256 and the size of every file, `model.sig` a signature over all of them in the OpenSSF
model signing format. With the publisher's public key, obtained from them and not from this folder:

```console
$ trinity verify . --key publisher.pem
```
"""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _shape(config: ModelConfig) -> list[list[str]]:
    count, cache = count_parameters(config), kv_bytes(config)
    return [
        ["parameters", f"{count.total:,}"],
        ["active for each token", f"{count.active:,}"],
        ["layers", f"{config.num_hidden_layers}, of which {config.num_dense_layers} dense"],
        ["experts in a sparse layer", f"{config.num_experts} routed and {config.num_shared_experts} shared"],
        [
            "attention",
            f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of {config.head_dim}",
        ],
        ["window of local layers", f"{config.sliding_window:,} tokens"],
        ["context", f"{config.max_position_embeddings:,} tokens"],
        ["vocabulary", f"{config.vocab_size:,}"],
        [
            "KV cache at full context, 16 bit",
            show_bytes(cache.at(config.max_position_embeddings, config.sliding_window)),
        ],
    ]


def _training(run: RunRecord, step: int | None) -> list[str]:
    """Figures of the training run up to the released step."""
    steps = [row for row in run.steps if step is None or row["step"] <= step]
    evaluations = [row for row in run.evaluations if step is None or row["step"] <= step]
    rows = []
    if steps:
        last = steps[-1]
        rows += [["steps", f"{last['step']:,}"], ["tokens seen", show_count(int(last.get("tokens", 0)))]]
        rows += [["training loss at the last step", f"{last['loss']:.4f} nats per token"]] if "loss" in last else []
        rows += [["dead experts at the last step", f"{last['dead_experts']}"]] if "dead_experts" in last else []
        rows += [["MaxVio at the last step", f"{last['max_violation']:.3f}"]] if "max_violation" in last else []
    if evaluations:
        last = evaluations[-1]
        where = f"step {last['step']:,}" + (f", {last['bytes']:,} bytes of held-out text" if "bytes" in last else "")
        rows.append(["bits per byte", f"{last['bits_per_byte']:.4f} ({where}; one evaluation, no interval)"])
    recipe, seed = run.config.get("name"), run.config.get("train", {}).get("seed")
    made = f"a run of recipe `{recipe}`, seed {seed}, configuration `{fingerprint(run.config)}`" if recipe else "a run"
    return (
        [f"## Training\n\nRead from the metrics of {made}.\n", markdown_table(["quantity", "value"], rows)]
        if rows
        else []
    )


def _audit(audit: AuditRecord | None, gates: Sequence[Gate]) -> list[str]:
    if audit is None or not audit.results:
        reason = next((gate.waived for gate in gates if gate.name == "audit"), "")
        return [f"## Audit\n\nNot audited. Reason given: {reason}\n"]
    rows = [
        [
            str(measure["probe"]),
            str(measure["name"]),
            ", ".join(f"{key} {value}" for key, value in measure.get("of", {}).items()),
            _with_interval(measure),
            f"{measure.get('n', '–')} {measure.get('counted', '')}".strip(),
        ]
        for measure in audit.results
    ]
    settings = {name: audit.about.get("config", {}).get(name) for name in ("seed", "confidence")}
    plain = {k: v for k, v in (audit.about | settings).items() if isinstance(v, str | int | float)}
    about = "; ".join(f"{name} {value}" for name, value in sorted(plain.items()))
    header = ["probe", "measure", "of", "value [interval]", "from"]
    made = f" ({about})" if about else ""
    return [
        f"## Audit\n\nFound by `trinity audit`{made}. Results and method: `audit/`.\n",
        markdown_table(header, rows),
    ]


def _gate_result(gate: Gate) -> str:
    return f"waived: {gate.told}. Reason given: {gate.waived}" if gate.waived else gate.told


def _origin(lineage: dict[str, Any], where: str = "") -> list[list[str]]:
    rows = []
    for name, value in lineage.items():
        if isinstance(value, dict):
            rows += _origin(value, f"{where}{name}.")
        else:
            rows.append([f"{where}{name}", str(value)])
    return rows


def _with_interval(measure: dict[str, Any]) -> str:
    value, low, high = (_number(measure.get(name)) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}] {measure.get('unit', '')}".strip()


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.4g}"
