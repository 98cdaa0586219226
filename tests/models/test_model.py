"""The family's model on whole sequences against the recorded reference, and what must not change its numbers."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file

from mmopt.frontend.load import from_config
from mmopt.models._stages import only
from mmopt.models.mplug_owl2 import Config, MplugOwl2

CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def case(name):
    return load_file(DATA / f"{name}.safetensors")


def raw_config(**changes):
    return json.loads((DATA / "config.json").read_text()) | changes


@pytest.mark.parametrize("name", ["mm_single", "mm_two_images", "text_only", "batch_right_pad", "batch_ragged_labels"])
def test_recorded_logits(model, name):
    c = case(name)
    rows, visual = c["out.prepare.inputs_embeds"], c["out.prepare.modality_indicators"]
    logits, kept = model.module(rows, visual)
    real = c.get("out.prepare.attention_mask", torch.ones_like(visual)).bool()
    torch.testing.assert_close(logits[real], c["out.logits"][real], **CLOSE)
    for i, (key, value) in enumerate(kept):
        for made, kind in ((key, "key"), (value, "value")):
            expected = c[f"out.kv_cache.{i}.{kind}"].transpose(1, 2).flatten(2)
            torch.testing.assert_close(made[real], expected[real], **CLOSE)


def test_recorded_image_rows(model):
    c = case("vision")
    made = model.module.encode_images(c["in.pixel_values"])
    torch.testing.assert_close(made, c["out.abstractor.last_hidden_state"], **CLOSE)


def test_a_ragged_batch_equals_single_runs(model):
    """Padding on the right is never seen: causality hides it."""
    g = torch.Generator().manual_seed(0)
    lengths, width = (11, 4, 7), model.config.hidden_size
    rows = torch.randn(3, 11, width, generator=g)
    visual = torch.rand(3, 11, generator=g) > 0.5
    for i, n in enumerate(lengths):
        rows[i, n:] = 99.0
    batch, _ = model.module(rows, visual)
    for i, n in enumerate(lengths):
        alone, _ = model.module(rows[i : i + 1, :n], visual[i : i + 1, :n])
        torch.testing.assert_close(batch[i : i + 1, :n], alone, **CLOSE)


def test_images_do_not_see_each_other(model):
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    together = model.module.encode_images(pixels)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], model.module.encode_images(pixels[i : i + 1]), **CLOSE)


def test_the_two_branches_differ(model):
    c = case("mm_single")
    rows, visual = c["out.prepare.inputs_embeds"], c["out.prepare.modality_indicators"]
    as_text, _ = model.module(rows, torch.zeros_like(visual))
    assert float((as_text - c["out.logits"]).abs().max()) > 1


def test_grouped_heads_are_repeated_heads():
    """A model of 2 key heads equals one of 4 whose key and value weights are those of the group, repeated."""
    grouped = from_config(raw_config(num_key_value_heads=2), dtype="float32", random=True).module
    plain = from_config(raw_config(), dtype="float32", random=True).module
    weights = grouped.state_dict()
    for name, w in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = w.view(2, 1, -1, w.shape[1]).expand(2, 2, -1, w.shape[1]).reshape(-1, w.shape[1])
    plain.load_state_dict(weights)
    g = torch.Generator().manual_seed(1)
    rows, visual = torch.randn(2, 9, 64, generator=g), torch.rand(2, 9, generator=g) > 0.5
    a, kept = grouped(rows, visual)
    b, _ = plain(rows, visual)
    torch.testing.assert_close(a, b, **CLOSE)
    assert kept[0][0].shape == (2, 9, 2 * 16)


def test_rotary_base_and_eps_come_from_the_config(model):
    c = case("text_only")
    rows, visual = c["out.prepare.inputs_embeds"], c["out.prepare.modality_indicators"]
    for change in ({"rope_theta": 500.0}, {"rms_norm_eps": 1e-1}):
        with torch.device("meta"):
            other = MplugOwl2(replace(model.config, **change))
        other.load_state_dict(model.module.state_dict(), assign=True)
        other.requires_grad_(False)
        assert float((other(rows, visual)[0] - c["out.logits"]).abs().max()) > 1e-2


def test_positions_do_not_depend_on_the_default_device_or_dtype():
    config = Config(vision=from_config("mplug-owl2-tiny").config.vision,
                    abstractor=from_config("mplug-owl2-tiny").config.abstractor, hidden_size=64, num_hidden_layers=1,
                    num_attention_heads=4, num_key_value_heads=4, intermediate_size=8, vocab_size=8)  # fmt: skip
    with torch.device("meta"):
        on_meta = MplugOwl2(config)
    here = MplugOwl2(config)
    for name in ("query_positions", "key_positions"):
        a, b = (getattr(m.model.visual_abstractor, name) for m in (on_meta, here))
        assert a.device.type == "cpu"
        assert torch.equal(a, b)
    assert torch.equal(on_meta.model.inv_freq, here.model.inv_freq)


def test_a_stage_has_its_own_submodules_alone(model):
    stage = model.family.stages(model.module, 64)["vision"].module
    own, every = dict(stage.named_parameters()), dict(model.module.named_parameters())
    assert own
    for name, parameter in own.items():
        assert name.startswith("root.model.vision_model.")
        assert parameter is every[name.removeprefix("root.")]
    assert len(dict(model.module.named_parameters())) == len(every) > len(own)
    with pytest.raises(AttributeError, match="no_such_part"):
        only(model.module, "model.no_such_part")
