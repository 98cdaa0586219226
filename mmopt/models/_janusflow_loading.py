"""Put JanusFlow together from where it lies on disk: the official directory and, apart from it, an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmopt.models._autoencoder import FILES, read_autoencoder
from mmopt.models._weight_files import Assembled, CheckpointError, Weights, place, read_json

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
OPTIONS = ("vae", "latent_size")


def assemble(checkpoint: Weights, language_model: Any, vision: Any, options: dict[str, Any]) -> Assembled:
    """A directory in the official layout; the autoencoder is in its folder ``vae``, or where the option `vae` says.

    Without one the model understands images, and paints latents only. The option `latent_size` sets how many latents a
    painted picture has along each side.
    """
    wrong = [n for n, given in (("language_model", language_model), ("vision", vision)) if given is not None]
    wrong += sorted(set(options) - set(OPTIONS))
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: a checkpoint of JanusFlow takes no such option, only {', '.join(OPTIONS)}"
        )
    config, tensors, files = dict(checkpoint.config or {}), dict(checkpoint.tensors), dict(checkpoint.files)
    language = dict(config.get("language_config") or {})
    for name, value in _marks(checkpoint.path).items():
        language.setdefault(name, value)
    if "language_config" in config:
        config["language_config"] = language
    if "latent_size" in options:
        config["latent_size"] = options["latent_size"]
    homes = {"": checkpoint.path}
    if "vae" in options:
        where: Path | None = place(str(options["vae"]), ["config.json", FILES[0]])
    else:
        folder = checkpoint.path / "vae"
        where = folder if folder.is_dir() else None
    if where is not None:
        if not where.is_dir():
            raise CheckpointError(f"{where}: expected the directory of an autoencoder with config.json and weights")
        read = read_autoencoder(where)
        config["vae"] = read.config
        tensors = {k: x for k, x in tensors.items() if not k.startswith("vae.")}
        tensors |= {f"vae.{k}": x for k, x in read.tensors.items()}
        files |= {f"vae.{k}": f for k, f in read.files.items()}
        homes = {r"vae\.": where, **homes}
    elif not any(k.startswith("vae.") for k in tensors):
        config.pop("vae", None)
    return Assembled(config, tensors, files, homes)


def _marks(directory: Path) -> dict[str, int]:
    """Ids of the tokens that begin and end a text, by the tokenizer's files: a published config.json has none."""
    found = {}
    if not (directory / "tokenizer.json").is_file():
        return {}
    tokenizer = read_json(directory / "tokenizer.json")
    ids = {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or []}
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    settings = directory / "tokenizer_config.json"
    said = read_json(settings) if settings.is_file() else {}
    for name, text in (("bos", BEGIN), ("eos", END)):
        given = said.get(f"{name}_token") or text
        given = given.get("content") if isinstance(given, dict) else given
        number = ids.get(given, vocab.get(given) if isinstance(vocab, dict) else None)
        if number is not None:
            found[f"{name}_token_id"] = number
    return found
