"""The autoencoder against diffusers (recorded), and its loader."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmopt.ir.capture import StageSpec, TensorSpec, trace_stage
from mmopt.models._autoencoder import AutoencoderKL, load_autoencoder, parse_autoencoder, read_autoencoder
from mmopt.models._weight_files import CheckpointError

DATA = Path(__file__).parents[1] / "data"
VAE = DATA / "janusflow" / "vae"
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def config(**changes):
    return json.loads((VAE / "config.json").read_text()) | changes


def made(**changes):
    """A model of other sizes, with random weights."""
    torch.manual_seed(0)
    return AutoencoderKL(parse_autoencoder(config(**changes))).eval().requires_grad_(False)


def copy(folder, rename=lambda k: k, file="diffusion_pytorch_model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(VAE / "config.json", folder / "config.json")
    tensors = {rename(k): x for k, x in load_file(VAE / "diffusion_pytorch_model.safetensors").items()}
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)
    return folder


def test_recorded_encoding():
    c = load_file(DATA / "autoencoder_encode.safetensors")
    mean, logvar = load_autoencoder(VAE).encode(c["in.images"])
    torch.testing.assert_close(mean, c["out.mean"], **CLOSE)
    torch.testing.assert_close(logvar, c["out.logvar"], **CLOSE)


@pytest.mark.parametrize("name", ["gen_s4_cfg5", "gen_s30"])
def test_recorded_decoding(name):
    c, vae = load_file(DATA / "janusflow" / f"{name}.safetensors"), load_autoencoder(VAE)
    torch.testing.assert_close(vae.decode(c["out.vae_input"]), c["out.image"], **CLOSE)
    torch.testing.assert_close(vae.image_of(c["out.z"][-1]), c["out.image"], **CLOSE)


def test_the_stage_that_is_traced():
    c, vae = load_file(DATA / "janusflow" / "gen_s4_cfg5.safetensors"), load_autoencoder(VAE)

    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.root = vae

        def forward(self, latents):
            return self.root.image_of(latents)

    weights = {}
    spec = StageSpec(Decode(), {"latents": TensorSpec(("B", 4, 16, 16), torch.float32)}, ["image"])
    stage = trace_stage(spec, weights)
    attention = [n for n in stage.graph.nodes if n.target is torch.ops.mmopt.attention.default]
    assert len(attention) == 1
    assert attention[0].args[3:5] == (1, 1)
    for count in (1, 2):
        image = stage.run(weights, {"latents": c["out.z"][-1][:count]})["image"]
        torch.testing.assert_close(image, c["out.image"][:count], **CLOSE)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"block_out_channels": [8, 16]}, 2),
        ({"block_out_channels": [4, 8, 16], "layers_per_block": 1}, 4),
        ({"latent_channels": 7, "use_quant_conv": False, "use_post_quant_conv": False}, 8),
        ({"mid_block_add_attention": False, "norm_num_groups": 8}, 8),
    ],
)
def test_other_sizes(changes, factor):
    vae = made(**changes)
    channels = changes.get("latent_channels", 4)
    mean, logvar = vae.encode(torch.randn(2, 3, 8 * factor, 4 * factor))
    assert vae.config.factor == factor
    assert mean.shape == logvar.shape == (2, channels, 8, 4)
    assert vae.decode(mean).shape == (2, 3, 8 * factor, 4 * factor)
    held = {k.split(".")[0] for k in vae.state_dict()}
    assert ("quant_conv" in held) == changes.get("use_quant_conv", True)
    assert any("attentions" in k for k in vae.state_dict()) == changes.get("mid_block_add_attention", True)


def test_scaling_and_shift():
    vae = made(scaling_factor=0.5, shift_factor=0.25)
    x, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 2, 2)
    mean, logvar = vae.encode(x)
    torch.testing.assert_close(vae.latents_of(x), (mean - 0.25) * 0.5)
    torch.testing.assert_close(vae.latents_of(x, noise), (mean + (logvar / 2).exp() * noise - 0.25) * 0.5)
    torch.testing.assert_close(vae.image_of(vae.latents_of(x)), vae.decode(mean), **CLOSE)


def test_half_precision_gives_float32_images():
    c = load_file(DATA / "janusflow" / "gen_s4_cfg5.safetensors")
    image = load_autoencoder(VAE, torch.bfloat16).image_of(c["out.z"][-1])
    assert image.dtype == torch.float32
    assert 0 < float((image - c["out.image"]).abs().max()) < 0.15 * float(c["out.image"].abs().max())


@pytest.mark.parametrize("kind", ["fp16.safetensors", "bin", "fp16.bin"])
def test_other_files(tmp_path, kind):
    file = f"diffusion_pytorch_model.{kind}"
    read = read_autoencoder(copy(tmp_path / "vae", file=file))
    assert set(read.files.values()) == {tmp_path / "vae" / file}
    expected = load_autoencoder(VAE).state_dict()
    assert all(torch.equal(x, expected[k]) for k, x in load_autoencoder(tmp_path / "vae").state_dict().items())


def test_older_names_of_the_attention(tmp_path):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key):
        for new, old in older.items():
            key = key.replace(f".{new}.", f".{old}.")
        return key

    folder = copy(tmp_path / "vae", rename)
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in load_file(folder / "diffusion_pytorch_model.safetensors")
    expected = load_autoencoder(VAE).state_dict()
    assert all(torch.equal(x, expected[k]) for k, x in load_autoencoder(folder).state_dict().items())


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        load_autoencoder(tmp_path)
    shutil.copy(VAE / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no weights of an autoencoder; expected diffusion_pytorch_model\.safet"):
        load_autoencoder(tmp_path)
    tensors = load_file(VAE / "diffusion_pytorch_model.safetensors")
    tensors["strange"] = tensors.pop("decoder.conv_in.weight")
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"][:, :2].contiguous()
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_autoencoder(tmp_path)
    for said in (
        "missing decoder.conv_in.weight (16, 4, 3, 3)",
        "unexpected strange",
        "(8, 3, 3, 3), found (8, 2, 3, 3)",
    ):
        assert said in str(error.value)


def test_pickles_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = copy(tmp_path / "vae", file="diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin"):
        load_autoencoder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny', only 'AutoencoderKL' is supported"),
        ({"act_fn": "relu"}, "act_fn is 'relu', only 'silu'"),
        ({"latents_mean": [0.0]}, "latents_mean is"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types holds AttnDownEncoderBlock2D"),
        ({"block_out_channels": []}, "block_out_channels is [], expected positive numbers"),
        ({"block_out_channels": [6, 16]}, "block_out_channels [6] are no multiples of norm_num_groups 4"),
        ({"layers_per_block": 1.5}, "layers_per_block is 1.5, expected a positive int"),
        ({"scaling_factor": 0}, "scaling_factor is 0, expected a positive float"),
        ({"use_quant_conv": 1}, "use_quant_conv is 1, expected a bool"),
    ],
)
def test_configs_that_are_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        parse_autoencoder(config(**changes), "some/vae")
    assert "some/vae" in str(error.value)
