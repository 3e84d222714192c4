"""New weights for a running engine, a few tensors to a call, as trainers push them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.engine.engines import engine, greedy, model
from tests.phi3_small.checkpoints import CONFIG, random_prompts, random_weights, save_weights, write_config
from tests.phi3_small.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from vllm import LLM

Weights = dict[str, torch.Tensor]

NUM_TOKENS = 8
PROMPTS = random_prompts([5, 333], seed=8)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("old"), random_weights(CONFIG, seed=0))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("new"), new_weights())


@pytest.fixture(scope="module")
def old_tokens(old: Path) -> list[list[int]]:
    return _expected(old)


@pytest.fixture(scope="module")
def new_tokens(new: Path) -> list[list[int]]:
    """The oracle's: an engine started on the new weights generates these."""
    return _expected(new)


@pytest.fixture(scope="module")
def llm(old: Path) -> Iterator[LLM]:
    with engine(old) as llm:
        yield llm


def new_weights() -> Weights:
    return random_weights(CONFIG, seed=1)


def one_tensor_to_a_call(llm: LLM) -> None:
    _transfer(llm, ([tensor] for tensor in new_weights().items()))


def buckets(llm: LLM) -> None:
    """Cut where it happens, within layers too."""
    tensors = list(new_weights().items())
    _transfer(llm, (tensors[i : i + 7] for i in range(0, len(tensors), 7)))


def a_state_dict_with_the_tied_head(llm: LLM) -> None:
    weights = new_weights()
    state = {"lm_head.weight": weights["model.embed_tokens.weight"], **weights}
    _transfer(llm, ([tensor] for tensor in state.items()))


def reload_rpc(llm: LLM) -> None:
    """vLLM's own call. What it is given of a module it takes for the whole: a weight goes with its bias."""
    modules: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, weight in new_weights().items():
        modules.setdefault(name.rpartition(".")[0], []).append((name, weight))
    for tensors in modules.values():
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})


UPDATES = [one_tensor_to_a_call, buckets, a_state_dict_with_the_tied_head, reload_rpc]


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_running_engine_generates_what_the_new_weights_do(
    llm: LLM, old_tokens: list[list[int]], new_tokens: list[list[int]], update: Callable[[LLM], None]
) -> None:
    llm.collective_rpc("reload_weights")
    assert _greedy(llm) == old_tokens != new_tokens
    update(llm)
    assert _greedy(llm) == new_tokens


def test_engine_that_has_started_without_weights(old: Path, new_tokens: list[list[int]]) -> None:
    """Trainers start one so: the first tensors it loads are a bucket."""
    with engine(old, load_format="dummy") as llm:
        buckets(llm)
        assert _greedy(llm) == new_tokens


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.3.self_attn.dense.weight", (256, 256)),
        ("model.layers.1.mlp.down_proj.weight", (256, 1)),
    ],
    ids=["unknown", "shape"],
)
def test_wrong_tensor_is_named_later_too(llm: LLM, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=name):
        model(llm).load_weights([(name, torch.zeros(shape))])


def _transfer(llm: LLM, calls: Iterable[list[tuple[str, torch.Tensor]]]) -> None:
    """What vLLM's weight transfer engines do between `start_weight_update` and `finish_weight_update`."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model(llm))
    for tensors in calls:
        model(llm).load_weights(tensors)
    finalize_layerwise_reload(model(llm), llm.llm_engine.vllm_config.model_config)


def _greedy(llm: LLM) -> list[list[int]]:
    """With the current weights: what the cache holds is of the ones before."""
    assert llm.reset_prefix_cache()
    return greedy(llm, PROMPTS, NUM_TOKENS)


def _save(folder: Path, weights: Weights) -> Path:
    write_config(folder, CONFIG)
    save_weights(folder, weights)
    return folder


def _expected(folder: Path) -> list[list[int]]:
    oracle = Oracle(folder)
    return [oracle.greedy(prompt, NUM_TOKENS)[0] for prompt in PROMPTS]
