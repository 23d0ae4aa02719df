"""``python -m customized_grpo`` is ``cgrpo``."""

import sys

from customized_grpo.cli.main import main

sys.exit(main())
