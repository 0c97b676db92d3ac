"""The demo policy's tokenizer: bytes, plus one token for each piece of the protocol.

There are no merges, so ids of texts that are joined are the joined ids: what the engine appends
in-line is what tokenising the whole text would give.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD = "<|endoftext|>"
"""The name that transformers expects beside a Qwen2 model; another one would add a 271st id."""
END = "<|end|>"
PIECES = (
    "<consult>",
    "</consult>",
    "<q>",
    "</q>",
    "<advice>",
    "</advice>",
    '<a i="1">',
    '<a i="2">',
    '<a i="3">',
    "</a>",
    "unavailable",
    "\\boxed{",
)
"""Texts that are one ordinary (not special) token each."""
CONTEXT = 1024


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: 256 bytes, `PIECES`, an end and a padding token.

    Text comes back exactly; AutoTokenizer puts text beyond ASCII into Unicode's NFC form first.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in PIECES])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
