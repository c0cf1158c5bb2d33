"""What must be there before a release may exist. Each gate has a name; a closed one is named with what opens it.

model       the weights load, and every value is finite
shape       embedding rows and tokenizer ids fit each other
tokenizer   text survives encoding and decoding
audit       measured results with intervals; may be waived with a reason, which the card then tells
"""

from dataclasses import dataclass

from trinity.base.errors import UsageError, VerificationError, nearest
from trinity.ckpt.opened import OpenedModel
from trinity.release.audited import AuditRecord

WAIVABLE = ("audit",)
_PROBE_TEXT = "def f(n):\n    return n + 1234567  # naïve, Ω, 漢字, 🙂\n"


@dataclass(frozen=True, kw_only=True)
class Gate:
    name: str
    open: bool
    told: str
    remedy: str = ""
    waived: str = ""  # the reason, where a closed gate was waived


def check_gates(opened: OpenedModel, audit: AuditRecord | None, waivers: dict[str, str]) -> list[Gate]:
    """Every gate, or a VerificationError that names all closed ones. `waivers` maps a gate to the reason."""
    for name, reason in waivers.items():
        if name not in WAIVABLE:
            raise UsageError(f"The gate '{name}' cannot be waived.", nearest(name, list(WAIVABLE)))
        if not reason.strip():
            raise UsageError(f"The gate '{name}' is waived without a reason.", f'Write --waive {name}="why".')
    gates = [_model(opened), _shape(opened), _tokenizer(opened), _audit(opened, audit, waivers.get("audit", ""))]
    closed = [gate for gate in gates if not gate.open and not gate.waived]
    if closed:
        raise VerificationError(
            f"The release is held back: {'; '.join(f'{gate.name}: {gate.told}' for gate in closed)}.",
            " ".join(gate.remedy for gate in closed),
        )
    return gates


def _model(opened: OpenedModel) -> Gate:
    broken = [name for name, tensor in opened.model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        told = f"{len(broken)} tensors hold values that are not finite, among them {broken[0]}"
        return Gate(name="model", open=False, told=told, remedy="Release an earlier checkpoint.")
    return Gate(name="model", open=True, told="the weights load and every value is finite")


def _shape(opened: OpenedModel) -> Gate:
    rows, ids = opened.model.config.vocab_size, opened.tokenizer.vocab_size
    if ids > rows:
        told = f"the tokenizer has {ids} ids, the embedding {rows} rows"
        return Gate(
            name="shape", open=False, told=told, remedy="Release the model with the tokenizer it was trained on."
        )
    return Gate(name="shape", open=True, told=f"{ids} token ids fit {rows} embedding rows")


def _tokenizer(opened: OpenedModel) -> Gate:
    back = opened.tokenizer.decode(opened.tokenizer.encode(_PROBE_TEXT))
    if back != _PROBE_TEXT:
        told = f"text does not survive encoding and decoding ({back!r})"
        return Gate(name="tokenizer", open=False, told=told, remedy="Train the tokenizer again.")
    return Gate(name="tokenizer", open=True, told="text survives encoding and decoding byte for byte")


def _audit(opened: OpenedModel, audit: AuditRecord | None, reason: str) -> Gate:
    if audit is None:
        told = "there are no audit results"
    elif not audit.results:
        told = f"{audit.folder} holds no results"
    elif audit.model != opened.name:
        told = f"{audit.folder} is the audit of '{audit.model}', not of '{opened.name}'"
    else:
        return Gate(name="audit", open=True, told=f"{len(audit.results)} results with intervals")
    return Gate(
        name="audit",
        open=False,
        told=told,
        remedy='Run `trinity audit` and name its folder with --audit, or say why not: --waive audit="reason".',
        waived=reason,
    )
