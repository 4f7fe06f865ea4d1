"""The containers that captioned pictures come in, read within limits: folders, tables, tar files."""
