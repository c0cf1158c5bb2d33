"""Text to token ids and back: byte-level BPE of the Trinity family, and decoding one token at a time for streaming.

Ids 0..31 are the added tokens (document and chat marks), 32..287 the bytes, the rest merges. `encode` treats its text
as data: a document that contains the characters '<|im_end|>' gets ordinary ids for them. Only `encode_with_special`,
meant for chat templates of our own making, turns such strings into the ids they name.

Whether a text that a model is to continue begins with the begin mark is the file's to say, in its post-processor: other
programs read it there. The tokenizers that we train say so; the published one, as far as it is known, does not.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from trinity.base.durable import write_durably
from trinity.base.errors import DataError, nearest

FILE = "tokenizer.json"
BEGIN_OF_TEXT, END_OF_TEXT = "<|begin_of_text|>", "<|end_of_text|>"
IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
REQUIRED = (BEGIN_OF_TEXT, END_OF_TEXT, IM_START, IM_END, PAD)


def byte_of_character() -> dict[str, int]:
    """The printable stand-in of each byte in a byte-level vocabulary: bytes that print stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_CHARACTER = byte_of_character()


class Tokenizer:
    """A loaded tokenizer.json. Equal files give equal ids on every machine; `fingerprint` names the file."""

    def __init__(self, source: str, name: str) -> None:
        """`source` is the text of a tokenizer.json, `name` what to call it in an error. Raises DataError."""
        self._source = source
        try:
            parts = json.loads(source)
            added = {entry["content"]: entry for entry in parts.pop("added_tokens")}
            if parts["model"]["type"] != "BPE" or (parts["decoder"] or {}).get("type") != "ByteLevel":
                raise DataError(f"{name} is not a byte-level BPE tokenizer.", "Use one of the Trinity family.")
            # Without its added tokens the library cannot mistake a document's characters for a mark.
            self._bpe = tokenizers.Tokenizer.from_str(json.dumps(parts | {"added_tokens": []}))
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(
                f"{name} is not a tokenizer.json: {' '.join(str(error).split())[:200]}.", "Give another file."
            ) from error
        self._added: dict[str, int] = {content: entry["id"] for content, entry in added.items()}
        self._name_of_added = {id: content for content, id in self._added.items()}
        self._control = {entry["id"] for entry in added.values() if entry["special"]}
        self._pieces: dict[int, bytes] = {}
        for required in REQUIRED:
            if required not in self._added:
                raise DataError(f"{name} has no token '{required}'.", "Use a tokenizer of the Trinity family.")
        longest_first = sorted(self._added, key=len, reverse=True)
        self._marks = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @staticmethod
    def load(path: Path | str) -> "Tokenizer":
        """Read a tokenizer.json, or the one in a folder. Raises DataError when there is none or it is another kind."""
        file = Path(path)
        if file.is_dir():
            file = file / FILE
        try:
            source = file.read_bytes().decode("utf-8")
        except FileNotFoundError as error:
            raise DataError(
                f"There is no tokenizer at {file}.", "Give a tokenizer.json or a folder that holds one."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as a tokenizer: {error}.", "Give another file.") from error
        return Tokenizer(source, str(file))

    def save(self, path: Path | str) -> Path:
        """Write the very bytes this tokenizer was made from, to a .json file or into a folder; returns the file."""
        file = Path(path) if Path(path).suffix == ".json" else Path(path) / FILE
        write_durably(file, self._source)
        return file

    def sections(self) -> dict[str, Any]:
        """What the file holds, for a program with a format of its own."""
        return json.loads(self._source)

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 digits of the sha256 of the file, whether or not it has programs put the mark before a text."""
        return hashlib.sha256(self._source.replace(self._adds_begin_mark, "null", 1).encode()).hexdigest()[:16]

    @cached_property
    def begins_texts(self) -> bool:
        """Whether the file has programs put the begin mark before a text."""
        return self._bpe.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    def with_begin_mark(self) -> "Tokenizer":
        """The same tokenizer with a file that does so: where it had no post-processor, not another byte changes."""
        if self.begins_texts:
            return self
        none = r'(?<!\\)("post_processor"\s*:\s*)null'
        source, found = re.subn(none, lambda match: match[1] + self._adds_begin_mark, self._source, count=1)
        if not found:
            parts = json.loads(self._source) | {"post_processor": json.loads(self._adds_begin_mark)}
            source = json.dumps(parts, ensure_ascii=False)
        return Tokenizer(source, "the tokenizer")

    @cached_property
    def _adds_begin_mark(self) -> str:
        """The post-processor that puts the begin mark before a text, as we write it."""
        mark = {"SpecialToken": {"id": BEGIN_OF_TEXT, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        ids = {"id": BEGIN_OF_TEXT, "ids": [self.bos_id], "tokens": [BEGIN_OF_TEXT]}
        kind = {"type": "TemplateProcessing", "single": [mark, first], "pair": [mark, first, mark, second]}
        return json.dumps(kind | {"special_tokens": {BEGIN_OF_TEXT: ids}})

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(max(self._bpe.get_vocab(with_added_tokens=False).values(), default=-1), *self._added.values())

    def id_of(self, name: str) -> int:
        """The id of an added token by its exact string. Raises DataError for one this tokenizer does not have."""
        if name not in self._added:
            raise DataError(f"The tokenizer has no token '{name}'.", nearest(name, list(self._added)))
        return self._added[name]

    @property
    def added_tokens(self) -> dict[str, int]:
        return dict(self._added)

    @cached_property
    def bos_id(self) -> int:
        return self._added[BEGIN_OF_TEXT]

    @cached_property
    def eos_id(self) -> int:
        """The end of a document (<|end_of_text|>); a chat turn ends with `im_end_id`."""
        return self._added[END_OF_TEXT]

    @cached_property
    def im_start_id(self) -> int:
        return self._added[IM_START]

    @cached_property
    def im_end_id(self) -> int:
        return self._added[IM_END]

    @cached_property
    def pad_id(self) -> int:
        return self._added[PAD]

    def encode(self, text: str) -> list[int]:
        """Ids of a text taken as data; no begin or end mark is added. Raises DataError for half a surrogate pair."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        try:
            return [found.ids for found in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            for text in texts:
                refuse_surrogates(text)
            raise AssertionError("the tokenizer was given something other than text") from error

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of a text in which the strings of added tokens become their ids. For templates, never for user text."""
        parts = self._marks.split(text)  # ordinary text at even places, marks at odd ones
        ordinary = iter(self.encode_batch(parts[::2]))
        ids = next(ordinary)
        for mark, following in zip(parts[1::2], ordinary, strict=True):
            ids += [self._added[mark], *following]
        return ids

    def piece(self, id: int) -> bytes:
        """The bytes one id stands for: none for control marks and for padding rows that have no entry."""
        found = self._pieces.get(id)
        if found is None:
            found = self._pieces[id] = self._spell(id)
        return found

    def _spell(self, id: int) -> bytes:
        if id in self._name_of_added:
            return b"" if id in self._control else self._name_of_added[id].encode()
        token = self._bpe.id_to_token(id) if id >= 0 else None
        return b"" if token is None else bytes(BYTE_OF_CHARACTER[character] for character in token)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.piece, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without control marks; bytes that are not UTF-8 become U+FFFD. decode(encode(text)) == text."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_name(self, id: int) -> str:
        """One id as a person may read it: a mark by its name, anything else by its text."""
        return self._name_of_added.get(id) or self.piece(id).decode("utf-8", "replace")


class StreamDecoder:
    """Decodes one id at a time and never emits part of a character.

    The texts of all `push` calls and of `finish`, joined, are `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes: Any = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that are complete with this id; often one piece, sometimes nothing yet."""
        return self._bytes.decode(self._tokenizer.piece(id))

    def finish(self) -> str:
        """What is left when no id follows: U+FFFD for a character that was never completed."""
        return self._bytes.decode(b"", final=True)


def refuse_surrogates(text: str) -> None:
    """Raise DataError for text that has no UTF-8 form (a lone half of a surrogate pair, as JSON escapes can make)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"Character {error.start} of the text is half of a surrogate pair and has no UTF-8 form.",
            "Remove it, or write the whole character.",
        ) from error
