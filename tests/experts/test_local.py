from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eapo_fast.errors import ConfigError, ModelError
from eapo_fast.experts import ConsultPolicy, ConsultRequest, ConsultScheduler, LocalModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with a byte-level tokenizer, as a transformers directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("local")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        initializer_range=0.5,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def answers(checkpoint: Path, size: int) -> list[tuple[str, str, int]]:
    expert = LocalModel(checkpoint, max_reply_tokens=9, max_batch_size=size)
    queries = ["short", "a much longer question than that", "<eos> in the middle"]
    with ConsultScheduler(expert, ConsultPolicy(timeout=30.0)) as desk:
        handles = [desk.submit(ConsultRequest(query, "p" * i)) for i, query in enumerate(queries)]
        desk.flush()
        results = [handle.result(30.0) for handle in handles]
    return [(r.status, r.text, r.usage.prompt_tokens if r.usage else 0) for r in results]


def test_replies_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    alone, together = answers(checkpoint, 1), answers(checkpoint, 3)
    assert alone == together
    assert len({text for _, text, _ in alone}) == 3
    assert len({prompt_tokens for _, _, prompt_tokens in alone}) == 3
    assert all(status == "ok" for status, _, _ in alone)


def test_special_tokens_in_a_query_are_text(checkpoint: Path) -> None:
    expert = LocalModel(checkpoint)
    assert 0 not in expert._encode(ConsultRequest("a<eos>b", "<eos>"))


def test_replies_are_those_of_generate(checkpoint: Path) -> None:
    import torch

    expert = LocalModel(checkpoint, max_reply_tokens=9)
    ids = expert._encode(ConsultRequest("short"))
    with torch.inference_mode():
        out = expert.model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)
    [(_, text, _)] = answers(checkpoint, 1)[:1]
    assert text == expert.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def test_a_prompt_without_room_is_too_long_and_the_others_are_answered(checkpoint: Path) -> None:
    expert = LocalModel(checkpoint, max_reply_tokens=5)
    assert expert.probe() is None
    expert._sampler.max_context = 400
    with ConsultScheduler(expert, ConsultPolicy(timeout=30.0, max_wait=0.2)) as desk:
        handles = [desk.submit(ConsultRequest(q)) for q in ("a", "b" * 400)]
        assert [handle.result(30.0).status for handle in handles] == ["ok", "too_long"]


def test_half_a_character_spoils_no_batch(checkpoint: Path) -> None:
    expert = LocalModel(checkpoint, max_reply_tokens=5, max_batch_size=3)
    with ConsultScheduler(expert, ConsultPolicy(timeout=30.0, max_wait=0.2)) as desk:
        handles = [desk.submit(ConsultRequest(q)) for q in ("a", "b\ud800", "c")]
        desk.flush()
        assert [handle.result(30.0).status for handle in handles] == ["ok"] * 3


def test_another_model_of_the_same_name_is_another_expert(checkpoint: Path) -> None:
    import torch

    one, same = LocalModel(checkpoint), LocalModel(checkpoint)
    assert one.identity == same.identity
    with torch.no_grad():
        next(iter(same.model.parameters())).mul_(1.5)
    assert one.identity != same.identity


def test_a_deadline_stops_generation(checkpoint: Path) -> None:
    expert = LocalModel(checkpoint, max_reply_tokens=30_000)
    with ConsultScheduler(expert, ConsultPolicy(timeout=0.3)) as desk:
        assert desk.submit(ConsultRequest("q")).result(5.0).status in ("timeout", "ok")


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no directory"):
        LocalModel(tmp_path / "absent")
    with pytest.raises(ModelError, match="no transformers checkpoint"):
        LocalModel(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer"):
        LocalModel(object())


def test_importing_experts_is_light() -> None:
    code = (
        "import sys, eapo_fast.experts; "
        "print([m for m in ('torch', 'httpx', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
