"""A config.json as the command reads it, against vLLM's own reading."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from transformers import CONFIG_MAPPING, CLIPVisionConfig, LlamaConfig, LlavaConfig
from vllm.config import ModelConfig
from vllm.config.model import _get_and_verify_max_len
from vllm.transformers_utils.config import patch_rope_parameters
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from s2_kernels.config import S2Config, S2ConfigError
from s2_vllm.hf_config import HFConfig, read_config
from s2_vllm.plan import ModelGeometry
from tests.hf_configs import LLAMA, REFUSED, S2, read, refusal, served_types

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@pytest.fixture(params=["transformers", "plain"])
def _reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With transformers' classes, and as if transformers were not installed."""
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "transformers", None)


both_readers = pytest.mark.usefixtures("_reader")


def error(folder: Path, config: dict[str, Any], overrides: dict[str, Any] | None = None) -> str:
    """What is said against `config` when it is read."""
    with pytest.raises(S2ConfigError) as caught:
        read(folder, config, overrides)
    return str(caught.value)


ACCEPTED = served_types().items() - {
    (kind, served_types()[kind]) for kind in " ".join(REFUSED.values()).split()
}


@pytest.mark.parametrize(("model_type", "architecture"), sorted(ACCEPTED))
def test_every_model_type_is_read_as_vllm_reads_it(
    model_type: str, architecture: str, tmp_path: Path
) -> None:
    config = CONFIG_MAPPING[model_type](architectures=[architecture])
    config.save_pretrained(tmp_path)
    ours = read_config(tmp_path, {})
    if model_type == "nemotron":  # vLLM takes no nemotron that does not name its KV heads
        config.num_key_value_heads = config.num_attention_heads
    text = config.get_text_config()
    patch_rope_parameters(text)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    theirs = convertor(config, text).convert()
    assert ours.geometry(2) == ModelGeometry(
        theirs.total_num_hidden_layers,
        theirs.total_num_attention_heads,
        theirs.total_num_kv_heads,
        theirs.head_size,
        2,
    )
    for asked in (None, 1000):
        assert ours.max_model_len(asked) == _get_and_verify_max_len(text, theirs, None, asked, False, None)


@both_readers
@pytest.mark.parametrize(
    ("config", "heads_and_size", "length"),
    [
        pytest.param(LLAMA, (3, 4, 2, 24), 4096, id="llama"),
        pytest.param(LLAMA | {"head_dim": 40}, (3, 4, 2, 40), 4096, id="head_dim"),
        pytest.param(LLAMA | {"head_dim": None}, (3, 4, 2, 24), 4096, id="head_dim-null"),
        pytest.param(LLAMA | {"head_dim": 0}, (3, 4, 2, 24), 4096, id="head_dim-0"),
        pytest.param(LLAMA | {"num_key_value_heads": None}, (3, 4, 4, 24), 4096, id="kv-heads-null"),
        pytest.param(
            {"model_type": "gpt2", "n_layer": 5, "n_head": 6, "n_embd": 96, "n_positions": 512},
            (5, 6, 6, 16),
            512,
            id="gpt2",
        ),
        pytest.param(
            {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False}
            | {"num_hidden_layers": 2, "num_attention_heads": 71, "hidden_size": 4544}
            | {"max_position_embeddings": 2048},
            (2, 71, 1, 64),
            2048,
            id="falcon-7b",
        ),
        pytest.param(
            {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": True}
            | {"num_hidden_layers": 2, "num_attention_heads": 128, "hidden_size": 8192, "num_kv_heads": 8}
            | {"max_position_embeddings": 2048},
            (2, 128, 8, 64),
            2048,
            id="falcon-40b",
        ),
        pytest.param(
            {"model_type": "dbrx", "n_layers": 4, "n_heads": 6, "d_model": 96, "max_seq_len": 1024}
            | {"attn_config": {"kv_n_heads": 3}},
            (4, 6, 3, 16),
            1024,
            id="dbrx",
        ),
        pytest.param(
            {"model_type": "falcon", "multi_query": False, "num_hidden_layers": 2}
            | {"num_attention_heads": 71, "hidden_size": 4544, "max_position_embeddings": 2048}
            | {"num_kv_heads": 71},
            (2, 71, 71, 64),
            2048,
            id="falcon-multi-head",
        ),
        pytest.param(
            {"model_type": "nobody-knows-it", "n_layers": 2, "n_heads": 4, "d_model": 64}
            | {"multi_query_group_num": 2, "hidden_size_per_head": 20, "seq_length": 99},
            (2, 4, 2, 20),
            99,
            id="unknown-type",
        ),
        pytest.param(
            {"model_type": "llava", "text_config": LLAMA, "vision_config": {}},
            (3, 4, 2, 24),
            4096,
            id="text_config",
        ),
        pytest.param(
            {"model_type": "nobody-knows-it", "llm_config": LLAMA}, (3, 4, 2, 24), 4096, id="llm_config"
        ),
        pytest.param(
            LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}}, (3, 4, 2, 24), 10240, id="linear"
        ),
        pytest.param(
            LLAMA | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            (3, 4, 2, 24),
            8192,
            id="dynamic",
        ),
        pytest.param(
            LLAMA
            | {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            (3, 4, 2, 24),
            4096,
            id="llama3",
        ),
        pytest.param(LLAMA | {"model_max_length": 777}, (3, 4, 2, 24), 777, id="model_max_length"),
        pytest.param(LLAMA | {"seq_length": 50}, (3, 4, 2, 24), 50, id="the-smallest-length"),
    ],
)
def test_geometry_and_length(
    config: dict[str, Any], heads_and_size: tuple[int, ...], length: int, tmp_path: Path
) -> None:
    found = read(tmp_path, config)
    assert found.geometry(2) == ModelGeometry(*heads_and_size, dtype_bytes=2)
    assert found.max_model_len(None) == length
    assert found.max_model_len(length) == length
    assert found.max_model_len(1) == 1
    with pytest.raises(
        S2ConfigError, match=rf"^--max-model-len: {length + 1}, expected at most {length} \(config.json, "
    ):
        found.max_model_len(length + 1)


def test_the_key_of_the_length_is_named(tmp_path: Path) -> None:
    for keys, name in [({}, "max_position_embeddings"), ({"seq_length": 50}, "seq_length")]:
        with pytest.raises(S2ConfigError, match=rf"^--max-model-len: 9999, .* \(config.json, {name}\)$"):
            read(tmp_path, LLAMA | keys).max_model_len(9999)


@both_readers
def test_a_long_rope_serves_its_original_length_unless_asked(tmp_path: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 12, "long_factor": [1.0] * 12}
    config = LLAMA | {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "rope_scaling": scaling,
        "original_max_position_embeddings": 256,
        "pad_token_id": None,
    }
    found = read(tmp_path, config)
    assert found.max_model_len(None) == 256
    assert found.max_model_len(4096) == 4096


def unknown_type(without: str, **keys: Any) -> HFConfig:
    """Llama's keys under a type that no class knows: all but `without`, and `keys`."""
    kept = {key: value for key, value in LLAMA.items() if key != without}
    config = SimpleNamespace(**kept | {"model_type": "nobody-knows-it"} | keys)
    return HFConfig(config, config)


@pytest.mark.parametrize(
    ("without", "name"),
    [
        *(("num_hidden_layers", name) for name in ("n_layer", "n_layers", "num_layers")),
        *(("num_attention_heads", name) for name in ("n_head", "n_heads")),
        *(("hidden_size", name) for name in ("n_embd", "d_model")),
    ],
)
def test_other_names_where_no_class_maps_them(without: str, name: str, tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != without}
    found = read(tmp_path, config | {"model_type": "nobody-knows-it", name: LLAMA[without]})
    assert found.geometry(2) == ModelGeometry(3, 4, 2, 24, 2)
    # The common name goes first.
    found = read(tmp_path, LLAMA | {"model_type": "nobody-knows-it", name: 7})
    assert found.geometry(2) == ModelGeometry(3, 4, 2, 24, 2)


def test_names_of_kv_heads_and_lengths_are_those_that_vllm_looks_for() -> None:
    """vLLM's own functions say which keys they ask a configuration for, and in which order."""
    asked: list[str] = []

    class Recorder:
        num_attention_heads = 4

        def __getattr__(self, name: str) -> None:
            asked.append(name)
            raise AttributeError(name)

    convertor = ModelArchConfigConvertorBase(Recorder(), Recorder())
    assert convertor.get_total_num_kv_heads() == 4
    kv_heads = list(asked)
    asked.clear()
    convertor.derive_max_model_len_and_key()
    lengths = set(asked)
    assert {"num_key_value_heads", "num_attention_groups"} <= set(kv_heads)
    assert {"max_position_embeddings", "seq_len"} <= lengths
    for n, name in enumerate(kv_heads):
        later = dict.fromkeys(kv_heads[n + 1 :], 4)
        assert unknown_type("num_key_value_heads", **later, **{name: 2}).geometry(2).num_kv_heads == 2, name
    for name in lengths:
        assert unknown_type("max_position_embeddings", **{name: 77}).max_model_len(None) == 77, name


def test_a_model_without_names() -> None:
    """Its class is named after its type, where the file says so much; a type that is not there is empty."""
    for keys, architecture, model_type in [
        ({"architectures": ["A", "B"], "model_type": "a"}, "A", "a"),
        ({"architectures": [], "model_type": "a"}, "a", "a"),
        ({"architectures": None}, "None", ""),
        ({}, "None", ""),
    ]:
        found = HFConfig(SimpleNamespace(**keys), SimpleNamespace(model_type="of the text part"))
        assert (found.architecture, found.model_type) == (architecture, model_type)


def test_which_of_several_lengths_counts() -> None:
    """Command R's own key before all others, or else the smallest; a long rope's own where it has one."""
    rope = {"rope_type": "longrope"}
    original = {"original_max_position_embeddings": 300}
    for keys, length in [
        ({"model_max_length": 5000}, 5000),
        ({"model_max_length": 5000, "seq_length": 50}, 5000),
        ({"n_positions": 5000, "seq_length": 50}, 50),
        ({"rope_parameters": rope}, 4096),
        (original, 4096),
        ({"rope_parameters": rope} | original, 300),
        ({"rope_parameters": {"type": "su"}} | original, 300),
    ]:
        assert unknown_type("", **keys).max_model_len(None) == length, keys


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ("linear", 1000),
        ("dynamic", 1000),
        *((kind, 100) for kind in ("su", "longrope", "llama3", "yarn")),
        *((kind, 100) for kind in ("deepseek_yarn", "deepseek_llama_scaling")),
    ],
)
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_ropes_whose_factor_is_in_the_length(kind: str, length: int, key: str) -> None:
    rope = {key: kind, "factor": 10.0}
    assert unknown_type("", max_position_embeddings=100, rope_parameters=rope).max_model_len(None) == length


@both_readers
def test_a_model_without_a_length(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    found = read(tmp_path, config | {"model_type": "nobody-knows-it"})
    assert found.max_model_len(123) == 123
    with pytest.raises(S2ConfigError) as caught:
        found.max_model_len(None)
    assert str(caught.value) == "--max-model-len: missing, expected a number (config.json names none)"


def test_lengths_of_gemma3_are_scaled_already() -> None:
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}
    keys = {"max_position_embeddings": 100, "rope_parameters": rope}
    for model_type, length in [("gemma3_text", 100), ("llama", 800)]:
        config = SimpleNamespace(model_type=model_type, **keys)
        assert HFConfig(config, config).max_model_len(None) == length


def test_a_layer_whose_rope_has_no_factor_leaves_that_of_others() -> None:
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "other": {"rope_type": "default"}}
    assert unknown_type("", max_position_embeddings=100, rope_parameters=ropes).max_model_len(None) == 800


@pytest.mark.parametrize("rope", [None, {}, [], "linear", {"rope_type": "linear", "factor": None}], ids=str)
def test_a_rope_without_a_factor(rope: Any) -> None:
    config = SimpleNamespace(max_position_embeddings=100, rope_parameters=rope)
    assert HFConfig(config, config).max_model_len(None) == 100


@both_readers
@pytest.mark.parametrize(
    ("keys", "fact"),
    [
        pytest.param({"sliding_window": 64}, "has a sliding window (64 tokens)", id="llama"),
        pytest.param(
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2, "model_type": "qwen2"},
            "has a sliding window (64 tokens)",
            id="qwen2-last-layer",
        ),
        pytest.param(
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3, "model_type": "qwen2"},
            None,
            id="qwen2-after-the-last-layer",
        ),
        pytest.param(
            {"use_sliding_window": False, "sliding_window": 64, "model_type": "qwen2"}, None, id="qwen2-off"
        ),
        pytest.param({"sliding_window": 64, "model_type": "qwen3"}, None, id="qwen3-by-default"),
        pytest.param({"sliding_window": 64, "model_type": "s2_qwen3"}, None, id="s2_qwen3-by-default"),
        pytest.param({"sliding_window": None, "model_type": "mistral"}, None, id="mistral-null"),
    ],
)
def test_whether_a_window_is_in_use(keys: dict[str, Any], fact: str | None, tmp_path: Path) -> None:
    assert refusal(read(tmp_path, LLAMA | keys)) == fact


def test_types_that_require_a_pattern_have_their_familys_defaults(tmp_path: Path) -> None:
    config = LLAMA | {"architectures": ["S2MistralForCausalLM"], "model_type": "s2_mistral"}
    assert refusal(read(tmp_path, config)) == "has a sliding window (4096 tokens)"


@both_readers
@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None}, "float32"),
        ({}, "float32"),
    ],
    ids=str,
)
def test_dtype(keys: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | keys).dtype_name() == name
    nested = {"model_type": "llava", "text_config": LLAMA | keys, "vision_config": {}}
    assert read(tmp_path, nested).dtype_name() == name


@both_readers
def test_the_pattern_is_looked_for_in_both_parts(tmp_path: Path) -> None:
    llava = {"model_type": "llava", "vision_config": {}}
    inner = read(tmp_path, llava | {"text_config": LLAMA | {"s2_attention": S2}})
    outer = read(tmp_path, llava | {"text_config": LLAMA, "s2_attention": S2 | {"local_blocks": 5}})
    neither = read(tmp_path, llava | {"text_config": LLAMA})
    assert inner.pattern_config() == S2Config(4, 8)
    assert outer.pattern_config() == S2Config(5, 8)
    assert neither.pattern_config() is None
    # The whole goes first, and layers are the text part's.
    both = llava | {"text_config": LLAMA | {"s2_attention": S2}, "s2_attention": S2 | {"local_blocks": 5}}
    assert read(tmp_path, both).pattern_config() == S2Config(5, 8)
    last = S2 | {"dense_layers": [2]}
    assert read(tmp_path, llava | {"text_config": LLAMA | {"s2_attention": last}}).pattern_config()
    with pytest.raises(S2ConfigError, match="expected layer indices from 0 to 2"):
        read(tmp_path, LLAMA | {"s2_attention": S2 | {"dense_layers": [3]}}).pattern_config()


@both_readers
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "mixtral"])
def test_types_that_require_a_pattern(family: str, tmp_path: Path) -> None:
    """They are read like the family they belong to: a Qwen's window is off unless it says otherwise."""
    window = 64 if family.startswith("qwen") else None
    own = {"model_type": f"s2_{family}", "sliding_window": window, "s2_attention": S2, "head_dim": 24}
    found = read(tmp_path, LLAMA | own)
    assert refusal(found) is None
    assert found.geometry(2) == ModelGeometry(3, 4, 2, 24, 2)
    assert found.pattern_config() == S2Config(4, 8)
    if sys.modules["transformers"] is not None:
        assert type(found.whole).__name__ == f"S2{family.capitalize()}Config"


@both_readers
def test_quantization(tmp_path: Path) -> None:
    scheme = {"quant_method": "compressed-tensors"}
    llava = {"model_type": "llava", "vision_config": {}, "text_config": LLAMA}
    for key in ("quantization_config", "compression_config"):
        assert read(tmp_path, LLAMA | {key: scheme}).quantization() == scheme
        assert read(tmp_path, llava | {key: scheme}).quantization() == scheme
        assert read(tmp_path, llava | {"text_config": LLAMA | {key: scheme}}).quantization() == scheme
    assert read(tmp_path, LLAMA).quantization() is None


@both_readers
def test_phi3_small(tmp_path: Path) -> None:
    config = {"model_type": "phi3small", "hidden_size": 512, "num_hidden_layers": 4} | {
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "blocksparse_vert_stride": 8,
        "blocksparse_block_size": 64,
        "blocksparse_num_local_blocks": 16,
        "blocksparse_homo_head_pattern": False,
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 512,
    }
    found = read(tmp_path, config)
    assert refusal(found) is None
    assert found.geometry(2) == ModelGeometry(4, 16, 4, 32, 2)
    pattern = found.pattern_config()
    assert pattern is not None
    assert (pattern.vert_stride, pattern.pattern_heads, pattern.dense_layers) == (8, "query", (1, 3))
    if sys.modules["transformers"] is not None:
        assert type(found.whole).__name__ == "Phi3SmallConfig"


OVERRIDES: dict[str, dict[str, Any]] = {
    "number": {"image_token_index": 7},
    "new-key": {"s2_attention": S2},
    "object-replaces-object": {"s2_attention": {"block_size": 32}},
    "nested-number": {"text_config": {"num_hidden_layers": 9}},
    "nested-new-object": {"text_config": {"s2_attention": S2}},
    "nested-object-merged": {"text_config": {"kept": {"b": 3, "c": {"d": 4}}}},
    "nested-object-for-a-number": {"text_config": {"number": {"a": 1}}},
    "nested-number-for-an-object": {"text_config": {"kept": 4}},
    "two-parts": {"text_config": {"num_attention_heads": 2}, "vision_config": {"num_hidden_layers": 5}},
    "null": {"s2_attention": None},
}


def nested_config() -> PreTrainedConfig:
    text = LlamaConfig(**{k: v for k, v in LLAMA.items() if k not in ("architectures", "model_type")})
    text.kept = {"a": 1, "b": 2, "c": {"e": 5}}
    text.number = 4
    config = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(num_hidden_layers=2))
    config.s2_attention = S2 | {"block_size": 16}
    return config


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
def test_overrides_are_applied_as_vllm_applies_them(overrides: dict[str, Any], tmp_path: Path) -> None:
    nested_config().save_pretrained(tmp_path)
    given = deepcopy(overrides)
    ours = read_config(tmp_path, overrides).whole
    assert overrides == given
    theirs = type(ours).from_pretrained(tmp_path)
    theirs.update({key: value for key, value in overrides.items() if not isinstance(value, dict)})
    dicts = {key: value for key, value in overrides.items() if isinstance(value, dict)}
    ModelConfig._apply_dict_overrides(object.__new__(ModelConfig), theirs, deepcopy(dicts))
    drop = {"transformers_version", "_name_or_path"}
    assert {k: v for k, v in ours.to_dict().items() if k not in drop} == {
        k: v for k, v in theirs.to_dict().items() if k not in drop
    }


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
def test_overrides_without_transformers(
    overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads(nested_config().to_json_string(use_diff=False))
    with_classes = read(tmp_path, raw, overrides)
    monkeypatch.setitem(sys.modules, "transformers", None)
    without = read(tmp_path, raw, overrides)
    for key in ("s2_attention", "image_token_index"):
        assert getattr(without.whole, key) == getattr(with_classes.whole, key)
    for key in ("s2_attention", "num_hidden_layers", "num_attention_heads", "kept", "number"):
        assert getattr(without.text, key, None) == getattr(with_classes.text, key, None)


def test_overrides_of_a_part_within_a_part(tmp_path: Path) -> None:
    CONFIG_MAPPING["qwen2_5_omni"]().save_pretrained(tmp_path)
    plain = read_config(tmp_path, {}).whole.thinker_config.text_config
    overrides = {"thinker_config": {"text_config": {"num_hidden_layers": 9}}}
    text = read_config(tmp_path, overrides).whole.thinker_config.text_config
    assert plain.num_hidden_layers != 9
    assert text.to_dict() == plain.to_dict() | {"num_hidden_layers": 9}


@both_readers
def test_an_override_of_the_type_decides_how_the_file_is_read(tmp_path: Path) -> None:
    overrides = {"model_type": "qwen2", "sliding_window": 64}
    assert read(tmp_path, LLAMA, overrides).text.sliding_window in (64, None)
    assert refusal(read(tmp_path, LLAMA | {"sliding_window": 64}, {"model_type": "qwen2"})) is None


@both_readers
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers: None, expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0, expected a positive integer"),
        ({"hidden_size": "96"}, "hidden_size: '96', expected a positive integer"),
        ({"max_position_embeddings": True}, "max_position_embeddings: True, expected a positive integer"),
        ({"num_key_value_heads": -1}, "num_key_value_heads: -1, expected a positive integer"),
        ({"head_dim": 1.5}, "head_dim: 1.5, expected a positive integer"),
    ],
    ids=str,
)
def test_what_is_no_count(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert error(tmp_path, LLAMA | keys) == message
    assert error(tmp_path, LLAMA, keys) == message
    llava = {"model_type": "llava", "vision_config": {}}
    assert error(tmp_path, llava | {"text_config": LLAMA | keys}) == message
    assert error(tmp_path, llava | {"text_config": LLAMA}, {"text_config": keys}) == message


@pytest.mark.parametrize("keys", [{"text_config": None}, {"vision_config": {"hidden_size": 0}}], ids=str)
def test_what_is_no_count_where_no_text_is(keys: dict[str, Any], tmp_path: Path) -> None:
    found = read(tmp_path, LLAMA | {"model_type": "nobody-knows-it"} | keys)
    assert found.geometry(2) == ModelGeometry(3, 4, 2, 24, 2)


@pytest.mark.parametrize("model_type", [None, ["llama"], {}, 3, "", "s2_", "s2_nobody"], ids=str)
def test_a_type_that_nobody_knows(model_type: Any, tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"model_type": model_type}).geometry(2) == ModelGeometry(3, 4, 2, 24, 2)


def test_keys_that_a_known_type_may_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    falcon = read(tmp_path, LLAMA | {"model_type": "RefinedWebModel", "multi_query": True})
    assert falcon.geometry(2).num_kv_heads == 1
    falcon = read(tmp_path, LLAMA | {"model_type": "RefinedWeb", "multi_query": True})
    assert falcon.geometry(2).num_kv_heads == 1
    assert read(tmp_path, LLAMA | {"model_type": "RefinedWeb"}).geometry(2).num_kv_heads == 2
    assert read(tmp_path, LLAMA | {"model_type": "llama", "multi_query": True}).geometry(2).num_kv_heads == 2
    assert read(tmp_path, LLAMA | {"model_type": "dbrx"}).geometry(2).num_kv_heads == 2
    dbrx = LLAMA | {"attn_config": {"kv_n_heads": 4}}
    assert read(tmp_path, dbrx | {"model_type": "dbrx"}).geometry(2).num_kv_heads == 4
    assert read(tmp_path, dbrx).geometry(2).num_kv_heads == 2
    with pytest.raises(S2ConfigError, match=r"^attn_config.kv_n_heads: 0, expected a positive integer$"):
        read(tmp_path, LLAMA | {"model_type": "dbrx", "attn_config": {"kv_n_heads": 0}}).geometry(2)


def test_what_is_missing(tmp_path: Path) -> None:
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        config = {k: v for k, v in LLAMA.items() if k != key}
        with pytest.raises(S2ConfigError) as caught:
            read(tmp_path, config | {"model_type": "nobody-knows-it"}).geometry(2)
        assert str(caught.value) == f"{key}: None, expected a positive integer"


def test_what_a_class_does_not_take(tmp_path: Path) -> None:
    message = error(tmp_path, LLAMA | {"attention_dropout": "much"})
    assert message.startswith(f"{tmp_path / 'config.json'}: Validation error for field 'attention_dropout'")
    assert message.endswith(", expected what LlamaConfig takes")
    assert "\n" not in message
    message = error(tmp_path, LLAMA, {"attention_dropout": "much"})
    assert message.endswith(", expected what LlamaConfig takes")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte, expected JSON"),
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1), expected JSON"),
        (b"[{}]", "list, expected a JSON object"),
        (b"null", "NoneType, expected a JSON object"),
    ],
    ids=str,
)
def test_what_is_no_json_object(content: bytes, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(S2ConfigError) as caught:
        read_config(tmp_path, {})
    assert str(caught.value) == f"{file}: {problem}"


def test_floats_that_json_does_not_have(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA | {"model_type": "nobody-knows-it", "x": {"__float__": "-Infinity"}})
    assert config.whole.x == float("-inf")
    config = read(tmp_path, LLAMA | {"model_type": "nobody-knows-it", "x": {"__float__": "1", "y": 2}})
    assert config.whole.x == {"__float__": "1", "y": 2}


def test_the_file_is_left_alone(tmp_path: Path) -> None:
    read(tmp_path, LLAMA, {"num_hidden_layers": 2})
    assert json.loads((tmp_path / "config.json").read_text()) == LLAMA


def test_the_file_or_its_folder(tmp_path: Path) -> None:
    read(tmp_path, LLAMA)
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert read_config(tmp_path / "other.json", {}).architecture == "LlamaForCausalLM"
    with pytest.raises(OSError, match=r"config\.json"):
        read_config(tmp_path, {})
