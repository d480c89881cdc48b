"""Whole training steps of models with random weights: TRL's trainers as they are, with ``patch()``, and our own modules.

``python -m logitless.bench.training --list`` names the suites (``suites``) and their cases (``cases``). A case is a model
(``models``), a method (``methods``) and a batch (``batches``); several arms (``arms``) run it in turns.
"""
