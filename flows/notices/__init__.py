"""Telling people: the text of a message, its delivery to each receiver, what waits for one, what was told already."""
