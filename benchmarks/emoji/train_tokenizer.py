"""Train the emoji tokenizer: CLIP's rules and file format, about 3,000 byte-pair tokens.

python benchmarks/emoji/train_tokenizer.py --out runs/tokenizer
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import emoji
from tokenizers import models, pre_tokenizers, trainers

from sdlite.tokenizer import rules


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--size", type=int, default=3000)
    ap.add_argument(
        "--max-length",
        type=int,
        default=28,
        help="the text encoder's window, with start and end token",
    )
    args = ap.parse_args()

    data = emoji.load()
    corpus = [f"{c} {' '.join(t)}" for c, t in zip(data.captions, data.tags, strict=True)]
    corpus += [f"a an the on a {n} background emoji of with and in" for n in emoji.NAMES] * 50
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = rules(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    trainer = trainers.BpeTrainer(
        vocab_size=args.size - len(alphabet),
        min_frequency=2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    with tempfile.TemporaryDirectory() as tmp:
        _, path = tokenizer.model.save(tmp)
        merges = [
            line
            for line in Path(path).read_text(encoding="utf-8").splitlines()
            if not line.startswith("#version")
        ]

    # CLIP's order: bytes, bytes at a word's end, merges, start, end.
    tokens = list(
        dict.fromkeys(
            [*alphabet, *(a + "</w>" for a in alphabet), *(m.replace(" ", "") for m in merges)]
        )
    )
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8"
    )
    (args.out / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8"
    )
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (args.out / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    config = {
        **special,
        "model_max_length": args.max_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "tokenizer_class": "CLIPTokenizer",
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    print(f"{args.out}: {len(tokens)} tokens, {len(merges)} merges")


if __name__ == "__main__":
    main()
