import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mmopt.processing import image_processor as processing
from mmopt.processing.chat_template import ChatTemplate
from mmopt.processing.image_processor import ImageError, ImageProcessor, open_image
from mmopt.processing.tokenizer import TextProcessor

DATA = Path(__file__).parents[1] / "data" / "mplug_owl2"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def file_bytes(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(height=12, width=20):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 12, y * 20, x + y], axis=-1).astype(np.uint8)


def pixel(image, x=0, y=0):
    assert image.mode == "RGB"
    return image.getpixel((x, y))


# Images


def test_sources(tmp_path):
    array = gradient()
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    for source in [
        path,
        str(path),
        path.read_bytes(),
        Image.open(path),
        array,
        array / 255,
        array.astype("uint16") << 8,
    ]:
        assert np.array_equal(np.asarray(open_image(source)), array)


def test_url(monkeypatch):
    data = file_bytes(Image.fromarray(gradient()))
    monkeypatch.setattr(processing.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(data))
    assert open_image("https://example.com/a.png").size == (20, 12)
    monkeypatch.setattr(processing, "DOWNLOAD_LIMIT", len(data) - 1)
    with pytest.raises(ImageError, match=r"https://example.com/a.png: .* larger than"):
        open_image("https://example.com/a.png")

    def refuse(url, timeout):
        raise TimeoutError("timed out")

    monkeypatch.setattr(processing.urllib.request, "urlopen", refuse)
    with pytest.raises(ImageError, match=r"http://example.com/a.png: .*timed out"):
        open_image("http://example.com/a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    upright = Image.fromarray(gradient())
    # How a camera stores the picture for each orientation: the inverse of what a viewer does.
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = upright.transpose(stored[orientation]) if orientation in stored else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(file_bytes(image, exif=exif))
    assert np.array_equal(np.asarray(opened), gradient())


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    opened = open_image(file_bytes(image))
    assert (pixel(opened), pixel(opened, 1)) == (RED, BLUE)
    for format in ("PNG", "GIF"):
        opened = open_image(file_bytes(image, format, transparency=1))
        assert (pixel(opened), pixel(opened, 1)) == (RED, (255, 255, 255))


def test_transparency_is_white():
    rgba = np.array([[[255, 0, 0, 255], [0, 0, 255, 0], [0, 0, 0, 128]]], np.uint8)
    for source in (rgba, file_bytes(Image.fromarray(rgba))):
        opened = open_image(source)
        assert pixel(opened, 0) == RED
        assert pixel(opened, 1) == (255, 255, 255)
        assert pixel(opened, 2) == (127, 127, 127)
    grey_alpha = Image.new("LA", (1, 1), (100, 0))
    assert pixel(open_image(file_bytes(grey_alpha))) == (255, 255, 255)
    grey_alpha = Image.new("LA", (1, 1), (100, 255))
    assert pixel(open_image(file_bytes(grey_alpha))) == (100, 100, 100)
    colour_key = file_bytes(Image.new("RGB", (1, 1), GREEN), transparency=GREEN)
    assert pixel(open_image(colour_key)) == (255, 255, 255)


def test_grey_and_one_bit():
    assert pixel(open_image(file_bytes(Image.new("L", (1, 1), 77)))) == (77, 77, 77)
    assert pixel(open_image(file_bytes(Image.new("1", (1, 1), 1)))) == (255, 255, 255)
    for shape in [(2, 3), (2, 3, 1)]:
        assert pixel(open_image(np.full(shape, 9, np.uint8))) == (9, 9, 9)


def test_cmyk():
    jpeg = file_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.allclose(pixel(open_image(jpeg)), RED, atol=3)


def test_16_bit():
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 128, 255]
    sources = [
        file_bytes(Image.fromarray(values)),
        file_bytes(Image.fromarray(values), "TIFF"),
        Image.fromarray(values.astype(np.int32)),  # mode I
        Image.fromarray(values),
        Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes()),
        values,
    ]
    for source in sources:
        opened = open_image(source)
        assert [pixel(opened, x)[0] for x in range(5)] == expected


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_truncated_file(tmp_path, format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = file_bytes(Image.fromarray(noise), format)
    data = data[: len(data) // 2]
    with pytest.raises(ImageError, match=f"bytes of length {len(data)}: cannot read the image: ."):
        open_image(data)
    path = tmp_path / "half.img"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"half\.img: cannot read the image: ."):
        open_image(path)


def test_unreadable(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    with pytest.raises(ImageError, match=r"notes\.txt: .*not an image file"):
        open_image(text)
    with pytest.raises(ImageError, match=r"missing\.png: .*No such file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match=r"bytes of length 0: .*empty"):
        open_image(b"")
    with pytest.raises(ImageError, match=r"Is a directory"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="int: not an image"):
        open_image(3)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 2, 2), np.uint8), "shape"),
        (np.zeros((2,), np.uint8), "shape"),
        (np.zeros((0, 2, 3), np.uint8), "shape"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (np.full((2, 2, 3), 2.0), "0 to 1"),
        (np.full((2, 2, 3), np.nan), "0 to 1"),
    ],
)
def test_unusable_array(array, reason):
    with pytest.raises(ImageError, match=reason):
        open_image(array)


@pytest.mark.parametrize("mode", ["resize", "pad", "plain"])
def test_processor_equals_reference(mode):
    recorded = load_file(DATA / "preprocess.safetensors")
    names = ["wide", "tall", "square_small"]
    processor = ImageProcessor(56, MEAN, STD, mode)
    pixels = processor([recorded[f"in.{name}_rgb"] for name in names])
    assert pixels.shape == (3, 3, 56, 56)
    assert pixels.dtype == np.float32
    for result, name in zip(pixels, names, strict=True):
        assert np.array_equal(result, recorded[f"out.{name}_{mode}"])


def test_processor_json():
    processor = ImageProcessor(56, MEAN, STD, "pad", "bilinear")
    assert ImageProcessor.from_json(processor.to_json()) == processor
    with pytest.raises(ValueError, match="mean"):
        ImageProcessor.from_json({"size": 3})
    with pytest.raises(ValueError, match="colour"):
        ImageProcessor.from_json({**processor.to_json(), "colour": 1})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 0}, "size"),
        ({"mean": (1.0,)}, "3 values"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"mode": "crop"}, "resize, pad, plain"),
        ({"resample": "best"}, "bicubic"),
    ],
)
def test_wrong_processor_settings(change, reason):
    settings = {"size": 56, "mean": MEAN, "std": STD, "mode": "pad", **change}
    with pytest.raises(ValueError, match=reason):
        ImageProcessor(**settings)


def test_processor_images():
    processor = ImageProcessor(8, MEAN, STD, "plain")
    assert processor([]).shape == (0, 3, 8, 8)
    with pytest.raises(TypeError, match="list of images"):
        processor("image.png")
    with pytest.raises(ImageError, match=r"missing\.png"):
        processor(["missing.png"])
    thin = np.zeros((40000, 1), np.uint8)
    for mode in ("resize", "pad"):
        with pytest.raises(ImageError, match="1x40000 pixels: too long and thin"):
            ImageProcessor(8, MEAN, STD, mode)([thin])
    with pytest.raises(ImageError, match="too long and thin"):
        ImageProcessor(224, MEAN, STD, "plain")([thin])


# Conversations

TEMPLATE = ChatTemplate(user="USER: ", assistant="ASSISTANT:", separator=" ", end="</s>", image="<|image|>")


def message(role, content):
    return {"role": role, "content": content}


def test_chat_template():
    question = [message("user", "<|image|>Describe the image.")]
    assert TEMPLATE.render(question) == "USER: <|image|>Describe the image. ASSISTANT:"
    conversation = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    assert TEMPLATE.render(conversation) == "USER: a ASSISTANT: b</s>USER: c ASSISTANT:"
    assert TEMPLATE.render(conversation[:2], answer=False) == "USER: a ASSISTANT: b</s>"
    assert TEMPLATE.render(conversation, answer=False) == "USER: a ASSISTANT: b</s>USER: c "


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one message"),
        ([message("system", "a")], "message 0: expected the role 'user', found 'system'"),
        ([message("assistant", "a")], "message 0: expected the role 'user', found 'assistant'"),
        ([message("user", "a"), message("user", "b")], "message 1: expected the role 'assistant', found 'user'"),
        ([message("user", "a"), message("assistant", "b")], "expected the last message to be the user's"),
        ([message("user", None)], "message 0: expected text"),
        ([{"content": "a"}], "found None"),
    ],
)
def test_wrong_messages(messages, reason):
    with pytest.raises(ValueError, match=reason):
        TEMPLATE.render(messages)


def test_chat_template_json():
    assert ChatTemplate.from_json(TEMPLATE.to_json()) == TEMPLATE
    with pytest.raises(ValueError, match="separator"):
        ChatTemplate.from_json({"user": "a"})


# Text


def sentencepiece_like():
    """A tokenizer of single characters, "▁" for spaces with one in front of each text, and bytes for the rest."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz</>é"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer


def byte_level():
    """A tokenizer whose pieces are bytes, with some characters in two pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def text_processor(tokenizer=None, bos_id=1, **options):
    return TextProcessor(tokenizer or sentencepiece_like(), "<|image|>", -200, bos_id, (2,), **options)


def test_encode_images():
    text = text_processor()
    names = [text.tokenizer.id_to_token(i) if i >= 0 else i for i in text.encode("a <|image|>b c<|image|>")]
    assert names == ["<s>", "▁", "a", "▁", -200, "▁", "b", "▁", "c", -200]
    assert text.encode("<|image|>") == [1, -200]
    assert text.encode("") == [1]
    assert text_processor(bos_id=None).encode("") == []


def test_special_tokens_in_text():
    """A special token typed by a user stays text, unless it is one of the marks."""
    prompt = "a</s>b"
    typed = text_processor().encode(prompt)
    assert 2 not in typed
    assert text_processor().decode(typed) == prompt
    text = text_processor(marks={"</s>": 2})
    names = [text.tokenizer.id_to_token(i) for i in text.encode(prompt)]
    assert names == ["<s>", "▁", "a", "</s>", "▁", "b"]


def test_decode():
    text = text_processor()
    assert text.decode(text.encode("<|image|>describe")) == "describe"
    assert text.decode(np.array([1, *text.encode("a  é🎉")[1:], 2])) == "a  é🎉"
    assert text.decode([]) == ""


def stream_pieces(text, ids):
    stream = text.stream()
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("make", [sentencepiece_like, byte_level])
@pytest.mark.parametrize(
    "string",
    ["", "a", " a", "   a  b ", "🎉", "a🎉🎉b", "👨‍👩‍👧 é\n\nX", "日本語 abc", "ends with 🎉", "\ufffd a \ufffd"],
)
def test_stream_text(make, string):
    text = text_processor(make(), bos_id=None)
    ids = text.encode(string)
    assert "".join(stream_pieces(text, ids)) == text.decode(ids) == string


def test_stream_is_prompt():
    """Text comes as soon as it is certain; the bytes of an emoji come with the piece after them."""
    text = text_processor()
    assert stream_pieces(text, text.encode("hi 🎉b")) == ["", "", "h", "i", " ", "", "", "", "", "🎉b", ""]


@pytest.mark.parametrize("make", [sentencepiece_like, byte_level])
def test_stream_of_any_ids(make):
    text = text_processor(make())
    rng = np.random.default_rng(0)
    size = text.tokenizer.get_vocab_size()
    emoji = text.encode("🎉")[1:]
    for _ in range(300):
        ids = []
        for _ in range(rng.integers(1, 12)):
            if rng.random() < 0.2:
                ids += emoji
            elif rng.random() < 0.2:
                ids += text.encode(" a")[1:]
            else:
                ids.append(int(rng.integers(0, size)))
        assert "".join(stream_pieces(text, ids)) == text.decode(ids)


def test_from_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    options = {"image_marker": "<|image|>", "image_id": -200, "bos_id": 1, "eos_ids": (2,)}
    sentencepiece_like().save(str(path))
    text = TextProcessor.from_file(path, **options)
    assert text.encode("a </s>") == text_processor().encode("a </s>")
    path.write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer\.json: ."):
        TextProcessor.from_file(path, **options)
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        TextProcessor.from_file(tmp_path / "missing.json", **options)
    with pytest.raises(ValueError, match="must not be empty"):
        TextProcessor(sentencepiece_like(), "", -200, 1, (2,))


def test_needs_no_framework():
    bad = "{'torch', 'sentencepiece'} & set(sys.modules)"
    code = f"import sys, mmopt.processing.image_processor; sys.exit(bool({bad}))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
