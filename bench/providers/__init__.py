"""The providers, one file per project or task. Importing this package registers all of them.

The order of the imports is that of the rows in a table.
"""

from . import plain, trl, liger, gpu, fused, gae, tile  # noqa: F401, I001
