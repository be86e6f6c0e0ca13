"""`python -m deit_fast` is `deit-fast`: for launchers that take a module."""

import sys

from deit_fast.cli.main import main

sys.exit(main())
