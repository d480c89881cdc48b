"""Preference training: DPO, IPO, SimPO, CPO, ORPO, KTO and their variants, sums of objectives, and losses of your own."""
