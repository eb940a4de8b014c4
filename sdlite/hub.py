"""Find the folder of a model by an embedded or published name, a path or a hub id."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from sdlite import downloads, families, published, schema
from sdlite.artifact import Artifact
from sdlite.errors import (
    ArtifactError,
    HubError,
    InputError,
    SdliteError,
    SdliteWarning,
    UnknownNameError,
    printable,
)
from sdlite.files import TOKENIZER_FILES, Files
from sdlite.io import write
from sdlite.manifest import INDEX, MANIFEST, REPORT
from sdlite.published import Published
from sdlite.weights import check_variant, select, stem, variants_of

log = logging.getLogger("sdlite")
EMBEDDED = Path(__file__).parent / "models"
_SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def embedded_models() -> list[str]:
    """Names of the models that are part of the package."""
    return (
        sorted(p.name for p in EMBEDDED.iterdir() if (p / "model_index.json").exists())
        if EMBEDDED.is_dir()
        else []
    )


def resolve(model: str | Path, revision: str | None = None, variant: str | None = None) -> Path:
    """Folder of a model. Order: embedded name, existing folder, name of a published model
    (`sdlite.published`), hub id `org/name`. The last two are downloaded once, then from the cache.

    Args:
        revision: branch, tag or commit of a hub repository; None is its main branch, or the commit
            of a published name. Only for these two.
        variant: which weights to fetch where a repository has several, such as "fp16"; those of a
            folder are chosen by `Artifact.open`.

    Raises:
        UnknownNameError: none of the four; near names are said. Or a variant that the repository
            does not have. InputError: `revision` given for something that has none.
        HubError: the hub could not be reached and the cache does not hold the model, or it is not
            there, or nothing that sdlite loads. ArtifactError: it is of a kind that sdlite does not
            run. Both before any weights are fetched.
    """
    name = str(model)
    local = _local(model)
    if os.path.isdir(local):  # false too for names that no file system takes
        if revision is not None:
            raise InputError(f"revision={revision!r} is for hub models; {name!r} is a local one.")
        if row := published.table().get(name):
            log.warning("%s is a folder here; the published model is %s", name, row.repo)
        return local
    if name.lower().endswith(_SINGLE):
        raise UnknownNameError(
            f"model {name!r} is a single file; make a model of it first: sdlite convert"
            f" {name} --out FOLDER."
        )
    if row := known(model):
        return _published(row, row.revision if revision is None else revision, variant)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise UnknownNameError(_unknown(name))
    _check_id(name, revision)
    return _fetch(name, revision, variant)


def known(model: str | Path) -> Published | None:
    """The published model that `resolve` would take, None where it would take another one. A `Path`
    is never a name.
    """
    row = published.table().get(model) if isinstance(model, str) else None
    return None if row is None or os.path.isdir(_local(model)) else row


def _local(model: str | Path) -> Path:
    name = str(model)
    return EMBEDDED / name if name in embedded_models() else Path(model)


def _unknown(name: str) -> str:
    close = published.near(name, [*embedded_models(), *published.table()])
    meant = f" Did you mean {', '.join(close)}?" if close else ""
    return (
        f"model {printable(repr(name), 200)} is not an existing folder, an embedded model"
        f" ({', '.join(embedded_models()) or 'none'}), a published one that `sdlite models` lists,"
        f" or a hub id like 'org/name'.{meant}"
    )


def _published(row: Published, revision: str | None, variant: str | None) -> Path:
    """The folder of a published model; its license is said where it is not in the cache yet."""
    _check_id(row.repo, revision)
    if _cached(row.repo, revision) is None:
        at = f"{row.repo}@{revision}" if revision else row.repo
        log.warning(
            "%s is %s, under %s: %s", row.name, at, row.license.name, row.license.restrictions
        )
    return _fetch(row.repo, revision, variant)


def asset(name: str) -> Path:
    """Folder of released weights that are not part of the package, such as "emoji-teacher".

    `$SDLITE_ASSETS/NAME` where that variable is set; else the cache, into which missing files are
    fetched once. Every file is checked by its SHA-256, on every call.

    Raises:
        UnknownNameError: there is no such asset; the message lists them. HubError: it cannot be
            fetched, or a file is not the released one; run again, and what was fetched is kept.
    """
    return downloads.asset(name)


def _check_id(repo: str, revision: str | None) -> None:
    """What the hub and git accept as names; the cache makes paths of them."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        why = " ".join(str(e).split())
        raise UnknownNameError(
            f"model {printable(repr(repo), 200)} is no hub id: {why} Or give a folder that exists."
        ) from e
    if revision is not None and (
        not re.fullmatch(r"[\w][\w./+-]{0,254}", revision) or ".." in revision or "//" in revision
    ):
        raise InputError(
            f"revision={printable(repr(revision), 200)} is no name of a branch, tag or commit, such"
            " as 'main'."
        )


def _fetch(repo: str, revision: str | None, variant: str | None) -> Path:
    """The folder of a hub model in the cache. A commit that the cache holds whole is not asked for:
    it cannot change.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    at = f"{repo}@{revision}" if revision else repo
    if (
        revision
        and re.fullmatch(r"[0-9a-f]{40}", revision)
        and (there := _cached(repo, revision))
        and not _lacks(there, variant, every=True)
    ):
        return there
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except RevisionNotFoundError as e:
        raise HubError(
            f"hub model {repo!r} has no revision {revision!r}; use a branch, tag or commit that"
            " exists."
        ) from e
    except RepositoryNotFoundError as e:
        raise HubError(
            f"hub model {repo!r} does not exist, or is private or gated: check the spelling, or log"
            " in with `hf auth login`."
        ) from e
    except Exception as e:  # requests', httpx' and the hub's own kinds
        return _from_cache(repo, revision, variant, at, e)
    try:
        names = [s.rfilename for s in info.siblings or []]
        return _download(repo, revision, variant, str(info.sha), names)
    except SdliteError:
        raise
    except Exception as e:
        raise HubError(
            f"fetching {at} failed ({_words(e.__cause__ or e)}); run again, finished files are"
            " kept."
        ) from e


def _words(e: BaseException) -> str:
    return f"{type(e).__name__}: {printable((str(e).splitlines() or [''])[0], 160)}"


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder of a revision in the cache, as whole as it is there. No network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # newer hub libraries want every file of the repository without the pattern
        return Path(
            snapshot_download(
                repo, revision=revision, local_files_only=True, allow_patterns=[INDEX]
            )
        )
    except LocalEntryNotFoundError:
        return None


def _lacks(folder: Path, variant: str | None, every: bool = False) -> str:
    """What a folder in the cache lacks or is wrong with, without hashing weights; "" where it is a
    whole model. `every`: also where some network has no weights of the variant in the cache, which
    the repository may have.
    """
    try:
        artifact = Artifact.open(folder, any_kind=True, variant=variant)
        names = artifact.listing.files if artifact.listing else artifact.plain_files()
    except (ArtifactError, UnknownNameError) as e:
        return str(e)
    if variant and every:
        for part in artifact.family.networks:
            if variant not in variants_of(artifact.files.part(part).names(), part):
                return f"{part} has no {variant}"
    return next((f"{n} is missing" for n in names if not artifact.files.path(n).exists()), "")


def _from_cache(
    repo: str, revision: str | None, variant: str | None, at: str, why: Exception
) -> Path:
    """The cached folder where the hub does not answer."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    there = _cached(repo, revision)
    offline = isinstance(why, OfflineModeIsEnabled)
    said = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({_words(why)})"
    if there is None:
        raise HubError(
            f"{said} and {at} is not in the cache; connect once, or give a local folder."
        ) from why
    if lacks := _lacks(there, variant):
        raise HubError(
            f"{said} and {at} is not whole in the cache: {lacks} Run again when it can; finished"
            " files are kept."
        ) from why
    if not offline:
        warnings.warn(
            f"{said}; {at} is the copy in the cache, commit {there.name[:12]}, which may be older.",
            SdliteWarning,
            stacklevel=2,
        )
    return there


def _download(
    repo: str, revision: str | None, variant: str | None, commit: str, names: Sequence[str]
) -> Path:
    """Fetch what is needed of one commit into the cache. Weights come last: a folder that has them
    has all the rest.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import tqdm
    from tqdm.contrib.concurrent import thread_map

    at = f"{repo}@{revision}" if revision else repo
    _check_names(at, commit, names)

    def one(name: str) -> Path:
        return Path(
            hf_hub_download(repo, name, revision=commit, etag_timeout=constants.HF_HUB_ETAG_TIMEOUT)
        )

    def fetched(files: Iterable[str]) -> Path:
        folder = one(INDEX).parent
        if wanted := [n for n in files if not (folder / n).exists()]:
            thread_map(
                one, wanted, desc=f"Fetching {len(wanted)} files", max_workers=8, tqdm_class=tqdm
            )
        return folder

    folder = fetched(_wanted(at, names, fetched, variant))
    if revision != commit:  # what "offline" finds by this name, which is whole from here
        ref = folder.parent.parent / "refs" / (revision or constants.DEFAULT_REVISION)
        with suppress(OSError):  # a cache that is read only
            ref.parent.mkdir(parents=True, exist_ok=True)
            write(ref, commit)
    return folder


def _check_names(at: str, commit: str, names: Sequence[str]) -> None:
    """Names of files that would lead out of the cache's folder, and commits that are none, are
    nobody's mistake.
    """
    bad = [
        n
        for n in names
        if ".." in re.split(r"[/\\]", n) or n.startswith(("/", "\\")) or schema.unclean(n)
    ]
    if bad or not re.fullmatch(r"[0-9a-f]{40}", commit):
        what = (
            f"a file called {printable(repr(bad[0]), 100)}"
            if bad
            else f"the commit {printable(repr(commit), 100)}"
        )
        raise HubError(
            f"the hub says that model {at} has {what}, which no honest repository has; do not"
            " use it."
        )


def _wanted(
    at: str,
    names: Sequence[str],
    fetched: Callable[[Iterable[str]], Path],
    variant: str | None = None,
) -> list[str]:
    """The files that the model needs and no other: no pickles, single-file copies, safety checkers,
    foreign ONNX; a variant only where it is asked for or there is nothing else.

    Args:
        at: what errors call the repository.
        names: the repository's files.
        fetched: fetches some of them and returns their folder.

    Raises:
        HubError, ArtifactError: see `resolve`.
    """
    if INDEX not in names:
        single = [n for n in names if "/" not in n and n.endswith((".safetensors", ".ckpt"))]
        how = (
            f"; it holds {single[0]}: fetch that file and give it to `sdlite convert`"
            if single
            else ""
        )
        raise HubError(
            f"hub model {at} has no model_index.json, so it is not a diffusers pipeline{how}."
        )
    inside = rf"({'|'.join(families.networks())})/(config|[\w.-]+\.index(\.[\w-]+)?)\.json"
    about = rf"model_index\.json|{MANIFEST}|{REPORT}|student\.json|{inside}"
    small = [n for n in names if re.fullmatch(about, n)]
    folder = fetched(small)
    artifact = Artifact.open(folder, any_kind=True)
    if why := families.refusal(at, artifact.index, artifact.config):
        raise ArtifactError(why)
    if artifact.listing is None:
        places = artifact.family.tokenizers.values()
        wanted = {f"{p}/{n}" for p in places for n in TOKENIZER_FILES}
        wanted.add("scheduler/scheduler_config.json")
        texts = [n for n in names if n in wanted]
        weights = _weights(at, names, folder, tuple(artifact.family.networks), variant)
        fetched(texts)
        return [*small, *texts, *weights]
    listed = [*artifact.listing.files, MANIFEST if artifact.manifest else REPORT]
    if missing := sorted(set(listed) - set(names)):
        raise HubError(
            f"hub model {at} lacks {missing[0]}, which its own list names; tell its author, or take"
            " another revision."
        )
    return listed


def _weights(
    at: str, names: Sequence[str], folder: Path, networks: Sequence[str], variant: str | None
) -> list[str]:
    out = []
    there = {p: [n.removeprefix(f"{p}/") for n in names if n.startswith(f"{p}/")] for p in networks}
    if variant is not None:
        check_variant(variant, there, at)
    for part, own in there.items():
        read = Files(folder).part(part).read_json
        try:
            chosen = select(own, part, f"{at}/{part}", read, variant or "")
        except ArtifactError as e:
            raise HubError(f"{e}{_elsewhere(at, networks)}") from e
        out += [f"{part}/{n}" for n in chosen]
    return out


def _elsewhere(at: str, networks: Sequence[str]) -> str:
    """Revisions of a repository that hold safetensors of all networks, in words: branches, tags,
    the latest pull requests.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import build_hf_headers, get_session

    repo, _, revision = at.partition("@")
    found = []
    try:  # HfApi.list_repo_refs waits for ever
        url = f"{constants.ENDPOINT}/api/models/{repo}/refs"
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        refs = (
            get_session()
            .get(url, headers=build_hf_headers(), params={"include_prs": 1}, timeout=timeout)
            .json()
        )
        pulls = sorted(
            (r["ref"] for r in refs.get("pullRequests") or []),
            key=lambda r: int(r.split("/")[-1]),
            reverse=True,
        )
        for ref in [*(r["name"] for r in (*refs["branches"], *refs["tags"])), *pulls[:12]]:
            names = [
                s.rfilename
                for s in HfApi().model_info(repo, revision=ref, timeout=timeout).siblings or []
            ]
            if all(
                any(re.fullmatch(rf"{p}/{stem(p)}\.safetensors(\.index\.json)?", n) for n in names)
                for p in networks
            ):
                found.append(printable(ref, 100))
    except Exception:  # the hub need not tell
        found = []
    if found:
        return (
            f" These revisions have safetensors: {', '.join(found)}; pass revision={found[0]!r}"
            " after looking at it."
        )
    return (
        ""
        if revision
        else " Or pass revision= of a branch or pull request (refs/pr/N) that has safetensors."
    )
