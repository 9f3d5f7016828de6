"""The stages, each a thin layer of Ray over `layered_model`: prepare, train, evaluate, sample, and the demo of all four.

A stage reads directories and writes directories, and knows no other stage. Run one with ``layered train --preset demo``,
``python -m pipelines.train --preset demo`` or ``ray job submit -- python -m pipelines.train --preset demo``.
"""
