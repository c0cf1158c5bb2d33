"""Conversations as tokens (ChatML): one function for fine-tuning and for the server, so that they cannot differ.

    <|begin_of_text|><|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi!<|im_end|>\\n

Marks are ids put between the texts; a message that contains the characters '<|im_end|>' gets ordinary ids for them and
cannot end its own turn. chat_template.jinja is the same format for other engines. They encode header and content in one
go, so ids differ from ours where a content begins with a line break (it would merge with the header's); and they read
marks inside a content as marks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from trinity.base.errors import RequestError, nearest
from trinity.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class RenderedChat:
    """`mask` is true at the tokens an assistant has to produce: its content and the <|im_end|> that closes it."""

    tokens: list[int]
    mask: list[bool]


def render(messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool) -> RenderedChat:
    """Tokens of a conversation, the begin mark first; with `add_generation_prompt` an assistant's turn is opened.

    Raises RequestError for an unknown role, a missing or empty content, or no message at all.
    """
    check_messages(messages)
    line_break = tokenizer.encode("\n")
    tokens, mask = [tokenizer.bos_id], [False]
    for message in messages:
        header = [tokenizer.im_start_id, *tokenizer.encode(f"{message['role']}\n")]
        content = [*tokenizer.encode(message["content"]), tokenizer.im_end_id]
        tokens += header + content + line_break
        mask += [False] * len(header) + [message["role"] == "assistant"] * len(content) + [False] * len(line_break)
    if add_generation_prompt:
        opening = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
        tokens += opening
        mask += [False] * len(opening)
    return RenderedChat(tokens, mask)


def check_messages(messages: Sequence[Message]) -> None:
    """RequestError naming the first message that a conversation cannot hold."""
    if not messages:
        raise RequestError("The conversation is empty.", "Give at least one message.")
    for place, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RequestError(f"messages[{place}] has the role {role!r}.", nearest(str(role), list(ROLES)))
        if not isinstance(content, str) or not content:
            raise RequestError(f"messages[{place}] ({role}) has no content.", "Give it a text that is not empty.")


def jinja_template() -> str:
    """The chat template for tokenizer folders that other engines read."""
    return files("trinity.text").joinpath("chat_template.jinja").read_text(encoding="utf-8")
