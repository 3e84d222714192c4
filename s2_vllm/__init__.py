"""s2-vllm: serves S2-Attention models on unmodified vLLM."""


def register() -> None:
    """The `vllm.general_plugins` entry point; vLLM calls it in every process it starts.

    It imports no kernel, no model and touches no device: all work waits until a model has a pattern.
    """
    from s2_vllm.compat import install

    install()
