"""A launcher that starts failed processes again, and how to tell it that doing so is of no use.

torchrun starts all workers again when one of them fails, up to `--max-restarts` times, whatever it ended with: there is
no exit code for "not again", and exit code 0 would tell the scheduler that all is well. So the first failure that a
start with nothing changed would meet again (`TrinityError.lasting`) is noted in the folder that the launcher keeps for
this launch on this machine. Workers that find the note end at once, before they load anything, so the launcher has used
up its tries within seconds. It ends with a failure, and its last words name the noted one as the cause.

The note is as old as the launch: whoever gives the command again starts with a clean sheet.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

_NOTE = "trinity-ended.json"


def folder() -> Path | None:
    """The launcher's own on this machine, the same for all starts of one launch; None where no launcher names one."""
    reply = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # FOLDER/attempt_N/RANK/error.json
    attempt = reply.parent.parent
    return attempt.parent if attempt.name.startswith("attempt_") else None


def starts_again() -> bool:
    """Whether the launcher will start the processes again when one fails now."""
    done, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return folder() is not None and int(done) < int(most)


def note_end(sentence: str) -> None:
    """This launch is not to be tried again."""
    place = folder()
    if place is None:
        return
    with suppress(OSError):  # then it is tried again, as without this
        aside = place / f".{_NOTE}.writing-{os.getpid()}"
        # In the form in which torchrun reads what a worker died of.
        aside.write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}))
        os.replace(aside, place / _NOTE)
    has_ended()


def has_ended() -> bool:
    """Whether an earlier start of this launch, or this one, ended it for good; the launcher is told of what."""
    place = folder()
    if place is None or not (place / _NOTE).exists():
        return False
    with suppress(OSError):
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_bytes((place / _NOTE).read_bytes())
    return True
