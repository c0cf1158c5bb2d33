"""Roll-back: weights, optimiser and counters of an older checkpoint; the data stream stays where it is.

The first roll-back goes to the newest good checkpoint. When the next one would end there again, nothing newer having
been saved, that checkpoint itself is under suspicion: the one before it is taken, where there is one, and the suspect
is abandoned, so that a start after a kill does not find it either (`ckpt.folder.abandon`).
"""

from pathlib import Path

from trinity.base.errors import TrainingHalted
from trinity.ckpt.folder import abandon, newest_good, read_state
from trinity.config.run import RunConfig
from trinity.train.duties import Duties
from trinity.train.evidence import Incident
from trinity.train.state import TrainState


class RollBack:
    """The roll-backs of one process's life. Called by all processes at the same point of the run."""

    def __init__(self, run: Path, config: RunConfig, duties: Duties) -> None:
        self.run, self.config, self.duties = run, config, duties
        self._returned_to: Path | None = None

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
        again = checkpoint == self._returned_to
        older = newest_good(self.run, duties.say, peers, before=checkpoint) if again else None
        if older is not None:
            incident = incident._replace(
                what=f"{incident.what}; a second time after {checkpoint.name}, so {older.name} is taken instead"
            )
        chosen = older or checkpoint
        duties.incident(step, incident.leaving(state.loader, read_state(chosen)["loader"]))
        state.restore(chosen, self.config, peers, keep_loader=True)
        if older is not None:
            peers.first(lambda: abandon(checkpoint, older))
        self._returned_to = chosen
        duties.rolled_back(state.step)
        duties.say(f"rolled back to step {state.step}")
