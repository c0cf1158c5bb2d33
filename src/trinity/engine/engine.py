"""The engine: requests in, pieces of answers out, one step at a time.

A step is one pass of the model over rows of many requests: the newest token of each answer, and parts of prompts
(scheduler.py). On the compiled runner an answer is the same, bit for bit, whatever company it has, however its prompt
is cut, and whether or not its beginning was found in the prefix cache. Greedy answers equal model/generate.py.

Single-threaded: one thread calls submit, step and abort. `check` may be called from any thread.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import count as counting

import torch
from torch import Tensor

from trinity.base.errors import DataError, RequestError
from trinity.base.units import show_bytes
from trinity.config.engine import EngineLimits
from trinity.engine.grammar import Matcher, matcher_of
from trinity.engine.limits import pools_for
from trinity.engine.pages import PAGE
from trinity.engine.prefix import PrefixCache
from trinity.engine.request import FinishReason, Piece, Request, TokenLogprob
from trinity.engine.runner import Runner
from trinity.engine.sampler import choose, logprobs_of
from trinity.engine.scheduler import Part, Scheduler
from trinity.engine.sequence import Sequence
from trinity.engine.step import Output, Rows
from trinity.text.tokenizer import Tokenizer


class Engine:
    """Answers many requests at once, as many as `limits` says; further ones wait for their turn."""

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, end_ids: frozenset[int], limits: EngineLimits | None = None
    ) -> None:
        self.runner = runner
        self.config = runner.config
        self.tokenizer = tokenizer
        self.end_ids = end_ids  # an answer ends before any of these
        self.limits = EngineLimits() if limits is None else limits
        self.pools = pools_for(runner, self.limits)
        self.prefix = PrefixCache(self.pools, self.limits.window_bytes)
        self.scheduler = Scheduler(
            self.pools, self.prefix, self.limits.max_active, self.limits.step_tokens, self.limits.draft_tokens
        )
        self.drafted = self.drafts_taken = 0
        self._masks = ThreadPoolExecutor(thread_name_prefix="mask")  # of constraints, found while the model reads
        self._ids = counting()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.active or self.scheduler.waiting)

    def kv_bytes(self) -> int:
        """Bytes of keys and values that active requests hold; what only the prefix cache holds can be given up."""
        return self.pools.bytes_in_use() - self.pools.paged.idle * self.pools.paged.page_bytes

    def check(self, request: Request) -> Matcher | None:
        """The matcher of the request's constraint, if it has one; RequestError where this model cannot serve it.

        That is an empty or too long prompt, an unknown token, a constraint that no answer can meet.
        """
        context, length = self.config.max_position_embeddings, len(request.prompt)
        vocabulary = self.config.vocab_size
        if not request.prompt:
            raise RequestError("The prompt is empty.", "Give at least one token.")
        if length > context - (request.sampling.max_new_tokens > 0):
            raise RequestError(
                f"The prompt has {length} tokens; the model's context holds {context}, the answer included.",
                "Shorten the prompt.",
            )
        whole, room = min(context, length + request.sampling.max_new_tokens), self.pools.tokens
        if whole > room:
            each = self.pools.paged.page_bytes // PAGE
            raise RequestError(
                f"Prompt and answer may reach {whole} tokens, {show_bytes(whole * each)} of keys and values; the "
                f"engine has room for {room}, {show_bytes(room * each)}.",
                "Shorten the prompt, ask for fewer tokens, or give the engine more memory (kv_bytes).",
            )
        for what, tokens in (("The prompt", request.prompt), ("logit_bias", request.sampling.logit_bias)):
            for token in tokens:
                if not 0 <= token < vocabulary:
                    raise RequestError(f"{what} names token {token}.", f"Token ids lie between 0 and {vocabulary - 1}.")
        return matcher_of(request.sampling, self.tokenizer, self.end_ids, vocabulary)

    def submit(self, request: Request) -> int:
        """Queue a request; its pieces carry the returned id. Raises RequestError (see `check`)."""
        matcher = self.check(request)
        context = self.config.max_position_embeddings
        sequence = Sequence(next(self._ids), request, context, self.tokenizer, matcher)
        self.scheduler.add(sequence)
        return sequence.id

    def abort(self, request_id: int) -> Piece | None:
        """End a request now and free all it holds. Returns its last piece (what was held back), or None if unknown."""
        sequence = self.scheduler.remove(request_id)
        if sequence is None:
            return None
        return sequence.piece(sequence.stops.rest() + sequence.decoder.finish(), finish_reason="abort")

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """One pass of the model. A request that ended has freed everything it held."""
        parts = self.scheduler.plan()
        if not parts:
            return []
        wanted = [self._wanted(part) for part in parts]
        rows = [_rows(part, number) for part, number in zip(parts, wanted, strict=True)]
        for part, number in zip(parts, wanted, strict=True):
            if number and part.length == part.sequence.unread and part.sequence.matcher is not None:
                part.sequence.matcher.prepare(self._masks, self.config.vocab_size)
        output = self.runner.read(rows, self.pools)
        pieces, end = [], 0
        for part, count in zip(parts, wanted, strict=True):
            start, end = end, end + count
            sequence = part.sequence
            sequence.read += part.length
            try:
                piece = self._advance(part, output, start, end)
            except RequestError as error:
                piece = Piece(request_id=sequence.id, finish_reason="error", error=error)
            ended = piece is not None and piece.finish_reason is not None
            if piece is None or piece.error is None:
                self.prefix.take_in(sequence, ended)
            if piece is not None:
                pieces.append(piece)
            if ended:
                self.scheduler.remove(sequence.id)
        return pieces

    def _wanted(self, part: Part) -> int:
        """Of how many of its last rows a part needs logits."""
        if part.sequence.scores:
            return part.length
        last = part.length == part.sequence.unread and part.sequence.most_tokens > 0
        return 1 + len(part.draft) if last else 0

    def _advance(self, part: Part, output: Output, start: int, end: int) -> Piece | None:
        """Make of a part's rows of the output what they are wanted for; a piece once the prompt is read."""
        if -1 in output.likeliest[start:end]:
            raise RequestError(
                "The model's output for this text is not finite.",
                "Its weights are damaged or overflow in this precision: verify the model, or load it in float32.",
            )
        sequence = part.sequence
        if sequence.scores:
            self._score_prompt(sequence, output.logits[start:end].cpu(), sequence.read - part.length)
        if sequence.unread:
            return None
        if sequence.most_tokens == 0:
            return sequence.piece(finish_reason="length")
        text, tokens, entries, reason = "", [], [], None
        for row, drafted in enumerate([*part.draft, None], end - 1 - len(part.draft)):
            added, token, entry, reason = self._draw(sequence, output, row)
            text += added
            tokens += [] if token is None else [token]
            entries += entry
            if reason is not None or token != drafted:
                break
            sequence.read += 1  # the draft's row was read as what the answer says
            self.drafts_taken += 1
        self.drafted += len(part.draft)
        return sequence.piece(text, tuple(tokens), tuple(entries), reason)

    def _draw(
        self, sequence: Sequence, output: Output, row: int
    ) -> tuple[str, int | None, list[TokenLogprob], FinishReason | None]:
        """Draw the next token from a row of the output and add it to the answer, or end the answer."""
        sampling = sequence.sampling
        if sequence.plain:
            token = output.likeliest[row]
        else:
            logits = output.logits[row].cpu()  # they stay as they are, for the log-probabilities
            if sequence.matcher is not None:
                sequence.matcher.mask(logits := logits.clone())
            token = choose(logits, sampling, sequence.prompt, sequence.answer, sequence.draw)
        if token in self.end_ids or token in sampling.stop_token_ids:
            return sequence.last_text(), None, [], "stop"
        sequence.answer.append(token)
        if sequence.matcher is not None:
            sequence.matcher.accept(token)
        entries = []
        if sampling.logprobs is not None:
            entries = logprobs_of(output.logits[row, None].cpu(), torch.tensor([token]), sampling.logprobs)
        text = sequence.stops.push(sequence.decoder.push(token))
        if sequence.stops.found:
            return text, token, entries, "stop"
        whole = sequence.matcher is not None and sequence.matcher.finished
        if whole or len(sequence.answer) == sequence.most_tokens:
            text += sequence.last_text()
            return text, token, entries, "stop" if whole or sequence.stops.found else "length"
        return text, token, entries, None

    def _score_prompt(self, sequence: Sequence, logits: Tensor, start: int) -> None:
        """Note the log-probabilities of the prompt's tokens that follow those at `start` on; logits [T, V]."""
        first = sequence.scored - 1 - start  # rows before it were scored before the request was set back
        targets = sequence.prompt[sequence.scored : start + 1 + len(logits)]
        if targets:
            rows = logits[first : first + len(targets)]
            sequence.prompt_logprobs += logprobs_of(rows, torch.tensor(targets), sequence.sampling.prompt_logprobs or 0)
            sequence.scored += len(targets)


def _rows(part: Part, wanted: int) -> Rows:
    sequence = part.sequence
    tokens = sequence.tokens(sequence.read, part.length) + part.draft
    return Rows(tokens, sequence.read, sequence.pages, sequence.ring, wanted)


def run(engine: Engine, requests: list[Request]) -> list[list[Piece]]:
    """Answer all requests and return the pieces of each, in the order given."""
    ids = [engine.submit(request) for request in requests]
    pieces: dict[int, list[Piece]] = {request_id: [] for request_id in ids}
    while engine.busy:
        for piece in engine.step():
            pieces[piece.request_id].append(piece)
    return [pieces[request_id] for request_id in ids]


def end_tokens(tokenizer: Tokenizer, generation: dict[str, object]) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's end of text and end of turn, and what generation_config.json names."""
    named = generation.get("eos_token_id", [])
    ends = {tokenizer.eos_id, tokenizer.im_end_id}
    for token in named if isinstance(named, list) else [named]:
        if not isinstance(token, int):
            raise DataError(f"generation_config.json: eos_token_id is {named!r}.", "It must be one or more token ids.")
        ends.add(token)
    return frozenset(ends)
