"""``python -m logitless.bench``"""

from .cli import main

raise SystemExit(main())
