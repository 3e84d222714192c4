"""The `s2_attention` key: what it accepts, what it means, and what it says of everything else."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2_kernels import config as kernels_config
from s2_kernels.config import (
    S2Config,
    S2ConfigError,
    find_config,
    find_model_config,
    local_blocks_of,
    sink_blocks_of,
    states_pattern,
)
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
        "sink_blocks": 3,
        "full_heads": [4, 2],
        "num_dense_heads": 0,
        "layers": {"1-2": {"sink_blocks": 1, "full_heads": [1, 0]}},
    }
    assert S2Config.parse(raw, LAYERS) == S2Config(
        *(3, 5, 32, True, 2, 7, "query", (0, 3)),
        sink_blocks=3,
        full_heads=(2, 4),
        layers={"1-2": {"sink_blocks": 1, "full_heads": (0, 1)}},
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"head_sliding_step": None}, id="step-null"),
        pytest.param({"head_sliding_step": 0}, id="step-0"),
        pytest.param({"head_sliding_offset": 0}, id="offset-0"),
        pytest.param({"local_blocks": 1, "vert_stride": 1}, id="smallest"),
        pytest.param({"vert_stride": None}, id="no-stride"),
        pytest.param({"sink_blocks": 4}, id="sinks-of-a-window"),
        pytest.param({"layers": {}, "full_heads": (), "num_dense_heads": 0}, id="nothing-of-its-own"),
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
        pytest.param("vert_stride", 0, f"{INTEGER} 1, or null", id="vert_stride-0"),
        pytest.param("vert_stride", -8, f"{INTEGER} 1, or null", id="vert_stride-negative"),
        pytest.param("vert_stride", True, f"{INTEGER} 1, or null", id="vert_stride-bool"),
        pytest.param("vert_stride", 8.0, f"{INTEGER} 1, or null", id="vert_stride-float"),
        pytest.param("vert_stride", [8], f"{INTEGER} 1, or null", id="vert_stride-list"),
        pytest.param("sink_blocks", -1, f"{INTEGER} 0", id="sink_blocks-negative"),
        pytest.param("sink_blocks", None, f"{INTEGER} 0", id="sink_blocks-null"),
        pytest.param("sink_blocks", 5, "expected at most the 4 blocks of the local window", id="sinks-long"),
        pytest.param("num_dense_heads", -1, f"{INTEGER} 0", id="num_dense_heads-negative"),
        pytest.param("num_dense_heads", [1], f"{INTEGER} 0", id="num_dense_heads-list"),
        pytest.param("full_heads", 1, "expected a list of KV heads", id="full_heads-int"),
        pytest.param("full_heads", None, "expected a list of KV heads", id="full_heads-null"),
        pytest.param("full_heads", [1, 1], "expected each KV head once", id="full_heads-twice"),
        pytest.param("layers", [0], "expected an object from layers to their keys", id="layers-list"),
        pytest.param("layers", None, "expected an object from layers to their keys", id="layers-null"),
        pytest.param("block_size", 48, BLOCK_SIZE, id="block_size-not-a-power-of-two"),
        pytest.param("block_size", 8, BLOCK_SIZE, id="block_size-too-small"),
        pytest.param("block_size", 256, BLOCK_SIZE, id="block_size-too-large"),
        pytest.param("block_size", 0, f"{INTEGER} 1", id="block_size-0"),
        pytest.param("block_size", True, f"{INTEGER} 1", id="block_size-bool"),
        pytest.param("block_size", 64.0, f"{INTEGER} 1", id="block_size-float"),
        pytest.param("block_size", None, f"{INTEGER} 1", id="block_size-null"),
        pytest.param("head_sliding_step", -1, f"{INTEGER} 0, or null", id="step-negative"),
        pytest.param("head_sliding_step", False, f"{INTEGER} 0, or null", id="step-bool"),
        pytest.param("head_sliding_step", 1.0, f"{INTEGER} 0, or null", id="step-float"),
        pytest.param("head_sliding_step", "1", f"{INTEGER} 0, or null", id="step-string"),
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
    or_null = ", or null" if key == "vert_stride" else ""
    assert message == f"s2_attention.{key}: missing, expected a positive integer{or_null}"


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


STREAMING: dict[str, Any] = {"local_blocks": 5, "vert_stride": None, "sink_blocks": 1}


def patterns(raw: dict[str, Any], heads: int = 8, kv_heads: int = 4) -> dict[int, S2Pattern]:
    return S2Config.parse(raw, LAYERS).layer_patterns(heads, kv_heads, LAYERS)


def pattern_refusal(raw: dict[str, Any]) -> str:
    """What the error says when the heads of a model with 8 query and 4 KV heads do not fit."""
    config = S2Config.parse(raw, LAYERS)
    with pytest.raises(S2ConfigError) as caught:
        config.layer_patterns(8, 4, LAYERS)
    return str(caught.value)


def test_layers_that_do_not_differ_share_a_pattern() -> None:
    found = patterns(GOOD | {"dense_layers": [1], "sink_blocks": 2, "full_heads": [3, 0]})
    expected = S2Pattern.build(8, 4, local_blocks=4, vert_stride=8, sink_blocks=2, full_heads=[0, 3])
    assert list(found.items()) == [(0, expected), (2, expected), (3, expected)]
    assert found[0] is found[3]
    assert S2Config.parse(GOOD | {"sink_blocks": 2, "full_heads": [0, 3]}, LAYERS).pattern(8, 4) == expected


def test_without_a_stride_all_other_heads_stream() -> None:
    (pattern,) = set(patterns(STREAMING | {"full_heads": [2]}).values())
    assert pattern.kept_residues == ((), (), (0,), ())
    (pattern,) = set(patterns(STREAMING).values())
    assert pattern.num_virtual_heads == 0
    assert not pattern.is_union_complete


@pytest.mark.parametrize("kind", [str, int])
def test_full_heads_by_layer(kind: type) -> None:
    """JSON's keys are strings; a configuration that is made in Python may have integers."""
    found = patterns(STREAMING | {"full_heads": {kind(0): [1], kind(3): [3, 0]}, "dense_layers": [2]})
    assert {layer: pattern.full_heads for layer, pattern in found.items()} == {0: (1,), 1: (), 3: (0, 3)}


def test_where_a_layer_has_a_value_from() -> None:
    config = S2Config.parse(GOOD | {"layers": {"1-2": {"vert_stride": 4}}, "dense_layers": [0]}, LAYERS)
    names = [config.name_of("vert_stride", layer) for layer in (1, 2, 3)]
    assert names == ["layers.1-2.vert_stride", "layers.1-2.vert_stride", "vert_stride"]


def test_num_dense_heads_are_the_last() -> None:
    assert {pattern.full_heads for pattern in patterns(GOOD | {"num_dense_heads": 3}).values()} == {(1, 2, 3)}


def test_a_layer_may_be_full_where_others_are_not() -> None:
    found = patterns(STREAMING | {"full_heads": {"1": [0, 1, 2, 3]}})
    assert [len(pattern.full_heads) for pattern in found.values()] == [0, 4, 0, 0]


@pytest.mark.parametrize(
    ("of_all", "own", "expected"),
    [
        ({"num_dense_heads": 2}, {"full_heads": [0]}, (0,)),
        ({"num_dense_heads": 2}, {"full_heads": []}, ()),
        ({"full_heads": [0, 1]}, {"num_dense_heads": 1}, (3,)),
        ({"full_heads": {"2": [0, 1]}}, {"num_dense_heads": 0}, ()),
        ({"full_heads": {"2": [0, 1]}}, {"full_heads": [3]}, (3,)),
        ({"full_heads": [0, 1]}, {"sink_blocks": 1}, (0, 1)),
    ],
    ids=str,
)
def test_full_heads_of_a_layers_own(
    of_all: dict[str, Any], own: dict[str, Any], expected: tuple[int, ...]
) -> None:
    found = patterns(GOOD | of_all | {"layers": {"2": own}})
    assert found[2].full_heads == expected
    assert patterns(GOOD | of_all)[1] == found[1]


@pytest.mark.parametrize(
    ("label", "layers"), [("2", [2]), ("1-3", [1, 2, 3]), ("0,2-3", [0, 2, 3]), ("0, 3", [0, 3]), (2, [2])]
)
def test_the_layers_that_a_key_names(label: str | int, layers: list[int]) -> None:
    found = patterns(GOOD | {"layers": {label: {"local_blocks": 9}}})
    assert [layer for layer, pattern in found.items() if pattern.local_blocks == 9] == layers


OWN_KEYS = st.fixed_dictionaries(
    {},
    optional={
        "local_blocks": st.integers(3, 6),
        "vert_stride": st.none() | st.integers(1, 8),
        "homo_head": st.booleans(),
        "head_sliding_step": st.none() | st.integers(0, 4),
        "head_sliding_offset": st.integers(0, 4),
        "sink_blocks": st.integers(0, 3),
        "full_heads": st.lists(st.integers(0, 2), unique=True),
    },
)


@given(OWN_KEYS, st.lists(OWN_KEYS, min_size=LAYERS, max_size=LAYERS))
def test_layers_are_as_if_each_were_the_whole_model(
    of_all: dict[str, Any], own: list[dict[str, Any]]
) -> None:
    layers = {str(layer): keys for layer, keys in enumerate(own)}
    found = patterns(GOOD | of_all | {"layers": layers})
    for layer, keys in enumerate(own):
        assert found[layer] == S2Config.parse(GOOD | of_all | keys, 1).pattern(8, 4)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"4": {}}, ": '4', expected layers from 0 to 3, the lower one first"),
        ({"0-4": {}}, ": '0-4', expected layers from 0 to 3, the lower one first"),
        ({"3-0": {}}, ": '3-0', expected layers from 0 to 3, the lower one first"),
        ({"-1": {}}, ": '-1', expected layers such as '3', '0-15' or '0-3,8'"),
        ({"all": {}}, ": 'all', expected layers such as '3', '0-15' or '0-3,8'"),
        ({True: {}}, ": True, expected layers such as '3', '0-15' or '0-3,8'"),
        ({"2-3": {}, "2": {}}, ": '2', expected each layer once, and layer 2 is there twice"),
        ({"0": {}, "2": {}, "0,3": {}}, ": '0,3', expected each layer once, and layer 0 is there twice"),
        ({"\u0663": {}}, ": '\u0663', expected layers such as '3', '0-15' or '0-3,8'"),
        ({2.0: {}}, ": 2.0, expected layers such as '3', '0-15' or '0-3,8'"),
        ({"0,0": {}}, ": '0,0', expected each layer once, and layer 0 is there twice"),
        ({"0-1": {}}, ": '0-1', expected sparse layers, and 1 is in dense_layers"),
        ({"0": {"block_size": 32}}, ".0.block_size: 32, expected none: all layers have the"),
        ({"0": {"dense_layers": []}}, ".0.dense_layers: unknown key, expected one of"),
        ({"0": [3]}, ".0: [3], expected an object with keys"),
        ({"0": {"local_blocks": None}}, ".0.local_blocks: None, expected an integer of at least 1"),
        ({"0": {"full_heads": {"0": [1]}}}, ".0.full_heads: {'0': [1]}, expected a list of KV heads"),
        ({"2-3": {"full_heads": [0, -1]}}, ".2-3.full_heads: -1, expected indices of KV heads"),
        ({"2,3": {"sink_blocks": 5}}, ".2,3.sink_blocks: 5, expected at most the 4 blocks"),
        (
            {"0": {"homo_head": True, "num_dense_heads": 1}},
            ".0.num_dense_heads: 1, expected 0 with homo_head",
        ),
        (
            {"0": {"full_heads": [1], "num_dense_heads": 1}},
            ".0.num_dense_heads: 1, expected 0 with full_heads",
        ),
    ],
    ids=str,
)
def test_wrong_layers(layers: dict[Any, Any], message: str) -> None:
    found = refusal(GOOD | {"dense_layers": [1], "layers": layers})
    assert found.startswith(f"s2_attention.layers{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full_heads": [0, True]}, "full_heads: True, expected indices of KV heads"),
        ({"full_heads": {"4": [0]}}, "full_heads: '4', expected layers from 0 to 3, the lower one first"),
        ({"full_heads": {"1": [0]}}, "full_heads: '1', expected sparse layers, and 1 is in dense_layers"),
        ({"full_heads": {"2-3": [0]}}, "full_heads: '2-3', expected the index of one layer"),
        ({"full_heads": {"2": 0}}, "full_heads.2: 0, expected a list of KV heads"),
        ({"full_heads": {"2": [0, 0]}}, "full_heads.2: [0, 0], expected each KV head once"),
        ({"homo_head": True, "num_dense_heads": 1}, "num_dense_heads: 1, expected 0 with homo_head"),
        ({"full_heads": [0], "num_dense_heads": 1}, "num_dense_heads: 1, expected 0 with full_heads"),
        ({"full_heads": {"2": []}, "num_dense_heads": 1}, "num_dense_heads: 1, expected 0 with full_heads"),
        (
            {"layers": {"0": {"local_blocks": 2}}, "sink_blocks": 3},
            "sink_blocks: 3, expected at most the 2 blocks of the local window",
        ),
    ],
    ids=str,
)
def test_heads_and_sinks_that_contradict(change: dict[str, Any], message: str) -> None:
    assert refusal(GOOD | {"dense_layers": [1]} | change) == f"s2_attention.{message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full_heads": [0, 4]}, "full_heads: (0, 4), expected KV heads from 0 to 3"),
        ({"full_heads": {"2": [4]}}, "full_heads.2: (4,), expected KV heads from 0 to 3"),
        ({"layers": {"0-1": {"full_heads": [9]}}}, "layers.0-1.full_heads: (9,), expected KV heads"),
        ({"num_dense_heads": 5}, "num_dense_heads: 5, expected at most 4, the KV heads"),
        ({"layers": {"3": {"num_dense_heads": 5}}}, "layers.3.num_dense_heads: 5, expected at most 4"),
        ({"full_heads": [0, 1, 2, 3]}, "full_heads: all 4 KV heads of every sparse layer, expected one"),
        ({"num_dense_heads": 4}, "num_dense_heads: all 4 KV heads of every sparse layer, expected one"),
        (
            {"layers": {"0-3": {"full_heads": [0, 1, 2, 3]}}},
            "layers.0-3.full_heads: all 4 KV heads of every sparse layer, expected one",
        ),
        ({"layers": {"1": {"vert_stride": 67108864}}}, "layers.1.vert_stride: 67108864, expected at most"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_heads(change: dict[str, Any], message: str) -> None:
    assert pattern_refusal(GOOD | change).startswith(f"s2_attention.{message}")


@pytest.mark.parametrize(
    ("key", "value"), [("layers", {"0": {"sink_blocks": 1}}), ("full_heads", {"0": [1]})]
)
def test_layers_that_differ_have_no_one_pattern(key: str, value: Any) -> None:
    config = S2Config.parse(GOOD | {key: value}, LAYERS)
    with pytest.raises(S2ConfigError, match=rf"^s2_attention\.{key}: layers that differ, expected one"):
        config.pattern(8, 4)


def test_configs_with_layers_of_their_own_can_be_hashed() -> None:
    raw = GOOD | {"full_heads": {"0": [1]}, "layers": {"0": {"sink_blocks": 1}}}
    assert len({S2Config.parse(raw, LAYERS), S2Config.parse(raw, LAYERS), S2Config.parse(GOOD, LAYERS)}) == 2


def test_a_config_is_read_back_from_its_own_values() -> None:
    raw = GOOD | {"dense_layers": [1], "full_heads": {"0": [1]}, "layers": {"2-3": {"num_dense_heads": 1}}}
    config = S2Config.parse(raw, LAYERS)
    assert S2Config.parse(json.loads(json.dumps(asdict(config))), LAYERS) == config


@given(st.integers(0, 10_000), st.sampled_from([16, 32, 64, 128]), st.integers(0, 10_000))
def test_blocks_hold_no_fewer_tokens_than_asked_for(tokens: int, block_size: int, query: int) -> None:
    window, sinks = local_blocks_of(tokens, block_size), sink_blocks_of(tokens, block_size)
    first = max(0, query // block_size - window + 1) * block_size
    assert first <= max(0, query - tokens)
    assert sinks * block_size >= tokens
    # With a block less, a query that is the first of its block, or the last sink, would miss some.
    assert not tokens or (window - 2) * block_size < tokens
    assert (sinks - 1) * block_size < max(1, tokens)


HEADWISE: dict[str, Any] = {
    "sink_token_num": 4,
    "swa_token_num": 8192,
    "seqlen_threshold": 16384,
    "0": [0, 0, 0, 1, 0, 0, 0, 0],
    "1": [1] * 8,
    "2": [0] * 8,
}
"""For 8 query heads; a layer without a list has retrieval heads only."""


def test_headwise_config() -> None:
    config = find_config({"headwise_config": HEADWISE}, LAYERS)
    assert config is not None
    assert config.dense_layers == (1, 3)
    found = config.layer_patterns(8, 4, LAYERS)
    streaming = {"local_blocks": 129, "vert_stride": None, "sink_blocks": 1}
    assert found == {
        0: S2Pattern.build(8, 4, full_heads=[1], **streaming),
        2: S2Pattern.build(8, 4, **streaming),
    }
    # The same heads, of which each has a KV head of its own.
    assert config.layer_patterns(8, 8, LAYERS)[0].full_heads == (3,)
    with pytest.raises(S2ConfigError, match=r"^headwise_config: layers that differ, expected one pattern"):
        config.pattern(8, 4)


def test_headwise_config_of_one_kv_head() -> None:
    config = find_config({"headwise_config": {"0": [0] * 7 + [1], "1": [0] * 8}}, LAYERS)
    assert config is not None
    assert {i: p.full_heads for i, p in config.layer_patterns(8, 1, LAYERS).items()} == {0: (0,), 1: ()}


@pytest.mark.parametrize(
    ("change", "local_blocks", "sink_blocks"),
    [
        ({"swa_token_num": 256, "sink_token_num": 64}, 5, 1),
        ({"swa_token_num": 257, "sink_token_num": 65}, 6, 2),
        ({"swa_token_num": 1, "sink_token_num": 0}, 2, 0),
        ({"swa_token_num": 8192, "sink_token_num": 4}, 129, 1),
    ],
    ids=str,
)
def test_headwise_tokens_become_blocks(change: dict[str, int], local_blocks: int, sink_blocks: int) -> None:
    config = find_config({"headwise_config": HEADWISE | change}, LAYERS)
    assert config is not None
    assert (config.local_blocks, config.sink_blocks) == (local_blocks, sink_blocks)


def test_headwise_defaults() -> None:
    given_all = find_config({"headwise_config": HEADWISE}, LAYERS)
    lists = {key: value for key, value in HEADWISE.items() if key.isdecimal()}
    assert find_config({"headwise_config": lists}, LAYERS) == given_all


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], ": [1], expected an object with a list for each layer"),
        (HEADWISE | {"swa_token_num": 0}, ".swa_token_num: 0, expected an integer of at least 1"),
        (HEADWISE | {"sink_token_num": True}, ".sink_token_num: True, expected an integer of at least 0"),
        (HEADWISE | {"4": [0]}, ".4: no such layer, expected layers from 0 to 3"),
        (HEADWISE | {"3": 0}, ".3: 0, expected a list with 0 or 1 for each query head"),
        (HEADWISE | {"3": []}, ".3: [], expected a list with 0 or 1 for each query head"),
        (HEADWISE | {"3": [0, 2]}, ".3: 2, expected 0 or 1 for each query head"),
        ({"0": [1, 1]}, ": all 4 layers, expected at least one sparse layer"),
        (
            {"swa_token_num": 64, "sink_token_num": 200, "0": [0]},
            ".sink_token_num: 4, expected at most the 2",
        ),
    ],
    ids=str,
)
def test_wrong_headwise_config(raw: Any, message: str) -> None:
    with pytest.raises(S2ConfigError) as caught:
        find_config({"headwise_config": raw}, LAYERS)
    assert str(caught.value).startswith(f"headwise_config{message}")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"0": [0] * 7}, ".0: 7 values, expected one for each of the 8 query heads"),
        ({"0": [0, 1] * 4}, ": all 4 KV heads of every sparse layer, expected one that is not full"),
    ],
    ids=str,
)
def test_headwise_lists_that_do_not_fit_the_heads(lists: dict[str, Any], message: str) -> None:
    config = find_config({"headwise_config": lists}, LAYERS)
    assert config is not None
    with pytest.raises(S2ConfigError) as caught:
        config.layer_patterns(8, 4, LAYERS)
    assert str(caught.value) == f"headwise_config{message}"


def test_two_statements_of_a_pattern_are_refused() -> None:
    both = {"s2_attention": GOOD, "headwise_config": HEADWISE}
    message = "^s2_attention: given beside headwise_config, expected one of the two"
    with pytest.raises(S2ConfigError, match=message):
        find_config(both, LAYERS)
    ours, theirs = (SimpleNamespace(**{key: value}) for key, value in both.items())
    for parts in ((ours, theirs), (theirs, ours)):
        with pytest.raises(S2ConfigError, match=message):
            find_model_config(*parts, LAYERS)
    assert find_config(both | {"headwise_config": None}, LAYERS) == S2Config(4, 8)
    assert isinstance(find_config(both | {"s2_attention": None}, LAYERS), kernels_config.HeadwisePattern)


def test_what_states_a_pattern() -> None:
    assert states_pattern(SimpleNamespace(s2_attention={}))
    assert states_pattern(SimpleNamespace(headwise_config=HEADWISE))
    assert not states_pattern(SimpleNamespace(s2_attention=None))
    assert not states_pattern(None)


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
        "sink_blocks": 0,
        "full_heads": (),
        "num_dense_heads": 0,
        "layers": {},
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
        ("blocksparse_vert_stride", None),
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
