"""The engine: requests in, pieces of answers out, one step at a time.

A step gives every active request one forward pass: a chunk of its prompt, or one token. Each request has a pass of its
own over its own cache, in chunks that depend on nothing but its prompt, so an answer is the same, bit for bit, whatever
company it has. Greedy answers equal model/generate.py.

Single-threaded: one thread calls submit, step and abort. `check` may be called from any thread.
"""

import secrets
from collections import deque
from itertools import count

import torch

from trinity.base.errors import DataError, RequestError
from trinity.base.seeds import named_seed
from trinity.engine.cache import KVCache
from trinity.engine.grammar import Matcher, matcher_of
from trinity.engine.request import FinishReason, Piece, Request, TokenLogprob
from trinity.engine.sampler import choose, logprobs_of
from trinity.engine.stopping import StopFinder
from trinity.model.transformer import Transformer
from trinity.text.tokenizer import StreamDecoder, Tokenizer

CHUNK_TOKENS = 512  # of a prompt read in one step; other requests wait no longer than that
SCORED_ROWS = 64  # of logits at once: with 200,000 entries a row, 51 MB


class Sequence:
    """One active request and all it holds: its cache, its answer so far, its randomness."""

    def __init__(
        self, request_id: int, request: Request, model: Transformer, tokenizer: Tokenizer, matcher: Matcher | None
    ) -> None:
        self.id = request_id
        self.prompt = list(request.prompt)
        self.sampling = request.sampling
        self.answer: list[int] = []
        self.cache = KVCache(model.config, CHUNK_TOKENS)
        self.decoder = StreamDecoder(tokenizer)
        self.stops = StopFinder(request.sampling.stop)
        self.matcher = matcher  # of the constraint, if there is one
        self.prompt_logprobs: list[TokenLogprob] = []
        seed = request.sampling.seed
        root = secrets.randbits(62) if seed is None else seed
        self.draw = torch.Generator().manual_seed(named_seed(root, "sample"))
        room = model.config.max_position_embeddings - len(self.prompt)
        self.most_tokens = min(request.sampling.max_new_tokens, room)

    def unread(self) -> list[int]:
        """What the next forward pass reads: the next chunk of the prompt, or the newest token of the answer."""
        if self.cache.tokens < len(self.prompt):
            return self.prompt[self.cache.tokens : self.cache.tokens + CHUNK_TOKENS]
        return self.answer[-1:]

    def piece(
        self,
        text: str = "",
        token: int | None = None,
        logprobs: list[TokenLogprob] | None = None,
        finish_reason: FinishReason | None = None,
    ) -> Piece:
        """What this step adds; the log-probabilities of the prompt go along with the first."""
        about_prompt, self.prompt_logprobs = self.prompt_logprobs, []
        return Piece(
            request_id=self.id,
            text=text,
            token_ids=() if token is None else (token,),
            logprobs=tuple(logprobs or ()),
            prompt_logprobs=tuple(about_prompt),
            finish_reason=finish_reason,
        )


class Engine:
    """Answers up to `max_active` requests at once; further ones wait in the order they came."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, end_ids: frozenset[int], max_active: int = 8) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.end_ids = end_ids  # an answer ends before any of these
        self.max_active = max_active
        self.device = model.embed_tokens.weight.device
        self.active: dict[int, Sequence] = {}
        self.waiting: deque[tuple[int, Request]] = deque()
        self._ids = count()

    @property
    def busy(self) -> bool:
        return bool(self.active or self.waiting)

    def kv_bytes(self) -> int:
        """Bytes that the caches of all active requests hold."""
        return sum(sequence.cache.bytes_held() for sequence in self.active.values())

    def check(self, request: Request) -> None:
        """RequestError where this model cannot serve the request.

        That is an empty or too long prompt, an unknown token, a constraint that no answer can meet.
        """
        context, length = self.model.config.max_position_embeddings, len(request.prompt)
        vocabulary = self.model.config.vocab_size
        if not request.prompt:
            raise RequestError("The prompt is empty.", "Give at least one token.")
        if length > context - (request.sampling.max_new_tokens > 0):
            raise RequestError(
                f"The prompt has {length} tokens; the model's context holds {context}, the answer included.",
                "Shorten the prompt.",
            )
        for what, tokens in (("The prompt", request.prompt), ("logit_bias", request.sampling.logit_bias)):
            for token in tokens:
                if not 0 <= token < vocabulary:
                    raise RequestError(f"{what} names token {token}.", f"Token ids lie between 0 and {vocabulary - 1}.")
        self._matcher(request)

    def _matcher(self, request: Request) -> Matcher | None:
        """Of the request's constraint; RequestError for one that cannot be held to."""
        return matcher_of(request.sampling, self.tokenizer, self.end_ids, self.model.config.vocab_size)

    def submit(self, request: Request) -> int:
        """Queue a request; its pieces carry the returned id. Raises RequestError (see `check`)."""
        self.check(request)
        request_id = next(self._ids)
        self.waiting.append((request_id, request))
        return request_id

    def abort(self, request_id: int) -> Piece | None:
        """End a request now and free all it holds. Returns its last piece (what was held back), or None if unknown."""
        sequence = self.active.pop(request_id, None)
        if sequence is not None:
            return sequence.piece(sequence.stops.rest() + sequence.decoder.finish(), finish_reason="abort")
        for entry in self.waiting:
            if entry[0] == request_id:
                self.waiting.remove(entry)
                return Piece(request_id=request_id, finish_reason="abort")
        return None

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Advance every active request by one forward pass. A request that ended has freed everything it held."""
        while self.waiting and len(self.active) < self.max_active:
            request_id, request = self.waiting.popleft()
            self.active[request_id] = Sequence(request_id, request, self.model, self.tokenizer, self._matcher(request))
        pieces = []
        for sequence in list(self.active.values()):
            try:
                piece = self._advance(sequence)
            except RequestError as error:
                piece = Piece(request_id=sequence.id, finish_reason="error", error=error)
            if piece is not None:
                pieces.append(piece)
                if piece.finish_reason is not None:
                    del self.active[sequence.id]
        return pieces

    def _advance(self, sequence: Sequence) -> Piece | None:
        """One forward pass; a piece once the prompt is read."""
        start = sequence.cache.tokens
        tokens = torch.tensor([sequence.unread()], device=self.device)
        positions = torch.arange(start, start + tokens.shape[1], device=self.device)
        hidden = self.model(tokens, positions, sequence.cache).hidden[0]  # [T, D]
        if sequence.sampling.prompt_logprobs is not None and not sequence.answer:
            self._score_prompt(sequence, hidden, start)
        if sequence.cache.tokens < len(sequence.prompt):
            return None
        if sequence.most_tokens == 0:
            return sequence.piece(finish_reason="length")
        return self._add(sequence, self._logits(hidden[-1:])[0])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, D] -> logits [T, V] float32 on the CPU. RequestError when they are not finite."""
        logits = self.model.head(hidden).cpu()
        if not bool(logits.isfinite().all()):
            raise RequestError(
                "The model's output for this text is not finite.",
                "Its weights are damaged or overflow in this precision: verify the model, or load it in float32.",
            )
        return logits

    def _add(self, sequence: Sequence, logits: torch.Tensor) -> Piece:
        """Draw the next token from logits [V] and add it to the answer, or end the answer."""
        sampling = sequence.sampling
        row = logits  # the model's own stay as they are, for the log-probabilities
        if sequence.matcher is not None:
            sequence.matcher.mask(row := logits.clone())
        token = choose(row, sampling, sequence.prompt, sequence.answer, sequence.draw)
        if token in self.end_ids or token in sampling.stop_token_ids:
            return sequence.piece(self._last_text(sequence), finish_reason="stop")
        sequence.answer.append(token)
        if sequence.matcher is not None:
            sequence.matcher.accept(token)
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = logprobs_of(logits[None], torch.tensor([token]), sampling.logprobs)
        text = sequence.stops.push(sequence.decoder.push(token))
        if sequence.stops.found:
            return sequence.piece(text, token, logprobs, "stop")
        whole = sequence.matcher is not None and sequence.matcher.finished
        if whole or len(sequence.answer) == sequence.most_tokens:
            text += self._last_text(sequence)
            return sequence.piece(text, token, logprobs, "stop" if whole or sequence.stops.found else "length")
        return sequence.piece(text, token, logprobs)

    def _last_text(self, sequence: Sequence) -> str:
        """What the decoder and the stop finder still hold when no token follows."""
        return sequence.stops.push(sequence.decoder.finish()) + sequence.stops.rest()

    def _score_prompt(self, sequence: Sequence, hidden: torch.Tensor, start: int) -> None:
        """Note the log-probabilities of the prompt tokens that follow the chunk at `start`; hidden [T, D]."""
        targets = sequence.prompt[start + 1 : start + 1 + len(hidden)]
        top = sequence.sampling.prompt_logprobs or 0
        for place in range(0, len(targets), SCORED_ROWS):
            part = torch.tensor(targets[place : place + SCORED_ROWS])
            logits = self._logits(hidden[place : place + len(part)])
            sequence.prompt_logprobs += logprobs_of(logits, part, top)


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
