"""What `deit-fast bench`, `tune` and `gpu` time, and what `deit-fast demo` compares."""
