"""The corpora of one run, read one after another: one numbering of documents over all sources of all of them.

A source that two corpora share is one source here, whatever its weight in each, so its epochs go on across the change.
What any source holds out no other may train on, as in a mix; here across all corpora of the run.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from trinity.base.errors import DataError
from trinity.base.lineage import fingerprint
from trinity.data.mix import Corpus, held_out_elsewhere, open_corpus, refuse_mixed_tokenizers
from trinity.data.tokens import TokenFolder


class Corpora:
    """Opened before the first step, all of them: what is missing or does not fit is said then and not weeks later."""

    def __init__(self, first: Path, later: Mapping[str, Path]) -> None:
        """The run's own data, and those of later phases under the setting that names each.

        Raises DataError for a folder that cannot be read, or of another tokenizer.
        """
        self.each = [open_corpus(first), *(_later_corpus(*named) for named in later.items())]
        if len(self.each) == 1:
            self.union, self._weights = self.each[0], [self.each[0].weights]
            return
        whole = {}  # by fingerprint, in the order in which they are met
        for corpus in self.each:
            for source in corpus.sources:
                folder = TokenFolder.open(source.path)
                whole.setdefault(folder.fingerprint, folder)
        refuse_mixed_tokenizers(list(whole.values()))
        dropped = held_out_elsewhere(list(whole.values()))
        sources = [folder.without(places) for folder, places in zip(whole.values(), dropped, strict=True)]
        self._weights = [_weights_among(corpus, list(whole)) for corpus in self.each]
        self.union = Corpus(self.each[0].path, sources, self._weights[0])

    @cached_property
    def fingerprint(self) -> str:
        """Names all that is read, in its order."""
        each = [corpus.fingerprint for corpus in self.each]
        return each[0] if len(each) == 1 else fingerprint(each)

    def weights(self, number: int) -> Sequence[float]:
        """Of corpus `number`, one for each source of the union; 0 where it does not read a source."""
        return self._weights[number]

    def num_documents(self, number: int) -> int:
        """Documents that corpus `number` trains on."""
        shares = zip(self.union.sources, self._weights[number], strict=True)
        return sum(source.train.num_documents for source, weight in shares if weight)


def _later_corpus(setting: str, folder: Path) -> Corpus:
    try:
        return open_corpus(folder)
    except DataError as error:
        raise DataError(
            f"{error.what} A later phase of this run reads it ({setting}).",
            f"{error.remedy} Or leave the data as it was there: --set {setting}=",
        ) from error


def _weights_among(corpus: Corpus, names: list[str]) -> list[float]:
    weights = [0.0] * len(names)
    for source, weight in zip(corpus.sources, corpus.weights, strict=True):
        weights[names.index(TokenFolder.open(source.path).fingerprint)] += weight
    return weights
