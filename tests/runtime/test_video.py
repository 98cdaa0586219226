"""Videos in the OpenFlamingo family: images of several frames, from the plain model to the engine."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA as MPLUG_OWL2
from toys import toy_info

import mmopt
from mmopt.exporters.onnx import export
from mmopt.exporters.tensorrt import available, profiles
from mmopt.frontend.trace import trace
from mmopt.runtime.request import Request
from mmopt.search.optimize import optimize
from mmopt.spec.errors import EngineError
from mmopt.spec.manifest import TensorInfo
from mmopt.spec.model_info import Cross

DATA = Path(__file__).parents[1] / "data" / "flamingo" / "openflamingo"
CONFIG = json.loads((DATA / "config.json").read_text())
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def with_times(**times):
    raw = copy.deepcopy(CONFIG)
    raw["model"]["perceiver"] |= times
    return raw


@pytest.fixture(scope="module", params=["plain", "frame embeddings"])
def line(request, tmp_path_factory):
    """(model, Program, optimized Program, engine directory); checked on the way."""
    if request.param == "plain":
        model = mmopt.load(DATA)
    else:
        model = mmopt.from_config(with_times(max_num_frames=3), random=True)
    program = trace(model, batch=2, images=2, context=40)
    result = optimize(program, check=True)
    out = export(result.program, tmp_path_factory.mktemp("video") / "engine", gate=False)
    assert json.loads((out / "program.json").read_text())["checked"]["program"] == "equal"
    return model, program, result.program, out


@pytest.fixture(scope="module")
def engine(line):
    return mmopt.Engine(line[3], threads=1)


def frames(*shape, seed=0):
    return torch.randn(*shape, 3, 42, 42, generator=torch.Generator().manual_seed(seed))


def pictures(count, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, 50, 60, 3), dtype=np.uint8))


def prompt_of(model):
    marker = model.image_id
    return [7, marker, 4, 5, marker, 6, 8]


def plain_logits(model, rows, prompt):
    """The whole model on full sequences; rows ``[images, 1, n, width]``."""
    ids = torch.tensor([prompt])
    time = (ids == model.image_id).cumsum(1)
    seen = time[..., None] == torch.arange(1, len(rows) + 1)
    with torch.inference_mode():
        return model.module(model.module.lang_encoder.embedding(ids), rows.flatten(0, 1)[None], seen, time > 0)[0]


# ---------------------------------------------------------------------------------------------- Programs and engines
@pytest.mark.parametrize("count", [1, 3])
def test_program_and_engine_equal_the_plain_model(line, engine, count):
    model, program, optimized, _ = line
    pixels, prompt = frames(2, count), prompt_of(model)
    with torch.inference_mode():
        rows = model.module.encode_images(pixels)
    logits = plain_logits(model, rows, prompt)
    for p in (program, optimized):
        made = p([prompt], pixels, max_new_tokens=1, ignore_eos=True)
        torch.testing.assert_close(made["image_rows"], rows, **CLOSE)
        torch.testing.assert_close(made["logits"][0, -1], logits[-1], **CLOSE)
        if count == 1:
            assert torch.equal(p([prompt], pixels[:, 0], ignore_eos=True)["image_rows"], made["image_rows"])
    made = program([prompt], pixels, max_new_tokens=4, ignore_eos=True)
    run = engine.debug.generate_ids([prompt], pixels.numpy(), max_new_tokens=4, ignore_eos=True, logits=True)
    assert run.tokens == made["tokens"]
    torch.testing.assert_close(torch.from_numpy(run.logits[0][0]), logits[-1], **CLOSE)
    torch.testing.assert_close(torch.from_numpy(run.image_embeds.numpy()), rows, **CLOSE)
    if count == 1:
        assert np.array_equal(engine.encode_images(pixels[:, 0].numpy()), run.image_embeds)


def test_the_rows_of_a_video_are_those_of_all_its_frames(line):
    """Each frame counts, and their order does where frames have embeddings."""
    model, program, _, _ = line
    pixels, prompt = frames(1, 3), [7, model.image_id, 4]
    rows = program([prompt], pixels)["image_rows"]
    for f in range(3):
        changed = pixels.clone()
        changed[0, f] = frames(1, seed=9)
        assert (program([prompt], changed)["image_rows"] - rows).abs().max() > 1e-3
    turned = (program([prompt], pixels.flip(1))["image_rows"] - rows).abs().max()
    assert turned > 1e-4 if program.info.max_frames else turned < 1e-5


def test_a_video_beside_an_image(line, engine):
    """In one prompt, each of its own number of frames; the other way round, alone, and in a batch."""
    model, prompt = line[0], prompt_of(line[0])
    image, video = pictures(1)[0], pictures(3, seed=1)
    for given in ([image, video], [video, image], [[image], np.stack(video)]):
        each = [x if isinstance(x, list) else list(x) if x.ndim == 4 else [x] for x in given]
        with torch.inference_mode():
            pixels = [torch.from_numpy(engine.image_processor(x))[None] for x in each]
            rows = torch.cat([model.module.encode_images(p) for p in pixels])
        torch.testing.assert_close(torch.from_numpy(engine.encode_images(given).numpy()), rows, **CLOSE)
        wanted = engine.debug.generate_ids(
            [prompt], image_embeds=rows.numpy(), max_new_tokens=4, ignore_eos=True, logits=True
        )
        torch.testing.assert_close(
            torch.from_numpy(wanted.logits[0][0]), plain_logits(model, rows, prompt)[-1], **CLOSE
        )
        made = engine.generate(prompt, given, max_new_tokens=4)
        assert list(made.ids) == wanted.tokens[0][: len(made.ids)]
    requests = [Request(prompt, [image, video], max_new_tokens=4), Request([7, 5, 4], max_new_tokens=4)]
    together = engine.generate_batch(requests)
    assert [c.ids for c in together] == [engine.generate(r.prompt, r.images, max_new_tokens=4).ids for r in requests]


def test_a_prefix_with_a_video(line, engine):
    prompt, given = prompt_of(line[0]), [pictures(3), pictures(1)[0]]
    whole = engine.generate([*prompt, 9, 10], given, max_new_tokens=4)
    after = engine.generate([9, 10], prefix=engine.prefix(prompt, given), max_new_tokens=4)
    assert after.ids == whole.ids


def test_hashes_cover_all_frames(line, engine):
    """An image is kept under a hash of all its frames, and encoded once."""
    video = pictures(3)
    keys = [engine._ready([v])[1][0] for v in (video, video[:2], video[0], [*video[:2], pictures(1, seed=5)[0]])]
    assert len(set(keys)) == 4
    assert engine._ready([[x.copy() for x in video]])[1][0] == keys[0]
    assert engine._ready([[video[0]]])[1][0] == keys[2]  # an image is a video of one frame
    calls, encode = [], engine.decoder.encode
    engine.decoder.encode = lambda *args: calls.append(args) or encode(*args)
    try:
        engine._ready([video])
        engine._ready([video[::-1]])
    finally:
        engine.decoder.encode = encode
    assert len(calls) == 1


# -------------------------------------------------------------------------------------------------------- refusals
def test_wrong_frames_are_refused(line, engine):
    model, program, _, _ = line
    prompt, most = [7, model.image_id, 4], program.info.max_frames
    with pytest.raises(EngineError, match="image 1 has 0 frames, expected"):
        engine.encode_images([pictures(1)[0], []])
    with pytest.raises(EngineError, match=r"shape \(1, 2, 3, 40, 42\), expected \(N, F, 3, 42, 42\)"):
        engine.encode_images(np.zeros((1, 2, 3, 40, 42), np.float32))
    with pytest.raises(ValueError, match="input pixel_values: expected shape"):
        program([prompt], torch.zeros(1, 1, 1, 3, 42, 42))
    if most is None:
        assert engine.encode_images([pictures(9)]).shape[0] == 1
        return
    with pytest.raises(EngineError, match="image 0 has 4 frames, expected 1 to 3"):
        engine.generate(prompt, [pictures(4)])
    with pytest.raises(EngineError, match="pixel_values has 4 frames, expected 1 to 3"):
        engine.debug.generate_ids([prompt], np.zeros((1, 4, 3, 42, 42), np.float32))
    with pytest.raises(ValueError, match="pixel_values have 4 frames, the model takes at most 3"):
        program([prompt], torch.zeros(1, 4, 3, 42, 42))


def test_media_time_embeddings_are_refused():
    with pytest.raises(ValueError, match=r"model\.perceiver\.max_num_media is 4, only None .* place in the prompt"):
        mmopt.from_config(with_times(max_num_media=4), random=True)


def test_families_without_videos_refuse_a_list_of_frames(tmp_path):
    model = mmopt.load(MPLUG_OWL2)
    out = export(optimize(trace(model, images=2), check=False).program, tmp_path / "engine", check=False)
    engine = mmopt.Engine(out, threads=1)
    with pytest.raises(EngineError, match="image 1 is a list of frames, but mplug_owl2 takes single images"):
        engine.generate([1, -200, -200, 5], [pictures(1)[0], pictures(2)])
    with pytest.raises(EngineError, match="image 0 is a list of frames"):
        engine.encode_images([pictures(2)])


# -------------------------------------------------------------------------------------------------- the TensorRT gate
def test_profiles_of_frames():
    info = toy_info(batch=1, images=2, context=64, tokens_per_image=1, cross=Cross(1, 8, 32))
    inputs = {"pixel_values": TensorInfo(("N", "F", 3, 5, 5), "float32")}
    (found,) = profiles(inputs, replace(info, max_frames=None))
    assert found["pixel_values"] == [(1, 1, 3, 5, 5), (1, 1, 3, 5, 5), (2, 8, 3, 5, 5)]
    (found,) = profiles(inputs, replace(info, max_frames=3))
    assert found["pixel_values"][2] == (2, 3, 3, 5, 5)


@pytest.mark.skipif(not available(), reason="TensorRT for RTX is not installed")
def test_gate_builds_the_stages_of_videos(line, tmp_path):
    out = export(line[2], tmp_path / "engine", target="tensorrt")
    checked = json.loads((out / "program.json").read_text())["checked"]
    assert checked["tensorrt"] == "parsed and built"
    assert checked["program"] == "equal"
