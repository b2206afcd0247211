"""Research studies: each is a command that writes the tables and figures of a page in docs/."""
