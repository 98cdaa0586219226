"""A trained checkpoint, the whole way: load, optimize, export, ask about real pictures, measure speed, drift, accuracy.

python examples/demo.py [--questions N | --all] [--out DIRECTORY]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import vqa

import mmopt
from mmopt.processing.chat_template import ChatTemplate
from mmopt.processing.image_processor import ImageProcessor
from mmopt.processing.tokenizer import TextProcessor

CHECKPOINT = Path(__file__).parent / "checkpoints/mplug-owl2-vqa"
NEW_TOKENS = 4  # an answer is one word and the end


class Reference:
    """The model as loaded, in plain PyTorch and without a cache: what the engine has to agree with."""

    def __init__(self, model):
        self.module, family = model.module.float(), model.family
        chat = ChatTemplate.from_json(model.processing["chat"])
        self.images = ImageProcessor.from_json(model.processing["image"])
        marks = {chat.end: model.config.eos_token_id}
        ids = {"image_marker": family.image_marker, "image_id": family.image_id, "bos_id": model.config.bos_token_id}
        eos = (model.config.eos_token_id,)
        self.text = TextProcessor.from_file(CHECKPOINT / "tokenizer.json", **ids, eos_ids=eos, marks=marks)
        self.prompt = lambda q: self.text.encode(chat.render([{"role": "user", "content": q.content}]))
        self.eos, self.image_id = eos[0], family.image_id

    def encode(self, image: str) -> torch.Tensor:
        return self.module.encode_images(torch.from_numpy(self.images([image])))[0]

    def rows(self, ids: list[int], image: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of one prompt and which of them are visual."""
        text = self.module.model.embed_tokens(torch.tensor([i for i in ids if i != self.image_id]))
        if image is None:
            return text, torch.zeros(len(text), dtype=torch.bool)
        at = ids.index(self.image_id)
        visual = torch.zeros(len(text) + len(image), dtype=torch.bool)
        visual[at : at + len(image)] = True
        return torch.cat([text[:at], image, text[at:]]), visual

    def answers(self, questions: list[vqa.Question], image: torch.Tensor | None) -> tuple[list[str], torch.Tensor]:
        """Greedy answers to questions on one picture, all at once; and the first logits of each."""
        prompts, first = [self.prompt(q) for q in questions], None
        new: list[list[int]] = [[] for _ in prompts]
        for _ in range(NEW_TOKENS):
            rows = [self.rows(p + n, image) for p, n in zip(prompts, new, strict=True)]
            x = torch.nn.utils.rnn.pad_sequence([r for r, _ in rows], batch_first=True)
            visual = torch.nn.utils.rnn.pad_sequence([v for _, v in rows], batch_first=True)
            logits = self.module(x, visual)[0][torch.arange(len(rows)), [len(r) - 1 for r, _ in rows]]
            first = logits if first is None else first
            for n, token in zip(new, logits.argmax(-1).tolist(), strict=True):
                n.append(token)
        return [self.text.decode(n[: n.index(self.eos)] if self.eos in n else n) for n in new], first


def by_picture(questions: list[vqa.Question]) -> dict[str | None, list[vqa.Question]]:
    groups: dict[str | None, list[vqa.Question]] = {}
    for q in questions:
        groups.setdefault(q.image, []).append(q)
    return groups


def bar(done: int, all_: int) -> None:
    if sys.stderr.isatty():
        print(f"\r  {done} of {all_} questions", end="" if done < all_ else "\n", file=sys.stderr)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--questions", type=int, default=2000, help="questions of the test set to answer")
    arguments.add_argument("--all", action="store_true", help="all of them, and the text-only tasks")
    arguments.add_argument("--out", type=Path, default=Path("out/mplug-owl2-vqa"), help="engine directory")
    arguments.add_argument("--threads", type=int, default=2)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    print(f"== load, optimize and export {CHECKPOINT.name}")
    model = mmopt.load(CHECKPOINT, "float32")
    result = mmopt.optimize(mmopt.trace(model, batch=16, images=1, context=96))
    print(result)
    mmopt.export(result.program, args.out, reports=result.reports)
    engine, reference = mmopt.Engine(args.out, threads=args.threads), Reference(model)
    print(f"   wrote {args.out}: {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.1f} MB")

    test = vqa.questions("test")
    print("\n== the engine answers questions about pictures it has never seen")
    for q in test[:: len(test) // 8][:8]:
        print(f"   {Path(q.image).name:>8}  {q.text:<42} ", end="")
        for piece in engine.generate(q.text, images=[q.image], max_new_tokens=NEW_TOKENS, stream=True):
            print(piece, end="", flush=True)
        print(f"   (right: {q.answer})")

    chosen = test if args.all else test[: args.questions]
    if args.all:
        chosen = chosen + vqa.reverse_task("test") + vqa.facts_task()
    print(f"\n== accuracy, agreement and drift on {len(chosen)} questions")
    before, after, differing, drift, done = [], [], [], 0.0, 0
    for picture, group in by_picture(chosen).items():
        image = None if picture is None else reference.encode(picture)
        rows = None if picture is None else engine.encode_images([picture])
        for part in (group[i : i + 16] for i in range(0, len(group), 16)):
            expected, logits = reference.answers(part, image)
            repeated = None if rows is None else np.repeat(np.asarray(rows), len(part), axis=0)
            prompts = [reference.prompt(q) for q in part]
            made = engine.debug.generate_ids(prompts, image_embeds=repeated, max_new_tokens=NEW_TOKENS, logits=True)
            given = [reference.text.decode([t for t in ids if t != reference.eos]) for ids in made.tokens]
            drift = max(drift, float(np.abs(np.stack([steps[0] for steps in made.logits]) - logits.numpy()).max()))
            before += zip(part, expected, strict=True)
            after += zip(part, given, strict=True)
            differing += [q for q, a, b in zip(part, expected, given, strict=True) if a != b]
            done += len(part)
            bar(done, len(chosen))
    was, now = vqa.score(before), vqa.score(after)
    print(f"   {'kind':<10}{'model':>8}{'engine':>8}")
    for kind in was:
        print(f"   {kind:<10}{was[kind]:>8.4f}{now[kind]:>8.4f}")
    print(f"   different answers: {len(differing)} of {len(chosen)}; largest drift of a logit: {drift:.2e}")

    print(f"\n== speed: one question with its picture, {args.threads} threads, float32, interleaved")
    times: dict[str, list[float]] = {"model (PyTorch)": [], "engine (ONNX Runtime)": []}
    for q in test[:60]:
        start = time.perf_counter()
        reference.answers([q], reference.encode(q.image))
        middle = time.perf_counter()
        engine.generate(q.text, images=[q.image], max_new_tokens=NEW_TOKENS)
        times["model (PyTorch)"].append(middle - start)
        times["engine (ONNX Runtime)"].append(time.perf_counter() - middle)
    for name, seconds in times.items():
        print(f"   {name:<24}min {min(seconds) * 1e3:7.2f} ms   median {statistics.median(seconds) * 1e3:7.2f} ms")
    print(
        "   (so small a model tells little of speed: `mmopt bench speed --config mplug-owl2-mid --random-weights` does)"
    )
    if differing:
        sys.exit(f"the engine's answers differ from the model's on {len(differing)} questions")


if __name__ == "__main__":
    main()
