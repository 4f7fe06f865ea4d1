"""`lcmlora <verb>`: one module for each group of verbs."""
