"""`python -m turboquant.cli` is the command `turboquant`, for a checkout that is not installed."""

from turboquant.cli import main

raise SystemExit(main())
