"""Files, texts and processes, safely: atomic writes, bounded readers, isolated workers."""
