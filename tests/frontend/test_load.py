"""Loading: every file layout and dtype, and a clear word about what does not fit."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file

from mmopt.frontend.load import from_config, load, shipped_configs
from mmopt.models._weight_files import CheckpointError
from mmopt.models.mplug_owl2 import abstractor_positions

FIRST = "model.embed_tokens.weight"
QUERIES = "model.visual_abstractor.encoder.layers.0.crossattention.attention.q_pos_embed"
KEYS = "model.visual_abstractor.encoder.layers.0.crossattention.attention.k_pos_embed"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def stored():
    return load_file(DATA / "model.safetensors")


@pytest.fixture(scope="module")
def learned(stored, model):
    """What is not derived."""
    names = model.module.state_dict()
    return {k: v for k, v in stored.items() if k in names}


def config(**changes):
    return json.loads((DATA / "config.json").read_text()) | changes


def written(folder, tensors=None, raw=None, name="model.safetensors"):
    """A checkpoint directory."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw or config()))
    if tensors is not None:
        if name.endswith(".bin"):
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, folder / name)
    return folder


def sharded(folder, tensors, stem, ending):
    """Two shards and their index."""
    names, half = sorted(tensors), len(tensors) // 2
    files = {f"{stem}-{i + 1:05d}-of-00002.{ending}": part for i, part in enumerate((names[:half], names[half:]))}
    for file, part in files.items():
        written(folder, {n: tensors[n] for n in part}, name=file)
    index = {"weight_map": {n: file for file, part in files.items() for n in part}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


def assert_same(model, tensors):
    state = model.module.state_dict()
    assert set(state) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(state[name], value), name


# ------------------------------------------------------------------------------------------------------------ layouts
def test_the_recorded_checkpoint(model, learned):
    assert_same(model, learned)
    assert model.dtype == torch.float32
    assert model.has_weights
    assert model.directory == DATA
    assert not any(p.requires_grad or p.is_meta for p in model.module.parameters())
    assert model.weight_bytes == sum(v.numel() * 4 for v in learned.values())


def test_single_bin(tmp_path, learned):
    assert_same(load(written(tmp_path, learned, name="pytorch_model.bin")), learned)


@pytest.mark.parametrize(("stem", "ending"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards(tmp_path, learned, stem, ending):
    assert_same(load(sharded(tmp_path, learned, stem, ending)), learned)


def test_safetensors_come_before_bin(tmp_path, learned):
    written(tmp_path, {}, name="pytorch_model.bin")
    assert_same(load(written(tmp_path, learned)), learned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_dtypes_stay_as_stored(tmp_path, learned, dtype, name):
    tensors = {k: v.to(dtype) for k, v in learned.items()}
    model = load(written(tmp_path, tensors, name=name))
    assert model.dtype == dtype
    assert_same(model, tensors)
    assert model.module.model.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bf16", torch.bfloat16])
def test_dtype_on_request(dtype, learned):
    model = load(DATA, dtype=dtype)
    wanted = torch.float16 if dtype == "float16" else torch.bfloat16
    assert_same(model, {k: v.to(wanted) for k, v in learned.items()})


def test_mixed_dtypes_become_the_widest(tmp_path, learned):
    half = {k: v if "norm" in k else v.half() for k, v in learned.items()}
    model = load(written(tmp_path, half))
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert_same(model, {k: v.float() for k, v in half.items()})


def test_grouped_key_heads(tmp_path):
    raw = config(num_key_value_heads=2, torch_dtype="float32")
    tensors = from_config(raw, random=True).module.state_dict()
    assert tensors["model.layers.0.self_attn.k_proj.multiway.1.weight"].shape == (32, 64)
    assert_same(load(written(tmp_path, tensors, raw)), tensors)


def test_tied_embeddings_need_no_head(tmp_path, learned):
    tied = {k: v for k, v in learned.items() if k != "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        load(written(tmp_path, tied))
    module = load(written(tmp_path, tied, config(tie_word_embeddings=True))).module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert torch.equal(module.lm_head.weight, learned[FIRST])


# ----------------------------------------------------------------------------------------------------- derived buffers
def test_derived_buffers_may_be_there(tmp_path, model, learned):
    queries, keys = abstractor_positions(model.config.abstractor)
    derived = {QUERIES: queries.bfloat16(), KEYS: keys, INV_FREQ: model.module.model.inv_freq.half()}
    assert_same(load(written(tmp_path, learned | derived)), learned)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        (QUERIES, lambda q, k: q + 1, "differs from the sine positions by 1"),
        (KEYS, lambda q, k: k.flip(0), "differs from the sine positions by"),
        (KEYS, lambda q, k: k[:-1], r"shape \(16, 48\), expected \(17, 48\)"),
    ],
)
def test_wrong_derived_buffers_are_refused(tmp_path, model, learned, name, change, why):
    wrong = change(*abstractor_positions(model.config.abstractor)).contiguous()
    with pytest.raises(CheckpointError, match=f"derived {name}: {why}"):
        load(written(tmp_path, learned | {name: wrong}))


# ------------------------------------------------------------------------------------------------------ what is refused
def test_all_that_does_not_fit_is_listed_at_once(tmp_path, learned):
    wrong = dict(learned)
    del wrong[FIRST], wrong["model.norm.weight"]
    wrong["model.extra.weight"] = torch.zeros(2, 3)
    wrong["lm_head.weight"] = torch.zeros(304, 32)
    wrong["model.vision_model.post_layernorm.bias"] = torch.zeros(48, dtype=torch.int32)
    with pytest.raises(CheckpointError) as e:
        load(written(tmp_path, wrong))
    message = str(e.value)
    for line in (
        f"{tmp_path}: the weights do not fit config.json",
        "missing model.embed_tokens.weight (304, 64)",
        "missing model.norm.weight (64,)",
        "unexpected model.extra.weight (2, 3)",
        "lm_head.weight: expected shape (304, 64), found (304, 32)",
        "model.vision_model.post_layernorm.bias: expected float32, float16 or bfloat16, found torch.int32",
    ):
        assert line in message


VISION, ABSTRACTOR = "visual_model", "visual_abstractor"


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        (None, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*, only None is supported"),
        (None, {"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu' is supported"),
        (None, {"attention_bias": True}, "attention_bias is True, only False is supported"),
        (None, {"mlp_bias": True}, "mlp_bias is True"),
        (None, {"sliding_window": 64}, "sliding_window is 64"),
        (None, {"model_type": "llama"}, "model_type is 'llama'"),
        (None, {"hidden_size": "64"}, "hidden_size is '64', expected int"),
        (None, {"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive number"),
        (None, {"num_hidden_layers": True}, "num_hidden_layers is True, expected int"),
        (None, {"num_key_value_heads": 3}, "num_key_value_heads 3 groups"),
        (None, {"num_attention_heads": 5}, "hidden_size 64 must divide into num_attention_heads 5"),
        (None, {"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres', expected 'resize', 'pad' or 'plain'"),
        (None, {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected bool"),
        (VISION, {"hidden_act": "gelu"}, "visual_config.visual_model.hidden_act is 'gelu', only 'quick_gelu'"),
        (VISION, {"use_cls_token": False}, "visual_config.visual_model.use_cls_token is False"),
        (VISION, {"use_post_layernorm": False}, "visual_config.visual_model.use_post_layernorm is False"),
        (VISION, {"patch_size": 15}, "image_size 56 is not a multiple of patch_size 15"),
        (VISION, {"hidden_size": 96}, "vision hidden_size 96 must be equal"),
        (VISION, {"num_attention_heads": 7}, "must divide into their num_attention_heads"),
        (ABSTRACTOR, {"grid_size": 32}, "grid_size 32 must equal image_size / patch_size = 4"),
        (ABSTRACTOR, {"add_v2t_pos_emb": True}, "visual_config.visual_abstractor.add_v2t_pos_emb is True"),
        (ABSTRACTOR, {"encoder_hidden_size": 32}, "encoder_hidden_size 32"),
    ],
)
def test_config_values_that_would_change_the_maths(tmp_path, stored, part, change, why):
    raw = config()
    (raw if part is None else raw["visual_config"][part]).update(change)
    with pytest.raises(ValueError, match=why) as e:
        load(written(tmp_path, stored, raw))
    assert "config.json" in str(e.value)


def test_all_wrong_config_values_are_named_at_once():
    with pytest.raises(ValueError, match=r"config\.json: .*hidden_act.*; .*rope_scaling.*; .*vocab_size"):
        from_config(config(hidden_act="relu", rope_scaling={"type": "dynamic"}, vocab_size=0))


def test_other_families_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['LlamaForCausalLM'\].*no family of mmopt handles"):
        load(written(tmp_path, {}, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))


@pytest.mark.parametrize(
    ("text", "why"), [("{", "not valid JSON"), ("[1]", "expected a JSON object"), ("\xff", "not valid")]
)
def test_broken_config(tmp_path, text, why):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{why}"):
        load(tmp_path)


def test_foreign_directories(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"png")
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weights; expected model\.safetensors"):
        load(written(tmp_path))
    with pytest.raises(CheckpointError, match="no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no such directory"):
        load("nowhere")


def test_unknown_names_of_configs():
    with pytest.raises(CheckpointError, match=r"neither a file nor one of .*mplug-owl2-7b, mplug-owl2-mid"):
        from_config("gigantic")
    assert {"mplug-owl2-7b", "mplug-owl2-mid", "mplug-owl2-tiny"} <= set(shipped_configs())


def test_truncated_files(tmp_path):
    written(tmp_path)
    whole = (DATA / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as weights"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: cannot be read as weights"):
        load(tmp_path)


class Malicious:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def test_pickles_that_run_code_are_refused(tmp_path):
    target = tmp_path / "pwned"
    written(tmp_path, {FIRST: Malicious(target)}, name="pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: cannot be read as weights"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({FIRST: Malicious(target)}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: cannot be read as weights"):
        load(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"state_dict": {"a": torch.zeros(2)}}, {"epoch": 3}])
def test_bin_files_of_other_things_are_refused(tmp_path, content):
    written(tmp_path, content, name="pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        load(tmp_path)


def test_incomplete_shards(tmp_path, learned):
    folder = sharded(tmp_path, learned, "model", "safetensors")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": listed | {"model.more.weight": sorted(set(listed.values()))[0]}}))
    with pytest.raises(CheckpointError, match=r"its shards lack model\.more\.weight"):
        load(folder)
    index.write_text(json.dumps({"weight_map": listed}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not there: model-00002-of-00002\.safetensors"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="names shards that are not there"):
        load(folder)


def test_hub_ids_are_downloaded(tmp_path, monkeypatch, learned):
    import huggingface_hub

    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(written(tmp_path / "cache", learned))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(load("someone/model"), learned)
    assert "*.safetensors" in asked["someone/model"]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    def fails(name, **_):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(CheckpointError, match=r"someone/model: no such directory, and it cannot be had .*no route"):
        load("someone/model")


# ---------------------------------------------------------------------------------------------------- random and shapes
def test_shipped_configs_are_shapes_only():
    model = from_config("mplug-owl2-7b")
    assert not model.has_weights
    assert model.dtype == torch.bfloat16
    assert 8.1e9 < model.weight_bytes / 2 < 8.3e9


def test_random_weights_depend_on_the_seed_alone():
    one, two, other = (from_config("mplug-owl2-tiny", random=True, seed=s).module.state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one)
    assert all(float(v.float().std()) > 0 for v in one.values())


# --------------------------------------------------------------------------------------------------------------- memory
PEAK = """
import os, sys, threading, torch
from mmopt.frontend import load as checkpoint
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
from safetensors.torch import load_file
checkpoint.from_config("mplug-owl2-tiny")  # everything is imported before memory is first read
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
model = checkpoint.load(sys.argv[1], dtype=sys.argv[2] if len(sys.argv) > 2 else None)
total = sum(float(p.flatten()[::64].float().sum()) for p in model.module.parameters())  # touch every page
done.set()
watcher.join()
print((max(peak, anonymous()) - before) * 1024 / model.weight_bytes)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 200 MB in float16."""
    folder = tmp_path_factory.mktemp("large")
    raw = config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, vocab_size=6000, torch_dtype="float16")
    tensors = from_config(raw, random=True).module.state_dict()
    assert 1.8e8 < sum(v.numel() * 2 for v in tensors.values()) < 2.4e8
    written(folder / "safetensors", tensors, raw)
    written(folder / "bin", tensors, raw, "pytorch_model.bin")
    return folder


def peak_share(*args):
    """Anonymous memory at its peak during a load, as a share of the weights; mapped files come on top with 1.0."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, args)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_peak_memory_stays_below_1_2_times_the_weights(large, kind):
    assert peak_share(large / kind) < 0.2


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_a_copy_would_be_seen(large):
    assert peak_share(large / "safetensors", "bfloat16") > 0.9
