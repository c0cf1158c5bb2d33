"""A release: what is in it, what keeps it back, and what verification says when anything about it changes."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from trinity.base.durable import MANIFEST, seal, write_json
from trinity.base.errors import CheckpointError, UsageError, VerificationError
from trinity.cli.main import main
from trinity.release import sign
from trinity.release.bundle import release_model
from trinity.release.verify import verify_release

# Where the package is there but does not import, these tests fail: a broken signature is no reason to skip.
pytestmark = pytest.mark.skipif(
    find_spec("model_signing") is None, reason="signatures need: pip install 'trinity[sign]'"
)

WAIVED = {"audit": "a test"}


@pytest.fixture(scope="module")
def tokenizer():
    from trinity.text.train_bpe import train_bpe

    return train_bpe(["def f(n):\n    return n + 12345\n"] * 8, 300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A run folder as training leaves it: one checkpoint, metrics, configuration, tokenizer."""
    from trinity.ckpt.folder import save_checkpoint, stage
    from trinity.config.load import override, to_dict
    from trinity.model.init import build_model
    from trinity.recipes.table import recipe

    run = tmp_path_factory.mktemp("runs") / "little"
    config = override(recipe("debug"), ["model.num_hidden_layers=2"])
    model = build_model(config.model, seed=0)
    for bias in model.expert_biases():
        bias.uniform_(-0.1, 0.1)
    state = {"step": 64, "tokens": 65536, "model_config": to_dict(config.model)}
    save_checkpoint(run, "step-00000064", stage(model.state_dict(), {}, state))
    write_json(run / "config.json", {"config": to_dict(config), "fingerprint": "0"})
    rows = [
        {"kind": "step", "step": 64, "tokens": 65536, "loss": 3.25, "dead_experts": 0, "max_violation": 0.5},
        {"kind": "evaluation", "step": 64, "tokens": 65536, "bits_per_byte": 2.75, "loss": 3.0, "bytes": 8192},
        {"kind": "evaluation", "step": 99, "tokens": 99999, "bits_per_byte": 1.25, "loss": 1.0, "bytes": 8192},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save(run)
    return run


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "publisher.pem"
    sign.create_key(path)
    return path


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    measure = {"probe": "bits_per_byte", "name": "bits per byte", "of": {"kind": "code"}, "value": 2.5, "low": 2.25,
               "high": 2.75, "n": 40, "counted": "held-out documents", "unit": "bits/byte"}  # fmt: skip
    write_json(folder / "results.json", {"model": "little", "suite": "base", "results": [measure]})
    seal(folder)
    return folder


@pytest.fixture(scope="module")
def sealed(run: Path, key: Path, audit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release_model(run, tmp_path_factory.mktemp("out") / "little", key, audit).folder


@pytest.fixture
def release(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "release"))


def test_a_release_holds_what_it_must(release: Path, key: Path):
    names = {path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "README.md", "LICENSE", "lineage.json", "chat_template.jinja", "audit/results.json", "audit/manifest.json",
        "manifest.json", "model.sig", "public_key.pem",
    }  # fmt: skip
    verdict = verify_release(release, key.with_name("publisher.pem.pub"))
    assert verdict.holds and verdict.trusted and verdict.signer == sign.key_name(sign.public_pem(key))
    assert not verify_release(release).trusted


def test_released_weights_are_the_checkpoint_to_the_bit(release: Path, run: Path):
    from trinity.ckpt.opened import open_model

    ours, theirs = open_model(run).model.state_dict(), open_model(release).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_released_folder_can_be_released_again_file_by_file(release: Path, key: Path, tmp_path: Path):
    again = release_model(release, tmp_path / "again", key, waivers=WAIVED).folder
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (again / name).read_bytes() == (release / name).read_bytes()
    assert not (again / "audit").exists(), "an audit belongs to the release it was made for"
    assert "Not audited. Reason given: a test" in (again / "README.md").read_text()


def test_the_card_tells_measured_numbers_of_this_checkpoint(release: Path):
    card = (release / "README.md").read_text()
    assert "2.7500 (step 64, 8,192 bytes of held-out text" in card
    assert "1.2500" not in card, "a later evaluation is not this checkpoint's"
    assert "2.5 [2.25, 2.75] bits/byte" in card and "40 held-out documents" in card
    assert "a run of recipe `debug`, seed 0" in card


def test_no_private_key_and_no_private_path_in_a_release(release: Path, run: Path, key: Path):
    for path in release.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"PRIVATE KEY" not in content and key.read_bytes() not in content
            assert str(run.parent).encode() not in content, f"{path.name} tells where the run lay"


def test_equal_inputs_have_equal_manifests(run: Path, key: Path, tmp_path: Path):
    manifests = []
    for parent in ("a", "b"):
        folder = release_model(run, tmp_path / parent / "little", key, waivers=WAIVED).folder
        manifests.append((folder / MANIFEST).read_bytes())
    assert manifests[0] == manifests[1]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forge(release: Path) -> None:
    """Alter a file and write a manifest that fits it: only the signature can tell."""
    flip(release / "config.json")
    seal(release, ignore=(sign.SIGNATURE,))


def break_manifest(release: Path) -> None:
    (release / MANIFEST).write_text('{"files": [1, 2]}')


TAMPERINGS: list[tuple[Callable[[Path], object], str]] = [
    (lambda release: flip(release / "model.safetensors"), "model.safetensors was altered"),
    (lambda release: os.truncate(release / "model.safetensors", 100), "model.safetensors has 100 bytes instead of"),
    (lambda release: (release / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    (lambda release: (release / "evil.py").write_text("1"), "evil.py is not in the manifest"),
    (lambda release: (release / ".gitattributes").write_text("1"), ".gitattributes is not in the manifest"),
    (lambda release: flip(release / "audit" / "results.json"), "audit/results.json was altered"),
    (lambda release: (release / "model.sig").unlink(), "model.sig is missing"),
    (lambda release: (release / "model.sig").write_text("{}"), "model.sig is not a valid signature"),
    (lambda release: (release / MANIFEST).unlink(), "manifest.json is missing"),
    (break_manifest, "manifest.json is not a manifest"),
    (forge, "The signature is not over these files: config.json was altered; manifest.json was altered"),
    (lambda release: (release / "link").symlink_to("/etc/hostname"), "link is a symbolic link"),
    (lambda release: (release / "folder").symlink_to("/"), "folder is a symbolic link"),
    (lambda release: os.mkfifo(release / "pipe"), "pipe is neither a file nor a folder"),
    (lambda release: (release / "public_key.pem").unlink(), "public_key.pem is missing"),
    (lambda release: (release / "public_key.pem").write_text("no key"), "not an elliptic-curve public key"),
]


@pytest.mark.parametrize(("tamper", "told"), TAMPERINGS, ids=[told[:28] for _, told in TAMPERINGS])
def test_every_change_is_named(release: Path, tamper: Callable[[Path], object], told: str):
    tamper(release)
    verdict = verify_release(release)
    assert not verdict.holds and verdict.signer is None and not verdict.trusted
    assert any(told in problem for problem in verdict.problems), verdict.problems


def test_a_manifest_that_leads_out_is_refused(release: Path):
    manifest = json.loads((release / MANIFEST).read_text())
    manifest["files"]["../../etc/passwd"] = {"sha256": "0", "bytes": 1}
    write_json(release / MANIFEST, manifest)
    assert any("outside the release" in problem for problem in verify_release(release).problems)


def test_a_release_signed_by_another_key_is_said_so(release: Path, key: Path, tmp_path: Path):
    other = tmp_path / "other.pem"
    sign.create_key(other)
    verdict = verify_release(release, tmp_path / "other.pem.pub")
    assert verdict.problems == ["The release was signed by another key than other.pem.pub."]

    # A thief signs altered files anew and puts the own key beside them: only the publisher's key unmasks that.
    flip(release / "config.json")
    (release / "public_key.pem").write_bytes(sign.public_pem(other))
    seal(release, ignore=(sign.SIGNATURE,))
    sign.sign_folder(release, other)
    assert verify_release(release).holds
    assert "another key" in verify_release(release, key.with_name("publisher.pem.pub")).problems[0]


def test_a_signature_of_another_release_does_not_fit(release: Path, run: Path, key: Path, tmp_path: Path):
    another = release_model(run, tmp_path / "another", key, waivers=WAIVED).folder
    shutil.copy(another / "model.sig", release / "model.sig")
    assert "The signature is not over these files" in verify_release(release).problems[0]


def test_gates_are_named_and_waivers_need_a_reason(run: Path, key: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(VerificationError, match="held back: audit: there are no audit results"):
        release_model(run, out, key)
    with pytest.raises(UsageError, match="is not an audit"):
        release_model(run, out, key, run)
    with pytest.raises(UsageError, match="without a reason"):
        release_model(run, out, key, waivers={"audit": " "})
    with pytest.raises(UsageError, match="'model' cannot be waived"):
        release_model(run, out, key, waivers={"model": "in a hurry"})
    assert list(tmp_path.iterdir()) == [], "a release that is held back leaves nothing behind"


def test_an_audit_of_another_model_or_an_altered_one_does_not_open_the_gate(
    run: Path, key: Path, audit: Path, tmp_path: Path
):
    other = Path(shutil.copytree(audit, tmp_path / "other"))
    results = json.loads((other / "results.json").read_text())
    write_json(other / "results.json", {**results, "model": "somebody"})
    with pytest.raises(VerificationError, match="results.json"):
        release_model(run, tmp_path / "out", key, other)
    seal(other)
    with pytest.raises(VerificationError, match="is the audit of 'somebody', not of 'little'"):
        release_model(run, tmp_path / "out", key, other)


def test_weights_that_are_not_finite_are_held_back(run: Path, key: Path, release: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(release / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, release / "model.safetensors", metadata={"format": "pt"})
    (release / "manifest.json").unlink()
    with pytest.raises(VerificationError, match="held back: model: 1 tensors hold values that are not finite"):
        release_model(release, tmp_path / "out", key, waivers=WAIVED)


def test_bad_places_are_refused(run: Path, key: Path, release: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not a release"):
        release_model(run, tmp_path / "mine", key, waivers=WAIVED)
    shutil.copy(key, release / "k.pem")
    with pytest.raises(UsageError, match="private key lies inside"):
        release_model(release, tmp_path / "out", release / "k.pem", waivers=WAIVED)
    (release / "k.pem").unlink()
    (release / "model2.safetensors").symlink_to(release / "model.safetensors")
    with pytest.raises(CheckpointError, match="symbolic link"):
        release_model(release, tmp_path / "out", key, waivers=WAIVED)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "release"]


def test_an_earlier_release_is_replaced_whole(run: Path, key: Path, tmp_path: Path):
    out = release_model(run, tmp_path / "out", key, waivers=WAIVED).folder
    (out / "stale.txt").write_text("old")
    release_model(run, out, key, waivers=WAIVED)
    assert verify_release(out).holds
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_server_of_another_account_can_read_every_file(run: Path, key: Path, tmp_path: Path):
    before = os.umask(0o022)
    try:
        out = release_model(run, tmp_path / "out", key, waivers=WAIVED).folder
    finally:
        os.umask(before)
    private = [path.name for path in out.rglob("*") if path.is_file() and stat.S_IMODE(path.stat().st_mode) != 0o644]
    assert not private and (out / "model.safetensors").is_file()


def test_keys_are_private_and_never_overwritten(tmp_path: Path):
    path = tmp_path / "k.pem"
    sign.create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="exists already"):
        sign.create_key(path)
    (tmp_path / "text.pem").write_text("hello")
    with pytest.raises(UsageError, match="not an unencrypted private key"):
        sign.public_pem(tmp_path / "text.pem")
    with pytest.raises(UsageError, match="There is no key"):
        sign.public_pem(tmp_path / "none.pem")


def test_signing_and_verifying_touch_no_network(release: Path, key: Path, monkeypatch: pytest.MonkeyPatch):
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was tried")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    sign.sign_folder(release, key)
    assert verify_release(release).holds


def test_the_tool_of_the_format_verifies_a_release(release: Path, key: Path):
    """A third party needs nothing of ours: the reference tool accepts the release, and refuses an altered one."""
    code = "import sys, model_signing._cli as tool; sys.exit(tool.main())"
    command = [sys.executable, "-c", code, "verify", "key", str(release), "--signature", str(release / "model.sig")]
    command += ["--public_key", f"{key}.pub"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    flip(release / "config.json")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_a_missing_signing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch, release: Path):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UsageError, match=r"pip install 'trinity\[sign\]'"):
        verify_release(release)


def test_the_commands(run: Path, audit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, key = tmp_path / "out", tmp_path / "keys" / "k.pem"
    arguments = ["release", str(run), "--out", str(out), "--audit", str(audit), "--new-key", str(key)]
    assert main([*arguments, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["files"] == 12 and [gate["name"] for gate in made["gates"]] == ["model", "shape", "tokenizer", "audit"]

    assert main(["verify", str(out), "--key", f"{key}.pub", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trusted"] is True
    assert main(["verify", str(out)]) == 0
    assert "not who signed it" in capsys.readouterr().out
    flip(out / "config.json")
    assert main(["verify", str(out)]) == 1
    told = capsys.readouterr()
    assert "config.json was altered" in told.out and "does not hold: 2 problems" in told.err
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert main(["release", str(run), "--out", str(out), "--key", str(key), "--waive", "audit"]) == 2
    assert "is not a waiver" in capsys.readouterr().err
