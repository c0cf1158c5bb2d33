"""What clients may send: the OpenAI request types, in the part this server honours.

A field it does not honour is refused by name rather than ignored, save those that ask for nothing (HARMLESS, NEUTRAL).
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trinity.engine.request import MOST_TOP_LOGPROBS, Constraint, SamplingParams, constraint_of
from trinity.serve.errors import ApiError

MOST_CHOICES = 16  # n
MOST_PROMPTS = 256  # in one /v1/completions request
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 512
ANY_OBJECT = {"type": "object"}

# Labels for the provider's own bookkeeping; nothing in the answer could depend on them.
HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
# Values of unsupported fields that ask for what happens anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
    "annotations": ([],),
}

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopText = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]


class Sent(BaseModel):
    """Strict types, no unknown fields; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def without_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if value is not None
            and (name in cls.model_fields or (name not in HARMLESS and value not in NEUTRAL.get(name, ())))
        }


class StreamOptions(Sent):
    include_usage: bool = False


class SchemaSent(Sent):
    """The schema is kept to in any case: `strict` asks for what happens."""

    schema_: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Sent):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaSent | None = None

    def form(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"json_schema": ANY_OBJECT} if self.type == "json_object" else {}
        if self.json_schema is None:
            raise ApiError(400, "'response_format' has no 'json_schema'.", "response_format")
        return {"json_schema": self.json_schema.schema_}


class StructuredOutputs(Sent):
    """vLLM's extension, one of: a JSON schema, any JSON object, a regular expression, a choice of texts, a grammar."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None  # in Lark's notation

    def form(self) -> dict[str, Any]:
        if len(self.model_fields_set) != 1:
            raise ApiError(400, "'structured_outputs' must name one form, and one alone.", "structured_outputs")
        if self.choice:
            return {"grammar": "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in self.choice)}
        schema = ANY_OBJECT if self.json_object else self.json_
        return {"json_schema": schema, "regex": self.regex, "grammar": self.grammar}


class Asked(Sent):
    """What both endpoints take: sampling, endings, number of choices, streaming."""

    model: str
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Int64 | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    after_think: bool = False
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    stream: bool = False
    stream_options: StreamOptions | None = None

    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, defaults: dict[str, Any], **more: Any) -> SamplingParams:
        """SamplingParams: what was sent, else the model's own `defaults`. Raises RequestError out of range."""
        values: dict[str, Any] = {"temperature": 1.0} | defaults
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        values["top_k"] = max(0, values.get("top_k", 0))  # -1 is another spelling of all
        for name in ("presence_penalty", "frequency_penalty", "seed"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        return SamplingParams(
            **values,
            logit_bias=self._logit_bias(),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            constraint=self._constraint(),
            **more,
        )

    @property
    def form_field(self) -> str | None:
        """The field that holds the answer to a form, if one does."""
        if self.structured_outputs is not None:
            return "structured_outputs"
        return "response_format" if self.response_format and self.response_format.form() else None

    def _constraint(self) -> Constraint | None:
        if self.form_field is None and self.after_think:
            raise ApiError(400, "'after_think' needs a 'response_format' or 'structured_outputs'.", "after_think")
        form = self.response_format.form() if self.response_format is not None else {}
        if self.structured_outputs is not None:
            if form:
                raise ApiError(400, "'response_format' and 'structured_outputs' are both given.", "structured_outputs")
            form = self.structured_outputs.form()
        return constraint_of(**form, after_think=self.after_think)

    def _logit_bias(self) -> dict[int, float]:
        """JSON keys are strings; here they must be token ids."""
        try:
            return {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise ApiError(400, "A key of 'logit_bias' is not a token id.", "logit_bias") from error


class CompletionAsked(Asked):
    prompt: (
        str
        | list[TokenId]
        | Annotated[list[str], Field(max_length=MOST_PROMPTS)]
        | Annotated[list[list[TokenId]], Field(max_length=MOST_PROMPTS)]
    )
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: a text or token ids. An empty list of prompts is refused."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(400, "The field 'prompt' is an empty list.", "prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Sent):
    type: Literal["text"]
    text: str


class MessageSent(Sent):
    role: str
    content: str | list[TextPart] = ""

    def plain(self) -> dict[str, str]:
        """The message as the chat template takes it. 'developer' is the newer name of 'system'."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatAsked(Asked):
    messages: list[MessageSent]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None

    def top(self) -> int | None:
        """Likeliest tokens to list at each place; None for no log-probabilities at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None
