"""The `tune` command, one file per verb; imports no torch."""
