"""Answers in the OpenAI response shapes, as JSON-ready dicts: choices, log-probabilities, usage."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from trinity.engine.request import Piece, Request, TokenLogprob
from trinity.text.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Head:
    """What all chunks of one answer share."""

    kind: str  # 'chat.completion' or 'text_completion'
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex}"

    def body(self, choices: list[dict[str, Any]], chunk: bool = False, **more: Any) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if chunk and self.kind == "chat.completion" else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}


class Usage:
    """Tokens of an answer; a prompt counts once however many choices it has."""

    def __init__(self, requests: list[Request], choices_each: int) -> None:
        self.prompts = sum(len(request.prompt) for request in requests[::choices_each])
        self.choices_each = choices_each
        self.generated = 0
        self.cached: dict[int, int] = {}  # of each prompt, tokens that were not read again

    def add(self, place: int, piece: Piece) -> None:
        self.generated += len(piece.token_ids)
        if place % self.choices_each == 0:
            self.cached[place] = piece.cached_tokens

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompts,
            "completion_tokens": self.generated,
            "total_tokens": self.prompts + self.generated,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


class LegacyLogprobs:
    """The log-probabilities of one /v1/completions choice: four parallel lists, offsets in characters of its text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = StreamDecoder(tokenizer)
        self.offset = 0

    def unscored(self, token: int) -> dict[str, list[Any]]:
        """The first token of an echoed prompt: nothing precedes it, so it has no log-probability."""
        return self._lists([(token, None, None)])

    def scored(self, entries: tuple[TokenLogprob, ...]) -> dict[str, list[Any]]:
        name = self.tokenizer.token_name
        return self._lists(
            [
                (
                    entry.token_id,
                    entry.logprob,
                    {name(token): value for token, value in (*entry.top, (entry.token_id, entry.logprob))}
                    if entry.top
                    else None,
                )
                for entry in entries
            ]
        )

    def _lists(self, rows: list[tuple[int, float | None, dict[str, float] | None]]) -> dict[str, list[Any]]:
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, top in rows:
            lists["tokens"].append(self.tokenizer.token_name(token))
            lists["token_logprobs"].append(logprob)
            lists["top_logprobs"].append(top)
            lists["text_offset"].append(self.offset)
            self.offset += len(self.decoder.push(token))
        return lists


def joined(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Legacy log-probabilities of successive stretches of one text."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [value for part in parts for value in part[name]] for name in names}


def chat_logprobs(entries: tuple[TokenLogprob, ...], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One entry a token: its text, its bytes (a token may be part of a character), and the likeliest at its place."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        return {"token": tokenizer.token_name(token), "logprob": logprob, "bytes": list(tokenizer.piece(token))}

    return [
        shown(entry.token_id, entry.logprob) | {"top_logprobs": [shown(token, value) for token, value in entry.top]}
        for entry in entries
    ]


class CompletionShape:
    """Turns pieces into /v1/completions choices. With `echo` the prompt comes first, with its log-probabilities."""

    def __init__(
        self, requests: list[Request], texts: list[str], tokenizer: Tokenizer, echo: bool, logprobs: bool
    ) -> None:
        self.requests = requests
        self.texts = texts  # of the prompts, for echo
        self.echo = echo
        self.with_logprobs = logprobs
        self.legacy = [LegacyLogprobs(tokenizer) for _ in requests]
        self.begun: set[int] = set()

    def choice(self, place: int, piece: Piece) -> dict[str, Any]:
        """The part of choice `place` that a piece brings; streaming chunks and whole answers share it."""
        text, parts = piece.text, []
        if place not in self.begun:
            self.begun.add(place)
            if self.echo:
                text = self.texts[place] + text
                parts.append(self.legacy[place].unscored(self.requests[place].prompt[0]))
                parts.append(self.legacy[place].scored(piece.prompt_logprobs))
        parts.append(self.legacy[place].scored(piece.logprobs))
        return {
            "index": place,
            "text": text,
            "logprobs": joined(parts) if self.with_logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def whole(self, place: int, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "index": place,
            "text": "".join(part["text"] for part in parts),
            "logprobs": joined([part["logprobs"] for part in parts]) if self.with_logprobs else None,
            "finish_reason": parts[-1]["finish_reason"],
        }


class ChatShape:
    """Turns pieces into /v1/chat/completions choices; the first chunk of each names the role."""

    def __init__(self, tokenizer: Tokenizer, logprobs: bool) -> None:
        self.tokenizer = tokenizer
        self.with_logprobs = logprobs
        self.begun: set[int] = set()

    def choice(self, place: int, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
        if place not in self.begun:
            self.begun.add(place)
            delta = {"role": "assistant", "content": piece.text}
        logprobs = {"content": chat_logprobs(piece.logprobs, self.tokenizer)} if self.with_logprobs else None
        return {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def whole(self, place: int, parts: list[dict[str, Any]]) -> dict[str, Any]:
        content = "".join(part["delta"].get("content", "") for part in parts)
        logprobs = (
            {"content": [entry for part in parts for entry in part["logprobs"]["content"]]}
            if self.with_logprobs
            else None
        )
        return {
            "index": place,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": parts[-1]["finish_reason"],
        }


Shape = CompletionShape | ChatShape
