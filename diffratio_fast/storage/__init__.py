"""Atomic writing of files, and safe reading of untrusted files."""
