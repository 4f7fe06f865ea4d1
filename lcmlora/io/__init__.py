"""Files, texts and processes, safely: atomic writes, bounded readers, masked secrets, isolated workers."""
