"""Preference losses as pure functions of :class:`~logitless.fused.preference.loss.Pairs` or ``Sequences``, one file per family.

Their derivatives, one coefficient per token, come from autograd.
"""
