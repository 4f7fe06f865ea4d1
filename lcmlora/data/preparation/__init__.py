"""How `prepare` reads a source shard by shard, and merges what it has found."""
