"""The configs of checkpoints that say themselves what they are: their family's, tokenizers included."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from transformers import AutoConfig, AutoTokenizer

from s2_vllm.demo.checkpoint import train_tokenizer
from s2_vllm.demo.corpus import project_text
from s2_vllm.models.families import register_configs
from tests.engine.checkpoints import FAMILIES, S2_NAMES, tiny_config

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

TEXT = "Two  spaces, 世界 and I'll: 12345"


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register_configs()


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(project_text()[:50_000])


@pytest.mark.parametrize("family", FAMILIES)
def test_config_is_the_familys_with_the_pattern(tmp_path: Path, family: str) -> None:
    dense = tiny_config(family, rope_theta=5e5)
    s2 = {"local_blocks": 16, "vert_stride": 8}
    keys = {**dense.to_dict(), **S2_NAMES[family], "s2_attention": s2}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, type(dense))
    assert config.s2_attention == s2
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        **json.loads(dense.to_json_string()),
        **S2_NAMES[family],
        "s2_attention": s2,
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "named", ["LlamaTokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "TokenizersBackend"]
)
def test_tokenizer_is_the_familys(
    tmp_path: Path, trained: PreTrainedTokenizerFast, family: str, named: str
) -> None:
    """For some families transformers takes another class than the one that tokenizer_config.json names."""
    tokenizers = []
    for folder, names in ((tmp_path / "dense", {}), (tmp_path / "sparse", S2_NAMES[family])):
        trained.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({**tiny_config(family).to_dict(), **names}))
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": named}))
        tokenizers.append(AutoTokenizer.from_pretrained(folder))
    dense, sparse = tokenizers
    assert type(sparse) is type(dense)
    assert sparse.encode(TEXT) == dense.encode(TEXT)
