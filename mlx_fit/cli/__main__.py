"""``python -m mlx_fit.cli`` is ``mlx-fit``."""

import sys

from mlx_fit.cli import main

sys.exit(main())
