"""Replaying recorded cases of models whose images lie outside the text: the goldens at every point, cases of other
sizes recorded from the library, masks that do not follow from the ids, and changed recordings that must be seen."""

import json
from collections import Counter

import pytest
import torch
from library_models import RECORDED, loaded, reference
from safetensors.torch import load_file, save_file

from mmopt.conformance import replay as cases
from mmopt.conformance.replay import passed, verify
from mmopt.conformance.table import table
from mmopt.frontend.load import from_config, load

torch.set_num_threads(1)  # tiny matrices: a second thread only waits
COUNTS = {
    "openflamingo": {"model": 140, "program": 57, "optimized": 57, "engine": 52},
    "idefics": {"model": 60, "program": 27, "optimized": 27, "engine": 24},
    "mllama": {"model": 71, "program": 33, "optimized": 33, "engine": 29},
}


def files(family):
    return sorted((RECORDED / family).glob("*.safetensors"))  # the weights among them are passed over


@pytest.fixture(scope="module", params=COUNTS)
def replayed(request):
    return request.param, verify(RECORDED / request.param, files(request.param))


def compared(result, case, point):
    return {r["output"] for r in result["rows"] if (r["case"], r["point"]) == (case, point)}


def bad(result):
    return {(r["point"], r["output"]) for r in result["rows"] if not r["ok"]}


def reasons(result, point, case=None):
    found = [n for n in result["not_compared"] if n["point"] == point and case in (None, n["case"])]
    return {n["output"]: n["reason"] for n in found}


def changed(directory, family, name, change):
    """A copy of a golden case with some tensors changed."""
    tensors = load_file(RECORDED / family / f"{name}.safetensors")
    change(tensors)
    path = directory / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


# ---------------------------------------------------------------------------------------------------- golden cases
def test_golden_cases_at_every_point(replayed):
    family, result = replayed
    assert bad(result) == set(), table(result)
    assert passed(result)
    assert Counter(r["point"] for r in result["rows"]) == COUNTS[family]
    json.dumps(result, allow_nan=False)


def test_nothing_is_lost(replayed):
    """Each recorded output, and each mask that was an input, is compared or listed with a reason, at every point."""
    family, result = replayed
    for path in files(family):
        if path.stem in ("model", "full_state_dict"):
            continue
        inputs = ("in.", "weights.", "lang_x", "prompt_lang", "continuation_", "decode_ids", "vision_x", "frames")
        recorded = {k for k in load_file(path) if not k.startswith((*inputs, "attention_mask")) or k.endswith("n_mask")}
        recorded -= {"in.attention_mask", "attention_mask"}
        for point in cases.POINTS:
            listed = reasons(result, point, path.stem)
            assert all(listed.values())
            assert recorded <= compared(result, path.stem, point) | set(listed), (path.stem, point)


def test_what_is_compared_where(replayed):
    family, result = replayed
    greedy = {"generated_ids_cached", "generated_ids_nocache", "gen_logits_cached", "gen_logits_nocache"}
    for name in {"openflamingo": ("single", "batch2"), "idefics": ("batch2",), "mllama": ("two_images",)}[family]:
        for point in cases.POINTS:
            assert greedy | {"logits"} <= compared(result, name, point)
    skipped = reasons(result, "model")
    inner = {"act.vit.pooled", "act.vit.tokens_ln_post"} if family == "openflamingo" else set()
    if family == "idefics":
        inner = {f"act.xattn{i}.attn_pregate, rows that see no image" for i in (0, 1)}
    assert set(skipped) == inner | {"padding rows"}
    if family == "openflamingo":
        block = {f"text_only_logits_with_past_{k}" for k in ("stepwise", "block")}
        for point in cases.POINTS:
            assert block | {"text_only_logits_no_past", "full_sequence_logits", "use_cached_text_time"} <= compared(
                result, "cached_media", point
            )
            assert {"decode_logits", "decode_text_time"} == compared(result, "edge_image_token_in_decode", point)
        for point in cases.POINTS:
            video = {"vit_tokens", "main_perceiver_out", "out", "out_first_frame_only"}
            assert compared(result, "video_perceiver", point) == video
    else:
        name, mask = ("fewshot3", "in.image_attention_mask") if family == "idefics" else ("two_images", "in.cross_at")
        assert any(k.startswith(mask) for k in compared(result, name, "program"))


@pytest.mark.parametrize("family", COUNTS)
def test_half_precision(family):
    found = verify(RECORDED / family, files(family), dtype="bfloat16", at=("model", "program"))
    assert passed(found), table(found)
    errors = [r["max_rel"] for r in found["rows"] if r["output"] == "logits"]
    assert min(errors) > 1e-3  # it did run in half precision


# ---------------------------------------------------------------------------------------- every check can fail
def test_changed_recordings_are_not_ok_at_every_point(tmp_path):
    def change(t):
        t["logits"][1, -1, 7] += 1e-2
        t["logits"][1, 0, 7] += 1  # padding
        t["generated_ids_cached"][1, 9] += 1
        t["gen_logits_nocache"][0, 3, 5] = float("nan")
        t["act.perceiver.out"][1, 1, 0, 0] += 1e-2
        t["act.xattn3.attn_pregate"][0, 0, 0] += 1e-2  # a row before the first image: zeros
        t["act.vit.block1"][0, 0, 0] += 1e-2
        t["mask.text_time"][1, 8] += 1
        t["mask.text_to_image_mask"][0, 3, 1] = 1
        t["mask.row_without_media"][0, 1] = 0

    found = verify(RECORDED / "openflamingo", [changed(tmp_path, "openflamingo", "batch2", change)])
    everywhere = {"logits", "generated_ids_cached", "gen_logits_nocache", "act.perceiver.out"}
    everywhere |= {"mask.text_time", "mask.text_to_image_mask", "mask.row_without_media"}
    inner = {("model", "act.xattn3.attn_pregate"), ("model", "act.vit.block1")}
    assert bad(found) == {(p, o) for p in cases.POINTS for o in everywhere} | inner
    assert not passed(found)


def test_changed_special_cases_are_not_ok(tmp_path):
    def media(t):
        for k in t:
            if k.startswith("text_only_logits") or k == "full_sequence_logits":
                t[k][0, -1, 3] += 1e-2
        t["no_past.act.xattn1.out"][0, 0, 0] += 1e-2
        t["use_cached_text_time"][0, 0] = 1

    def token(t):
        t["decode_logits"][0, 2, 3] += 1e-2
        t["decode_text_time"][0, 2] = 3

    def video(t):
        t["out"][1, 0, 0, 0] += 1e-2
        t["main_perceiver_out"][1, 1, 0, 0] += 1e-2
        t["out_first_frame_only"][0, 0, 0, 0] += 1e-2
        t["vit_tokens"][0, 0, 2, 0, 0] += 1e-2

    names = {"cached_media": media, "edge_image_token_in_decode": token, "video_perceiver": video}
    paths = [changed(tmp_path, "openflamingo", name, change) for name, change in names.items()]
    found = verify(RECORDED / "openflamingo", paths, at=("model", "program"))
    both = {f"text_only_logits_{k}" for k in ("no_past", "with_past_stepwise", "with_past_block")}
    both |= {"full_sequence_logits", "use_cached_text_time", "decode_logits", "decode_text_time", "vit_tokens"}
    both |= {"main_perceiver_out", "out", "out_first_frame_only"}
    assert bad(found) == {(p, o) for p in ("model", "program") for o in both} | {("model", "no_past.act.xattn1.out")}


def test_other_sight_and_inputs_are_not_ok(tmp_path):
    def tiles(t):
        t["in.aspect_ratio_ids"][0, 1] = 1  # was 2

    found = verify(RECORDED / "mllama", [changed(tmp_path, "mllama", "two_images", tiles)], at=("model", "program"))
    for point in ("model", "program"):
        assert {(point, "act.vision.out"), (point, "logits")} <= bad(found)

    def mask(t):  # the second image is seen from the start
        t["in.image_attention_mask"][0, 5:, 1] = 1

    found = verify(RECORDED / "idefics", [changed(tmp_path, "idefics", "fewshot3", mask)], at=("model", "program"))
    assert ("model", "logits") in bad(found)  # the model goes by the mask of the case
    assert not compared(found, "fewshot3", "program")
    assert "not the one that follows from its ids" in reasons(found, "program")["logits"]
    assert "given as it is" in reasons(found, "model")["in.image_attention_mask"]


def test_ln_post(tmp_path):
    """The option changes the rows: what was recorded without it no longer fits, what was recorded of it does."""
    found = verify(
        RECORDED / "openflamingo",
        [RECORDED / "openflamingo/single.safetensors"],
        at=("model",),
        load_options={"ln_post": True},
    )
    assert "act.vit.tokens_ln_post" in compared(found, "single", "model")
    assert {("model", "act.vit.tokens"), ("model", "logits")} <= bad(found)
    assert ("model", "act.vit.tokens_ln_post") not in bad(found)


def test_a_checkpoint_in_parts(tmp_path):
    """Trained tensors, a stock language model and a stock vision tower: `load_options` say where they lie."""
    folder = RECORDED / "openflamingo"
    raw, full = json.loads((folder / "config.json").read_text()), load_file(folder / "full_state_dict.safetensors")
    trained = {k: full[k] for k in raw["checkpoint_subset_keys"]}
    language = {
        k.removeprefix("lang_encoder.").replace(".decoder_layer.", "."): v
        for k, v in full.items()
        if k.startswith("lang_encoder.") and k not in trained
    }
    language |= {k: torch.zeros(320, 64) for k in ("gpt_neox.embed_in.weight", "embed_out.weight")}
    tower = {k.removeprefix("vision_"): v for k, v in full.items() if k.startswith("vision_encoder.")}
    tower = {k.replace("encoder.", "visual.", 1): v for k, v in tower.items()}
    (tmp_path / "lm").mkdir()
    save_file(trained, tmp_path / "trained.safetensors")
    save_file(language, tmp_path / "lm/model.safetensors")
    save_file(tower, tmp_path / "tower.safetensors")
    config = raw["model"]["lm"]["hf_config"] | {"model_type": "gpt_neox"}
    (tmp_path / "lm/config.json").write_text(json.dumps(config))
    special = {k: raw["model"][k] for k in ("eoc_token_id", "media_token_id", "pad_token_id")}
    options = {
        "language_model": tmp_path / "lm",
        "vision": tmp_path / "tower.safetensors",
        "vision_heads": 2,
        **special,
    }
    found = verify(tmp_path / "trained.safetensors", [folder / "single.safetensors"], load_options=options)
    assert passed(found), table(found)
    assert all("gen_logits_cached" in compared(found, "single", p) for p in cases.POINTS)


def test_files_that_are_not_cases(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign\.safetensors.*expected tensors named vision_x.*found w"):
        verify(RECORDED / "openflamingo", [tmp_path / "foreign.safetensors"])
    path = changed(tmp_path, "idefics", "single", lambda t: t.update({"in.position_ids": torch.zeros(1, 14)}))
    with pytest.raises(ValueError, match=r"single: unknown input in\.position_ids"):
        verify(RECORDED / "idefics", [path])
    path = changed(tmp_path, "openflamingo", "single", lambda t: t.update(vision_x=torch.zeros(2, 1, 1, 3, 42, 42)))
    with pytest.raises(ValueError, match=r"single: expected images \[1, images, .*found \(2, 1, 1, 3, 42, 42\)"):
        verify(RECORDED / "openflamingo", [path])
    path = changed(tmp_path, "mllama", "two_images", lambda t: t.update({"in.aspect_ratio_ids": torch.ones(1, 3)}))
    with pytest.raises(ValueError, match=r"two_images: expected aspect_ratio_ids for each of 2 images"):
        verify(RECORDED / "mllama", [path])
    path = changed(tmp_path, "idefics", "fewshot3", lambda t: t["in.image_attention_mask"].resize_(1, 25, 2))
    with pytest.raises(ValueError, match=r"fewshot3: expected a mask of images of shape \(1, 25, 3\)"):
        verify(RECORDED / "idefics", [path])
    path = changed(tmp_path, "openflamingo", "single", lambda t: t.update(attention_probabilities=torch.zeros(1)))
    found = verify(RECORDED / "openflamingo", [path], at=("model",))
    assert passed(found)
    assert "not an output that this version knows" in reasons(found, "model")["attention_probabilities"]


# --------------------------------------------------------------------- cases of other sizes, recorded from the library
def record(model, given, mask_name, steps=5):
    """What the library's model gives, in the layout of the goldens. The last row of the mask of images is repeated."""
    with torch.inference_mode():
        out = {f"in.{k}": v for k, v in given.items()} | {"logits": model(**given, use_cache=False).logits}
        ids, rows = [], []
        for _ in range(steps):
            rows.append(model(**given, use_cache=False).logits[:, -1])
            ids.append(rows[-1].argmax(-1))
            given = dict(given)
            given["input_ids"] = torch.cat([given["input_ids"], ids[-1][:, None]], 1)
            given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
            if mask_name in given:
                given[mask_name] = torch.cat([given[mask_name], given[mask_name][:, -1:]], 1)
    for kind in ("cached", "nocache"):
        out |= {f"generated_ids_{kind}": torch.stack(ids, 1), f"gen_logits_{kind}": torch.stack(rows, 1)}
    return {k: v.clone().contiguous() for k, v in out.items()}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ids(*shape, high, seed=0):
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def idefics_cases(tmp_path_factory):
    pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("idefics")
    raw = json.loads((RECORDED / "idefics/config.json").read_text())
    raw |= {"alpha_type": "vector", "cross_layer_interval": 1, "hidden_size": 48, "num_attention_heads": 6}
    raw |= {"use_resampler": False, "qk_layer_norms": False, "num_hidden_layers": 2}
    raw["vision_config"] |= {"image_size": 28, "num_hidden_layers": 1}
    model = reference("IdeficsForVisionText2Text", raw, seed=2)
    loaded(model, directory)
    marker = load(directory).image_id
    # two images, and one of which the second place is filled up; both padded, on the left and on the right
    ids = random_ids(2, 11, high=200)
    ids[0, 2] = ids[0, 6] = ids[1, 5] = marker
    real = torch.ones(2, 11, dtype=torch.long)
    real[1, :4] = 0
    pixels = noise(2, 2, 3, 28, 28)
    pixels[1, 1] = 0
    seen = torch.zeros(2, 11, 2, dtype=torch.long)
    seen[0, 2:6, 0] = seen[0, 6:, 1] = seen[1, 5:, 0] = 1
    given = {"input_ids": ids, "attention_mask": real, "pixel_values": pixels, "image_attention_mask": seen}
    made = {"uneven": record(model, given, "image_attention_mask")}
    free = dict(given, image_attention_mask=(noise(2, 11, 2, seed=3) > 0).long())
    made["free_mask"] = record(model, free, "image_attention_mask")
    for name, tensors in made.items():
        save_file(tensors, directory / f"{name}.safetensors")
    return directory


def test_idefics_of_other_sizes(idefics_cases):
    found = verify(idefics_cases, [idefics_cases / "uneven.safetensors"])
    assert passed(found), table(found)
    for point in cases.POINTS:
        assert {"logits", "generated_ids_cached", "in.image_attention_mask"} <= compared(found, "uneven", point)


def test_a_mask_that_does_not_follow_from_the_ids(idefics_cases):
    found = verify(idefics_cases, [idefics_cases / "free_mask.safetensors"])
    assert passed(found), table(found)
    assert {r["point"] for r in found["rows"]} == {"model"}
    assert {"logits", "generated_ids_cached"} <= compared(found, "free_mask", "model")
    for point in cases.POINTS[1:]:
        assert "its mask of images" in reasons(found, point)["logits"]


@pytest.fixture(scope="module")
def mllama_cases(tmp_path_factory):
    processing = pytest.importorskip("transformers.models.mllama.processing_mllama")
    directory = tmp_path_factory.mktemp("mllama")
    raw = json.loads((RECORDED / "mllama/config.json").read_text())
    raw["text_config"] |= {"num_hidden_layers": 4, "cross_attention_layers": [2], "num_key_value_heads": 4}
    raw["vision_config"] |= {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    model = reference("MllamaForConditionalGeneration", raw, seed=2)
    loaded(model, directory)
    marker = raw["image_token_index"]
    # three images, the first two directly after each other; one image; none: places are filled up
    ids = random_ids(3, 12, high=200)
    ids[0, 1] = ids[0, 2] = ids[0, 7] = ids[1, 5] = marker
    real = torch.ones(3, 12, dtype=torch.long)
    real[1, :3] = real[2, :5] = 0
    shapes = torch.tensor([[1, 2, 3], [3, 0, 0], [0, 0, 0]])
    tiles = torch.tensor([[1, 2, 2], [2, 1, 1], [1, 1, 1]])
    there = (torch.arange(2) < tiles[..., None]).long()
    size = raw["vision_config"]["image_size"]
    pixels = noise(3, 3, 2, 3, size, size) * there[..., None, None, None] * (shapes > 0)[..., None, None, None, None]
    spans = [processing.get_cross_attention_token_mask(row, marker) for row in ids.tolist()]
    spans[2] = [[0, 0]]
    mask = torch.from_numpy(processing.convert_sparse_cross_attention_mask_to_dense(spans, tiles.tolist(), 2, 12))
    given = {"input_ids": ids, "attention_mask": real, "pixel_values": pixels, "aspect_ratio_ids": shapes}
    given |= {"aspect_ratio_mask": there, "cross_attention_mask": mask}
    save_file(record(model, given, "cross_attention_mask"), directory / "uneven.safetensors")
    return directory


def test_mllama_of_other_sizes(mllama_cases):
    found = verify(mllama_cases, [mllama_cases / "uneven.safetensors"])
    assert passed(found), table(found)
    for point in cases.POINTS:
        assert {"logits", "generated_ids_cached", "in.cross_attention_mask"} <= compared(found, "uneven", point)


# ------------------------------------------------------------- markers that are fed or made, in models of other layouts
@pytest.fixture(scope="module")
def flamingo(tmp_path_factory):
    """A random checkpoint with another language model; its plain model and what is needed to run it by hand."""
    directory = tmp_path_factory.mktemp("flamingo")
    raw = json.loads((RECORDED / "openflamingo/config.json").read_text())
    raw = {"model": raw["model"]}
    lm = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    lm |= {"intermediate_size": 80, "vocab_size": 300, "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
    raw["model"] |= {"lm": {"type": "llama", "hf_config": lm}, "cross_attn_every_n_layers": 1}
    model = from_config(raw, random=True, seed=3)
    save(model, raw, directory)
    return directory


def save(model, raw, directory):
    save_file({k: v.clone() for k, v in model.module.state_dict().items()}, directory / "full_state_dict.safetensors")
    (directory / "config.json").write_text(json.dumps(raw))


def by_hand(model, ids, pixels, time, real=None):
    """Logits where the image of each row is told: its number, 0 for none, too large a number for all alike."""
    rows = model.module.encode_images(pixels.flatten(0, 2))
    media = rows.view(*pixels.shape[:2], *rows.shape[2:])
    seen = time[..., None] == torch.arange(1, pixels.shape[1] + 1)
    return model.module(model.module.lang_encoder.embedding(ids), media, seen, time > 0, real)


def greedy(model, ids, pixels, time, steps, next_time):
    """Ids and logits; `next_time` of all ids gives the image of the new row."""
    chosen = []
    for _ in range(steps):
        chosen.append(by_hand(model, ids, pixels, time)[:, -1])
        ids = torch.cat([ids, chosen[-1].argmax(-1)[:, None]], 1)
        time = torch.cat([time, next_time(ids)[:, None]], 1)
    return ids[:, -steps:], torch.stack(chosen, 1)


def swap_words(model, a, b):
    """What was the likeliest word a is b from now on."""
    head = model.module.lang_encoder.head.weight.clone()
    head[[a, b]] = head[[b, a]]
    model.module.lang_encoder.head.weight = torch.nn.Parameter(head, requires_grad=False)


def test_a_marker_fed_to_one_sample_of_a_batch(flamingo, tmp_path):
    model = load(flamingo)
    marker = model.image_id
    ids, pixels, fed = random_ids(2, 8, high=290), noise(2, 2, 1, 3, 42, 42), random_ids(2, 4, high=290, seed=1)
    ids[:, 2] = ids[0, 5] = fed[0, 1] = marker
    time = (ids == marker).cumsum(1)
    fed_time = torch.tensor([[2, 1, 1, 1], [1, 0, 0, 0]])  # the other sample has lost its image
    with torch.inference_mode():
        logits = by_hand(model, torch.cat([ids, fed], 1), pixels, torch.cat([time, fed_time], 1))
    case = {"vision_x": pixels, "prompt_lang_x": ids, "decode_ids": fed, "decode_text_time": fed_time}
    save_file(case | {"decode_logits": logits[:, 8:].contiguous()}, tmp_path / "touch.safetensors")
    found = verify(flamingo, [tmp_path / "touch.safetensors"], at=("model", "program"))
    assert passed(found), table(found)
    assert compared(found, "touch", "model") == {"decode_logits", "decode_text_time"}
    assert "samples do not touch" in reasons(found, "program")["decode_logits"]

    # alone, each sample can be followed everywhere
    alone = {k: v[:1].contiguous() for k, v in case.items()} | {"decode_logits": logits[:1, 8:].contiguous()}
    save_file(alone, tmp_path / "alone.safetensors")
    found = verify(flamingo, [tmp_path / "alone.safetensors"])
    assert passed(found), table(found)
    assert all(compared(found, "alone", p) == {"decode_logits", "decode_text_time"} for p in cases.POINTS)


def test_greedy_decoding_that_makes_a_marker(flamingo, tmp_path):
    raw = json.loads((flamingo / "config.json").read_text())
    model, marker = load(flamingo), raw["model"]["media_token_id"]
    ids, pixels = random_ids(1, 7, high=290, seed=5), noise(1, 2, 1, 3, 42, 42)
    ids[:, 1] = ids[:, 4] = marker
    time, steps = (ids == marker).cumsum(1), 5

    def cached(all_ids):  # the first image, once there is a marker among the new ids
        return torch.where((all_ids[:, 7:] == marker).any(1), 1, 2)

    def nocache(all_ids):  # a third image, which there is not
        return (all_ids == marker).sum(1)

    with torch.inference_mode():
        first, _ = greedy(model, ids, pixels, time, steps, cached)
        swap_words(model, marker, int(first[0, 1]))
        save(model, raw, tmp_path)
        runs = {"cached": greedy(model, ids, pixels, time, steps, cached)}
        runs["nocache"] = greedy(model, ids, pixels, time, steps, nocache)
        case = {"vision_x": pixels, "lang_x": ids, "logits": by_hand(model, ids, pixels, time), "mask.text_time": time}
    assert marker in runs["cached"][0][0, :-1]
    assert not torch.allclose(runs["cached"][1], runs["nocache"][1], atol=1e-2)
    for kind, (made, logits) in runs.items():
        case |= {f"generated_ids_{kind}": made.contiguous(), f"gen_logits_{kind}": logits.contiguous()}
    save_file(case, tmp_path / "marker.safetensors")
    found = verify(tmp_path, [tmp_path / "marker.safetensors"])
    assert passed(found), table(found)
    assert {"gen_logits_cached", "gen_logits_nocache"} <= compared(found, "marker", "model")
    for point in cases.POINTS[1:]:
        assert "gen_logits_cached" in compared(found, "marker", point)
        assert "one more image" in reasons(found, point)["gen_logits_nocache"]


def test_a_sample_that_ends_before_the_others(flamingo, tmp_path):
    """The reference fills it up with ids and logits that mean nothing."""
    raw = json.loads((flamingo / "config.json").read_text())
    model, marker, end = load(flamingo), raw["model"]["media_token_id"], raw["model"]["eoc_token_id"]
    ids, pixels = random_ids(2, 7, high=290, seed=14), noise(2, 1, 1, 3, 42, 42)
    ids[:, 1] = marker
    time = (ids == marker).cumsum(1)

    def last(all_ids):
        return torch.ones(len(all_ids), dtype=torch.long)

    with torch.inference_mode():
        first, _ = greedy(model, ids, pixels, time, 5, last)
        swap_words(model, end, next(t for t in first[1, :3].tolist() if t not in first[0]))
        save(model, raw, tmp_path)
        made, chosen = greedy(model, ids, pixels, time, 5, last)
    made, chosen = made.clone(), chosen.clone()
    ended = made[1].tolist().index(end) + 1
    assert end not in made[0]
    made[1, ended:], chosen[1, ended:] = raw["model"]["pad_token_id"], 7.0
    case = {"vision_x": pixels, "lang_x": ids, "generated_ids_cached": made.contiguous()}
    save_file(case | {"gen_logits_cached": chosen.contiguous()}, tmp_path / "ended.safetensors")
    found = verify(tmp_path, [tmp_path / "ended.safetensors"], at=("model", "program"))
    assert passed(found), table(found)
    assert "fills a sample up" in reasons(found, "program")["gen_logits_cached, after a sample's end"]
    chosen[1, ended - 1, 0] += 1e-2
    save_file(case | {"gen_logits_cached": chosen.contiguous()}, tmp_path / "ended.safetensors")
    found = verify(tmp_path, [tmp_path / "ended.safetensors"], at=("model",))
    assert bad(found) == {("model", "gen_logits_cached")}


def test_right_padding(flamingo, tmp_path):
    """Real rows are compared; the reference would decode from the padding."""
    model = load(flamingo)
    ids, pixels, real = random_ids(2, 7, high=290, seed=9), noise(2, 1, 1, 3, 42, 42), torch.ones(2, 7).long()
    ids[:, 1], real[0, 5:] = model.image_id, 0
    with torch.inference_mode():
        logits = by_hand(model, ids, pixels, (ids == model.image_id).cumsum(1), real.bool())
    case = {"vision_x": pixels, "lang_x": ids, "attention_mask": real, "logits": logits}
    save_file(case | {"generated_ids_cached": torch.zeros(2, 3).long()}, tmp_path / "right.safetensors")
    found = verify(flamingo, [tmp_path / "right.safetensors"], at=("model", "program"))
    assert passed(found), table(found)
    for point in ("model", "program"):
        assert compared(found, "right", point) == {"logits"}
        assert "padding" in reasons(found, point)["generated_ids_cached"]
