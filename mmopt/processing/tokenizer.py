"""The tokenizer of a model with its marks: text to ids and back, whole and in pieces."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mmopt.processing.chat_template import ChatTemplate
from mmopt.processing.sentencepiece import convert_sentencepiece, prove_equal
from mmopt.spec.model_info import ModelInfo


class TextProcessor:
    """Text to token ids and back, with images as marks in the text.

    tokenizer: gets each stretch of text between marks on its own, as ordinary text: a special token typed by a user is
        not recognised in it (encode_special_tokens of the tokenizer is switched on).
    image_marker, image_id: the text that stands for an image, and the id put in its place (it need not be in the
        vocabulary, e.g. -200).
    bos_id: put once at the start of the ids, or None.
    eos_ids: ids that end an answer.
    marks: more texts that become one id each, such as {"</s>": 2} where a chat template closes answers with it.
    template: the texts of a chat template. Special tokens and ends of answers that stand in it are marks too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_marker: str,
        image_id: int,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
        marks: Mapping[str, int] | None = None,
        template: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.image_marker = image_marker
        self.image_id = image_id
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        added = tokenizer.get_added_tokens_decoder()
        named = {token.content: i for i, token in added.items() if token.special}
        named |= {text: i for i in self.eos_ids if (text := tokenizer.id_to_token(i))}
        written = {text: i for text, i in named.items() if text and text in template}
        self.marks = {**written, image_marker: image_id, **(marks or {})}
        if "" in self.marks:
            raise ValueError("the image marker and the marks must not be empty")
        tokenizer.encode_special_tokens = True
        longest_first = sorted(self.marks, key=len, reverse=True)
        self._mark_pattern = re.compile("(" + "|".join(re.escape(mark) for mark in longest_first) + ")")
        self._hidden_ids = {image_id, bos_id, *self.eos_ids, *(i for i, token in added.items() if token.special)}

    @classmethod
    def from_file(cls, path: str | Path, **kw: Any) -> TextProcessor:
        """Read a tokenizer.json file; kw are the other arguments of the class.

        Raises FileNotFoundError, or ValueError if the file is not a tokenizer.
        """
        text = Path(path).read_bytes()
        try:
            tokenizer = Tokenizer.from_buffer(text)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path}: not a readable tokenizer.json: {error}") from error
        return cls(tokenizer, **kw)

    @classmethod
    def of_model(cls, path: str | Path, info: ModelInfo, chat: ChatTemplate) -> TextProcessor:
        """Read a tokenizer.json file with the marks of a model's facts and chat template; errors as `from_file`."""
        return cls.from_file(
            path,
            image_marker=info.image_marker,
            image_id=info.image_id,
            bos_id=info.bos_id,
            eos_ids=tuple(info.eos_ids),
            template=" ".join(str(x) for x in chat.to_json().values()),
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with image_id at each image marker."""
        ids = [] if self.bos_id is None else [self.bos_id]
        for piece in self._mark_pattern.split(text):
            if piece in self.marks:
                ids.append(self.marks[piece])
            else:
                ids.extend(self.tokenizer.encode(piece, add_special_tokens=False).ids)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, without special tokens and images."""
        return self.tokenizer.decode([int(i) for i in ids if not self.is_hidden(i)], skip_special_tokens=True)

    def is_hidden(self, token_id: int) -> bool:
        """Return whether an id has no text: an image or a special token."""
        return int(token_id) in self._hidden_ids

    def stream(self) -> TextStream:
        """Return a new decoder for ids that come one at a time."""
        return TextStream(self)


class TextStream:
    """Decodes ids one at a time. The pieces of text, joined, are exactly decode() of all ids."""

    def __init__(self, processor: TextProcessor) -> None:
        self._processor = processor
        # Only the latest ids are decoded again for each new one: the context is already emitted, the rest is not.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is now certain; "" while a character is incomplete."""
        if self._processor.is_hidden(token_id):
            return ""
        self._pending.append(int(token_id))
        token = self._processor.tokenizer.id_to_token(int(token_id))
        # A run of byte tokens is decoded as a whole: a later byte can turn all of it into replacement characters.
        if token is not None and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return ""
        new = self._new_text()
        if new.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._emit(new)

    def flush(self) -> str:
        """Return the text still held back. Call it after the last id."""
        return self._emit(self._new_text())

    def _new_text(self) -> str:
        before = self._processor.decode(self._context)
        return self._processor.decode(self._context + self._pending)[len(before) :]

    def _emit(self, new: str) -> str:
        # Leading spaces are stripped from a whole text, so a context needs a visible character before the next piece
        # can be decoded after it as it would be after everything.
        if new.strip():
            self._context = self._pending
        else:
            self._context = self._context + self._pending
        self._pending = []
        return new


def image_prompt_ids(text: TextProcessor, template: ChatTemplate, prompt: str) -> list[int]:
    """Ids of a text to paint, with one more whose place the picture takes."""
    ids = text.encode(template.render([{"role": "user", "content": prompt}], painting=True))
    return [*ids, ids[0]]


def write_tokenizer(source: str | None, text: str | None, directory: Path) -> str | None:
    """Put tokenizer.json into a directory: `text`, or that of the directory `source`, or its tokenizer.model converted.

    A converted one is proved to give the same ids. Returns the name of the file, None if there is no tokenizer.
    """
    made = directory / "tokenizer.json"
    if text:
        made.write_text(text)
        return made.name
    if source is None:
        return None
    ready, model = Path(source) / "tokenizer.json", Path(source) / "tokenizer.model"
    if ready.is_file():
        shutil.copyfile(ready, made)
    elif model.is_file():
        tokenizer = convert_sentencepiece(model)
        prove_equal(model, tokenizer)
        tokenizer.save(str(made))
    else:
        return None
    return made.name
