"""`trinity release`: bundle a model with its card, licence, lineage and audit, seal it, and sign it with a local key.

Example:
  trinity release runs/demo --out release/demo --audit audit/demo --new-key keys/publisher.pem
  trinity release runs/demo/checkpoints/pre-anneal --out release/truebase --key keys/publisher.pem \\
    --waive audit="internal preview"
"""

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a Hugging Face folder, a run, or one of its checkpoints"
    )
    parser.add_argument("--out", type=Path, required=True, help="the release folder to write")
    parser.add_argument("--audit", type=Path, help="folder of audit results to bundle")
    parser.add_argument(
        "--waive", action="append", default=[], metavar='GATE="REASON"', help="pass a closed gate, and say why"
    )
    key = parser.add_mutually_exclusive_group(required=True)
    key.add_argument("--key", type=Path, help="private key (PEM, P-256) to sign with")
    key.add_argument("--new-key", type=Path, metavar="KEY", help="make a private key here and sign with it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(action=release)


def release(options: argparse.Namespace) -> None:
    import json

    from trinity.base.units import show_bytes
    from trinity.release.bundle import release_model
    from trinity.release.sign import PUBLIC_KEY, create_key, key_name

    waivers = dict(_waiver(text) for text in options.waive)
    if options.new_key:
        create_key(options.new_key)
    private_key = options.key or options.new_key
    made = release_model(options.model, options.out, private_key, options.audit, waivers)
    signer = key_name((options.out / PUBLIC_KEY).read_bytes())
    if options.json:
        gates = [
            {"name": gate.name, "open": gate.open, "told": gate.told, "waived": gate.waived} for gate in made.gates
        ]
        found = {"folder": str(made.folder), "files": made.files, "bytes": made.bytes, "signer": signer, "gates": gates}
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for gate in made.gates:
        print(f"{'open' if gate.open else 'waived':<8}{gate.name:<11}{gate.waived or gate.told}")
    print(f"\n{made.folder}: {made.files} files, {show_bytes(made.bytes)}, signed by key {signer}")
    if options.new_key:
        print(f"Give {options.new_key}.pub to those who should check it, and keep {options.new_key} to yourself.")
    print(f"Check it: trinity verify {made.folder}" + (f" --key {options.new_key}.pub" if options.new_key else ""))


def _waiver(text: str) -> tuple[str, str]:
    from trinity.base.errors import UsageError

    name, equals, reason = text.partition("=")
    if not equals:
        raise UsageError(f"'{text}' is not a waiver.", 'Write --waive audit="reason".')
    return name.strip(), reason.strip()
