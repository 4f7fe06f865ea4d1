"""Who made a release, and whether it is the newest: signatures, signed records, what was seen before."""
