"""Research studies: each is a command and writes the tables and figures of a page in docs/."""
