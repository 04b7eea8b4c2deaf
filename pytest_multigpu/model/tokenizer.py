"""A tokenizer that needs no files: one token a byte, and Llama 3's chat template.

For synthesised models, and for checkpoints that come without one. May import nothing of the
package; tokenizers and transformers in functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BYTES = 256
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
)
"""Ids 256 to 261, after the bytes."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")


def built_in_tokenizer(max_length: int | None = None) -> Any:
    """``PreTrainedTokenizerFast`` of 262 tokens; every text survives encoding and decoding.

    ``<|begin_of_text|>`` is put in front, ``<|eot_id|>`` ends a turn, padding is on the left as
    generation wants it. Offsets count characters of the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    begin, end, padding = SPECIAL_TOKENS[0], SPECIAL_TOKENS[4], SPECIAL_TOKENS[5]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A",
                pair=f"{begin} $A {begin} $B",
                special_tokens=[(begin, BYTES)],
            ),
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=padding,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length or 1 << 30,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tokenizer_for(
    checkpoint: Path | str | None, vocab_size: int, max_length: int | None = None
) -> tuple[Any, str | None]:
    """The checkpoint's tokenizer, or the built-in one; and a note if it had to stand in.

    The built-in tokenizer needs a vocabulary of 262 tokens at least.

    :raises ValueError: ``vocab_size`` is smaller than that.
    """
    note = None
    if checkpoint is not None:
        folder = Path(checkpoint)
        if any((folder / name).is_file() for name in _FILES):
            from transformers import AutoTokenizer

            try:
                return AutoTokenizer.from_pretrained(str(folder), local_files_only=True), None
            except Exception as error:  # its loaders raise anything from KeyError to ImportError
                text = " ".join(str(error).split())[:200]
                note = (
                    f"the checkpoint's tokenizer could not be loaded ({type(error).__name__}: "
                    f"{text}); the built-in byte-level tokenizer stands in"
                )
        else:
            note = "the checkpoint has no tokenizer; the built-in byte-level tokenizer stands in"
    if vocab_size < BYTES + len(SPECIAL_TOKENS):
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens is too small for the built-in tokenizer's "
            f"{BYTES + len(SPECIAL_TOKENS)}"
        )
    return built_in_tokenizer(max_length), note
