"""Whole training steps of models with random weights: TRL's trainers as they are, on ``patch()``, and our own modules.

``python -m logitless.bench.training --list`` says what there is: suites (``suites``) of cases (``cases``), each a model
(``models``), a method (``methods``) and a batch (``batches``), run by several arms (``arms``) that take turns.
"""
