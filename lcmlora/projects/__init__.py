"""Projects of one's own: the files that `lcmlora init` and `lcmlora upgrade` write, and what they are made from."""
