"""What the tests of the families from the transformers library share: random models of the library, and comparisons."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmopt.conformance.run_model import tapped
from mmopt.frontend.load import Model, load
from mmopt.ir.capture import trace_stage

os.environ["HF_HUB_OFFLINE"] = "1"
RECORDED = Path(__file__).parent / "data" / "flamingo"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
CAPACITY = 32


def recorded(family: str) -> list[str]:
    return sorted(p.stem for p in (RECORDED / family).glob("*.safetensors") if p.stem != "model")


def case(family: str, name: str) -> dict[str, torch.Tensor]:
    return load_file(RECORDED / family / f"{name}.safetensors")


def reference(name: str, raw: dict, seed: int = 0, **save):
    """A random model of the library: its class `name`, weights near 1 in effect, gates open."""
    import transformers

    config = getattr(transformers, name.split("For")[0] + "Config").from_dict(raw)
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        scale = p.shape[1:].numel() ** -0.5 if p.dim() in (2, 4) else 0.3
        centre = 1.0 if p.dim() == 1 and p.numel() > 1 and key.endswith("weight") else 0.0
        p.copy_(centre + scale * torch.randn(p.shape, generator=g))
        if p.numel() == 1:
            p.copy_(torch.tensor([0.6 if torch.rand(1, generator=g) < 0.5 else -0.6]))
    return model


def loaded(model, directory: Path, **options) -> Model:
    """The library's model written as the library writes it, and read by mmopt."""
    model.save_pretrained(directory, **options)
    return load(directory)


def with_hooks(model: Model, names, run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What `run` returns, and the outputs of the modules that the recorded `names` stand for."""
    kept: dict[str, torch.Tensor] = {}
    hooks = []
    cases = model.family.cases
    cases = cases(model.config) if callable(cases) else cases
    for name in names:
        path = tapped(name, cases.vision_taps | cases.language_taps)
        if path:
            module = model.module.get_submodule(path)
            hooks.append(module.register_forward_hook(lambda m, args, out, name=name: kept.setdefault(name, out)))
    try:
        with torch.inference_mode():
            return run(), kept
    finally:
        for hook in hooks:
            hook.remove()


def check_stages(model: Model, image_inputs: dict[str, torch.Tensor]) -> None:
    """The traced stages against the plain model: images, ids, and prefill in pieces with decode on top of caches."""
    module, c, weights = model.module, model.config, {}
    specs = model.family.stages(module, CAPACITY)
    stages = {name: trace_stage(spec, weights) for name, spec in specs.items()}
    cross = model.family.cross(c)
    g = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        values = dict(image_inputs)
        for name in ("encode_vision", "resample"):
            if name in stages:
                values |= stages[name].run(weights, values)
        rows = module.encode_images(**image_inputs)
        assert rows.shape[1:] == (cross.tiles, cross.tokens, cross.width)
        torch.testing.assert_close(values["image_rows"], rows, **CLOSE)

        batch, length, blocks = 2, 9, 3
        ids = torch.randint(0, c.vocab_size, (batch, length), generator=g)
        media = torch.randn(batch, blocks, cross.tokens, cross.width, generator=g)
        seen = torch.rand(batch, length, blocks, generator=g) > 0.5
        attends = torch.rand(batch, length, generator=g) > 0.3
        sees = attends & (torch.rand(batch, length, generator=g) > 0.3)
        x = stages["embed"].run(weights, {"ids": ids})["text"]
        torch.testing.assert_close(x, specs["embed"].module(ids))
        expected = module(x, media, seen, attends, sees=sees)
        state = {"past": torch.zeros(batch, dtype=torch.int64)}
        for i in range(c.num_hidden_layers):
            for kind in ("key", "value"):
                shape = (batch, c.num_key_value_heads, CAPACITY, c.head_dim)
                state[f"{kind}_cache.{i}"] = torch.zeros(shape)
        logits, done = [], 0
        for n in (4, 1, 3, 1):
            now = slice(done, done + n)
            given = {"text": x[:, now], "seen": seen[:, now], "attends": attends[:, now], "sees": sees[:, now]}
            given |= {"media": media} | state
            made = stages["language_model"].run(weights, {k: given[k] for k in stages["language_model"].inputs})
            logits.append(made.pop("logits"))
            state, done = state | made, done + n
        torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)
        assert state["past"].tolist() == [length] * batch
