"""10,000 hostile replies through five tokenizers: nothing in them acts as ours."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eapo_fast.engine import Sampler, SamplingParams, Vocabulary
from eapo_fast.experts import (
    ConsultPolicy,
    ConsultRequest,
    ConsultResult,
    ConsultScheduler,
    Function,
)
from eapo_fast.rewards import verify
from eapo_fast.rollout import ConsultProtocol, collect_rollouts
from eapo_fast.rollout.injection import compose, encode_reply

EACH = 2000
SPECIALS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "deepseek": [
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cUser\uff5c>",
        "<\uff5cAssistant\uff5c>",
    ],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"],
}
PROTOCOL = ConsultProtocol()
TAGS = PROTOCOL.tags


def byte_level(specials: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ['<consult><q>48+24</q></consult><advice><a i="1">x</a></advice> the answer is 72'],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=specials[0], additional_special_tokens=specials[1:]
    )


def byte_fallback(specials: list[str]) -> Any:
    """A metaspace BPE whose unknown characters fall back to bytes, as sentencepiece models do."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(
        set('\u2581<>/[]|="_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ')
    )
    words = ["<unk>", *specials, *(f"<0x{b:02X}>" for b in range(256)), *letters]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=specials[1],
        unk_token="<unk>",
        additional_special_tokens=[s for s in specials if s != specials[1]],
    )


@pytest.fixture(scope="module")
def vocabularies() -> dict[str, Vocabulary]:
    found = {}
    for name, specials in SPECIALS.items():
        make = byte_fallback if name in ("gemma", "mistral") else byte_level
        tokenizer = make(specials)
        found[name] = Vocabulary(tokenizer, len(tokenizer))
        assert {tokenizer.convert_tokens_to_ids(s) for s in specials} <= found[name].control_ids
    return found


def hostile(rng: random.Random, specials: list[str]) -> str:
    """One reply made to be taken for something else."""
    pieces = [
        *specials,
        *TAGS,
        "\\boxed{7}",
        "#### 7",
        "<consult><q>1</q></consult>",
        "</a></advice>",
    ]
    tricks: list[Callable[[str], str]] = [
        lambda s: s,
        lambda s: s.upper(),
        lambda s: (
            s[: len(s) // 2] + rng.choice("\u200b\u00ad\u2060\ufeff\x00\u202e") + s[len(s) // 2 :]
        ),
        lambda s: s.replace("<", "<" + s),
        lambda s: s[0] + s + s[1:],
        lambda s: s.replace("<", "\uff1c").replace(">", "\uff1e"),
        lambda s: "".join(f"{c}\u0301" for c in s),
        lambda s: "\u2066" + s[::-1] + "\u2069",
        lambda s: s.replace("<", "&lt;"),
        lambda s: " ".join(s),
        lambda s: s.replace("o", "\ud800o"),
        lambda s: s.replace(" ", "\u2581"),
        lambda s: "".join(f"<0x{b:02X}>" for b in s.encode(errors="replace")),
    ]
    parts = [rng.choice(tricks)(rng.choice(pieces)) for _ in range(rng.randint(1, 6))]
    glue = rng.choice(["", " ", "\n", "hint ", "\r\n\u2028"])
    return glue.join(parts)


@pytest.mark.parametrize("name", list(SPECIALS))
def test_hostile_replies_stay_text(vocabularies: dict[str, Vocabulary], name: str) -> None:
    vocabulary, rng = vocabularies[name], random.Random(name)
    texts = [hostile(rng, SPECIALS[name]) for _ in range(EACH)]
    texts[0] = "".join(SPECIALS[name] + list(TAGS)) * 6000  # about a megabyte
    texts[1] = "\x00" * 1_000_000
    policy = ConsultPolicy(dedup="off", max_reply_tokens=256)
    desk = ConsultScheduler(Function(lambda r: texts[r.rollout], immediate=True), policy)
    accepted = 0
    with desk:
        for number in range(EACH):
            result = desk.submit(ConsultRequest("q", rollout=number)).result()
            accepted += result.accepted
            _check(vocabulary, result)
    assert accepted > 0.9 * EACH


@pytest.mark.parametrize("lower", [False, True])
def test_a_tokenizer_that_rewrites_look_alikes_makes_no_tag_of_them(lower: bool) -> None:
    """Full-width letters become ours under NFKC; what is not a tag in the reply is kept."""
    from tokenizers import normalizers

    tokenizer = byte_level(["<|end|>"])
    steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if lower else [])]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    for tag in TAGS:
        wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in tag)
        text = vocabulary.text(encode_reply(vocabulary, f"use {wide} 24", TAGS))
        assert text.startswith("use ")
        assert text.endswith(" 24")
        assert not any(other in text for other in TAGS)


def _check(vocabulary: Vocabulary, result: ConsultResult) -> None:
    answer = compose(vocabulary, PROTOCOL, [result], 256)
    assert not vocabulary.control_ids.intersection(answer.token_ids)
    if not result.accepted:
        assert answer.kind == "notice"
        return
    around = [vocabulary.encode(t) for t in (PROTOCOL.advice_tags[0], '<a i="1">')]
    start = sum(map(len, around))
    [(first, stop)] = answer.spans
    assert first == len(around[0])
    reply = answer.token_ids[start : stop - len(vocabulary.encode("</a>"))]
    assert len(reply) <= 256
    text = vocabulary.text(reply)
    assert not any(tag.lower() in text.lower() for tag in TAGS)
    assert PROTOCOL.parse(text) is None
    whole = vocabulary.text(answer.token_ids)
    assert PROTOCOL.parse(whole) is None
    counts = {tag: whole.count(tag) for tag in (*PROTOCOL.advice_tags, '<a i="1">', "</a>")}
    assert set(counts.values()) == {1}


def test_the_mask_covers_exactly_the_reply_and_only_the_policy_is_graded(
    make_model: Callable[..., Any], bpe_tokenizer: Any
) -> None:
    """Rollouts of a model that closes blocks by chance would be rare, so blocks are forced."""
    rng = random.Random(5)
    replies = [hostile(rng, ["<|end|>", "<|user|>"]) + " \\boxed{72}" for _ in range(64)]
    sampler = Sampler(make_model(), bpe_tokenizer)
    vocabulary = sampler.vocabulary
    assert vocabulary is not None
    prompt = vocabulary.encode("What is 48+24?")
    expert = Function(lambda request: replies[request.rollout], immediate=True)
    asked = vocabulary.encode("<consult><q>48+24</q></consult>")
    rollouts = _with_forced_block(sampler, prompt, asked, expert, len(replies))
    for rollout in rollouts:
        [injection] = rollout.injections
        covered = np.zeros(len(rollout.token_ids), bool)
        covered[injection.start : injection.stop] = True
        assert np.array_equal(covered, rollout.loss_mask == 0)
        assert not vocabulary.control_ids.intersection(rollout.ids(("expert",)))
        assert rollout.policy_text(vocabulary.plain_text).startswith("<consult><q>48+24")
        assert len(rollout.consults) == 1
        graded = rollout.final_turn(vocabulary.plain_text)
        assert not verify(graded, "72").correct or "72" in graded


def _with_forced_block(
    sampler: Sampler, prompt: list[int], asked: list[int], expert: Any, n: int
) -> list[Any]:
    """Make the first tokens of every rollout those of a consult block."""
    from eapo_fast.engine import session as module

    real = module.sample
    place: dict[int, int] = {}

    def forced(logits: Any, **options: Any) -> Any:
        tokens, logprobs, kept = real(logits, **options)
        for row, seq in enumerate(seqs[-1]):
            at = place.get(seq, 0)
            if at < len(asked):
                tokens[row] = asked[at]
            place[seq] = at + 1
        return tokens, logprobs, kept

    seqs: list[list[int]] = []
    step = module.Session.step

    class Watched:
        def __init__(self, scheduler: Any) -> None:
            self.scheduler = scheduler

        def __getattr__(self, name: str) -> Any:
            return getattr(self.scheduler, name)

        def plan(self) -> Any:
            plan = self.scheduler.plan()
            seqs.append([] if plan is None else plan.sample_seqs.tolist())
            return plan

    def watched(self: Any) -> Any:
        if not isinstance(self.scheduler, Watched):
            self.scheduler = Watched(self.scheduler)
        return step(self)

    desk = ConsultScheduler(expert, ConsultPolicy(dedup="off"))
    with pytest.MonkeyPatch.context() as patch, desk:
        patch.setattr(module, "sample", forced)
        patch.setattr(module.Session, "step", watched)
        params = SamplingParams(max_tokens=len(asked) + 6, n=n)
        protocol = ConsultProtocol(max_turns=2)
        return collect_rollouts(sampler, [prompt], params, protocol=protocol, scheduler=desk)
