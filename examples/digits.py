"""What a JanusFlow of coloured digits is asked, as token ids, and its plain answers and paintings, scored."""

import numpy as np
import pictures
import torch
from judge import as_uint8, normalised
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from mmopt.models.janusflow import END, END_OF_IMAGE, IMAGE_ID, IMAGE_MARKER, SYSTEM

BEGIN, PAD, PAINT = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜begin▁of▁generation｜>"
SPECIAL = ["<unk>", BEGIN, END, PAD, IMAGE_MARKER, "<begin_of_image>", END_OF_IMAGE, PAINT]
BOS_ID, EOS_ID, PAD_ID = (SPECIAL.index(name) for name in (BEGIN, END, PAD))


def make_tokenizer() -> Tokenizer:
    """One token for each word, lower-cased; "User:", "Assistant:" and punctuation are tokens of their own. Adds BOS."""
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+:|[?!.,]"), "isolated")]
    made = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    texts = [SYSTEM, "User: Assistant:", *pictures.NAMES, *map(str, range(10)), *pictures.QUESTIONS.values()]
    texts += [form.format(digit="1", fg="red", bg="red") for form in pictures.CAPTIONS]
    words = sorted({w for t in texts for w, _ in made.pre_tokenizer.pre_tokenize_str(t.lower())})
    made.model = models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>")
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, BOS_ID)])
    return made


class Prompts:
    """Prompts in the official template; each text is encoded once."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def painting(self, caption: str) -> list[int]:
        """No system prompt; the last id gives way to the time."""
        return [BOS_ID, *self.ids(f"User: {caption}\n\nAssistant:{PAINT}")]

    def before(self, image: list[int], system: bool = True) -> list[int]:
        """Up to the end of the picture; `image`: the ids that stand for it."""
        return [BOS_ID, *self.ids(SYSTEM if system else ""), *self.ids("User:"), *image, *self.ids(END_OF_IMAGE)]

    def question(self, part: str, system: bool = True) -> list[int]:
        """The first question about a picture: its digit, fg or bg."""
        return self.before([IMAGE_ID], system) + self.ids(f"{pictures.QUESTIONS[part]}\n\nAssistant:")

    def answer(self, word: str) -> list[int]:
        return [*self.ids(word), EOS_ID]


def insert(module: nn.Module, ids: Tensor, image_rows: Tensor) -> Tensor:
    """Ids ``[B, n]`` with IMAGE_ID at the same place, the rows of a picture each -> rows for the language model."""
    at = ids[0].tolist().index(IMAGE_ID)
    x = module.embed(ids.clamp(min=0))
    last = ids.shape[1] - ids[0].tolist()[::-1].index(IMAGE_ID)
    return torch.cat([x[:, :at], image_rows, x[:, last:]], dim=1)


def reading_batch(
    prompts: Prompts, shown: pictures.Pictures, rows: int, rng: np.random.Generator, system: bool, turns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All three questions about each picture, in any order -> ids, positions, mask, and what each id must predict.

    As turns of one conversation, or side by side: then each sees the picture and itself, as if it were the only one.
    """
    made, parts = [], list(pictures.QUESTIONS)
    for i in range(len(shown.pixels)):
        ids = prompts.before([IMAGE_ID] * rows, system)
        start = len(ids)
        positions, block, wanted = list(range(start)), [-1] * start, [-100] * start
        for j, part in enumerate(rng.permutation(parts)):
            question = prompts.ids("User:" if turns and j else "")
            question = question + prompts.ids(f"{pictures.QUESTIONS[part]}\n\nAssistant:")
            answer = prompts.answer(shown.words(i)[part])
            first, count = len(ids) if turns else start, len(question) + len(answer)
            ids = ids + question + answer
            positions += range(first, first + count)
            block += [-1 if turns else j] * count
            wanted += [-100] * (len(question) - 1) + answer + [-100]
        made.append((ids, positions, block, wanted))
    ids, positions, block, wanted = (torch.tensor(x) for x in zip(*made, strict=True))
    mask = (block[:, None] == -1) | (block[:, None] == block[:, :, None])
    return ids, positions, mask.tril(), wanted


@torch.inference_mode()
def answers(
    module: nn.Module, prompts: Prompts, shown: pictures.Pictures, blind: str | None = None, system: bool = True
) -> dict[str, float]:
    """Shares of right answers to each question, greedy and single-turn; right is the word and the end after it.

    blind: show something else, a "grey" picture or "another" of the pictures.
    """
    pixels = normalised(shown.pixels)
    if blind == "grey":
        pixels = torch.zeros_like(pixels)
    elif blind == "another":
        pixels = pixels.roll(1, 0)
    found = {}
    for part in pictures.QUESTIONS:
        hits = []
        wanted = torch.tensor([prompts.answer(shown.words(i)[part]) for i in range(len(pixels))])
        for some, right in zip(pixels.split(200), wanted.split(200), strict=True):
            ids = torch.tensor([prompts.question(part, system)]).expand(len(some), -1)
            x, rows = insert(module, ids, module.encode_images(some)), []
            for _ in range(2):
                rows.append(module(x)[0][:, -1].argmax(-1))
                x = torch.cat([x, module.embed(rows[-1][:, None])], dim=1)
            hits.append((torch.stack(rows, 1) == right).all(1))
        found[part] = torch.cat(hits).float().mean().item()
    return found


def orders(n: int, seed: int) -> tuple[pictures.Pictures, Tensor]:
    """What `n` paintings are to show (no pixels; digits in turn, colours drawn) and their noise ``[n, 4, 8, 8]``."""
    fg, bg = pictures.colours(n, np.random.default_rng(seed))
    wanted = pictures.Pictures(np.zeros((n, 0), np.uint8), np.arange(n) % 10, fg, bg)
    return wanted, torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def painted(
    module: nn.Module,
    prompts: Prompts,
    wanted: pictures.Pictures,
    noise: Tensor,
    steps: int = 30,
    guidance: float = 2.0,
) -> tuple[np.ndarray, Tensor]:
    """The plain sampler on full captions -> pictures ``[n, 32, 32, 3]`` uint8 and their latents."""
    ids = [prompts.painting(wanted.caption(i)) for i in range(len(noise))]
    parts = [slice(i, i + 100) for i in range(0, len(ids), 100)]
    latents = torch.cat([module.generate_images(ids[part], noise[part], steps, guidance) for part in parts])
    return as_uint8(torch.cat([module.decode_image(part) for part in latents.split(200)])), latents
