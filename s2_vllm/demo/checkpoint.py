"""The demo's checkpoints of Llamas with S2-Attention: a trained one, and one with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2_vllm.demo.corpus import project_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINED = Path(__file__).parent / "model"
"""The folder of the trained one; its README.md says how it was trained."""

# Of the random one. Eight KV heads at stride 8 keep a residue each, and all blocks together.
S2_ATTENTION: dict[str, Any] = {
    "block_size": 64,
    "local_blocks": 4,
    "vert_stride": 8,
    "pattern_heads": "kv",
    "dense_layers": [0],
}
NUM_LAYERS = 5
NUM_HEADS = 16
NUM_KV_HEADS = 8
HEAD_SIZE = 64
MAX_POSITIONS = 16384
VOCAB_SIZE = 2048

END_OF_TEXT = "<|endoftext|>"
TURN_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_checkpoint(directory: Path, seed: int = 0) -> None:
    """Write the random one's config.json, model.safetensors and tokenizer, a real one, to `directory`.

    Args:
        directory: made if it is not there; files of the same names are overwritten.
        seed: of the weights. The same seed and the same project text give the same files.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from s2_vllm.models.families import S2LlamaConfig
    from s2_vllm.models.transformers import S2LlamaForCausalLM

    tokenizer = train_tokenizer(project_text())
    config = S2LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        # Wide enough that the attention is not flat and the next token depends on the context.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        s2_attention=S2_ATTENTION,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = S2LlamaForCausalLM(config)
    disable_progress_bar()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most VOCAB_SIZE tokens: any text is encoded and decoded exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, *TURN_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
