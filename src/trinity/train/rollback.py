"""Roll-back: weights, optimiser and counters of an older checkpoint; the data stream stays where it is.

The first roll-back goes to the newest good checkpoint. When the next one would end there again, nothing newer having
been saved, that checkpoint itself is under suspicion: the one before it is taken, where there is one, and the suspect
is abandoned, so that a start after a kill does not find it either (`ckpt.folder.abandon`).

A checkpoint is not written anew by a roll-back to it, so where the data went on and what the guard had counted is kept
beside it, in the run folder. A run that is killed before its next save and resumes from that checkpoint goes on from
there, to the bit as if it had not been killed.

    RUN/rolled_back.json   {name of a checkpoint: {"manifest": its hash, "loader": ..., "guard": ...}}

The hash ties an entry to the very checkpoint: after a roll-back behind it, another one may take its name. A kill before
the entry stands undoes the roll-back whole, and the resumed run meets the incident again.
"""

import json
from pathlib import Path
from typing import Any

from trinity.base.durable import MANIFEST, sha256_file, write_json
from trinity.base.errors import CheckpointError, StorageError, TrainingHalted
from trinity.ckpt.folder import abandon, newest_good, read_state
from trinity.ckpt.peers import Peers
from trinity.config.run import RunConfig
from trinity.train.duties import Duties
from trinity.train.evidence import Incident
from trinity.train.state import TrainState

ROLLED_BACK = "rolled_back.json"


class RollBack:
    """The roll-backs of a run. Called by all processes at the same point of it."""

    def __init__(self, run: Path, config: RunConfig, duties: Duties) -> None:
        self.run, self.config, self.duties = run, config, duties

    def __call__(self, state: TrainState, incident: Incident, step: int) -> None:
        """Go back because of what was found at `step`. TrainingHalted where there is nothing to go back to."""
        duties, peers = self.duties, self.duties.saver.peers
        duties.wait_for_save()
        checkpoint = newest_good(self.run, duties.say, peers)
        if checkpoint is None:
            duties.incident(step, incident)
            raise TrainingHalted(
                f"Step {step}: {incident.what}. There is no checkpoint to roll back to yet.",
                "Lower the learning rates, or set train.save_every_tokens lower.",
            )
        again = returned_to(self.run, checkpoint, peers) is not None
        older = newest_good(self.run, duties.say, peers, before=checkpoint) if again else None
        if older is not None:
            incident = incident._replace(
                what=f"{incident.what}; a second time after {checkpoint.name}, so {older.name} is taken instead"
            )
        chosen = older or checkpoint
        duties.incident(step, incident.leaving(state.loader, read_state(chosen)["loader"]))
        state.restore(chosen, self.config, peers, keep_loader=True)
        peers.first(lambda: self._make_lasting(state, chosen, checkpoint))
        duties.say(f"rolled back to step {state.step}")

    def _make_lasting(self, state: TrainState, chosen: Path, newest: Path) -> None:
        """In this order: whatever a kill leaves, a resume finds the roll-back whole or makes it again."""
        rows_read = state.loader.trace.place.rows
        self.duties.metrics.leave(state.step, rows_read)
        try:
            _record(self.run, chosen, state)
            if chosen != newest:
                abandon(newest, chosen)
        except (OSError, StorageError) as refusal:
            what = f"the roll-back is not recorded: {refusal}"
            self.duties.incident(
                state.step, Incident("storage", what, "go on; a kill before the next save undoes it", {})
            )
        self.duties.rolled_back(state.step, rows_read)


def returned_to(run: Path, checkpoint: Path, peers: Peers) -> dict[str, Any] | None:
    """What the last roll-back to this very checkpoint recorded; None where there was none."""

    def look() -> dict[str, Any] | None:
        found = _records(run).get(checkpoint.name)
        return found if found and found["manifest"] == sha256_file(checkpoint / MANIFEST) else None

    return peers.share(peers.first(look))


def _records(run: Path) -> dict[str, Any]:
    path = run / ROLLED_BACK
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}.",
            "Restore it from a copy; without it the run reads again what a roll-back left behind.",
        ) from error


def _record(run: Path, checkpoint: Path, state: TrainState) -> None:
    entry = {
        "manifest": sha256_file(checkpoint / MANIFEST),
        "loader": state.loader.state(),
        "guard": state.guard.state(),
    }
    standing = {name: kept for name, kept in _records(run).items() if (checkpoint.parent / name).exists()}
    write_json(run / ROLLED_BACK, {**standing, checkpoint.name: entry})
