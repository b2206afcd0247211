"""What to run on a GPU, each in one command of bounded time: see docs/performance.md."""
