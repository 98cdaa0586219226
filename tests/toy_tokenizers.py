"""Small tokenizers of the tests: a piece a letter."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers


def letters(vocabulary, added):
    """A tokenizer of one piece a letter; added: id -> special piece."""
    pieces = ["<unk>", "<s>", "</s>", *"\u2581abcdefghijklmnopqrstuvwxyzQA:.?"]
    pieces += [chr(0x4E00 + i) for i in range(vocabulary - len(pieces))]
    for i, piece in added.items():
        pieces[i] = piece
    made = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True))
    made.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in added.values()])
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    assert made.get_vocab_size() == vocabulary
    return made


def small_tokenizer():
    """One piece a letter, spaces as in sentencepiece: 304 pieces, as many as the checkpoint has ids."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *"USERAITN:.abcdefghijklmnopqrstuvwxyz"]
    pieces += [chr(0x4E00 + i) for i in range(304 - len(pieces))]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in pieces[:3]])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert tokenizer.get_vocab_size() == 304
    return tokenizer
