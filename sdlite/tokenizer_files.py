"""Every layout that CLIP's tokenizer comes in -> `TokenizerFiles`, by transformers' rules.

    vocab.json + merges.txt      [+ tokenizer_config, special_tokens_map, added_tokens]: diffusers
    tokenizer.json               [+ tokenizer_config]: what transformers 5 saves
    both                         tokenizer.json counts

Source of the rules: transformers 4.57 `PreTrainedTokenizerBase._from_pretrained`,
`PreTrainedTokenizerFast.__init__` and `CLIPConverter`. transformers 5.24 gives the same ids, but
for special tokens that a prompt writes in another case (<|EndOfText|>).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlite.errors import ArtifactError, printable
from sdlite.files import ADDED, CONFIG, FAST, MERGES, SPECIAL, VOCAB, Files
from sdlite.schema import Json, shown

WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
PATTERNS = (WORDS, r"<\|startoftext\|>|<\|endoftext\|>|" + WORDS)  # the second: transformers 5
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")  # transformers 4, 5
START, END = "<|startoftext|>", "<|endoftext|>"
DEFAULTS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
MODEL: Json = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "</w>",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ],
}


@dataclass(frozen=True)
class Token:
    """A token that is matched as a whole; normalized: in the lower-case text, else as given."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True
    special: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say, in one form for all layouts.

    `words` is the regular expression of `PATTERNS` that splits the text. `added` are in the order
    in which they get their ids, `ids` those that the files give them. `named`: "bos_token", ... ->
    content. `max_length` is None where the files do not say.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    words: str
    added: list[Token]
    ids: dict[str, int]
    named: dict[str, str]
    max_length: int | None
    split_special_tokens: bool


def read(folder: Path | Files) -> TokenizerFiles:
    """The tokenizer of a folder.

    Raises:
        ArtifactError: files are missing, damaged or of another kind of tokenizer; it names them.
    """
    files = Files.of(folder)
    folder, config, fast = files.folder, _optional(files, CONFIG), _optional(files, FAST)
    _check_config(folder / CONFIG, config)
    parts = _read_fast(folder / FAST, fast) if fast else _read_slow(files)
    named, numbered = _tokens(files, config, parts.own)
    for key in () if fast else ("bos_token", "eos_token", "unk_token"):
        if isinstance(named.get(key), str):  # as transformers' slow class reads them
            named[key] = Token(named[key], special=True)
    if named["unk_token"] is None or _content(named["unk_token"]) not in parts.vocab:
        if not _whole(parts.vocab):
            raise _bad(folder, "has letters that its vocabulary lacks, and no unk_token for them")
        named["unk_token"] = None
    listed = [*parts.own.values(), *(t for _, t in sorted(numbered.items()))]
    added = listed + _specials(named, listed)
    _check_text(folder, [*parts.vocab, *(t.content for t in added)])
    return TokenizerFiles(
        parts.vocab,
        parts.merges,
        parts.words,
        added=added,
        ids={t.content: i for i, t in numbered.items()},
        named={k: _content(v) for k, v in named.items() if k in NAMED and v is not None},
        max_length=_max_length(folder / CONFIG, config),
        split_special_tokens=_flag(folder / CONFIG, config, "split_special_tokens", False),
    )


def _bad(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path} {printable(what, 400)}; fetch or save the model again.")


def _optional(files: Files, name: str) -> Json:
    return files.read_json(name) if files.has(name) else {}


def _check_text(folder: Path, tokens: list[str]) -> None:
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as e:
        raise _bad(folder, f"has a token with {e.object[e.start]!r}, which is no text") from e


def _check_config(path: Path, config: Json) -> None:
    kind = config.get("tokenizer_class") or CLASSES[0]
    if kind not in CLASSES:
        raise ArtifactError(
            f"{path} names a {shown(kind)}; of tokenizers only CLIPTokenizer is read."
        )
    for key in ("padding_side", "truncation_side"):
        if config.get(key, "right") != "right":
            raise ArtifactError(f"{path} has {key} {shown(config[key])}; CLIP's is 'right'.")


def _max_length(path: Path, config: Json) -> int | None:
    """model_max_length, in tokens: start, one at least, end. transformers writes 1e30 for a length
    that nobody set; whatever is above the text encoder's window means the window.
    """
    given = config.get("model_max_length")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given >= 3:
        raise _bad(
            path, f"has model_max_length {shown(given)}, which is no number of tokens from 3"
        )
    return int(min(given, 2**31))


# --- vocabulary and merges


@dataclass(frozen=True)
class _Parts:
    """`own` are tokenizer.json's added tokens."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    words: str
    own: dict[int, Token]


def _read_slow(files: Files) -> _Parts:
    path = files.path(MERGES)
    if not files.has(VOCAB):
        raise _bad(files.folder, f"has neither {FAST} nor {VOCAB}, so it is no CLIP tokenizer")
    vocab = _vocabulary(files.path(VOCAB), files.read_json(VOCAB))
    lines = files.read_text(MERGES).split("\n")
    pairs = [pair for line in lines if not line.startswith("#version") and (pair := line.split())]
    return _Parts(vocab, _merges(path, pairs, vocab), WORDS, {})


def _read_fast(path: Path, data: Json) -> _Parts:
    model, added = data.get("model"), data.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise _bad(path, "has no model, or added_tokens that are no list")
    for key, want in MODEL.items():
        if (got := model.get(key, want)) != want and not (want == "" and got is None):
            raise ArtifactError(f"{path} has a model with {key} {shown(got)}; CLIP's has {want!r}.")
    if data.get("normalizer") != NORMALIZER:
        raise ArtifactError(f"{path} has another normalizer than CLIP's tokenizer has.")
    vocab, pairs = _vocabulary(path, model.get("vocab")), model.get("merges")
    if not isinstance(pairs, list):
        raise _bad(path, "has no list of merges")
    merges = _merges(path, [p.split(" ") if isinstance(p, str) else p for p in pairs], vocab)
    own = {}
    for token in added:
        flags = _token(path, token)
        own[_id(path, flags.content, token.get("id"))] = flags
    return _Parts(vocab, merges, _words(path, data.get("pre_tokenizer")), own)


def _words(path: Path, given: Any) -> str:
    """The regular expression by which text is split into words."""
    try:
        split, letters = given["pretokenizers"]
        words = str(split["pattern"]["Regex"])
        same = (split["type"], split["behavior"], split["invert"]) == ("Split", "Removed", True)
        same &= letters["type"] == "ByteLevel" and not letters["add_prefix_space"]
        same &= letters.get("use_regex", True)
    except (AttributeError, KeyError, TypeError, ValueError):
        same = False
    if not same or words not in PATTERNS:
        raise ArtifactError(f"{path} has another pre_tokenizer than CLIP's tokenizer has.")
    return words


def _vocabulary(path: Path, given: object) -> dict[str, int]:
    if not isinstance(given, dict) or not given:
        raise _bad(path, "has no vocabulary (token -> id)")
    for token, i in given.items():
        if type(i) is not int or not 0 <= i < 2**31:
            raise _bad(
                path, f"gives {shown(token)} the id {shown(i)}, which is no whole number from 0"
            )
    if len(set(given.values())) < len(given):
        raise _bad(path, "gives one id to two tokens")
    return given


def _whole(vocab: dict[str, int]) -> bool:
    """Whether it has every byte, within a word and at its end: then no text is unknown."""
    return sum(len(t.removesuffix("</w>")) == 1 for t in vocab) >= 512


def _id(path: Path, token: str, given: object) -> int:
    """An id, of JSON's whole numbers or its keys."""
    digits = isinstance(given, str) and given.isdecimal() and given.isascii()
    number = int(given) if isinstance(given, int | str) and (type(given) is int or digits) else -1
    if not 0 <= number < 2**31:
        raise _bad(
            path, f"gives {shown(token)} the id {shown(given)}, which is no whole number from 0"
        )
    return number


def _merges(path: Path, merges: list[Any], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The checked merges; a file cut between two lines leaves tokens that no merge makes."""
    try:
        out = [(first, second) for first, second in merges]
        made = {first + second for first, second in out}
        unknown = made.union(*zip(*out, strict=True)) - vocab.keys()
    except (TypeError, ValueError) as e:
        raise _bad(path, f"is damaged: a merge is no pair of tokens ({e})") from e
    if unknown:
        raise _bad(path, f"is damaged: a merge has {min(unknown, key=str)!r}, which is no token")
    lost = [t for t in vocab.keys() - made if t.endswith("</w>") and len(t) > len("x</w>")]
    if lost and _whole(vocab):  # the toy vocabularies of tests list words without their merges
        raise _bad(path, f"is damaged: no merge makes {min(lost)!r}, nor {len(lost) - 1} others")
    return out


# --- special and learned tokens

Named = Json  # bos_token, ... -> str, Token or None; "extra" -> list of str and Token


def _tokens(files: Files, config: Json, own: dict[int, Token]) -> tuple[Named, dict[int, Token]]:
    """The named special tokens, and the numbered ones by id.

    tokenizer_config.json alone counts where it has an added_tokens_decoder. Else
    special_tokens_map.json wins over it, and added_tokens.json and tokenizer.json number tokens.
    """
    path, numbered = files.path(CONFIG), {}
    named: Named = DEFAULTS | _named(path, config, special=False)
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"]
        if not isinstance(decoder, dict):
            raise _bad(path, "has an added_tokens_decoder that is no object (id -> token)")
        for i, given in decoder.items():
            token = _token(path, given)
            numbered[_id(path, token.content, i)] = token
    else:
        also = _named(files.path(SPECIAL), _optional(files, SPECIAL), special=True)
        named |= also | {"extra": named["extra"] + also["extra"]}
        numbered = _legacy(files, named) | own
    known = {t.content: t for t in numbered.values()}
    for key in NAMED:
        if named.get(key) is not None:
            named[key] = known.get(_content(named[key]), named[key])
    return named, numbered


def _legacy(files: Files, named: Named) -> dict[int, Token]:
    """added_tokens.json: token -> id."""
    values = [*(named.get(k) for k in NAMED), *named["extra"]]
    special = {_content(v) for v in values if v is not None}
    return {
        _id(files.path(ADDED), t, i): Token(t, normalized=t not in special, special=t in special)
        for t, i in _optional(files, ADDED).items()
    }


def _named(path: Path, data: Json, special: bool) -> Named:
    """The named special tokens of one file; strings stay strings, as their flags are set later."""

    def token(value: object) -> str | Token | None:
        return value if value is None or isinstance(value, str) else _token(path, value, special)

    extra: list[Any] = []
    for key in EXTRA:
        value = data.get(key) or []
        if not isinstance(value, (list, dict)):
            raise _bad(path, f"has {key} {shown(value)}, which is no list of tokens")
        extra += value.values() if isinstance(value, dict) else value
    named: Named = {key: token(data[key]) for key in NAMED if key in data}
    return named | {"extra": [token(t) for t in extra if t is not None]}


def _token(path: Path, given: object, special: bool = False) -> Token:
    """A token with its flags; `normalized` is unsaid for "not special", as in tokenizers."""
    if not isinstance(given, dict) or not isinstance(given.get("content"), str):
        raise _bad(path, f"has the token {shown(given)}, which is no object with content")
    special = special or _flag(path, given, "special", False)
    flags = {k: _flag(path, given, k, False) for k in ("lstrip", "rstrip", "single_word")}
    normalized = _flag(path, given, "normalized", not special)
    return Token(given["content"], **flags, normalized=normalized, special=special)


def _flag(path: Path, given: Json, key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise _bad(path, f"has {key} {shown(value)}, which is neither true nor false")
    return value


def _content(token: str | Token) -> str:
    return token if isinstance(token, str) else token.content


def _specials(named: Named, listed: Iterable[Token]) -> list[Token]:
    """Special tokens to add to the listed ones: those not listed, and those with other flags."""
    known, seen, out = {t.content for t in listed}, set(), []
    for value in (*(named.get(k) for k in NAMED), *named["extra"]):
        if value is None or _content(value) in seen:
            continue
        seen.add(_content(value))
        if isinstance(value, Token):
            out.append(dataclasses.replace(value, special=True))
        elif value not in known:
            out.append(Token(value, normalized=False, special=True))
    return out
