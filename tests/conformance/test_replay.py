"""Replaying recorded cases: the goldens at every point, cases of other sizes, and broken cases that must be seen."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mmopt.conformance import replay as cases
from mmopt.conformance.read import read_cases
from mmopt.conformance.replay import judge, passed, verify
from mmopt.conformance.table import table
from mmopt.frontend.load import from_config, load

GOLDEN = Path(__file__).parents[1] / "data" / "mplug_owl2"
FILES = sorted(GOLDEN.glob("*.safetensors"))  # the weights among them are passed over
torch.set_num_threads(1)  # tiny matrices: a second thread only waits
PROMPTS = ["batch_list_images_nomask", "batch_mixed_textonly_nomask", "batch_ragged_labels", "batch_right_pad"]
PROMPTS += ["mm_single", "mm_two_images", "text_only"]


@pytest.fixture(scope="module")
def result():
    return verify(GOLDEN, FILES)


def compared(result, case, point):
    return {r["output"] for r in result["rows"] if (r["case"], r["point"]) == (case, point)}


def bad(result):
    return {(r["point"], r["output"]) for r in result["rows"] if not r["ok"]}


def changed(tmp_path, name, change):
    """A copy of a golden case with some tensors changed."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    change(tensors)
    path = tmp_path / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


# ---------------------------------------------------------------------------------------------------- golden cases
def test_golden_cases_at_every_point(result):
    assert bad(result) == set()
    assert passed(result)
    counts = Counter(r["point"] for r in result["rows"])
    assert counts == {"model": 280, "program": 124, "optimized": 123, "engine": 121}
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("name", PROMPTS)
def test_what_is_compared_where(result, name):
    recorded = {k for k in load_file(GOLDEN / f"{name}.safetensors") if k.startswith("out.")}
    assert compared(result, name, "model") == recorded
    asked = {k for k in recorded if k.startswith(("out.logits", "out.greedy.", "out.kv_cache.", "out.prepare.inputs"))}
    assert asked | ({"out.loss"} & recorded) <= compared(result, name, "program")
    assert asked <= compared(result, name, "optimized")
    assert asked - ({"out.prepare.inputs_embeds"} if name == "text_only" else set()) <= compared(result, name, "engine")
    for point in cases.POINTS:  # nothing is lost: what is not compared is listed with a reason
        listed = [n for n in result["not_compared"] if (n["case"], n["point"]) == (name, point)]
        assert all(n["reason"] for n in listed)
        assert recorded <= compared(result, name, point) | {n["output"] for n in listed}


def test_images_and_preprocessing(result):
    recorded = {k for k in load_file(GOLDEN / "vision.safetensors") if k.startswith("out.")}
    assert compared(result, "vision", "model") == recorded
    assert compared(result, "vision", "engine") == {
        "out.vision.last_hidden_state",
        "out.abstractor.last_hidden_state",
    }
    for point in cases.POINTS:
        assert len(compared(result, "preprocess", point)) == 9


def test_left_padding_is_compared_where_the_reference_is_right(result):
    name = "batch_left_pad_quirk"
    prepared = {f"out.prepare.{k}" for k in ("inputs_embeds", "modality_indicators", "attention_mask")}
    assert compared(result, name, "model") == prepared | {"out.hidden.0"}
    assert compared(result, name, "engine") == {"out.prepare.inputs_embeds", "out.hidden.0"}
    reasons = {n["output"]: n["reason"] for n in result["not_compared"] if n["case"] == name}
    assert "left padding" in reasons["out.logits"]
    assert "left padding" in reasons["out.greedy.token_ids"]


def test_half_precision_reports_ids_without_judging_them():
    files = [GOLDEN / "text_only.safetensors", GOLDEN / "batch_right_pad.safetensors"]
    found = verify(GOLDEN, files, dtype="bfloat16", at=("model", "program", "engine"))
    assert passed(found)
    assert {r["point"] for r in found["rows"]} == {"model", "program"}
    assert any(n["point"] == "engine" and "bfloat16" in n["reason"] for n in found["not_compared"])
    errors = [r["max_rel"] for r in found["rows"] if r["output"] == "out.logits"]
    assert min(errors) > 1e-3  # it did run in half precision
    assert [r["ids_equal"] is not None for r in found["rows"] if r["output"] == "out.greedy.token_ids"] == [True, True]


# ---------------------------------------------------------------------------------------- every check can fail
def test_changed_recordings_are_not_ok_at_every_point(tmp_path):
    def change(t):
        t["out.logits"][0, -1, 7] += 1e-2
        t["out.greedy.token_ids"][0, 9] += 1
        t["out.greedy.step_logits_nocache"][0, 3, 5] = float("nan")
        t["out.kv_cache.1.key"][0, 2, 7, 3] += 1e-2
        t["out.greedy.final_kv_cache.2.value"][0, 0, -1, 0] -= 1e-2
        t["out.prepare.inputs_embeds"][0, 8, 0] += 1e-2  # a row of the image

    found = verify(GOLDEN, [changed(tmp_path, "mm_single", change)])
    outputs = {
        "out.logits",
        "out.greedy.token_ids",
        "out.greedy.step_logits_nocache",
        "out.kv_cache.1.key",
        "out.greedy.final_kv_cache.2.value",
        "out.prepare.inputs_embeds",
    }
    assert bad(found) == {(p, o) for p in cases.POINTS for o in outputs}
    assert not passed(found)
    row = next(r for r in found["rows"] if r["output"] == "out.logits")
    assert row["max_abs"] == pytest.approx(1e-2, rel=0.05)
    assert row["ids_equal"] is None
    row = next(r for r in found["rows"] if r["output"] == "out.greedy.token_ids")
    assert row["ids_equal"] is False
    assert "NOT OK" in table(found)
    assert "not equal" in table(found)
    json.dumps(found, allow_nan=False)


def test_changed_loss_taps_masks_and_images_are_not_ok(tmp_path):
    def change(t):
        t["out.loss"] += 1e-2
        t["out.prepare.labels"][0, 1] += 1
        t["out.prepare.attention_mask"][1, -1] = 1
        t["out.prepare.modality_indicators"][0, 0] = 1
        t["out.hidden.3"][1, 2, 0] += 1e-2
        t["out.logits"][1, 3, 0] += 1e-2  # not the last row
        t["out.logits"][1, -1, 0] += 1  # padding

    found = verify(GOLDEN, [changed(tmp_path, "batch_ragged_labels", change)], at=("model", "program"))
    prepared = {f"out.prepare.{k}" for k in ("labels", "attention_mask", "modality_indicators")}
    rows = {"out.loss", "out.logits"}
    assert bad(found) == {("model", o) for o in prepared | rows | {"out.hidden.3"}} | {("program", o) for o in rows}

    def change_images(t):
        t["out.abstractor.layers.1.normk"][0, 0, 0] += 1e-2
        t["out.abstractor.last_hidden_state"] += 1e-2

    found = verify(GOLDEN, [changed(tmp_path, "vision", change_images)], at=("model",))
    assert {o for _, o in bad(found)} == {"out.abstractor.layers.1.normk", "out.abstractor.last_hidden_state"}

    def change_pixels(t):
        t["out.wide_pad"][0, 0, 0] += 1e-2

    found = verify(GOLDEN, [changed(tmp_path, "preprocess", change_pixels)], at=("model",))
    assert bad(found) == {("model", "out.wide_pad")}


def test_a_run_that_fails_is_a_row_that_is_not_ok(monkeypatch):
    def broken(*args, **kw):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("mmopt.conformance.replay.trace", broken)
    found = verify(GOLDEN, [GOLDEN / "text_only.safetensors"])
    assert bad(found) == {("program", "run"), ("optimized", "run"), ("engine", "run")}
    assert any("no such kernel" in n["reason"] for n in found["not_compared"])
    assert "failed NOT OK" in table(found)


def test_wrong_weights_are_not_ok(tmp_path):
    """Half precision too must tell a right model from one whose modality branches are mixed up."""
    weights = load_file(GOLDEN / "model.safetensors")
    mixed = {k: weights[k.replace("multiway.1", "multiway.0")].clone() for k in weights}
    save_file(mixed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    for dtype in ("float32", "bfloat16"):
        found = verify(tmp_path, [GOLDEN / "mm_single.safetensors"], at=("model",), dtype=dtype)
        assert ("model", "out.logits") in bad(found)
        assert ("model", "out.prepare.inputs_embeds") not in bad(found)


def test_judge():
    a = torch.tensor([1.0, 2.0])
    assert judge("out.x", a, a, 0, 0)["ok"]
    assert judge("out.x", a + 1e-4, a, 2e-4, 0)["ok"]
    assert not judge("out.x", a + 1e-3, a, 2e-4, 1e-4)["ok"]
    assert not judge("out.x", a[:1], a, 1, 1)["ok"]
    unknown = {"max_abs": None, "max_rel": None, "ids_equal": None}
    assert judge("out.x", a * float("nan"), a, 1, 1) == unknown | {"ok": False}
    row = judge("out.x", a + 0.125, a, 0, 0, half=0.07)
    assert row == {"max_abs": 0.125, "max_rel": 0.0625, "ids_equal": None, "ok": True}
    assert not judge("out.x", a * float("nan"), a, 0, 0, half=0.06)["ok"]
    ids = torch.tensor([[3, 4]])
    assert not judge("out.greedy.token_ids", ids + 1, ids, 9, 9)["ok"]
    assert judge("out.greedy.token_ids", ids + 1, ids, 0, 0, half=0.1) == unknown | {"ids_equal": False, "ok": True}


# -------------------------------------------------------------------------------------------- what cannot be read
def test_unknown_names(tmp_path):
    def change(t):
        t["out.attention_probabilities"] = torch.zeros(1)

    found = verify(GOLDEN, [changed(tmp_path, "text_only", change)], at=("model",))
    assert passed(found)
    assert [n["output"] for n in found["not_compared"]] == ["out.attention_probabilities"]
    assert "not an output that this version knows" in found["not_compared"][0]["reason"]

    with pytest.raises(ValueError, match=r"text_only: unknown input in\.position_ids"):
        verify(GOLDEN, [changed(tmp_path, "text_only", lambda t: t.update({"in.position_ids": torch.zeros(1)}))])
    save_file({"w": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign\.safetensors.*in\.\* and out\.\*, found w"):
        verify(GOLDEN, [tmp_path / "foreign.safetensors"])
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match=r"text\.safetensors: cannot be read"):
        verify(GOLDEN, [tmp_path / "text.safetensors"])
    with pytest.raises(ValueError, match="no recorded case"):
        verify(GOLDEN, [GOLDEN / "model.safetensors"])
    with pytest.raises(ValueError, match="expected some of model, program, optimized, engine, found middle"):
        verify(GOLDEN, FILES, at=("model", "middle"))
    with pytest.raises(ValueError, match="dtype"):
        verify(GOLDEN, FILES, dtype="int4")


def test_a_case_that_compares_nothing_does_not_pass(tmp_path):
    path = tmp_path / "empty.safetensors"
    save_file({"in.input_ids": torch.tensor([[1, 5]]), "out.unknown": torch.zeros(2)}, path)
    found = verify(GOLDEN, [path], at=("model",))
    assert not found["rows"]
    assert not passed(found)
    assert "nothing was compared" in table(found)


def test_inputs_that_do_not_fit(tmp_path):
    path = changed(tmp_path, "mm_single", lambda t: t.pop("in.pixel_values"))
    with pytest.raises(ValueError, match="mm_single: sample 0 needs image 0, but 0 were recorded"):
        verify(GOLDEN, [path])
    path = changed(tmp_path, "batch_right_pad", lambda t: t.update({"in.attention_mask": torch.ones(2, 3)}))
    with pytest.raises(ValueError, match=r"expected in.attention_mask of shape \(2, 15\), found \(2, 3\)"):
        verify(GOLDEN, [path])
    path = changed(tmp_path, "text_only", lambda t: t.update({"out.hidden.9": t.pop("out.hidden.1")}))
    found = verify(GOLDEN, [path], at=("model",))
    assert bad(found) == {("model", "run")}
    assert "no module model.layers.8" in found["not_compared"][0]["reason"]
    path = changed(tmp_path, "text_only", lambda t: t.update({"out.logits": t["out.logits"][:, 1:]}))
    assert bad(verify(GOLDEN, [path], at=("model",))) == {("model", "run")}


def test_a_prompt_that_ends_with_an_image(tmp_path):
    """The model is compared; a Program refuses such prompts, which is said."""

    def change(t):
        ids = t["in.input_ids"]
        at = int((ids[0] == -200).nonzero())
        t["in.input_ids"] = ids[:, : at + 1]
        for k in [k for k in t if k.startswith("out.")]:
            t[k] = t[k][:, : at + 9] if k == "out.logits" else None
            if t[k] is None:
                del t[k]

    found = verify(GOLDEN, [changed(tmp_path, "mm_single", change)], at=("model", "program"))
    assert [(r["point"], r["output"], r["ok"]) for r in found["rows"]] == [("model", "out.logits", True)]
    assert "ends with an image" in found["not_compared"][0]["reason"]


# ---------------------------------------------------------------------------------------------- cases of other sizes
@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A random checkpoint with grouped heads and other sizes everywhere."""
    directory = tmp_path_factory.mktemp("grouped")
    raw = json.loads((GOLDEN / "config.json").read_text())
    raw |= {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3}
    raw |= {"vocab_size": 211, "intermediate_size": 80, "rope_theta": 5000.0}
    raw["visual_config"]["visual_model"] |= {"image_size": 28, "num_hidden_layers": 2}
    raw["visual_config"]["visual_abstractor"] |= {"grid_size": 2, "num_learnable_queries": 5, "num_hidden_layers": 2}
    module = from_config(raw, random=True, seed=5).module
    save_file({k: v.clone() for k, v in module.state_dict().items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def plain_run(model, samples, rows_per_sample):
    """Each sample alone, straight through the model: a list of (embeddings, is_visual, logits, keys and values)."""
    runs = []
    for ids, images in zip(samples, rows_per_sample, strict=True):
        pieces, visual = [], []
        images = list(images)
        for token in ids:
            rows = images.pop(0) if token == -200 else model.module.model.embed_tokens(torch.tensor([token]))
            pieces.append(rows)
            visual += [token == -200] * len(rows)
        x, is_visual = torch.cat(pieces)[None], torch.tensor([visual])
        runs.append((x, is_visual, *model.module(x, is_visual)))
    return runs


def pad_rows(tensors, dim=1):
    longest = max(t.shape[dim] for t in tensors)
    # F.pad counts dimensions from the last one
    return torch.cat([F.pad(t, [0, 0] * (t.dim() - 1 - dim) + [0, longest - t.shape[dim]]) for t in tensors])


def random_ids(*shape, seed=0):
    return torch.randint(3, 211, shape, generator=torch.Generator().manual_seed(seed))


def recorded(runs):
    out = {"out.logits": pad_rows([r[2] for r in runs]), "out.prepare.inputs_embeds": pad_rows([r[0] for r in runs])}
    out["out.prepare.modality_indicators"] = pad_rows([r[1] for r in runs]).long()
    for i in range(len(runs[0][3])):
        for kind, which in (("key", 0), ("value", 1)):
            kept = [r[3][i][which].unflatten(2, (2, -1)).transpose(1, 2) for r in runs]
            out[f"out.kv_cache.{i}.{kind}"] = pad_rows(kept, dim=2)
    return out


@pytest.fixture(scope="module")
def grouped_cases(grouped):
    model = load(grouped)
    g = torch.Generator().manual_seed(1)
    made = {}
    with torch.inference_mode():
        # 5-D images: a placeholder stands for 2 images; the second sample has none but takes a slot all the same
        stacks = torch.randn(4, 2, 3, 28, 28, generator=g)
        rows = [model.module.encode_images(s).flatten(0, 1) for s in stacks]
        ids = random_ids(3, 7)
        ids[0, 2] = ids[2, 0] = ids[2, 4] = -200
        runs = plain_run(model, ids.tolist(), [[rows[0]], [], [rows[2], rows[3]]])
        made["stacks"] = {"in.input_ids": ids, "in.pixel_values": stacks, **recorded(runs)}

        # text alone, right padded, with a loss
        ids, lengths = random_ids(2, 9, seed=1), (9, 4)
        mask = torch.arange(9) < torch.tensor(lengths)[:, None]
        labels = ids.masked_fill(~mask, -100)
        labels[0, :3] = -100
        runs = plain_run(model, [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)], [[], []])
        logits = pad_rows([r[2] for r in runs])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        made["text"] = {"in.input_ids": ids * mask, "in.attention_mask": mask.long(), "in.labels": labels}
        made["text"] |= {"out.logits": logits, "out.loss": loss[None], "out.prepare.labels": labels}

        # a list of images: placeholders stand for 1, 3 and 2 of them
        images = [torch.randn(n, 3, 28, 28, generator=g) for n in (1, 3, 2)]
        rows = [model.module.encode_images(s).flatten(0, 1) for s in images]
        ids = random_ids(2, 8, seed=2)
        ids[0, 6] = ids[1, 0] = ids[1, 1] = -200
        made["list"] = {"in.input_ids": ids} | {f"in.images_list.{i}": x for i, x in enumerate(images)}
        made["list"] |= recorded(plain_run(model, ids.tolist(), [[rows[0]], rows[1:]]))

        # 21 greedy tokens
        pixels = torch.randn(1, 3, 28, 28, generator=g)
        rows = [model.module.encode_images(pixels)[0]]
        sample, steps = [5, 6, 7, 8, -200, 9, 10, 11, 12], []
        for _ in range(21):
            (run,) = plain_run(model, [sample], [rows])
            steps.append(run[2][0, -1])
            sample = [*sample, int(steps[-1].argmax())]
        made["greedy"] = {"in.input_ids": torch.tensor([sample[:9]]), "in.pixel_values": pixels}
        made["greedy"]["out.greedy.token_ids"] = torch.tensor([sample[9:]])
        made["greedy"]["out.greedy.step_logits_cached"] = torch.stack(steps)[None]
        final = {k.replace("out.kv", "out.greedy.final_kv"): v for k, v in recorded([run]).items() if "kv" in k}
        made["greedy"] |= final
    for name, tensors in made.items():
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, grouped / f"{name}.safetensors")
    return [grouped / f"{name}.safetensors" for name in made]


def test_grouped_heads_and_other_sizes_at_every_point(grouped, grouped_cases):
    lines: list[str] = []
    found = verify(grouped, grouped_cases, progress=lines.append)
    assert passed(found), table(found)
    for point in cases.POINTS:
        for name in ("stacks", "list"):
            assert {"out.logits", "out.kv_cache.2.key"} <= compared(found, name, point)
        assert {"out.greedy.token_ids", "out.greedy.final_kv_cache.0.value"} <= compared(found, "greedy", point)
    assert "out.loss" in compared(found, "text", "program")
    assert any("batch 3, 5 images, context 36" in line for line in lines)


def test_images_are_taken_in_order(grouped, grouped_cases):
    case = read_cases(grouped_cases[:1], grouped, -200, 6)[0]
    assert case.used == [0, 1, 4, 5, 6, 7]  # images 2 and 3 belong to the sample of text alone
    assert [p.count(-200) for p in case.prompts] == [2, 0, 4]
    assert case.valid.sum(1).tolist() == [18, 7, 29]
    assert case.padded
    assert not case.left_padded
