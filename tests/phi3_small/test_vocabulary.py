"""The real vocabulary under models with more rows than tokens: its special ids stay where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from s2_vllm.models.phi3_small_config import Phi3SmallConfig
from tests.engine.engines import engine, generate, greedy_params
from tests.phi3_small.checkpoints import save_checkpoint
from tests.phi3_small.oracle import DUMMY_IDS, TRAINED_SPECIAL_IDS, Oracle

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 100352
"""Ordinary and special ones."""

VOCABULARY_SIZES = [TOKENS, TOKENS + 1, 100360, 100416]


@pytest.mark.parametrize("vocab_size", VOCABULARY_SIZES)
def test_masked_ids_are_the_published_tokenizers(vocab_size: int) -> None:
    """And a row that is no token's is not masked: fine-tuning may have added one there."""
    assert Phi3SmallConfig(vocab_size=vocab_size).dummy_token_indices == DUMMY_IDS


def test_a_vocabulary_without_special_ids_has_none_masked() -> None:
    assert Phi3SmallConfig(vocab_size=512).dummy_token_indices == []


def test_an_answer_can_end(tmp_path: Path) -> None:
    """`<|end|>` and the other trained special tokens can be generated, a dummy cannot."""
    vocab_size = TOKENS + 1
    folder = save_checkpoint(tmp_path, num_hidden_layers=1, vocab_size=vocab_size, dummy_token_indices=None)
    prompt = [100257, 100262, 5, 100266, 100263, vocab_size - 1]

    def wanting(token: int) -> dict[str, dict[int, float]]:
        return {"logit_bias": {token: 1e4}}

    asked = [*sorted(TRAINED_SPECIAL_IDS), vocab_size - 1, DUMMY_IDS[0], DUMMY_IDS[-1]]
    params = [greedy_params(1, **wanting(token)) for token in asked] + [greedy_params(8)]
    with engine(folder, max_model_len=64) as llm:
        *answers, plain = (
            list(output.outputs[0].token_ids) for output in generate(llm, [prompt] * len(params), params)
        )
    expected, _ = Oracle(folder).greedy(prompt, 8)
    assert answers == [[token] for token in asked[:-2]] + [expected[:1]] * 2
    assert plain == expected
