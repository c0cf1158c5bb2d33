"""A release: one folder with weights, tokenizer, card, licence, lineage, audit, manifest and signature.

It is built aside and moved into place only when it verifies, so a folder with the final name is a whole release. The
private key is read where it lies and never copied.
"""

import json
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from trinity.base.durable import (
    MANIFEST,
    folder_aside,
    move_into_place,
    refusing_disk,
    sha256_file,
    write_durably,
)
from trinity.base.errors import CheckpointError, UsageError, VerificationError
from trinity.base.lineage import LINEAGE, write_lineage
from trinity.base.run import METRICS
from trinity.ckpt.folder import STATE
from trinity.ckpt.model_folder import copy_model_files, write_model_folder
from trinity.ckpt.opened import OpenedModel, open_model
from trinity.release.audited import AuditRecord, read_audit
from trinity.release.card import model_card
from trinity.release.gate import Gate, check_gates
from trinity.release.sign import PUBLIC_KEY, SIGNATURE, public_pem, sign_folder
from trinity.release.verify import verify_release
from trinity.report.read import RunRecord, read_run

CARD, LICENSE, AUDIT = "README.md", "LICENSE", "audit"


@dataclass(frozen=True, kw_only=True)
class Released:
    folder: Path
    gates: list[Gate]
    files: int
    bytes: int


def release_model(
    source: Path, out: Path, private_key: Path, audit: Path | None = None, waivers: dict[str, str] | None = None
) -> Released:
    """Gate, bundle, seal, sign, verify, and only then move to `out`. An earlier release at `out` is replaced whole."""
    public = public_pem(private_key)
    _refuse_places(source, out, private_key)
    opened = open_model(source)
    audited = read_audit(audit) if audit is not None else None
    gates = check_gates(opened, audited, waivers or {})
    hidden = out.with_name(f".{out.name}.unsigned")
    staged = hidden / out.name  # the signature holds the folder's name, so it has the final one
    try:
        with folder_aside(staged) as folder:
            write_model(folder, opened)
            _write_papers(folder, out.name, opened, gates, audited)
            write_durably(folder / PUBLIC_KEY, public)
        sign_folder(staged, private_key)
        verdict = verify_release(staged)
        if not verdict.holds:
            raise VerificationError(f"The new release does not verify: {'; '.join(verdict.problems)}.", "Try again.")
        with refusing_disk(out):
            move_into_place(staged, out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Released(folder=out, gates=gates, files=verdict.files, bytes=size)


def write_model(folder: Path, opened: OpenedModel) -> None:
    """Weights, configuration and tokenizer as a Hugging Face folder; such a folder is copied file by file."""
    if (opened.folder / STATE).exists():
        write_model_folder(
            folder,
            opened.model,
            opened.tokenizer,
            torch.float32,
            load_balance_coeff=opened.load_balance_coeff,
        )
        return
    _refuse_links(opened.folder)
    copy_model_files(opened.folder, folder)


def _write_papers(folder: Path, name: str, opened: OpenedModel, gates: list[Gate], audit: AuditRecord | None) -> None:
    """Licence, lineage, audit results and card."""
    if not (folder / LICENSE).exists():  # a model that came with a licence keeps it
        write_durably(folder / LICENSE, files("trinity.release").joinpath("apache-2.0.txt").read_bytes())
    weights = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
    waived = {gate.name: gate.waived for gate in gates if gate.waived}
    parents: dict[str, Any] = {"model": opened.name, "weights": weights, "lineage": opened.lineage}
    if audit is not None:
        _copy_audit(audit.folder, folder / AUDIT)
        parents["audit"] = sha256_file(folder / AUDIT / MANIFEST)
    write_lineage(folder, "release", parents, {"command": "trinity release", "waived": waived})
    run, step = _run_behind(opened)
    lineage = json.loads((folder / LINEAGE).read_text())
    write_durably(folder / CARD, model_card(name, opened.model.config, lineage, gates, audit, run, step))


def _run_behind(opened: OpenedModel) -> tuple[RunRecord | None, int | None]:
    """The training run a checkpoint belongs to, and the checkpoint's step; nothing for a Hugging Face folder."""
    state = opened.folder / STATE
    run = opened.folder.parent.parent
    if not state.exists() or not (run / METRICS).exists():
        return None, None
    return read_run(run), json.loads(state.read_text()).get("step")


def _copy_audit(source: Path, target: Path) -> None:
    _refuse_links(source)
    with refusing_disk(target):
        shutil.copytree(source, target)


def _refuse_links(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link.", "A release holds plain files only: copy its target.")


def _refuse_places(source: Path, out: Path, private_key: Path) -> None:
    """No release over something else, and none that would take in the private key."""
    inside = [place for place in (out, source) if private_key.resolve().is_relative_to(place.resolve())]
    if inside:
        raise UsageError(f"The private key lies inside {inside[0]}.", "Keep it elsewhere: what is released is public.")
    if source.resolve() == out.resolve() or out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out} lies inside the model it would release.", "Choose another --out.")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / SIGNATURE).exists())):
        raise UsageError(f"{out} exists and is not a release.", "Choose another --out, or remove it yourself.")
