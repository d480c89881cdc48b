"""The losses as pure functions of :class:`~logitless.fused.preference.loss.Pairs` or ``Sequences``: one file a family.

Nobody writes a derivative: the engine asks autograd for the coefficient of each token.
"""
