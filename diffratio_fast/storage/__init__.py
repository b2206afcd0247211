"""Safe writing of own files and safe reading of foreign ones."""
