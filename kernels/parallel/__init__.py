"""A head whose weight is sharded over its vocabulary, one shard per rank of a process group.

``vocab_parallel``: what a caller passes, and what ranks agree on. ``collectives``: communication. ``backend``: a backend that
scores a shard. ``dtensor``: shards given as a DTensor.
"""
