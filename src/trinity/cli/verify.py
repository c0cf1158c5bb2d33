"""`trinity verify`: are a release's bytes what its publisher signed? Every altered, missing or extra file is named.

Example:
  trinity verify release/demo --key publisher.pem
  trinity verify release/demo
"""

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a release folder")
    parser.add_argument("--key", type=Path, help="the publisher's public key (PEM), obtained from them")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.set_defaults(action=verify)


def verify(options: argparse.Namespace) -> None:
    import json

    from trinity.base.errors import VerificationError
    from trinity.release.verify import verify_release

    verdict = verify_release(options.folder, options.key)
    if options.json:
        found = {"folder": str(verdict.folder), "holds": verdict.holds, "problems": verdict.problems,
                 "files": verdict.files, "signer": verdict.signer, "trusted": verdict.trusted}  # fmt: skip
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif verdict.holds:
        print(f"{verdict.folder}: {verdict.files} files are as they were signed, by key {verdict.signer}.")
        if not verdict.trusted:
            print(
                "That key came with the folder: this shows that nothing was damaged, not who signed it.\n"
                "To know the signer, get their public key from them and name it with --key."
            )
    else:
        print("\n".join(f"  {problem}" for problem in verdict.problems))
    if not verdict.holds:
        count = len(verdict.problems)
        raise VerificationError(
            f"{verdict.folder} does not hold: {count} {'problem' if count == 1 else 'problems'}.",
            "Do not use these files.",
        )
