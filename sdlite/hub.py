"""Names to folders: an embedded model, a local folder, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sdlite import families
from sdlite.artifact import MANIFEST, Artifact
from sdlite.errors import ArtifactError, HubError, InputError, SdliteError, UnknownNameError
from sdlite.exported import REPORT
from sdlite.io import read_json
from sdlite.weights import select, stem

EMBEDDED = Path(__file__).parent / "models"
NETWORKS = ("text_encoder", "unet", "vae")
_SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def embedded_models() -> list[str]:
    return sorted(p.name for p in EMBEDDED.iterdir() if (p / "model_index.json").exists()) if EMBEDDED.is_dir() else []


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """Folder of a model. Order: embedded name, existing folder, hub id `org/name` (downloaded once, then from the cache).

    Args:
        revision: branch, tag or commit of a hub repository; None is its main branch. Only for hub ids.

    Raises:
        UnknownNameError: none of the three. InputError: `revision` given for something that has none.
        HubError: the hub could not be reached and the cache does not hold the model, or it is not there, or nothing that
            sdlite loads. ArtifactError: it is of a kind that sdlite does not run. Both before any weights are fetched.
    """
    name = str(model)
    local = EMBEDDED / name if name in embedded_models() else Path(model)
    if local.is_dir():
        if revision is not None:
            raise InputError(f"revision={revision!r} is for hub models; {name!r} is a local one.")
        return local
    if name.lower().endswith(_SINGLE):
        raise UnknownNameError(
            f"model {name!r} is a single file; make a folder of it first, with diffusers: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise UnknownNameError(
            f"model {name!r} is not an existing folder, an embedded model ({', '.join(embedded_models()) or 'none'}) or a hub id like 'org/name'."
        )
    return _fetch(name, revision)


def _fetch(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    at = f"{repo}@{revision}" if revision else repo

    def fetched(files: Iterable[str]) -> Path:
        exact = [re.sub(r"([*?[])", r"[\1]", f) for f in files]  # they are taken as patterns
        return Path(snapshot_download(repo, revision=revision, allow_patterns=exact))

    try:
        names = _names(repo, revision)
        if names is None:
            # What is not there is said when it is opened; newer hub libraries want every file of the repository otherwise.
            return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["model_index.json"]))
        return fetched(_wanted(at, names, fetched))
    except SdliteError:
        raise
    except RevisionNotFoundError as e:
        raise HubError(f"hub model {repo!r} has no revision {revision!r}; use a branch, tag or commit that exists.") from e
    except RepositoryNotFoundError as e:
        raise HubError(
            f"hub model {repo!r} does not exist, or is private or gated: check the spelling, or log in with `hf auth login`."
        ) from e
    except LocalEntryNotFoundError as e:
        raise HubError(f"the hub cannot be reached and {at} is not in the cache; connect once, or give a local folder.") from e
    except Exception as e:  # requests', httpx' and the hub's own kinds
        first = (str(e).splitlines() or [""])[0][:160]
        raise HubError(f"fetching {at} failed ({type(e).__name__}: {first}); run again, finished files are kept.") from e


def _names(repo: str, revision: str | None) -> list[str] | None:
    """The repository's files; None where the hub cannot be reached, or answers with an error of its own."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return [s.rfilename for s in HfApi().model_info(repo, revision=revision).siblings or []]
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:  # the cache may have it
        return None


def _wanted(at: str, names: Sequence[str], fetched: Callable[[Iterable[str]], Path]) -> list[str]:
    """The files that the model needs and no other: no pickles, variants, single-file copies, safety checkers, foreign ONNX.

    Args:
        at: what errors call the repository.
        names: the repository's files.
        fetched: fetches some of them and returns their folder.

    Raises:
        HubError, ArtifactError: see `resolve`.
    """
    if "model_index.json" not in names:
        single = [n for n in names if "/" not in n and n.endswith((".safetensors", ".ckpt"))]
        how = f"; it holds {single[0]}: make a folder of it with diffusers' from_single_file" if single else ""
        raise HubError(f"hub model {at} has no model_index.json, so it is not a diffusers pipeline{how}.")
    about = rf"model_index\.json|{MANIFEST}|{REPORT}|student\.json|({'|'.join(NETWORKS)})/(config|.+\.index)\.json"
    small = [n for n in names if re.fullmatch(about, n)]
    folder = fetched(small)
    artifact = Artifact.open(folder, any_kind=True)
    if why := families.refusal(at, artifact.index, artifact.config):
        raise ArtifactError(why)
    texts = [n for n in names if re.fullmatch(r"(tokenizer|scheduler)/[^/]+\.(json|txt)", n)]
    if artifact.manifest:
        listed = [*artifact.manifest.files, MANIFEST]
    elif artifact.export:
        listed = sorted({*artifact.export.files, *small, *texts})
    else:
        return [*small, *texts, *_weights(at, names, folder)]
    if missing := sorted(set(listed) - set(names)):
        raise HubError(f"hub model {at} lacks {missing[0]}, which its own list names; tell its author, or take another revision.")
    return listed


def _weights(at: str, names: Sequence[str], folder: Path) -> list[str]:
    out = []
    for part in NETWORKS:
        there = [n.removeprefix(f"{part}/") for n in names if n.startswith(f"{part}/")]
        try:
            chosen = select(there, part, f"{at}/{part}", lambda n, part=part: read_json(folder / part / n))  # type: ignore[misc]
        except ArtifactError as e:
            raise HubError(f"{e}{_elsewhere(at)}") from e
        out += [f"{part}/{n}" for n in chosen]
    return out


def _elsewhere(at: str) -> str:
    """Revisions of a repository that hold safetensors of all networks, in words: branches, tags, the latest pull requests."""
    from huggingface_hub import HfApi

    repo, _, revision = at.partition("@")
    found = []
    try:
        refs = HfApi().list_repo_refs(repo, include_pull_requests=True)
        pulls = sorted(refs.pull_requests or [], key=lambda r: int(r.ref.split("/")[-1]), reverse=True)
        for ref in [*(r.name for r in (*refs.branches, *refs.tags)), *(r.ref for r in pulls[:12])]:
            names = _names(repo, ref) or []
            if all(any(re.fullmatch(rf"{p}/{stem(p)}\.safetensors(\.index\.json)?", n) for n in names) for p in NETWORKS):
                found.append(ref)
    except Exception:  # the hub need not tell
        found = []
    if found:
        return f" These revisions have safetensors: {', '.join(found)}; pass revision={found[0]!r} after looking at it."
    return "" if revision else " Or pass revision= of a branch or pull request (refs/pr/N) that has safetensors."
