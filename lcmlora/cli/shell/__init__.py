"""What a shell sees of the command line: the list of verbs, hints, completion, errors."""
