"""What sharding the context among heads costs a model: small ones trained and served, with and without it.

    python -m benchmarks.quality train --arm s2          # some minutes on a GPU
    python -m benchmarks.quality evaluate                # every arm that has been trained, served by vLLM
    python -m benchmarks.plot benchmarks/results/quality.json

All arms see the same data: real text with pass keys hidden in it and asked for later. A held-out part of the
text gives the loss; pass keys at every depth of contexts of every length show what a model still finds.
"""
