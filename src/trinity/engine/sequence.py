"""One request on its way: its text so far, what of it the model has read, and all it holds."""

import secrets

import torch

from trinity.base.seeds import named_seed
from trinity.engine.drafts import Drafts
from trinity.engine.grammar import Matcher
from trinity.engine.request import FinishReason, Piece, Request, TokenLogprob
from trinity.engine.stopping import StopFinder
from trinity.text.tokenizer import StreamDecoder, Tokenizer


class Sequence:
    """Keys and values of its first `read` tokens lie in `pages` and `ring`; the rest of its text is to be read."""

    def __init__(
        self, request_id: int, request: Request, context: int, tokenizer: Tokenizer, matcher: Matcher | None
    ) -> None:
        self.id = request_id
        self.client = request.client
        self.salt = request.cache_salt
        self.prompt = list(request.prompt)
        self.sampling = request.sampling
        self.answer: list[int] = []
        self.most_tokens = min(request.sampling.max_new_tokens, context - len(self.prompt))
        self.read = 0
        self.pages: list[int] = []
        self.ring: list[int] = []
        self.keys: list[bytes] = []  # of its full pages, as the prefix cache names them
        self.kept = 0  # of its full pages, known to the prefix cache
        self.marks: set[int] = set()  # full pages after which a window is worth keeping
        self.cached_tokens = 0  # of the prompt, found in the prefix cache when it first read
        self.begun = False
        self.reads = False  # since its admission: what is known of its beginning was looked up
        self.decoder = StreamDecoder(tokenizer)
        self.stops = StopFinder(request.sampling.stop)
        self.matcher = matcher
        self.plain = matcher is None and request.sampling.plain
        self.drafts = Drafts()
        self.prompt_logprobs: list[TokenLogprob] = []
        self.scored = 1  # tokens of the prompt whose log-probability is known, the first having none
        seed = request.sampling.seed
        self.draw = torch.Generator().manual_seed(named_seed(secrets.randbits(62) if seed is None else seed, "sample"))

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def unread(self) -> int:
        return self.length - self.read

    @property
    def scores(self) -> bool:
        """Whether the log-probabilities of its prompt are still wanted."""
        return self.sampling.prompt_logprobs is not None and self.scored < len(self.prompt)

    def tokens(self, start: int, count: int) -> list[int]:
        """Of the text, `count` from `start` on."""
        split = len(self.prompt)
        if start >= split:
            return self.answer[start - split : start - split + count]
        return self.prompt[start : start + count] + self.answer[: max(0, start + count - split)]

    def piece(
        self,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        finish_reason: FinishReason | None = None,
    ) -> Piece:
        """What a step adds; the log-probabilities of the prompt go along with the first."""
        about_prompt, self.prompt_logprobs = self.prompt_logprobs, []
        return Piece(
            request_id=self.id,
            text=text,
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=tuple(about_prompt),
            cached_tokens=self.cached_tokens,
            finish_reason=finish_reason,
        )

    def last_text(self) -> str:
        """What the decoder and the stop finder still hold when no token follows."""
        return self.stops.push(self.decoder.finish()) + self.stops.rest()
