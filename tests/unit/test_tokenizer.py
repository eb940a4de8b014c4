"""Tokenizer: every layout of CLIP's files gives transformers' ids, in Python and in JavaScript."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sdlite
from benchmarks import published_models
from sdlite.errors import ArtifactError, InputError
from sdlite.files import TOKENIZER_FILES
from sdlite.tokenizer import ClipTokenizer, TokenWarning, TruncationWarning, rules
from sdlite.tokenizer_files import PATTERNS
from tests.conftest import EMOJI

WEB = Path(__file__).parents[2] / "export" / "web" / "tokenizer.js"
START, END = "<|startoftext|>", "<|endoftext|>"
PROMPTS = [
    "",
    " ",
    "\n\t",
    "a red fox in snow!",
    "wow !! x!y",
    "DON'T we'll 1234 é e\u0301 İ ΑΣ",
    "🦊🔥👨‍👩‍👧 カワイイ 狐",
    f"a {END} b{START}",
    "\u0085a\ufeffb\u00a0c\u200bd",
    "<Toy> a<Toy>b  <Toy>\u3000c <toy>é<TOY>.",
    "x<Toy>\u00a0 y",
    "[PAD] [pad]",
    "cat concatenate Cat",
    "apple, " * 40,
    "! " * 50,
    "<Toy>" * 40,
]
NAMES = {"config": "tokenizer_config", "special": "special_tokens_map", "added": "added_tokens"}


def token(content: str, **flags: Any) -> dict[str, Any]:
    """A token as the files have it: a learned one, but for `flags`."""
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    return {"content": content, **plain, **flags}


@functools.cache
def as_fast() -> str:
    """The embedded student's tokenizer as tokenizer.json, without added tokens."""
    from tokenizers.models import BPE

    vocab, merges = (str(EMOJI / "tokenizer" / n) for n in ("vocab.json", "merges.txt"))
    model = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "unk_token": END}
    return rules(BPE.from_file(vocab, merges, **model)).to_str()


def fast(added: list, words: str = PATTERNS[0]) -> dict[str, Any]:
    """tokenizer.json with the vocabulary of the embedded student."""
    data = json.loads(as_fast()) | {"added_tokens": added}
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = words
    ends = {"type": "RobertaProcessing", "sep": [END, 2946], "cls": [START, 2945]}
    data["post_processor"] = ends | {"trim_offsets": False, "add_prefix_space": False}
    return data


def as_text(data: dict) -> dict:
    """Merges "a b" instead of ["a", "b"], as before tokenizers 0.20."""
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    return data


def write(folder: Path, **contents: dict) -> Path:
    """A tokenizer's folder: the files of `NAMES`, tokenizer.json, and the slow ones without it."""
    folder.mkdir(parents=True)
    if "tokenizer" not in contents or contents.pop("both", False):
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(EMOJI / "tokenizer" / name, folder / name)
    for name, content in contents.items():
        (folder / f"{NAMES.get(name, name)}.json").write_text(json.dumps(content))
    return folder


ENDS = {"bos_token": START, "eos_token": END, "unk_token": END}
CLIP = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 32, "pad_token": END, **ENDS}
OBJECTS = CLIP | {k: {"__type": "AddedToken", **token(v)} for k, v in ENDS.items()}
MAP = {k: token(v) for k, v in ENDS.items()} | {"pad_token": END}
IDS = {"2945": token(START, special=True), "2946": token(END, special=True)}
MARK = {"0": token("!", normalized=False, special=True)}
IN_FAST = [t | {"id": int(i)} for i, t in IDS.items()]
OF_FIVE = [IN_FAST[0], IN_FAST[1] | {"normalized": False}]  # as transformers 5 saves SD-1.x
LEARNED = {"<cat>": 2947, "<cat>_1": 2948, "<cat>_2": 2949}
TOY = token("<Toy>", normalized=False, special=False)


def decoder(*more: dict, **config: Any) -> dict:
    """tokenizer_config.json with an added_tokens_decoder."""
    ids = IDS | {str(2947 + i): t for i, t in enumerate(more)}
    return OBJECTS | {"added_tokens_decoder": ids} | config


SPECIAL = {"pad_token": "[PAD]", "additional_special_tokens": ["<Toy>", "cat"]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "slow": {"config": OBJECTS, "special": MAP},
    "SD-2": {"config": OBJECTS, "special": MAP | {"pad_token": "!"}},
    "SD-Turbo": {
        "config": CLIP | {"pad_token": "!", "added_tokens_decoder": IDS | MARK},
        "special": MAP,
    },
    "decoder before map": {"config": decoder(), "special": MAP | {"pad_token": "!"}},
    "strings": {"config": CLIP},
    "no config": {"special": MAP | {"pad_token": "!"}},
    "bare": {},
    "added": {"config": OBJECTS, "special": MAP, "added": LEARNED},
    "special": {"config": OBJECTS, "special": MAP | SPECIAL, "added": {"<Toy>": 2947}},
    "decoder": {"config": decoder(*(token(t) for t in LEARNED))},
    "split special": {"config": decoder(TOY | {"special": True}, split_special_tokens=True)},
    "fast": {"tokenizer": fast(IN_FAST), "config": OBJECTS},
    "fast, no config": {"tokenizer": fast(IN_FAST)},
    "fast, no tokens": {"tokenizer": fast([]), "config": CLIP},
    "fast, text merges": {"tokenizer": as_text(fast(IN_FAST)), "config": CLIP},
    "fast, new pad": {"tokenizer": fast(IN_FAST), "config": CLIP | {"pad_token": "[PAD]"}},
    "fast, other flags": {"tokenizer": fast(OF_FIVE), "config": decoder(token("<Toy>"))},
    "fast, 5": {
        "tokenizer": fast([*OF_FIVE, TOY | {"id": 2947}], PATTERNS[1]),
        "config": CLIP | {"backend": "tokenizers", "is_local": True},
    },
    "both": {"tokenizer": fast(IN_FAST), "both": True, "config": OBJECTS, "special": MAP},
    "lstrip": {"config": decoder(token("<Toy>", lstrip=True))},
    "rstrip": {"config": decoder(token("<Toy>", rstrip=True))},
    "single_word": {"config": decoder(token("<Toy>", single_word=True))},
    "not normalized": {"config": decoder(TOY)},
}


@pytest.fixture(params=list(LAYOUTS))
def layout(request, tmp_path):
    return write(tmp_path / "tokenizer", **LAYOUTS[request.param])


def ids_of(tokenizer: ClipTokenizer, prompts: list[str] = PROMPTS) -> list[list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return tokenizer(prompts).tolist()


def theirs(folder: Path, prompts: list[str] = PROMPTS) -> list[list[int]]:
    transformers = pytest.importorskip("transformers", reason="needs the distill extra")
    reference = transformers.CLIPTokenizerFast.from_pretrained(folder)
    length = min(reference.model_max_length, 77)
    return reference(prompts, padding="max_length", max_length=length, truncation=True).input_ids


def test_ids_are_those_of_transformers(layout, request):
    transformers = pytest.importorskip("transformers", reason="needs the distill extra")
    if request.node.callspec.id == "special" and transformers.__version__ >= "5":
        pytest.skip("transformers 5 overlooks the additional_special_tokens of that file")
    assert ids_of(ClipTokenizer.from_pretrained(layout)) == theirs(layout)


@pytest.mark.parametrize(
    ("style", "pad", "mark"), [("sd1", 49407, 256), ("sd2", 0, 0), ("turbo", 0, 0)]
)
def test_published_vocabulary(tmp_path, style, pad, mark):
    """Known ids; SD-2's special_tokens_map.json has another pad token than its config."""
    if published_models.merges_file() is None:
        pytest.skip("CLIP's merges are not installed: open_clip_torch")
    published_models.write_tokenizer(tmp_path / "tokenizer", style)
    tokenizer = ClipTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = ids_of(tokenizer, ["a photo of a cat!"])[0]
    assert ids == [49406, 320, 1125, 539, 320, 2368, mark, 49407] + [pad] * 69
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (49406, 49407, pad)
    assert tokenizer.vocab_size == 49408
    prompts = [*PROMPTS, "“quoted” — ﬁ ½ 𝓯𝓪 \u202eabc &amp; (cat:1.3)", "word" * 200]
    assert ids_of(tokenizer, prompts) == theirs(tmp_path / "tokenizer", prompts)


def test_pad_token_by_the_file_that_counts(tmp_path):
    pads = {}
    for name in ("slow", "SD-2", "SD-Turbo", "decoder before map", "fast, new pad", "both"):
        pads[name] = ClipTokenizer.from_pretrained(write(tmp_path / name, **LAYOUTS[name])).pad
    assert list(pads.values()) == [2946, 0, 0, 2946, 2947, 2946]


def test_several_vectors_are_spelled_out_as_in_diffusers(tmp_path):
    loaders = pytest.importorskip("diffusers.loaders", reason="needs the distill extra")
    transformers = pytest.importorskip("transformers", reason="needs the distill extra")
    folder = write(tmp_path / "tokenizer", **LAYOUTS["added"])
    tokenizer = ClipTokenizer.from_pretrained(folder)
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    mixin = loaders.TextualInversionLoaderMixin()
    prompts = ["a <cat> on a box", "<cat><cat>", "<cat>_1 alone", "no learned word"]
    given = [mixin._maybe_convert_prompt(p, reference) for p in prompts]
    assert given[0] == "a <cat> <cat>_1 <cat>_2 on a box"
    want = reference(given, padding="max_length", max_length=32, truncation=True).input_ids
    assert ids_of(tokenizer, prompts) == want
    assert [want[0].count(i) for i in LEARNED.values()] == [1, 1, 1]


def test_javascript_gives_the_same_ids(layout, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js on this machine")
    tokenizer = ClipTokenizer.from_pretrained(layout)
    prompts = [*PROMPTS, "a <cat> on <cat>_1, <CAT>"]
    (tmp_path / "tokenizer.mjs").write_bytes(WEB.read_bytes())
    what = {"form": tokenizer.to_json(), "prompts": prompts}
    (tmp_path / "what.json").write_text(json.dumps(what))
    script = """
        import { readFileSync } from "node:fs";
        import { ClipTokenizer } from "./tokenizer.mjs";
        const { form, prompts } = JSON.parse(readFileSync("what.json"));
        const tokenizer = new ClipTokenizer(form);
        for (const bad of [undefined, "\\udce9"]) {
            try { tokenizer.encode(bad); console.log(bad); } catch (error) {}
        }
        const made = prompts.map((p) => tokenizer.encode(p));
        const plain = made.map(({ ids, dropped }) => ({ ids: Array.from(ids, Number), dropped }));
        console.log(JSON.stringify(plain));
    """
    command = [node, "--input-type=module", "-e", script]
    made = json.loads(subprocess.run(command, cwd=tmp_path, stdout=-1, check=True).stdout)
    assert [m["ids"] for m in made] == ids_of(tokenizer, prompts)
    dropped = dict(zip(prompts, (m["dropped"] for m in made), strict=True))
    assert dropped["a red fox in snow!"] == ""
    assert dropped["apple, " * 40].replace(" ", "").strip("aple,") == ""
    assert len(dropped["apple, " * 40]) > 10


# --- the text encoder


@pytest.mark.parametrize("given", [None, 10**30, 1e30, 10**9])
def test_max_length_is_bounded_by_the_text_encoder(tmp_path, given):
    config = {} if given is None else {"model_max_length": given}
    folder = write(tmp_path / "tokenizer", config=config)
    assert ClipTokenizer.from_pretrained(folder)(["a fox"]).shape == (1, 77)
    window = {"vocab_size": 2947, "max_position_embeddings": 28}
    assert ClipTokenizer.from_pretrained(folder, window)(["a fox"]).shape == (1, 28)


def test_every_token_has_an_embedding(tmp_path):
    folder = write(tmp_path / "tokenizer", **LAYOUTS["added"])
    with pytest.raises(ArtifactError, match=r"'<cat>_2' with id 2949, but .* has 2947 embeddings"):
        ClipTokenizer.from_pretrained(folder, {"vocab_size": 2947})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClipTokenizer.from_pretrained(folder, {"vocab_size": 2950})
        ClipTokenizer.from_pretrained(folder, {"vocab_size": 3008})  # padded to a multiple of 64
    with pytest.warns(TokenWarning, match="2951 embeddings and .* 2950 tokens"):
        ClipTokenizer.from_pretrained(folder, {"vocab_size": 2951})
    with pytest.raises(ArtifactError, match="max_position_embeddings '77'"):
        ClipTokenizer.from_pretrained(folder, {"max_position_embeddings": "77"})


def test_a_pipeline_without_its_learned_embeddings_does_not_open(plain, tmp_path):
    pytest.importorskip("torch", reason="needs the torch extra")
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    config = folder / "tokenizer" / "tokenizer_config.json"
    data = json.loads(config.read_text())
    data["added_tokens_decoder"]["2947"] = token("<cat>")
    config.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="'<cat>' with id 2947"):
        sdlite.Pipeline.from_pretrained(folder, backend="torch")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "merges.txt"])
def test_convert_refuses_a_damaged_tokenizer_before_it_writes(plain, tmp_path, name):
    pytest.importorskip("onnx_ir", reason="needs the export extra")
    from sdlite.converter import convert

    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    text = (folder / "tokenizer" / name).read_text()
    (folder / "tokenizer" / name).write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match=name):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is refused


@pytest.mark.parametrize(
    "prompts", ["a fox", None, 3, [None], [3], [b"a fox"], ["a fox", ["x"]], ["a \udce9 fox"]]
)
def test_prompts_that_are_no_text(tmp_path, prompts):
    tokenizer = ClipTokenizer.from_pretrained(EMOJI / "tokenizer")
    with pytest.raises(InputError):
        tokenizer(prompts)


def edit(name: str, change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """A file whose content is what `change` returns, or what it left."""

    def damage(folder: Path) -> None:
        path = folder / f"{NAMES.get(name, name)}.json"
        data = json.loads(path.read_text())
        path.write_text(json.dumps(change(data) or data))

    return damage


def put(name: str, **values: Any) -> Callable[[Path], None]:
    return edit(name, lambda data: data | values)


def model(**values: Any) -> Callable[[Path], None]:
    return edit("tokenizer", lambda data: data["model"].update(values))


def cut(name: str, lines: bool = False) -> Callable[[Path], None]:
    """The first half of a file; lines: whole lines of it."""

    def damage(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        kept = text[: len(text) // 2]
        (folder / name).write_text(kept.rpartition("\n")[0] if lines else kept, encoding="utf-8")

    return damage


FAR = {"2945": token(START), "2946": token(END), "3000": token("<far>")}
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "merges cut in a line": ("slow", cut("merges.txt"), "merges.txt is damaged: a merge "),
    "merges cut": ("slow", cut("merges.txt", lines=True), "merges.txt is damaged: no merge makes"),
    "merges gone": ("slow", lambda d: (d / "merges.txt").unlink(), "merges.txt is missing"),
    "merges no text": ("slow", lambda d: (d / "merges.txt").write_bytes(b"\xff"), "merges.txt"),
    "vocabulary cut": ("slow", cut("vocab.json"), "vocab.json"),
    "vocabulary a list": ("slow", edit("vocab", list), "vocab.json"),
    "id a float": ("slow", put("vocab", a=1.5), "vocab.json gives 'a' the id 1.5"),
    "id true": ("slow", put("vocab", a=True), "vocab.json gives 'a' the id True"),
    "id negative": ("slow", put("vocab", a=-1), "vocab.json gives 'a' the id -1"),
    "id twice": ("slow", put("vocab", a=0), "vocab.json gives one id to two tokens"),
    "token no text": ("slow", put("vocab", **{"\ud800": 5000}), "which is no text"),
    "nothing": ("slow", lambda d: [p.unlink() for p in d.iterdir()], "has neither tokenizer.json"),
    "config a list": ("slow", edit("config", list), "tokenizer_config.json"),
    "map cut": ("slow", cut("special_tokens_map.json"), "special_tokens_map.json"),
    "another class": ("slow", put("config", tokenizer_class="T5Tokenizer"), "'T5Tokenizer'"),
    "left": ("slow", put("config", padding_side="left"), "padding_side 'left'"),
    "length a word": ("slow", put("config", model_max_length="77"), "model_max_length '77'"),
    "length 0": ("slow", put("config", model_max_length=0), "model_max_length 0"),
    "length NaN": ("slow", put("config", model_max_length=float("nan")), "NaN is not a number"),
    "no pad token": ("slow", put("special", pad_token=None), "no id for its pad_token"),
    "start a number": ("decoder", put("config", bos_token=5), "config.json has the token 5"),
    "decoder a list": ("decoder", put("config", added_tokens_decoder=[]), "added_tokens_decoder"),
    "id left out": ("decoder", put("config", added_tokens_decoder=FAR), "'<far>' the id 3000"),
    "added a word": ("added", put("added", **{"<cat>": "x"}), "added_tokens.json gives '<cat>'"),
    "fast cut": ("fast", cut("tokenizer.json"), "tokenizer.json"),
    "another model": ("fast", model(type="Unigram"), "type 'Unigram'"),
    "GPT-2": ("fast", model(end_of_word_suffix=""), "end_of_word_suffix ''"),
    "dropout": ("fast", model(dropout=0.1), "dropout 0.1"),
    "merges of three": ("fast", model(merges=["a b c"]), "is no pair of tokens"),
    "merges lost": ("fast", model(merges=[["a", "n"]]), "no merge makes"),
    "normalizer": ("fast", put("tokenizer", normalizer=None), "another normalizer"),
    "splitting": ("fast", put("tokenizer", pre_tokenizer={"type": "x"}), "another pre_tokenizer"),
    "no model": ("fast", put("tokenizer", model=None), "tokenizer.json has no model"),
    "added a string": ("fast", put("tokenizer", added_tokens=["<x>"]), "has the token '<x>'"),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_damaged_and_foreign_files_are_named(tmp_path, name):
    layout, damage, message = DAMAGES[name]
    folder = write(tmp_path / "tokenizer", **LAYOUTS[layout])
    damage(folder)
    with pytest.raises(ArtifactError) as caught:
        ClipTokenizer.from_pretrained(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_of_few_letters_needs_an_unknown_token(tmp_path):
    """The toy vocabularies of other projects' tests: few letters, words that no merge makes."""
    folder = write(tmp_path / "tokenizer", **LAYOUTS["strings"])
    tokens = ["a", "b", "a</w>", "b</w>", "ab</w>", "lost</w>", START, END]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    assert ids_of(ClipTokenizer.from_pretrained(folder), ["ab xb"])[0][:5] == [6, 4, 7, 3, 7]
    put("config", unk_token=None)(folder)
    with pytest.raises(ArtifactError, match="no unk_token"):
        ClipTokenizer.from_pretrained(folder)


# --- students


def test_latents_cached_with_another_tokenizer_are_made_again(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the distill extra")
    from sdlite.distill import data
    from sdlite.distill.latent_cache import CachedLatents

    (tmp_path / "prompts.txt").write_text("a fox!\n")
    captions, made = data.read(tmp_path / "prompts.txt"), []

    def encode(prompts: list[str], before: int) -> Any:
        made.append(prompts)
        return torch.zeros(len(prompts), 4, 8, 8)

    def ids(name: str, **changes: Any) -> list[int]:
        folder = write(tmp_path / f"{name} {len(made)} {len(changes)}", **LAYOUTS[name] | changes)
        arguments = (captions, ClipTokenizer.from_pretrained(folder), encode, tmp_path / "cache")
        found = CachedLatents.build(*arguments, key={}, size=(8, 8), progress=False)
        return found.ids[0, [4, 5, -1]].tolist()

    assert [ids("slow"), len(made)] == [[256, 2946, 2946], 1]
    assert [ids("slow", added={}), len(made)] == [[256, 2946, 2946], 1]
    assert [ids("SD-2"), len(made)] == [[0, 2946, 0], 2]


def test_a_student_has_the_tokenizer_files_of_its_teacher(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the distill extra")
    diffusers = pytest.importorskip("diffusers", reason="needs the distill extra")
    transformers = pytest.importorskip("transformers", reason="needs the distill extra")
    from sdlite.distill.preview import save_pipeline
    from sdlite.distill.tasks.base import V_ZERO_SNR

    torch.manual_seed(0)
    teacher = write(tmp_path / "tokenizer", **LAYOUTS["both"], other={})
    text = {"vocab_size": 2947, "hidden_size": 8, "intermediate_size": 8}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=2,
            **sizes,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        "vae": diffusers.AutoencoderKL(
            **sizes,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "tokenizer_folder": teacher,
    }
    save_pipeline(tmp_path / "student", parts, V_ZERO_SNR)
    saved = {p.name: p.read_bytes() for p in (tmp_path / "student" / "tokenizer").iterdir()}
    assert saved == {p.name: p.read_bytes() for p in teacher.iterdir() if p.name in TOKENIZER_FILES}
    assert len(saved) == 5
    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    ours = sdlite.Pipeline.from_pretrained(tmp_path / "student", backend="torch")
    ids = opened.tokenizer("a fox").input_ids
    assert ours.tokenize(["a fox"])[0].tolist() == ids + [2946] * (32 - len(ids))
