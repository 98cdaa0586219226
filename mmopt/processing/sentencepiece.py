"""Conversion of sentencepiece models to the `tokenizers` library.

The rules followed here are those of the sentencepiece source (normalizer.cc, bpe_model.cc, unigram_model.cc,
sentencepiece_processor.cc). `prove_equal` compares a conversion with sentencepiece itself.
"""

import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

SPACE = "▁"  # U+2581: sentencepiece writes a space as this character

# Private use characters (plane 16) that stand for a piece or a character of the model inside the tokenizer. Only a text
# that itself holds one of them is tokenised differently than by sentencepiece.
FIRST_STAND_IN = 0x10F000


def convert_sentencepiece(path: str | Path) -> Tokenizer:
    """Convert a sentencepiece BPE or Unigram `tokenizer.model` to a Tokenizer that gives the same ids.

    Control and unknown pieces become special tokens: left out when decoding and, as in sentencepiece, not recognised
    in a text. `tokenizers` does not store the latter in tokenizer.json: after loading such a file set
    `tokenizer.encode_special_tokens = True` (mmopt.processing.tokenizer.TextProcessor does).

    Differences remain, and prove_equal finds out whether they matter for a model. One with its own character
    normalisation (such as nmt_nfkc) is converted with the `Precompiled` normaliser, which differs on "\\r\\n" and on
    long sequences of combining characters. Unigram scores are added in float64, by sentencepiece in float32, so that
    among segmentations of equal score (as of a long run of one character) another can be chosen.

    Raises ImportError without sentencepiece or protobuf, FileNotFoundError, and ValueError if the file is not a
    sentencepiece model or uses what `tokenizers` cannot do.
    """
    proto, _ = _load(path)
    piece_type = type(proto.pieces[0])
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(f"{path}: treat_whitespace_as_suffix is not supported")
    unused = [p.piece for p in proto.pieces if p.type == piece_type.UNUSED]
    if unused:
        raise ValueError(f"{path}: unused pieces are not supported, found {unused[0]!r} and {len(unused) - 1} more")

    # Longer symbols come first, as sentencepiece takes the longest that matches.
    user_defined = sorted((p.piece for p in proto.pieces if p.type == piece_type.USER_DEFINED), key=len, reverse=True)
    symbols = {symbol: chr(FIRST_STAND_IN + i) for i, symbol in enumerate(user_defined)}

    model_type = proto.trainer_spec.model_type
    if model_type == proto.trainer_spec.BPE:
        # sentencepiece takes user-defined symbols out of the text before it merges characters. One private character
        # in the place of a symbol does the same: no merge contains it.
        stand_ins = symbols
        model = _bpe(proto, stand_ins)
    elif model_type == proto.trainer_spec.UNIGRAM:
        # Unigram of tokenizers finds every entry of its vocabulary in a text, "</s>" and "<0x0A>" too. In the text
        # and in the other pieces a private character replaces the first one of such names, so they are never found.
        reserved = [p.piece for p in proto.pieces if p.type not in (piece_type.NORMAL, piece_type.USER_DEFINED)]
        start = FIRST_STAND_IN + len(symbols)
        stand_ins = {c: chr(start + i) for i, c in enumerate(sorted({piece[0] for piece in reserved}))}
        model = _unigram(proto, stand_ins)
    else:
        raise ValueError(f"{path}: only BPE and Unigram models are supported, found model type {model_type}")

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(proto.normalizer_spec, symbols, stand_ins)
    tokenizer.decoder = _decoder(proto.normalizer_spec, stand_ins)
    special = [p.piece for p in proto.pieces if p.type in (piece_type.CONTROL, piece_type.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _load(path: str | Path) -> tuple[Any, Any]:
    """Return the model file as a protobuf message and as a sentencepiece processor."""
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError(
            "sentencepiece models need the packages sentencepiece and protobuf: pip install 'mmopt[compile]'"
        ) from error
    data = Path(path).read_bytes()
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time by protobuf
    try:
        proto.ParseFromString(data)
        processor = SentencePieceProcessor(model_proto=data)
    except Exception as error:  # DecodeError of protobuf, RuntimeError of sentencepiece
        raise ValueError(f"{path}: not a sentencepiece model: {error}") from error
    if not proto.pieces:
        raise ValueError(f"{path}: not a sentencepiece model: it has no pieces")
    return proto, processor


def _bpe(proto: Any, stand_ins: dict[str, str]) -> Any:
    vocabulary = {stand_ins.get(p.piece, p.piece): i for i, p in enumerate(proto.pieces)}
    scores = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    # sentencepiece merges the adjacent pair whose concatenation has the highest score, the leftmost one of equals. Here
    # each pair needs a rank of its own. Equal scores occur in runs of one character: LLaMA gives all its runs of spaces
    # the same one. There the leftmost pair is the one with the longest left part, as merged runs are on the left.
    merges = []
    for piece, score in scores.items():
        for i in range(1, len(piece)):
            left, right = piece[:i], piece[i:]
            if left in scores and right in scores:
                merges.append((-score, -len(left), vocabulary[piece], left, right))
    merges.sort()
    return models.BPE(
        vocab=vocabulary,
        merges=[(left, right) for _, _, _, left, right in merges],
        unk_token=next(p.piece for p in proto.pieces if p.type == p.UNKNOWN),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: Any, stand_ins: dict[str, str]) -> Any:
    vocabulary = []
    for p in proto.pieces:
        piece, score = p.piece, p.score
        if p.type in (p.NORMAL, p.USER_DEFINED):
            for character, stand_in in stand_ins.items():
                piece = piece.replace(character, stand_in)
        if p.type == p.USER_DEFINED:
            # unigram_model.cc computes length * max_score - 0.1; its max_score starts at FLT_MIN, so it is about 0.
            score = -0.1
        vocabulary.append((piece, score))
    unknown_id = next(i for i, p in enumerate(proto.pieces) if p.type == p.UNKNOWN)
    return models.Unigram(vocabulary, unknown_id, proto.trainer_spec.byte_fallback)


def _normalizer(spec: Any, symbols: dict[str, str], stand_ins: dict[str, str]) -> Any:
    space = SPACE if spec.escape_whitespaces else " "
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        # User-defined symbols are not normalised: hide them meanwhile.
        steps += [normalizers.Replace(symbol, character) for symbol, character in symbols.items()]
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
        steps += [normalizers.Replace(character, symbol) for symbol, character in symbols.items()]
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(f"[ {space}]+\\z"), ""))  # a U+2581 typed at the end is removed as well
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(space))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    steps += [normalizers.Replace(text, character) for text, character in stand_ins.items()]
    return normalizers.Sequence(steps)


def _decoder(spec: Any, stand_ins: dict[str, str]) -> Any:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Replace(character, text.replace(SPACE, " ")) for text, character in stand_ins.items()]
    if spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1000, 0))  # all leading spaces
    elif spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def prove_equal(sp_path: str | Path, tokenizer: Tokenizer, n: int = 1000, seed: int = 0) -> None:
    """Compare a tokenizer with the sentencepiece model it was made from, on n generated strings.

    The ids must be equal, and so must the decoded text (except that of unknown pieces, which are special tokens in
    the tokenizer). Raises ValueError with the first string that differs.
    """
    proto, processor = _load(sp_path)
    for text in _test_strings(proto, n, seed):
        expected = processor.encode(text)
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise ValueError(f"{text!r} gives different ids: sentencepiece {expected}, tokenizer {found}")
        if processor.unk_id() not in expected:
            expected_text, found_text = processor.decode(expected), tokenizer.decode(found)
            if found_text != expected_text:
                raise ValueError(
                    f"{expected} give different texts: sentencepiece {expected_text!r}, tokenizer {found_text!r}"
                )


FIXED_STRINGS = [
    "",
    " ",
    "  ",
    "\n",
    "\t\n \r\n",
    SPACE,
    f" {SPACE} {SPACE}",
    " leading",
    "trailing ",
    "  two  spaces   three    four ",
    "line\nline\n\nline",
    "<s>",
    "</s>",
    "a</s>b<s> c <unk>",
    "<0x41><0x0A>",
    "<|image|>",
    "e\u0301 cafe\u0301 \u00e9",
    "\N{FAMILY} 👨‍👩‍👧‍👦 👍🏽 🇫🇷 ❤️",
    "\x00\x01\x07\x7f\u200b\u200d\ufeff\ufffd",
    "ﬁ ½ ＡＢＣ ㈱ … “quoted”",
    "aaaaaaaaaaaaaaa",
    "USER: Describe the image. ASSISTANT:",
]

CHARACTER_RANGES = [
    (0x20, 0x7E),  # ASCII
    (0xA1, 0x24F),  # Latin with accents
    (0x300, 0x36F),  # combining marks
    (0x391, 0x3C9),  # Greek
    (0x410, 0x44F),  # Cyrillic
    (0x5D0, 0x5EA),  # Hebrew
    (0x621, 0x64A),  # Arabic
    (0x905, 0x94D),  # Devanagari
    (0xE01, 0xE3A),  # Thai
    (0x3041, 0x30F6),  # Hiragana and Katakana
    (0x4E00, 0x9FA5),  # Chinese characters
    (0xAC00, 0xD7A3),  # Hangul
    (0xFF01, 0xFF5E),  # full-width forms
    (0x1D400, 0x1D44F),  # mathematical letters, outside the basic plane
    (0x1F300, 0x1F64F),  # emoji
    (0x00, 0x1F),  # control characters
    (0x2000, 0x200F),  # kinds of space, joiners
]


def _test_strings(proto: Any, n: int, seed: int) -> list[str]:
    """Return n strings: pieces of the vocabulary, characters of many scripts, spaces and names of special tokens."""
    rng = random.Random(seed)
    pieces = [p.piece.replace(SPACE, " ") for p in proto.pieces]
    lookalikes = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN, p.BYTE)]
    letters = sorted({c for p in proto.pieces if p.type == p.NORMAL for c in p.piece} - {SPACE})

    def part() -> str:
        kind = rng.randrange(8)
        if kind <= 1:
            return rng.choice(pieces)
        if kind == 2:
            first, last = rng.choice(CHARACTER_RANGES)
            return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))
        if kind == 3:
            return " " * rng.choice([1, 2, 3, 4, 7, rng.randint(1, 60)])
        if kind == 4:
            return rng.choice(["\n", "\n\n", "\t", "\r\n", ".", ", ", "123", SPACE])
        if kind == 5:
            return rng.choice(lookalikes)
        if kind == 6 and letters:
            return "".join(rng.choice(letters) for _ in range(rng.randint(1, 8)))
        return rng.choice(FIXED_STRINGS)

    strings = list(FIXED_STRINGS)
    while len(strings) < n:
        strings.append("".join(part() for _ in range(rng.randint(1, 12))))
    return strings[:n]
