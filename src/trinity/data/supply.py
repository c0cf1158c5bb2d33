"""Whether a run's text and vocabulary are of the size that its model and its tokens ask for; said before it begins.

Neither is a mistake in itself: small models are trained over their text many times, and published vocabularies are
padded. Unexpected, both waste a run.
"""

from collections.abc import Iterator

from trinity.base.units import show_count
from trinity.config.run import RunConfig
from trinity.data.loader import Loader

_PADDING = 0.01  # rows without an entry that a vocabulary may have for the sake of round numbers


def remarks(config: RunConfig, loader: Loader) -> Iterator[str]:
    """One sentence for each source that is read more than once, and one for rows that no entry uses."""
    corpora = loader.corpora
    for place, source in enumerate(corpora.union.sources):
        read = sum((phase.end - phase.begin) * corpora.weights(phase.corpus)[place] for phase in config.course)
        if read > source.train.num_tokens:
            yield (
                f"The run reads {show_count(round(read))} tokens of the {show_count(source.train.num_tokens)} in "
                f"{source.path}: {read / source.train.num_tokens:.3g} times over."
            )
    rows, entries = config.model.vocab_size, loader.tokenizer.vocab_size
    if rows - entries > _PADDING * rows:
        yield (
            f"The model has {rows:,} rows of vocabulary, the tokenizer {entries:,} entries: {rows - entries:,} rows "
            "are never used (model.vocab_size)."
        )
