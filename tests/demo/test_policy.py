from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from eapo_fast.demo import POLICY  # noqa: E402
from eapo_fast.demo.problems import build_dataset  # noqa: E402
from eapo_fast.demo.vocabulary import CONTEXT, PIECES, build_tokenizer  # noqa: E402

SOLUTION = (
    "a=48/2=<consult><q>48/2</q><q>3*4</q></consult>"
    '<advice><a i="1">24</a><a i="2">unavailable</a></advice>24\n'
    "b=3*4=12\n\\boxed{12}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(POLICY).eval()


@pytest.mark.parametrize("text", [SOLUTION, "a=1?", " <advice>\t", "<a i=1>", "\\boxed{}", "é ≤ 5"])
def test_text_comes_back_exactly(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("piece", PIECES)
def test_each_protocol_piece_is_one_ordinary_token(tokenizer, piece: str) -> None:
    (token,) = tokenizer.encode(piece)
    assert token not in tokenizer.all_special_ids


def test_ids_of_pieces_are_the_ids_of_the_joined_text(tokenizer) -> None:
    for cut in range(len(SOLUTION)):
        if any(SOLUTION.find(p, max(cut - len(p) + 1, 0), cut + len(p) - 1) >= 0 for p in PIECES):
            continue
        joined = tokenizer.encode(SOLUTION[:cut]) + tokenizer.encode(SOLUTION[cut:])
        assert joined == tokenizer.encode(SOLUTION)
    parts = re.split("(" + "|".join(map(re.escape, PIECES)) + ")", SOLUTION)
    ids = [token for part in parts for token in tokenizer.encode(part)]
    assert ids == tokenizer.encode(SOLUTION)


def test_the_saved_tokenizer_is_the_built_one(tokenizer) -> None:
    built = build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.encode(SOLUTION) == built.encode(SOLUTION)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_checkpoint_is_small_and_complete(model, tokenizer) -> None:
    assert sum(path.stat().st_size for path in Path(POLICY).iterdir()) < 4_000_000
    assert model.config.model_type == "qwen2"
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == CONTEXT
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def sample(model, tokenizer, rows: int) -> list[str]:
    prompts = [row["prompt"] for row in build_dataset("train", rows, 3)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    ids = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=70)
    return [
        tokenizer.decode(new, skip_special_tokens=True)
        for new in ids[:, batch.input_ids.shape[1] :]
    ]


def test_the_policy_writes_steps_boxes_and_consult_blocks(model, tokenizer) -> None:
    texts = sample(model, tokenizer, 24)
    assert sum(bool(re.match(r"a=\d+[-+*/]\d+=", text)) for text in texts) >= 22
    assert sum(bool(re.search(r"\\boxed\{\d+\}$", text)) for text in texts) >= 3
    assert any(re.search(r"<consult>(<q>\d+[-+*/]\d+</q>)+</consult>", text) for text in texts)


def test_accepted_advice_is_copied(model, tokenizer) -> None:
    rows = build_dataset("train", 16, 4)
    copied = 0
    for row in rows:
        expression = row["prompt"].split(";")[0][2:]
        text = (
            f"{row['prompt']}a={expression}=<consult><q>{expression}</q></consult>"
            '<advice><a i="1">137</a></advice>'
        )
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=4)[0, ids.input_ids.shape[1] :]
        copied += tokenizer.decode(out) == "137\n"
    assert copied >= 14
