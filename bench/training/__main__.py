"""``python -m logitless.bench.training``"""

from .cli import main

raise SystemExit(main())
