import builtins
import io
import json
import random

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from mmopt.processing.sentencepiece import convert_sentencepiece, prove_equal
from mmopt.processing.tokenizer import TextProcessor


def training_lines():
    rng = random.Random(1)
    syllables = ["ba", "ko", "ti", "ru", "sen", "lo", "mi", "qu", "the", "ing", "é", "ß", "да", "ни", "日本", "中文"]
    syllables += ["!", "?", ".", ",", "<", "s>", "12", "7"]
    words = ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 4))) for _ in range(300)]
    lines = [" ".join(rng.choice(words) for _ in range(rng.randint(3, 12))) for _ in range(400)]
    return lines + ["    def f():  return    x"] * 20


def train(path, **settings):
    settings = {
        "normalization_rule_name": "identity",
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
        **settings,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(training_lines()), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    """A model with the settings of LLaMA-2."""
    return train(
        tmp_path_factory.mktemp("bpe") / "tokenizer.model",
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
    )


@pytest.fixture(scope="module")
def unigram_path(tmp_path_factory):
    return train(
        tmp_path_factory.mktemp("unigram") / "tokenizer.model", model_type="unigram", vocab_size=450, byte_fallback=True
    )


@pytest.mark.parametrize("model", ["bpe_path", "unigram_path"])
def test_equal_to_sentencepiece(model, request):
    path = request.getfixturevalue(model)
    prove_equal(path, convert_sentencepiece(path), n=1000, seed=0)
    prove_equal(path, convert_sentencepiece(path), n=1000, seed=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "bpe", "remove_extra_whitespaces": True},
        {"model_type": "bpe", "add_dummy_prefix": False, "byte_fallback": True},
        {"model_type": "bpe", "remove_extra_whitespaces": False, "user_defined_symbols": ["<sep>", "\n\n", "▁▁▁", "b"]},
        {"model_type": "unigram", "add_dummy_prefix": False},
        {"model_type": "unigram", "user_defined_symbols": ["<sep>", "\n\n", "[x]"], "byte_fallback": True},
    ],
)
def test_equal_with_other_settings(tmp_path, settings):
    path = train(tmp_path / "tokenizer.model", vocab_size=500, character_coverage=0.999, **settings)
    prove_equal(path, convert_sentencepiece(path))


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_spaces_with_equal_scores(bpe_path, tmp_path, seed):
    """LLaMA gives its pieces of 2 to 16 spaces one score, so that only the position decides what is merged first."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(bpe_path.read_bytes())
    pieces = [p for p in proto.pieces if len(p.piece) == 1 or set(p.piece) != {"▁"}]
    rng = random.Random(seed)
    for length in rng.sample(range(2, 17), rng.randint(3, 14)):
        pieces.append(type(proto.pieces[0])(piece="▁" * length, score=-1e9))
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    tokenizer = convert_sentencepiece(path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for count in range(80):
        text = "a" + " " * count + "b"
        assert tokenizer.encode(text, add_special_tokens=False).ids == processor.encode(text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_character_normalisation(tmp_path, model_type):
    path = train(
        tmp_path / "tokenizer.model",
        model_type=model_type,
        vocab_size=500,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=["①"],
    )
    tokenizer = convert_sentencepiece(path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ["ｋｏｔｉ ①②", "①", "ba\u00a0ko\tti", "e\u0301 é", "\x01 ba"]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == processor.encode(text)


def test_equal_after_saving(bpe_path, tmp_path):
    file = tmp_path / "tokenizer.json"
    convert_sentencepiece(bpe_path).save(str(file))
    text = TextProcessor.from_file(file, image_marker="<|image|>", image_id=-200, bos_id=1, eos_ids=(2,))
    prove_equal(bpe_path, text.tokenizer)


@pytest.mark.parametrize("model", ["bpe_path", "unigram_path"])
def test_special_tokens(model, request):
    tokenizer = convert_sentencepiece(request.getfixturevalue(model))
    assert [tokenizer.token_to_id(name) for name in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    ids = tokenizer.encode("ba </s> ko", add_special_tokens=False).ids
    assert 2 not in ids
    assert tokenizer.decode([1, *ids, 2]) == "ba </s> ko"


def test_broken_conversion_is_found(bpe_path):
    description = json.loads(convert_sentencepiece(bpe_path).to_str())
    description["model"]["merges"].reverse()
    broken = Tokenizer.from_str(json.dumps(description))
    broken.encode_special_tokens = True
    with pytest.raises(ValueError, match=r"gives different ids: sentencepiece \[.*\], tokenizer \[.*\]"):
        prove_equal(bpe_path, broken)


def test_matched_special_tokens_are_found(bpe_path):
    tokenizer = convert_sentencepiece(bpe_path)
    tokenizer.encode_special_tokens = False
    with pytest.raises(ValueError, match="'<s>' gives different ids"):
        prove_equal(bpe_path, tokenizer)


def test_wrong_decoder_is_found(bpe_path):
    tokenizer = convert_sentencepiece(bpe_path)
    tokenizer.decoder = None
    with pytest.raises(ValueError, match="different texts"):
        prove_equal(bpe_path, tokenizer)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x00" * 100])
def test_not_a_model(tmp_path, data):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a sentencepiece model"):
        convert_sentencepiece(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        convert_sentencepiece(tmp_path / "missing.model")


def test_unsupported_model_type(tmp_path):
    path = train(tmp_path / "tokenizer.model", model_type="char", vocab_size=60)
    with pytest.raises(ValueError, match="only BPE and Unigram"):
        convert_sentencepiece(path)


def test_without_sentencepiece(bpe_path, monkeypatch):
    original = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "sentencepiece":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match=r"pip install 'mmopt\[compile\]'"):
        convert_sentencepiece(bpe_path)
