"""`python -m vllm_powerquant.cli`."""

import sys

from . import main

sys.exit(main())
