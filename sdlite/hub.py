"""Names to folders: an embedded model, a local folder, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from sdlite.errors import HubError, InputError, UnknownNameError

EMBEDDED = Path(__file__).parent / "models"
# What a pipeline needs and nothing else: no pickles, no second copies (fp16 variants, single-file checkpoints), no safety checker.
FETCHED = ["model_index.json", "sdlite.json", "tokenizer/*", "scheduler/*"] + [
    f"{part}/*{ending}"
    for part in ("text_encoder", "unet", "vae", "vae_decoder", "vae_encoder")
    for ending in (".json", ".safetensors", ".onnx", ".onnx.data", ".onnx_data")
]
SKIPPED = ["*.fp16.safetensors", "*.non_ema.safetensors", "*.fp16-*.safetensors"]


def embedded_models() -> list[str]:
    return sorted(p.name for p in EMBEDDED.iterdir() if (p / "model_index.json").exists()) if EMBEDDED.is_dir() else []


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """Folder of a model. Order: embedded name, existing folder, hub id `org/name` (downloaded once, then from the cache).

    Args:
        revision: branch, tag or commit of a hub repository; None is its main branch. Only for hub ids.

    Raises:
        UnknownNameError: none of the three. InputError: `revision` given for something that has none.
        HubError: the hub could not be reached and the cache does not hold the model, or it does not exist there.
    """
    name = str(model)
    local = EMBEDDED / name if name in embedded_models() else Path(model)
    if local.is_dir():
        if revision is not None:
            raise InputError(f"revision={revision!r} is for hub models; {name!r} is a local one.")
        return local
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise UnknownNameError(
            f"model {name!r} is not an existing folder, an embedded model ({', '.join(embedded_models()) or 'none'}) or a hub id like 'org/name'."
        )
    return _fetch(name, revision)


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    at = f"{repo}@{revision}" if revision else repo
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=FETCHED, ignore_patterns=SKIPPED))
    except RevisionNotFoundError as e:
        raise HubError(f"hub model {repo!r} has no revision {revision!r}; use a branch, tag or commit that exists.") from e
    except RepositoryNotFoundError as e:
        raise HubError(f"hub model {repo!r} does not exist, or is private: check the spelling, or log in with `hf auth login`.") from e
    except LocalEntryNotFoundError as e:
        raise HubError(f"the hub cannot be reached and {at} is not in the cache; connect once, or give a local folder.") from e
    except (HfHubHTTPError, OSError) as e:
        raise HubError(
            f"fetching {at} failed ({type(e).__name__}: {str(e).splitlines()[0][:160]}); run again, finished files are kept."
        ) from e
