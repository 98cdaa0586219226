"""Train a small mPLUG-Owl2 on easy-VQA pictures and two text-only tasks; write it in the official checkpoint layout.

python examples/train_mplug_owl2.py --out examples/checkpoints/mplug-owl2-vqa
python examples/train_mplug_owl2.py --out examples/checkpoints/mplug-owl2-vqa --evaluate   # test set only
"""

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
import vqa
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from mmopt.frontend import load as checkpoint
from mmopt.processing.chat_template import ChatTemplate
from mmopt.processing.image_processor import ImageProcessor
from mmopt.processing.tokenizer import TextProcessor

IMAGES, QUESTIONS, TEXTS = 32, 8, 32  # per step: pictures, questions on each, text-only examples
BLOCK = 12  # rows of one question with its answer, </s> left out: 10 tokens, "ASSISTANT:", one word
TEXT_BLOCK = 10  # rows of a text-only example: <s> "USER:" "reverse:" a b c "ASSISTANT:" c b a
LEARNING_RATE = 1e-3
SHIFT = 6  # pixels
NEW_TOKENS = 4  # the longest answer and </s>
SPECIAL = ["<unk>", "<s>", "</s>"]
PREPROCESSOR: dict = {"image_processor_type": "CLIPImageProcessor", "resample": 3, "size": 64, "crop_size": 64}
PREPROCESSOR |= {"do_resize": True, "do_center_crop": True, "do_normalize": True}
PREPROCESSOR |= {"image_mean": [0.9] * 3, "image_std": [0.25] * 3}  # light backgrounds near 0: the shape stands out


def config(vocab_size: int) -> dict:
    """The fields of the shipped tiny config with other sizes."""
    c = json.loads((checkpoint.CONFIGS / "mplug-owl2-tiny.json").read_text())
    c |= {"vocab_size": vocab_size, "hidden_size": 128, "intermediate_size": 344, "torch_dtype": "float16"}
    c |= {"image_aspect_ratio": "resize"}
    width = {"hidden_size": 96, "num_attention_heads": 4}
    c["visual_config"]["visual_model"] |= width | {"image_size": 64, "patch_size": 8, "intermediate_size": 384}
    c["visual_config"]["visual_abstractor"] |= width | {"encoder_hidden_size": 96, "grid_size": 8}
    c["visual_config"]["visual_abstractor"] |= {"num_learnable_queries": 16, "num_hidden_layers": 2}
    c["visual_config"]["visual_abstractor"] |= {"intermediate_size": 256}
    return c


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """One token for each word, lower-cased; "?" is a word of its own, "USER:" and "ASSISTANT:" are whole."""
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?!.,]"), "isolated")]
    made = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    words = sorted({w for t in texts for w, _ in made.pre_tokenizer.pre_tokenize_str(t)})
    vocab = {w: i for i, w in enumerate([*SPECIAL, "user:", "assistant:", *words])}
    made.model = models.WordLevel(vocab, unk_token="<unk>")
    made.add_special_tokens(SPECIAL)
    return made  # no decoder is set: words are joined by one space


def initialise(module: nn.Module, seed: int) -> None:
    """Both branches of a norm start equal; learned positions must be as large as the patches, or shapes come slowly."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        with torch.no_grad():
            if p.dim() == 1:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith(("position_embedding", "cls_token", "query_embeds")):
                p.normal_(std=0.5, generator=generator)
            elif name.endswith(("embed_tokens.weight", "vit_eos")):
                p.normal_(std=0.02, generator=generator)
            else:
                p.normal_(std=0.7 * p[0].numel() ** -0.5, generator=generator)


class Prompts:
    """Prompt ids of questions in the official template."""

    def __init__(self, tokenizer: Tokenizer, family):
        self.template = ChatTemplate(**family.chat)
        self.text = TextProcessor(tokenizer, family.image_marker, family.image_id, bos_id=1, eos_ids=(2,))
        self.image_id = family.image_id
        self.known: dict[str, list[int]] = {}

    def ids(self, content: str) -> list[int]:
        if content not in self.known:
            self.known[content] = self.text.encode(self.template.render([{"role": "user", "content": content}]))
        return self.known[content]

    def example(self, q: vqa.Question, rows: int) -> tuple[list[int], list[int]]:
        """Token ids after the picture (of a text-only task: all) and what each must predict, -100 for nothing."""
        prompt = self.ids(q.content)
        prompt = prompt[prompt.index(self.image_id) + 1 :] if q.image else prompt
        answer = self.text.encode(q.answer)[1:]  # without <s>
        ids, wanted = prompt + answer, [-100] * (len(prompt) - 1) + answer + [2]
        return ids + [0] * (rows - len(ids)), wanted + [-100] * (rows - len(wanted))


class Packed:
    """One picture and several questions as one row of a batch: the picture's rows once, then question after question.

    Each question sees <s>, "USER:", the picture and itself, at the positions it would have alone: the logits are those
    of separate prompts, at a fraction of the cost.
    """

    def __init__(self, model: nn.Module):
        c = model.config
        self.model, self.heads, self.layers = model, c.num_attention_heads, c.num_hidden_layers
        self.prefix = prefix = 2 + c.tokens_per_image
        block = torch.cat([torch.full((prefix,), -1), torch.arange(QUESTIONS).repeat_interleave(BLOCK)])
        seen = (block[None] == -1) | (block[None] == block[:, None])
        self.mask = seen & torch.ones_like(seen).tril()
        self.positions = torch.cat([torch.arange(prefix), prefix + torch.arange(BLOCK).repeat(QUESTIONS)])[None]
        self.is_visual = torch.zeros(1, len(block), 1, dtype=torch.bool)
        self.is_visual[:, 2:prefix] = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2)

    def logits(self, image_rows: Tensor, start: Tensor, ids: Tensor) -> Tensor:
        """Image rows ``[B, n, hidden]``, ids of <s> "USER:" ``[2]``, ids ``[B, questions * block]`` -> their logits."""
        embed = self.model.model.embed_tokens
        x = torch.cat([embed(start).expand(len(ids), -1, -1), image_rows, embed(ids)], dim=1)
        return self.model.decode_rows(x, self.is_visual, self.positions, [self.attend] * self.layers)[:, self.prefix :]


def augmented(pixels: Tensor, rng: random.Random) -> Tensor:
    """Mirrored half of the time and moved a little. Never turned upside down: triangles always point up."""
    padded, size = F.pad(pixels, [SHIFT] * 4, mode="replicate"), pixels.shape[-1]
    made = []
    for image in padded:
        top, left = rng.randint(0, 2 * SHIFT), rng.randint(0, 2 * SHIFT)
        image = image[:, top : top + size, left : left + size]
        made.append(image.flip(2) if rng.random() < 0.5 else image)
    return torch.stack(made)


@torch.inference_mode()
def answers(module: nn.Module, prompts: Prompts, images: dict, asked: list, blind: bool = False) -> list[str]:
    """Greedy answers by plain, unpacked passes; "" for an answer that did not end. `blind`: image rows are zero."""
    rows: dict = {}
    embed = module.model.embed_tokens
    paths = sorted({q.image for q in asked if q.image})
    for i in range(0, len(paths), 200):
        made = module.encode_images(torch.stack([images[p] for p in paths[i : i + 200]]))
        rows |= dict(zip(paths[i : i + 200], made * (not blind), strict=True))
    groups, given = defaultdict(list), [""] * len(asked)
    for i, q in enumerate(asked):
        groups[len(prompts.ids(q.content)), q.image is None].append(i)  # of one length: nothing needs padding
    for (_, text_only), group in groups.items():
        for part in (group[i : i + 256] for i in range(0, len(group), 256)):
            ids = torch.tensor([prompts.ids(asked[i].content) for i in part])
            x, is_visual = embed(ids.clamp(min=0)), ids == prompts.image_id
            if not text_only:
                at, visual = ids[0].tolist().index(prompts.image_id), torch.stack([rows[asked[i].image] for i in part])
                x = torch.cat([x[:, :at], visual, x[:, at + 1 :]], dim=1)
                is_visual = F.pad(is_visual[:, : at + 1], (0, x.shape[1] - at - 1))
                is_visual[:, at : at + visual.shape[1]] = True
            new = ids[:, :0]
            while new.shape[1] < NEW_TOKENS and not bool((new == 2).any(1).all()):
                new = torch.cat([new, module(x, is_visual)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
                x, is_visual = torch.cat([x, embed(new[:, -1:])], dim=1), F.pad(is_visual, (0, 1))
            for i, tokens in zip(part, new.tolist(), strict=True):
                given[i] = prompts.text.decode(tokens[: tokens.index(2)]) if 2 in tokens else ""
    return given


def load_images(asked: list[vqa.Question]) -> dict[str, Tensor]:
    processor = ImageProcessor(64, tuple(PREPROCESSOR["image_mean"]), tuple(PREPROCESSOR["image_std"]), "resize")
    paths = sorted({q.image for q in asked if q.image})
    return dict(zip(paths, torch.from_numpy(processor(paths)), strict=True))


def train(module: nn.Module, prompts: Prompts, args: argparse.Namespace) -> None:
    asked, checks = vqa.questions("train"), vqa.questions("validation")
    facts, reverse = vqa.facts_task(), vqa.reverse_task("train")
    images = load_images(asked + checks)
    by_image: dict[str, list[vqa.Question]] = defaultdict(list)
    for q in asked:
        by_image[str(q.image)].append(q)
    paths = sorted(by_image)
    # Training only: a head that names colour and shape from the patch rows makes the vision tower useful early.
    aux = nn.Linear(2 * module.config.vision.hidden_size, len(vqa.COLOURS) + len(vqa.SHAPES))
    initialise(aux, args.seed)
    labels = {}
    for p in paths:
        known = [set(k) - {None} for k in zip(*map(vqa.seen_in, by_image[p]), strict=True)]
        labels[p] = [names.index(*k) if k else -100 for names, k in zip((vqa.COLOURS, vqa.SHAPES), known, strict=True)]

    parameters = [*module.requires_grad_(True).parameters(), *aux.parameters()]
    matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    packed, first, spent = Packed(module), 0, 0.0
    state, run = Path(args.state), [args.steps, args.seed]
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        if saved["run"] != run:
            raise SystemExit(f"{state} is of a run with (steps, seed) {saved['run']}: delete it or name another")
        module.load_state_dict(saved["module"])
        aux.load_state_dict(saved["aux"])
        optimizer.load_state_dict(saved["optimizer"])
        first, spent = saved["step"], saved["seconds"]
        print(f"resumed at step {first} from {state}", flush=True)
    start, began = torch.tensor(prompts.ids("")[:2]), time.monotonic() - spent
    for step in range(first, args.steps):
        rng = random.Random(f"{args.seed} {step}")  # of the step alone, so a resumed run is the same run
        warm, done = min(1.0, (step + 1) / 100), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        chosen = rng.sample(paths, IMAGES)
        examples = [prompts.example(q, BLOCK) for p in chosen for q in rng.choices(by_image[p], k=QUESTIONS)]
        ids, wanted = torch.tensor(examples).unbind(1)
        features = module.model.vision_model(augmented(torch.stack([images[p] for p in chosen]), rng))
        logits = packed.logits(module.model.visual_abstractor(features), start, ids.reshape(IMAGES, -1))
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

        texts = rng.sample(facts, TEXTS // 2) + rng.sample(reverse, TEXTS // 2)
        ids, wanted = torch.tensor([prompts.example(q, TEXT_BLOCK) for q in texts]).unbind(1)
        logits, _ = module(module.model.embed_tokens(ids), torch.zeros(ids.shape, dtype=torch.bool))
        text_loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())

        patches = features[:, 1:]
        named = aux(torch.cat([patches.mean(1), patches.amax(1)], dim=1)).split([len(vqa.COLOURS), len(vqa.SHAPES)], 1)
        target = torch.tensor([labels[p] for p in chosen]).unbind(1)
        aux_loss = sum(F.cross_entropy(n, t) for n, t in zip(named, target, strict=True))

        total = loss + 0.3 * text_loss + max(0.0, 1 - done / 0.6) * aux_loss
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            part = checks[:1000] + vqa.reverse_task("validation")[:64] + facts
            found = vqa.score(zip(part, answers(module, prompts, images, part), strict=True))
            spent = time.monotonic() - began
            report = " ".join(f"{k} {v:.3f}" for k, v in found.items() if k != "all")
            print(
                f"step {step + 1}: {spent:.0f} s, loss {loss.item():.3f}, text {text_loss.item():.3f}, "
                f"aux {aux_loss.item():.3f}; validation {report}",
                flush=True,
            )
            state.parent.mkdir(parents=True, exist_ok=True)
            made = {"module": module.state_dict(), "aux": aux.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(made | {"run": run, "step": step + 1, "seconds": spent}, state.with_suffix(".part"))
            os.replace(state.with_suffix(".part"), state)


def save(module: nn.Module, raw: dict, tokenizer: Tokenizer, out: Path) -> None:
    """Each file under a temporary name first: an interrupted run leaves no half-written checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    special |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": raw["max_position_embeddings"]}
    files = {"config.json": raw, "preprocessor_config.json": PREPROCESSOR, "tokenizer_config.json": special}
    texts = {name: json.dumps(value, indent=1) + "\n" for name, value in files.items()}
    made = {name: text.encode() for name, text in texts.items()} | {"tokenizer.json": tokenizer.to_str(True).encode()}
    weights = {k: v.to(torch.float16).contiguous() for k, v in module.state_dict().items()}
    made["model.safetensors"] = safetensors.torch.save(weights, metadata={"format": "pt"})
    for name, data in made.items():
        (out / (name + ".part")).write_bytes(data)
    for name in made:
        os.replace(out / (name + ".part"), out / name)


def evaluate(out: Path, split: str) -> None:
    """The saved file, computed in float32, on a whole split: with the picture, with its rows zeroed, without it."""
    model = checkpoint.load(out, dtype="float32")
    prompts = Prompts(Tokenizer.from_file(str(out / "tokenizer.json")), model.family)
    asked = vqa.questions(split)
    images = load_images(asked)
    cases = {"with the picture": (asked, False), "image rows zeroed": (asked, True)}
    cases["no picture"] = ([q._replace(image=None) for q in asked], False)
    cases["text only"] = (vqa.reverse_task(split) + vqa.facts_task(), False)
    for name, (part, blind) in cases.items():
        found = vqa.score(zip(part, answers(model.module, prompts, images, part, blind), strict=True))
        print(f"{split}, {name}: " + " ".join(f"{k} {v:.4f}" for k, v in found.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", default="out/train_mplug_owl2.pt", help="where an interrupted run is resumed from")
    parser.add_argument("--evaluate", action="store_true", help="do not train: score the checkpoint on the test set")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.evaluate:
        text_only = [*vqa.facts_task(), *vqa.reverse_task("train")]
        texts = [t for q in [*vqa.questions("train"), *text_only] for t in (q.text, q.answer)]
        tokenizer = make_tokenizer(texts)
        model = checkpoint.from_config(config(tokenizer.get_vocab_size()), dtype="float32", random=True)
        initialise(model.module, args.seed)
        train(model.module, Prompts(tokenizer, model.family), args)
        save(model.module, model.raw_config, tokenizer, args.out)
        Path(args.state).unlink()
    evaluate(args.out, "test" if args.evaluate else "validation")


if __name__ == "__main__":
    main()
