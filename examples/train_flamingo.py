"""Train a small Flamingo to answer from interleaved shots; write it in the layout of OpenFlamingo's checkpoints.

python examples/train_flamingo.py --out examples/checkpoints/flamingo-vqa
python examples/train_flamingo.py --out examples/checkpoints/flamingo-vqa --evaluate   # held-out pictures only
"""

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from pathlib import Path

import codebook
import safetensors.torch
import torch
import torch.nn.functional as F
import vqa
from codebook import Chunk
from episodes import CHUNKS, SHOTS, Checks, Prompts, logits_of, share
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from train_mplug_owl2 import PREPROCESSOR, augmented, load_images

from mmopt.frontend import load as checkpoint

VISION = Path(__file__).parent / "checkpoints/mplug-owl2-vqa/model.safetensors"  # its vision tower is used as it is
IMAGES, EPISODES = 48, 48  # per step: pictures, and episodes made of them
BOOK_SHARE = 0.5  # of the episodes; the others are ordinary questions, where shots are of no use
LEARNING_RATE = 1e-3


def config(words: int) -> dict:
    """`words`: size of the language model's own vocabulary, before the marks of Flamingo are added."""
    lm = {"vocab_size": words, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    lm |= {"intermediate_size": 512, "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000}
    lm |= {"max_position_embeddings": 256, "layer_norm_eps": 1e-5, "use_parallel_residual": False}
    lm |= {"tie_word_embeddings": False, "attention_bias": True, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"image_size": 64, "patch_size": 8, "width": 96, "layers": 3, "heads": 4, "mlp_ratio": 4.0}
    heads = {"dim_head": 32, "heads": 4, "ff_mult": 4}
    model = {
        "vision": vision | {"act": "quick_gelu"},
        "lm": {"type": "gpt_neox", "hf_config": lm},
        "decoder_layers_attr_name": "gpt_neox.layers",
        "vocab_size_after_resize": words + 3,
        "eoc_token_id": words,
        "media_token_id": words + 1,
        "pad_token_id": words + 2,
        "cross_attn_every_n_layers": 1,
        "perceiver": heads | {"depth": 2, "num_latents": 8},
        "gated_cross_attn": heads | {"only_attend_immediate_media": True},
    }
    return {"model": model, "dtype": "float16"}


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """One token for each word, lower-cased; "question:", "answer:" and "?" are tokens of their own."""
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+:|[?!.,]"), "isolated")]
    made = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    words = {w for t in texts for w, _ in made.pre_tokenizer.pre_tokenize_str(t.lower())}
    vocab = {w: i for i, w in enumerate(["<|endoftext|>", "<unk>", *sorted(words)])}
    made.model = models.WordLevel(vocab, unk_token="<unk>")
    made.add_special_tokens(["<|endoftext|>", "<unk>"])
    made.add_special_tokens(["<|endofchunk|>", "<image>", "<PAD>"])  # last, as OpenFlamingo adds them
    return made


def initialise(module: nn.Module, seed: int) -> None:
    """Gates half open: there is no trained language model to protect, and closed ones would hardly open in time.

    Words must not be as small as usual (0.02), or what the first gate lets in would drown them. The vision tower is the
    trained one of the first yardstick.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in module.named_parameters():
            if key.endswith("gate"):
                p.fill_(0.5)
            elif p.dim() == 1:
                p.fill_(1.0 if key.endswith("weight") else 0.0)
            elif key.endswith("latents"):
                p.normal_(std=0.5, generator=generator)
            else:
                std = 0.3 if "embed_in" in key else 0.7 * p[0].numel() ** -0.5
                p.normal_(std=std, generator=generator)
    module.vision_encoder.load_state_dict(vision_weights(module.config.vision.heads))


def vision_weights(heads: int) -> dict[str, Tensor]:
    """The vision tower of the first yardstick under CLIP's names."""
    renamed = {"embeddings.patch_embed": "conv1", "embeddings.pre_layernorm": "ln_pre", "post_layernorm": "ln_post"}
    renamed |= {"embeddings.cls_token": "class_embedding", "embeddings.position_embedding": "positional_embedding"}
    renamed |= {
        "encoder.layers": "transformer.resblocks",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
    }
    renamed |= {"self_attn.query_key_value.": "attn.in_proj_", "self_attn.dense": "attn.out_proj"}
    renamed |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    made = {}
    for key, v in safetensors.torch.load_file(VISION).items():
        if "vision_model." in key:
            key = key.split("vision_model.")[1]
            for old in sorted(renamed, key=len, reverse=True):
                key = key.replace(old, renamed[old])
            if "in_proj" in key:  # q, k, v of each head -> q of all heads, k of all, v of all
                v = v.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            made[key] = v.float().squeeze() if key.endswith("embedding") else v.float()
    return made


def train(module: nn.Module, prompts: Prompts, args: argparse.Namespace) -> None:
    shown, asked = codebook.pictures("train"), vqa.questions("train")
    images = load_images(asked)
    by_image: dict[str, list[vqa.Question]] = defaultdict(list)
    for q in asked:
        by_image[str(q.image)].append(q)
    checks = Checks("validation", 400)
    # Training only: one head names colour and shape from a picture's latents, which makes the resampler useful early;
    # the other names the code book from the row of an answer, half-way through the layers. Without it the model takes
    # shots for their words alone: that they have to be looked at together with their pictures is not found in time.
    torch.manual_seed(args.seed)
    see = nn.Linear(2 * module.config.vision.width, len(vqa.COLOURS) + len(vqa.SHAPES))
    read = nn.Linear(module.config.hidden_size, len(codebook.BOOKS))
    half_way: list[Tensor] = []
    module.lang_encoder.gpt_neox.layers[1].register_forward_hook(lambda _module, _in, out: half_way.append(out))
    module.requires_grad_(True).vision_encoder.requires_grad_(False)
    trained = {"module": module, "see": see, "read": read}
    parameters = [p for m in trained.values() for p in m.parameters() if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    first, spent, run = 0, 0.0, [args.steps, args.seed]
    if args.state.is_file():
        saved = torch.load(args.state, weights_only=True)
        if saved["run"] != run:
            raise SystemExit(f"{args.state} is of a run with (steps, seed) {saved['run']}: delete it or name another")
        for name, part in (trained | {"optimizer": optimizer}).items():
            part.load_state_dict(saved[name])
        first, spent = saved["step"], saved["seconds"]
        print(f"resumed at step {first} from {args.state}", flush=True)
    began = time.monotonic() - spent
    for step in range(first, args.steps):
        rng = random.Random(f"{args.seed} {step}")  # of the step alone, so a resumed run is the same run
        warm, done = min(1.0, (step + 1) / 50), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        chosen = rng.sample(shown, IMAGES)
        episodes, books = [], []
        for i in range(EPISODES):
            book, part = codebook.episode(rng, chosen, CHUNKS)
            if i < BOOK_SHARE * EPISODES:
                episodes.append(codebook.chunks_of(book, part))
                books.append(codebook.BOOKS.index(book))
            else:
                picked = [rng.choice(by_image[p.path]) for p in part]
                episodes.append([Chunk(str(q.image), q.text, q.answer) for q in picked])
        ids, wanted = prompts.batch(episodes)
        with torch.no_grad():
            patches = module.vision_encoder(augmented(torch.stack([images[p.path] for p in chosen]), rng))
        latents = module.perceiver(patches)
        place = {p.path: i for i, p in enumerate(chosen)}
        media = latents[torch.tensor([[place[c.image] for c in chunks] for chunks in episodes])]
        half_way.clear()
        loss = F.cross_entropy(logits_of(module, ids, media).flatten(0, 1), wanted.flatten())

        named = see(torch.cat([latents.mean(1), latents.amax(1)], dim=1)).split([len(vqa.COLOURS), len(vqa.SHAPES)], 1)
        target = [[vqa.COLOURS.index(p.colour), vqa.SHAPES.index(p.shape)] for p in chosen]
        see_loss = sum(F.cross_entropy(n, t) for n, t in zip(named, torch.tensor(target).unbind(1), strict=True))
        answers = half_way[0][: len(books)][wanted[: len(books)] == prompts.end]  # an answer's row predicts the end
        read_loss = F.cross_entropy(read(answers), torch.tensor(books).repeat_interleave(CHUNKS))
        optimizer.zero_grad()
        (loss + 0.3 * max(0.0, 1 - done / 0.6) * (see_loss + read_loss)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            rows = checks.encode(module)
            found = [checks.right(module, prompts, rows, e).float().mean(0).tolist() for e in (checks.book, checks.vqa)]
            gates = [g.tanh().item() for k, g in module.named_parameters() if k.endswith("attn_gate")]
            spent = time.monotonic() - began
            print(
                f"step {step + 1}: {spent:.0f} s, loss {loss.item():.3f}, heads {see_loss.item():.3f} "
                f"{read_loss.item():.3f}, gates {' '.join(f'{g:.2f}' for g in gates)}; "
                "validation, 0 to 4 shots: code book "
                + ", questions ".join(" ".join(f"{x:.3f}" for x in xs) for xs in found),
                flush=True,
            )
            args.state.parent.mkdir(parents=True, exist_ok=True)
            made = {name: part.state_dict() for name, part in (trained | {"optimizer": optimizer}).items()}
            torch.save(made | {"run": run, "step": step + 1, "seconds": spent}, args.state.with_suffix(".part"))
            os.replace(args.state.with_suffix(".part"), args.state)


def evaluate(out: Path, split: str, count: int) -> None:
    """The saved file, computed in float32: the code book and ordinary questions, with their pictures and without."""
    model = checkpoint.load(out, dtype="float32")
    prompts = Prompts(Tokenizer.from_file(str(out / "tokenizer.json")), model.config)
    checks = Checks(split, count)
    rows, rng = checks.encode(model.module), random.Random(0)
    paths = list(checks.images)
    print(f"{split}, {count} episodes; columns: {SHOTS} shots")
    for task, episodes in (("code book", checks.book), ("questions", checks.vqa)):
        cut = {n: [e[CHUNKS - 1 - n :] for e in episodes] for n in SHOTS}  # the query is the same, whatever the shots
        cases = {
            "pictures": {n: None for n in SHOTS},
            "all pictures zeroed": {n: [[None] * (n + 1)] * count for n in SHOTS},
            "shots' pictures zeroed": {n: [[None] * n + [e[-1].image] for e in cut[n]] for n in SHOTS[1:]},
            "shots' pictures exchanged": {n: [[*rng.sample(paths, n), e[-1].image] for e in cut[n]] for n in SHOTS[1:]},
        }
        for case, shown in cases.items():
            found = [
                share(checks.right(model.module, prompts, rows, cut[n], s)[:, -1].tolist()) for n, s in shown.items()
            ]
            print(f"  {task}, {case}: " + "  ".join(found), flush=True)
        answers = [e[-1].answer for e in episodes]
        print(f"  {task}, most frequent answer: {max(map(answers.count, set(answers))) / count:.4f}")
    for see in (True, False):
        best = [sum(codebook.best_chance(b, p[CHUNKS - 1 - n :], see) for b, p in checks.drawn) / count for n in SHOTS]
        reader = "who knows all books" if see else "who does not see the shots' pictures"
        print(f"  code book, best reader {reader}: " + "  ".join(f"{b:.4f}" for b in best))


def save(module: nn.Module, raw: dict, tokenizer: Tokenizer, out: Path) -> None:
    """Each file under a temporary name first: an interrupted run leaves no half-written checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    files = {"config.json": raw, "preprocessor_config.json": PREPROCESSOR}
    made = {name: (json.dumps(value, indent=1) + "\n").encode() for name, value in files.items()}
    made["tokenizer.json"] = tokenizer.to_str(True).encode()
    weights = {k: v.to(torch.float16).contiguous() for k, v in module.state_dict().items()}
    made["model.safetensors"] = safetensors.torch.save(weights, metadata={"format": "pt"})
    for name, data in made.items():
        (out / (name + ".part")).write_bytes(data)
    for name in made:
        os.replace(out / (name + ".part"), out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, default="out/train_flamingo.pt", help="where a run is resumed from")
    parser.add_argument("--evaluate", action="store_true", help="do not train: score the checkpoint on the test set")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.evaluate:
        asked = vqa.questions("train")
        texts = [codebook.QUESTION, " ".join(codebook.words()), "Question: Short answer:"]
        tokenizer = make_tokenizer([*texts, *(t for q in asked for t in (q.text, q.answer))])
        raw = config(tokenizer.get_vocab_size() - 3)
        model = checkpoint.from_config(raw, dtype="float32", random=True)
        initialise(model.module, args.seed)
        train(model.module, Prompts(tokenizer, model.config), args)
        save(model.module, raw, tokenizer, args.out)
    evaluate(args.out, "test" if args.evaluate else "validation", 2000)


if __name__ == "__main__":
    main()
