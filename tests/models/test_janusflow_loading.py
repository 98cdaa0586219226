"""JanusFlow as it lies on disk: shards, half precision, an autoencoder beside it or elsewhere, and what is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

import mmopt
from mmopt.cli import app
from mmopt.models._weight_files import CheckpointError

DATA = Path(__file__).parents[1] / "data" / "janusflow"
VAE = DATA / "vae"
ANOTHER = Path(__file__).parents[1] / "data" / "mplug_owl2"


@pytest.fixture(scope="module")
def tensors():
    return load_file(DATA / "model.safetensors")


@pytest.fixture(scope="module")
def whole():
    return mmopt.load(DATA)


def written(folder: Path, tensors: dict, shards: int = 1, config: dict | None = None) -> Path:
    """A directory in the official layout, without an autoencoder."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads((DATA / "config.json").read_text()) if config is None else config
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({k: tensors[k] for k in names[i::shards]}, folder / file)
        where |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def same(a, b) -> bool:
    one, two = a.module.state_dict(), b.module.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def kinds(model, prefix: str = "") -> set:
    return {x.dtype for k, x in model.module.state_dict().items() if k.startswith("vae.") == (prefix == "vae.")}


def test_the_pooling_head_is_in_the_file_and_not_loaded(tensors, whole):
    assert any(".attn_pool." in k for k in tensors)
    assert not any(".attn_pool." in k for k in whole.module.state_dict())


def test_shards_and_an_autoencoder_elsewhere(tmp_path, tensors, whole):
    folder = written(tmp_path / "model", tensors, shards=3)
    assert same(mmopt.load(folder, vae=VAE), whole)
    moved = shutil.copytree(VAE, tmp_path / "elsewhere")
    assert same(mmopt.load(folder, vae=str(moved)), whole)
    shutil.copytree(VAE, folder / "vae")
    assert same(mmopt.load(folder), whole)


def test_the_option_goes_before_the_folder(tmp_path, whole):
    other = shutil.copytree(VAE, tmp_path / "vae")
    file = other / "diffusion_pytorch_model.safetensors"
    changed = {k: x + 1 for k, x in load_file(file).items()}
    save_file(changed, file)
    made = mmopt.load(DATA, vae=other)
    assert torch.equal(made.module.vae.decoder.conv_in.bias, whole.module.vae.decoder.conv_in.bias + 1)


def test_without_an_autoencoder(tmp_path, tensors):
    made = mmopt.load(written(tmp_path / "model", tensors), latent_size=16)
    assert made.module.vae is None
    assert made.config.flow.latents == (4, 16, 16)
    assert "decode_image" not in mmopt.trace(made, context=80).stages
    with pytest.raises(ValueError, match="has no autoencoder"):
        made.module.decode_image(torch.zeros(1, 4, 16, 16))


def test_a_config_that_holds_the_autoencoder_s(tmp_path, tensors, whole):
    """As the shipped ones do: with its tensors in the same file it is complete, else it is loaded without."""
    raw = whole.raw_config
    assert raw["vae"]["scaling_factor"] == 0.13025
    kept = {k: x for k, x in whole.module.state_dict().items()}
    assert same(mmopt.load(written(tmp_path / "one", kept, config=raw)), whole)
    assert mmopt.load(written(tmp_path / "two", tensors, config=raw)).module.vae is None


def test_precisions(tmp_path, tensors):
    folder = written(tmp_path / "model", {k: x.bfloat16() for k, x in tensors.items()})
    shutil.copytree(VAE, folder / "vae")
    stored = mmopt.load(folder)
    assert (kinds(stored), kinds(stored, "vae.")) == ({torch.bfloat16}, {torch.float32})
    assert stored.dtype == torch.bfloat16
    for asked, model, vae in (
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("float16", torch.float16, torch.float32),
        ("float32", torch.float32, torch.float32),
    ):
        made = mmopt.load(folder, dtype=asked)
        assert (kinds(made), kinds(made, "vae.")) == ({model}, {vae})
        image = made.module.decode_image(torch.randn(1, 4, 16, 16))
        assert image.dtype == torch.float32
        assert image.isfinite().all()
    made = mmopt.from_config("janusflow-tiny", "float16", random=True)
    assert (kinds(made), kinds(made, "vae.")) == ({torch.float16}, {torch.float32})


def test_an_autoencoder_stored_in_half_precision(tmp_path, tensors):
    """In float16 it gives no picture: it is computed in float32."""
    other = tmp_path / "vae"
    other.mkdir()
    shutil.copy(VAE / "config.json", other)
    half = {k: x.half() for k, x in load_file(VAE / "diffusion_pytorch_model.safetensors").items()}
    save_file(half, other / "diffusion_pytorch_model.fp16.safetensors")
    made = mmopt.load(DATA, vae=other)
    assert (kinds(made), kinds(made, "vae.")) == ({torch.float32}, {torch.float32})


def test_a_float16_model_traces_with_a_float32_end(tmp_path):
    program = mmopt.trace(mmopt.load(DATA, dtype="float16"), context=80)
    image = program.stages["decode_image"].output_nodes()["image"]
    assert image.meta["dtype"] == torch.float32
    decoder = [n for n in program.stages["decode_image"].graph.nodes if n.op == "get_attr"]
    assert {n.meta["dtype"] for n in decoder} == {torch.float32}
    assert program.stages["flow_decode"].output_nodes()["velocity"].meta["dtype"] == torch.float32


def test_what_is_missing_or_wrong_is_named(tmp_path, tensors):
    wrong = dict(tensors)
    del wrong["vision_gen_dec_aligner.bias"]
    wrong["vision_gen_enc_model.in_conv.weight"] = torch.zeros(32, 4, 3, 3)
    wrong["strange"] = torch.zeros(2)
    vae = shutil.copytree(VAE, tmp_path / "vae")
    file = vae / "diffusion_pytorch_model.safetensors"
    held = load_file(file)
    del held["decoder.conv_out.bias"]
    save_file(held, file)
    with pytest.raises(CheckpointError) as error:
        mmopt.load(written(tmp_path / "model", wrong), vae=vae)
    said = str(error.value)
    assert f"missing vision_gen_dec_aligner.bias (32,) in {tmp_path / 'model'}" in said
    assert f"missing vae.decoder.conv_out.bias (3,) in {vae}" in said
    assert f"unexpected strange (2,) in {tmp_path / 'model' / 'model.safetensors'}" in said
    assert "expected shape (32, 4, 2, 2), found (32, 4, 3, 3)" in said


def test_an_autoencoder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        mmopt.load(DATA, vae=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        mmopt.load(DATA, vae=tmp_path)
    with pytest.raises(CheckpointError, match="expected the directory of an autoencoder"):
        mmopt.load(DATA, vae=VAE / "diffusion_pytorch_model.safetensors")


def test_other_latents_than_the_model_s(tmp_path):
    vae = shutil.copytree(VAE, tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"latent_channels": 16}))
    with pytest.raises(ValueError, match="latent_channels 16 of the autoencoder must be 4"):
        mmopt.load(DATA, vae=vae)


@pytest.mark.parametrize("options", [{"vision": DATA}, {"ln_post": True}, {"vision_heads": 3}])
def test_options_of_other_families(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: .*only vae, latent_size"):
        mmopt.load(DATA, **options)


def test_other_families_take_no_autoencoder():
    with pytest.raises(ValueError, match=re.escape("vae: checkpoints of the family mplug_owl2 are complete")):
        mmopt.load(ANOTHER, vae=VAE)


@pytest.mark.parametrize("said", [None, {"eos_token": {"content": "<end>"}, "bos_token": "<begin>"}])
def test_ids_that_only_the_tokenizer_knows(tmp_path, tensors, said):
    """A published config.json names neither the first nor the last token of a text."""
    raw = json.loads((DATA / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id"):
        del raw["language_config"][name]
    folder = written(tmp_path / "model", tensors, config=raw)
    assert (mmopt.load(folder).config.bos_token_id, mmopt.load(folder).config.eos_token_id) == (1, 2)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<begin>": 1, "<end>": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    if said is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    made = mmopt.load(folder).config
    assert (made.bos_token_id, made.eos_token_id) == ((3, 4) if said is None else (1, 2))
    raw["language_config"] |= {"bos_token_id": 7, "eos_token_id": [8, 9]}
    (folder / "config.json").write_text(json.dumps(raw))
    made = mmopt.load(folder).config
    assert (made.bos_token_id, made.eos_token_id) == (7, (8, 9))


def test_the_command_line(tmp_path, tensors):
    folder = written(tmp_path / "model", tensors)
    size = ["--context", "128", "--json"]
    bare = CliRunner().invoke(app, ["inspect", str(folder), "--set", "latent_size=16", *size])
    full = CliRunner().invoke(app, ["inspect", str(folder), "--vae", str(VAE), *size])
    assert (bare.exit_code, full.exit_code) == (0, 0)
    assert "decode_image" not in bare.stdout
    assert "decode_image" in full.stdout
