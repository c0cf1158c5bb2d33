"""Signatures by the OpenSSF model signing format, with a local elliptic-curve key: no account, no service, no network.

The signature covers every file of the folder, the manifest included, and lies beside them as `model.sig`. Any tool that
reads the format can check it:

    model_signing verify key FOLDER --signature FOLDER/model.sig --public_key publisher.pem

The only file that imports model_signing.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from trinity.base.durable import refusing_disk, write_durably
from trinity.base.errors import UsageError, VerificationError

SIGNATURE, PUBLIC_KEY = "model.sig", "public_key.pem"
_CURVE = "secp256r1"


def create_key(path: Path) -> None:
    """Write a new P-256 private key, readable by its owner alone, and its public half beside it (`.pub`)."""
    serialization, ec = _cryptography()
    if path.exists():
        raise UsageError(f"{path} exists already.", f"Sign with it: --key {path}, or name a new file.")
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with refusing_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The mode is part of the creation: at no moment can another user read the key.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(handle)
    write_durably(path.with_name(path.name + ".pub"), public_pem(path))


def public_pem(private_key: Path) -> bytes:
    """The public half of a private key, as PEM. UsageError where the file is no unencrypted P-256 key."""
    serialization, ec = _cryptography()
    try:
        key = serialization.load_pem_private_key(private_key.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise UsageError(f"There is no key at {private_key}.", "Make one with --new-key.") from error
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{private_key} is not an unencrypted private key in PEM.", "Make one with --new-key."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != _CURVE:
        raise UsageError(f"{private_key} is not a P-256 key.", "Make one with --new-key.")
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_name(public: bytes) -> str:
    """A short name of a public key for people to compare: the first 16 hex digits of the sha256 of its PEM."""
    return hashlib.sha256(public).hexdigest()[:16]


def sign_folder(folder: Path, private_key: Path) -> None:
    """Write `model.sig` over every other file of the folder."""
    signing, _, hashing = _model_signing()
    aside = folder.with_name(f".{folder.name}.{SIGNATURE}")
    try:
        with refusing_disk(folder / SIGNATURE):
            config = signing.Config().use_elliptic_key_signer(private_key=private_key)
            config.set_hashing_config(_covering(hashing)).sign(folder, aside)
            write_durably(folder / SIGNATURE, aside.read_bytes())
    finally:
        aside.unlink(missing_ok=True)


def check_signature(folder: Path, public_key: Path) -> None:
    """VerificationError unless `model.sig` was made with the private half of `public_key` over exactly these bytes."""
    if not (folder / SIGNATURE).is_file():
        raise VerificationError(
            f"{folder} has no signature: {SIGNATURE} is missing.", "Ask its publisher for a signed copy."
        )
    _, verifying, hashing = _model_signing()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except FileNotFoundError as error:
        raise UsageError(
            f"There is no public key at {public_key}.", "Name the publisher's public key (PEM)."
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise VerificationError(
            f"{public_key} is not an elliptic-curve public key in PEM.", "Name the publisher's public key."
        ) from error
    try:
        config.set_hashing_config(_covering(hashing)).verify(folder, folder / SIGNATURE)
    except Exception as error:  # the library raises its parsers' and cryptography's own kinds on a broken signature
        raise VerificationError(*_told(str(error) or type(error).__name__, folder, public_key)) from error


def _told(why: str, folder: Path, public_key: Path) -> tuple[str, str]:
    """The library's complaint as one sentence and a remedy."""
    if "Key mismatch" in why:
        return (
            f"The release was signed by another key than {public_key.name}.",
            "If you trust that other signer, name their public key with --key; else do not use the files.",
        )
    if "Signature mismatch" in why:
        plain = why.replace("\\", "")  # the library prints lists of strings that hold quotes of either kind
        altered = re.findall(r"Hash mismatch for '([^']+)'", plain)
        others = re.findall(r"(Extra|Missing) files [^:]*: ([^\"\]]+)\"", plain)
        named = [f"{name} was altered" for name in altered] + [f"{kind.lower()}: {names}" for kind, names in others]
        return f"The signature is not over these files: {'; '.join(named)}.", "Fetch the release again."
    return f"{SIGNATURE} is not a valid signature ({' '.join(why.split())[:200]}).", "Fetch the release again."


def _covering(hashing: Any) -> Any:
    """Hash everything but the signature itself; git's files, which the library skips by default, are covered too."""
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _model_signing() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise UsageError(
            f"Signatures need a package that is not here ({error}).", "Try: pip install 'trinity[sign]'"
        ) from error
    return signing, verifying, hashing


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise UsageError(
            f"Keys need a package that is not here ({error}).", "Try: pip install 'trinity[sign]'"
        ) from error
    return serialization, ec
