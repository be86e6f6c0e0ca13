"""The `deit-fast` command."""
