"""Rows of data as people have them, read as prompts: messages, columns, files, and what cannot be used."""
