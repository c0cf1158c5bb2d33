"""Documents in, rewritten documents out: segments, cached answers, gates, lineage.

`generate` is handed in: any function from (messages, sampling) to an Answer that may be called from several threads.
A RequestError of it fails one segment, which is counted and named; any other error ends the run, with every answer
received so far in the cache. Documents leave in the order they came, whatever the timing, so equal answers make equal
bytes.

A rewriting folder is a documents folder (data/documents.py): its ledger names every segment that did not make it,
with the gate and the number, and report.json holds acceptance, density, requests and cache hits.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trinity.base.durable import write_json
from trinity.base.errors import RequestError
from trinity.data.documents import Document, writing_documents
from trinity.data.rewrite.cache import Answer, AnswerCache, Sampling, request_key
from trinity.data.rewrite.check import Checked, check
from trinity.data.rewrite.prompts import Messages, Style
from trinity.data.rewrite.segment import CountTokens, segment

Generate = Callable[[Messages, Sampling], Answer]
REPORT = "report.json"
DOCUMENTS_AHEAD = 64  # documents whose segments may be on the way while an earlier one is still waited for


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """What an answer depends on (style, model, sampling), how many are asked at once, and what counts tokens."""

    style: Style
    model: str
    temperature: float = 0.5
    top_p: float = 0.9
    concurrency: int = 8
    count: CountTokens

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.style.longest_answer)


class Drop(NamedTuple):
    """A segment that did not make it, as the ledger records it."""

    rule: str
    number: float | None
    detail: str


class Outcome(NamedTuple):
    """What became of one document."""

    parent: Document
    child: Document | None  # None when no segment was accepted
    drops: list[Drop]
    figures: Counter[str]


class _Underway(NamedTuple):
    document: Document
    segments: list[tuple[str, str, Future[Answer] | None]]  # text, request key, answer; None: too short to be asked
    figures: Counter[str]


def rewrite_documents(
    documents: Iterable[Document], generate: Generate, cache: AnswerCache, rewriting: Rewriting
) -> Iterator[Outcome]:
    """Rewrite each document; at most `concurrency` requests run at once, each distinct one is made once."""
    asked: dict[str, Future[Answer]] = {}
    underway: deque[_Underway] = deque()
    pool = ThreadPoolExecutor(rewriting.concurrency, thread_name_prefix="rewrite")
    try:
        for document in documents:
            underway.append(_ask(document, generate, cache, rewriting, pool, asked))
            while len(asked) > 2 * rewriting.concurrency or len(underway) > DOCUMENTS_AHEAD:
                _keep_arrived(asked, cache, block=bool(asked))
                yield from _finished(underway, asked, rewriting)
        while underway:
            _keep_arrived(asked, cache, block=bool(asked))
            yield from _finished(underway, asked, rewriting)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        _keep_arrived(asked, cache, block=False, ending=True)


def _ask(
    document: Document,
    generate: Generate,
    cache: AnswerCache,
    rewriting: Rewriting,
    pool: ThreadPoolExecutor,
    asked: dict[str, Future[Answer]],
) -> _Underway:
    """Cut a document and send off those segments that neither the cache nor a request on its way will answer."""
    style, figures = rewriting.style, Counter[str]()
    cut = segment(document.text, style.longest_segment, rewriting.count)
    figures["lines_cut"] = cut.lines_cut
    segments: list[tuple[str, str, Future[Answer] | None]] = []
    for text in cut.segments:
        if rewriting.count(text.strip()) < style.shortest_segment:
            segments.append((text, "", None))
            continue
        key = request_key(style.name, style.version, rewriting.model, rewriting.sampling, text)
        future = asked.get(key)
        if future is not None:
            figures["cache_hits"] += 1
        elif (known := cache.get(key)) is not None:
            figures["cache_hits"] += 1
            future = Future()
            future.set_result(known)
        else:
            figures["requests"] += 1
            future = asked[key] = pool.submit(generate, style.messages(text.strip()), rewriting.sampling)
        segments.append((text, key, future))
    return _Underway(document, segments, figures)


def _keep_arrived(asked: dict[str, Future[Answer]], cache: AnswerCache, block: bool, ending: bool = False) -> None:
    """Put every answer that has arrived into the cache, then raise what ends the run, if any answer was that."""
    if block:
        wait(asked.values(), return_when=FIRST_COMPLETED)
    fatal: BaseException | None = None
    for key in [key for key, future in asked.items() if future.done()]:
        future = asked.pop(key)
        if future.cancelled():
            continue
        error = future.exception()
        if error is None:
            cache.put(key, future.result())
        elif not isinstance(error, RequestError):
            fatal = fatal or error
    if fatal is not None and not ending:
        raise fatal


def _finished(underway: deque[_Underway], asked: dict[str, Future[Answer]], rewriting: Rewriting) -> Iterator[Outcome]:
    """Outcomes of the first documents in line whose answers have all arrived and been kept."""
    while underway and not any(key in asked for _, key, _ in underway[0].segments):
        yield _judge(underway.popleft(), rewriting)


def _judge(ready: _Underway, rewriting: Rewriting) -> Outcome:
    """Pass a document's answers through the gates and join what is accepted into its child."""
    document, figures = ready.document, ready.figures
    drops: list[Drop] = []
    accepted: list[str] = []
    for index, (text, _, future) in enumerate(ready.segments):
        where = f"segment {index + 1} of {len(ready.segments)}"
        figures["segments"] += 1
        if future is None:
            figures["short"] += 1
            shortest = rewriting.style.shortest_segment
            drops.append(Drop("too short", rewriting.count(text.strip()), f"{where}: fewer than {shortest} tokens"))
        elif (error := future.exception()) is not None:
            figures["failed"] += 1
            drops.append(Drop("failed", None, f"{where}: {error}"))
        else:
            answer = future.result()
            checked = check(rewriting.style, text.strip(), answer.text, answer.cut_off, rewriting.count)
            for gate, number, bound, detail in checked.rejections:
                drops.append(Drop(gate, number, f"{where}: bound {bound}; {detail}"))
                figures[f"gate.{gate}"] += 1
            if checked.rejections:
                figures["rejected"] += 1
            else:
                accepted.append(checked.text)
                _weigh(figures, text, checked, rewriting.count)
    child = None
    if accepted:
        lineage = (document.id, *document.parents)
        child = Document("\n\n".join(accepted) + "\n", document.source, document.kind, document.licence, lineage)
    return Outcome(document, child, drops, figures)


def _weigh(figures: Counter[str], source: str, checked: Checked, count: CountTokens) -> None:
    figures["accepted"] += 1
    figures["source_tokens"] += count(source)
    figures["rewrite_tokens"] += count(checked.text)
    if checked.number_recall is not None:
        figures["with_numbers"] += 1
        figures["number_recall"] += checked.number_recall  # type: ignore[assignment]  # a sum of shares, not a count


def rewrite_folder(
    documents: Iterable[Document],
    out: Path,
    generate: Generate,
    cache: AnswerCache,
    rewriting: Rewriting,
    parents: dict[str, Any],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Write the rewrites of `documents` as a documents folder and return its report; `advance` hears of each document.

    Nothing appears at `out` before all is done; a run that is stopped leaves its answers in the cache.
    """
    figures, read, last_failure = Counter[str](), 0, ""
    made_by = {"style": rewriting.style.described(), "model": rewriting.model, "sampling": rewriting.sampling._asdict()}
    with writing_documents(out, parents, made_by) as (writer, ledger):
        for outcome in rewrite_documents(documents, generate, cache, rewriting):
            for rule, number, detail in outcome.drops:
                ledger.drop(f"rewrite: {rule}", outcome.parent.source, outcome.parent.id, number, detail)
                last_failure = detail if rule == "failed" else last_failure
            if outcome.child is not None:
                writer.write(outcome.child)
            figures.update(outcome.figures)
            read += 1
            advance(1)
        if figures["failed"] and not figures["accepted"] + figures["rejected"]:
            raise RequestError(f"Not one of {figures['failed']} requests was answered; {last_failure}.")
        report = summarise(figures, read, writer.documents) | made_by
        write_json(writer.folder / REPORT, report)
    return report


def summarise(figures: Counter[str], documents: int, rewritten: int) -> dict[str, Any]:
    """Counts, and the density numbers over the accepted segments.

    token_ratio = rewrite tokens / source tokens; number_recall = mean share of a segment's numbers that are kept.
    """
    answered = figures["accepted"] + figures["rejected"]
    gates = {name.removeprefix("gate."): value for name, value in figures.items() if name.startswith("gate.")}
    return {
        "documents": documents,
        "documents_rewritten": rewritten,
        "segments": figures["segments"],
        "segments_accepted": figures["accepted"],
        "segments_rejected": figures["rejected"],
        "segments_failed": figures["failed"],
        "segments_too_short": figures["short"],
        "lines_cut": figures["lines_cut"],
        "acceptance": figures["accepted"] / answered if answered else None,
        "rejections_by_gate": dict(sorted(gates.items())),
        "token_ratio": figures["rewrite_tokens"] / figures["source_tokens"] if figures["source_tokens"] else None,
        "number_recall": figures["number_recall"] / figures["with_numbers"] if figures["with_numbers"] else None,
        "requests": figures["requests"],
        "cache_hits": figures["cache_hits"],
    }
