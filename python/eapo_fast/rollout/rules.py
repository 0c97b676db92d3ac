"""What the engine is told about consults: where rows park, what is banned, how much may come in."""

from __future__ import annotations

import dataclasses

from eapo_fast.engine import Rules, Sampler
from eapo_fast.experts import ConsultScheduler
from eapo_fast.rollout.protocol import ConsultProtocol


def foreign_tokens(
    sampler: Sampler, protocol: ConsultProtocol | None, scheduler: ConsultScheduler | None
) -> int:
    """Return the most tokens that replies can add to one rollout."""
    if protocol is None or scheduler is None or sampler.vocabulary is None:
        return 0
    texts = [*protocol.tags, *protocol.notices.values()]
    written = sum(len(sampler.vocabulary.encode(t)) for t in texts)
    replies = protocol.max_queries * (scheduler.policy.max_reply_tokens + written)
    return (protocol.max_turns - 1) * replies


def consult_rules(base: Rules, protocol: ConsultProtocol | None) -> Rules:
    """Consults are possible: the closing tag parks the row."""
    return dataclasses.replace(base, park=(protocol.close_tag,)) if protocol else base


def solo_rules(base: Rules, protocol: ConsultProtocol | None) -> Rules:
    """No consult: the opening tag is banned, a stray closing tag ends the rollout."""
    if protocol is None:
        return base
    return dataclasses.replace(
        base,
        park=(protocol.close_tag,),
        banned_strings=(*base.banned_strings, protocol.open_tag),
    )
