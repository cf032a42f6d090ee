"""`python -m mytune` is the `tune` command."""

from mytune.cli.main import main

raise SystemExit(main())
