"""What the registry's servers are asked before they are trusted: their version, their answers, their artifacts."""
