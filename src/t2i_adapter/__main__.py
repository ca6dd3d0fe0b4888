"""`python -m t2i_adapter`: the same as the command `t2i-adapter`."""

import sys

from t2i_adapter.cli import main

sys.exit(main())
