"""The `s2_attention` key: what it accepts, what it means, and what it says of everything else."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from s2_kernels import config as kernels_config
from s2_kernels.config import S2Config, S2ConfigError, find_config, find_model_config
from s2_kernels.pattern import S2Pattern
from s2_vllm import config
from s2_vllm.plan import ModelGeometry
from s2_vllm.planning import make_plan

LAYERS = 4

GOOD: dict[str, Any] = {"local_blocks": 4, "vert_stride": 8}


def refusal(raw: object) -> str:
    """What the error says when `raw` is the key's value."""
    with pytest.raises(S2ConfigError) as caught:
        S2Config.parse(raw, LAYERS)
    return str(caught.value)


def test_defaults() -> None:
    assert S2Config.parse(GOOD, LAYERS) == S2Config(
        local_blocks=4,
        vert_stride=8,
        block_size=64,
        homo_head=False,
        head_sliding_step=None,
        head_sliding_offset=0,
        pattern_heads="kv",
        dense_layers=(),
    )


def test_every_key() -> None:
    raw = {
        "local_blocks": 3,
        "vert_stride": 5,
        "block_size": 32,
        "homo_head": True,
        "head_sliding_step": 2,
        "head_sliding_offset": 7,
        "pattern_heads": "query",
        "dense_layers": [3, 0],
    }
    assert S2Config.parse(raw, LAYERS) == S2Config(3, 5, 32, True, 2, 7, "query", (0, 3))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"head_sliding_step": None}, id="step-null"),
        pytest.param({"head_sliding_step": 0}, id="step-0"),
        pytest.param({"head_sliding_offset": 0}, id="offset-0"),
        pytest.param({"local_blocks": 1, "vert_stride": 1}, id="smallest"),
        pytest.param({"block_size": 16}, id="block-16"),
        pytest.param({"block_size": 128}, id="block-128"),
        pytest.param({"dense_layers": []}, id="no-dense-layer"),
        pytest.param({"dense_layers": [0, 1, 2]}, id="one-sparse-layer"),
    ],
)
def test_edges_are_accepted(change: dict[str, Any]) -> None:
    config = S2Config.parse(GOOD | change, LAYERS)
    for key, value in change.items():
        assert getattr(config, key) == (tuple(value) if key == "dense_layers" else value)


def test_parse_leaves_its_input_alone() -> None:
    raw = GOOD | {"dense_layers": [2, 1]}
    S2Config.parse(raw, LAYERS)
    assert raw == GOOD | {"dense_layers": [2, 1]}


INTEGER = "expected an integer of at least"
BLOCK_SIZE = "expected a power of two from 16 to 128"
LAYER_INDEX = f"expected layer indices from 0 to {LAYERS - 1}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        pytest.param("local_blocks", 0, f"{INTEGER} 1", id="local_blocks-0"),
        pytest.param("local_blocks", -3, f"{INTEGER} 1", id="local_blocks-negative"),
        pytest.param("local_blocks", True, f"{INTEGER} 1", id="local_blocks-bool"),
        pytest.param("local_blocks", 4.0, f"{INTEGER} 1", id="local_blocks-float"),
        pytest.param("local_blocks", "4", f"{INTEGER} 1", id="local_blocks-string"),
        pytest.param("local_blocks", None, f"{INTEGER} 1", id="local_blocks-null"),
        pytest.param("vert_stride", 0, f"{INTEGER} 1", id="vert_stride-0"),
        pytest.param("vert_stride", -8, f"{INTEGER} 1", id="vert_stride-negative"),
        pytest.param("vert_stride", True, f"{INTEGER} 1", id="vert_stride-bool"),
        pytest.param("vert_stride", 8.0, f"{INTEGER} 1", id="vert_stride-float"),
        pytest.param("vert_stride", [8], f"{INTEGER} 1", id="vert_stride-list"),
        pytest.param("vert_stride", None, f"{INTEGER} 1", id="vert_stride-null"),
        pytest.param("block_size", 48, BLOCK_SIZE, id="block_size-not-a-power-of-two"),
        pytest.param("block_size", 8, BLOCK_SIZE, id="block_size-too-small"),
        pytest.param("block_size", 256, BLOCK_SIZE, id="block_size-too-large"),
        pytest.param("block_size", 0, f"{INTEGER} 1", id="block_size-0"),
        pytest.param("block_size", True, f"{INTEGER} 1", id="block_size-bool"),
        pytest.param("block_size", 64.0, f"{INTEGER} 1", id="block_size-float"),
        pytest.param("block_size", None, f"{INTEGER} 1", id="block_size-null"),
        pytest.param("head_sliding_step", -1, f"{INTEGER} 0", id="step-negative"),
        pytest.param("head_sliding_step", False, f"{INTEGER} 0", id="step-bool"),
        pytest.param("head_sliding_step", 1.0, f"{INTEGER} 0", id="step-float"),
        pytest.param("head_sliding_step", "1", f"{INTEGER} 0", id="step-string"),
        pytest.param("head_sliding_offset", -1, f"{INTEGER} 0", id="offset-negative"),
        pytest.param("head_sliding_offset", True, f"{INTEGER} 0", id="offset-bool"),
        pytest.param("head_sliding_offset", 0.5, f"{INTEGER} 0", id="offset-float"),
        pytest.param("head_sliding_offset", None, f"{INTEGER} 0", id="offset-null"),
        pytest.param("homo_head", 1, "expected true or false", id="homo_head-int"),
        pytest.param("homo_head", "true", "expected true or false", id="homo_head-string"),
        pytest.param("homo_head", None, "expected true or false", id="homo_head-null"),
        pytest.param("pattern_heads", "q", "expected 'kv' or 'query'", id="pattern_heads-other"),
        pytest.param("pattern_heads", 1, "expected 'kv' or 'query'", id="pattern_heads-int"),
        pytest.param("pattern_heads", ["kv"], "expected 'kv' or 'query'", id="pattern_heads-list"),
        pytest.param("pattern_heads", None, "expected 'kv' or 'query'", id="pattern_heads-null"),
        pytest.param("dense_layers", 0, "expected a list of layer indices", id="dense_layers-int"),
        pytest.param("dense_layers", "01", "expected a list of layer indices", id="dense_layers-string"),
        pytest.param("dense_layers", None, "expected a list of layer indices", id="dense_layers-null"),
        pytest.param("dense_layers", [1, 1], "expected each layer once", id="dense_layers-twice"),
    ],
)
def test_wrong_value(key: str, value: object, expected: str) -> None:
    message = refusal(GOOD | {key: value})
    assert message.startswith(f"s2_attention.{key}: {value!r}")
    assert message.endswith(expected)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(LAYERS, id="too-large"),
        pytest.param(-1, id="negative"),
        pytest.param(True, id="bool"),
        pytest.param(1.0, id="float"),
        pytest.param("1", id="string"),
        pytest.param([1], id="list"),
    ],
)
def test_wrong_layer_index(layer: object) -> None:
    message = refusal(GOOD | {"dense_layers": [0, layer]})
    assert message == f"s2_attention.dense_layers: {layer!r}, {LAYER_INDEX}"


def test_all_layers_dense() -> None:
    message = refusal(GOOD | {"dense_layers": list(range(LAYERS))})
    assert message.startswith(f"s2_attention.dense_layers: all {LAYERS} layers")
    assert message.endswith("expected at least one sparse layer")


def test_unknown_key() -> None:
    message = refusal(GOOD | {"window": 4})
    assert message.startswith("s2_attention.window: unknown key, expected one of")
    assert "local_blocks" in message
    assert "dense_layers" in message


@pytest.mark.parametrize("key", ["local_blocks", "vert_stride"])
def test_missing_key(key: str) -> None:
    message = refusal({k: v for k, v in GOOD.items() if k != key})
    assert message == f"s2_attention.{key}: missing, expected a positive integer"


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param([4, 8], id="list"),
        pytest.param("local_blocks=4", id="string"),
        pytest.param(4, id="int"),
        pytest.param(True, id="bool"),
    ],
)
def test_not_an_object(raw: object) -> None:
    message = refusal(raw)
    assert message.startswith(f"s2_attention: {raw!r}, expected an object with keys")
    assert "vert_stride" in message


def test_pattern_takes_every_parameter() -> None:
    config = S2Config(3, 6, 32, False, 2, 1, "query", (0,))
    pattern = config.pattern(num_heads=4, num_kv_heads=2)
    assert (pattern.block_size, pattern.local_blocks, pattern.vert_stride) == (32, 3, 6)
    assert pattern.num_kv_heads == 2
    # Head h attends to the blocks j with (j + 2 h + 1) mod 6 == 0.
    assert pattern.residues == (5, 3, 1, 5)


def test_pattern_of_one_head() -> None:
    pattern = S2Config(3, 6, homo_head=True, head_sliding_offset=2).pattern(num_heads=4, num_kv_heads=2)
    assert pattern.residues == (4, 4, 4, 4)


def test_a_stride_longer_than_any_table() -> None:
    with pytest.raises(S2ConfigError, match=r"^s2_attention\.vert_stride: 67108864, expected at most 65536$"):
        S2Config(4, 67108864).pattern(num_heads=8, num_kv_heads=2)


def test_more_query_heads_than_the_stride_has_residues() -> None:
    config = S2Config(4, 2, pattern_heads="query")
    with pytest.raises(S2ConfigError, match=r"^s2_attention\.vert_stride: 2, expected at least 4 "):
        config.pattern(num_heads=8, num_kv_heads=2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [
        (16, 3, "num_attention_heads: 16, expected a multiple of num_key_value_heads (3)"),
        (0, 1, "num_attention_heads: 0, expected a positive integer"),
        (8, 0, "num_key_value_heads: 0, expected a positive integer"),
    ],
)
def test_heads_are_named_by_the_models_keys(heads: int, kv_heads: int, message: str) -> None:
    with pytest.raises(S2ConfigError) as caught:
        S2Config(4, 8).pattern(heads, kv_heads)
    assert str(caught.value) == message


def test_an_error_of_the_pattern_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object, **__: object) -> None:
        raise ValueError("vert_stride: 1: 2, expected num_heads: 3")

    monkeypatch.setattr(S2Pattern, "build", build)
    with pytest.raises(S2ConfigError) as caught:
        S2Config(4, 8).pattern(4, 2)
    assert str(caught.value) == "s2_attention.vert_stride: 1: 2, expected num_attention_heads: 3"


def test_find_config() -> None:
    assert find_config({"s2_attention": GOOD, "num_hidden_layers": LAYERS}, LAYERS) == S2Config(4, 8)


@pytest.mark.parametrize(
    "hf_config",
    [
        pytest.param({"num_hidden_layers": LAYERS}, id="no-key"),
        pytest.param({"s2_attention": None}, id="null"),
    ],
)
def test_a_model_without_a_pattern(hf_config: dict[str, Any]) -> None:
    assert find_config(hf_config, LAYERS) is None


def test_an_empty_object_is_not_the_absence_of_one() -> None:
    with pytest.raises(S2ConfigError, match="local_blocks: missing"):
        find_config({"s2_attention": {}}, LAYERS)


def test_the_whole_configuration_goes_before_its_text_part() -> None:
    none, some = SimpleNamespace(other=1), SimpleNamespace(s2_attention=GOOD | {"dense_layers": [LAYERS - 1]})
    other = SimpleNamespace(s2_attention=GOOD | {"local_blocks": 9})
    expected = S2Config(4, 8, dense_layers=(LAYERS - 1,))
    assert find_model_config(none, none, LAYERS) is None
    assert find_model_config(none, some, LAYERS) == expected
    assert find_model_config(some, none, LAYERS) == expected
    assert find_model_config(some, other, LAYERS) == expected
    with pytest.raises(S2ConfigError, match=f"expected layer indices from 0 to {LAYERS - 2}"):
        find_model_config(none, some, LAYERS - 1)


PHI3_SMALL: dict[str, Any] = {
    "blocksparse_block_size": 64,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_triton_kernel_block_size": 64,
    "blocksparse_vert_stride": 8,
    "dense_attention_every_n_layers": 2,
}


def test_phi3_small_keys() -> None:
    config = find_config(PHI3_SMALL, num_layers=32)
    assert config is not None
    assert asdict(config) == {
        "local_blocks": 16,
        "vert_stride": 8,
        "block_size": 64,
        "homo_head": False,
        "head_sliding_step": None,
        "head_sliding_offset": 1,
        "pattern_heads": "query",
        "dense_layers": tuple(range(1, 32, 2)),
    }


@pytest.mark.parametrize(
    ("change", "attribute", "expected"),
    [
        pytest.param({"blocksparse_homo_head_pattern": True}, "homo_head", True, id="homo-head"),
        pytest.param({"blocksparse_block_size": 32}, "block_size", 32, id="block-32"),
        pytest.param({"dense_attention_every_n_layers": 3}, "dense_layers", (2, 5, 8), id="every-third"),
        pytest.param({"dense_attention_every_n_layers": None}, "dense_layers", (), id="none-dense"),
    ],
)
def test_other_phi3_small_values(change: dict[str, Any], attribute: str, expected: object) -> None:
    config = find_config(PHI3_SMALL | change, num_layers=9)
    assert getattr(config, attribute) == expected


def test_the_key_goes_before_phi3_smalls_own() -> None:
    assert find_config(PHI3_SMALL | {"s2_attention": GOOD}, LAYERS) == S2Config(4, 8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("blocksparse_vert_stride", 0),
        ("blocksparse_num_local_blocks", "16"),
        ("blocksparse_block_size", 96),
        ("blocksparse_homo_head_pattern", "no"),
        ("dense_attention_every_n_layers", "2"),
        ("dense_attention_every_n_layers", -2),
    ],
)
def test_wrong_phi3_small_value(key: str, value: object) -> None:
    with pytest.raises(S2ConfigError) as caught:
        find_config(PHI3_SMALL | {key: value}, num_layers=32)
    assert str(caught.value).startswith(f"{key}: {value!r}, expected ")


@pytest.mark.parametrize(
    ("stride", "heads", "message"),
    [
        (2, 32, "blocksparse_vert_stride: 2, expected at least 4 with pattern_heads 'query'"),
        (4, 32, "blocksparse_vert_stride: 4, expected more than the 4 residues that each KV head keeps"),
        (8, 28, "num_attention_heads: 28, expected a multiple of num_key_value_heads (8)"),
    ],
)
def test_phi3_smalls_keys_are_named_by_the_plan_too(stride: int, heads: int, message: str) -> None:
    config = find_config(PHI3_SMALL | {"blocksparse_vert_stride": stride}, num_layers=32)
    assert config is not None
    with pytest.raises(S2ConfigError) as caught:
        make_plan(config, ModelGeometry(32, heads, 8, 128, 2))
    assert str(caught.value).startswith(message)


def test_find_config_checks_the_layers() -> None:
    with pytest.raises(
        S2ConfigError, match=r"^s2_attention\.dense_layers: 4, expected layer indices from 0 to 3$"
    ):
        find_config({"s2_attention": GOOD | {"dense_layers": [4]}}, LAYERS)


def test_a_phi3_small_with_every_layer_dense_has_no_pattern() -> None:
    assert find_config(PHI3_SMALL | {"dense_attention_every_n_layers": 1}, LAYERS) is None


def test_plugins_name_is_the_same_parser() -> None:
    for name in config.__all__:
        assert getattr(config, name) is getattr(kernels_config, name)
