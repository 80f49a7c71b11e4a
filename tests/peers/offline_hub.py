"""The tiny tokenizers and configurations that diffusers' tests take from the hub, made here.

They are written as huggingface_hub's cache keeps them, so that everything that loads them finds them offline. Their
words and weights are others than on the hub: tests that compare with numbers written down there can't pass.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers.pre_tokenizers import ByteLevel

REVISION = "0" * 40
LETTERS = string.ascii_letters + string.digits + string.punctuation
QWEN_SPECIAL = 151643  # tiny configurations in diffusers' tests name the tokens from here on by number


def make(cache: Path) -> None:
    """Fill a cache folder, as ``HF_HUB_CACHE`` names it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -4.0) for letter in LETTERS)]
    t5 = hf.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    # Without dropout, which T5 applies in the state of training that some tests leave it in.
    small = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "dropout_rate": 0.0}
    _save(cache, "hf-internal-testing/tiny-random-t5", t5, hf.T5EncoderModel(hf.T5Config(vocab_size=1103, **small)))

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    clip = hf.CLIPTokenizer(vocab=_numbered(words), merges=[], model_max_length=77)
    _save(cache, "hf-internal-testing/tiny-random-clip", clip)

    qwen = _qwen_tokenizer()
    _save(cache, "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration", qwen, hf.Qwen2VLImageProcessor())

    gemma = _numbered(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "▁", *LETTERS])
    _save(cache, "hf-internal-testing/dummy-gemma", hf.GemmaTokenizer(vocab=gemma, merges=[]))
    llama = hf.LlamaTokenizer(vocab=_numbered(["<unk>", "<s>", "</s>", "▁", *LETTERS]), merges=[], pad_token="</s>")
    _save(cache, "finetrainers/dummy-hunyaunvideo", llama, folder="tokenizer")

    siglip = hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=2
    )  # fmt: skip
    _save(
        cache,
        "hf-internal-testing/tiny-random-SiglipVisionModel",
        hf.SiglipVisionModel(siglip),
        hf.SiglipImageProcessor(size={"height": 30, "width": 30}),
    )


def _qwen_tokenizer() -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
    special += ["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"]
    special += ["<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    vocab = _numbered(sorted(ByteLevel.alphabet())) | {name: QWEN_SPECIAL + i for i, name in enumerate(special)}
    # Their template puts the prompt between a user's turn and, where asked for, the start of an answer.
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return hf.Qwen2Tokenizer(
        vocab=vocab, merges=[], additional_special_tokens=special[1:], chat_template=template, model_max_length=32768
    )


def _numbered(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def _save(cache: Path, name: str, *parts: Any, folder: str = "") -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(REVISION)
    for part in parts:
        part.save_pretrained(repository / "snapshots" / REVISION / folder)
