"""Episodes of pictures and text as a Flamingo reads them, and how many of their answers it gets right."""

import math
import random

import codebook
import torch
import vqa
from codebook import Chunk
from tokenizers import Tokenizer
from torch import Tensor, nn
from train_mplug_owl2 import load_images

from mmopt.processing.tokenizer import TextProcessor

SHOTS = (0, 1, 2, 4)
CHUNKS = 5  # of an episode: the shots and the query


class Prompts:
    """Chunks to token ids."""

    def __init__(self, tokenizer: Tokenizer, config):
        self.end, self.marker, self.pad = config.eos_token_id, config.media_token_id, config.pad_token_id
        marks = {"<|endofchunk|>": self.end}
        self.text = TextProcessor(tokenizer, "<image>", self.marker, bos_id=None, eos_ids=(self.end,), marks=marks)
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.text.encode(text)
        return self.known[text]

    def batch(self, episodes: list[list[Chunk]]) -> tuple[Tensor, Tensor]:
        """ids ``[B, S]``, and what each must predict: answers and the ends of chunks, -100 for the rest."""
        made: list[tuple[list[int], list[int]]] = []
        for chunks in episodes:
            ids: list[int] = []
            wanted: list[int] = []
            for c in chunks:
                shot, asked = self.ids(c.shot), len(self.ids(c.query))
                ids += shot
                wanted += [-100] * (asked - 1) + shot[asked:] + [-100]
            made.append((ids, wanted))
        most = max(len(ids) for ids, _ in made)
        padded = [(i + [self.pad] * (most - len(i)), w + [-100] * (most - len(w))) for i, w in made]
        ids, wanted = torch.tensor(padded).unbind(1)
        return ids, wanted


def logits_of(module: nn.Module, ids: Tensor, media: Tensor) -> Tensor:
    """Each row sees the picture of the last marker up to it. media ``[B, pictures, rows, width]``."""
    time_ = (ids == module.config.media_token_id).cumsum(1)
    seen = time_[..., None] == torch.arange(1, media.shape[1] + 1)
    return module(module.lang_encoder.embedding(ids), media, seen, time_ > 0)


class Checks:
    """Episodes of held-out pictures, and how many of their answers a model gets exactly, with the end of the chunk."""

    def __init__(self, split: str, count: int, seed: int = 0):
        rng = random.Random(f"{split} {seed}")
        self.shown = codebook.pictures(split)
        drawn = [codebook.episode(rng, self.shown, CHUNKS) for _ in range(count)]
        asked = vqa.questions(split)
        self.drawn = drawn
        self.book = [codebook.chunks_of(*d) for d in drawn]
        self.vqa = [[Chunk(str(q.image), q.text, q.answer) for q in rng.sample(asked, CHUNKS)] for _ in range(count)]
        self.images = load_images(asked)

    @torch.inference_mode()
    def encode(self, module: nn.Module) -> dict[str, Tensor]:
        paths, parts = list(self.images), torch.stack(list(self.images.values())).split(200)
        return dict(zip(paths, torch.cat([module.encode_images(p)[:, 0] for p in parts]), strict=True))

    @torch.inference_mode()
    def right(self, module, prompts, rows: dict, episodes: list, shown: list | None = None) -> Tensor:
        """``[episodes, chunks]``: right answers. `shown`: other pictures than the episodes' own, None for zeros."""
        shown = shown or [[c.image for c in chunks] for chunks in episodes]
        zeros, found = torch.zeros_like(next(iter(rows.values()))), []
        for i in range(0, len(episodes), 200):
            ids, wanted = prompts.batch(episodes[i : i + 200])
            media = torch.stack([torch.stack([rows.get(p, zeros) for p in s]) for s in shown[i : i + 200]])
            good = logits_of(module, ids, media).argmax(-1) == wanted
            found.append(good[wanted != -100].view(len(ids), -1, 2).all(2))  # an answer is one word and the end
        return torch.cat(found)


def share(right: list[bool]) -> str:
    """Share of True with the 95 % interval of Wilson (1927)."""
    n, p, z = len(right), sum(right) / len(right), 1.96
    middle, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2)
    return f"{p:.4f} ({(middle - half) / (1 + z * z / n):.3f}-{(middle + half) / (1 + z * z / n):.3f})"
